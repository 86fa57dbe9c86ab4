"""Backward pass of selected attention, over the lists of the forward pass; no atomics.

A thread block keeps a block of K and V and the sums dK^T, dV^T of its unit on chip and
walks the unit's tiles: it gathers rows of Q and dO, recomputes P from the log-sum-exp and
does five products per tile. dQ of an entry is written as a partial result and summed per
query over its slots; dK and dV of a unit are written in float32 and summed per block in
the order of the units, so that equal inputs give equal bits. A block that every query
chose is many units that run side by side.

The sums are kept transposed, [H, keys], where 64 divides H: then the 64 of a wgmma is H or the
tile, and blocks of 32 keys waste nothing; else they are [keys, H]. The next tile is fetched while this one is worked
on; P and dS take turns in one buffer and dQ leaves through that of dO, or two thread blocks
would not fit a multiprocessor at H = 128.
"""
from __future__ import annotations

import math

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.lists import TILE_ROWS
from pallas_kernels.mosaic_gpu import gather
from pallas_kernels.mosaic_gpu.tiles import LOG2E, compiler_params, load, tile_transforms, visible

REDUCE_ROWS = 32  # rows of a sum that one thread block of `sum_units` adds up


def part_keys(plan):
  """Keys that a thread block of the backward pass keeps: 128 would not fit the registers."""
  return min(plan.block_size, 64)


def transposed(head_dim):
  """Whether the sums are dK^T and dV^T; those of dK and dV need keys in 64s."""
  return head_dim % TILE_ROWS == 0


def shared_by_two(plan, head_dim):
  """Whether the two halves of a block share each tile: rows are gathered once, and dQ of an entry is one row."""
  return plan.block_size == 2 * TILE_ROWS and head_dim == 2 * TILE_ROWS


def _added(products, carry, sums: tuple[int, int], interpret: bool):
  """`carry`, the float32 sums [*sums] of dK and dV so far, and what `products(dk_acc, dv_acc)` adds to them."""
  if interpret:  # which knows no accumulators that begin with a value
    more = pl.run_scoped(lambda *accs: (products(*accs), [acc[...] for acc in accs])[1],
                         *[plgpu.ACC(sums, jnp.float32)] * 2)
    return tuple(x + y for x, y in zip(carry, more))
  return pl.run_state(lambda accs: products(*accs))(tuple(plgpu.ACC.init(x) for x in carry))


def _summed(step, tiles, sums: tuple[int, int]):
  """(dK, dV) of a unit: `step(i, carry)` over its tiles, from zeros on."""
  zeros = plgpu.layout_cast(jnp.zeros(sums, jnp.float32), plgpu.Layout.WGMMA)
  return lax.fori_loop(0, tiles, step, (zeros, zeros))


