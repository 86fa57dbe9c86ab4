"""Tests of nsa/train.py and nsa/step.py: forks and kills change no bit, first steps are golden, failures speak.

    PYTHONPATH=. python tests/train_test.py --update

writes tests/golden.json anew, after a change that is meant to change numbers.
"""
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

from commands import logged
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import (
  checkpoint,
  config as config_lib,
  methods,
  model as model_lib,
  provenance,
  schedule,
  sharding,
  step as step_lib,
  train as train_lib,
)
from nsa.config import Stage
from pallas_kernels import backends

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).with_name("golden.json")
ATTENTION = {
    "dense": methods.Dense(),
    "msa": methods.MSA(block_size=4, num_blocks=3, index_dim=4),
    "nsa": methods.NSA(block_size=4, num_blocks=4, compress_len=4, compress_stride=2, window=8),
}


def make_config(method, plan, seeds=(0,), **options):
  config = config_lib.Config(
      arm=method, seeds=seeds, attention=dataclasses.replace(ATTENTION[method]), schedule=plan, log_every=1,
      model=config_lib.ModelConfig(vocab_size=264, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1,
                                   head_dim=8,
                                   mlp_dim=16, short_conv=2),
      data=config_lib.DataConfig(context=32, global_batch=4, align=4),
      eval=config_lib.EvalConfig(sequences=0, run_modes=()), checkpoint=config_lib.CheckpointConfig(every=4))
  plan.learning_rate.peak = 1e-2
  for name, value in options.items():
    setattr(config, name, value)
  return config


def run(config, workdir):
  assert train_lib.train(config, workdir, progress=False) == config.schedule.steps
  return logged(workdir), checkpoint.load_params(workdir)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# --- golden first steps --------------------------------------------------------------


def example(config, mesh):
  """A batch of packed rows."""
  rng = np.random.default_rng(0)  # not from the text: the standard library is another one in each Python
  tokens = rng.integers(0, 256, (4, 33)).astype(np.int32)
  weights = rng.integers(0, 2, (4, 32)).astype(np.float32)
  segments = 1 + (np.arange(32) >= np.array([0, 4, 16, 28])[:, None]).astype(np.int32)
  batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=weights, segment_ids=segments)
  return jax.device_put(batch, sharding.of_batch(config, mesh))


def first_step(method):
  config = make_config(method, schedule.dense(1) if method == "dense" else schedule.native(1, 0))
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  batch = example(config, mesh)
  state = step_lib.compile_init(config, mesh)(step_lib.seeds_of(config))
  function = step_lib.compile_step(config, schedule.at(config, 0), mesh)
  _, values = function(state, batch, np.full(2, 1e-3, np.float32), step_lib.seeds_of(config))
  return {name: float(value) for name, value in sorted(values.items())}


@pytest.mark.parametrize("method", ["dense", "msa", "nsa"])
def test_first_step_is_golden(method):
  want = json.loads(GOLDEN.read_text())[method]
  got = first_step(method)
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_unrolled_layers_compute_the_same_step():
  looped, unrolled = (make_config("dense", schedule.dense(1), unroll=layers) for layers in (1, 2))
  unrolled.model.remat = "layer"
  mesh = sharding.make_mesh(looped, jax.devices()[:1])
  batch = example(looped, mesh)
  state = step_lib.compile_init(looped, mesh)(step_lib.seeds_of(looped))

  def after(config):
    function, *_ = step_lib.program(config, schedule.at(config, 0), mesh)
    arguments = state, batch, jnp.full((2,), 1e-3, jnp.float32), step_lib.seeds_of(config)
    lowered = jax.jit(function).lower(*arguments)
    return lowered.as_text().count("stablehlo.while"), lowered.compile()(*arguments)

  (loops, want), (fewer, got) = after(looped), after(unrolled)
  assert fewer == loops - 2  # one forward, one backward
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_kernels_of_a_step_run_side_by_side_on_one_gpu(monkeypatch):
  config = make_config("dense", schedule.dense(1))
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  options = lambda: step_lib.program(config, schedule.at(config, 0), mesh)[2].get("compiler_options")
  assert options() is None  # a CPU has no CUDA graphs
  with backends.target_platform("gpu"):
    assert options() == ({step_lib.GRAPH_MODE: "CONCURRENT"} if jax.__version_info__ >= (0, 11) else None)
    assert step_lib._side_by_side(types.SimpleNamespace(size=2)) == {}
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --{step_lib.GRAPH_MODE}=SERIALIZE")
    assert options() is None
  monkeypatch.undo()
  known = jax.jit(lambda x: x + 1, compiler_options={step_lib.GRAPH_MODE: "CONCURRENT"})  # XLA has one list for all
  assert known(1) == 2


