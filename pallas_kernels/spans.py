"""Where documents begin and end: a segment is a contiguous run of equal ids, so what a query sees is a run of keys.

Plain jnp, shared by all backends; letters as in `pallas_kernels.api`.
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
  """Begin and end, int32[B, T] each, of the run of equal ids that holds each position.

  Positions past the last id belong to its run, as in the reference.
  """
  at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  last = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
  begin = lax.cummax(jnp.where(new, at, 0), axis=1)
  end = lax.cummin(jnp.where(last, at + 1, FAR), axis=1, reverse=True)
  return tuple(jnp.take_along_axis(x, pos, axis=1, mode="clip") for x in (begin, end))


def visible_keys(batch, queries, keys, segment_ids, query_offset):
  """int32[B, T] pair (first, end): the keys that each query sees, as far as causality and segments go."""
  pos = positions(queries, query_offset, batch)
  first = jnp.zeros_like(pos) if segment_ids is None else of_segments(segment_ids, pos)[0]
  return first, jnp.minimum(pos + 1, keys)
