"""Flash attention over a run of keys per query: dense, windowed, packed and compressed attention in one.

Tiles are transposed, scores lie [keys, queries]: then the maximum and the sum of a query run down the
sublanes, and everything that there is one of per query (lse, delta, the ends of its run) is a row along the
lanes. Q, O and their gradients come and go as [B, K, G, H, T], so that a head dim of 64 wastes no lanes in
HBM; K and V as [B, K, S, H].

The grid's last axis walks the key tiles of a tile of queries (of the gradients of K and V: the other way
round). Which ones is known from the prefetched tables of spans.py; steps past the last one name the
tile that is already on chip, copy nothing and do nothing. The G heads of a group share each copy of K and V.

The backward pass is two kernels, one for dQ and one for dK and dV, that recompute P from the log-sum-exp: 7
products to the 5 of one pass, but no read-modify-write of sums in HBM, and equal inputs give equal bits.

How well the units overlap is read off the schedule that libtpu emits, for want of a TPU. For v5p (bfloat16, head dim
128, G 16, whole tiles) the matrix unit is busy in 72 % of the cycles of the forward loop (48 % with two parts at a
time whose loads and stores take turns), and in 99 % of both backward loops.

Why not jax's own splash attention: it returns the log-sum-exp (`save_residuals`) or has gradients, not both;
its mask is fixed at trace time, which rules out traced offsets; it wants lengths in whole tiles and writes
the log-sum-exp 128 times over.
"""
from __future__ import annotations

import functools
import math

import jax
from jax import lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends, spans

LOG2E = math.log2(math.e)
LANES = 128
TILE_ROWS = 4096   # query rows, heads times queries, of a tile: an accumulator of 2 MiB at head dim 128
MAX_QUERIES = 1024     # of a tile
MAX_KEYS = 512         # of a tile; twice as many where the rows are few
PART_QUERIES = 256     # of a head that are worked on as one
TABLE_BYTES = 2 ** 19  # of SMEM for the tables; there is 1 MiB of it
VMEM_LIMIT = 48 * 2 ** 20  # where the default is 16 or 32 MiB; every chip has 64 and more
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 256
MAX_GROUP_DIM = 8192   # G * H: the accumulators of 128 queries take 4 MiB


def refuses(q, k, v, scale, q_name="q", k_name="k"):
  """None, or why the kernels do not take these arrays; reads shapes and dtypes only."""
  H, G = q.shape[-1], q.shape[2] // k.shape[2] if k.ndim == 4 else 1
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q_name}.dtype = {q.dtype}: the kernels take bfloat16 and float32"
  if k.dtype != q.dtype or v.dtype != q.dtype:
    return f"{k_name}.dtype = {k.dtype}, {v.dtype} for its values: the kernels need that of {q_name}, {q.dtype}"
  if H % HEAD_DIM_STEP or H > MAX_HEAD_DIM:
    return f"{q_name} has head dim {H}: the kernels take multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
  if G * H > MAX_GROUP_DIM:
    return f"{q_name} has {G} heads of {H} per KV head: the kernels take {MAX_GROUP_DIM // H}"
  if scale is not None and not isinstance(scale, (int, float, np.floating)):
    return "scale is traced: the kernels need a number"
  if 0 in q.shape or 0 in k.shape:
    return f"{q_name} {q.shape} or {k_name} {k.shape} is empty"
  return None


