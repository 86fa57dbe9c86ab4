"""Short convolution, RMSNorm per head and rotary embedding in one pass over memory, and their gradient in one.

XLA makes a dozen passes of them: shifted copies for the convolution, a reduction and a pass for the norm, halves cut
and joined for the rotation, a reduction for each tap and gain. Between the steps numbers stay float32 here.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends
from pallas_kernels.triton import call, heads_kernels

GROUPS = 6  # that the kernels have places for, beside q


class Walk(NamedTuple):
  """What a program does with one head: `rows` stretches of `tokens` side by side; `ahead`, which divides `tokens`, of
  each are loaded at once."""
  rows: int
  tokens: int
  ahead: int
  warps: int


# On one H200, 8 x 4,096 tokens, 8/2 heads of 64, 3 taps: forward 0.036 ms, others to 0.062; backward 0.086, others
# 0.083 (16 stretches of 64, too few programs for few heads) to 0.112, in two passes 0.120.
FORWARD, BACKWARD = Walk(8, 16, 4, 4), Walk(8, 16, 2, 4)


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
  whole = Groups(y.shape[2], 0, 0, 0)
  return _heads(y, taps, None if gain is None else gain[None], cos, sin, first, float(eps), whole)[0]


def groups(y, taps, gains, cos, sin, first, eps, kv_heads, turned, plain):
  """A tuple of 1 + turned + plain arrays [B, T, heads, H], the parts of the heads of one projection: those of q, then
  groups of kv_heads each. q and the first `turned` groups as in `heads`, the `plain` ones are convolved alone.

  gains: float32[1 + turned, H], of q's norm and of each such group's, or None.
  """
  if turned + plain > GROUPS:
    raise ValueError(f"{turned} + {plain} groups: the kernels have places for {GROUPS}")
  parts = Groups(y.shape[2] - (turned + plain) * kv_heads, kv_heads, turned, plain)
  return _heads(y, taps, gains, cos, sin, first, float(eps), parts)


class Groups(NamedTuple):
  """The heads of a projection: those of q, then turned + plain groups of `each`."""
  q: int
  each: int
  turned: int
  plain: int

  @property
  def heads(self):
    """Of each part."""
    return (self.q, *(self.each,) * (self.turned + self.plain))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _heads(y, taps, gains, cos, sin, first, eps, parts):
  return _forward(y, _rows(taps), _rows(gains), cos, sin, first, eps, parts)


def _forward_rule(y, taps, gains, cos, sin, first, eps, parts):
  return _heads(y, taps, gains, cos, sin, first, eps, parts), (y, taps, gains, cos, sin, first)


def _backward_rule(eps, parts, saved, do):
  y, taps, gains, cos, sin, first = saved
  do = tuple(x.astype(y.dtype) for x in do)
  dy, dtaps, dgains = _backward(y, _rows(taps), _rows(gains), cos, sin, first, do, eps, parts)
  return (dy, None if taps is None else dtaps[0], None if gains is None else dgains[0],
          *backends.no_gradient((cos, sin, first)))


_heads.defvjp(_forward_rule, _backward_rule)


def _rows(parameters):
  """With the axis of replicas that `_folded` folds."""
  return None if parameters is None else parameters[None]


def _folded(function):
  """`function` of (y, taps, gains, cos, sin, first, do) with a batching rule: replicas go into the first axes."""
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


def _sizes(y, taps, gains, cos, parts):
  B, T, N, H = y.shape
  replicas = next((x.shape[0] for x in (taps, gains) if x is not None), 1)
  return dict(B=B, R=replicas, T=T, N=N, NQ=parts.q, NK=parts.each, NT=parts.turned, H2=H // 2,
              W=0 if taps is None else taps.shape[1], NORM=gains is not None, ROPE=cos is not None)


def _inputs(y, taps, gains, cos, sin, first):
  nothing = jnp.zeros((1,), jnp.float32)  # in the place of what is not there and not read
  return (y, *(nothing if x is None else x for x in (taps, gains, cos, sin)), first)


def _programs(y, walk):
  """That share the tokens of a sequence."""
  return -(-y.shape[1] // (walk.rows * walk.tokens))


def _how(y, walk):
  B, _, N, _ = y.shape
  return dict(grid=(B * N * _programs(y, walk),), num_warps=walk.warps, num_stages=1, ROWS=walk.rows,
              TOKENS=walk.tokens, AHEAD=walk.ahead)


def _forward(y, taps, gains, cos, sin, first, eps, parts):
  def run(y, taps, gains, cos, sin, first, _):
    B, T, _, H = y.shape
    outputs = [jax.ShapeDtypeStruct((B, T, heads, H), y.dtype) for heads in parts.heads]
    nothing = [jax.ShapeDtypeStruct((B, 1), y.dtype)] * (1 + GROUPS - len(outputs))
    out = call.kernel_call(heads_kernels.heads_forward_kernel, _inputs(y, taps, gains, cos, sin, first),
                           outputs + nothing, name="heads_forward", EPS=eps, **_how(y, FORWARD),
                           **_sizes(y, taps, gains, cos, parts))
    return tuple(out[:len(outputs)])

  return _folded(run)(y, taps, gains, cos, sin, first, ())


def _backward(y, taps, gains, cos, sin, first, do, eps, parts):
  def run(y, taps, gains, cos, sin, first, do):
    B, T, N, H = y.shape
    W = 0 if taps is None else taps.shape[1]
    do = (*do, *(do[0],) * (1 + GROUPS - len(do)))
    sums = max(W + (gains is not None), 1)
    dy, shares = call.kernel_call(
        heads_kernels.heads_backward_kernel, (*_inputs(y, taps, gains, cos, sin, first), *do),
        [jax.ShapeDtypeStruct(y.shape, y.dtype),
         jax.ShapeDtypeStruct((B * _programs(y, BACKWARD), sums, N, H), jnp.float32)],
        name="heads_backward", EPS=eps, **_how(y, BACKWARD), **_sizes(y, taps, gains, cos, parts))
    replicas = next((x.shape[0] for x in (taps, gains) if x is not None), 1)
    sums = shares.reshape(replicas, -1, *shares.shape[1:]).sum(1)
    if gains is None:
      return dy, sums if W else None, None
    group = np.repeat(np.arange(len(parts.heads)), parts.heads)  # of each head
    mine = (group[:, None] == np.arange(1 + parts.turned))[..., None]
    dgains = jnp.where(mine, sums[:, W, :, None], 0.0).sum(1)  # of each gain at once would read all as often
    return dy, sums[:, :W] if W else None, dgains

  return _folded(run)(y, taps, gains, cos, sin, first, do)
