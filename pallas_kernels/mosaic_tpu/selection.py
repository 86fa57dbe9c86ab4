"""Block selection on chip: scores of blocks against a tile of queries live in VMEM, never in HBM.

Both selectors walk the key tiles of a tile of queries, reduce scores of keys to scores of blocks, [blocks,
queries] in float32, and at the last tile take the best J of each column by J sweeps: the maximum and its
lowest row, which is then struck out. `sort` does not exist in kernels; sweeps run over the blocks that some
query of the tile sees, and no others. Forced blocks score +inf and invisible ones -inf, as in the
reference; ties go to the lower block.
"""
from __future__ import annotations

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import spans
from pallas_kernels.mosaic_tpu import flash
from pallas_kernels.mosaic_tpu.flash import LANES

SUBLANES = 8
SWEEP_ROWS = 64        # blocks that a sweep holds in registers at a time
SCORE_BYTES = 2 ** 23  # of scores on chip, if that takes no fewer than 128 queries
MAX_SCORE_BYTES = 2 ** 24
MAX_SLOTS = 64         # J: a sweep each
TABLE = 6              # numbers per tile of queries in SMEM


def queries_of(queries, num_blocks, most):
  """Queries of a tile: up to `most` if their scores fit."""
  while most > LANES and num_blocks * most * 4 > SCORE_BYTES:
    most //= 2
  return min(most, -(-queries // LANES) * LANES)


def refuses(num_blocks, batch, queries, tile_queries):
  """None, or why there is no room on chip."""
  if num_blocks * LANES * 4 > MAX_SCORE_BYTES:
    return f"the scores of {num_blocks} blocks do not fit: the kernels take {MAX_SCORE_BYTES // (4 * LANES)}"
  if 4 * TABLE * batch * -(-queries // tile_queries) > flash.TABLE_BYTES:
    return f"q has {batch} x {queries} queries: their tables do not fit SMEM"
  return None


class Selection:
  """What both selectors share: shapes, tables, and the sweeps.

  Args:
    shape: B, T, K of the result.
    tiles: queries and keys of a tile, KV heads per step.
    keys: begin and end, int32[B, T] each, of the run of keys that each query sees.
    tokens: the same of tokens.
    pos: int32[B, T], positions of the queries.
    num_keys: of all blocks.
    blocks: how many there are.
    overhang: whether keys add to the block after their last.
  """

  def __init__(self, shape, tiles, keys, tokens, pos, *, num_keys, blocks, block_size, num_blocks, num_initial,
               num_local, overhang, interpret):
    self.B, self.T, self.K = shape
    self.bt, self.bk, self.heads = tiles
    self.J, self.num_initial, self.interpret = num_blocks, num_initial, interpret
    self.nq, self.nk = -(-self.T // self.bt), -(-num_keys // self.bk)
    self.padded_T = self.nq * self.bt
    self.sweep = min(SWEEP_ROWS, -(-blocks // SUBLANES) * SUBLANES)
    self.per_tile = self.bk * blocks // num_keys
    # The last tile of keys may fill rows past those that are swept, and the other way round.
    self.rows = max(-(-blocks // self.sweep) * self.sweep, self.nk * self.per_tile)
    pad = lambda x: spans.pad_queries(x, self.padded_T)
    begin, end = map(pad, keys)
    first, stop = pad(tokens[0] // block_size), pad(jnp.minimum(-(-tokens[1] // block_size), blocks))
    local = pad(pos // block_size - num_local + 1)  # the first of the forced last blocks
    self.bounds = jnp.stack([begin, end, first, stop, local], axis=1)
    tiles = spans.query_tiles(begin, end, self.bt, self.bk)
    more = jnp.where(tiles[..., 1:2] > tiles[..., :1], int(overhang), 0)
    last = jnp.minimum(tiles[..., 1:2] + more, self.nk)
    seen = spans.query_tiles(first, stop, self.bt, self.sweep)[..., :2]
    self.tiles = jnp.concatenate([tiles[..., :1], last, tiles[..., 2:], seen], axis=2)

  def place(self):
    """In a kernel: where the row of this tile of queries is in the table, and the step over its keys."""
    return (pl.program_id(0) * self.nq + pl.program_id(2)) * TABLE, pl.program_id(3)

  def key_tile(self, b, i, j, tiles):
    """For a block spec: the tile of keys of a step; past the last one, the last one."""
    at = (b * self.nq + i) * TABLE
    return jnp.minimum(tiles[at] + j, jnp.maximum(tiles[at + 1] - 1, tiles[at]))

  def over_keys(self, tiles, at, j, bounds_ref, step):
    """step(key tile, mask or None) if this step has a tile."""
    tile = tiles[at] + j
    first_key = tile * self.bk
    active = tile < tiles[at + 1]
    full = (first_key >= tiles[at + 2]) & (first_key + self.bk <= tiles[at + 3])
    pl.when(active & full)(lambda: step(tile, None))
    pl.when(active & ~full)(
        lambda: step(tile, flash.visible(bounds_ref[0, 0:2], first_key, (self.bk, self.bt))))

  def rows_of(self, tile):
    """The rows of scores that a tile of keys fills."""
    return pl.ds(pl.multiple_of(tile * self.per_tile, SUBLANES), self.per_tile)

  def over_blocks(self, tiles, at, part, carry):
    """Folds part(first block of the rows, carry) over the rows of blocks that some query sees."""
    step = lambda i, carry: part(pl.multiple_of(i * self.sweep, self.sweep), carry)
    return lax.fori_loop(tiles[at + 4], tiles[at + 5], step, carry)

  def clear(self, tiles, at, scores, value):
    """Fills the scores of every head."""
    def part(row, carry):
      scores[:, pl.ds(row, self.sweep)] = jnp.full((self.heads, self.sweep, self.bt), value, jnp.float32)
      return carry
    self.over_blocks(tiles, at, part, 0)

  def choose(self, tiles, at, bounds_ref, scores, out_ref):
    """Writes the best J rows of each column of the scores to out_ref[0, head, J, queries]."""
    first, stop, local = (bounds_ref[0, i:i + 1] for i in (2, 3, 4))
    block = lax.broadcasted_iota(jnp.int32, (self.sweep, self.bt), 0)
    big = float(np.finfo(np.float32).max)

    def head(r, _):
      def prepare(row, carry):
        here, j = pl.ds(row, self.sweep), block + row
        forced = (j >= local) | (j < first + self.num_initial)
        x = jnp.where(forced, jnp.inf, jnp.clip(scores[r, here], -big, big))
        scores[r, here] = jnp.where((j >= first) & (j < stop), x, -jnp.inf)
        return carry

      def take(slot, before):
        def part(row, best):
          here, j = pl.ds(row, self.sweep), block + row
          x = jnp.where(j == before, -jnp.inf, scores[r, here])
          scores[r, here] = x
          top = x.max(axis=0, keepdims=True)
          lowest = jnp.where(x == top, j, spans.FAR).min(axis=0, keepdims=True)
          better = top > best[0]
          return jnp.where(better, top, best[0]), jnp.where(better, lowest, best[1])

        nothing = jnp.full((1, self.bt), -jnp.inf, jnp.float32), jnp.full((1, self.bt), -1, jnp.int32)
        _, taken = self.over_blocks(tiles, at, part, nothing)
        out_ref[0, r, pl.ds(slot, 1)] = taken
        return taken

      self.over_blocks(tiles, at, prepare, 0)
      lax.fori_loop(0, self.J, take, jnp.full((1, self.bt), -1, jnp.int32))
      return 0

    lax.fori_loop(0, self.heads, head, 0)

  def run(self, body, name, in_specs, scratch, *args):
    """int32[B, T, K, J]. The body gets the table, the bounds, the arguments, the result, the scores, scratch."""
    bounds = pl.BlockSpec((1, 5, self.bt), lambda b, r, i, j, *_: (b, 0, i))
    indices = pl.pallas_call(
        body, name=name, interpret=self.interpret,
        out_shape=jax.ShapeDtypeStruct((self.B, self.K, self.J, self.padded_T), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(self.B, self.K // self.heads, self.nq, self.nk),
            in_specs=[bounds, *in_specs],
            out_specs=pl.BlockSpec((1, self.heads, self.J, self.bt), lambda b, r, i, j, *_: (b, r, 0, i)),
            scratch_shapes=[pltpu.VMEM((self.heads, self.rows, self.bt), jnp.float32), *scratch]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=flash.VMEM_LIMIT),
    )(self.tiles.reshape(-1), self.bounds, *args)
    return indices[..., :self.T].transpose(0, 3, 1, 2)
