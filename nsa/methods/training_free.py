"""Training-free selections: on a dense model they are methods, in place of a learned selector they are controls.

| selector | blocks it takes (forced ones included in J) | source |
|---|---|---|
| sink_window | the first blocks and the latest ones | StreamingLLM, arXiv 2309.17453, in blocks |
| block_topk | best <sum of the group's queries, mean key of the block> | MoBA, arXiv 2502.13189 eq. 6, per group |
| oracle | most true attention mass | the ceiling of any frozen backbone |
| random | uniform | the floor, and the proof that sparsity is on |
| quest | largest bound of <q, k> over the block's keys, summed over the group | Quest, arXiv 2406.10774, eq. 2 |

None has parameters, so each can be trained through (gradient flows in the chosen blocks) or
put on any model that has q, k and v. All are causal: a query chooses by itself, from blocks that lie
wholly before it or hold it, and its own block is forced. Selections that are made once per prompt are
in prompt/base.py.

Every registered subclass of `TrainingFree` is a method, a run mode and a control: `Call.selector` takes its name.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nsa.methods import blocks, interface
from nsa.methods.interface import Cost, Pool
import pallas_kernels as pk


@dataclasses.dataclass
class TrainingFree(blocks.BlockMethod):
  """Base of the selections that are scores of blocks and nothing else: a subclass says which (`scores`)."""
  least_initial: ClassVar[int] = 0         # first blocks forced whatever `num_initial` says

  def scores(self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"],
             call: interface.Call) -> Float[Array, "B T K blocks"]:
    """float32 scores of the blocks of `block_size` keys, of which each query takes the best; after RoPE, no
    gradient."""
    raise NotImplementedError

  def pool(self, k: Float[Array, "B S K H"]):
    """What `scores` reads of each block of keys, an array [B, blocks, ...] or a tree of such: `pooled` gives it, in
    decoding from the cache. None: nothing."""

  def pooled(self, k, call):
    return self.pool(k) if call.pooled is None else call.pooled["blocks"]

  def choose(self, q, k, call) -> Int[Array, "B T K J"]:
    """The chosen blocks: forced ones, then the best scores."""
    q, k = jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)
    initial = max(self.num_initial, self.least_initial)
    local = min(self.num_local, self.num_blocks - initial) or 1
    geometry = dict(self.geometry, num_initial=min(initial, self.num_blocks - local), num_local=local)
    return pk.block_top_k(self.scores(q, k, call), **geometry, keys=k.shape[1], **call.ops)

  def blocks_of(self, k) -> int:
    """How many blocks the keys [B, S, K, H] make."""
    return -(-k.shape[1] // self.block_size)

  def layer(self, init, model):
    return TrainingFreeLayer(self)


class TrainingFreeLayer(blocks.BlockLayer):
  """Selected attention over a training-free selection; no parameters."""

  @property
  def selection(self) -> TrainingFree:
    return self.options

  def pools(self):
    if type(self.selection).pool is TrainingFree.pool:
      return {}
    return {"blocks": Pool(self.selection.block_size, self.selection.block_size)}

  def pool(self, name, streams, call, first=0):
    return self.selection.pool(jax.lax.stop_gradient(streams["k"]))

  def select(self, index, x, streams, call):
    return self.selection.choose(x.q, streams["k"], call)


@dataclasses.dataclass
class BlockTopK(TrainingFree):
  """Mean-pooled block keys (arXiv 2502.13189, eq. 6), one set per GQA group."""
  name: ClassVar[str] = "block_topk"

  def pool(self, k):
    return blocks.mean_keys(k, self.block_size)

  def scores(self, q, k, call):
    (B, T, N, H), K = q.shape, k.shape[2]
    group = q.astype(jnp.float32).reshape(B, T, K, N // K, H).sum(axis=3)
    return jnp.einsum("btkh,bckh->btkc", group, self.pooled(k, call), precision=jax.lax.Precision.HIGHEST)

  def selection_costs(self, model, context):
    return {"scores": mean_key_cost(model, context, self.block_size)}

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / self.block_size / 2}  # a mean key has no value


@dataclasses.dataclass
class Quest(TrainingFree):
  """Bounds from each page's smallest and largest keys (arXiv 2406.10774). Defaults: pages of 16, 1,024 tokens.

  The paper chooses per query head, at decode alone, and keeps the first two layers dense (`Config.layers` can).
  """
  name: ClassVar[str] = "quest"
  has_geometry: ClassVar[bool] = True
  block_size: int = 16            # tokens of a page
  num_blocks: int = 64            # J, forced pages included

  def pool(self, k):
    return page_ends(k, self.block_size)

  def scores(self, q, k, call):
    return page_bounds(q, *self.pooled(k, call))

  def selection_costs(self, model, context):
    cost = mean_key_cost(model, context, self.block_size)
    return {"scores": cost._replace(flops=2 * cost.flops)}  # two products per page

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / self.block_size}


@dataclasses.dataclass
class SinkWindow(TrainingFree):
  """The first block and the latest J - 1 (arXiv 2309.17453, in blocks)."""
  name: ClassVar[str] = "sink_window"
  least_initial: ClassVar[int] = 1
  num_initial: int = 1

  def scores(self, q, k, call):
    count = self.blocks_of(k)
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32), (*q.shape[:2], k.shape[2], count))


@dataclasses.dataclass
class RandomBlocks(TrainingFree):
  """Uniformly drawn blocks besides the forced ones."""
  name: ClassVar[str] = "random"

  def scores(self, q, k, call):
    """Numbers that depend on (key, sequence, position, head, block) alone, so that decoding agrees."""
    if call.key is None:
      raise ValueError("selector = 'random' needs a random key: pass key= to the model")
    (B, T), K, count = q.shape[:2], k.shape[2], self.blocks_of(k)
    bits = jax.random.bits(call.key, (), jnp.uint32)
    for axis, size, start in ((0, B, 0), (1, T, call.offset), (2, K, 0), (3, count, 0)):
      index = (start + jnp.arange(size)).astype(jnp.uint32)
      bits = _mix(bits ^ index.reshape([-1 if a == axis else 1 for a in range(4)]))
    return (bits >> 8).astype(jnp.float32)


@dataclasses.dataclass
class Oracle(TrainingFree):
  """The blocks with most of the dense model's own attention mass; costs a dense pass."""
  name: ClassVar[str] = "oracle"

  def scores(self, q, k, call):
    _, lse = pk.attention(q, k, k, **call.ops)
    return pk.block_mass(q, k, lse, block_size=self.block_size, **call.ops)[0]

  def selection_costs(self, model, context):
    return {"scores": Cost(interface.dense_flops(model, context) / 2, gradient=False, causal=True)}

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / 2}


