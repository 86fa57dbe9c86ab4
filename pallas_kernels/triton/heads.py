"""Short convolution, RMSNorm per head and rotary embedding in one pass over memory, and their gradient in another.

XLA makes a dozen passes of them: shifted copies for the convolution, a reduction and a pass for the norm, halves cut
and joined for the rotation, a reduction for each tap and gain. Between the steps numbers stay float32 here.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton import call, heads_kernels

ROWS = 32  # tokens of a tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def heads(y, taps, gain, cos, sin, first, eps):
  """[B, T, N, H] in y.dtype, convolved, normed and rotated.

  Args:
    y: [B, T, N, H], a projection of the hidden state; H a power of two, 16 or more.
    taps: float32[W, N, H] or None for no convolution; taps[0] is of the present token.
    gain: float32[H] or None for no norm.
    cos, sin: float32[T, H / 2], or None for no rotation.
    first: int32[B, T], the first token of each token's segment.
    eps: of the norm.
  """
  return _forward(y, _rows(taps), _rows(gain), cos, sin, first, eps)


def _forward_rule(y, taps, gain, cos, sin, first, eps):
  return heads(y, taps, gain, cos, sin, first, eps), (y, taps, gain, cos, sin, first)


def _backward_rule(eps, saved, do):
  y, taps, gain, cos, sin, first = saved
  dy, dtaps, dgain = _backward(y, _rows(taps), _rows(gain), cos, sin, first, do.astype(y.dtype), eps)
  zeros = lambda x: None if x is None else jnp.zeros_like(x)
  return (dy, None if taps is None else dtaps[0], None if gain is None else dgain[0], zeros(cos), zeros(sin),
          np.zeros(first.shape, jax.dtypes.float0))


heads.defvjp(_forward_rule, _backward_rule)


def _rows(parameters):
  """With the axis of replicas that `_folded` folds."""
  return None if parameters is None else parameters[None]


def _folded(function):
  """`function` of (y, taps, gain, cos, sin, first, do) with a batching rule: replicas go into the first axes."""
  one = jax.custom_batching.custom_vmap(function)

  @one.def_vmap
  def rule(size, mapped, *args):
    def fold(x, is_mapped):
      x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    folded = [jax.tree.map(fold, x, is_mapped) for x, is_mapped in zip(args, mapped)]
    folded[3:5] = [x[0] if is_mapped else x for x, is_mapped in zip(args[3:5], mapped[3:5])]  # one table for all
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), _folded(function)(*folded))
    return out, jax.tree.map(lambda _: True, out)

  return one


def _call(kernel, name, y, taps, gain, cos, sin, first, more, outputs, eps, **constants):
  B, T, N, H = y.shape
  nothing = jnp.zeros((1,), jnp.float32)  # in the place of what is not there and not read
  replicas = next((x.shape[0] for x in (taps, gain) if x is not None), 1)
  return call.kernel_call(
      kernel, (y, *(nothing if x is None else x for x in (taps, gain, cos, sin)), first, *more), outputs,
      grid=(B * N * -(-T // ROWS),), name=name, num_warps=4, num_stages=1, B=B, R=replicas, T=T, N=N, H2=H // 2,
      W=0 if taps is None else taps.shape[1], NORM=gain is not None, ROPE=cos is not None, EPS=float(eps), ROWS=ROWS,
      **constants)


def _forward(y, taps, gain, cos, sin, first, eps):
  def run(y, taps, gain, cos, sin, first, _):
    return _call(heads_kernels.forward_kernel, "heads_forward", y, taps, gain, cos, sin, first, (),
                 jax.ShapeDtypeStruct(y.shape, y.dtype), eps)

  return _folded(run)(y, taps, gain, cos, sin, first, ())


def _backward(y, taps, gain, cos, sin, first, do, eps):
  def run(y, taps, gain, cos, sin, first, do):
    B, T, N, H = y.shape
    shares, W = B * -(-T // ROWS), 0 if taps is None else taps.shape[1]
    outputs = [jax.ShapeDtypeStruct(y.shape, y.dtype), jax.ShapeDtypeStruct((shares, max(W, 1), N, H), jnp.float32),
               jax.ShapeDtypeStruct((shares, N, H), jnp.float32)]
    dy, dtaps, dgain = _call(heads_kernels.backward_kernel, "heads_backward", y, taps, gain, cos, sin, first, (do,),
                             outputs, eps, REACH=max(W, 1))
    return (dy, None if taps is None else dtaps.reshape(taps.shape[0], -1, W, N, H).sum(1),
            None if gain is None else dgain.reshape(gain.shape[0], -1, H).sum(1))

  return _folded(run)(y, taps, gain, cos, sin, first, do)
