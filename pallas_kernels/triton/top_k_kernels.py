"""Triton kernels that score blocks and take the best J; top_k.py calls them.

A tile is a few neighbouring tokens with all heads that score together. Its scores go to memory, but to a few lines
per thread block that are written again with the next tile and stay in the cache: nothing grows with T * S. Few
queries (decoding) take two launches instead, scores by parts of the keys and then the choice.

The choice repeats "the largest, and of equals the lowest block" J times over the scores in registers. Forced
blocks score +inf, invisible ones -inf.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.range_kernels import blocks_of
from pallas_kernels.triton.range_kernels import load_block
from pallas_kernels.triton.range_kernels import rows_of

FLOAT32_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
NO_BLOCK: tl.constexpr = tl.constexpr(2 ** 31 - 1)


@triton.jit
def _part(begin, end, full_begin, full_end, part, SPLITS: tl.constexpr):
  size = (end - begin + SPLITS - 1) // SPLITS
  begin = tl.minimum(begin + part * size, end)
  end = tl.minimum(begin + size, end)
  full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
  return begin, end, full_begin, tl.maximum(tl.minimum(full_end, end), full_begin)


@triton.jit
def _compressed_run(first, position, token, ok, C, LEN: tl.constexpr, STRIDE: tl.constexpr):
  """The compressed blocks low .. high - 1 that the tokens see."""
  position = tl.load(position + token, mask=ok, other=-1)
  high = tl.where(position >= LEN - 1, (tl.maximum(position, LEN - 1) - (LEN - 1)) // STRIDE + 1, 0)
  low = (tl.load(first + token, mask=ok, other=0) + STRIDE - 1) // STRIDE
  return low, tl.minimum(high, C)


@triton.jit
def _compressed_step(out, q, norm, k, block, low, high, C, K: tl.constexpr, H: tl.constexpr, GP: tl.constexpr,
                     SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                     PRECISION: tl.constexpr, MASKED: tl.constexpr):
  """Sums over the group of exp(score - lse), of a block of keys. Scores are [keys, rows]: so the heads of a group
  lie in neighbouring columns, which the tensor core leaves in four neighbouring threads."""
  TOKENS: tl.constexpr = ROWS // GP
  keys = load_block(k, block, C, K * H, H, BLOCK, MASKED)
  s = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
  p = tl.exp2(s * SCALE - norm[None, :])
  c = block * BLOCK + tl.arange(0, BLOCK)
  if MASKED:
    p = tl.where((c[:, None] >= low[None, :]) & (c[:, None] < high[None, :]), p, 0.0)
  p = tl.sum(tl.reshape(p, (BLOCK, TOKENS, GP)), axis=2)
  tl.store(out + tl.arange(0, TOKENS)[None, :] * WIDTH + c[:, None], p)


@triton.jit
def _compressed_scores(out, q, k, lse, first, position, tile, b, r, part, T: tl.constexpr, C: tl.constexpr,
                       K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, LEN: tl.constexpr,
                       STRIDE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                       WIDTH: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """Writes `out` float32[TOKENS, WIDTH] from one of SPLITS parts of the keys."""
  token, head, ok = rows_of(tile, T, G, GP, ROWS)
  at = tl.cast(b, tl.int64) * T
  low, high = _compressed_run(first + at, position + at, token, ok, C, LEN, STRIDE)
  begin, end, full_begin, full_end = blocks_of(low, high, ok, BLOCK)
  if SPLITS > 1:
    begin, end, full_begin, full_end = _part(begin, end, full_begin, full_end, part, SPLITS)
  row = (at + token) * (K * G) + r * G + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=float("-inf")) * 1.4426950408889634
  norm = tl.where(norm == float("-inf"), float("inf"), norm)  # rows that see nothing give nothing
  keys = (tl.cast(b, tl.int64) * C * K + r) * H
  for block in range(full_begin, full_end):
    _compressed_step(out, queries, norm, k + keys, block, low, high, C, K, H, GP, SCALE, ROWS, BLOCK, WIDTH,
                     PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):
    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
    _compressed_step(out, queries, norm, k + keys, block, low, high, C, K, H, GP, SCALE, ROWS, BLOCK, WIDTH,
                     PRECISION, True)


@triton.jit
def _index_step(out, q, k, block, low, high, S, H: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
                MASKED: tl.constexpr):
  """Best scores of the selection blocks inside a block of keys."""
  PER: tl.constexpr = BLOCK // SIZE if BLOCK > SIZE else 1
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
def _index_scores(out, q, k, first, position, tile, b, part, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
                  KP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """Writes `out` float32[ROWS, WIDTH]; a row is a token and one of its K index queries."""
  token, head, ok = rows_of(tile, T, K, KP, ROWS)
  at = tl.cast(b, tl.int64) * T
  low = tl.load(first + at + token, mask=ok, other=0)
  high = tl.minimum(tl.load(position + at + token, mask=ok, other=-1) + 1, S)
  begin, end, full_begin, full_end = blocks_of(low, high, ok, BLOCK)
  if SPLITS > 1:
    begin, end, full_begin, full_end = _part(begin, end, full_begin, full_end, part, SPLITS)
  row = (at + token) * K + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  keys = k + tl.cast(b, tl.int64) * S * H
  for block in range(full_begin, full_end):
    _index_step(out, queries, keys, block, low, high, S, H, SIZE, SCALE, ROWS, BLOCK, WIDTH, PRECISION, False)
  for i in range(begin, end - (full_end - full_begin)):
    block = tl.where(i < full_begin, i, i + (full_end - full_begin))
    _index_step(out, queries, keys, block, low, high, S, H, SIZE, SCALE, ROWS, BLOCK, WIDTH, PRECISION, True)


@triton.jit
def _block_scores(row, j, ok, begin_block, own_block, written_begin, written_end, LEN: tl.constexpr,
                  STRIDE: tl.constexpr, SUB: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
                  INITIAL: tl.constexpr, LOCAL: tl.constexpr):
  """Scores of the blocks `j` [lines or 1, n] from the lines at `row`, +inf if forced, -inf if invisible."""
  if STRIDE == 0:  # SUB parts of a block, the best one counts
    value = (j * 0).to(tl.float32) + float("-inf")
    for n in tl.static_range(SUB):
      part = j * SUB + n
      here = (part >= written_begin) & (part < written_end) & ok[:, None]
      value = tl.maximum(value, tl.load(row + part, mask=here, other=float("-inf")))
  else:
    RATIO: tl.constexpr = SIZE // STRIDE
    EARLIER: tl.constexpr = (LEN - 1) // STRIDE  # compressed blocks that begin before and reach into it
    if RATIO & (RATIO - 1) == 0:  # those that begin in it, with one wide load
      nth = tl.arange(0, RATIO)
      c = (j * RATIO)[:, :, None] + nth[None, None, :]
      weight = tl.minimum(nth * STRIDE + LEN, SIZE) - nth * STRIDE
      here = (c >= written_begin) & (c < written_end) & ok[:, None, None]
      own = tl.load(row[:, :, None] + c, mask=here, other=0.0)
      value = tl.sum(own * (weight.to(tl.float32) / STRIDE)[None, None, :], axis=2)
      START: tl.constexpr = 0
    else:
      value = (j * 0).to(tl.float32) + tl.where(ok, 0.0, 0.0)[:, None]
      START: tl.constexpr = RATIO
    for n in tl.static_range(EARLIER + START):
      c = j * RATIO + n - EARLIER
      shared = tl.minimum((n - EARLIER) * STRIDE + LEN, SIZE) - tl.maximum((n - EARLIER) * STRIDE, 0)
      here = (c >= written_begin) & (c < written_end) & ok[:, None]
      value += tl.load(row + c, mask=here, other=0.0) * (shared / STRIDE)
  value = tl.minimum(tl.maximum(value, -FLOAT32_MAX), FLOAT32_MAX)
  forced = (j < begin_block[:, None] + INITIAL) | (j > own_block[:, None] - LOCAL)
  visible = (j >= begin_block[:, None]) & (j <= own_block[:, None]) & (j < BLOCKS)
  return tl.where(visible, tl.where(forced, float("inf"), value), float("-inf"))


@triton.jit
def _choose(scores, indices, first, position, tile, b, r, written_begin, written_end, T: tl.constexpr,
            K: tl.constexpr, KP: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, LEN: tl.constexpr,
            STRIDE: tl.constexpr, SUB: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, J: tl.constexpr,
            JP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, SELECT: tl.constexpr,
            SWEEP: tl.constexpr, GROUP: tl.constexpr):
  """indices[b, t, r, :] of a tile from its lines of `scores`, SELECT lines at a time.

  A line has SUB scores per selection block if STRIDE = 0, else one per compressed block, each of which counts
  for a selection block by the strides they share. Past written_begin .. written_end - 1 lies rubbish.

  With GROUP > 0 the J groups of GROUP neighbouring blocks with the largest scores are found first. They hold the
  J best blocks: each group that comes before another one has a block that comes before all blocks of the other.
  """
  at = tl.cast(b, tl.int64) * T
  for chunk in range(LINES // SELECT):
    line = chunk * SELECT + tl.arange(0, SELECT)
    token = tile * (LINES // KP) + line // KP
    head = r + line % KP
    ok = (token < T) & (head < K)
    begin_block = tl.load(first + at + token, mask=ok, other=0) // SIZE
    own_block = tl.load(position + at + token, mask=ok, other=0) // SIZE
    row = scores + line[:, None] * WIDTH
    slot = tl.arange(0, JP)
    kept = tl.full((SELECT, JP), float("-inf"), tl.float32)
    kept_block = tl.full((SELECT, JP), -1, tl.int32)
    last = tl.minimum(tl.max(own_block, axis=0) + 1, BLOCKS)
    for sweep in range(tl.minimum(tl.min(begin_block, axis=0), last - 1) // SWEEP, (last + SWEEP - 1) // SWEEP):
      j = (sweep * SWEEP + tl.arange(0, SWEEP))[None, :]
      value = _block_scores(row, j, ok, begin_block, own_block, written_begin, written_end, LEN, STRIDE, SUB, SIZE,
                            BLOCKS, INITIAL, LOCAL)
      if GROUP > 0:
        peaks = tl.max(tl.reshape(value, (SELECT, SWEEP // GROUP, GROUP)), axis=2)
        group = tl.arange(0, SWEEP // GROUP)[None, :]
        picked = tl.full((SELECT, JP), 2 ** 20, tl.int32)
        for n in range(J):
          top = tl.max(peaks, axis=1)
          which = tl.min(tl.where(peaks == top[:, None], group, NO_BLOCK), axis=1)
          peaks = tl.where(group == which[:, None], float("-inf"), peaks)
          which = tl.where(top > float("-inf"), which, 2 ** 20)
          picked = tl.where(slot[None, :] == n, which[:, None], picked)
        j = sweep * SWEEP + picked[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        j = tl.reshape(j, (SELECT, JP * GROUP))
        value = _block_scores(row, j, ok, begin_block, own_block, written_begin, written_end, LEN, STRIDE, SUB, SIZE,
                              BLOCKS, INITIAL, LOCAL)
      best = tl.full((SELECT, JP), float("-inf"), tl.float32)
      best_block = tl.full((SELECT, JP), -1, tl.int32)
      for n in range(J):
        top = tl.max(value, axis=1)
        if SWEEP < BLOCKS:
          top = tl.maximum(top, tl.max(kept, axis=1))
        which = tl.min(tl.where(value == top[:, None], j, NO_BLOCK), axis=1)
        if SWEEP < BLOCKS:
          which = tl.minimum(which, tl.min(tl.where(kept == top[:, None], kept_block, NO_BLOCK), axis=1))
          kept = tl.where(kept_block == which[:, None], float("-inf"), kept)
        value = tl.where(j == which[:, None], float("-inf"), value)
        best = tl.where(slot[None, :] == n, top[:, None], best)
        chosen = tl.where(top > float("-inf"), which, -1)
        best_block = tl.where(slot[None, :] == n, chosen[:, None], best_block)
      kept = best
      kept_block = best_block
    out = ((at + token) * K + head)[:, None] * J + slot[None, :]
    tl.store(indices + out, kept_block, mask=ok[:, None] & (slot < J)[None, :])


@triton.jit
def _written(first, position, tile, b, T: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, LEN: tl.constexpr,
             STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
  """What the scores of a tile have written of its lines: begin .. end - 1."""
  token = tile * TOKENS + tl.arange(0, TOKENS)
  at = tl.cast(b, tl.int64) * T
  ok = token < T
  if STRIDE == 0:
    low = tl.load(first + at + token, mask=ok, other=0)
    high = tl.minimum(tl.load(position + at + token, mask=ok, other=-1) + 1, C)
    begin, end, _, _ = blocks_of(low, high, ok, BLOCK)
    PER: tl.constexpr = BLOCK // SIZE if BLOCK > SIZE else 1
    return begin * PER, end * PER
  low, high = _compressed_run(first + at, position + at, token, ok, C, LEN, STRIDE)
  begin, end, _, _ = blocks_of(low, high, ok, BLOCK)
  return begin * BLOCK, end * BLOCK


@triton.jit
def compressed_scores_kernel(q, k, lse, first, position, scores, B: tl.constexpr, T: tl.constexpr,
                             C: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                             H: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, SCALE: tl.constexpr,
                             ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
                             PRECISION: tl.constexpr):
  """scores float32[tiles * B * K, TOKENS, WIDTH]."""
  item = tl.program_id(0) // SPLITS
  out = scores + tl.cast(item, tl.int64) * (ROWS // GP * WIDTH)
  _compressed_scores(out, q, k, lse, first, position, item // (B * K), item % (B * K) // K, item % K,
                     tl.program_id(0) % SPLITS, T, C, K, G, GP, H, LEN, STRIDE, SCALE, ROWS, BLOCK, WIDTH, SPLITS,
                     PRECISION)


@triton.jit
def index_scores_kernel(q, k, first, position, scores, B: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                        K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr,
                        SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                        SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """scores float32[tiles * B, ROWS, WIDTH]."""
  item = tl.program_id(0) // SPLITS
  _index_scores(scores + tl.cast(item, tl.int64) * (ROWS * WIDTH), q, k, first, position, item // B, item % B,
                tl.program_id(0) % SPLITS, T, S, K, KP, H, SIZE, SCALE, ROWS, BLOCK, WIDTH, SPLITS, PRECISION)


@triton.jit
def choose_kernel(scores, first, position, indices, B: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
                  K: tl.constexpr, KP: tl.constexpr, HEADS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
                  LEN: tl.constexpr, STRIDE: tl.constexpr, SUB: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCKS: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, INITIAL: tl.constexpr,
                  LOCAL: tl.constexpr, SELECT: tl.constexpr, SWEEP: tl.constexpr, GROUP: tl.constexpr):
  """The choice alone; HEADS tiles of the same tokens lie beside each other (K for compressed scores, else 1)."""
  item = tl.program_id(0)
  tile, b, r = item // (B * HEADS), item % (B * HEADS) // HEADS, item % HEADS
  begin, end = _written(first, position, tile, b, T, C, LINES // KP, LEN, STRIDE, SIZE, BLOCK)
  _choose(scores + tl.cast(item, tl.int64) * (LINES * WIDTH), indices, first, position, tile, b, r, begin, end, T, K, KP,
          LINES, WIDTH, LEN, STRIDE, SUB, SIZE, BLOCKS, J, JP, INITIAL, LOCAL, SELECT, SWEEP, GROUP)


@triton.jit
def compressed_top_k_kernel(q, k, lse, first, position, indices, scores, B: tl.constexpr, T: tl.constexpr,
                            C: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr,
                            LEN: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
                            J: tl.constexpr, JP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
                            SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                            SELECT: tl.constexpr, SWEEP: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
                            PRECISION: tl.constexpr):
  """Tile after tile, the longest first; `scores` float32[PROGRAMS, TOKENS, WIDTH] is scratch."""
  TOKENS: tl.constexpr = ROWS // GP
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  mine = scores + tl.program_id(0).to(tl.int64) * (TOKENS * WIDTH)
  for item in range(tl.program_id(0), TILES * B * K, PROGRAMS):
    tile, b, r = TILES - 1 - item // (B * K), item % (B * K) // K, item % K
    _compressed_scores(mine, q, k, lse, first, position, tile, b, r, 0, T, C, K, G, GP, H, LEN, STRIDE, SCALE, ROWS,
                       BLOCK, WIDTH, 1, PRECISION)
    tl.debug_barrier()  # the choice reads what other threads stored
    begin, end = _written(first, position, tile, b, T, C, TOKENS, LEN, STRIDE, SIZE, BLOCK)
    _choose(mine, indices, first, position, tile, b, r, begin, end, T, K, 1, TOKENS, WIDTH, LEN, STRIDE, 1, SIZE,
            BLOCKS, J, JP, INITIAL, LOCAL, SELECT, SWEEP, GROUP)
    tl.debug_barrier()  # the next tile writes where the choice reads


@triton.jit
def index_top_k_kernel(q, k, first, position, indices, scores, B: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                       K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr,
                       BLOCKS: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, INITIAL: tl.constexpr,
                       LOCAL: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                       WIDTH: tl.constexpr, SUB: tl.constexpr, SELECT: tl.constexpr, SWEEP: tl.constexpr,
                       GROUP: tl.constexpr, PROGRAMS: tl.constexpr, PRECISION: tl.constexpr):
  """Like `compressed_top_k_kernel`; `scores` float32[PROGRAMS, ROWS, WIDTH]."""
  TOKENS: tl.constexpr = ROWS // KP
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  mine = scores + tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
  for item in range(tl.program_id(0), TILES * B, PROGRAMS):
    tile, b = TILES - 1 - item // B, item % B
    _index_scores(mine, q, k, first, position, tile, b, 0, T, S, K, KP, H, SIZE, SCALE, ROWS, BLOCK, WIDTH, 1,
                  PRECISION)
    tl.debug_barrier()
    begin, end = _written(first, position, tile, b, T, S, TOKENS, 0, 0, SIZE, BLOCK)
    _choose(mine, indices, first, position, tile, b, 0, begin, end, T, K, KP, ROWS, WIDTH, 0, 0, SUB, SIZE, BLOCKS, J,
            JP, INITIAL, LOCAL, SELECT, SWEEP, GROUP)
    tl.debug_barrier()
