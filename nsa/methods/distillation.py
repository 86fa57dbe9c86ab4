"""What selectors that learn from attention share: an index key per token, the cost of a teacher, chunks of queries.

Scores of tokens, probabilities and losses are operations of pallas_kernels. What methods themselves make of a query and
each block, or each token, exists for one chunk of queries at a time, forward and backward.
"""
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nsa.methods import blocks, interface
from nsa.methods.interface import Cost, Loss, Stream
from pallas_kernels import masked


class Indexed(blocks.BlockMethod):
  """Block methods whose selector scores tokens by one index key of width `index_dim` for all heads, trained by KL."""
  groups: ClassVar[tuple[str, ...]] = ("selector",)
  losses: ClassVar[dict[str, Loss]] = {"index_kl": Loss("selector")}
  index_dim: int

  def index_flops(self, model, keys: float) -> float:
    """Of the index scores of one query over `keys` tokens."""
    raise NotImplementedError

  def check(self, model, context):
    return super().check(model, context) + rotated(self, "index_dim")

  def streams(self, model):
    return {"k_idx": Stream(1, self.index_dim)}

  def selection_costs(self, model, context):
    return {"index": Cost(self.index_flops(model, (context + 1) / 2), gradient=False, causal=True)}

  def loss_costs(self, model, context, mode):
    if mode == "dense":
      return {}
    visible = blocks.mean_visible(context if mode == "warmup" else self.num_blocks * self.block_size, context)
    return costs("index_kl", self.index_flops(model, visible), model, visible)

  def reads(self, model, context):
    # The one index key head is read once for all K heads and has no value.
    share = self.index_dim / (2 * model.head_dim * model.num_kv_heads)
    return {"selected": self.tokens_visible(context), "index": context * share}


class IndexedLayer(blocks.BlockLayer):
  """`selector` has `keys(h, call)` and `queries(h, call)`; it sees a detached hidden state."""

  def streams(self, x, call):
    return {"k_idx": self.selector.keys(jax.lax.stop_gradient(x.h), call)}

  def index(self, x, streams, call):
    return self.selector.queries(jax.lax.stop_gradient(x.h), call)


def rotated(options, name: str) -> list:
  """The problem of a width that RoPE cannot rotate, for `Method.check`."""
  value = getattr(options, name)
  return [(name, value, "RoPE rotates pairs: take an even number, 2 or more")] if value < 2 or value % 2 else []


def over_queries(f, call: interface.Call, scores_per_query: int, *xs):
  """f(position, segments, *xs) by chunks of queries, which are recomputed in the backward pass.

  Args:
    f: gets the positions int32[B, t] and segment ids int32[B, t] (None without) of a chunk's queries and its part
      of each x; returns a pytree of arrays whose axis 1 is the query. Rows with position -1 are padding: they see
      nothing and are cut off.
    scores_per_query: numbers that f holds for one query position of the whole batch.
    xs: arrays [B, T, ...], or None.

  Returns:
    what f returns, for all T queries.
  """
  B, T = next(x.shape[:2] for x in xs if x is not None)
  position = jnp.broadcast_to((call.offset + jnp.arange(T, dtype=jnp.int32))[None], (B, T))
  chunk = max(1, masked.MAX_SCORES // max(1, scores_per_query))
  return masked.in_chunks(f, chunk, position, call.query_segments(T), *xs)


def teacher(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"],
            mask: Bool[Array, "B R T S"]) -> Float[Array, "B K G T S"]:
  """The probabilities of attention with the log normaliser `lse` within R = 1 or K sets of tokens, held constant."""
  q, k, lse = map(jax.lax.stop_gradient, (q, k, lse))
  return masked.probabilities(q, k, lse, mask, q.shape[-1] ** -0.5)


def costs(loss: str, student: float, model, visible: float) -> dict[str, Cost]:
  """Both branches' scores over `visible` tokens, computed again; the teacher's pass no gradient."""
  return {loss: Cost(student, causal=True, trains="selector"),
          "teacher": Cost(2.0 * model.num_heads * model.head_dim * visible, gradient=False, causal=True)}
