"""Tests of nsa/checkpoint.py and stored.py: what is restored is what was saved, or an error says what to do."""
import dataclasses
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from nsa import checkpoint, stored
from nsa.checkpoint import CheckpointError, Checkpoints, CorruptCheckpointError, load_params

# A load that fails leaves Orbax's coroutines and its event loop to the garbage collector, which complains.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
              pytest.mark.filterwarnings("ignore:.*never awaited:RuntimeWarning")]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  extra: dict


def make_mesh(devices=1):
  return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))


def make_state(seed=0, mesh=None, size=16):
  """A state with every kind of leaf: optax states, bf16, scalars, uint32, bool, no elements at all."""
  rng = np.random.default_rng(seed)
  params = {"layers": {"q": rng.normal(size=(3, size, 8)).astype(np.float32)},
            "embed": jnp.asarray(rng.normal(size=(size, 8)), jnp.bfloat16),
            "0": np.float32([-0.0, np.nan, np.inf])}
  learns = {"layers": True, "embed": True, "0": False}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), learns))
  extra = {"key": np.uint32([1, 2**32 - 1]), "flag": np.array([True, False]), "none": np.zeros((0, 4), np.float32)}
  state = State(np.int32(seed), params, tx.init(params), extra)
  mesh = mesh or make_mesh()
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_for(x, mesh))), state)


def spec_for(x, mesh):
  return P(*(["data"] if np.ndim(x) > 1 and np.shape(x)[0] % mesh.size == 0 else []))


def abstract(state, mesh=None):
  mesh = mesh or make_mesh()
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec_for(x, mesh))), state)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
  """A run directory with the good checkpoints 100 and 200; tests copy it."""
  workdir = tmp_path_factory.mktemp("saved") / "run"
  checkpoints = Checkpoints(workdir)
  checkpoints.save(100, make_state(100))
  checkpoints.save(200, make_state(200))
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(two_saves, tmp_path):
  shutil.copytree(two_saves, tmp_path / "run")
  return tmp_path / "run"


def files(directory):
  return sorted(p for p in pathlib.Path(directory).rglob("*") if p.is_file())


def data_file(step_directory):
  return max(files(step_directory), key=lambda p: p.stat().st_size)


def flip(path, at):
  data = bytearray(path.read_bytes())
  data[at] ^= 0x10
  path.write_bytes(data)


# --- round trips --------------------------------------------------------------


def test_round_trip_is_bit_exact(two_saves):
  checkpoints = Checkpoints(two_saves, read_only=True)
  assert checkpoints.steps() == [100, 200] and checkpoints.latest() == 200
  restored = checkpoints.restore(abstract(make_state()))
  assert_same(restored, make_state(200))
  assert_same(checkpoints.restore(abstract(make_state()), 100), make_state(100))
  for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract(make_state()))):
    assert leaf.sharding == wanted.sharding


def test_state_may_be_donated_at_once(tmp_path):
  """The saved values are those at the call, although the next step overwrites their buffers."""
  checkpoints = Checkpoints(tmp_path)
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
  state = jax.device_put({"w": jnp.arange(300_000, dtype=jnp.float32), "n": jnp.int32(3)},
                         NamedSharding(make_mesh(), P()))
  wanted, shapes = jax.tree.map(lambda x: np.array(x, copy=True), state), abstract(state)
  checkpoints.save(1, state)
  for _ in range(5):
    state = step(state)
  jax.block_until_ready(state)
  assert_same(checkpoints.restore(shapes, 1), wanted)


RESHARD = """
import sys, jax, numpy as np
sys.path[:0] = sys.argv[2:]
import checkpoint_test as t
assert len(jax.devices()) == 8
one, eight = t.make_mesh(1), t.make_mesh(8)
checkpoints = t.Checkpoints(sys.argv[1], keep=5)
state = checkpoints.restore(t.abstract(t.make_state(), eight), 200)
t.assert_same(state, t.make_state(200))
assert len(state.params["embed"].sharding.device_set) == 8
assert state.params["embed"].addressable_shards[0].data.shape == (2, 8)
checkpoints.save(300, t.make_state(300, eight), wait=True)
t.assert_same(checkpoints.restore(t.abstract(t.make_state(), one), 300), t.make_state(300, one))
explicit = jax.make_mesh((8,), ("data",))
checkpoints.save(400, t.make_state(400, explicit), wait=True)
"""


def test_other_mesh_and_other_device_count(workdir):
  """Saved on 1 device, restored on 8, saved on 8, restored and inspected here."""
  run_python(RESHARD, workdir, env={"JAX_NUM_CPU_DEVICES": "8"})
  checkpoints = Checkpoints(workdir, read_only=True)
  assert checkpoints.steps() == [100, 200, 300, 400]
  for step in (300, 400):
    assert_same(checkpoints.restore(abstract(make_state()), step), make_state(step))
    assert checkpoints.describe(step) == checkpoints.describe(100)
  assert_same(load_params(workdir, 300), jax.tree.map(np.asarray, make_state(300).params))


