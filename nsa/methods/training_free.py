"""Training-free selections: on a dense model they are methods, in place of a learned selector they are controls.

| selector | blocks it takes (forced ones included in J) | source |
|---|---|---|
| sink_window | the first blocks and the latest ones | StreamingLLM, arXiv 2309.17453, in blocks |
| block_topk | best <sum of the group's queries, mean key of the block> | MoBA without training, arXiv 2502.13189 eq. 6, one set per group |
| oracle | most true attention mass | the ceiling of any frozen backbone |
| random | uniform | the floor, and the proof that sparsity is on |
| quest | largest bound of <q, k> over the block's keys, summed over the group's queries | Quest, arXiv 2406.10774, eq. 2 |

None has parameters, so each can be trained through (gradient flows in the chosen blocks) or
put on any model that has q, k and v. All are causal: a query chooses by itself, from blocks that lie
wholly before it or hold it, and its own block is forced. Selections that are made once per prompt are
in prompt/base.py.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from nsa.methods import blocks, interface

SELECTORS = ("oracle", "random", "block_topk", "sink_window", "quest")


def select(selector: str, q, k, options: blocks.BlockMethod, call: interface.Call):
  """block_indices int32[B,T,K,J] of a training-free selector for q [B,T,N,H] and k [B,S,K,H]."""
  q, k = jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)
  B, T, N, H = q.shape
  S, K = k.shape[1], k.shape[2]
  size = options.block_size
  count = -(-S // size)
  initial = options.num_initial
  if selector == "oracle":
    _, lse = pk.attention(q, k, k, **call.ops)
    scores, _ = pk.block_mass(q, k, lse, block_size=size, **call.ops)
  elif selector == "block_topk":
    padded = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, count * size - S), (0, 0), (0, 0)))
    mean = padded.reshape(B, count, size, K, H).mean(axis=2)
    group = q.astype(jnp.float32).reshape(B, T, K, N // K, H).sum(axis=3)
    scores = jnp.einsum("btkh,bckh->btkc", group, mean, precision=jax.lax.Precision.HIGHEST)
  elif selector == "quest":
    scores = page_bounds(q, k, size)
  elif selector == "sink_window":
    initial = max(initial, 1)
    scores = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32), (B, T, K, count))
  elif selector == "random":
    scores = _random_scores(call, B, T, K, count)
  else:
    raise ValueError(f"selector = {selector!r}: no such selector; known are {', '.join(SELECTORS)}")
  local = min(options.num_local, options.num_blocks - initial) or 1
  return pk.block_top_k(scores, block_size=size, num_blocks=options.num_blocks,
                        num_initial=min(initial, options.num_blocks - local), num_local=local, keys=S, **call.ops)


def page_bounds(q, k, size: int):
  """Upper bounds of <q, k> over the keys of each page, summed over the group's queries: float32[B, T, K, pages].

  sum_d max(q_d min_d, q_d max_d), with min and max over the page's keys (Quest, arXiv 2406.10774, eq. 2). What a
  query may not see yet lies in its own page, which is forced.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1], k.shape[2]
  pad = ((0, 0), (0, -S % size), (0, 0), (0, 0))
  pages = jnp.pad(k.astype(jnp.float32), pad, mode="edge").reshape(B, -1, size, K, H)
  group = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
  # Where q_d is positive the largest product is with max_d, else with min_d: the group sums up before the product.
  parts = ((jnp.maximum(group, 0).sum(3), pages.max(2)), (jnp.minimum(group, 0).sum(3), pages.min(2)))
  return sum(jnp.einsum("btkh,bckh->btkc", x, y, precision=jax.lax.Precision.HIGHEST) for x, y in parts)


def _random_scores(call, B, T, K, count):
  """Uniform numbers that depend on (key, sequence, position, head, block) alone, so that decoding agrees."""
  if call.key is None:
    raise ValueError("selector = 'random' needs a random key: pass key= to the model")
  seed = jax.random.bits(call.key, (), jnp.uint32)
  bits = seed
  for axis, size, start in ((0, B, 0), (1, T, call.offset), (2, K, 0), (3, count, 0)):
    index = (start + jnp.arange(size)).astype(jnp.uint32)
    bits = _mix(bits ^ index.reshape([-1 if a == axis else 1 for a in range(4)]))
  return (bits >> 8).astype(jnp.float32)


def _mix(x):
  """A bijective 32-bit mixer (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


class SelectorLayer(interface.Layer):
  """Selected attention over a training-free selection; no parameters."""

  def __init__(self, options, selector: str):
    self.options, self.selector = options, selector

  def __call__(self, x, streams, call):
    if call.mode == "dense":
      return super().__call__(x, streams, call)
    name = self.selector if call.selector == "own" else call.selector
    block_indices = select(name, x.q, streams["k"], self.options, call)
    o, _ = pk.selected_attention(x.q, streams["k"], streams["v"], block_indices,
                                 block_size=self.options.block_size, **call.ops)
    return interface.Result(o, {}, block_indices)


class _TrainingFree(blocks.BlockMethod):

  def layer(self, init, model):
    return SelectorLayer(self, self.name)


@dataclasses.dataclass
class BlockTopK(_TrainingFree):
  """Mean-pooled block keys (arXiv 2502.13189, eq. 6), one set per GQA group."""
  name: ClassVar[str] = "block_topk"

  def flops(self, model, context, mode):
    out = super().flops(model, context, mode)
    if mode != "dense":
      out["scores"] = model.num_kv_heads * model.head_dim * (context + 1) / self.block_size
    return out

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / self.block_size / 2}


@dataclasses.dataclass
class Quest(_TrainingFree):
  """Bounds from each page's smallest and largest keys (arXiv 2406.10774). Defaults: pages of 16, 1,024 tokens.

  The paper chooses per query head, at decode alone, and keeps the first two layers dense (`Config.layers` can).
  """
  name: ClassVar[str] = "quest"
  block_size: int = 16            # tokens of a page
  num_blocks: int = 64            # J, forced pages included

  def flops(self, model, context, mode):
    out = super().flops(model, context, mode)
    if mode != "dense":  # two products per page
      out["scores"] = 2.0 * model.num_kv_heads * model.head_dim * (context + 1) / self.block_size
    return out

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / self.block_size}


@dataclasses.dataclass
class SinkWindow(_TrainingFree):
  """The first block and the latest J - 1 (arXiv 2309.17453, in blocks)."""
  name: ClassVar[str] = "sink_window"
  num_initial: int = 1


@dataclasses.dataclass
class RandomBlocks(_TrainingFree):
  """Uniformly drawn blocks besides the forced ones."""
  name: ClassVar[str] = "random"


@dataclasses.dataclass
class Oracle(_TrainingFree):
  """The blocks with most of the dense model's own attention mass; costs a dense pass."""
  name: ClassVar[str] = "oracle"

  def flops(self, model, context, mode):
    out = super().flops(model, context, mode)
    if mode != "dense":
      out["scores"] = interface.dense_flops(model, context) / 2
    return out

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / 2}
