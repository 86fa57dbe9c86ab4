"""Triton kernels of the writes of Titans' memories of two matrices, two for a chunk: its tokens, then its weights.

Of the tokens a program has TILE of one chunk, one memory and one sequence; of the weights it has PART columns of one
matrix and of its surprise. Arrays have all C chunks of a memory or one alone; `at` int32[B] is the chunk that a call is
of. Letters: T tokens of a chunk, I width, H hidden width; matrices [I, H] and [H, I]. Products have operands of
`errors0`'s dtype and float32 sums; all else is float32. What is computed: `pallas_kernels.memory.write`.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean(x):
  return (tl.sum(x, axis=1) / x.shape[1])[:, None]


@triton.jit
def _bounding(z):
  """1 / sqrt(1 + mean(z^2)) of each row."""
  return tl.rsqrt(1 + _mean(z * z))


@triton.jit
def _through(z, s, g):
  """The gradient of z s with s = _bounding(z), for g."""
  return s * g - s * s * s * z * _mean(z * g)


@triton.jit
def _through_again(z, s, g, d):
  """The gradient of sum(d _through(z, s, g)) with respect to z."""
  zg, zd = _mean(z * g), _mean(z * d)
  cube = s * s * s
  return z * (3 * cube * s * s * zg * zd - cube * _mean(g * d)) - cube * (g * zd + d * zg)


@triton.jit
def _gradients(a0, v, step, gain, w0, w1, LIMIT: tl.constexpr, PRECISION: tl.constexpr):
  """What `memory.write` takes of a tile of tokens, and what a gradient of it needs."""
  H: tl.constexpr = w0.shape[1]
  dtype: tl.constexpr = w0.dtype
  z0 = tl.dot(a0.to(dtype), w0, input_precision=PRECISION)
  s0 = _bounding(z0)
  n0 = z0 * s0
  open0 = tl.sigmoid(n0)
  a1 = n0 * open0 * (1.0 / H ** 0.5)
  z1 = tl.dot(a1.to(dtype), w1, input_precision=PRECISION)
  s1 = _bounding(z1)
  missed = a0 + gain * (z1 * s1) - v
  g1 = missed * gain
  e1 = _through(z1, s1, g1)
  h = tl.dot(e1.to(dtype), tl.trans(w1), input_precision=PRECISION)
  g0 = h * open0 * (1 + n0 * (1 - open0)) * (1.0 / H ** 0.5)
  e0 = _through(z0, s0, g0)
  squared = tl.sum(a0 * a0, 1) * tl.sum(e0 * e0, 1) + tl.sum(a1 * a1, 1) * tl.sum(e1 * e1, 1)
  clipping = tl.full(step.shape, 1.0, tl.float32)
  if LIMIT > 0:
    clipping = LIMIT ** 0.5 * tl.rsqrt(tl.maximum(squared, LIMIT))
  return z0, s0, n0, open0, a1, z1, s1, missed, g1, e1, h, g0, e0, squared, clipping


@triton.jit
def tokens_forward_kernel(k, v, step, gain, low0, low1, at, hidden, errors0, errors1, R: tl.constexpr,
                          C: tl.constexpr, T: tl.constexpr, I: tl.constexpr, H: tl.constexpr, LIMIT: tl.constexpr,
                          TILE: tl.constexpr, PRECISION: tl.constexpr):
  """Of one chunk: hidden [B, R, T, H], errors0 the same, errors1 [B, R, T, I], by the weights in low0 [B, R, 2 I, H]
  and low1 [B, R, 2 H, I], rounded once, not by every program."""
  pid = tl.cast(tl.program_id(0), tl.int64)
  memory, tile = pid // (T // TILE), pid % (T // TILE)
  dtype: tl.constexpr = errors0.dtype.element_ty
  i, h, t = tl.arange(0, I), tl.arange(0, H), tile * TILE + tl.arange(0, TILE)
  row = (memory * C + tl.load(at + memory // R)) * T + t
  wide, theta = row[:, None] * I + i[None, :], tl.load(step + row)
  w0 = tl.load(low0 + memory * 2 * I * H + i[:, None] * H + h[None, :])
  w1 = tl.load(low1 + memory * 2 * I * H + h[:, None] * I + i[None, :])
  _, _, _, _, a1, _, _, _, _, e1, _, _, e0, _, clipping = _gradients(
      tl.load(k + wide), tl.load(v + wide), theta, tl.load(gain + memory * I + i)[None, :], w0, w1, LIMIT, PRECISION)
  theta = (theta * clipping)[:, None]
  row = memory * T + t
  wide, deep = row[:, None] * I + i[None, :], row[:, None] * H + h[None, :]
  tl.store(hidden + deep, a1)
  tl.store(errors0 + deep, (e0 * theta).to(dtype))
  tl.store(errors1 + wide, (e1 * theta).to(dtype))


@triton.jit
def _after(pair, first, anew, beta, gamma, kept, inputs, errors, leaving, lasting, new, low, part, I: tl.constexpr,
           O: tl.constexpr, T: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
  """PART columns of a matrix and its surprise as the next chunk begins with them; `low`: rounded."""
  dtype: tl.constexpr = errors.dtype.element_ty
  i, o, t = tl.arange(0, I), part * PART + tl.arange(0, PART), tl.arange(0, TILE)
  at = i[:, None] * O + o[None, :]
  now, surprise = tl.load(pair + at), tl.load(pair + I * O + at)
  now, surprise = beta * now + gamma * surprise, kept * surprise
  for tile in range(T // TILE):
    row = tile * TILE + t
    a = tl.load(inputs + row[None, :] * I + i[:, None])
    error = tl.load(errors + row[:, None] * O + o[None, :])
    stays, goes = tl.load(leaving + row)[None, :], tl.load(lasting + row)[None, :]
    now -= tl.dot((stays * a).to(dtype), error, input_precision=PRECISION)
    surprise -= tl.dot((goes * a).to(dtype), error, input_precision=PRECISION)
  if anew != 0:
    now, surprise = tl.load(first + at), tl.zeros([I, PART], tl.float32)
  tl.store(new + at, now)
  tl.store(new + I * O + at, surprise)
  tl.store(low + at, now.to(dtype))
  tl.store(low + I * O + at, surprise.to(dtype))


@triton.jit
def weights_forward_kernel(k, hidden, errors0, errors1, leaving, lasting, decays, anew, first0, first1, pair0, pair1,
                           at, new0, new1, low0, low1, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
                           I: tl.constexpr, H: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
                           PRECISION: tl.constexpr):
  """new0 and new1, what the next chunk begins with, like pair0 and pair1, of what the tokens of one left; low0 and
  low1, the same in the dtype of products."""
  pid = tl.cast(tl.program_id(0), tl.int64)
  memory, part = pid // ((H + I) // PART), pid % ((H + I) // PART)
  c = tl.load(at + memory // R)
  chunk = memory * C + c
  beta, gamma, kept = tl.load(decays + chunk * 3), tl.load(decays + chunk * 3 + 1), tl.load(decays + chunk * 3 + 2)
  fresh = tl.load(anew + memory // R * C + c + 1, mask=c + 1 < C, other=0)
  leaving += chunk * T
  lasting += chunk * T
  whole = memory * 2 * I * H
  if part < H // PART:
    _after(pair0 + whole, first0 + memory * I * H, fresh, beta, gamma, kept, k + chunk * T * I,
           errors0 + memory * T * H, leaving, lasting, new0 + whole, low0 + whole, part, I,
           H, T, PART, TILE, PRECISION)
  else:
    _after(pair1 + whole, first1 + memory * I * H, fresh, beta, gamma, kept, hidden + memory * T * H,
           errors1 + memory * T * I, leaving, lasting, new1 + whole, low1 + whole, part - H // PART, H, I, T, PART,
           TILE, PRECISION)


@triton.jit
def tokens_backward_kernel(k, v, step, leaving, lasting, gain, lows0, lows1, after0, after1, dhidden, derrors0,
                           derrors1, at, dk, dv, dstep, dleaving, dlasting, dgain, deep_ones, wide_ones,
                           R: tl.constexpr, C: tl.constexpr, T: tl.constexpr, I: tl.constexpr, H: tl.constexpr,
                           LIMIT: tl.constexpr, FULL: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
  """Of one chunk, made again: the gradients of its tokens, of the gain by tile, and what its tokens give those of the
  weights: deep_ones [B, R, 3, T, H] and wide_ones [B, R, 2, T, I]. lows0 and lows1 are the pairs of all chunks, after0
  and after1 the gradients of those that this one left, all of them rounded before."""
  pid = tl.cast(tl.program_id(0), tl.int64)
  memory, tile = pid // (T // TILE), pid % (T // TILE)
  dtype: tl.constexpr = derrors0.dtype.element_ty
  ROOT: tl.constexpr = 1.0 / H ** 0.5
  SIZE: tl.constexpr = I * H
  i, h, t = tl.arange(0, I), tl.arange(0, H), tile * TILE + tl.arange(0, TILE)
  at0, at1 = i[:, None] * H + h[None, :], h[:, None] * I + i[None, :]
  chunk = memory * C + tl.load(at + memory // R)
  row = chunk * T + t
  wide, deep = row[:, None] * I + i[None, :], row[:, None] * H + h[None, :]
  own = memory * T + t
  own_wide = own[:, None] * I + i[None, :]
  kept_wide, kept_deep = t[:, None] * I + i[None, :], t[:, None] * H + h[None, :]
  deep_ones += memory * 3 * T * H
  wide_ones += memory * 2 * T * I
  g = tl.load(gain + memory * I + i)[None, :]
  w0, w1 = tl.load(lows0 + chunk * 2 * SIZE + at0), tl.load(lows1 + chunk * 2 * SIZE + at1)
  after0 += memory * 2 * SIZE
  after1 += memory * 2 * SIZE
  a0, theta = tl.load(k + wide), tl.load(step + row)
  z0, s0, n0, open0, a1, z1, s1, missed, g1, e1, hid, g0, e0, squared, clipping = _gradients(
      a0, tl.load(v + wide), theta, g, w0, w1, LIMIT, PRECISION)
  scaled = (theta * clipping)[:, None]
  stays, goes = tl.load(leaving + row)[:, None], tl.load(lasting + row)[:, None]
  # What the chunk leaves: now -= (stays a)^T (e scaled), surprise -= (goes a)^T (e scaled).
  dw0, ds0 = tl.load(after0 + at0), tl.load(after0 + SIZE + at0)
  low = (e0 * scaled).to(dtype)
  one = -tl.dot(low, tl.trans(dw0), input_precision=PRECISION)
  two = -tl.dot(low, tl.trans(ds0), input_precision=PRECISION)
  da0 = stays * one + goes * two
  dstays, dgoes = tl.sum(a0 * one, 1), tl.sum(a0 * two, 1)
  de0 = tl.load(derrors0 + deep).to(tl.float32)
  de0 -= tl.dot((stays * a0).to(dtype), dw0, input_precision=PRECISION)
  de0 -= tl.dot((goes * a0).to(dtype), ds0, input_precision=PRECISION)
  dw1, ds1 = tl.load(after1 + at1), tl.load(after1 + SIZE + at1)
  low = (e1 * scaled).to(dtype)
  one = -tl.dot(low, tl.trans(dw1), input_precision=PRECISION)
  two = -tl.dot(low, tl.trans(ds1), input_precision=PRECISION)
  da1 = tl.load(dhidden + deep) + stays * one + goes * two
  tl.store(dleaving + own, dstays + tl.sum(a1 * one, 1))
  tl.store(dlasting + own, dgoes + tl.sum(a1 * two, 1))
  de1 = tl.load(derrors1 + wide).to(tl.float32)
  de1 -= tl.dot((stays * a1).to(dtype), dw1, input_precision=PRECISION)
  de1 -= tl.dot((goes * a1).to(dtype), ds1, input_precision=PRECISION)
  # The steps: theta clipping, with clipping = sqrt(LIMIT / max(squared, LIMIT)).
  dscaled = tl.sum(de0 * e0, 1) + tl.sum(de1 * e1, 1)
  tl.store(dstep + own, dscaled * clipping)
  de0, de1 = de0 * scaled, de1 * scaled
  if LIMIT > 0:
    share = tl.where(squared > LIMIT, -dscaled * theta * clipping / squared, 0.0)[:, None]  # 2 dsquared
    da0 += share * tl.sum(e0 * e0, 1)[:, None] * a0
    da1 += share * tl.sum(e1 * e1, 1)[:, None] * a1
    de0 += share * tl.sum(a0 * a0, 1)[:, None] * e0
    de1 += share * tl.sum(a1 * a1, 1)[:, None] * e1
  # The error signals, from the first matrix' back to the last one's.
  dz0 = _through_again(z0, s0, g0, de0)
  dg0 = _through(z0, s0, de0)
  slope = open0 * (1 + n0 * (1 - open0)) * ROOT
  dn0 = dg0 * hid * open0 * (1 - open0) * (2 + n0 * (1 - 2 * open0)) * ROOT
  w1 = tl.load(lows1 + chunk * 2 * SIZE + at1)  # again: six matrices would fill the registers
  low = (dg0 * slope).to(dtype)
  de1 += tl.dot(low, w1, input_precision=PRECISION)
  if FULL:
    tl.store(deep_ones + kept_deep, low)
    tl.store(wide_ones + kept_wide, e1.to(dtype))
  dz1 = _through_again(z1, s1, g1, de1)
  dg1 = _through(z1, s1, de1)
  dmissed = dg1 * g
  tl.store(dgain + pid * I + i, tl.sum(dg1 * missed + dmissed * (z1 * s1), 0))
  tl.store(dv + own_wide, -dmissed)
  da0 += dmissed
  # The pass forward.
  dz1 += _through(z1, s1, dmissed * g)
  low = dz1.to(dtype)
  da1 += tl.dot(low, tl.trans(w1), input_precision=PRECISION)
  if FULL:
    tl.store(deep_ones + T * H + kept_deep, a1.to(dtype))
    tl.store(wide_ones + T * I + kept_wide, low)
  dz0 += _through(z0, s0, dn0 + da1 * slope)
  w0 = tl.load(lows0 + chunk * 2 * SIZE + at0)
  low = dz0.to(dtype)
  da0 += tl.dot(low, tl.trans(w0), input_precision=PRECISION)
  if FULL:
    tl.store(deep_ones + 2 * T * H + kept_deep, low)
  tl.store(dk + own_wide, da0)


@triton.jit
def _before(pair, dpair, after, dfirst, x0, y0, x1, y1, anew, beta, gamma, kept, before, low, new_first, part,
            I: tl.constexpr, O: tl.constexpr, T: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
            TERMS: tl.constexpr, PRECISION: tl.constexpr):
  """PART columns of the gradient of a matrix and its surprise before a chunk, of that after it; to that of the matrix
  it adds x^T y, x [T, I] and y [T, O], of the first TERMS of two. Returns the gradients of beta, gamma and kept."""
  dtype: tl.constexpr = y0.dtype.element_ty
  i, o, t = tl.arange(0, I), part * PART + tl.arange(0, PART), tl.arange(0, TILE)
  at = i[:, None] * O + o[None, :]
  more = tl.zeros([I, PART], tl.float32)
  for tile in range(T // TILE if TERMS else 0):
    row = tile * TILE + t
    left, right = row[None, :] * I + i[:, None], row[:, None] * O + o[None, :]
    more += tl.dot(tl.load(x0 + left).to(dtype), tl.load(y0 + right), input_precision=PRECISION)
    if TERMS == 2:
      more += tl.dot(tl.load(x1 + left).to(dtype), tl.load(y1 + right), input_precision=PRECISION)
  now, surprise = tl.load(pair + at), tl.load(pair + I * O + at)
  dnow, dsurprise = tl.load(after + at), tl.load(after + I * O + at)
  dbeta = tl.sum(tl.sum(dnow * now, 1), 0)
  dgamma = tl.sum(tl.sum(dnow * surprise, 1), 0)
  dkept = tl.sum(tl.sum(dsurprise * surprise, 1), 0)
  dsurprise = gamma * dnow + kept * dsurprise + tl.load(dpair + I * O + at)
  dnow = beta * dnow + more + tl.load(dpair + at)
  whole = tl.load(dfirst + at)
  if anew != 0:
    whole += dnow
    dnow, dsurprise = tl.zeros([I, PART], tl.float32), tl.zeros([I, PART], tl.float32)
  tl.store(new_first + at, whole)
  tl.store(before + at, dnow)
  tl.store(before + I * O + at, dsurprise)
  tl.store(low + at, dnow.to(dtype))
  tl.store(low + I * O + at, dsurprise.to(dtype))
  return dbeta, dgamma, dkept


@triton.jit
def weights_backward_kernel(k, deep_ones, wide_ones, decays, anew, pairs0, pairs1, dpairs0, dpairs1, after0, after1,
                            dfirst0, dfirst1, at, before0, before1, low0, low1, new_first0, new_first1, ddecays,
                            R: tl.constexpr, C: tl.constexpr, T: tl.constexpr, I: tl.constexpr, H: tl.constexpr,
                            FULL: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
  """The gradients of what a chunk began with, before0 and before1, and rounded low0 and low1, of those of what it left,
  after0 and after1; those of `first` summed so far, new_first0 and new_first1; those of the decays by program, [B, R,
  programs, 3]."""
  pid = tl.cast(tl.program_id(0), tl.int64)
  memory, part = pid // ((H + I) // PART), pid % ((H + I) // PART)
  c = tl.load(at + memory // R)
  chunk = memory * C + c
  beta, gamma, kept = tl.load(decays + chunk * 3), tl.load(decays + chunk * 3 + 1), tl.load(decays + chunk * 3 + 2)
  fresh = tl.load(anew + memory // R * C + c)
  deep_ones += memory * 3 * T * H
  wide_ones += memory * 2 * T * I
  one, pair, alone = memory * 2 * I * H, chunk * 2 * I * H, memory * I * H
  if part < H // PART:
    dbeta, dgamma, dkept = _before(
        pairs0 + pair, dpairs0 + pair, after0 + one, dfirst0 + alone, k + chunk * T * I, deep_ones + 2 * T * H, k,
        deep_ones, fresh, beta, gamma, kept, before0 + one, low0 + one, new_first0 + alone, part, I, H,
        T, PART, TILE, 1 if FULL else 0, PRECISION)
  else:
    dbeta, dgamma, dkept = _before(
        pairs1 + pair, dpairs1 + pair, after1 + one, dfirst1 + alone, deep_ones, wide_ones, deep_ones + T * H,
        wide_ones + T * I, fresh, beta, gamma, kept, before1 + one, low1 + one, new_first1 + alone,
        part - H // PART, H, I, T, PART, TILE, 2 if FULL else 0, PRECISION)
  tl.store(ddecays + pid * 3, dbeta)
  tl.store(ddecays + pid * 3 + 1, dgamma)
  tl.store(ddecays + pid * 3 + 2, dkept)
