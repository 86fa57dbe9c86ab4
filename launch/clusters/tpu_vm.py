"""Cloud TPU VMs through gcloud: create, set up, run on all workers, watch, and delete in the end.

The script stays where it was started and watches. A spot TPU that was taken away is deleted and made anew,
and the same command goes on from its last checkpoint: the run directory has to be on gs://.
"""
from __future__ import annotations

import shlex

from launch.clusters.job import WATCH, Job, Script

# The images' own Python is older than the project needs.
SETUP = ("{ command -v python3.11 || sudo apt-get install -qq -y python3.11-venv; } >/dev/null && "
         'source launch/environment.sh && install_into .venv ".[tpu]" && source .venv/bin/activate')
TRIES = 5  # of the set-up, before it is taken for broken


def script(job: Job) -> Script:
  """A bash script; options: accelerator, zone, project, runtime, repository (git URL), spot (yes or no)."""
  accelerator = job.option("accelerator", "v5litepod-8")
  zone, project = job.option("zone", "us-west4-a"), job.option("project", "my-project")
  repository = job.option("repository", "https://github.com/me/fork.git")
  runtime = job.options.get("runtime") or "tpu-ubuntu2204-base"
  spot = job.options.get("spot") or "yes"
  if spot not in ("yes", "no"):
    raise ValueError(f"--spot={spot}: yes or no")
  job.need_remote_workdir("take gs://BUCKET/...")
  machine = f"--accelerator-type={shlex.quote(accelerator)} --version={shlex.quote(runtime)}"
  machine += " --spot" if spot == "yes" else ""
  folder, setup = f"~/{job.name}", job.setup or SETUP
  prepare = (f"test -d {folder} || git clone --quiet {shlex.quote(repository)} {folder}; "
             f"cd {folder} && {{ {setup}; }}")
  run = f"{{ {setup}; }} && {job.python}; echo $? > exit-code"
  start = (f"cd {folder} && {{ tmux has-session -t run 2>/dev/null || {{ rm -f exit-code; "
           f"tmux new-session -d -s run bash -c {shlex.quote(f'{{ {run}; }} >> run.log 2>&1')}; }}; }}")
  text = f"""#!/usr/bin/env bash
# {job.name} on {accelerator}: runs until it is done, through preemptions.
set -u
{WATCH.partition("watch()")[0].rstrip()}
tpu=({job.name} --zone={shlex.quote(zone)} --project={shlex.quote(project)})
tpu_vm() {{ gcloud compute tpus tpu-vm "$1" "${{tpu[@]}}" "${{@:2}}" --quiet; }}
on_all() {{ tpu_vm ssh --worker=all --command="$1"; }}
on_first() {{ tpu_vm ssh --worker=0 --command="$1" 2>/dev/null; }}
state() {{  # MISSING only if gcloud says so: a lost connection is no lost TPU
  local told
  if told=$(tpu_vm describe --format='value(state)' 2>&1); then echo "$told" | tail -n 1
  elif [[ "$told" == *NOT_FOUND* || "$told" == *"not found"* ]]; then echo MISSING
  else echo UNKNOWN; echo "$told" >&2; fi
}}
trap 'echo "{job.name}: no longer watched, not stopped. To delete it: gcloud compute tpus tpu-vm delete ${{tpu[*]}}" >&2
  exit 130' INT TERM

command -v gcloud >/dev/null || {{ echo "{job.name}: gcloud is not installed here" >&2; exit 2; }}
restarts=0 failed=0 code=""
while true; do
  case "$(state)" in
    READY) ;;
    MISSING)
      told=$(tpu_vm create {machine} 2>&1)
      case "$?:$told" in
        0:*) ;;
        *INVALID_ARGUMENT* | *PERMISSION_DENIED*) echo "$told" >&2; exit 2 ;;  # no capacity comes and goes, this stays
        *) echo "$told" >&2; sleep 60 ;;
      esac
      continue ;;
    PREEMPTED | TERMINATED | STOPPED) tpu_vm delete || sleep 30; continue ;;
    *) sleep 15; continue ;;
  esac
  if ! on_all {shlex.quote(prepare)} || ! on_all {shlex.quote(start)}; then
    failed=$((failed + 1))
    if [ "$failed" -ge {TRIES} ] && [ "$(state)" = READY ]; then code=2; break; fi
    sleep 30
    continue
  fi
  failed=0 code=""
  while [ -z "$code" ]; do
    sleep 30
    case "$(state)" in
      READY | UNKNOWN) code=$(on_first 'cat {folder}/exit-code') ;;
      *) code=137 ;;
    esac
  done
  on_first 'tail -n 20 {folder}/run.log'
  echo "{job.name}: exit code $code" >&2
  if ! again "$code" || [ "$restarts" -ge {job.max_restarts} ]; then break; fi
  restarts=$((restarts + 1))
  on_all 'tmux kill-session -t run 2>/dev/null; true'  # a worker that waits for one that has gone
done
tpu_vm delete
exit "$code"
"""
  return Script(".sh", text, ("bash", "{file}"))