def test_layers_are_unrolled_where_that_was_faster():
  config = make_config("dense", schedule.dense(1))
  assert step_lib.layers_per_turn(config) == 1
  with backends.target_platform("gpu"):
    for layers, turn in ((30, 30), (step_lib.UNROLLED_LAYERS + 1, 1), (2, 2)):
      config.model.num_layers = layers
      assert step_lib.layers_per_turn(config) == turn
    config.model.remat = "layer"
    assert step_lib.layers_per_turn(config) == 1
    config.unroll = 2
    assert step_lib.layers_per_turn(config) == 2


# --- forks ------------------------------------------------------------------------------


@pytest.mark.parametrize("method,trunk_method", [("msa", "dense"), ("nsa", "nsa")])
def test_trunk_and_fork_equal_one_staged_run(tmp_path, method, trunk_method):
  surgery = dict(selector_warmup=0.5) if method == "msa" else dict(selector_warmup=0, enter="copy_kv")
  plan = lambda: schedule.retrofit(12, 0.5, **surgery)
  staged_records, staged = run(make_config(method, plan()), tmp_path / "staged")
  keep = config_lib.CheckpointConfig(every=0, keep_at=(6,))
  run(make_config(trunk_method, schedule.dense(12), checkpoint=keep), tmp_path / "trunk")
  fork = config_lib.ForkConfig(str(tmp_path / "trunk"), 6)
  fork_records, forked = run(make_config(method, plan(), fork=fork), tmp_path / "fork")
  assert_same_bits(forked, staged)
  assert fork_records == staged_records[6:]
  assert [r["mode"] for r in staged_records] == ["dense"] * 6 + (
      ["warmup"] * 3 + ["sparse"] * 3 if method == "msa" else ["sparse"] * 6)
  first = checkpoint.load_params(tmp_path / "trunk", 6)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(first["embed"]), jax.tree.leaves(forked["embed"])))


def test_fork_errors_name_the_field(tmp_path):
  run(make_config("dense", schedule.dense(2)), tmp_path / "trunk")
  fork = lambda **kw: config_lib.ForkConfig(str(tmp_path / "trunk"), **kw)
  for field, options in [
      ("fork.workdir", dict(fork=config_lib.ForkConfig(str(tmp_path / "nothing")))),
      ("fork.step", dict(fork=fork(step=1))),
      ("seeds", dict(fork=fork(), seeds=(5,)))]:
    with pytest.raises(config_lib.ConfigError, match=field):
      train_lib.train(make_config("dense", schedule.dense(4), **options), tmp_path / field, progress=False)
  wider = make_config("dense", schedule.dense(4), fork=fork())
  wider.model.mlp_dim = 24
  with pytest.raises(config_lib.ConfigError, match="mlp"):
    train_lib.train(wider, tmp_path / "wider", progress=False)


def test_a_workdir_belongs_to_one_config(tmp_path):
  run(make_config("dense", schedule.dense(2)), tmp_path)
  changed = make_config("dense", schedule.dense(2))
  changed.optimizer.b2 = 0.9
  with pytest.raises(config_lib.ConfigError, match="optimizer.*0.9"):
    train_lib.train(changed, tmp_path, progress=False)
  assert train_lib.train(make_config("dense", schedule.dense(2), log_every=5), tmp_path, progress=False) == 2


