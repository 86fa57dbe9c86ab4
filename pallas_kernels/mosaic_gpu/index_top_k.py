"""`index_top_k` on Hopper: block scores by wgmma, the choice by the kernel of triton/.

A thread block has 256 index queries, the K heads of 256 / K neighbouring tokens, on chip, two warpgroups half of them
each, and a third warpgroup brings tiles of 128 keys; so one warpgroup takes maxima while the other multiplies. Keys are
read from the L2 cache once per 256 queries: with 128 that alone would cost more than the products.
"""
from __future__ import annotations

import functools

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels import spans
from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.tiles import compiler_params, load, of_another_gpu, tile_transforms
from pallas_kernels.triton import call, top_k

ROWS = 256  # index queries of a thread block
KEYS = 128  # of a step
STAGES = 3  # tiles of keys on chip
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (32, 64, 128)
MAX_HEADS = 16


def scores(q, k, first, end, *, block_size, scale, splits, width, interpret=False):
  """Of each index query the best score in each block that it sees some key of.

  Args:
    q: [B, T, K, H], K a power of two up to 16, T * K a multiple of ROWS.
    k: [B, S, H], S a multiple of KEYS.
    first, end: int32[B, T], the keys that each query sees.
    block_size: a divisor of KEYS.
    scale: of the scores, positive.
    splits: thread blocks that share the keys of a tile.
    width: numbers of a line, at least the blocks there are in whole KEYS.
    interpret: use only operations of the interpreter.

  Returns:
    float32[T / tokens * B, ROWS, width], a tile's lines together, tokens = ROWS / K, in the order of (tile, batch).
    What no query of a tile sees is undefined.
  """
  B, T, K, H = q.shape
  tokens = ROWS // K
  tiles = T // tokens
  bounds = spans.query_tiles(first, end, tokens, KEYS)  # B, tiles, 4
  bounds = bounds.transpose(1, 0, 2).reshape(-1)
  by_row = lambda x: jnp.repeat(x, K, axis=1).reshape(B, tiles, ROWS).transpose(1, 0, 2).reshape(-1)
  dtype, half, per = q.dtype, ROWS // 2, KEYS // block_size
  transforms = tile_transforms(H, dtype)
  items = tiles * B
  square = (half, KEYS)

  def body(bounds, firsts, ends, q, k, out, q_s, k_s, first_s, end_s, ready, full, used):
    at, wg = lax.axis_index("item"), lax.axis_index("wg")
    item = items - 1 - lax.div(at, jnp.int32(splits))  # long tiles first
    part = lax.rem(at, jnp.int32(splits))
    begin, stop = bounds[item * 4], bounds[item * 4 + 1]
    share = lax.div(stop - begin + (splits - 1), jnp.int32(splits))
    begin = lax.min(begin + part * share, stop)
    stop = lax.min(begin + share, stop)
    batch, tile = lax.rem(item, jnp.int32(B)), lax.div(item, jnp.int32(B))

    @pl.when(wg == 2)
    def _():
      @pl.loop(0, stop - begin)
      def _(i):
        slot = lax.rem(i, jnp.int32(STAGES))
        pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(used.at[slot]))
        plgpu.copy_gmem_to_smem(k.at[batch, pl.ds((begin + i) * KEYS, KEYS)], k_s.at[slot], full.at[slot])

    @pl.when(wg < 2)
    def _():
      mine = pl.ds(item * ROWS + wg * half, half)
      copies = [(q.at[batch, pl.ds(tile * ROWS + wg * half, half)], q_s.at[wg]), (firsts.at[mine], first_s.at[wg]),
                (ends.at[mine], end_s.at[wg])]
      for source, place in copies:
        plgpu.copy_gmem_to_smem(source, place, ready.at[wg])
      plgpu.barrier_wait(ready.at[wg])
      layout = plgpu.Layout.WGMMA.reduce(1)
      row_first, row_end = load(first_s.at[wg], layout), load(end_s.at[wg], layout)
      row = plgpu.broadcasted_iota(jnp.int32, (half,), 0, layout=layout) + (item * ROWS + wg * half)
      key = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA)
      spread = lambda x: lax.broadcast_in_dim(x, square, [0])
      see_all, all_see = bounds[item * 4 + 2], bounds[item * 4 + 3]

      def step(masked, i, carry):
        slot = lax.rem(i - begin, jnp.int32(STAGES))
        plgpu.barrier_wait(full.at[slot])

        def multiply(acc):
          plgpu.wgmma(acc, q_s.at[wg], k_s.at[slot].transpose((1, 0)))
          return acc[...]

        s = pl.run_scoped(multiply, plgpu.ACC(square, jnp.float32))
        plgpu.barrier_arrive(used.at[slot])
        if masked:
          visible = (key < spread(row_end - i * KEYS)) & (key >= spread(row_first - i * KEYS))
          s = jnp.where(visible, s, -jnp.inf)
        for n in range(per):
          best = s[:, n * block_size:(n + 1) * block_size].max(axis=1) * scale
          if interpret:  # which scatters nothing
            out[i * per + n, mine] = best
          else:
            _store(best, row, i * per + n, out, width)
        return carry

      # Tiles of keys that every query sees all of need no mask.
      full_begin = lax.min(lax.max(lax.div(see_all + (KEYS - 1), jnp.int32(KEYS)), begin), stop)
      full_stop = lax.max(lax.min(lax.div(all_see, jnp.int32(KEYS)), stop), full_begin)
      lax.fori_loop(begin, full_begin, functools.partial(step, True), None)
      lax.fori_loop(full_begin, full_stop, functools.partial(step, False), None)
      lax.fori_loop(full_stop, stop, functools.partial(step, True), None)

  pair = lambda shape, kind, **kw: plgpu.SMEM((2, *shape), kind, **kw)
  out = plgpu.kernel(
      body,
      out_type=jax.ShapeDtypeStruct((width, items * ROWS) if interpret else (items * ROWS, width), jnp.float32),
      scratch_types=[
          pair((half, H), dtype, transforms=transforms),
          plgpu.SMEM((STAGES, KEYS, H), dtype, transforms=transforms),
          pair((half,), jnp.int32), pair((half,), jnp.int32),
          plgpu.Barrier(num_arrivals=3, num_barriers=2), plgpu.Barrier(num_barriers=STAGES),
          plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      ],
      grid=(items * splits,), grid_names=("item",), num_threads=3, thread_name="wg",
      compiler_params=compiler_params(interpret), kernel_name="index_scores",
  )(bounds, by_row(first), by_row(end), q.reshape(B, T * K, H), k)
  return (out.T if interpret else out).reshape(items, ROWS, width)


