"""A study: a grid of runs over arms, sizes and seeds that ends in a report.

Every arm is one `Config`. An arm may fork from another arm ("fork.workdir" = "@dense"): the
trunk is trained once, keeps the checkpoints that forks need, and goes on to its own end.
Finished runs are reused, cut runs resume, a failed run is noted and does not stop the rest. A study may go from machine
to machine with its finished runs alone, without checkpoints: a trunk that a further fork needs is trained again, to the
same bits.
"""
import copy
import dataclasses
from dataclasses import dataclass, field
import fnmatch
import math
import time
import traceback

from absl import logging
from etils import epath
import jax

from nsa import (
  again,
  config as config_lib,
  data,
  flops,
  forks,
  lock,
  metrics,
  processes,
  programs,
  provenance,
  rundir,
  sharding,
  start,
  train,
)
from nsa.config import Config, ConfigError, kinds
from nsa.tasks import audit


@dataclass
class Study:
  """What to run and what to ask of it. `arms[*].seeds` is ignored: `seeds` says it for all."""
  name: str = "study"
  question: str = ""
  arms: list[Config] = field(default_factory=list)
  seeds: tuple[int, ...] = (0, 1, 2)
  few: dict[str, tuple[int, ...]] = field(default_factory=dict)  # arm, or arm-size -> its seeds, where it has not all
                                                                 # of them
  now: tuple[str, ...] = ()        # arms ("arm-size") that are run now; the others are listed and judged; () = all
  vmap_seeds: bool = True          # all seeds of an arm as one program: fewer compilations and launches;
                                   # on a CPU no faster per token (17.0k against 18.8k tokens/s in the quickstart)
  dense: str = "dense"             # the arm that is the quality anchor
  reference: str = "native_msa"    # the arm that the others are compared with
  budgets: dict[str, float] = field(default_factory=dict)  # arm -> share of the steps after leaving dense
  controls: dict[str, str] = field(default_factory=dict)  # retrofit -> the dense arm with its tokens and rates, where
                                                          # not `dense`
  # arm -> shorter runs of it with a decay of their own
  branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
  # "arm-size" -> tokens per second of the arm alone on its device, where runs share devices and what they log says
  # nothing of it; None = as logged
  speeds: dict[str, float] | None = None
  # recall is a mean over the tasks of which the dense arm answers so much; 0 = over all
  solved: float = 0.0
  # What is judged, and how: metrics of nsa/report/endpoints.py, alone or "metric:corpus", "metric:task family".
  primary: tuple[str, ...] = ("second_half_bits_per_byte", "exact_match")
  secondary: tuple[str, ...] = ()
  quantities: tuple[str, ...] = ("R", "A", "Delta")  # the declared family of tests (nsa/report/comparisons.py)
  alpha: float = 0.05              # shared by the primary families, text and recall
  margin: float = 0.005            # equivalence margin of bits per byte and of NLL of text
  task_margin: float = 0.02        # of exact match
  nll_margin: float = 0.05         # of answers' NLL, nats per token
  # The plan (nsa/report/plan_file.py): where its files lie, and what power and cost are reckoned from.
  plan: str = ""                   # directory of PLAN.md and plan.json; "" = no plan
  notes: tuple[str, ...] = ()       # what a reader of the plan has to know of the arms and of what they are compared by
  stopping: str = ("Every listed seed runs once; a run that diverges or fails is counted, not repeated with another "
                   "seed.")
  # name -> arms, or arm-size, in the order in which they run
  tiers: dict[str, tuple[str, ...]] = field(default_factory=dict)
  # "text R", "text A", "recall R", ... -> SD of paired differences
  expected_sd: dict[str, float] = field(default_factory=dict)
  flops_per_second: float = 1e14   # of one device, of the FLOPs that an arm needs
  training_share: float = 1.0      # of the wall time that is training steps
  sections: tuple[str, ...] = ()   # further sections of the report, of nsa/report/sections.py: FURTHER
  shortcuts: bool = False          # True: tasks may be answerable from the first block and a window (tasks/audit.py),
                                   # on purpose


