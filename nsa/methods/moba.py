"""MoBA, Mixture of Block Attention (arXiv 2502.13189): every query head picks blocks by their mean keys.

  s[t, n, b] = <q[t, n], mean of the keys of block b>     keys after RoPE, float32 (eq. 6)

Each query head attends to its own block, which takes one of the J slots, and to the J - 1 previous blocks with the
best s, in one exact softmax over their tokens. Nothing is learned: a hard choice passes no gradient, and keys and
queries learn to be found only because the LM loss changes them in the blocks that were chosen. With J at least the
number of blocks it is dense attention, so a retrofit begins where the dense model is; but the authors' own
retrofit took another 100B tokens and full attention in the last layers (`config.layers`), and their best native
recipe ends with dense steps (`schedule.sparse_to_dense`).

One set per query head, not per group: `selected_attention` takes a set per KV head, so K and V are repeated to N
heads. That holds G times the keys and values in memory, and a kernel loads every block for one head's queries
alone instead of for the group's. Decoding repeats nothing, heads of a group attend one after the other; `reads` counts
sets that share nothing but the forced blocks. Controls in the selector's place
(`Call.selector`) choose one set per group.

`key_conv` is FlashMoBA's short convolution (arXiv 2511.11571), meant to gather a block's signal into its mean key:

  k'[t] = k[t] + silu(sum over w < key_conv of taps[w] * k[t - w])     per KV head and channel

UNCERTAIN: that it is depthwise and causal, has 3 to 5 taps, SiLU and a residual is known at second hand; its exact
form and place are unverified. Here it acts on the normed keys before RoPE, in every mode, because it is part of the
keys that attention uses, and its taps begin at zero, where k' = k to the bit. They are the group "branch": they learn
in sparse steps.
"""
import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from nsa import layers
from nsa.methods import blocks, distillation, training_free
from nsa.methods.interface import Cost, Pool, Stream
import pallas_kernels as pk


@dataclasses.dataclass
class MoBA(blocks.BlockMethod):
  """Defaults: the paper's scaling-law runs at 8,192 tokens (blocks of 512, J 3), without FlashMoBA's convolution."""
  name: ClassVar[str] = "moba"
  groups: ClassVar[tuple[str, ...]] = ("branch",)
  block_size: int = 512           # tokens; FlashMoBA: 128, its kernel takes multiples of 64
  num_blocks: int = 3             # J, the query's own block included
  num_initial: int = 0            # forced first blocks
  num_local: int = 1              # forced last blocks, the query's own included
  key_conv: int = 0               # taps of the convolution on keys; 0 = none. FlashMoBA: 3 to 5

  @property
  def acts_when_dense(self):
    return self.key_conv > 0

  def check(self, model, context):
    problems = super().check(model, context)
    if self.key_conv < 0:
      problems.append(("key_conv", self.key_conv, "taps of the convolution on keys, 0 for none"))
    return problems

  def layer(self, init, model):
    return MoBALayer(init, model, self)

  def streams(self, model):
    """Keys and values once more for each query head beyond the first of its group."""
    extra = model.num_heads - model.num_kv_heads
    return {name: Stream(extra, model.head_dim, cached=False) for name in ("k_repeated", "v_repeated")}

  def chosen(self, model, context):
    return model.num_heads * self.num_blocks

  def costs(self, model, context, mode):
    out = super().costs(model, context, mode)
    if self.key_conv:
      out["key_conv"] = Cost(2.0 * self.key_conv * model.num_kv_heads * model.head_dim)
    return out

  def selection_costs(self, model, context):
    return {"scores": training_free.mean_key_cost(model, context, self.block_size, model.num_heads)}

  def reads(self, model, context):
    forced = min(self.num_initial + self.num_local, self.num_blocks)
    chosen = model.num_heads // model.num_kv_heads * (self.num_blocks - forced)
    return {"selected": float(min((forced + chosen) * self.block_size, context)),
            "scores": context / self.block_size / 2}  # a mean key has no value


class KeyConv(nnx.Module):
  """FlashMoBA's convolution on the keys of one layer."""

  def __init__(self, init, model, taps: int):
    self.taps = init.constant((taps, model.num_kv_heads, model.head_dim), (None, "kv_heads", None), 0.0)

  def __call__(self, k_BTKH, segment_ids):
    return k_BTKH + jax.nn.silu(layers.short_conv(k_BTKH, self.taps[...], segment_ids))


class MoBALayer(blocks.BlockLayer):

  def __init__(self, init, model, options: MoBA):
    self.options = options
    self.past_shape = (max(options.key_conv - 1, 0), model.num_kv_heads, model.head_dim)
    if options.key_conv:
      self.branch = KeyConv(init.child("branch", group="branch"), model, options.key_conv)

  def initial_state(self, batch, dtype):
    return {"k_past": jnp.zeros((batch, *self.past_shape), dtype)} if self.past_shape[0] else {}

  def _keys(self, x, call):
    """The raw keys that the convolution of these tokens reaches, [B, W - 1 + T, K, H]; without a cache these alone."""
    if call.state is None:
      return x.k_raw
    if call.segment_ids is not None:
      raise ValueError(f"segment_ids with a cache and attention.key_conv = {self.options.key_conv}: the keys that the "
                       "convolution still reaches know no segments; decode each document by itself")
    return jnp.concatenate([call.state["k_past"].astype(x.k_raw.dtype), x.k_raw], axis=1)

  def streams(self, x, call):
    if not self.options.key_conv:
      return {}
    T = x.k_raw.shape[1]
    k = self.branch(self._keys(x, call), call.query_segments(T))[:, -T:]
    return {"k": call.rope(k, offset=call.offset)}  # in place of the model's own

  def __call__(self, x, streams, call):
    state = None if call.state is None else {"k_past": self._keys(x, call)[:, -self.past_shape[0]:]}
    return super().__call__(x, streams, call)._replace(state=state)

  def pools(self):
    return {"mean_keys": Pool(self.options.block_size, self.options.block_size)}

  def pool(self, name, streams, call, first=0):
    return blocks.mean_keys(jax.lax.stop_gradient(streams["k"]), self.options.block_size, call.segment_ids)

  def select(self, index, x, streams, call):
    """One set per query head: int32[B, T, N, J]."""
    q = jax.lax.stop_gradient(x.q)
    B, _, N, H = q.shape
    S, K = streams["k"].shape[1:3]
    mean = self.pooled("mean_keys", streams, call)

    def choose(position, segments, q):
      q = q.astype(jnp.float32).reshape(B, -1, K, N // K, H)
      scores = jnp.einsum("btkgh,bckh->btkgc", q, mean, precision=jax.lax.Precision.HIGHEST)
      return pk.block_top_k(scores.reshape(B, -1, N, mean.shape[1]), **self.options.geometry, keys=S,
                            segment_ids=call.segment_ids, query_offset=position[:, 0],
                            implementation=call.implementation)

    return distillation.over_queries(choose, call, B * N * mean.shape[1], q)