def test_a_workdir_that_can_be_none_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  for path, why in ((tmp_path / "file", "File exists"), (tmp_path / "file/run", "Not a directory"),
                    ("/proc/run", "No such file")):
    with pytest.raises(config_lib.ConfigError, match=f"--workdir = '{path}': cannot be made or written to .{why}"):
      train_lib.train(make_config("dense", schedule.dense(2)), path, progress=False)


def test_what_does_not_fit_says_what_to_change_before_the_first_step(tmp_path, monkeypatch):
  config = make_config("msa", schedule.native(4, 0))
  # Adam's moments, and steps
  state = 4 * (4 + 3 * sum(x.size for x in jax.tree.leaves(model_lib.abstract_params(config))))
  for room, what in ((state // 2, "parameters and optimizer state"), (2 * state, "a training step")):
    monkeypatch.setattr(train_lib.capacity, "available", lambda room=room: room)
    with pytest.raises(config_lib.ConfigError,
                       match=rf'{what} = .* GB per device.*cpu has {room / 1e9:.2f} GB: take model.remat = '
                       r'"layer", or data.global_batch = 2 with twice the schedule.steps, or mesh.fsdp = 2 on more '
                       r'devices'):
      train_lib.train(config, tmp_path, progress=False)
  assert not (tmp_path / "checkpoints").exists()

  def full(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

  monkeypatch.undo()
  monkeypatch.setattr(train_lib.forks, "initial_state", full)
  with pytest.raises(config_lib.ConfigError, match="more memory than is free"):
    train_lib.train(config, tmp_path, progress=False)


# --- kills --------------------------------------------------------------------------------

# Each line of input "kill_at signal workdir" is one run in a process of its own, which gets the
# signal while it waits for the batch of step `kill_at`; the answer is its exit code and the steps logged by then.
KILLER = """
import json, os, sys
import train_test
from nsa import metrics, step as step_lib, train
real = step_lib.Batches.at
for line in sys.stdin:
  kill_at, number, workdir = line.split()
  if not os.fork():
    def at(self, step):
      if step == int(kill_at):
        os.kill(os.getpid(), int(number))
      return real(self, step)
    step_lib.Batches.at = at
    code = 0
    try:
      train.train(train_test.resumable(), workdir, progress=False)
    except train.Preempted:
      code = 3
    os._exit(code)
  status = os.wait()[1]
  code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
  log = os.path.join(workdir, "metrics.jsonl")
  steps = [r["step"] for r in metrics.read_jsonl(log)] if os.path.exists(log) else []
  print(json.dumps([code, steps]), flush=True)
"""


def resumable():
  return make_config("msa", schedule.native(12, 0.4), checkpoint=config_lib.CheckpointConfig(every=3), log_every=3)


def test_killed_runs_reach_the_bits_of_an_undisturbed_one_and_lose_at_most_one_logging_interval(tmp_path):
  calm, cut = tmp_path / "calm", tmp_path / "cut"
  kill, term = int(signal.SIGKILL), int(signal.SIGTERM)
  # Before the first checkpoint; in the warm-up, after a save that may be under way; SIGTERM; to the end.
  jobs = [(2, kill), (4, kill), (10, term), (-1, kill)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  done = subprocess.run([sys.executable, "-c", KILLER], input="".join(f"{at} {number} {cut}\n" for at, number in jobs),
                        text=True, capture_output=True, env=environment, timeout=600)
  # Step 4 runs while its successor's batch is made, and is logged with step 6.
  assert [json.loads(line) for line in done.stdout.splitlines()] == [
      [-kill, []], [-kill, [3]], [3, [3, 6, 9]], [0, [3, 6, 9, 12]]], done.stderr[-3000:]
  run(resumable(), calm)
  assert_same_bits(checkpoint.load_params(cut), checkpoint.load_params(calm))
  assert_same_bits(checkpoint.load_params(cut, subtree="optimizer"),
                   checkpoint.load_params(calm, subtree="optimizer"))
  assert logged(cut) == logged(calm) and (cut / "DONE").exists()
  assert checkpoint.Checkpoints(cut, read_only=True).steps() == [10, 12]  # SIGTERM saved where no save was due


def test_a_run_cut_before_its_evaluation_makes_up_for_it(tmp_path):
  config = lambda: make_config("dense", schedule.dense(4),
                               eval=config_lib.EvalConfig(every=2, sequences=2, run_modes=("dense",)),
                               checkpoint=config_lib.CheckpointConfig(every=2))
  run(config(), tmp_path / "calm")
  for last in (2, 4):
    work = tmp_path / f"cut{last}"

    class Killed(BaseException):
      pass

    def write(config, params, workdir, step, mesh, during, own, seconds):
      if step == last and not killed:
        killed.append(step)
        raise Killed
      assert during == (step < 4)
      assert own
      return real(config, params, workdir, step, mesh, during, own, seconds)

    killed, real = [], train_lib.evaluate.write
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train_lib.evaluate, "write", write)
      with pytest.raises(Killed):
        train_lib.train(config(), work, progress=False)
    assert (work / f"checkpoints/{last}").is_dir()  # what was being saved is finished first
    run(config(), work)
    for step in (2, 4):
      assert (work / f"eval/{step}.json").read_text() == (tmp_path / f"calm/eval/{step}.json").read_text()


def test_a_run_directory_in_a_bucket(tmp_path, bucket, monkeypatch):
  """Everything but the checkpoints, which the library that writes them reaches by itself, goes through one code."""
  real = checkpoint.Checkpoints
  monkeypatch.setattr(train_lib.checkpoint, "Checkpoints",
                      lambda workdir, **kw: real(tmp_path / os.fspath(workdir).removeprefix("gs://"), **kw))
  config = lambda: make_config("dense", schedule.dense(6), eval=config_lib.EvalConfig(every=3, sequences=2),
                                     checkpoint=config_lib.CheckpointConfig(every=3))
  at = step_lib.Batches.at
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib.Batches, "at", lambda self, step: os.kill(os.getpid(), signal.SIGTERM) or at(self, step)
                  if step == 5 else at(self, step))
    with pytest.raises(train_lib.Preempted, match="gs://bucket/run: saved at step 5"):
      train_lib.train(config(), "gs://bucket/run", progress=False)
  assert train_lib.train(config(), "gs://bucket/run", progress=False) == 6
  assert sorted(bucket.store) == [f"/bucket/run/{name}" for name in (
      "DONE", "config.json", "eval/3.json", "eval/6.json", "metrics.jsonl", "versions.json")]
  train_lib.train(config(), tmp_path / "local", progress=False)
  assert logged("gs://bucket/run") == logged(tmp_path / "local")
  changed = config()
  changed.optimizer.b2 = 0.9
  with pytest.raises(config_lib.ConfigError, match="^[^{]*optimizer.b2 = '0.9': gs://bucket/run was started with 0.95"):
    train_lib.train(changed, "gs://bucket/run", progress=False)


# --- failures -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_with_all_that_helps(tmp_path, monkeypatch):
  config = make_config("dense", schedule.dense(12))
  real = step_lib.Batches.at

  def poisoned(self, step):
    batch = real(self, step)
    return {**batch, "weights": batch["weights"] * np.float32("nan")} if step == 6 else batch

  monkeypatch.setattr(step_lib.Batches, "at", poisoned)
  with pytest.raises(train_lib.Diverged) as failure:
    train_lib.train(config, tmp_path, progress=False)
  message = str(failure.value)
  assert failure.value.seed == 0 and "not finite at step 6" in message and "loss = nan" in message
  assert "last good checkpoint is step 4" in message
  rows = step_lib.Batches(config, sharding.make_mesh(config, jax.devices()[:1])).describe(6, 0)
  assert rows in message and rows.count("row ") == 4
  assert [r["step"] for r in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
  monkeypatch.undo()
  got, params = run(config, tmp_path)  # the same command goes on from the last good checkpoint
  calm, want = run(make_config("dense", schedule.dense(12)), tmp_path / "calm")
  assert got == calm
  assert_same_bits(params, want)


def test_a_batch_that_cannot_be_made_loses_nothing_of_what_is_trained(tmp_path, monkeypatch):
  config = make_config("dense", schedule.dense(8), checkpoint=config_lib.CheckpointConfig(every=0))
  real = step_lib.Batches.at

  def broken(self, step):
    if step == 5:
      raise ValueError("data.source: this text cannot be read")
    return real(self, step)

  monkeypatch.setattr(step_lib.Batches, "at", broken)
  with pytest.raises(RuntimeError, match="goes on from the newest checkpoint. ValueError: data.source"):
    train_lib.train(config, tmp_path, progress=False)
  assert checkpoint.Checkpoints(tmp_path, read_only=True).steps() == [5]
  assert [r["step"] for r in logged(tmp_path)] == [1, 2, 3, 4, 5]
  monkeypatch.undo()
  got, params = run(config, tmp_path)
  calm, want = run(make_config("dense", schedule.dense(8)), tmp_path / "calm")
  assert got == calm
  assert_same_bits(params, want)


# --- seeds, contexts, learning ----------------------------------------------------------------


def test_seeds_trained_together_equal_seeds_trained_alone(tmp_path):
  both, params = run(make_config("msa", schedule.native(4, 0), seeds=(0, 1)), tmp_path / "both")
  for replica, seed in enumerate((0, 1)):
    alone, want = run(make_config("msa", schedule.native(4, 0), seeds=(seed,)), tmp_path / f"s{seed}")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[replica], b, rtol=1e-4, atol=1e-5), params, want)
    mine = [r for r in both if r["seed"] == seed]
    assert len(mine) == 4
    for a, b in zip(mine, alone):
      np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-5)
  assert both[0]["loss"] != both[1]["loss"]


