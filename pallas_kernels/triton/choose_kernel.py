"""The Triton kernels that take the best J of a line of block scores; top_k.py calls them.

A *line* is what is chosen from, one (token, KV head). Lines of up to 128 blocks lie in registers, several in a warp
(`choose_few_kernel`). Through longer ones a warp goes one at a time (`choose_kernel`). Scores are compared as
integers, for which a warp has an instruction. Forced blocks need no scores: they are the first and the last visible
ones, and left to find are the best `need` of those between.

Of a long line the need-th best maximum of 64 or more groups of blocks comes first: need blocks are no worse, and few
others. Those that reach it are written to a short list, and the best of the list are taken in turn. A line with more
blocks of equal score than the list holds is gone through once for each slot instead.
"""
from __future__ import annotations

import triton
import triton.language as tl

INVISIBLE: tl.constexpr = tl.constexpr(-2 ** 31)
NO_BLOCK: tl.constexpr = tl.constexpr(2 ** 31 - 1)
LARGEST: tl.constexpr = tl.constexpr(0x7f7fffff)  # the bits of the largest float32
PIECE: tl.constexpr = tl.constexpr(32)  # of a line's 128 blocks, in `choose_few_kernel`


@triton.jit
def _ranks(row, j, low, high, WIDTH: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr):
  """int32 in the order of the scores of the blocks j, INVISIBLE outside low .. high - 1."""
  inside = (j >= low) & (j < high)
  if STRIDE > 0:  # sums of exponentials: not negative
    value = tl.load(row + j)
    if LEN > STRIDE:
      value += tl.load(row + WIDTH + j)
    bits = value.to(tl.int32, bitcast=True)
  else:
    value = tl.load(row + j) if PADDED else tl.load(row + j, mask=inside, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0 is no less than 0
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7fffffff)
    bits = tl.minimum(tl.maximum(bits, -LARGEST - 1), LARGEST)  # as the reference clips them
  return tl.where(inside, bits, INVISIBLE)


