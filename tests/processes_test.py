"""Tests of runs of several processes (nsa/processes.py, launch/cli.py): the command of a user, in each process.

Two or four processes of this machine hold the four devices of one mesh. One process that has imported everything
forks them, which saves most of their time; each then does all that `python -m launch.train` does.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

from commands import logged
import numpy as np
import pytest

from nsa import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 8

# A line of input is one launch: [[environment, arguments, log file], ...]; the answer is the list of exit codes.
# TROUBLE is "step event": what befalls the process when it reads the batch of that step, or saves it.
SERVER = """
import json, os, signal, sys, time
from absl import flags
from launch import cli, train as entry
from nsa import checkpoint, evaluate, step as step_lib, train
import jax

def trouble(step, event):
  read, save = step_lib.Batches.at, checkpoint.Checkpoints.save
  def at(self, now):
    if now == step and event != "kill_saving":
      # jax looks for a signal once a second only: without the sleep the steps left may be done before it has looked.
      {"term": lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(3)),
       "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "sleep": lambda: time.sleep(1000)}[event]()
    return read(self, now)
  def saved(self, now, *args, **kw):
    save(self, now, *args, **kw)
    if now == step and event == "kill_saving":
      os.kill(os.getpid(), signal.SIGKILL)
  step_lib.Batches.at, checkpoint.Checkpoints.save = at, saved

for line in sys.stdin:
  children = []
  for environment, arguments, log in json.loads(line):
    pid = os.fork()
    if not pid:
      file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
      os.dup2(file, 1), os.dup2(file, 2)
      os.environ.update(environment)
      jax.config.update("jax_num_cpu_devices", int(environment["DEVICES"]))
      if "TROUBLE" in environment:
        step, event = environment["TROUBLE"].split()
        trouble(int(step), event)
      sys.argv = ["train", *arguments]
      cli.run(entry.main)  # ends in sys.exit
    children.append(pid)
  codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
  print(json.dumps(codes), flush=True)
"""


# What processes have to agree on in every step, and where steps become others: rows twice as long from the middle on.
EXPERIMENT = """
from experiments import mqar
from nsa.config import Stage

def get_config(arg=None):
  config = mqar.get_config(arg)
  config.schedule.stages = [Stage(0.5, context=32), Stage(0.5)]
  return config
