"""What of a study goes into a repository beside its report: one archive that unpacks to a study directory.

    tar -xJf study.tar.xz -C runs/again

It has study.json, PLAN.md, and of each run config.json, versions.json, metrics.jsonl, eval/, hidden/ and DONE; and
autotune/, without which a trunk that is trained again on a GPU gets other bits (nsa/autotune.py). A study that is
published in slices gets one archive for the runs that each slice adds, study-2.tar.xz and so on: what is in a
repository is not written again. The newest one's study.json speaks for all.

No checkpoints and no paths of the machine it ran on; windows and items condensed to documents and tasks
(records.condense). A published report is written from its own archive, so that the same report comes out again.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import lzma
from pathlib import Path, PurePath
import re
import tarfile
import tempfile

from absl import logging
import numpy as np

from nsa import autotune, records as record_lib
from nsa.report import comparable as comparable_lib, endpoints, reading
from nsa.report.runs import Run, Study

NAME = "study.tar.xz"
_SMALL = 1 << 22  # bytes of autotune/ in all: a cache of years, of many programs, is not for a repository
# How a run is carried out, not what it computes; and what may differ between runs of one arm.
_NOT_COMPARED = ("seeds", "mesh", "checkpoint", "log_every", "tensorboard", "profile", "peak_tflops")


# --- writing ------------------------------------------------------------------------


def archives(folder: Path) -> list[Path]:
  """The published archives in a directory, the oldest first."""
  found = {p: re.fullmatch(r"study(?:-(\d+))?\.tar\.xz", p.name) for p in Path(folder).glob("study*.tar.xz")}
  return sorted((p for p, match in found.items() if match), key=lambda p: int(found[p][1] or 1))


def publish(study: Study, out: Path) -> None:
  """Writes what the archives in `out` do not hold yet: runs that are new there, finished since, or trained otherwise.

  Nothing is written where the archives say all of it already.
  """
  before = archives(out)
  if not before:
    (out / NAME).write_bytes(pack(study))
    return
  held = load([out])
  theirs = {run.name: run for run in held.runs}
  leave_out = {run.name for run in study.runs if run.name in theirs and _same_run(run, theirs[run.name])}
  same = json.dumps(description(study)) == json.dumps(description(held))
  if same and all(run.name in leave_out for run in study.runs):
    return
  (out / f"study-{len(before) + 1}.tar.xz").write_bytes(pack(study, leave_out, frozenset(held.autotune)))


def _same_run(a: Run, b: Run) -> bool:
  """Whether two runs came as far, logged the same bits and were evaluated alike."""
  facts = lambda run: (run.status, run.curves.keys(), run.eval_step, run.settings, run.hidden.keys(), bool(run.sealed))
  if facts(a) != facts(b):
    return False
  return all(x.keys() == y.keys() and all(np.array_equal(x[n], y[n], equal_nan=True) for n in x)
             for x, y in ((a.curves[seed], b.curves[seed]) for seed in a.curves))


def pack(study: Study, leave_out=frozenset(), known=frozenset()) -> bytes:
  """The archive of a study or of single runs; the same study gives the same bytes.

  leave_out: names of runs that study.json lists and another archive holds. known: choices of the autotuner likewise.

  Raises ValueError for two runs of one name: what is published of a run is found by the name of its directory.
  """
  names = [run.name for run in study.runs]
  wrong = next((name for name in names if names.count(name) > 1 or name in ("", ".", "..")), None)
  if wrong is not None:
    raise ValueError(f"run = {wrong!r}: what is published of a run is found by the name of its directory, and no other "
                     "run may have it; rename one, or give its path from a directory above")
  text = lambda tree: json.dumps(tree, separators=(",", ":")) + "\n"
  drawn = {id(record) for size in study.sizes for _, record in endpoints.illustrated(study, size)}
  small = sum(map(len, study.autotune.values())) <= _SMALL
  if not small:
    logging.warning("%s/ has more than %d MiB and is not published: put what the study's own programs need beside it",
                    autotune.FOLDER, _SMALL >> 20)
  files = {f"{autotune.FOLDER}/{name}": body for name, body in study.autotune.items() if small and name not in known}
  files["study.json"] = (json.dumps(description(study), indent=1) + "\n").encode()
  for run in (run for run in study.runs if run.name not in leave_out):
    for name, content in _files(study, run, text, drawn).items():
      files[f"runs/{run.name}/{name}"] = content.encode()
  whole = io.BytesIO()
  with tarfile.open(fileobj=whole, mode="w") as tar:
    for name, content in sorted(files.items()):
      member = tarfile.TarInfo(name)  # no time and no owner
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  digits = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 4, "pb": 0}
  return lzma.compress(whole.getvalue(), filters=[digits])


def description(study: Study) -> dict:
  """study.json of the archive: what study.run writes, and what was not well with the runs when they were read."""
  return {"name": study.name, "question": study.question, "declared": study.declared, "arms": study.arms,
          "endpoints": [vars(e) for e in study.endpoints], "quantities": list(study.quantities), "alpha": study.alpha,
          "reference_arm": study.reference, "dense_arm": study.dense, "budgets": study.budgets,
          "controls": study.controls, "branches": study.branches, "solved": study.solved, "plan": study.plan,
          "audit": study.audit, **({"sections": list(study.sections)} if study.sections else {}),
          **({"opened": list(study.opened)} if study.opened else {}),
          **({} if study.speeds is None else {"speeds": study.speeds}),
          "jobs": [{"run": f"runs/{run.name}", "arm": run.arm, "size": run.size, "seeds": list(run.seeds),
                    "status": run.status, "error": bare(study, run.message) if run.status == "failed" else "",
                    "problems": [bare(study, p) for p in run.problems]} for run in study.runs]}


def _files(study, run: Run, text, drawn) -> dict[str, str]:
  """The run's directory by file name; {} of one that has left nothing."""
  files = {}
  if run.config:
    files["config.json"] = text(without_machine(run.config, {r.name: r.arm for r in study.runs}))
  if run.versions:
    files["versions.json"] = text(run.versions)
  if run.curves:
    files["metrics.jsonl"] = "".join(text({"step": int(curve["step"][i]), "seed": seed, **{
        name: float(x[i]) for name, x in curve.items() if name != "step" and x[i] == x[i]}})
        for seed, curve in run.curves.items() for i in range(len(curve["step"])))
  for step in run.text:
    records = (run.records if step == run.eval_step
               else run.text[step] + run.tasks.get(step, []) + run.layers.get(step, []))
    settings = {"settings": run.settings} if step == run.eval_step and run.settings else {}
    files[f"eval/{step}.json"] = text({"step": step, "arm": run.arm, "size": run.size, **settings,
                                       "records": record_lib.condense(
                                           [r for r in records if r["kind"] != "heat" or id(r) in drawn],
                                           lists="frontier" in study.sections)})
  for step, snapshots in run.hidden.items():
    files[f"hidden/{step}.json"] = text({"step": step, "snapshots": snapshots})
  if run.sealed:
    files[f"eval/{run.eval_step}-sealed.json"] = text({
        **run.sealed, "records": record_lib.condense(run.sealed.get("records", []))})
  if run.status == "done":
    files["DONE"] = text({"seconds_paused": run.paused})
  elif run.status == "failed" and files:
    files["FAILED"] = text({"error": bare(study, run.message)})
  return files


