"""`index_kl` of `pallas_kernels.api`: over selected blocks by the inverse of the selection, over all tokens by tiles.

Over selected blocks the forward pass leaves five numbers per entry of the selection, the backward pass one row of
dq_idx. P, which costs G products of H numbers where an index score costs one, is kept for the backward pass up to
`KEPT_BYTES` of it (with 64/4 heads of 128 and 16 blocks of 128 as much as q) and made again beyond, and under a remat,
which would make all else again with it. What entries have takes J times as much as q_idx; above `SLICE_BYTES` the
queries go through in slices, one after the other. Sums go in a fixed order: equal inputs give equal bits.
"""
from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends, lists as entry_lists, spans
from pallas_kernels.triton import call, invert, kl_kernels, ranged, tuning

BLOCK_SIZES = (16, 32, 64, 128)
RANGE_BYTES = 16 * 2 ** 20  # of Q of one KV head: what one range of queries takes of the L2 cache
# Of P, from the forward to the backward pass of one call: 4.5 GiB at 262,144 tokens, where making it again costs 23 of
# 369 ms, forward + backward, of the layer on one H200.
KEPT_BYTES = 5 * 2 ** 30
COUNTED = 2 ** 31  # numbers of q and of q_idx, by 32 bits
MAX_GROUP = 16  # of lists for attention: tiles hold a group whole
MERGED_ROWS = 32  # (token, KV head)s whose moments one program adds up
GATHERED_ROWS = 16  # whose rows of dq_idx one program adds up
SUMMED_COLUMNS = 32  # of dK and dV that one program adds up
SLICE_BYTES = 4 * 2 ** 30   # of P and dq_idx by entry that are alive at a time


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
  plan, _ = _plan(q, k, q_idx, block_indices, block_size)
  if plan.max_tiles * entry_lists.TILE_ROWS >= 2 ** 31 or plan.lists >= 2 ** 31:
    return f"block_indices {block_indices.shape} has more entries per slice of queries than int32 counts"
  return None


