"""The loss of an index branch on TPUs: what `pallas_kernels.api.index_kl` runs there, over selected blocks.

The walk is that of selected attention (union.py, walk.py), over pairs of k and k_idx. The target P is a mean over
the G heads of a token, which are G neighbouring rows, hence lanes: a product with ones where two rows belong to
one token takes the mean and leaves it in each of the G rows. The index query is repeated G times to match, so
that everything that follows is the same in all G rows; gradients count the first of them.

With P renormalised as the reference does, sum P (log P - s) / sum P - log sum P + log sum exp(s) over the
selected tokens is the loss, s the index scores; its gradient by s is softmax(s) - P / sum P.
"""
from __future__ import annotations

import functools
import math

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends
from pallas_kernels.mosaic_tpu import selected, union, walk
from pallas_kernels.mosaic_tpu.walk import LN2, LOG2E


def supports(q, k, q_idx, k_idx, block_indices, *, block_size, scale=None, index_scale=None, **_):
  """None, or why these arguments need another implementation; begins with the argument's name."""
  if block_indices is None:
    return "block_indices = None: the kernels take a selection"
  reason = selected.unserved(q, k, block_indices, block_size, scale)
  if reason is not None:
    return reason
  if q_idx.dtype != q.dtype or k_idx.dtype != q.dtype:
    return f"q_idx.dtype, k_idx.dtype = {q_idx.dtype}, {k_idx.dtype}: the kernels need that of q, {q.dtype}"
  if q_idx.shape[3] > union.LANES:
    return f"q_idx has index dim {q_idx.shape[3]}: the kernels take up to {union.LANES}"
  if index_scale is not None and not isinstance(index_scale, (int, float, np.floating)):
    return "index_scale is traced: the kernels need a number"
  return None