"""


class Cluster:
  """`launch(count, ...)` runs one command in `count` processes; returns (exit codes, what each said)."""

  def __init__(self, directory):
    self._directory, self._port = directory, 20_000 + os.getpid() % 20_000
    (directory / "experiment.py").write_text(EXPERIMENT)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    self._server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    cwd=ROOT, env=env, text=True)

  def launch(self, count, workdir, *arguments, trouble=(), start=None, own=(), mesh=None):
    """trouble: {process: "step event"}; start: the processes that are started, None = all; own: {process: argument};
    mesh: sizes of axes, None = fsdp and tensor of 2."""
    self._port += 1
    mesh = dict(fsdp=2, tensor=2) if mesh is None else mesh
    jobs, logs = [], []
    for i in range(count) if start is None else start:
      logs.append(self._directory / f"log{i}")
      environment = {"DEVICES": str(4 // count)}
      if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{self._port}", "JAX_NUM_PROCESSES": str(count),
                        "JAX_PROCESS_ID": str(i)}
      if i in dict(trouble):
        environment["TROUBLE"] = trouble[i]
      model = dict(num_layers=1, d_model=16, mlp_dim=32, num_heads=2, num_kv_heads=2, head_dim=8)
      fields = {**{f"model.{k}": v for k, v in model.items()}, **{f"mesh.{k}": v for k, v in mesh.items()},
                "data.context": 64, "data.global_batch": 4, "eval.task_examples": 4, "eval.batch": 4, "eval.every": 0,
                "log_every": 1,
                "data.tasks": "('mqar:pairs=4',)", "checkpoint.every": 2}
      jobs.append((environment, [f"--config={self._directory}/experiment.py:steps={STEPS}", f"--workdir={workdir}",
                                 f"--compilation_cache={self._directory / 'cache'}", "--heartbeat_timeout=10",
                                 *(f"--config.{k}={v}" for k, v in fields.items()), *arguments,
                                 *([own[i]] if i in dict(own) else [])], str(logs[-1])))
    self._server.stdin.write(json.dumps(jobs) + "\n")
    self._server.stdin.flush()
    return json.loads(self._server.stdout.readline()), [log.read_text() for log in logs]

  def close(self):
    self._server.stdin.close()
    self._server.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  cluster = Cluster(tmp_path_factory.mktemp("cluster"))
  yield cluster
  cluster.close()


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory):
  """The workdir of an undisturbed run in two processes."""
  workdir = tmp_path_factory.mktemp("calm")
  codes, said = cluster.launch(2, workdir)
  assert codes == [0, 0], said
  assert f"{STEPS} steps done" in said[0] and "steps done" not in said[1], "one process speaks"
  return workdir


def evaluation(workdir):
  rows = metrics.read_json(workdir / f"eval/{STEPS}.json")["records"]
  return [(row["run_mode"], row["index"], row["answer_nll"]) for row in rows if row["kind"] == "task"]


def assert_same_run(workdir, calm, rtol):
  """The same steps on the same rows: metrics, evaluation, parameters, moments; the same bits if rtol = 0."""
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
  got, want = logged(workdir), logged(calm)
  assert [r["step"] for r in got] == list(range(1, STEPS + 1))
  for a, b in zip(got, want):
    assert a.keys() == b.keys() and a["stage"] == b["stage"] == (a["step"] > STEPS // 2)
    close([v for v in a.values() if isinstance(v, float)], [v for v in b.values() if isinstance(v, float)])
  got, want = evaluation(workdir), evaluation(calm)
  assert [row[:2] for row in got] == [row[:2] for row in want] and len(got) == 4
  close([row[2] for row in got], [row[2] for row in want])
  for part in ("params", "optimizer"):
    a, b = (checkpoint.load_params(w, STEPS, part) for w in (workdir, calm))
    leaves = dict(_leaves(a))
    assert leaves.keys() == dict(_leaves(b)).keys() and leaves
    for name, leaf in _leaves(b):
      np.testing.assert_allclose(leaves[name], leaf, rtol=rtol, atol=rtol, err_msg=name)


def _leaves(tree, path=""):
  for name, value in tree.items():
    yield from _leaves(value, f"{path}/{name}") if isinstance(value, dict) else [(f"{path}/{name}", value)]


def test_a_run_of_two_processes_leaves_one_set_of_files(calm):
  assert {p.name for p in calm.iterdir()} == {"config.json", "versions.json", "metrics.jsonl", "checkpoints", "eval",
                                              "DONE"}
  assert metrics.read_json(calm / "versions.json")["processes"] == 2
  assert len(logged(calm)) == STEPS and len(evaluation(calm)) == 4  # examples, each once


def test_sigterm_on_one_process_saves_all_and_the_resumed_run_has_the_same_bits(cluster, calm, tmp_path):
  rare = "--config.checkpoint.every=100"  # nothing else saves before the end
  codes, said = cluster.launch(2, tmp_path, rare, trouble={1: "4 term"})
  assert codes == [75, 75], said
  steps = {re.search(rf"saved at step (\d+) of {STEPS}", text).group(1) for text in said}
  assert len(steps) == 1 and (tmp_path / "checkpoints" / steps.pop()).is_dir(), said
  codes, said = cluster.launch(2, tmp_path, rare)
  assert codes == [0, 0], said
  assert_same_run(tmp_path, calm, rtol=0)


def test_killed_in_a_step_and_in_a_save_then_restored_by_four_and_by_one(cluster, calm, tmp_path):
  codes, said = cluster.launch(2, tmp_path, trouble={1: "5 kill"})
  assert codes[1] == -9 and codes[0] != 0, said
  assert said[0].strip(), "the other one says why it ends"
  assert checkpoint.Checkpoints(tmp_path, read_only=True).latest() in (2, 4)
  codes, said = cluster.launch(4, tmp_path, trouble={0: "6 kill_saving"})
  assert codes[0] == -9 and 0 not in codes, said
  assert checkpoint.Checkpoints(tmp_path, read_only=True).latest() in (4, 6)
  codes, said = cluster.launch(1, tmp_path, mesh=dict(fsdp=2, context=2))
  assert codes == [0], said
  assert_same_run(tmp_path, calm, rtol=2e-4)


def test_what_goes_wrong_is_said_by_every_process(cluster, tmp_path):
  codes, said = cluster.launch(2, tmp_path / "missing", "--initialization_timeout=2", start=[1])
  assert codes == [6] and "process 1 of 2" in said[0] and "within 2 s" in said[0], said
  codes, said = cluster.launch(2, tmp_path / "other", own={1: "--config.optimizer.b2=0.9"})
  assert codes == [6, 6] and all("config differs" in text and "process 1" in text for text in said), said
  assert not (tmp_path / "other").exists()
  codes, said = cluster.launch(2, tmp_path / "apart", own={1: f"--workdir={tmp_path / 'elsewhere'}"})
  assert sorted(codes) == [2, 6] and "take a directory that all hosts share" in said[1], said
  codes, said = cluster.launch(2, tmp_path / "stuck", "--hang_timeout=4", trouble={1: "2 sleep"})
  assert 6 in codes and 0 not in codes, said
  assert any("did not end within 4 s" in text and "File" in text for text in said), said