@dataclass
class Job:
  """One run: an arm and the seeds that it trains together."""
  config: Config
  run: str                         # its directory, relative to the study's
  trunk: str = ""                  # the job that has to be done first, "" for none
  status: str = "pending"          # pending | done | failed
  error: str = ""


def jobs(study: Study, directory) -> list[Job]:
  """All runs, trunks first. Raises ConfigError for a question that no report could answer, an arm that cannot run or
  forks from nowhere."""
  _check_question(study)
  cohorts = [tuple(study.seeds)] if study.vmap_seeds else [(seed,) for seed in study.seeds]
  out = [job for seeds in cohorts for job in _cohort(study, directory, seeds)]
  names = [job.run for job in out]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ConfigError([("arms", ", ".join(twice), "two arms have the same name and size: rename one")])
  return _trunks_first(out)


def check_tasks(study: Study) -> None:
  """Raises ConfigError where tasks can be answered without selecting anything, unless `study.shortcuts`."""
  if problems := audit.problems(study):
    raise ConfigError(problems)


def check(study: Study, directory, todo: list[Job]) -> None:
  """Raises ConfigError for what would fail run by run: tasks that test nothing, corpora, a plan or trunks of other
  studies that are not there."""
  check_tasks(study)
  directory, problems = epath.Path(directory), []
  left = [job for job in todo if not (directory / job.run / "DONE").exists()]
  if left and study.plan and not epath.Path(study.plan).is_dir():
    problems.append(("plan", study.plan, "no such directory: write the plan first (--plan), or name the right one"))
  elif left and study.plan and not (epath.Path(study.plan) / "plan.json").exists():
    logging.warning("plan = %s: there is no plan.json, the study has no plan", study.plan)
  for job in todo:
    different = [] if job in left else _trained_otherwise(job, directory)
    if different:
      name, new, old = different[0]
      logging.warning("%s was trained with %s = %s and not %s%s: it is taken as it is; delete it, or take another "
                      "--workdir", job.run, name, old, new, f", and {len(different) - 1} more" * (len(different) > 1))
  for job in left:
    begins = not job.trunk and not (directory / job.run / "checkpoints").exists()
    problems += [(f"arms[*].{name}", value, fix) for name, value, fix in provenance.missing(job.config, begins)]
  if problems:
    raise ConfigError({repr(one): one for one in problems}.values())


def _trained_otherwise(job: Job, directory) -> list[tuple]:
  """(field, value now, value then) of a finished run, of what decides its result. Where it lay and read is left out."""
  try:
    then, now = (config_lib.to_dict(c) for c in (rundir.read_config(directory / job.run), job.config))
  except ConfigError:  # of another version, or no config.json: reports say what they make of it
    return []
  for one in (then, now):
    one["data"] = {k: v for k, v in one["data"].items() if k not in ("source", "corpora", "data_dir", "tokenizer")}
  return [difference for part in ("model", "attention", "layers", "others", "schedule", "optimizer", "data")
          for difference in rundir.changed(part, now[part], then[part])]


def _cohort(study, directory, seeds) -> list[Job]:
  configs = {}
  for arm in study.arms:
    if not set(seeds) <= set(seeds_of(study, arm)):
      continue
    # Parts of their own where runs of an arm differ: there may be hundreds of runs.
    configs[arm.arm, arm.size] = dataclasses.replace(
        arm, seeds=seeds, fork=copy.copy(arm.fork), checkpoint=copy.copy(arm.checkpoint))
  out = []
  for (arm, size), config in configs.items():
    trunk = ""
    if config.fork.workdir.startswith("@"):
      source = configs.get((config.fork.workdir[1:], size))
      if source is None:
        raise ConfigError([(f"arms[{arm}].fork.workdir", config.fork.workdir,
                            f"no arm of size {size} and seeds {list(seeds)} has that name; there are "
                            f"{sorted(a for a, s in configs if s == size)}")])
      if config.fork.step >= 0:
        source.checkpoint.keep_at = tuple(sorted({*source.checkpoint.keep_at, config.fork.step}))
      trunk = _directory(source)
      config.fork.workdir = str(epath.Path(directory) / trunk)
    out.append(Job(config, _directory(config), trunk))
  for job in out:
    try:
      config_lib.validate(job.config)
    except ConfigError as error:
      raise ConfigError([(f"arms[{job.config.arm}].{name}", value, fix)
                         for name, value, fix in error.problems]) from None
  return out


