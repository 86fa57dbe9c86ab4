"""`paged_attention`: the reference against an oracle, the Triton kernel in its interpreter and, marked `gpu`, on a GPU.

`TRITON_INTERPRET=1 pytest tests/paged_test.py` runs the kernel's arithmetic where torch and triton are installed.
"""
import functools

import jax
import jax.numpy as jnp
import kernels_cases
import kernels_oracle as oracle
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, masked, reference

try:
  from pallas_kernels.triton import call, paged
except ImportError:
  call = None
try:
  import torch
except ImportError:
  torch = None

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
interprets = pytest.mark.skipif(call is None or not call.INTERPRET or torch is None,
                                reason="needs TRITON_INTERPRET=1, triton and torch")

# Sequences of length `lengths` after the T tokens of this call; tables of `table` pages, some of them of nothing.
CASES = {
    "dense": dict(T=1, lengths=(61, 1, 200)),
    "window": dict(T=1, lengths=(200, 17, 100), window=37),
    "several_tokens": dict(T=3, lengths=(40, 3), window=20),
    "selected": dict(T=1, lengths=(61, 1, 200), J=5),
    "selected_g1": dict(T=2, lengths=(130, 7), J=3, N=2),
    "past_the_table": dict(T=1, lengths=(300, 40), table=9),
    "past_the_table_window": dict(T=1, lengths=(300, 150), table=9, window=37),
    "past_the_table_selected": dict(T=1, lengths=(300, 40), table=9, J=4),
}


