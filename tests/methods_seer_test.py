"""Tests of nsa/methods/seer.py against a slow float64 reference written from the papers' formulas."""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import methods_oracle as oracle
import numpy as np
import one_layer
from one_layer import D, H, K
import pytest

from nsa import flops, methods, schedule

B, T, N = 2, 44, 6  # the last block has 4 tokens of 8
VARIANTS = {
    "seer": methods.Seer(block_size=8, num_blocks=3, gate_dim=6),
    "bare": methods.Seer(block_size=8, num_blocks=3, num_initial=1, gate_dim=6, gate_norm=False),
}
PACKED = np.searchsorted((5, 29, T), np.arange(T), side="right") * np.ones((B, 1), int)  # not on the block grid
CASES = [(name, mode, packed) for name in VARIANTS for mode in ("sparse", "warmup") for packed in (False, True)
         if mode == "sparse" or name == "seer"]


def objective(name, mode, params, h, weights, segments):
  """<output, weights> + KL of one layer, and (output, KL, chosen blocks)."""
  call = one_layer.call(T, segments, mode)
  seen = lambda q, k, indices, call: {} if indices is None else {"indices": indices}
  out, losses, seen, *_ = nnx.merge(attention_of(name)[0], params)(h, call, None, seen)
  return jnp.sum(out * weights) + losses["gate_kl"], (out, losses["gate_kl"], seen.get("indices"))


make_config, segments_of, attention_of, gradient_of, run_layer = one_layer.kit(objective, VARIANTS, PACKED, N)


# --- the reference -----------------------------------------------------------------


def sees(packed, b, t, s):
  return s <= t and (not packed or PACKED[b, s] == PACKED[b, t])


