"""What launch.submit and launch.sweep would do, and that the local script does it."""
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

from commands import run
from launch_test import TINY
import pytest

from launch import cli, clusters, study
from nsa import study as study_lib

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ("launch.train", "--config=experiments/native.py:method=msa", "--workdir=/shared/runs/a b")
REMOTE = (*COMMAND[:2], "--workdir=gs://bucket/native")
OPTIONS = {
    "local": {}, "slurm": dict(partition="gpu", time="24:00:00", logs="/shared/logs"),
    "tpu_vm": dict(accelerator="v5litepod-8", zone="us-west4-a", project="p", repository="https://example.org/nsa.git"),
    "gke": dict(image="example.org/nsa:1", volume="claim:/shared"),
}


def script(cluster, **fields):
  command = REMOTE if cluster == "tpu_vm" else COMMAND
  fields = {**dict(name="native", command=command, options=OPTIONS[cluster]), **fields}
  return clusters.CLUSTERS[cluster](clusters.Job(**fields))


def test_the_slurm_script_is_as_recorded():
  """No test can run it. UPDATE_GOLDEN=1 records it anew: then read the difference."""
  made = script("slurm", nodes=2, gpus=8, setup="source /shared/venv/bin/activate")
  path = ROOT / "tests/golden_scripts/slurm.sbatch"
  if os.environ.get("UPDATE_GOLDEN"):
    path.write_text(made.text)
  assert made.text == path.read_text()
  subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_finds_nothing(tmp_path):
  program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if program is None:
    pytest.skip("no shellcheck")
  for cluster in ("local", "slurm", "tpu_vm"):
    made = script(cluster, nodes=1 if cluster == "local" else 2, setup="source /shared/venv/bin/activate")
    (tmp_path / f"{cluster}.sh").write_text(made.text)
  files = [p for folder in (ROOT / "launch", ROOT / "tests", ROOT / ".ci", tmp_path) for p in folder.rglob("*")
           if p.suffix == ".sh" or p.parent.name == ".ci" and p.is_file()]
  # The environment that a user names is not there to be followed.
  found = subprocess.run([program, "--shell=bash", "--exclude=SC1091", *files], capture_output=True, text=True)
  assert len(files) > 6 and not found.returncode, found.stdout


@pytest.mark.parametrize("cluster,fields,words", [
    ("local", dict(nodes=2), "--nodes=2"), ("local", dict(name="Native"), "--name='Native'"),
    ("slurm", dict(command=("train",)), "after --"),
    ("slurm", dict(command=("launch.trian", *COMMAND[1:])), "'launch.trian'.*did you mean launch.train"),
    ("slurm", dict(max_restarts=-1), "--max_restarts=-1"),
    ("slurm", dict(options=dict(time="soon")), "--time=soon: take minutes"),
    ("slurm", dict(options=dict(time="1h")), "--time=1h"),
    ("tpu_vm", dict(options={}), "--accelerator"), ("tpu_vm", dict(command=COMMAND), "--workdir=/shared/runs/a b"),
    ("tpu_vm", dict(options=dict(OPTIONS["tpu_vm"], spot="maybe")), "--spot=maybe"),
    ("gke", dict(options={}), "--image"), ("gke", dict(options=dict(image="i")), "--workdir=.*--volume=CLAIM"),
    ("gke", dict(options=dict(image="i", volume="claim")), "--volume=claim"),
    ("gke", dict(options=dict(image="i", topology="4x4"), command=REMOTE), "--accelerator"),
])
def test_wrong_jobs_are_refused(cluster, fields, words):
  with pytest.raises(ValueError, match=words):
    script(cluster, **fields)


def launch(*argv, code=0):
  return run(*argv, code=code)[code != 0]


def test_dry_run_prints_the_script_and_the_command(tmp_path):
  out = launch("launch.submit", "--cluster=slurm", "--name=native", "--nodes=2", "--dry_run", f"--scripts={tmp_path}/s",
               "--", *COMMAND)
  assert script("slurm", nodes=2, options={}).text in out and out.strip().endswith(f"sbatch {tmp_path}/s/native.sbatch")
  assert not (tmp_path / "s").exists()
  err = launch("launch.submit", "--cluster=slurm", "--name=N", "--dry_run", "--", *COMMAND, code=2)
  assert "--name='N'" in err and "Traceback" not in err
  err = launch("launch.submit", "--cluster=slurm", "--name=n", "--zone=a", "--dry_run", "--", *COMMAND, code=2)
  assert "--zone=a: nothing that --cluster=slurm takes, but tpu_vm" in err
  err = launch("launch.submit", "--name=n", "--", *COMMAND, code=2)
  assert "--cluster: missing; <gke|local|slurm|tpu_vm>: Where to run." in err


