"""InfLLM-V2 (arXiv 2509.24663): sparse attention without a parameter, switchable with the dense model it sits on.

Blocks are chosen by attention to mean-pooled keys; l = `pool_len`, s = `pool_stride`:

  k_cmp[c] = mean of the keys s c .. s c + l - 1           after RoPE; seen once complete
  p[t, n]  = softmax over c of <q[t, n], k_cmp[c]> / sqrt(H)          per query head
  score[t, r, b] = max over the c that share tokens with block b of (sum over the heads n of group r of p[t, n, c])

For l 32, s 16 and blocks of 64 that is a max-pool of kernel 5, stride 4 and padding 1; in general kernel
(block + l) / s - 1, stride block / s and padding l / s - 1. The first `num_initial` blocks, the last `num_local` and
the best of the rest, J together, go into one softmax over their tokens: no gates, no sliding-window branch, and the
compressed attention's output is dropped. A dense model lacks nothing: mode "dense" is the dense model itself, and J at
least the number of blocks (up to 6,144 tokens by default) gives its logits, so that one model serves short inputs
dense and long ones sparse. No gradient reaches the choice; keys and queries learn in the blocks that were chosen.

The paper computes the softmax in two passes over q k_cmp, because group sums leave no room for scores in a fused
kernel: one for the log-normaliser, one for the sums. `coarse_lse` takes the normaliser from keys pooled over 4 l
every 4 s instead (128 and 64 there), which makes 2 passes 1.25. It weighs the heads of a group a little differently and
changes nothing else. FLOPs count the passes; the mean-pooling itself, K H l / s additions per token, is left out.

UNCERTAIN: whether keys are pooled before or after RoPE is from the released code (after), not from the paper. That a
block which no pooled key touches yet scores 0 is ours, and matters only where num_local is small.

Scores are plain jnp by chunks of queries (nsa/methods/distillation.py), for no operation of pallas_kernels pools the
group's sums by their maximum.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nsa.methods import blocks, distillation
from nsa.methods.interface import Cost, Pool
import pallas_kernels as pk

COARSE = 4  # the coarse log-normaliser pools over so many times pool_len and pool_stride


@dataclasses.dataclass
class InfLLMV2(blocks.BlockMethod):
  """Defaults: the paper's 96 blocks of 64, of them 1 initial, 32 local and 63 by score; about 6,000 visible tokens."""
  name: ClassVar[str] = "infllm_v2"
  block_size: int = 64            # tokens
  num_blocks: int = 96            # J, forced blocks included
  num_initial: int = 1            # forced first blocks
  num_local: int = 32             # forced last blocks, the query's own included
  pool_len: int = 32              # l, tokens of a pooled key
  pool_stride: int = 16           # s, tokens between the beginnings of pooled keys
  coarse_lse: bool = False        # log-normaliser from keys pooled over 4 l every 4 s

  def check(self, model, context):
    problems = super().check(model, context)
    if self.pool_stride < 1:
      problems.append(("pool_stride", self.pool_stride, "at least 1 token"))
      return problems
    for name in ("pool_len", "block_size"):
      if getattr(self, name) < 1 or getattr(self, name) % self.pool_stride:
        problems.append((name, getattr(self, name), f"must be a multiple of pool_stride = {self.pool_stride}"))
    if self.pool_len > context:
      problems.append(("pool_len", self.pool_len, f"longer than the context of {context} tokens"))
    reach = COARSE * self.pool_len
    if self.coarse_lse and self.block_size > 0 and self.num_blocks * self.block_size < reach:
      problems.append(("coarse_lse", self.coarse_lse,
                       f"queries that see no coarse key yet must see all blocks: num_blocks * block_size = "
                       f"{self.num_blocks * self.block_size} is below {COARSE} * pool_len = {reach}"))
    return problems

  def layer(self, init, model):
    return InfLLMV2Layer(self)

  def selection_costs(self, model, context):
    factor = COARSE if self.coarse_lse else 1
    keys = sum(mean_pooled(context, f * self.pool_len, f * self.pool_stride) for f in (1, factor))
    return {"scores": Cost(2.0 * model.num_heads * model.head_dim * keys, gradient=False, causal=True)}

  def reads(self, model, context):
    keys = context / self.pool_stride * (1 + (1 / COARSE if self.coarse_lse else 0))
    return {**super().reads(model, context), "scores": keys / 2}  # a pooled key has no value