def test_describe(two_saves):
  described = Checkpoints(two_saves, read_only=True).describe()
  assert described["params/layers/q"] == ((3, 16, 8), "float32")
  assert described["params/embed"] == ((16, 8), "bfloat16") and described["extra/none"] == ((0, 4), "float32")
  assert described["step"] == ((), "int32") and any(p.startswith("opt_state/1/") for p in described)
  assert len(described) == len(jax.tree.leaves(make_state()))


def test_load_params_needs_no_optimizer(two_saves):
  wanted = jax.tree.map(np.asarray, make_state(200).params)
  params = load_params(two_saves)
  assert_same(params, wanted)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
  assert_same(load_params(two_saves, 100, "params/layers"), {"q": np.asarray(make_state(100).params["layers"]["q"])})
  assert set(load_params(two_saves, subtree="")) == {"step", "params", "opt_state", "extra"}
  with pytest.raises(CheckpointError, match='no subtree "parms"; its top level is step, params, opt_state'):
    load_params(two_saves, subtree="parms")


# --- policy -------------------------------------------------------------------


def test_policy(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, keep_at=[15], every=10)
  assert [s for s in range(1, 41) if checkpoints.should_save(s)] == [10, 15, 20, 30, 40]
  for step in (10, 15, 20, 30, 40):
    checkpoints.save(step, {"w": jnp.full(3, step)})
  checkpoints.close()
  assert checkpoints.steps() == [15, 30, 40]
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["15", "30", "40"]
  checkpoints.save(40, {"w": jnp.zeros(3)}, wait=True)  # complete: left as it is
  assert load_params(tmp_path, 40, "")["w"].tolist() == [40] * 3
  checkpoints.save(5, {"w": jnp.zeros(3)}, wait=True)  # a rewound run: the new one is never the one deleted
  assert checkpoints.steps() == [5, 15, 30, 40]


def test_a_period_stays(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, keep_period=4, every=2)
  for step in range(2, 15, 2):
    checkpoints.save(step, {"w": jnp.ones(3)})
  checkpoints.close()
  assert checkpoints.steps() == [4, 8, 12, 14]


def test_old_ones_go_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, {"w": jnp.ones(3)}, wait=True)
  seen = []
  monkeypatch.setattr(stored, "delete", lambda path, real=stored.delete: (
      seen.append((path.name, checkpoints.steps())), real(path)))
  checkpoints.save(2, {"w": jnp.ones(3)})
  checkpoints.close()
  assert seen == [("1", [1, 2])] and checkpoints.steps() == [2]


def test_refusals(tmp_path, two_saves):
  with pytest.raises(CheckpointError, match="read_only"):
    Checkpoints(two_saves, read_only=True).save(300, {"w": jnp.ones(1)})
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [] and checkpoints.latest() is None and not checkpoints.directory.exists()
  for call in (lambda: checkpoints.restore({}), checkpoints.describe, lambda: load_params(tmp_path)):
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
      call()
  with pytest.raises(CheckpointError, match="of step 150 .*; there are 100, 200"):
    Checkpoints(two_saves, read_only=True).restore({"w": abstract(jnp.ones(1))}, 150)
  for leaf, why in ((3.0, "a/b is a float.*device_put"), (np.ones(2), "a/b is a ndarray"),
                    (jax.random.key(0), "a/b has dtype key.*key_data")):
    with pytest.raises(CheckpointError, match=why):
      checkpoints.save(1, {"a": {"b": leaf}})
  with pytest.raises(CheckpointError, match='"a/b"'):
    checkpoints.save(1, {"a/b": jnp.ones(1)})
  with pytest.raises(CheckpointError, match="leaf w of the abstract state has no sharding"):
    checkpoints.restore({"w": jax.ShapeDtypeStruct((1,), jnp.float32)})
  with pytest.raises(ValueError, match="keep = 0"):
    Checkpoints(tmp_path, keep=0)


def test_mismatch_names_the_leaves(two_saves):
  checkpoints = Checkpoints(two_saves, read_only=True)
  state = abstract(make_state())
  mesh = NamedSharding(make_mesh(), P())
  params = dict(state.params, new=jax.ShapeDtypeStruct((1,), jnp.float32, sharding=mesh),
                embed=jax.ShapeDtypeStruct((16, 9), jnp.float32, sharding=mesh))
  del params["layers"]
  with pytest.raises(CheckpointError) as caught:
    checkpoints.restore(dataclasses.replace(state, params=params), fall_back=True)
  text = str(caught.value)
  assert type(caught.value) is CheckpointError and str(checkpoints.directory / "200") in text
  assert "params/new: in the state, missing in the checkpoint" in text
  assert "params/layers/q: in the checkpoint, missing in the state" in text
  assert "params/embed: float32[16, 9] in the state, bfloat16[16, 8] in the checkpoint" in text
  assert "load_params" in text