def index_kl(q, k, lse, q_idx, k_idx, block_indices, *, block_size, scale, index_scale, segment_ids, query_offset):
  """See `pallas_kernels.api.index_kl`."""
  how = (block_size, float(scale), float(index_scale), "ieee" if q.dtype == jnp.float32 else "tf32")
  keep = not backends.is_recomputed()
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (q.shape[0],))
  return _index_kl(q_idx, k_idx, (q, k, lse.astype(jnp.float32), block_indices, segment_ids, offset), how, keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _index_kl(q_idx, k_idx, rest, how, keep):
  del keep
  return call.batched(functools.partial(_losses, how=how, keep=False))(q_idx, k_idx, rest)[0]


def _forward(q_idx, k_idx, rest, how, keep):
  loss, *saved, targets = call.batched(functools.partial(_losses, how=how, keep=keep))(q_idx, k_idx, rest)
  return loss, (q_idx, k_idx, rest, backends.attended(saved), targets)


def _backward(how, keep, residuals, dloss):
  del keep
  gradients = call.batched(functools.partial(_gradients, how=how), laid_out=(4,))
  q_idx, k_idx, rest, saved, targets = residuals
  dq, dk = gradients(q_idx, k_idx, rest, saved, targets, dloss)
  return dq, dk, backends.no_gradient(rest)


_index_kl.defvjp(_forward, _backward)


def _plan(q, k, q_idx, block_indices, block_size):
  """Lists of tokens per block of a slice of the queries, and how many slices there are. Heads are no rows here, so a
  tile of 64 rows would be 64 tokens, a group of 1; but where all queries are one range of selected attention, its lists
  serve here too and are made once."""
  (B, T, N, H), (S, K), J = q.shape, k.shape[1:3], block_indices.shape[3]
  per_query = B * K * J * (block_size + q_idx.shape[3]) * q.dtype.itemsize
  slices, size = entry_lists.slices_of(T, per_query, SLICE_BYTES)
  if slices == 1 and N // K <= MAX_GROUP:
    of_attention = entry_lists.plan_of(B, T, S, K, N // K, J, H, block_size, entry_lists.BACKWARD_TILES)
    if of_attention.range_size == T:
      return of_attention, 1
  range_size = max(RANGE_BYTES // (N // K * H * 2), 8 * entry_lists.TILE_ROWS * -(-S // block_size) // J, 1)
  return entry_lists.Plan(B, size, S, K, 1, J, block_size, min(range_size, size), tiles_per_unit=16), slices


def _tuned(q, kernel="index_kl"):
  return tuning.get(kernel, head_dim=q.shape[3], dtype=q.dtype)


def _constants(q, k, q_idx, how):
  (_, _, N, H), (S, K) = q.shape, k.shape[1:3]
  _, scale, index_scale, precision = how
  return dict(S=S, K=K, G=N // K, H=H, HI=q_idx.shape[3], SCALE=scale * call.LOG2E, INDEX_SCALE=index_scale,
              PRECISION=precision)


def _launch(tuned):
  return dict(num_warps=tuned.warps, num_stages=tuned.stages)


def _launch_over_all(tuned):
  return dict(TOKENS=tuned.rows, BLOCK=tuned.block, **_launch(tuned))


def _losses(q_idx, k_idx, rest, *, how, keep):
  """loss, index lse, 1 / sum of P: float32[B, T, K]; over all tokens dq_idx for a loss of weight 1, else None; P by
  entry [B, places / B, block size] if it is to be kept, there are blocks and it is not too large, else None."""
  q, k, lse, block_indices, segment_ids, offset = rest
  constants = _constants(q, k, q_idx, how)
  if block_indices is None:
    B, T, K, HI = q_idx.shape
    tuned = _tuned(q)
    moments, dq = call.kernel_call(
        kl_kernels.dense_forward_kernel,
        (q, k, lse, q_idx, k_idx, *spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, offset)),
        [jax.ShapeDtypeStruct((5, B, T, K), jnp.float32), jax.ShapeDtypeStruct((B, T, K, HI), jnp.float32)],
        grid=(B * K * -(-T // tuned.rows),), name="index_kl_dense_forward", B=B, T=T,
        **_launch_over_all(tuned), **constants)
    top, norm, total, entropy, cross = moments
    index_lse = jnp.where(norm > 0, top + jnp.log(jnp.where(norm > 0, norm, 1.0)), -jnp.inf)
    return *loss_of(total, entropy, cross, index_lse), dq, None
  plan, slices = _plan(q, k, q_idx, block_indices, how[0])
  keep = keep and slices * _places(plan) * how[0] * q.dtype.itemsize <= KEPT_BYTES

  def one(block_indices, first):
    entries = _invert(block_indices, plan, q.shape[1], first, segment_ids, offset)
    moments, targets = _of_entries(q, k, lse, q_idx, k_idx, entries, plan, constants, keep=keep)
    return _merged(moments, entries.position, plan), targets if keep else None, None

  results, targets, _ = entry_lists.in_slices(one, slices, (block_indices,))
  return *results, None, targets


def _merged(moments, position, plan):
  """loss, index lse, 1 / sum of P: float32[B, T, K], of the `moments` of a query's entries: `loss_of` their sums."""
  *rows, J = position.shape
  return tuple(call.kernel_call(
      kl_kernels.merge_kernel, (moments, position), [jax.ShapeDtypeStruct(tuple(rows), jnp.float32)] * 3,
      grid=(-(-math.prod(rows) // MERGED_ROWS),), name="index_kl_merge", num_warps=4, num_stages=1, M=math.prod(rows),
      J=J, JP=call.next_power_of_2(J), PLACES=moments.shape[1], ROWS=MERGED_ROWS,
      TILE_TOKENS=plan.tile_tokens, G=plan.group))


def _gathered(parts, position, plan):
  """[B, T, K, HI] of the rows that a query's entries have in `parts` [places, HI], their sum."""
  *rows, J = position.shape
  return call.kernel_call(
      kl_kernels.gather_sum_kernel, (parts, position), jax.ShapeDtypeStruct((*rows, parts.shape[1]), parts.dtype),
      grid=(-(-math.prod(rows) // GATHERED_ROWS),), name="index_kl_gather_sum", num_warps=2, num_stages=1,
      M=math.prod(rows), J=J, SIZE=parts.shape[1], ROWS=GATHERED_ROWS, TILE_TOKENS=plan.tile_tokens, G=plan.group,
      AT_ONCE=math.gcd(J, 16))


def loss_of(total, entropy, cross, index_lse):
  """loss, index lse, 1 / sum of P."""
  seen = total > 0
  safe = jnp.where(seen, total, 1.0)
  loss = (entropy - cross) / safe - jnp.log(safe) + index_lse
  return jnp.where(seen, loss, 0.0), index_lse, jnp.where(seen, 1.0 / safe, 0.0)


def _places(plan):
  return plan.max_tiles * plan.tile_tokens


def _of_entries(q, k, lse, q_idx, k_idx, entries, plan, constants, *, keep, moments=True):
  """The moments of each entry, and P by entry; without `moments` or without `keep` nothing of use in their place."""
  B, places, size, tuned = plan.batch, _places(plan), plan.block_size, _tuned(q, "index_kl_forward")
  targets = jax.ShapeDtypeStruct((B, -(-places // B) if keep else 1, size), q.dtype)  # a first axis for `call.batched`
  return call.kernel_call(
      kl_kernels.selected_forward_kernel, (q, k, lse, q_idx, k_idx, entries.rows, entries.spans, entries.units),
      [jax.ShapeDtypeStruct((5, places if moments else 1), jnp.float32), targets], grid=(plan.max_units,),
      name="index_kl_forward", PLACES=places, SIZE=size, TOKENS=tuned.rows, TILE_TOKENS=plan.tile_tokens,
      WIDE=max(q.size, q_idx.size) >= COUNTED, MOMENTS=moments, KEEP=keep, **_launch(tuned), **constants)


def _invert(block_indices, plan, queries, first, segment_ids, offset):
  """The lists of a slice, their rows those of all queries."""
  use = invert if invert.supports(plan) is None else entry_lists
  entries = use.invert(block_indices, plan, segment_ids, offset + first)
  rows = entry_lists.rows_of_all(entries.rows, plan, queries, first, plan.kv_heads)
  return dataclasses.replace(entries, rows=rows)


def _gradients(q_idx, k_idx, rest, saved, targets, dloss, *, how):
  q, k, lse, block_indices, segment_ids, offset = rest
  index_lse, factor, dq = saved
  B, T, K, HI = q_idx.shape
  constants = _constants(q, k, q_idx, how)
  dloss = jnp.where(factor > 0, dloss, 0.0)
  weight = dloss * how[2]
  if block_indices is None:
    low, high = spans.visible_keys(*q.shape[:2], k.shape[1], segment_ids, offset)
    S, tuned = k.shape[1], _tuned(q)
    dk = call.kernel_call(
        kl_kernels.dense_dk_kernel, (q, k, lse, q_idx, k_idx, index_lse, factor, weight, low, high,
                                     ranged.who_sees(low, high, S, tuned.block)),
        jax.ShapeDtypeStruct((B, K, S, HI), jnp.float32), grid=(B * K * -(-S // tuned.block),),
        name="index_kl_dense_dk", B=B, T=T, **_launch_over_all(tuned), **constants)
    return (dq * dloss[..., None]).astype(q_idx.dtype), dk.sum(axis=1).astype(k_idx.dtype)
  plan, slices = _plan(q, k, q_idx, block_indices, how[0])
  dtype = k_idx.dtype if slices == 1 else jnp.float32  # several are summed
  tuned = _tuned(q, "index_kl_backward")
  of_index = {name: constants[name] for name in ("S", "HI", "INDEX_SCALE", "PRECISION")} | _launch(tuned)

  def one(block_indices, targets, first):
    entries = _invert(block_indices, plan, T, first, segment_ids, offset)
    if targets is None:  # by the kernel of the forward pass: beside the sums of dk, P does not fit the registers
      _, targets = _of_entries(q, k, lse, q_idx, k_idx, entries, plan, constants, keep=True, moments=False)
    dq, dk = call.kernel_call(
        kl_kernels.selected_backward_kernel,
        (q_idx, k_idx, index_lse, factor, weight, entries.rows, entries.spans, entries.units, targets),
        [jax.ShapeDtypeStruct((_places(plan), HI), q_idx.dtype),
         jax.ShapeDtypeStruct((plan.max_units, how[0], HI), jnp.float32)],
        grid=(plan.max_units,), name="index_kl_backward", SIZE=how[0], TOKENS=tuned.rows, TILE_TOKENS=plan.tile_tokens,
        **of_index)
    return _gathered(dq, entries.position, plan), None, sum_units(dk, entries.unit_start, plan, K, dtype)

  dq, _, dk = entry_lists.in_slices(one, slices, (block_indices, targets))
  return dq, dk.reshape(B, -1, HI)[:, :k.shape[1]].astype(k_idx.dtype)


def sum_units(parts, unit_start, plan, heads, dtype):
  """[B, K / heads, blocks, ...] of dtype from float32[units, ...]; `heads` KV heads are summed into one."""
  size = int(np.prod(parts.shape[1:]))
  chunk = min(1024, call.next_power_of_2(size))
  shape = (plan.batch, plan.kv_heads // heads, plan.blocks, *parts.shape[1:])
  return call.kernel_call(
      kl_kernels.sum_units_kernel, (parts, unit_start), jax.ShapeDtypeStruct(shape, dtype),
      grid=(shape[0] * shape[1] * plan.blocks * -(-size // chunk),), name="sum_units", num_warps=4, RANGES=plan.ranges,
      BLOCKS=plan.blocks, HEADS=heads, SIZE=size, CHUNK=chunk)


def sum_keys(dk, dv, unit_start, plan, dtype, *, scale=1.0, transposed=False):
  """dK and dV [B, keys, K, H] of dtype, dK times scale, from those of units, float32[units, parts, keys, H] each;
  transposed: [units, parts, H, keys]."""
  _, parts, *tile = dk.shape
  keys, H = reversed(tile) if transposed else tile
  out = jax.ShapeDtypeStruct((plan.batch, plan.keys, plan.kv_heads, H), dtype)
  width = min(SUMMED_COLUMNS, call.next_power_of_2(H))
  return call.kernel_call(
      kl_kernels.sum_keys_kernel, (dk, dv, unit_start), [out, out],
      grid=(plan.batch * plan.kv_heads * plan.blocks * parts * -(-H // width),), name="sum_keys", num_warps=4,
      num_stages=1, S=plan.keys, K=plan.kv_heads, RANGES=plan.ranges, BLOCKS=plan.blocks, PARTS=parts, KEYS=keys, H=H,
      WIDTH=width, TRANSPOSED=transposed, FACTOR=float(scale))
