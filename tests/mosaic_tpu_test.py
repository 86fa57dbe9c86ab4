"""TPU kernels on a CPU: equal to the reference in both interpreters, without races, and compiled for TPUs by libtpu.

One program per shape serves many inputs: segments and query offsets are always passed and may say nothing.
"""
import dataclasses
import functools

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import native
from benchmarks import tpu_programs
import pallas_kernels
from pallas_kernels import arg_specs
from pallas_kernels import backends
from pallas_kernels import reference
from pallas_kernels.mosaic_tpu import aot
from pallas_kernels.mosaic_tpu import kl
from pallas_kernels.mosaic_tpu import selected
from pallas_kernels.mosaic_tpu import union

# On_wait: a copy moves data when it is waited for, so that reading too early reads NaN.
CAREFUL = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
pytestmark = pytest.mark.usefixtures("quick_compiles")
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def races_found():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  return interpret_pallas_call.races.races_found


def with_gradients(attend):
  """attend to (q, k, v, blocks, segments, offset, do, dlse) -> o, lse, dq, dk, dv."""
  def both(q, k, v, blocks, segments, offset, do, dlse):
    (o, lse), vjp = jax.vjp(lambda q, k, v: attend(q, k, v, blocks, segment_ids=segments, query_offset=offset),
                            q, k, v)
    return (o, lse, *vjp((do.astype(o.dtype), jnp.where(jnp.isfinite(lse), dlse, 0.0))))
  return jax.jit(both)


SHAPES = {
    # Several sequences, ragged tiles, a partial last block, more slots than blocks; k and v share 128 lanes.
    "packed": dict(B=2, T=70, S=230, N=4, K=1, H=64, J=5, block_size=64, dtype="float32"),
    # 256 rows of 16 heads, blocks of 128.
    "g16": dict(B=1, T=20, S=400, N=16, K=1, H=128, J=3, block_size=128, dtype="bfloat16"),
    # Groups of 3 leave rows of a tile empty; two KV heads, blocks of 32.
    "g3": dict(B=1, T=50, S=300, N=6, K=2, H=64, J=4, block_size=32, dtype="bfloat16"),
}


@functools.cache
def program(name, careful):
  interpret = CAREFUL if careful else True
  attend = functools.partial(selected.selected_attention, block_size=SHAPES[name]["block_size"], interpret=interpret)
  return with_gradients(attend)


@functools.cache
def truth(name):
  return with_gradients(functools.partial(reference.selected_attention, block_size=SHAPES[name]["block_size"]))


def make_inputs(name, blocks=None, magnitude=1.0, segments=False, offset=0, seed=0):
  B, T, S, N, K, H, J, block_size, dtype = SHAPES[name].values()
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  shape, count = (B, T, K, J), -(-S // block_size)
  blocks = rng.integers(-1, count, size=shape) if blocks is None else blocks(rng, shape, count)
  ids = np.sort(rng.integers(0, 4, size=(B, S)), axis=1) if segments else np.zeros((B, S))
  offset = np.broadcast_to(offset, B)
  return (draw(B, T, N, H) * magnitude, draw(B, S, K, H) * magnitude, draw(B, S, K, H),
          jnp.asarray(blocks, jnp.int32), jnp.asarray(ids, jnp.int32), jnp.asarray(offset, jnp.int32),
          draw(B, T, N, H), jnp.asarray(rng.normal(size=(B, T, N)), jnp.float32))


def check(name, inputs, careful=False, exact=2e-6):
  got = jax.block_until_ready(program(name, careful)(*inputs))
  want = truth(name)(*(x.astype(jnp.float32) for x in inputs[:3]), *inputs[3:])
  for what, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, want):
    assert x.dtype == (jnp.float32 if what == "lse" else inputs[0].dtype)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y), err_msg=what)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    bar = exact if what == "lse" or inputs[0].dtype == jnp.float32 else 4e-3  # a bfloat16 rounds by 2e-3 on average
    assert np.linalg.norm(x - y) <= bar * np.linalg.norm(y), (what, np.linalg.norm(x - y) / np.linalg.norm(y))
  if careful:
    assert not races_found()
  return [np.asarray(x, np.float32) for x in got]