def make_plan(q, k, k_idx, block_indices, block_size):
  """The sizes of a call."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  return union.Plan(B, T, S, K, N // K, block_indices.shape[3], block_size, H, k_idx.shape[2])


def index_kl(q, k, lse, q_idx, k_idx, block_indices, *, block_size, scale=None, index_scale=None, segment_ids=None,
             query_offset=0, interpret=False):
  """See `pallas_kernels.api.index_kl`; differentiable with respect to q_idx and k_idx.

  interpret: of `pl.pallas_call`, to run on a CPU.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  index_scale = q_idx.shape[-1] ** -0.5 if index_scale is None else float(index_scale)
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (q.shape[0],))
  q, k, lse = map(lax.stop_gradient, (q, k, lse))
  return _index_kl(q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset, block_size, scale, index_scale,
                   interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def _index_kl(q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset, block_size, scale, index_scale, interpret):
  return _forward(q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset, block_size, scale, index_scale,
                  interpret)[0]


def _arrays(plan, q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset):
  """Queries, pairs, numbers of each row, its picks, and its base-2 log-sum-exp with that of the group's size."""
  by_head = lambda x: x.reshape(plan.batch, plan.queries, plan.kv_heads, plan.group, *x.shape[3:])
  repeated = jnp.broadcast_to(q_idx[:, :, :, None], (*q.shape[:2], plan.kv_heads, plan.group, plan.right))
  queries = union.query_rows(plan, union.pair(plan, by_head(q), repeated))
  shared = jnp.broadcast_to(k_idx[:, :, None], (*k.shape[:3], plan.right))
  pairs = union.key_blocks(plan, union.pair(plan, k, shared))
  picks = union.seen_picks(plan, block_indices, segment_ids, offset)
  numbers = union.row_numbers(plan, picks, segment_ids, offset)
  # Infinite where a row saw nothing: then its P is 0.
  lse = jnp.where(lse > -jnp.inf, lse * LOG2E + math.log2(plan.group), jnp.inf)
  return queries, pairs, numbers, picks, union.query_rows(plan, by_head(lse)[..., None]).transpose(0, 1, 3, 2)


def _forward(q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset, block_size, scale, index_scale, interpret):
  plan = make_plan(q, k, k_idx, block_indices, block_size)
  queries, pairs, numbers, picks, row_lse = _arrays(plan, q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset)
  lists = union.make_lists(plan, picks)
  out = divergence(plan, queries, row_lse, pairs, lists, numbers, scale=scale, index_scale=index_scale,
                   interpret=interpret)
  out = backends.attended(out)
  loss = union.from_rows(plan, out[:, :, :1])[:, :, :, 0, 0]
  return loss, (q_idx, k_idx, q, k, lse, block_indices, lists, out, segment_ids, offset)


def _backward(block_size, scale, index_scale, interpret, residuals, dloss):
  q_idx, k_idx, q, k, lse, block_indices, lists, out, segment_ids, offset = residuals
  plan = make_plan(q, k, k_idx, block_indices, block_size)
  queries, pairs, numbers, _, row_lse = _arrays(plan, q_idx, k_idx, q, k, lse, block_indices, segment_ids, offset)
  first = jnp.arange(plan.group) == 0
  weight = jnp.where(first[:, None], dloss[..., None, None], 0.0)  # [B, T, K, G, 1]
  weight = union.query_rows(plan, weight).transpose(0, 1, 3, 2)
  sums = jnp.concatenate([row_lse, out[:, :, 1:], weight], axis=2)
  dq, dk = gradients(plan, queries, sums, pairs, lists, numbers, scale=scale, index_scale=index_scale,
                     interpret=interpret)
  at = plan.start if plan.packed else 0  # where the index dims begin among the lanes of `right_keys`
  dq = union.from_rows(plan, dq[:, :, at:at + plan.right])[:, :, :, 0]
  dk = union.from_blocks(plan, dk)[..., at:at + plan.right].sum(axis=2)
  return ((dq * index_scale).astype(q_idx.dtype), (dk * index_scale).astype(k_idx.dtype),
          *backends.no_gradient((q, k, lse, block_indices, segment_ids, offset)))


_index_kl.defvjp(_forward, _backward)


# --- the kernels --------------------------------------------------------------


def _same_token(plan, dtype):
  """[lanes, lanes] ones where two rows belong to one token; all rows repeat it if tokens do not straddle vectors."""
  lanes = union.LANES if union.LANES % plan.group == 0 else plan.rows
  token = np.arange(lanes) // plan.group
  return jnp.asarray(token[:, None] == token, dtype)


def _over_heads(p, same):
  """float32[keys, rows] summed over the rows of each token, in each of them."""
  def part(p):
    if same.dtype == jnp.float32:
      return walk.product(p, same, (1, 0))
    # Two bfloat16 hold 16 bits of p. Cut by hand: a compiler may drop a conversion there and back.
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(p, jnp.uint32) & jnp.uint32(0xffff0000), jnp.float32)
    return sum(walk.product(x.astype(jnp.bfloat16), same, (1, 0)) for x in (high, p - high))

  lanes = same.shape[0]
  return jnp.concatenate([part(p[:, at:at + lanes]) for at in range(0, p.shape[1], lanes)], axis=1)


def _target(plan, pairs, queries, lse, seen, same, scale):
  """P, float32[keys, rows], not renormalised."""
  s = walk.scores(walk.left_keys(plan, pairs), walk.left_queries(plan, queries)) * (scale * LOG2E)
  p = jnp.where(seen, jnp.exp2(s - lse), 0.0)
  return p if plan.group == 1 else _over_heads(p, same)


def _index_scores(plan, pairs, queries, index_scale):
  """Base-2 index scores, float32[keys, rows]."""
  return walk.scores(walk.right_keys(plan, pairs), walk.right_queries(plan, queries)) * (index_scale * LOG2E)


def _whole(x):
  return pl.BlockSpec(x.shape, lambda head, span, tile: (0,) * x.ndim)


