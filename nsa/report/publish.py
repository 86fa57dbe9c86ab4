"""What of a study goes into a repository beside its report, without paths of the machine it ran on: study.json with the
configs, and records.tar.xz with what the report has read of every run, as run directories without checkpoints.

published.py reads it back. Numbers that endpoints, intervals and layers.csv are computed from keep every digit; what is
drawn alone is thinned.
"""
from __future__ import annotations

import copy
import hashlib
import io
import json
import lzma
import math
from pathlib import PurePath
import re
import tarfile

import numpy as np

from nsa.report import endpoints
from nsa.report.runs import Run, Study

RECORDS = "records.tar.xz"
LINES = 500                        # of metrics.jsonl per seed that are kept at least; fewer than twice as many, and a few
_FIELDS = {                        # that the report reads
    "language": ("split", "document", "bits_per_byte", "bytes", "second_half_bits_per_byte", "second_half_bytes"),
    "position": ("start", "end", "bits_per_byte", "bytes"),
    "task": ("task", "exact_match", "answer_nll", "evidence_distance"),
    "layer": ("layer", *endpoints.LAYER),
    "heat": ("layer", "kv_head", "document", "heat"),
}
_WRITTEN = ("block_recall", "score_recall", "entropy")  # of a layer in layers.csv, to 4 digits, and nowhere else


def description(study: Study, files: dict[str, bytes]) -> dict:
  """What was asked, the config of every arm (of its first run, with all seeds), the software it ran with, and the SHA-256 of
  the files that belong together."""
  arms, directories = {}, {run.name: run.arm for run in study.runs}
  for run in study.runs:
    if not run.config:
      continue
    name = run.arm if len(study.sizes) == 1 else f"{run.arm}-{run.size}"
    if name not in arms:
      arms[name] = without_machine(run.config, directories)
      arms[name]["seeds"] = []
    arms[name]["seeds"] = sorted({*arms[name]["seeds"], *run.seeds})
  versions = []
  for one in [run.versions for run in study.runs] + study.versions:
    if one and one not in versions:
      versions.append(one)
  listed = []
  for run in study.runs:
    listed.append({"run": run.name, "arm": run.arm, "size": run.size, "seeds": list(run.seeds), "status": run.status})
    if run.status == "failed":
      listed[-1]["error"] = bare(study, run.message)
    if run.problems:
      listed[-1]["problems"] = [bare(study, problem) for problem in run.problems]
    if run.rows is not None and run.versions:  # of other runs the archive says it
      listed[-1]["versions"] = versions.index(run.versions)
    if run.rows is not None and run.config and run.config["seeds"] != list(run.seeds):
      listed[-1]["trained_with"] = run.config["seeds"]
  return {"name": study.name, "question": study.question, "declared": study.declared, "reference_arm": study.reference,
          "dense_arm": study.dense, "budgets": study.budgets, "primary": {"metric": study.primary, "margin": study.margin},
          "secondary": {"metric": study.secondary, "margin": study.secondary_margin}, "order": study.arms,
          "runs": listed, "arms": arms, "versions": versions,
          "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}


def records(study: Study) -> bytes:
  """The archive: of every run that has left something to read, what the report reads of it. b"" where there is none.

  The same study gives the same bytes, and so does what is read back from them. Raises ValueError for two runs of one name
  and for a run without one.
  """
  names = [run.name for run in study.runs]
  wrong = next((name for name in names if names.count(name) > 1 or not is_name(name)), None)
  if wrong is not None:
    raise ValueError(f"run = {wrong!r}: what is published of a run is found by the name of its directory, and no other run may "
                     "have it; rename one, or give its path from a directory above")
  directories = {run.name: run.arm for run in study.runs}
  drawn = {id(record) for size in study.sizes for _, record in endpoints.illustrated(study, size)}
  files = {}
  for run in study.runs:
    if run.rows is None and (run.config or run.curves or run.records):
      files |= {f"{run.name}/{name}": text for name, text in _files(run, directories, drawn).items()}
  if not files:
    return b""
  whole = io.BytesIO()
  with tarfile.open(fileobj=whole, mode="w") as tar:
    for name, text in sorted(files.items()):
      data = text.encode()
      member = tarfile.TarInfo(name)  # no time and no owner
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  digits = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 4, "pb": 0}
  return lzma.compress(whole.getvalue(), filters=[digits])


def without_paths(study: Study, text: str) -> str:
  """`text` with the directories of the runs left out: an error message may name them."""
  places = {str(p) for run in study.runs if run.path.is_dir()  # what was published lies nowhere
            for p in (run.path.parent, run.path.parent.resolve())}
  for place in sorted(places, key=len, reverse=True):
    text = re.sub(r"(?<![\w.-])" + re.escape(place) + r"(?:/|(?![\w.-]))", "", text) if len(place) > 1 else text
  return text


def bare(study: Study, text: str) -> str:
  """`text` without the directories of the runs, and with the last part alone of every other absolute path."""
  return re.sub(r"(?<![\w/.])/(?:[^/\s'\"]+/)*(?=[^/\s'\"])", "", without_paths(study, text))


