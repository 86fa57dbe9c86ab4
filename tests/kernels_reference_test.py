"""The reference against float64 oracles, under jax's transformations, and the dispatch around it."""
import functools
import logging
import sys
import types

import jax
import jax.numpy as jnp
import kernels_cases as cases
import kernels_oracle as oracle
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import api, backends, masked, reference

B, K, H, HI = 2, 2, 8, 4
CLOSE = dict(rtol=1e-5, atol=2e-5)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(T, S, N=4, seed=0):
  return normal(seed, B, T, N, H), normal(seed + 1, B, S, K, H), normal(seed + 2, B, S, K, H)


def value_and_vjp(f, args, cotangents):
  def run(args, cotangents):
    out, vjp = jax.vjp(f, *args)
    return out, vjp(cotangents)

  return jax.jit(run)(args, cotangents)


def random_indices(seed, T, blocks, J):
  """Anything the contract allows: future blocks, duplicates, -1 in any place, empty rows."""
  rng = np.random.default_rng(seed)
  indices = rng.integers(-1, blocks, (B, T, K, J), dtype=np.int32)
  indices[:, ::5, :, 1:] = -1
  indices[0, 3] = -1
  return indices


# --- against the oracles ------------------------------------------------------


ONE = cases.Situation(offset=(0.5,))  # an offset that all have
CASES = [  # operation, shape, situation, options
    # What all implementations inherit, whose truth elsewhere is the reference.
    *((operation, dict(T=13, S=29), situation, {}) for operation in cases.DIFFERENTIABLE
      for situation in cases.situations(operation)),
    *(("attention", dict(T=28), "from_the_start", options) for options in (
        dict(causal=False), dict(window=5), dict(window=1), dict(scale=0.3))),
    *(("attention", dict(T=28), "segments", options) for options in (dict(window=6), dict(causal=False))),
    *(("attention", dict(T=30, S=12), "from_the_start", options) for options in ({}, dict(window=4))),
    *((operation, dict(T=7, S=29), ONE, {}) for operation in cases.DIFFERENTIABLE),
    *(("selected_attention", shape, "from_the_start", {}) for shape in (
        dict(N=2), dict(T=40, S=12), dict(block_size=64))),
    ("selected_attention", {}, "segments", dict(scale=0.3)),
    ("token_attention", dict(sets=1, J=9, S=70), "segments", dict(scale=0.3)),
    ("compressed_attention", dict(T=38, block_len=6, block_stride=6), "from_the_start", {}),
    ("compressed_attention", dict(T=5), "from_the_start", {}),  # no block is complete
]


def named(case):
  operation, shape, situation, options = case
  return f"{operation}, {situation if isinstance(situation, str) else 'one offset'}, {shape}, {options}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_results_and_gradients_match_the_oracle(case):
  operation, shape, situation, options = case
  s = cases.shape(**shape)
  inputs = cases.draw(operation, s, situation, always=isinstance(situation, str))
  if "query_offset" in inputs.rest:
    past = np.reshape(inputs.rest["query_offset"], (-1, 1)) + np.arange(s.T) >= s.keys
    assert past.any() == (situation == "past_the_keys" or s.T > s.keys)
  options = {**cases.options_of(operation, s), **options}
  cases.check_by_oracle(operation, cases.truth(operation, **options)(inputs), s, inputs, options,
                        exact=2.0 ** -16 if situation == "huge_logits" else 2e-6)


CHOICES = [(operation, shape) for operation in cases.SELECTIONS for shape in (
    dict(), dict(num_initial=0, num_local=1), dict(num_initial=0, num_local=0), dict(J=9), dict(J=3, num_local=1))]
CHOICES += [(operation, dict(T=40, S=12, J=3)) for operation in ("index_top_k", "block_top_k")]  # they know the keys


@pytest.mark.parametrize("operation, shape", CHOICES, ids=str)
def test_choices_match_the_oracle(operation, shape):
  s = cases.shape(**{**dict(T=13, S=38), **shape})
  f = functools.partial(getattr(pk, operation), **cases.options_of(operation, s))
  choose = jax.jit(f)
  for situation in cases.situations(operation):
    for whole in (False, True):
      cases.check_selection(operation, choose, s, cases.draw(operation, s, situation, whole=whole), whole=whole)
  known = lambda *arrays, query_offset, segment_ids, **rest: jax.jit(  # the offset an int, and no ids
      functools.partial(f, query_offset=query_offset))(*arrays, **rest)
  cases.check_selection(operation, known, s, cases.draw(operation, s, ONE, always=False))


