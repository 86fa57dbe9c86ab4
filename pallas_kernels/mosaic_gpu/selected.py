"""Selected attention on Hopper: what `pallas_kernels.api.selected_attention` runs on an H100 or H200.

Forward: attend to what a tile of neighbouring queries has in common with the queries on chip
(shared_blocks.py, shared_attention.py), sort the rest of the selection by block (lists.py), attend entry by entry with
the block on chip (forward.py), combine each query's partial results (merge.py). Backward: lists
of the whole selection, one kernel for dQ, dK and dV (backward.py). Partial results take
J * N * H numbers per token; above `PARTIAL_BYTES` the queries go through in slices, one after
the other.

Where neighbours share nothing, the floor is the traffic of J partial rows per query row, written
once and read once; on one H200 the forward pass of 64 heads over 32,768 tokens took 1.32 times that.
"""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import backends, lists as entry_lists, validate
from pallas_kernels.mosaic_gpu import backward, forward, merge, shared_attention, shared_blocks
from pallas_kernels.mosaic_gpu.tiles import LOG2E, of_another_gpu

try:
  from pallas_kernels.triton import call, invert as counting, kl
except Exception:  # triton is not installed, or broken
  counting = None

HEAD_DIMS = (64, 96, 128)
BLOCK_SIZES = (32, 64, 128)
MAX_GROUP = 16
MAX_SLOTS = 64  # that `merge` unrolls
PARTIAL_BYTES = 10 * 2 ** 30  # of partial results alive at a time


