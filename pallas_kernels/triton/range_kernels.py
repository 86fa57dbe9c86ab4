"""Triton kernels of attention in which every query sees one contiguous run of keys; ranged.py calls them.

That is dense, sliding-window, packed and compressed attention alike: token t of batch b sees the keys
low[b, t] .. high[b, t] - 1.

A *tile* is ROWS query rows: TOKENS = ROWS / GP neighbouring tokens times the GP heads of one KV head, the G
there are and padding up to a power of two. So tensor cores have whole tiles at any G, and the keys that a tile
loads serve all of its rows. Blocks of keys inside the runs of all rows go through without a mask.

Scores are in base 2: SCALE has a factor log2(e), and so has the `lse` that `dkv_kernel` reads. `dq_kernel` makes it,
and `delta`, a row's sum of o times its gradient, less the gradient of its lse.
"""
from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(tile, T, G: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr):
  """Of each row of a tile: token, head of the group, and whether there is such a row."""
  m = tl.arange(0, ROWS)
  token = tile * (ROWS // GP) + m // GP
  return token, m % GP, (token < T) & (m % GP < G)


@triton.jit
def blocks_of(low, high, ok, BLOCK: tl.constexpr):
  """Blocks of keys of a tile: begin .. end see something, full_begin .. full_end everything in all rows."""
  seen = ok & (high > low)
  begin = tl.min(tl.where(seen, low, 2 ** 30), axis=0) // BLOCK
  end = (tl.max(tl.where(seen, high, 0), axis=0) + BLOCK - 1) // BLOCK
  full_begin = (tl.max(tl.where(ok, low, 0), axis=0) + BLOCK - 1) // BLOCK
  full_end = tl.min(tl.where(ok, high, 2 ** 30), axis=0) // BLOCK
  begin = tl.minimum(begin, end)
  full_begin = tl.maximum(tl.minimum(full_begin, end), begin)
  return begin, end, full_begin, tl.maximum(tl.minimum(full_end, end), full_begin)


@triton.jit
def load_block(pointer, block, C, stride: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
               MASKED: tl.constexpr):
  """[BLOCK, H], rows `stride` apart; 0 past C. Offsets inside the block fit 32 bits at any length."""
  i = tl.arange(0, BLOCK)
  at = pointer + tl.cast(block, tl.int64) * (BLOCK * stride) + i[:, None] * stride + tl.arange(0, H)[None, :]
  return tl.load(at, mask=(block * BLOCK + i < C)[:, None], other=0.0) if MASKED else tl.load(at)


@triton.jit
def softmax_step(s, top, total, SCALE: tl.constexpr, MASKED: tl.constexpr):
  """Online softmax over scores [rows, keys]: exponentials, what the sums so far shrink by, the new maxima and sums."""
  new = tl.maximum(top, tl.max(s, axis=1) * SCALE)
  shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
  p = tl.exp2(s * SCALE - shift[:, None])
  decay = tl.exp2(top - shift)
  return p, decay, new, total * decay + tl.sum(p, axis=1)


@triton.jit
def store_softmax(acc, top, total, row, ok, o, lse, H: tl.constexpr):
  """Its end: o and the natural lse of the rows; 0 and -inf where nothing was seen."""
  safe = tl.where(total > 0, total, 1.0)
  at_o = o + row[:, None] * H + tl.arange(0, H)[None, :]
  tl.store(at_o, (acc / safe[:, None]).to(o.dtype.element_ty), mask=ok[:, None])
  natural = (top + tl.log2(safe)) * 0.6931471805599453
  tl.store(lse + row, tl.where(total > 0, natural, float("-inf")), mask=ok)


@triton.jit
def _attend(acc, top, total, q, k, v, block, low, high, C, K: tl.constexpr, H: tl.constexpr,
            SCALE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
  """One step of online softmax: a block of keys."""
  keys = load_block(k, block, C, K * H, H, BLOCK, MASKED)
  s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
  if MASKED:
    c = block * BLOCK + tl.arange(0, BLOCK)
    s = tl.where((c[None, :] >= low[:, None]) & (c[None, :] < high[:, None]), s, float("-inf"))
  p, decay, top, total = softmax_step(s, top, total, SCALE, MASKED)
  values = load_block(v, block, C, K * H, H, BLOCK, MASKED)
  acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
  return acc, top, total


@triton.jit
def forward_kernel(q, k, v, low, high, o, lse,
                   B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
                   GP: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """o and lse of a tile, from one of SPLITS parts of its keys; o [SPLITS, B, T, N, H], lse [SPLITS, B, T, N].

  Long tiles, the last of the sequences, are launched first.
  """
  TILES: tl.constexpr = (T + ROWS // GP - 1) // (ROWS // GP)
  part = tl.program_id(0) % SPLITS
  item = tl.program_id(0) // SPLITS
  tile = TILES - 1 - item // (B * K)
  b, r = item % (B * K) // K, item % K
  token, head, ok = rows_of(tile, T, G, GP, ROWS)
  at = tl.cast(b, tl.int64) * T
  first = tl.load(low + at + token, mask=ok, other=0)
  stop = tl.load(high + at + token, mask=ok, other=0)
  begin, end, full_begin, full_end = blocks_of(first, stop, ok, BLOCK)
  if SPLITS > 1:
    size = (end - begin + SPLITS - 1) // SPLITS
    begin = tl.minimum(begin + part * size, end)
    end = tl.minimum(begin + size, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
  row = (at + token) * (K * G) + r * G + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  keys = (tl.cast(b, tl.int64) * C * K + r) * H
  acc = tl.zeros((ROWS, H), tl.float32)
  top = tl.full((ROWS,), float("-inf"), tl.float32)
  total = tl.zeros((ROWS,), tl.float32)
  for block in range(full_begin, full_end):
    acc, top, total = _attend(acc, top, total, queries, k + keys, v + keys, block, first, stop, C, K, H, SCALE,
                              BLOCK, PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):  # the other blocks: before, then after the full ones
    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
    acc, top, total = _attend(acc, top, total, queries, k + keys, v + keys, block, first, stop, C, K, H, SCALE,
                              BLOCK, PRECISION, True)
  store_softmax(acc, top, total, row + part.to(tl.int64) * (B * T) * (K * G), ok, o, lse, H)


@triton.jit
def combine_kernel(o, lse, out, out_lse, ROWS: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr,
                   CHUNK: tl.constexpr):
  """A row's o and lse over all keys, from those of o [PARTS, ROWS, H] and lse [PARTS, ROWS]; PP is PARTS rounded up."""
  row = tl.cast(tl.program_id(0), tl.int64)
  n = tl.arange(0, PP)
  part = tl.load(lse + n * ROWS + row, mask=n < PARTS, other=float("-inf"))
  top = tl.max(part, axis=0)
  shift = tl.where(top > float("-inf"), top, 0.0)
  total = tl.sum(tl.exp(part - shift), axis=0)
  safe = tl.where(total > 0, total, 1.0)
  acc = tl.zeros((H,), tl.float32)
  for begin in range(0, PARTS, CHUNK):
    some = begin + tl.arange(0, CHUNK)
    weight = tl.exp(tl.load(lse + some * ROWS + row, mask=some < PARTS, other=float("-inf")) - shift)
    at = (some * ROWS + row)[:, None] * H + tl.arange(0, H)[None, :]
    acc += tl.sum(weight[:, None] * tl.load(o + at, mask=(some < PARTS)[:, None], other=0.0), axis=0)
  tl.store(out + row * H + tl.arange(0, H), (acc / safe).to(out.dtype.element_ty))
  tl.store(out_lse + row, tl.where(total > 0, top + tl.log(safe), float("-inf")))


@triton.jit
def _dq_step(dq, q, do, lse, delta, k, v, block, low, high, C, K: tl.constexpr, H: tl.constexpr,
             SCALE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
  keys = load_block(k, block, C, K * H, H, BLOCK, MASKED)
  values = load_block(v, block, C, K * H, H, BLOCK, MASKED)
  s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * SCALE - lse[:, None]
  if MASKED:
    c = block * BLOCK + tl.arange(0, BLOCK)
    s = tl.where((c[None, :] >= low[:, None]) & (c[None, :] < high[:, None]), s, float("-inf"))
  dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
  ds = tl.exp2(s) * (dp - delta[:, None])
  return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit
def dq_kernel(q, k, v, o, do, lse, dlse, low, high, dq, base_2, delta,
              B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
              GP: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """dQ of a tile, times FACTOR, its lse in base 2, which is 0 where it is -inf, and its delta."""
  TILES: tl.constexpr = (T + ROWS // GP - 1) // (ROWS // GP)
  tile = TILES - 1 - tl.program_id(0) // (B * K)
  b, r = tl.program_id(0) % (B * K) // K, tl.program_id(0) % K
  token, head, ok = rows_of(tile, T, G, GP, ROWS)
  at = tl.cast(b, tl.int64) * T
  first = tl.load(low + at + token, mask=ok, other=0)
  stop = tl.load(high + at + token, mask=ok, other=0)
  begin, end, full_begin, full_end = blocks_of(first, stop, ok, BLOCK)
  row = (at + token) * (K * G) + r * G + head
  square = row[:, None] * H + tl.arange(0, H)[None, :]
  queries = tl.load(q + square, mask=ok[:, None], other=0.0)
  cotangents = tl.load(do + square, mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=0.0) * LOG2E
  # A row that sees nothing meets masked scores alone, has an o of zeros and no gradient of its lse.
  nothing = norm == float("-inf")
  norm = tl.where(nothing, 0.0, norm)
  tl.store(base_2 + row, norm, mask=ok)
  results = tl.load(o + square, mask=ok[:, None], other=0.0)
  shift = tl.sum(results.to(tl.float32) * cotangents.to(tl.float32), axis=1)
  shift -= tl.where(nothing, 0.0, tl.load(dlse + row, mask=ok, other=0.0))
  tl.store(delta + row, shift, mask=ok)
  keys = (tl.cast(b, tl.int64) * C * K + r) * H
  acc = tl.zeros((ROWS, H), tl.float32)
  for block in range(full_begin, full_end):
    acc = _dq_step(acc, queries, cotangents, norm, shift, k + keys, v + keys, block, first, stop, C, K, H, SCALE,
                   BLOCK, PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):
    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
    acc = _dq_step(acc, queries, cotangents, norm, shift, k + keys, v + keys, block, first, stop, C, K, H, SCALE,
                   BLOCK, PRECISION, True)
  tl.store(dq + square, (acc * FACTOR).to(dq.dtype.element_ty), mask=ok[:, None])


@triton.jit
def _dkv_step(dk, dv, keys, values, q, do, lse, delta, low, high, tile, c, T, K: tl.constexpr,
              G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
              PRECISION: tl.constexpr, MASKED: tl.constexpr):
  """One tile of queries; scores are [keys, rows] so that the products need no transposed accumulators."""
  TOKENS: tl.constexpr = ROWS // GP
  m = tl.arange(0, ROWS)
  start = tl.cast(tile, tl.int64) * TOKENS  # offsets from there fit 32 bits
  ok = (tile * TOKENS + m // GP < T) & (m % GP < G)
  row = m // GP * (K * G) + m % GP
  square = row[:, None] * H + tl.arange(0, H)[None, :]
  q += start * (K * G * H)
  do += start * (K * G * H)
  lse += start * (K * G)
  delta += start * (K * G)
  # Tiles whose tokens all see all of the block have all of their tokens; only heads may be padding.
  MASK_ROWS: tl.constexpr = MASKED or G < GP
  queries = tl.load(q + square, mask=ok[:, None], other=0.0) if MASK_ROWS else tl.load(q + square)
  norm = tl.load(lse + row, mask=ok, other=0.0) if MASK_ROWS else tl.load(lse + row)
  s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE - norm[None, :]
  if MASKED:
    first = tl.load(low + start + m // GP, mask=ok, other=0)
    stop = tl.load(high + start + m // GP, mask=ok, other=0)
    s = tl.where((c[:, None] >= first[None, :]) & (c[:, None] < stop[None, :]), s, float("-inf"))
  p = tl.exp2(s)
  cotangents = tl.load(do + square, mask=ok[:, None], other=0.0) if MASK_ROWS else tl.load(do + square)
  dv = tl.dot(p.to(values.dtype), cotangents, dv, input_precision=PRECISION)
  dp = tl.dot(values, tl.trans(cotangents), input_precision=PRECISION)
  shift = tl.load(delta + row, mask=ok, other=0.0) if MASK_ROWS else tl.load(delta + row)
  ds = p * (dp - shift[None, :])
  dk = tl.dot(ds.to(keys.dtype), queries, dk, input_precision=PRECISION)
  return dk, dv


@triton.jit
def dkv_kernel(q, k, v, do, lse, delta, low, high, ranges, dk, dv,
               B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
               GP: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr,
               SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """dK, times FACTOR, and dV of a block of keys, from one of SPLITS parts of the queries that see it.

  `ranges` int32[B, blocks, 4] has, per block of keys, the tokens that see any of it, [0] .. [1] - 1, and
  those that see all of it, [2] .. [3] - 1. dk and dv are [B, SPLITS, C, K, H].
  """
  BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
  TOKENS: tl.constexpr = ROWS // GP
  part = tl.program_id(0) % SPLITS  # blocks at the beginning have most to do and are launched first
  b, r = tl.program_id(0) // SPLITS % (B * K) // K, tl.program_id(0) // SPLITS % K
  block = tl.program_id(0) // (SPLITS * B * K)
  c = block * BLOCK + tl.arange(0, BLOCK)
  base = (tl.cast(b, tl.int64) * C * K + r) * H
  keys = load_block(k + base, block, C, K * H, H, BLOCK, True)
  values = load_block(v + base, block, C, K * H, H, BLOCK, True)
  bounds = ranges + (b * BLOCKS + block) * 4
  some_begin = tl.load(bounds) // TOKENS
  some_end = (tl.load(bounds + 1) + TOKENS - 1) // TOKENS
  per_part = (tl.maximum(some_end - some_begin, 0) + SPLITS - 1) // SPLITS
  begin = some_begin + part * per_part
  end = tl.maximum(tl.minimum(begin + per_part, some_end), begin)
  full_begin = tl.minimum(tl.maximum((tl.load(bounds + 2) + TOKENS - 1) // TOKENS, begin), end)
  full_end = tl.maximum(tl.minimum(tl.load(bounds + 3) // TOKENS, end), full_begin)
  at = tl.cast(b, tl.int64) * T
  rows = at * (K * G) + r * G
  q += rows * H
  do += rows * H
  lse += rows
  delta += rows
  acc_k = tl.zeros((BLOCK, H), tl.float32)
  acc_v = tl.zeros((BLOCK, H), tl.float32)
  for tile in range(full_begin, full_end):
    acc_k, acc_v = _dkv_step(acc_k, acc_v, keys, values, q, do, lse, delta, low + at, high + at, tile, c,
                             T, K, G, GP, H, SCALE, ROWS, PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):
    tile = tl.where(i < full_begin, i, i + (full_end - full_begin))
    acc_k, acc_v = _dkv_step(acc_k, acc_v, keys, values, q, do, lse, delta, low + at, high + at, tile, c,
                             T, K, G, GP, H, SCALE, ROWS, PRECISION, True)
  out = ((b * SPLITS + part).to(tl.int64) * C + c[:, None]) * (K * H) + r * H + tl.arange(0, H)[None, :]
  tl.store(dk + out, (acc_k * FACTOR).to(dk.dtype.element_ty), mask=c[:, None] < C)
  tl.store(dv + out, acc_v.to(dv.dtype.element_ty), mask=c[:, None] < C)