def seeds_of(study: Study, arm: Config) -> tuple[int, ...]:
  """The seeds that an arm is run with."""
  return study.few.get(f"{arm.arm}-{arm.size}", study.few.get(arm.arm, study.seeds))


def _check_question(study: Study) -> None:
  """Raises ConfigError that lists what reports would refuse once everything has run, or judge by in silence."""
  if wrong := [*kinds.problems(Study, study)]:
    raise ConfigError(wrong)
  problems = []

  def need(ok, name, value, fix):
    if not ok:
      problems.append((name, value, fix))

  of_size = {f"{one.arm}-{one.size}" for one in study.arms}
  arms = {one.arm for one in study.arms}
  need(arms, "arms", study.arms, "at least one")
  need(study.seeds and len(set(study.seeds)) == len(study.seeds), "seeds", study.seeds, "one or more different seeds")
  need(not (study.vmap_seeds and study.few), "few", study.few,
       "seeds that train as one program are the same for all arms: set vmap_seeds = False")
  named = {"dense": [study.dense], "reference": [study.reference], "budgets": study.budgets, "controls": study.controls,
           "controls[*]": study.controls.values(), "branches": study.branches,
           "branches[*]": [arm for shorter in study.branches.values() for arm in shorter]}
  both = {"few": study.few, "now": study.now}  # speeds and tiers may name arms of other slices
  for known, fields in ((arms, named), (arms | of_size, both)) if arms else ():
    for name, used in fields.items():
      for arm in used:
        need(arm in known, name, arm, f"no arm has that name; there are {', '.join(sorted(arms))}")
  for arm, share in study.budgets.items():
    need(0 < share <= 1, f"budgets[{arm!r}]", share, "a share of the tokens, above 0, at most 1")
  for name in ("margin", "task_margin", "nll_margin", "flops_per_second"):
    need(0 < getattr(study, name) < math.inf, name, getattr(study, name), "a number above 0")
  need(0 < study.alpha < 1, "alpha", study.alpha, "between 0 and 1, such as 0.05")
  need(0 < study.training_share <= 1, "training_share", study.training_share, "a share above 0, at most 1")
  need(0 <= study.solved <= 1, "solved", study.solved, "a share of the answers, 0 to 1")
  for name, scatter in study.expected_sd.items():
    need(0 < scatter < math.inf, f"expected_sd[{name!r}]", scatter, "a standard deviation above 0")
  for quantity in study.quantities:
    need(quantity in ("R", "A", "Delta"), "quantities", quantity, "R, A or Delta")
  if problems:
    raise ConfigError(problems)


def asked(study: Study) -> dict:
  """What is asked of the runs, JSON-ready: the part of study.json, and of a plan, that reports judge by."""
  from nsa.report import endpoints  # here: whoever only runs a study does without
  unknown = [(name, m) for name in ("primary", "secondary") for m in getattr(study, name) if not endpoints.is_metric(m)]
  if unknown:
    raise ConfigError([(name, m, f"one of {', '.join(endpoints.METRIC)}, alone or followed by : and a corpus or a task "
                                 "family")
                       for name, m in unknown])
  margin = lambda m: (study.task_margin if "exact_match" in m else study.nll_margin if "answer_nll" in m
                      else study.margin)
  return {"name": study.name, "question": study.question, "arms": list(dict.fromkeys(arm.arm for arm in study.arms)),
          "endpoints": [{"metric": m, "margin": margin(m), "primary": m in study.primary}
                        for m in (*study.primary, *study.secondary)],
          "quantities": list(study.quantities), "alpha": study.alpha, "reference_arm": study.reference,
          "dense_arm": study.dense, "budgets": study.budgets, "controls": study.controls, "solved": study.solved,
          "branches": {arm: list(b) for arm, b in study.branches.items()},
          **({"sections": list(study.sections)} if study.sections else {})}


