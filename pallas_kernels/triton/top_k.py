"""`compressed_top_k`, `index_top_k` and `block_top_k` of `pallas_kernels.api`. No gradients: selection has none."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import lists, spans
from pallas_kernels.triton import call, choose_kernel, ranged, score_kernels, tuning

MAX_SLOTS = 128
CHUNK = 128     # blocks that the choice looks at together
FEW = 128       # blocks of a line that lie in registers, at most
# Lines of so few blocks that a program has, and warps. On one H200, 65,536 lines of 128 blocks, J 16: 0.040 ms, with 8
# or 16 lines 0.041 to 0.043, through lists in memory 0.069.
LINES = call.Tiles(4, 1, 1)
SCRATCH_BYTES = 2 ** 28  # of scores alive at a time; more queries go through in chunks


def selection_reason(block_size, num_blocks):
  if num_blocks > MAX_SLOTS:
    return f"num_blocks = {num_blocks}: the kernels take up to {MAX_SLOTS}"
  if block_size < 1:
    return f"block_size = {block_size}"
  return None


def supports_compressed_top_k(*, q, k_cmp, block_len, block_stride, block_size, num_blocks, scale, **_):
  if block_size % block_stride:
    return f"block_stride = {block_stride}: the kernels need a divisor of block_size = {block_size}"
  if (block_size // block_stride) & (block_size // block_stride - 1):
    return f"block_stride = {block_stride}: the kernels need block_size = {block_size} to be a power of two times it"
  if block_size - block_stride + block_len > 2 * block_size:
    return f"block_len = {block_len}: the kernels take compressed blocks that touch two blocks of {block_size}, no more"
  return ranged.reasons(q, k_cmp, None, scale, "k_cmp") or selection_reason(block_size, num_blocks)


def supports_index_top_k(*, q_idx, k_idx, block_size, num_blocks, scale, **_):
  if block_size not in (16, 32, 64, 128, 256) and not call.INTERPRET:
    return f"block_size = {block_size}: the kernels take 16, 32, 64, 128, 256"
  return ranged.reasons(q_idx, _OneHead(k_idx), None, scale, "k_idx") or selection_reason(block_size, num_blocks)


class _OneHead:
  """Shape and dtype of the index key, seen as the keys of one head for all index queries."""

  def __init__(self, x):
    self.shape, self.dtype = (*x.shape[:2], 1, x.shape[2]), x.dtype


def compressed_top_k(q, k_cmp, lse, *, block_len, block_stride, block_size, num_blocks, num_initial, num_local, scale,
                     segment_ids, query_offset):
  """See `pallas_kernels.api.compressed_top_k`."""
  (B, T), (C, K) = q.shape[:2], k_cmp.shape[1:3]
  position = spans.positions(T, query_offset, B)
  first, _ = spans.of_segments(segment_ids, position)
  S = spans.compressed_tokens(T, C, segment_ids, query_offset, block_len=block_len, block_stride=block_stride)
  f = functools.partial(
      _compressed_top_k, LEN=block_len, STRIDE=block_stride, SIZE=block_size, BLOCKS=max(1, -(-S // block_size)),
      choice=(num_blocks, num_initial, num_local), scale=float(scale))
  line = 8 * line_width(-(-k_cmp.shape[1] * block_stride // block_size))
  return call.batched(functools.partial(in_chunks, f, B * K * line))(q, lse.astype(jnp.float32), first, position, k_cmp)


def in_chunks(f, bytes_per_token, *arguments):
  """f(*arguments) by chunks of queries, axis 1 of all but the last argument, the keys."""
  *queries, keys = arguments
  chunks, _ = lists.slices_of(queries[0].shape[1], min(bytes_per_token, SCRATCH_BYTES // 64), SCRATCH_BYTES)
  return lists.in_slices(lambda *args: (f(*args[:-1], keys), None, None), chunks, queries)[0]


def _compressed_top_k(q, lse, first, position, k, *, LEN, STRIDE, SIZE, BLOCKS, choice, scale):
  (B, T, N, H), (C, K) = q.shape, k.shape[1:3]
  sizes = ranged.Sizes(T, C, K, N // K, H, scale, "ieee" if q.dtype == jnp.float32 else "tf32")
  ratio = SIZE // STRIDE
  tuned = tuning.get("compressed_scores", head_dim=H, dtype=q.dtype)
  rows, block = sizes.rows(tuned.rows), max(tuned.block, call.next_power_of_2(ratio))
  tokens = rows // sizes.GP
  # what begins in a block may reach into one more
  width = line_width(max(-(-C // block) * (block // ratio) + 1, BLOCKS))
  items = B * K * -(-T // tokens)
  splits = max(1, min(4 * call.processors() // items, C // (2 * block)))
  scores = call.kernel_call(
      score_kernels.compressed_scores_kernel, (q, k, lse, first, position),
      jax.ShapeDtypeStruct((items, tokens, 2, width), jnp.float32), grid=(items * splits,), name="compressed_scores",
      num_warps=tuned.warps, num_stages=tuned.stages, LEN=LEN, STRIDE=STRIDE, SIZE=SIZE, ROWS=rows, BLOCK=block,
      WIDTH=width, SPLITS=splits, **sizes.constants(B))
  return choose(scores, first, position, choice, K=K, KP=1, TOKENS=tokens, WIDTH=width, LEN=LEN, STRIDE=STRIDE,
                 SIZE=SIZE, BLOCKS=BLOCKS)


def line_width(blocks):
  """Numbers of a line of scores: whole chunks of the choice."""
  return -(-blocks // CHUNK) * CHUNK


def choose(scores, first, position, choice, *, K, padded=True, **constants):
  (B, T), (num_blocks, num_initial, num_local) = first.shape, choice
  lines = scores.shape[0] * scores.shape[1]
  slots = call.next_power_of_2(num_blocks)
  constants |= dict(B=B, T=T, K=K, J=num_blocks, JP=slots, INITIAL=num_initial, LOCAL=num_local, TOTAL=lines)
  indices = jax.ShapeDtypeStruct((B, T, K, num_blocks), jnp.int32)
  if constants["BLOCKS"] <= FEW:
    return call.kernel_call(
        choose_kernel.choose_few_kernel, (scores, first, position), indices, grid=(-(-lines // LINES.rows),),
        name="choose_blocks", num_warps=LINES.warps, num_stages=1, LINES=LINES.rows, **constants)
  groups, size = max(64, 2 * slots), max(64, 4 * slots)  # more groups than slots, or no maximum bounds the others
  each = max(1, min(4, lines // (32 * call.processors())))
  programs = -(-lines // each)
  return call.kernel_call(
      choose_kernel.choose_kernel, (scores, first, position),
      [indices, jax.ShapeDtypeStruct((programs, size), jnp.int32)], grid=(programs,), name="choose_blocks", num_warps=1,
      num_stages=1, LINES=each, CHUNK=CHUNK, GROUPS=min(groups, CHUNK), PARTS=-(-groups // CHUNK), LIST=size,
      PADDED=padded, **constants)[0]


def index_top_k(q_idx, k_idx, *, block_size, num_blocks, num_initial, num_local, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.index_top_k`."""
  B, T, K, _ = q_idx.shape
  position = spans.positions(T, query_offset, B)
  first, _ = spans.of_segments(segment_ids, position)
  f = functools.partial(_index_top_k, SIZE=block_size, choice=(num_blocks, num_initial, num_local),
                        scale=float(scale))
  line = 4 * line_width(-(-k_idx.shape[1] // block_size))
  return call.batched(functools.partial(in_chunks, f, B * call.next_power_of_2(K) * line))(
      q_idx, first, position, k_idx)


def _index_top_k(q, first, position, k, *, SIZE, choice, scale):
  (B, T, K, H), S = q.shape, k.shape[1]
  KP = call.next_power_of_2(K)
  tuned = tuning.get("index_scores", head_dim=H, dtype=q.dtype)
  rows = max(min(tuned.rows, call.next_power_of_2(T) * KP), KP, ranged.MIN_ROWS)
  block, tokens = max(tuned.block, SIZE), rows // KP
  width = line_width(-(-S // block) * (block // SIZE))
  items = B * -(-T // tokens)
  splits = max(1, min(4 * call.processors() // items, S // (2 * block)))
  scores = call.kernel_call(
      score_kernels.index_scores_kernel, (q, k, first, position),
      jax.ShapeDtypeStruct((items, rows, width), jnp.float32), grid=(items * splits,), name="index_scores",
      num_warps=tuned.warps, num_stages=tuned.stages, B=B, T=T, S=S, K=K, KP=KP, H=H, SIZE=SIZE, SCALE=scale, ROWS=rows,
      BLOCK=block, WIDTH=width, SPLITS=splits, PRECISION="ieee" if q.dtype == jnp.float32 else "tf32")
  return choose(scores, first, position, choice, K=K, KP=KP, TOKENS=tokens, WIDTH=width, LEN=0, STRIDE=0,
                 SIZE=SIZE, BLOCKS=-(-S // SIZE))


def supports_block_top_k(*, scores, block_size, num_blocks, **_):
  if call.unavailable():
    return call.unavailable()
  if scores.size == 0:
    return f"scores {scores.shape} is empty"
  if scores.shape[0] * scores.shape[1] * scores.shape[2] >= 2 ** 31:
    return f"scores {scores.shape} has more rows than int32 counts"
  return selection_reason(block_size, num_blocks)


def block_top_k(scores, *, block_size, num_blocks, num_initial, num_local, keys, segment_ids, query_offset):
  """See `pallas_kernels.api.block_top_k`."""
  position = spans.positions(scores.shape[1], query_offset, scores.shape[0])
  first, _ = spans.of_segments(segment_ids, position)
  del keys
  f = functools.partial(_block_top_k, SIZE=block_size, choice=(num_blocks, num_initial, num_local))
  return call.batched(f)(scores.astype(jnp.float32), first, position)


def _block_top_k(scores, first, position, *, SIZE, choice):
  B, T, K, blocks = scores.shape
  # One tile of T tokens with K heads each per batch entry: the order that the scores have.
  return choose(scores.reshape(B, T * K, blocks), first, position, choice, K=K, KP=K, TOKENS=T, WIDTH=blocks,
                 LEN=0, STRIDE=0, SIZE=SIZE, BLOCKS=blocks, padded=False)
