"""Attention over any set of tokens per query: what is seen, a softmax over it, its probabilities, a KL against them.

Plain jnp and float32; the one truth of the reference and of methods whose scores no operation computes. Letters as in
`pallas_kernels.api`; scores lie [B, K, G, T, S] and sets of tokens [B, K or 1, T, S]. A row that sees nothing gives
o = 0, lse = -inf, probabilities and losses of 0 and no gradient: masked scores are -inf but are only ever compared with
a finite row maximum, so no inf - inf and no 0 * inf arises, forward or backward.
"""
from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_SCORES = 2 ** 25  # float32 scores of an array at a time (128 MiB); more go through in chunks of queries


def einsum(spec: str, x, y):
  """float32, whatever the operands are, and exact in it: HIGHEST, or an accelerator multiplies in TF32 or bfloat16."""
  return jnp.einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32), precision=lax.Precision.HIGHEST,
                    preferred_element_type=jnp.float32)


# --- sets of tokens ---------------------------------------------------------------


def visible_tokens(position: Int[Array, "B T"], segments: Int[Array, "B T"] | None, keys: slice,
                   segment_ids: Int[Array, "B all"] | None, *, causal: bool = True,
                   window: int | None = None) -> Bool[Array, "B T S"]:
  """Which tokens of the slice `keys` each query may see; padded queries, at position -1, none.

  Args:
    position: of the queries, absolute; the first axis may be 1.
    segments: the queries' segments; None without any.
    segment_ids: those of all tokens.
    window: tokens a query sees, its own included.
  """
  tokens = jnp.arange(keys.start, keys.stop, dtype=jnp.int32)
  position = position[:, :, None]
  mask = tokens <= position if causal else jnp.broadcast_to(position >= 0, position.shape[:2] + tokens.shape)
  if window is not None:
    mask &= tokens > position - window
  if segments is not None and segment_ids is not None:
    mask &= segments[:, :, None] == segment_ids[:, None, keys]
  return mask


def selected_tokens(block_indices: Int[Array, "B T K J"], block_size: int, keys: int) -> Bool[Array, "B K T S"]:
  """The tokens, of the first `keys`, that lie in each query's selected blocks; -1 selects none."""
  B, T, K, _ = block_indices.shape
  blocks = -(-keys // block_size)
  at = jnp.where(block_indices < 0, blocks, block_indices)  # a scatter drops what lies past the end
  b, t, r = (jnp.arange(n).reshape([-1 if a == axis else 1 for a in range(4)]) for axis, n in enumerate((B, T, K)))
  chosen = jnp.zeros((B, K, T, blocks), bool).at[b, r, t, at].set(True, mode="drop")
  if block_size == 1:
    return chosen
  size = min(block_size, keys)
  return jnp.broadcast_to(chosen[..., None], (*chosen.shape, size)).reshape(B, K, T, blocks * size)[..., :keys]


def packed(mask: Bool[Array, "... S"]) -> Int[Array, "... words"]:
  """int32[..., ceil(S / 32)] of sets of tokens: bit s % 32 of word s // 32 says whether token s is in it."""
  bits = by_block(mask, 32, False).astype(jnp.uint32)
  bits = bits << jnp.arange(bits.shape[-1], dtype=jnp.uint32)
  return lax.bitcast_convert_type(bits.sum(axis=-1, dtype=jnp.uint32), jnp.int32)


def unpacked(sets: Int[Array, "... words"], keys: int) -> Bool[Array, "... S"]:
  """The inverse of `packed`, of so many keys."""
  bits = (sets[..., None] >> jnp.arange(32, dtype=jnp.int32)) & 1
  return bits.reshape(sets.shape[:-1] + (-1,))[..., :keys] != 0


def membership(block_indices: Int[Array, "B T K J"], blocks: int) -> Bool[Array, "B T K blocks"]:
  """The index lists as bool sets; -1 belongs to none."""
  return jnp.any(block_indices[..., None] == jnp.arange(blocks), axis=-2)


def by_block(x: Array, block_size: int, fill) -> Array:
  """[..., S] -> [..., blocks, block_size], the last block padded with `fill`; [..., 1, S] where one block holds all."""
  S = x.shape[-1]
  blocks = -(-S // block_size)
  if blocks == 1:
    return x[..., None, :]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block_size - S)], constant_values=fill)
  return x.reshape(x.shape[:-1] + (blocks, block_size))


def weighted_scores(q_idx: Float[Array, "B T R HI dI"], weights: Float[Array, "B T R HI"],
                    k_idx: Float[Array, "B S dI"]) -> Float[Array, "B R T S"]:
  """The sum over index heads of weights * relu(<q_idx, k_idx>)."""
  dots = einsum("btrjd,bsd->brtjs", q_idx, k_idx)
  return jnp.sum(weights.astype(jnp.float32).swapaxes(1, 2)[..., None] * jax.nn.relu(dots), axis=3)


