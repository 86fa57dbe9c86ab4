"""Tests of nsa/methods/ssa.py against a slow float64 reference written from the paper's formulas."""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import methods_oracle as oracle
import numpy as np
import one_layer
from one_layer import H, K
import pytest

from nsa import config as config_lib, flops, methods, model as model_lib, schedule, sharding, step as step_lib

B, T, V, N = 2, 44, 320, 4  # the last block has 4 tokens of 8
OPTIONS = methods.SSA(block_size=8, num_blocks=2)
PACKED = np.searchsorted((16, 24, T), np.arange(T), side="right") * np.ones((B, 1), int)
CASES = [(mode, packed) for mode in ("dense", "sparse") for packed in (False, True)]


ALPHA = 10.0


def objective(name, mode, params, h, weights, segments):
  """<output, weights> + ALPHA * alignment of one layer, and (output, alignment, chosen blocks)."""
  call = one_layer.call(T, segments, mode)
  seen = lambda q, k, indices, call: {} if indices is None else {"indices": indices}
  out, losses, seen, *_ = nnx.merge(attention_of(name)[0], params)(h, call, None, seen)
  return jnp.sum(out * weights) + ALPHA * losses["alignment"], (out, losses["alignment"], seen.get("indices"))


make_config, segments_of, attention_of, gradient_of, run_layer = one_layer.kit(
    objective, {"ssa": OPTIONS}, PACKED, N, 0.8, vocab_size=V, context=T, output_gate=True)


# --- the reference -----------------------------------------------------------------


def reference(xp, p, h, full_mask, mask, dense, stop=lambda x: x):
  """(output, alignment, |differences|) of a layer whose step passes on dense (1.0) or sparse (0.0) attention."""
  q, k = (oracle.rope(xp, oracle.project(xp, p[x], h), np.arange(T)) for x in "qk")
  gate = 1 / (1 + xp.exp(-xp.einsum("btd,dn->btn", h, p["gate"])))[..., None]
  full, sparse = (gate * oracle.attend(xp, q, k, oracle.project(xp, p["v"], h), m)[0] for m in (full_mask, mask))

  def smooth(a, b):
    d = xp.abs(a - b)
    return xp.where(d < 1, d * d / 2, d - 0.5).mean()

  loss = smooth(full, stop(sparse)) + smooth(sparse, stop(full))
  return xp.einsum("btnh,nhd->btd", dense * full + (1 - dense) * sparse, p["out"]), loss, xp.abs(full - sparse)


@functools.lru_cache(maxsize=None)
def slow_gradient():
  def slow(p, h, full_mask, mask, dense, weights):
    out, loss, _ = reference(jnp, p, h, full_mask, mask, dense, jax.lax.stop_gradient)
    return jnp.sum(out * weights) + ALPHA * loss

  return jax.jit(jax.grad(slow, argnums=(0, 1)))


def masks(indices, packed):
  own = segments_of(packed)
  return oracle.causal_mask(B, T, K, own), oracle.token_mask(indices, 8, own)


@pytest.mark.parametrize("mode,packed", CASES)
def test_layer_equals_the_masked_reference(mode, packed):
  h, weights, (grads, (out, loss, indices)) = run_layer("ssa", mode, packed)
  assert (indices is None) == (mode == "dense")  # a dense step passes on no sparse attention
  params, dense = attention_of("ssa")[1], float(mode == "dense")
  full, mask = masks(run_layer("ssa", "sparse", packed)[2][1][2], packed)
  want, want_loss, apart = reference(np, oracle.as_float64(params), h.astype(np.float64), full, mask, dense)
  assert (apart > 1).any() and ((apart > 0.01) & (apart < 1)).any()  # both branches of SmoothL1
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-4)
  oracle.assert_gradients(grads, slow_gradient()(params, h, full, mask, dense, weights))


def test_the_alignment_loss_moves_the_backbone_alike_in_both_modes():
  h, weights, _ = run_layer("ssa", "dense", False)
  (dense, _), (sparse, _) = (gradient_of("ssa", mode)(attention_of("ssa")[1], h, 0 * weights, segments_of(False))[0]
                             for mode in ("dense", "sparse"))
  assert all(np.abs(g).max() > 1e-3 for name in ("q", "k", "v", "gate") for g in jax.tree.leaves(dense[name]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), dense, sparse)


