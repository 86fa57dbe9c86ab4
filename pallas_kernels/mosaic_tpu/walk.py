"""Inside the kernels: walking over a tile's list with its blocks arriving in VMEM two steps deep.

The grid is (sequence and KV head, range of keys, tile); it runs in order, so that the last step of a tile
fetches the first blocks of the next one, and sums over tiles need no atomics: equal inputs give equal bits.
"""
from __future__ import annotations

from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import union

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LEFT_IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


def list_specs(plan):
  """Block specs of the lists, taken twice: a tile's own and the next one's."""
  shape = (1, 1, 1, plan.list_length)
  return [pl.BlockSpec(shape, lambda head, span, tile: (head, tile, 0, 0), memory_space=pltpu.SMEM),
          pl.BlockSpec(shape, lambda head, span, tile: (head, jnp.minimum(tile + 1, plan.tiles - 1), 0, 0),
                       memory_space=pltpu.SMEM)]


def tile_specs(plan, *arrays):
  """Block specs of arrays [B * K, tiles, ...]: what belongs to a tile."""
  return [pl.BlockSpec((1, 1, *x.shape[2:]), lambda head, span, tile: (head, tile, 0, 0)) for x in arrays]


def stream_scratch(plan, dtype):
  """What `over_list` needs: buffer, arrived, parity."""
  return [pltpu.VMEM((2, plan.step_blocks * plan.block_size, plan.width), dtype),
          pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)]


def compiler_params():
  return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                              vmem_limit_bytes=union.VMEM_BYTES)


def product(x, y, contract):
  """x times y over the given dimension of each, summed in float32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def scores(keys, queries):
  """[keys, rows] of [keys, width] and [rows, width]."""
  return product(keys, queries, (1, 1))


def left_keys(plan, block):
  """The part of a block of pairs to multiply with `left_queries`."""
  return block if plan.packed else block[:, :plan.start]


def right_keys(plan, block):
  return block if plan.packed else block[:, plan.start:]


def left_queries(plan, rows):
  """The first of a tile of pairs, with zeros where it shares its lanes."""
  if not plan.packed:
    return rows[:, :plan.start]
  lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
  return jnp.where(lane < plan.start, rows, jnp.zeros_like(rows))


def right_queries(plan, rows):
  if not plan.packed:
    return rows[:, plan.start:]
  lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
  return jnp.where(lane < plan.start, jnp.zeros_like(rows), rows)


def height(plan, right):
  """Lanes of `left_keys` or `right_keys`: what a sum over keys has in the head dim's place."""
  return plan.width if plan.packed else plan.width - plan.start if right else plan.start


def mask(plan, blocks, numbers):
  """bool[keys of a step, rows]: what each row selected and sees.

  Args:
    blocks: the step's blocks, scalars; -1 where there is none.
    numbers: int32[J + 2, rows] of `union.row_numbers`.
  """
  picks, first, end = numbers[:plan.slots], numbers[plan.slots:plan.slots + 1], numbers[plan.slots + 1:]
  key = lax.broadcasted_iota(jnp.int32, (plan.block_size, plan.rows), 0)
  out = []
  for block in blocks:
    chose = jnp.max(jnp.where(picks == block + 1, 1, 0), axis=0, keepdims=True)
    at = block * plan.block_size
    stop = jnp.where((chose > 0) & (block >= 0), end - at, 0)
    out.append((key < stop) & (key >= first - at))
  return jnp.concatenate(out, axis=0)


def clear(plan, sums, tile):
  """Zeros in the sums of a range of keys, before its first tile."""
  @pl.when(tile == 0)
  def _():
    @pl.loop(0, plan.range_blocks)
    def _(i):
      sums[pl.ds(i * plan.block_size, plan.block_size)] = jnp.zeros((plan.block_size, sums.shape[1]), sums.dtype)


def add(plan, sums, more, blocks, span):
  """Adds the rows of a step's blocks to the sums of the range of keys `span`; zeros where there is no block."""
  size = plan.block_size
  for i, block in enumerate(blocks):
    at = pl.multiple_of(jnp.maximum(block - span * plan.range_blocks, 0) * size, size)
    sums[pl.ds(at, size)] += more[i * size:(i + 1) * size]


def over_list(plan, step, init, *, whole, head, span, tile, lists, following, source, buffer, arrived, parity):
  """step(blocks, pairs [keys of a step, width], carry) -> carry over the list of a tile.

  Args:
    whole: over the whole list, else over its part in the range of keys `span`.
    head, span, tile: where the grid stands; tiles are counted last.
    lists, following: SMEM [1, 1, 1, list_length], the lists of this tile and the next.
    source: HBM [B * K, blocks, block_size, width].
    buffer: VMEM [2, keys of a step, width]; arrived: two DMA semaphores.
    parity: SMEM int32[1], which half of the buffer the tile begins with; kept from tile to tile.
  """
  size, each = plan.block_size, plan.step_blocks

  def part(ref):
    bounds = plan.union + each
    ends = (bounds, bounds + plan.ranges) if whole else (bounds + span, bounds + span + 1)
    return tuple(ref[0, 0, 0, at] for at in ends)

  def copies(ref, first, half):
    return [pltpu.make_async_copy(source.at[head, ref[0, 0, 0, first + i]],
                                  buffer.at[half, pl.ds(i * size, size)], arrived.at[half])
            for i in range(each)]

  def fetch(ref, first, half):
    for copy in copies(ref, first, half):
      copy.start()

  start, stop = part(lists)
  steps = lax.div(stop - start + (each - 1), each)
  next_start, next_stop = part(following)
  more = (tile + 1 < plan.tiles) & (next_stop > next_start)

  @pl.when(tile == 0)
  def _():
    parity[0] = 0
    pl.when(steps > 0)(lambda: fetch(lists, start, 0))

  begin = parity[0]

  @pl.when((steps == 0) & more)
  def _():
    fetch(following, next_start, begin)

  def one(i, carry):
    half = lax.rem(begin + i, 2)
    at = start + i * each

    @pl.when(i + 1 < steps)
    def _():
      fetch(lists, at + each, 1 - half)

    @pl.when((i + 1 == steps) & more)
    def _():
      fetch(following, next_start, 1 - half)

    for copy in copies(lists, at, half):
      copy.wait()
    blocks = [jnp.where(at + i < stop, lists[0, 0, 0, at + i], -1) for i in range(each)]
    return step(blocks, buffer[half], carry)

  out = lax.fori_loop(0, steps, one, init)
  parity[0] = lax.rem(begin + steps, 2)
  return out
