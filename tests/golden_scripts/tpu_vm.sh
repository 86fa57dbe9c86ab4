#!/usr/bin/env bash
# native on v5litepod-8: runs until it is done, through preemptions.
set -u
again() {  # exit codes of launch/cli.py: 75 preempted, 4 a checkpoint or 6 a process failed; above 128: a signal
  case "$1" in 75 | 4 | 6) true ;; *) [ "$1" -gt 128 ] ;; esac
}
tpu=(native --zone=us-west4-a --project=p)
tpu_vm() { gcloud compute tpus tpu-vm "$1" "${tpu[@]}" "${@:2}" --quiet; }
on_all() { tpu_vm ssh --worker=all --command="$1"; }
on_first() { tpu_vm ssh --worker=0 --command="$1" 2>/dev/null; }
state() {  # MISSING only if gcloud says so: a lost connection is no lost TPU
  local told
  if told=$(tpu_vm describe --format='value(state)' 2>&1); then echo "$told" | tail -n 1
  elif [[ "$told" == *NOT_FOUND* || "$told" == *"not found"* ]]; then echo MISSING
  else echo UNKNOWN; echo "$told" >&2; fi
}
trap 'echo "native: no longer watched, not stopped. To delete it: gcloud compute tpus tpu-vm delete ${tpu[*]}" >&2
  exit 130' INT TERM

command -v gcloud >/dev/null || { echo "native: gcloud is not installed here" >&2; exit 2; }
restarts=0 failed=0 code=""
while true; do
  case "$(state)" in
    READY) ;;
    MISSING)
      told=$(tpu_vm create --accelerator-type=v5litepod-8 --version=tpu-ubuntu2204-base --spot 2>&1)
      case "$?:$told" in
        0:*) ;;
        *INVALID_ARGUMENT* | *PERMISSION_DENIED*) echo "$told" >&2; exit 2 ;;  # no capacity comes and goes, this stays
        *) echo "$told" >&2; sleep 60 ;;
      esac
      continue ;;
    PREEMPTED | TERMINATED | STOPPED) tpu_vm delete || sleep 30; continue ;;
    *) sleep 15; continue ;;
  esac
  if ! on_all 'test -d ~/native || git clone --quiet https://example.org/nsa.git ~/native; cd ~/native && { source /shared/venv/bin/activate; }' || ! on_all 'cd ~/native && { tmux has-session -t run 2>/dev/null || { rm -f exit-code; tmux new-session -d -s run bash -c '"'"'{ { source /shared/venv/bin/activate; } && python -m launch.train --config=experiments/native.py:method=msa --workdir=gs://bucket/native; echo $? > exit-code; } >> run.log 2>&1'"'"'; }; }'; then
    failed=$((failed + 1))
    if [ "$failed" -ge 5 ] && [ "$(state)" = READY ]; then code=2; break; fi
    sleep 30
    continue
  fi
  failed=0 code=""
  while [ -z "$code" ]; do
    sleep 30
    case "$(state)" in
      READY | UNKNOWN) code=$(on_first 'cat ~/native/exit-code') ;;
      *) code=137 ;;
    esac
  done
  on_first 'tail -n 20 ~/native/run.log'
  echo "native: exit code $code" >&2
  if ! again "$code" || [ "$restarts" -ge 100 ]; then break; fi
  restarts=$((restarts + 1))
  on_all 'tmux kill-session -t run 2>/dev/null; true'  # a worker that waits for one that has gone
done
tpu_vm delete
exit "$code"
