"""What a query sees is one run of keys: causality, a window, segments and compressed blocks all say where it
begins and where it ends. Kernels get two numbers per query, and per tile of queries the key tiles it needs.

Letters as in `pallas_kernels.api`; segments are contiguous runs of equal ids.
"""
from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import spans


def of_tokens(pos, keys, segment_ids, *, causal=True, window=None):
  """First token and one past the last, int32[B, T] each, that each query sees of `keys` tokens."""
  begin, end = jnp.zeros_like(pos), jnp.full_like(pos, keys)
  if segment_ids is not None:
    begin, end = spans.of_segments(segment_ids, pos)
  if causal:
    end = jnp.minimum(pos + 1, end if segment_ids is None else keys)
  if window is not None:
    begin = jnp.maximum(begin, pos - window + 1)
  return begin, end


def of_compressed(pos, num_compressed, segment_ids, *, block_len, block_stride):
  """First compressed block and one past the last, int32[B, T] each, that each query sees."""
  begin = jnp.zeros_like(pos) if segment_ids is None else spans.of_segments(segment_ids, pos)[0]
  begin = -(-begin // block_stride)
  end = jnp.minimum((pos - (block_len - 1)) // block_stride + 1, num_compressed)
  return begin, end


def pad_queries(x, length):
  """Pads the last axis to `length` with 0: a run that ends where it begins."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def query_tiles(begin, end, tile_queries, tile_keys):
  """The key tiles that each tile of queries needs.

  Args:
    begin, end: int32[B, T], T a multiple of tile_queries.

  Returns:
    int32[B, T / tile_queries, 4]: the first key tile, one past the last, and the keys [third, fourth) that
    every query of the tile sees.
  """
  begin, end = (x.reshape(x.shape[0], -1, tile_queries) for x in (begin, end))
  some = begin < end
  first = jnp.where(some, begin, spans.FAR).min(axis=2) // tile_keys
  stop = -(-jnp.where(some, end, 0).max(axis=2) // tile_keys)
  first = jnp.where(stop > 0, first, 0)
  return jnp.stack([first, stop, jnp.where(some, begin, spans.FAR).max(axis=2), jnp.where(some, end, 0).min(axis=2)],
                   axis=2)


def key_tiles(tiles, num_key_tiles):
  """The inverse of `query_tiles`: int32[B, num_key_tiles, 2], the first tile of queries that needs each key tile
  and one past the last; 0, 0 where none does."""
  key = jnp.arange(num_key_tiles, dtype=jnp.int32)[None, :, None]
  needs = (tiles[:, None, :, 0] <= key) & (key < tiles[:, None, :, 1])
  query = jnp.arange(tiles.shape[1], dtype=jnp.int32)
  first = jnp.where(needs, query, spans.FAR).min(axis=2)
  stop = jnp.where(needs, query + 1, 0).max(axis=2)
  return jnp.stack([jnp.where(stop > 0, first, 0), stop], axis=2)
