"""SeerAttention-R (arXiv 2506.08889; the gate of arXiv 2410.13276 for single queries): a distilled block gate.

A gate per layer and KV head, on the model's own queries and keys before RoPE, all detached:

  q_gate = rope(norm(concat of the group's queries, G * H -> d))                        [T, K, d]  rotated at the token
  k_gate = rope(norm(concat of the block's max, min and mean key, 3 * H -> d))          [S / block, K, d]
                                                                              rotated at the block's first token
  score  = <q_gate, k_gate> / sqrt(d);  top J blocks, the query's own (unfinished) one always kept

The gate is trained by KL(target || softmax(score)), where the target is the block's largest attention
probability, then the largest over the group's heads, normalised to 1 over the blocks, held constant. The paper
freezes the model: that is `schedule.selector_only` (dense output, teacher over all previous blocks). Sparse steps
train all parameters, a use of our own: backbone by the LM loss alone, gate by the same KL over the chosen blocks,
the teacher being the sparse attention over them.

Both sides of the KL range over the blocks that are complete at the query, for those alone compete: the unfinished
one is kept without a score. (The released code ranks it too in training, with a key pooled over tokens that come
after the query, and takes the loss on the second half of each sequence; here the loss is a mean over all queries
with a complete block.) Whether gates are normed is an option there too.

The block x block gate of arXiv 2410.13276 for prefill is not here: it pools the queries of a block, so a query's
set depends on later tokens, and no causal model can be trained or decoded with it.

The teacher is `pk.block_peak`. Pooling, scores and the KL, with a number per (query, block), are plain jnp, the KL in
chunks of queries (nsa/methods/distillation.py).
"""
import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nsa import layers
from nsa.methods import blocks, distillation
from nsa.methods.interface import Cost, Loss, Pool, Stream
import pallas_kernels as pk
from pallas_kernels import masked


@dataclasses.dataclass
class Seer(blocks.BlockMethod):
  """Defaults: the paper's blocks of 64 and gates of width 128; 2,048 tokens is its smallest budget."""
  name: ClassVar[str] = "seer"
  groups: ClassVar[tuple[str, ...]] = ("selector",)
  losses: ClassVar[dict[str, Loss]] = {"gate_kl": Loss("selector")}
  block_size: int = 64            # tokens
  num_blocks: int = 32            # J, forced blocks included
  num_initial: int = 0            # forced first blocks
  num_local: int = 1              # forced last blocks, the query's own included
  gate_dim: int = 128             # d, width of a gate's query and key
  gate_norm: bool = True          # RMSNorm on the gate's query and key before RoPE

  def check(self, model, context):
    return super().check(model, context) + distillation.rotated(self, "gate_dim")

  def layer(self, init, model):
    return SeerLayer(init, model, self)

  def _gate_flops(self, model, block_scores: float) -> float:
    """Of `block_scores` scores per KV head, and of projecting one pooled key per block."""
    project = 2.0 * model.num_kv_heads * 3 * model.head_dim * self.gate_dim / self.block_size
    return 2.0 * model.num_kv_heads * self.gate_dim * block_scores + project

  def streams(self, model):
    return {"k_raw": Stream(model.num_kv_heads, model.head_dim)}

  def selection_costs(self, model, context):
    scores = self._gate_flops(model, mean_complete(context, self.block_size, context))
    return {"scores": Cost(scores, gradient=False, causal=True)}

  def loss_costs(self, model, context, mode):
    if mode == "dense":
      return {}
    complete = mean_complete(context, self.block_size, context if mode == "warmup" else self.num_blocks)
    return distillation.costs("gate_kl", self._gate_flops(model, complete), model, self.block_size * complete)

  def reads(self, model, context):
    share = self.gate_dim / (2 * model.head_dim)  # a pooled key has no value
    return {"selected": self.tokens_visible(context), "scores": context / self.block_size * share}


def mean_complete(context: int, block_size: int, num_blocks: int) -> float:
  """Complete blocks among the `num_blocks` of a query, its own block being one, averaged over 0 .. context - 1."""
  full, rest = divmod(context, block_size)
  ramp = min(full, num_blocks)
  before = ramp * (ramp - 1) / 2 + (full - ramp) * (num_blocks - 1)  # sum of min(b, J - 1) over the full blocks b
  return (block_size * before + full + rest * min(full, num_blocks - 1)) / context


class PerHead(nnx.Module):
  """One matrix per KV head: [..., K, in] -> [..., K, out], with an optional RMSNorm."""

  def __init__(self, init, heads: int, width: int, out: int, norm: bool, tokens: bool = True):
    self.inner = init.normal("inner", (heads, width, out), ("kv_heads", None, None), fan_in=width, matrix=(1,),
                             tokens=tokens)
    if norm:
      self.norm = init.constant((out,), (None,), 1.0)

  def __call__(self, x: Float[Array, "B n K in"]) -> Float[Array, "B n K out"]:
    y = layers.product("bnki,kio->bnko", x, self.inner[...])
    return layers.rms_norm(y, self.norm[...]) if hasattr(self, "norm") else y