def test_sweep_prints_every_point():
  out = launch("launch.sweep", "--grid=config.schedule.steps=10,20", "--grid=:method=msa,nsa", "--",
               "launch.train", "--config=experiments/native.py:steps=5", "--workdir=runs/s/").splitlines()
  assert out[1] == ("python -m launch.train --config=experiments/native.py:steps=5,method=nsa "
                    "--workdir=runs/s/steps_10-method_nsa --config.schedule.steps=10")
  assert len(out) == len(set(out)) == 4
  out = launch("launch.sweep", "--grid=config.data.source=stdlib,files:/a/b", "--submit", "--cluster=slurm", "--name=g",
               "--dry_run", "--", *COMMAND)
  assert (re.findall(r"--job-name=(.*)", out) == ["g-0", "g-1"]
          and "source_files-a-b' --config.data.source=files:/a/b" in out)
  for wrong, words in ((["--grid=steps"], "--grid=steps"), (["--grid=schedule.steps=1,2"], "e.g. config.schedule."),
                       ([], "--grid: missing"), (["--grid=config.seeds=1"], "--workdir")):
    command = ["launch.train", "--config=c.py"] + ["--workdir=w"] * (words != "--workdir")
    assert words in launch("launch.sweep", *wrong, "--", *command, code=2)


def test_a_jobset_retries_no_wrong_configuration():
  """Exit codes 2 and 3 end the set; 75, 4 and signals match no rule, and the set restarts."""
  spec = json.loads(script("gke").text)["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
  assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
  final = {code for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"
           for code in rule["onExitCodes"]["values"]}
  assert {cli.BAD_INPUT, cli.DIVERGED, cli.RUNS_FAILED, 1, 127} <= final
  assert not {cli.PREEMPTED, cli.CHECKPOINT, 134, 137, 143} & final
  several = json.loads(script("gke", nodes=2).text)
  assert '"values": [2, 3, 5, 126, 127]' in json.dumps(several), "a node's death may be an error (1) of its peers"


def test_a_jobset_gives_every_node_its_place_its_gpus_and_its_volume():
  job = json.loads(script("gke", nodes=2, gpus=8, setup="source env").text)["spec"]["replicatedJobs"][0]
  pods = job["template"]["spec"]
  pod = pods["template"]["spec"]
  container, = pod["containers"]
  assert (pods["parallelism"], pods["completions"], pods["completionMode"]) == (2, 2, "Indexed")
  assert (container["image"], container["resources"]) == ("example.org/nsa:1", {"limits": {"nvidia.com/gpu": "8"}})
  assert container["command"][-1] == (
      "export JAX_COORDINATOR_ADDRESS=native-node-0-0.native:1234 JAX_NUM_PROCESSES=2 "
      'JAX_PROCESS_ID="$JOB_COMPLETION_INDEX"; source env && exec python -m '
      f"launch.train {COMMAND[1]} '{COMMAND[2]}'")
  mount, = container["volumeMounts"]
  assert pod["volumes"] == [{"name": mount["name"], "persistentVolumeClaim": {"claimName": "claim"}}]
  assert mount["mountPath"] == "/shared"


def test_a_study_comes_back_if_a_restart_can_help():
  jobs = lambda *errors: [study_lib.Job(None, "run", status="failed" if error else "done", error=error)
                          for error in errors]
  assert study.exit_code(jobs("", "")) == 0
  assert study.exit_code(jobs("", "Diverged: seed 0")) == cli.RUNS_FAILED
  assert study.exit_code(jobs("CorruptCheckpointError: none is good")) == cli.RUNS_FAILED
  assert study.exit_code(jobs("Diverged: seed 0", "CheckpointError: the disk is full")) == cli.CHECKPOINT


# A stand-in for an entry point: ends with the first code of the file `codes`, and takes it away.
ENTRY = """
import os, pathlib, signal, sys, time
codes = pathlib.Path("codes")
pathlib.Path("log").open("a").write("run ")
signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))
code, *rest = codes.read_text().split()
codes.write_text(" ".join(rest))
if code == "wait": time.sleep(60)
if int(code) < 0: os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


def stand_in(folder, codes):
  (folder / "launch").mkdir(exist_ok=True)
  (folder / "launch/__init__.py").touch()
  (folder / "launch/train.py").write_text(ENTRY)
  (folder / "codes").write_text(codes)
  (folder / "log").write_text("")


def commands(folder, **texts):
  """A PATH that begins with these commands, and this Python."""
  (folder / "bin").mkdir(exist_ok=True)
  for name, text in texts.items():
    (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / "bin" / name).chmod(0o755)
  return {**os.environ, "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def until(condition, seconds=60):
  deadline = time.time() + seconds
  while not condition():
    assert time.time() < deadline
    time.sleep(0.05)


@pytest.mark.parametrize("codes,code,runs,fields", [
    ("75 75 0", 0, 3, {}), ("75 3", 3, 2, {}), ("2", 2, 1, {}), ("75 75 0", 75, 2, dict(max_restarts=1)),
    ("4 -9 0", 0, 3, {}),
])
def test_the_local_script_restarts_what_can_go_on(tmp_path, codes, code, runs, fields):
  stand_in(tmp_path, codes)
  path = tmp_path / "job.sh"
  path.write_text(script("local", command=("launch.train",), **fields).text)
  env = commands(tmp_path, sleep='echo "$@" >> slept')
  assert subprocess.run(["bash", path], cwd=tmp_path, env=env, timeout=60, capture_output=True).returncode == code
  assert (tmp_path / "log").read_text().count("run") == runs
  assert (tmp_path / "slept").exists() == ("4" in codes)  # a full disk is given time


def test_a_signal_to_the_local_script_ends_it_when_all_is_saved(tmp_path):
  stand_in(tmp_path, "wait 0")
  path = tmp_path / "job.sh"
  path.write_text(script("local", command=("launch.train",)).text)
  process = subprocess.Popen(["bash", path], cwd=tmp_path, env=commands(tmp_path), stderr=subprocess.PIPE)
  until(lambda: (tmp_path / "codes").read_text() == "0")
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75 and (tmp_path / "log").read_text().count("run") == 1


# gcloud: notes what is asked; `describe` and `cat .../exit-code` answer with the next line of a file.
GCLOUD = r"""
echo "$4 $*" | tr '\n' ' ' >> calls; echo >> calls
next() { line=$(head -n 1 "$1"); sed -i 1d "$1"; echo "$line"; }
case "$*" in
  *" describe "*) answer=$(next states); echo "$answer"; [[ "$answer" != ERROR* ]] ;;
  *tmux*) ;;
  *"cat ~/native/exit-code"*) next codes ;;
  *" create "*) answer=$(next created); echo "$answer"; [[ "$answer" != ERROR* ]] ;;
