"""The writes of Titans' memories: `pallas_kernels.memory.write`, two kernels for a chunk forward and two backward."""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call, memory_kernels as kernels

FORWARD = call.Tiles(16, 1, 4)    # tokens of a program
BACKWARD = call.Tiles(16, 1, 8)
COLUMNS = call.Tiles(32, 1, 4)    # of a matrix, of a program
TOGETHER = 64                     # tokens of a product that is summed over tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def write(tokens, decays, anew, first, begin, clip, full, dtype):
  """As `pallas_kernels.memory.write`, of gains for each sequence: tokens["gain"] [B, R, I]."""
  return forward(tokens, decays, anew, first, begin, clip, dtype)


def _round(arrays, dtype):
  return tuple(x.astype(dtype) for x in arrays)


def forward(tokens, decays, anew, first, begin, clip, dtype):
  """(pairs, end, inputs of the second matrix, errors, pairs in `dtype`): two of each but the third."""
  def run(tokens, decays, anew, first, begin):
    (B, R, C, T, I), H = tokens["k"].shape, first[0].shape[-1]
    how = dict(R=R, C=C, T=T, I=I, H=H, PRECISION=_precision(dtype))
    shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, R) + shape, dtype)
    of = lambda *names: tuple(tokens[name] for name in names)
    fresh = anew[:, 0, None, None, None] != 0
    pair = tuple(jnp.where(fresh, jnp.concatenate([w, jnp.zeros_like(w)], 2), old) for w, old in zip(first, begin))
    chunks, low = [], _round(pair, dtype)
    for c in range(C):
      at = jnp.full((B,), c, jnp.int32)
      tile = min(T, FORWARD.rows)
      left = tuple(call.kernel_call(
          kernels.tokens_forward_kernel, (*of("k", "v", "step", "gain"), *low, at),
          [shape(T, H), shape(T, H, dtype=dtype), shape(T, I, dtype=dtype)], grid=(B * R * (T // tile),),
          name="memory_tokens", num_warps=FORWARD.warps, num_stages=1, LIMIT=float(clip) ** 2 * I, TILE=tile, **how))
      chunks.append((pair, left, low))
      part = min(COLUMNS.rows, I, H)
      new = call.kernel_call(
          kernels.weights_forward_kernel,
          (tokens["k"], *left, *of("leaving", "lasting"), decays, anew, *first, *pair, at),
          [shape(2 * I, H, dtype=d) if one else shape(2 * H, I, dtype=d) for d in (jnp.float32, dtype)
           for one in (True, False)], grid=(B * R * ((H + I) // part),), name="memory_weights",
          num_warps=COLUMNS.warps, num_stages=1, PART=part, TILE=min(T, TOGETHER), **how)
      pair, low = tuple(new[:2]), tuple(new[2:])
    pairs, left, low = jax.tree.map(lambda *x: jnp.stack(x, 2), *chunks)
    return pairs, pair, left[0], left[1:], low

  return call.batched(run)(tokens, decays, anew, first, begin)


def backward(tokens, decays, anew, first, pairs, lows, cotangents, clip, full, dtype):
  """Cotangents of tokens, decays, first and begin, for those of what `forward` returns."""
  def run(tokens, decays, anew, first, pairs, lows, dpairs, dend, dhidden, derrors):
    (B, R, C, T, I), H = tokens["k"].shape, first[0].shape[-1]
    how = dict(R=R, C=C, T=T, I=I, H=H, FULL=full, PRECISION=_precision(dtype))
    shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, R) + shape, dtype)
    dfirst = tuple(jnp.zeros_like(x) for x in first)
    tile, part = min(T, BACKWARD.rows), min(COLUMNS.rows, I, H)
    tiles, parts = T // tile, (H + I) // part
    chunks, low = [], _round(dend, dtype)
    for c in reversed(range(C)):
      at = jnp.full((B,), c, jnp.int32)
      *left, deep, wide = call.kernel_call(
          kernels.tokens_backward_kernel,
          (*(tokens[name] for name in (*ORDER, "gain")), *lows, *low, dhidden, *derrors, at),
          [shape(T, I), shape(T, I), shape(T), shape(T), shape(T), shape(tiles, I), shape(3, T, H, dtype=dtype),
           shape(2, T, I, dtype=dtype)], grid=(B * R * tiles,), name="memory_tokens_backward",
          num_warps=BACKWARD.warps, num_stages=1, LIMIT=float(clip) ** 2 * I, TILE=tile, **how)
      *new, ddecays = call.kernel_call(
          kernels.weights_backward_kernel,
          (tokens["k"], deep, wide, decays, anew, *pairs, *dpairs, *dend, *dfirst, at),
          [shape(2 * I, H), shape(2 * H, I), shape(2 * I, H, dtype=dtype), shape(2 * H, I, dtype=dtype), shape(I, H),
           shape(H, I), shape(parts, 3)], grid=(B * R * parts,),
          name="memory_weights_backward", num_warps=COLUMNS.warps, num_stages=1, PART=part, TILE=min(T, TOGETHER),
          **how)
      dend, low, dfirst = tuple(new[:2]), tuple(new[2:4]), tuple(new[4:])
      chunks.insert(0, (*left, ddecays))
    *left, dgain, ddecays = (jnp.stack(x, 2) for x in zip(*chunks))
    return dict(zip(ORDER, left), gain=dgain.sum((2, 3))), ddecays.sum(3), dfirst, dend

  return call.batched(run)(tokens, decays, anew, first, pairs, lows, *cotangents)


ORDER = ("k", "v", "step", "leaving", "lasting")


def _precision(dtype) -> Any:
  return "ieee" if dtype == jnp.float32 else "tf32"


def _forward_rule(tokens, decays, anew, first, begin, clip, full, dtype):
  out = forward(tokens, decays, anew, first, begin, clip, dtype)
  return out, (tokens, decays, anew, first, out[0], out[4])


def _backward_rule(clip, full, dtype, saved, cotangents):
  tokens, decays, anew, first, pairs, lows = saved
  tokens, decays, first, begin = backward(tokens, decays, anew, first, pairs, lows, cotangents[:4], clip, full, dtype)
  return tokens, decays, None, first, begin


write.defvjp(_forward_rule, _backward_rule)