def partial_gradients(q, k, v, do, lse, delta, entries, plan, *, scale, segmented,
                      interpret=False):
  """Gradients of each entry and each unit.

  Args:
    q, do: [B * T * N, H].
    k, v: [B, blocks * block_size, K, H].
    lse: float32[B * T * N], base-2 log-sum-exp of each query row over all its entries; finite.
    delta: float32[B * T * N], rowsum(o * do) less the cotangent of the natural log-sum-exp.
    entries, plan, scale, segmented, interpret: as in `partial_attention`.

  Returns:
    dq [parts, max_tiles * 64, H] of q.dtype and dk^T, dv^T float32[max_units, parts, H, keys], or dk, dv with
    the last axes swapped, see `transposed`; parts * keys is block_size, but dq has one part where `shared_by_two`. dq
    and dk lack the factor `scale`.
  """
  head_dim, dtype = q.shape[1], q.dtype
  if shared_by_two(plan, head_dim):
    return _by_two(q, k, v, do, lse, delta, entries, plan, scale=scale, segmented=segmented, interpret=interpret)
  keys = part_keys(plan)
  parts = plan.block_size // keys
  tile, square = (TILE_ROWS, head_dim), (TILE_ROWS, keys)
  sums = (head_dim, keys) if transposed(head_dim) else (keys, head_dim)
  transforms = tile_transforms(math.gcd(keys, head_dim), dtype)  # one swizzle, wgmma wants the same on both sides

  def body(units, *refs):
    at = lax.axis_index("unit_part")  # CUDA allows 2^31 blocks on one axis alone, 65535 on the others
    unit, part = lax.div(at, jnp.int32(parts)), lax.rem(at, jnp.int32(parts))
    tokens = units[unit, 1]

    @pl.when(tokens > 0)
    def _():
      _unit(units, unit, part, tokens, *refs)

  def _unit(units, unit, part, tokens, rows, spans, q, k, v, do, lse, delta, dq, dk, dv,
            rows_s, spans_s, q_s, do_s, k_s, v_s, p_s, span_s, lse_s, delta_s, kv_ready, copied):
    first, first_tile = units[unit, 0], units[unit, 2]
    batch, head, block = units[unit, 3], units[unit, 4], units[unit, 5]
    tiles = lax.div(tokens + (plan.tile_tokens - 1), jnp.int32(plan.tile_tokens))
    mine = pl.ds(block * plan.block_size + part * keys, keys)
    plgpu.copy_gmem_to_smem(k.at[batch, mine, head], k_s, kv_ready)
    plgpu.copy_gmem_to_smem(v.at[batch, mine, head], v_s, kv_ready)
    gather.load_lists([rows, spans], [rows_s, spans_s], first, tokens, copied=copied, interpret=interpret)

    def fetch(i, slot):
      tokens_of = pl.ds(i * plan.tile_tokens, plan.tile_tokens)
      gather.gather_tile(rows_s.at[tokens_of], spans_s.at[tokens_of], [q, do], [q_s.at[slot], do_s.at[slot]],
                         [lse, delta], [lse_s.at[slot], delta_s.at[slot]], span_s.at[slot], group=plan.group,
                         transforms=transforms, left=lambda: tokens - i * plan.tile_tokens, copied=copied,
                         interpret=interpret)
      gather.commit(interpret)

    fetch(jnp.int32(0), jnp.int32(0))
    plgpu.barrier_wait(kv_ready)

    def step(i, carry):
      slot = lax.rem(i, jnp.int32(2))
      gather.wait(0, interpret)
      plgpu.commit_smem()

      def scores(s_acc, dp_acc):
        plgpu.wgmma(s_acc, q_s.at[slot], k_s.transpose((1, 0)))
        plgpu.wgmma(dp_acc, do_s.at[slot], v_s.transpose((1, 0)))
        # The last dQ lies in the other dO: only when it has left may the next tile come.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(i + 1 < tiles)(lambda: fetch(i + 1, 1 - slot))
        return s_acc[...], dp_acc[...]

      s, dp = pl.run_scoped(scores, plgpu.ACC(square, jnp.float32), plgpu.ACC(square, jnp.float32))
      by_row = plgpu.Layout.WGMMA.reduce(1)
      span = load(span_s.at[slot], by_row)
      spread = lambda x: lax.broadcast_in_dim(x, square, [0])
      p = jnp.exp2(s * (scale * LOG2E) - spread(load(lse_s.at[slot], by_row)))
      p = jnp.where(visible(span, square, segmented, part * keys), p, 0.0)
      p_s[...] = p.astype(dtype)
      plgpu.commit_smem()

      def by_key(acc, weights, rows):
        if transposed(head_dim):
          plgpu.wgmma(acc, rows.transpose((1, 0)), weights)
        else:
          plgpu.wgmma(acc, weights.transpose((1, 0)), rows)

      def products(dk_acc, dv_acc):
        by_key(dv_acc, p_s, do_s.at[slot])
        ds = (p * (dp - spread(load(delta_s.at[slot], by_row)))).astype(dtype)
        plgpu.wgmma_wait(0)
        gather.barrier_unless(interpret)  # everybody's wgmma has read P
        p_s[...] = ds
        plgpu.commit_smem()

        def last(dq_acc):
          plgpu.wgmma(dq_acc, p_s, k_s)
          by_key(dk_acc, p_s, q_s.at[slot])
          return dq_acc[...].astype(dtype)

        do_s[slot] = pl.run_scoped(last, plgpu.ACC(tile, jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(do_s.at[slot], dq.at[part, pl.ds((first_tile + i) * TILE_ROWS, TILE_ROWS)])

      return _added(products, carry, sums, interpret)

    dk_sum, dv_sum = _summed(step, tiles, sums)
    dk[unit, part] = dk_sum
    dv[unit, part] = dv_sum
    plgpu.wait_smem_to_gmem(0)

  matrix = lambda *shape: plgpu.SMEM(shape, dtype, transforms=transforms)
  lanes = lambda dtype: plgpu.SMEM((2, TILE_ROWS), dtype)
  partial = jax.ShapeDtypeStruct((plan.max_units, parts, *sums), jnp.float32)
  return plgpu.kernel(
      body,
      out_type=(jax.ShapeDtypeStruct((parts, plan.max_tiles * TILE_ROWS, head_dim), dtype), partial, partial),
      scratch_types=[
          plgpu.SMEM((plan.unit_tokens,), jnp.int32), plgpu.SMEM((plan.unit_tokens,), jnp.int32),
          matrix(2, *tile), matrix(2, *tile), matrix(keys, head_dim), matrix(keys, head_dim), matrix(*square),
          lanes(jnp.int32), lanes(jnp.float32), lanes(jnp.float32),
          plgpu.Barrier(num_arrivals=2), plgpu.Barrier(),
      ],
      grid=(plan.max_units * parts,), grid_names=("unit_part",),
      compiler_params=compiler_params(interpret), kernel_name="selected_attention_backward",
  )(entries.units, entries.rows, entries.spans, q, k, v, do, lse, delta)


def _by_two(q, k, v, do, lse, delta, entries, plan, *, scale, segmented, interpret):
  """`partial_gradients` where two warpgroups share a tile: each has half of the block's keys and sums their dK^T and
  dV^T, and each makes half of the columns of dQ, from the dS of both."""
  head_dim, dtype, half = q.shape[1], q.dtype, TILE_ROWS
  tile, square, sums = (TILE_ROWS, head_dim), (half, half), (head_dim, half)
  transforms = tile_transforms(half, dtype)

  def body(units, *refs):
    unit, wg = lax.axis_index("unit"), lax.axis_index("wg")
    tokens = units[unit, 1]

    @pl.when(tokens > 0)
    def _():
      _unit(units, unit, wg, tokens, *refs)

  def _unit(units, unit, wg, tokens, rows, spans, q, k, v, do, lse, delta, dq, dk, dv,
            rows_s, spans_s, q_s, do_s, k_s, v_s, columns_s, p_s, dq_s, span_s, lse_s, delta_s, kv_ready, landed,
            written, copied):
    first, first_tile = units[unit, 0], units[unit, 2]
    batch, head, block = units[unit, 3], units[unit, 4], units[unit, 5]
    tiles = lax.div(tokens + (plan.tile_tokens - 1), jnp.int32(plan.tile_tokens))
    mine = pl.ds(block * plan.block_size + wg * half, half)
    plgpu.copy_gmem_to_smem(k.at[batch, mine, head], k_s.at[wg], kv_ready)
    plgpu.copy_gmem_to_smem(v.at[batch, mine, head], v_s.at[wg], kv_ready)
    for n in range(2):
      plgpu.copy_gmem_to_smem(k.at[batch, mine, head, pl.ds(n * half, half)], columns_s.at[wg * 2 + n], kv_ready)
    gather.load_lists([rows, spans], [rows_s.at[wg], spans_s.at[wg]], first, tokens, copied=copied.at[wg],
                      interpret=interpret)

    def fetch(i, slot):
      """Each warpgroup fetches one of Q and dO, and what it needs of each row."""
      those, own = pl.ds(i * plan.tile_tokens, plan.tile_tokens), wg * 2 + slot
      for n, (matrix, place) in enumerate(((q, q_s), (do, do_s))):
        args = (rows_s.at[wg, those], spans_s.at[wg, those], [matrix], [place.at[slot]], [lse, delta],
                [lse_s.at[own], delta_s.at[own]], span_s.at[own])
        pl.when(wg == n)(lambda args=args: gather.gather_tile(
            *args, group=plan.group, transforms=transforms, left=lambda: tokens - i * plan.tile_tokens,
            copied=copied.at[wg], interpret=interpret))
      gather.commit(interpret)

    def meet(barrier):
      plgpu.barrier_arrive(barrier)
      plgpu.barrier_wait(barrier)

    fetch(jnp.int32(0), jnp.int32(0))
    plgpu.barrier_wait(kv_ready)

    def step(i, carry):
      slot = lax.rem(i, jnp.int32(2))
      own = wg * 2 + slot
      gather.wait(0, interpret)
      plgpu.commit_smem()
      meet(landed)  # and so both are done with the tile before

      def scores(s_acc, dp_acc):
        plgpu.wgmma(s_acc, q_s.at[slot], k_s.at[wg].transpose((1, 0)))
        plgpu.wgmma(dp_acc, do_s.at[slot], v_s.at[wg].transpose((1, 0)))
        pl.when(i + 1 < tiles)(lambda: fetch(i + 1, 1 - slot))
        return s_acc[...], dp_acc[...]

      s, dp = pl.run_scoped(scores, plgpu.ACC(square, jnp.float32), plgpu.ACC(square, jnp.float32))
      by_row = plgpu.Layout.WGMMA.reduce(1)
      span = load(span_s.at[own], by_row)
      spread = lambda x: lax.broadcast_in_dim(x, square, [0])
      p = jnp.exp2(s * (scale * LOG2E) - spread(load(lse_s.at[own], by_row)))
      p = jnp.where(visible(span, square, segmented, wg * half), p, 0.0)
      p_s[wg] = p.astype(dtype)
      plgpu.commit_smem()

      def products(dk_acc, dv_acc):
        plgpu.wgmma(dv_acc, do_s.at[slot].transpose((1, 0)), p_s.at[wg])
        ds = (p * (dp - spread(load(delta_s.at[own], by_row)))).astype(dtype)
        plgpu.wgmma_wait(0)
        gather.barrier_unless(interpret)  # everybody's wgmma has read P
        p_s[wg] = ds
        plgpu.commit_smem()
        meet(written)

        def last(dq_acc):
          for n in range(2):
            plgpu.wgmma(dq_acc, p_s.at[n], columns_s.at[n * 2 + wg])
          plgpu.wgmma(dk_acc, q_s.at[slot].transpose((1, 0)), p_s.at[wg])
          return dq_acc[...].astype(dtype)

        result = pl.run_scoped(last, plgpu.ACC(square, jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dq_s[wg] = result
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            dq_s.at[wg], dq.at[0, pl.ds((first_tile + i) * TILE_ROWS, TILE_ROWS), pl.ds(wg * half, half)])

      return _added(products, carry, sums, interpret)

    dk_sum, dv_sum = _summed(step, tiles, sums)
    dk[unit, wg] = dk_sum
    dv[unit, wg] = dv_sum
    plgpu.wait_smem_to_gmem(0)

  matrix = lambda *shape: plgpu.SMEM(shape, dtype, transforms=transforms)
  lanes = lambda dtype: plgpu.SMEM((4, TILE_ROWS), dtype)
  lists = lambda: plgpu.SMEM((2, plan.unit_tokens), jnp.int32)
  partial = jax.ShapeDtypeStruct((plan.max_units, 2, *sums), jnp.float32)
  return plgpu.kernel(
      body,
      out_type=(jax.ShapeDtypeStruct((1, plan.max_tiles * TILE_ROWS, head_dim), dtype), partial, partial),
      scratch_types=[
          lists(), lists(), matrix(2, *tile), matrix(2, *tile), matrix(2, half, head_dim), matrix(2, half, head_dim),
          matrix(4, *square), matrix(2, *square), matrix(2, *square), lanes(jnp.int32), lanes(jnp.float32),
          lanes(jnp.float32), plgpu.Barrier(num_arrivals=8), plgpu.Barrier(num_arrivals=2),
          plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_barriers=2),
      ],
      grid=(plan.max_units,), grid_names=("unit",), num_threads=2, thread_name="wg",
      compiler_params=compiler_params(interpret), kernel_name="selected_attention_backward",
  )(entries.units, entries.rows, entries.spans, q, k, v, do, lse, delta)


def sum_units(dk, dv, unit_start, plan):
  """Adds up what the units of each block have of dK and dV, in the order of the units.

  Args:
    dk, dv: float32[max_units, parts, H, keys] or float32[max_units, parts, keys, H].
    unit_start: Entries.unit_start.

  Returns:
    The sums, float32[B, K, blocks, parts, ...].
  """
  _, parts, length, width = dk.shape
  rows = min(REDUCE_ROWS, length)
  bands = length // rows
  layout = plgpu.Layout.WG_STRIDED((rows, width), vec_size=4)

  def body(unit_start, dk, dv, dk_out, dv_out):
    at, place = lax.axis_index("place"), []
    for size in (bands, parts, plan.blocks):
      place.append(lax.rem(at, jnp.int32(size)))
      at = lax.div(at, jnp.int32(size))
    (band, part, block), head = place, at
    band = pl.ds(band * rows, rows)

    def add_range(r, sums):
      which = (head * plan.ranges + r) * plan.blocks + block

      def add(unit, sums):
        dk_sum, dv_sum = sums
        return (dk_sum + load(dk.at[unit, part, band], layout),
                dv_sum + load(dv.at[unit, part, band], layout))

      return lax.fori_loop(unit_start[which], unit_start[which + 1], add, sums)

    zeros = plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), layout)
    dk_sum, dv_sum = lax.fori_loop(0, plan.ranges, add_range, (zeros, zeros))
    dk_out[head, block, part, band] = dk_sum
    dv_out[head, block, part, band] = dv_sum

  heads = plan.batch * plan.kv_heads
  out = jax.ShapeDtypeStruct((heads, plan.blocks, parts, length, width), jnp.float32)
  dk, dv = plgpu.kernel(
      body, out_type=(out, out),
      grid=(bands * parts * plan.blocks * heads,), grid_names=("place",),
      compiler_params=compiler_params(), kernel_name="selected_attention_sum_units",
  )(unit_start, dk, dv)
  shape = (plan.batch, plan.kv_heads, *out.shape[1:])
  return dk.reshape(shape), dv.reshape(shape)