def _directory(config) -> str:
  return f"runs/{config.arm}-{config.size}-s{'_'.join(map(str, config.seeds))}"


def _trunks_first(unordered: list[Job]) -> list[Job]:
  out, placed, rest = [], set(), list(unordered)
  while rest:
    ready = [job for job in rest if not job.trunk or job.trunk in placed]
    if not ready:
      raise ConfigError([("arms[*].fork.workdir", ", ".join(job.run for job in rest), "the forks run in a circle")])
    out += ready
    placed |= {job.run for job in ready}
    rest = [job for job in rest if job.run not in placed]
  return out


def wanted(study: Study, directory, only: tuple[str, ...] = ()) -> tuple[list[Job], list[Job]]:
  """(the runs that `only` and study.now name, the others), trunks first, then in the order of the patterns of `only`.
  ConfigError where one of the patterns, or study.now, names none."""
  patterns = only or ("*",)
  place = lambda job: next((i for i, p in enumerate(patterns) if fnmatch.fnmatch(job.run.removeprefix("runs/"), p)),
                           len(patterns))
  todo = _trunks_first(sorted(jobs(study, directory), key=place))
  now = lambda job: not study.now or f"{job.config.arm}-{job.config.size}" in study.now
  mine = [job for job in todo if place(job) < len(patterns) and now(job)]
  named = {job.run for job in mine}
  others = [job for job in todo if job.run not in named]
  names = [job.run.removeprefix("runs/") for job in todo]
  nothing = [p for p in patterns if not fnmatch.filter(names, p)]  # misspelt: its runs would be left out in silence
  if nothing or not mine:
    raise ConfigError([("--only", p, f"no run has such a name; there are {', '.join(job.run for job in todo)}")
                       for p in nothing or [",".join(only)]])
  return mine, others


def settle(study: Study, directory, todo: list[Job], others: list[Job]) -> None:
  """Gives runs that other processes have ended their status, and writes study.json."""
  for job in todo:
    failed = epath.Path(directory) / job.run / "FAILED"
    if failed.exists() and not (failed.parent / "DONE").exists():
      job.status, job.error = "failed", metrics.read_json(failed).get("error", "")
  _save(study, todo + others, epath.Path(directory))


def run(study: Study, directory, *, only: tuple[str, ...] = (), other_bits: bool = False, on_job=print) -> list[Job]:
  """Runs what is not done yet and writes study.json after every run. Returns the jobs.

  only: patterns of run names ("*-s0", "dense-*"), in the order in which they run; other runs are left to other
    processes that share the directory.
    A fork whose trunk is neither done nor among them is left for later.
  other_bits: a trunk that was trained again may log other bits; its forks' versions.json say so ("trunk_again"), and
    reports do.

  Raises ConfigError before anything is trained, and train.Preempted on SIGTERM (the same call
  goes on). Everything else that happens to a run is its own failure.
  """
  directory = epath.Path(directory)
  todo, others = wanted(study, directory, only)
  check(study, directory, todo)
  rundir.make_workdir(directory)
  data.read_ahead(dict.fromkeys(source for job in todo for source in job.config.data.texts.values()))
  known = {job.run: job for job in todo + others}
  clock, trained, began = 0.0, 0.0, time.monotonic()
  position = 0
  audit.of_study(study)  # for study.json; beside a thread that traces it would take ten times as long
  start.lap("checks")
  jax.devices()  # whatever comes now waits for them
  start.lap("devices")
  with programs.ahead(_compilations(todo, directory)):
    work = {job.run: _work(job) for job in todo}
    while position < len(todo):
      job = todo[position]
      position += 1
      _save(study, todo + others, directory)
      if (directory / job.run / "DONE").exists():
        job.status = "done"
        on_job(f"[{position}/{len(todo)}] {job.run}: done before")
        continue
      left = sum(work[other.run] for other in todo[position - 1:] if other.status == "pending")
      eta = f", about {_minutes(left * clock / trained)} of training left" if trained else ""
      on_job(f"[{position}/{len(todo)}] {job.run}{eta}")
      before = time.monotonic()
      _run_one(job, known, directory, other_bits)
      if job.status == "done":
        clock, trained = clock + time.monotonic() - before, trained + work[job.run]
      elif job.status == "pending":
        on_job(f"[{position}/{len(todo)}] {job.run}: left for later: {job.error}")
      else:
        on_job(f"[{position}/{len(todo)}] {job.run}: FAILED: {job.error.splitlines()[0]}")
        if len(job.config.seeds) > 1 and "not finite" in job.error:
          alone = _one_by_one(job)
          on_job(f"[{position}/{len(todo)}] its seeds run one by one, so that one does not take the others along")
          todo[position:position] = alone
          work.update({other.run: _work(other) for other in alone})
  _save(study, todo + others, directory)
  done = sum(job.status == "done" for job in todo)
  on_job(f"{done} of {len(todo)} runs done in {_minutes(time.monotonic() - began)}")
  return todo