def blocks_of(packed, b, t, size=8):
  """(blocks with a token that the query sees, those of them that are complete at the query)."""
  some = sorted({s // size for s in range(t + 1) if sees(packed, b, t, s)})
  return some, [j for j in some if sees(packed, b, t, (j + 1) * size - 1)]


def gate_scores(xp, p, h, options, packed):
  """{(b, t): [K, complete blocks]} of every query that has complete blocks, `h` being constant."""
  heads = lambda x, w: xp.einsum("...ki,kio->...ko", x, w["inner"])
  norm = lambda x, w: oracle.rms_norm(xp, x, w["norm"]) if options.gate_norm else x
  q, k = oracle.project(xp, p["q"], h), oracle.project(xp, p["k"], h)
  gate = p["method"]["selector"]
  q = norm(heads(q.reshape(B, T, K, N // K * H), gate["q"]), gate["q"])
  q = oracle.rope(xp, q, np.arange(T))
  out = {}
  for b, t in np.ndindex(B, T):
    _, complete = blocks_of(packed, b, t)
    if complete:
      tokens = [[s for s in range(j * 8, j * 8 + 8) if sees(packed, b, t, s)] for j in complete]
      pooled = xp.stack([xp.concatenate([k[b, at].max(0), k[b, at].min(0), k[b, at].mean(0)], -1)
                         for at in map(np.asarray, tokens)])
      keys = norm(heads(pooled, gate["compress_k"]), gate["compress_k"])
      keys = oracle.rope(xp, keys[None], np.asarray(complete) * 8)[0]
      out[b, t] = xp.einsum("kd,ckd->kc", q[b, t], keys) / np.sqrt(options.gate_dim)
  return out


def token_mask(packed, indices):
  own = segments_of(packed)
  return oracle.causal_mask(B, T, K, own) if indices is None else oracle.token_mask(indices, 8, own)


def reference(xp, options, p, h, packed, indices, stop=lambda x: x):
  """(output, KL): softmax attention over the chosen blocks (all without), and the loss of 2506.08889, section 2.2."""
  q, k = (oracle.rope(xp, oracle.project(xp, p[x], h), np.arange(T)) for x in "qk")
  o, prob = oracle.attend(xp, q, k, oracle.project(xp, p["v"], h), token_mask(packed, indices))
  selector = p["method"]["selector"]
  frozen = {**{x: {name: stop(w) for name, w in p[x].items()} for x in "qk"}, "method": {"selector": selector}}
  losses = []
  for (b, t), scores in gate_scores(xp, frozen, stop(h), options, packed).items():
    _, complete = blocks_of(packed, b, t)
    for r in range(K):
      mine = [i for i, j in enumerate(complete) if indices is None or j in indices[b, t, r]]
      if mine:
        largest = xp.stack([prob[b, t, r, :, complete[i] * 8:complete[i] * 8 + 8].max() for i in mine])
        target = stop(largest / largest.sum())
        e = xp.exp(scores[r, np.asarray(mine)])
        losses.append((target * (xp.log(target) - xp.log(e / e.sum()))).sum())
  return xp.einsum("btnh,nhd->btd", o, p["out"]), sum(losses) / len(losses)


@pytest.mark.parametrize("name,mode,packed", CASES)
def test_layer_values_equal_the_reference(name, mode, packed):
  h, _, (_, (out, kl, indices)) = run_layer(name, mode, packed)
  want, want_kl = reference(np, VARIANTS[name], oracle.as_float64(attention_of(name)[1]), h.astype(np.float64),
                            packed, indices)
  assert (indices is None) == (mode == "warmup") and kl > 0.01
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(kl, want_kl, rtol=1e-4)


slow_gradient = oracle.gradients("dense")


@pytest.mark.parametrize("name,mode,packed", CASES)
def test_gradients_equal_the_reference(name, mode, packed):
  """LM part: autodiff of the masked dense reference. KL: central differences of the float64 reference."""
  h, weights, (grads, (_, _, indices)) = run_layer(name, mode, packed)
  params, mask = attention_of(name)[1], token_mask(packed, indices)

  want, of_h = slow_gradient(params, h, mask, weights)
  close = functools.partial(np.testing.assert_allclose, rtol=2e-3)
  close(grads[1], of_h, atol=2e-4 * np.abs(of_h).max())  # the KL adds nothing to h and to the backbone
  for x in ("q", "k", "v", "out"):
    jax.tree.map(lambda a, b: close(a, b, atol=2e-4 * np.abs(b).max()), grads[0][x], want[x])
  exact, rng = oracle.as_float64(params), np.random.default_rng(3)
  gate = grads[0]["method"]["selector"]
  for part in ("q", "compress_k"):
    for leaf, got in gate[part].items():
      direction = rng.standard_normal(got.shape)

      def moved(step):
        selector = exact["method"]["selector"]
        there = {**selector, part: {**selector[part], leaf: selector[part][leaf] + step * direction}}
        return reference(np, VARIANTS[name], {**exact, "method": {"selector": there}}, h.astype(np.float64), packed,
                         indices)[1]

      slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
      close(np.sum(got * direction), slope, atol=1e-5)
      assert np.abs(got).max() > 1e-4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_selected_sets_are_those_of_the_slow_gate(name, packed):
  h, _, (_, (_, _, indices)) = run_layer(name, "sparse", packed)
  options = VARIANTS[name]
  scores = gate_scores(np, oracle.as_float64(attention_of(name)[1]), h.astype(np.float64), options, packed)
  swapped = 0
  for b, t, r in np.ndindex(B, T, K):
    some, complete = blocks_of(packed, b, t)
    value = dict(zip(complete, scores[b, t][r])) if complete else {}
    forced = {t // 8} | set(some[:options.num_initial])
    got = oracle.assert_chosen(indices[b, t, r].tolist(), some, forced, value, options.num_blocks)
    swapped += set(some[-len(got):]) != got
  assert swapped > 10  # the gate chooses more than the latest blocks


def test_chunks_of_queries_change_nothing(monkeypatch):
  h, weights, (grads, (out, kl, _)) = run_layer("seer", "sparse", True)
  again = jax.grad(functools.partial(objective, "seer", "sparse"), argnums=(0, 1), has_aux=True)
  grads_2, (out_2, kl_2, _) = one_layer.in_chunks(  # 7 queries
      monkeypatch, 7 * B * T * N, again, attention_of("seer")[1], h, weights, segments_of(True))
  np.testing.assert_allclose(out_2, out, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(kl_2, kl, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads_2, grads)


def test_no_complete_block_means_no_loss_and_no_gradient():
  h, weights, segments = np.ones((B, 7, D), np.float32), np.zeros((B, 7, D), np.float32), np.zeros((B, 7), np.int32)
  grads, (_, kl, _) = gradient_of("seer", "sparse")(attention_of("seer")[1], h, weights, segments)
  assert kl == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


# --- cost and options ------------------------------------------------------------------


def test_flops_by_hand():
  options, context = methods.Seer(block_size=8, num_blocks=3, gate_dim=6), 50
  config = make_config(options)
  config.schedule, config.data.context, config.data.global_batch = schedule.native(10, 0.5), context, 2
  mean = lambda count: sum(count(t) for t in range(context)) / context
  complete = lambda t: (t + 1) // 8
  chosen = lambda t: min(t // 8 + 1, 3) - ((t + 1) % 8 > 0)  # without the unfinished own block
  parts = flops.forward(config, context, "sparse")
  key = 2 * 2 * K * 3 * H * 6 / 8  # one pooled key of 3 H per block and head
  score = 2 * 2 * K * 6
  assert parts["scores"] == pytest.approx(score * mean(complete) + key)
  assert parts["selected"] == pytest.approx(2 * 4 * N * H * mean(lambda t: min(t + 1, 24)))
  assert parts["projections"] - flops.forward(config, context, "dense")["projections"] == 2 * 2 * K * (N // K * H) * 6
  warmup = flops.training(config, schedule.at(config, 0))
  assert warmup["gate_kl"] == pytest.approx(3 * (score * mean(complete) + key)) and "scores" not in warmup
  assert warmup["teacher"] == pytest.approx(2 * 2 * N * H * 8 * mean(complete))
  sparse = flops.training(config, schedule.at(config, 9))
  assert sparse["gate_kl"] == pytest.approx(3 * (score * mean(chosen) + key))
  assert sparse["teacher"] == pytest.approx(2 * 2 * N * H * 8 * mean(chosen))
  assert options.reads(config.model, 48) == {"selected": 24, "scores": 6 * 6 / (2 * H)}
