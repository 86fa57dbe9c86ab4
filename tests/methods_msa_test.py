"""Tests of what nsa/methods/msa.py adds to the paper: a warm-up's loss by how far queries look."""
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from nsa import config as config_lib, methods

B, T, N, BLOCK, J = 2, 40, 4, 4, 4
PACKED = np.searchsorted((17, T), np.arange(T), side="right") * np.ones((B, 1), int)  # not on the block grid


def options(share):
  return methods.MSA(block_size=BLOCK, num_blocks=J, index_dim=6, far_share=share)


def make(share):
  return one_layer.split(one_layer.make_config(options(share), heads=N))


def loss_of(share, params, h, segments):
  layer = nnx.merge(make(share)[0], params)
  return layer(h, one_layer.call(T, segments, "warmup"), None, None)[1]["index_kl"]


def seen_and_far(segments):
  """(bool[B, T, S] what a query sees, bool[B, T, S] what of it is neither in its first block nor in the last J - 1)."""
  t, s = np.arange(T)[:, None], np.arange(T)
  seen = (s <= t) & (segments[:, :, None] == segments[:, None])
  first = jnp.argmax(seen, -1)[..., None] // BLOCK
  return seen, seen & (s // BLOCK != first) & (s // BLOCK <= t // BLOCK - (J - 1))


def reference(share, params, h, segments):
  """(1 - a) mean KL + a sum(w KL) / sum(w), written out."""
  layer = nnx.merge(make(share)[0], params)
  call = one_layer.call(T, segments, "warmup")
  x, streams = layer.project(h, call)
  q_idx, k_idx = layer.method.index(x, streams, call), streams["k_idx"]
  seen, far = seen_and_far(segments)
  K = streams["k"].shape[2]
  q = x.q.reshape(B, T, K, N // K, -1)
  scores = jnp.einsum("btkgh,bskh->btkgs", q, streams["k"]) * q.shape[-1] ** -0.5
  p = jax.nn.softmax(jnp.where(seen[:, :, None, None], scores, -jnp.inf), -1).mean(3)
  p = jax.lax.stop_gradient(p)
  student = jnp.einsum("btkh,bsh->btks", q_idx, k_idx) * q_idx.shape[-1] ** -0.5
  logs = jax.nn.log_softmax(jnp.where(seen[:, :, None], student, -1e30), -1)
  kl = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1.0)) - logs), 0.0), -1)
  w = jnp.sum(jnp.where(far[:, :, None], p, 0.0), -1)
  return (1 - share) * kl.mean() + share * jnp.sum(w * kl) / jnp.sum(w)


@functools.cache
def both(share):
  """jit: (params, h, segments) -> (loss, gradients) of the layer, and of the formula."""
  return jax.jit(lambda *inputs: [jax.value_and_grad(functools.partial(f, share))(*inputs)
                                  for f in (loss_of, reference)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(share, packed):
  segments = np.asarray(PACKED if packed else 0 * PACKED, np.int32)
  params, h = make(share)[1], np.random.default_rng(2).standard_normal((B, T, one_layer.D)).astype(np.float32)
  (got, grads), (want, slow) = both(share)(params, h, segments)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  selector = lambda tree: tree["method"]["selector"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), selector(grads), selector(slow))
  assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(selector(grads)))
  if share:  # the share matters
    assert abs(got - both(0.0)(params, h, segments)[0][0]) > 1e-3 * got


def test_where_no_query_looks_far_the_weighted_part_is_zero_and_not_nan():
  few = dataclasses.replace(options(1.0), num_blocks=T // BLOCK + 1)
  graph, params = one_layer.split(one_layer.make_config(few, heads=N))
  h = np.ones((B, T, one_layer.D), np.float32)
  loss = lambda p: nnx.merge(graph, p)(h, one_layer.call(T, None, "warmup"), None, None)[1]["index_kl"]
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert value == 0 and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_the_share_costs_a_pass_over_the_scores_of_a_warm_up_and_is_a_share():
  config = one_layer.make_config(options(0.5), heads=N)
  plain = dataclasses.replace(config, attention=options(0.0))
  cost = lambda one, mode: one.attention.loss_costs(one.model, T, mode)
  assert set(cost(config, "warmup")) - set(cost(plain, "warmup")) == {"far"}
  assert cost(config, "warmup")["far"].flops == 2 * N * one_layer.H * (T + 1) / 2
  assert cost(config, "sparse") == cost(plain, "sparse")
  config.attention.far_share = 1.5
  with pytest.raises(config_lib.ConfigError, match=r"far_share = 1\.5.*0 to 1"):
    config_lib.validate(config)
