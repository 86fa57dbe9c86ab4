"""Inside the kernels: walking over a tile's list with its blocks arriving in VMEM two steps deep.

The grid is (sequence and KV head, range of keys, tile); it runs in order, so that the last step of a tile
fetches the first blocks of the next one, and sums over tiles need no atomics: equal inputs give equal bits.
"""
from __future__ import annotations

import jax
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


def tile_specs(*arrays):
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


def gradients(plan, name, tiles, more, pairs, lists, step, *, queries_height, dtype, factor=1.0, keys_width, interpret):
  """Gradients of tiles and of their blocks: one pass for both if the sums of all keys fit VMEM, else a pass each.

  Args:
    name: of the kernel.
    tiles: arrays [B * K, tiles, ...], of which `step` gets what belongs to a tile.
    more: arrays that every step gets whole.
    pairs: [B * K, blocks, block_size, width].
    lists: of `union.make_lists`.
    step: (refs of tiles and more, blocks, pairs of the blocks) -> two functions, which give float32 summands
      [queries_height, rows] for the tile and [keys of a step, keys_width] for its blocks.
    dtype, factor: of the sums of a tile, as they are written.

  Returns:
    dtype[B * K, tiles, queries_height, rows] and float32[B * K, keys of all ranges, keys_width].
  """
  heads, count = tiles[0].shape[:2]

  def once(of_queries, of_keys):
    ranges, range_keys = plan.ranges if of_keys else 1, plan.range_blocks * plan.block_size

    def body(lists, following, *refs):
      refs = list(refs)
      given = [refs.pop(0) for _ in (*tiles, *more)]
      pairs = refs.pop(0)
      q_out, k_out = (refs.pop(0) if wanted else None for wanted in (of_queries, of_keys))
      q_sums, k_sums = (refs.pop(0) if wanted else None for wanted in (of_queries, of_keys))
      buffer, arrived, parity = refs
      head, span, tile = (pl.program_id(axis) for axis in range(3))
      if of_queries:
        q_sums[...] = jnp.zeros_like(q_sums)
      if of_keys:
        clear(plan, k_sums, tile)

      def one(blocks, pairs, carry):
        for_tile, for_blocks = step(given, blocks, pairs)
        if of_queries:
          q_sums[...] += for_tile()
        if of_keys:
          add(plan, k_sums, for_blocks(), blocks, span)
        return carry

      over_list(plan, one, 0, whole=not of_keys, head=head, span=span, tile=tile, lists=lists, following=following,
                source=pairs, buffer=buffer, arrived=arrived, parity=parity)
      if of_queries:
        q_out[0, 0] = (q_sums[...] * factor).astype(dtype)
      if of_keys:
        @pl.when(tile == count - 1)
        def _():
          pltpu.sync_copy(k_sums, k_out.at[head, pl.ds(span * range_keys, range_keys)])

    of = lambda wanted, *x: list(x) if wanted else []
    whole = lambda x: pl.BlockSpec(x.shape, lambda head, span, tile: (0,) * x.ndim)
    q_shape = jax.ShapeDtypeStruct((heads, count, queries_height, plan.rows), dtype)
    k_shape = jax.ShapeDtypeStruct((heads, ranges * range_keys, keys_width), jnp.float32)
    return pl.pallas_call(
        body, grid=(heads, ranges, count),
        in_specs=[*list_specs(plan), *tile_specs(*tiles), *map(whole, more), LEFT_IN_HBM],
        out_specs=of(of_queries, *tile_specs(q_shape)) + of(of_keys, LEFT_IN_HBM),
        out_shape=of(of_queries, q_shape) + of(of_keys, k_shape),
        scratch_shapes=of(of_queries, pltpu.VMEM((queries_height, plan.rows), jnp.float32))
        + of(of_keys, pltpu.VMEM((range_keys, keys_width), jnp.float32)) + stream_scratch(plan, pairs.dtype),
        compiler_params=compiler_params(), interpret=interpret, name=name)(lists, lists, *tiles, *more, pairs)

  if plan.ranges == 1:
    return once(True, True)
  return once(True, False)[0], once(False, True)[0]