@pytest.mark.parametrize("packed", [False, True])
def test_selected_sets_are_the_best_mean_keys(packed):
  h, _, (_, (_, _, indices)) = run_layer("ssa", "sparse", packed)
  p = oracle.as_float64(attention_of("ssa")[1])
  scores, own = oracle.block_scores("block_topk", {**p, "method": {}}, h, OPTIONS), segments_of(packed)
  for b, t, r in np.ndindex(B, T, K):
    visible = {s // 8 for s in range(t + 1) if own[b, s] == own[b, t]}
    oracle.assert_chosen(indices[b, t, r].tolist(), visible, {t // 8}, scores[b, t, r], 2)


# --- whole models --------------------------------------------------------------------


def test_steps_of_a_retrofit():
  config = config_lib.validate(make_config(OPTIONS, plan=schedule.mixed_retrofit(40, 0.5)))
  trunk, steps = schedule.at(config, 0), [schedule.at(config, i) for i in range(20, 40)]
  kinds = {step.mode: step for step in steps}
  assert set(kinds) == {"dense", "sparse"} and trunk.mode == "dense" and not trunk.losses
  assert kinds["dense"].losses and dict(kinds["dense"].loss_weights) == {"alignment": 10.0}
  config.schedule.stages[1].loss_weights = {"alignment": 3.0}
  assert dict(schedule.at(config, 30).loss_weights) == {"alignment": 3.0}
  assert {step.program for step in schedule.programs(config)} == {schedule.at(config, i).program for i in range(40)}

  params = one_layer.random_params(model_lib.abstract_params(config), 0.8)
  inputs = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
  batch = {"inputs": inputs, "targets": inputs, "weights": np.ones((B, T), np.float32),
           "segment_ids": 1 + segments_of(False)}

  def run(step, attention=OPTIONS):
    of, mesh = make_config(attention, plan=schedule.mixed(10)), sharding.make_mesh(config, jax.devices()[:1])
    return jax.jit(lambda params: step_lib.loss_and_metrics(of, params, batch, None, step, lambda x, axes: x, mesh))(
        params)

  plain, of_dense_method = run(trunk), run(trunk, methods.Dense())
  np.testing.assert_array_equal(plain[0], of_dense_method[0])
  assert "alignment" not in plain[1]
  objective, metrics = run(kinds["dense"])
  np.testing.assert_allclose(metrics["loss"], plain[0], rtol=1e-6)
  assert metrics["alignment"] > 1e-3
  np.testing.assert_allclose(objective, metrics["loss"] + 10 * metrics["alignment"], rtol=1e-6)
  again = run(kinds["sparse"])[1]
  assert abs(again["loss"] - plain[0]) > 1e-3 and again["alignment"] > 1e-3


# --- cost ---------------------------------------------------------------------------------


def test_flops_by_hand():
  config = make_config(OPTIONS, plan=schedule.mixed_retrofit(40, 0.5))
  mean = lambda count: sum(count(t) for t in range(T)) / T
  dense, scores = 2 * 4 * N * H * mean(lambda t: t + 1), 2 * 2 * K * H * mean(lambda t: t + 1) / 8
  selected = 2 * 4 * N * H * mean(lambda t: min(t + 1, 16))
  attention_of = lambda parts: {name: parts[name] for name in parts if name not in ("projections", "unembedding")}
  trunk = attention_of(flops.training(config, schedule.at(config, 0)))
  assert trunk == {"dense": pytest.approx(3 * dense)}
  kinds = {schedule.at(config, i).mode: attention_of(flops.training(config, schedule.at(config, i)))
           for i in range(20, 40)}
  assert kinds["dense"] == {"dense": pytest.approx(3 * dense), "counterpart": pytest.approx(3 * selected),
                            "scores": pytest.approx(scores)}
  assert kinds["sparse"] == {"selected": pytest.approx(3 * selected), "scores": pytest.approx(scores),
                             "counterpart": pytest.approx(3 * dense)}
  assert OPTIONS.reads(config.model, 48) == {"selected": 16, "scores": 3}
  assert (methods.SSA().block_size, methods.SSA().tokens_visible(8192)) == (16, 256)