esac
"""


@pytest.mark.parametrize("states,codes,created,code,calls", [
    # Made; runs; taken away by its owner; made anew; preempted; done.
    ("ERROR: NOT_FOUND/READY/READY/ERROR: no network/PREEMPTED/PREEMPTED/ERROR: NOT_FOUND/READY/READY/READY/READY",
     "//75/0", "ok/ok", 0, "create run delete create run run delete"),
    ("READY/READY", "2", "", 2, "run delete"),
    ("ERROR: NOT_FOUND/ERROR: NOT_FOUND/READY/READY", "0", "ERROR: no more capacity/ok", 0, "create create run delete"),
    ("ERROR: NOT_FOUND", "", "ERROR: INVALID_ARGUMENT: no such accelerator", 2, "create"),
])
def test_the_tpu_script_watches_and_deletes(tmp_path, states, codes, created, code, calls):
  for name, text in (("states", states), ("codes", codes), ("created", created)):
    (tmp_path / name).write_text(text.replace("/", "\n") + "\n")
  path = tmp_path / "job.sh"
  path.write_text(script("tpu_vm").text)
  done = subprocess.run(["bash", path], cwd=tmp_path, env=commands(tmp_path, gcloud=GCLOUD, sleep=""), timeout=60,
                        capture_output=True, text=True)
  assert done.returncode == code, done.stderr
  said = [line.split()[0] if "new-session" not in line else "run"
          for line in (tmp_path / "calls").read_text().splitlines()
          if "new-session" in line or line.split()[0] in ("create", "delete")]
  assert " ".join(said) == calls
  asked = (tmp_path / "calls").read_text()
  assert all("native --zone=us-west4-a --project=p" in line for line in asked.splitlines())


def test_the_local_script_takes_a_run_through_a_preemption(tmp_path):
  """A real run: SIGTERM to the process that trains; the script starts it again; it finishes."""
  work = tmp_path / "run"
  command = ("launch.train", "--config=experiments/mqar.py:arm=dense,steps=300", f"--workdir={work}", *TINY)
  path = tmp_path / "job.sh"
  path.write_text(script("local", command=command).text)
  env = {**commands(tmp_path), "JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(["bash", path], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
  metrics = work / "metrics.jsonl"
  until(lambda: metrics.exists() and metrics.read_text().count("\n") > 10, seconds=300)
  children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  os.kill(int(children[0]), signal.SIGTERM)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert re.search(r"saved at step \d+ of 300", err), err
  assert "exit code 75, restart 1 of 100" in err and "300 steps done" in out
  assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 301))
