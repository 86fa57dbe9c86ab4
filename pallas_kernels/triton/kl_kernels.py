"""Triton kernels of `index_kl`; kl.py calls them.

P, the mean over a group's heads of exp(score - lse), and the index scores are made for a tile of tokens and a block
of keys at a time, head after head: so the tensor core has 64 tokens on one side at any group size, and the mean needs
no exchange between threads. Scores are in base 2 for P (SCALE and the lse have a factor log2(e)), natural for the
index.

Over selected blocks a kernel keeps one block of keys and gathers the tokens that chose it (lists.py); over all
visible tokens it keeps a tile of tokens (forward) or a block of keys (backward).
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.range_kernels import blocks_of, load_block

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def target(q, lse, row, ok, keys, G: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr,
            BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """P, unmasked, float32[TOKENS, BLOCK]; `row` counts (batch, token, KV head)."""
  p = tl.zeros((TOKENS, BLOCK), tl.float32)
  for g in range(G):
    at = row * G + g
    queries = tl.load(q + at[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
    norm = tl.load(lse + at, mask=ok, other=float("-inf")) * LOG2E
    norm = tl.where(norm == float("-inf"), float("inf"), norm)
    p += tl.exp2(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE - norm[:, None])
  return p * (1.0 / G)


@triton.jit
def index_rows(q_idx, row, ok, HI: tl.constexpr):
  return tl.load(q_idx + row[:, None] * HI + tl.arange(0, HI)[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def moments_of(p, s, top):
  """Of a block: sum of exp(s - top), of P, of P log P and of P s; s is -inf outside the mask, P 0."""
  shift = tl.where(top == float("-inf"), 0.0, top)
  e = tl.exp2((s - shift[:, None]) * LOG2E)
  log = tl.log(tl.where(p > 0, p, 1.0))
  cross = p * tl.where(s == float("-inf"), 0.0, s)
  return e, tl.sum(e, axis=1), tl.sum(p, axis=1), tl.sum(p * log, axis=1), tl.sum(cross, axis=1)


@triton.jit
def store_moments(moments, place, PLACES: tl.constexpr, ok, top, norm, total, entropy, cross):
  """moments float32[5, PLACES]."""
  tl.store(moments + place, top, mask=ok)
  tl.store(moments + PLACES + place, norm, mask=ok)
  tl.store(moments + 2 * PLACES + place, total, mask=ok)
  tl.store(moments + 3 * PLACES + place, entropy, mask=ok)
  tl.store(moments + 4 * PLACES + place, cross, mask=ok)


@triton.jit
def selected_forward_kernel(q, k, lse, q_idx, k_idx, rows, spans, units, moments, targets, S: tl.constexpr,
                            K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HI: tl.constexpr, SIZE: tl.constexpr,
                            PLACES: tl.constexpr, SCALE: tl.constexpr, INDEX_SCALE: tl.constexpr,
                            TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, WIDE: tl.constexpr,
                            MOMENTS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr):
  """`moments` float32[5, PLACES], written if MOMENTS: of each entry the maximum of its index scores and `moments_of`.

  `targets` [PLACES, SIZE], written if KEEP: P of each entry, 0 outside the mask. WIDE: 32 bits do not count q or q_idx;
  where they do, fewer registers are in use. The list's next tokens and a tile's index queries are read before the heads
  are gone through, or each would be waited for.
  """
  unit = units + tl.program_id(0) * 6
  first, count, tile = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
  b, r, block = tl.load(unit + 3), tl.load(unit + 4), tl.load(unit + 5)
  start = tl.cast(b, tl.int64) * S
  keys = load_block(k + (start * K + r) * H, block, S, K * H, H, SIZE, True)
  index_keys = load_block(k_idx + start * HI, block, S, HI, HI, SIZE, True)
  c = tl.arange(0, SIZE)
  i = tl.arange(0, TOKENS)
  coming = tl.load(rows + first + i, mask=i < count, other=0)
  coming_span = tl.load(spans + first + i, mask=i < count, other=0)
  for begin in range(0, count, TOKENS):
    i = begin + tl.arange(0, TOKENS)
    ok = i < count
    row, span = coming, coming_span
    if WIDE:
      row = row.to(tl.int64)
    coming = tl.load(rows + first + i + TOKENS, mask=i + TOKENS < count, other=0)
    coming_span = tl.load(spans + first + i + TOKENS, mask=i + TOKENS < count, other=0)
    if MOMENTS:
      queries = index_rows(q_idx, row, ok, HI)
    seen = (c[None, :] >= (span >> 16)[:, None]) & (c[None, :] < (span & 0xffff)[:, None])
    p = tl.where(seen, target(q, lse, row, ok, keys, G, H, SCALE, TOKENS, SIZE, PRECISION), 0.0)
    place = tile.to(tl.int64) * TILE_TOKENS + i
    if MOMENTS:
      s = tl.dot(queries, tl.trans(index_keys), input_precision=PRECISION) * INDEX_SCALE
      s = tl.where(seen, s, float("-inf"))
      top = tl.max(s, axis=1)
      _, norm, total, entropy, cross = moments_of(p, s, top)
      store_moments(moments, place, PLACES, ok, top, norm, total, entropy, cross)
    if KEEP:
      tl.store(targets + place[:, None] * SIZE + c[None, :], p.to(targets.dtype.element_ty), mask=ok[:, None])


@triton.jit
def score_gradient(p, s, seen, index_lse, factor, weight):
  """d loss / d (unscaled index score): (P_idx - P / total) * weight."""
  shift = tl.where(index_lse == float("-inf"), 0.0, index_lse)
  chosen = tl.exp2((s - shift[:, None]) * LOG2E)
  return tl.where(seen, (chosen - p * factor[:, None]) * weight[:, None], 0.0)


@triton.jit
def selected_backward_kernel(q_idx, k_idx, index_lse, factor, weight, rows, spans, units, targets, dq_parts, dk_parts,
                             S: tl.constexpr, HI: tl.constexpr, SIZE: tl.constexpr,
                             INDEX_SCALE: tl.constexpr, TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr,
                             PRECISION: tl.constexpr):
  """What a block of keys gives to dq_idx, [PLACES, HI], one row per entry, and dk_idx, float32[units, SIZE, HI].

  factor and weight, [B, T, K]: 1 / sum of P, and d loss * INDEX_SCALE. `targets` holds P of each entry.
  """
  unit = units + tl.program_id(0) * 6
  first, count, tile = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
  b, block = tl.load(unit + 3), tl.load(unit + 5)
  start = tl.cast(b, tl.int64) * S
  index_keys = load_block(k_idx + start * HI, block, S, HI, HI, SIZE, True)
  c = tl.arange(0, SIZE)
  # Of [SIZE, HI] or the other way round, what has 64 rows for the tensor core.
  dk = tl.zeros((SIZE, HI) if SIZE >= 64 else (HI, SIZE), tl.float32)
  for begin in range(0, count, TOKENS):
    i = begin + tl.arange(0, TOKENS)
    ok = i < count
    row = tl.load(rows + first + i, mask=ok, other=0).to(tl.int64)
    span = tl.load(spans + first + i, mask=ok, other=0)
    seen = (c[None, :] >= (span >> 16)[:, None]) & (c[None, :] < (span & 0xffff)[:, None])
    place = tile.to(tl.int64) * TILE_TOKENS + i
    p = tl.load(targets + place[:, None] * SIZE + c[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    queries = index_rows(q_idx, row, ok, HI)
    s = tl.dot(queries, tl.trans(index_keys), input_precision=PRECISION) * INDEX_SCALE
    ds = score_gradient(p, s, seen, tl.load(index_lse + row, mask=ok, other=0.0),
                         tl.load(factor + row, mask=ok, other=0.0), tl.load(weight + row, mask=ok, other=0.0))
    ds = ds.to(queries.dtype)
    if SIZE >= 64:
      dk = tl.dot(tl.trans(ds), queries, dk, input_precision=PRECISION)
    else:
      dk = tl.dot(tl.trans(queries), ds, dk, input_precision=PRECISION)
    dq = tl.dot(ds, index_keys, input_precision=PRECISION)
    tl.store(dq_parts + place[:, None] * HI + tl.arange(0, HI)[None, :], dq.to(dq_parts.dtype.element_ty),
             mask=ok[:, None])
  if count > 0:
    at = tl.program_id(0).to(tl.int64) * (SIZE * HI) + c[:, None] * HI + tl.arange(0, HI)[None, :]
    tl.store(dk_parts + at, dk if SIZE >= 64 else tl.trans(dk))


@triton.jit
def sum_units_kernel(parts, unit_start, out, RANGES: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr,
                     SIZE: tl.constexpr, CHUNK: tl.constexpr):
  """out[b, head, block, :] = sum of parts [units, SIZE] over the units of a block, in their order.

  HEADS neighbouring KV heads are summed into one.
  """
  CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
  i = tl.program_id(0) % CHUNKS * CHUNK + tl.arange(0, CHUNK)
  item = tl.program_id(0) // CHUNKS
  block, group = item % BLOCKS, item // BLOCKS  # group counts (batch, head of the result)
  acc = tl.zeros((CHUNK,), tl.float32)
  for n in range(HEADS * RANGES):
    at = unit_start + (group * (HEADS * RANGES) + n) * BLOCKS + block
    for unit in range(tl.load(at), tl.load(at + 1)):
      acc += tl.load(parts + tl.cast(unit, tl.int64) * SIZE + i, mask=i < SIZE, other=0.0)
  tl.store(out + tl.cast(item, tl.int64) * SIZE + i, acc.to(out.dtype.element_ty), mask=i < SIZE)


@triton.jit
def sum_keys_kernel(dk_parts, dv_parts, unit_start, dk, dv, S: tl.constexpr, K: tl.constexpr, RANGES: tl.constexpr,
                    BLOCKS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr, H: tl.constexpr,
                    WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, FACTOR: tl.constexpr):
  """dk and dv [B, S, K, H], dk times FACTOR, from what units have of them: float32[units, PARTS, KEYS, H], or with H
  and KEYS the other way round. A block has PARTS * KEYS keys; its units are added in their order.

  A program has WIDTH of the H numbers.
  """
  COLUMNS: tl.constexpr = (H + WIDTH - 1) // WIDTH
  column, item = tl.program_id(0) % COLUMNS, tl.program_id(0) // COLUMNS
  part, block, head = item % PARTS, item // PARTS % BLOCKS, item // (PARTS * BLOCKS)
  h = column * WIDTH + tl.arange(0, WIDTH)
  key = tl.arange(0, KEYS)
  if TRANSPOSED:
    at = h[:, None] * KEYS + key[None, :]
    there = h[:, None] + key[None, :] * 0 < H
    dk_sum = tl.zeros((WIDTH, KEYS), tl.float32)
  else:
    at = key[:, None] * H + h[None, :]
    there = key[:, None] * 0 + h[None, :] < H
    dk_sum = tl.zeros((KEYS, WIDTH), tl.float32)
  dv_sum = dk_sum
  for n in range(RANGES):
    which = unit_start + (head * RANGES + n) * BLOCKS + block
    for unit in range(tl.load(which), tl.load(which + 1)):
      tile = (tl.cast(unit, tl.int64) * PARTS + part) * (KEYS * H) + at
      dk_sum += tl.load(dk_parts + tile, mask=there, other=0.0)
      dv_sum += tl.load(dv_parts + tile, mask=there, other=0.0)
  if TRANSPOSED:
    dk_sum, dv_sum = tl.trans(dk_sum), tl.trans(dv_sum)
  key += (block * PARTS + part) * KEYS
  at = ((tl.cast(head // K, tl.int64) * S + key) * K + head % K)[:, None] * H + h[None, :]
  there = (key < S)[:, None] & (h < H)[None, :]
  tl.store(dk + at, (dk_sum * FACTOR).to(dk.dtype.element_ty), mask=there)
  tl.store(dv + at, dv_sum.to(dv.dtype.element_ty), mask=there)


@triton.jit
def place_of(position, TILE_TOKENS: tl.constexpr, G: tl.constexpr):
  """Where an entry's numbers lie, of the first of its G rows in tiles of 64."""
  return position // 64 * TILE_TOKENS + position % 64 // G