def everybody(block):
  return lambda rng, shape, count: np.full(shape, block)


def half_empty(rng, shape, count):
  return np.where(rng.random(shape[:3] + (1,)) < 0.5, -1, rng.integers(0, count, size=shape))


def with_duplicates_and_strangers(rng, shape, count):
  blocks = rng.integers(-1, count + 3, size=shape)  # some lie past the end
  blocks[..., 1] = blocks[..., 0]
  return blocks


CASES = {
    "random": dict(offset=(0, 150)),
    "from_the_start": dict(),  # most choices lie in the future
    "segments": dict(segments=True, offset=(100, 160)),
    "half_empty": dict(blocks=half_empty, offset=(70, 160)),
    "all_empty": dict(blocks=everybody(-1)),
    "sink": dict(blocks=everybody(0), offset=(0, 160)),
    "late_block": dict(blocks=everybody(3), offset=(130, 160)),
    "duplicates_and_strangers": dict(blocks=with_duplicates_and_strangers, offset=(10, 160)),
    "huge_logits": dict(magnitude=8.0, offset=(70, 160)),
}


@pytest.mark.parametrize("case", CASES)
def test_selected_attention_equals_the_reference(case):
  inputs = make_inputs("packed", **CASES[case])
  # float32 rounds the largest score, 315, by up to 1.5e-5, and that is the error of its exponential, here and in the
  # reference; how much of it is left depends on the CPU (against float64 dk was off by 1.05e-5 here, 0.55e-5 there).
  o, lse, dq, dk, dv = check("packed", inputs, exact=2.0 ** -16 if case == "huge_logits" else 2e-6)
  if case == "all_empty":
    assert not (o.any() or dq.any() or dk.any() or dv.any()) and (lse == -np.inf).all()
  if case == "late_block":  # the blocks nobody chose
    assert not dk[:, :192].any() and not dv[:, :192].any() and dv[:, 192:].any()