def bare(study: Study, text: str) -> str:
  """`text` without the directories of the runs, and with the last part alone of every other absolute path."""
  places = {str(p) for run in study.runs for p in (run.path.parent, run.path.parent.resolve())}
  for place in sorted(places, key=len, reverse=True):
    text = re.sub(r"(?<![\w.-])" + re.escape(place) + r"(?:/|(?![\w.-]))", "", text) if len(place) > 1 else text
  return re.sub(r"(?<![\w/.])/(?:[^/\s'\"]+/)*(?=[^/\s'\"])", "", text)


def without_machine(config: dict, directories: dict[str, str]) -> dict:
  """A copy of a run's config: of paths the last part, of a trunk its arm. `directories`: arms of the study's runs by
  name."""
  def last_part(value):  # "tfds:name/config" has slashes and is no path
    kind, colon, path = value.partition(":")
    return value if kind == "tfds" else kind + colon + PurePath(path).name if colon else PurePath(value).name

  config = copy.deepcopy(config)
  data, fork = config.get("data", {}), config.get("fork", {})
  for field in ("source", "tokenizer", "data_dir"):
    if isinstance(data.get(field), str):
      data[field] = last_part(data[field])
  if isinstance(data.get("corpora"), dict):
    data["corpora"] = {name: last_part(str(source)) for name, source in data["corpora"].items()}
  if fork.get("workdir"):
    name = PurePath(fork["workdir"]).name
    fork["workdir"] = f"@{directories[name]}" if name in directories else name
  return config


