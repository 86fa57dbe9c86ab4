"""`paged_attention` of `pallas_kernels.api`: decoding over a cache of pages, one of which is one block of keys.

One token and KV head at a time, its G heads padded to GP rows; the pages of an item are split over programs whose
results are combined, because few sequences give too few items for the GPU. The tokens that a program may see are
low .. high - 1; memory of other tokens, and of pages that are not there, is not read.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import spans
from pallas_kernels.triton import call, ranged, tuning
from pallas_kernels.triton.range_kernels import softmax_step, store_softmax
from pallas_kernels.triton.selected_kernels import head_rows, slot

MAX_SPLITS = 128
MAX_TILE = 128 * 128  # numbers of a page of one head


def supports_paged_attention(*, q, k_pages, v_pages, scale, **_):
  size, H = k_pages.shape[1], k_pages.shape[3]
  if size not in (16, 32, 64, 128):
    return f"k_pages has pages of {size} tokens: the kernel takes 16, 32, 64, 128"
  if size * H > MAX_TILE:
    return f"k_pages has pages of {size} tokens at head dim {H}: the kernel takes up to {MAX_TILE} numbers of a head"
  return ranged.reasons(q, k_pages, v_pages, scale, "k_pages")


def paged_attention(q, k_pages, v_pages, page_table, *, block_indices, window, scale, query_offset):
  """See `pallas_kernels.api.paged_attention`."""
  (B, T, N, H), (pages, size, K) = q.shape, k_pages.shape[:3]
  blocks = page_table.shape[1]
  low, high = spans.of_tokens(spans.positions(T, query_offset, B), blocks * size, None, window=window)
  items = B * T * K
  if block_indices is None:
    J, JP, most = 0, 0, blocks if window is None else min(blocks, -(-window // size) + 1)
    slots, splits = page_table, min(4 * call.processors() // items, most // 4, MAX_SPLITS)
  else:
    J = block_indices.shape[3]
    slots, JP = block_indices.astype(jnp.int32), call.next_power_of_2(J)
    splits = min(2 * call.processors() // items, J)
  splits = max(splits, 1)
  tuned = tuning.get("range_decode", head_dim=H, dtype=q.dtype)
  stages = tuned.stages if size * H <= 64 * 128 else min(tuned.stages, 2)
  o, lse = call.kernel_call(
      kernel, (q, k_pages, v_pages, page_table.astype(jnp.int32), slots, low, high),
      [jax.ShapeDtypeStruct((splits, B, T, N, H), q.dtype if splits == 1 else jnp.float32),
       jax.ShapeDtypeStruct((splits, B, T, N), jnp.float32)],
      grid=(items * splits,), name="paged_attention", num_warps=tuned.warps,
      num_stages=stages, ITEMS=items, T=T, BLOCKS=blocks, PAGES=pages, K=K, G=N // K,
      GP=max(call.next_power_of_2(N // K), ranged.MIN_ROWS), H=H, J=J, JP=JP, SIZE=size,
      SCALE=float(scale) * call.LOG2E, SPLITS=splits, PRECISION="ieee" if q.dtype == jnp.float32 else "tf32")
  return (o[0], lse[0]) if splits == 1 else ranged.combine(o, lse, q.dtype)


@triton.jit
def kernel(q, k, v, table, slots, low, high, o, lse, ITEMS: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr,
           PAGES: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, J: tl.constexpr,
           JP: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
  """o [SPLITS, B, T, N, H] and lse [SPLITS, B, T, N], from one of SPLITS parts of an item's J slots; J = 0: of all
  blocks that hold a visible token."""
  part = tl.program_id(0) % SPLITS
  item = tl.program_id(0) // SPLITS
  b, r, row, ok = head_rows(item, T, K, G, GP)
  first, stop = tl.load(low + item // K), tl.load(high + item // K)
  begin, end = 0, J
  if J == 0:
    begin = first // SIZE
    end = tl.maximum((stop + SIZE - 1) // SIZE, begin)
  per = (end - begin + SPLITS - 1) // SPLITS
  begin = tl.minimum(begin + part * per, end)
  end = tl.minimum(begin + per, end)
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  acc = tl.zeros((GP, H), tl.float32)
  top = tl.full((GP,), float("-inf"), tl.float32)
  total = tl.zeros((GP,), tl.float32)
  for n in range(begin, end):
    block, counts = n, True
    if J > 0:
      block, counts = slot(slots, item, n, J, JP)
      block = tl.where(block < BLOCKS, block, -1)
    page = tl.load(table + tl.cast(b, tl.int64) * BLOCKS + tl.maximum(block, 0))
    c = block * SIZE + tl.arange(0, SIZE)
    there = (block >= 0) & (page >= 0) & (page < PAGES) & (c >= first) & (c < stop)
    at = (tl.cast(page, tl.int64) * (SIZE * K) + r) * H + tl.arange(0, SIZE)[:, None] * (K * H)
    at += tl.arange(0, H)[None, :]
    s = tl.dot(queries, tl.trans(tl.load(k + at, mask=there[:, None], other=0.0)), input_precision=PRECISION)
    s = tl.where((there & counts)[None, :], s, float("-inf"))
    p, decay, top, total = softmax_step(s, top, total, SCALE, True)
    values = tl.load(v + at, mask=there[:, None], other=0.0)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
  store_softmax(acc, top, total, row + tl.cast(part, tl.int64) * (ITEMS * G), ok, o, lse, H)
