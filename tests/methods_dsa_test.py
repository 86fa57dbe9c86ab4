"""Tests of nsa/methods/dsa.py against a slow float64 reference written from the paper's formulas."""
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import methods_oracle as oracle
import numpy as np
import one_layer
from one_layer import D, H, K
import pytest

from nsa import config as config_lib, flops, methods, model as model_lib, schedule
from pallas_kernels import masked

B, T, V, N = 2, 48, 32, 4
INDEX = dict(block_size=8, num_blocks=2, index_heads=3, index_dim=6)
VARIANTS = {
    "token": methods.DSA(**INDEX),
    "block": methods.DSA(level="block", **INDEX),
    "token_group": methods.DSA(per_group=True, **INDEX),
    "block_group": methods.DSA(level="block", per_group=True, num_initial=1, **{**INDEX, "num_blocks": 3}),
}
PACKED = np.searchsorted((21, 32, T), np.arange(T), side="right") * np.ones((B, 1), int)  # not on the block grid
CASES = [(name, mode, packed) for name in VARIANTS for mode in ("sparse", "warmup") for packed in (False, True)
         if mode == "sparse" or name.startswith("token")]


def objective(name, mode, params, h, weights, segments):
  """<output, weights> + KL of one layer, and (output, KL, chosen lists)."""
  call = one_layer.call(T, segments, mode)
  layer = nnx.merge(attention_of(name)[0], params)
  out, losses, *_ = layer(h, call, None, None)
  x, streams = layer.project(h, call)
  lists = layer.method.select(layer.method.index(x, streams, call), x, streams, call)
  assert layer.method.unit == (0 if name.startswith("token") else 8)
  return jnp.sum(out * weights) + losses["index_kl"], (out, losses["index_kl"], lists)


make_config, segments_of, attention_of, gradient_of, run_layer = one_layer.kit(objective, VARIANTS, PACKED, N)


# --- the reference -----------------------------------------------------------------


def index_scores(xp, p, h, options):
  """I[b, t, r, s] of eq. 1."""
  sets = K if options.per_group else 1
  x = oracle.project(xp, p["q"], h)
  q = oracle.rope(xp, x, np.arange(T)).reshape(B, T, sets, options.index_heads, options.index_dim)
  k = oracle.project(xp, p["k"], h)
  k = (k - k.mean(-1, keepdims=True)) / xp.sqrt(k.var(-1, keepdims=True) + 1e-6)
  k = oracle.rope(xp, k * p["k_norm"] + p["k_norm_bias"], np.arange(T))[:, :, 0]
  w = (h @ p["weights"]).reshape(B, T, sets, options.index_heads)
  w = w / np.sqrt(options.index_heads * options.index_dim)
  return sum(w[..., j, None] * xp.maximum(xp.einsum("btrd,bsd->btrs", q[:, :, :, j], k), 0.0)
             for j in range(options.index_heads))


def visible(packed):
  return oracle.causal_mask(B, T, 1, segments_of(packed))


def reference(xp, options, p, h, mask, stop=lambda x: x):
  """(output, KL): softmax attention over mask bool[B, T, K, S], and eqs. 3 and 4."""
  q, k = (oracle.rope(xp, oracle.project(xp, p[x], h), np.arange(T)) for x in "qk")
  o, prob = oracle.attend(xp, q, k, oracle.project(xp, p["v"], h), mask)
  target = prob.sum(3) if options.per_group else prob.sum((2, 3))[:, :, None]
  target = stop(target / target.sum(-1, keepdims=True))
  scores = index_scores(xp, p["method"]["selector"], stop(h), options)
  inside = mask[:, :, :scores.shape[2]]
  e = xp.where(inside, xp.exp(scores), 0.0)
  student = e / e.sum(-1, keepdims=True)
  both = inside & (target > 0)
  ratio = xp.log(xp.where(both, target, 1.0)) - xp.log(xp.where(both, student, 1.0))
  return xp.einsum("btnh,nhd->btd", o, p["out"]), (target * ratio).sum(-1).mean()


def mask_of(name, mode, packed, lists):
  if mode == "warmup":
    mask = visible(packed)
  else:
    mask = masked.unpacked(lists, T) if name.startswith("token") else oracle.token_mask(lists, 8, segments_of(packed))
  return np.broadcast_to(mask, (B, T, K, T))


@functools.lru_cache(maxsize=None)
def slow_gradient(per_group):
  def slow(params, h, mask, weights):
    out, kl = reference(jnp, methods.DSA(per_group=per_group, **INDEX), params, h, mask, jax.lax.stop_gradient)
    return jnp.sum(out * weights) + kl

  return jax.jit(jax.grad(slow, argnums=(0, 1)))