class Gate(nnx.Module):
  """The gate's two projections."""

  def __init__(self, init, model, options: Seer):
    K, H, d = model.num_kv_heads, model.head_dim, options.gate_dim
    self.q = PerHead(init.child("q"), K, model.num_heads // K * H, d, options.gate_norm)
    # Once per block, not per token: Seer.selection_costs has it.
    self.compress_k = PerHead(init.child("compress_k"), K, 3 * H, d, options.gate_norm, tokens=False)


def pooled(k_raw: Float[Array, "B S K H"], block_size: int, segment_ids) -> Float[Array, "B blocks K 3*H"]:
  """Max, min and mean key of each block.

  With segments over the tokens of the segment that the block's last token is in: to whom the block is complete
  and visible, that is its own. A last block that the sequence does not fill is padded with zeros.
  """
  B, S, K, H = k_raw.shape
  count = -(-S // block_size)
  extra = count * block_size - S
  k = jnp.pad(k_raw, ((0, 0), (0, extra), (0, 0), (0, 0))).reshape(B, count, block_size, K, H)
  if segment_ids is None:
    parts = k.max(2), k.min(2), k.astype(jnp.float32).mean(2)
  else:
    ids = jnp.pad(segment_ids, ((0, 0), (0, extra)), mode="edge").reshape(B, count, block_size, 1, 1)
    mine = ids == ids[:, :, -1:]
    mean = jnp.sum(jnp.where(mine, k, 0).astype(jnp.float32), 2) / mine.sum(2)
    parts = jnp.where(mine, k, -jnp.inf).max(2), jnp.where(mine, k, jnp.inf).min(2), mean
  return jnp.concatenate([x.astype(k_raw.dtype) for x in parts], axis=-1)


def complete_blocks(position, segments, segment_ids, keys: int, block_size: int) -> Bool[Array, "B t blocks"]:
  """Which blocks of the `keys` tokens end at or before each query, in its own segment."""
  count = -(-keys // block_size)
  last = (jnp.arange(count) + 1) * block_size - 1
  mask = last <= position[:, :, None]
  if segments is not None:
    mask &= segments[:, :, None] == jnp.take(segment_ids, last, axis=1, mode="clip")[:, None]
  return mask


class SeerLayer(blocks.BlockLayer):

  def __init__(self, init, model, options: Seer):
    self.options = options
    self.selector = Gate(init.child("selector", group="selector"), model, options)

  def streams(self, x, call):
    return {"k_raw": x.k_raw}

  def pools(self):
    return {"gate_keys": Pool(self.options.block_size, self.options.block_size)}

  def pool(self, name, streams, call, first=0) -> Float[Array, "B blocks K d"]:
    """k_gate."""
    k_pool = pooled(jax.lax.stop_gradient(streams["k_raw"]), self.options.block_size, call.segment_ids)
    return call.rope(self.selector.compress_k(k_pool), offset=first, stride=self.options.block_size)

  def index(self, x, streams, call) -> Float[Array, "B T K blocks"]:
    """The gate's scores, float32; those of blocks that are not complete at the query mean nothing."""
    q_raw = jax.lax.stop_gradient(x.q_raw)
    B, T, N, H = q_raw.shape
    K = streams["k_raw"].shape[2]
    q_gate = call.rope(self.selector.q(q_raw.reshape(B, T, K, N // K * H)), offset=call.offset)
    k_gate = self.pooled("gate_keys", streams, call)
    return jnp.einsum("btkd,bckd->btkc", q_gate, k_gate, preferred_element_type=jnp.float32,
                      precision=jax.lax.Precision.HIGHEST) * self.options.gate_dim ** -0.5

  def select(self, scores, x, streams, call):
    return pk.block_top_k(scores, **self.options.geometry, keys=streams["k"].shape[1], **call.ops)

  def losses(self, scores, x, streams, lse, lists, call):
    """The KL of the module's docstring, a mean over the KV heads and the queries that it ranges over."""
    k, size = streams["k"], self.options.block_size
    B, _, K, count = scores.shape
    lists = None if lists is None else blocks.per_head(lists, k)
    peak = pk.block_peak(x.q, k, lse, lists, block_size=size, **call.ops)

    def one(position, segments, peak, scores, lists):
      mask = complete_blocks(position, segments, call.segment_ids, k.shape[1], size)[:, :, None]
      if lists is not None:
        mask = mask & masked.membership(lists, count)
      p = jnp.where(mask, peak, 0.0)
      return masked.kl(p, scores, mask), jnp.any(p > 0, -1)

    loss, counts = distillation.over_queries(one, call, B * K * count, peak, scores, lists)
    if call.counted is not None:
      counts &= call.counted[:, :, None]
    return {"gate_kl": jnp.sum(jnp.where(counts, loss, 0)) / jnp.maximum(jnp.sum(counts), 1)}
