"""Selection by an index branch on TPUs: one product and a maximum over each block's rows.

The index key is one for all KV heads, so a step takes as many heads as their scores have room for.
"""
from __future__ import annotations

import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels import spans
from pallas_kernels.mosaic_tpu import flash, selection
from pallas_kernels.mosaic_tpu.selection import SUBLANES

TILE_SCORES = 2 ** 19  # of keys that are on chip at a time


def tile_sizes(queries, kv_heads, block_size, blocks):
  """Queries and keys of a tile (in whole blocks whose scores fill whole registers), and KV heads per step."""
  rows = selection.queries_of(queries, blocks, flash.MAX_QUERIES)
  heads = max(h for h in range(1, kv_heads + 1)
              if kv_heads % h == 0 and (h == 1 or h * blocks * rows * 4 <= selection.SCORE_BYTES))
  step = SUBLANES * block_size
  keys = min(max(1, TILE_SCORES // rows // step), -(-blocks // SUBLANES)) * step
  return rows, keys, heads


def supports(q_idx, k_idx, *, block_size, num_blocks, scale=None, **_):
  """None, or why these arguments need another implementation; begins with the argument's name."""
  reason = flash.refuses(q_idx, k_idx, k_idx, scale, q_name="q_idx", k_name="k_idx")
  if reason is not None:
    return reason
  if block_size % SUBLANES:
    return f"block_size = {block_size}: the kernel takes multiples of {SUBLANES}"
  if num_blocks > selection.MAX_SLOTS:
    return f"num_blocks = {num_blocks}: the kernel takes up to {selection.MAX_SLOTS}"
  B, T, K, _ = q_idx.shape
  blocks = -(-k_idx.shape[1] // block_size)
  return selection.refuses(blocks, B, T, tile_sizes(T, K, block_size, blocks)[0])


def index_top_k(q_idx, k_idx, *, block_size, num_blocks, num_initial=0, num_local=1, scale=None,
                segment_ids=None, query_offset=0, tiles=None, interpret=False):
  """Selects blocks by their best index score; see `pallas_kernels.api.index_top_k`.

  Args:
    tiles: (queries, keys, KV heads) of a step; None is `tile_sizes`. Queries are a multiple of 128, keys of 8
      blocks.
    interpret: for `pl.pallas_call`.
  """
  B, T, K, H = q_idx.shape
  S = k_idx.shape[1]
  blocks = -(-S // block_size)
  bt, bk, heads = tiles or tile_sizes(T, K, block_size, blocks)
  pos = spans.positions(T, query_offset, B)
  tokens = spans.of_tokens(pos, S, segment_ids)
  c = selection.Selection(
      (B, T, K), (bt, bk, heads), tokens, tokens, pos, num_keys=blocks * block_size, blocks=blocks,
      block_size=block_size, num_blocks=num_blocks, num_initial=num_initial, num_local=num_local, overhang=False,
      interpret=interpret)

  def body(tiles, bounds_ref, q_ref, k_ref, out_ref, scores):
    place, j = c.place()
    pl.when(j == 0)(lambda: c.clear(tiles, place, scores, -jnp.inf))

    def step(tile, mask):
      def some(parts):
        for r, lane in parts:
          s = flash.dot(k_ref[0], q_ref[0, r, :, lane], 1, 0)
          if scale is not None and scale != 1:
            s *= scale
          if mask is not None:
            s = jnp.where(mask[:, lane], s, -jnp.inf)
          scores[r, c.rows_of(tile), lane] = s.reshape(c.per_tile, block_size, -1).max(axis=1)

      flash.each_part(heads, bt, some, 2)

    c.over_keys(tiles, place, j, bounds_ref, step)
    pl.when(j == c.nk - 1)(lambda: c.choose(tiles, place, bounds_ref, scores, out_ref))

  return c.run(
      body, "index_top_k",
      [pl.BlockSpec((1, heads, H, bt), lambda b, r, i, j, *_: (b, r, 0, i)),
       pl.BlockSpec((1, bk, H), lambda b, r, i, j, t: (b, c.key_tile(b, i, j, t), 0))],
      [], flash.heads_first(q_idx, K, c.padded_T)[:, :, 0], jnp.pad(k_idx, ((0, 0), (0, c.nk * bk - S), (0, 0))))