# --- damage -------------------------------------------------------------------


def truncate(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


DAMAGE = {
    "data truncated": lambda d: truncate(data_file(d)),
    "data deleted": lambda d: data_file(d).unlink(),
    "data flipped": lambda d: flip(data_file(d), data_file(d).stat().st_size // 2),
    "_CHECKPOINT_METADATA deleted": lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
    "_CHECKPOINT_METADATA truncated": lambda d: truncate(d / "_CHECKPOINT_METADATA"),
    "_METADATA deleted": lambda d: next(d.rglob("_METADATA")).unlink(),
    "manifest deleted": lambda d: next(d.rglob("manifest.ocdbt")).unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_with_a_fix(workdir, kind):
  directory = workdir / "checkpoints" / "200"
  DAMAGE[kind](directory)
  before = files(workdir)
  checkpoints = Checkpoints(workdir)
  assert checkpoints.latest() == 200  # it does not vanish from the list
  with pytest.raises(CorruptCheckpointError, match="is damaged") as caught:
    checkpoints.restore(abstract(make_state()))
  assert f"delete {directory}; the newest good one is step 100" in str(caught.value)
  with mock.patch.object(checkpoint.logging, "warning") as warning:
    assert_same(checkpoints.restore(abstract(make_state()), fall_back=True), make_state(100))
  shown = [call.args[0] % call.args[1:] for call in warning.call_args_list]
  assert any("skipped damaged checkpoints [200] and restored step 100" in line for line in shown)
  aside = workdir / "checkpoints" / "200.damaged"
  assert [aside / p.relative_to(directory) if directory in p.parents else p for p in before] == files(workdir)
  checkpoints.save(200, make_state(200), wait=True)  # the run gets there again
  assert_same(checkpoints.restore(abstract(make_state())), make_state(200))
  DAMAGE[kind](directory)
  assert_same(Checkpoints(workdir, read_only=True).restore(abstract(make_state()), fall_back=True), make_state(100))
  assert directory.exists()  # who only reads changes nothing
  assert_same(checkpoints.restore(abstract(make_state()), fall_back=True), make_state(100))
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["100", "200.damaged", "200.damaged-2"]


def test_fall_back_skips_several_and_gives_up(workdir):
  checkpoints = Checkpoints(workdir, keep=3)
  checkpoints.save(300, make_state(300), wait=True)
  for step in (200, 300):
    truncate(data_file(workdir / "checkpoints" / str(step)))
  assert_same(checkpoints.restore(abstract(make_state()), fall_back=True), make_state(100))
  truncate(data_file(workdir / "checkpoints" / "100"))
  with pytest.raises(CorruptCheckpointError, match="No earlier checkpoint is good.*start anew"):
    checkpoints.restore(abstract(make_state()), fall_back=True)


def test_a_flipped_bit_anywhere_is_never_restored(two_saves, tmp_path):
  """Each byte position of a sample, in every file: an error, or the very values that were saved."""
  rng, outcomes = np.random.default_rng(0), {"error": 0, "same": 0}
  source = two_saves / "checkpoints" / "200"
  wanted, target = make_state(200), abstract(make_state())
  for path in files(source):
    size = path.stat().st_size
    for at in rng.integers(size, size=min(4 if path == data_file(source) else 1, size)):
      copy = tmp_path / "run" / "checkpoints" / "200"
      shutil.rmtree(tmp_path / "run", ignore_errors=True)
      shutil.copytree(source, copy)
      flip(copy / path.relative_to(source), at)
      try:
        restored = Checkpoints(tmp_path / "run", read_only=True).restore(target)
      except CheckpointError:
        outcomes["error"] += 1
      else:
        assert_same(restored, wanted)
        outcomes["same"] += 1  # a byte that nothing depends on, such as a time stamp
  assert outcomes["error"] >= 4


def test_load_params_checks_values_too(workdir, monkeypatch):
  """A wrong value that Orbax reads without complaint is found by the fingerprint."""
  real = stored.orbax()[0].load
  def off_by_one_bit(path, tree):
    out = real(path, tree)
    leaf = np.array(out["params/embed"])
    leaf.view(np.uint16)[3, 5] ^= 1
    return {**out, "params/embed": leaf if isinstance(out["params/embed"], np.ndarray) else jax.device_put(
        leaf, out["params/embed"].sharding)}
  monkeypatch.setattr(stored.orbax()[0], "load", off_by_one_bit)
  for call in (lambda: load_params(workdir),
               lambda: Checkpoints(workdir).restore(abstract(make_state()))):
    with pytest.raises(CorruptCheckpointError, match="params/embed are not those that were saved"):
      call()


# --- failing saves --------------------------------------------------------------

KILLED = """
import os, pathlib, signal, sys, threading, jax, jax.numpy as jnp
sys.path[:0] = sys.argv[2:]
import checkpoint_test as t
checkpoints = t.Checkpoints(sys.argv[1])
big = {"w": jax.random.normal(jax.random.key(0), (4 << 20,))}
def kill_as_soon_as_data_are_on_disk():
  while not any(p.stat().st_size for p in pathlib.Path(sys.argv[1]).glob("checkpoints/*tmp*/**/d/*")):
    pass
  os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill_as_soon_as_data_are_on_disk, daemon=True).start()
checkpoints.save(300, big, wait=True)
"""


def test_killed_save_leaves_the_previous_checkpoint(workdir):
  code = run_python(KILLED, workdir, check=False).returncode
  assert code == -signal.SIGKILL
  checkpoints = Checkpoints(workdir)
  leftovers = [p for p in checkpoints.directory.iterdir() if "tmp" in p.name]
  assert len(leftovers) == 1 and sum(p.stat().st_size for p in files(leftovers[0])) > 1000
  assert checkpoints.steps() == [100, 200]
  assert_same(checkpoints.restore(abstract(make_state())), make_state(200))
  checkpoints.save(300, make_state(300), wait=True)  # the restarted run gets there again
  assert_same(checkpoints.restore(abstract(make_state())), make_state(300))
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["200", "300"]


def test_leftovers_of_other_steps_are_removed_by_the_next_save(workdir):
  for name in ("250.orbax-checkpoint-tmp", "50.deleted"):
    (workdir / "checkpoints" / name / "d").mkdir(parents=True)
  (workdir / "checkpoints" / "notes").mkdir()
  checkpoints = Checkpoints(workdir)
  assert checkpoints.steps() == [100, 200]
  checkpoints.save(300, make_state(300), wait=True)
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["200", "300", "notes"]


def assert_full_disk_is_survived(workdir, release):
  checkpoints = Checkpoints(workdir)
  rng = np.random.default_rng(0)  # random bits: compression does not help
  big = {"w": jax.device_put(rng.normal(size=400_000).astype(np.float32), NamedSharding(make_mesh(), P()))}
  checkpoints.save(1, make_state(1), wait=True)
  with pytest.raises(CheckpointError, match="(?s)step 2 .* not saved: the disk is full.*"
                                            "newest complete one is step 1.*free some space"):
    checkpoints.save(2, big)
    checkpoints.save(3, make_state(3))  # the failure of a thread is raised here at the latest
  assert checkpoints.steps() == [1]
  assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]  # half a checkpoint gives its space back
  assert_same(checkpoints.restore(abstract(make_state())), make_state(1))
  release()
  checkpoints.save(2, big, wait=True)
  assert checkpoints.latest() == 2


def test_full_disk_by_file_size_limit(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  release = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    assert_full_disk_is_survived(tmp_path, release)
  finally:
    release()
    signal.signal(signal.SIGXFSZ, previous)


def test_full_disk_by_tmpfs(tmp_path):
  def mount(*options):
    return subprocess.run(["mount", *options, "tmpfs", str(tmp_path)], capture_output=True).returncode
  try:
    if mount("-t", "tmpfs", "-o", "size=1m"):
      pytest.skip("may not mount a tmpfs")
  except FileNotFoundError:
    pytest.skip("no mount command")
  try:
    assert_full_disk_is_survived(tmp_path / "run", lambda: mount("-o", "remount,size=8m"))
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_error_of_an_asynchronous_save_is_raised_once(tmp_path, monkeypatch):
  class Response:
    def result(self):
      raise RuntimeError("the network is gone")
  checkpoints = Checkpoints(tmp_path)
  for call in (checkpoints.wait, checkpoints.close, lambda: checkpoints.save(2, {"w": jnp.ones(2)})):
    with monkeypatch.context() as patch:
      patch.setattr(stored.orbax()[0], "save_async", lambda *a, **k: Response())
      checkpoints.save(1, {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="(?s)step 1 .*RuntimeError.*the network is gone"):
      call()
    checkpoints.close()
  assert checkpoints.steps() == []
  checkpoints.save(1, {"w": jnp.ones(2)}, wait=True)
  assert checkpoints.steps() == [1]


def run_python(code, workdir, check=True, env=None):
  here = pathlib.Path(__file__).resolve().parent
  done = subprocess.run([sys.executable, "-c", code, str(workdir), str(here), str(here.parent)], text=True,
                        capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})})
  assert not check or done.returncode == 0, done.stderr[-4000:]
  return done
