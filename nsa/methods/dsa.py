"""DSA, DeepSeek Sparse Attention (arXiv 2512.02556, section 2.1): a lightning indexer picks tokens, KL trains it.

Indexer, per layer, on the detached hidden state x:

  q_idx = rope(x Wq)             [T, HI, dI]   HI index heads
  k_idx = rope(LayerNorm(x Wk))  [S, dI]       one index key
  w     = x Ww / sqrt(HI * dI)   [T, HI]
  I[t, s] = sum over j of w[t, j] * relu(<q_idx[t, j], k_idx[s]>)

Every query attends to the tokens with the best I, `num_blocks * block_size` of them, all heads of the layer to
the same ones; nothing is forced, not even the query itself. Two options make it comparable with block methods:

* `level = "block"`: I is max-pooled over each block's visible tokens, the best `num_blocks` blocks are taken, and
  `num_initial` and `num_local` blocks are forced as everywhere else (at level "token" these two do nothing).
* `per_group = True`: HI index heads, and so a set, for each KV head.

Losses (eqs. 3 and 4 there), with p the attention probabilities summed over all heads (of the group, with
`per_group`) and L1-normalised, held constant: warm-up KL(p || softmax(I)) over all previous tokens; in sparse
steps the same over the chosen tokens alone, where p comes from the sparse attention, normalised over them (the
paper does not say). The KL reaches the indexer and nothing else, and nothing else reaches the indexer.

The paper's model has MLA: there q_idx comes from the query latent, RoPE turns 64 of the 128 dimensions, and both
sides are Hadamard-rotated and quantised to FP8. Here q_idx comes from x, RoPE turns all dimensions (halves, not
interleaved), and scores are float32 sums. Where the model convolves its q and k (`model.short_conv`) q_idx and
k_idx are convolved too, or the indexer could not see what the attention that it imitates matches.

`pk.lightning_kl` computes the losses. Blocks are chosen of what `pk.lightning_scores` makes of I; tokens by
`pk.token_top_k`, as sets of one bit per token and not as lists, which `pk.token_attention` and the losses take.
"""
import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nsa import layers
from nsa.methods import blocks, distillation
import pallas_kernels as pk
from pallas_kernels import partition

LEVELS = ("token", "block")


@dataclasses.dataclass
class DSA(distillation.Indexed):
  """Defaults: the paper's budget of 2,048 tokens, and an indexer for small models (the paper: 64 heads of 128)."""
  name: ClassVar[str] = "dsa"
  block_size: int = 64            # tokens; at level "token" only a factor of the budget
  num_blocks: int = 32            # J; the budget is num_blocks * block_size tokens
  num_initial: int = 0            # forced first blocks, level "block" only
  num_local: int = 1              # forced last blocks, the query's own included, level "block" only
  level: str = "token"            # token | block: what is selected
  per_group: bool = False         # one set per KV head instead of one for all
  index_heads: int = 4            # HI, index heads of one set
  index_dim: int = 64             # dI, width of an index query and of the index key

  def sets(self, model) -> int:
    """R, sets of tokens per query."""
    return model.num_kv_heads if self.per_group else 1

  def check(self, model, context):
    problems = super().check(model, context) + self.too_small(index_heads=1)
    if self.level not in LEVELS:
      problems.append(("level", self.level, f"one of {', '.join(LEVELS)}"))
    return problems

  def layer(self, init, model):
    return DSALayer(init, model, self)

  def index_flops(self, model, keys):
    """Of I over `keys` tokens: each head's dot product, then its weighted sum."""
    return 2.0 * self.sets(model) * self.index_heads * (self.index_dim + 1) * keys

  def chosen(self, model, context):
    return self.sets(model) * (-(-context // 32) if self.level == "token" else self.num_blocks)


def layer_norm(x: Float[Array, "... D"], gain: Float[Array, " D"], bias: Float[Array, " D"], eps: float = 1e-6):
  """(x - mean) / standard deviation * gain + bias, computed in float32, returned in x.dtype (arXiv 1607.06450)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale * gain + bias).astype(x.dtype)


class Indexer(nnx.Module):
  """The lightning indexer's projections."""

  def __init__(self, init, model, options: DSA):
    self.sets, self.heads = options.sets(model), options.index_heads
    count, axis = self.sets * self.heads, "kv_heads" if options.per_group else None
    projection = functools.partial(layers.HeadProjection, taps=model.short_conv)
    self.q = projection(init.child("q"), model.d_model, count, options.index_dim, axis=axis)
    self.k = projection(init.child("k"), model.d_model, 1, options.index_dim, axis=None)
    self.k_norm = init.constant((options.index_dim,), (None,), 1.0)
    self.k_norm_bias = init.constant((options.index_dim,), (None,), 0.0)
    self.weights = init.normal("weights", (model.d_model, count), ("embed", axis), fan_in=model.d_model)
    self.scale = (options.index_heads * options.index_dim) ** -0.5

  def keys(self, h, call) -> Float[Array, "B T dI"]:
    k = layer_norm(self.k(h, call.query_segments(h.shape[1]), call.tail), self.k_norm[...], self.k_norm_bias[...])
    return call.rope(k, offset=call.offset)[:, :, 0]

  def queries(self, h, call) -> tuple[Float[Array, "B T R HI dI"], Float[Array, "B T R HI"]]:
    """The index queries of each set and their weights."""
    B, T, _ = h.shape
    q = call.rope(self.q(h, call.query_segments(T), call.tail), offset=call.offset)
    w = layers.product("btd,dj->btj", h, self.weights[...]) * self.scale
    return q.reshape(B, T, self.sets, self.heads, -1), w.reshape(B, T, self.sets, self.heads)


class DSALayer(distillation.IndexedLayer):

  def __init__(self, init, model, options: DSA):
    self.options = options
    self.selector = Indexer(init.child("selector", group="selector"), model, options)

  @property
  def unit(self):
    return 0 if self.options.level == "token" else self.options.block_size

  def index(self, x, streams, call):
    return *super().index(x, streams, call), streams["k_idx"]

  def select(self, index, x, streams, call):
    o = self.options
    q_idx, w, k_idx = map(jax.lax.stop_gradient, index)
    (B, S), R = k_idx.shape[:2], w.shape[2]
    if o.level == "token":
      return pk.token_top_k(q_idx, w, k_idx, num_tokens=min(o.num_blocks * o.block_size, S), **call.ops)

    def choose(position, segments, q_idx, w):
      del segments
      where = dict(call.ops, query_offset=position[:, 0])
      scores = pk.lightning_scores(q_idx, w, k_idx, block_size=o.block_size, **where)
      return pk.block_top_k(scores, **o.geometry, keys=S, **where)

    return distillation.over_queries(choose, call, B * R * -(-S // o.block_size), q_idx, w)

  def attend(self, index, x, streams, lists, size, call):
    if size:
      return super().attend(index, x, streams, lists, size, call)
    if partition.active():  # which cuts no heads where sets have one for all
      lists = blocks.per_head(lists, streams["k"])
    return pk.token_attention(x.q, streams["k"], streams["v"], lists, implementation=call.implementation)

  def losses(self, index, x, streams, lse, lists, call):
    """KL(p || softmax(I)), a mean over queries and sets; `lists` None takes all visible tokens."""
    chosen = dict(block_indices=lists)
    if call.selector == "own" and not self.unit:
      chosen = dict(block_indices=None, token_sets=lists)
    kl = pk.lightning_kl(x.q, streams["k"], lse, *index, **chosen, block_size=self.options.block_size, **call.ops)
    return {"index_kl": call.mean(kl)}