@triton.jit
def _append(short, count, chunk, listed, CHUNK: tl.constexpr, LIST: tl.constexpr):
  """Writes the `listed` blocks of a chunk to `short` behind its `count`, as far as it goes; gives the new count.

  A thread has four neighbouring blocks and writes one at a time: so nothing moves to another thread before.
  """
  listed = tl.reshape(listed.to(tl.int32), (CHUNK // 4, 4))
  four = tl.sum(listed, axis=1)
  place = count + tl.cumsum(four, axis=0) - four
  j = chunk * CHUNK + 4 * tl.arange(0, CHUNK // 4)
  even, odd = tl.split(tl.reshape(listed, (CHUNK // 4, 2, 2)))
  first, third = tl.split(even)
  second, fourth = tl.split(odd)
  tl.store(short + place, j, mask=(first > 0) & (place < LIST))
  place += first
  tl.store(short + place, j + 1, mask=(second > 0) & (place < LIST))
  place += second
  tl.store(short + place, j + 2, mask=(third > 0) & (place < LIST))
  place += third
  tl.store(short + place, j + 3, mask=(fourth > 0) & (place < LIST))
  return count + tl.sum(four, axis=0)


@triton.jit
def _take_from_list(chosen, slot, row, short, count, low, high, forced, need, WIDTH: tl.constexpr, LEN: tl.constexpr,
                    STRIDE: tl.constexpr, PADDED: tl.constexpr, LIST: tl.constexpr):
  """`chosen` with the best `need` of the `count` listed blocks after the forced ones."""
  entry = tl.arange(0, LIST)
  j = tl.load(short + entry, mask=entry < count, other=0)
  rank = tl.where(entry < count, _ranks(row, j, low, high, WIDTH, LEN, STRIDE, PADDED), INVISIBLE)
  for n in range(need):
    top = tl.max(rank, axis=0)
    which = tl.min(tl.where(rank == top, j, NO_BLOCK), axis=0)
    rank = tl.where(j == which, INVISIBLE, rank)
    chosen = tl.where(slot == forced + n, which, chosen)
  return chosen


@triton.jit
def _take_from_line(chosen, slot, row, begin, end, low, high, forced, need, WIDTH: tl.constexpr, LEN: tl.constexpr,
                    STRIDE: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
  """The same from all blocks of the chunks begin .. end - 1, each time the best that comes after the last one."""
  top = NO_BLOCK
  which = -1
  for n in range(need):
    best = tl.full((CHUNK,), INVISIBLE, tl.int32)
    best_block = tl.full((CHUNK,), NO_BLOCK, tl.int32)
    for chunk in range(begin, end):
      j = chunk * CHUNK + tl.arange(0, CHUNK)
      rank = _ranks(row, j, low, high, WIDTH, LEN, STRIDE, PADDED)
      better = ((rank < top) | ((rank == top) & (j > which))) & (rank > best)
      best = tl.where(better, rank, best)
      best_block = tl.where(better, j, best_block)
    top = tl.max(best, axis=0)
    which = tl.min(tl.where(best == top, best_block, NO_BLOCK), axis=0)
    chosen = tl.where(slot == forced + n, which, chosen)
  return chosen


@triton.jit
def _whose(line, scores, B: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr,
           WIDTH: tl.constexpr, STRIDE: tl.constexpr):
  """Sequence, token and head of a line, and where its scores lie; see `choose_kernel`."""
  if STRIDE > 0:
    item = line // TOKENS
    tile, b, head = item // (B * K), item % (B * K) // K, item % K
    token = tile * TOKENS + line % TOKENS
    row = scores + tl.cast(line, tl.int64) * (2 * WIDTH)
  else:
    item = line // (TOKENS * KP)
    tile, b, head = item // B, item % B, line % KP
    token = tile * TOKENS + line // KP % TOKENS
    row = scores + tl.cast(line, tl.int64) * WIDTH
  return b, token, head, row


@triton.jit
def _bounds(first, own, SIZE: tl.constexpr, BLOCKS: tl.constexpr, J: tl.constexpr, INITIAL: tl.constexpr,
            LOCAL: tl.constexpr):
  """Visible are the blocks begin .. end - 1, forced of them begin .. low - 1 and high .. end - 1; `need` are left to
  find. Of the first token that is seen and the own one."""
  begin, own = tl.maximum(first, 0) // SIZE, own // SIZE
  end = tl.maximum(tl.minimum(own + 1, BLOCKS), begin)
  low = tl.minimum(begin + INITIAL, end)
  high = tl.minimum(tl.maximum(own + 1 - LOCAL, low), end)
  forced = low - begin + end - high
  return begin, low, high, forced, tl.minimum(tl.maximum(J - forced, 0), high - low)


@triton.jit
def choose_few_kernel(scores, first, position, indices, B: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
                      KP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LEN: tl.constexpr,
                      STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, J: tl.constexpr,
                      JP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, LINES: tl.constexpr,
                      TOTAL: tl.constexpr):
  """What `choose_kernel` computes, of LINES lines of at most 128 blocks side by side; found blocks in ascending
  order.

  A line lies in four pieces, sorted where they lie: to take the best one away, a place's others move up. Of equal ones
  several may go at once; then `least`, the need-th best, ends too low, and goes up again.
  """
  line = tl.program_id(0) * LINES + tl.arange(0, LINES)
  b, token, head, row = _whose(tl.minimum(line, TOTAL - 1), scores, B, K, KP, TOKENS, WIDTH, STRIDE)
  ok = (line < TOTAL) & (token < T) & (head < K)
  at = tl.cast(b, tl.int64) * T + token
  begin, low, high, forced, need = _bounds(tl.load(first + at, mask=ok, other=0),
                                           tl.load(position + at, mask=ok, other=0), SIZE, BLOCKS, J, INITIAL, LOCAL)
  high = tl.where(ok, high, low)
  need = tl.where(ok, need, 0)
  column = tl.arange(0, PIECE)[None, :]
  ranks = ()
  for i in tl.static_range(4):
    ranks += (_ranks(row[:, None], i * PIECE + column, low[:, None], high[:, None], WIDTH, LEN, STRIDE, False),)
  best, second = tl.maximum(ranks[0], ranks[1]), tl.minimum(ranks[0], ranks[1])
  third, fourth = tl.maximum(ranks[2], ranks[3]), tl.minimum(ranks[2], ranks[3])
  best, third = tl.maximum(best, third), tl.minimum(best, third)
  second, fourth = tl.maximum(second, fourth), tl.minimum(second, fourth)
  second, third = tl.maximum(second, third), tl.minimum(second, third)
  least = tl.full((LINES,), NO_BLOCK, tl.int32)
  for n in range(J):
    top = tl.max(best, axis=1)
    least = tl.where(n < need, top, least)
    gone = best == top[:, None]
    best = tl.where(gone, second, best)
    second = tl.where(gone, third, second)
    third = tl.where(gone, fourth, third)
    fourth = tl.where(gone, INVISIBLE, fourth)
  least = tl.maximum(least, INVISIBLE + 1)
  better = _count_better(ranks, least)
  while tl.max((better >= tl.maximum(need, 1)).to(tl.int32), axis=0) > 0:
    above = tl.full((LINES, PIECE), NO_BLOCK, tl.int32)
    for i in tl.static_range(4):
      above = tl.minimum(above, tl.where(ranks[i] > least[:, None], ranks[i], NO_BLOCK))
    least = tl.where(better >= tl.maximum(need, 1), tl.min(above, axis=1), least)
    better = _count_better(ranks, least)
  equal = tl.zeros((LINES,), tl.int32)  # to `least`, so far
  place = forced
  at = indices + (at * K + head) * J
  for i in tl.static_range(4):
    same = (ranks[i] == least[:, None]).to(tl.int32)
    before = equal[:, None] + tl.cumsum(same, axis=1) - same
    taken = (ranks[i] > least[:, None]) | ((same > 0) & (before < (need - better)[:, None]))
    taken = (taken & (need > 0)[:, None]).to(tl.int32)
    where = place[:, None] + tl.cumsum(taken, axis=1) - taken
    tl.store(at[:, None] + where, i * PIECE + column + tl.zeros((LINES, PIECE), tl.int32), mask=taken > 0)
    equal += tl.sum(same, axis=1)
    place += tl.sum(taken, axis=1)
  slot = tl.arange(0, JP)[None, :]
  block = begin[:, None] + slot
  block = tl.where(block < low[:, None], block, block + (high - low)[:, None])
  block = tl.where(slot < forced[:, None], block, -1)
  found = (slot >= forced[:, None]) & (slot < (forced + need)[:, None])
  tl.store(at[:, None] + slot, block, mask=ok[:, None] & (slot < J) & ~found)


@triton.jit
def _count_better(ranks, least):
  better = tl.zeros_like(ranks[0])
  for i in tl.static_range(4):
    better += (ranks[i] > least[:, None]).to(tl.int32)
  return tl.sum(better, axis=1)


@triton.jit
def choose_kernel(scores, first, position, indices, lists, B: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
                  KP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LEN: tl.constexpr,
                  STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, J: tl.constexpr,
                  JP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, LINES: tl.constexpr,
                  CHUNK: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, LIST: tl.constexpr,
                  TOTAL: tl.constexpr, PADDED: tl.constexpr):
  """indices int32[B, T, K, J] from the scores of LINES lines, one after the other.

  STRIDE > 0: scores as `compressed_scores_kernel` leaves them, in tiles of TOKENS tokens of one KV head.
  STRIDE = 0: one score per block, in tiles of TOKENS tokens with KP heads each.
  Maxima are of PARTS * GROUPS groups: parts of a chunk, and if there are PARTS > 1 those of every PARTS-th chunk.
  PADDED: lines may be read up to a multiple of CHUNK. lists int32[programs, LIST] is scratch.
  """
  short = lists + tl.program_id(0).to(tl.int64) * LIST
  slot = tl.arange(0, JP)
  for line in range(tl.program_id(0) * LINES, tl.minimum(tl.program_id(0) * LINES + LINES, TOTAL)):
    b, token, head, row = _whose(line, scores, B, K, KP, TOKENS, WIDTH, STRIDE)
    if token < T and head < K:
      at = tl.cast(b, tl.int64) * T + token
      begin, low, high, forced, need = _bounds(tl.load(first + at), tl.load(position + at), SIZE, BLOCKS, J, INITIAL,
                                               LOCAL)
      chosen = begin + slot
      chosen = tl.where(chosen < low, chosen, chosen + (high - low))
      chosen = tl.where(slot < forced, chosen, -1)
      if need > 0:
        first_chunk, chunks = low // CHUNK, (high + CHUNK - 1) // CHUNK
        peaks = tl.full((PARTS, GROUPS), INVISIBLE, tl.int32)
        for chunk in range(first_chunk, chunks):
          rank = _ranks(row, chunk * CHUNK + tl.arange(0, CHUNK), low, high, WIDTH, LEN, STRIDE, PADDED)
          rank = tl.max(tl.reshape(rank, (1, GROUPS, CHUNK // GROUPS)), axis=2)
          here = tl.arange(0, PARTS)[:, None] == chunk % PARTS
          peaks = tl.where(here, tl.maximum(peaks, rank), peaks)
        least = NO_BLOCK
        for n in range(need):  # noqa: B007 (Triton compiles the name too)
          least = tl.max(peaks)
          peaks = tl.where(peaks == least, INVISIBLE, peaks)  # equal ones at once: `least` ends lower, but not too high
        least = tl.maximum(least, INVISIBLE + 1)
        count = 0
        for chunk in range(first_chunk, chunks):
          j = chunk * CHUNK + tl.arange(0, CHUNK)
          rank = _ranks(row, j, low, high, WIDTH, LEN, STRIDE, PADDED)
          count = _append(short, count, chunk, rank >= least, CHUNK, LIST)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        if count <= LIST:
          chosen = _take_from_list(chosen, slot, row, short, count, low, high, forced, need, WIDTH, LEN, STRIDE, PADDED,
                                   LIST)
        else:
          chosen = _take_from_line(chosen, slot, row, first_chunk, chunks, low, high, forced, need, WIDTH, LEN, STRIDE,
                                   PADDED, CHUNK)
        tl.debug_barrier()
      tl.store(indices + (at * K + head) * J + slot, chosen, mask=slot < J)
