"""Reading run and study directories as they lie on disk: finished, cut short, failed or never begun.

A run directory has config.json, metrics.jsonl, eval/<step>.json, hidden/<step>.json and DONE or FAILED; a study
directory has study.json and runs/; archive.py unpacks what was published into a study directory. What is
missing or broken becomes a line in `problems`, never an exception, except for a path that is none of these, and a
study.json that does not say what it must.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from nsa import autotune

LINES = 500  # of metrics.jsonl per seed that are read at least; fewer than twice as many, and a few
_CURVES = ("step", "stage", "tokens", "flops", "loss", "bits_per_byte", "tokens_per_second", "mfu", "seconds")


@dataclasses.dataclass
class Run:
  """One run directory. `curves[seed][name]` is float64[logged steps], NaN where a line had no value."""
  path: Path
  arm: str
  size: str
  seeds: tuple[int, ...]
  config: dict[str, Any]
  versions: dict[str, Any]
  curves: dict[int, dict[str, np.ndarray]]
  records: list[dict]              # of the last evaluation
  eval_step: int | None
  status: str                      # done | failed | unfinished | pending
  error: str = ""
  problems: list[str] = dataclasses.field(default_factory=list)
  # records of layers by step, of all evaluations
  layers: dict[int, list[dict]] = dataclasses.field(default_factory=dict)
  text: dict[int, list[dict]] = dataclasses.field(default_factory=dict)    # records of held-out text, likewise
  tasks: dict[int, list[dict]] = dataclasses.field(default_factory=dict)   # records of tasks, likewise
  paused: dict[str, float] = dataclasses.field(default_factory=dict)       # seconds of what was not training, by label
  # what the last evaluation asked (nsa/held_out.py)
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  hidden: dict[int, list[dict]] = dataclasses.field(default_factory=dict)  # snapshots by step (records.HIDDEN_STATES)
  sealed: dict[str, Any] = dataclasses.field(default_factory=dict)         # eval/<step>-sealed.json, as it lies there

  @property
  def name(self) -> str:
    return self.path.name

  @property
  def stages(self) -> list[dict]:
    return self.config.get("schedule", {}).get("stages", []) if self.config else []

  @property
  def headline_mode(self) -> str:
    """How the arm's own number is taken: dense where it ends dense, else sparse."""
    return "dense" if self.stages and self.stages[-1].get("mode") == "dense" else "sparse"

  @functools.cached_property
  def split(self) -> str:
    """The split whose windows count: val where there is one."""
    splits = {r.get("split", "val") for r in self.records if r["kind"] == "language"}
    return "val" if not splits or "val" in splits else sorted(splits)[0]

  @property
  def first(self) -> int:
    """The step that the run's own training begins at: where it forks, or 0."""
    fork = self.config.get("fork", {}) if self.config else {}
    return max(0, int(fork.get("step", 0))) if fork.get("workdir") and not fork.get("reset") else 0

  @property
  def message(self) -> str:
    """Its error in one line."""
    text = self.error
    return (text.strip().splitlines() or ["no message"])[-1 if text.startswith("Traceback") else 0][:300]

  @property
  def diverged(self) -> list[int]:
    """Seeds whose loss was finite once and was not at the last logged step: they have no line in results.csv."""
    losses = {s: np.isfinite(c["loss"]) for s, c in self.curves.items()}
    return [s for s, finite in losses.items() if finite.any() and not finite[-1]]


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """What arms are judged by: a metric of endpoints.py, its equivalence margin in the metric's unit, and its role."""
  metric: str
  margin: float
  primary: bool = True


