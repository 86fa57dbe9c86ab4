"""Selected attention on TPUs: what `pallas_kernels.api.selected_attention` runs there.

Forward: flash attention of a tile of neighbouring queries over the union of their blocks, each row masked to its
own (union.py, walk.py). Backward: the same walk again. The gradients of a range of keys, as many as fit VMEM in
float32, stay there while the grid goes through all tiles in order; if that range is all keys, one pass makes dQ,
dK and dV with five products per block, else a pass per range makes dK and dV and one more makes dQ. Nothing of
the size of the selection is written but the lists, at most as large as `block_indices`.

The work is that of the union: where neighbours share little (G = 1, blocks drawn at random) a tile of 128 rows
attends to many blocks for the sake of a few rows each.
"""
from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import backends, validate
from pallas_kernels.mosaic_tpu import union, walk
from pallas_kernels.mosaic_tpu.walk import LN2, LOG2E

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (32, 64, 128)
MAX_GROUP = 16
MAX_SLOTS = 64
MAX_RANGES = 128  # of keys, whose bounds end each list


def padded_head_dim(H):
  """The least head dim that the kernels have for this one; H itself beyond."""
  return next((size for size in HEAD_DIMS if H <= size), H)


def supports(q, k, v, block_indices, *, block_size, scale=None, **_):
  """None, or why these arguments need another implementation; begins with the argument's name.

  Reads shapes and dtypes only.
  """
  if v.dtype != q.dtype:
    return f"v.dtype = {v.dtype}: the kernels need that of q, {q.dtype}"
  return unserved(q, k, block_indices, block_size, scale)


def unserved(q, k, block_indices, block_size, scale):
  """`supports` for the arguments that all walks over selected blocks share."""
  refused = validate.unserved_selection(q, k, block_indices, block_size, scale, dtypes=(jnp.bfloat16, jnp.float32),
                                        head_dims=HEAD_DIMS, block_sizes=BLOCK_SIZES, group=MAX_GROUP, slots=MAX_SLOTS)
  if refused:
    return refused
  if make_plan(q, k, block_indices, block_size).ranges > MAX_RANGES:
    return f"k has {k.shape[1]} keys: the backward kernel takes {MAX_RANGES} times what fits VMEM"
  return None


