"""What the losses and choices of selectors that no operation computes share: chunks of queries, and the cost of a
teacher.

Their scores, probabilities and losses are those of pallas_kernels/masked.py. Scores of queries against keys exist for
one chunk of queries at a time, forward and backward: memory grows with T and S, not with T * S.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nsa.methods import interface
from nsa.methods.interface import Cost
from pallas_kernels import masked


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
