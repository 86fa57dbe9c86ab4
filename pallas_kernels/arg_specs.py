"""The named shapes that tests, tuning and benchmarks share, and the inputs that go with them.

A measured number belongs to a name from here, and to an index pattern:

* `uniform`: every query draws its own blocks. Neighbours share next to nothing, the worst case.
* `stripes`: a sink, the local blocks and columns that stay hot for long, as maps of trained models show.
* `neighbours`: tokens of a tile have a given share of their free picks in common, all else uniform.

The patterns are NumPy, deterministic in the seed, and take about a second at 65,536 tokens.
"""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """One shape of every operation: self-attention over T tokens from position 0."""
  name: str
  B: int                   # sequences
  T: int                   # tokens per sequence, queries and keys
  N: int                   # query heads
  K: int                   # KV heads
  H: int                   # head dim
  block_size: int          # tokens per selection block
  J: int                   # selected blocks per (query, KV head), the forced ones included
  dtype: str = "bfloat16"  # of q, k, v
  window: int = 512        # tokens of the sliding window
  block_len: int = 32      # tokens per compressed block
  block_stride: int = 16   # tokens between the starts of compressed blocks
  index_dim: int = 64      # Hi, head dim of the index branch
  num_initial: int = 1     # forced blocks at the start
  num_local: int = 2       # forced blocks at the query, its own included

  @property
  def G(self) -> int:
    """Query heads per KV head."""
    return self.N // self.K

  @property
  def num_blocks(self) -> int:
    """Selection blocks in the sequence (not the J selected ones)."""
    return -(-self.T // self.block_size)

  @property
  def num_compressed(self) -> int:
    """C, complete compressed blocks."""
    return max(0, (self.T - self.block_len) // self.block_stride + 1)


def _tiny(name, **fields):
  small = dict(B=2, T=64, N=4, K=2, H=16, block_size=16, J=3, dtype="float32", window=24, block_len=8,
               block_stride=4, index_dim=8)
  return AttentionSpec(name=name, **{**small, **fields})


def _study(name, **fields):
  return AttentionSpec(name=name, **{**dict(N=8, K=2, H=64, block_size=32), **fields})


def _headline(name, **fields):
  large = dict(B=1, T=32768, H=128, block_size=64, J=16, index_dim=128)
  return AttentionSpec(name=name, **{**large, **fields})


# For tests on any machine. Ragged: the last block is partial.
TINY = (
    _tiny("tiny_g2"),
    _tiny("tiny_g1", N=2, T=80),
    _tiny("tiny_g4_ragged", N=4, K=1, T=77, block_size=8, J=5),
    _tiny("tiny_g16", N=16, K=1, B=1, T=48),
    _tiny("tiny_all_blocks", T=48, J=8, num_local=1),
    _tiny("tiny_bf16", dtype="bfloat16"),
)

# What the studies train.
STUDY = (
    _study("study_4k_j8", B=32, T=4096, J=8),
    _study("study_4k_j16", B=32, T=4096, J=16),
    _study("study_8k_j8", B=16, T=8192, J=8),
    _study("study_8k_j16", B=16, T=8192, J=16),
    _study("study_16k_j8", B=8, T=16384, J=8),
    _study("study_16k_j16", B=8, T=16384, J=16),
)

# What other kernels publish: four group sizes at one length.
HEADLINE = (
    _headline("headline_g16", N=64, K=4),
    _headline("headline_g8", N=64, K=8),
    _headline("headline_g4", N=32, K=8),
    _headline("headline_g1", N=16, K=16),
)

# One head layout over the length of the sequence.
LENGTHS = (
    _headline("length_8k", N=64, K=4, T=8192),
    _headline("length_16k", N=64, K=4, T=16384),
    _headline("length_64k", N=64, K=4, T=65536),
)

# MSA's geometry over the length of the sequence.
MSA = tuple(_headline(f"msa_{T // 1024}k", N=64, K=4, T=T, block_size=128, num_initial=0, num_local=1)
            for T in (8192, 16384, 32768, 65536))

# Heads of checkpoints that people retrofit: groups that are no power of two, and other head dims.
CHECKPOINTS = (
    _headline("smollm2_8k", B=4, T=8192, N=9, K=3, H=64, index_dim=64),  # SmolLM2-135M; 360M has 15/5
    _headline("llama32_8k", T=8192, N=24, K=8),    # Llama-3.2-3B
    _headline("llama32_32k", N=24, K=8),
    _headline("qwen25_8k", T=8192, N=28, K=4),     # Qwen2.5-7B
    _headline("qwen25_32k", N=28, K=4),
    _headline("qwen25_14b_32k", N=40, K=8),        # a group of 5
    _headline("qwen25_1b_32k", N=12, K=2),         # a group of 6
    _headline("h96_32k", N=32, K=8, H=96),
    _headline("h256_16k", T=16384, N=16, K=4, H=256),
)

# Long caches to decode from; nothing else is run at these lengths.
CACHES = (
    _headline("cache_256k", N=64, K=4, T=262144),
    _headline("cache_1m", N=64, K=4, T=1048576),
)

ALL = {spec.name: spec for spec in TINY + STUDY + HEADLINE + LENGTHS + MSA + CHECKPOINTS + CACHES}


def get(name: str) -> AttentionSpec:
  """The spec of that name. Raises ValueError with the known names."""
  if name not in ALL:
    raise ValueError(f"spec {name!r} is unknown: take one of {', '.join(ALL)}")
  return ALL[name]


def arrays(spec: AttentionSpec, seed: int = 0) -> dict[str, jax.Array]:
  """Standard normal inputs in spec.dtype: q, k, v, do, and q_idx, k_idx, k_cmp, v_cmp of the selectors."""
  s = spec
  shapes = dict(q=(s.B, s.T, s.N, s.H), k=(s.B, s.T, s.K, s.H), v=(s.B, s.T, s.K, s.H),
                do=(s.B, s.T, s.N, s.H), q_idx=(s.B, s.T, s.K, s.index_dim), k_idx=(s.B, s.T, s.index_dim),
                k_cmp=(s.B, s.num_compressed, s.K, s.H), v_cmp=(s.B, s.num_compressed, s.K, s.H))
  # One draw for all: each shape of a random draw is compiled on its own.
  sizes = [int(np.prod(shape)) for shape in shapes.values()]
  flat = jax.random.normal(jax.random.key(seed), (sum(sizes),), jnp.dtype(s.dtype))
  starts = np.cumsum([0] + sizes)
  return {name: flat[start:start + size].reshape(shapes[name])
          for name, start, size in zip(shapes, starts, sizes)}


# --- patterns of block indices ------------------------------------------------


def uniform(spec: AttentionSpec, seed: int = 0) -> np.ndarray:
  """int32[B, T, K, J]: the forced blocks, the rest drawn uniformly from the other visible ones."""
  rng = np.random.default_rng(seed)
  own, forced = _forced(spec)
  free = _draw(rng, _num_free(spec, own), spec.J - forced.shape[-1])
  return _assemble(spec, forced, free + spec.num_initial)


def stripes(spec: AttentionSpec, seed: int = 0, *, density: float = 0.1, noise: float = 0.1) -> np.ndarray:
  """int32[B, T, K, J]: the forced blocks, hot columns per KV head, and a few blocks drawn uniformly.

  Args:
    density: share of the blocks that are hot columns of a (sequence, KV head). A query takes the hottest
      visible ones; all tokens of a block take the same.
    noise: share of the free slots that every query draws for itself.
  """
  rng = np.random.default_rng(seed)
  own, forced = _forced(spec)
  free = spec.J - forced.shape[-1]
  fresh = round(noise * free)
  shape = (spec.B, spec.num_blocks, spec.K, spec.num_blocks)  # sequence, own block, KV head, column
  heat = rng.random((spec.B, 1, spec.K, spec.num_blocks), np.float32)
  column = np.arange(spec.num_blocks)
  last = np.arange(spec.num_blocks)[None, :, None, None] - spec.num_local
  visible = (column >= spec.num_initial) & (column <= last) & (heat < density)
  heat = np.broadcast_to(np.where(visible, heat, 2.0), shape)
  hot = np.argsort(heat, axis=-1, kind="stable")[..., :free - fresh]
  hot = np.where(np.take_along_axis(heat, hot, axis=-1) < 1.0, hot, -1)
  hot = np.pad(hot, [(0, 0)] * 3 + [(0, free - fresh - hot.shape[-1])], constant_values=-1)
  hot = np.take(hot, np.arange(spec.T) // spec.block_size, axis=1)
  return _assemble(spec, forced, np.concatenate([hot, _draw_beside(rng, spec, own, hot, fresh)], axis=-1))


def neighbours(spec: AttentionSpec, share: float, seed: int = 0, *, tile: int = 64) -> np.ndarray:
  """int32[B, T, K, J]: the forced blocks, round(share * free) picks common to each tile of tokens, the rest
  drawn uniformly by each query from the blocks that are left."""
  if not 0 <= share <= 1:
    raise ValueError(f"share = {share}: take a share between 0 and 1")
  rng = np.random.default_rng(seed)
  own, forced = _forced(spec)
  free = spec.J - forced.shape[-1]
  common = round(share * free)
  starts = np.arange(0, spec.T, tile)
  first = np.broadcast_to((starts // spec.block_size)[None, :, None], (spec.B, len(starts), spec.K))
  picks = _draw(rng, _num_free(spec, first), common) + spec.num_initial
  picks = np.repeat(picks, tile, axis=1)[:, :spec.T]
  picks = np.where(picks >= spec.num_initial, picks, -1)
  fresh = _draw_beside(rng, spec, own, picks, free - common)
  return _assemble(spec, forced, np.concatenate([picks, fresh], axis=-1))


def _forced(spec):
  """Own block [B, T, K] of each query, and its forced blocks [B, T, K, num_initial + num_local], -1 pads."""
  if spec.num_initial + spec.num_local > spec.J:
    raise ValueError(f"spec {spec.name}: num_initial + num_local = {spec.num_initial} + {spec.num_local} "
                     f"exceed J = {spec.J}")
  own = np.broadcast_to((np.arange(spec.T) // spec.block_size)[None, :, None], (spec.B, spec.T, spec.K))
  initial = np.arange(spec.num_initial)
  local = own[..., None] - np.arange(spec.num_local)
  initial = np.where(initial <= own[..., None], initial, -1)
  local = np.where(local >= spec.num_initial, local, -1)
  return own, np.concatenate([initial, local], axis=-1)


def _num_free(spec, own):
  """Visible blocks that are not forced: the blocks num_initial .. own - num_local."""
  return np.maximum(own - spec.num_local + 1 - spec.num_initial, 0)


def _draw(rng, n, m):
  """m distinct numbers of range(n) for each n, uniform over subsets; if n < m all, then very negative.

  Floyd's algorithm, a row at a time in all rows at once: step i draws from range(n - m + i + 1) and takes the
  largest of that range where the draw was already there.
  """
  out = np.full(n.shape + (m,), -2**30, np.int64)
  for i in range(m):
    top = n - m + i
    pick = (rng.random(n.shape) * np.maximum(top + 1, 1)).astype(np.int64)
    taken = (out[..., :i] == pick[..., None]).any(axis=-1)
    out[..., i] = np.where(top < 0, -2**30, np.where(taken, top, pick))
  return out


def _draw_beside(rng, spec, own, picks, m):
  """m more free blocks per query, none of them in `picks` [B, T, K, any] (-1 pads)."""
  taken = np.sort(np.where(picks < 0, 2**30, picks - spec.num_initial), axis=-1)
  ranks = _draw(rng, np.maximum(_num_free(spec, own) - (picks >= 0).sum(axis=-1), 0), m)
  for i in range(taken.shape[-1]):  # a rank among the blocks that are left becomes a block
    ranks += (ranks >= taken[..., i:i + 1]).astype(np.int64)
  return ranks + spec.num_initial


def _assemble(spec, forced, free):
  indices = np.concatenate([forced, free], axis=-1)
  assert indices.shape == (spec.B, spec.T, spec.K, spec.J)
  return np.where(indices < 0, -1, indices).astype(np.int32)
