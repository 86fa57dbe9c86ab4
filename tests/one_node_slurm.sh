#!/usr/bin/env bash
# A Slurm cluster of this one machine, for tests: apt-get install slurm-wlm munge, then as root
#   bash tests/one_node_slurm.sh DIRECTORY
# starts munged, slurmctld and slurmd with all their files in DIRECTORY and stops them when it is stopped. In another
# shell: export SLURM_CONF=DIRECTORY/slurm.conf; sinfo; sbatch ... A job in the partition "urgent" preempts one in "main".
# Needs neither cgroups nor systemd nor a user for Slurm: it works in a container.
set -euo pipefail
mkdir -p "$1"
home=$(cd "$1" && pwd)
host=$(hostname -s)
mkdir -p "$home/state" "$home/spool"
chmod 755 "$home"
(umask 077 && head -c 128 /dev/urandom > "$home/munge.key")

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
# cred_expire: a job that is requeued waits until its old credential has expired, 120 seconds by default.
cat > "$home/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
export SLURM_CONF="$home/slurm.conf"

daemons=()
# shellcheck disable=SC2329  # the trap calls it
stop() {
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do kill "${daemons[i]}" 2>/dev/null || true; done
  wait
}
trap stop EXIT
trap 'exit 0' TERM INT
start() { "$@" > "$home/$1.out" 2>&1 & daemons+=($!); }
start munged --foreground --force --key-file="$home/munge.key" --socket="$home/munge.socket" \
  --pid-file="$home/munge.pid" --log-file="$home/munge.log" --seed-file="$home/munge.seed"
start slurmctld -D -i
start slurmd -D
for _ in $(seq 60); do
  if [ "$(sinfo --noheader --partition=main --format=%T 2>/dev/null)" = idle ]; then
    echo "up: export SLURM_CONF=$SLURM_CONF"
    wait
    exit 1  # a daemon ended by itself
  fi
  sleep 1
done
tail -n 5 "$home"/*.out >&2
echo "error: the node did not come up in 60 seconds" >&2
exit 1