def mean_key_cost(model, context: int, block_size: int, heads: int = 0) -> Cost:
  """One product with each earlier block's pooled key, of `heads` queries (0: one per KV head)."""
  return Cost((heads or model.num_kv_heads) * model.head_dim * (context + 1) / block_size, gradient=False, causal=True)


def page_ends(k: Float[Array, "B S K H"], size: int) -> tuple[Array, Array]:
  """The largest and the smallest of each page's keys by dimension, [B, pages, K, H] in k.dtype."""
  pages = jnp.pad(k, ((0, 0), (0, -k.shape[1] % size), (0, 0), (0, 0)), mode="edge")
  pages = pages.reshape(k.shape[0], -1, size, *k.shape[2:])
  return pages.max(2), pages.min(2)


def page_bounds(q, most, least) -> Array:
  """Upper bounds of <q, k> over the keys of each page, summed over the group's queries: float32[B, T, K, pages].

  sum_d max(q_d min_d, q_d max_d), with min and max over the page's keys (Quest, arXiv 2406.10774, eq. 2). What a
  query may not see yet lies in its own page, which is forced.
  """
  (B, T, N, H), K = q.shape, most.shape[2]
  group = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
  # Where q_d is positive the largest product is with max_d, else with min_d: the group sums up before the product.
  parts = ((jnp.maximum(group, 0).sum(3), most), (jnp.minimum(group, 0).sum(3), least))
  above, below = (jnp.einsum("btkh,bckh->btkc", x, y.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
                  for x, y in parts)
  return above + below


def _mix(x):
  """A bijective 32-bit mixer (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
