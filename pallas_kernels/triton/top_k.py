"""`compressed_top_k` and `index_top_k` of `pallas_kernels.api`. No gradients: selection has none."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton import call
from pallas_kernels.triton import ranged
from pallas_kernels.triton import top_k_kernels
from pallas_kernels.triton import tuning

MAX_SLOTS = 128
GROUP = 16         # neighbouring blocks of which the largest score decides first
FEW = 2            # tiles per multiprocessor up to which the keys of a tile are split


def _selection_reason(block_size, num_blocks):
  if num_blocks > MAX_SLOTS:
    return f"num_blocks = {num_blocks}: the kernels take up to {MAX_SLOTS}"
  if block_size < 1:
    return f"block_size = {block_size}"
  return None


def supports_compressed_top_k(a):
  length, stride, size = a["block_len"], a["block_stride"], a["block_size"]
  if size % stride:
    return f"block_stride = {stride}: the kernels need a divisor of block_size = {size}"
  if length < 1 or length > 8 * stride:
    return f"block_len = {length}: the kernels take up to 8 strides of {stride}"
  return ranged.reasons(a["q"], a["k_cmp"], None, a["scale"], "k_cmp") or _selection_reason(size, a["num_blocks"])


def supports_index_top_k(a):
  size = a["block_size"]
  if size not in (16, 32, 64, 128, 256) and not call.INTERPRET:
    return f"block_size = {size}: the kernels take 16, 32, 64, 128, 256"
  q = a["q_idx"]
  return ranged.reasons(q, _OneHead(a["k_idx"]), None, a["scale"], "k_idx") or _selection_reason(size, a["num_blocks"])


class _OneHead:
  """Shape and dtype of the index key, seen as the keys of one head for all index queries."""

  def __init__(self, x):
    self.shape, self.dtype = (*x.shape[:2], 1, x.shape[2]), x.dtype


def _choice(tile_lines, BLOCKS, num_blocks, num_initial, num_local, warps, width=1):
  """Constants of the choice: as many lines at once as give a thread 32 numbers; `width` are read per block."""
  sweep = min(call.next_power_of_2(BLOCKS), 1024)
  select = max(1, min(tile_lines, warps * 32 * 32 // (sweep * max(1, width // 2))))
  slots = call.next_power_of_2(num_blocks)
  group = GROUP if sweep >= 3 * slots * GROUP else 0
  return dict(BLOCKS=BLOCKS, J=num_blocks, JP=slots, INITIAL=num_initial, LOCAL=num_local, SELECT=select, SWEEP=sweep,
              GROUP=group)


def _last_block(position_bound, size):
  return max(1, -(-position_bound // size))


def compressed_top_k(q, k_cmp, lse, *, block_len, block_stride, block_size, num_blocks, num_initial, num_local, scale,
                     segment_ids, query_offset):
  """See `pallas_kernels.api.compressed_top_k`."""
  (B, T, N, H), (C, K) = q.shape, k_cmp.shape[1:3]
  first, position = call.visible_tokens(B, T, query_offset, segment_ids)
  last = T + query_offset if isinstance(query_offset, (int, np.integer)) else T
  S = max(last, C * block_stride + block_len - 1) if segment_ids is None else segment_ids.shape[1]
  f = functools.partial(
      _compressed_top_k, LEN=block_len, STRIDE=block_stride, SIZE=block_size, BLOCKS=_last_block(S, block_size),
      choice=(num_blocks, num_initial, num_local), scale=float(scale))
  return call.batched(f)(q, k_cmp, lse.astype(jnp.float32), first, position)


def _compressed_top_k(q, k, lse, first, position, *, LEN, STRIDE, SIZE, BLOCKS, choice, scale):
  (B, T, N, H), (C, K) = q.shape, k.shape[1:3]
  sizes = ranged.Sizes(T, C, K, N // K, H, scale, "ieee" if q.dtype == jnp.float32 else "tf32")
  tuned = tuning.get("compressed_scores", head_dim=H, dtype=q.dtype, length=C)
  rows = sizes.rows(tuned.rows)
  tokens = rows // sizes.GP
  width = -(-C // tuned.block) * tuned.block
  items = B * K * -(-T // tokens)
  scoring = dict(LEN=LEN, STRIDE=STRIDE, ROWS=rows, BLOCK=tuned.block, WIDTH=width, **sizes.constants(B))
  chosen = _choice(tokens, BLOCKS, *choice, tuned.warps, SIZE // STRIDE)
  how = dict(num_warps=tuned.warps, num_stages=tuned.stages)
  indices = jax.ShapeDtypeStruct((B, T, K, choice[0]), jnp.int32)
  if items > FEW * call.processors():
    programs = min(items, tuned.resident * call.processors())
    return call.kernel_call(
        top_k_kernels.compressed_top_k_kernel, (q, k, lse, first, position),
        [indices, jax.ShapeDtypeStruct((programs, tokens, width), jnp.float32)], grid=(programs,),
        name="compressed_top_k", SIZE=SIZE, PROGRAMS=programs, **how, **scoring, **chosen)[0]
  splits = max(1, min(4 * call.processors() // items, C // (2 * tuned.block)))
  scores = call.kernel_call(
      top_k_kernels.compressed_scores_kernel, (q, k, lse, first, position),
      jax.ShapeDtypeStruct((items, tokens, width), jnp.float32), grid=(items * splits,), name="compressed_scores",
      SPLITS=splits, **how, **scoring)
  return call.kernel_call(
      top_k_kernels.choose_kernel, (scores, first, position), indices, grid=(items,), name="compressed_choose",
      B=B, T=T, C=C, K=K, KP=1, HEADS=K, LINES=tokens, WIDTH=width, LEN=LEN, STRIDE=STRIDE, SUB=1,
      SIZE=SIZE, BLOCK=tuned.block, **how, **chosen)


def index_top_k(q_idx, k_idx, *, block_size, num_blocks, num_initial, num_local, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.index_top_k`."""
  first, position = call.visible_tokens(*q_idx.shape[:2], query_offset, segment_ids)
  f = functools.partial(_index_top_k, SIZE=block_size, choice=(num_blocks, num_initial, num_local),
                        scale=float(scale))
  return call.batched(f)(q_idx, k_idx, first, position)


