"""Properties that every implementation of the operations must have, on inputs that hypothesis draws."""
import functools
import inspect

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import kernels_cases as cases
import kernels_oracle as oracle
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, spans

H, HI, BLOCK = 8, 4, 8
few = functools.partial(settings, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


@functools.cache
def program(operation, **options):
  return cases.with_gradients(getattr(pk, operation), **options)


select = program("selected_attention", block_size=BLOCK)
draw = functools.partial(cases.draw, "selected_attention")


def choosing(inputs, blocks):
  return inputs._replace(rest={**inputs.rest, "block_indices": jnp.asarray(blocks, jnp.int32)})


def assert_same(got, want, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), got, want)


# --- selected attention -------------------------------------------------------


@few(max_examples=10)
@given(seeds, st.sampled_from([(1, 2), (2, 2), (4, 1), (8, 1), (16, 1), (3, 2)]),
       st.sampled_from([(24, 1), (21, 3), (13, 7)]), st.sampled_from(["from_the_start", "crumbs"]))
def test_any_group_any_length_any_row(seed, heads, lengths, situation):
  (G, K), (T, J) = heads, lengths
  s = cases.shape(T=T, N=G * K, K=K, J=J)
  inputs = draw(s, situation, seed)
  cases.check_by_oracle("selected_attention", select(inputs), s, inputs, {})


@few(max_examples=5)
@given(seeds)
def test_order_and_duplicates_do_not_matter(seed):
  inputs = draw(cases.shape(T=24), "from_the_start", seed)
  blocks = np.asarray(inputs.rest["block_indices"])
  shuffled = np.random.default_rng(seed).permuted(blocks, axis=-1)
  for other in (shuffled, np.concatenate([blocks, shuffled], axis=-1)):
    assert_same(select(choosing(inputs, other)), select(inputs), rtol=1e-6, atol=1e-6)


@few(max_examples=5)
@given(seeds, st.sampled_from(["from_the_start", "crumbs"]))
def test_all_blocks_are_dense_attention(seed, situation):
  s = cases.shape(T=21)
  inputs, dense = draw(s, situation, seed), cases.draw("attention", s, situation, seed)
  blocks = np.random.default_rng(seed).permuted(np.broadcast_to([0, 1, 2, -1], (s.B, s.T, s.K, 4)), axis=-1)
  inputs = choosing(inputs, blocks)._replace(arrays=dense.arrays, cotangents=dense.cotangents)
  assert_same(select(inputs), program("attention")(dense), rtol=1e-5, atol=1e-5)


@few(max_examples=4)
@given(seeds, st.sampled_from([1e2, 1e4]))
def test_huge_logits(seed, size):
  # Small integers times a scale: scores are exact in float32, so the oracle's softmax is comparable.
  s = cases.shape(T=24)
  inputs = draw(s, "from_the_start", seed, whole=True)
  got = program("selected_attention", block_size=BLOCK, scale=size)(inputs)
  assert all(np.isfinite(x).all() for x in (got[0], *got[2:]))
  sets = oracle.selected_sets(np.asarray(inputs.rest["block_indices"]), BLOCK, s.T)
  o, lse = oracle.attend(*inputs.arrays, sets, size)
  np.testing.assert_allclose(got[0], o, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[1], lse, rtol=1e-6)


# --- across operations --------------------------------------------------------

OPTIONS = dict(block_len=8, block_stride=4)


def compress(k):
  C = (k.shape[1] - 8) // 4 + 1
  return jnp.stack([k[:, c * 4:c * 4 + 8].mean(1) for c in range(C)], axis=1)


def layer(q, k, v, q_idx, k_idx, k_cmp, v_cmp, **where):
  """Every operation once; outputs have the query on axis 1."""
  o_cmp, lse_cmp = pk.compressed_attention(q, k_cmp, v_cmp, **OPTIONS, **where)
  by_cmp = pk.compressed_top_k(q, k_cmp, lse_cmp, block_size=BLOCK, num_blocks=4, **OPTIONS, **where)
  by_idx = pk.index_top_k(q_idx, k_idx, block_size=BLOCK, num_blocks=3, num_initial=1, **where)
  o_sel, lse_sel = pk.selected_attention(q, k, v, by_cmp, block_size=BLOCK, **where)
  o_idx, lse_idx = pk.selected_attention(q, k, v, by_idx, block_size=BLOCK, **where)
  o_win, lse_win = pk.attention(q, k, v, window=6, **where)
  loss = pk.index_kl(q, k, lse_idx, q_idx, k_idx, by_idx, block_size=BLOCK, **where)
  return dict(o_cmp=o_cmp, lse_cmp=lse_cmp, by_cmp=jnp.sort(by_cmp), by_idx=jnp.sort(by_idx), o_sel=o_sel,
              lse_sel=lse_sel, o_idx=o_idx, lse_idx=lse_idx, o_win=o_win, lse_win=lse_win, loss=loss)


