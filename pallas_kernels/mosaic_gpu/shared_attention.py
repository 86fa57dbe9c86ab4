"""Attention of a tile of neighbouring queries over the blocks that they have in common (shared_blocks.py).

Plain flash attention with the queries on chip, each row masked to the blocks that its token chose. On one H200 (64/4
heads of 128, 32,768 tokens, blocks of 64, J 16) the kernel took 1.99, 1.98 and 1.02 ms (hot columns, neighbours that
share 80 %, uniform choices) with a step per block, at whose two products both warpgroups met; as below 1.70, 1.67 and
0.91: of hot columns 540 TFLOP/s and, with K, V, queries and results, 4.8 TB/s through the L2 cache. Two blocks a step
in turns are 2 to 5 % faster than one without turns. Three warpgroups, a tile of 192 rows, took 1.53, 1.69 and 0.78;
whole forward passes were no faster for it. Blocks of 128: hot columns 3.20 and 2.39, uniform 2.50 and 1.83.
"""
from __future__ import annotations

import functools
import math

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.lists import TILE_ROWS
from pallas_kernels.mosaic_gpu import gather, shared_blocks
from pallas_kernels.mosaic_gpu.shared_blocks import ROWS, SLOTS
from pallas_kernels.mosaic_gpu.tiles import LOG2E, compiler_params, load, tile_transforms

AHEAD = 4  # places for the lists of tiles


