"""What the losses of distilled selectors share: attention probabilities as a teacher, by chunks of queries.

Plain jnp: no operation of pallas_kernels covers these losses. Scores of queries against keys exist for one chunk
of queries at a time, forward and backward: a chunk is recomputed in the backward pass, so that memory grows with
T and S, not with T * S.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa.methods import interface
from nsa.methods.interface import Cost

MAX_SCORES = 2 ** 25  # float32 scores that a chunk of queries may hold at a time (128 MiB)


def over_queries(f, call: interface.Call, scores_per_query: int, *xs):
  """f(position, segments, *xs) by chunks of queries.

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
  xs = (position, call.query_segments(T), *xs)
  count = -(-T * max(1, scores_per_query) // MAX_SCORES)
  chunk = -(-T // min(T, count))
  count = -(-T // chunk)
  if count == 1:
    return jax.checkpoint(f)(*xs)

  def split(x):
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    x = jnp.pad(x, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape((B, count, chunk) + x.shape[2:]), 1, 0)

  def join(y):
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape((B, count * chunk) + y.shape[3:])[:, :T]

  step = jax.checkpoint(f, prevent_cse=False)  # the body of a scan is not merged with its recomputation anyway
  return jax.tree.map(join, jax.lax.map(lambda xs: step(*xs), jax.tree.map(split, xs)))


def visible_tokens(position, segments, segment_ids, keys: int) -> Bool[Array, "B t S"]:
  """Which of the `keys` tokens each query may attend to: those up to its position, of its own segment."""
  mask = jnp.arange(keys, dtype=jnp.int32) <= position[:, :, None]
  if segments is not None:
    mask &= segments[:, :, None] == segment_ids[:, None]
  return mask


def probabilities(q: Float[Array, "B t N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B t N"],
                  mask: Bool[Array, "B t R S"]) -> Float[Array, "B t K G S"]:
  """float32 softmax probabilities of attention with the log normaliser `lse`, held constant; 0 outside `mask`
  (R = 1 or K sets of tokens)."""
  B, t, N, H = q.shape
  K = k.shape[2]
  q, k, lse = map(jax.lax.stop_gradient, (q, k, lse))
  scores = jnp.einsum("btkgh,bskh->btkgs", q.reshape(B, t, K, N // K, H), k, preferred_element_type=jnp.float32,
                      precision=jax.lax.Precision.HIGHEST) * H ** -0.5
  lse = lse.reshape(B, t, K, N // K, 1)
  seen = mask[:, :, :, None] & (lse > -jnp.inf)
  return jnp.exp(jnp.where(seen, scores - jnp.where(lse > -jnp.inf, lse, 0.0), -jnp.inf))


def kl(target: Float[Array, "... S"], scores: Float[Array, "... S"], mask: Bool[Array, "... S"]) -> Float[Array, "..."]:
  """KL(target / sum(target) || softmax(scores)) inside `mask`, in nats; 0 where the target is nought.

  `target` is 0 outside the mask and is a constant; the gradient with respect to the scores is
  softmax(scores) - target / sum(target).
  """
  total = target.sum(-1, keepdims=True)
  some = total > 0
  target = target / jnp.where(some, total, 1.0)
  mask = mask & some
  top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, scores, -jnp.inf), -1, keepdims=True, initial=-jnp.inf))
  scores = jnp.where(mask, scores - jnp.where(some, top, 0.0), 0.0)
  norm = jnp.sum(jnp.where(mask, jnp.exp(scores), 0.0), -1)
  log_norm = jnp.log(jnp.where(some[..., 0], norm, 1.0))
  entropy = jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1.0)), 0.0)
  return jnp.sum(entropy - target * scores, -1) + jnp.where(some[..., 0], log_norm, 0.0)


def selected_tokens(block_indices: Int[Array, "B t R J"], block_size: int, keys: int) -> Bool[Array, "B t R S"]:
  """Lists of blocks as sets of the first `keys` tokens; -1 belongs to none."""
  B, t, R, J = block_indices.shape
  count = -(-keys // block_size)
  at = jnp.where(block_indices < 0, count, block_indices)  # a scatter drops what lies past the end
  b, i, r = (jnp.arange(n).reshape([-1 if a == axis else 1 for a in range(4)]) for axis, n in enumerate((B, t, R)))
  chosen = jnp.zeros((B, t, R, count), bool).at[b, i, r, at].set(True, mode="drop")
  return jnp.repeat(chosen, block_size, axis=-1)[..., :keys] if block_size > 1 else chosen


def costs(loss: str, student: float, model, visible: float) -> dict[str, Cost]:
  """Both branches' scores over `visible` tokens, computed again; the teacher's pass no gradient."""
  return {loss: Cost(student, causal=True, trains="selector"),
          "teacher": Cost(2.0 * model.num_heads * model.head_dim * visible, gradient=False, causal=True)}
