"""Tests of nsa/methods/infllm_v2.py against a slow float64 reference written from the paper's formulas."""
from flax import nnx
import jax.numpy as jnp
import methods_oracle as oracle
import numpy as np
import one_layer
from one_layer import H, K
import pytest

from nsa import flops, methods

B, T, N = 2, 60, 6  # the last block has 4 tokens of 8
BLOCKS = dict(block_size=8, num_blocks=4)
VARIANTS = {
    # Kernel 5, stride 4, padding 1, as in the paper; kernel 5, stride 2, padding 3.
    "paper": methods.InfLLMV2(pool_len=4, pool_stride=2, num_initial=1, num_local=2, **BLOCKS),
    "coarse": methods.InfLLMV2(pool_len=8, pool_stride=4, num_initial=0, num_local=1, coarse_lse=True, **BLOCKS),
}
PACKED = np.searchsorted((24, 32, T), np.arange(T), side="right") * np.ones((B, 1), int)
CASES = [(name, packed) for name in VARIANTS for packed in (False, True)]


def objective(name, params, h, weights, segments):
  """<output, weights> of one layer, and (output, chosen blocks)."""
  call = one_layer.call(T, segments)
  out, losses, seen, *_ = nnx.merge(attention_of(name)[0], params)(h, call, None, lambda q, k, indices, call: {
      "indices": indices})
  assert not losses
  return jnp.sum(out * weights), (out, seen["indices"])


make_config, segments_of, attention_of, gradient_of, run_layer = one_layer.kit(
    objective, VARIANTS, PACKED, N, 0.5, vocab_size=320, context=60)


# --- the reference -----------------------------------------------------------------


slow_gradient = oracle.gradients("dense")


def pooled(k, segments, t, length, stride):
  """{first token: mean key [K, H]} of the pooled keys that query t sees, of one sequence."""
  inside = lambda c: c + length - 1 <= t and (segments[c:c + length] == segments[t]).all()
  return {c: k[c:c + length].mean(0) for c in range(0, T, stride) if inside(c)}


def block_scores(options, q, k, segments, t):
  """[K, blocks] of query t of one sequence: q [N, H], k [S, K, H]."""
  keys = pooled(k, segments, t, options.pool_len, options.pool_stride)
  factor = 4 if options.coarse_lse else 1
  normaliser = pooled(k, segments, t, factor * options.pool_len, factor * options.pool_stride)
  out = np.zeros((K, -(-T // 8)))
  if not normaliser:
    return out
  for r in range(K):
    heads = q[r * N // K:(r + 1) * N // K] / np.sqrt(H)
    total = sum(np.exp(heads @ key[r]) for key in normaliser.values())
    for c, key in keys.items():
      mass = (np.exp(heads @ key[r]) / total).sum()
      for j in {s // 8 for s in range(c, c + options.pool_len)}:
        out[r, j] = max(out[r, j], mass)
  return out


@pytest.mark.parametrize("name,packed", CASES)
def test_layer_equals_the_masked_reference(name, packed):
  h, weights, (grads, (out, indices)) = run_layer(name, packed)
  params, mask = attention_of(name)[1], oracle.token_mask(indices, 8, segments_of(packed))
  want, _ = oracle.layer(np, "dense", oracle.as_float64(params), h.astype(np.float64), None, mask)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
  oracle.assert_gradients(grads, slow_gradient(params, h, mask, weights))


@pytest.mark.parametrize("name,packed", CASES)
def test_selected_sets_are_those_of_the_slow_scores(name, packed):
  h, _, (_, (_, indices)) = run_layer(name, packed)
  p, options, segments = oracle.as_float64(attention_of(name)[1]), VARIANTS[name], segments_of(packed)
  q, k = (oracle.rope(np, oracle.project(np, p[x], h.astype(np.float64)), np.arange(T)) for x in "qk")
  swapped = 0
  for b, t in np.ndindex(B, T):
    scores = block_scores(options, q[b, t], k[b], segments[b], t)
    visible = sorted({s // 8 for s in range(t + 1) if segments[b, s] == segments[b, t]})
    forced = (set(visible[:options.num_initial])
              | set(range(max(visible[0], t // 8 - options.num_local + 1), t // 8 + 1)))
    for r in range(K):
      got = oracle.assert_chosen(indices[b, t, r].tolist(), visible, forced, scores[r], 4, 1e-6)
      swapped += set(visible[-4:]) != got
  assert swapped > 20 or packed


def test_chunks_of_queries_change_nothing(monkeypatch):
  h, weights, (_, (_, indices)) = run_layer("paper", True)
  got = one_layer.in_chunks(monkeypatch, 7 * B * N * 29, lambda *xs: objective("paper", *xs)[1][1],  # 7 queries
                            attention_of("paper")[1], h, weights, segments_of(True))
  np.testing.assert_array_equal(got, indices)


def test_the_defaults_are_the_papers_pooling():
  options = methods.InfLLMV2()
  shared = [c for c in range(40) if any(s // 64 == 3 for s in range(c * 16, c * 16 + 32))]
  assert shared == [4 * 3 - 1 + i for i in range(5)]  # kernel 5, stride 4, padding 1
  assert (options.pool_len, options.pool_stride, options.block_size) == (32, 16, 64)
  assert options.num_blocks - options.num_initial - options.num_local == 63


# --- cost and options ------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_by_hand(name):
  options, context, config = VARIANTS[name], 50, make_config(VARIANTS[name])
  parts, dense = flops.forward(config, context, "sparse"), flops.forward(config, context, "dense")
  mean = lambda count: sum(count(t) for t in range(context)) / context
  keys = lambda length, stride: mean(lambda t: sum(c + length - 1 <= t for c in range(0, context, stride)))
  second = keys(4, 2) if name == "paper" else keys(32, 16)
  assert parts["selected"] == pytest.approx(2 * 4 * N * H * mean(lambda t: min(t + 1, 32)))
  assert parts["scores"] == pytest.approx(2 * 2 * N * H * (keys(options.pool_len, options.pool_stride) + second))
  assert parts["projections"] == dense["projections"] and "scores" not in dense
  assert options.reads(config.model, 48) == {"selected": 32, "scores": 12 if name == "paper" else 7.5}
