#!/usr/bin/env bash
# native: runs until it is done.
set -u
again() {  # exit codes of launch/cli.py: 75 preempted, 4 a checkpoint or 6 a process failed; above 128: a signal
  case "$1" in 75 | 4 | 6) true ;; *) [ "$1" -gt 128 ] ;; esac
}
watch() {  # waits for process $1 although signals end `wait`; its exit code is left in $code
  while interrupted=""; wait "$1"; code=$?; [ -n "$interrupted" ]; do :; done
}
child="" stopped="" restarts=0
trap 'interrupted=1 stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
{ source /shared/venv/bin/activate; } || exit 2
while true; do
  python -m launch.train --config=experiments/native.py:method=msa '--workdir=/shared/runs/a b' &
  child=$!
  watch "$child"
  if [ -n "$stopped" ] || ! again "$code"; then exit "$code"; fi
  if [ "$restarts" -ge 100 ]; then
    echo "native: 100 restarts are used up" >&2
    exit "$code"
  fi
  restarts=$((restarts + 1))
  echo "native: exit code $code, restart $restarts of 100" >&2
  if [ "$code" -eq 4 ]; then
    sleep 60 &
    child=$!
    watch "$child"
    [ -z "$stopped" ] || exit 4
  fi
done