@triton.jit
def merge_kernel(moments, position, loss, index_lse, factor, M: tl.constexpr, J: tl.constexpr, JP: tl.constexpr,
                 PLACES: tl.constexpr, ROWS: tl.constexpr, TILE_TOKENS: tl.constexpr, G: tl.constexpr):
  """Of each of M rows the KL, the log normaliser of its index scores and 1 / sum of P, of the moments [5, PLACES] of
  its entries, which lie at position [M, J]; -1 is none."""
  row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  j = tl.arange(0, JP)
  at = tl.load(position + tl.cast(row, tl.int64)[:, None] * J + j[None, :],
               mask=(row < M)[:, None] & (j < J)[None, :], other=-1)
  used = at >= 0
  at = place_of(at, TILE_TOKENS, G)
  top = tl.load(moments + at, mask=used, other=float("-inf"))
  peak = tl.max(top, axis=1)
  decay = tl.exp2((top - tl.where(peak == float("-inf"), 0.0, peak)[:, None]) * LOG2E)
  norm = tl.sum(tl.load(moments + PLACES + at, mask=used, other=0.0) * decay, axis=1)
  total = tl.sum(tl.load(moments + 2 * PLACES + at, mask=used, other=0.0), axis=1)
  entropy = tl.sum(tl.load(moments + 3 * PLACES + at, mask=used, other=0.0), axis=1)
  cross = tl.sum(tl.load(moments + 4 * PLACES + at, mask=used, other=0.0), axis=1)
  log = tl.where(norm > 0, peak + tl.log(tl.where(norm > 0, norm, 1.0)), float("-inf"))
  safe = tl.where(total > 0, total, 1.0)
  ok = row < M
  tl.store(loss + row, tl.where(total > 0, (entropy - cross) / safe - tl.log(safe) + log, 0.0), mask=ok)
  tl.store(index_lse + row, log, mask=ok)
  tl.store(factor + row, tl.where(total > 0, 1.0 / safe, 0.0), mask=ok)