def is_name(name: str) -> bool:
  """Whether it can name a directory inside another."""
  return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def without_machine(config: dict, directories: dict[str, str]) -> dict:
  """A copy of a run's config: of paths the last part, of a trunk its arm. `directories`: arms of the study's runs by name."""
  config = copy.deepcopy(config)
  data, fork = config.get("data", {}), config.get("fork", {})
  for field in ("source", "tokenizer", "data_dir"):
    kind, colon, path = str(data.get(field, "")).partition(":")
    if not colon:
      data[field] = PurePath(kind).name
    elif kind != "tfds":  # whose names have slashes
      data[field] = kind + colon + PurePath(path).name
  if fork.get("workdir"):
    name = PurePath(fork["workdir"]).name
    fork["workdir"] = f"@{directories[name]}" if name in directories else name
  return config


def _files(run: Run, directories, drawn) -> dict[str, str]:
  """The run's directory, by file name."""
  write = lambda tree: json.dumps(tree, separators=(",", ":")) + "\n"
  files = {"config.json": write(without_machine(run.config, directories))} if run.config else {}
  if run.versions:
    files["versions.json"] = write(run.versions)
  if run.curves:
    files["metrics.jsonl"] = "".join(write(line) for seed, curve in run.curves.items() for line in _lines(seed, curve))
  for step in run.text:
    last = step == run.eval_step
    kept = [r for record in run.records if (r := _record(run, record, drawn))] if last else _on_the_way(run, step)
    files[f"eval/{step}.json"] = write({
        "step": step, "arm": run.arm, "size": run.size, **({"settings": run.settings} if last and run.settings else {}), "records": kept})
  if run.status == "done":
    files["DONE"] = write({"seconds_paused": run.paused})
  return files


def _lines(seed, curve):
  """The lines of metrics.jsonl. A speed is read as a median: it stays in the line, or the two, that make it."""
  n, finite = len(curve["step"]), {name: np.flatnonzero(np.isfinite(x)) for name, x in curve.items()}
  changes = np.flatnonzero(np.diff(curve["stage"]) > 0) if n > 1 else np.array([], int)
  only = {"flops": finite["flops"][-1:]}
  for name in ("tokens_per_second", "mfu"):
    at = np.flatnonzero(endpoints.last_stage(curve) & np.isfinite(curve[name]))
    at = at[np.argsort(curve[name][at], kind="stable")]
    only[name] = at[[(len(at) - 1) // 2, len(at) // 2]] if len(at) else at
  kept = {*range(0, n, max(1, n // LINES)), *range(n - 1, n), *changes, *changes + 1, *finite["loss"][:1],
          *finite["tokens"][-1:], *(i for places in only.values() for i in places)}
  for i in sorted(int(i) for i in kept):
    line = {"step": int(curve["step"][i]), "seed": seed}
    for name in ("stage", "tokens", "loss", "flops", "tokens_per_second", "mfu"):
      if math.isfinite(curve[name][i]) and (name not in only or i in only[name]):
        line[name] = float(f"{curve[name][i]:.6g}") if name == "loss" else _short(curve[name][i])
    yield line


def _record(run, record, drawn):
  """A record of the last evaluation; {} for what no report reads."""
  kind, mode = record["kind"], record.get("run_mode", run.headline_mode)
  own = mode == run.headline_mode
  if kind not in _FIELDS or kind == "heat" and id(record) not in drawn or kind == "position" and not own:
    return {}
  left_out = () if own else ("evidence_distance",) if mode == "block_topk" else ("evidence_distance", *_WRITTEN)
  given = (("arm", run.arm), ("split", "val"))
  out = {name: record[name] for name in ("kind", "seed", "arm", "run_mode", *_FIELDS[kind])
         if record.get(name) is not None and name not in left_out and (name, record[name]) not in given}
  for name in ("bits_per_byte",) if kind == "position" else _WRITTEN:
    if name in out:
      out[name] = _rounded(out[name], 6 if kind == "position" else 4)
  return out


def _on_the_way(run, step):
  """The records of an earlier evaluation: of text the mean of each seed, of layers what layers.csv writes."""
  text, out = endpoints.own_text(run, run.text[step]), []
  means = endpoints.group(text, ("seed",), "second_half_bits_per_byte", "second_half_bytes")
  for (seed,), value in means.items():
    weights = [endpoints.number(r.get("second_half_bytes")) for r in text if r.get("seed") == seed]
    mean = {"second_half_bits_per_byte": _rounded(value, 8), "second_half_bytes": sum(w for w in weights if w > 0)}
    out.append({**_record(run, next(r for r in text if r.get("seed") == seed), ()), **mean})
    for name in ("document", "bits_per_byte", "bytes"):
      out[-1].pop(name, None)
  for record in run.layers.get(step, []):
    kept = _record(run, record, ())
    out.append({name: _rounded(value, 4) if name in endpoints.LAYER else value for name, value in kept.items()})
  return out


def _rounded(value, digits):
  return float(f"{value:.{digits}g}") if math.isfinite(endpoints.number(value)) else value


def _short(value):
  return int(value) if value == int(value) and abs(value) < 2 ** 53 else float(value)
