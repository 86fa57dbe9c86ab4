"""Forward pass of selected attention: one block of K and V on chip, its queries gathered.

A thread block takes a unit of a list (see lists.py), loads the block of K and V once and
walks the unit's tiles of 64 query rows: gather, S = Q K^T, softmax over the block, O = P V.
The softmax is over this block alone; merge.py combines the partial results of a query,
weighted with their log-sum-exp, in the order of its slots. `merge` and `weighted_rows` here
are its slow twins in plain jnp, which the interpreter's tests use.
"""
from __future__ import annotations

import math

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.lists import TILE_ROWS
from pallas_kernels.mosaic_gpu import gather, shared_blocks
from pallas_kernels.mosaic_gpu.tiles import LOG2E, compiler_params, load, tile_transforms, visible


def partial_attention(q, k, v, entries, plan, *, scale, segmented, slots=2, interpret=False):
  """Attention of each entry over its one block.

  Args:
    q: [B * T * N, H], rows in the order of q[B, T, N, H].
    k, v: [B, blocks * block_size, K, H].
    entries: Entries.
    plan: Plan.
    scale: float.
    segmented: whether spans may begin past the start of their block.
    slots: tiles on chip, of Q before and of results after: all but one are fetched ahead.
    interpret: use only operations of the interpreter.

  Returns:
    o [max_tiles * 64, H] of q.dtype, each row normalised on its own, and float32[max_tiles * 64], the base-2
    log-sum-exp. Rows of tiles that no entry has are undefined.
  """
  head_dim, dtype = q.shape[1], q.dtype
  tile = (TILE_ROWS, head_dim)
  transforms = tile_transforms(head_dim, dtype)

  def body(units, rows, spans, q, k, v, o, lse, *scratch):
    unit = lax.axis_index("unit")
    tokens = units[unit, 1]

    @pl.when(tokens > 0)
    def _():
      _unit(units, unit, tokens, rows, spans, q, k, v, o, lse, *scratch)

  def _unit(units, unit, tokens, rows, spans, q, k, v, o, lse,
            rows_s, spans_s, q_s, k_s, v_s, span_s, lse_s, kv_ready, copied):
    first, first_tile = units[unit, 0], units[unit, 2]
    batch, head, block = units[unit, 3], units[unit, 4], units[unit, 5]
    tiles = lax.div(tokens + (plan.tile_tokens - 1), jnp.int32(plan.tile_tokens))
    keys = pl.ds(block * plan.block_size, plan.block_size)
    plgpu.copy_gmem_to_smem(k.at[batch, keys, head], k_s, kv_ready)
    plgpu.copy_gmem_to_smem(v.at[batch, keys, head], v_s, kv_ready)
    gather.load_lists([rows, spans], [rows_s, spans_s], first, tokens, copied=copied, interpret=interpret)

    def fetch(i, slot):
      mine = pl.ds(i * plan.tile_tokens, plan.tile_tokens)
      gather.gather_tile(rows_s.at[mine], spans_s.at[mine], [q], [q_s.at[slot]], [], [], span_s.at[slot],
                         group=plan.group, transforms=transforms, left=lambda: tokens - i * plan.tile_tokens,
                         copied=copied, interpret=interpret)

    def fetch_if(i, slot):
      pl.when(i < tiles)(lambda: fetch(i, slot))
      gather.commit(interpret)

    for i in range(slots - 1):
      fetch_if(jnp.int32(i), jnp.int32(i))
    plgpu.barrier_wait(kv_ready)

    @pl.loop(0, tiles)
    def _(i):
      slot = lax.rem(i, jnp.int32(slots))
      gather.wait(slots - 2, interpret)
      plgpu.commit_smem()

      def scores(acc):
        plgpu.wgmma(acc, q_s.at[slot], k_s.transpose((1, 0)))
        # Meanwhile the last result leaves the place of the tile that comes next.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        fetch_if(i + (slots - 1), lax.rem(i + (slots - 1), jnp.int32(slots)))
        return acc[...]

      s = pl.run_scoped(scores, plgpu.ACC((TILE_ROWS, plan.block_size), jnp.float32))
      span = load(span_s.at[slot], plgpu.Layout.WGMMA.reduce(1))
      s = jnp.where(visible(span, s.shape, segmented), s * (scale * LOG2E), -jnp.inf)
      m = s.max(axis=1)
      m = jnp.where(m == -jnp.inf, 0.0, m)
      p = jnp.exp2(s - lax.broadcast_in_dim(m, s.shape, [0]))
      total = p.sum(axis=1)
      p = p.astype(dtype)

      def values(acc):
        if interpret:  # which cannot take the left operand from registers
          weights(acc, p)
        else:
          plgpu.wgmma(acc, p, v_s)
        return acc[...]

      def weights(acc, p):
        def staged(p_s):
          p_s[...] = p
          plgpu.commit_smem()
          plgpu.wgmma(acc, p_s, v_s)
          plgpu.wgmma_wait(0)
        pl.run_scoped(staged, plgpu.SMEM(p.shape, dtype, transforms=tile_transforms(plan.block_size, dtype)))

      result = pl.run_scoped(values, plgpu.ACC(tile, jnp.float32))
      some = total > 0
      inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
      result = (result * lax.broadcast_in_dim(inverse, tile, [0])).astype(dtype)
      log_sum = jnp.where(some, m + jnp.log(jnp.where(some, total, 1.0)) * LOG2E, -jnp.inf)
      q_s[slot] = result
      lse_s[...] = log_sum
      plgpu.commit_smem()
      to = pl.ds((first_tile + i) * TILE_ROWS, TILE_ROWS)
      plgpu.copy_smem_to_gmem(q_s.at[slot], o.at[to])
      plgpu.copy_smem_to_gmem(lse_s, lse.at[to])

    plgpu.wait_smem_to_gmem(0)

  matrix = lambda rows, transforms=transforms: plgpu.SMEM((rows, head_dim), dtype, transforms=transforms)
  # P V takes its keys in groups as wide as the swizzle.
  value_transforms = tile_transforms(math.gcd(head_dim, plan.block_size), dtype)
  rows = plan.max_tiles * TILE_ROWS
  return plgpu.kernel(
      body,
      out_type=(jax.ShapeDtypeStruct((rows, head_dim), dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)),
      scratch_types=[
          plgpu.SMEM((plan.unit_tokens,), jnp.int32), plgpu.SMEM((plan.unit_tokens,), jnp.int32),
          plgpu.SMEM((slots, *tile), dtype, transforms=transforms), matrix(plan.block_size),
          matrix(plan.block_size, value_transforms), plgpu.SMEM((slots, TILE_ROWS), jnp.int32),
          plgpu.SMEM((TILE_ROWS,), jnp.float32),
          plgpu.Barrier(num_arrivals=2), plgpu.Barrier(),
      ],
      grid=(plan.max_units,), grid_names=("unit",),
      compiler_params=compiler_params(interpret), kernel_name="selected_attention_forward",
  )(entries.units, entries.rows, entries.spans, q, k, v)