def _compilations(todo: list[Job], directory):
  """What the runs that are not done will compile, in the order of the runs."""
  for job in todo:
    if not (directory / job.run / "DONE").exists():
      yield from train.compilations(job.config, sharding.make_mesh(job.config),
                                    forks.first_step(job.config, directory / job.run))


def unfinished(study: Study, directory) -> list[str]:
  """The runs that are neither done nor failed."""
  directory = epath.Path(directory)
  return [job.run for job in jobs(study, directory)
          if not any((directory / job.run / name).exists() for name in ("DONE", "FAILED"))]


def _run_one(job: Job, known: dict[str, Job], directory, other_bits: bool) -> None:
  workdir, trunk = directory / job.run, known.get(job.trunk)
  try:
    if trunk is not None and trunk.status == "failed":
      raise RuntimeError(f"its trunk {trunk.run} failed")
    if trunk is not None and not (directory / trunk.run / "DONE").exists():
      raise lock.Busy(f"its trunk {trunk.run} is not done yet")
    if trunk is not None:
      again.bring_back(trunk, job.config.fork.step, known, directory, other_bits)
    train.train(job.config, workdir)
    job.status, job.error = "done", ""
  except (train.Preempted, KeyboardInterrupt):
    raise
  # another process is at it, or its trunk is not to be had: neither failed nor done
  except (lock.Busy, again.Unlike) as error:
    job.error = str(error)
  except Exception as error:  # whatever it is, the other runs are not to blame
    job.status, job.error = "failed", f"{type(error).__name__}: {error}"
    logging.debug("%s", traceback.format_exc())
    if not processes.first():
      return
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(workdir / "FAILED", {"error": job.error, "traceback": traceback.format_exc()})


def _one_by_one(job: Job) -> list[Job]:
  out = []
  for seed in job.config.seeds:
    config = copy.deepcopy(job.config)
    config.seeds = (seed,)
    out.append(Job(config, _directory(config), job.trunk))
  return out


def _work(job: Job) -> float:
  """FLOPs that the run itself computes: a fork does not repeat its trunk's."""
  config = job.config
  skipped = flops.cumulative(config, max(config.fork.step, 0)) if config.fork.workdir and not config.fork.reset else 0.0
  return (flops.cumulative(config, config.schedule.steps) - skipped) * len(config.seeds)


def _save(study, todo, directory) -> None:
  if not processes.first():
    return
  for job in todo:
    if job.status == "pending" and (directory / job.run / "DONE").exists():
      job.status = "done"            # by another process
  plan = epath.Path(study.plan) / "plan.json" if study.plan else directory / "plan.json"
  metrics.write_json(directory / "study.json", {
      **asked(study),
      "audit": [{**dataclasses.asdict(row), "geometry": str(row.geometry)} for row in audit.of_study(study)],
      **({"plan": metrics.read_json(plan)} if plan.exists() else {}),
      **({} if study.speeds is None else {"speeds": study.speeds}),
      "jobs": [{"run": job.run, "arm": job.config.arm, "size": job.config.size, "seeds": list(job.config.seeds),
                "status": job.status, "error": job.error} for job in todo]})


def _minutes(seconds: float) -> str:
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