def mean_pooled(context: int, length: int, stride: int) -> float:
  """Pooled keys that a query sees, a mean over the queries 0 .. context - 1."""
  count = max(0, (context - length) // stride + 1)
  return (count * (context - length + 1) - stride * count * (count - 1) / 2) / context


def mean_pool(k: Float[Array, "B S K H"], length: int, stride: int) -> Float[Array, "B C K H"]:
  """Means of `length` tokens every `stride`, a multiple of which `length` is; computed in float32."""
  B, S, K, H = k.shape
  count = max(0, (S - length) // stride + 1)
  if not count:  # a cache shorter than one pooled key
    return jnp.zeros((B, 0, K, H), k.dtype)
  strips = k[:, :(count - 1) * stride + length].astype(jnp.float32).reshape(B, -1, stride, K, H).sum(2)
  return (sum(strips[:, i:i + count] for i in range(length // stride)) / length).astype(k.dtype)


def visible_pooled(position, segments, segment_ids, count: int, length: int, stride: int) -> Bool[Array, "B t C"]:
  """Which pooled keys each query sees: those that end at or before it and lie in its segment."""
  first = jnp.arange(count, dtype=jnp.int32) * stride
  last = first + length - 1
  mask = last <= position[:, :, None]
  if segments is not None:  # segments are contiguous: the ends tell of all tokens
    for end in (first, last):
      mask &= segments[:, :, None] == segment_ids[:, None, end]
  return mask


class InfLLMV2Layer(blocks.BlockLayer):

  def pools(self):
    o = self.options
    fine = {"k_cmp": Pool(o.pool_len, o.pool_stride)}
    return fine | {"k_coarse": Pool(COARSE * o.pool_len, COARSE * o.pool_stride)} if o.coarse_lse else fine

  def pool(self, name, streams, call, first=0):
    return mean_pool(jax.lax.stop_gradient(streams["k"]), *self.pools()[name])

  def select(self, index, x, streams, call):
    o = self.options
    q = jax.lax.stop_gradient(x.q)
    B, _, N, _ = q.shape
    S = streams["k"].shape[1]
    k_cmp, lse_of = self.pooled("k_cmp", streams, call), "k_coarse" if o.coarse_lse else "k_cmp"
    k_lse, (length, stride) = self.pooled(lse_of, streams, call), self.pools()[lse_of]
    _, lse = pk.compressed_attention(q, k_lse, k_lse, block_len=length, block_stride=stride, **call.ops)
    C, count, step = k_cmp.shape[1], -(-S // o.block_size), o.block_size // o.pool_stride
    kernel, before = (o.block_size + o.pool_len) // o.pool_stride - 1, o.pool_len // o.pool_stride - 1
    padding = (before, (count - 1) * step + kernel - before - C)

    def choose(position, segments, q, lse):
      seen = visible_pooled(position, segments, call.segment_ids, C, o.pool_len, o.pool_stride)
      p = distillation.teacher(q, k_cmp, lse, seen[:, None]).sum(2).swapaxes(1, 2)  # over the heads of the group
      scores = jax.lax.reduce_window(p, 0.0, jax.lax.max, (1, 1, 1, kernel), (1, 1, 1, step),
                                     ((0, 0), (0, 0), (0, 0), padding))
      return pk.block_top_k(scores, **o.geometry, keys=S, segment_ids=call.segment_ids, query_offset=position[:, 0],
                            implementation=call.implementation)

    return distillation.over_queries(choose, call, B * N * max(C, 1), q, lse)
