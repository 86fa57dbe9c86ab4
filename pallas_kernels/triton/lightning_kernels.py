"""Triton kernels of `lightning_scores` and `lightning_kl`; lightning.py calls them.

A program has a tile of tokens and one set of index heads, or for dk_idx a block of keys. Scores are made for a tile and
a block of keys at a time, index head after index head, as P is made query head after query head (kl_kernels.py): so the
tensor core has whole tiles at any number of either. `chosen`, int8[B, T, R, S / SIZE], says which blocks of SIZE keys
a token chose, and is read if SELECTED; blocks of keys that no token of a tile chose are left out. BLOCK divides SIZE.
With SIZE = 1 it is sets of tokens, `masked.packed` int32[B, T, R, ceil(S / 32)], and 32 divides BLOCK.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.kl_kernels import index_rows, moments_of, score_gradient, store_moments, target
from pallas_kernels.triton.range_kernels import blocks_of, load_block


@triton.jit
def weighted(q_idx, weights, row, ok, index_keys, HEADS: tl.constexpr, HI: tl.constexpr, TOKENS: tl.constexpr,
             BLOCK: tl.constexpr, PRECISION: tl.constexpr):
  """The index score, float32[TOKENS, BLOCK]; `row` counts (batch, token, set)."""
  s = tl.zeros((TOKENS, BLOCK), tl.float32)
  for j in range(HEADS):
    dots = tl.dot(index_rows(q_idx, row * HEADS + j, ok, HI), tl.trans(index_keys), input_precision=PRECISION)
    weight = tl.load(weights + row * HEADS + j, mask=ok, other=0.0).to(tl.float32)
    s += tl.maximum(dots, 0.0) * weight[:, None]
  return s


@triton.jit
def tile_of(low, high, b, tile, T: tl.constexpr, TOKENS: tl.constexpr):
  """Token, whether there is one, and the keys that it sees."""
  token = tile * TOKENS + tl.arange(0, TOKENS)
  ok = token < T
  at = tl.cast(b, tl.int64) * T + token
  return at, ok, tl.load(low + at, mask=ok, other=0), tl.load(high + at, mask=ok, other=0)


@triton.jit
def members(words, ok, block, WORDS: tl.constexpr, BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr):
  """bool[rows, BLOCK], if KEYS_FIRST [BLOCK, rows]: which keys of a block are in each row's set of tokens, whose WORDS
  words begin at `words`. 32 divides BLOCK."""
  i = tl.arange(0, BLOCK)
  first = block * (BLOCK // 32)
  word = tl.load(words + first, mask=ok & (first < WORDS), other=0)
  found = word[None, :] if KEYS_FIRST else word[:, None]
  for n in tl.static_range(1, BLOCK // 32):
    word = tl.load(words + first + n, mask=ok & (first + n < WORDS), other=0)
    if KEYS_FIRST:
      found = tl.where((i // 32 >= n)[:, None], word[None, :], found)
    else:
      found = tl.where((i // 32 >= n)[None, :], word[:, None], found)
  shift = (i % 32)[:, None] if KEYS_FIRST else (i % 32)[None, :]
  return ((found >> shift) & 1) != 0


@triton.jit
def _seen(first, stop, chosen, row, ok, block, S: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
          SELECTED: tl.constexpr):
  """bool[TOKENS, BLOCK]."""
  c = block * BLOCK + tl.arange(0, BLOCK)
  seen = (c[None, :] >= first[:, None]) & (c[None, :] < stop[:, None])
  if SELECTED and SIZE == 1:
    WORDS: tl.constexpr = (S + 31) // 32
    seen = seen & members(chosen + row * WORDS, ok, block, WORDS, BLOCK, False)
  elif SELECTED:
    own = tl.load(chosen + row * ((S + SIZE - 1) // SIZE) + block * BLOCK // SIZE, mask=ok, other=0)
    seen = seen & (own > 0)[:, None]
  return seen


@triton.jit
def _some(chosen, row, ok, block, S: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SELECTED: tl.constexpr):
  """Whether a token of the tile chose any of the block."""
  some = True
  if SELECTED and SIZE == 1:
    WORDS: tl.constexpr = (S + 31) // 32
    n = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    words = tl.load(chosen + row[:, None] * WORDS + n[None, :], mask=ok[:, None] & (n < WORDS)[None, :], other=0)
    some = tl.max((words != 0).to(tl.int32)) > 0
  elif SELECTED:
    own = tl.load(chosen + row * ((S + SIZE - 1) // SIZE) + block * BLOCK // SIZE, mask=ok, other=0)
    some = tl.max(own.to(tl.int32), axis=0) > 0
  return some


@triton.jit
def _targets(q, k, lse, at, ok, b, r, block, S: tl.constexpr, K: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
             H: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
             PRECISION: tl.constexpr):
  """P of a set, unmasked, summed over its K / R KV heads: float32[TOKENS, BLOCK]."""
  p = tl.zeros((TOKENS, BLOCK), tl.float32)
  for n in range(K // R):
    head = r * (K // R) + n
    keys = load_block(k + (tl.cast(b, tl.int64) * S * K + head) * H, block, S, K * H, H, BLOCK, True)
    p += target(q, lse, at * K + head, ok, keys, G, H, SCALE, TOKENS, BLOCK, PRECISION)
  return p


@triton.jit
def lightning_scores_kernel(q_idx, weights, k_idx, low, high, scores, B: tl.constexpr, T: tl.constexpr,
                            S: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, HI: tl.constexpr,
                            SIZE: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                            SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """scores float32[B, T, R, BLOCKS]: the best of each block, -inf where nothing is seen. SIZE divides BLOCK. SPLITS
  programs share the keys of a tile."""
  PER: tl.constexpr = BLOCK // SIZE
  item, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
  b, r = item % (B * R) // R, item % R
  tile = (T + TOKENS - 1) // TOKENS - 1 - item // (B * R)  # long tiles first
  at, ok, first, stop = tile_of(low, high, b, tile, T, TOKENS)
  begin, end, _, _ = blocks_of(first, stop, ok, BLOCK)
  row = at * R + r
  line = scores + row * BLOCKS
  nothing = tl.full((TOKENS,), float("-inf"), tl.float32)
  if part == 0:
    for j in range(0, tl.minimum(begin * PER, BLOCKS)):
      tl.store(line + j, nothing, mask=ok)
    for j in range(end * PER, BLOCKS):
      tl.store(line + j, nothing, mask=ok)
  size = (end - begin + SPLITS - 1) // SPLITS
  first_block = begin + part * size
  for block in range(first_block, tl.minimum(first_block + size, end)):
    index_keys = load_block(k_idx + tl.cast(b, tl.int64) * S * HI, block, S, HI, HI, BLOCK, True)
    s = weighted(q_idx, weights, row, ok, index_keys, HEADS, HI, TOKENS, BLOCK, PRECISION)
    s = tl.where(_seen(first, stop, low, row, ok, block, S, SIZE, BLOCK, False), s, float("-inf"))
    mine = block * PER + tl.arange(0, PER)
    best = tl.max(tl.reshape(s, (TOKENS, PER, SIZE)), axis=2)
    tl.store(line[:, None] + mine[None, :], best, mask=ok[:, None] & (mine < BLOCKS)[None, :])


@triton.jit
def lightning_forward_kernel(q, k, lse, q_idx, weights, k_idx, low, high, chosen, moments, B: tl.constexpr,
                             T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
                             H: tl.constexpr, HEADS: tl.constexpr, HI: tl.constexpr, SCALE: tl.constexpr,
                             SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SELECTED: tl.constexpr,
                             PRECISION: tl.constexpr):
  """moments float32[5, B, T, R]: the maximum of the index scores and `moments_of` all blocks."""
  b, r = tl.program_id(0) % (B * R) // R, tl.program_id(0) % R
  tile = (T + TOKENS - 1) // TOKENS - 1 - tl.program_id(0) // (B * R)
  at, ok, first, stop = tile_of(low, high, b, tile, T, TOKENS)
  begin, end, _, _ = blocks_of(first, stop, ok, BLOCK)
  row = at * R + r
  top = tl.full((TOKENS,), float("-inf"), tl.float32)
  norm = tl.zeros((TOKENS,), tl.float32)
  total = tl.zeros((TOKENS,), tl.float32)
  entropy = tl.zeros((TOKENS,), tl.float32)
  cross = tl.zeros((TOKENS,), tl.float32)
  for block in range(begin, end):
    if _some(chosen, row, ok, block, S, SIZE, BLOCK, SELECTED):
      seen = _seen(first, stop, chosen, row, ok, block, S, SIZE, BLOCK, SELECTED)
      p = _targets(q, k, lse, at, ok, b, r, block, S, K, R, G, H, SCALE, TOKENS, BLOCK, PRECISION)
      index_keys = load_block(k_idx + tl.cast(b, tl.int64) * S * HI, block, S, HI, HI, BLOCK, True)
      s = weighted(q_idx, weights, row, ok, index_keys, HEADS, HI, TOKENS, BLOCK, PRECISION)
      p, s = tl.where(seen, p, 0.0), tl.where(seen, s, float("-inf"))
      new = tl.maximum(top, tl.max(s, axis=1))
      e, n, a, h, x = moments_of(p, s, new)
      norm = norm * tl.exp(top - tl.where(new == float("-inf"), 0.0, new)) + n
      total += a
      entropy += h
      cross += x
      top = new
  store_moments(moments, row, B * T * R, ok, top, norm, total, entropy, cross)


@triton.jit
def lightning_ds_kernel(q, k, lse, q_idx, weights, k_idx, low, high, chosen, index_lse, factor, dloss, ds,
                        B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
                        G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, HI: tl.constexpr, SCALE: tl.constexpr,
                        SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SELECTED: tl.constexpr,
                        PRECISION: tl.constexpr):
  """ds [B, R, T, S]: the gradient of the index scores, 0 outside of what is seen. What no token of a tile sees, or
  chose, is not written: the kernels that read it leave out the same."""
  b, r = tl.program_id(0) % (B * R) // R, tl.program_id(0) % R
  tile = (T + TOKENS - 1) // TOKENS - 1 - tl.program_id(0) // (B * R)
  at, ok, first, stop = tile_of(low, high, b, tile, T, TOKENS)
  begin, end, _, _ = blocks_of(first, stop, ok, BLOCK)
  row = at * R + r
  norm = tl.load(index_lse + row, mask=ok, other=0.0)
  share, weight = tl.load(factor + row, mask=ok, other=0.0), tl.load(dloss + row, mask=ok, other=0.0)
  out = ds + ((tl.cast(b * R + r, tl.int64) * T + tile * TOKENS) * S + tl.arange(0, TOKENS)[:, None] * S)
  for block in range(begin, end):
    if _some(chosen, row, ok, block, S, SIZE, BLOCK, SELECTED):
      seen = _seen(first, stop, chosen, row, ok, block, S, SIZE, BLOCK, SELECTED)
      p = _targets(q, k, lse, at, ok, b, r, block, S, K, R, G, H, SCALE, TOKENS, BLOCK, PRECISION)
      index_keys = load_block(k_idx + tl.cast(b, tl.int64) * S * HI, block, S, HI, HI, BLOCK, True)
      s = weighted(q_idx, weights, row, ok, index_keys, HEADS, HI, TOKENS, BLOCK, PRECISION)
      c = block * BLOCK + tl.arange(0, BLOCK)
      gradient = score_gradient(p, s, seen, norm, share, weight)
      tl.store(out + c[None, :], gradient.to(ds.dtype.element_ty), mask=ok[:, None] & (c < S)[None, :])


@triton.jit
def _head_gradient(ds, dots, weight):
  """Of a head's dot products."""
  return tl.where(dots > 0, ds * weight[:, None], 0.0)


