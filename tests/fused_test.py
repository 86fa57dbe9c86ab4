"""The one-pass kernel of pallas_kernels/fused.py: against XLA's passes, and where the model puts it.

`TRITON_INTERPRET=1 pytest tests/fused_test.py` runs the kernels' arithmetic on the CPU where torch is installed.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from kernels_cases import kernels_run
import numpy as np
from one_layer import random_params
import pytest

from nsa import config as config_lib, layers, methods, model as model_lib, step as step_lib
from pallas_kernels import fused, spans

ON_GPU = jax.default_backend() == "gpu"


def several_programs(monkeypatch):
  """For a sequence, each with several stretches of tokens."""
  from pallas_kernels.triton import heads
  monkeypatch.setattr(heads, "FORWARD", heads.Walk(8, 4, 2, 4))
  monkeypatch.setattr(heads, "BACKWARD", heads.Walk(16, 3, 2, 4))


def heads_by_xla(y, taps, gain, table, first, eps):
  """What fused.heads computes, step by step."""
  if taps is not None:
    y = layers.short_conv(y, taps, first)  # tokens of a segment have the same first token
  if gain is not None:
    y = layers.rms_norm(y, gain, eps)
  return y if table is None else layers.rope(y, table)


def groups_by_xla(y, taps, gains, table, first, eps, kv_heads, turned, plain):
  """What fused.groups computes."""
  q = y.shape[2] - (turned + plain) * kv_heads
  edges = [0, *range(q, y.shape[2] + 1, kv_heads)]
  return tuple(heads_by_xla(y[:, :, a:b], None if taps is None else taps[:, a:b],
                            None if gains is None or i > turned else gains[i], table if i <= turned else None, first,
                            eps)
               for i, (a, b) in enumerate(zip(edges, edges[1:])))


def gate_by_xla(y):
  gate, up = jnp.split(y, 2, axis=-1)
  return jax.nn.silu(gate) * up


def results_and_gradients(function, arguments, seed=5):
  """Results and gradients for random cotangents; None stays None."""
  out, pull = jax.vjp(function, *arguments)
  rng = np.random.default_rng(seed)
  return out, pull(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), out))


def assert_close(got, want, rtol=2e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("taps, norm, rope",
                         [(3, True, True), (0, True, True), (2, True, False), (4, False, False), (0, False, True)])
@pytest.mark.parametrize("seeds", [0, 2])
def test_heads_are_convolved_normed_and_rotated_in_one_pass(taps, norm, rope, seeds, monkeypatch):
  """Packed rows that no tile divides; `seeds`: as many models with parameters of their own, vmapped."""
  kernels_run()
  several_programs(monkeypatch)
  B, T, N, H = 2, 70, 3, 16
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(seeds,) * bool(seeds) + shape), jnp.float32)
  arguments = draw(B, T, N, H), draw(taps, N, H) if taps else None, draw(H) if norm else None
  table = tuple(map(jnp.asarray, layers.rope_table(T, H, 1e4))) if rope else None
  first, _ = spans.of_segments(jnp.asarray(np.sort(rng.integers(0, 5, (B, T)), axis=1), jnp.int32),
                               spans.positions(T, 0, B))

  def both(function):
    run = lambda *a: results_and_gradients(lambda *a: function(*a, table, first, 1e-5), a)
    return jax.vmap(run)(*arguments) if seeds else run(*arguments)

  assert_close(both(fused.heads), both(heads_by_xla))


@pytest.mark.gpu
@pytest.mark.parametrize("taps, norm, turned, plain", [(3, True, 1, 1), (0, True, 1, 1), (2, False, 1, 1),
                                                       (0, False, 1, 1), (3, True, 1, 0), (3, True, 2, 4)])
@pytest.mark.parametrize("seeds", [0, 2])
def test_several_projections_in_one_pass(taps, norm, turned, plain, seeds, monkeypatch):
  """q, k and v; an index's queries and keys; NSA's seven."""
  kernels_run()
  several_programs(monkeypatch)
  B, T, N, K, H = 2, 70, 3, 2, 16
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(seeds,) * bool(seeds) + shape), jnp.float32)
  heads = N + (turned + plain) * K
  arguments = draw(B, T, heads, H), draw(taps, heads, H) if taps else None, draw(1 + turned, H) if norm else None
  table = tuple(map(jnp.asarray, layers.rope_table(T, H, 1e4)))
  segments = jnp.asarray(np.sort(rng.integers(0, 5, (B, T)), axis=1), jnp.int32)
  first, _ = spans.of_segments(segments, spans.positions(T, 0, B))

  def both(function):
    run = lambda *a: results_and_gradients(lambda *a: function(*a, table, first, 1e-5, K, turned, plain), a)
    return jax.vmap(run)(*arguments) if seeds else run(*arguments)

  assert_close(both(fused.groups), both(groups_by_xla))


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", [0, 2])
def test_norm_and_gate_in_one_pass(seeds):
  kernels_run()
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(seeds,) * bool(seeds) + shape), jnp.float32)

  def both(function, *arguments):
    run = lambda *a: results_and_gradients(function, a)
    return jax.vmap(run)(*arguments) if seeds else run(*arguments)

  normed, more = (draw(2, 64, 300), draw(300)), draw(2, 64, 300)  # the gradient's pass takes 300 in three pieces
  for function, arguments in ((lambda of, x, gain: of(x, None, gain, eps=1e-5), normed),
                              (lambda of, x, gain, more: of(x, more, gain, eps=1e-5), (*normed, more))):
    one, steps = (functools.partial(function, of) for of in (fused.norm, layers.add_and_norm))
    assert_close(both(one, *arguments), both(steps, *arguments))
  gated = draw(2, 35, 48)
  assert_close(both(fused.gate, gated), both(gate_by_xla, gated))


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", [0, 2])
def test_the_loss_and_its_gradient_in_one_pass(monkeypatch, seeds):
  """Rows that no tile divides."""
  kernels_run()
  from pallas_kernels.triton import call, pointwise
  monkeypatch.setattr(pointwise, "LOSS", call.Tiles(32, 1, 4))
  rng = np.random.default_rng(0)
  lead = (seeds,) * bool(seeds)
  logits = jnp.asarray(rng.normal(size=(*lead, 2, 5, 75)) * 9, jnp.float32)
  targets = jnp.asarray(rng.integers(0, 75, (*lead, 2, 5)), jnp.int32)
  shares = jnp.asarray(rng.normal(size=(*lead, 2, 5)), jnp.float32)

  def both(function):
    run = lambda *arguments: function(*arguments, jnp.float32)
    return jax.vmap(run)(logits, targets, shares) if seeds else run(logits, targets, shares)

  assert_close(both(fused.nll), both(step_lib._nll_and_gradient))


@pytest.mark.parametrize("method", [methods.MSA(block_size=8, num_blocks=2, index_dim=16),
                                    methods.NSA(block_size=8, num_blocks=4, compress_len=8, compress_stride=4,
                                                window=8)],
                         ids=lambda method: method.name)
def test_a_model_puts_the_pass_where_its_steps_were(monkeypatch, method):
  """The same losses and gradients through fused.heads, whose place XLA's steps take here."""
  called = []

  def serve(name, function):
    def run(*arguments, **options):
      called.append(name)
      return function(*arguments, **options)
    monkeypatch.setattr(fused, name, run)

  for name, twin in dict(heads=heads_by_xla, groups=groups_by_xla, norm=layers.add_and_norm, gate=gate_by_xla).items():
    serve(name, twin)
  config = config_lib.Config(attention=method, one_pass=True, model=config_lib.ModelConfig(
      vocab_size=264, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=32, short_conv=3))
  params = random_params(model_lib.abstract_params(config))  # no gain or tap is 1 or 0
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 256, (2, 32)), jnp.int32)
  segments = jnp.asarray(np.arange(32) >= np.array([[0], [16]]), jnp.int32)

  def loss(params):
    out = model_lib.forward(config, params, tokens, segments)
    return jnp.mean(jax.nn.logsumexp(out.logits, -1) - out.logits[..., 0]) + sum(out.losses.values())

  exact = jax.default_matmul_precision("float32")  # products of q, k and v alone and together may round differently
  want = jax.jit(exact(jax.value_and_grad(loss)))(params)
  assert not called
  monkeypatch.setattr(fused, "serves", lambda x: True)
  got = jax.jit(exact(lambda params: jax.value_and_grad(loss)(params)))(params)
  assert {"groups", "norm", "gate"} <= set(called)
  assert_close(got, want, rtol=1e-4)
  called.clear()
  jax.eval_shape(
      lambda p: model_lib.forward(dataclasses.replace(config, one_pass=False), p, tokens, segments).logits, params)
  assert not called


def test_kernels_serve_half_precision_on_one_gpu_alone():
  x = jax.ShapeDtypeStruct((1, 2, 3), jnp.bfloat16)
  assert fused.serves(x) == ON_GPU
  assert not fused.serves(jax.ShapeDtypeStruct((1, 2, 3), jnp.float32))
