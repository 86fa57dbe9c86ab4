"""Tiles of neighbouring queries and the blocks they need: what the kernels of this package walk over.

A *tile* is `rows` query rows of one KV head: neighbouring tokens times the G heads that share it (the rest of the
rows is padding). Its *list* names every block that at least one of its tokens selected and sees, once, in
ascending order; a kernel copies those blocks to VMEM one after the other and hides from each row what its own
token did not select. Rows lie in lanes, keys in sublanes: then a softmax is a reduction over sublanes, numbers
per row fill whole vectors, blocks of 32 keys waste nothing and the queries are what the matrix unit keeps.

Two arrays that are needed together are *paired* in the lanes of one: k and v, q and do, k and k_idx. Head dims
up to 64 give a pair of 128 lanes that one copy fetches; where one of the pair is wanted for the keys' side of a
product, the other meets zeros on the queries' side.
"""
from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels import lists, spans

LANES = 128
STEP_KEYS = 256               # keys that a step of a kernel takes, as whole blocks
SUMS_BYTES = 16 * 2 ** 20     # of VMEM for the float32 gradients of a range of keys
VMEM_BYTES = 48 * 2 ** 20     # limit of a kernel; the least of the chips has 64 MiB


@dataclasses.dataclass(frozen=True)
class Plan(lists.Sizes):
  """And of its tiles."""
  left: int              # head dim of the first of a pair
  right: int             # head dim of the second

  @property
  def rows(self):
    """Of a tile. Few tokens make long lists' blocks rarely shared; G = 8 fills 256 rows with 32 tokens."""
    return 2 * LANES if self.group >= 8 else LANES

  @property
  def tokens(self):
    """Of a tile."""
    return self.rows // self.group

  @property
  def tiles(self):
    """Of a sequence and KV head."""
    return -(-self.queries // self.tokens)

  @property
  def step_blocks(self):
    return max(1, STEP_KEYS // self.block_size)

  @property
  def union(self):
    """Longest list."""
    return min(self.tokens * self.slots, self.blocks)

  @property
  def packed(self):
    """Whether a pair shares 128 lanes."""
    return max(self.left, self.right) <= LANES // 2

  @property
  def start(self):
    """Lane where the second of a pair begins."""
    return LANES // 2 if self.packed else _round_up(self.left, LANES)

  @property
  def width(self):
    """Lanes of a pair."""
    return self.start + (LANES // 2 if self.packed else _round_up(self.right, LANES))

  @property
  def range_blocks(self):
    """Blocks whose gradients fit VMEM together."""
    return max(1, min(self.blocks, SUMS_BYTES // (self.block_size * self.width * 4)))

  @property
  def ranges(self):
    return -(-self.blocks // self.range_blocks)

  @property
  def list_length(self):
    """The blocks, room for the last step, and where each range of keys begins and ends."""
    return self.union + self.step_blocks + self.ranges + 1


def _round_up(n, multiple):
  return -(-n // multiple) * multiple


# --- arrays in the order of the kernels ---------------------------------------


def pair(plan, a, b):
  """[..., left] and [..., right] (None is 0) to [..., width]."""
  shape = a.shape[:-1]
  b = jnp.zeros((*shape, 0), a.dtype) if b is None else b
  fill = lambda x, size: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
  return jnp.concatenate([fill(a, plan.start), fill(b, plan.width - plan.start)], axis=-1)


def query_rows(plan, x):
  """[B, T, K, G, ...] to [B * K, tiles, rows, ...], zeros in rows of no query."""
  x = jnp.moveaxis(x, 2, 1)
  rest, none = x.shape[4:], [(0, 0)] * (x.ndim - 4)
  x = jnp.pad(x, [(0, 0), (0, 0), (0, plan.tiles * plan.tokens - plan.queries), (0, 0), *none])
  x = x.reshape(plan.batch * plan.kv_heads, plan.tiles, plan.tokens * plan.group, *rest)
  return jnp.pad(x, [(0, 0), (0, 0), (0, plan.rows - plan.tokens * plan.group), *none])


def from_rows(plan, x):
  """[B * K, tiles, any, rows] to [B, T, K, G, any]."""
  some = x.shape[2]
  x = x[..., :plan.tokens * plan.group]
  x = x.reshape(plan.batch, plan.kv_heads, plan.tiles, some, plan.tokens, plan.group)
  x = x.transpose(0, 2, 4, 1, 5, 3)
  return x.reshape(plan.batch, plan.tiles * plan.tokens, plan.kv_heads, plan.group, some)[:, :plan.queries]


def key_blocks(plan, x):
  """[B, S, K, any] to [B * K, blocks, block_size, any], zeros past the end."""
  x = jnp.pad(x, [(0, 0), (0, plan.blocks * plan.block_size - plan.keys), (0, 0), (0, 0)])
  x = x.transpose(0, 2, 1, 3)
  return x.reshape(plan.batch * plan.kv_heads, plan.blocks, plan.block_size, x.shape[-1])


def from_blocks(plan, x):
  """[B * K, at least blocks * block_size, any] to [B, S, K, any]."""
  x = x.reshape(plan.batch, plan.kv_heads, -1, x.shape[-1])[:, :, :plan.keys]
  return x.transpose(0, 2, 1, 3)


def seen_picks(plan, block_indices, segment_ids, query_offset):
  """int32[B, T, K, J]: the selection, -1 in place of what is padding, not there or out of the query's sight."""
  first, end = (x[:, :, None, None]
                for x in spans.visible_keys(plan.batch, plan.queries, plan.keys, segment_ids, query_offset))
  start = block_indices * plan.block_size
  seen = (block_indices >= 0) & (block_indices < plan.blocks) & (start < end) & (start + plan.block_size > first)
  return jnp.where(seen, block_indices, -1).astype(jnp.int32)


def make_lists(plan, picks):
  """The blocks of every tile.

  Args:
    picks: int32[B, T, K, J] of `seen_picks`.

  Returns:
    int32[B * K, tiles, 1, list_length]: `union` places for blocks, of which the first are used, and from place
    `union + step_blocks` on, for each range of keys and past the last, how many blocks of the list lie before it.
  """
  x = jnp.pad(picks, ((0, 0), (0, plan.tiles * plan.tokens - plan.queries), (0, 0), (0, 0)), constant_values=-1)
  x = x.transpose(0, 2, 1, 3).reshape(plan.batch * plan.kv_heads, plan.tiles, plan.tokens * plan.slots)
  # Comparisons with all blocks that fuse into their sums, and counts by a product: XLA takes minutes to compile
  # the sort of a few hundred numbers per tile, and ten times as long for a cumulative sum as for the product.
  block = jnp.arange(plan.blocks, dtype=jnp.int32)
  needed = (x[..., None] == block).any(axis=2)
  before = jnp.einsum("htb,bc->htc", needed.astype(jnp.bfloat16), (block[:, None] <= block).astype(jnp.bfloat16),
                      preferred_element_type=jnp.float32).astype(jnp.int32)
  places = jnp.arange(plan.union, dtype=jnp.int32)
  listed = (before[:, :, None] <= places[:, None]).sum(axis=3, dtype=jnp.int32)
  edges = [min(i * plan.range_blocks, plan.blocks) for i in range(plan.ranges + 1)]
  bounds = jnp.stack([before[..., edge - 1] if edge else jnp.zeros_like(before[..., 0]) for edge in edges], axis=2)
  listed = jnp.pad(jnp.where(listed < plan.blocks, listed, 0), ((0, 0), (0, 0), (0, plan.step_blocks)))
  return jnp.concatenate([listed, bounds], axis=2)[:, :, None]


def row_numbers(plan, picks, segment_ids, query_offset):
  """int32[B * K, tiles, J + 2, rows]: 1 + the picks of each row's token, the first key and the end of its sight."""
  sight = [jnp.broadcast_to(x[:, :, None, None], (*picks.shape[:3], 1))
           for x in spans.visible_keys(plan.batch, plan.queries, plan.keys, segment_ids, query_offset)]
  x = jnp.concatenate([picks + 1, *sight], axis=3)  # + 1: rows of no query hold zeros
  x = jnp.pad(x, ((0, 0), (0, plan.tiles * plan.tokens - plan.queries), (0, 0), (0, 0)))
  x = x.reshape(plan.batch, plan.tiles, plan.tokens, plan.kv_heads, plan.slots + 2).transpose(0, 3, 1, 4, 2)
  x = x.reshape(plan.batch * plan.kv_heads, plan.tiles, plan.slots + 2, plan.tokens)
  x = jnp.repeat(x, plan.group, axis=3)
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.rows - plan.tokens * plan.group)))
