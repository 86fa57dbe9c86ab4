"""Titans' memories read for all chunks side by side: `pallas_kernels.memory.mix` and `read`, a kernel each forward, one
backward of decays, three of reading."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call, memory_read_kernels as kernels
from pallas_kernels.triton.memory import _precision

AHEAD = 4                         # rows of a chunk's decays that are on their way
FORWARD = call.Tiles(64, 2, 4)    # tokens of a program; parts of them that are written at a time
ROWS = call.Tiles(64, 2, 4)
SUMS = call.Tiles(64, 1, 8)       # tokens whose sums a program makes, and of a product
STAGES = 2


@jax.custom_vjp
def mix(keep, momentum, live):
  """`pallas_kernels.memory.mix`."""
  return _mix_forward(keep, momentum, live)[0]


def _mix_forward(keep, momentum, live):
  def run(keep, momentum, live):
    *lead, T = keep.shape
    shape = lambda *shape: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
    return tuple(call.kernel_call(
        kernels.mixing_forward_kernel, (keep, momentum, live), [shape(T, T), *[shape(T)] * 4, shape(3)],
        grid=(keep.size // T,), name="memory_mixing", num_warps=1, num_stages=1, T=T))

  out = call.batched(run)(keep, momentum, live)
  return out, (keep, momentum, live, *out[:3])


def _mix_backward(saved, cotangents):
  def run(keep, *rest):
    T, shape = keep.shape[-1], jax.ShapeDtypeStruct(keep.shape, jnp.float32)
    return tuple(call.kernel_call(
        kernels.mixing_backward_kernel, (keep, *rest), [shape, shape], grid=(keep.size // T,),
        name="memory_mixing_backward", num_warps=1, num_stages=1, T=T, STAGES=AHEAD))

  return (*call.batched(run)(*saved, *cotangents), None)


mix.defvjp(_mix_forward, _mix_backward)


@jax.custom_vjp
def read(q, live, gain, mixing, k, hidden, errors, pairs, low):
  """`pallas_kernels.memory.read`, of gains for each sequence [B, R, I]; mixing: (C, beta, gamma); low: `pairs` as
  products take them, which get their gradient in float32."""
  return _read_forward(q, live, gain, mixing, k, hidden, errors, pairs, low)[0]


def _how(q, k, hidden, errors):
  _, R, C, T, I = k.shape
  return dict(R=R, C=C, G=q.shape[3], T=T, I=I, H=hidden.shape[-1], PRECISION=_precision(errors[0].dtype))


def _operands(k, hidden, errors, low):
  """Rounded once, not by every program that reads them."""
  return *(x.astype(errors[0].dtype) for x in (k, hidden)), *errors, *low


def _tiles(T, tiles):
  rows = min(T, tiles.rows)
  return dict(TILE=rows, PART=max(16, rows // tiles.count))


def _read_forward(*args):
  def run(q, live, gain, mixing, k, hidden, errors, low):
    how, tiles = _how(q, k, hidden, errors), _tiles(k.shape[3], FORWARD)
    return call.kernel_call(
        kernels.read_forward_kernel, (q, live, gain, *mixing, *_operands(k, hidden, errors, low)),
        jax.ShapeDtypeStruct(q.shape, jnp.float32), grid=(q.size // (how["I"] * tiles["TILE"]),), name="memory_read",
        num_warps=FORWARD.warps, num_stages=STAGES, **tiles, **how)

  *args, _, low = args
  return call.batched(run)(*args, low), (*args, low)


def _read_backward(saved, dy):
  def run(q, live, gain, mixing, k, hidden, errors, low, dy):
    how = _how(q, k, hidden, errors)
    (B, R, C, T, I), H, G, dtype = k.shape, how["H"], how["G"], errors[0].dtype
    shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, R, C, *shape), dtype)
    operands, tiles = _operands(k, hidden, errors, low), _tiles(T, ROWS)
    parts = T // tiles["TILE"]
    dq, *dmixing, dgain, a0, a1, dz0, dz1 = call.kernel_call(
        kernels.read_rows_kernel, (q, live, gain, *mixing, *operands, dy),
        [jax.ShapeDtypeStruct(q.shape, q.dtype), shape(T, T), shape(T), shape(T), shape(parts, I),
         *[shape(G, T, n, dtype=dtype) for n in (I, H, H, I)]], grid=(B * R * C * parts,),
        name="memory_read_rows", num_warps=ROWS.warps, num_stages=STAGES, **tiles, **how)
    tile, sums = min(T, SUMS.rows), []
    for a, dz, keys, error in zip((a0, a1), (dz0, dz1), operands[:2], errors):
      I, O = keys.shape[-1], error.shape[-1]
      sums.append(call.kernel_call(
          kernels.read_sums_kernel, (a, dz, keys, error, *mixing),
          [shape(2 * I, O), shape(T, I), shape(T, O, dtype=dtype)], grid=(B * R * C * (T // tile + 1),),
          name="memory_read_sums", num_warps=SUMS.warps, num_stages=STAGES, G=G, T=T, I=I, O=O, TILE=tile,
          PRECISION=how["PRECISION"]))
    dpairs, (dk, dhidden), derrors = zip(*sums)
    return dq, dgain.sum((2, 3)), tuple(dmixing), dk, dhidden, derrors, dpairs

  dq, *rest = call.batched(run)(*saved, dy)
  return (dq, None, *rest, None)


read.defvjp(_read_forward, _read_backward)
