"""Runs a study, or goes on with it, and writes its report.

    python -m launch.study --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m launch.study --config=experiments/pilot.py --workdir=runs/pilot --only='*-s0,dense-*'  # beside others

With --plan it writes PLAN.md and plan.json (into the study's `plan` directory, or the workdir) and trains nothing:
commit them before the first run that counts; the report lists what deviates. With --only the process runs the named
runs alone; the report is written by the call that finds all runs done. With --devices=0,1,2,3 runs go side by side,
in a process on each device (launch/side_by_side.py).
"""
from pathlib import Path
import re
import time

from absl import flags
from ml_collections import config_flags

from launch import cli, side_by_side

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file of a study, e.g. experiments/quickstart.py",
                                          lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Study directory, made if it is not there.")
_ONLY = flags.DEFINE_list("only", [], "Patterns of run names: only these, in this order, e.g. *-s0,*-s1; other "
                          "processes take the rest.")
_DEVICES = flags.DEFINE_list("devices", [], "GPUs of this host, each as often as it is to have processes: 0,0,1,1 runs "
                             "two on each of two. Empty: one run after the other, in this process.")
_WORKER = flags.DEFINE_bool("worker", False, "What --devices starts: takes names of runs from standard input, a line "
                            "each.")
_OTHER_BITS = flags.DEFINE_bool("other_bits", False, "A trunk whose checkpoints are gone may log other bits when it is "
                                "trained again; its forks' records and the report say so.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs with their cost; train nothing.")
_PLAN = flags.DEFINE_bool("plan", False, "Write the plan of the study (PLAN.md, plan.json); train nothing.")
flags.mark_flag_as_required("config")
cli.define_common()


def main():
  import jax

  from nsa import config as config_lib, start, study as study_lib
  start.of_process()
  study = _CONFIG.value
  if not isinstance(study, study_lib.Study):
    raise config_lib.ConfigError(
        [("config", type(study).__name__, "launch.study takes a Study; a Config goes to launch.train")])
  workdir = _WORKDIR.value or ("unnamed" if _DRY_RUN.value or (_PLAN.value and study.plan) else "")
  if not workdir:
    raise config_lib.ConfigError([("--workdir", "", "name the study directory, or take --dry_run")])
  if _DRY_RUN.value:
    from nsa.planning import plan
    print(plan.describe_study(study, workdir))
    return
  if _PLAN.value:
    from nsa.report import plan_file
    study_lib.jobs(study, workdir)  # raises for what cannot run
    print(plan_file.write(study, study.plan or workdir))
    return
  cli.compilation_cache(flags.FLAGS.compilation_cache, programs=flags.FLAGS.keep_programs, workdir=workdir)
  began = time.monotonic()
  say = lambda line: print(line, flush=True)
  only = tuple(_ONLY.value)
  for device in _DEVICES.value:
    if not re.fullmatch(r"\d+|(GPU|MIG)-.+", device):  # CUDA would see none, and the runs would train on the CPU
      raise config_lib.ConfigError([("--devices", device, "numbers or UUIDs of GPUs, such as 0,0,1,1")])
  if _DEVICES.value:
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the others need the devices' memory
    jobs, others = study_lib.wanted(study, workdir, only)
    study_lib.check(study, workdir, jobs)
    study_lib.settle(study, workdir, jobs, others)
    stopped = side_by_side.run(jobs, workdir, _DEVICES.value, say)
    study_lib.settle(study, workdir, jobs, others)
    if stopped:
      return cli.PREEMPTED
  else:
    cli.begin_early(dict.fromkeys(source for arm in study.arms for source in arm.data.texts.values()))
    run = lambda patterns: study_lib.run(study, workdir, only=patterns, other_bits=_OTHER_BITS.value, on_job=say)
    if _WORKER.value:
      return side_by_side.serve(lambda name: run((name,)), Path(workdir) / "logs")
    jobs = run(only)
  left = study_lib.unfinished(study, workdir)
  if left:
    print(f"{len(left)} runs are left to other processes: {', '.join(left)}")
    return exit_code(jobs)
  from nsa import report
  paths = report.write([workdir], f"{workdir}/report")
  print("\n" + report.verdict_table(workdir))
  print(f"\nreport: {paths.html}\n        {paths.markdown}\nin {time.monotonic() - began:.0f} s")
  return exit_code(jobs)


def exit_code(jobs) -> int:
  """A run whose checkpoint could not be written may yet be finished, by a restart; other failures are final."""
  failed = [job.error for job in jobs if job.status == "failed"]
  if any(error.startswith("CheckpointError") for error in failed):
    return cli.CHECKPOINT
  return cli.RUNS_FAILED if failed else 0


if __name__ == "__main__":
  cli.run(main)
