"""Blocks that neighbouring queries have in common, attended tile by tile with the queries on chip.

Sending every (query, block) through the lists of lists.py costs a partial result, written and read
again, however many neighbours chose the same block. Trained selections share much: the sink, the query's
own blocks, stripes. A *tile* is 128 query rows, 128 // G neighbouring tokens of one KV head and, where G does
not divide 128, a few rows that see nothing; a block that enough of the tokens chose is *common* to the tile
(`split`), and `attend` runs plain flash attention of the tile over its common blocks, with each row masked to those
that its token did choose. That makes one partial result per query for all its common blocks, which merge.py adds to
those of the entries.

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
import math

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends, lists as entry_lists, spans
from pallas_kernels.lists import TILE_ROWS
from pallas_kernels.mosaic_gpu import gather
from pallas_kernels.mosaic_gpu.tiles import LOG2E, compiler_params, load, tile_transforms

ROWS = 2 * TILE_ROWS  # of a tile: two warpgroups share the keys that are on chip
SLOTS = 32            # candidates of a tile, the choices of a few of its tokens: bits of a word
SHARE = 1 / 3         # of the tile's tokens that have to choose a block


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=("blocks", "count", "rows", "words", "first", "end"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Common:
  """The common blocks of all tiles; tiles are numbered by (batch, KV head, place along the sequence).

  Attributes:
    blocks: int32[tiles * SLOTS], block * SLOTS + bit; of each tile the first `count` are used.
    count: int32[tiles].
    rows: int32[tiles * ROWS], where each row lies in q[B, T, N, H]; those past the end are the last one's.
    words: int32[tiles * ROWS]; of the bits of the tile's blocks those are set whose block the row's token chose.
    first, end: int32[tiles * ROWS], the keys that each row sees as far as causality and segments go.
  """
  blocks: jax.Array
  count: jax.Array
  rows: jax.Array
  words: jax.Array
  first: jax.Array
  end: jax.Array


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

  def by_head(x):  # int32[B, T] to all tokens of all tiles
    x = jnp.pad(x, ((0, 0), (0, tiles * tokens - T)))
    return jnp.broadcast_to(x[:, None], (B, K, tiles * tokens))

  first, end = spans.visible_keys(plan.batch, plan.queries, plan.keys, segment_ids, query_offset)
  token = np.minimum(np.arange(tiles * tokens), T - 1)
  rows = (np.arange(B)[:, None, None] * T + token) * K + np.arange(K)[:, None]
  rows = rows[..., None] * plan.group + np.arange(plan.group)
  rows = _whole_tiles(jnp.asarray(rows.reshape(-1, tokens * plan.group), jnp.int32))
  return Common(blocks.reshape(-1), taken.sum(axis=1, dtype=jnp.int32), rows,
                by_row(words & mask[:, None]), by_row(by_head(first)), by_row(by_head(end))), rest


def attend(q, k, v, common, plan, *, scale, segmented, interpret=False, programs=None):
  """Attention of every query over its tile's common blocks.

  As many thread blocks as there are multiprocessors take every so many-th tile each: one warpgroup fetches what two
  others work on, the queries of the next tile too, since a tile has few common blocks and its first loads and last
  stores would take longer than its products.

  Args:
    q: [B * T * N, H], rows in the order of q[B, T, N, H].
    k, v: [B, blocks * block_size, K, H].
    common: Common.
    plan: Plan.
    scale: float.
    segmented: whether `common.first` may be above 0.
    interpret: use only operations of the interpreter.
    programs: thread blocks; None is one per multiprocessor.

  Returns:
    o [B * K * tiles * ROWS, H] of q.dtype, normalised, and the base-2 log-sum-exp float32[B * K * tiles * ROWS];
    0 and -inf where a query chose no common block.
  """
  head_dim, dtype, size = q.shape[1], q.dtype, plan.block_size
  tiles = tiles_of(plan)
  tile, square = (TILE_ROWS, head_dim), (TILE_ROWS, size)
  stages = 4 if head_dim * size <= 64 * 64 else 3 if head_dim * size <= 128 * 64 else 2
  query_transforms = tile_transforms(head_dim, dtype)
  key_transforms = query_transforms
  value_transforms = tile_transforms(math.gcd(head_dim, size), dtype)
  all_tiles = plan.batch * plan.kv_heads * tiles
  # The list of a tile and its length come on chip in one copy, whose place is a multiple of 128 bytes.
  listing = jnp.concatenate([common.blocks.reshape(all_tiles, SLOTS), common.count[:, None]], axis=1)
  listing = jnp.pad(listing, ((0, 0), (0, SLOTS - 1))).reshape(-1)
  programs = min(all_tiles, backends.processors() if programs is None else programs)

  def body(listing, rows, words, first, end, q, k, v, o, lse,
           q_s, k_s, v_s, rows_s, word_s, first_s, end_s, list_s, nothing_s, lse_s,
           listed, full_q, free_q, full_k, full_v, used_k, used_v, turn, *for_interpreter):
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    mine = lax.div(all_tiles - 1 - program, jnp.int32(programs)) + 1
    tile_of = lambda n: program + n * programs

    def fetch_lists(n):
      at, slot = tile_of(n), lax.rem(n, jnp.int32(2))
      plgpu.copy_gmem_to_smem(listing.at[pl.ds(at * 2 * SLOTS, 2 * SLOTS)], list_s.at[slot], listed.at[slot])
      for half in range(2):
        those = pl.ds(at * ROWS + half * TILE_ROWS, TILE_ROWS)
        for source, place in [(rows, rows_s), (words, word_s), (end, end_s)] + [(first, first_s)] * segmented:
          plgpu.copy_gmem_to_smem(source.at[those], place.at[slot * 2 + half], listed.at[slot])

    def produce(n, done):
      at, which = tile_of(n), lax.rem(n, jnp.int32(2))
      plgpu.barrier_wait(listed.at[which])
      for half in range(2):
        of = which * 2 + half
        gather.gather_tile(rows_s.at[of], rows_s.at[of], [q], [q_s.at[of]], [], [], nothing_s, group=1,
                           transforms=query_transforms, left=lambda: TILE_ROWS,
                           copied=for_interpreter[1] if interpret else None, interpret=interpret)
      gather.commit(interpret)
      batch_head = lax.div(at, jnp.int32(tiles))
      batch, head = lax.div(batch_head, jnp.int32(plan.kv_heads)), lax.rem(batch_head, jnp.int32(plan.kv_heads))
      steps = list_s[which, SLOTS]

      def bring(i):
        slot = lax.rem(done + i, jnp.int32(stages))
        keys = pl.ds(lax.div(list_s[which, i], jnp.int32(SLOTS)) * size, size)
        for source, place, full, used in ((k, k_s, full_k, used_k), (v, v_s, full_v, used_v)):
          pl.when(done + i >= stages)(lambda used=used: plgpu.barrier_wait(used.at[slot]))
          plgpu.copy_gmem_to_smem(source.at[batch, keys, head], place.at[slot], full.at[slot])

      # As many as wait for the tile before alone; the next ones need that this one is worked on.
      pl.loop(0, lax.min(steps, stages))(bring)
      gather.wait(0, interpret)
      plgpu.commit_smem()
      plgpu.barrier_arrive(full_q.at[which])
      pl.loop(lax.min(steps, stages), steps)(bring)

      @pl.when(n + 1 < mine)
      def _():
        pl.when(n >= 1)(lambda: plgpu.barrier_wait(free_q.at[1 - which]))
        fetch_lists(n + 1)

      return done + steps

    @pl.when(wg == 2)
    def _():
      fetch_lists(jnp.int32(0))
      done = lax.fori_loop(0, mine, produce, jnp.int32(0))
      if interpret:  # where whoever waits on a barrier has to see it to the end

        @pl.loop(lax.max(done - stages, 0), done)
        def _(i):
          for used in (used_k, used_v):
            plgpu.barrier_wait(used.at[lax.rem(i, jnp.int32(stages))])

        @pl.loop(lax.max(mine - 2, 0), mine)
        def _(n):
          plgpu.barrier_wait(free_q.at[lax.rem(n, jnp.int32(2))])

    @pl.when(wg < 2)
    def _():
      def consume(n, done):
        at, which = tile_of(n), lax.rem(n, jnp.int32(2))
        of = which * 2 + wg
        plgpu.barrier_wait(listed.at[which])
        plgpu.barrier_wait(full_q.at[which])
        steps = list_s[which, SLOTS]
        _compute(at * ROWS + wg * TILE_ROWS, wg, steps, done, o, lse, q_s.at[of], k_s, v_s, word_s.at[of],
                 first_s.at[of], end_s.at[of], list_s.at[which], lse_s.at[wg], full_k, full_v, used_k, used_v, turn,
                 for_interpreter)
        plgpu.barrier_arrive(free_q.at[which])
        return done + steps

      lax.fori_loop(0, mine, consume, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

  def _compute(first_row, wg, steps, done, o, lse, q_s, k_s, v_s, word_s, first_s, end_s, list_s, lse_s, full_k, full_v,
               used_k, used_v, turn, for_interpreter):
    def take_turns():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    word, last = load(word_s, by_row), load(end_s, by_row)
    begin = load(first_s, by_row) if segmented else None
    key = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA)
    spread = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])
    # One warpgroup multiplies while the other takes exponentials.
    pl.when(wg == 1)(take_turns)

    def step(i, carry):
      acc, m, total = carry
      slot = lax.rem(done + i, jnp.int32(stages))
      plgpu.barrier_wait(full_k.at[slot])

      def scores(acc):
        plgpu.wgmma(acc, q_s, k_s.at[slot].transpose((1, 0)))
        take_turns()
        return acc[...]

      s = pl.run_scoped(scores, plgpu.ACC(square, jnp.float32))
      plgpu.barrier_arrive(used_k.at[slot])
      first_key, bit = lax.div(list_s[i], jnp.int32(SLOTS)) * size, lax.rem(list_s[i], jnp.int32(SLOTS))
      stop = jnp.where(((word >> bit) & 1) != 0, last - first_key, 0)
      visible = key < spread(stop, square)
      if segmented:
        visible &= key >= spread(begin - first_key, square)
      s = jnp.where(visible, s * (scale * LOG2E), -jnp.inf)
      top = jnp.maximum(m, s.max(axis=1))
      shift = jnp.where(top == -jnp.inf, 0.0, top)
      p = jnp.exp2(s - spread(shift, square))
      decay = jnp.exp2(m - shift)
      acc = acc * spread(decay, tile)
      total = total * decay + p.sum(axis=1)
      p = p.astype(dtype)
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(full_v.at[slot])
      plgpu.barrier_wait(turn)

      def values(acc):
        plgpu.wgmma(acc, p, v_s.at[slot])

      if interpret:  # which knows neither operands in registers nor accumulators that begin with a value
        p_s = for_interpreter[0].at[wg]
        p_s[...] = p
        plgpu.commit_smem()

        def more(acc):
          plgpu.wgmma(acc, p_s, v_s.at[slot])
          plgpu.wgmma_wait(0)
          return acc[...]

        acc = acc + pl.run_scoped(more, plgpu.ACC(tile, jnp.float32))
      else:
        acc = pl.run_state(values)(plgpu.ACC.init(acc))
      plgpu.barrier_arrive(used_v.at[slot])
      return acc, top, total

    row = lambda value: plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), by_row)
    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), plgpu.Layout.WGMMA)
    acc, m, total = lax.fori_loop(0, steps, step, (acc, row(-jnp.inf), row(0.0)))
    pl.when(wg == 0)(take_turns)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    q_s[...] = (acc * spread(1.0 / safe, tile)).astype(dtype)
    lse_s[...] = jnp.where(some, m + jnp.log(safe) * LOG2E, -jnp.inf)
    plgpu.commit_smem()
    mine = pl.ds(first_row, TILE_ROWS)
    plgpu.copy_smem_to_gmem(q_s, o.at[mine])
    plgpu.copy_smem_to_gmem(lse_s, lse.at[mine])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  shared = lambda count, shape, kind, **kw: plgpu.SMEM((count, *shape), kind, **kw)
  lists = lambda: shared(4, (TILE_ROWS,), jnp.int32)
  ring = lambda count: plgpu.Barrier(num_arrivals=count, num_barriers=stages)
  pair = lambda count: plgpu.Barrier(num_arrivals=count, num_barriers=2)
  return plgpu.kernel(
      body,
      out_type=(jax.ShapeDtypeStruct((all_tiles * ROWS, head_dim), dtype),
                jax.ShapeDtypeStruct((all_tiles * ROWS,), jnp.float32)),
      scratch_types=[
          shared(4, tile, dtype, transforms=query_transforms),  # of this tile and the next, half each warpgroup
          shared(stages, (size, head_dim), dtype, transforms=key_transforms),
          shared(stages, (size, head_dim), dtype, transforms=value_transforms),
          lists(), lists(), lists(), lists(), shared(2, (2 * SLOTS,), jnp.int32), plgpu.SMEM((TILE_ROWS,), jnp.int32),
          shared(2, (TILE_ROWS,), jnp.float32), pair(7 + 2 * segmented), pair(1), pair(2), ring(1), ring(1), ring(2),
          ring(2), plgpu.Barrier(num_arrivals=2),
      ] + [shared(2, square, dtype, transforms=tile_transforms(size, dtype)), plgpu.Barrier()] * interpret,
      grid=(programs,), grid_names=("program",), num_threads=3, thread_name="wg",
      compiler_params=compiler_params(interpret), kernel_name="selected_attention_common",
  )(listing, common.rows, common.words, common.first, common.end, q, k, v)
