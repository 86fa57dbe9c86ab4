"""`block_mass` and `block_peak` of `pallas_kernels.api`: attention by block, made tile by tile, never kept by token.

A tile is a few neighbouring tokens with the heads of one KV head, as in `compressed_top_k` (score_kernels.py): a thread
has all heads of a token for a few keys and sums them alone, or takes the largest. A line of blocks per (token, KV head)
is all that is written; what no query of a tile sees is written as zeros.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import masked, spans
from pallas_kernels.triton import call, ranged, tuning
from pallas_kernels.triton.score_kernels import columns, over_heads

BLOCK_SIZES = (16, 32, 64, 128, 256)


def supports_block_mass(*, q, k, block_size, scale, **_):
  if block_size not in BLOCK_SIZES and not call.INTERPRET:
    return f"block_size = {block_size}: the kernel takes {', '.join(map(str, BLOCK_SIZES))}"
  return ranged.reasons(q, k, None, scale)


def block_mass(q, k, lse, *, block_size, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.block_mass`."""
  return _by_block(q, k, lse, None, block_size, scale, segment_ids, query_offset, peak=False)


def block_peak(q, k, lse, block_indices, *, block_size, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.block_peak`."""
  chosen = None
  if block_indices is not None:
    chosen = masked.membership(block_indices, -(-k.shape[1] // block_size)).astype(jnp.int8)
  return _by_block(q, k, lse, chosen, block_size, scale, segment_ids, query_offset, peak=True)[0]


def _by_block(q, k, lse, chosen, block_size, scale, segment_ids, query_offset, peak):
  first, end = spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, query_offset)
  f = functools.partial(_run, block_size=block_size, scale=float(scale), peak=peak)
  return call.batched(f)(q, k, lse.astype(jnp.float32), first, end, chosen)


def _run(q, k, lse, first, end, chosen, *, block_size, scale, peak):
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  sizes = ranged.Sizes(T, S, K, N // K, H, scale, "ieee" if q.dtype == jnp.float32 else "tf32")
  tuned = tuning.get("block_mass", head_dim=H, dtype=q.dtype)
  rows = sizes.rows(tuned.rows)
  items = B * K * -(-T // (rows // sizes.GP))
  blocks = -(-S // block_size)
  return tuple(call.kernel_call(
      by_block_kernel, (q, k, lse, first, end, first if chosen is None else chosen),
      [jax.ShapeDtypeStruct((B, T, K, blocks), jnp.float32), jax.ShapeDtypeStruct((B, T, K), jnp.float32)],
      grid=(items,), name="block_peak" if peak else "block_mass", num_warps=tuned.warps, num_stages=tuned.stages,
      PEAK=peak, SELECTED=chosen is not None, SIZE=block_size, ROWS=rows, BLOCK=tuned.block, BLOCKS=blocks,
      **sizes.constants(B)))


@triton.jit
def by_block_kernel(q, k, lse, first, end, chosen, mass, entropy, B: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
                    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr,
                    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
                    PEAK: tl.constexpr, SELECTED: tl.constexpr, PRECISION: tl.constexpr):
  """mass float32[B, T, K, BLOCKS] and entropy float32[B, T, K], or if PEAK the largest probabilities in place of mass
  and nothing; of BLOCK and SIZE one divides the other. If SELECTED, 0 where `chosen`, int8[B, T, K, BLOCKS], is 0."""
  STEP: tl.constexpr = max(BLOCK, SIZE)  # keys between two writes
  PER: tl.constexpr = STEP // SIZE
  TOKENS: tl.constexpr = ROWS // GP
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  item = TILES * B * K - 1 - tl.program_id(0)  # long tiles first
  tile, b, r = item // (B * K), item % (B * K) // K, item % K
  at = tl.cast(b, tl.int64) * T + tile * TOKENS
  nth = tl.arange(0, TOKENS)
  there = tile * TOKENS + nth < T
  low = tl.load(first + at + nth, mask=there, other=0)
  high = tl.load(end + at + nth, mask=there, other=0)
  # Runs do not decrease with the token, so those of the first and the last tell what the tile sees.
  last = at + tl.minimum(TOKENS, T - tile * TOKENS) - 1
  begin = tl.load(first + at) // STEP
  stop = tl.maximum((tl.load(end + last) + STEP - 1) // STEP, begin)
  token, head = columns(GP, ROWS)
  ok = (tile * TOKENS + token < T) & (head < G)
  row = (at + token) * (K * G) + r * G + head
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=float("-inf")) * 1.4426950408889634
  norm = tl.where(norm == float("-inf"), float("inf"), norm)  # rows that see nothing give nothing
  keys = k + (tl.cast(b, tl.int64) * C * K + r) * H
  line = mass + ((at + nth) * K + r) * BLOCKS
  for j in range(0, tl.minimum(begin * PER, BLOCKS)):
    tl.store(line + j, tl.zeros((TOKENS,), tl.float32), mask=there)
  for j in range(stop * PER, BLOCKS):
    tl.store(line + j, tl.zeros((TOKENS,), tl.float32), mask=there)
  spread = tl.zeros((BLOCK, TOKENS), tl.float32)  # of the entropy, by key within a step
  for j in range(begin, stop):
    total = tl.full((PER, TOKENS), float("-inf") if PEAK else 0.0, tl.float32)
    block = j * PER + tl.arange(0, PER)
    inside = there[None, :] & (block < BLOCKS)[:, None]
    parts = STEP // BLOCK
    if SELECTED:
      own = tl.load(chosen + ((at + nth) * K + r)[None, :] * BLOCKS + block[:, None], mask=inside, other=0)
      parts = tl.where(tl.max(tl.max(own.to(tl.int32), axis=1), axis=0) > 0, STEP // BLOCK, 0)
    for part in range(parts):
      c = j * STEP + part * BLOCK + tl.arange(0, BLOCK)
      rows = tl.load(keys + tl.cast(c, tl.int64)[:, None] * (K * H) + tl.arange(0, H)[None, :],
                     mask=(c < C)[:, None], other=0.0)
      x = tl.dot(rows, tl.trans(queries), input_precision=PRECISION) * SCALE - norm[None, :]
      seen = (c[:, None] >= low[None, :]) & (c[:, None] < high[None, :])
      if PEAK:
        x = tl.where(seen, over_heads(tl.max, x, GP, BLOCK, ROWS), float("-inf"))
        total = tl.maximum(total, tl.max(tl.reshape(x, (PER, BLOCK // PER, TOKENS)), axis=1))
      else:
        x = tl.maximum(x, -1e30)  # 0 * -inf is NaN
        p = tl.exp2(x)
        products = over_heads(tl.sum, p * x, GP, BLOCK, ROWS)
        p = tl.where(seen, over_heads(tl.sum, p, GP, BLOCK, ROWS), 0.0)
        total += tl.sum(tl.reshape(p, (PER, BLOCK // PER, TOKENS)), axis=1)
        spread -= tl.where(seen, products, 0.0)
    if SELECTED:
      total = tl.where(own > 0, total, float("-inf"))
    total = tl.exp2(total) if PEAK else total * (1.0 / G)
    tl.store(line[None, :] + block[:, None], total, mask=inside)
  if not PEAK:
    nats = tl.sum(spread, axis=0) * (0.6931471805599453 / G)
    tl.store(entropy + (at + nth) * K + r, nats, mask=there)