def test_packed_equals_separate():
  inputs = make_inputs("packed", blocks=lambda rng, shape, count: np.broadcast_to([0, 1, -1, 1, 0], shape))
  start = np.arange(70) >= 64
  blocks = np.where(start[None, :, None, None], 1, inputs[3])
  packed = (*inputs[:3], jnp.asarray(blocks), jnp.asarray(np.arange(230) >= 64, jnp.int32)[None].repeat(2, 0),
            *inputs[5:])
  whole = check("packed", packed)
  alone = tuple(jnp.roll(x, -64, axis=1) for x in inputs[:3])
  alone = check("packed", (*alone, jnp.zeros_like(inputs[3]), *inputs[4:]))
  np.testing.assert_allclose(alone[0][:, :6], whole[0][:, 64:], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(alone[1][:, :6], whole[1][:, 64:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name,case", [("g16", dict(offset=380, segments=True, blocks=half_empty)),
                                       ("g3", dict(offset=250, blocks=with_duplicates_and_strangers))])
def test_selected_attention_does_not_race(name, case, monkeypatch):
  if name == "g3":  # the gradients of three blocks at a time: two passes, four ranges of keys
    monkeypatch.setattr(union, "SUMS_BYTES", 3 * 32 * 128 * 4)
    monkeypatch.setattr(union, "STEP_KEYS", 2 * 32)  # every copy is a callback to be compiled
  inputs = make_inputs(name, **case)
  plan = selected.make_plan(inputs[0], inputs[1], inputs[3], SHAPES[name]["block_size"])
  assert plan.ranges == (4 if name == "g3" else 1) and plan.tiles == 2
  first = check(name, inputs, careful=True)
  if name == "g16":
    for x, y in zip(first, check(name, inputs, careful=True)):
      np.testing.assert_array_equal(x, y)


# --- the loss of an index -----------------------------------------------------


def kl_with_gradients(loss_of):
  """loss_of to (q, k, lse, q_idx, k_idx, blocks, segments, offset, dloss) -> loss, dq_idx, dk_idx."""
  def both(q, k, lse, q_idx, k_idx, blocks, segments, offset, dloss):
    loss, vjp = jax.vjp(lambda q_idx, k_idx: loss_of(q, k, lse, q_idx, k_idx, blocks, segment_ids=segments,
                                                     query_offset=offset), q_idx, k_idx)
    return (loss, *vjp(dloss))
  return jax.jit(both)


@functools.cache
def kl_program(name, careful):
  size = SHAPES[name]["block_size"]
  mine = functools.partial(kl.index_kl, block_size=size, interpret=CAREFUL if careful else True)
  return kl_with_gradients(mine), kl_with_gradients(functools.partial(reference.index_kl, block_size=size))


def check_kl(name, index_dim, careful=False, magnitude=1.0, seed=0, **case):
  q, k, v, blocks, ids, offset, _, _ = make_inputs(name, magnitude=magnitude, **case)
  rng = np.random.default_rng(seed)
  (B, T, S, _, K, *_), dtype = SHAPES[name].values(), q.dtype
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  lse = truth(name)(*(x.astype(jnp.float32) for x in (q, k, v)), blocks, ids, offset, q, jnp.zeros(q.shape[:3]))[1]
  inputs = (q, k, lse, draw(B, T, K, index_dim) * magnitude, draw(B, S, index_dim), blocks, ids, offset,
            jnp.asarray(rng.normal(size=(B, T, K)), jnp.float32))
  mine, theirs = kl_program(name, careful)
  got = jax.block_until_ready(mine(*inputs))
  want = theirs(*(x.astype(jnp.float32) for x in inputs[:5]), *inputs[5:])
  for what, x, y in zip(("loss", "dq_idx", "dk_idx"), got, want):
    assert x.dtype == (jnp.float32 if what == "loss" else dtype)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    # The target is summed over heads with 16 bits where q is bfloat16.
    bar = 1e-5 if what == "loss" else 2e-6 * magnitude if dtype == jnp.float32 else 4e-3
    assert np.isfinite(x).all()
    assert np.linalg.norm(x - y) <= bar * np.linalg.norm(y), (what, np.linalg.norm(x - y) / np.linalg.norm(y))
  if careful:
    assert not races_found()
  return got


@pytest.mark.parametrize("case", ["random", "segments", "half_empty", "sink", "huge_logits", "all_empty"])
def test_index_kl_equals_the_reference(case):
  loss, dq, dk = check_kl("packed", 32, **CASES[case])
  if case == "all_empty":
    assert not (loss.any() or dq.any() or dk.any())


def test_index_kl_does_not_race():
  check_kl("g16", 64, careful=True, offset=380, segments=True, blocks=half_empty)


def test_index_kl_in_ranges_of_keys_and_groups_that_straddle(monkeypatch):
  monkeypatch.setattr(union, "SUMS_BYTES", 3 * 32 * 128 * 4)
  monkeypatch.setattr(union, "STEP_KEYS", 2 * 32)
  check_kl("g3", 64, offset=250, blocks=with_duplicates_and_strangers)


# --- lists of blocks ----------------------------------------------------------


def test_a_block_that_is_not_there_raises():
  plan = union.Plan(batch=1, queries=8, keys=256, kv_heads=1, group=16, slots=1, block_size=128, left=128, right=128)
  lists = jnp.zeros((1, 1, 1, plan.list_length), jnp.int32).at[..., 0].set(plan.blocks).at[..., -1].set(1)
  numbers = jnp.zeros((1, 1, 3, plan.rows), jnp.int32)
  q, kv = jnp.ones((1, 1, plan.rows, 128)), jnp.ones((1, plan.blocks, 128, 256))
  try:
    with pytest.raises(Exception, match="(?i)out of bounds|out-of-bounds"):
      jax.block_until_ready(selected.attend(plan, q, kv, lists, numbers, scale=1.0, interpret=CAREFUL))
  finally:
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("group,slots,block_size,segments", [(16, 5, 4, True), (3, 2, 8, False), (1, 4, 16, True)])
def test_lists_name_what_tiles_see(group, slots, block_size, segments):
  rng = np.random.default_rng(group)
  B, T, S, K, offset = 2, 75, 90, 2, (15, 0)
  plan = union.Plan(B, T, S, K, group, slots, block_size, 64, 64)
  blocks = jnp.asarray(rng.integers(-1, plan.blocks + 2, size=(B, T, K, slots)), jnp.int32)
  ids = np.sort(rng.integers(0, 3, size=(B, S)), axis=1) if segments else None

  @jax.jit
  def make(blocks, ids, offset):
    picks = union.seen_picks(plan, blocks, ids, offset)
    return union.make_lists(plan, picks), union.row_numbers(plan, picks, ids, offset)

  lists, numbers = map(np.asarray, make(blocks, None if ids is None else jnp.asarray(ids), jnp.asarray(offset)))
  for b, r, tile in np.ndindex(B, K, plan.tiles):
    needed = set()
    for t in range(tile * plan.tokens, min((tile + 1) * plan.tokens, T)):
      at = t + offset[b]
      keys = [s for s in range(min(at + 1, S)) if ids is None or ids[b, s] == ids[b, min(at, S - 1)]]
      mine = {int(j) for j in blocks[b, t, r]} & {s // block_size for s in keys}
      row = numbers[b * K + r, tile, :, (t % plan.tokens) * group]
      assert {int(j) - 1 for j in row[:slots] if j} == mine
      assert list(range(row[-2], row[-1])) == keys
      needed |= mine
    found = lists[b * K + r, tile, 0]
    start, stop = found[plan.union + plan.step_blocks:][[0, -1]]
    assert start == 0 and list(found[:stop]) == sorted(needed)


# --- compiled for chips that are not here -------------------------------------


@needs_libtpu
@pytest.mark.parametrize("operation", ["selected_attention", "index_kl"])
def test_libtpu_compiles_the_kernels(operation):
  spec = dataclasses.replace(arg_specs.get("study_8k_j8"), B=1, T=256, J=4)
  row = tpu_programs.row(operation, "v6e", *tpu_programs.operations(spec)[operation])
  assert row["kernels"] == f"{operation}_backward {operation}_forward"
  assert 0 < row["vmem_bytes"] < union.VMEM_BYTES and row["argument_bytes"] > 256 * 8 * 64 * 2


@needs_libtpu
def test_libtpu_compiles_a_training_step():
  function, arguments = tpu_programs.train_step(tpu_programs.shrunk(native.get_config("method=nsa")))
  compiled = aot.compile_for("v6e", function, *arguments, donate_argnums=0)
  # Compressed attention, the window and the selected blocks, both ways, and the choice of blocks.
  assert set(aot.kernels_of(compiled)) == {
      "attention_forward", "attention_backward_q", "attention_backward_kv", "compressed_top_k",
      "selected_attention_forward", "selected_attention_backward"}


def test_served_on_tpu_only_and_reasons_begin_with_an_argument():
  inputs = make_inputs("g16")
  with pytest.raises(NotImplementedError, match="runs on tpu"):
    pallas_kernels.selected_attention(*inputs[:4], block_size=128, implementation="mosaic_tpu")
  for change, begins in [(dict(block_size=48), "block_size = 48"), (dict(k=inputs[1].astype(jnp.float32)), "k.dtype"),
                         (dict(q=jnp.zeros((1, 20, 17, 128), jnp.bfloat16)), "q has 17 heads per KV head"),
                         (dict(scale=jnp.float32(1)), "scale is traced")]:
    arguments = dict(q=inputs[0], k=inputs[1], v=inputs[2], block_indices=inputs[3], block_size=128, scale=None)
    assert selected.supports(**arguments) is None
    assert selected.supports(**{**arguments, **change}).startswith(begins)
  with backends.target_platform("tpu"):
    assert backends.choose("selected_attention", None, arguments).name == "mosaic_tpu"
