"""Runs an entry point on a cluster: this machine, Slurm, Cloud TPU VMs, or Kubernetes.

    python -m launch.submit --cluster=slurm --name=native --nodes=2 --gpus=8 --time=24:00:00 --dry_run \\
        -- launch.train --config=experiments/native.py --workdir=/shared/runs/native

`--dry_run` prints the script or manifest and the command that would submit it, and does nothing.
"""
import os
import pathlib
import shlex
import subprocess
import sys

from absl import flags

from launch import cli, clusters

_CLUSTER = flags.DEFINE_enum("cluster", None, sorted(clusters.CLUSTERS), "Where to run.")
_NAME = flags.DEFINE_string("name", None, "Name of the job: lower-case letters, digits and dashes.")
_NODES = flags.DEFINE_integer("nodes", 1, "Machines; one process each.", lower_bound=1)
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs per machine (Slurm, GKE).", lower_bound=0)
_MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "Restarts before the job is given up.",
                                     lower_bound=0)
_SETUP = flags.DEFINE_string("setup", "", 'Shell command on every node first, e.g. "source /shared/venv/bin/activate".')
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be done; do nothing.")
_SCRIPTS = flags.DEFINE_string("scripts", "runs/submitted", "Directory that keeps what was submitted.")
# Name -> the clusters that take it, what it is.
OPTIONS = {
    "partition": ("slurm", "Slurm partition."), "time": ("slurm", "Slurm time limit, e.g. 24:00:00."),
    "account": ("slurm", "Slurm account."),
    "logs": ("slurm", "Slurm: directory of the logs, on a file system of all nodes."),
    "accelerator": ("tpu_vm gke", "TPU type (v5litepod-8) or Kubernetes node label."),
    "zone": ("tpu_vm", "Google Cloud zone."), "project": ("tpu_vm", "Google Cloud project."),
    "runtime": ("tpu_vm", "TPU VM runtime version."), "spot": ("tpu_vm", "TPU VM: yes (default) or no."),
    "repository": ("tpu_vm", "TPU VM: git URL of the project."), "image": ("gke", "Kubernetes: container image."),
    "topology": ("gke", "Kubernetes: TPU topology, e.g. 4x4."), "chips": ("gke", "Kubernetes: TPU chips per node (4)."),
    "volume": ("gke", "Kubernetes: a persistent volume claim and where it goes, CLAIM:/path."),
}
for _name, (_, _help) in OPTIONS.items():
  flags.DEFINE_string(_name, "", _help)
flags.mark_flags_as_required(["cluster", "name"])


def job(name: str, command: list[str]) -> clusters.Job:
  """The job that the flags describe. Raises ValueError naming the flag that is wrong."""
  options = {name: flags.FLAGS[name].value for name in OPTIONS if flags.FLAGS[name].value}
  for flag, value in options.items():
    if _CLUSTER.value not in OPTIONS[flag][0].split():
      raise ValueError(f"--{flag}={value}: nothing that --cluster={_CLUSTER.value} takes, but {OPTIONS[flag][0]}: "
                       "leave it out")
  return clusters.Job(name, tuple(command), _NODES.value, _GPUS.value, _MAX_RESTARTS.value, _SETUP.value, options)


def submit(name: str, command: list[str]) -> int:
  """Writes the script and submits it, or prints both; returns the exit code of the submission."""
  script = clusters.CLUSTERS[_CLUSTER.value](job(name, command))
  path = pathlib.Path(_SCRIPTS.value) / f"{name}{script.suffix}"
  argv = [part.format(file=path) for part in script.submit]
  if _DRY_RUN.value:
    print(f"# {path}\n{script.text}\n# then: {shlex.join(argv)}")
    return 0
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(script.text)
  try:
    return subprocess.run(argv, check=False).returncode
  except FileNotFoundError:
    raise FileNotFoundError(f"{argv[0]}: not installed here; {path} is written, submit it where it is") from None


def main(command):
  return submit(_NAME.value, command)


if __name__ == "__main__":
  sys.path.insert(0, os.getcwd())
  cli.run(main, arguments=True)
