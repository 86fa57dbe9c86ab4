"""Reading a directory that a report was published into, and adding its runs to the study that goes on.

Runs in records.tar.xz are read like those on disk. Directories published before there was one have the endpoints in
results.csv, the arms' configs in study.json and the layers in layers.csv: runs that are known by their numbers alone.
"""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import lzma
from pathlib import Path
import tarfile
import tempfile

from nsa.report import endpoints, publish
from nsa.report.runs import Run, Study, load_run, never_begun, read_plan, study_of

STATUSES = ("done", "failed", "unfinished", "pending")
# How a run is carried out, not what it computes; and what may differ between runs of one arm.
_NOT_COMPARED = ("seeds", "mesh", "checkpoint", "log_every", "tensorboard", "profile", "peak_tflops")


def is_published(plan: dict) -> bool:
  """Whether a study.json was written by a published report: it has the arms' configs and no jobs."""
  return "jobs" not in plan and ("runs" in plan or isinstance(plan.get("arms"), dict))


def load(path: Path, plan: dict) -> Study:
  """The study as it was published into the directory `path`; `plan` is its study.json. ValueError for damaged files."""
  _check_plan(path, plan)
  for name, wanted in (plan.get("files") or {}).items():
    found = hashlib.sha256((path / name).read_bytes()).hexdigest() if (path / name).is_file() else "missing"
    if found != wanted:
      raise ValueError(f"{path / name}: SHA-256 = {found}, and study.json was written with {wanted}: they do not belong together; "
                       "take the directory from the repository again")
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
    of_run = {step: mine for step, records in layers.get(key, {}).items()
              if (mine := [r for r in records if owners.get((*key, r["seed"])) == item["run"]])}
    rows = [row for row in table if row.run == item["run"]]
    if item["run"] in archived:
      runs.append(archived[item["run"]])
    elif rows or of_run:
      runs.append(_by_numbers(item, configs.get(key), versions, rows, of_run))
    else:
      runs.append(never_begun(Path(item["run"]), item, item["status"]))
      runs[-1].problems += ["finished, but results.csv has no line of it"] if item["status"] == "done" else []
    if "problems" in item:
      runs[-1].problems = list(item["problems"])
  order = plan.get("order") or [*dict.fromkeys(row.arm for row in table)]  # rows stand in the order of the arms
  study = study_of(path, plan, runs, list(order), plan.get("declared", bool(plan.get("reference_arm"))))
  study.versions = versions if any(run.rows is not None for run in runs) else []
  return study


def check_out(out: Path, study: Study, publishing: bool) -> None:
  """Raises ValueError where a report of `study` written into `out` would lose something that is there."""
  plan = read_plan(out) if (out / "study.json").is_file() else None
  if plan is None or not is_published(plan) and not publishing:
    return
  if not is_published(plan):
    raise ValueError(f"out = {str(out)!r}: a study runs there, and its study.json would be lost; give another directory")
  if not publishing:
    raise ValueError(f"out = {str(out)!r}: a report was published there, and its results.csv would no longer belong to its "
                     "study.json; give another directory, or --publish")
  done = lambda s: {(run.arm, run.size, seed) for run in s.finished for seed in run.seeds}
  lost = sorted(done(load(out, plan)) - done(study))
  if lost:
    raise ValueError(f"out = {str(out)!r}: {len(lost)} finished seeds that were published there, the first of them "
                     f"{' '.join(map(str, lost[0]))}, are not in this report; name the directory among the paths too, or delete it")


