"""Tests of the diagnostics in nsa/methods/blocks.py against a slow computation."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import methods
from nsa.methods import blocks
import pallas_kernels as pk


def random_case(segments=None):
  rng = np.random.default_rng(2)
  q, k = rng.standard_normal((2, 40, 4, 4)), rng.standard_normal((2, 40, 2, 4))
  return q.astype(np.float32), k.astype(np.float32), segments


def slow_attention(q, k, segments):
  """Dense attention probabilities [B, N, T, S] in float64."""
  B, S, N = q.shape[0], k.shape[1], q.shape[2]
  p = np.zeros((B, N, S, S))
  for b, n, t in np.ndindex(B, N, S):
    seen = [s for s in range(t + 1) if segments is None or segments[b][s] == segments[b][t]]
    e = np.exp(k[b, seen, n // 2].astype(np.float64) @ q[b, t, n] / 2)
    p[b, n, t, seen] = e / e.sum()
  return p


def diagnosed(q, k, indices, options, call=None, **how):
  run = jax.jit(lambda *arrays: blocks.diagnostics(*arrays, call or methods.Call(), options, **how))
  return jax.device_get(run(q, k, indices))


@pytest.mark.parametrize("segmented", [False, True])
def test_diagnostics_equal_a_slow_computation(segmented):
  segments = np.repeat([[0, 1], [2, 3]], [16, 24], axis=1).astype(np.int32) if segmented else None
  q, k, _ = random_case()
  options = methods.BlockTopK(block_size=4, num_blocks=3)
  call = methods.Call(segment_ids=segments, key=jax.random.key(0))
  indices = np.asarray(methods.RandomBlocks(**options.geometry).choose(q, k, call))
  got = diagnosed(q, k, indices, options, call, tile_rows=12)  # 6 queries; the last tile has 4
  p = slow_attention(q, k, segments)
  names = ("captured_mass", "oracle_mass", "block_recall", "score_recall", "entropy", "overlap", "tile_union",
           "tile_common")
  sums, limited = {name: np.zeros(2) for name in names}, 0
  begins = lambda b, t: 0 if segments is None else int(np.argmax(segments[b] == segments[b][t])) // 4
  for b, t in np.ndindex(2, 40):
    first = begins(b, t)
    visible = range(first, t // 4 + 1)
    if len(visible) <= 3:
      continue
    limited += 1
    for r in range(2):
      heads = p[b, 2 * r:2 * r + 2, t]
      mass = {j: heads[:, 4 * j:4 * j + 4].sum(-1).mean() for j in visible}
      chosen = set(indices[b, t, r].tolist())
      best = set(sorted(mass, key=mass.get)[-3:])
      after = set(indices[b, t + 1, r].tolist()) if t < 39 else None
      before = set(indices[b, t - 1, r].tolist())
      shared = len(chosen & after) / 3 if after else len(before & chosen) / 3  # the last query has no next
      tile = range(t // 6 * 6, min(t // 6 * 6 + 6, 40))
      picks = [j for u in tile for j in indices[b, u, r].tolist() if begins(b, u) <= j <= u // 4]
      common = [j for j in picks if picks.count(j) >= 2]  # a third of 6
      values = (sum(mass[j] for j in chosen), sum(mass[j] for j in best), len(best & chosen) / 3,
                sum(mass[j] for j in best & chosen), -(heads * np.log(np.where(heads > 0, heads, 1))).sum(-1).mean(),
                shared, len(set(picks)) * len(tile) / len(picks), len(common) / len(picks))
      for name, value in zip(names, values):
        sums[name][r] += value
  np.testing.assert_allclose(got["queries_limited"], limited / 80, rtol=1e-6)
  for name in names:
    np.testing.assert_allclose(got[name], sums[name] / limited, rtol=1e-4, err_msg=name)
  assert (got["captured_mass"] <= got["oracle_mass"]).all()
  for r, i, j in np.ndindex(2, 10, 10):
    share = np.mean([j in indices[0, t, r] for t in range(4 * i, 4 * i + 4)])
    np.testing.assert_allclose(got["heat"][r, i, j], share, atol=1e-6)


def test_an_oracle_without_forced_blocks_captures_the_oracle_mass():
  q, k, _ = random_case()
  options = methods.Oracle(block_size=4, num_blocks=3)
  mass, _ = jax.jit(lambda q, k: pk.block_mass(q, k, pk.attention(q, k, k)[1], block_size=4))(q, k)
  free = pk.block_top_k(mass, block_size=4, num_blocks=3, num_initial=0, num_local=0)
  got = diagnosed(q, k, free, options)
  np.testing.assert_allclose(got["captured_mass"], got["oracle_mass"], rtol=1e-6)
  np.testing.assert_allclose(got["block_recall"], 1.0, rtol=1e-6)
  np.testing.assert_allclose(got["score_recall"], got["oracle_mass"], rtol=1e-6)
  forced = jax.jit(lambda q, k: options.choose(q, k, methods.Call()))(q, k)
  assert (diagnosed(q, k, forced, options)["captured_mass"] <= got["oracle_mass"] + 1e-6).all()


def test_rows_that_fill_up_a_batch_do_not_count():
  q, k, _ = random_case()
  options = methods.BlockTopK(block_size=4, num_blocks=3)
  indices = jax.jit(lambda q, k: options.choose(q, k, methods.Call()))(q, k)
  alone = diagnosed(q[:1], k[:1], indices[:1], options)
  both = diagnosed(q, k, indices, options, rows=jnp.array([1.0, 0.0]))
  for name, value in alone.items():
    np.testing.assert_allclose(both[name], value, rtol=1e-5, err_msg=name)
