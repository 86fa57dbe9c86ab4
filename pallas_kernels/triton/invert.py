"""`pallas_kernels.lists.invert` by four small kernels instead of a sort, which is its slow twin.

On one H200, counted and sorted, ms: 8 x 4,096 tokens, 8/2 heads, 16 blocks of 32 each 0.13 and 0.30; 64/4 heads,
blocks of 64, 8,192 tokens 0.09 and 0.18, 32,768 tokens 0.18 and 0.19 (0.08 since each list is placed by a program that
knows of all of them: 0.010 ms in place of 0.096).
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import lists, spans
from pallas_kernels.triton import call, invert_kernels

WORDS = 2 ** 28  # of who chose what, at most: 1 GiB, twice
MOST_LISTS = 2 ** 18
WIDE, STEP, LISTS = 32, 64, 1024  # tiles of the kernels


def supports(plan):
  """None, or why the lists of this plan need the sort."""
  if call.unavailable():
    return call.unavailable()
  if plan.lists > MOST_LISTS:
    return f"{plan.lists} lists: each program adds up those before its own, which takes longer than to sort"
  if _chunks(plan) * plan.lists > WORDS:
    return f"{plan.lists} lists of up to {plan.range_size} queries take more than {WORDS} words"
  return None


def _chunks(plan):
  return -(-plan.range_size // 32)


def invert(block_indices, plan, segment_ids=None, query_offset=0):
  """The same Entries as `pallas_kernels.lists.invert` where it defines them; what its padding holds is undefined."""
  first, end = spans.visible_keys(plan.batch, plan.queries, plan.keys, segment_ids, query_offset)
  # Each selection has lists of its own.
  return call.one_by_one(functools.partial(_entries, plan=plan))(block_indices, first, end)


def _entries(block_indices, first, end, *, plan):
  B, T, K, J = block_indices.shape
  chunks, owners = _chunks(plan), B * K * plan.ranges
  numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  inputs = (block_indices.astype(jnp.int32), first, end)
  tokens = dict(T=T, K=K, J=J, JP=call.next_power_of_2(J), SIZE=plan.block_size, BLOCKS=plan.blocks,
                RANGE=plan.range_size, RANGES=plan.ranges, CHUNKS=chunks)
  by_chunk = numbers(owners, chunks, plan.blocks)
  words = call.kernel_call(invert_kernels.mark_kernel, inputs, by_chunk, grid=(owners * chunks,), name="lists_mark",
                           num_warps=4, STEP=min(1024, call.next_power_of_2(plan.blocks)), **tokens)
  wide = min(WIDE, call.next_power_of_2(plan.blocks))
  before, counts = call.kernel_call(
      invert_kernels.count_kernel, (words,), [by_chunk, numbers(owners, plan.blocks)],
      grid=(owners * -(-plan.blocks // wide),), name="lists_count", num_warps=4, BLOCKS=plan.blocks, CHUNKS=chunks,
      WIDE=wide, STEP=min(STEP, call.next_power_of_2(chunks)))
  bounds, tile_start, unit_start, units = call.kernel_call(
      invert_kernels.place_kernel, (counts,), [numbers(plan.lists + 1)] * 3 + [numbers(plan.max_units, 6)],
      grid=(plan.lists // LISTS + 1,), name="lists_place", num_warps=8, LISTS=plan.lists, TOKENS=plan.tile_tokens,
      TILES=plan.tiles_per_unit, K=K, RANGES=plan.ranges, BLOCKS=plan.blocks, UNITS=plan.max_units, STEP=LISTS,
      AT_ONCE=min(4 * LISTS, call.next_power_of_2(plan.lists)))
  padded = numbers(plan.entries + plan.unit_tokens)
  rows, spans_, position = call.kernel_call(
      invert_kernels.scatter_kernel, (*inputs, words, before, bounds, tile_start),
      [padded, padded, numbers(B, T, K, J)],
      grid=(owners * chunks,), name="lists_scatter", num_warps=4, TOKENS=plan.tile_tokens, G=plan.group,
      TILE_ROWS=lists.TILE_ROWS, **tokens)
  return lists.Entries(rows, spans_, position, units, unit_start)
