"""Blocks that neighbouring queries have in common, to be attended tile by tile with the queries on chip.

Sending every (query, block) through the lists of lists.py costs a partial result, written and read
again, however many neighbours chose the same block. Trained selections share much: the sink, the query's
own blocks, stripes. A *tile* is 128 query rows, 128 // G neighbouring tokens of one KV head and, where G does
not divide 128, a few rows that see nothing; a block that enough of the tokens chose is *common* to the tile
(`split`), and shared_attention.py runs flash attention of the tile over its common blocks. That makes one partial
result per query for all its common blocks, which merge.py adds to those of the entries.

Which blocks count as common, and whether any do, is a question of cost alone. On one H200 (32,768 tokens,
bf16, head dim 128, block 64, J 16; forward ms without and with this pass): 64/4 heads, neighbours share 80 %
of their free choices 6.23 and 4.88, hot columns 5.81 and 4.77 (an earlier, slower `split`), uniform choices
6.17 and 6.17; 32/8 heads 3.35 and 2.84, uniform 3.34 and 3.46; 16/16 heads 2.07 and 2.43; 8/2 heads of 64
with blocks of 32 (16 x 8,192 tokens) 1.71 and 1.76. Hence the rule of `pays`. Uniform choices of other groups:
24/8 heads 2.48 and 2.90, 20/4 2.24 and 2.28, 28/4 2.81 and 3.02. All this with a thread block per tile; since thread
blocks walk tiles, 64/4 heads, 8,192 tokens, blocks of a random index, which are common by chance: 1.59 and 1.54 (1.64).
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lists as entry_lists, spans
from pallas_kernels.lists import TILE_ROWS

ROWS = 2 * TILE_ROWS  # of a tile: two warpgroups share the keys that are on chip
SLOTS = 32            # candidates of a tile, the choices of a few of its tokens: bits of a word
SHARE = 1 / 3         # of the tile's tokens that have to choose a block


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=("blocks", "count", "rows", "words", "first", "end", "all_from", "all_to"),
                   meta_fields=())
@dataclasses.dataclass(frozen=True)
class Common:
  """The common blocks of all tiles; tiles are numbered by (batch, KV head, place along the sequence).

  Attributes:
    blocks: int32[tiles * SLOTS], block * SLOTS + bit; of each tile the first `count` are used.
    count: int32[tiles].
    rows: int32[tiles * ROWS], where each row lies in q[B, T, N, H]; those past the end are the last one's.
    words: int32[tiles * ROWS]; of the bits of the tile's blocks those are set whose block the row's token chose.
    first, end: int32[tiles * ROWS], the keys that each row sees as far as causality and segments go.
    all_from, all_to: int32[tiles], those that all tokens of a tile see.
  """
  blocks: jax.Array
  count: jax.Array
  rows: jax.Array
  words: jax.Array
  first: jax.Array
  end: jax.Array
  all_from: jax.Array
  all_to: jax.Array


def tokens_of(plan):
  """Tokens of a tile."""
  return ROWS // plan.group


def tiles_of(plan):
  """Tiles of one (batch, KV head)."""
  return -(-plan.queries // tokens_of(plan))


def votes_needed(plan):
  """Tokens of a tile that have to choose a block."""
  return max(2, round(SHARE * tokens_of(plan)))


def first_rows(plan):
  """int32[B, T, K]: the first of the G rows of each query, among the rows of all tiles."""
  tokens, tiles = tokens_of(plan), tiles_of(plan)
  token = np.arange(plan.queries)
  heads = np.arange(plan.batch * plan.kv_heads).reshape(plan.batch, 1, plan.kv_heads) * (tiles * ROWS)
  return jnp.asarray(heads + (token // tokens * ROWS + token % tokens * plan.group)[:, None], jnp.int32)


def _whole_tiles(x):
  """[tiles, rows with tokens] to [tiles * ROWS], padded with zeros."""
  return jnp.pad(x, ((0, 0), (0, ROWS - x.shape[1]))).reshape(-1)


_overrides: list[bool] = []


@contextlib.contextmanager
def override(own_pass):
  """`pays` gives `own_pass` inside the block: for measuring. Compiled functions keep what they have."""
  _overrides.append(own_pass)
  try:
    yield
  finally:
    _overrides.pop()


def pays(plan, head_dim):
  """Whether common blocks are worth their own pass; measured, see above. The queries have to fill tiles."""
  fills = plan.queries >= tokens_of(plan)
  if _overrides:
    return fills and _overrides[-1]
  return fills and plan.group >= 4 and head_dim >= 128


def split(block_indices, plan, segment_ids=None, query_offset=0):
  """Takes the common blocks out of a selection.

  Args:
    block_indices: int32[B, T, K, J].
    plan: Plan.
    segment_ids, query_offset: as in `lists.invert`.

  Returns:
    Common, and int32[B, T, K, J], the selection without them.
  """
  B, T, K, J = block_indices.shape
  tokens, tiles = tokens_of(plan), tiles_of(plan)
  picks = jnp.where(entry_lists.chosen(block_indices, plan.blocks), block_indices, -1)
  picks = jnp.pad(picks, ((0, 0), (0, tiles * tokens - T), (0, 0), (0, 0)), constant_values=-1)
  picks = picks.transpose(0, 2, 1, 3).reshape(-1, tokens, J)
  samples = -(-SLOTS // J)
  sampled = (2 * np.arange(samples) + 1) * tokens // (2 * samples)
  candidates = picks[:, sampled].reshape(-1, samples * J)[:, :SLOTS]
  candidates = jnp.pad(candidates, ((0, 0), (0, SLOTS - candidates.shape[1])), constant_values=-1)
  slot = jnp.arange(SLOTS, dtype=jnp.int32)
  # The first candidate that an entry equals; a padding entry equals none.
  same = (picks[..., None] == candidates[:, None, None, :]) & (picks >= 0)[..., None]
  which = jnp.where(same, slot, SLOTS).min(axis=-1)
  words = jnp.where(which < SLOTS, 1 << jnp.minimum(which, SLOTS - 1), 0).sum(axis=2, dtype=jnp.int32)  # no carry
  votes = ((words[..., None] >> slot) & 1).sum(axis=1, dtype=jnp.int32)
  taken = votes >= votes_needed(plan)
  mask = jnp.where(taken, 1 << slot, 0).sum(axis=-1, dtype=jnp.int32)
  rank = jnp.cumsum(taken, axis=1, dtype=jnp.int32) - 1
  here = taken[:, :, None] & (rank[:, :, None] == slot)
  blocks = jnp.where(here, (candidates * SLOTS + slot)[:, :, None], 0).sum(axis=1, dtype=jnp.int32)
  out = (which < SLOTS) & ((mask[:, None, None] >> jnp.minimum(which, SLOTS - 1)) & 1 != 0)
  rest = jnp.where(out, -1, picks).reshape(B, K, tiles * tokens, J).transpose(0, 2, 1, 3)[:, :T]

  def by_row(x):  # a number per token to one per row
    return _whole_tiles(jnp.repeat(x.reshape(-1, tokens), plan.group, axis=1))

  def by_head(x):  # int32[B, ...] to all KV heads
    return jnp.broadcast_to(x[:, None], (B, K, *x.shape[1:]))

  first, end = spans.visible_keys(plan.batch, plan.queries, plan.keys, segment_ids, query_offset)
  first, end = (jnp.pad(x, ((0, 0), (0, tiles * tokens - T))) for x in (first, end))
  by_tile = lambda x: x.reshape(B, tiles, tokens)
  token = np.minimum(np.arange(tiles * tokens), T - 1)
  rows = (np.arange(B)[:, None, None] * T + token) * K + np.arange(K)[:, None]
  rows = rows[..., None] * plan.group + np.arange(plan.group)
  rows = _whole_tiles(jnp.asarray(rows.reshape(-1, tokens * plan.group), jnp.int32))
  return Common(blocks.reshape(-1), taken.sum(axis=1, dtype=jnp.int32), rows,
                by_row(words & mask[:, None]), by_row(by_head(first)), by_row(by_head(end)),
                by_head(by_tile(first).max(axis=2)).reshape(-1), by_head(by_tile(end).min(axis=2)).reshape(-1)), rest
