"""What a query sees, as one span of keys: half-open (first, end), int32[B, T] each, the keys first .. end - 1.

Causality, a window, segments and compressed blocks all only say where the span begins and where it ends, because a
segment is a contiguous run of equal ids. Where a query sees nothing, end <= first. Kernels get these two numbers per
query, and per tile of queries the tiles of keys that hold some of their spans. Plain jnp, shared by all backends;
letters as in `pallas_kernels.api`.
"""
from __future__ import annotations

from jax import lax
import jax.numpy as jnp

FAR = 2 ** 30  # past every key; a float32 of it is exact


def positions(queries, query_offset, batch):
  """Absolute positions int32[B, T] of the queries."""
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32).reshape(-1, 1), (batch, 1))
  return offset + jnp.arange(queries, dtype=jnp.int32)


def of_segments(segment_ids, pos):
  """The segment that holds each position, its keys past `pos` included; all there are without ids (first 0, end FAR).

  Positions past the last id belong to its run, as in the reference.
  """
  if segment_ids is None:
    return jnp.zeros_like(pos), jnp.full_like(pos, FAR)
  at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  last = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
  first = lax.cummax(jnp.where(new, at, 0), axis=1)
  end = lax.cummin(jnp.where(last, at + 1, FAR), axis=1, reverse=True)
  return tuple(jnp.take_along_axis(x, pos, axis=1, mode="clip") for x in (first, end))


def of_tokens(pos, keys, segment_ids, *, causal=True, window=None):
  """The tokens, of `keys`, that each query sees."""
  first, end = of_segments(segment_ids, pos)
  end = jnp.minimum(pos + 1 if causal else end, keys)
  if window is not None:
    first = jnp.maximum(first, pos - window + 1)
  return first, end


def of_compressed(pos, num_compressed, segment_ids, *, block_len, block_stride):
  """The compressed blocks that each query sees: complete ones, of its own segment."""
  first = -(-of_segments(segment_ids, pos)[0] // block_stride)
  end = jnp.clip((pos - (block_len - 1)) // block_stride + 1, 0, num_compressed)
  return first, end


def compressed_tokens(queries, num_compressed, segment_ids, query_offset, *, block_len, block_stride):
  """An upper bound of the tokens there are where arguments have no S: with one more there would be another compressed
  key. Blocks past the end are invisible, so that too many change nothing."""
  if segment_ids is not None:
    return segment_ids.shape[1]
  last = queries + query_offset if isinstance(query_offset, int) else queries
  return max(last, num_compressed * block_stride + block_len - 1)


def visible_keys(batch, queries, keys, segment_ids, query_offset):
  """`of_tokens` of causal queries from `query_offset` on."""
  return of_tokens(positions(queries, query_offset, batch), keys, segment_ids)


# --- spans of a tile of queries ---------------------------------------------------


def pad_queries(x, length):
  """Pads the last axis to `length` with 0: a span that ends where it begins."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def query_tiles(first, end, tile_queries, tile_keys):
  """The key tiles that each tile of queries needs.

  Args:
    first, end: int32[B, T], T a multiple of tile_queries.

  Returns:
    int32[B, T / tile_queries, 4]: the first key tile, one past the last, and the keys [third, fourth) that
    every query of the tile sees.
  """
  first, end = (x.reshape(x.shape[0], -1, tile_queries) for x in (first, end))
  some = first < end
  begin = jnp.where(some, first, FAR).min(axis=2) // tile_keys
  stop = -(-jnp.where(some, end, 0).max(axis=2) // tile_keys)
  begin = jnp.where(stop > 0, begin, 0)
  return jnp.stack([begin, stop, jnp.where(some, first, FAR).max(axis=2), jnp.where(some, end, 0).min(axis=2)], axis=2)


def key_tiles(tiles, num_key_tiles):
  """The inverse of `query_tiles`: int32[B, num_key_tiles, 2], the first tile of queries that needs each key tile
  and one past the last; 0, 0 where none does."""
  key = jnp.arange(num_key_tiles, dtype=jnp.int32)[None, :, None]
  needs = (tiles[:, None, :, 0] <= key) & (key < tiles[:, None, :, 1])
  query = jnp.arange(tiles.shape[1], dtype=jnp.int32)
  first = jnp.where(needs, query, FAR).min(axis=2)
  stop = jnp.where(needs, query + 1, 0).max(axis=2)
  return jnp.stack([jnp.where(stop > 0, first, 0), stop], axis=2)
