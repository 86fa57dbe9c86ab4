"""Jobs under a real Slurm on this machine: signalled or preempted, requeued, finished with the bits of an undisturbed
run.

    pytest -m slurm       (as root; Debian: slurm-wlm and munge; about 2 minutes)
"""
import json
import os
from pathlib import Path
import shlex
import shutil
import subprocess
import sys
import time

from launch_test import TINY
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "scontrol")
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not all(map(shutil.which, TOOLS)) or os.geteuid() != 0,
                                                    reason="needs Slurm, munge and root")]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """A cluster of one node; yields the environment that its commands need."""
  home = tmp_path_factory.mktemp("slurm")
  cluster = subprocess.Popen(["bash", ROOT / "tests/one_node_slurm.sh", home], stdout=subprocess.PIPE, text=True)
  try:
    assert cluster.stdout.readline().startswith("up: "), "the node did not come up"
    yield {**os.environ, "SLURM_CONF": f"{home}/slurm.conf", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
  finally:
    cluster.terminate()
    cluster.wait(30)


def train(workdir):
  return ["launch.train", "--config=experiments/mqar.py:arm=msa,steps=200", f"--workdir={workdir}", *TINY,
          f"--compilation_cache={Path(workdir).parent}/cache"]


def state_of(job, env):
  out = subprocess.run(["scontrol", "show", "job", "--oneliner", job], env=env, capture_output=True, text=True).stdout
  return dict(part.split("=", 1) for part in out.split() if "=" in part)


def steps_in(workdir):
  path = Path(workdir) / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def submit(slurm, tmp_path, name, *flags, command):
  """The id of the job that launch.submit makes of `command`."""
  setup = f"cd {shlex.quote(str(ROOT))}; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
  argv = [sys.executable, "-m", "launch.submit", "--cluster=slurm", f"--name={name}", f"--logs={tmp_path}",
          f"--scripts={tmp_path}/submitted", f"--setup={setup}", *flags, "--", *command]
  out = subprocess.run(argv, cwd=ROOT, env=slurm, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  return out.stdout.split()[-1]


def told(tmp_path, name, job):
  log = tmp_path / f"{name}-{job}.log"
  return log.read_text() if log.exists() else "(no log)"


@pytest.mark.parametrize("by", ["signal", "urgent job"])
def test_a_preempted_job_is_requeued_and_finishes(slurm, tmp_path, by):
  work, deadline = tmp_path / "run", time.time() + 300
  job = submit(slurm, tmp_path, "cut", command=train(work))
  log = lambda: told(tmp_path, "cut", job)
  while len(steps_in(work)) < 20:
    assert time.time() < deadline and state_of(job, slurm)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log()
    time.sleep(0.2)
  if by == "signal":
    subprocess.run(["scancel", "--signal=TERM", "--batch", job], env=slurm, check=True)
  else:
    subprocess.run(["sbatch", "--partition=urgent", f"--output={tmp_path}/urgent.log", "--wrap=sleep 1"], env=slurm,
                   check=True)
  while (state := state_of(job, slurm))["JobState"] != "COMPLETED":
    assert time.time() < deadline and state["JobState"] not in ("FAILED", "CANCELLED"), (state, log())
    time.sleep(1)
  assert state["Restarts"] == "1" and state["ExitCode"] == "0:0"
  assert "saved at step" in log() and "start 2 on" in log() and "exit code 0" in log()

  twin = tmp_path / "twin"
  subprocess.run([sys.executable, "-m", *train(twin)], cwd=ROOT, env=slurm, check=True, capture_output=True)
  numbers = lambda rows: [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
  assert numbers(steps_in(work)) == numbers(steps_in(twin)) and len(steps_in(work)) == 200


def test_a_wrong_configuration_is_not_requeued(slurm, tmp_path):
  job = submit(slurm, tmp_path, "typo", command=train(tmp_path / "run") + ["--config.log_everi=1"])
  deadline = time.time() + 120
  while (state := state_of(job, slurm))["JobState"] != "FAILED":
    assert time.time() < deadline and state["JobState"] != "COMPLETED", state
    time.sleep(0.5)
  assert state["Restarts"] == "0" and state["ExitCode"] == "2:0"
  assert "did you mean log_every" in told(tmp_path, "typo", job)


def test_a_cancelled_job_stays_away(slurm, tmp_path):
  job = submit(slurm, tmp_path, "cancelled", command=train(tmp_path / "run"))
  deadline = time.time() + 120
  while "start 1 on" not in told(tmp_path, "cancelled", job):
    assert time.time() < deadline
    time.sleep(0.2)
  subprocess.run(["scancel", job], env=slurm, check=True)
  while (state := state_of(job, slurm))["JobState"] != "CANCELLED":
    assert time.time() < deadline and state["JobState"] != "PENDING", (state, told(tmp_path, "cancelled", job))
    time.sleep(0.2)
  assert state["Restarts"] == "0" and "start 2" not in told(tmp_path, "cancelled", job)
