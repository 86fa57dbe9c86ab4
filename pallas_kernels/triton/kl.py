"""`index_kl` of `pallas_kernels.api`: over selected blocks by the inverse of the selection, over all tokens by tiles.

Over selected blocks the forward pass leaves five numbers per entry of the selection, the backward pass one row of
dq_idx. P, which costs G products of H numbers where an index score costs one, is kept for the backward pass up to
`KEPT_BYTES` of it (with 64/4 heads of 128 and 16 blocks of 128 as much as q) and made again beyond. Sums go in a fixed
order: equal inputs give equal bits.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lists as entry_lists, spans
from pallas_kernels.triton import call, invert, kl_kernels, ranged, tuning

BLOCK_SIZES = (16, 32, 64, 128)
RANGE_BYTES = 16 * 2 ** 20  # of Q of one KV head: what one range of queries takes of the L2 cache
KEPT_BYTES = 2 * 2 ** 30    # of P, from the forward to the backward pass of one call


def supports_index_kl(*, q, k, q_idx, k_idx, block_indices, block_size, scale, index_scale, **_):
  reason = ranged.reasons(q, k, None, scale) or ranged.reasons(q_idx, q_idx, None, index_scale)
  if reason:
    return reason
  if q.dtype == jnp.float16:
    return "q.dtype = float16: gradients of the index scores would underflow; the kernels take bfloat16"
  if q_idx.dtype != q.dtype or k_idx.dtype != q.dtype:
    return f"q_idx.dtype, k_idx.dtype = {q_idx.dtype}, {k_idx.dtype}: the kernels need that of q, {q.dtype}"
  if max(q.shape[3], q_idx.shape[3]) > 128:
    return f"q, q_idx have head dims {q.shape[3]}, {q_idx.shape[3]}: the kernels take up to 128"
  if block_indices is None:
    return None
  if block_size not in BLOCK_SIZES:
    return f"block_size = {block_size}: the kernels take {', '.join(map(str, BLOCK_SIZES))}"
  if call.small_memory() and block_size * max(q.shape[3], q_idx.shape[3]) > 64 * 128:
    return f"block_size = {block_size}: with these head dims the kernels need more shared memory than there is"
  plan = _plan(q, k, block_indices.shape[3], block_size, 64)
  if plan.max_tiles * 64 >= 2 ** 31 or plan.lists >= 2 ** 31:
    return f"block_indices {block_indices.shape} has more entries than int32 counts"
  return None


def index_kl(q, k, lse, q_idx, k_idx, block_indices, *, block_size, scale, index_scale, segment_ids, query_offset):
  """See `pallas_kernels.api.index_kl`."""
  how = (block_size, float(scale), float(index_scale), "ieee" if q.dtype == jnp.float32 else "tf32")
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (q.shape[0],))
  return _index_kl(q_idx, k_idx, (q, k, lse.astype(jnp.float32), block_indices, segment_ids, offset), how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _index_kl(q_idx, k_idx, rest, how):
  return call.batched(functools.partial(_losses, how=how, keep=False))(q_idx, k_idx, rest)[0]


def _forward(q_idx, k_idx, rest, how):
  loss, *saved, targets = call.batched(functools.partial(_losses, how=how, keep=True))(q_idx, k_idx, rest)
  return loss, (q_idx, k_idx, rest, saved, targets)


def _backward(how, residuals, dloss):
  gradients = call.batched(functools.partial(_gradients, how=how), laid_out=(4,))
  q_idx, k_idx, rest, saved, targets = residuals
  dq, dk = gradients(q_idx, k_idx, rest, saved, targets, dloss)
  nothing = lambda x: (np.zeros(x.shape, jax.dtypes.float0) if jnp.issubdtype(x.dtype, jnp.integer)
                       else jnp.zeros_like(x))
  return dq, dk, jax.tree.map(nothing, rest)


_index_kl.defvjp(_forward, _backward)


def _plan(q, k, J, block_size, tokens):
  """Lists of tokens per block; heads go one after the other, so a tile's rows are tokens: a group of 1."""
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  range_size = max(RANGE_BYTES // (N // K * H * 2), 8 * tokens * -(-S // block_size) // J, 1)
  return entry_lists.Plan(B, T, S, K, 1, J, block_size, min(range_size, T), tiles_per_unit=16)


def _constants(q, k, q_idx, how, tuned):
  (_, _, N, H), (S, K) = q.shape, k.shape[1:3]
  _, scale, index_scale, precision = how
  return dict(S=S, K=K, G=N // K, H=H, HI=q_idx.shape[3], SCALE=scale * call.LOG2E, INDEX_SCALE=index_scale,
              PRECISION=precision, num_warps=tuned.warps, num_stages=tuned.stages)


def _losses(q_idx, k_idx, rest, *, how, keep):
  """loss, index lse, 1 / sum of P: float32[B, T, K]; over all tokens dq_idx for a loss of weight 1, else None; P by
  entry [B, places / B, block size] if it is to be kept, there are blocks and it is not too large, else None."""
  q, k, lse, block_indices, segment_ids, offset = rest
  tuned = tuning.get("index_kl", head_dim=q.shape[3], dtype=q.dtype)
  constants = _constants(q, k, q_idx, how, tuned)
  dq = targets = None
  if block_indices is None:
    B, T, K, HI = q_idx.shape
    moments, dq = call.kernel_call(
        kl_kernels.dense_forward_kernel,
        (q, k, lse, q_idx, k_idx, *spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, offset)),
        [jax.ShapeDtypeStruct((5, B, T, K), jnp.float32), jax.ShapeDtypeStruct((B, T, K, HI), jnp.float32)],
        grid=(B * K * -(-T // tuned.rows),), name="index_kl_dense_forward", B=B, T=T, TOKENS=tuned.rows,
        BLOCK=tuned.block, **constants)
    top, norm, total, entropy, cross = moments
    index_lse = jnp.where(norm > 0, top + jnp.log(jnp.where(norm > 0, norm, 1.0)), -jnp.inf)
  else:
    plan = _plan(q, k, block_indices.shape[3], how[0], entry_lists.TILE_ROWS)
    entries = _invert(block_indices, plan, segment_ids, offset)
    places = plan.max_tiles * entry_lists.TILE_ROWS
    keep = keep and places * how[0] * q.dtype.itemsize <= KEPT_BYTES
    moments, kept = call.kernel_call(
        kl_kernels.selected_forward_kernel, (q, k, lse, q_idx, k_idx, entries.rows, entries.spans, entries.units),
        [jax.ShapeDtypeStruct((5, places), jnp.float32), _kept(q, places if keep else 1, how[0])],
        grid=(plan.max_units,), name="index_kl_forward", PLACES=places, SIZE=how[0], TOKENS=entry_lists.TILE_ROWS,
        KEEP=keep, **constants)
    targets = kept if keep else None
    used = entries.position >= 0
    top, norm, total, entropy, cross = (moments[n][entries.position] for n in range(5))
    peak = jnp.where(used, top, -jnp.inf).max(axis=-1)
    norm = jnp.where(used, norm * jnp.exp(top - peak[..., None]), 0.0).sum(axis=-1)
    total, entropy, cross = (jnp.where(used, x, 0.0).sum(axis=-1) for x in (total, entropy, cross))
    index_lse = jnp.where(norm > 0, peak + jnp.log(jnp.where(norm > 0, norm, 1.0)), -jnp.inf)
  seen = total > 0
  safe = jnp.where(seen, total, 1.0)
  loss = (entropy - cross) / safe - jnp.log(safe) + index_lse
  return jnp.where(seen, loss, 0.0), index_lse, jnp.where(seen, 1.0 / safe, 0.0), dq, targets


def _invert(block_indices, plan, segment_ids, offset):
  use = invert if invert.supports(plan) is None else entry_lists
  return use.invert(block_indices, plan, segment_ids, offset)


def _kept(q, places, block_size):
  """P by entry; a first axis of B, as `call.batched` wants it."""
  return jax.ShapeDtypeStruct((q.shape[0], -(-places // q.shape[0]), block_size), q.dtype)


def _gradients(q_idx, k_idx, rest, saved, targets, dloss, *, how):
  q, k, lse, block_indices, segment_ids, offset = rest
  index_lse, factor, dq = saved
  B, T, K, HI = q_idx.shape
  tuned = tuning.get("index_kl", head_dim=q.shape[3], dtype=q.dtype)
  constants = _constants(q, k, q_idx, how, tuned)
  dloss = jnp.where(factor > 0, dloss, 0.0)
  weight = dloss * how[2]
  inputs = (q, k, lse, q_idx, k_idx, index_lse, factor, weight)
  if block_indices is None:
    low, high = spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, offset)
    S = k.shape[1]
    dk = call.kernel_call(
        kl_kernels.dense_dk_kernel, (*inputs, low, high, ranged.who_sees(low, high, S, tuned.block)),
        jax.ShapeDtypeStruct((B, K, S, HI), jnp.float32), grid=(B * K * -(-S // tuned.block),),
        name="index_kl_dense_dk", B=B, T=T, TOKENS=tuned.rows, BLOCK=tuned.block, **constants)
    return (dq * dloss[..., None]).astype(q_idx.dtype), dk.sum(axis=1).astype(k_idx.dtype)
  plan = _plan(q, k, block_indices.shape[3], how[0], entry_lists.TILE_ROWS)
  entries = _invert(block_indices, plan, segment_ids, offset)
  places = plan.max_tiles * entry_lists.TILE_ROWS
  kept = targets is not None
  targets = targets if kept else jnp.zeros_like(_kept(q, 1, how[0]))
  dq, dk = call.kernel_call(
      kl_kernels.selected_backward_kernel, (*inputs, entries.rows, entries.spans, entries.units, targets),
      [jax.ShapeDtypeStruct((places, HI), q_idx.dtype),
       jax.ShapeDtypeStruct((plan.max_units, how[0], HI), jnp.float32)],
      grid=(plan.max_units,), name="index_kl_backward", SIZE=how[0], TOKENS=entry_lists.TILE_ROWS, KEPT=kept,
      **constants)
  dq = jnp.where(entries.position[..., None] >= 0, dq[entries.position], 0).astype(jnp.float32).sum(axis=-2)
  dk = sum_units(dk, entries.unit_start, plan, heads=K)
  dk = dk.reshape(B, -1, HI)[:, :k.shape[1]]
  return dq.astype(q_idx.dtype), dk.astype(k_idx.dtype)


def sum_units(parts, unit_start, plan, heads):
  """float32[B, K / heads, blocks, ...] from float32[units, ...]; `heads` KV heads are summed into one."""
  size = int(np.prod(parts.shape[1:]))
  chunk = min(1024, call.next_power_of_2(size))
  shape = (plan.batch, plan.kv_heads // heads, plan.blocks, *parts.shape[1:])
  return call.kernel_call(
      kl_kernels.sum_units_kernel, (parts, unit_start), jax.ShapeDtypeStruct(shape, jnp.float32),
      grid=(shape[0] * shape[1] * plan.blocks * -(-size // chunk),), name="sum_units", num_warps=4, K=plan.kv_heads,
      RANGES=plan.ranges, BLOCKS=plan.blocks, HEADS=heads, SIZE=size, CHUNK=chunk)
