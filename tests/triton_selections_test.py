"""Triton kernels that choose blocks, and the KL that trains the choice: in the interpreter, and `gpu` tests.

Run as triton_test.py says, with whose inputs and tolerances.
"""
import contextlib
import functools

import jax
import jax.numpy as jnp
import kernels_cases as cases
from kernels_cases import of_index, on_cpu, on_host, shape, situations, with_gradients
import kernels_oracle as oracle
import numpy as np
import pytest

from pallas_kernels import lists, reference

pytest.importorskip("triton", reason="triton is not installed")
from triton_test import COMPRESSED, TINY, interprets, needs_gpu  # noqa: E402

from pallas_kernels.triton import call, invert, kl, mass, top_k, tuning  # noqa: E402


def drawn_segments(rng, B, S, n=4):
  return jnp.asarray(np.sort(rng.integers(0, n, size=(B, S)), axis=1), jnp.int32)


# --- selections -----------------------------------------------------------------


def block_scores(q, k, block_len, block_stride, block_size, S, scale, segment_ids, offset):
  """float64[B, T, K, blocks] from the definition, -inf where invisible."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  (B, T, N, H), (C, K) = q.shape, k.shape[1:3]
  pos, seg = reference._query_positions(T, offset, segment_ids)
  mask = np.asarray(reference._visible_compressed(pos, seg, C, segment_ids, block_len, block_stride))
  s = np.einsum("btkgh,bckh->bkgtc", q.reshape(B, T, K, N // K, H), k) * scale
  s = np.where(mask[:, None, None], s, -np.inf)
  top = s.max(axis=-1, keepdims=True)
  p = np.exp(s - np.where(np.isfinite(top), top, 0))
  p = (p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)).sum(axis=2)
  weights = reference.overlap_weights(C, -(-S // block_size), block_len, block_stride, block_size)
  visible = np.asarray(reference._visible_blocks(pos, seg, S, segment_ids, block_size))
  scores = np.einsum("bktc,cj->btkj", p, weights)
  return np.where(visible[:, :, None], scores, -np.inf)


SELECTIONS = {  # shape of q, K, packed, query offset, block, J, (initial, local)
    "g16": ((1, 700, 16, 64), 1, False, 0, 64, 8, (1, 2)),
    "g3_packed": ((2, 500, 6, 64), 2, True, 0, 64, 4, (1, 1)),
    "few_queries": ((2, 2, 8, 64), 2, False, 3000, 64, 8, (0, 1)),
    "all_blocks": ((1, 200, 4, 64), 1, False, 0, 32, 16, (0, 0)),
    "beyond_one_chunk": ((1, 40, 2, 64), 1, False, 18000, 32, 5, (1, 0)),
}


def check_selections(name, seed=0):
  (B, T, N, H), K, packed, offset, size, J, (initial, local) = SELECTIONS[name]
  rng = np.random.default_rng(seed)
  S, dtype = T + offset, jnp.float32 if call.INTERPRET else jnp.bfloat16
  ids = drawn_segments(rng, B, S) if packed else None
  strides = dict(block_len=size // 2, block_stride=size // 4, segment_ids=ids, query_offset=offset)
  C = (S - size // 2) // (size // 4) + 1
  q, k = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, N, H), (B, C, K, H)))
  choice = dict(block_size=size, num_blocks=J, num_initial=initial, num_local=local)
  with on_cpu():
    _, lse = jax.jit(functools.partial(reference.compressed_attention, **on_host(strides)))(*on_host((q, k, k)))
  lse = jnp.asarray(np.asarray(lse))
  got = np.asarray(jax.jit(functools.partial(top_k.compressed_top_k, scale=H ** -0.5, **strides, **choice))(q, k, lse))
  oracle.check_selection(got, block_scores(q, k, size // 2, size // 4, size, S, H ** -0.5, ids, offset), J, initial,
                         local, size, offset, atol=1e-4)
  # Small integers: exact scores, so ties and all must be the reference's.
  q, k = (jnp.asarray(rng.integers(-1, 2, size=s), dtype) for s in ((B, T, K, H), (B, S, H)))
  where = dict(segment_ids=ids, query_offset=offset, scale=1.0)
  got = jax.jit(functools.partial(top_k.index_top_k, **where, **choice))(q, k)
  with on_cpu():
    want = jax.jit(functools.partial(reference.index_top_k, **on_host(where), **choice))(*on_host((q, k)))
  np.testing.assert_array_equal(np.sort(got), np.sort(want))


  scores = jnp.asarray(rng.integers(-3, 4, size=(B, T, K, -(-S // size))), dtype)  # ties, and blocks past the last
  where = dict(segment_ids=ids, query_offset=offset, keys=S)
  got = jax.jit(functools.partial(top_k.block_top_k, **where, **choice))(scores)
  with on_cpu():
    want = jax.jit(functools.partial(reference.block_top_k, **on_host(where), **choice))(on_host(scores))
  np.testing.assert_array_equal(np.sort(got), np.sort(want))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("few", [0, top_k.FEW])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_on_device(name, few, monkeypatch):
  monkeypatch.setattr(top_k, "FEW", few)
  check_selections(name)


def check_many_slots(blocks):
  """More slots than the least number of groups; one sequence has every score four times."""
  B, T, K, size, J = 2, 1, 2, 4, 100
  scores = np.random.default_rng(0).normal(size=(B, T, K, blocks))
  scores[1] = scores[1, :, :, :1] + np.arange(blocks) // 4 % 5
  scores = jnp.asarray(scores, jnp.float32)
  choice = dict(block_size=size, num_blocks=J, num_initial=1, num_local=2, keys=blocks * size, segment_ids=None,
                query_offset=blocks * size - 100)
  got = np.asarray(jax.jit(functools.partial(top_k.block_top_k, **choice))(scores))
  with on_cpu():
    want = np.asarray(jax.jit(functools.partial(reference.block_top_k, **choice))(on_host(scores)))
  np.testing.assert_array_equal(np.sort(got), np.sort(want))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("blocks", [700, 125])
def test_many_slots_on_device(blocks):
  check_many_slots(blocks)


def test_blocks_that_no_tile_holds_are_refused():
  q, k_cmp = jax.ShapeDtypeStruct((1, 480, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 29, 2, 64), jnp.bfloat16)
  reason = lambda **sizes: top_k.supports_compressed_top_k(
      q=q, k_cmp=k_cmp, scale=0.1, num_blocks=4, **{**COMPRESSED, **sizes}) or ""
  assert "block_size = 48 to be a power of two times" in reason(block_size=48)
  assert "divisor of block_size = 40" in reason(block_size=40)
  assert "block_size" not in reason(block_size=64)


# --- index_kl -------------------------------------------------------------------


KL_ON_DEVICE = functools.partial(shape, T=200, N=6, H=64, index_dim=32, block_size=32, dtype="bfloat16", S=260)
KL_SMALL = functools.partial(shape, T=40, N=6, H=16, index_dim=16, block_size=16)


def check_kl(s, situation, *, warmup=False, **tolerance):
  """Over selected tokens, or over all (warm-up)."""
  inputs = cases.draw("index_kl", s, situation, always=False)
  if warmup:
    q, k = inputs.rest["q"], inputs.rest["k"]
    where = {name: inputs.rest[name] for name in ("segment_ids", "query_offset")}
    with on_cpu():
      _, lse = reference.attention(*cases.up(on_host((q, k, k))), **on_host(where))
    inputs = inputs._replace(rest={**inputs.rest, "block_indices": None, "lse": jnp.asarray(np.asarray(lse))})
  options = dict(block_size=s.block_size, scale=s.H ** -0.5, index_scale=s.index_dim ** -0.5)
  got = with_gradients(of_index(kl.index_kl), **options)(inputs)
  with on_cpu():
    want = cases.truth("index_kl", **options)(cases.up(on_host(inputs)))
  cases.compare("index_kl", got, want, jnp.dtype(s.dtype), **tolerance)


KEPT = [(False, 2 ** 31, 2 ** 32), (False, 0, 2 ** 32), (True, 0, 2 ** 32),  # warm-up, KEPT_BYTES, SLICE_BYTES
        (False, 2 ** 31, 2 ** 16), (False, 0, 2 ** 16)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("situation, warmup, kept_bytes, slice_bytes", [
    *((name, *kept) for name in situations("index_kl") for kept in KEPT[:3]),
    *(("segments", *kept) for kept in KEPT[3:])])
def test_index_kl_on_device(situation, warmup, kept_bytes, slice_bytes, monkeypatch):
  monkeypatch.setattr(kl, "KEPT_BYTES", kept_bytes)
  monkeypatch.setattr(kl, "SLICE_BYTES", slice_bytes)
  # float32 sums of bfloat16 products; gradients round their scores and themselves to bfloat16
  check_kl(KL_ON_DEVICE(), situation, warmup=warmup, rounded=5e-3)


@pytest.mark.gpu
@needs_gpu
def test_index_kl_same_bits_over_20_runs():
  s = KL_ON_DEVICE(T=1000, S=1000)
  options = dict(block_size=32, scale=0.125, index_scale=0.2)
  cases.same_bits(with_gradients(of_index(kl.index_kl), **options), cases.draw("index_kl", s, "segments", always=False))


# --- lists ----------------------------------------------------------------------


LISTS = {  # group, J, block size, segments, query offset, range, B, T, S, K
    "ranges": (4, 3, 8, False, 0, 10, 2, 37, 50, 2),
    "segments": (16, 5, 4, True, 7, 70, 2, 80, 90, 2),
    "g7": (7, 4, 8, False, 0, 40, 1, 120, 120, 2),
}
LARGE = {
    "study": (4, 16, 32, True, 0, 4096, 4, 4096, 4096, 2),
    "many_lists": (16, 16, 64, False, 0, 1024, 1, 16384, 16384, 4),
    "many_slots": (1, 50, 128, False, 0, 5000, 1, 7000, 7000, 3),
}


def check_lists(group, J, size, segments, offset, range_size, B, T, S, K):
  """Counted as sorted, wherever lists.Entries says what is there."""
  rng = np.random.default_rng(J)
  plan = lists.Plan(B, T, S, K, group, J, size, range_size=range_size, tiles_per_unit=2)
  blocks = rng.integers(-1, plan.blocks + 2, size=(B, T, K, J))  # some lie past the end
  blocks[:, :T // 4, 0] = 1  # duplicates, and a hot block
  blocks, ids = jnp.asarray(blocks, jnp.int32), drawn_segments(rng, B, S) if segments else None
  want, got = (jax.jit(lambda b: f(b, plan, ids, offset))(blocks) for f in (lists.invert, invert.invert))
  entries, units = int((np.asarray(want.position) >= 0).sum()), int(want.unit_start[-1])
  for name, end in (("rows", entries), ("spans", entries), ("units", units), ("position", B), ("unit_start", None)):
    np.testing.assert_array_equal(getattr(got, name)[:end], getattr(want, name)[:end], err_msg=name)
  assert not np.asarray(got.units)[units:, 1].any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", LARGE)
def test_lists_on_device(name):
  check_lists(*LARGE[name])


# --- block mass and block peak --------------------------------------------------


MASS = {  # shape of q, K, S, block size, options
    "g3_packed": ((2, 90, 6, 64), 2, 90, 32, dict(segments=True)),
    "g16_cache": ((1, 40, 16, 64), 1, 300, 64, dict(query_offset=250)),
    "beyond_the_keys": ((1, 50, 2, 64), 2, 70, 16, dict(query_offset=40)),
}


def check_block_mass(name, H, tolerance):
  (B, T, N, _), K, S, size, options = MASS[name]
  options, rng = dict(options), np.random.default_rng(0)
  dtype = jnp.float32 if call.INTERPRET else jnp.bfloat16
  q, k = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, N, H), (B, S, K, H)))
  if options.pop("segments", False):
    options["segment_ids"] = drawn_segments(rng, B, S)
  options = {**dict(segment_ids=None, query_offset=0, scale=0.3), **options}
  with on_cpu():
    host = on_host((q, k, options))
    _, lse = reference.attention(host[0], host[1], host[1], **host[2])
    lse = lse.at[:, 3].set(-jnp.inf)  # says that nothing is seen
    chosen = jnp.asarray(rng.integers(-1, -(-S // size) + 1, size=(B, T, K, 2)), jnp.int32).at[:, 20:40].set(-1)
    run = lambda f, *lists: f(*host[:2], lse, *lists, block_size=size, **host[2])
    want = [*run(reference.block_mass), run(reference.block_peak, None), run(reference.block_peak, chosen)]
  run = lambda f, *lists: jax.jit(functools.partial(f, block_size=size, **options))(
      q, k, jnp.asarray(np.asarray(lse)), *lists)
  got = run(mass.block_mass)
  both = run(mass.block_peak, None), run(mass.block_peak, jnp.asarray(np.asarray(chosen)))
  for x, y in zip((*got, *both), want, strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    assert np.asarray(y).max() > 0.01
  np.testing.assert_allclose(np.delete(got[0].sum(axis=-1), 3, axis=1), 1.0, rtol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", MASS)
def test_block_mass_on_device(name):
  check_block_mass(name, 64, 1e-4)


# --- the interpreter ------------------------------------------------------------


@interprets
@pytest.mark.parametrize("name", LISTS)
def test_interpreted_lists(name):
  check_lists(*LISTS[name])


@interprets
def test_interpreted_lists_under_vmap():
  plan = lists.Plan(1, 40, 40, 1, 4, 2, 8, range_size=40, tiles_per_unit=2)
  blocks = jnp.asarray(np.random.default_rng(0).integers(-1, 5, size=(2, 1, 40, 1, 2)), jnp.int32)
  want, got = (jax.vmap(lambda b: f(b, plan))(blocks) for f in (lists.invert, invert.invert))
  np.testing.assert_array_equal(got.position, want.position)


@interprets
@pytest.mark.parametrize("H, parts, transposed", [(64, 2, True), (48, 1, False)])
def test_interpreted_sums_of_keys(H, parts, transposed):
  """Of a last block that is cut short, of two ranges of queries; a block may have no unit, and what no unit wrote is
  not read."""
  plan = lists.Plan(2, 40, 60, 2, 1, 2, 32, range_size=20, tiles_per_unit=2)
  rng = np.random.default_rng(0)
  counts = rng.integers(0, 4, (plan.batch, plan.kv_heads, plan.ranges, plan.blocks))
  starts = np.concatenate([[0], np.cumsum(counts)])
  dk, dv = rng.normal(size=(2, starts[-1] + 3, parts, 32 // parts, H)).astype(np.float32)
  dk[starts[-1]:] = np.nan
  want = np.zeros((2, plan.batch, plan.blocks * 32, plan.kv_heads, H))
  for unit, (b, r, _, block) in enumerate(np.repeat(np.argwhere(counts >= 0), counts.ravel(), axis=0)):
    for x, total in ((dk * 0.5, want[0]), (dv, want[1])):
      total[b, block * 32:(block + 1) * 32, r] += x[unit].reshape(32, H)
  arrays = [jnp.asarray(x.swapaxes(2, 3) if transposed else x) for x in (dk, dv)]
  got = kl.sum_keys(*arrays, jnp.asarray(starts, jnp.int32), plan, jnp.float32, scale=0.5, transposed=transposed)
  np.testing.assert_allclose(got, want[:, :, :60], rtol=1e-5, atol=1e-5)


@interprets
@pytest.mark.parametrize("name", MASS)
def test_interpreted_block_mass(name):
  with tuning.override("block_mass", TINY._replace(block=32)):  # less than a block, as much, and more
    check_block_mass(name, 16, 2e-5)


@interprets
@pytest.mark.parametrize("few", [0, top_k.FEW])  # so short lines go through the kernel of long ones, too
@pytest.mark.parametrize("name", SELECTIONS)
def test_interpreted_selections(name, few, monkeypatch):
  monkeypatch.setattr(top_k, "FEW", few)
  (B, T, N, H), *rest = SELECTIONS[name]
  monkeypatch.setitem(SELECTIONS, name, ((B, min(T, 40), N, 16), *rest))
  with tuning.override("compressed_scores", TINY), tuning.override("index_scores", TINY):
    check_selections(name)


@interprets
@pytest.mark.parametrize("few", [0, top_k.FEW])
def test_interpreted_scores_that_are_no_numbers(few, monkeypatch):
  monkeypatch.setattr(top_k, "FEW", few)
  cases.check_nan_scores(top_k.block_top_k, top_k.index_top_k)


@interprets
@pytest.mark.parametrize("blocks", [700, 125])
def test_interpreted_many_slots(blocks):
  check_many_slots(blocks)


@interprets
@pytest.mark.parametrize("situation, warmup, kept_bytes, slice_bytes", [
    *(("segments", *kept) for kept in KEPT), *((name, *KEPT[0]) for name in situations("index_kl"))])
def test_interpreted_index_kl(situation, warmup, kept_bytes, slice_bytes, monkeypatch):
  monkeypatch.setattr(kl, "KEPT_BYTES", kept_bytes)
  monkeypatch.setattr(kl, "SLICE_BYTES", slice_bytes)
  monkeypatch.setattr(kl, "COUNTED", 0 if kept_bytes == 0 else 2 ** 31)
  with contextlib.ExitStack() as stack:
    for kernel in ("index_kl", "index_kl_forward", "index_kl_backward"):
      stack.enter_context(tuning.override(kernel, TINY))
    check_kl(KL_SMALL(S=60), situation, warmup=warmup, exact=2.0 ** -16 if situation == "huge_logits" else 5e-6)


@interprets
def test_interpreted_index_kl_of_several_cotangents():
  """What the forward pass keeps of a batch must not be read as if it were that of a larger one."""
  inputs = cases.draw("index_kl", KL_SMALL(), "segments", always=False)
  f = functools.partial(of_index(kl.index_kl), **inputs.rest, block_size=16, scale=0.25, index_scale=0.25)
  with tuning.override("index_kl", TINY):
    _, pull = jax.vjp(f, *inputs.arrays)
    dloss = inputs.cotangents
    got = jax.vmap(pull)(jnp.stack([dloss, 2 * dloss]))
    want = pull(dloss)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, jnp.stack([y, 2 * y]), rtol=2e-5, atol=2e-5)