@triton.jit
def lightning_dq_kernel(q_idx, weights, k_idx, low, high, chosen, ds, dq, dweights, B: tl.constexpr, T: tl.constexpr,
                        S: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, HI: tl.constexpr, SIZE: tl.constexpr,
                        TOKENS: tl.constexpr, BLOCK: tl.constexpr, SELECTED: tl.constexpr, PRECISION: tl.constexpr):
  """dq_idx [B, T, R, HEADS, HI] and dweights float32[B, T, R, HEADS] of a tile and one index head."""
  item, j = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
  b, r = item % (B * R) // R, item % R
  tile = (T + TOKENS - 1) // TOKENS - 1 - item // (B * R)
  at, ok, first, stop = tile_of(low, high, b, tile, T, TOKENS)
  begin, end, _, _ = blocks_of(first, stop, ok, BLOCK)
  row = at * R + r
  head = row * HEADS + j
  queries = index_rows(q_idx, head, ok, HI)
  weight = tl.load(weights + head, mask=ok, other=0.0).to(tl.float32)
  tiles = ds + ((tl.cast(b * R + r, tl.int64) * T + tile * TOKENS) * S + tl.arange(0, TOKENS)[:, None] * S)
  acc = tl.zeros((TOKENS, HI), tl.float32)
  total = tl.zeros((TOKENS,), tl.float32)
  for block in range(begin, end):
    if _some(chosen, row, ok, block, S, SIZE, BLOCK, SELECTED):
      index_keys = load_block(k_idx + tl.cast(b, tl.int64) * S * HI, block, S, HI, HI, BLOCK, True)
      c = block * BLOCK + tl.arange(0, BLOCK)
      d = tl.load(tiles + c[None, :], mask=ok[:, None] & (c < S)[None, :], other=0.0).to(tl.float32)
      dots = tl.dot(queries, tl.trans(index_keys), input_precision=PRECISION)
      total += tl.sum(d * tl.maximum(dots, 0.0), axis=1)
      acc = tl.dot(_head_gradient(d, dots, weight).to(index_keys.dtype), index_keys, acc, input_precision=PRECISION)
  tl.store(dq + head[:, None] * HI + tl.arange(0, HI)[None, :], acc.to(dq.dtype.element_ty), mask=ok[:, None])
  tl.store(dweights + head, total, mask=ok)


