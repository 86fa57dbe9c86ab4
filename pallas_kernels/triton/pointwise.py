"""RMSNorm beside a residual stream, and SwiGLU's gate, each one pass over memory forward and one backward; the loss of
logits and its gradient in one pass together."""
from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call, pointwise_kernels as kernels

SIZE = 1024  # numbers of a program of `gate`
# Of a program of the norm's gradient, at most; of a thread at a time. On one H200, 32,768 rows of 384 and 512: 0.036
# and 0.043 ms, with 32 rows 0.041 and 0.048, with 8 numbers 0.034 and 0.053.
NORM_ROWS, NORM_NUMBERS = 64, 4
LOSS = call.Tiles(16384, 1, 32)  # logits that a program of `nll` has at a time; one program to a multiprocessor


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm(x, more, gain, eps):
  """(x + more, RMSNorm of it): the residual stream goes on beside the norm, whose pass sums its gradient.

  Args:
    x: [B, T, D].
    more: like x, or None for nothing.
    gain: float32[D].
  """
  return _norm_forward(x, more, gain[None], eps)


def _norm_forward_rule(x, more, gain, eps):
  whole, out = norm(x, more, gain, eps)
  return (whole, out), (whole, None if more is None else (), gain)


def _norm_backward_rule(eps, saved, cotangents):
  whole, added, gain = saved
  beside, dout = (y.astype(whole.dtype) for y in cotangents)
  dx, dgain = _norm_backward(whole, gain[None], dout, beside, eps)
  return dx, None if added is None else dx, dgain[0]


norm.defvjp(_norm_forward_rule, _norm_backward_rule)


def _norm_tiles(D):
  """Fewer rows of wide ones, whose numbers fill the registers; `fused.ROWS` is a multiple of the rows. On one H200,
  32,768 rows, forward: 384 wide 0.025 ms; 576 wide 0.036, with 8 rows 0.041."""
  return call.Tiles(max(1, min(8, 4096 // call.next_power_of_2(D))), 1, 4)


def _norm_pieces(T, D):
  """(tiles of the backward pass, numbers of a piece of a row): so many numbers per thread, up to 5 pieces."""
  piece = max(128, call.next_power_of_2(-(-D // 5)))
  rows = max(1, NORM_NUMBERS * 128 // piece)
  return call.Tiles(rows, math.gcd(NORM_ROWS // rows, T // rows), 4), piece


def _norm_how(x, gain, eps, tiles):
  B, T, D = x.shape
  return dict(grid=(B * T // (tiles.rows * tiles.count),), num_warps=tiles.warps, num_stages=1, M=B * T,
              R=gain.shape[0], D=D, EPS=eps, ROWS=tiles.rows)


def _norm_forward(x, more, gain, eps):
  def run(x, more, gain):
    add = more is not None
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape if add else (x.shape[0],), x.dtype)]
    out, whole = call.kernel_call(kernels.norm_forward_kernel, (x, more if add else x, gain), outputs, ADD=add,
                                  name="norm_forward", WIDTH=call.next_power_of_2(x.shape[2]),
                                  **_norm_how(x, gain, eps, _norm_tiles(x.shape[2])))
    return out, whole if add else None

  out, whole = call.batched(run)(x, more, gain)
  return x if more is None else whole, out


def _norm_backward(x, gain, dout, beside, eps):
  def run(x, gain, dout, beside):
    tiles, piece = _norm_pieces(*x.shape[1:])
    how = _norm_how(x, gain, eps, tiles)
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((*how["grid"], x.shape[2]), jnp.float32)]
    dx, dgain = call.kernel_call(kernels.norm_backward_kernel, (x, gain, dout, beside), outputs, name="norm_backward",
                                 TILES=tiles.count, PIECE=piece, **how)
    return dx, dgain.reshape(gain.shape[0], -1, x.shape[2]).sum(1)

  return call.batched(run)(x, gain, dout, beside)


@jax.custom_vjp
def gate(y):
  """silu(y[..., :F]) * y[..., F:] of y [B, T, 2F]."""
  return _gate_forward(y)


def _gate_forward(y):
  def run(y):
    B, T, F = *y.shape[:2], y.shape[2] // 2
    return call.kernel_call(kernels.gate_forward_kernel, (y,), jax.ShapeDtypeStruct((B, T, F), y.dtype),
                            grid=(-(-B * T * F // SIZE),), name="gate_forward", num_warps=4, num_stages=1, M=B * T, F=F,
                            SIZE=SIZE)

  return call.batched(run)(y)


def _gate_backward(y, dout):
  def run(y, dout):
    B, T, F = *y.shape[:2], y.shape[2] // 2
    return call.kernel_call(kernels.gate_backward_kernel, (y, dout), jax.ShapeDtypeStruct(y.shape, y.dtype),
                            grid=(-(-B * T * F // SIZE),), name="gate_backward", num_warps=4, num_stages=1,
                            M=B * T, F=F, SIZE=SIZE)

  return call.batched(run)(y, dout)


gate.defvjp(lambda y: (gate(y), y), lambda y, dout: (_gate_backward(y, dout.astype(y.dtype)),))


def nll(logits, targets, shares, dtype):
  """(negative log-likelihood of the targets, float32[B, T]; the gradient of sum(shares * it), [B, T, V] of `dtype`).

  Args:
    logits: float32[B, T, V].
    targets: int32[B, T]; outside of 0 to V - 1 nothing is a target.
    shares: float32[B, T].
  """
  def run(logits, targets, shares):
    B, T, V = logits.shape
    outputs = [jax.ShapeDtypeStruct((B, T), jnp.float32), jax.ShapeDtypeStruct((B, T, V), dtype)]
    size = min(LOSS.rows, call.next_power_of_2(V))
    return call.kernel_call(kernels.nll_kernel, (logits, targets, shares), outputs, grid=(B * T,), name="nll",
                            num_warps=max(1, min(LOSS.warps, size // 512)), num_stages=1, V=V, SIZE=size)

  return call.batched(run)(logits, targets, shares)