def make_plan(q, k, block_indices, block_size):
  """The sizes of a call."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  return union.Plan(B, T, S, K, N // K, block_indices.shape[3], block_size, H, H)


def selected_attention(q, k, v, block_indices, *, block_size, scale=None, segment_ids=None, query_offset=0,
                       interpret=False):
  """See `pallas_kernels.api.selected_attention`; differentiable with respect to q, k and v through both results.

  interpret: of `pl.pallas_call`, to run on a CPU.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (q.shape[0],))
  return _selected_attention(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _selected_attention(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret):
  return _forward(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret)[0]


def _by_head(plan, x):
  """[B, T, N, ...] to [B, T, K, G, ...]."""
  return x.reshape(plan.batch, plan.queries, plan.kv_heads, plan.group, *x.shape[3:])


def _forward(q, k, v, block_indices, segment_ids, offset, block_size, scale, interpret):
  plan = make_plan(q, k, block_indices, block_size)
  picks = union.seen_picks(plan, block_indices, segment_ids, offset)
  lists = union.make_lists(plan, picks)
  numbers = union.row_numbers(plan, picks, segment_ids, offset)
  queries = union.query_rows(plan, _by_head(plan, q))
  if plan.packed:
    queries = union.pair(plan, queries, None)
  pairs = union.pair(plan, union.key_blocks(plan, k), union.key_blocks(plan, v))
  o, lse = attend(plan, queries, pairs, lists, numbers, scale=scale, interpret=interpret)
  o = union.from_rows(plan, o[:, :, -plan.right:] if plan.packed else o[:, :, :plan.right])
  o = o.reshape(q.shape)
  o, lse = backends.attended((o, union.from_rows(plan, lse).reshape(q.shape[:3])))
  return (o, lse), (q, k, v, o, lse, block_indices, lists, segment_ids, offset)


def _backward(block_size, scale, interpret, residuals, cotangents):
  q, k, v, o, lse, block_indices, lists, segment_ids, offset = residuals
  do, dlse = cotangents
  plan = make_plan(q, k, block_indices, block_size)
  do = do.astype(q.dtype)
  delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
  # A row that sees nothing is in nobody's mask; 0 keeps what is masked finite.
  seen = lse > -jnp.inf
  sums = jnp.stack([jnp.where(seen, lse * LOG2E, 0.0), jnp.where(seen, delta, 0.0)], axis=-1)
  sums = union.query_rows(plan, _by_head(plan, sums)).transpose(0, 1, 3, 2)
  picks = union.seen_picks(plan, block_indices, segment_ids, offset)
  numbers = union.row_numbers(plan, picks, segment_ids, offset)
  queries = union.query_rows(plan, _by_head(plan, union.pair(plan, q, do)))
  pairs = union.pair(plan, union.key_blocks(plan, k), union.key_blocks(plan, v))
  dq, dkv = gradients(plan, queries, sums, pairs, lists, numbers, scale=scale, interpret=interpret)
  dq = union.from_rows(plan, dq[:, :, :plan.left]).reshape(q.shape)
  dkv = union.from_blocks(plan, dkv)
  dk = (dkv[..., :plan.left] * scale).astype(k.dtype)
  dv = dkv[..., plan.start:plan.start + plan.right].astype(v.dtype)
  return dq, dk, dv, *backends.no_gradient((block_indices, segment_ids, offset))


_selected_attention.defvjp(_forward, _backward)


# --- the kernels --------------------------------------------------------------


def attend(plan, queries, pairs, lists, numbers, *, scale, interpret=False):
  """Attention of tiles over their lists.

  Args:
    queries: [B * K, tiles, rows, lanes of `walk.left_keys`].
    pairs: [B * K, blocks, block_size, width] of k and v.
    lists, numbers: of `union.make_lists` and `union.row_numbers`.
    scale: float.

  Returns:
    o [B * K, tiles, lanes of `walk.right_keys`, rows] of queries.dtype and lse float32[B * K, tiles, 1, rows];
    0 and -inf in rows that see nothing.
  """
  heads, tiles = queries.shape[:2]
  height, dtype = walk.height(plan, right=True), queries.dtype

  def body(lists, following, numbers, queries, pairs, o, lse, sums, buffer, arrived, parity):
    head, tile = pl.program_id(0), pl.program_id(2)
    sums[...] = jnp.zeros_like(sums)

    def step(blocks, pairs, carry):
      top, total = carry
      s = walk.scores(walk.left_keys(plan, pairs), queries[0, 0]) * (scale * LOG2E)
      s = jnp.where(walk.mask(plan, blocks, numbers[0, 0]), s, -jnp.inf)
      new = jnp.maximum(top, s.max(axis=0, keepdims=True))
      shift = jnp.where(new == -jnp.inf, 0.0, new)
      p = jnp.exp2(s - shift)
      decay = jnp.exp2(top - shift)
      values = walk.right_keys(plan, pairs)
      sums[...] = sums[...] * decay + walk.product(values, p.astype(dtype), (0, 0))
      return new, total * decay + p.sum(axis=0, keepdims=True)

    row = lambda value: jnp.full((1, plan.rows), value, jnp.float32)
    top, total = walk.over_list(
        plan, step, (row(-jnp.inf), row(0.0)), whole=True, head=head, span=0, tile=tile, lists=lists,
        following=following, source=pairs, buffer=buffer, arrived=arrived, parity=parity)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    o[0, 0] = (sums[...] / safe).astype(dtype)
    lse[0, 0] = jnp.where(some, top * LN2 + jnp.log(safe), -jnp.inf)

  shapes = [jax.ShapeDtypeStruct((heads, tiles, height, plan.rows), dtype),
            jax.ShapeDtypeStruct((heads, tiles, 1, plan.rows), jnp.float32)]
  return pl.pallas_call(
      body, grid=(heads, 1, tiles),
      in_specs=[*walk.list_specs(plan), *walk.tile_specs(numbers, queries), walk.LEFT_IN_HBM],
      out_specs=walk.tile_specs(*shapes), out_shape=shapes,
      scratch_shapes=[pltpu.VMEM((height, plan.rows), jnp.float32), *walk.stream_scratch(plan, dtype)],
      compiler_params=walk.compiler_params(), interpret=interpret,
      name="selected_attention_forward")(lists, lists, numbers, queries, pairs)


def gradients(plan, queries, sums, pairs, lists, numbers, *, scale, interpret=False):
  """Gradients of tiles and of their blocks.

  Args:
    queries: [B * K, tiles, rows, width], pairs of q and do.
    sums: float32[B * K, tiles, 2, rows], the base-2 log-sum-exp and rowsum(o * do) less the cotangent of lse.
    pairs: [B * K, blocks, block_size, width] of k and v.
    lists, numbers: of `union.make_lists` and `union.row_numbers`.
    scale: float.

  Returns:
    dq [B * K, tiles, lanes of `walk.left_keys`, rows] of queries.dtype and float32[B * K, ranges * range_blocks *
    block_size, width], the pair of dk and dv, dk without the factor `scale`.
  """
  dtype = queries.dtype

  def step(refs, blocks, pairs):
    numbers, queries, sums = refs
    rows = queries[0, 0]
    q, do = walk.left_queries(plan, rows), walk.right_queries(plan, rows)
    keys, values = walk.left_keys(plan, pairs), walk.right_keys(plan, pairs)
    s = walk.scores(keys, q) * (scale * LOG2E) - sums[0, 0, 0:1]
    p = jnp.where(walk.mask(plan, blocks, numbers[0, 0]), jnp.exp2(s), 0.0)
    ds = p * (walk.scores(values, do) - sums[0, 0, 1:2])
    p, ds = p.astype(dtype), ds.astype(dtype)

    def for_blocks():
      dk, dv = walk.product(ds, q, (1, 0)), walk.product(p, do, (1, 0))
      return dk + dv if plan.packed else jnp.concatenate([dk, dv], axis=1)

    return lambda: walk.product(keys, ds, (0, 0)), for_blocks

  return walk.gradients(plan, "selected_attention_backward", (numbers, queries, sums), (), pairs, lists, step,
                        queries_height=walk.height(plan, right=False), dtype=dtype, factor=scale,
                        keys_width=plan.width, interpret=interpret)
