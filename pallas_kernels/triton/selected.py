"""`selected_attention` of `pallas_kernels.api` for Ampere and later, and for decoding.

On Hopper the kernels of mosaic_gpu/ are faster wherever there are many queries; for one token these are, because
nothing is sorted and the slots of a token are split over programs.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import lists as entry_lists, spans
from pallas_kernels.triton import call, kl, ranged, selected_kernels, tuning

MAX_BLOCK = 64 * 256  # numbers of a block of keys: dK and dV of it are sums in registers


def supports_selected_attention(*, q, k, v, block_indices, block_size, scale, **_):
  reason = ranged.reasons(q, k, v, scale)
  if reason:
    return reason
  if block_size not in (16, 32, 64, 128):
    return f"block_size = {block_size}: the kernels take 16, 32, 64, 128"
  if block_size * q.shape[3] > MAX_BLOCK:
    return (f"q has head dim {q.shape[3]}: with block_size = {block_size} the kernels take up to "
            f"{MAX_BLOCK // block_size}")
  plan = _plan(q, k, block_indices.shape[3], block_size)
  if plan.max_tiles * entry_lists.TILE_ROWS >= 2 ** 31 or plan.lists >= 2 ** 31:
    return f"block_indices {block_indices.shape} has more entries than int32 counts"
  return None


def selected_attention(q, k, v, block_indices, *, block_size, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.selected_attention`."""
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (q.shape[0],))
  how = (block_size, float(scale), "ieee" if q.dtype == jnp.float32 else "tf32")
  return _attend(q, k, v, (block_indices, segment_ids, offset), how)


def _plan(q, k, J, block_size):
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  GP = call.next_power_of_2(N // K)
  range_size = max(kl.RANGE_BYTES // (GP * H * 2), 8 * (64 // GP) * -(-S // block_size) // J, 1)
  return entry_lists.Plan(B, T, S, K, GP, J, block_size, min(range_size, T), tiles_per_unit=32)


def _constants(q, k, how, kernel):
  (N, H), (S, K) = q.shape[2:], k.shape[1:3]
  block_size, scale, precision = how
  tuned = tuning.get(kernel, head_dim=H, dtype=q.dtype)
  return dict(S=S, K=K, G=N // K, GP=call.next_power_of_2(N // K), H=H, SIZE=block_size, SCALE=scale * call.LOG2E,
              PRECISION=precision, num_warps=tuned.warps, num_stages=tuned.stages)


def _slots(q, k, rest, how):
  """Block indices with each block once, and the keys that each token sees: what forward and dQ read."""
  block_indices, segment_ids, offset = rest
  once = entry_lists.chosen(block_indices, -(-k.shape[1] // how[0]))
  seen = spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, offset)
  return jnp.where(once, block_indices, -1).astype(jnp.int32), *seen


def _per_token(constants):
  return dict(constants, GP=max(constants["GP"], ranged.MIN_ROWS))


def _forward(q, k, v, rest, how):
  B, T, N, H = q.shape
  K, J = k.shape[2], rest[0].shape[3]
  items = B * T * K
  splits = max(1, min(2 * call.processors() // items, J))
  if T == 1:  # decoding is made of launches: the kernel itself looks for blocks that stand twice
    slots, JP = (rest[0].astype(jnp.int32), *spans.visible_keys(B, T, k.shape[1], *rest[1:])), call.next_power_of_2(J)
  else:
    slots, JP = _slots(q, k, rest, how), 0
  o, lse = call.kernel_call(
      selected_kernels.forward_kernel, (q, k, v, *slots),
      [jax.ShapeDtypeStruct((splits, B, T, N, H), q.dtype if splits == 1 else jnp.float32),
       jax.ShapeDtypeStruct((splits, B, T, N), jnp.float32)],
      grid=(items * splits,), name="selected_attention_forward", ITEMS=items, T=T, J=J, SPLITS=splits, JP=JP,
      **_per_token(_constants(q, k, how, "selected_decode" if T == 1 else "selected_forward")))
  return (o[0], lse[0]) if splits == 1 else ranged.combine(o, lse, q.dtype)


def _backward(q, k, v, rest, o, lse, do, dlse, how):
  B, T, N, H = q.shape
  K, J = k.shape[2], rest[0].shape[3]
  do = do.astype(q.dtype)
  delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
  seen = lse > -jnp.inf
  delta, lse = jnp.where(seen, delta, 0.0), jnp.where(seen, lse * call.LOG2E, 0.0)
  constants = _constants(q, k, how, "selected_forward")
  dq = call.kernel_call(
      selected_kernels.dq_kernel, (q, k, v, do, lse, delta, *_slots(q, k, rest, how)),
      jax.ShapeDtypeStruct(q.shape, q.dtype), grid=(B * T * K,), name="selected_attention_dq", T=T, J=J,
      FACTOR=how[1], **_per_token(constants))
  plan = _plan(q, k, J, how[0])
  block_indices, segment_ids, offset = rest
  entries = entry_lists.invert(block_indices, plan, segment_ids, offset)
  parts = jax.ShapeDtypeStruct((plan.max_units, how[0], H), jnp.float32)
  constants = _constants(q, k, how, "selected_dkv")
  if how[0] * H > 64 * 64:  # two float32 accumulators of this size
    constants["num_warps"] = max(constants["num_warps"], 8)
  if H > 128:
    constants["num_stages"] = 1
  dk, dv = call.kernel_call(
      selected_kernels.dkv_kernel, (q, k, v, do, lse, delta, entries.rows, entries.spans, entries.units),
      [parts, parts], grid=(plan.max_units,), name="selected_attention_dkv", FACTOR=how[1],
      TOKENS=plan.tile_tokens, **constants)

  dk, dv = kl.sum_keys(dk[:, None], dv[:, None], entries.unit_start, plan, k.dtype)
  return dq, dk, dv


_attend = call.differentiable(_forward, _backward)
