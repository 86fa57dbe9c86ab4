"""Attention over one run of keys per query: `attention` and `compressed_attention` of `pallas_kernels.api`.

Forward one kernel, backward two: dQ by tiles of queries, dK and dV by blocks of keys, which recompute the
scores from lse. No atomics: equal inputs give equal bits. Few queries (decoding) leave too few tiles for the
GPU; then each tile's keys are split over several programs whose results are combined.
"""
from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import spans
from pallas_kernels.triton import call, range_kernels, tuning

MIN_ROWS = 16  # the least M of a tensor core product
MAX_GROUP = 64
SPLIT_BELOW = 4  # programs for dK and dV per multiprocessor: with fewer, several share a block of keys


def reasons(q, k, v=None, scale=None, k_name="k"):
  """None, or why no kernel over q and k serves these arguments; shapes and dtypes only."""
  B, T, N, H = q.shape
  if call.unavailable():
    return call.unavailable()
  if q.dtype not in (jnp.bfloat16, jnp.float16) and not call.INTERPRET:
    return f"q.dtype = {q.dtype}: the kernels take bfloat16 and float16"
  if any(x is not None and x.dtype != q.dtype for x in (k, v)):
    return f"{k_name}.dtype = {k.dtype}: the kernels need that of q, {q.dtype}"
  if H not in (16, 32, 64, 128, 256):
    return f"q has head dim {H}: the kernels take 16, 32, 64, 128, 256"
  if N // k.shape[2] > MAX_GROUP:
    return f"q has {N // k.shape[2]} heads per KV head: the kernels take up to {MAX_GROUP}"
  if scale is not None and not (isinstance(scale, (int, float, np.floating, np.integer)) and scale > 0):
    return f"scale = {scale}: the kernels need a positive number that is not traced"
  if min(B, T, k.shape[1]) == 0:
    return f"q {q.shape} or {k_name} {k.shape} is empty"
  return None


def attention(q, k, v, *, causal, window, scale, segment_ids, query_offset, forward_pass=None):
  """See `pallas_kernels.api.attention`; forward_pass as in `attend`."""
  (B, T), S = q.shape[:2], k.shape[1]
  low, high = spans.of_tokens(spans.positions(T, query_offset, B), S, segment_ids, causal=causal, window=window)
  return attend(q, k, v, low, high, scale, forward_pass)


def compressed_attention(q, k_cmp, v_cmp, *, block_len, block_stride, scale, segment_ids, query_offset,
                         forward_pass=None):
  """See `pallas_kernels.api.compressed_attention`; forward_pass as in `attend`."""
  low, high = spans.of_compressed(spans.positions(q.shape[1], query_offset, q.shape[0]), k_cmp.shape[1], segment_ids,
                                  block_len=block_len, block_stride=block_stride)
  return attend(q, k_cmp, v_cmp, low, high, scale, forward_pass)


def supports_attention(*, q, k, v, scale, **_):
  return reasons(q, k, v, scale)