def layer_inputs(seed, T, B=2, N=4, K=2):
  rng = np.random.default_rng(seed)
  new = lambda *shape: rng.normal(size=shape).astype(np.float32)
  k, v = new(B, T, K, H), new(B, T, K, H)
  return dict(q=new(B, T, N, H), k=k, v=v, q_idx=new(B, T, K, HI), k_idx=new(B, T, HI))


def with_compressed(x):
  return dict(x, k_cmp=compress(x["k"]), v_cmp=compress(x["v"]))


def assert_close(got, want, **slices):
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_nothing_leaks_from_the_future():
  T = 272  # enough for several parts
  f = jax.jit(lambda x: layer(**with_compressed(x)))
  x = layer_inputs(0, T)
  plain = f(x)
  changed = {n: np.array(a) for n, a in x.items()}
  for t in (271, 200, 137, 130, 7):
    for name in changed:
      shape = changed[name][:, t].shape
      changed[name][:, t] = 100.0 * (1 + np.arange(np.prod(shape)).reshape(shape) % 3)
    got = f(changed)
    for name in plain:
      np.testing.assert_array_equal(got[name][:, :t], plain[name][:, :t], err_msg=f"{name} before token {t}")
    if t < 269:
      assert all(np.any(got[n][:, t:] != plain[n][:, t:]) for n in ("o_cmp", "o_sel", "o_win", "o_idx"))


def test_decoding_equals_the_parallel_pass():
  """One query at a time over a preallocated cache, at another position in each sequence."""
  T, S = 27, 40
  x = layer_inputs(1, T)
  want = jax.jit(lambda x: layer(**with_compressed(x)))(x)
  cache = {n: np.pad(a, [(0, 0), (0, S - T)] + [(0, 0)] * (a.ndim - 2), constant_values=7.0)
           for n, a in with_compressed(x).items() if not n.startswith("q")}
  step = jax.jit(lambda queries, offset: layer(**queries, **cache, query_offset=offset))
  for positions in ([0, 26], [8, 7], [15, 16], [23, 11]):
    at = lambda a: np.stack([a[b, p:p + 1] for b, p in enumerate(positions)])
    got = step({n: at(x[n]) for n in ("q", "q_idx")}, np.int32(positions))
    assert_close(got, {n: at(np.asarray(a)) for n, a in want.items()})
  # A static offset and several queries: prefill in chunks.
  chunk = jax.jit(lambda queries: layer(**queries, **cache, query_offset=9))
  assert_close(chunk({n: x[n][:, 9:20] for n in ("q", "q_idx")}), {n: a[:, 9:20] for n, a in want.items()})


