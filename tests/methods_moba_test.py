"""Tests of nsa/methods/moba.py against a slow float64 reference written from the papers' formulas."""
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import methods_oracle as oracle
import numpy as np
import one_layer
from one_layer import H, K
import pytest

from nsa import evaluate, flops, methods, model as model_lib, optim
from nsa.methods import blocks

B, T, V, N = 2, 44, 32, 4  # the last block has 4 tokens of 8
VARIANTS = {"plain": methods.MoBA(block_size=8, num_blocks=2),
            "conv": methods.MoBA(block_size=8, num_blocks=2, key_conv=3)}
PACKED = np.searchsorted((5, 29, T), np.arange(T), side="right") * np.ones((B, 1), int)  # not on the block grid
CASES = [(name, packed) for name in VARIANTS for packed in (False, True)]


def objective(name, params, h, weights, segments):
  """<output, weights> of one layer, and (output, chosen blocks, diagnostics)."""
  call = one_layer.call(T, segments)
  seen = lambda q, k, indices, call: {
      "indices": indices, "diagnostics": blocks.diagnostics(q, k, indices, call, VARIANTS[name])}
  out, losses, seen, *_ = nnx.merge(attention_of(name)[0], params)(h, call, None, seen)
  assert not losses
  return jnp.sum(out * weights), (out, seen["indices"], seen["diagnostics"])


make_config, segments_of, attention_of, gradient_of, run_layer = one_layer.kit(objective, VARIANTS, PACKED, N)


# --- the reference -----------------------------------------------------------------