def _store(values, rows, column, out, width):
  """out[rows[i], column] = values[i], a few rows per thread."""
  layout = plgpu.Layout.WGMMA.reduce(1)

  @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.Layout.WG_SPLAT(()), plgpu.RefType()))
  def do(ctx, values, rows, column, out):
    del ctx
    column, base = ptx.wide(column.registers.item()), ptx.global_address(out)
    for value, row in zip(values.registers.flat, rows.registers.flat):
      value, row = map(_scalar, (value, row))
      ptx.effect("st.global.f32 [$0], $1;", "l,f", ptx.byte(base, ptx.add(ptx.mul(ptx.wide(row), width), column), 4),
                 value)
  do(values, rows, column, out)


def _scalar(x):
  return vector.extract(x, [], [0]) if isinstance(x.type, ir.VectorType) else x


def index_top_k(q_idx, k_idx, *, block_size, num_blocks, num_initial, num_local, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.index_top_k`."""
  (B, T, K, _), S = q_idx.shape, k_idx.shape[1]
  first, end = spans.visible_keys(B, T, S, segment_ids, query_offset)
  f = functools.partial(_index_top_k, block_size=block_size, choice=(num_blocks, num_initial, num_local),
                        scale=float(scale), blocks=-(-S // block_size))
  missing = -S % KEYS
  keys = jnp.pad(k_idx, ((0, 0), (0, missing), (0, 0))) if missing else k_idx
  line = 4 * top_k.line_width((S + missing) // block_size)
  position = spans.positions(T, query_offset, B)
  return call.batched(functools.partial(top_k.in_chunks, f, B * K * line))(q_idx, first, end, position, keys)


def _index_top_k(q, first, end, position, k, *, block_size, choice, scale, blocks):
  (B, T, K, _), S = q.shape, k.shape[1]
  tokens = ROWS // K
  missing = -T % tokens
  seen = [spans.pad_queries(x, T + missing) for x in (first, end)]
  padded = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else q
  width = top_k.line_width(S // block_size)
  items = B * (T + missing) // tokens
  splits = max(1, min(2 * call.processors() // items, S // (8 * KEYS)))
  lines = scores(padded, k, *seen, block_size=block_size, scale=scale, splits=splits, width=width)
  return top_k.choose(lines, first, position, choice, K=K, KP=K, TOKENS=tokens, WIDTH=width, LEN=0, STRIDE=0,
                      SIZE=block_size, BLOCKS=blocks)


def avoid(*, q_idx, block_size, **_):
  """On one H200, ms here and in triton/, 4 heads of 128: 131,072 tokens 13.3 and 18.8, 32,768 tokens 0.91 and 1.20,
  8,192 tokens 0.115 and 0.122; 2 heads of 64, blocks of 32, 8 x 4,096 tokens 0.165 and 0.140."""
  H = q_idx.shape[3]
  if H < 128 or block_size < 64:
    return (f"q_idx has head dim {H}, block_size = {block_size}: triton is faster but for heads of 128 and blocks from "
            "64 on")
  return None


def supports(*, q_idx, block_size, **rest):
  """None, or why these arguments need another implementation; begins with the argument's name."""
  T, K, H = q_idx.shape[1:]
  if q_idx.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q_idx.dtype = {q_idx.dtype}: the kernel takes bfloat16 and float16"
  if H not in HEAD_DIMS:
    return f"q_idx has head dim {H}: the kernel takes {', '.join(map(str, HEAD_DIMS))}"
  if block_size not in BLOCK_SIZES:
    return f"block_size = {block_size}: the kernel takes {', '.join(map(str, BLOCK_SIZES))}"
  if K & (K - 1) or K > MAX_HEADS:
    return f"q_idx has {K} heads: the kernel takes powers of two up to {MAX_HEADS}"
  if T * K < ROWS:
    return f"q_idx {q_idx.shape} fills no tile of {ROWS} rows"
  return top_k.supports_index_top_k(q_idx=q_idx, block_size=block_size, **rest) or of_another_gpu("q_idx")
