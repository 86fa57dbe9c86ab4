"""Properties that every implementation of the operations must have, on inputs that hypothesis draws."""
import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np

import pallas_kernels as pk

H, HI, BLOCK = 8, 4, 8
few = functools.partial(settings, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)


@functools.partial(jax.jit, static_argnames=("op", "options"))
def run(args, rest, do, dlse, *, op="selected_attention", options=(("block_size", BLOCK),)):
  """o, lse, (dq, dk, dv) of an operation; `rest` are keyword arguments that may be traced."""
  f = lambda q, k, v: getattr(pk, op)(q, k, v, **rest, **dict(options))
  out, vjp = jax.vjp(f, *args)
  return *out, vjp((do, dlse))


@jax.jit
def kl_and_grads(q, k, v, indices):
  """Loss and gradients of an index that is the single-headed attention, and the loss of its opposite."""
  _, lse = pk.selected_attention(q, k, v, indices, block_size=BLOCK)
  f = lambda q_idx, k_idx: pk.index_kl(q, k, lse, q_idx, k_idx, indices, block_size=BLOCK)
  loss, vjp = jax.vjp(f, q[:, :, :1], k[:, :, 0])
  return loss, vjp(jnp.ones_like(loss)), f(-q[:, :, :1], k[:, :, 0])


def draw(seed, T=24, S=24, N=4, K=2, J=3, B=2, integers=False):
  """q, k, v, cotangents and block indices that break habits: future blocks, duplicates, pads anywhere."""
  rng = np.random.default_rng(seed)
  new = lambda *shape: (rng.integers(-2, 3, shape) if integers else rng.normal(size=shape)).astype(np.float32)
  qkv = new(B, T, N, H), new(B, S, K, H), new(B, S, K, H)
  return qkv, new(B, T, N, H), new(B, T, N), rng.integers(-1, -(-S // BLOCK), (B, T, K, J), dtype=np.int32)


def draw_segments(seed, S, B=2):
  rng = np.random.default_rng(seed)
  return np.cumsum(rng.random((B, S)) < 0.15, axis=1).astype(np.int32)


def check(qkv, do, dlse, sets, got, scale=H ** -0.5, **tolerance):
  tolerance = tolerance or dict(rtol=2e-5, atol=2e-5)
  want_o, want_lse, *want_grads = oracle.attend(*qkv, sets, scale, do, dlse)
  o, lse, grads = got
  np.testing.assert_allclose(o, want_o, **tolerance)
  np.testing.assert_allclose(lse, want_lse, **tolerance)  # compares -inf with -inf
  for name, grad, want in zip("qkv", grads, want_grads):
    np.testing.assert_allclose(grad, want, err_msg=f"d{name}", **tolerance)


# --- selected attention -------------------------------------------------------


@few(max_examples=10)
@given(seeds, st.sampled_from([(1, 2), (2, 2), (4, 1), (8, 1), (16, 1), (3, 2)]),
       st.sampled_from([(24, 1), (21, 3), (13, 7)]), st.booleans())
def test_any_group_any_length_any_row(seed, heads, lengths, packed):
  (G, K), (S, J) = heads, lengths
  qkv, do, dlse, indices = draw(seed, T=S, S=S, N=G * K, K=K, J=J)
  rest = dict(block_indices=indices)
  if packed:
    rest["segment_ids"] = draw_segments(seed, S)
  got = run(qkv, rest, do, dlse)
  check(qkv, do, dlse, oracle.selected_sets(indices, BLOCK, S, rest.get("segment_ids")), got)


@few(max_examples=5)
@given(seeds)
def test_order_and_duplicates_do_not_matter(seed):
  qkv, do, dlse, indices = draw(seed)
  rng = np.random.default_rng(seed)
  shuffled = rng.permuted(indices, axis=-1)
  doubled = np.concatenate([indices, shuffled], axis=-1)
  plain = run(qkv, dict(block_indices=indices), do, dlse)
  for other in (shuffled, doubled):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), plain,
                 run(qkv, dict(block_indices=other), do, dlse))


