"""Triton kernels that score blocks for a top-k; top_k.py calls them.

A tile is a few neighbouring tokens with all heads that score together. It goes through the keys it sees and writes
one line of block scores per token and KV head. Long tiles, the last of the sequences, are launched first.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.range_kernels import blocks_of, load_block, rows_of


@triton.jit
def compressed_run(first, position, C, LEN: tl.constexpr, STRIDE: tl.constexpr):
  """The compressed blocks low .. high - 1 inside the tokens first .. position."""
  high = tl.where(position >= LEN - 1, (tl.maximum(position, LEN - 1) - (LEN - 1)) // STRIDE + 1, 0)
  return (first + STRIDE - 1) // STRIDE, tl.minimum(high, C)


@triton.jit
def _part(begin, end, full_begin, full_end, part, SPLITS: tl.constexpr):
  size = (end - begin + SPLITS - 1) // SPLITS
  begin = tl.minimum(begin + part * size, end)
  end = tl.minimum(begin + size, end)
  full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
  return begin, end, full_begin, tl.maximum(tl.minimum(full_end, end), full_begin)


@triton.jit
def columns(GP: tl.constexpr, ROWS: tl.constexpr):
  """Token and head of the rows of a tile, in an order that leaves all heads of a token in one thread.

  A thread of a tensor core product holds the columns 8i + 2t and 8i + 2t + 1 for all i, and four neighbouring
  threads the four t. So t numbers tokens, and what else numbers the columns heads.
  """
  n = tl.arange(0, ROWS)
  if 2 <= GP and GP <= ROWS // 4:
    return n // 2 % 4 + n // (4 * GP) * 4, n % 2 + n // 8 * 2 % GP
  else:
    return n // GP, n % GP


@triton.jit
def over_heads(fold: tl.constexpr, x, GP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr):
  """[KEYS, ROWS] with columns in the order of `columns` to [KEYS, tokens], by `fold`: tl.sum or tl.max."""
  TOKENS: tl.constexpr = ROWS // GP
  if 2 <= GP and GP <= ROWS // 4:
    x = fold(tl.reshape(x, (KEYS, TOKENS // 4, GP // 2, 4, 2)), axis=4)
    return tl.reshape(fold(x, axis=2), (KEYS, TOKENS))
  else:
    return fold(tl.reshape(x, (KEYS, TOKENS, GP)), axis=2)


@triton.jit
def _sum_keys(x, RATIO: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr):
  """[KEYS, TOKENS] with rows in the order of `_compressed_step` to [KEYS / RATIO, TOKENS]."""
  if RATIO == 1:
    return x
  elif RATIO <= 16:
    x = tl.sum(tl.reshape(x, (KEYS // 16, 2, 16 // RATIO, RATIO // 2, TOKENS)), axis=1)
    return tl.reshape(tl.sum(x, axis=2), (KEYS // RATIO, TOKENS))
  else:
    return tl.sum(tl.reshape(x, (KEYS // RATIO, RATIO, TOKENS)), axis=1)


@triton.jit
def _compressed_step(out, q, norm, k, block, low, high, C, K: tl.constexpr, H: tl.constexpr, GP: tl.constexpr,
                     LEN: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
                     WHOLE: tl.constexpr):
  """What a block of compressed keys gives to the selection blocks that they begin in, and to the ones after.

  Scores are [keys, rows]: a thread holds all heads of a token for a few keys and sums them alone. Rows i and i + 8 of
  the product, which one thread holds too, are neighbouring keys. Sums over heads are masked, not what goes into them.
  """
  RATIO: tl.constexpr = SIZE // STRIDE
  PER: tl.constexpr = BLOCK // RATIO
  TOKENS: tl.constexpr = ROWS // GP
  i = tl.arange(0, BLOCK)
  key = i // 16 * 16 + i % 8 * 2 + i // 8 % 2 if 2 <= RATIO and RATIO <= 16 else i
  at = k + tl.cast(block, tl.int64) * (BLOCK * K * H) + key[:, None] * (K * H) + tl.arange(0, H)[None, :]
  c = block * BLOCK + key
  keys = tl.load(at) if WHOLE else tl.load(at, mask=(c < C)[:, None], other=0.0)
  s = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
  p = over_heads(tl.sum, tl.exp2(s * SCALE - norm[None, :]), GP, BLOCK, ROWS)
  p = tl.where((c[:, None] >= low[None, :]) & (c[:, None] < high[None, :]), p, 0.0)
  nth = key % RATIO * STRIDE
  own_weight = (tl.minimum(nth + LEN, SIZE) - nth).to(tl.float32) / STRIDE
  own = _sum_keys(p * own_weight[:, None], RATIO, BLOCK, TOKENS)
  at = out + tl.arange(0, TOKENS)[None, :] * (2 * WIDTH) + (block * PER + tl.arange(0, PER))[:, None]
  tl.store(at, own)
  if LEN > STRIDE:
    next_weight = tl.maximum(nth + LEN - SIZE, 0).to(tl.float32) / STRIDE
    tl.store(at + (WIDTH + 1), _sum_keys(p * next_weight[:, None], RATIO, BLOCK, TOKENS))


@triton.jit
def _clear(out, begin, end, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
  for block in range(begin, end):
    tl.store(out + tl.arange(0, TOKENS) * (2 * WIDTH) + block, tl.zeros((TOKENS,), tl.float32))


@triton.jit
def compressed_scores_kernel(q, k, lse, first, position, scores, B: tl.constexpr, T: tl.constexpr,
                             C: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                             H: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr,
                             SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                             SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """scores float32[tiles * B * K, TOKENS, 2, WIDTH]: [0] what a block has from the compressed blocks that begin in it,
  [1] what it has from those that begin in the block before. Written is what any token of a tile sees, and more."""
  TOKENS: tl.constexpr = ROWS // GP
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  PER: tl.constexpr = BLOCK // (SIZE // STRIDE)
  item = TILES * B * K - 1 - tl.program_id(0) // SPLITS
  tile, b, r = item // (B * K), item % (B * K) // K, item % K
  at = tl.cast(b, tl.int64) * T + tile * TOKENS
  token = tl.arange(0, TOKENS)
  ok = tile * TOKENS + token < T
  low, high = compressed_run(tl.load(first + at + token, mask=ok, other=0),
                             tl.load(position + at + token, mask=ok, other=-1), C, LEN, STRIDE)
  # Runs do not decrease with the token, so those of the first and the last tell what the tile sees. (Loads, where a
  # reduction would do: only so does the compiler know that all threads have the same loop.)
  last = at + tl.minimum(TOKENS, T - tile * TOKENS) - 1
  see_begin, see_end = tl.maximum(tl.load(first + at), 0), tl.load(position + last)
  begin, _ = compressed_run(see_begin, see_begin, C, LEN, STRIDE)
  _, end = compressed_run(see_begin, see_end, C, LEN, STRIDE)
  begin, end = begin // BLOCK, (end + BLOCK - 1) // BLOCK
  begin = tl.minimum(begin, end)
  out = scores + tl.cast(item, tl.int64) * (TOKENS * 2 * WIDTH)
  if tl.program_id(0) % SPLITS == 0:  # visible blocks without a compressed one score 0
    see_begin, see_end = see_begin // SIZE, tl.minimum(see_end // SIZE + 1, WIDTH)
    _clear(out, see_begin, begin * PER, TOKENS, WIDTH)
    _clear(out, tl.maximum(see_begin, end * PER), see_end, TOKENS, WIDTH)
    if LEN > STRIDE:
      _clear(out + WIDTH, see_begin, begin * PER + (begin < end), TOKENS, WIDTH)
      _clear(out + WIDTH, tl.maximum(see_begin, end * PER + (begin < end)), see_end, TOKENS, WIDTH)
  if SPLITS > 1:
    begin, end, _, _ = _part(begin, end, begin, end, tl.program_id(0) % SPLITS, SPLITS)
  token, head = columns(GP, ROWS)
  ok = (tile * TOKENS + token < T) & (head < G)
  row = (at + token) * (K * G) + r * G + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=float("-inf")) * 1.4426950408889634
  norm = tl.where(norm == float("-inf"), float("inf"), norm)  # rows that see nothing give nothing
  keys = k + (tl.cast(b, tl.int64) * C * K + r) * H
  for block in range(begin, tl.minimum(end, C // BLOCK)):
    _compressed_step(out, queries, norm, keys, block, low, high, C, K, H, GP, LEN, STRIDE, SIZE, SCALE, ROWS, BLOCK,
                     WIDTH, PRECISION, True)
  if C % BLOCK > 0 and begin <= C // BLOCK and end > C // BLOCK:
    _compressed_step(out, queries, norm, keys, C // BLOCK, low, high, C, K, H, GP, LEN, STRIDE, SIZE, SCALE, ROWS,
                     BLOCK, WIDTH, PRECISION, False)


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
  """scores float32[tiles * B, ROWS, WIDTH]; a row is a token and one of its K index queries."""
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