@pytest.mark.parametrize("name,mode,packed", CASES)
def test_layer_equals_the_masked_reference(name, mode, packed):
  h, weights, (grads, (out, kl, lists)) = run_layer(name, mode, packed)
  options, params = VARIANTS[name], attention_of(name)[1]
  mask = mask_of(name, mode, packed, lists)
  want, want_kl = reference(np, options, oracle.as_float64(params), h.astype(np.float64), mask)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(kl, want_kl, rtol=1e-4)
  assert kl > 0.01
  oracle.assert_gradients(grads, slow_gradient(options.per_group)(params, h, mask, weights))
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_selected_sets_are_the_best_by_score(name, packed):
  h, _, (_, (_, _, lists)) = run_layer(name, "sparse", packed)
  options = VARIANTS[name]
  scores = index_scores(np, oracle.as_float64(attention_of(name)[1])["method"]["selector"], h.astype(np.float64),
                        options)
  token = options.level == "token"
  budget = options.num_blocks * (options.block_size if token else 1)
  size = 1 if token else options.block_size
  assert lists.shape == (B, T, K if options.per_group else 1, -(-T // 32) if token else budget)
  chosen = masked.unpacked(lists, T) if token else None
  seen = np.broadcast_to(visible(packed), scores.shape)
  for b, t, r in np.ndindex(lists.shape[:3]):
    mine = [s for s in range(T) if seen[b, t, r, s]]
    units = sorted({s // size for s in mine})
    value = {j: max(scores[b, t, r, s] for s in mine if s // size == j) for j in units}
    forced = set() if token else {t // size} | set(units[:options.num_initial])
    listed = (np.flatnonzero(chosen[b, t, r]) if token else lists[b, t, r]).tolist()
    # Scores of exactly 0 (no index head fires) tie, to the earlier token.
    oracle.assert_chosen(listed, units, forced, value, budget, 1e-6)
  if token and not packed:  # nothing is forced: some query does not choose itself
    assert not np.diagonal(chosen[0, :, 0]).all()


def test_chunks_of_queries_change_nothing(monkeypatch):
  h, weights, (grads, (out, kl, lists)) = run_layer("token", "sparse", True)
  again = jax.grad(functools.partial(objective, "token", "sparse"), argnums=(0, 1), has_aux=True)
  grads_2, (out_2, kl_2, lists_2) = one_layer.in_chunks(  # 7 or more queries
      monkeypatch, 7 * B * T * 6, again, attention_of("token")[1], h, weights, segments_of(True))
  np.testing.assert_array_equal(lists_2, lists)
  np.testing.assert_allclose(out_2, out, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(kl_2, kl, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads_2, grads)


# --- whole models --------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def params_of(name, **model):
  return one_layer.random_params(model_lib.abstract_params(make_config(VARIANTS[name], **model)))


def tokens(seed=0):
  return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


def forward(name, **kw):
  model = {k: kw.pop(k) for k in ("short_conv",) if k in kw}
  return jax.jit(functools.partial(model_lib.forward, make_config(VARIANTS[name], **model), **kw))


def test_decoding_by_blocks_equals_the_parallel_pass():
  name = "block"  # by tokens: tests/methods_test.py
  config, params = make_config(VARIANTS[name], short_conv=3), params_of(name, short_conv=3)
  want = forward(name, losses=False, short_conv=3)(params, tokens()).logits
  np.testing.assert_allclose(one_layer.decoded(config, params, tokens(), 20)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["token", "block_group"])
def test_a_control_takes_the_selectors_place(name):
  seen = lambda method, q, k, lists, call: {} if lists is None else {"lists": lists}
  run = lambda **kw: forward(name, observe=seen, key=jax.random.key(2), **kw)(params_of(name), tokens())
  own, random = run(), run(selector="random")
  assert random.layers[0]["lists"].shape == (2, B, T, K, VARIANTS[name].num_blocks)
  # Lists of tokens are not handed out as blocks.
  assert ("lists" in own.layers[0]) == (name == "block_group")
  assert np.abs(own.logits - random.logits).max() > 1e-2
  assert np.isfinite(random.losses["index_kl"]) and random.losses["index_kl"] > 0


# --- cost and options ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token", "block_group"])
def test_flops_by_hand(name):
  options, context = VARIANTS[name], 50
  config = make_config(options)
  config.schedule, config.data.context, config.data.global_batch = schedule.native(10, 0.5), context, 2
  sets, (HI, dI) = (K if options.per_group else 1), (options.index_heads, options.index_dim)
  mean = lambda count: sum(count(t) for t in range(context)) / context
  budget = options.num_blocks * options.block_size
  parts = flops.forward(config, context, "sparse")
  dense = flops.forward(config, context, "dense")
  pair = sets * HI * (2 * dI + 2)  # a dot product, a multiplication with w and an addition per index head
  assert parts["index"] == pytest.approx(2 * pair * mean(lambda t: t + 1))
  assert parts["selected"] == pytest.approx(2 * 4 * N * H * mean(lambda t: min(t + 1, budget)))
  assert parts["projections"] - dense["projections"] == 2 * 2 * D * (sets * HI * dI + dI + sets * HI)
  warmup = flops.training(config, schedule.at(config, 0))
  assert warmup["index_kl"] == pytest.approx(3 * 2 * pair * mean(lambda t: t + 1)) and "index" not in warmup
  sparse = flops.training(config, schedule.at(config, 9))
  assert sparse["index_kl"] == pytest.approx(3 * 2 * pair * mean(lambda t: min(t + 1, budget)))
  assert sparse["teacher"] == pytest.approx(2 * 2 * N * H * mean(lambda t: min(t + 1, budget)))
  assert options.tokens_visible(context) == budget
  assert options.reads(config.model, context) == {"selected": budget, "index": context * dI / (2 * H * K)}


@pytest.mark.parametrize("field,value", [("level", "tokens"), ("index_heads", 0), ("index_dim", 5)])
def test_check_names_the_field(field, value):
  config = make_config(dataclasses.replace(VARIANTS["token"], **{field: value}), vocab_size=320)
  with pytest.raises(config_lib.ConfigError, match=rf"attention\.{field} = {value!r}"):
    config_lib.validate(config)
