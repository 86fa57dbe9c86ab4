"""DSA's lightning scores and the KL that trains them by Triton: in the interpreter, and `gpu` tests.

Run as triton_test.py says, with the shapes and tolerances of triton_selections_test.py.
"""
import functools

import jax
import jax.numpy as jnp
import kernels_cases as cases
from kernels_cases import on_cpu, on_host, situations
import numpy as np
import pytest

from pallas_kernels import reference

pytest.importorskip("triton", reason="triton is not installed")
from triton_selections_test import KL_ON_DEVICE, KL_SMALL  # noqa: E402
from triton_test import TINY, interprets, needs_gpu  # noqa: E402

from pallas_kernels.triton import call, lightning, tuning  # noqa: E402


def draw_lightning(s, situation, per_group, warmup):
  """(q_idx, index_weights, k_idx), what `lightning_kl` takes beside them, and a cotangent."""
  inputs = cases.draw("index_kl", s, situation, always=False)
  rng, dtype, R, heads = np.random.default_rng(1), jnp.dtype(s.dtype), s.K if per_group else 1, 3
  rest = dict(inputs.rest)
  rest["block_indices"] = None if warmup else rest["block_indices"][:, :, :R]
  where = {name: rest[name] for name in ("segment_ids", "query_offset")}
  with on_cpu():
    q, k = cases.up(on_host((rest["q"], rest["k"])))
    if warmup:
      _, lse = reference.attention(q, k, k, **on_host(where))
    else:
      lists_ = jnp.broadcast_to(np.asarray(rest["block_indices"]), (s.B, s.T, s.K, s.J))
      _, lse = reference.selected_attention(q, k, k, lists_, block_size=s.block_size, **on_host(where))
  rest["lse"] = jnp.asarray(np.asarray(lse))
  index = (jnp.asarray(rng.normal(size=(s.B, s.T, R, heads, s.index_dim)), dtype),
           jnp.asarray(rng.normal(size=(s.B, s.T, R, heads)) / s.index_dim ** 0.5, dtype), inputs.arrays[1])
  return index, rest, inputs.cotangents[:, :, :R]


def of_lightning(f):
  return lambda *index, q, k, lse, block_indices, **rest: f(q, k, lse, *index, block_indices, **rest)


def check_lightning(s, situation, per_group, warmup, *, exact, rounded):
  """Scores by block, and the KL with its gradients, against the reference in float32."""
  index, rest, dloss = draw_lightning(s, situation, per_group, warmup)
  where = {name: rest[name] for name in ("segment_ids", "query_offset")}
  scores = lambda f, *index, **where: f(*index, block_size=s.block_size, **where)
  got = jax.jit(functools.partial(scores, lightning.lightning_scores, **where))(*index)
  with on_cpu():
    want = scores(reference.lightning_scores, *cases.up(on_host(index)), **on_host(where))
  np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  compare_lightning_kl(s, index, rest, dloss, block_size=s.block_size, empty=situation == "all_empty",
                       small=situation in ("all_empty", "crumbs"), exact=exact, rounded=rounded)


def compare_lightning_kl(s, index, rest, dloss, *, block_size, empty, small, exact, rounded):
  """The KL with its gradients. empty: nothing is chosen anywhere; small: the loss may be below 0.01."""
  def both(f, index, rest, dloss):
    loss, pull = jax.vjp(functools.partial(of_lightning(f), **rest, block_size=block_size, scale=s.H ** -0.5), *index)
    return loss, *pull(dloss)

  got = jax.jit(lambda index, dloss: both(lightning.lightning_kl, index, rest, dloss))(index, dloss)
  with on_cpu():
    want = both(reference.lightning_kl, *cases.up(on_host((index, rest, dloss))))
  assert np.abs(want[0]).max() > 0.01 or small
  for what, x, y in zip(("loss", "dq_idx", "dweights", "dk_idx"), got, want, strict=True):
    assert x.dtype == (jnp.float32 if what == "loss" else jnp.dtype(s.dtype)), what
    error, size = np.linalg.norm(np.float64(x) - np.float64(y)), np.linalg.norm(np.float64(y))
    bar = exact if what == "loss" or s.dtype == "float32" else rounded
    assert error <= bar * size, (what, error, bar, size)
    assert size > 0 or empty, what


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ds_bytes", [2 ** 30, 2 ** 17])
@pytest.mark.parametrize("situation", situations("index_kl"))
@pytest.mark.parametrize("per_group, warmup", [(False, False), (True, False), (False, True)])
def test_lightning_on_device(situation, per_group, warmup, ds_bytes, monkeypatch):
  monkeypatch.setattr(lightning, "DS_BYTES", ds_bytes)
  # the gradient of a score is rounded to bfloat16, then that of a head's, then the sum
  check_lightning(KL_ON_DEVICE(), situation, per_group, warmup, exact=1e-5, rounded=5e-3)


@pytest.mark.gpu
@needs_gpu
def test_lightning_of_few_queries_on_device():
  check_lightning(KL_ON_DEVICE(T=1, S=3000), cases.Situation(offset=(0.2, 1)), False, True, exact=1e-5, rounded=5e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("warmup", [False, True])
def test_lightning_same_bits_over_20_runs(warmup):
  s = KL_ON_DEVICE(T=1000, S=1000)
  index, rest, dloss = draw_lightning(s, "segments", False, warmup)
  f = functools.partial(of_lightning(lightning.lightning_kl), **rest, block_size=32, scale=0.125)
  run = jax.jit(lambda index: (lambda loss, pull: (loss, *pull(dloss)))(*jax.vjp(f, *index)))
  cases.same_bits(run, index)


def test_lightning_refuses_sets_of_each_head_for_one_index_set():
  s = KL_ON_DEVICE()
  of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  reason = lambda R, sets, heads=4, size=32: lightning.supports_lightning_kl(
      q=of(s.B, s.T, s.N, s.H), k=of(s.B, s.S, s.K, s.H), q_idx=of(s.B, s.T, R, heads, 64), scale=0.1, block_size=size,
      index_weights=of(s.B, s.T, R, heads), k_idx=of(s.B, s.S, 64),
      block_indices=of(s.B, s.T, sets, 4, dtype=jnp.int32))
  if call.unavailable() is None:
    assert reason(1, 1) is None and reason(s.K, s.K) is None
    assert "a set for each KV head" in reason(1, s.K) and "block_size = 1:" in reason(1, 1, size=1)


@interprets
@pytest.mark.parametrize("situation, per_group, warmup, ds_bytes", [
    *((name, False, False, 2 ** 30) for name in situations("index_kl")), ("segments", False, True, 2 ** 30),
    ("random", True, True, 2 ** 13), ("segments", True, False, 2 ** 13), ("past_the_keys", False, True, 2 ** 13),
    ("crumbs", False, True, 2 ** 13)])
def test_interpreted_lightning(situation, per_group, warmup, ds_bytes, monkeypatch):
  monkeypatch.setattr(lightning, "DS_BYTES", ds_bytes)
  with tuning.override("lightning", TINY._replace(block=32 if warmup else TINY.block)):
    check_lightning(KL_SMALL(S=60), situation, per_group, warmup, rounded=0,
                    exact=2.0 ** -16 if situation == "huge_logits" else 5e-6)


@interprets
def test_interpreted_lightning_of_few_queries():
  """Programs that share the keys of a tile, some of which have none."""
  with tuning.override("lightning", TINY):
    check_lightning(KL_SMALL(T=3, S=230), cases.Situation(offset=(0.2, 1)), False, True, rounded=0, exact=5e-6)
