"""The inverse of a block selection: for each block of keys, the queries that chose it.

`block_indices` lists blocks per query; a kernel that keeps one block of K and V on chip
needs queries per block. An *entry* is one (batch, query, KV head, slot) of the selection.
Entries are sorted, stably, by

  list = (batch, KV head, range of queries, block)

so that queries inside a list keep their order and no result depends on the order in which
hardware does things. The range of queries comes before the block so that the queries which
one wave of thread blocks gathers stay in the L2 cache. A list is cut into *tiles* of 64
query rows (64 / G tokens, the last one padded), and tiles are dealt in *units* of up to
`tiles_per_unit` to thread blocks: a block that everybody chose becomes many units.
"""
from __future__ import annotations

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import spans

TILE_ROWS = 64  # the M of one wgmma instruction


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Static sizes of one call over a selection; hashable."""
  batch: int
  queries: int           # T
  keys: int              # S
  kv_heads: int          # K
  group: int             # G
  slots: int             # J
  block_size: int        # tokens

  @property
  def blocks(self):
    return -(-self.keys // self.block_size)


@dataclasses.dataclass(frozen=True)
class Plan(Sizes):
  """And of its lists."""
  range_size: int        # queries per range, see the module
  tiles_per_unit: int

  @property
  def ranges(self):
    return -(-self.queries // self.range_size)

  @property
  def lists(self):
    return self.batch * self.kv_heads * self.ranges * self.blocks

  @property
  def entries(self):
    return self.batch * self.queries * self.kv_heads * self.slots

  @property
  def tile_tokens(self):
    return TILE_ROWS // self.group

  @property
  def unit_tokens(self):
    return self.tile_tokens * self.tiles_per_unit

  @property
  def max_tiles(self):
    """No selection needs more tiles: full ones, and one begun per list that is not empty."""
    return -(-self.entries // self.tile_tokens) + min(self.lists, self.entries)

  @property
  def max_units(self):
    return -(-self.entries // self.unit_tokens) + min(self.lists, self.entries)


RANGE_BYTES = 8 * 2 ** 20     # of Q of one KV head: what one range of queries takes of the L2 cache
# Of a list, at least, on average, whatever a range then takes. Backward each list ends in sums of its block: 262,144
# tokens, blocks of 128, layer with KL, forward + backward, one H200: lists of 8, 16, 32 tiles 346, 330, 328 ms.
FORWARD_TILES, BACKWARD_TILES = 8, 16


def plan_of(B, T, S, K, G, J, H, block_size, list_tiles=FORWARD_TILES) -> Plan:
  """Sizes of the lists of attention over a selection: ranges of queries that fit the L2 cache, units that pay for their
  block."""
  # Shorter lists would mostly load keys.
  range_size = max(RANGE_BYTES // (G * H * 2), list_tiles * (TILE_ROWS // G) * -(-S // block_size) // J, 1)
  # A unit's list lies in shared memory, 8 bytes per token: at G = 1 more would leave room for one
  # thread block per multiprocessor instead of two. (24/8 heads of 128 at 32,768 tokens, forward + backward: 24 tiles
  # 6.98 ms, 32 tiles 7.55.)
  return Plan(B, T, S, K, G, J, block_size, min(range_size, T), tiles_per_unit={1: 12, 2: 16, 3: 24}.get(G, 32))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "spans", "position", "units", "unit_start"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Entries:
  """A selection sorted by block.

  Attributes:
    rows: int32[entries + unit_tokens], for each sorted entry (b * T + t) * K + r.
    spans: int32[entries + unit_tokens], the keys of the block that the entry's query sees, as
      offsets into the block: bits 0-15 hold the end, bits 16-30 the start.
    position: int32[B, T, K, J], the first of the G tile rows of an entry, tile * 64 + place in it; -1 if the entry
      sees nothing.
    units: int32[max_units, 6], each (first sorted entry, tokens, first tile, batch, KV head, block). Unused
      units have 0 tokens.
    unit_start: int32[lists + 1], the units of list i are unit_start[i] .. unit_start[i + 1].
  """
  rows: jax.Array
  spans: jax.Array
  position: jax.Array
  units: jax.Array
  unit_start: jax.Array


def _exclusive_cumsum(x):
  return jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(x, dtype=jnp.int32)])


def _span(first, end, block, plan):
  """The part of [first, end) in a block: (start, stop), offsets into it; empty if stop <= start."""
  first_key = block * plan.block_size
  return jnp.clip(first - first_key, 0, plan.block_size), jnp.clip(end - first_key, 0, plan.block_size)


def chosen(block_indices, blocks):
  """bool[B, T, K, J]: the slots that name one of that many blocks, each block once."""
  same = block_indices[..., :, None] == block_indices[..., None, :]
  earlier = np.tril(np.ones(2 * block_indices.shape[-1:], bool), -1)
  return (block_indices >= 0) & (block_indices < blocks) & ~(same & earlier).any(axis=-1)


def invert(block_indices, plan, segment_ids=None, query_offset=0):
  """Sorts the selection by block.

  Args:
    block_indices: int32[B, T, K, J].
    plan: the sizes.
    segment_ids: int32[B, S] in contiguous runs, or None.
    query_offset: int32 scalar or [B].

  Returns:
    Entries.
  """
  B, T, K, J = block_indices.shape
  first, end = spans.visible_keys(plan.batch, plan.queries, plan.keys, segment_ids, query_offset)
  start, stop = _span(first[:, :, None, None], end[:, :, None, None], block_indices, plan)
  seen = chosen(block_indices, plan.blocks) & (stop > start)
  head = (jnp.arange(B, dtype=jnp.int32)[:, None] * K + jnp.arange(K, dtype=jnp.int32))[:, None, :, None]
  which = (jnp.arange(T, dtype=jnp.int32) // plan.range_size)[None, :, None, None]
  key = (head * plan.ranges + which) * plan.blocks + block_indices
  key = jnp.where(seen, key, plan.lists).reshape(-1)
  # Two bytes sort in half the passes of four.
  key_dtype = jnp.uint16 if plan.lists < 2 ** 16 - 1 else jnp.uint32
  key, entry = lax.sort(
      (key.astype(key_dtype), jnp.arange(plan.entries, dtype=jnp.int32)), num_keys=1, is_stable=True)
  bounds = jnp.searchsorted(key, jnp.arange(plan.lists + 1).astype(key_dtype), method="scan_unrolled")
  bounds = bounds.astype(jnp.int32)
  tokens = bounds[1:] - bounds[:-1]
  tiles = -(-tokens // plan.tile_tokens)
  tile_start = _exclusive_cumsum(tiles)
  unit_start = _exclusive_cumsum(-(-tiles // plan.tiles_per_unit))

  unit = jnp.arange(plan.max_units, dtype=jnp.int32)
  owner = jnp.searchsorted(unit_start[1:], unit, side="right", method="scan_unrolled").astype(jnp.int32)
  used = unit < unit_start[-1]
  owner = jnp.where(used, owner, 0)
  nth = unit - unit_start[owner]
  left = tokens[owner] - nth * plan.unit_tokens
  batch_head = owner // (plan.ranges * plan.blocks)
  units = jnp.stack([
      bounds[owner] + nth * plan.unit_tokens,
      jnp.where(used, jnp.minimum(left, plan.unit_tokens), 0),
      tile_start[owner] + nth * plan.tiles_per_unit,
      batch_head // K,
      batch_head % K,
      owner % plan.blocks,
  ], axis=1).astype(jnp.int32)

  key = key.astype(jnp.int32)
  owner = jnp.minimum(key, plan.lists - 1)
  nth = jnp.arange(plan.entries, dtype=jnp.int32) - bounds[owner]
  at = (tile_start[owner] + nth // plan.tile_tokens) * TILE_ROWS + nth % plan.tile_tokens * plan.group
  position = jnp.zeros((plan.entries,), jnp.int32).at[entry].set(
      jnp.where(key < plan.lists, at, -1), unique_indices=True)
  # The spans anew from the sorted entries: that reads B * T numbers out of order, not all of them.
  query = entry // (K * J)
  start, stop = _span(first.reshape(-1)[query], end.reshape(-1)[query], owner % plan.blocks, plan)
  pad = (0, plan.unit_tokens)
  return Entries(
      rows=jnp.pad(entry // J, pad), spans=jnp.pad(start << 16 | stop, pad),
      position=position.reshape(B, T, K, J), units=units, unit_start=unit_start)


# --- slices of the queries, one after the other -----------------------------------


def slices_of(queries, bytes_per_query, limit):
  """In how many slices of queries to go through, and their size: what a slice needs lies below `limit` bytes.

  All of one size where that takes few more of them: padded queries are a copy of all of them.
  """
  least = -(-queries * bytes_per_query // limit)
  slices = next((n for n in range(least, 2 * least) if queries % n == 0), least)
  size = -(-queries // slices)
  return -(-queries // size), size


def rows_of_all(rows, plan, queries, first, heads):
  """Rows of a slice from query `first` on, which count (batch, query, head), to those of all queries; where those end,
  the last one. So kernels read the arrays of all queries, and no slice of them is a copy."""
  if plan.queries == queries:
    return rows
  rows = rows + (rows // (plan.queries * heads) * (queries - plan.queries) + first) * heads
  return jnp.minimum(rows, plan.batch * queries * heads - 1)


def in_slices(f, slices, arrays):
  """f(*arrays, first) with arrays [B, T, ...] and None cut into slices, where `first` is a slice's first query.

  f gives results by query, what is kept of a slice ([B, ...], to be cut the same way later) and sums, which are added
  up in order. Padding is -1 in whole numbers, else 0.
  """
  if slices == 1:
    return f(*arrays, 0)
  T = arrays[0].shape[1]

  def pad(x):
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    missing = -x.shape[1] % slices
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill) if missing else x

  # Where they lie and not stacked, slices first: to XLA that is another layout, and so a copy, even of one sequence.
  def cut(x, i):
    size = x.shape[1] // slices
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1)

  def step(i, carry):
    joined, sums = carry
    *parts, more = f(*jax.tree.map(lambda x: cut(x, i), arrays), i * -(-T // slices))
    put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], axis=1)
    return jax.tree.map(put, joined, parts), jax.tree.map(jnp.add, sums, more)

  arrays = jax.tree.map(pad, tuple(arrays))
  *parts, sums = jax.eval_shape(lambda *x: f(*jax.tree.map(lambda x: cut(x, 0), x), 0), *arrays)
  init = (jax.tree.map(lambda x: jnp.zeros((x.shape[0], x.shape[1] * slices, *x.shape[2:]), x.dtype), parts),
          jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums))
  (results, kept), sums = lax.fori_loop(0, slices, step, init)
  return jax.tree.map(lambda x: x[:, :T], results), kept, sums