def divergence(plan, queries, lse, pairs, lists, numbers, *, scale, index_scale, interpret=False):
  """The loss of every row.

  Args:
    queries: [B * K, tiles, rows, width], pairs of q and q_idx.
    lse: float32[B * K, tiles, 1, rows], base-2 log-sum-exp of the main attention plus log2 G; inf: sees nothing.
    pairs: [B * K, blocks, block_size, width] of k and k_idx.
    lists, numbers: of `union.make_lists` and `union.row_numbers`.
    scale, index_scale: floats.

  Returns:
    float32[B * K, tiles, 3, rows]: the loss in nats, 1 / sum P (0 in rows that see nothing), and the base-2
    log-sum-exp of the index scores.
  """
  heads, tiles = queries.shape[:2]
  same = _same_token(plan, queries.dtype)

  def body(lists, following, numbers, queries, lse, same, pairs, out, buffer, arrived, parity):
    def step(blocks, pairs, carry):
      mass, cross, top, total = carry
      rows, seen = queries[0, 0], walk.mask(plan, blocks, numbers[0, 0])
      p = _target(plan, pairs, rows, lse[0, 0], seen, same[...], scale)
      s = _index_scores(plan, pairs, rows, index_scale)
      some = p > 0
      cross += jnp.sum(jnp.where(some, p * (jnp.log(jnp.where(some, p, 1.0)) - s * LN2), 0.0), axis=0, keepdims=True)
      s = jnp.where(seen, s, -jnp.inf)
      new = jnp.maximum(top, s.max(axis=0, keepdims=True))
      shift = jnp.where(new == -jnp.inf, 0.0, new)
      total = total * jnp.exp2(top - shift) + jnp.exp2(s - shift).sum(axis=0, keepdims=True)
      return mass + p.sum(axis=0, keepdims=True), cross, new, total

    row = lambda value: jnp.full((1, plan.rows), value, jnp.float32)
    mass, cross, top, total = walk.over_list(
        plan, step, (row(0.0), row(0.0), row(-jnp.inf), row(0.0)), whole=True, head=pl.program_id(0), span=0,
        tile=pl.program_id(2), lists=lists, following=following, source=pairs, buffer=buffer, arrived=arrived,
        parity=parity)
    some = mass > 0
    mass = jnp.where(some, mass, 1.0)
    norm = jnp.where(total > 0, jnp.where(top > -jnp.inf, top, 0.0) * LN2 + jnp.log(jnp.where(total > 0, total, 1.0)),
                     0.0)
    out[0, 0, 0:1] = jnp.where(some, cross / mass - jnp.log(mass) + norm, 0.0)
    out[0, 0, 1:2] = jnp.where(some, 1.0 / mass, 0.0)
    out[0, 0, 2:3] = norm * LOG2E

  shape = jax.ShapeDtypeStruct((heads, tiles, 3, plan.rows), jnp.float32)
  return pl.pallas_call(
      body, grid=(heads, 1, tiles),
      in_specs=[*walk.list_specs(plan), *walk.tile_specs(numbers, queries, lse), _whole(same), walk.LEFT_IN_HBM],
      out_specs=walk.tile_specs(shape)[0], out_shape=shape, scratch_shapes=walk.stream_scratch(plan, pairs.dtype),
      compiler_params=walk.compiler_params(), interpret=interpret,
      name="index_kl_forward")(lists, lists, numbers, queries, lse, same, pairs)


def gradients(plan, queries, sums, pairs, lists, numbers, *, scale, index_scale, interpret=False):
  """Gradients of q_idx and k_idx, without the factor `index_scale`.

  Args:
    queries, pairs, lists, numbers, scale, index_scale: as in `divergence`.
    sums: float32[B * K, tiles, 4, rows]: the lse of `divergence`, the last two of its results, and the cotangent
      of the loss in the first row of each token, 0 in the others.

  Returns:
    float32[B * K, tiles, lanes of `walk.right_keys`, rows], nonzero in the first row of each token, and
    float32[B * K, ranges * range_blocks * block_size, lanes of `walk.right_keys`].
  """
  def step(refs, blocks, pairs):
    numbers, queries, sums, same = refs
    rows, seen = queries[0, 0], walk.mask(plan, blocks, numbers[0, 0])
    p = _target(plan, pairs, rows, sums[0, 0, 0:1], seen, same[...], scale)
    s = _index_scores(plan, pairs, rows, index_scale) - sums[0, 0, 2:3]
    p_idx = jnp.where(seen, jnp.exp2(s), 0.0)
    ds = ((p_idx - p * sums[0, 0, 1:2]) * sums[0, 0, 3:4]).astype(rows.dtype)
    return (lambda: walk.product(walk.right_keys(plan, pairs), ds, (0, 0)),
            lambda: walk.product(ds, walk.right_queries(plan, rows), (1, 0)))

  height = walk.height(plan, right=True)
  return walk.gradients(plan, "index_kl_backward", (numbers, queries, sums), (_same_token(plan, queries.dtype),), pairs,
                        lists, step, queries_height=height, dtype=jnp.float32, keys_width=height, interpret=interpret)
