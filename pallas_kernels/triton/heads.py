"""Short convolution, RMSNorm per head and rotary embedding in one pass over memory, and their gradient in two.

XLA makes a dozen passes of them: shifted copies for the convolution, a reduction and a pass for the norm, halves cut
and joined for the rotation, a reduction for each tap and gain. Between the steps numbers stay float32 here; the
gradient of the convolution's result is rounded to y.dtype between its two passes, as XLA's is.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton import call, heads_kernels

# Of one head. Gradients of taps and gains are summed over the rows of all tiles of a program at once. On one H200, 8 x
# 4,096 tokens, 8/2 heads of 64, 3 taps: backward 0.14 ms of 0.26 with a sum for each tile; others take 0.15 to 0.18.
FORWARD, BACKWARD, UNCONVOLVE = call.Tiles(32, 1, 4), call.Tiles(16, 8, 4), call.Tiles(16, 16, 4)


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
  return _heads(y, taps, None if gain is None else gain[None], cos, sin, first, float(eps), 0)[0]


def qkv(y, taps, gains, cos, sin, first, eps, kv_heads):
  """(q, k, v) of the heads of one projection [B, T, N + 2 kv_heads, H]: as `heads`, those of v convolved alone.

  gains: float32[2, H], of q's and of k's norm, or None.
  """
  return _heads(y, taps, gains, cos, sin, first, float(eps), kv_heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _heads(y, taps, gains, cos, sin, first, eps, kv_heads):
  return _forward(y, _rows(taps), _rows(gains), cos, sin, first, eps, kv_heads)


def _forward_rule(y, taps, gains, cos, sin, first, eps, kv_heads):
  return _heads(y, taps, gains, cos, sin, first, eps, kv_heads), (y, taps, gains, cos, sin, first)


def _backward_rule(eps, kv_heads, saved, do):
  y, taps, gains, cos, sin, first = saved
  do = tuple(x.astype(y.dtype) for x in do)
  dy, dtaps, dgains = _backward(y, _rows(taps), _rows(gains), cos, sin, first, do, eps, kv_heads)
  zeros = lambda x: None if x is None else jnp.zeros_like(x)
  return (dy, None if taps is None else dtaps[0], None if gains is None else dgains[0], zeros(cos), zeros(sin),
          np.zeros(first.shape, jax.dtypes.float0))


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


def _sizes(y, taps, gains, cos, kv_heads):
  B, T, N, H = y.shape
  replicas = next((x.shape[0] for x in (taps, gains) if x is not None), 1)
  return dict(B=B, R=replicas, T=T, NQ=N - 2 * kv_heads, NK=kv_heads, H2=H // 2, W=0 if taps is None else taps.shape[1],
              NORM=gains is not None, ROPE=cos is not None)


def _inputs(y, taps, gains, cos, sin, first):
  nothing = jnp.zeros((1,), jnp.float32)  # in the place of what is not there and not read
  return (y, *(nothing if x is None else x for x in (taps, gains, cos, sin)), first)


def _parts_of(y, tiles):
  """Programs that share the tokens of a sequence."""
  return -(-y.shape[1] // (tiles.rows * tiles.count))


def _how(y, tiles):
  B, _, N, _ = y.shape
  return dict(grid=(B * N * _parts_of(y, tiles),), num_warps=tiles.warps, num_stages=1, ROWS=tiles.rows)


def _parts(y, kv_heads):
  B, T, N, H = y.shape
  return [jax.ShapeDtypeStruct((B, T, n, H), y.dtype) for n in (N - 2 * kv_heads, kv_heads or 1, kv_heads or 1)]


def _forward(y, taps, gains, cos, sin, first, eps, kv_heads):
  def run(y, taps, gains, cos, sin, first, _):
    parts = _parts(y, kv_heads)
    if not kv_heads:
      parts[1:] = [jax.ShapeDtypeStruct((y.shape[0], 1), y.dtype)] * 2
    out = call.kernel_call(heads_kernels.heads_forward_kernel, _inputs(y, taps, gains, cos, sin, first), parts,
                           name="heads_forward", EPS=eps, **_how(y, FORWARD),
                           **_sizes(y, taps, gains, cos, kv_heads))
    return tuple(out) if kv_heads else (out[0],)

  return _folded(run)(y, taps, gains, cos, sin, first, ())


def _backward(y, taps, gains, cos, sin, first, do, eps, kv_heads):
  def run(y, taps, gains, cos, sin, first, do):
    B, T, N, H = y.shape
    W, NQ = 0 if taps is None else taps.shape[1], N - 2 * kv_heads
    do = do if kv_heads else (do[0],) * 3
    like_y = jax.ShapeDtypeStruct(y.shape, y.dtype)
    share = lambda tiles, *shape: jax.ShapeDtypeStruct((B * _parts_of(y, tiles), *shape), jnp.float32)
    dy, dgains = call.kernel_call(
        heads_kernels.heads_backward_kernel, (*_inputs(y, taps, gains, cos, sin, first), *do),
        [like_y, share(BACKWARD, N, H)], name="heads_backward", EPS=eps, TILES=BACKWARD.count, **_how(y, BACKWARD),
        **_sizes(y, taps, gains, cos, kv_heads))
    dtaps = None
    if W:
      dy, dtaps = call.kernel_call(
          heads_kernels.unconvolve_kernel, (dy, y, taps, first), [like_y, share(UNCONVOLVE, W, N, H)],
          name="heads_unconvolve", B=B, R=taps.shape[0], T=T, N=N, H=H, W=W, TILES=UNCONVOLVE.count,
          **_how(y, UNCONVOLVE))
      dtaps = dtaps.reshape(taps.shape[0], -1, W, N, H).sum(1)
    if gains is not None:
      of = lambda first, end: dgains.reshape(gains.shape[0], -1, N, H)[:, :, first:end].sum((1, 2))
      dgains = jnp.stack([of(0, NQ), of(NQ, NQ + kv_heads)] if kv_heads else [of(0, N)], axis=1)
    return dy, dtaps, dgains if gains is not None else None

  return _folded(run)(y, taps, gains, cos, sin, first, do)