def test_overlap_weights_are_those_of_the_paper():
  weights = reference.overlap_weights(20, 5, 32, 16, 64)
  for j in range(1, 4):
    column = np.zeros(20)
    column[4 * j - 1:4 * j + 4] = 1, 2, 2, 2, 1
    np.testing.assert_array_equal(weights[:, j], column)
  np.testing.assert_array_equal(weights[:4, 0], [2, 2, 2, 1])  # no compressed block lies before the first
  # With blocks of one size there is nothing to share: the identity.
  np.testing.assert_array_equal(reference.overlap_weights(4, 4, 16, 16, 16), np.eye(4))


def test_a_query_before_the_first_compressed_block_sees_its_own_block_wherever_its_offset_is_known():
  """No compressed key, position 17: blocks 0, 1 and 2 of 8 tokens are all there is, traced or not."""
  q, k_cmp, _ = make(1, 0)
  lse = jnp.full(q.shape[:3], -jnp.inf)
  select = lambda offset: pk.compressed_top_k(q, k_cmp, lse, block_len=32, block_stride=16, block_size=8, num_blocks=3,
                                              query_offset=offset)
  for indices in (select(17), jax.jit(select)(17)):
    np.testing.assert_array_equal(np.sort(indices, -1), np.broadcast_to([0, 1, 2], (B, 1, K, 3)))