# --- reading ------------------------------------------------------------------------


@contextlib.contextmanager
def unpacked(path: Path):
  """The directory that the archive unpacks to, for as long as the block lasts. ValueError names a damaged file."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      whole = io.BytesIO(lzma.decompress(Path(path).read_bytes()))  # to its end, where its check sum is
      with tarfile.open(fileobj=whole, mode="r:") as tar:
        tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, KeyError) as error:
      raise ValueError(f"{path}: cannot be read ({error}); take it from the repository again") from None
    yield Path(folder)


def load(paths: list[Path]) -> Study:
  """One study and what was published of it before, or the given runs side by side.

  A path is a study directory, a run directory, or a directory with a published archive. A run that the study has not
  finished is taken from the first archive that has it. Raises ValueError for a path that is none of these, for two
  studies, and for runs of another experiment (the first field that differs is named).
  """
  paths = [Path(p) for p in paths]
  if not paths:
    raise ValueError("paths = []: give at least one run directory or one study directory")
  old = next((p for p in paths
              if (p / "report.md").is_file() and (p / "results.csv").is_file() and not archives(p)), None)
  if old is not None:
    raise ValueError(f"{old}: a report without records, to be read as it is; give the study's directory, or one with "
                     f"{NAME}")
  live = [p for p in paths if (p / "study.json").is_file() and not archives(p)]
  if len(live) > 1:
    raise ValueError(f"paths = {[str(p) for p in live]}: one report holds one study; give one each time, with what was "
                     "published of it")
  studies = [(p, reading.load_study(p, reading.read_plan(p))) for p in live]
  singles = []
  for path in paths:
    if archives(path):
      for archive in archives(path)[::-1]:
        with unpacked(archive) as folder:
          studies.append((path, reading.load_study(folder, reading.read_plan(folder))))
    elif path not in live:
      if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
        hint = "it does not exist" if not path.exists() else "it has neither"
        raise ValueError(f"{path}: {hint}; expected a run directory (config.json, metrics.jsonl), a study directory "
                         f"(study.json) or a published report ({NAME})")
      singles.append(reading.load_run(path))
  study = studies[0][1] if studies else Study(singles[0].name if len(singles) == 1 else f"{len(singles)} runs", runs=[])
  for path, other in studies[1:]:
    merge(study, other, path)
  for run in singles:
    if any(mine.name == run.name for mine in study.runs) and studies:
      raise ValueError(f"{run.path}: run {run.name!r} is in {study.name!r} already; leave one of the two paths out")
    same_arms(study, [run], run.path)
    study.runs.append(run)
  notes = next((p / "NOTES.md" for p in paths if (p / "NOTES.md").is_file()), None)
  study.notes = notes.read_text() if notes else ""
  for run in study.runs:
    for arm in [run.arm] + sorted({str(r.get("arm", run.arm)) for r in run.records}):
      study.arms += [arm] if arm not in study.arms else []
    if run.size not in study.sizes and (run.status != "pending" or all(r.status == "pending" for r in study.runs)):
      study.sizes.append(run.size)
    study.problems += [f"`{run.name}`: {p}" for p in run.problems]
    study.problems += [f"`{run.name}`: seed {seed} diverged (its last loss is not finite), left out"
                       for seed in run.diverged]
  study.problems += comparable_lib.problems(study)
  study.sizes.sort(key=lambda size: _scale(next((r.config for r in study.runs if r.size == size and r.config), {})))
  return study


def _scale(config: dict) -> tuple[int, int]:
  """By which sizes are ordered, smallest first, whatever ran last: weights of the layers, tokens of context."""
  model = config.get("model", {})
  return (model.get("num_layers", 0) * model.get("d_model", 0) * (model.get("d_model", 0) + model.get("mlp_dim", 0)),
          config.get("data", {}).get("context", 0))


def merge(study: Study, other: Study, path: Path) -> None:
  """Adds the runs of `other`, published in `path`, that `study` has not finished; ValueError for another experiment."""
  asked = lambda s: {name: value for name, value in description(s).items() if name in (
      "name", "endpoints", "quantities", "alpha", "reference_arm", "dense_arm", "solved")}
  found = difference(asked(study), asked(other), "")
  common = study.budgets.keys() & other.budgets.keys()
  found = found or difference(*({arm: s.budgets[arm] for arm in sorted(common)} for s in (study, other)), "budgets")
  if found:
    _refuse(study, path, *found)
  same_arms(study, other.runs, path)
  for run in other.runs:
    at = next((i for i, mine in enumerate(study.runs) if mine.name == run.name), None)
    if at is None:
      study.runs.append(run)
    elif run.status == "done" and study.runs[at].status != "done":
      study.runs[at] = run
  study.arms += [arm for arm in other.arms if arm not in study.arms]
  study.autotune = {**other.autotune, **study.autotune}
  study.opened += tuple(tier for tier in other.opened if tier not in study.opened)
  study.speeds = other.speeds if study.speeds is None else study.speeds
  study.budgets = {**other.budgets, **study.budgets}
  study.controls = {**other.controls, **study.controls}


def same_arms(study: Study, others: list[Run], path: Path) -> None:
  """Raises ValueError where a run of `others` read another corpus, or is configured otherwise than its arm in
  `study`."""
  directories, first = {run.name: run.arm for run in [*others, *study.runs]}, {}
  corpora = [sorted({r.versions["corpus_sha256"] for r in of if "corpus_sha256" in r.versions})
             for of in (study.runs, others)]
  found = difference(*corpora, "versions.corpus_sha256") if all(corpora) else None
  for run in study.runs:
    if run.config:
      first.setdefault((run.arm, run.size), run.config)
  for run in others:
    same = next((mine for mine in study.runs if mine.name == run.name), run)
    found = found or difference((same.arm, same.size), (run.arm, run.size), f"arm and size of run {run.name!r}")
    mine = first.get((run.arm, run.size))
    if not found and run.config and mine:
      pair = [comparable(config, directories, all(corpora)) for config in (mine, run.config)]
      found = difference(*pair, f"arms.{run.arm}")
  if found:
    _refuse(study, path, *found)


def check_out(out: Path, study: Study, publishing: bool) -> None:
  """Raises ValueError where a report of `study` written into `out` would lose something that is there."""
  if not archives(out):
    if (out / "study.json").is_file() or (out / "report.md").is_file() and publishing:
      raise ValueError(f"out = {str(out)!r}: a study, or a report without records, lies there; give another directory")
    return
  if not publishing:
    raise ValueError(f"out = {str(out)!r}: a report was published there, and would no longer belong to its {NAME}; "
                     "give another directory, or --publish")
  done = lambda s: {(run.arm, run.size, seed) for run in s.finished for seed in run.seeds}
  lost = sorted(done(load([out])) - done(study))
  if lost:
    raise ValueError(f"out = {str(out)!r}: {len(lost)} finished seeds that were published there, the first of them "
                     f"{' '.join(map(str, lost[0]))}, are not in this report; name the directory among the paths too, "
                     "or delete it")


def open_sealed(study: Study) -> None:
  """Opens the sealed evaluations of every tier all of whose planned runs are there, finished or failed.

  Raises ValueError where no tier has become ready since: what is sealed is opened once.
  """
  there = {(f"{run.arm}-{run.size}", seed) for run in study.runs if run.status in ("done", "failed")
           for seed in run.seeds}
  waits = {tier: sorted(runs - there) for tier, runs in study.tiers().items() if tier not in study.opened}
  ready = tuple(tier for tier, left in waits.items() if not left)
  if not any(run.sealed for run in study.finished):
    raise ValueError("--open: no finished run has a sealed evaluation (eval.sealed)")
  if not ready:
    raise ValueError("--open: " + ("; ".join(
        f"{f'tier {tier}' if tier else 'the study'} waits for {len(left)} runs, the first of them {left[0][0]} seed "
        f"{left[0][1]}" for tier, left in waits.items())
        or "it was opened before, once and for all: leave the flag out, and the report has it"))
  study.opened += ready


def shown(study: Study) -> set[str]:
  """arm-size of the runs whose sealed evaluations were opened."""
  return {key for tier, runs in study.tiers().items() if tier in study.opened for key, _ in runs}


def unsealed(study: Study) -> Study:
  """The study as the opened evaluations of its runs have it: each in its arm's own run mode, nothing on the way."""
  there = shown(study)
  of = lambda run: run.sealed if f"{run.arm}-{run.size}" in there else {}
  runs = [dataclasses.replace(run, records=of(run).get("records", []), settings=of(run).get("settings", {}),
                              sealed=of(run), layers={}, text={}, tasks={}) for run in study.runs]
  return dataclasses.replace(study, runs=runs, problems=[])


