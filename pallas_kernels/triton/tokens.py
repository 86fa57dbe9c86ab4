"""`token_top_k` and `token_attention` of `pallas_kernels.api`: sets of single tokens, one bit per (query, set, key).

The choice makes the index scores of as many queries as `SCORE_BYTES` hold, once, and finds the last score that is
taken: in registers, bit by bit, up to `REGISTER_KEYS` keys, beyond by histograms in four passes over the row.
Attention multiplies whole tiles and masks them by the bits: a block of keys of which no query of a tile has a token is
left out, any other costs what dense attention pays for it. The same set serves all kernels, so no score is made again.
No atomics on numbers that round: equal inputs give equal bits.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import lists, spans
from pallas_kernels.triton import call, lightning, ranged, token_kernels as kernels, tuning

SCORE_BYTES = 2 ** 30  # of float32 scores alive at a time
REGISTER_KEYS = 32768  # of a row that one program holds, 64 of them in each of 512 threads
CHUNK = 4096           # keys at a time of longer rows


def supports_token_top_k(*, q_idx, k_idx, **_):
  return lightning.index_reasons(q_idx, k_idx)


def supports_token_attention(*, q, k, v, scale, **_):
  return ranged.reasons(q, k, v, scale)


# --- the choice ---


def token_top_k(q_idx, index_weights, k_idx, *, num_tokens, segment_ids, query_offset):
  """See `pallas_kernels.api.token_top_k`."""
  low, high = spans.visible_keys(*q_idx.shape[:2], k_idx.shape[1], segment_ids, query_offset)
  return call.batched(functools.partial(_choose, num_tokens=num_tokens))(q_idx, index_weights, k_idx, low, high)


def _choose(q_idx, weights, k_idx, low, high, *, num_tokens):
  (B, T, R), S = q_idx.shape[:3], k_idx.shape[1]
  slices, _ = lists.slices_of(T, B * R * S * 4, SCORE_BYTES)
  chunk = max(32, call.next_power_of_2(S)) if S <= REGISTER_KEYS else CHUNK
  warps = max(4, chunk // 2048) if S <= REGISTER_KEYS else 4
  words = -(-S // 32)

  def one(q_idx, weights, low, high, first):
    del first
    T = q_idx.shape[1]
    low, high = (jnp.where(x < 0, 0, x) for x in (low, high))  # padding sees nothing
    constants = lightning.index_constants(q_idx, k_idx, lambda block: block)
    items = B * R * -(-T // constants["TOKENS"])
    splits = max(1, min(4 * call.processors() // items, S // (2 * constants["BLOCK"])))  # few queries in decoding
    scores = call.kernel_call(
        kernels.token_scores_kernel, (q_idx, weights, k_idx, low, high),
        jax.ShapeDtypeStruct((B, T, R, S), jnp.float32), grid=(items * splits,), name="token_scores", SPLITS=splits,
        **constants)
    sets = call.kernel_call(
        kernels.token_choose_kernel, (scores, low, high), jax.ShapeDtypeStruct((B, T, R, words), jnp.int32),
        grid=(B * T * R,), name="choose_tokens", num_warps=warps, num_stages=1, R=R, S=S, COUNT=num_tokens,
        WORDS=words, CHUNK=chunk)
    return sets, None, None

  return lists.in_slices(one, slices, (q_idx, weights, low, high))[0]


# --- attention ---


def token_attention(q, k, v, token_sets, *, scale):
  """See `pallas_kernels.api.token_attention`."""
  T, N, H = q.shape[1:]
  C, K = k.shape[1:3]
  sizes = ranged.Sizes(T, C, K, N // K, H, float(scale), "ieee" if q.dtype == jnp.float32 else "tf32")
  return _attend(q, k, v, token_sets, sizes)


def _tuned(kernel, q, keys):
  """Its shape: a block of keys is some words of a set."""
  tuned = tuning.get(kernel, head_dim=q.shape[3], dtype=q.dtype, length=keys)
  return tuned._replace(block=max(tuned.block, 32))


def _constants(sets, sizes, tuned, rows):
  return dict(sizes.constants(sets.shape[0]), R=sets.shape[2], WORDS=sets.shape[3], ROWS=rows, BLOCK=tuned.block,
              num_warps=tuned.warps, num_stages=tuned.stages)


def _occupied(sets, tokens, block):
  """bool[B, R, tiles, blocks]: whether a query of a tile of `tokens` has a token of a block."""
  B, T, R, words = sets.shape
  tiles, blocks, size = -(-T // tokens), -(-words // (block // 32)), block // 32
  some = jnp.pad(sets != 0, ((0, 0), (0, tiles * tokens - T), (0, 0), (0, blocks * size - words)))
  return some.reshape(B, tiles, tokens, R, blocks, size).any((2, 5)).swapaxes(1, 2)


def _walk(occupied):
  """The occupied columns of each row, in order and before the others, int32; and how many, int32."""
  count = occupied.shape[-1]
  column = jnp.arange(count, dtype=jnp.int32)
  order = jnp.sort(jnp.where(occupied, column, column + count), axis=-1, stable=False)
  return order, occupied.sum(-1, dtype=jnp.int32)


def _forward(q, k, v, sets, sizes):
  """o and lse, not differentiable."""
  B, T, N, H = q.shape
  tuned = _tuned("range_forward", q, sizes.C)
  rows = sizes.rows(tuned.rows)
  programs = B * sizes.K * -(-T // (rows // sizes.GP))
  splits = 1
  if T == 1 or 4 * programs <= call.processors():
    tuned = _tuned("range_decode", q, sizes.C)
    splits = max(1, min(4 * call.processors() // programs, sizes.C // (4 * tuned.block), 64))
  dtype = q.dtype if splits == 1 else jnp.float32
  o, lse = call.kernel_call(
      kernels.forward_kernel, (q, k, v, sets, *_walk(_occupied(sets, rows // sizes.GP, tuned.block))),
      [jax.ShapeDtypeStruct((splits, B, T, N, H), dtype), jax.ShapeDtypeStruct((splits, B, T, N), jnp.float32)],
      grid=(programs * splits,), name="token_attention_forward", SPLITS=splits,
      **_constants(sets, sizes, tuned, rows))
  return (o[0], lse[0]) if splits == 1 else ranged.combine(o, lse, q.dtype)


def _backward(q, k, v, sets, o, lse, do, dlse, sizes):
  """dq, dk, dv."""
  B, T, N, H = q.shape
  C, K = sizes.C, sizes.K
  do = do.astype(q.dtype)
  delta = ranged.row_terms(o, lse, do, dlse)
  tuned = _tuned("range_dq", q, C)
  rows = sizes.rows(tuned.rows)
  dq, base_2 = call.kernel_call(
      kernels.dq_kernel, (q, k, v, do, lse, delta, sets, *_walk(_occupied(sets, rows // sizes.GP, tuned.block))),
      [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)],
      grid=(B * K * -(-T // (rows // sizes.GP)),), name="token_attention_dq", FACTOR=sizes.scale,
      **_constants(sets, sizes, tuned, rows))
  tuned = _tuned("range_dkv", q, C)
  rows, blocks = sizes.rows(tuned.rows), -(-C // tuned.block)
  tiles = -(-T // (rows // sizes.GP))
  splits = max(1, min(-(-8 * call.processors() // (B * K * blocks)), tiles // 4, 32))
  parts = jax.ShapeDtypeStruct((B, splits, C, K, H), jnp.float32)
  occupied = _occupied(sets, rows // sizes.GP, tuned.block).swapaxes(2, 3)
  dk, dv = call.kernel_call(
      kernels.dkv_kernel, (q, k, v, do, base_2, delta, sets, *_walk(occupied)), [parts, parts],
      grid=(B * K * blocks * splits,), name="token_attention_dkv", FACTOR=sizes.scale, SPLITS=splits,
      **_constants(sets, sizes, tuned, rows))
  return dq, dk.sum(axis=1).astype(k.dtype), dv.sum(axis=1).astype(v.dtype)


_attend = call.differentiable(_forward, _backward)
