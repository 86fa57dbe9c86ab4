"""Gradients that are written by hand or by another route than JAX would take, and rotary tables."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import config as config_lib, layers, model as model_lib, sharding, step as step_lib


@pytest.mark.parametrize("vocab", [48, layers._ONE_HOT_ROWS + 1], ids=["product", "scatter"])
def test_the_embedding_is_a_look_up_whose_gradient_is_summed_in_float32(vocab):
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(np.minimum(rng.zipf(1.3, (4, 512)) - 1, vocab - 1))  # a few rows get most of the sum
  table = jnp.asarray(rng.normal(size=(vocab, 8)), jnp.bfloat16)
  do = jnp.asarray(rng.normal(size=(4, 512, 8)), jnp.bfloat16)
  out, pull = jax.vjp(lambda t: layers.look_up(t, tokens), table)
  np.testing.assert_array_equal(out, table[tokens])
  want = np.zeros((vocab, 8))
  np.add.at(want, np.asarray(tokens), np.asarray(do, np.float64))
  got = np.asarray(pull(do)[0], np.float64)
  np.testing.assert_allclose(got, want, rtol=2 ** -8, atol=1e-4)  # one rounding to bfloat16, at the end
  by_jax = np.asarray(jax.vjp(lambda t: t[tokens], table)[1](do)[0], np.float64)
  assert np.abs(got - want).max() < np.abs(by_jax - want).max() / 4  # which adds up in bfloat16


def test_the_targets_loss_and_its_gradient_are_those_of_log_softmax():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(2, 16, 64)) * 5, jnp.float32)
  targets = jnp.asarray(rng.integers(0, 64, (2, 16)))
  plain = lambda x: -jnp.take_along_axis(jax.nn.log_softmax(x), targets[..., None], axis=-1)[..., 0]
  weight = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
  ours, theirs = (jax.value_and_grad(lambda x, f=f: jnp.sum(f(x) * weight))(logits)
                  for f in (lambda x: step_lib.target_nll(x, targets), plain))
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_chunks_of_logits_has_the_gradient_of_all_at_once(monkeypatch, tied):
  """Float32 to rounding. In bfloat16 the gradient of logits is rounded as well, which costs a fifth at most."""
  config = config_lib.Config(model=config_lib.ModelConfig(vocab_size=96, d_model=16, tie_embeddings=tied))
  name, shape = ("embed", (96, 16)) if tied else ("head", (16, 96))
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  rng = np.random.default_rng(2)
  matrix = jnp.asarray(rng.normal(size=shape), jnp.float32)
  hidden = jnp.asarray(rng.normal(size=(2, 24, 16)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 96, (2, 24)), jnp.int32)
  weights = jnp.asarray(rng.integers(0, 3, (2, 24)), jnp.float32)

  def run(dtype, numbers):
    monkeypatch.setattr(step_lib, "MAX_LOGITS", numbers)

    def loss(matrix, hidden):
      hidden = hidden.astype(dtype)
      out = model_lib.Output(model_lib.unembed(config, {name: matrix}, hidden), {}, [], None, hidden)
      mean, nll = step_lib.mean_nll(config, {name: matrix}, out, targets, weights, mesh)
      return 2 * mean, nll

    with jax.default_matmul_precision("float32"):
      return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(matrix, hidden)

  want = run(jnp.float32, 2 ** 20)
  close = lambda a, b, tolerance: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
  jax.tree.map(lambda a, b: close(a, b, 2e-6), run(jnp.float32, 600), want)
  error = lambda got: [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(got[1], want[1])]
  ours, jaxs = error(run(jnp.bfloat16, 600)), error(run(jnp.bfloat16, 2 ** 20))
  assert all(a < 1.2 * b < 0.01 for a, b in zip(ours, jaxs)), (ours, jaxs)


def test_yarn_lowers_slow_waves_and_lengthens_the_rest_of_the_vector():
  """Against scalar arithmetic: base 100, 16 dimensions, 4 times 32 tokens; wave 0 stays, from 3 on all are divided."""
  scaling = config_lib.RopeScaling("yarn", factor=4.0, context=32, low_frequency=1.0, high_frequency=32.0)
  cos, sin = layers.rope_table(7, 16, 100.0, 3, scaling)
  for wave in range(8):
    # The wave that turns once in 32 tokens is 16 ln(32 / 2 pi) / 2 ln 100 = 2.83, up to 3; 32 turns: below 0.
    divided = min(wave / 3, 1.0)
    frequency = 100.0 ** (-wave / 8) * (divided / 4 + 1 - divided)
    for position in range(7):
      size = 0.1 * math.log(4) + 1
      assert math.isclose(cos[position, wave], size * math.cos(3 * position * frequency), abs_tol=1e-6)
      assert math.isclose(sin[position, wave], size * math.sin(3 * position * frequency), abs_tol=1e-6)
  plain, _ = layers.rope_table(7, 16, 100.0, 3, dataclasses.replace(scaling, attention_factor=1.0))
  np.testing.assert_allclose(plain * (0.1 * math.log(4) + 1), cos, rtol=1e-6)


@pytest.mark.parametrize("length", [20, 32, 33, 80])
def test_dynamic_and_longrope_go_by_the_length(length):
  """Against scalar arithmetic: base 100, 16 dimensions, trained with 32 tokens; every third position of the row."""
  dynamic = config_lib.RopeScaling("dynamic", factor=2.0, context=32)
  short, far = tuple(1 + wave / 10 for wave in range(8)), tuple(1.0 + wave for wave in range(8))
  longrope = config_lib.RopeScaling("longrope", factor=4.0, context=32, short_factors=short, long_factors=far)
  base = 100.0 * (2.0 * max(length, 32) / 32 - 1) ** (16 / 14)
  size = math.sqrt(1 + math.log(4) / math.log(32))
  for scaling, factor, frequencies in (
      (dynamic, 1.0, [base ** (-wave / 8) for wave in range(8)]),
      (longrope, size, [100.0 ** (-wave / 8) / (far if length > 32 else short)[wave] for wave in range(8)])):
    cos, sin = layers.rope_table(7, 16, 100.0, 3, scaling, length)
    for wave, frequency in enumerate(frequencies):
      for position in range(7):
        assert math.isclose(cos[position, wave], factor * math.cos(3 * position * frequency), abs_tol=1e-6)
        assert math.isclose(sin[position, wave], factor * math.sin(3 * position * frequency), abs_tol=1e-6)