def _index_top_k(q, k, first, position, *, SIZE, choice, scale):
  (B, T, K, H), S = q.shape, k.shape[1]
  KP = call.next_power_of_2(K)
  tuned = tuning.get("index_scores", head_dim=H, dtype=q.dtype)
  rows = max(min(tuned.rows, call.next_power_of_2(T) * KP), KP, ranged.MIN_ROWS)
  block, BLOCKS = tuned.block, -(-S // SIZE)
  SUB = max(1, SIZE // block)
  width = -(-S // max(block, SIZE)) * max(block // SIZE, SUB)
  items = B * -(-T // (rows // KP))
  scoring = dict(B=B, T=T, S=S, K=K, KP=KP, H=H, SIZE=SIZE, SCALE=scale, ROWS=rows, BLOCK=block, WIDTH=width,
                 PRECISION="ieee" if q.dtype == jnp.float32 else "tf32")
  chosen = _choice(rows, BLOCKS, *choice, tuned.warps)
  how = dict(num_warps=tuned.warps, num_stages=tuned.stages)
  indices = jax.ShapeDtypeStruct((B, T, K, choice[0]), jnp.int32)
  if items > FEW * call.processors():
    programs = min(items, tuned.resident * call.processors())
    return call.kernel_call(
        top_k_kernels.index_top_k_kernel, (q, k, first, position),
        [indices, jax.ShapeDtypeStruct((programs, rows, width), jnp.float32)], grid=(programs,), name="index_top_k",
        PROGRAMS=programs, SUB=SUB, **how, **scoring, **chosen)[0]
  splits = max(1, min(4 * call.processors() // items, S // (2 * block)))
  scores = call.kernel_call(
      top_k_kernels.index_scores_kernel, (q, k, first, position),
      jax.ShapeDtypeStruct((items, rows, width), jnp.float32), grid=(items * splits,), name="index_scores",
      SPLITS=splits, **how, **scoring)
  return call.kernel_call(
      top_k_kernels.choose_kernel, (scores, first, position), indices, grid=(items,), name="index_choose", B=B, T=T,
      C=S, K=K, KP=KP, HEADS=1, LINES=rows, WIDTH=width, LEN=0, STRIDE=0, SUB=SUB, SIZE=SIZE, BLOCK=block, **how,
      **chosen)