# --- comparing ----------------------------------------------------------------------


def comparable(config: dict, directories: dict[str, str], corpus_known: bool) -> dict:
  """A config without what may differ between runs of one arm; fields that it lacks, of a later version, have their
  defaults."""
  parsed = endpoints.parsed(without_machine(config, directories))
  if parsed is not None:
    from nsa import config as config_lib
    config = json.loads(json.dumps(config_lib.to_dict(parsed)))  # a list where it has a tuple, as files have
  else:
    config = without_machine(config, directories)
  config = {name: value for name, value in config.items() if name not in _NOT_COMPARED}
  config["data"] = {name: value for name, value in config.get("data", {}).items() if name != "data_dir"}
  if corpus_known:  # by its hash: the file may have another name here
    config["data"]["source"] = config["data"].get("source", "").partition(":")[0]
    config["data"]["corpora"] = {name: source.partition(":")[0]
                                 for name, source in (config["data"].get("corpora") or {}).items()}
  return config


def difference(a, b, name: str):
  """(field, its value in a, its value in b) of the first difference of two trees; None where they are equal."""
  if isinstance(a, dict) and isinstance(b, dict):
    pairs = [(key, a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)]]
    return next((d for key, x, y in pairs if (d := difference(x, y, f"{name}.{key}".lstrip(".")))), None)
  if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
    return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{name}[{i}]"))), None)
  return None if a == b else (name, a, b)


def _refuse(study, path, name, mine, its):
  raise ValueError(f"{path}: {name} = {its!r}, and {mine!r} in {study.name!r}: not the same experiment, and its seeds "
                   "cannot be added to these; report it alone")
