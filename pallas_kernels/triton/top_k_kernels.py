"""Triton kernels that score blocks and take the best J; top_k.py calls them.

Two launches per chunk of queries: scores of all blocks, by tiles of a few neighbouring tokens with all heads that
score together, then the choice, line by line. A *line* is what is chosen from, one (token, KV head).

The choice repeats "the largest, and of equals the lowest block" J times over scores that lie in the registers of one
warp. They are compared as integers, for which a warp has an instruction. Forced blocks come first, invisible ones last.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.range_kernels import blocks_of
from pallas_kernels.triton.range_kernels import load_block
from pallas_kernels.triton.range_kernels import rows_of

FORCED: tl.constexpr = tl.constexpr(2 ** 31 - 1)
INVISIBLE: tl.constexpr = tl.constexpr(-2 ** 31)
NO_BLOCK: tl.constexpr = tl.constexpr(2 ** 31 - 1)
LARGEST: tl.constexpr = tl.constexpr(0x7f7fffff)  # the bits of the largest float32


@triton.jit
def _part(begin, end, full_begin, full_end, part, SPLITS: tl.constexpr):
  size = (end - begin + SPLITS - 1) // SPLITS
  begin = tl.minimum(begin + part * size, end)
  end = tl.minimum(begin + size, end)
  full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
  return begin, end, full_begin, tl.maximum(tl.minimum(full_end, end), full_begin)


@triton.jit
def _compressed_run(first, position, C, LEN: tl.constexpr, STRIDE: tl.constexpr):
  """The compressed blocks low .. high - 1 inside the tokens first .. position."""
  high = tl.where(position >= LEN - 1, (tl.maximum(position, LEN - 1) - (LEN - 1)) // STRIDE + 1, 0)
  return (first + STRIDE - 1) // STRIDE, tl.minimum(high, C)


@triton.jit
def _compressed_step(out, q, norm, k, block, low, high, C, K: tl.constexpr, H: tl.constexpr, GP: tl.constexpr,
                     LEN: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
                     MASKED: tl.constexpr):
  """What a block of compressed keys gives to the selection blocks that they begin in and to the ones after.

  Scores are [keys, rows], so the heads of a group lie in neighbouring columns, which the tensor core leaves in four
  neighbouring threads. Row i of the product is not key i: the rows that one thread of wgmma holds, i, i + 8, i + 64
  and i + 72 of 128, are four keys in a row, those of one selection block if it has four. Any order is correct.
  """
  RATIO: tl.constexpr = SIZE // STRIDE
  PER: tl.constexpr = BLOCK // RATIO
  TOKENS: tl.constexpr = ROWS // GP
  i = tl.arange(0, BLOCK)
  if BLOCK == 128 and RATIO == 4:
    key = (i // 16 % 4 * 8 + i % 8) * 4 + i // 64 * 2 + i // 8 % 2
  else:
    key = i
  at = k + tl.cast(block, tl.int64) * (BLOCK * K * H) + key[:, None] * (K * H) + tl.arange(0, H)[None, :]
  c = block * BLOCK + key
  keys = tl.load(at, mask=(c < C)[:, None], other=0.0) if MASKED else tl.load(at)
  s = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
  p = tl.exp2(s * SCALE - norm[None, :])
  if MASKED:
    p = tl.where((c[:, None] >= low[None, :]) & (c[:, None] < high[None, :]), p, 0.0)
  nth = key % RATIO * STRIDE
  next_weight = tl.maximum(nth + LEN - SIZE, 0).to(tl.float32) / STRIDE
  own_weight = (tl.minimum(nth + LEN, SIZE) - nth).to(tl.float32) / STRIDE
  own = p * own_weight[:, None]
  next = p * next_weight[:, None]
  if BLOCK == 128 and RATIO == 4:
    own = tl.sum(tl.sum(tl.reshape(own, (2, 4, 2, 8, ROWS)), axis=0), axis=1)
    next = tl.sum(tl.sum(tl.reshape(next, (2, 4, 2, 8, ROWS)), axis=0), axis=1)
  else:
    own = tl.sum(tl.reshape(own, (PER, RATIO, ROWS)), axis=1)
    next = tl.sum(tl.reshape(next, (PER, RATIO, ROWS)), axis=1)
  own = tl.sum(tl.reshape(own, (PER, TOKENS, GP)), axis=2)
  at = out + tl.arange(0, TOKENS)[None, :] * (2 * WIDTH) + (block * PER + tl.arange(0, PER))[:, None]
  tl.store(at, own)
  if LEN > STRIDE:
    tl.store(at + WIDTH, tl.sum(tl.reshape(next, (PER, TOKENS, GP)), axis=2))


@triton.jit
def compressed_scores_kernel(q, k, lse, first, position, scores, B: tl.constexpr, T: tl.constexpr,
                             C: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                             H: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr,
                             SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                             SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """scores float32[tiles * B * K, TOKENS, 2, WIDTH]: [0] from the compressed blocks that begin in a selection block,
  [1] from those that begin in it for the one after it. Long tiles first."""
  TILES: tl.constexpr = (T + ROWS // GP - 1) // (ROWS // GP)
  item = TILES * B * K - 1 - tl.program_id(0) // SPLITS
  tile, b, r = item // (B * K), item % (B * K) // K, item % K
  token, head, ok = rows_of(tile, T, G, GP, ROWS)
  at = tl.cast(b, tl.int64) * T
  low, high = _compressed_run(tl.load(first + at + token, mask=ok, other=0),
                              tl.load(position + at + token, mask=ok, other=-1), C, LEN, STRIDE)
  begin, end, full_begin, full_end = blocks_of(low, high, ok, BLOCK)
  if SPLITS > 1:
    begin, end, full_begin, full_end = _part(begin, end, full_begin, full_end, tl.program_id(0) % SPLITS, SPLITS)
  row = (at + token) * (K * G) + r * G + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=float("-inf")) * 1.4426950408889634
  norm = tl.where(norm == float("-inf"), float("inf"), norm)  # rows that see nothing give nothing
  keys = k + (tl.cast(b, tl.int64) * C * K + r) * H
  out = scores + tl.cast(item, tl.int64) * (ROWS // GP * 2 * WIDTH)
  for block in range(full_begin, full_end):
    _compressed_step(out, queries, norm, keys, block, low, high, C, K, H, GP, LEN, STRIDE, SIZE, SCALE, ROWS, BLOCK,
                     WIDTH, PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):
    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
    _compressed_step(out, queries, norm, keys, block, low, high, C, K, H, GP, LEN, STRIDE, SIZE, SCALE, ROWS, BLOCK,
                     WIDTH, PRECISION, True)


@triton.jit
def _index_step(out, q, k, block, low, high, S, H: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
                MASKED: tl.constexpr):
  """Best scores of the selection blocks inside a block of keys."""
  PER: tl.constexpr = BLOCK // SIZE
  keys = load_block(k, block, S, H, H, BLOCK, MASKED)
  s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
  if MASKED:
    c = block * BLOCK + tl.arange(0, BLOCK)
    s = tl.where((c[None, :] >= low[:, None]) & (c[None, :] < high[:, None]), s, float("-inf"))
  if PER == 1:
    tl.store(out + tl.arange(0, ROWS) * WIDTH + block, tl.max(s, axis=1) * SCALE)
  else:
    best = tl.max(tl.reshape(s, (ROWS, PER, SIZE)), axis=2)
    j = block * PER + tl.arange(0, PER)
    tl.store(out + tl.arange(0, ROWS)[:, None] * WIDTH + j[None, :], best * SCALE)


@triton.jit
def index_scores_kernel(q, k, first, position, scores, B: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                        K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr,
                        SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                        SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """scores float32[tiles * B, ROWS, WIDTH]; a row is a token and one of its K index queries. Long tiles first."""
  TILES: tl.constexpr = (T + ROWS // KP - 1) // (ROWS // KP)
  item = TILES * B - 1 - tl.program_id(0) // SPLITS
  tile, b = item // B, item % B
  token, head, ok = rows_of(tile, T, K, KP, ROWS)
  at = tl.cast(b, tl.int64) * T
  low = tl.load(first + at + token, mask=ok, other=0)
  high = tl.minimum(tl.load(position + at + token, mask=ok, other=-1) + 1, S)
  begin, end, full_begin, full_end = blocks_of(low, high, ok, BLOCK)
  if SPLITS > 1:
    begin, end, full_begin, full_end = _part(begin, end, full_begin, full_end, tl.program_id(0) % SPLITS, SPLITS)
  row = (at + token) * K + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  keys = k + tl.cast(b, tl.int64) * S * H
  out = scores + tl.cast(item, tl.int64) * (ROWS * WIDTH)
  for block in range(full_begin, full_end):
    _index_step(out, queries, keys, block, low, high, S, H, SIZE, SCALE, ROWS, BLOCK, WIDTH, PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):
    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
    _index_step(out, queries, keys, block, low, high, S, H, SIZE, SCALE, ROWS, BLOCK, WIDTH, PRECISION, True)


@triton.jit
def choose_kernel(scores, first, position, indices, B: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
                  K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LEN: tl.constexpr,
                  STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, J: tl.constexpr,
                  JP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, LINES: tl.constexpr,
                  SWEEP: tl.constexpr, TOTAL: tl.constexpr):
  """indices int32[B, T, K, J] from the scores of LINES lines.

  STRIDE > 0: scores as `compressed_scores_kernel` leaves them, in tiles of TOKENS tokens of one KV head.
  STRIDE = 0: one score per block, in tiles of TOKENS tokens with KP heads each.
  """
  line = tl.program_id(0) * LINES + tl.arange(0, LINES)
  ok = line < TOTAL
  if STRIDE > 0:
    item = line // TOKENS
    tile, b, head = item // (B * K), item % (B * K) // K, item % K
    token = tile * TOKENS + line % TOKENS
    row = scores + line.to(tl.int64)[:, None] * (2 * WIDTH)
  else:
    item = line // (TOKENS * KP)
    tile, b, head = item // B, item % B, line % KP
    token = tile * TOKENS + line // KP % TOKENS
    row = scores + line.to(tl.int64)[:, None] * WIDTH
  ok = ok & (token < T) & (head < K)
  at = b.to(tl.int64) * T + token
  begin = tl.load(first + at, mask=ok, other=0)
  own = tl.load(position + at, mask=ok, other=0)
  if STRIDE > 0:
    low, high = _compressed_run(begin, own, C, LEN, STRIDE)
    some_begin = low // (SIZE // STRIDE)
    some_end = tl.where(ok & (high > low), (high - 1) // (SIZE // STRIDE) + 1, 0)
  begin = begin // SIZE
  own = own // SIZE
  slot = tl.arange(0, JP)
  kept = tl.full((LINES, JP), INVISIBLE, tl.int32)
  kept_block = tl.full((LINES, JP), -1, tl.int32)
  last = tl.minimum(tl.max(own, axis=0) + 1, BLOCKS)
  for sweep in range(tl.minimum(tl.min(begin, axis=0), last - 1) // SWEEP, (last + SWEEP - 1) // SWEEP):
    j = (sweep * SWEEP + tl.arange(0, SWEEP))[None, :]
    visible = (j >= begin[:, None]) & (j <= own[:, None]) & (j < BLOCKS) & ok[:, None]
    if STRIDE > 0:
      here = (j >= some_begin[:, None]) & (j < some_end[:, None])
      value = tl.load(row + j, mask=here, other=0.0)
      if LEN > STRIDE:
        here = (j > some_begin[:, None]) & (j <= some_end[:, None])
        value += tl.load(row + (WIDTH - 1) + j, mask=here, other=0.0)
    else:
      value = tl.load(row + j, mask=visible, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0 is no less than 0
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7fffffff, bits)  # floats in their order, as integers
    bits = tl.minimum(tl.maximum(bits, -LARGEST - 1), LARGEST)
    forced = (j < begin[:, None] + INITIAL) | (j > own[:, None] - LOCAL)
    bits = tl.where(visible, tl.where(forced, FORCED, bits), INVISIBLE)
    best = tl.full((LINES, JP), INVISIBLE, tl.int32)
    best_block = tl.full((LINES, JP), -1, tl.int32)
    for n in range(J):
      top = tl.max(bits, axis=1)
      if SWEEP < BLOCKS:
        top = tl.maximum(top, tl.max(kept, axis=1))
      which = tl.min(tl.where(bits == top[:, None], j, NO_BLOCK), axis=1)
      if SWEEP < BLOCKS:
        which = tl.minimum(which, tl.min(tl.where(kept == top[:, None], kept_block, NO_BLOCK), axis=1))
        kept = tl.where(kept_block == which[:, None], INVISIBLE, kept)
      bits = tl.where(j == which[:, None], INVISIBLE, bits)
      best = tl.where(slot[None, :] == n, top[:, None], best)
      which = tl.where(top > INVISIBLE, which, -1)
      best_block = tl.where(slot[None, :] == n, which[:, None], best_block)
    kept = best
    kept_block = best_block
  out = (at * K + head)[:, None] * J + slot[None, :]
  tl.store(indices + out, kept_block, mask=ok[:, None] & (slot < J)[None, :])