def supports(q, k, v, block_indices, *, block_size, scale=None, **_):
  """None, or why these arguments need another implementation; begins with the argument's name.

  Reads shapes and dtypes only.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  J = block_indices.shape[3]
  refused = validate.unserved_selection(q, k, block_indices, block_size, scale, dtypes=(jnp.bfloat16, jnp.float16),
                                        head_dims=HEAD_DIMS, block_sizes=BLOCK_SIZES, group=MAX_GROUP, slots=MAX_SLOTS)
  if refused:
    return refused
  if v.dtype != q.dtype:
    return f"v.dtype = {v.dtype}: the kernels need that of q, {q.dtype}"
  if v.shape[3] != H:
    return f"v has head dim {v.shape[3]}: the kernels need that of q, {H}"
  if H % 64 and block_size % 64:
    return f"q has head dim {H}: with block_size = {block_size} the kernels take 64 and 128"
  plan, _ = _slices(B, T, S, K, N // K, J, H, block_size)
  if plan.max_tiles * entry_lists.TILE_ROWS >= 2 ** 31 or plan.lists >= 2 ** 31:
    return f"block_indices {block_indices.shape} has more entries per slice of queries than int32 counts"
  return of_another_gpu("q")


def _slices(B, T, S, K, G, J, H, block_size, list_tiles=entry_lists.FORWARD_TILES):
  """The plan of one slice of the queries, and how many slices there are."""
  slices, size = entry_lists.slices_of(T, B * K * G * J * H * 2, PARTIAL_BYTES)
  return entry_lists.plan_of(B, size, S, K, G, J, H, block_size, list_tiles), slices


def forward_slots(plan, head_dim):
  """Tiles on chip: three where that leaves room for three thread blocks per multiprocessor."""
  return 2 if head_dim * plan.block_size >= 64 * 128 else 3


def selected_attention(q, k, v, block_indices, *, block_size, scale=None, segment_ids=None, query_offset=0,
                       interpret=False):
  """See `pallas_kernels.api.selected_attention`; differentiable with respect to q, k and v through both results.

  Equal inputs give equal bits, gradients too. interpret: use only operations that the interpreter of Mosaic GPU
  kernels knows; for tests.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (q.shape[0],))
  return _selected_attention(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _selected_attention(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret):
  return _forward(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret)[0]


def _plan_of(q, k, block_indices, block_size, list_tiles=entry_lists.FORWARD_TILES):
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  return _slices(B, T, S, K, N // K, block_indices.shape[3], H, block_size, list_tiles)


def _invert(block_indices, plan, queries, first, segment_ids, offset, interpret):
  """The lists of a slice, their rows those of all queries: counted by kernels of triton/ where that is installed, else
  sorted."""
  use = entry_lists if counting is None or interpret or counting.supports(plan) else counting
  entries = use.invert(block_indices, plan, segment_ids, offset + first)
  rows = entry_lists.rows_of_all(entries.rows, plan, queries, first, plan.kv_heads)
  return dataclasses.replace(entries, rows=rows)


def _whole_blocks(x, plan):
  """Keys padded to whole blocks; the spans keep the padding out of sight."""
  missing = plan.blocks * plan.block_size - plan.keys
  return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _forward(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret):
  plan, slices = _plan_of(q, k, block_indices, block_size)
  keys, values = _whole_blocks(k, plan), _whole_blocks(v, plan)

  rows = q.reshape(-1, q.shape[-1])
  how = dict(scale=scale, segmented=segment_ids is not None, interpret=interpret)

  def one(block_indices, first):
    shared = None
    # the interpreter hangs on three warpgroups within a larger program
    if not interpret and shared_blocks.pays(plan, q.shape[-1]):
      tiles, block_indices = shared_blocks.split(block_indices, plan, segment_ids, offset + first)
      tiles = dataclasses.replace(tiles, rows=entry_lists.rows_of_all(tiles.rows, plan, q.shape[1], first, q.shape[2]))
      shared = shared_attention.attend(rows, keys, values, tiles, plan, **how)
    entries = _invert(block_indices, plan, q.shape[1], first, segment_ids, offset, interpret)
    parts, part_lse = forward.partial_attention(
        rows, keys, values, entries, plan, slots=forward_slots(plan, q.shape[-1]), **how)
    combine = forward.merge if interpret else merge.combine
    o, lse = combine(parts[None], part_lse, entries.position, plan, shared=shared)
    shape = plan.batch, plan.queries, q.shape[2]
    return (o.reshape(*shape, -1), lse.reshape(shape)), None, None

  (o, lse), _, _ = entry_lists.in_slices(one, slices, (block_indices,))
  o, lse = backends.attended((o, lse))
  return (o, lse), (q, k, v, o, lse, segment_ids, offset, block_indices)


def _backward(block_size, scale, interpret, residuals, cotangents):
  q, k, v, o, lse, segment_ids, offset, block_indices = residuals
  do, dlse = cotangents
  plan, slices = _plan_of(q, k, block_indices, block_size, entry_lists.BACKWARD_TILES)
  H = q.shape[-1]
  do = do.astype(q.dtype)
  # A query that sees nothing has no entries, an o of zeros and no gradient of its lse; 0 keeps its row finite.
  seen = lse > -jnp.inf
  delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - jnp.where(seen, dlse, 0.0)
  lse = jnp.where(seen, lse * LOG2E, 0.0)
  keys, values = _whole_blocks(k, plan), _whole_blocks(v, plan)

  def one(block_indices, first):
    entries = _invert(block_indices, plan, q.shape[1], first, segment_ids, offset, interpret)
    dq, dk, dv = backward.partial_gradients(
        q.reshape(-1, H), keys, values, do.reshape(-1, H), lse.reshape(-1), delta.reshape(-1), entries, plan,
        scale=scale, segmented=segment_ids is not None, interpret=interpret)
    if interpret:
      dq = forward.weighted_rows(dq, scale, entries.position, plan)
    else:
      dq = merge.combine(dq, None, entries.position, plan, scale=scale)
    dtype = k.dtype if slices == 1 else jnp.float32  # those of several slices are added up
    sums = _sums(dk, dv, entries.unit_start, plan, scale, backward.transposed(H), dtype, interpret)
    return dq.reshape(plan.batch, plan.queries, *q.shape[2:]), None, sums

  dq, _, (dk, dv) = entry_lists.in_slices(one, slices, (block_indices,))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), *backends.no_gradient((block_indices, segment_ids, offset))


def _sums(dk, dv, unit_start, plan, scale, transposed, dtype, interpret):
  """dK and dV, [B, keys, K, H] of dtype, of what units have of them: by a kernel of triton/ where that is installed."""
  how = dict(scale=scale, transposed=transposed)
  if counting is not None and not interpret and call.unavailable() is None:
    return tuple(call.one_by_one(lambda *x: kl.sum_keys(*x, plan, dtype, **how))(dk, dv, unit_start))

  def tokens_first(x, factor):
    x = x.swapaxes(4, 5) if transposed else x
    x = x.transpose(0, 2, 3, 4, 1, 5)  # B, blocks, parts, keys, K, H
    x = x.reshape(plan.batch, -1, plan.kv_heads, x.shape[-1])
    return (x[:, :plan.keys] * factor).astype(dtype)

  dk, dv = backward.sum_units(dk, dv, unit_start, plan)
  return tokens_first(dk, scale), tokens_first(dv, 1.0)


_selected_attention.defvjp(_forward, _backward)
