"""TPU kernels on a CPU: equal to the reference in both interpreters, without races, and compiled for TPUs by libtpu.

One program per shape serves many inputs: segments and query offsets are always passed and may say nothing.
"""
import dataclasses
import functools

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import kernels_cases as cases
import numpy as np
import pytest

from benchmarks import tpu_programs
from experiments import native
import pallas_kernels
from pallas_kernels import arg_specs, backends, head_dims, reference
from pallas_kernels.mosaic_tpu import aot, kl, selected, union

# On_wait: a copy moves data when it is waited for, so that reading too early reads NaN.
CAREFUL = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def races_found():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  return interpret_pallas_call.races.races_found


SHAPES = {
    # Several sequences, ragged tiles, a partial last block, more slots than blocks; k and v share 128 lanes.
    "packed": cases.shape(B=2, T=70, S=230, N=4, K=1, H=64, J=5, block_size=64, index_dim=32),
    # 256 rows of 16 heads, blocks of 128.
    "g16": cases.shape(B=1, T=20, S=400, N=16, K=1, H=128, J=3, block_size=128, dtype="bfloat16", index_dim=64),
    # Groups of 3 leave rows of a tile empty; two KV heads, blocks of 32.
    "g3": cases.shape(B=1, T=50, S=300, N=6, K=2, H=64, J=4, block_size=32, dtype="bfloat16", index_dim=64),
    "g5_h256": cases.shape(B=1, T=20, S=140, N=5, K=1, H=256, J=3, block_size=64, dtype="bfloat16"),
}
KERNELS = {"selected_attention": selected.selected_attention, "index_kl": cases.of_index(kl.index_kl)}
PACKED_HALF_EMPTY = cases.Situation(documents=lambda S: 4, offset=(1,), blocks=cases.half_empty)


@functools.cache
def program(operation, name, careful):
  return cases.with_gradients(KERNELS[operation], block_size=SHAPES[name].block_size,
                              interpret=CAREFUL if careful else True)


def check(operation, name, situation, careful=False, **tolerance):
  inputs = situation if isinstance(situation, cases.Inputs) else cases.draw(operation, SHAPES[name], situation)
  got = cases.check(operation, program(operation, name, careful), inputs,
                    options=dict(block_size=SHAPES[name].block_size), **tolerance)
  if careful:
    assert not races_found()
  return got


@pytest.mark.parametrize("situation", cases.situations("selected_attention"))
def test_selected_attention_equals_the_reference(situation):
  # float32 rounds the largest score, 315, by up to 1.5e-5, and that is the error of its exponential, here and in the
  # reference; how much of it is left depends on the CPU (against float64 dk was off by 1.05e-5 here, 0.55e-5 there).
  exact = 2.0 ** -16 if situation == "huge_logits" else 2e-6
  o, lse, dq, dk, dv = check("selected_attention", "packed", situation, exact=exact)
  if situation == "all_empty":
    assert not (o.any() or dq.any() or dk.any() or dv.any()) and (lse == -np.inf).all()
  if situation == "late_block":  # the blocks nobody chose
    assert not dk[:, :192].any() and not dv[:, :192].any() and dv[:, 192:].any()