def test_context_changes_between_stages_at_equal_tokens_per_step(tmp_path):
  plan = config_lib.ScheduleConfig(6, [Stage(0.5, context=16), Stage(0.5)])
  got, _ = run(make_config("dense", plan), tmp_path)
  assert [r["tokens"] for r in got] == [128 * i for i in range(1, 7)]
  assert [r["stage"] for r in got] == [0, 0, 0, 1, 1, 1]
  cost = np.diff([r["flops"] for r in got])
  assert cost[-1] > cost[0]  # longer rows cost more


def test_native_training_lowers_the_loss_and_the_selector_learns(tmp_path):
  plan = schedule.native(80, 0.25)
  got, _ = run(make_config("msa", plan), tmp_path)
  bits = [r["bits_per_byte"] for r in got]
  assert bits[0] > 7.5 and np.mean(bits[-10:]) < 5.5
  kl = [r["index_kl"] for r in got if r["mode"] == "warmup"]
  assert np.mean(kl[-5:]) < 0.8 * np.mean(kl[:5])


# --- provenance ---------------------------------------------------------------------------


def test_a_run_knows_the_commit_of_its_code(tmp_path, monkeypatch):
  def git(*arguments):
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(tmp_path), *arguments], check=True,
                   capture_output=True)

  (tmp_path / "nsa").mkdir()
  (tmp_path / "nsa/train.py").write_text("first")
  monkeypatch.setattr(provenance, "__file__", str(tmp_path / "nsa/provenance.py"))
  assert {k: provenance.versions()[k] for k in ("commit", "dirty")} == {"commit": None, "dirty": None}
  git("init", "-q")
  git("add", ".")
  git("commit", "-qm", "first")
  clean = provenance.versions()
  assert len(clean["commit"]) == 40 and clean["dirty"] is False
  (tmp_path / "nsa/train.py").write_text("second")
  assert provenance.versions() == {**clean, "dirty": True}


if __name__ == "__main__":
  if sys.argv[1:] != ["--update"]:
    sys.exit(__doc__)
  jax.config.update("jax_platforms", "cpu")
  GOLDEN.write_text(json.dumps({method: first_step(method) for method in ATTENTION}, indent=2) + "\n")
  print(f"wrote {GOLDEN}")
