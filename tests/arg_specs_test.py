"""The shapes and selections that tests and benchmarks share are what they say."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import arg_specs


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
