"""This machine: the command, again after each preemption."""
from __future__ import annotations

from launch.clusters.job import WATCH, Job, Script

# Seconds before the next try when a checkpoint failed: somebody has to free the disk.
PAUSE = 60


def script(job: Job) -> Script:
  """A bash script; a signal to it ends the job, one to the command alone is a preemption. One node only."""
  if job.nodes != 1:
    raise ValueError(f"--nodes={job.nodes}: --cluster=local is this one machine")
  setup = f"{{ {job.setup}; }} || exit 2\n" if job.setup else ""
  text = f"""#!/usr/bin/env bash
# {job.name}: runs until it is done.
set -u
{WATCH}
child="" stopped="" restarts=0
trap 'interrupted=1 stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
{setup}while true; do
  {job.python} &
  child=$!
  watch "$child"
  if [ -n "$stopped" ] || ! again "$code"; then exit "$code"; fi
  if [ "$restarts" -ge {job.max_restarts} ]; then
    echo "{job.name}: {job.max_restarts} restarts are used up" >&2
    exit "$code"
  fi
  restarts=$((restarts + 1))
  echo "{job.name}: exit code $code, restart $restarts of {job.max_restarts}" >&2
  if [ "$code" -eq 4 ]; then
    sleep {PAUSE} &
    child=$!
    watch "$child"
    [ -z "$stopped" ] || exit 4
  fi
done
"""
  return Script(".sh", text, ("bash", "{file}"))
