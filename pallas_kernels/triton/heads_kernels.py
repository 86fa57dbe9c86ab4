"""Triton kernels of what stands between a projection and attention: short convolution, RMSNorm per head, rotation.

A program walks ROWS neighbouring stretches of TOKENS tokens of one head side by side, a token of each at a time, and
keeps the W - 1 tokens before in registers, which the convolution reaches back to: so each array is read once. What
AHEAD tokens need is loaded at once. The H numbers of a token come as two halves of H2 = H / 2, which the rotation turns
against each other. `first` is the first token of each token's segment. Of the heads of y NQ are q's, for the first
array, then come groups of NK heads each, for the others. The first NT groups are normed, with a gain of each, and
rotated as q is; the rest are convolved alone. NK = 0: all are q's. Parameters, and shares of their gradients, have a
row for each of R replicas of B / R sequences.
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
def gain_of(gain, b, n, is_turned, B: tl.constexpr, R: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr,
            NT: tl.constexpr, H2: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr):
  """The gain of head n, of q's or of its group's, by halves, float32[ROWS, H2]; 0 where there is none."""
  one = tl.zeros([ROWS, H2], tl.float32)
  two = one
  if NORM:
    gain += b // (B // R) * ((1 + NT) * 2 * H2)
    if NK > 0:
      gain += tl.where(n < NQ, 0, 1 + (n - NQ) // NK) * (2 * H2)
    if is_turned:
      one += tl.load(gain + tl.arange(0, H2))[None, :]
      two += tl.load(gain + H2 + tl.arange(0, H2))[None, :]
  return one, two


@triton.jit
def taps_of(taps, b, n, B: tl.constexpr, R: tl.constexpr, N: tl.constexpr, H2: tl.constexpr, W: tl.constexpr):
  """Tuples of W, one for each half: the taps of head n, float32[1, H2]."""
  h = tl.arange(0, H2)
  one, two = (), ()
  for back in tl.static_range(W):
    tap = taps + ((b // (B // R) * W + back) * N + n) * (2 * H2) + h
    one += (tl.load(tap)[None, :],)
    two += (tl.load(tap + H2)[None, :],)
  return one, two


@triton.jit
def before_of(y, start, T, N: tl.constexpr, H2: tl.constexpr, W: tl.constexpr):
  """Tuples of W - 1, one for each half: what the convolution reads of the tokens start - 1, start - 2, ..."""
  one, two = (), ()
  for back in tl.static_range(1, W):
    t = start - back
    at = y + tl.cast(t, tl.int64)[:, None] * (N * 2 * H2) + tl.arange(0, H2)[None, :]
    ok = ((t >= 0) & (t < T))[:, None]
    one += (tl.load(at, mask=ok, other=0.0).to(tl.float32),)
    two += (tl.load(at + H2, mask=ok, other=0.0).to(tl.float32),)
  return one, two


@triton.jit
def convolved(own, before, taps, before_t, W: tl.constexpr):
  """A half of the convolution, and the W values that it is made of: those within the token's segment, where before_t
  tokens are before it."""
  x, reached = own, (own,)
  if W > 0:
    x = own * taps[0]
    for back in tl.static_range(1, W):
      reached += (tl.where((back <= before_t)[:, None], before[back - 1], 0.0),)
      x += reached[back] * taps[back]
  return x, reached


@triton.jit
def heads_forward_kernel(y, taps, gain, cos, sin, first, oa, ob, oc, od, oe, of, og, B: tl.constexpr, R: tl.constexpr,
                         T: tl.constexpr, N: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, NT: tl.constexpr,
                         H2: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr,
                         ROWS: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr):
  b, part, n = tile_of(T, N, ROWS * TOKENS)
  to, step = place(oa, ob, oc, od, oe, of, og, n, NQ, NK, 2 * H2)
  is_turned = n < NQ + NT * NK
  h = tl.arange(0, H2)
  start = (part * ROWS + tl.arange(0, ROWS)) * TOKENS
  far = tl.cast(start, tl.int64)[:, None]  # a long sequence has more numbers than 32 bits count
  y += (b * T * N + n) * (2 * H2)
  to += b * T * step
  first += b * T
  gain_one, gain_two = gain_of(gain, b, n, is_turned, B, R, NQ, NK, NT, H2, ROWS, NORM)
  REACH: tl.constexpr = W - 1 if W > 0 else 0
  tap_one, tap_two = taps_of(taps, b, n, B, R, N, H2, W)
  before_one, before_two = before_of(y, start, T, N, H2, W)
  at_y = y + far * (N * 2 * H2) + h[None, :]
  at_o = to + far * step + h[None, :]
  at_angle = start[:, None] * H2 + h[None, :]
  for begin in range(0, TOKENS, AHEAD):
    loaded = ()
    for ahead in tl.static_range(AHEAD):
      ok = start + begin < T - ahead
      loaded += ((tl.load(at_y + ahead * (N * 2 * H2), mask=ok[:, None], other=0.0),
                  tl.load(at_y + ahead * (N * 2 * H2) + H2, mask=ok[:, None], other=0.0),
                  tl.load(first + start + begin + ahead, mask=ok, other=T)),)
    for ahead in tl.static_range(AHEAD):
      ok = (start + begin < T - ahead)[:, None]
      own_one, own_two = loaded[ahead][0].to(tl.float32), loaded[ahead][1].to(tl.float32)
      back = start + begin + ahead - loaded[ahead][2]
      one, _ = convolved(own_one, before_one, tap_one, back, W)
      two, _ = convolved(own_two, before_two, tap_two, back, W)
      before_one, before_two = ((own_one,) + before_one)[:REACH], ((own_two,) + before_two)[:REACH]
      if is_turned:
        if NORM:
          scale = tl.rsqrt(tl.sum(one * one + two * two, axis=1) / (2 * H2) + EPS)[:, None]
          one, two = one * scale * gain_one, two * scale * gain_two
        if ROPE:
          c = tl.load(cos + at_angle + ahead * H2, mask=ok, other=0.0)
          s = tl.load(sin + at_angle + ahead * H2, mask=ok, other=0.0)
          turned = one * c - two * s
          two = two * c + one * s
          one = turned
      tl.store(at_o + ahead * step, one.to(oa.dtype.element_ty), mask=ok)
      tl.store(at_o + ahead * step + H2, two.to(oa.dtype.element_ty), mask=ok)
    at_y += AHEAD * (N * 2 * H2)
    at_o += AHEAD * step
    at_angle += AHEAD * H2


@triton.jit
def turned_back(one, two, x_one, x_two, cos, sin, gain_one, gain_two, at, ok, H2: tl.constexpr, NORM: tl.constexpr,
                ROPE: tl.constexpr, EPS: tl.constexpr):
  """Rotation and norm backward: the gradient of the norm's input x from that of the result, and the gain's shares.

  `at`: of the tokens in the table of angles; a token that is not ok has zeros and gets zeros.
  """
  share_one, share_two = one, two
  if ROPE:
    c = tl.load(cos + at, mask=ok, other=0.0)
    s = tl.load(sin + at, mask=ok, other=0.0)
    turned = one * c + two * s
    two = two * c - one * s
    one = turned
  if NORM:
    scale = tl.rsqrt(tl.sum(x_one * x_one + x_two * x_two, axis=1) / (2 * H2) + EPS)[:, None]
    x_one, x_two = x_one * scale, x_two * scale
    share_one, share_two = one * x_one, two * x_two
    mean = (tl.sum(share_one * gain_one + share_two * gain_two, axis=1) / (2 * H2))[:, None]
    one, two = scale * (one * gain_one - x_one * mean), scale * (two * gain_two - x_two * mean)
  return one, two, share_one, share_two


@triton.jit
def heads_backward_kernel(y, taps, gain, cos, sin, first, da, db, dc, dd, de, df, dg, dy, shares,
                          B: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, NQ: tl.constexpr,
                          NK: tl.constexpr, NT: tl.constexpr, H2: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr,
                          ROPE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                          AHEAD: tl.constexpr):
  """All gradients: dy, and shares of those of taps and, if NORM, behind them of gains, float32[B * programs of a
  sequence, W (+ 1), N, H].

  What there is of the dy of the W - 1 tokens before stays in registers too. The W - 1 tokens after a stretch are gone
  through for what they give to it.
  """
  b, part, n = tile_of(T, N, ROWS * TOKENS)
  of, step = place(da, db, dc, dd, de, df, dg, n, NQ, NK, 2 * H2)
  is_turned = n < NQ + NT * NK
  h = tl.arange(0, H2)
  start = (part * ROWS + tl.arange(0, ROWS)) * TOKENS
  far = tl.cast(start, tl.int64)[:, None]  # a long sequence has more numbers than 32 bits count
  y += (b * T * N + n) * (2 * H2)
  dy += (b * T * N + n) * (2 * H2)
  of += b * T * step
  first += b * T
  none = tl.zeros([ROWS, H2], tl.float32)
  gain_sum_one, gain_sum_two = none, none
  gain_one, gain_two = gain_of(gain, b, n, is_turned, B, R, NQ, NK, NT, H2, ROWS, NORM)
  REACH: tl.constexpr = W - 1 if W > 0 else 0
  tap_one, tap_two = taps_of(taps, b, n, B, R, N, H2, W)
  before_one, before_two = before_of(y, start, T, N, H2, W)
  # Of token t - a, at a - 1: what dy has of tokens before t.
  owed_one, owed_two = (none,) * REACH, (none,) * REACH
  tap_sum_one, tap_sum_two = (none,) * W, (none,) * W
  at_y = y + far * (N * 2 * H2) + h[None, :]
  at_dy = dy + far * (N * 2 * H2) + h[None, :]
  at_o = of + far * step + h[None, :]
  at_angle = start[:, None] * H2 + h[None, :]
  for begin in range(0, TOKENS + REACH, AHEAD):
    loaded = ()
    for ahead in tl.static_range(AHEAD):
      ok = start + begin < T - ahead
      wide = ok[:, None]
      loaded += ((tl.load(at_o + ahead * step, mask=wide, other=0.0),
                  tl.load(at_o + ahead * step + H2, mask=wide, other=0.0),
                  tl.load(at_y + ahead * (N * 2 * H2), mask=wide, other=0.0),
                  tl.load(at_y + ahead * (N * 2 * H2) + H2, mask=wide, other=0.0),
                  tl.load(first + start + begin + ahead, mask=ok, other=T)),)
    for ahead in tl.static_range(AHEAD):
      i = begin + ahead
      one, two, own_one, own_two = (loaded[ahead][0].to(tl.float32), loaded[ahead][1].to(tl.float32),
                                    loaded[ahead][2].to(tl.float32), loaded[ahead][3].to(tl.float32))
      before_t = start + i - loaded[ahead][4]
      x_one, reached_one = convolved(own_one, before_one, tap_one, before_t, W)
      x_two, reached_two = convolved(own_two, before_two, tap_two, before_t, W)
      if is_turned:
        one, two, share_one, share_two = turned_back(
            one, two, x_one, x_two, cos, sin, gain_one, gain_two, at_angle + ahead * H2,
            (start + begin < T - ahead)[:, None], H2, NORM, ROPE, EPS)
        if NORM:
          gain_sum_one += tl.where(i < TOKENS, share_one, 0.0)
          gain_sum_two += tl.where(i < TOKENS, share_two, 0.0)
      if W > 0:
        counted_one, counted_two = tl.where(i < TOKENS, one, 0.0), tl.where(i < TOKENS, two, 0.0)
        sums_one, sums_two = (), ()
        for back in tl.static_range(W):
          sums_one += (tap_sum_one[back] + counted_one * reached_one[back],)
          sums_two += (tap_sum_two[back] + counted_two * reached_two[back],)
        tap_sum_one, tap_sum_two = sums_one, sums_two
        now_one, now_two = (one * tap_one[0],), (two * tap_two[0],)
        for back in tl.static_range(1, W):
          reach = (back <= before_t)[:, None]
          now_one += (owed_one[back - 1] + tl.where(reach, one, 0.0) * tap_one[back],)
          now_two += (owed_two[back - 1] + tl.where(reach, two, 0.0) * tap_two[back],)
        one, two = now_one[REACH], now_two[REACH]
        owed_one, owed_two = now_one[:REACH], now_two[:REACH]
        before_one, before_two = ((own_one,) + before_one)[:REACH], ((own_two,) + before_two)[:REACH]
      to = at_dy + (ahead - REACH) * (N * 2 * H2)
      ok = ((start + begin < T - (ahead - REACH)) & (i >= REACH) & (i < TOKENS + REACH))[:, None]
      tl.store(to, one.to(dy.dtype.element_ty), mask=ok)
      tl.store(to + H2, two.to(dy.dtype.element_ty), mask=ok)
    at_y += AHEAD * (N * 2 * H2)
    at_dy += AHEAD * (N * 2 * H2)
    at_o += AHEAD * step
    at_angle += AHEAD * H2
  SUMS: tl.constexpr = W + 1 if NORM else W
  shares += ((b * ((T + ROWS * TOKENS - 1) // (ROWS * TOKENS)) + part) * SUMS * N + n) * (2 * H2) + h
  for back in tl.static_range(W):
    tl.store(shares + back * N * (2 * H2), tl.sum(tap_sum_one[back], axis=0))
    tl.store(shares + back * N * (2 * H2) + H2, tl.sum(tap_sum_two[back], axis=0))
  if NORM:
    tl.store(shares + W * N * (2 * H2), tl.sum(gain_sum_one, axis=0))
    tl.store(shares + W * N * (2 * H2) + H2, tl.sum(gain_sum_two, axis=0))
