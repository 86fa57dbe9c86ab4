"""`lightning_scores` and `lightning_kl` of `pallas_kernels.api`: index heads that a ReLU and weights add up.

The KL's forward pass leaves two numbers per query and set. The backward pass makes the gradient of the index scores
once, for as many queries as `DS_BYTES` hold of it, and reads it for each index head and for the keys: P, whose products
are most of the work, is made twice in all. Over selected blocks kernels leave out what no query of a tile chose. Sums
go in a fixed order: equal inputs give equal bits.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import backends, lists, masked, spans
from pallas_kernels.triton import call, kl, lightning_kernels as kernels, ranged, tuning

BLOCK_SIZES = (16, 32, 64, 128)
DS_BYTES = 2 ** 30  # of the gradient of the index scores alive at a time


def index_reasons(q_idx, k_idx):
  B, T, R, heads, HI = q_idx.shape
  one = jax.ShapeDtypeStruct((B, T, R, HI), q_idx.dtype)
  reason = ranged.reasons(one, one)
  if reason:
    return reason.replace("q has", "q_idx has").replace("q.dtype", "q_idx.dtype")
  if k_idx.dtype != q_idx.dtype:
    return f"k_idx.dtype = {k_idx.dtype}: the kernels need that of q_idx, {q_idx.dtype}"
  if HI > 128:
    return f"q_idx has head dim {HI}: the kernels take up to 128"
  if k_idx.shape[1] == 0 or heads == 0:
    return f"q_idx {q_idx.shape} or k_idx {k_idx.shape} is empty"
  return None


def supports_lightning_scores(*, q_idx, k_idx, block_size, **_):
  if block_size not in BLOCK_SIZES:
    return f"block_size = {block_size}: the kernels take {', '.join(map(str, BLOCK_SIZES))}"
  return index_reasons(q_idx, k_idx)


def supports_lightning_kl(*, q, k, q_idx, k_idx, block_indices, block_size, scale, **_):
  reason = ranged.reasons(q, k, None, scale) or index_reasons(q_idx, k_idx)
  if reason:
    return reason
  if q.dtype == jnp.float16:
    return "q.dtype = float16: gradients of the index scores would underflow; the kernels take bfloat16"
  if q_idx.dtype != q.dtype:
    return f"q_idx.dtype = {q_idx.dtype}: the kernels need that of q, {q.dtype}"
  if q.shape[3] > 128:
    return f"q has head dim {q.shape[3]}: the kernels take up to 128"
  if block_indices is None:
    return None
  if block_size not in BLOCK_SIZES:
    return f"block_size = {block_size}: the kernels take {', '.join(map(str, BLOCK_SIZES))}"
  if block_indices.shape[2] != q_idx.shape[2]:
    return (f"block_indices {block_indices.shape} has a set for each KV head, q_idx {q_idx.shape} one for all: the "
            "kernels take equally many")
  return None


def index_constants(q_idx, k_idx, block):
  """Of kernels over index heads; `block` of the tuned one is theirs."""
  B, T, R, heads, HI = q_idx.shape
  tuned = tuning.get("lightning", head_dim=HI, dtype=q_idx.dtype)
  rows = max(ranged.MIN_ROWS, min(tuned.rows, call.next_power_of_2(T)))
  precision = "ieee" if q_idx.dtype == jnp.float32 else "tf32"
  return dict(B=B, T=T, S=k_idx.shape[1], R=R, HEADS=heads, HI=HI, TOKENS=rows, BLOCK=block(tuned.block),
              PRECISION=precision, num_warps=tuned.warps, num_stages=tuned.stages)


# --- scores ---


def lightning_scores(q_idx, index_weights, k_idx, *, block_size, segment_ids, query_offset):
  """See `pallas_kernels.api.lightning_scores`."""
  low, high = spans.visible_keys(*q_idx.shape[:2], k_idx.shape[1], segment_ids, query_offset)
  return call.batched(functools.partial(_scores, block_size=block_size))(q_idx, index_weights, k_idx, low, high)


def _scores(q_idx, weights, k_idx, low, high, *, block_size):
  constants = index_constants(q_idx, k_idx, lambda block: max(block, block_size))
  (B, T, R), blocks = q_idx.shape[:3], -(-k_idx.shape[1] // block_size)
  items = B * R * -(-T // constants["TOKENS"])
  splits = max(1, min(4 * call.processors() // items, k_idx.shape[1] // (2 * constants["BLOCK"])))  # few in decoding
  return call.kernel_call(
      kernels.lightning_scores_kernel, (q_idx, weights, k_idx, low, high),
      jax.ShapeDtypeStruct((B, T, R, blocks), jnp.float32), grid=(items * splits,), name="lightning_scores",
      SIZE=block_size, BLOCKS=blocks, SPLITS=splits, **constants)


# --- KL ---


def lightning_kl(q, k, lse, q_idx, index_weights, k_idx, block_indices, *, token_sets=None, block_size, scale,
                 segment_ids, query_offset):
  """See `pallas_kernels.api.lightning_kl`."""
  low, high = spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, query_offset)
  chosen = token_sets
  if block_indices is not None:
    chosen = masked.membership(block_indices, -(-k.shape[1] // block_size)).astype(jnp.int8)
  rest = q, lse.astype(jnp.float32), low, high, chosen, k
  return _lightning_kl(q_idx, index_weights, k_idx, rest, (block_size if token_sets is None else 1, float(scale)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lightning_kl(q_idx, weights, k_idx, rest, how):
  return call.batched(functools.partial(_losses, how=how))(q_idx, weights, k_idx, rest)[0]


def _forward(q_idx, weights, k_idx, rest, how):
  loss, *saved = call.batched(functools.partial(_losses, how=how))(q_idx, weights, k_idx, rest)
  return loss, (q_idx, weights, k_idx, rest, backends.attended(saved))


def _backward(how, residuals, dloss):
  q_idx, weights, k_idx, rest, saved = residuals
  gradients = call.batched(functools.partial(_gradients, how=how))(q_idx, weights, k_idx, rest, saved, dloss)
  return *gradients, backends.no_gradient(rest)


_lightning_kl.defvjp(_forward, _backward)


def _kl_constants(q_idx, k_idx, how, selected):
  block = lambda tuned: tuned if not selected else max(tuned, 32) if how[0] == 1 else min(tuned, how[0])
  return dict(index_constants(q_idx, k_idx, block), SIZE=how[0], SELECTED=selected)


def _of_targets(q, k, scale):
  (N, H), K = q.shape[2:], k.shape[2]
  return dict(K=K, G=N // K, H=H, SCALE=scale * call.LOG2E)


def _losses(q_idx, weights, k_idx, rest, *, how):
  """loss, index lse, 1 / sum of P: float32[B, T, R]."""
  q, lse, low, high, chosen, k = rest
  constants = _kl_constants(q_idx, k_idx, how, chosen is not None)
  B, T, R = q_idx.shape[:3]
  chosen = low if chosen is None else chosen
  top, norm, total, entropy, cross = call.kernel_call(
      kernels.lightning_forward_kernel, (q, k, lse, q_idx, weights, k_idx, low, high, chosen),
      jax.ShapeDtypeStruct((5, B, T, R), jnp.float32), grid=(B * R * -(-T // constants["TOKENS"]),),
      name="lightning_kl_forward", **constants, **_of_targets(q, k, how[1]))
  index_lse = jnp.where(norm > 0, top + jnp.log(jnp.where(norm > 0, norm, 1.0)), -jnp.inf)
  return kl.loss_of(total, entropy, cross, index_lse)


def _gradients(q_idx, weights, k_idx, rest, saved, dloss, *, how):
  """Those of q_idx, weights and k_idx, by slices of the queries."""
  *queries, k = rest
  index_lse, factor = saved
  dloss = jnp.where(factor > 0, dloss, 0.0)
  B, T, R = q_idx.shape[:3]
  slices, _ = lists.slices_of(T, B * R * k.shape[1] * q_idx.dtype.itemsize, DS_BYTES)

  def one(q_idx, weights, q, lse, low, high, chosen, index_lse, factor, dloss, first):
    del first
    T, S = q_idx.shape[1], k.shape[1]
    low, high = (jnp.where(x < 0, S, x) for x in (low, high))  # padding sees nothing, and order stays
    constants = _kl_constants(q_idx, k_idx, how, chosen is not None)
    tiles, chosen = B * R * -(-T // constants["TOKENS"]), low if chosen is None else chosen
    ds = call.kernel_call(
        kernels.lightning_ds_kernel, (q, k, lse, q_idx, weights, k_idx, low, high, chosen, index_lse, factor, dloss),
        jax.ShapeDtypeStruct((B, R, T, S), q_idx.dtype), grid=(tiles,), name="lightning_kl_ds", **constants,
        **_of_targets(q, k, how[1]))
    dq, dweights = call.kernel_call(
        kernels.lightning_dq_kernel, (q_idx, weights, k_idx, low, high, chosen, ds),
        [jax.ShapeDtypeStruct(q_idx.shape, q_idx.dtype), jax.ShapeDtypeStruct(weights.shape, jnp.float32)],
        grid=(tiles * q_idx.shape[3],), name="lightning_kl_dq", **constants)
    block = constants["BLOCK"]
    ranges = ranged.who_sees(low, high, S, block)
    dk = call.kernel_call(
        kernels.lightning_dk_kernel, (q_idx, weights, k_idx, low, high, ranges, chosen, ds),
        jax.ShapeDtypeStruct((B, R, S, q_idx.shape[4]), jnp.float32), grid=(B * R * -(-S // block),),
        name="lightning_kl_dk", **constants)
    return (dq, dweights.astype(weights.dtype)), None, dk

  (dq, dweights), _, dk = lists.in_slices(one, slices, (q_idx, weights, *queries, index_lse, factor, dloss))
  return dq, dweights, dk.sum(axis=1).astype(k_idx.dtype)