@triton.jit
def lightning_dk_kernel(q_idx, weights, k_idx, low, high, ranges, chosen, ds, dk, B: tl.constexpr, T: tl.constexpr,
                        S: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, HI: tl.constexpr, SIZE: tl.constexpr,
                        TOKENS: tl.constexpr, BLOCK: tl.constexpr, SELECTED: tl.constexpr, PRECISION: tl.constexpr):
  """dk_idx of a block of keys from one set, float32[B, R, S, HI]."""
  BLOCKS: tl.constexpr = (S + BLOCK - 1) // BLOCK
  b, r = tl.program_id(0) % (B * R) // R, tl.program_id(0) % R
  block = tl.program_id(0) // (B * R)
  index_keys = load_block(k_idx + tl.cast(b, tl.int64) * S * HI, block, S, HI, HI, BLOCK, True)
  c = block * BLOCK + tl.arange(0, BLOCK)
  bounds = ranges + (b * BLOCKS + block) * 4
  acc = tl.zeros((BLOCK, HI), tl.float32)
  for tile in range(tl.load(bounds) // TOKENS, (tl.load(bounds + 1) + TOKENS - 1) // TOKENS):
    at, ok, first, stop = tile_of(low, high, b, tile, T, TOKENS)
    row = at * R + r
    if _some(chosen, row, ok, block, S, SIZE, BLOCK, SELECTED):
      tiles = ds + ((tl.cast(b * R + r, tl.int64) * T + tile * TOKENS) * S + tl.arange(0, TOKENS)[:, None] * S)
      # A tile of tokens that see nothing may lie in the range; its ds was not written.
      seen = _seen(first, stop, chosen, row, ok, block, S, SIZE, BLOCK, False)
      d = tl.load(tiles + c[None, :], mask=seen & ok[:, None], other=0.0).to(tl.float32)
      for j in range(HEADS):
        queries = index_rows(q_idx, row * HEADS + j, ok, HI)
        weight = tl.load(weights + row * HEADS + j, mask=ok, other=0.0).to(tl.float32)
        dots = tl.dot(queries, tl.trans(index_keys), input_precision=PRECISION)
        acc = tl.dot(tl.trans(_head_gradient(d, dots, weight).to(queries.dtype)), queries, acc,
                     input_precision=PRECISION)
  out = (tl.cast(b * R + r, tl.int64) * S + c[:, None]) * HI + tl.arange(0, HI)[None, :]
  tl.store(dk + out, acc, mask=c[:, None] < S)