@few(max_examples=5)
@given(seeds, st.booleans())
def test_all_blocks_are_dense_attention(seed, packed):
  qkv, do, dlse, _ = draw(seed, T=21, S=21)
  rng = np.random.default_rng(seed)
  indices = rng.permuted(np.broadcast_to(np.int32([0, 1, 2, -1]), (2, 21, 2, 4)), axis=-1)
  rest = dict(segment_ids=draw_segments(seed, 21)) if packed else {}
  dense = run(qkv, rest, do, dlse, op="attention", options=())
  sparse = run(qkv, dict(rest, block_indices=indices), do, dlse)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), sparse, dense)


def test_all_queries_select_one_block_and_nobody_the_others():
  qkv, do, dlse, indices = draw(0)
  indices = np.full_like(indices, 1)
  got = run(qkv, dict(block_indices=indices), do, dlse)
  check(qkv, do, dlse, oracle.selected_sets(indices, BLOCK, 24), got)
  for grad in got[2][1:]:
    assert np.any(grad[:, 8:16]) and not np.any(grad[:, :8]) and not np.any(grad[:, 16:])
  o, lse, (dq, _, _) = got
  assert not np.any(o[:, :8]) and np.isneginf(lse[:, :8]).all() and not np.any(dq[:, :8])  # before the block


def test_nothing_selected_anywhere():
  (q, k, v), do, dlse, indices = draw(0)
  indices = np.full_like(indices, -1)
  o, lse, grads = run((q, k, v), dict(block_indices=indices), do, dlse)
  assert not np.any(o) and np.isneginf(lse).all()
  assert all(not np.any(g) for g in grads), "NaN counts as any, too"
  losses = kl_and_grads(q[:, :, :2], k[:, :, :1], v[:, :, :1], indices[:, :, :1])
  assert not any(np.any(x) for x in jax.tree.leaves(losses))


@few(max_examples=4)
@given(seeds, st.sampled_from([1e2, 1e4]))
def test_huge_logits(seed, size):
  # Small integers times a scale: scores are exact in float32, so the oracle's softmax is comparable.
  qkv, do, dlse, indices = draw(seed, integers=True)
  got = run(qkv, dict(block_indices=indices, scale=size), do, dlse)
  assert all(np.isfinite(x).all() for x in (got[0], *got[2]))
  o, lse = oracle.attend(*qkv, oracle.selected_sets(indices, BLOCK, 24), size)
  np.testing.assert_allclose(got[0], o, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[1], lse, rtol=1e-6)


# --- selections ---------------------------------------------------------------


@few(max_examples=12)
@given(seeds, st.sampled_from([(1, 0, 1), (3, 1, 1), (3, 0, 0), (4, 1, 2), (9, 2, 2)]), st.booleans(),
       st.booleans())
def test_index_top_k_of_any_packing(seed, sizes, packed, coarse):
  num_blocks, num_initial, num_local = sizes
  rng = np.random.default_rng(seed)
  sample = (lambda shape: rng.integers(-1, 2, shape)) if coarse else rng.standard_normal  # coarse scores tie
  new = lambda *shape: sample(shape).astype(np.float32)
  q_idx, k_idx = new(2, 29, 2, HI), new(2, 29, HI)
  segment_ids = draw_segments(seed, 29) if packed else None
  f = functools.partial(pk.index_top_k, block_size=BLOCK, num_blocks=num_blocks, num_initial=num_initial,
                        num_local=num_local)
  indices = np.asarray(jax.jit(f)(q_idx, k_idx, segment_ids=segment_ids))
  scores = oracle.index_block_scores(q_idx, k_idx, BLOCK, segment_ids)
  oracle.check_selection(indices, scores, num_blocks, num_initial, num_local, BLOCK)
  if coarse and num_initial == num_local == 0:  # exact scores: the lowest index wins every tie
    for row, chosen in zip(scores.reshape(-1, 4), indices.reshape(-1, num_blocks)):
      best = [j for j in np.argsort(-row, kind="stable")[:num_blocks] if row[j] > -np.inf]
      assert set(chosen) - {-1} == set(best)


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
  (q, k, v), _, _, indices = draw(seed, N=2, K=1)
  loss, grads, other = kl_and_grads(np.repeat(q[:, :, :1], 2, axis=2), k, v, indices)
  np.testing.assert_allclose(loss, 0, atol=2e-6)
  for grad in grads:
    np.testing.assert_allclose(grad, 0, atol=5e-6)
  assert np.min(other) > -2e-6 and np.max(other) > 0.1