def make(T, lengths, J=None, window=None, table=13, N=6, K=2, H=16, size=16, dtype=jnp.float32, seed=0):
  """(q, k_pages, v_pages, page_table), options and the keys that each query sees, as the oracle takes them."""
  rng, B = np.random.default_rng(seed), len(lengths)
  pages = B * table + 3
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  names = rng.permutation(pages)[:B * table].reshape(B, table).astype(np.int32)
  names[0, 1] = -1
  names[-1, :1] = pages + 7  # absent pages of either kind
  names[-1, -1] = names[0, 0]  # and one that two sequences share
  offset = np.int32(lengths) - T
  options = dict(window=window, block_indices=None, query_offset=jnp.asarray(offset))
  if J:
    blocks = rng.integers(-1, table + 2, size=(B, T, K, J)).astype(np.int32)
    blocks[:, -1, :, 0] = (np.int32(lengths) - 1)[:, None] // size
    blocks[..., -1] = blocks[..., 0]  # a duplicate
    options["block_indices"] = jnp.asarray(blocks)
    sets = oracle.selected_sets(blocks, size, table * size, query_offset=offset)
  else:
    sets = oracle.dense_sets(B, T, K, table * size, query_offset=offset, window=window)
  there = (names >= 0) & (names < pages)
  sets = [[[[s for s in seen if there[b, s // size]] for seen in row] for row in sets[b]] for b in range(B)]
  return (draw(B, T, N, H), draw(pages, size, K, H), draw(pages, size, K, H), jnp.asarray(names)), options, sets


def gathered(pages, names):
  """[B, S, K, H] of a pool of pages, by the table; absent pages are of NaN."""
  pages, names = np.asarray(pages, np.float64), np.asarray(names)
  out = np.full((*names.shape, *pages.shape[1:]), np.nan)
  there = (names >= 0) & (names < len(pages))
  out[there] = pages[names[there]]
  return out.reshape(len(names), -1, *pages.shape[2:])


def check(got, arguments, sets, **tolerance):
  q, k, v, names = arguments
  o, lse = (np.asarray(x, np.float64) for x in got)
  want_o, want_lse = oracle.attend(q, gathered(k, names), gathered(v, names), sets, q.shape[-1] ** -0.5)[:2]
  assert np.isfinite(want_o).all()
  np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
  seen = np.isfinite(want_lse)
  np.testing.assert_allclose(o, want_o, **tolerance)
  np.testing.assert_allclose(np.where(seen, lse, 0), np.where(seen, want_lse, 0), **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_the_oracle(name):
  arguments, options, sets = make(**CASES[name])
  got = jax.jit(functools.partial(pk.paged_attention, implementation="reference", **options))(*arguments)
  check(got, arguments, sets, rtol=1e-5, atol=2e-5)


def test_pages_in_order_are_a_contiguous_cache():
  (q, k, v, _), options, _ = make(**CASES["selected"])
  B, table = q.shape[0], 13
  names = jnp.arange(B * table, dtype=jnp.int32).reshape(B, table)
  flat = [x[:B * table].reshape(B, table * 16, *x.shape[2:]) for x in (k, v)]
  where = dict(query_offset=options["query_offset"])
  same = lambda f, g: np.testing.assert_allclose(jax.jit(f)()[0], jax.jit(g)()[0], rtol=1e-6, atol=1e-6)
  same(lambda: pk.paged_attention(q, k, v, names, window=50, **where),
       lambda: pk.attention(q, *flat, window=50, **where))
  blocks = options["block_indices"]
  same(lambda: pk.paged_attention(q, k, v, names, block_indices=blocks, **where),
       lambda: pk.selected_attention(q, *flat, blocks, block_size=16, **where))


BAD = {
    r"k_pages has the shape \(13, 16, 2\)": lambda q, k, v, t: pk.paged_attention(q, k[..., 0], v, t),
    "v_pages has the shape.*that of k_pages": lambda q, k, v, t: pk.paged_attention(q, k, v[1:], t),
    "page_table has the dtype float": lambda q, k, v, t: pk.paged_attention(q, k, v, t * 1.0),
    "page_table has the shape.*B must be that of q": lambda q, k, v, t: pk.paged_attention(q, k, v, t[:1]),
    r"page_table \(2, 0\) is empty": lambda q, k, v, t: pk.paged_attention(q, k, v, t[:, :0]),
    "H must be that of q": lambda q, k, v, t: pk.paged_attention(q[..., :8], k, v, t),
    "N = 5 heads.*multiple of the K = 2 heads of k_pages": lambda q, k, v, t: pk.paged_attention(q[:, :, :5], k, v, t),
    "window = 0": lambda q, k, v, t: pk.paged_attention(q, k, v, t, window=0),
    "window = 4 with block_indices": lambda q, k, v, t: pk.paged_attention(
        q, k, v, t, window=4, block_indices=np.zeros((2, 1, 2, 3), np.int32)),
    "block_indices has the shape": lambda q, k, v, t: pk.paged_attention(
        q, k, v, t, block_indices=np.zeros((2, 1, 6, 3), np.int32)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  table = np.arange(12, dtype=np.int32).reshape(2, 6)
  with pytest.raises(ValueError, match=message):
    BAD[message](draw(2, 1, 6, 16), draw(13, 16, 2, 16), draw(13, 16, 2, 16), table)


@interprets
@pytest.mark.parametrize("processors", [1, 132])  # one program per item, and many
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_the_oracle(name, processors, monkeypatch):
  monkeypatch.setattr(call, "processors", lambda: processors)
  arguments, options, sets = make(**CASES[name])
  free = sorted(set(range(len(arguments[1]))) - set(np.asarray(arguments[3]).ravel().tolist()))
  poisoned = [x.at[jnp.asarray(free)].set(jnp.nan) for x in arguments[1:3]]  # what no table names is not read
  options = dict(options, scale=16 ** -0.5)
  got = jax.jit(functools.partial(paged.paged_attention, **options))(arguments[0], *poisoned, arguments[3])
  check(got, (arguments[0], *poisoned, arguments[3]), sets, rtol=2e-5, atol=2e-5)


ON_DEVICE = {
    "dense_g16": dict(T=1, lengths=(1000, 1, 2500, 77), table=41, N=32, H=128, size=64),
    "one_long": dict(T=1, lengths=(60_000,), table=1000, N=16, K=1, H=128, size=64),
    "window_g3": dict(T=2, lengths=(1000, 200), table=16, window=300, N=6, H=64, size=64),
    "selected_g16": dict(T=1, lengths=(1000, 1, 2500, 77), table=41, J=9, N=32, H=128, size=64),
    "selected_pages_of_128": dict(T=1, lengths=(5000, 3000), table=40, J=6, N=8, H=128, size=128),
    "small_pages": dict(T=1, lengths=(500,) * 8, table=33, J=4, N=4, H=64, size=16),
    "many_sequences": dict(T=1, lengths=tuple(range(1, 900, 7)), table=15, N=16, K=4, H=128, size=64),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ON_DEVICE)
def test_error_on_device_is_that_of_the_dtype(name):
  arguments, options, _ = make(**ON_DEVICE[name], dtype=jnp.bfloat16)
  assert backends.choose("paged_attention", None, dict(zip(("q", "k_pages", "v_pages", "page_table"), arguments),
                                                       scale=0.1, **options)).name == "triton"
  got = jax.jit(functools.partial(pk.paged_attention, implementation="triton", **options))(*arguments)
  with kernels_cases.on_cpu():
    (q, k, v, names), options = kernels_cases.on_host((arguments, options))
    B, T, K, size = *q.shape[:2], k.shape[2], k.shape[1]
    pos, _ = reference._query_positions(T, options["query_offset"], None)
    keys = slice(0, names.shape[1] * size)
    mask = masked.visible_tokens(pos, None, keys, None, window=options["window"])[:, None]
    if options["block_indices"] is not None:
      mask = reference._selected_tokens(options["block_indices"], pos, None, keys, None, size)
    there = (names >= 0) & (names < len(k))
    mask = jnp.broadcast_to(mask & jnp.repeat(there, size, axis=1)[:, None, None], (B, K, T, keys.stop))
    flat = [x[jnp.where(there, names, 0)].reshape(B, keys.stop, K, -1) for x in (k, v)]
    theirs = jax.jit(kernels_cases.attend_in_dtype(mask, q.shape[-1] ** -0.5))(q, *flat)
    exact = functools.partial(reference.paged_attention, **options)
    want = jax.jit(exact)(*(x.astype(jnp.float32) for x in (q, k, v)), names)
  kernels_cases.compare("paged_attention", got, want, jnp.bfloat16, theirs=theirs)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["one_long", "selected_g16"])
def test_same_bits_over_200_runs(name):
  arguments, options, _ = make(**ON_DEVICE[name], dtype=jnp.bfloat16)
  run = jax.jit(functools.partial(pk.paged_attention, implementation="triton", **options))
  first = [np.asarray(x).tobytes() for x in run(*arguments)]
  for _ in range(200):
    assert [np.asarray(x).tobytes() for x in run(*arguments)] == first


@pytest.mark.skipif(call is None or call.unavailable() is not None or call.INTERPRET, reason="needs the CUDA plugin")
@pytest.mark.parametrize("J", [None, 12])
def test_lowers_for_h100(J):
  import triton_test
  arguments, options, _ = make(T=1, lengths=(2500, 30), table=41, J=J, N=8, H=128, size=64, dtype=jnp.bfloat16)
  text = triton_test.lowered(functools.partial(pk.paged_attention, implementation="triton", **options), *arguments)
  assert text.count("@triton_kernel_call") == 2  # of parts of the pages, and of what they come to
