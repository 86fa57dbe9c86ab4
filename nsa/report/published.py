"""Reading a directory that a report was published into, and adding its runs to the study that goes on.

Runs in records.tar.xz are read like those on disk. Directories published before there was one have the endpoints in
results.csv, the arms' configs in study.json and the layers in layers.csv: runs that are known by their numbers alone.
"""
from __future__ import annotations

import copy
import dataclasses
import json
import lzma
from pathlib import Path
import tarfile
import tempfile

from nsa.report import endpoints, publish
from nsa.report.runs import Run, Study, load_run, never_begun, study_of

# How a run is carried out, not what it computes; and what may differ between runs of one arm.
_NOT_COMPARED = ("seeds", "mesh", "checkpoint", "log_every", "tensorboard", "profile", "peak_tflops")


def is_published(plan: dict) -> bool:
  """Whether a study.json was written by a published report: it has the arms' configs and no jobs."""
  return "runs" in plan and "jobs" not in plan


def load(path: Path, plan: dict) -> Study:
  """The study as it was published into the directory `path`; `plan` is its study.json."""
  table = endpoints.read_csv(path / "results.csv") if (path / "results.csv").is_file() else []
  layers = endpoints.read_layers(path / "layers.csv") if (path / "layers.csv").is_file() else {}
  configs = {(c.get("arm", name), c.get("size")): c for name, c in plan["arms"].items()}
  versions, listed = plan.get("versions") or [], plan["runs"]
  archived = _archived(path, listed)
  owners = {}  # (arm, size, seed) -> the run that its lines in layers.csv are of: a finished one, if there is one
  for item in sorted((item for item in listed if item["status"] != "pending"), key=lambda item: item["status"] != "done"):
    for seed in item["seeds"]:
      owners.setdefault((item["arm"], item["size"], seed), item["run"])
  runs = []
  for item in listed:
    key = item["arm"], item["size"]
    if item["run"] in archived:
      runs.append(archived[item["run"]])
    elif item["status"] == "pending":
      runs.append(never_begun(Path(item["run"]), item, "pending"))
    else:
      of_run = {step: mine for step, records in layers.get(key, {}).items()
                if (mine := [r for r in records if owners.get((*key, r["seed"])) == item["run"]])}
      runs.append(_by_numbers(item, configs.get(key), versions, [row for row in table if row.run == item["run"]], of_run))
  order = plan.get("order") or [*dict.fromkeys(row.arm for row in table)]  # rows stand in the order of the arms
  study = study_of(path, plan, runs, list(order), plan.get("declared", bool(plan.get("reference_arm"))))
  study.versions = versions if any(run.rows is not None for run in runs) else []
  return study


def merge(study: Study, other: Study, path: Path) -> Study:
  """`study` with the runs of `other`, published in `path`, that it has not finished; ValueError for another experiment."""
  _same_experiment(study, other, path)
  for run in other.runs:
    at = next((i for i, mine in enumerate(study.runs) if mine.name == run.name), None)
    done = {seed for mine in study.finished if (mine.arm, mine.size) == (run.arm, run.size) for seed in mine.seeds}
    left = tuple(seed for seed in run.seeds if seed not in done)
    if not left or at is not None and (run.status != "done" or study.runs[at].status == "done"):
      continue
    run = run if left == run.seeds else _of_seeds(run, left)
    if at is None:
      study.runs.append(run)
    else:
      study.runs[at] = run
    if run.status == "done":  # what began them under another name has only its other seeds to do
      study.runs = [rest for mine in study.runs if (rest := mine if mine is run else _waiting(mine, run))]
  study.arms += [arm for arm in other.arms if arm not in study.arms]
  study.budgets = {**other.budgets, **study.budgets}
  study.versions = study.versions + [v for v in other.versions if v not in study.versions]
  return study


def _archived(path, listed) -> dict[str, Run]:
  file, found = path / publish.RECORDS, {}
  if not file.is_file():
    return found
  with tempfile.TemporaryDirectory() as folder:
    try:
      with tarfile.open(file, "r:xz") as tar:
        tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
      raise ValueError(f"{file}: cannot be read ({error}); take it from the repository again") from None
    for item in listed:
      if (Path(folder) / item["run"]).is_dir():
        # Its seeds may be fewer than its config's: the others came from another run.
        found[item["run"]] = dataclasses.replace(load_run(Path(folder) / item["run"], item), path=Path(item["run"]),
                                                 seeds=tuple(item["seeds"]))
  return found