def queries_and_keys(xp, p, h, segments):
  """q and k, both [B, T, N, H]: each query head with the keys of its group, after the convolution and RoPE."""
  q, k = oracle.project(xp, p["q"], h), oracle.project(xp, p["k"], h)
  if "method" in p:
    past, inner = xp.concatenate([0 * k[:, :2], k], 1), 0.0
    ids = xp.concatenate([np.full((B, 2), -1), segments], 1)
    for w, tap in enumerate(p["method"]["branch"]["taps"]):
      same = ids[:, 2 - w:T + 2 - w] == segments
      inner = inner + tap * xp.where(same[:, :, None, None], past[:, 2 - w:T + 2 - w], 0.0)
    k = k + inner / (1 + xp.exp(-inner))
  q, k = (oracle.rope(xp, x, np.arange(T)) for x in (q, k))
  return q, xp.repeat(k, N // K, axis=2)


def reference(xp, p, h, mask, segments):
  """Softmax attention over mask bool[B, T, N, S], a set per query head."""
  q, k = queries_and_keys(xp, p, h, segments)
  o, prob = oracle.attend(xp, q, k, xp.repeat(oracle.project(xp, p["v"], h), N // K, axis=2), mask)
  return xp.einsum("btnh,nhd->btd", o, p["out"]), prob


@functools.lru_cache(maxsize=None)
def slow_gradient(name):
  return jax.jit(
      jax.grad(lambda p, h, mask, segments, weights: jnp.sum(reference(jnp, p, h, mask, segments)[0] * weights),
               argnums=(0, 1)))


@pytest.mark.parametrize("name,packed", CASES)
def test_layer_equals_the_masked_reference(name, packed):
  h, weights, (grads, (out, indices, _)) = run_layer(name, packed)
  params, segments = attention_of(name)[1], segments_of(packed)
  mask = oracle.token_mask(indices, 8, segments)
  want, _ = reference(np, oracle.as_float64(params), h.astype(np.float64), mask, segments)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
  oracle.assert_gradients(grads, slow_gradient(name)(params, h, mask, segments, weights))
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name,packed", CASES)
def test_selected_sets_are_those_of_the_slow_gate(name, packed):
  h, _, (_, (_, indices, _)) = run_layer(name, packed)
  segments = segments_of(packed)
  q, k = queries_and_keys(np, oracle.as_float64(attention_of(name)[1]), h.astype(np.float64), segments)
  assert indices.shape == (B, T, N, 2)
  apart = 0
  for b, t, n in np.ndindex(B, T, N):
    mine = [s for s in range(T) if s <= t and segments[b, s] == segments[b, t]]
    value = {}
    for j in sorted({s // 8 for s in mine} - {t // 8}):  # previous blocks, with the tokens of the query's segment
      value[j] = q[b, t, n] @ k[b, [s for s in mine if s // 8 == j], n].mean(0)
    oracle.assert_chosen(indices[b, t, n].tolist(), {t // 8, *value}, {t // 8}, value, 2)
    apart += n % 2 and set(indices[b, t, n]) != set(indices[b, t, n - 1])
  assert apart > 20  # heads of a group choose for themselves


def test_diagnostics_are_per_query_head():
  h, _, (_, (_, indices, got)) = run_layer("plain", False)
  segments = segments_of(False)
  params = oracle.as_float64(attention_of("plain")[1])
  _, prob = reference(np, params, h.astype(np.float64), oracle.causal_mask(B, T, N), segments)
  limited = np.arange(T) >= 16  # three blocks and more, J = 2
  captured = np.where(oracle.token_mask(indices, 8, segments), prob[:, :, :, 0], 0.0).sum(-1)
  np.testing.assert_allclose(got["captured_mass"], captured[:, limited].mean((0, 1)), rtol=1e-4)
  assert got["captured_mass"].shape == (N,) and (got["oracle_mass"] >= got["captured_mass"] - 1e-5).all()


def test_chunks_of_queries_change_nothing(monkeypatch):
  h, weights, (_, (_, indices, _)) = run_layer("plain", True)
  got = one_layer.in_chunks(monkeypatch, 7 * B * N * 6, lambda *xs: objective("plain", *xs)[1][1],  # 7 queries
                            attention_of("plain")[1], h, weights, segments_of(True))
  np.testing.assert_array_equal(got, indices)


def test_the_convolution_begins_as_the_identity_and_learns():
  h, weights, (_, (want, _, _)) = run_layer("plain", False)
  params = attention_of("plain")[1]
  params = {**params, "method": {"branch": {"taps": np.zeros((3, K, H), np.float32)}}}
  grads, (out, _, _) = gradient_of("conv")(params, h, weights, segments_of(False))
  np.testing.assert_array_equal(out, want)
  assert (np.abs(grads[0]["method"]["branch"]["taps"]).max((1, 2)) > 1e-3).all()


# --- whole models --------------------------------------------------------------------


def tokens(seed=0):
  return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


def test_decoding_with_the_convolution_equals_the_parallel_pass():
  config = make_config(VARIANTS["conv"], short_conv=2)
  params = one_layer.random_params(model_lib.abstract_params(config))
  assert [path for path, group in optim.groups_of(config).items() if group == "branch"] == \
      ["stacks.stack0.attention.method.branch.taps"]
  whole = lambda config, **kw: jax.jit(functools.partial(model_lib.forward, config, **kw))(params, tokens()).logits
  got, _ = one_layer.decoded(config, params, tokens(), 19)  # at the end by one token: less than the convolution reaches
  np.testing.assert_allclose(got, whole(config), rtol=1e-4, atol=1e-4)
  # With blocks enough it is dense attention over the convolved keys.
  enough = make_config(dataclasses.replace(VARIANTS["conv"], num_blocks=6), short_conv=2)
  dense = whole(config, mode="dense")
  np.testing.assert_allclose(whole(enough), dense, rtol=1e-5, atol=1e-5)
  assert np.abs(whole(config) - dense).max() > 1e-2
  config.model.short_conv = 0
  params = one_layer.random_params(model_lib.abstract_params(config))
  with pytest.raises(ValueError, match="segment_ids with a cache and attention.key_conv = 3"):
    model_lib.forward(config, params, tokens(), np.zeros((B, T), np.int32),
                      cache=model_lib.init_cache(config, params, B, T))


# --- cost and options ------------------------------------------------------------------


def test_flops_by_hand():
  context, config = 50, make_config(VARIANTS["conv"])
  parts, dense = flops.forward(config, context, "sparse"), flops.forward(config, context, "dense")
  mean = lambda count: sum(count(t) for t in range(context)) / context
  assert parts["selected"] == pytest.approx(2 * 4 * N * H * mean(lambda t: min(t + 1, 16)))
  assert parts["scores"] == pytest.approx(2 * 2 * N * H * mean(lambda t: t + 1) / 8)
  assert parts["key_conv"] == dense["key_conv"] == 2 * 2 * 3 * K * H
  assert parts["projections"] == dense["projections"]
  # Two heads per group: their own block, and one each of their own choice.
  assert VARIANTS["conv"].reads(config.model, 48) == {"selected": 24, "scores": 3}
  assert VARIANTS["conv"].tokens_visible(48) == 16


def test_a_convolved_model_has_no_run_mode_without_its_taps():
  assert evaluate.how(make_config(VARIANTS["conv"]), "flexprefill") is None
  assert evaluate.how(make_config(VARIANTS["plain"]), "flexprefill") is not None
  assert evaluate.how(make_config(VARIANTS["conv"]), "oracle") is not None
