"""Triton kernels of `token_top_k` and `token_attention`; tokens.py calls them.

A set of tokens is a row of bits, `masked.packed`. The choice goes through scores that lie in memory, of a slice of the
queries, one row per program. Attention reads the bits of a tile beside its keys, one word per row and 32 keys; it needs
neither lists of tokens nor positions. `walk` int32[..., BLOCKS] names, per tile of queries, the blocks of keys of which
some query has a token, and `counts` how many; for dK and dV tiles of queries per block of keys.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.lightning_kernels import members, tile_of, weighted
from pallas_kernels.triton.range_kernels import LOG2E, blocks_of, load_block, rows_of, softmax_step, store_softmax

# --- the choice -----------------------------------------------------------------


@triton.jit
def token_scores_kernel(q_idx, weights, k_idx, low, high, scores, B: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                        R: tl.constexpr, HEADS: tl.constexpr, HI: tl.constexpr, TOKENS: tl.constexpr,
                        BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """scores float32[B, T, R, S]; those of blocks that no token of a tile sees are not written. SPLITS programs share the
  keys of a tile."""
  item, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
  b, r = item % (B * R) // R, item % R
  tile = (T + TOKENS - 1) // TOKENS - 1 - item // (B * R)  # long tiles first
  at, ok, first, stop = tile_of(low, high, b, tile, T, TOKENS)
  begin, end, _, _ = blocks_of(first, stop, ok, BLOCK)
  row = at * R + r
  size = (end - begin + SPLITS - 1) // SPLITS
  first_block = begin + part * size
  for block in range(first_block, tl.minimum(first_block + size, end)):
    index_keys = load_block(k_idx + tl.cast(b, tl.int64) * S * HI, block, S, HI, HI, BLOCK, True)
    s = weighted(q_idx, weights, row, ok, index_keys, HEADS, HI, TOKENS, BLOCK, PRECISION)
    c = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(scores + row[:, None] * S + c[None, :], s, mask=ok[:, None] & (c < S)[None, :])


@triton.jit
def _ranks(row, i, first, stop):
  """uint32 in the order of the scores of the tokens i, 0 of those that are not seen; no score has 0."""
  seen = (i >= first) & (i < stop)
  value = tl.load(row + i, mask=seen, other=0.0)
  value = tl.where(value == 0.0, 0.0, value)  # -0 is no less than 0
  bits = value.to(tl.uint32, bitcast=True)
  bits = tl.where((bits >> 31) > 0, bits ^ 0xffffffff, bits ^ 0x80000000)
  return tl.where(seen, tl.maximum(bits, 1), 0)


@triton.jit
def _of_registers(ranks, COUNT: tl.constexpr):
  """The COUNT-th largest rank, and how many of those equal to it are among the COUNT; of more ranks than COUNT.

  Bit by bit from above: one more of the threshold while COUNT ranks reach it, and no further once they are just COUNT.
  """
  least = tl.cast(0, tl.uint32)
  bit = tl.cast(0x80000000, tl.uint32)
  while bit > 0:
    reach = tl.sum((ranks >= (least | bit)).to(tl.int32), axis=0)
    least = tl.where(reach >= COUNT, least | bit, least)
    bit = tl.where(reach == COUNT, tl.cast(0, tl.uint32), bit >> 1)
  return least, COUNT - tl.sum((ranks > least).to(tl.int32), axis=0)


@triton.jit
def _eight_bits(row, first, stop, least, left, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
  """`least` with its bits from SHIFT on, and how many of the ranks that agree with it in those are left to take: by a
  histogram of the ranks that agree in the bits above. What is not seen has the rank 0, below all that is taken."""
  counts = tl.zeros((256,), tl.int32)
  for chunk in range(first // CHUNK, (stop + CHUNK - 1) // CHUNK):
    ranks = _ranks(row, chunk * CHUNK + tl.arange(0, CHUNK), first, stop)
    agree = ((ranks >> SHIFT) >> 8) == ((least >> SHIFT) >> 8)  # twice: a shift by 32 is not defined
    counts += tl.histogram(((ranks >> SHIFT) & 255).to(tl.int32), 256, mask=agree)
  reach = tl.cumsum(counts, axis=0, reverse=True)
  here = (reach >= left) & (reach - counts < left)
  digit = tl.sum(tl.where(here, tl.arange(0, 256), 0), axis=0)
  above = tl.sum(tl.where(here, reach - counts, 0), axis=0)
  return least | (digit.to(tl.uint32) << SHIFT), left - above


@triton.jit
def _of_memory(row, first, stop, COUNT: tl.constexpr, CHUNK: tl.constexpr):
  """The same of a row that registers do not hold, in four passes over it."""
  least, left = _eight_bits(row, first, stop, tl.cast(0, tl.uint32), COUNT, 24, CHUNK)
  least, left = _eight_bits(row, first, stop, least, left, 16, CHUNK)
  least, left = _eight_bits(row, first, stop, least, left, 8, CHUNK)
  return _eight_bits(row, first, stop, least, left, 0, CHUNK)


@triton.jit
def _words(chosen, CHUNK: tl.constexpr):
  """int32[CHUNK / 32] of bool[CHUNK]."""
  bits = tl.reshape(chosen.to(tl.int32), (CHUNK // 32, 32))
  return tl.sum(bits << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def _taken(ranks, least, left, before):
  """Which of a chunk are chosen, and the ties of it and of chunks before it: `left` of the ties are, the first ones."""
  ties = ranks == least
  place = before + tl.cumsum(ties.to(tl.int32), axis=0)
  return (ranks > least) | (ties & (place <= left)), before + tl.sum(ties.to(tl.int32), axis=0)


@triton.jit
def token_choose_kernel(scores, low, high, sets, R: tl.constexpr, S: tl.constexpr, COUNT: tl.constexpr,
                        WORDS: tl.constexpr, CHUNK: tl.constexpr):
  """sets int32[B, T, R, WORDS]: the COUNT tokens with the best scores of each row, all that are seen where they are
  fewer."""
  CHUNKS: tl.constexpr = (S + CHUNK - 1) // CHUNK
  line = tl.cast(tl.program_id(0), tl.int64)
  first, stop = tl.load(low + line // R), tl.load(high + line // R)
  row, out = scores + line * S, sets + line * WORDS
  i, word = tl.arange(0, CHUNK), tl.arange(0, CHUNK // 32)
  if stop - first <= COUNT:
    for chunk in range(CHUNKS):
      c = chunk * CHUNK + i
      some = _words((c >= first) & (c < stop), CHUNK)
      tl.store(out + chunk * (CHUNK // 32) + word, some, mask=chunk * (CHUNK // 32) + word < WORDS)
  elif CHUNKS == 1:
    ranks = _ranks(row, i, first, stop)
    least, left = _of_registers(ranks, COUNT)
    chosen = ranks >= least
    if tl.sum(chosen.to(tl.int32), axis=0) > COUNT:
      chosen, _ = _taken(ranks, least, left, 0)
    tl.store(out + word, _words(chosen, CHUNK), mask=word < WORDS)
  else:
    least, left = _of_memory(row, first, stop, COUNT, CHUNK)
    before = 0
    for chunk in range(CHUNKS):
      ranks = _ranks(row, chunk * CHUNK + i, first, stop)
      chosen, before = _taken(ranks, least, left, before)
      tl.store(out + chunk * (CHUNK // 32) + word, _words(chosen, CHUNK),
               mask=chunk * (CHUNK // 32) + word < WORDS)


# --- attention ------------------------------------------------------------------


@triton.jit
def forward_kernel(q, k, v, sets, walk, counts, o, lse, B: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
                   K: tl.constexpr, R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr,
                   WORDS: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """o and lse of a tile, from one of SPLITS parts of its blocks; o [SPLITS, B, T, N, H], lse [SPLITS, B, T, N]."""
  TILES: tl.constexpr = (T + ROWS // GP - 1) // (ROWS // GP)
  BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
  part, item = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
  tile = TILES - 1 - item // (B * K)  # long tiles first
  b, r = item % (B * K) // K, item % K
  token, head, ok = rows_of(tile, T, G, GP, ROWS)
  at = tl.cast(b, tl.int64) * T + token
  row = at * (K * G) + r * G + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  own = sets + (at * R + r * R // K) * WORDS
  which = (tl.cast(b, tl.int64) * R + r * R // K) * TILES + tile
  count = tl.load(counts + which)
  size = (count + SPLITS - 1) // SPLITS
  begin = tl.minimum(part * size, count)
  end = tl.minimum(begin + size, count)
  walk += which * BLOCKS
  keys_at = (tl.cast(b, tl.int64) * C * K + r) * H
  acc = tl.zeros((ROWS, H), tl.float32)
  top = tl.full((ROWS,), float("-inf"), tl.float32)
  total = tl.zeros((ROWS,), tl.float32)
  block = tl.load(walk + begin, mask=begin < end, other=0)
  for i in range(begin, end):
    following = tl.load(walk + i + 1, mask=i + 1 < end, other=0)  # ahead of the loads that wait for it
    seen = members(own, ok, block, WORDS, BLOCK, False)
    keys = load_block(k + keys_at, block, C, K * H, H, BLOCK, True)
    s = tl.where(seen, tl.dot(queries, tl.trans(keys), input_precision=PRECISION), float("-inf"))
    p, decay, top, total = softmax_step(s, top, total, SCALE, True)
    values = load_block(v + keys_at, block, C, K * H, H, BLOCK, True)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    block = following
  store_softmax(acc, top, total, tl.cast(part, tl.int64) * (B * T * K * G) + row, ok, o, lse, H)


@triton.jit
def dq_kernel(q, k, v, do, lse, delta, sets, walk, counts, dq, base_2, B: tl.constexpr, T: tl.constexpr,
              C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr,
              WORDS: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
              PRECISION: tl.constexpr):
  """dQ of a tile, times FACTOR, and its lse in base 2, which is 0 where it is -inf."""
  TILES: tl.constexpr = (T + ROWS // GP - 1) // (ROWS // GP)
  BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
  tile = TILES - 1 - tl.program_id(0) // (B * K)
  b, r = tl.program_id(0) % (B * K) // K, tl.program_id(0) % K
  token, head, ok = rows_of(tile, T, G, GP, ROWS)
  at = tl.cast(b, tl.int64) * T + token
  row = at * (K * G) + r * G + head
  square = row[:, None] * H + tl.arange(0, H)[None, :]
  queries = tl.load(q + square, mask=ok[:, None], other=0.0)
  cotangents = tl.load(do + square, mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=0.0) * LOG2E
  norm = tl.where(norm == float("-inf"), 0.0, norm)  # a row that sees nothing meets masked scores alone
  tl.store(base_2 + row, norm, mask=ok)
  shift = tl.load(delta + row, mask=ok, other=0.0)
  own = sets + (at * R + r * R // K) * WORDS
  which = (tl.cast(b, tl.int64) * R + r * R // K) * TILES + tile
  count = tl.load(counts + which)
  walk += which * BLOCKS
  keys_at = (tl.cast(b, tl.int64) * C * K + r) * H
  acc = tl.zeros((ROWS, H), tl.float32)
  block = tl.load(walk, mask=count > 0, other=0)
  for i in range(count):
    following = tl.load(walk + i + 1, mask=i + 1 < count, other=0)
    seen = members(own, ok, block, WORDS, BLOCK, False)
    keys = load_block(k + keys_at, block, C, K * H, H, BLOCK, True)
    values = load_block(v + keys_at, block, C, K * H, H, BLOCK, True)
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE - norm[:, None]
    s = tl.where(seen, s, float("-inf"))
    dp = tl.dot(cotangents, tl.trans(values), input_precision=PRECISION)
    ds = tl.exp2(s) * (dp - shift[:, None])
    acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    block = following
  tl.store(dq + square, (acc * FACTOR).to(dq.dtype.element_ty), mask=ok[:, None])


@triton.jit
def dkv_kernel(q, k, v, do, lse, delta, sets, walk, counts, dk, dv, B: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
               K: tl.constexpr, R: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr,
               WORDS: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, SPLITS: tl.constexpr,
               ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """dK, times FACTOR, and dV of a block of keys, from one of SPLITS parts of the tiles that have some of it:
  float32[B, SPLITS, C, K, H]. Scores are [keys, rows], so that the products need no transposed accumulators."""
  TOKENS: tl.constexpr = ROWS // GP
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
  part, item = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS  # blocks at the beginning have most to do
  b, r, block = item % (B * K) // K, item % K, item // (B * K)
  keys_at = (tl.cast(b, tl.int64) * C * K + r) * H
  keys = load_block(k + keys_at, block, C, K * H, H, BLOCK, True)
  values = load_block(v + keys_at, block, C, K * H, H, BLOCK, True)
  which = (tl.cast(b, tl.int64) * R + r * R // K) * BLOCKS + block
  count = tl.load(counts + which)
  size = (count + SPLITS - 1) // SPLITS
  begin = tl.minimum(part * size, count)
  end = tl.minimum(begin + size, count)
  walk += which * TILES
  acc_k = tl.zeros((BLOCK, H), tl.float32)
  acc_v = tl.zeros((BLOCK, H), tl.float32)
  tile = tl.load(walk + begin, mask=begin < end, other=0)
  for i in range(begin, end):
    following = tl.load(walk + i + 1, mask=i + 1 < end, other=0)
    token, head, ok = rows_of(tile, T, G, GP, ROWS)
    at = tl.cast(b, tl.int64) * T + token
    row = at * (K * G) + r * G + head
    square = row[:, None] * H + tl.arange(0, H)[None, :]
    seen = members(sets + (at * R + r * R // K) * WORDS, ok, block, WORDS, BLOCK, True)
    queries = tl.load(q + square, mask=ok[:, None], other=0.0)
    norm = tl.load(lse + row, mask=ok, other=0.0)
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE - norm[None, :]
    p = tl.exp2(tl.where(seen, s, float("-inf")))
    cotangents = tl.load(do + square, mask=ok[:, None], other=0.0)
    acc_v = tl.dot(p.to(values.dtype), cotangents, acc_v, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(cotangents), input_precision=PRECISION)
    shift = tl.load(delta + row, mask=ok, other=0.0)
    ds = p * (dp - shift[None, :])
    acc_k = tl.dot(ds.to(keys.dtype), queries, acc_k, input_precision=PRECISION)
    tile = following
  c = block * BLOCK + tl.arange(0, BLOCK)
  out = ((b * SPLITS + part).to(tl.int64) * C + c[:, None]) * (K * H) + r * H + tl.arange(0, H)[None, :]
  tl.store(dk + out, acc_k * FACTOR, mask=c[:, None] < C)
  tl.store(dv + out, acc_v, mask=c[:, None] < C)