def refuses_tables(q, k, window=None):
  """None, or why the tables of a call do not fit on chip: they are kept for all sequences at once."""
  (B, T), S = q.shape[:2], k.shape[1]
  bt, bk = tile_sizes(T, S, q.shape[2] // k.shape[2], window, q.dtype)
  if 4 * B * (4 * -(-T // bt) + 2 * -(-S // bk)) > TABLE_BYTES:
    return f"q has {B} x {T} queries, k {S} keys: their tables do not fit SMEM"
  return None


def tile_sizes(queries, keys, group, window=None, dtype=jnp.bfloat16):
  """Queries and keys of a tile: enough of both that a step takes longer than its overhead. A product of float32 is
  six of bfloat16, in time and in code: one part of a head will do, and minutes of compilation are saved.

  A window that is short against the tiles makes most of their scores invisible: tiles of half its length
  compute up to twice what is seen.
  """
  tile_queries = max(LANES, min(MAX_QUERIES, TILE_ROWS // group // LANES * LANES))
  tile_keys = MAX_KEYS if group * tile_queries > 1024 else 2 * MAX_KEYS
  if dtype == jnp.float32:
    tile_queries, tile_keys = min(tile_queries, PART_QUERIES), MAX_KEYS
  if window is not None:
    half = max(LANES, window // 2 // LANES * LANES)
    tile_queries, tile_keys = min(tile_queries, half), min(tile_keys, half)
  up = lambda x: -(-x // LANES) * LANES
  return min(tile_queries, up(queries)), min(tile_keys, up(keys))


def heads_first(q, kv_heads, length):
  """[B, T, N, H] to [B, K, G, H, length]."""
  B, T, N, H = q.shape
  q = q.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 4, 1)
  return spans.pad_queries(q, length)


def queries_first(q, queries):
  """[B, K, G, H, padded] to [B, T, N, H]."""
  q = q[..., :queries].transpose(0, 4, 1, 2, 3)
  return q.reshape(q.shape[0], queries, -1, q.shape[4])


def keys_second(k, length):
  """[B, S, K, H] to [B, K, length, H]; padding is zero, so that no weight of zero meets a NaN."""
  return jnp.pad(k, ((0, 0), (0, length - k.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def dot(x, y, x_axis, y_axis):
  """float32 product of two matrices over an axis of each; float32 operands are multiplied as such."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def each_part(group, queries, step, most):
  """step([(head, slice of queries), ...]) over all parts of a tile, `most` at a time.

  A part is some 256 queries of one head, independent of the others: while the vector unit works on one, the matrix
  unit has another. For that a step loads what all its parts need before it stores anything; the compiler does not
  know that the parts lie apart. Backward two parts are enough.
  """
  width = PART_QUERIES if queries % PART_QUERIES == 0 else queries
  lanes = [slice(first, first + width) for first in range(0, queries, width)]
  lanes = [lanes[i:i + most] for i in range(0, len(lanes), most)]
  heads = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * len(lanes[0]) <= most))

  def some(i, _):
    for part in lanes:
      step([(i * heads + g, lane) for g in range(heads) for lane in part])
    return 0

  lax.fori_loop(0, group // heads, some, 0)


def visible(bounds, first_key, shape):
  """bool[keys, queries]: whether each query, whose run bounds[2, queries] holds, sees each key of a tile."""
  key = first_key + lax.broadcasted_iota(jnp.int32, shape, 0)
  return (key >= bounds[0:1]) & (key < bounds[1:2])


def attend(q, k, v, begin, end, *, scale, window=None, tiles=None, interpret=False):
  """Softmax attention of each query over the keys begin .. end - 1.

  Args:
    q: [B, T, N, H], bfloat16 or float32.
    k, v: [B, S, K, H] of the same dtype.
    begin, end: int32[B, T].
    scale: of the scores, a number.
    window: the longest run, or None; the grid is as long as that takes.
    tiles: (queries, keys) of a tile; None is `tile_sizes`. On a TPU multiples of 128.
    interpret: for `pl.pallas_call`.

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N], both differentiable (q, k, v).
  """
  tiles = tiles or tile_sizes(q.shape[1], k.shape[1], q.shape[2] // k.shape[2], window, q.dtype)
  return _attend(q, k, v, begin, end, (float(scale), window, tiles, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, begin, end, static):
  return _forward(q, k, v, begin, end, static)[0]


class _Call:
  """The shapes of one call and its padded inputs."""

  def __init__(self, q, k, begin, end, static):
    self.scale, window, (self.bt, self.bk), self.interpret = static
    self.together = (1, 1) if q.dtype == jnp.float32 else (4, 2)  # parts, forward and backward; see `tile_sizes`
    self.B, self.T, self.N, self.H = q.shape
    self.S, self.K = k.shape[1:3]
    self.G = self.N // self.K
    self.nq, self.nk = -(-self.T // self.bt), -(-self.S // self.bk)
    self.padded_T, self.padded_S = self.nq * self.bt, self.nk * self.bk
    # A tile of queries sees runs that begin within its own length of each other, not aligned to tiles.
    self.key_steps, self.query_steps = self.nk, self.nq
    if window is not None:
      self.key_steps = min(self.nk, (self.bt + window - 2) // self.bk + 2)
      self.query_steps = min(self.nq, (self.bk + window - 2) // self.bt + 2)
    begin, end = (spans.pad_queries(x, self.padded_T) for x in (begin, end))
    self.bounds = jnp.stack([begin, end], axis=1)
    self.query_tiles = spans.query_tiles(begin, end, self.bt, self.bk)

  def row(self, x):
    """[B, T, N] to [B, K, G, padded T]."""
    x = x.reshape(self.B, self.T, self.K, self.G).transpose(0, 2, 3, 1)
    return spans.pad_queries(x, self.padded_T)

  def specs(self, by_keys):
    """Block specs (of [G, H, bt], [G, bt], [2, bt] and [bk, H]) and the grid.

    The grid is (B, K, query tile, step over key tiles), or with `by_keys` (B, K, key tile, step over query
    tiles). The last prefetched table says which tile a step takes.
    """
    outer, wide = (self.nk, 2) if by_keys else (self.nq, 4)

    def inner(b, i, j, *tables):
      at = (b * outer + i) * wide
      first, stop = tables[-1][at], tables[-1][at + 1]
      return jnp.minimum(first + j, jnp.maximum(stop - 1, first))

    query = inner if by_keys else lambda b, i, j, *tables: i
    key = (lambda b, i, j, *tables: i) if by_keys else inner
    spec = pl.BlockSpec
    return (
        spec((1, 1, self.G, self.H, self.bt), lambda b, r, i, j, *t: (b, r, 0, 0, query(b, i, j, *t))),
        spec((1, 1, self.G, self.bt), lambda b, r, i, j, *t: (b, r, 0, query(b, i, j, *t))),
        spec((1, 2, self.bt), lambda b, r, i, j, *t: (b, 0, query(b, i, j, *t))),
        spec((1, 1, self.bk, self.H), lambda b, r, i, j, *t: (b, r, key(b, i, j, *t), 0)),
    ), (self.B, self.K, outer, self.query_steps if by_keys else self.key_steps)

  def run(self, body, name, tables, grid, in_specs, out_specs, out_shape, scratch, *args):
    return pl.pallas_call(
        body, name=name, out_shape=out_shape, interpret=self.interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables), grid=grid, in_specs=in_specs, out_specs=out_specs,
            scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT),
    )(*(x.reshape(-1) for x in tables), *args)

  def masked_and_not(self, tile_of_queries, tile_of_keys, active, query_tiles, bounds_ref, step):
    """step(mask) if active, with mask None where every query of the tile sees every key of it."""
    at = tile_of_queries * 4
    first_key = tile_of_keys * self.bk
    full = (first_key >= query_tiles[at + 2]) & (first_key + self.bk <= query_tiles[at + 3])
    pl.when(active & full)(lambda: step(None))
    pl.when(active & ~full)(lambda: step(visible(bounds_ref[0], first_key, (self.bk, self.bt))))


def _forward(q, k, v, begin, end, static):
  c = _Call(q, k, begin, end, static)
  (wide, row, bound, key), grid = c.specs(by_keys=False)

  def body(tiles, bounds_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, acc, top, total):
    tile, j = pl.program_id(0) * c.nq + pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)
      top[...] = jnp.full_like(top, -jnp.inf)
      total[...] = jnp.zeros_like(total)

    def step(mask):
      keys, values = k_ref[0, 0], v_ref[0, 0]

      def some(parts):
        scores = [dot(keys, q_ref[0, 0, g, :, lane], 1, 0) for g, lane in parts]
        before = [(top[pl.ds(g, 1), lane], total[pl.ds(g, 1), lane], acc[g, :, lane]) for g, lane in parts]
        after = []
        for (_, lane), s, (old, sums, o) in zip(parts, scores, before):
          s *= c.scale * LOG2E
          if mask is not None:
            s = jnp.where(mask[:, lane], s, -jnp.inf)
          new = jnp.maximum(old, s.max(axis=0, keepdims=True))
          shift = new if mask is None else jnp.where(new == -jnp.inf, 0.0, new)
          p, decay = jnp.exp2(s - shift), jnp.exp2(old - shift)
          o = o * decay + dot(values, p.astype(values.dtype), 0, 0)
          after.append((new, sums * decay + p.sum(axis=0, keepdims=True), o))
        for (g, lane), state in zip(parts, after):
          top[pl.ds(g, 1), lane], total[pl.ds(g, 1), lane], acc[g, :, lane] = state

      each_part(c.G, c.bt, some, c.together[0])

    key_tile = tiles[tile * 4] + j
    c.masked_and_not(tile, key_tile, key_tile < tiles[tile * 4 + 1], tiles, bounds_ref, step)

    @pl.when(j == c.key_steps - 1)
    def _():
      some = total[...] > 0
      safe = jnp.where(some, total[...], 1.0)
      lse_ref[0, 0] = jnp.where(some, top[...] / LOG2E + jnp.log(safe), -jnp.inf)

      def write(parts):
        for g, lane in parts:
          sums = total[pl.ds(g, 1), lane]
          o_ref[0, 0, g, :, lane] = (acc[g, :, lane] / jnp.where(sums > 0, sums, 1.0)).astype(o_ref.dtype)

      each_part(c.G, c.bt, write, 1)

  o, lse = c.run(
      body, "attention_forward", [c.query_tiles], grid, [bound, wide, key, key], [wide, row],
      [jax.ShapeDtypeStruct((c.B, c.K, c.G, c.H, c.padded_T), q.dtype),
       jax.ShapeDtypeStruct((c.B, c.K, c.G, c.padded_T), jnp.float32)],
      [pltpu.VMEM((c.G, c.H, c.bt), jnp.float32), pltpu.VMEM((c.G, c.bt), jnp.float32),
       pltpu.VMEM((c.G, c.bt), jnp.float32)],
      c.bounds, heads_first(q, c.K, c.padded_T), keys_second(k, c.padded_S), keys_second(v, c.padded_S))
  o, lse = queries_first(o, c.T), queries_first(lse[:, :, :, None], c.T)[..., 0]
  o, lse = backends.attended((o, lse))
  return (o, lse), (q, k, v, begin, end, o, lse)


def _backward(static, residuals, cotangents):
  q, k, v, begin, end, o, lse = residuals
  do, dlse = cotangents
  c = _Call(q, k, begin, end, static)
  some = lse > -jnp.inf
  delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=-1) - dlse
  delta = c.row(jnp.where(some, delta, 0.0))
  base2 = c.row(jnp.where(some, lse * LOG2E, 0.0))  # rows that see nothing are masked wherever they are read
  args = (c.bounds, heads_first(q, c.K, c.padded_T), keys_second(k, c.padded_S), keys_second(v, c.padded_S),
          heads_first(do, c.K, c.padded_T), base2, delta)
  shapes = jax.ShapeDtypeStruct((c.B, c.K, c.G, c.H, c.padded_T), q.dtype)

  def gradient(mask, part, keys, values, q_ref, do_ref, lse_ref, delta_ref):
    """P and the gradient of the scores, [keys, queries] each, in the dtype of the inputs."""
    g, lane = part
    s = dot(keys, q_ref[0, 0, g, :, lane], 1, 0) * (c.scale * LOG2E)
    p = jnp.exp2(s - lse_ref[0, 0, pl.ds(g, 1), lane])
    if mask is not None:
      p = jnp.where(mask[:, lane], p, 0.0)
    ds = p * (dot(values, do_ref[0, 0, g, :, lane], 1, 0) - delta_ref[0, 0, pl.ds(g, 1), lane])
    return p.astype(keys.dtype), ds.astype(keys.dtype)

  def of_queries(tiles, bounds_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, acc):
    tile, j = pl.program_id(0) * c.nq + pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)

    def step(mask):
      keys, values = k_ref[0, 0], v_ref[0, 0]

      def some(parts):
        of_parts = [gradient(mask, part, keys, values, q_ref, do_ref, lse_ref, delta_ref)[1] for part in parts]
        sums = [acc[g, :, lane] + dot(keys, ds, 0, 0) for (g, lane), ds in zip(parts, of_parts)]
        for (g, lane), x in zip(parts, sums):
          acc[g, :, lane] = x

      each_part(c.G, c.bt, some, c.together[1])

    key_tile = tiles[tile * 4] + j
    c.masked_and_not(tile, key_tile, key_tile < tiles[tile * 4 + 1], tiles, bounds_ref, step)

    @pl.when(j == c.key_steps - 1)
    def _():
      def write(parts):
        for g, lane in parts:
          dq_ref[0, 0, g, :, lane] = (acc[g, :, lane] * c.scale).astype(dq_ref.dtype)

      each_part(c.G, c.bt, write, 1)

  (wide, row, bound, key), grid = c.specs(by_keys=False)
  dq = c.run(of_queries, "attention_backward_q", [c.query_tiles], grid, [bound, wide, key, key, wide, row, row],
             wide, shapes, [pltpu.VMEM((c.G, c.H, c.bt), jnp.float32)], *args)

  def of_keys(tiles, key_tiles, bounds_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref,
              dk, dv):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
      dk[...] = jnp.zeros_like(dk)
      dv[...] = jnp.zeros_like(dv)

    def step(mask):
      keys, values = k_ref[0, 0], v_ref[0, 0]

      def some(parts):
        more_k, more_v = 0.0, 0.0
        for g, lane in parts:
          p, ds = gradient(mask, (g, lane), keys, values, q_ref, do_ref, lse_ref, delta_ref)
          more_v += dot(p, do_ref[0, 0, g, :, lane], 1, 1)
          more_k += dot(ds, q_ref[0, 0, g, :, lane], 1, 1)
        dk[...] += more_k
        dv[...] += more_v

      each_part(c.G, c.bt, some, c.together[1])

    at = (b * c.nk + i) * 2
    query_tile = key_tiles[at] + j
    active = query_tile < key_tiles[at + 1]
    # A step past the last tile must not read past the table.
    of_table = b * c.nq + jnp.where(active, query_tile, 0)
    c.masked_and_not(of_table, i, active, tiles, bounds_ref, step)

    @pl.when(j == c.query_steps - 1)
    def _():
      dk_ref[0, 0] = (dk[...] * c.scale).astype(dk_ref.dtype)
      dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)

  (wide, row, bound, key), grid = c.specs(by_keys=True)
  of_k = jax.ShapeDtypeStruct((c.B, c.K, c.padded_S, c.H), k.dtype)
  sums = pltpu.VMEM((c.bk, c.H), jnp.float32)
  dk, dv = c.run(
      of_keys, "attention_backward_kv", [c.query_tiles, spans.key_tiles(c.query_tiles, c.nk)], grid,
      [bound, wide, key, key, wide, row, row], [key, key], [of_k, of_k], [sums, sums], *args)
  tokens_first = lambda x: x.transpose(0, 2, 1, 3)[:, :c.S]
  return queries_first(dq, c.T), tokens_first(dk), tokens_first(dv), *backends.no_gradient((begin, end))


_attend.defvjp(_forward, _backward)
