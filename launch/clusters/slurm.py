"""Slurm: one task per node under `srun`; jax.distributed finds the other nodes by Slurm's own variables.

A signal before the time limit, or a preemption, reaches the tasks as SIGTERM: they save and exit with 75,
and the job puts itself back into the queue.
"""
from __future__ import annotations

import re

from launch.clusters.job import WATCH, Job, Script

# Seconds between the signal and the end of the time limit: a checkpoint has to fit in.
GRACE = 120
# What sbatch takes: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or a word for no limit.
_TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE"


def script(job: Job) -> Script:
  """An sbatch script; options: partition, time, account, logs (a directory on a file system of all nodes)."""
  time = job.options.get("time")
  if time and not re.fullmatch(_TIME, time):
    raise ValueError(f"--time={time}: take minutes, H:MM:SS, or D-HH:MM:SS, e.g. --time=24:00:00")
  logs = job.options.get("logs") or "."
  lines = [f"--job-name={job.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1", "--requeue", "--open-mode=append",
           f"--output={logs}/{job.name}-%j.log", f"--signal=B:TERM@{GRACE}"]
  if job.gpus:
    lines.append(f"--gpus-per-node={job.gpus}")
  lines += [f"--{name}={job.options[name]}" for name in ("partition", "time", "account") if job.options.get(name)]
  header = "\n".join(f"#SBATCH {line}" for line in lines)
  setup = f"{{ {job.setup}; }} || exit 2\n" if job.setup else ""
  text = f"""#!/usr/bin/env bash
{header}
set -u
{WATCH}
step=""
# What reaches the batch shell goes on to the tasks. (srun itself would end the step at a SIGTERM.)
trap 'interrupted=1; [ -z "$step" ] || scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
{setup}echo "{job.name}: start $((${{SLURM_RESTART_COUNT:-0}} + 1)) on $SLURM_JOB_NODELIST"
srun --kill-on-bad-exit=1 {job.python} &
step=$!
watch "$step"
echo "{job.name}: exit code $code"
# A job that was cancelled is no longer RUNNING, and stays away.
if again "$code" && [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep {GRACE}  # the controller ends this script
  else
    echo "{job.name}: {job.max_restarts} restarts are used up" >&2
  fi
fi
exit "$code"
"""
  return Script(".sbatch", text, ("sbatch", "{file}"))
