"""The work of the kernels in pallas_kernels.mosaic_tpu."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cost import counts
from pallas_kernels.cost.chips import Kernel

LANES = 128
# Operations of the vector unit per score, as libtpu schedules the loops for v5p at head dim 128 (whole tiles, no
# mask): softmax, its two gradients, the index's maximum; and per block and sweep of a selection.
SOFTMAX, GRADIENT_Q, GRADIENT_KV, PROBABILITY, MAXIMUM, SWEEP = 6.4, 6.6, 8.2, 4.0, 1.8, 9.6


def _lanes(n):
  return -(-n // LANES) * LANES


def _size(spec):
  return jnp.dtype(spec.dtype).itemsize


def _depth(n, chip):
  """Length of a contraction as the matrix unit takes it."""
  return -(-n // chip.matrix) * chip.matrix


def _layout(spec, queries, keys):
  """The copies by XLA into and out of the kernels' layouts: `queries` and `keys` arrays, read and written."""
  q = spec.B * spec.T * spec.N * spec.H
  k = spec.B * spec.T * spec.K * _lanes(spec.H)
  return Kernel("layout", bytes=2 * _size(spec) * (queries * q + keys * k))


def run_attention(spec, chip, operation, backward):
  """`flash.attend` forward, or its backward pass; operation is "dense", "window" or "compressed"."""
  from pallas_kernels.mosaic_tpu import flash
  begin, end, keys = counts.runs(spec, operation)
  window = spec.window if operation == "window" else None
  bt, bk = flash.tile_sizes(spec.T, max(keys, 1), spec.G, window, jnp.dtype(spec.dtype))
  tiles, heads = -(-spec.T // bt), spec.B * spec.K
  pairs, _ = counts.visited(begin, end, bt, bk)
  pairs *= heads
  key_steps = -(-keys // bk) if window is None else min(-(-keys // bk), (bt + window - 2) // bk + 2)
  query_steps = tiles if window is None else min(tiles, (bk + window - 2) // bt + 2)
  size, H = _size(spec), spec.H
  q, row, k = size * spec.G * H * bt, 4 * spec.G * bt, size * bk * _lanes(H)
  scores = spec.G * bk * bt
  # Contractions: over H in S and dP, over keys or queries (whole tiles) in the rest, where H is the other side.
  over_h, other = 2 * scores * _depth(H, chip), 2 * scores * H
  accumulator = 4 * spec.G * H * bt
  smem = 4 * spec.B * (4 * tiles + 2 * -(-keys // bk))
  key_share = keys / spec.T
  if not backward:
    return [_layout(spec, 2, 2 * key_share), Kernel(
        "attention_forward", flops=pairs * (over_h + other), bytes=pairs * 2 * k + heads * tiles * (2 * q + row),
        copies=pairs * 2 + heads * tiles * 4, steps=heads * tiles * key_steps, vector=pairs * scores * SOFTMAX,
        on_chip=2 * (2 * q + row + 2 * k) + accumulator + 2 * row, smem=smem)]
  of_queries = Kernel(
      "attention_backward_q", flops=pairs * (2 * over_h + other),
      bytes=pairs * 2 * k + heads * tiles * (3 * q + 2 * row), copies=pairs * 2 + heads * tiles * 6,
      steps=heads * tiles * key_steps, vector=pairs * scores * GRADIENT_Q,
      on_chip=2 * (3 * q + 2 * row + 2 * k) + accumulator, smem=smem)
  key_tiles = heads * -(-keys // bk)
  of_keys = Kernel(
      "attention_backward_kv", flops=pairs * (2 * over_h + 2 * other),
      bytes=pairs * (2 * q + 2 * row) + key_tiles * 4 * k, copies=pairs * 5 + key_tiles * 4,
      steps=key_tiles * query_steps, vector=pairs * scores * GRADIENT_KV,
      on_chip=2 * (2 * q + 2 * row + 4 * k) + 2 * 4 * bk * _lanes(H), smem=smem)
  return [_layout(spec, 3, 4 * key_share), of_queries, of_keys]


def _sweeps(seen, bt, sweep, slots):
  """Vector operations of the choice: `seen` blocks of rows per tile of queries."""
  return seen * sweep * bt * SWEEP * (slots + 1)


def compressed_top_k(spec, chip):
  from pallas_kernels.mosaic_tpu import compressed_top_k as kernel, selection
  per_block = spec.block_size // spec.block_stride
  bt, bk = kernel.tile_sizes(spec.T, spec.G, per_block, spec.num_blocks)
  begin, end, _ = counts.runs(spec, "compressed")
  heads, tiles = spec.B * spec.K, -(-spec.T // bt)
  pairs = heads * counts.visited(begin, end, bt, bk)[0]
  size, scores = _size(spec), spec.G * bk * bt
  q, row, k = size * spec.G * spec.H * bt, 4 * spec.G * bt, size * bk * _lanes(spec.H)
  sweep = min(selection.SWEEP_ROWS, spec.num_blocks)
  _, seen, _ = counts.runs(spec, "dense")
  swept = heads * counts.visited(begin, -(-seen // spec.block_size), bt, sweep)[0]
  return [_layout(spec, 1, 1 / spec.block_stride), Kernel(
      "compressed_top_k", flops=pairs * 2 * scores * _depth(spec.H, chip),
      bytes=pairs * k + heads * tiles * (q + row + 4 * spec.J * bt), copies=pairs + heads * tiles * 4,
      steps=heads * tiles * -(-spec.num_blocks * per_block // bk),
      vector=pairs * scores * PROBABILITY + _sweeps(swept, bt, sweep, spec.J),
      on_chip=2 * (q + row + k + 4 * (spec.J + 8) * bt) + 4 * bt * (spec.num_blocks + bk),
      smem=4 * spec.B * tiles * selection.TABLE)]


def index_top_k(spec, chip):
  from pallas_kernels.mosaic_tpu import index_top_k as kernel, selection
  bt, bk, together = kernel.tile_sizes(spec.T, spec.K, spec.block_size, spec.num_blocks)
  begin, end, _ = counts.runs(spec, "dense")
  groups, tiles, H = spec.B * spec.K // together, -(-spec.T // bt), spec.index_dim
  pairs = groups * counts.visited(begin, end, bt, bk)[0]
  size, scores = _size(spec), together * bk * bt
  q, k = size * together * H * bt, size * bk * _lanes(H)
  sweep = min(selection.SWEEP_ROWS, spec.num_blocks)
  swept = groups * together * counts.visited(begin, -(-end // spec.block_size), bt, sweep)[0]
  return [Kernel(
      "index_top_k", flops=pairs * 2 * scores * _depth(H, chip),
      bytes=pairs * k + groups * tiles * (q + 4 * together * spec.J * bt), copies=pairs + groups * tiles * 3,
      steps=groups * tiles * -(-spec.num_blocks * spec.block_size // bk),
      vector=pairs * scores * MAXIMUM + _sweeps(swept, bt, sweep, spec.J),
      on_chip=2 * (q + k + 4 * (together * spec.J + 8) * bt) + 4 * together * bt * spec.num_blocks,
      smem=4 * spec.B * tiles * selection.TABLE)]


def selected_attention(spec, chip, indices, backward):
  """Union tiles; see pallas_kernels.mosaic_tpu.union. A step takes whole blocks, `walk` copies each on its own."""
  from pallas_kernels.mosaic_tpu import selected
  sds = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype))
  plan = selected.make_plan(sds(spec.B, spec.T, spec.N, spec.H), sds(spec.B, spec.T, spec.K, spec.H),
                            jax.ShapeDtypeStruct(indices.shape, jnp.int32), spec.block_size)
  unions = counts.union_sizes(indices, plan.tokens)
  steps = int((-(-unions // plan.step_blocks)).sum())
  copies, size = steps * plan.step_blocks, _size(spec)
  keys = steps * plan.step_blocks * plan.block_size
  scores = keys * plan.rows
  tiles = len(unions)
  lists = 4 * tiles * (2 * plan.list_length + plan.rows * (plan.slots + 2))
  product = 2 * scores * _depth(spec.H, chip)
  pairs, rows = size * keys * plan.width, size * tiles * plan.rows * plan.width
  buffers = 2 * 2 * plan.step_blocks * plan.block_size * plan.width * size
  if not backward:
    return [_layout(spec, 2, 2), Kernel(
        "selected_attention_forward", flops=2 * product, bytes=pairs + rows + lists, copies=copies + 4 * tiles,
        steps=tiles, vector=scores * (SOFTMAX + 3), on_chip=buffers + 4 * plan.rows * plan.width,
        smem=8 * plan.list_length)]
  sums = 4 * plan.range_blocks * plan.block_size * plan.width
  written = 4 * spec.B * spec.K * plan.blocks * plan.block_size * plan.width
  one = lambda name, products, passes, more: Kernel(
      name, flops=products * product, bytes=pairs + passes * (rows + lists) + more, copies=copies + 5 * tiles * passes,
      steps=tiles * passes, vector=scores * (GRADIENT_KV + 3), on_chip=buffers + sums, smem=8 * plan.list_length)
  if plan.ranges == 1:
    return [_layout(spec, 3, 4), one("selected_attention_backward", 5, 1, rows / 2 + written)]
  return [_layout(spec, 3, 4), one("selected_attention_backward_q", 3, 1, rows / 2),
          one("selected_attention_backward_kv", 4, plan.ranges, written)]
