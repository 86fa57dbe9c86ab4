"""Selection by compressed attention on TPUs.

The log-sum-exp of `compressed_attention` is given, so p of a key needs no other key, and the score of a block
is a weighted sum over a few neighbouring rows of p (summed over the heads of the group): each a load with a
stride. A block's rows end in its own tile of keys; those that begin in the tile before are kept from there.
"""
from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import spans
from pallas_kernels.mosaic_tpu import flash, selection
from pallas_kernels.mosaic_tpu.flash import LANES, LOG2E
from pallas_kernels.mosaic_tpu.selection import SUBLANES

MAX_WEIGHTS = 64  # rows of p that make up a block, the loads of a step


def tile_sizes(queries, group, per_block, blocks):
  """Queries and compressed keys of a tile: some 512 keys, in whole blocks whose scores fill whole registers."""
  keys = SUBLANES * per_block * max(1, flash.MAX_KEYS // (SUBLANES * per_block))
  return selection.queries_of(queries, blocks, max(1, 4 // group) * LANES), keys


def supports(q, k_cmp, *, block_len, block_stride, block_size, num_blocks, scale=None, segment_ids=None, query_offset=0,
             **_):
  """None, or why these arguments need another implementation; begins with the argument's name."""
  reason = flash.refuses(q, k_cmp, k_cmp, scale, k_name="k_cmp")
  if reason is not None:
    return reason
  if block_size % block_stride:
    return f"block_size = {block_size} is no multiple of block_stride = {block_stride}: the kernel needs one"
  if (block_len + block_size) // block_stride > MAX_WEIGHTS:
    return (f"block_len = {block_len}, block_size = {block_size}: the kernel takes up to {MAX_WEIGHTS} strides "
            "together")
  if num_blocks > selection.MAX_SLOTS:
    return f"num_blocks = {num_blocks}: the kernel takes up to {selection.MAX_SLOTS}"
  S = spans.compressed_tokens(q.shape[1], k_cmp.shape[1], segment_ids, query_offset, block_len=block_len,
                              block_stride=block_stride)
  blocks = -(-S // block_size)
  tile, _ = tile_sizes(q.shape[1], q.shape[2] // k_cmp.shape[2], block_size // block_stride, blocks)
  return selection.refuses(blocks, *q.shape[:2], tile)


def compressed_top_k(q, k_cmp, lse, *, block_len, block_stride, block_size, num_blocks, num_initial=1,
                     num_local=2, scale=None, segment_ids=None, query_offset=0, tiles=None, interpret=False):
  """Selects blocks by the mass of their compressed keys; see `pallas_kernels.api.compressed_top_k`.

  Args:
    tiles: (queries, keys) of a tile; None is `tile_sizes`. Queries are a multiple of 128, keys of 8 blocks.
    interpret: for `pl.pallas_call`.
  """
  B, T, N, H = q.shape
  C, K = k_cmp.shape[1:3]
  G, per_block = N // K, block_size // block_stride
  factor = (H ** -0.5 if scale is None else float(scale)) * LOG2E
  S = spans.compressed_tokens(T, C, segment_ids, query_offset, block_len=block_len, block_stride=block_stride)
  blocks = -(-S // block_size)
  bt, bk = tiles or tile_sizes(T, G, per_block, blocks)
  pos = spans.positions(T, query_offset, B)
  keys = spans.of_compressed(pos, C, segment_ids, block_len=block_len, block_stride=block_stride)
  before = -(-block_len // block_stride) - 1  # compressed blocks that begin before a block and reach into it
  shared = lambda n: min(n * block_stride + block_len, block_size) - max(n * block_stride, 0)
  weights = [(n, shared(n) / block_stride) for n in range(-before, per_block) if shared(n) > 0]
  kept = -(-before // SUBLANES) * SUBLANES
  c = selection.Selection(
      (B, T, K), (bt, bk, 1), keys, spans.of_tokens(pos, S, segment_ids), pos, num_keys=blocks * per_block,
      blocks=blocks, block_size=block_size, num_blocks=num_blocks, num_initial=num_initial, num_local=num_local,
      overhang=before > 0, interpret=interpret)
  lanes = bt // LANES  # a load with a stride wants rows of one register

  def body(tiles, bounds_ref, q_ref, k_ref, lse_ref, out_ref, scores, mass):
    place, j = c.place()

    @pl.when(j == 0)
    def _():
      c.clear(tiles, place, scores, 0.0)
      mass[...] = jnp.zeros_like(mass)

    def step(tile, mask):
      for lane in range(lanes):
        here, row = slice(lane * LANES, (lane + 1) * LANES), lane * (kept + bk)
        new = pl.ds(row + kept, bk)
        if kept:
          mass[pl.ds(row, kept)] = mass[pl.ds(row + bk, kept)]
        mass[new] = jnp.zeros((bk, LANES), jnp.float32)

        def some(parts, here=here, new=new):
          of_parts = 0.0
          for g, _ in parts:
            s = flash.dot(k_ref[0, 0], q_ref[0, 0, g, :, here], 1, 0) * factor
            of_parts += jnp.exp2(s - lse_ref[0, 0, pl.ds(g, 1), here])
          if mask is not None:  # the same for all heads
            of_parts = jnp.where(mask[:, here], of_parts, 0.0)
          mass[new] += of_parts

        flash.each_part(G, LANES, some, 1 if q.dtype == jnp.float32 else 4)
        total = 0.0
        for n, weight in weights:
          total += weight * mass[pl.ds(row + kept + n, c.per_tile, per_block)]
        scores[0, c.rows_of(tile), here] = total

    c.over_keys(tiles, place, j, bounds_ref, step)
    pl.when(j == c.nk - 1)(lambda: c.choose(tiles, place, bounds_ref, scores, out_ref))

  row = lse.reshape(B, T, K, G).transpose(0, 2, 3, 1)
  row = spans.pad_queries(jnp.where(row > -jnp.inf, row * LOG2E, jnp.inf), c.padded_T)  # inf: p is 0
  return c.run(
      body, "compressed_top_k",
      [pl.BlockSpec((1, 1, G, H, bt), lambda b, r, i, j, *_: (b, r, 0, 0, i)),
       pl.BlockSpec((1, 1, bk, H), lambda b, r, i, j, t: (b, r, c.key_tile(b, i, j, t), 0)),
       pl.BlockSpec((1, 1, G, bt), lambda b, r, i, j, *_: (b, r, 0, i))],
      [pltpu.VMEM((lanes * (kept + bk), LANES), jnp.float32)],
      flash.heads_first(q, K, c.padded_T), flash.keys_second(k_cmp, c.nk * bk), row)
