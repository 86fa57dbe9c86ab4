"""Triton kernels that sort a block selection by block without sorting; invert.py calls them.

A token chooses a block at most once. So for 32 neighbouring tokens, a *chunk*, one word per block says who chose it;
the place of an entry in its list is the sum of the bits of earlier chunks and of the earlier bits of its own word.
Words are set by atomic or, whose result does not depend on the order.

Chunks lie inside ranges of queries; arrays by chunk are [B * K * ranges, CHUNKS, BLOCKS].
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(indices, first, end, T, K: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, SIZE: tl.constexpr,
          BLOCKS: tl.constexpr, RANGE: tl.constexpr, RANGES: tl.constexpr, CHUNKS: tl.constexpr):
  """Of a program, a chunk: its head and range, its tokens, slots, blocks, what is seen of them and whether any is."""
  chunk = tl.program_id(0) % CHUNKS
  own = tl.program_id(0) // CHUNKS  # (b * K + r) * ranges + range
  b, r = own // (RANGES * K), own // RANGES % K
  nth = chunk * 32 + tl.arange(0, 32)
  token = own % RANGES * RANGE + nth
  there = (nth < RANGE) & (token < T)
  row = (tl.cast(b, tl.int64) * T + token) * K + r
  slot = tl.arange(0, JP)
  block = tl.load(indices + row[:, None] * J + slot[None, :], mask=there[:, None] & (slot < J)[None, :], other=-1)
  at = tl.cast(b, tl.int64) * T + token
  start = tl.load(first + at, mask=there, other=0)[:, None] - block * SIZE
  stop = tl.load(end + at, mask=there, other=0)[:, None] - block * SIZE
  start = tl.minimum(tl.maximum(start, 0), SIZE)
  stop = tl.minimum(tl.maximum(stop, 0), SIZE)
  seen = (block >= 0) & (block < BLOCKS) & (stop > start)
  return own, row, there, slot, block, start, stop, seen


@triton.jit
def mark_kernel(indices, first, end, words, T: tl.constexpr, K: tl.constexpr, J: tl.constexpr, JP: tl.constexpr,
                SIZE: tl.constexpr, BLOCKS: tl.constexpr, RANGE: tl.constexpr, RANGES: tl.constexpr,
                CHUNKS: tl.constexpr, STEP: tl.constexpr):
  """words int32[..., CHUNKS, BLOCKS]: bit i is set if token i of the chunk chose the block and sees some of it."""
  line = words + tl.program_id(0).to(tl.int64) * BLOCKS
  for begin in range(0, BLOCKS, STEP):
    j = begin + tl.arange(0, STEP)
    tl.store(line + j, tl.zeros((STEP,), tl.int32), mask=j < BLOCKS)
  own, row, there, slot, block, start, stop, seen = _tile(indices, first, end, T, K, J, JP, SIZE, BLOCKS, RANGE, RANGES,
                                                          CHUNKS)
  tl.debug_barrier()  # other threads cleared the words
  bit = (1 << tl.arange(0, 32))[:, None] + tl.zeros((32, JP), tl.int32)
  tl.atomic_or(line + tl.where(seen, block, 0), bit, mask=seen, sem="relaxed")


@triton.jit
def _bits(x):
  """How many bits of each int32 are set."""
  x = x.to(tl.uint32, bitcast=True)
  x = x - ((x >> 1) & 0x55555555)
  x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
  x = (x + (x >> 4)) & 0x0f0f0f0f
  return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def count_kernel(words, before, counts, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr,
                 STEP: tl.constexpr):
  """before int32[..., CHUNKS, BLOCKS]: entries of earlier chunks of the list; counts int32[..., BLOCKS]: of all."""
  PER: tl.constexpr = (BLOCKS + WIDE - 1) // WIDE
  own = tl.program_id(0) // PER
  j = tl.program_id(0) % PER * WIDE + tl.arange(0, WIDE)
  total = tl.zeros((WIDE,), tl.int32)
  for begin in range(0, CHUNKS, STEP):
    chunk = begin + tl.arange(0, STEP)
    at = (tl.cast(own, tl.int64) * CHUNKS + chunk)[:, None] * BLOCKS + j[None, :]
    there = (chunk < CHUNKS)[:, None] & (j < BLOCKS)[None, :]
    n = _bits(tl.load(words + at, mask=there, other=0))
    tl.store(before + at, total[None, :] + tl.cumsum(n, axis=0) - n, mask=there)
    total += tl.sum(n, axis=0)
  tl.store(counts + tl.cast(own, tl.int64) * BLOCKS + j, total, mask=j < BLOCKS)


@triton.jit
def _sizes(counts, i, LISTS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr):
  tokens = tl.load(counts + i, mask=i < LISTS, other=0)
  tiles = (tokens + TOKENS - 1) // TOKENS
  return tokens, tiles, (tiles + TILES - 1) // TILES


@triton.jit
def place_kernel(counts, bounds, tile_start, unit_start, units, LISTS: tl.constexpr, TOKENS: tl.constexpr,
                 TILES: tl.constexpr, K: tl.constexpr, RANGES: tl.constexpr, BLOCKS: tl.constexpr,
                 UNITS: tl.constexpr, STEP: tl.constexpr, AT_ONCE: tl.constexpr):
  """Where each list begins, in entries, tiles and units, int32[LISTS + 1] each, and the units int32[UNITS, 6].

  A program has STEP lists, adds up those of all itself, and clears its share of the units that are not used.
  """
  own = tl.program_id(0)
  programs: tl.constexpr = LISTS // STEP + 1
  token_base = tl.zeros((AT_ONCE,), tl.int32)
  tile_base = tl.zeros((AT_ONCE,), tl.int32)
  unit_base = tl.zeros((AT_ONCE,), tl.int32)
  used = tl.zeros((AT_ONCE,), tl.int32)
  for begin in range(0, LISTS, AT_ONCE):
    others = begin + tl.arange(0, AT_ONCE)
    tokens, tiles, deals = _sizes(counts, others, LISTS, TOKENS, TILES)
    before = others < own * STEP
    token_base += tl.where(before, tokens, 0)
    tile_base += tl.where(before, tiles, 0)
    unit_base += tl.where(before, deals, 0)
    used += deals
  token_base, tile_base, unit_base = tl.sum(token_base, axis=0), tl.sum(tile_base, axis=0), tl.sum(unit_base, axis=0)
  used = tl.sum(used, axis=0)
  i = own * STEP + tl.arange(0, STEP)
  tokens, tiles, deals = _sizes(counts, i, LISTS, TOKENS, TILES)
  token_at = token_base + tl.cumsum(tokens, axis=0) - tokens
  tile_at = tile_base + tl.cumsum(tiles, axis=0) - tiles
  unit_at = unit_base + tl.cumsum(deals, axis=0) - deals
  tl.store(bounds + i, token_at, mask=i <= LISTS)  # list number LISTS is empty: there the totals lie
  tl.store(tile_start + i, tile_at, mask=i <= LISTS)
  tl.store(unit_start + i, unit_at, mask=i <= LISTS)
  head = i // (RANGES * BLOCKS)
  for n in range(0, tl.max(deals, axis=0)):
    at = units + (unit_at + n) * 6
    mine = n < deals
    tl.store(at, token_at + n * (TOKENS * TILES), mask=mine)
    tl.store(at + 1, tl.minimum(tokens - n * (TOKENS * TILES), TOKENS * TILES), mask=mine)
    tl.store(at + 2, tile_at + n * TILES, mask=mine)
    tl.store(at + 3, head // K, mask=mine)
    tl.store(at + 4, head % K, mask=mine)
    tl.store(at + 5, i % BLOCKS, mask=mine)
  for begin in range((used + own * STEP) * 6, UNITS * 6, programs * STEP * 6):
    for column in range(6):
      at = begin + column * STEP + tl.arange(0, STEP)
      tl.store(units + at, tl.zeros((STEP,), tl.int32), mask=at < UNITS * 6)


@triton.jit
def scatter_kernel(indices, first, end, words, before, bounds, tile_start, rows, spans, position, T: tl.constexpr,
                   K: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
                   RANGE: tl.constexpr, RANGES: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
                   G: tl.constexpr, TILE_ROWS: tl.constexpr):
  """rows, spans and position of pallas_kernels.lists.Entries."""
  own, row, there, slot, block, start, stop, seen = _tile(indices, first, end, T, K, J, JP, SIZE, BLOCKS, RANGE, RANGES,
                                                          CHUNKS)
  again = tl.zeros((32, JP), tl.int1)
  for j in range(0, J - 1):
    other = tl.load(indices + row * J + j, mask=there, other=-1)
    again = again | ((block == other[:, None]) & (slot > j)[None, :])
  seen = seen & (again == 0)
  safe = tl.where(seen, block, 0)
  at = tl.program_id(0).to(tl.int64) * BLOCKS + safe
  below = ((1 << tl.arange(0, 32)) - 1)[:, None]
  nth = tl.load(before + at, mask=seen, other=0) + _bits(tl.load(words + at, mask=seen, other=0) & below)
  which = own * BLOCKS + safe
  to = tl.load(bounds + which, mask=seen, other=0) + nth
  tl.store(rows + to, row.to(tl.int32)[:, None] + tl.zeros((32, JP), tl.int32), mask=seen)
  tl.store(spans + to, (start << 16) | stop, mask=seen)
  tile = tl.load(tile_start + which, mask=seen, other=0) + nth // TOKENS
  place = tl.where(seen, tile * TILE_ROWS + nth % TOKENS * G, -1)
  tl.store(position + row[:, None] * J + slot[None, :], place, mask=there[:, None] & (slot < J)[None, :])