@triton.jit
def gather_sum_kernel(parts, position, out, M: tl.constexpr, J: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
                      TILE_TOKENS: tl.constexpr, G: tl.constexpr, AT_ONCE: tl.constexpr):
  """out[m] = sum of parts [places, SIZE] at position [M, J], in float32 and in the order of J; -1 is none.

  AT_ONCE, which divides J, are loaded before they are added.
  """
  row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  i = tl.arange(0, SIZE)
  acc = tl.zeros((ROWS, SIZE), tl.float32)
  for j in tl.range(0, J, loop_unroll_factor=AT_ONCE):
    at = tl.load(position + tl.cast(row, tl.int64) * J + j, mask=row < M, other=-1)
    place = tl.cast(place_of(at, TILE_TOKENS, G), tl.int64)
    acc += tl.load(parts + place[:, None] * SIZE + i[None, :], mask=(at >= 0)[:, None],
                   other=0.0).to(tl.float32)
  tl.store(out + tl.cast(row, tl.int64)[:, None] * SIZE + i[None, :], acc.to(out.dtype.element_ty),
           mask=(row < M)[:, None])


@triton.jit
def dense_forward_kernel(q, k, lse, q_idx, k_idx, low, high, moments, dq, B: tl.constexpr, T: tl.constexpr,
                         S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HI: tl.constexpr,
                         SCALE: tl.constexpr, INDEX_SCALE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                         PRECISION: tl.constexpr):
  """Over all visible tokens: `moments` float32[5, B, T, K], and dq_idx for a loss of weight 1, float32."""
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  tile = TILES - 1 - tl.program_id(0) // (B * K)
  b, r = tl.program_id(0) % (B * K) // K, tl.program_id(0) % K
  token = tile * TOKENS + tl.arange(0, TOKENS)
  ok = token < T
  at = tl.cast(b, tl.int64) * T
  first = tl.load(low + at + token, mask=ok, other=0)
  stop = tl.load(high + at + token, mask=ok, other=0)
  begin, end, _, _ = blocks_of(first, stop, ok, BLOCK)
  row = (at + token) * K + r
  start = tl.cast(b, tl.int64) * S
  queries = index_rows(q_idx, row, ok, HI)
  top = tl.full((TOKENS,), float("-inf"), tl.float32)
  norm = tl.zeros((TOKENS,), tl.float32)
  total = tl.zeros((TOKENS,), tl.float32)
  entropy = tl.zeros((TOKENS,), tl.float32)
  cross = tl.zeros((TOKENS,), tl.float32)
  chosen = tl.zeros((TOKENS, HI), tl.float32)
  wanted = tl.zeros((TOKENS, HI), tl.float32)
  for block in range(begin, end):
    keys = load_block(k + (start * K + r) * H, block, S, K * H, H, BLOCK, True)
    index_keys = load_block(k_idx + start * HI, block, S, HI, HI, BLOCK, True)
    c = block * BLOCK + tl.arange(0, BLOCK)
    seen = (c[None, :] >= first[:, None]) & (c[None, :] < stop[:, None])
    p = tl.where(seen, target(q, lse, row, ok, keys, G, H, SCALE, TOKENS, BLOCK, PRECISION), 0.0)
    s = tl.dot(queries, tl.trans(index_keys), input_precision=PRECISION) * INDEX_SCALE
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, axis=1))
    e, n, a, h, x = moments_of(p, s, new)
    decay = tl.exp2((top - tl.where(new == float("-inf"), 0.0, new)) * LOG2E)
    norm = norm * decay + n
    total += a
    entropy += h
    cross += x
    chosen = tl.dot(e.to(index_keys.dtype), index_keys, chosen * decay[:, None], input_precision=PRECISION)
    wanted = tl.dot(p.to(index_keys.dtype), index_keys, wanted, input_precision=PRECISION)
    top = new
  store_moments(moments, row, B * T * K, ok, top, norm, total, entropy, cross)
  both = chosen / tl.where(norm > 0, norm, 1.0)[:, None] - wanted / tl.where(total > 0, total, 1.0)[:, None]
  tl.store(dq + row[:, None] * HI + tl.arange(0, HI)[None, :], both * INDEX_SCALE, mask=ok[:, None])