def test_packed_equals_separate():
  lengths = (16, 16, 13)  # all but the last are whole blocks
  separate = jax.jit(lambda x: layer(**with_compressed(x)))
  docs = [layer_inputs(10 + i, T, B=1) for i, T in enumerate(lengths)]
  packed = {n: np.concatenate([d[n] for d in docs], axis=1) for n in docs[0]}
  segment_ids = np.repeat(np.int32([3, 1, 2]), lengths)[None]
  got = jax.jit(lambda x: layer(**with_compressed(x), segment_ids=segment_ids))(packed)
  begin = 0
  for doc, T in zip(docs, lengths):
    want = dict(separate(doc))
    for name in ("by_cmp", "by_idx"):
      want[name] = np.where(want[name] < 0, -1, want[name] + begin // BLOCK)
    assert_close({n: a[:, begin:begin + T] for n, a in got.items()}, want)
    begin += T


def test_heads_do_not_mix():
  x = with_compressed(layer_inputs(2, 24))
  f = jax.jit(lambda x: layer(**x))
  want = f(x)
  for r in range(2):  # the shard of one KV head
    of_group, of_head = (lambda a: a[:, :, 2 * r:2 * r + 2]), (lambda a: a[:, :, r:r + 1])
    shard = {n: a if n == "k_idx" else of_group(a) if n == "q" else of_head(a) for n, a in x.items()}
    per_kv_head = ("by_cmp", "by_idx", "loss")
    assert_close(f(shard), {n: of_head(a) if n in per_kv_head else of_group(a) for n, a in want.items()})


@few(max_examples=5)
@given(seeds)
def test_an_index_that_equals_the_attention_has_no_loss(seed):
  """Two heads with one query are their own index; its opposite is none."""
  inputs = draw(cases.shape(T=24, N=2, K=1), "from_the_start", seed)
  (q, k, v), blocks = inputs.arrays, inputs.rest["block_indices"]
  q = q[:, :, :1].repeat(2, axis=2)
  loss, grads, other = kl_and_grads(q, k, v, blocks)
  np.testing.assert_allclose(loss, 0, atol=2e-6)
  for grad in grads:
    np.testing.assert_allclose(grad, 0, atol=5e-6)
  assert np.min(other) > -2e-6 and np.max(other) > 0.1


@jax.jit
def kl_and_grads(q, k, v, blocks):
  """Loss and gradients of an index that is the single-headed attention, and the loss of its opposite."""
  _, lse = pk.selected_attention(q, k, v, blocks, block_size=BLOCK)
  f = lambda q_idx, k_idx: pk.index_kl(q, k, lse, q_idx, k_idx, blocks, block_size=BLOCK)
  loss, vjp = jax.vjp(f, q[:, :, :1], k[:, :, 0])
  return loss, vjp(jnp.ones_like(loss)), f(-q[:, :, :1], k[:, :, 0])


# --- integers that no array has -----------------------------------------------


def ones(*shape):
  return np.ones(shape, np.float32)


def tiny(operation):
  """Arrays of the operation: 3 queries, 6 keys or 3 blocks of 2, by the shapes in its annotations."""
  axes = dict(B=1, T=3, S=6, N=2, K=1, H=8, C=3, J=2, R=1, HI=2, Hi=4, dI=4, blocks=3, words=1, pages=3, page_size=2,
              table=3)
  out = {}
  for name, parameter in inspect.signature(getattr(pk, operation)).parameters.items():
    kind, _, names = parameter.annotation.split(" | ")[0].rstrip(")]\"'").partition("[Array, ")
    if names and name not in ("query_offset", "segment_ids", "token_sets"):
      shape = [axes[axis] for axis in names.strip("'\"").split()]
      out[name] = ones(*shape) if kind == "Float" else jnp.zeros(shape, jnp.int32)
  return out


OPTIONAL = dict(block_size=2, num_blocks=2, num_initial=0, num_local=1, num_tokens=2, block_len=2, block_stride=2)
INTEGERS = {operation: [name for name, p in inspect.signature(getattr(pk, operation)).parameters.items()
                        if p.annotation in ("int", "int | None", "Offset")] for operation in backends.OPERATIONS}


def call(operation, **integers):
  """The operation of its tiny arrays, with these integers."""
  arrays = tiny(operation)
  if "window" in integers:
    arrays.pop("block_indices", None)
  given = {name: OPTIONAL[name] for name in INTEGERS[operation] if name in OPTIONAL}
  return getattr(pk, operation)(**arrays, **{**given, **integers})


@pytest.mark.parametrize("operation, name", [(operation, name) for operation, names in INTEGERS.items()
                                             for name in names])
def test_integers_beyond_every_array_are_named(operation, name):
  @few(max_examples=20)
  @given(st.one_of(st.integers(spans.FAR + 1, 2 ** 70), st.integers(-2 ** 70, -1), st.sampled_from([1.0, True]),
                   st.integers(spans.FAR + 1, 2 ** 63 - 1).map(np.int64)))
  def refused(value):
    with pytest.raises(ValueError, match=f"^{operation}: .*{name}"):
      call(operation, **{name: value})

  refused()


@pytest.mark.parametrize("operation, name", [
    (operation, name) for operation, names in INTEGERS.items() for name in names
    if name in ("window", "block_len", "block_stride", "block_size", "num_tokens") and operation != "block_top_k"])
def test_integers_past_the_arrays_are_all_one(operation, name):
  """As many tokens as an int32 allows, and no memory for them; in NumPy's integers too."""
  most = spans.FAR // 4  # there are C compressed blocks
  want = call(operation, **{name: 64})
  assert_same(call(operation, **{name: most}), want)
  assert_same(call(operation, **{name: np.int8(64)}), want)
