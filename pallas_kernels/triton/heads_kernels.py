"""Triton kernels of what stands between a projection and attention: short convolution, RMSNorm per head, rotation.

A tile is ROWS tokens of one head. Its H numbers per token come as two halves of H2 = H / 2, which the rotation turns
against each other. What a token reaches back to is read again, from the chip's caches, so each array passes through
memory once. `first` is the first token of each token's segment. Of the heads of y NQ are q's, for the first array, then
come groups of NK heads each, for the others. The first NT groups are normed, with a gain of each, and rotated as q is;
the rest are convolved alone. NK = 0: all are q's. Parameters, and shares of their gradients, have a row for each of R
replicas of B / R sequences.
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
def place(a, b, c, d, e, f, g, n, NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr):
  """(pointer to head n of token 0, numbers from a token to the next), of whichever array has the head."""
  at = a + n * H
  if NK > 0:
    if n >= NQ:
      group = (n - NQ) // NK
      to = b
      if group == 1:
        to = c
      elif group == 2:
        to = d
      elif group == 3:
        to = e
      elif group == 4:
        to = f
      elif group == 5:
        to = g
      at = to + (n - NQ) % NK * H
  return at, tl.where(n < NQ, NQ * H, NK * H)


@triton.jit
def gain_of(gain, b, n, B: tl.constexpr, R: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, NT: tl.constexpr,
            H: tl.constexpr):
  """Pointer to the gain of head n, of q's or of its group's."""
  gain += b // (B // R) * ((1 + NT) * H)
  if NK > 0:
    gain += tl.where(n < NQ, 0, 1 + (n - NQ) // NK) * H
  return gain


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
def heads_forward_kernel(y, taps, gain, cos, sin, first, oa, ob, oc, od, oe, of, og, B: tl.constexpr, R: tl.constexpr,
                         T: tl.constexpr, N: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, NT: tl.constexpr,
                         H2: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr,
                         ROWS: tl.constexpr):
  b, tile, n = tile_of(T, N, ROWS)
  taps += b // (B // R) * (W * N * 2 * H2)
  gain = gain_of(gain, b, n, B, R, NQ, NK, NT, 2 * H2)
  t = tile * ROWS + tl.arange(0, ROWS)
  ok = t < T
  h = tl.arange(0, H2)
  low = tl.load(first + b * T + t, mask=ok, other=0)
  one, two = convolved(y, taps, b, t, n, low, ok, T, N, H2, W, ROWS)
  if n < NQ + NT * NK:
    if NORM:
      scale = tl.rsqrt((tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)) / (2 * H2) + EPS)[:, None]
      one = one * scale * tl.load(gain + h)[None, :]
      two = two * scale * tl.load(gain + H2 + h)[None, :]
    if ROPE:
      c = tl.load(cos + t[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
      s = tl.load(sin + t[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
      turned = one * c - two * s
      two = two * c + one * s
      one = turned
  to, step = place(oa, ob, oc, od, oe, of, og, n, NQ, NK, 2 * H2)
  at = to + (b * T + t)[:, None] * step + h[None, :]
  tl.store(at, one.to(oa.dtype.element_ty), mask=ok[:, None])
  tl.store(at + H2, two.to(oa.dtype.element_ty), mask=ok[:, None])


@triton.jit
def heads_backward_kernel(y, taps, gain, cos, sin, first, da, db, dc, dd, de, df, dg, dz, dgain, B: tl.constexpr,
                          R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr,
                          NT: tl.constexpr, H2: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
                          EPS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
  """dz of TILES neighbouring tiles, the gradient of what the convolution gives, and their share of dgain
  [B * programs per sequence, N, H], float32, summed over their rows at the end."""
  b, part, n = tile_of(T, N, ROWS * TILES)
  taps += b // (B // R) * (W * N * 2 * H2)
  gain = gain_of(gain, b, n, B, R, NQ, NK, NT, 2 * H2)
  h = tl.arange(0, H2)
  of, step = place(da, db, dc, dd, de, df, dg, n, NQ, NK, 2 * H2)
  total_one = tl.zeros([ROWS, H2], tl.float32)
  total_two = tl.zeros([ROWS, H2], tl.float32)
  for tile in range(TILES):
    t = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
    ok = t < T
    at = of + (b * T + t)[:, None] * step + h[None, :]
    one = tl.load(at, mask=ok[:, None], other=0.0).to(tl.float32)
    two = tl.load(at + H2, mask=ok[:, None], other=0.0).to(tl.float32)
    if n < NQ + NT * NK:
      if ROPE:
        c = tl.load(cos + t[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
        s = tl.load(sin + t[:, None] * H2 + h[None, :], mask=ok[:, None], other=0.0)
        turned = one * c + two * s
        two = two * c - one * s
        one = turned
      if NORM:
        low = tl.load(first + b * T + t, mask=ok, other=0)
        x_one, x_two = convolved(y, taps, b, t, n, low, ok, T, N, H2, W, ROWS)
        scale = tl.rsqrt((tl.sum(x_one * x_one, axis=1) + tl.sum(x_two * x_two, axis=1)) / (2 * H2) + EPS)[:, None]
        x_one, x_two = x_one * scale, x_two * scale
        total_one += one * x_one
        total_two += two * x_two
        one = one * tl.load(gain + h)[None, :]
        two = two * tl.load(gain + H2 + h)[None, :]
        mean = ((tl.sum(one * x_one, axis=1) + tl.sum(two * x_two, axis=1)) / (2 * H2))[:, None]
        one, two = scale * (one - x_one * mean), scale * (two - x_two * mean)
    at = dz + ((b * T + t) * N + n)[:, None] * (2 * H2) + h[None, :]
    tl.store(at, one.to(dz.dtype.element_ty), mask=ok[:, None])
    tl.store(at + H2, two.to(dz.dtype.element_ty), mask=ok[:, None])
  if NORM and n < NQ + NT * NK:
    to = dgain + ((b * ((T + ROWS * TILES - 1) // (ROWS * TILES)) + part) * N + n) * (2 * H2) + h
    tl.store(to, tl.sum(total_one, axis=0))
    tl.store(to + H2, tl.sum(total_two, axis=0))


@triton.jit
def unconvolve_kernel(dz, y, taps, first, dy, dtaps, B: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
                      N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
  """The convolution's gradients, of TILES neighbouring tiles: dy[t] sums taps[a] dz[t + a] over the tokens of t's
  segment that reach back to it, and dtaps[a] sums y[t] dz[t + a], a share of [B * programs per sequence, W, N, H],
  float32.
  """
  b, part, n = tile_of(T, N, ROWS * TILES)
  taps += b // (B // R) * (W * N * H)
  h = tl.arange(0, H)
  sums = (tl.zeros([ROWS, H], tl.float32),) * W
  for tile in range(TILES):
    t = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
    at = ((b * T + t) * N + n)[:, None] * H + h[None, :]
    own = tl.load(y + at, mask=(t < T)[:, None], other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, H], tl.float32)
    more = ()
    for ahead in tl.static_range(W):
      ok = t + ahead < T
      low = tl.load(first + b * T + t + ahead, mask=ok, other=T)
      reach = (ok & (t >= low))[:, None]
      z = tl.load(dz + at + ahead * N * H, mask=reach, other=0.0).to(tl.float32)
      total += z * tl.load(taps + (ahead * N + n) * H + h)[None, :]
      more += (sums[ahead] + z * own,)
    sums = more
    tl.store(dy + at, total.to(dy.dtype.element_ty), mask=(t < T)[:, None])
  share = b * ((T + ROWS * TILES - 1) // (ROWS * TILES)) + part
  for ahead in tl.static_range(W):
    tl.store(dtaps + ((share * W + ahead) * N + n) * H + h, tl.sum(sums[ahead], axis=0))
