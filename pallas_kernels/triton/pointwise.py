"""RMSNorm beside a residual stream, and SwiGLU's gate, each one pass over memory forward and one backward."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call, pointwise_kernels as kernels

ROWS, TILES = 8, 4  # of a tile of a norm, and tiles of a program backward: together `fused.ROWS`
SIZE = 1024         # numbers of a program of `gate`


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def norm(x, gain, eps):
  """(x, RMSNorm of x): the residual stream goes on beside the norm, so that its gradient is summed in the norm's pass.

  Args:
    x: [B, T, D].
    gain: float32[D].
  """
  return x, _norm_forward(x, gain[None], eps)


def _norm_forward_rule(x, gain, eps):
  return norm(x, gain, eps), (x, gain)


def _norm_backward_rule(eps, saved, cotangents):
  x, gain = saved
  beside, dout = (y.astype(x.dtype) for y in cotangents)
  dx, dgain = _norm_backward(x, gain[None], dout, beside, eps)
  return dx, dgain[0]


norm.defvjp(_norm_forward_rule, _norm_backward_rule)


def _norm_sizes(x, gain):
  B, T, D = x.shape
  return dict(M=B * T, R=gain.shape[0], D=D, WIDTH=call.next_power_of_2(D), ROWS=ROWS)


def _norm_forward(x, gain, eps):
  def run(x, gain):
    return call.kernel_call(kernels.norm_forward_kernel, (x, gain), jax.ShapeDtypeStruct(x.shape, x.dtype),
                            grid=(x.shape[0] * x.shape[1] // ROWS,), name="norm_forward", num_warps=4, num_stages=1,
                            EPS=eps, **_norm_sizes(x, gain))

  return call.batched(run)(x, gain)


def _norm_backward(x, gain, dout, beside, eps):
  def run(x, gain, dout, beside):
    programs = x.shape[0] * x.shape[1] // (ROWS * TILES)
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((programs, x.shape[2]), jnp.float32)]
    dx, dgain = call.kernel_call(kernels.norm_backward_kernel, (x, gain, dout, beside), outputs, grid=(programs,),
                                 name="norm_backward", num_warps=4, num_stages=1, EPS=eps, TILES=TILES,
                                 **_norm_sizes(x, gain))
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