def attend(q, k, v, common, plan, *, scale, segmented, interpret=False, programs=None):
  """Attention of every query over its tile's common blocks.

  As many thread blocks as there are multiprocessors take every so many-th tile each. One warpgroup fetches what two
  others work on, lists two tiles and queries one tile ahead, since a tile has few common blocks. The two take turns to
  start their products (P V of a step and Q K^T of the next), so that one takes exponentials while the tensor cores
  work for the other.

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
  tiles = shared_blocks.tiles_of(plan)
  tile, square = (TILE_ROWS, head_dim), (TILE_ROWS, size)
  per = 1 if size > TILE_ROWS else 2  # blocks of a step: the sums so far are scaled and maxima are taken once per step
  stages = 2 if head_dim * size > 128 * 64 else 4
  query_transforms = tile_transforms(head_dim, dtype)
  key_transforms = query_transforms
  value_transforms = tile_transforms(math.gcd(head_dim, size), dtype)
  all_tiles = plan.batch * plan.kv_heads * tiles
  factor = max(abs(scale), 1e-30) * LOG2E  # of scores whose sign is that of `scale`; above 0, for -inf stays -inf
  # The list of a tile, its length and what all its tokens see come on chip in one copy, whose place is a multiple of
  # 128 bytes.
  listing = jnp.concatenate([common.blocks.reshape(all_tiles, SLOTS), jnp.stack(
      [common.count, common.all_from, common.all_to], axis=1)], axis=1)
  listing = jnp.pad(listing, ((0, 0), (0, SLOTS - 3))).reshape(-1)
  programs = min(all_tiles, backends.processors() if programs is None else programs)

  def body(listing, rows, words, first, end, q, k, v, o, lse,
           q_s, k_s, v_s, rows_s, word_s, first_s, end_s, list_s, nothing_s, lse_s,
           listed, full_q, free_q, full_k, full_v, used_k, used_v, turn, *for_interpreter):
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    mine = lax.div(all_tiles - 1 - program, jnp.int32(programs)) + 1
    tile_of = lambda n: program + n * programs
    place_of = lambda n: lax.rem(n, jnp.int32(AHEAD))

    def steps_of(slot):
      """Blocks that are brought: the list, or where it is shorter than a step some that are nobody's."""
      return lax.max(list_s[slot, SLOTS], per)

    def fetch_lists(n):
      at, slot = tile_of(n), place_of(n)
      plgpu.copy_gmem_to_smem(listing.at[pl.ds(at * 2 * SLOTS, 2 * SLOTS)], list_s.at[slot], listed.at[slot])
      for half in range(2):
        those = pl.ds(at * ROWS + half * TILE_ROWS, TILE_ROWS)
        for source, place in [(rows, rows_s), (words, word_s), (end, end_s)] + [(first, first_s)] * segmented:
          plgpu.copy_gmem_to_smem(source.at[those], place.at[slot * 2 + half], listed.at[slot])

    def fetch_queries(n):
      """And the lists after the next: whoever is done with the queries' place is done with theirs."""
      slot, which = place_of(n), lax.rem(n, jnp.int32(2))
      plgpu.barrier_wait(listed.at[slot])
      pl.when(n >= 2)(lambda: plgpu.barrier_wait(free_q.at[which]))
      for half in range(2):
        gather.gather_tile(rows_s.at[slot * 2 + half], rows_s.at[slot * 2 + half], [q], [q_s.at[which * 2 + half]], [],
                           [], nothing_s, group=1, transforms=query_transforms, left=lambda: TILE_ROWS,
                           copied=for_interpreter[1] if interpret else None, interpret=interpret)
      gather.commit(interpret)
      pl.when(n + AHEAD - 2 < mine)(lambda: fetch_lists(n + (AHEAD - 2)))

    def produce(n, done):
      slot, which = place_of(n), lax.rem(n, jnp.int32(2))
      batch_head = lax.div(tile_of(n), jnp.int32(tiles))
      batch, head = lax.div(batch_head, jnp.int32(plan.kv_heads)), lax.rem(batch_head, jnp.int32(plan.kv_heads))
      steps = steps_of(slot)

      def bring(i, source, place, full, used):
        stage = lax.rem(done + i, jnp.int32(stages))
        keys = pl.ds(lax.div(list_s[slot, i], jnp.int32(SLOTS)) * size, size)
        pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(used.at[stage]))
        plgpu.copy_gmem_to_smem(source.at[batch, keys, head], place.at[stage], full.at[stage])

      bring_k = functools.partial(bring, source=k, place=k_s, full=full_k, used=used_k)
      bring_v = functools.partial(bring, source=v, place=v_s, full=full_v, used=used_v)
      lead = lax.min(steps, stages // 2)  # K comes that much before V, as it is used a step before
      pl.loop(0, lead)(bring_k)
      gather.wait(0, interpret)
      plgpu.commit_smem()
      plgpu.barrier_arrive(full_q.at[which])

      @pl.loop(lead, steps)
      def _(i):
        bring_k(i)
        bring_v(i - lead)

      pl.loop(steps - lead, steps)(bring_v)
      pl.when(n + 1 < mine)(lambda: fetch_queries(n + 1))
      return done + steps

    @pl.when(wg == 2)
    def _():
      if not interpret:
        plgpu.set_max_registers(40, action="decrease")
      for n in range(AHEAD - 2):
        pl.when(n < mine)(lambda n=n: fetch_lists(jnp.int32(n)))
      fetch_queries(jnp.int32(0))
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
      if not interpret:
        plgpu.set_max_registers(232, action="increase")
      pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

      def consume(n, done):
        at, slot, which = tile_of(n), place_of(n), lax.rem(n, jnp.int32(2))
        of, lists = which * 2 + wg, slot * 2 + wg
        plgpu.barrier_wait(listed.at[slot])
        plgpu.barrier_wait(full_q.at[which])
        steps = steps_of(slot)
        _compute(at * ROWS + wg * TILE_ROWS, wg, steps, done, o, lse, q_s.at[of], k_s, v_s, word_s.at[lists],
                 first_s.at[lists], end_s.at[lists], list_s.at[slot], lse_s.at[wg], full_k, full_v, used_k, used_v,
                 turn, for_interpreter)
        plgpu.barrier_arrive(free_q.at[which])
        return done + steps

      lax.fori_loop(0, mine, consume, jnp.int32(0))
      pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
      plgpu.wait_smem_to_gmem(0)

  def _compute(first_row, wg, steps, done, o, lse, q_s, k_s, v_s, word_s, first_s, end_s, list_s, lse_s, full_k, full_v,
               used_k, used_v, turn, for_interpreter):
    by_row = plgpu.Layout.WGMMA.reduce(1)
    word, last = load(word_s, by_row), load(end_s, by_row)
    begin = load(first_s, by_row) if segmented else None
    key = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA)
    spread = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])
    count, all_from, all_to = list_s[SLOTS], list_s[SLOTS + 1], list_s[SLOTS + 2]
    stage_of = lambda i: lax.rem(done + i, jnp.int32(stages))
    row = lambda value: plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), by_row)
    zeros = lambda shape: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def seen(s, i):
      """Scores of block i of the list; those of keys that a row does not see are -inf."""
      s = s if scale >= 0 else -s
      first_key = lax.div(list_s[i], jnp.int32(SLOTS)) * size

      def masked(s):
        visible = key < spread(last - first_key, square)
        if segmented:
          visible &= key >= spread(begin - first_key, square)
        return jnp.where(visible, s, -jnp.inf)

      whole = first_key + size <= all_to
      if segmented:
        whole &= first_key >= all_from
      return lax.cond(whole, lambda s: s, masked, s)

    def weights(scores, i, m, total):
      """P of the blocks from block i of the list on, for rows whose token chose them; what the sums so far are worth
      now; maxima and sums."""
      scores = [seen(s, i + n) for n, s in enumerate(scores)]
      chose = [(((word >> lax.rem(list_s[i + n], jnp.int32(SLOTS))) & 1) != 0) & (i + n < count)
               for n in range(len(scores))]
      top = m
      for s, mine in zip(scores, chose):
        top = jnp.maximum(top, jnp.where(mine, s.max(axis=1), -jnp.inf))
      shift = jnp.where(top == -jnp.inf, 0.0, top * factor)
      decay = jnp.exp2(m * factor - shift)
      p = [jnp.exp2(s * factor + spread(jnp.where(mine, -shift, -jnp.inf), square)) for s, mine in zip(scores, chose)]
      return [x.astype(dtype) for x in p], decay, top, total * decay + functools.reduce(jnp.add, p).sum(axis=1)

    def multiply(acc, p, at, following, blocks=per):
      """(acc + P V, scores): P is that of blocks from `at` on, scores are of so many blocks from `following` on."""
      v_stages = [stage_of(at + n) for n in range(len(p))]
      k_stages = [stage_of(following + n) for n in range(blocks)]
      for full, held in ((full_v, v_stages), (full_k, k_stages)):
        for stage in held:
          plgpu.barrier_wait(full.at[stage])

      def products(refs):
        acc, *scores = refs
        for x, stage in zip(p, v_stages):
          plgpu.wgmma(acc, x, v_s.at[stage])
        for score, stage in zip(scores, k_stages):
          plgpu.wgmma(score, q_s, k_s.at[stage].transpose((1, 0)))
        plgpu.barrier_arrive(turn.at[1 - wg])

      plgpu.barrier_wait(turn.at[wg])
      if interpret:
        acc, scores = interpreted(acc, p, v_stages, k_stages)
        plgpu.barrier_arrive(turn.at[1 - wg])
      else:
        acc, *scores = pl.run_state(products)(
            (plgpu.ACC.init(acc), *(plgpu.ACC.init(zeros(square)) for _ in k_stages)))
      for used, held in ((used_v, v_stages), (used_k, k_stages)):
        for stage in held:
          plgpu.barrier_arrive(used.at[stage])
      return acc, scores

    def interpreted(acc, p, v_stages, k_stages):
      """The interpreter knows neither operands in registers nor accumulators that begin with a value."""
      def product(left, right):
        def made(acc):
          plgpu.wgmma(acc, left, right)
          plgpu.wgmma_wait(0)
          return acc[...]
        return pl.run_scoped(made, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

      for x, stage in zip(p, v_stages):
        p_s = for_interpreter[0].at[wg]
        p_s[...] = x
        plgpu.commit_smem()
        acc = acc + product(p_s, v_s.at[stage])
      return acc, [product(q_s, k_s.at[stage].transpose((1, 0))) for stage in k_stages]

    def with_a_step():
      acc, scores = multiply(zeros(tile), [], 0, jnp.int32(0))
      return acc, scores, row(-jnp.inf), row(0.0)

    def with_one_block():
      acc, scores = multiply(zeros(tile), [], 0, jnp.int32(0), blocks=1)
      p, _, m, total = weights(scores, jnp.int32(0), row(-jnp.inf), row(0.0))
      return *multiply(acc, p, jnp.int32(0), jnp.int32(1)), m, total

    def step(i, carry):
      acc, scores, m, total = carry
      at = single + i * per
      p, decay, m, total = weights(scores, at, m, total)
      return *multiply(acc * spread(decay, tile), p, at, at + per), m, total

    single = lax.rem(steps, jnp.int32(per))  # one block alone, and then two at a time
    more = lax.div(steps, jnp.int32(per)) - 1
    carry = with_a_step() if per == 1 else lax.cond(single == 1, with_one_block, with_a_step)
    acc, scores, m, total = lax.fori_loop(0, more, step, carry)
    p, decay, m, total = weights(scores, single + more * per, m, total)
    acc, _ = multiply(acc * spread(decay, tile), p, single + more * per, 0, blocks=0)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    q_s[...] = (acc * spread(1.0 / safe, tile)).astype(dtype)
    lse_s[...] = jnp.where(some, m * factor + jnp.log(safe) * LOG2E, -jnp.inf)
    plgpu.commit_smem()
    mine = pl.ds(first_row, TILE_ROWS)
    plgpu.copy_smem_to_gmem(q_s, o.at[mine])
    plgpu.copy_smem_to_gmem(lse_s, lse.at[mine])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  shared = lambda count, shape, kind, **kw: plgpu.SMEM((count, *shape), kind, **kw)
  lists = lambda: shared(2 * AHEAD, (TILE_ROWS,), jnp.int32)
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
          lists(), lists(), lists(), lists(), shared(AHEAD, (2 * SLOTS,), jnp.int32),
          plgpu.SMEM((TILE_ROWS,), jnp.int32), shared(2, (TILE_ROWS,), jnp.float32),
          plgpu.Barrier(num_arrivals=7 + 2 * segmented, num_barriers=AHEAD), pair(1), pair(2), ring(1), ring(1),
          ring(2), ring(2), pair(1),
      ] + [shared(2, square, dtype, transforms=tile_transforms(size, dtype)), plgpu.Barrier()] * interpret,
      grid=(programs,), grid_names=("program",), num_threads=3, thread_name="wg",
      compiler_params=compiler_params(interpret), kernel_name="selected_attention_common",
  )(listing, common.rows, common.words, common.first, common.end, q, k, v)