@triton.jit
def dense_dk_kernel(q, k, lse, q_idx, k_idx, index_lse, factor, weight, low, high, ranges, dk, B: tl.constexpr,
                    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
                    HI: tl.constexpr, SCALE: tl.constexpr, INDEX_SCALE: tl.constexpr, TOKENS: tl.constexpr,
                    BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """dk_idx of a block of keys from the queries of one KV head, float32[B, K, S, HI]."""
  BLOCKS: tl.constexpr = (S + BLOCK - 1) // BLOCK
  b, r = tl.program_id(0) % (B * K) // K, tl.program_id(0) % K
  block = tl.program_id(0) // (B * K)
  start = tl.cast(b, tl.int64) * S
  keys = load_block(k + (start * K + r) * H, block, S, K * H, H, BLOCK, True)
  index_keys = load_block(k_idx + start * HI, block, S, HI, HI, BLOCK, True)
  c = block * BLOCK + tl.arange(0, BLOCK)
  bounds = ranges + (b * BLOCKS + block) * 4
  at = tl.cast(b, tl.int64) * T
  acc = tl.zeros((BLOCK, HI), tl.float32)
  for tile in range(tl.load(bounds) // TOKENS, (tl.load(bounds + 1) + TOKENS - 1) // TOKENS):
    token = tile * TOKENS + tl.arange(0, TOKENS)
    ok = token < T
    first = tl.load(low + at + token, mask=ok, other=0)
    stop = tl.load(high + at + token, mask=ok, other=0)
    seen = (c[None, :] >= first[:, None]) & (c[None, :] < stop[:, None])
    row = (at + token) * K + r
    p = target(q, lse, row, ok, keys, G, H, SCALE, TOKENS, BLOCK, PRECISION)
    queries = index_rows(q_idx, row, ok, HI)
    s = tl.dot(queries, tl.trans(index_keys), input_precision=PRECISION) * INDEX_SCALE
    ds = score_gradient(p, s, seen, tl.load(index_lse + row, mask=ok, other=0.0),
                         tl.load(factor + row, mask=ok, other=0.0), tl.load(weight + row, mask=ok, other=0.0))
    acc = tl.dot(tl.trans(ds.to(queries.dtype)), queries, acc, input_precision=PRECISION)
  out = (tl.cast(b * K + r, tl.int64) * S + c[:, None]) * HI + tl.arange(0, HI)[None, :]
  tl.store(dk + out, acc, mask=c[:, None] < S)
