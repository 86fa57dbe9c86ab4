"""Reading run and study directories as they lie on disk: finished, cut short, failed or never begun.

A run directory has config.json, metrics.jsonl, eval/<step>.json, hidden/<step>.json and DONE or FAILED; a study
directory has study.json and runs/; archive.py unpacks what was published into a study directory. What is
missing or broken becomes a line in `problems`, never an exception, except for a path that is none of these, and a
study.json that does not say what it must.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nsa import autotune
from nsa.records import number
from nsa.report.endpoints import METRIC, is_metric
from nsa.report.runs import Endpoint, Run, Study

LINES = 500  # of metrics.jsonl per seed that are read at least; fewer than twice as many, and a few
_CURVES = ("step", "stage", "tokens", "flops", "loss", "bits_per_byte", "tokens_per_second", "mfu", "seconds")


def load_run(path: Path, job: dict | None = None) -> Run:
  """The run at `path`; `job` is its line in study.json, which names it where config.json cannot."""
  path, job, problems = Path(path), job or {}, []
  config = _read_object(path / "config.json", problems)
  versions = _read_object(path / "versions.json", problems) if (path / "versions.json").exists() else {}
  curves = _read_metrics(path / "metrics.jsonl", problems)
  records, eval_step, of_kind, settings = _read_eval(path / "eval", problems)
  first = records[0] if records else {}
  status, error = _status(path, job)
  seeds = tuple(config.get("seeds") or job.get("seeds") or sorted(curves)) or (0,)
  run = Run(path, config.get("arm") or job.get("arm") or first.get("arm", "unknown"),
            config.get("size") or job.get("size") or first.get("size", "unknown"),
            seeds, config, versions, curves, records, eval_step, status, error, problems,
            of_kind["layer"], of_kind["language"], of_kind["task"], _paused(path), settings)
  if (path / f"eval/{eval_step}-sealed.json").exists():
    run.sealed = _read_object(path / f"eval/{eval_step}-sealed.json", problems)
  run.hidden = _read_hidden(path / "hidden", problems)
  if job.get("arm", run.arm) != run.arm:
    problems.append(f"study.json calls it arm {job['arm']!r}, its config.json {run.arm!r}: the latter counts")
  strangers = sorted({r.get("arm", run.arm) for r in records} - {run.arm})
  if strangers:
    problems.append(f"its evaluation holds records of other arms: {', '.join(map(str, strangers))}")
  if status == "done" and not records:
    problems.append("finished, but there is no evaluation that can be read")
  problems += [p for p in job.get("problems", []) if p not in problems]  # of what was read when it was published
  return run


def read_plan(path: Path) -> dict:
  """study.json of a study, live or published."""
  try:
    plan = json.loads((path / "study.json").read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path / 'study.json'}: not JSON ({error}); run the study launcher again") from None
  if not isinstance(plan, dict):
    raise ValueError(f"{path / 'study.json'}: study = {plan!r}: an object with name, arms, jobs")
  return plan


def study_of(path: Path, plan: dict) -> Study:
  """What study.json asks, checked, without its runs. ValueError names the field, its value and the fix."""
  def need(ok, name, value, fix):
    if not ok:
      raise ValueError(f"{path / 'study.json'}: {name} = {value!r}: {fix}")
  for name, kind, words in (("endpoints", list, "a list of objects with metric and margin"),
                            ("budgets", dict, "an object"),
                            ("controls", dict, "an object"), ("branches", dict, "an object"),
                            ("jobs", list, "a list of objects"),
                            ("speeds", dict, "an object"), ("arms", list, "a list of names"),
                            ("audit", list, "a list of objects"), ("sections", list, "a list of names"),
                            ("opened", list, "a list of tiers")):
    need(isinstance(plan.get(name) or kind(), kind), name, plan.get(name), words)
  solved = plan.get("solved") or 0
  need(isinstance(solved, (int, float)) and 0 <= solved <= 1, "solved", solved, "a share of the answers, 0 to 1")
  endpoints = []
  for i, one in enumerate(plan.get("endpoints") or ()):
    need(isinstance(one, dict), f"endpoints[{i}]", one, "an object with metric and margin")
    metric, margin = one.get("metric"), one.get("margin")
    need(is_metric(metric), f"endpoints[{i}].metric", metric,
         f"one of {', '.join(METRIC)}, alone or followed by : and a corpus or task")
    need(isinstance(margin, (int, float)) and margin > 0, f"endpoints[{i}].margin", margin, "a number above 0")
    endpoints.append(Endpoint(metric, float(margin), one.get("primary", True)))
  for arm, b in (plan.get("budgets") or {}).items():
    need(isinstance(b, (int, float)) and 0 < b <= 1, f"budgets.{arm}", b, "a share of the tokens, above 0, at most 1")
  for i, job in enumerate(plan.get("jobs") or ()):
    at = f"jobs[{i}]."
    need(isinstance(job, dict), at[:-1], job, "an object with run, arm, size and seeds")
    run = job.get("run")
    need(isinstance(run, str) and run.strip("./") and not run.startswith("/") and ".." not in run.split("/"),
         at + "run", run, "a directory inside the study's")
    need(isinstance(job.get("seeds", []), list) and all(isinstance(s, int) for s in job.get("seeds", [])), at + "seeds",
         job.get("seeds"), "a list of integers")
  given = {name: plan[name] for name in ("question", "alpha", "plan", "audit", "controls", "branches", "solved")
           if plan.get(name)}
  return Study(name=plan.get("name") or path.name, runs=[], declared=plan.get("declared", True),
               sections=tuple(plan.get("sections") or ()),
               arms=list(plan.get("arms") or []), reference=plan.get("reference_arm") or "",
               dense=plan.get("dense_arm") or "dense",
               budgets={k: float(v) for k, v in (plan.get("budgets") or {}).items()},
               quantities=tuple(plan.get("quantities") or ("R", "A", "Delta")), opened=tuple(plan.get("opened") or ()),
               speeds=plan.get("speeds"), **({"endpoints": endpoints} if endpoints else {}), **given)


def load_study(path: Path, plan: dict) -> Study:
  """The study in `path`, whose study.json is `plan`, with its runs; those without a directory are pending."""
  study = study_of(path, plan)
  study.autotune = autotune.read(path)
  jobs = plan.get("jobs") or []
  for job in jobs:
    where = path / job.get("run", "?")
    if where.is_dir():
      study.runs.append(load_run(where, job))
    else:
      status = job.get("status") if job.get("status") in ("failed", "unfinished") else "pending"
      study.runs.append(Run(where, job.get("arm", "unknown"), job.get("size", "unknown"), tuple(job.get("seeds") or ()),
                            {}, {}, {}, [], None, status, job.get("error") or "", list(job.get("problems", []))))
  if not jobs and study.declared:
    study.problems.append("study.json lists no jobs")
  return study


def _status(path, job):
  done, failed = path / "DONE", path / "FAILED"
  if failed.exists() and not (done.exists() and done.stat().st_mtime > failed.stat().st_mtime):
    message = failed.read_text(errors="replace").strip()
    try:  # the study writes {"error", "traceback"}
      message = json.loads(message)["error"]
    except (ValueError, KeyError, TypeError):
      pass
    return "failed", message or job.get("error") or "no message"
  if done.exists():
    return "done", ""
  if job.get("status") == "failed":
    return "failed", job.get("error") or "no message"
  return "unfinished", ""


def _read_object(path, problems):
  tree = _read_json(path, problems) or {}
  if not isinstance(tree, dict):
    problems.append(f"{path.name} is not an object")
    return {}
  return tree


def _read_json(path, problems):
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    problems.append(f"no {path.name}")
  except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
    problems.append(f"{path.name} cannot be read ({error})")
  return None


def _read_metrics(path, problems):
  """{seed: {name: float64[steps]}}. Of a step logged twice (a resumed run) the later line counts."""
  if not path.is_file():
    problems.append("no metrics.jsonl")
    return {}
  lines, broken = {}, 0
  with open(path, errors="replace") as file:
    for line in file:
      if not line.strip():
        continue
      try:
        record = json.loads(line)
        lines[int(record.get("seed", 0)), int(record["step"])] = record
      except (ValueError, KeyError, TypeError, AttributeError):
        broken += 1
  if broken:
    problems.append(f"{broken} unreadable line{'s' * (broken > 1)} in metrics.jsonl skipped (a run that is "
                    "killed while it writes leaves one)")
  curves = {}
  for seed in sorted({s for s, _ in lines}):
    mine = _thinned([lines[key] for key in sorted(k for k in lines if k[0] == seed)])
    curves[seed] = {n: np.array([number(r.get(n)) for r in mine], np.float64) for n in _CURVES}
  return curves


def _thinned(lines):
  """Lines at even distances, the last one, and those around a change of stage: figures need no more, nor does an
  archive."""
  apart = len(lines) // LINES
  if apart < 2:
    return lines
  stage = [line.get("stage") for line in lines]
  keep = {*range(0, len(lines), apart), len(lines) - 1}
  keep |= {j for i in range(1, len(lines)) if stage[i] != stage[i - 1] for j in (i - 1, i)}
  return [lines[i] for i in sorted(keep)]


def _read_eval(folder, problems):
  """Of the newest evaluation that can be read the records, step and settings; records of layers, text and tasks of all,
  by step."""
  newest, of_kind, settings = ([], None), {"layer": {}, "language": {}, "task": {}}, {}
  files = [f for f in folder.glob("*.json") if f.stem.isdigit()] if folder.is_dir() else []
  for file in sorted(files, key=lambda f: int(f.stem), reverse=True):
    tree = _read_json(file, problems)
    if isinstance(tree, dict) and isinstance(tree.get("records"), list):
      records = [r for r in tree["records"] if isinstance(r, dict) and "kind" in r]
      step = int(tree.get("step", file.stem))
      if newest[1] is None:
        newest, settings = (records, step), tree.get("settings") if isinstance(tree.get("settings"), dict) else {}
      for kind, by_step in of_kind.items():
        by_step[step] = [r for r in records if r["kind"] == kind]
    elif tree is not None:
      problems.append(f"eval/{file.name} has no list of records")
  return *newest, of_kind, settings


def _read_hidden(folder, problems):
  """Snapshots of hidden states by step."""
  out = {}
  for file in sorted(folder.glob("*.json"), key=lambda f: f.name) if folder.is_dir() else ():
    tree = _read_json(file, problems)
    if isinstance(tree, dict) and isinstance(tree.get("snapshots"), list):
      out[int(tree["step"])] = tree["snapshots"]
    elif tree is not None:
      problems.append(f"hidden/{file.name} has no list of snapshots")
  return out


def _paused(path):
  """Seconds by label that a finished run did not train; {} where DONE does not say."""
  try:
    seconds = json.loads((path / "DONE").read_text())["seconds_paused"]
    return {name: float(s) for name, s in seconds.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}