def test_block_mass_matches_the_softmax():
  S = 29
  q, k, v = make(S, S)
  mass, entropy = jax.jit(lambda q, k, v: pk.block_mass(q, k, pk.attention(q, k, v)[1], block_size=8))(q, k, v)
  assert mass.shape == (B, S, K, 4)
  for t in (0, 8, 28):
    for n in (0, 2):  # KV head n // 2 has the heads n and n + 1
      ps = [oracle.softmax(H ** -0.5 * np.float64(k[1, :t + 1, n // 2]) @ q[1, t, h]) for h in (n, n + 1)]
      want = [np.mean([p[8 * j:8 * j + 8].sum() for p in ps]) for j in range(4)]
      np.testing.assert_allclose(mass[1, t, n // 2], want, **CLOSE)
      want = np.mean([-(p * np.log(p)).sum() for p in ps])
      np.testing.assert_allclose(entropy[1, t, n // 2], want, **CLOSE)


@pytest.mark.parametrize("packed, selected", [(False, False), (True, False), (True, True)])
def test_block_peak_is_the_largest_probability_of_the_group(packed, selected):
  S, offset = 29, 7
  q, k, _ = make(S - offset, S)
  N = q.shape[2]
  lse = normal(5, B, S - offset, N)  # of any attention, not of this one
  ids = np.searchsorted((11, 29), np.arange(S), side="right") * np.ones((B, 1), np.int32) if packed else None
  ids = None if ids is None else jnp.asarray(ids, jnp.int32)
  blocks = random_indices(3, S - offset, 4, 2) if selected else None
  got = jax.jit(lambda *a: pk.block_peak(*a, blocks, block_size=8, segment_ids=ids, query_offset=offset))(q, k, lse)
  assert got.shape == (B, S - offset, K, 4) and got.dtype == jnp.float32
  for b, t, r in np.ndindex(B, S - offset, K):
    heads = slice(r * N // K, (r + 1) * N // K)
    s = H ** -0.5 * np.float64(k[b, :, r]) @ np.float64(q[b, t, heads]).T  # [S, G]
    p = np.exp(s - np.float64(lse[b, t, heads]))
    seen = (np.arange(S) <= t + offset) & (not packed or ids[b] == ids[b, t + offset])
    seen &= not selected or np.isin(np.arange(S) // 8, blocks[b, t, r])
    want = [np.max(np.where(seen[:, None], p, 0)[8 * j:8 * j + 8]) for j in range(4)]
    np.testing.assert_allclose(got[b, t, r], want, **CLOSE)


@pytest.mark.parametrize("lists", ["of the set", "of each KV head", "none"])
def test_lightning_kl_is_the_formula(lists):
  """Index heads of one set, against all heads of attention, in float64; and the block's best score."""
  T, heads, size, offset = 11, 3, 8, 13
  S = T + offset
  q, k, v = make(T, S)
  q_idx, w, k_idx = normal(5, B, T, 1, heads, HI), normal(6, B, T, 1, heads), normal(7, B, S, HI)
  blocks = {"of the set": random_indices(3, T, 3, 2)[:, :, :1], "of each KV head": random_indices(4, T, 3, 2),
            "none": None}[lists]
  each = None if blocks is None else np.broadcast_to(blocks, (B, T, K, 2))
  dloss, where = normal(8, B, T, 1), dict(block_size=size, query_offset=offset)

  @jax.jit
  def run(q, k, v, *index):
    _, lse = (pk.attention(q, k, v, query_offset=offset) if blocks is None else
              pk.selected_attention(q, k, v, each, **where))
    loss, pull = jax.vjp(lambda *index: pk.lightning_kl(q, k, lse, *index, blocks, **where), *index)
    return loss, pull(dloss), pk.lightning_scores(*index, **where)

  loss, got, best = jax.device_get(run(q, k, v, q_idx, w, k_idx))
  want = [np.zeros(x.shape) for x in (q_idx, w, k_idx)]
  for b, t in np.ndindex(B, T):
    seen = np.arange(S) <= t + offset
    mine = [seen if each is None else seen & np.isin(np.arange(S) // size, each[b, t, r]) for r in range(K)]
    p, some = np.zeros(S), np.any(mine, axis=0)
    dots = np.float64(k_idx[b]) @ np.float64(q_idx[b, t, 0]).T  # [S, heads]
    s = np.maximum(dots, 0) @ np.float64(w[b, t, 0])
    assert best.shape == (B, T, 1, 3)
    np.testing.assert_allclose(best[b, t, 0], [np.where(seen, s, -np.inf)[8 * j:8 * j + 8].max() for j in range(3)],
                               **CLOSE)
    if not some.any():
      assert loss[b, t, 0] == 0
      continue
    for n in range(q.shape[2]):
      tokens = mine[n // 2]
      p[tokens] += oracle.softmax(H ** -0.5 * np.float64(k[b, tokens, n // 2]) @ q[b, t, n]) if tokens.any() else 0
    p, student = p[some] / p.sum(), oracle.softmax(s[some])
    nats = np.sum(p * (np.log(p, where=p > 0, out=0 * p) - np.log(student)))
    np.testing.assert_allclose(loss[b, t, 0], nats, **CLOSE)
    ds, fires = (student - p) * dloss[b, t, 0], dots[some] > 0
    want[0][b, t, 0] = (ds[:, None] * fires * w[b, t, 0]).T @ np.float64(k_idx[b, some])
    want[1][b, t, 0] = ds @ np.maximum(dots[some], 0)
    want[2][b, some] += (ds[:, None] * fires * w[b, t, 0]) @ np.float64(q_idx[b, t, 0])
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, **CLOSE)
    assert np.abs(y).max() > 0.01


def test_a_score_that_is_no_number():
  cases.check_nan_scores(reference.block_top_k, reference.index_top_k)


def test_ties_go_to_the_lower_block_and_masking_precedes_pooling():
  q_idx = np.ones((1, 32, 1, 1), np.float32)
  k_idx = np.zeros((1, 32, 1), np.float32)
  k_idx[0, :8] = -0.0  # minus zero ties with zero
  choose = jax.jit(functools.partial(pk.index_top_k, block_size=8, num_blocks=2, num_local=0))
  assert set(np.asarray(choose(q_idx, k_idx))[0, 31, 0]) == {0, 1}
  k_idx[0, 30] = 5.0  # query 29 does not see it: its block must not win by it
  indices = np.asarray(choose(q_idx, k_idx))[0, :, 0]
  assert set(indices[29]) == {0, 1} and 3 in indices[30]


@pytest.mark.parametrize("T, case", [(29, {}), (7, dict(query_offset=11, index_scale=0.7, scale=0.2))],
                         ids=["warm-up", "scales"])
def test_index_kl_trains_the_index_alone(T, case):
  S, where = 29, {n: case[n] for n in ("query_offset",) if n in case}
  q, k, v = make(T, S)
  q_idx, k_idx = normal(4, B, T, K, HI), normal(5, B, S, HI)
  if case:
    indices = random_indices(3, T, 4, 4)
    sets = oracle.selected_sets(indices, 8, S, **where)
    main = functools.partial(pk.selected_attention, block_indices=indices, block_size=8, scale=case["scale"], **where)
  else:
    indices, sets = None, oracle.dense_sets(B, T, K, S)
    main = pk.attention
  _, lse = jax.jit(main)(q, k, v)
  dloss = normal(6, B, T, K)
  want, want_dq, want_dk = oracle.index_kl(q, k, q_idx, k_idx, sets, case.get("scale", H ** -0.5),
                                           case.get("index_scale", HI ** -0.5), dloss)
  f = lambda q, k, lse, q_idx, k_idx: pk.index_kl(q, k, lse, q_idx, k_idx, indices, block_size=8, **case)
  loss, grads = value_and_vjp(f, (q, k, lse, q_idx, k_idx), dloss)
  assert loss.shape == (B, T, K) and loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, want, **CLOSE)
  for grad in grads[:3]:
    assert not np.any(grad), "the teacher must get no gradient"
  np.testing.assert_allclose(grads[3], want_dq, **CLOSE)
  np.testing.assert_allclose(grads[4], want_dk, **CLOSE)


# --- memory and transformations -----------------------------------------------


def everything(q, k, v, q_idx, k_idx):
  """All six operations in one function of floats, as a model would call them."""
  pool = lambda x: x[:, :x.shape[1] // 4 * 4].reshape(x.shape[0], -1, 4, *x.shape[2:]).mean(2)
  k_cmp, v_cmp = pool(k), pool(v)
  o_cmp, lse_cmp = pk.compressed_attention(q, k_cmp, v_cmp, block_len=4, block_stride=4)
  chosen = pk.compressed_top_k(q, k_cmp, lse_cmp, block_len=4, block_stride=4, block_size=8, num_blocks=4)
  o_sel, lse_sel = pk.selected_attention(q, k, v, chosen, block_size=8)
  o_win, _ = pk.attention(q, k, v, window=5)
  indexed = pk.index_top_k(q_idx, k_idx, block_size=8, num_blocks=3)
  o_idx, lse_idx = pk.selected_attention(q, k, v, indexed, block_size=8)
  loss = pk.index_kl(q, k, lse_idx, q_idx, k_idx, indexed, block_size=8)
  return o_cmp + o_sel + o_win + o_idx, jnp.concatenate([lse_sel, lse_idx, loss], axis=-1), chosen, indexed


def floats(seed=0, T=37):
  return (*make(T, T, seed=seed), normal(seed + 3, B, T, K, HI), normal(seed + 4, B, T, HI))


def scalar(*args, f=everything):
  y = f(*args)
  weights = jnp.cos(jnp.arange(y[0].size, dtype=y[0].dtype)).reshape(y[0].shape)
  return (y[0] * weights).sum() + y[1].sum(), y


def outputs_and_grads(f=everything):
  return jax.value_and_grad(functools.partial(scalar, f=f), argnums=(0, 1, 2, 3, 4), has_aux=True)


@pytest.fixture(scope="module")
def expected():
  args = floats()
  return args, jax.jit(outputs_and_grads())(*args)


def assert_close(got, want):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-5), got, want)


@pytest.mark.parametrize("max_scores, part_queries", [(2500, 10**6), (10**9, 18)], ids=["chunks", "parts"])
def test_chunks_and_parts_change_nothing(monkeypatch, expected, max_scores, part_queries):
  args, want = expected
  monkeypatch.setattr(masked, "MAX_SCORES", max_scores)
  monkeypatch.setattr(reference, "PART_QUERIES", part_queries)
  assert_close(jax.jit(outputs_and_grads())(*args), want)


def test_chunks_bound_memory():
  """Forward and backward at 8,192 tokens stay far below the 2 GiB that one array of all scores takes."""
  q, k, v = (jax.ShapeDtypeStruct((1, 8192, n, 8), jnp.float32) for n in (8, 2, 2))
  f = jax.grad(lambda q, k, v: pk.attention(q, k, v)[0].sum(), argnums=(0, 1, 2))
  assert jax.jit(f).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes < 2 ** 30


def test_vmap_over_seeds(expected):
  args, want = expected
  two = jax.tree.map(lambda x, y: np.stack([x, y]), floats(seed=50), args)
  assert_close(jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(outputs_and_grads()))(*two)), want)


@pytest.mark.parametrize("max_scores", [2**25, 2500], ids=["plain", "chunks"])
def test_shard_map_over_the_batch(monkeypatch, expected, max_scores):
  monkeypatch.setattr(masked, "MAX_SCORES", max_scores)
  args, want = expected
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
  spec = jax.sharding.PartitionSpec("data")
  sharded = jax.shard_map(lambda *a: everything(*a), mesh=mesh, in_specs=spec, out_specs=spec)
  assert_close(jax.jit(outputs_and_grads(sharded))(*args), want)


def test_top_k_passes_no_gradient():
  q_idx, k_idx = normal(0, B, 20, K, HI), normal(1, B, 20, HI)
  f = lambda q, k: pk.index_top_k(q * k.sum(), k, block_size=8, num_blocks=2).astype(jnp.float32).sum()
  assert not any(np.any(g) for g in jax.jit(jax.grad(f, argnums=(0, 1)))(q_idx, k_idx))


def test_bfloat16_inputs_are_accumulated_in_float32():
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in make(29, 29))
  indices = random_indices(3, 29, 4, 4)
  o, lse = jax.jit(functools.partial(pk.selected_attention, block_size=8))(q, k, v, indices)
  want_o, want_lse = oracle.attend(q, k, v, oracle.selected_sets(indices, 8, 29), H ** -0.5)
  assert o.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(o, np.float64), want_o, rtol=2 ** -8, atol=1e-5)  # one rounding
  np.testing.assert_allclose(lse, want_lse, **CLOSE)


# --- dispatch -----------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
  """A registry of its own for each test, with the reference alone: what a test registers, imports or logs is
  forgotten."""
  only = lambda found: {"reference": found["reference"]}
  monkeypatch.setattr(backends, "_registered", {op: only(found) for op, found in backends._registered.items()})
  monkeypatch.setattr(backends, "_import_errors", {})
  monkeypatch.setattr(backends, "_logged", set())
  monkeypatch.setattr(backends, "BACKENDS", {"cpu": [], "gpu": [("fast", "fast_backend")],
                                             "tpu": [("gone", "no_such")]})


def install_backend(monkeypatch, **register):
  def marked(**arguments):
    o, lse = reference.attention(**arguments)
    return o + 100, lse

  module = types.ModuleType("fast_backend")
  monkeypatch.setitem(sys.modules, "fast_backend", module)
  small = lambda *, q, **_: None if q.shape[-1] <= 8 else f"q has the head dim {q.shape[-1]}, at most 8 is built"
  api.register("attention", "fast", marked, **dict(dict(platforms=("gpu",), supports=small), **register))


def test_dispatch_takes_the_backend_of_the_platform(registry, monkeypatch, caplog):
  install_backend(monkeypatch)
  q, k, v = make(5, 5)
  plain = pk.attention(q, k, v)[0]
  with api.target_platform("cuda"), caplog.at_level(logging.INFO, "pallas_kernels"):
    np.testing.assert_allclose(pk.attention(q, k, v)[0], plain + 100, rtol=1e-6)
    np.testing.assert_allclose(pk.attention(q, k, v, implementation="reference")[0], plain)
    wide = [np.concatenate([x, x], axis=-1) for x in (q, k, v)]
    caplog.clear()
    for _ in range(3):
      assert np.abs(pk.attention(*wide)[0]).max() < 50
    assert [r.message for r in caplog.records] == [
        "attention: reference (gpu), because fast: q has the head dim 16, at most 8 is built"]
    with pytest.raises(NotImplementedError, match="head dim 16"):
      pk.attention(*wide, implementation="fast")
    pk.compressed_attention(q, k, v, block_len=2, block_stride=1)
    assert caplog.records[-1].message == "compressed_attention: reference (gpu), because fast: it has no " \
                                         "compressed_attention"
    with pytest.raises(NotImplementedError, match="has no index_kl"):
      pk.index_kl(q, k, q[..., 0], normal(0, B, 5, K, HI), normal(1, B, 5, HI), None, block_size=8,
                  implementation="fast")
  with pytest.raises(NotImplementedError, match="runs on gpu, not on cpu"), api.target_platform("cpu"):
    pk.attention(q, k, v, implementation="fast")
  assert pk.available("attention") == ("fast", "reference")


def test_a_missing_backend_costs_a_warning_only(registry, caplog):
  q, k, v = make(5, 5)
  with api.target_platform("tpu"), caplog.at_level(logging.INFO, "pallas_kernels"):
    pk.attention(q, k, v)
    pk.attention(q, k, v)
    with pytest.raises(NotImplementedError, match="no_such does not import"):
      pk.attention(q, k, v, implementation="gone")
  assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
  assert "attention: reference (tpu), because gone: no_such does not import" in caplog.records[0].message
  with pytest.raises(ValueError, match="'quickest'.*reference"):
    pk.attention(q, k, v, implementation="quickest")


BAD = {
    "N = 3 heads.*multiple of the K = 2": lambda q, k, v, i: pk.attention(q[:, :, :3], k, v),
    "B and H must be those of q": lambda q, k, v, i: pk.attention(q[:1], k, v),
    "v has the shape": lambda q, k, v, i: pk.attention(q, k, v[:, :-1]),
    "q has the shape.*B, T, N, H": lambda q, k, v, i: pk.attention(q[0], k, v),
    "v is a NoneType": lambda q, k, v, i: pk.selected_attention(q, k, None, i, block_size=4),
    "H must be at least 1": lambda q, k, v, i: pk.attention(q[..., :0], k[..., :0], v[..., :0]),
    "q has the dtype int32": lambda q, k, v, i: pk.attention(q.astype(np.int32), k, v),
    "window = 0": lambda q, k, v, i: pk.attention(q, k, v, window=0),
    "window = 3 needs causal": lambda q, k, v, i: pk.attention(q, k, v, window=3, causal=False),
    "query_offset = -1": lambda q, k, v, i: pk.attention(q, k, v, query_offset=-1),
    "query_offset is of shape": lambda q, k, v, i: pk.attention(q, k, v, query_offset=np.zeros(3, np.int32)),
    "past the 9 segment_ids": lambda q, k, v, i: pk.attention(
        q, k, v, query_offset=1, segment_ids=np.zeros((2, 9), int)),
    "segment_ids has the shape": lambda q, k, v, i: pk.attention(q, k, v, segment_ids=np.zeros((2, 8), int)),
    "block_size = 0": lambda q, k, v, i: pk.selected_attention(q, k, v, i, block_size=0),
    "J >= 1": lambda q, k, v, i: pk.selected_attention(q, k, v, i[..., :0], block_size=4),
    "block_indices has the dtype float": lambda q, k, v, i: pk.selected_attention(
        q, k, v, i * 1.0, block_size=4),
    "block_stride = 0": lambda q, k, v, i: pk.compressed_attention(q, k, v, block_len=4, block_stride=0),
    "num_blocks = 0": lambda q, k, v, i: pk.index_top_k(q, k[:, :, 0], block_size=4, num_blocks=0),
    r"num_initial \+ num_local = 1 \+ 2": lambda q, k, v, i: pk.compressed_top_k(
        q, k, q[..., 0], block_len=4, block_stride=4, block_size=4, num_blocks=2),
    "lse has the shape": lambda q, k, v, i: pk.index_kl(
        q, k, q[:, :1, :, 0], q[:, :, :2], k[:, :, 0], i, block_size=4),
    "q_idx.*must be": lambda q, k, v, i: pk.index_kl(
        q, k, q[..., 0], q[:, :, :1], k[:, :, 0], i, block_size=4),
    "index_weights has the shape": lambda q, k, v, i: pk.lightning_scores(
        q[:, :, None], q[:, :, :1, :3], k[:, :, 0], block_size=4),
    "with R = 1 or 2": lambda q, k, v, i: pk.lightning_kl(
        q, k, q[..., 0], q[:, :, :, None], q[..., :1], k[:, :, 0], i, block_size=4),  # R = 4
    "scores has 2 blocks; 24 keys": lambda q, k, v, i: pk.block_top_k(
        q[..., :2], block_size=8, num_blocks=2, keys=24),
    "block_size = -8": lambda q, k, v, i: pk.block_top_k(q, block_size=-8, num_blocks=2),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
  q, k, v = make(9, 9)
  with pytest.raises(ValueError, match=message):
    BAD[message](q, k, v, np.zeros((B, 9, K, 2), np.int32))