def merge(o, lse, position, plan, shared=None):
  """Combines the partial results of each query.

  Args:
    o: [1, max_tiles * 64, H] and lse of `partial_attention`.
    position: Entries.position.
    shared: rows and lse of `shared_attention.attend`, one more slot of every query, or None.

  Returns:
    o [B, T, K, G, H] of the dtype of o and lse float32[B, T, K, G], natural log.
  """
  G = plan.group
  if shared is not None:
    begin = o.shape[1]
    o, lse = jnp.concatenate([o, shared[0][None]], axis=1), jnp.concatenate([lse, shared[1]])
    position = jnp.concatenate([position, begin + shared_blocks.first_rows(plan)[..., None]], axis=3)
  valid = (position >= 0)[..., None]
  at = jnp.maximum(position, 0)[..., None] + jnp.arange(G)
  lse = jnp.where(valid, lse[at], -jnp.inf)  # [B, T, K, J, G]
  m = lse.max(axis=3)
  m = jnp.where(m == -jnp.inf, 0.0, m)
  weight = jnp.exp2(lse - m[:, :, :, None])
  total = weight.sum(axis=3)
  some = total > 0
  weight = weight / jnp.where(some, total, 1.0)[:, :, :, None]
  lse = jnp.where(some, m / LOG2E + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
  return weighted_rows(o, weight, position, plan), lse


def weighted_rows(rows, weight, position, plan):
  """The sum over slots of weight * row.

  Args:
    rows: [parts, tiles * 64, H].
    weight: float32[B, T, K, J, G], or one number for all.
    position: Entries.position.

  Returns:
    [B, T, K, G, H] of the dtype of rows, summed in float32 in the order of the slots.
  """
  G, H = plan.group, rows.shape[-1]
  B, T, K, J = position.shape
  total = jnp.zeros((B, T, K, G, H), jnp.float32)
  for j in range(J):
    first = position[..., j, None]
    scale = weight if isinstance(weight, float) else weight[..., j, :, None]
    for part in rows:
      row = jnp.where((first >= 0)[..., None], part[jnp.maximum(first, 0) + jnp.arange(G)], 0).astype(jnp.float32)
      total += row * scale
  return total.astype(rows.dtype)