def _check_plan(path, plan):
  """Raises ValueError for the first field of a published study.json that cannot be read."""
  def need(ok, name, value, fix):
    if not ok:
      raise ValueError(f"{path / 'study.json'}: {name} = {value!r}: {fix}; take it from the repository again")
  is_list = lambda x, kind: isinstance(x, list) and all(isinstance(one, kind) for one in x)
  versions = plan.get("versions") or []
  need(isinstance(plan.get("arms"), dict) and is_list(list(plan["arms"].values()), dict), "arms", plan.get("arms"),
       "an object with the config of every arm")
  need(is_list(plan.get("runs"), dict), "runs", plan.get("runs"), "a list of objects")
  need(is_list(versions, dict), "versions", versions, "a list of objects")
  need(is_list(plan.get("order") or [], str), "order", plan.get("order"), "a list of arms")
  need(isinstance(plan.get("files") or {}, dict), "files", plan.get("files"), "an object with the SHA-256 of files")
  for i, item in enumerate(plan["runs"]):
    at = f"runs[{i}]."
    for name in ("run", "arm", "size"):
      need(isinstance(item.get(name), str), at + name, item.get(name), "a string")
    need(publish.is_name(item["run"]), at + "run", item["run"], "the name of a directory")
    need(item.get("status") in STATUSES, at + "status", item.get("status"), f"one of {', '.join(STATUSES)}")
    for name in ("seeds", "trained_with"):
      seeds = item.get(name, item.get("seeds"))
      need(is_list(seeds, int) and seeds, at + name, seeds, "a list of integers, not empty")
    need(is_list(item.get("problems", []), str), at + "problems", item.get("problems"), "a list of strings")
    number = item.get("versions", 0)
    need(isinstance(number, int) and (0 <= number < len(versions) or "versions" not in item), at + "versions", number,
         f"a number of one of the {len(versions)} versions")


def merge(study: Study, other: Study, path: Path) -> Study:
  """`study` with the runs of `other`, published in `path`, that it has not finished; ValueError for another experiment."""
  _same_experiment(study, other, path)
  for run in other.runs:
    at = next((i for i, mine in enumerate(study.runs) if mine.name == run.name), None)
    done = {seed for mine in study.finished if (mine.arm, mine.size) == (run.arm, run.size) for seed in mine.seeds}
    left = tuple(seed for seed in run.seeds if seed not in done)
    if at is not None and run.status == study.runs[at].status == "done" and run.rows is None and study.runs[at].rows is not None:
      left = run.seeds  # what is known by its numbers alone, here with its records
    elif not left or at is not None and (run.status != "done" or study.runs[at].status == "done"):
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
      whole = io.BytesIO(lzma.decompress(file.read_bytes()))  # to its end, where its check sum is
      with tarfile.open(fileobj=whole, mode="r:") as tar:
        tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, KeyError) as error:
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
  config = {**copy.deepcopy(config), "seeds": list(item.get("trained_with", item["seeds"]))} if config else {}
  return Run(Path(item["run"]), item["arm"], item["size"], tuple(item["seeds"]), config, common, {}, layers.get(step, []), step,
             item["status"], item.get("error", ""), [], dict(sorted(layers.items())), rows=rows)


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
  if found:
    _refuse(study, path, *found)
  same_arms(study, other.runs, path, other.versions)


def same_arms(study: Study, others: list[Run], path: Path, versions=()) -> None:
  """Raises ValueError where a run of `others` read another corpus, or is configured otherwise than its arm in `study`."""
  directories, first = {run.name: run.arm for run in [*others, *study.runs]}, {}
  corpora = [sorted({v["corpus_sha256"] for v in [r.versions for r in runs] + list(more) if "corpus_sha256" in v})
             for runs, more in ((study.runs, study.versions), (others, versions))]
  found = _difference(*corpora, "versions.corpus_sha256") if all(corpora) else None
  for run in study.runs:
    if run.config:
      first.setdefault((run.arm, run.size), run.config)
  for run in others:
    same = next((mine for mine in study.runs if mine.name == run.name), run)
    found = found or _difference((same.arm, same.size), (run.arm, run.size), f"arm and size of run {run.name!r}")
    mine = first.get((run.arm, run.size))
    if not found and run.config and mine:
      pair = [_comparable(config, directories, all(corpora)) for config in (mine, run.config)]
      found = _difference(*pair, f"arms.{run.arm}")
  if found:
    _refuse(study, path, *found)


def _refuse(study, path, name, mine, its):
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