def _by_numbers(item, config, versions, rows, layers) -> Run:
  """A run made from its lines of results.csv and layers.csv and its arm's config."""
  step = max([*layers, *(row.step for row in rows)], default=None)
  candidates = [versions[item["versions"]]] if "versions" in item else versions
  common = {name: value for name, value in (candidates or [{}])[0].items() if all(v.get(name) == value for v in candidates)}
  if len({v.get("devices", 1) for v in candidates}) > 1:
    common["devices"] = None  # not known, where without the line there was one
  problems = ["finished, but results.csv has no line of it"] if item["status"] == "done" and not rows else []
  config = {**copy.deepcopy(config), "seeds": list(item.get("trained_with", item["seeds"]))} if config else {}
  return Run(Path(item["run"]), item["arm"], item["size"], tuple(item["seeds"]), config, common, {}, layers.get(step, []), step,
             item["status"], item.get("error", ""), problems, dict(sorted(layers.items())), rows=rows)


def _waiting(mine, done) -> Run | None:
  """`mine` without the seeds that `done` has finished, unless it has finished too; None where none are left."""
  left = tuple(seed for seed in mine.seeds if seed not in done.seeds)
  if mine.status == "done" or (mine.arm, mine.size) != (done.arm, done.size) or left == mine.seeds:
    return mine
  return _of_seeds(mine, left) if left else None


def _of_seeds(run, seeds) -> Run:
  """The run without its other seeds; its config still says which were trained together."""
  keep = lambda records: [r for r in records if r.get("seed", run.seeds[0]) in seeds]
  return dataclasses.replace(
      run, seeds=seeds, curves={s: c for s, c in run.curves.items() if s in seeds}, records=keep(run.records),
      layers={step: keep(r) for step, r in run.layers.items()}, text={step: keep(r) for step, r in run.text.items()},
      rows=None if run.rows is None else [r for r in run.rows if r.seed in seeds])


def _same_experiment(study, other, path):
  """Raises ValueError with the first field that differs: seeds of different experiments are not replicates."""
  asked = lambda s: {"name": s.name, "reference_arm": s.reference, "dense_arm": s.dense,
                     "primary": {"metric": s.primary, "margin": s.margin},
                     "secondary": {"metric": s.secondary, "margin": s.secondary_margin}}
  common = study.budgets.keys() & other.budgets.keys()
  budgets = lambda s: {arm: s.budgets[arm] for arm in sorted(common)}
  ours, theirs = ({**asked(s), "budgets": budgets(s)} for s in (study, other))
  found = _difference(ours, theirs, "")
  corpora = [sorted({v["corpus_sha256"] for v in [r.versions for r in s.runs] + s.versions if "corpus_sha256" in v})
             for s in (study, other)]
  if not found and all(corpora):
    found = _difference(*corpora, "versions.corpus_sha256")
  directories = {run.name: run.arm for s in (other, study) for run in s.runs}
  first = {}
  for run in study.runs:
    if run.config:
      first.setdefault((run.arm, run.size), run.config)
  for run in other.runs:
    same = next((mine for mine in study.runs if mine.name == run.name), run)
    found = found or _difference((same.arm, same.size), (run.arm, run.size), f"arm and size of run {run.name!r}")
    mine = first.get((run.arm, run.size))
    if not found and run.config and mine:
      pair = [_comparable(config, directories, all(corpora)) for config in (mine, run.config)]
      found = _difference(*pair, f"arms.{run.arm}")
  if found:
    name, mine, its = found
    raise ValueError(f"{path}: {name} = {its!r}, and {mine!r} in {study.name!r}: not the same experiment, and its seeds cannot "
                     "be added to these; report it alone")


def _comparable(config, directories, corpus_known):
  """A config without what may differ; fields that it lacks, of a later version, have their defaults."""
  config = publish.without_machine(config, directories)
  parsed = endpoints.parsed(config)
  if parsed is not None:
    from nsa import config as config_lib
    config = json.loads(json.dumps(config_lib.to_dict(parsed)))  # a list where it has a tuple, as files have
  config = {name: value for name, value in config.items() if name not in _NOT_COMPARED}
  config["data"] = {name: value for name, value in config.get("data", {}).items() if name != "data_dir"}
  if corpus_known:  # by its hash: the file may have another name here
    config["data"]["source"] = config["data"].get("source", "").partition(":")[0]
  return config


def _difference(a, b, name):
  """(field, its value in a, its value in b) of the first difference of two trees; None where they are equal."""
  if isinstance(a, dict) and isinstance(b, dict):
    pairs = [(key, a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)]]
    return next((d for key, x, y in pairs if (d := _difference(x, y, f"{name}.{key}".lstrip(".")))), None)
  if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
    return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := _difference(x, y, f"{name}[{i}]"))), None)
  return None if a == b else (name, a, b)