def test_packed_equals_separate():
  lists = cases.Situation(blocks=lambda rng, shape, count: np.broadcast_to([0, 1, -1, 1, 0], shape))
  inputs = cases.draw("selected_attention", SHAPES["packed"], lists)
  blocks = inputs.rest["block_indices"]
  second = np.where((np.arange(70) >= 64)[None, :, None, None], 1, blocks)
  ids = jnp.asarray(np.arange(230) >= 64, jnp.int32)[None].repeat(2, 0)
  with_lists = lambda arrays, **rest: inputs._replace(arrays=arrays, rest={**inputs.rest, **rest})
  packed = with_lists(inputs.arrays, block_indices=jnp.asarray(second, jnp.int32), segment_ids=ids)
  alone = with_lists(tuple(jnp.roll(x, -64, axis=1) for x in inputs.arrays), block_indices=jnp.zeros_like(blocks))
  whole, alone = (check("selected_attention", "packed", x) for x in (packed, alone))
  np.testing.assert_allclose(alone[0][:, :6], whole[0][:, 64:], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(alone[1][:, :6], whole[1][:, 64:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name,situation", [("g16", PACKED_HALF_EMPTY), ("g3", "duplicates_and_strangers")])
def test_selected_attention_does_not_race(name, situation, monkeypatch):
  if name == "g3":  # the gradients of three blocks at a time: two passes, four ranges of keys
    monkeypatch.setattr(union, "SUMS_BYTES", 3 * 32 * 128 * 4)
    monkeypatch.setattr(union, "STEP_KEYS", 2 * 32)  # every copy is a callback to be compiled
  inputs = cases.draw("selected_attention", SHAPES[name], situation)
  plan = selected.make_plan(*inputs.arrays[:2], inputs.rest["block_indices"], SHAPES[name].block_size)
  assert plan.ranges == (4 if name == "g3" else 1) and plan.tiles == 2
  first = check("selected_attention", name, inputs, careful=True)
  if name == "g16":
    for x, y in zip(first, check("selected_attention", name, inputs, careful=True)):
      np.testing.assert_array_equal(x, y)


def test_selected_attention_of_a_wide_head():
  check("selected_attention", "g5_h256", "random")


def test_head_dims_that_the_kernels_lack_are_padded():
  seen = []

  def kernel(**arguments):
    seen.append(arguments["q"].shape[-1])
    return reference.selected_attention(**arguments)

  padded = head_dims.pad(kernel, selected.padded_head_dim, gives_rows=True, names=("q", "k", "v"))
  how = dict(block_size=32, scale=0.1)
  inputs = cases.draw("selected_attention", cases.shape(B=1, T=9, S=70, N=2, K=1, H=80, J=2, block_size=32))
  program = cases.with_gradients(lambda q, k, v, **rest: padded(q=q, k=k, v=v, **rest), **how)
  cases.check("selected_attention", program, inputs, options=how)
  assert seen == [128] and [selected.padded_head_dim(H) for H in (48, 64, 96, 256, 300)] == [64, 64, 128, 256, 300]


# --- the loss of an index -----------------------------------------------------


@pytest.mark.parametrize("situation", cases.situations("index_kl"))
def test_index_kl_equals_the_reference(situation):
  loss, dq, dk = check("index_kl", "packed", situation, exact=16e-6 if situation == "huge_logits" else 2e-6)
  if situation == "all_empty":
    assert not (loss.any() or dq.any() or dk.any())


def test_index_kl_does_not_race():
  check("index_kl", "g16", PACKED_HALF_EMPTY, careful=True)


def test_index_kl_in_ranges_of_keys_and_groups_that_straddle(monkeypatch):
  monkeypatch.setattr(union, "SUMS_BYTES", 3 * 32 * 128 * 4)
  monkeypatch.setattr(union, "STEP_KEYS", 2 * 32)
  check("index_kl", "g3", "duplicates_and_strangers")


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
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="compiled by the newest jax, which CI asks too")
def test_libtpu_compiles_a_training_step():
  function, arguments = tpu_programs.train_step(tpu_programs.shrunk(native.get_config("method=nsa")))
  compiled = aot.compile_for("v6e", function, *arguments, donate_argnums=0)
  # Compressed attention, the window and the selected blocks, both ways, and the choice of blocks.
  assert set(aot.kernels_of(compiled)) == {
      "attention_forward", "attention_backward_q", "attention_backward_kv", "compressed_top_k",
      "selected_attention_forward", "selected_attention_backward"}


def test_served_on_tpu_only_and_reasons_begin_with_an_argument():
  inputs = cases.draw("selected_attention", SHAPES["g16"])
  (q, k, v), blocks = inputs.arrays, inputs.rest["block_indices"]
  with pytest.raises(NotImplementedError, match="runs on tpu"):
    pallas_kernels.selected_attention(q, k, v, blocks, block_size=128, implementation="mosaic_tpu")
  for change, begins in [(dict(block_size=48), "block_size = 48"), (dict(k=k.astype(jnp.float32)), "k.dtype"),
                         (dict(q=jnp.zeros((1, 20, 17, 128), jnp.bfloat16)), "q has 17 heads per KV head"),
                         (dict(scale=jnp.float32(1)), "scale is traced")]:
    arguments = dict(q=q, k=k, v=v, block_indices=blocks, block_size=128, scale=None)
    assert selected.supports(**arguments) is None
    assert selected.supports(**{**arguments, **change}).startswith(begins)
  with backends.target_platform("tpu"):
    assert backends.choose("selected_attention", None, arguments).name == "mosaic_tpu"