# --- softmax over them ------------------------------------------------------------


def scores(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], scale) -> Float[Array, "B K G T S"]:
  """scale * <q, k>."""
  B, T, N, H = q.shape
  K = k.shape[2]
  # The small operands are transposed, so that the products come out in their final order.
  q = (q.astype(jnp.float32) * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  return einsum("bkgth,bksh->bkgts", q, k.transpose(0, 2, 1, 3))


def exponentials(s: Float[Array, "... S"], mask: Bool[Array, "... S"]) -> tuple[Array, Array]:
  """exp(s - top) within the mask, 0 outside, and top[..., 1], each row's maximum (0 where nothing is seen)."""
  s = jnp.where(mask, s, -jnp.inf)
  top = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf))
  top = jnp.where(top > -jnp.inf, top, 0.0)
  return jnp.exp(s - top), top


def softmax(s: Float[Array, "... S"], mask: Bool[Array, "... S"]) -> Float[Array, "... S"]:
  """Softmax over the last axis within the mask."""
  p, _ = exponentials(s, mask)
  total = p.sum(axis=-1, keepdims=True)
  return p / jnp.where(total > 0, total, 1.0)


def attend(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
           mask: Bool[Array, "B R T S"], scale) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Softmax attention over sets of tokens, of each KV head or (R = 1) of all: o in q.dtype and lse float32."""
  B, T, N, H = q.shape
  p, top = exponentials(scores(q, k, scale), mask[:, :, None])
  total = p.sum(axis=-1)
  seen = total > 0
  safe = jnp.where(seen, total, 1.0)
  lse = jnp.where(seen, top[..., 0] + jnp.log(safe), -jnp.inf)  # [B, K, G, T]
  o = einsum("bkgts,bksh->bkgth", p, v.transpose(0, 2, 1, 3)) / safe[..., None]
  o = o.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)
  return o, lse.transpose(0, 3, 1, 2).reshape(B, T, N)


def probabilities(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"],
                  mask: Bool[Array, "B R T S"], scale) -> Float[Array, "B K G T S"]:
  """exp(score - lse) within the mask; 0 outside and in rows with lse = -inf."""
  B, T, N = lse.shape
  K = k.shape[2]
  lse = lse.astype(jnp.float32).reshape(B, T, K, N // K).transpose(0, 2, 3, 1)[..., None]
  seen = lse > -jnp.inf
  s = jnp.where(mask[:, :, None] & seen, scores(q, k, scale), -jnp.inf)
  return jnp.exp(s - jnp.where(seen, lse, 0.0))


def kl(target: Float[Array, "... S"], s: Float[Array, "... S"], mask: Bool[Array, "... S"]) -> Float[Array, "..."]:
  """KL(target / sum(target) || softmax(s)) within the mask, in nats; 0 where the target is nought.

  `target` is 0 outside the mask and a constant; the gradient with respect to s is softmax(s) - target / sum(target).
  """
  total = target.sum(axis=-1, keepdims=True)
  some = total > 0
  target = target / jnp.where(some, total, 1.0)
  p, top = exponentials(s, mask & some)
  total = p.sum(axis=-1)
  log_total = jnp.log(jnp.where(total > 0, total, 1.0))
  # -inf * 0 is NaN: the scores outside the set leave the sum before they meet their zero weight.
  cross = jnp.where(mask & some, s - top, 0.0)
  entropy = jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1.0)), 0.0)
  return (entropy - target * cross).sum(axis=-1) + log_total


# --- by chunks of queries ---------------------------------------------------------


def in_chunks(f, chunk: int, *xs):
  """f(*xs) by chunks of at most `chunk` queries, axis 1 of each x and result, recomputed in the backward pass.

  So memory grows with T and S, not with T * S. Rows that fill the last chunk are 0, or -1 in integers (a position that
  sees nothing), and are cut off. xs are arrays [B, T, ...] or None.
  """
  T = next(x.shape[1] for x in xs if x is not None)
  n = -(-T // chunk)
  if n <= 1:
    return jax.checkpoint(f)(*xs)
  chunk = -(-T // n)

  def split(x):
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    x = jnp.pad(x, [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape((x.shape[0], n, chunk) + x.shape[2:]), 1, 0)

  def join(y):
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape((y.shape[0], n * chunk) + y.shape[3:])[:, :T]

  step = jax.checkpoint(f, prevent_cse=False)  # a scan's body is not merged with its recomputation anyway
  return jax.tree.map(join, lax.map(lambda xs: step(*xs), jax.tree.map(split, xs)))
