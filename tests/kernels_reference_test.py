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
from pallas_kernels import api, arg_specs, backends, masked, reference

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


def segments(S):
  """Two rows of packed documents: one begins inside blocks, one has an id that comes again."""
  rows = (np.repeat([0, 1, 2], [S // 4, S // 3, S - S // 4 - S // 3]), np.repeat([5, 9, 5], [10, 3, S - 13]))
  return np.stack(rows).astype(np.int32)


def random_indices(seed, T, blocks, J):
  """Anything the contract allows: future blocks, duplicates, -1 in any place, empty rows."""
  rng = np.random.default_rng(seed)
  indices = rng.integers(-1, blocks, (B, T, K, J), dtype=np.int32)
  indices[:, ::5, :, 1:] = -1
  indices[0, 3] = -1
  return indices


def check_attention(f, args, sets, scale=H ** -0.5, **tolerance):
  tolerance = tolerance or CLOSE
  do, dlse = normal(7, *args[0].shape), normal(8, *args[0].shape[:3])
  want_o, want_lse, *want_grads = oracle.attend(*args, sets, scale, do, dlse)
  seen = np.isfinite(want_lse)
  (o, lse), grads = value_and_vjp(f, args, (do, dlse))
  assert o.dtype == args[0].dtype and lse.dtype == jnp.float32
  np.testing.assert_allclose(o, want_o, **tolerance)
  np.testing.assert_array_equal(np.isneginf(lse), ~seen)
  np.testing.assert_allclose(np.where(seen, lse, 0), np.where(seen, want_lse, 0), **tolerance)
  for name, grad, want in zip("qkv", grads, want_grads):
    np.testing.assert_allclose(grad, want, err_msg=f"d{name}", **tolerance)


# --- against the oracles ------------------------------------------------------


INHERITED = [(operation, situation) for operation in cases.RESULTS
             if operation != "paged_attention"  # has cases of its own
             for situation in cases.situations(operation)]


@pytest.mark.parametrize("operation, situation", INHERITED)
def test_inherited_cases_match_the_oracle(operation, situation):
  """The cases that all implementations inherit, whose truth elsewhere is the reference."""
  s = cases.shape(T=13, S=29)
  inputs, options = cases.draw(operation, s, situation), cases.options_of(operation, s)
  where = {name: np.asarray(inputs.rest[name]) for name in ("segment_ids", "query_offset")}
  past = where["query_offset"][:, None] + np.arange(s.T) >= s.keys  # such queries are of the last key's segment
  where["segment_ids"] = np.pad(where["segment_ids"], ((0, 0), (0, 2 * s.T)), mode="edge")
  assert past.any() == (situation == "past_the_keys")
  sets = {"attention": lambda: oracle.dense_sets(s.B, s.T, s.K, s.keys, **where),
          "compressed_attention": lambda: oracle.compressed_sets(
              s.B, s.T, s.K, inputs.arrays[1].shape[1], **options, **where)}.get(
      operation, lambda: oracle.selected_sets(np.asarray(inputs.rest["block_indices"]), s.block_size, s.keys,
                                              **where))()
  if operation == "index_kl":
    want = oracle.index_kl(inputs.rest["q"], inputs.rest["k"], *inputs.arrays, sets, s.H ** -0.5, s.index_dim ** -0.5,
                           np.asarray(inputs.cotangents))
  else:
    want = oracle.attend(*inputs.arrays, sets, s.H ** -0.5, *map(np.asarray, inputs.cotangents))
  cases.compare(operation, cases.truth(operation, **options)(inputs), want, jnp.float32,
                exact=2.0 ** -16 if situation == "huge_logits" else 2e-6)


@pytest.mark.parametrize("case", [
    dict(causal=False), dict(window=5), dict(window=1), dict(scale=0.3), dict(segments=True, window=6),
    dict(segments=True, causal=False), dict(T=7, query_offset=11), dict(T=30, S=12), dict(T=30, S=12, window=4),
], ids=str)
def test_attention_matches_the_oracle(case):
  case = dict(case)
  T, S = case.pop("T", 28), case.pop("S", 28)
  if case.pop("segments", False):
    case["segment_ids"] = segments(S)
  sets = oracle.dense_sets(B, T, K, S, **{k: v for k, v in case.items() if k != "scale"})
  check_attention(functools.partial(pk.attention, **case), make(T, S), sets, case.get("scale", H ** -0.5))


@pytest.mark.parametrize("case", [
    dict(N=2), dict(scale=0.3), dict(segments=True), dict(T=7, query_offset=11), dict(T=40, S=12), dict(block_size=64),
], ids=str)
def test_selected_attention_matches_the_oracle(case):
  case = dict(case)
  T, S, N, block_size = (case.pop(n, d) for n, d in (("T", 29), ("S", 29), ("N", 4), ("block_size", 8)))
  if case.pop("segments", False):
    case["segment_ids"] = segments(S)
  indices = random_indices(3, T, 5, 4)
  sets = oracle.selected_sets(indices, block_size, S, **{k: v for k, v in case.items() if k != "scale"})
  f = lambda q, k, v: pk.selected_attention(q, k, v, indices, block_size=block_size, **case)
  check_attention(f, make(T, S, N), sets, case.get("scale", H ** -0.5))


@pytest.mark.parametrize("case", [
    dict(), dict(block_len=6, block_stride=6), dict(segments=True), dict(T=9, query_offset=17), dict(C=0),
    dict(C=12),
], ids=str)
def test_compressed_attention_matches_the_oracle(case):
  case = dict(dict(block_len=8, block_stride=4), **case)
  T, S = case.pop("T", 38), 38
  C = case.pop("C", (S - case["block_len"]) // case["block_stride"] + 1)
  if case.pop("segments", False):
    case["segment_ids"] = segments(S)
  sets = oracle.compressed_sets(B, T, K, C, **case)
  check_attention(functools.partial(pk.compressed_attention, **case), make(T, C), sets)


def test_overlap_weights_are_those_of_the_paper():
  weights = reference.overlap_weights(20, 5, 32, 16, 64)
  for j in range(1, 4):
    column = np.zeros(20)
    column[4 * j - 1:4 * j + 4] = 1, 2, 2, 2, 1
    np.testing.assert_array_equal(weights[:, j], column)
  np.testing.assert_array_equal(weights[:4, 0], [2, 2, 2, 1])  # no compressed block lies before the first
  # With blocks of one size there is nothing to share: the identity.
  np.testing.assert_array_equal(reference.overlap_weights(4, 4, 16, 16, 16), np.eye(4))


@pytest.mark.parametrize("case", [
    dict(), dict(num_initial=0, num_local=1), dict(num_initial=0, num_local=0), dict(num_blocks=9),
    dict(segments=True), dict(segments=True, num_blocks=2, num_local=1), dict(T=6, query_offset=23),
    dict(block_len=8, block_stride=8),
    dict(T=6, query_offset=np.array([4, 30], np.int32)),
], ids=str)
def test_compressed_top_k_matches_the_oracle(case):
  defaults = dict(block_len=8, block_stride=4, block_size=8, num_blocks=4, num_initial=1, num_local=2)
  case = dict(defaults, **case)
  S = 38
  T = case.pop("T", S)
  if case.pop("segments", False):
    case["segment_ids"] = segments(S)
  C = (S - case["block_len"]) // case["block_stride"] + 1
  q, k_cmp, _ = make(T, C)
  where = {n: case[n] for n in ("segment_ids", "query_offset") if n in case}
  q *= 3  # peaked

  @jax.jit
  def select(q, k_cmp):
    _, lse = pk.compressed_attention(q, k_cmp, k_cmp, block_len=case["block_len"],
                                     block_stride=case["block_stride"], **where)
    return pk.compressed_top_k(q, k_cmp, lse, **case)

  indices = np.asarray(select(q, k_cmp))
  scores = oracle.compressed_block_scores(q, k_cmp, case["block_len"], case["block_stride"], 8, S, H ** -0.5,
                                          **where)
  oracle.check_selection(indices, scores, case["num_blocks"], case["num_initial"], case["num_local"], 8,
                         where.get("query_offset", 0))


def test_a_query_before_the_first_compressed_block_sees_its_own_block_wherever_its_offset_is_known():
  """No compressed key, position 17: blocks 0, 1 and 2 of 8 tokens are all there is, traced or not."""
  q, k_cmp, _ = make(1, 0)
  lse = jnp.full(q.shape[:3], -jnp.inf)
  select = lambda offset: pk.compressed_top_k(q, k_cmp, lse, block_len=32, block_stride=16, block_size=8, num_blocks=3,
                                              query_offset=offset)
  for indices in (select(17), jax.jit(select)(17)):
    np.testing.assert_array_equal(np.sort(indices, -1), np.broadcast_to([0, 1, 2], (B, 1, K, 3)))


@pytest.mark.parametrize("case", [
    dict(), dict(num_initial=1, num_local=2), dict(num_local=0), dict(num_blocks=9), dict(segments=True),
    dict(segments=True, num_initial=1, num_blocks=2), dict(T=6, query_offset=23),
    dict(T=40, S=12, num_blocks=1),
    dict(T=6, query_offset=np.array([4, 30], np.int32)),
], ids=str)
def test_index_top_k_matches_the_oracle(case):
  case = dict(dict(block_size=8, num_blocks=3, num_initial=0, num_local=1), **case)
  S = case.pop("S", 38)
  T = case.pop("T", S)
  if case.pop("segments", False):
    case["segment_ids"] = segments(S)
  where = {n: case[n] for n in ("segment_ids", "query_offset") if n in case}
  q_idx, k_idx = normal(0, B, T, K, HI), normal(1, B, S, HI)
  indices = np.asarray(jax.jit(functools.partial(pk.index_top_k, **case))(q_idx, k_idx))
  scores = oracle.index_block_scores(q_idx, k_idx, 8, **where)
  oracle.check_selection(indices, scores, case["num_blocks"], case["num_initial"], case["num_local"], 8,
                         where.get("query_offset", 0))


@pytest.mark.parametrize("packed", [False, True])
def test_block_top_k_takes_given_scores(packed):
  S = 38
  segment_ids = segments(S) if packed else None
  given = normal(0, B, S, K, 5)
  f = functools.partial(pk.block_top_k, block_size=8, num_blocks=2, num_initial=1, num_local=1, keys=S)
  indices = np.asarray(jax.jit(f)(given, segment_ids=segment_ids))
  zeros = np.zeros((B, S, K, HI), np.float32)
  visible = np.isfinite(oracle.index_block_scores(zeros, zeros[:, :, 0], 8, segment_ids))
  oracle.check_selection(indices, np.where(visible, given, -np.inf), 2, 1, 1, 8)


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


def test_ties_go_to_the_lower_block_and_masking_precedes_pooling():
  q_idx = np.ones((1, 32, 1, 1), np.float32)
  k_idx = np.zeros((1, 32, 1), np.float32)
  k_idx[0, :8] = -0.0  # minus zero ties with zero
  choose = jax.jit(functools.partial(pk.index_top_k, block_size=8, num_blocks=2, num_local=0))
  assert set(np.asarray(choose(q_idx, k_idx))[0, 31, 0]) == {0, 1}
  k_idx[0, 30] = 5.0  # query 29 does not see it: its block must not win by it
  indices = np.asarray(choose(q_idx, k_idx))[0, :, 0]
  assert set(indices[29]) == {0, 1} and 3 in indices[30]


@pytest.mark.parametrize("case", [
    dict(warmup=True), dict(T=7, query_offset=11, index_scale=0.7, scale=0.2),
], ids=str)
def test_index_kl_matches_the_oracle(case):
  case = dict(case)
  T, S, N = case.pop("T", 29), 29, 4
  if case.pop("segments", False):
    case["segment_ids"] = segments(S)
  where = {n: case[n] for n in ("segment_ids", "query_offset") if n in case}
  q, k, v = make(T, S, N)
  q_idx, k_idx = normal(4, B, T, K, HI), normal(5, B, S, HI)
  if case.pop("warmup", False):
    indices, sets = None, oracle.dense_sets(B, T, K, S)
    main = pk.attention
  else:
    indices = random_indices(3, T, 4, 4)
    sets = oracle.selected_sets(indices, 8, S, **where)
    main = functools.partial(pk.selected_attention, block_indices=indices, block_size=8,
                             scale=case.get("scale"), **where)
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
    "scores has 2 blocks; 24 keys": lambda q, k, v, i: pk.block_top_k(
        q[..., :2], block_size=8, num_blocks=2, keys=24),
    "block_size = -8": lambda q, k, v, i: pk.block_top_k(q, block_size=-8, num_blocks=2),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
  q, k, v = make(9, 9)
  with pytest.raises(ValueError, match=message):
    BAD[message](q, k, v, np.zeros((B, 9, K, 2), np.int32))


# --- the shared shapes --------------------------------------------------------


@pytest.mark.parametrize("spec", arg_specs.TINY + (arg_specs.get("study_4k_j8"),), ids=lambda s: s.name)
@pytest.mark.parametrize("pattern", ["uniform", "stripes", "none shared", "half shared", "all shared"])
def test_index_patterns_are_selections(spec, pattern):
  build = dict(uniform=arg_specs.uniform, stripes=arg_specs.stripes)
  for name, share in (("none shared", 0.0), ("half shared", 0.5), ("all shared", 1.0)):
    build[name] = functools.partial(arg_specs.neighbours, share=share)
  indices = build[pattern](spec, seed=3)
  np.testing.assert_array_equal(indices, build[pattern](spec, seed=3))
  assert indices.shape == (spec.B, spec.T, spec.K, spec.J) and indices.dtype == np.int32
  own = (np.arange(spec.T) // spec.block_size)[None, :, None]
  assert indices.min() >= -1 and (indices <= own[..., None]).all()
  ordered = np.sort(indices, axis=-1)
  assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(), "duplicates"
  for forced in (np.zeros_like(own), own, np.maximum(own - spec.num_local + 1, 0)):
    assert (indices == forced[..., None]).any(axis=-1).all()
  if pattern in ("uniform", "none shared"):
    np.testing.assert_array_equal((indices >= 0).sum(-1) - np.minimum(own + 1, spec.J), 0)


def test_patterns_share_what_they_say_and_uniform_is_uniform():
  spec = arg_specs.get("study_16k_j16")
  def shared(indices):  # of the free picks of a token, how many has the next token of its tile
    free = indices[:1, -1024:, :, 3:]
    here, there = free[:, :-1], free[:, 1:]
    same = ((here[..., :, None] == there[..., None, :]) & (here[..., :, None] >= 0)).any(-1).mean(-1)
    return same.reshape(-1, spec.K)[np.arange(1023) % 64 != 63].mean()
  chance = 13 / 500
  assert abs(shared(arg_specs.uniform(spec)) - chance) < 0.01
  for share in (0.5, 1.0):
    exact = round(share * 13) / 13
    assert abs(shared(arg_specs.neighbours(spec, share)) - exact - (1 - exact) * chance) < 0.01
  assert shared(arg_specs.stripes(spec)) > 0.9
  tiny = arg_specs.AttentionSpec("t", 1, 4096, 1, 1, 8, 128, 8)
  counts = np.bincount(arg_specs.uniform(tiny)[0, -128:, 0, 3:].ravel(), minlength=32)[1:30]
  assert counts.sum() == 128 * 5 and (counts > 4).all() and (counts < 50).all()  # 22 expected


def test_specs_have_inputs():
  for spec in (arg_specs.get("tiny_g4_ragged"), arg_specs.get("tiny_bf16")):
    x = arg_specs.arrays(spec)
    assert x["q"].shape == (spec.B, spec.T, spec.N, spec.H) and x["q"].dtype == jnp.dtype(spec.dtype)
    assert x["k_cmp"].shape[1] == spec.num_compressed and spec.G * spec.K == spec.N
    sparse = jax.jit(functools.partial(pk.selected_attention, block_size=spec.block_size))
    o, _ = sparse(x["q"], x["k"], x["v"], arg_specs.stripes(spec))
    assert np.isfinite(np.asarray(o, np.float32)).all()
  with pytest.raises(ValueError, match="headline_g16"):
    arg_specs.get("headline")