def supports_compressed_attention(*, q, k_cmp, v_cmp, scale, **_):
  return reasons(q, k_cmp, v_cmp, scale, "k_cmp")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the kernels take as constants; hashable."""
  T: int
  C: int
  K: int
  G: int
  H: int
  scale: float
  precision: str

  @property
  def GP(self):
    return call.next_power_of_2(self.G)

  def rows(self, tokens_wanted):
    """Rows of a tile: no more than the tokens fill."""
    return max(min(tokens_wanted, call.next_power_of_2(self.T) * self.GP), self.GP, MIN_ROWS)

  def constants(self, B):
    return dict(B=B, T=self.T, C=self.C, K=self.K, G=self.G, GP=self.GP, H=self.H,
                SCALE=self.scale * call.LOG2E, PRECISION=self.precision)


def attend(q, k, v, low, high, scale, forward_pass=None):
  """Attention of query t over the keys low[t] .. high[t] - 1; both do not decrease with t.

  Args:
    q: [B, T, N, H].
    k, v: [B, C, K, H].
    low, high: int32[B, T].
    scale: of the scores, a positive number.
    forward_pass: other code for the same o and lse, called like `forward`; None is `forward`.

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N], both differentiable (q, k, v).
  """
  B, T, N, H = q.shape
  C, K = k.shape[1:3]
  sizes = Sizes(T, C, K, N // K, H, float(scale), "ieee" if q.dtype == jnp.float32 else "tf32")
  return _attend(q, k, v, (low, high), (sizes, forward_pass or forward))


def forward(q, k, v, low, high, *, sizes):
  """o and lse, not differentiable."""
  B, T, N, H = q.shape
  tuned = tuning.get("range_forward", head_dim=H, dtype=q.dtype, length=sizes.C)
  rows = sizes.rows(tuned.rows)
  programs = B * sizes.K * -(-T // (rows // sizes.GP))
  splits = 1
  if T == 1 or 4 * programs <= call.processors():  # one token: the bytes of its keys take the time, never products
    tuned = tuning.get("range_decode", head_dim=H, dtype=q.dtype, length=sizes.C)
    splits = max(1, min(4 * call.processors() // programs, sizes.C // (4 * tuned.block), 64))
  dtype = q.dtype if splits == 1 else jnp.float32
  o, lse = call.kernel_call(
      range_kernels.forward_kernel, (q, k, v, low, high),
      [jax.ShapeDtypeStruct((splits, B, T, N, H), dtype), jax.ShapeDtypeStruct((splits, B, T, N), jnp.float32)],
      grid=(programs * splits,), name="range_attention_forward", num_warps=tuned.warps, num_stages=tuned.stages,
      SPLITS=splits, ROWS=rows, BLOCK=tuned.block, **sizes.constants(B))
  return (o[0], lse[0]) if splits == 1 else combine(o, lse, q.dtype)


def combine(o, lse, dtype):
  """Parts of the keys, softmax over each, to the softmax over all: float32 o [parts, ..., H] and lse [parts, ...].

  One kernel; XLA makes three.
  The last program of a tile to come adding the parts up, inside the kernel, was slower on an H200: one token of a cache
  of 1M, batch 1, NSA's three branches 0.30 ms and not 0.17; paged dense, 64K, 0.10 and not 0.06; lists 0.03 both ways.
  """
  parts, *rows, H = o.shape
  return tuple(call.kernel_call(
      range_kernels.combine_kernel, (o, lse),
      [jax.ShapeDtypeStruct((*rows, H), dtype), jax.ShapeDtypeStruct(tuple(rows), jnp.float32)],
      grid=(math.prod(rows),), name="combine_parts", num_warps=2, num_stages=1, ROWS=math.prod(rows), H=H, PARTS=parts,
      CHUNK=min(call.next_power_of_2(parts), 16), PP=call.next_power_of_2(parts)))


def row_terms(o, lse, do, dlse):
  """float32[B, T, N] that the gradient of a row's scores takes from dP.

  A row that sees nothing has an o of zeros and no gradient of its lse.
  """
  return jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - jnp.where(lse > -jnp.inf, dlse, 0.0)


def backward(q, k, v, low, high, o, lse, do, dlse, *, sizes):
  """dq, dk, dv."""
  B, T, N, H = q.shape
  C, K = k.shape[1:3]
  do = do.astype(q.dtype)
  tuned = tuning.get("range_dq", head_dim=H, dtype=q.dtype, length=C)
  rows = sizes.rows(tuned.rows)
  of_rows = jax.ShapeDtypeStruct(lse.shape, jnp.float32)
  dq, base_2, delta = call.kernel_call(
      range_kernels.dq_kernel, (q, k, v, o, do, lse, dlse, low, high),
      [jax.ShapeDtypeStruct(q.shape, q.dtype), of_rows, of_rows],
      grid=(B * K * -(-T // (rows // sizes.GP)),), name="range_attention_dq", num_warps=tuned.warps,
      num_stages=tuned.stages, FACTOR=sizes.scale, ROWS=rows, BLOCK=tuned.block, **sizes.constants(B))
  tuned = tuning.get("range_dkv", head_dim=H, dtype=q.dtype, length=C)
  rows, blocks = sizes.rows(tuned.rows), -(-C // tuned.block)
  tiles = -(-T // (rows // sizes.GP))
  splits = max(1, min(-(-SPLIT_BELOW * call.processors() // (B * K * blocks)), tiles // 4, 32))
  parts = jax.ShapeDtypeStruct((B, splits, C, K, H), k.dtype if splits == 1 else jnp.float32)
  dk, dv = call.kernel_call(
      range_kernels.dkv_kernel,
      (q, k, v, do, base_2, delta, low, high, who_sees(low, high, C, tuned.block)), [parts, parts],
      grid=(B * K * blocks * splits,), name="range_attention_dkv", num_warps=tuned.warps, num_stages=tuned.stages,
      FACTOR=sizes.scale, SPLITS=splits, ROWS=rows, BLOCK=tuned.block, **sizes.constants(B))
  if splits == 1:
    return dq, dk[:, 0], dv[:, 0]
  return dq, dk.sum(axis=1).astype(k.dtype), dv.sum(axis=1).astype(v.dtype)


_attend = call.differentiable(
    lambda q, k, v, seen, how: how[1](q, k, v, *seen, sizes=how[0]),
    lambda q, k, v, seen, o, lse, do, dlse, how: backward(q, k, v, *seen, o, lse, do, dlse, sizes=how[0]))


def who_sees(low, high, C, block):
  """int32[B, blocks, 4]: per block of keys the tokens [0] .. [1] - 1 that see some of it, [2] .. [3] - 1 all."""
  start = jnp.arange(0, C, block, dtype=jnp.int32)
  stop = jnp.minimum(start + block, C)
  find = functools.partial(jnp.searchsorted, method="scan_unrolled")

  def one(low, high):
    return jnp.stack([find(high, start, side="right"), find(low, stop, side="left"),
                      find(high, stop, side="left"), find(low, start, side="right")], axis=-1)

  return jax.vmap(one)(low, high).astype(jnp.int32)