@dataclasses.dataclass
class Study:
  """The runs of one report, and what was asked of them before they started."""
  name: str
  runs: list[Run]
  declared: bool = False           # whether a study.json says what to compare
  question: str = ""
  arms: list[str] = dataclasses.field(default_factory=list)   # in their order
  sizes: list[str] = dataclasses.field(default_factory=list)
  endpoints: list[Endpoint] = dataclasses.field(default_factory=lambda: [Endpoint("second_half_bits_per_byte", 0.005),
                                                                         Endpoint("exact_match", 0.02)])
  quantities: tuple[str, ...] = ("R", "A", "Delta")           # the declared family of tests, of each endpoint
  alpha: float = 0.05                                         # shared by the families of the primary endpoints
  reference: str = ""
  dense: str = "dense"
  budgets: dict[str, float] = dataclasses.field(default_factory=dict)
  # arm -> the dense arm with its tokens and rates
  controls: dict[str, str] = dataclasses.field(default_factory=dict)
  # arm -> its decay branches, shorter runs of the same
  branches: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  # recall is a mean over the tasks of which the dense arm answers so much; 0 = over all
  solved: float = 0.0
  sections: tuple[str, ...] = ()   # further sections that the study asks for (sections.py: FURTHER)
  # "arm-size" -> tokens per second of the arm alone on its device; None = as the runs logged it
  speeds: dict[str, float] | None = None
  plan: dict | None = None         # what was planned before the data (plan_file.py)
  # rows of the shortcut audit (nsa.tasks), as study.json has them
  audit: list[dict] = dataclasses.field(default_factory=list)
  # tiers of the plan whose sealed evaluations are reported; "" = of all runs, where the plan has no tiers
  opened: tuple[str, ...] = ()
  autotune: dict[str, bytes] = dataclasses.field(default_factory=dict)  # nsa.autotune.read
  notes: str = ""                  # NOTES.md beside study.json: what people have to say of it
  problems: list[str] = dataclasses.field(default_factory=list)

  @property
  def primary(self) -> str:
    """The metric that figures show: the first primary endpoint."""
    return next((e.metric for e in self.endpoints if e.primary), self.endpoints[0].metric)

  @property
  def asked(self) -> tuple[str, ...]:
    """The quantities that there can be: R alone where no arm is native."""
    return ("R",) if self.reference == self.dense else ("R", "A", "Delta")

  @property
  def finished(self) -> list[Run]:
    return [r for r in self.runs if r.status == "done"]

  def arm_runs(self, arm: str, size: str | None = None) -> list[Run]:
    return [r for r in self.runs if r.arm == arm and size in (None, r.size)]

  def headline_mode(self, arm: str) -> str:
    runs = [r for r in self.arm_runs(arm) if r.config]
    return runs[0].headline_mode if runs else "dense" if arm in (self.dense, *self.controls.values()) else "sparse"

  def label(self, arm: str, run_mode: str) -> str:
    """The name in tables: the arm, or "arm -> run mode" where that is not its own."""
    return arm if run_mode == self.headline_mode(arm) else f"{arm} -> {run_mode}"

  def retrofits(self) -> list[str]:
    """The arms that are compared with their dense control: those with a budget, smallest budget first."""
    budgeted = sorted((a for a in self.arms if a in self.budgets), key=self.budgets.get)
    named = [a for a in self.arms if a.startswith("retrofit") and a not in budgeted]
    others = [a for a in self.arms if a not in (self.reference, self.dense, *self.controls.values())]
    return budgeted + named or others

  def control(self, arm: str) -> str:
    """The dense arm that a retrofit has to reach: the trunk, or a dense continuation with the retrofit's tokens."""
    return self.controls.get(arm, self.dense)


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
  from nsa.report import endpoints as endpoint_lib  # which reads runs
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
    need(endpoint_lib.is_metric(metric), f"endpoints[{i}].metric", metric,
         f"one of {', '.join(endpoint_lib.METRIC)}, alone or followed by : and a corpus or task")
    need(isinstance(margin, (int, float)) and margin > 0, f"endpoints[{i}].margin", margin, "a number above 0")
    endpoints.append(Endpoint(metric, float(margin), one.get("primary", True)))
  for arm, b in (plan.get("budgets") or {}).items():
    need(isinstance(b, (int, float)) and 0 < b <= 1, f"budgets.{arm}", b,
         "a share of the tokens, above 0, at most 1")
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
    curves[seed] = {n: np.array([_number(r.get(n)) for r in mine], np.float64) for n in _CURVES}
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


def _number(value):
  return float(value) if isinstance(value, (int, float)) else math.nan
