"""Triton kernels of what stands between a projection and attention: short convolution, RMSNorm per head, rotary
embedding.

A tile is ROWS tokens of one head. Its H numbers per token come as two halves of H2 = H / 2, which the rotation turns
against each other. What a token reaches back to is read again, from the chip's caches, so each array passes through
memory once. `first` is the first token of each token's segment. Parameters, and shares of their gradients, have a row
for each of R replicas of B / R sequences.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(T, N: tl.constexpr, ROWS: tl.constexpr):
  """Sequence, tile of its tokens and head of this program."""
  pid = tl.program_id(0)
  tiles = (T + ROWS - 1) // ROWS
  return tl.cast(pid // N // tiles, tl.int64), pid // N % tiles, pid % N


@triton.jit
def convolved(y, taps, b, t, n, low, ok, T, N: tl.constexpr, H2: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
  """Both halves of the convolution at the tokens t, float32[ROWS, H2] each; 0 where not ok. W = 0: the input.

  taps: of this replica.
  """
  h = tl.arange(0, H2)
  at = y + ((b * T + t) * N + n)[:, None] * (2 * H2) + h[None, :]
  if W == 0:
    one = tl.load(at, mask=ok[:, None], other=0.0).to(tl.float32)
    two = tl.load(at + H2, mask=ok[:, None], other=0.0).to(tl.float32)
  else:
    one = tl.zeros([ROWS, H2], tl.float32)
    two = tl.zeros([ROWS, H2], tl.float32)
    for back in tl.static_range(W):
      reach = (ok & (t - back >= low))[:, None]
      tap = taps + (back * N + n) * (2 * H2) + h
      before = at - back * N * (2 * H2)
      one += tl.load(before, mask=reach, other=0.0).to(tl.float32) * tl.load(tap)[None, :]
      two += tl.load(before + H2, mask=reach, other=0.0).to(tl.float32) * tl.load(tap + H2)[None, :]
  return one, two


@triton.jit
def forward_kernel(y, taps, gain, cos, sin, first, out, B: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
                   N: tl.constexpr, H2: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
                   EPS: tl.constexpr, ROWS: tl.constexpr):
  b, tile, n = tile_of(T, N, ROWS)
  taps += b // (B // R) * (W * N * 2 * H2)
  gain += b // (B // R) * (2 * H2)
  t = tile * ROWS + tl.arange(0, ROWS)
  ok = t < T
  h = tl.arange(0, H2)
  low = tl.load(first + b * T + t, mask=ok, other=0)
  one, two = convolved(y, taps, b, t, n, low, ok, T, N, H2, W, ROWS)
  if NORM:
    scale = tl.rsqrt((tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)) / (2 * H2) + EPS)[:, None]
    one = one * scale * tl.load(gain + h)[None, :]
    two = two * scale * tl.load(gain + H2 + h)[None, :]
  if ROPE:
    c = tl.load(cos + t[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
    s = tl.load(sin + t[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
    one, two = one * c - two * s, two * c + one * s
  at = out + ((b * T + t) * N + n)[:, None] * (2 * H2) + h[None, :]
  tl.store(at, one.to(out.dtype.element_ty), mask=ok[:, None])
  tl.store(at + H2, two.to(out.dtype.element_ty), mask=ok[:, None])


@triton.jit
def backward_kernel(y, taps, gain, cos, sin, first, do, dy, dtaps, dgain, B: tl.constexpr, R: tl.constexpr,
                    T: tl.constexpr, N: tl.constexpr, H2: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr,
                    ROPE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, REACH: tl.constexpr):
  """dy of the tile, and its share of dtaps [B * tiles, W, N, H] and dgain [B * tiles, N, H], both float32."""
  b, tile, n = tile_of(T, N, ROWS)
  taps += b // (B // R) * (W * N * 2 * H2)
  gain += b // (B // R) * (2 * H2)
  t = tile * ROWS + tl.arange(0, ROWS)
  h = tl.arange(0, H2)
  share = b * ((T + ROWS - 1) // ROWS) + tile
  d_one = tl.zeros([ROWS, H2], tl.float32)
  d_two = tl.zeros([ROWS, H2], tl.float32)
  for ahead in tl.static_range(REACH):  # the tokens whose convolution reaches back to t, itself included
    u = t + ahead
    ok = u < T
    low = tl.load(first + b * T + u, mask=ok, other=0)
    at = ((b * T + u) * N + n)[:, None] * (2 * H2) + h[None, :]
    one = tl.load(do + at, mask=ok[:, None], other=0.0).to(tl.float32)
    two = tl.load(do + at + H2, mask=ok[:, None], other=0.0).to(tl.float32)
    if ROPE:
      c = tl.load(cos + u[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
      s = tl.load(sin + u[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
      one, two = one * c + two * s, two * c - one * s
    if NORM:
      x_one, x_two = convolved(y, taps, b, u, n, low, ok, T, N, H2, W, ROWS)
      scale = tl.rsqrt((tl.sum(x_one * x_one, axis=1) + tl.sum(x_two * x_two, axis=1)) / (2 * H2) + EPS)[:, None]
      x_one, x_two = x_one * scale, x_two * scale
      if ahead == 0:
        to = dgain + (share * N + n) * (2 * H2) + h
        tl.store(to, tl.sum(one * x_one, axis=0))
        tl.store(to + H2, tl.sum(two * x_two, axis=0))
      one, two = one * tl.load(gain + h)[None, :], two * tl.load(gain + H2 + h)[None, :]
      mean = ((tl.sum(one * x_one, axis=1) + tl.sum(two * x_two, axis=1)) / (2 * H2))[:, None]
      one, two = scale * (one - x_one * mean), scale * (two - x_two * mean)
    if W == 0:
      d_one, d_two = one, two
    else:
      if ahead == 0:
        for back in tl.static_range(W):
          reach = (ok & (t - back >= low))[:, None]
          before = y + at - back * N * (2 * H2)
          to = dtaps + ((share * W + back) * N + n) * (2 * H2) + h
          tl.store(to, tl.sum(one * tl.load(before, mask=reach, other=0.0).to(tl.float32), axis=0))
          tl.store(to + H2, tl.sum(two * tl.load(before + H2, mask=reach, other=0.0).to(tl.float32), axis=0))
      reach = (ok & (t >= low))[:, None]
      tap = taps + (ahead * N + n) * (2 * H2) + h
      d_one += tl.where(reach, one, 0.0) * tl.load(tap)[None, :]
      d_two += tl.where(reach, two, 0.0) * tl.load(tap + H2)[None, :]
  at = dy + ((b * T + t) * N + n)[:, None] * (2 * H2) + h[None, :]
  tl.store(at, d_one.to(dy.dtype.element_ty), mask=(t < T)[:, None])
  tl.store(at + H2, d_two.to(dy.dtype.element_ty), mask=(t < T)[:, None])
