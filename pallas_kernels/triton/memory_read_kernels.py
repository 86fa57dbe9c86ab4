"""Triton kernels that read Titans' memories of two matrices, for all chunks side by side, and the decays of chunks.

Letters: T tokens of a chunk, I width, H hidden width, G queries of a memory; matrices [I, H] and [H, I]. A chunk n is
(sequence, memory, chunk of it). Products have operands of `errors0`'s dtype and float32 sums; all else is float32.
What is computed: `pallas_kernels.memory.mix` and `read`.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.memory_kernels import _bounding, _through

EPS = tl.constexpr(1e-6)


@triton.jit
def mixing_forward_kernel(keep, momentum, live, mixing, beta, gamma, leaving, lasting, decays, T: tl.constexpr):
  """Of one chunk, of [T] logarithms: mixing [T, T]; beta, gamma, leaving, lasting [T]; decays [3]. Row by row, a column
  to each token: what is left of its step in the memory, and in the surprise."""
  n = tl.cast(tl.program_id(0), tl.int64)
  i = tl.arange(0, T)
  memory, surprise = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
  start, new, end = 1.0, 0.0, 1.0
  for t in range(T):
    kept, going = tl.exp(tl.load(keep + n * T + t)), tl.exp(tl.load(momentum + n * T + t))
    on = tl.load(live + n * T + t)
    surprise = tl.where(i == t, 1.0, surprise * going)
    memory = memory * kept + surprise * on
    tl.store(mixing + (n * T + t) * T + i, memory)
    end *= going
    start *= kept
    new = new * kept + end * on
    tl.store(beta + n * T + t, start)
    tl.store(gamma + n * T + t, new)
  tl.store(leaving + n * T + i, memory)
  tl.store(lasting + n * T + i, surprise)
  tl.store(decays + n * 3, start)
  tl.store(decays + n * 3 + 1, new)
  tl.store(decays + n * 3 + 2, end)


@triton.jit
def mixing_backward_kernel(keep, momentum, live, mixing, beta, gamma, dmixing, dbeta, dgamma, dleaving, dlasting,
                           ddecays, dkeep, dmomentum, T: tl.constexpr, STAGES: tl.constexpr):
  """From the last row back, with the gradients of what `mixing_forward_kernel` carries."""
  n = tl.cast(tl.program_id(0), tl.int64)
  i = tl.arange(0, T)
  memory, surprise = tl.load(dleaving + n * T + i), tl.load(dlasting + n * T + i)
  start, new, end = tl.load(ddecays + n * 3), tl.load(ddecays + n * 3 + 1), tl.load(ddecays + n * 3 + 2)
  steps = tl.load(momentum + n * T + i)
  sums = tl.cumsum(steps, 0)
  reached = tl.sum(steps, 0)
  for step in tl.range(0, T, num_stages=STAGES):
    at = n * T + T - 1 - step
    log_kept, log_going, on = tl.load(keep + at), tl.load(momentum + at), tl.load(live + at)
    row = tl.load(dmixing + at * T + i, mask=i < T - step, other=0.0)
    left = tl.load(mixing + at * T + i)
    kept, going = tl.exp(log_kept), tl.exp(log_going)
    share = tl.where(i <= T - 1 - step, tl.exp(tl.where(i <= T - 1 - step, reached - sums, 0.0)), 0.0)
    whole, fresh = tl.load(beta + at), tl.load(gamma + at)
    carried = tl.exp(reached)
    memory += row
    start += tl.load(dbeta + at)
    new += tl.load(dgamma + at)
    surprise += memory * on
    end += new * on
    tl.store(dkeep + at, tl.sum(memory * (left - share * on), 0) + new * (fresh - carried * on) + start * whole)
    tl.store(dmomentum + at, tl.sum(tl.where(i < T - 1 - step, surprise * share, 0.0), 0) + end * carried)
    memory *= kept
    new *= kept
    start *= kept
    surprise *= going
    end *= going
    reached -= log_going


@triton.jit
def _unit(x):
  """SiLU, then unit norm: (that, 1 / norm, the sigmoid)."""
  gate = tl.sigmoid(x)
  y = x * gate
  scale = tl.rsqrt(tl.sum(y * y, axis=1) + EPS)[:, None]
  return y * scale, scale, gate


@triton.jit
def _moved(a, pair, keys, errors, mixing, tiles, beta, gamma, I: tl.constexpr, O: tl.constexpr,
           PART: tl.constexpr, PRECISION: tl.constexpr):
  """a times its matrix after each token's own write, [rows, O]: of what the chunk began with less what its first
  `tiles` times PART tokens wrote. `mixing`: pointers to rows, [rows, 1]."""
  i, o, low = tl.arange(0, I), tl.arange(0, O), a.to(errors.dtype.element_ty)
  at = i[:, None] * O + o[None, :]
  out = beta * tl.dot(low, tl.load(pair + at), input_precision=PRECISION)
  out += gamma * tl.dot(low, tl.load(pair + I * O + at), input_precision=PRECISION)
  for tile in range(tiles):
    t = tile * PART + tl.arange(0, PART)
    shares = tl.dot(low, tl.load(keys + i[:, None] + t[None, :] * I), input_precision=PRECISION)
    shares *= tl.load(mixing + t[None, :])
    out -= tl.dot(shares.to(low.dtype), tl.load(errors + t[:, None] * O + o[None, :]), input_precision=PRECISION)
  return out


@triton.jit
def _back(a, dz, pair, keys, errors, mixing, dmixing, more, tiles, beta, gamma, I: tl.constexpr, O: tl.constexpr,
          PART: tl.constexpr, PRECISION: tl.constexpr):
  """Gradients of `_moved` for that of its result: of a, beta [rows] and gamma [rows]; that of mixing it stores, or adds
  to what is there where `more` is not 0."""
  i, o = tl.arange(0, I), tl.arange(0, O)
  low, dlow = a.to(errors.dtype.element_ty), dz.to(errors.dtype.element_ty)
  at = o[:, None] + i[None, :] * O
  one = tl.dot(dlow, tl.load(pair + at), input_precision=PRECISION)
  da, dbeta = beta * one, tl.sum(one * a, 1)
  one = tl.dot(dlow, tl.load(pair + I * O + at), input_precision=PRECISION)
  da, dgamma = da + gamma * one, tl.sum(one * a, 1)
  for tile in range(tiles):
    t = tile * PART + tl.arange(0, PART)
    key = tl.load(keys + t[:, None] * I + i[None, :])
    shares = tl.dot(low, tl.trans(key), input_precision=PRECISION)
    dshares = tl.dot(dlow, tl.load(errors + o[:, None] + t[None, :] * O), input_precision=PRECISION)
    before = tl.load(dmixing + t[None, :], mask=tl.full(shares.shape, more, tl.int32) != 0, other=0.0)
    tl.store(dmixing + t[None, :], before - dshares * shares)
    da -= tl.dot((dshares * tl.load(mixing + t[None, :])).to(low.dtype), key, input_precision=PRECISION)
  return da, dbeta, dgamma


@triton.jit
def read_forward_kernel(q, live, gain, mixing, beta, gamma, k, hidden, errors0, errors1, pairs0, pairs1, y,
                        R: tl.constexpr, C: tl.constexpr, G: tl.constexpr, T: tl.constexpr, I: tl.constexpr,
                        H: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr):
  """y [B, C T, R, G, I] of q of the same shape, as projected: TILE tokens of a chunk and one query of a memory."""
  pid = tl.cast(tl.program_id(0), tl.int64)
  g, tile, n = pid % G, pid // G % (T // TILE), pid // G // (T // TILE)
  t = tile * TILE + tl.arange(0, TILE)
  memory, i, tiles = n // C, tl.arange(0, I), tl.cast((tile + 1) * TILE // PART, tl.int32)
  token = (memory // R * C + n % C) * T + t
  mix = mixing + (n * T + t)[:, None] * T
  start, new = tl.load(beta + n * T + t)[:, None], tl.load(gamma + n * T + t)[:, None]
  at = ((token * R + memory % R) * G + g)[:, None] * I + i[None, :]
  a0, _, _ = _unit(tl.load(q + at).to(tl.float32))
  z = _moved(a0, pairs0 + n * 2 * I * H, k + n * T * I, errors0 + n * T * H, mix, tiles, start, new, I, H, PART,
             PRECISION)
  z = z * _bounding(z)
  z = _moved(z * tl.sigmoid(z) * (1.0 / H ** 0.5), pairs1 + n * 2 * I * H, hidden + n * T * H, errors1 + n * T * I, mix,
             tiles, start, new, H, I, PART, PRECISION)
  on, weight = tl.load(live + token)[:, None], tl.load(gain + memory * I + i)[None, :]
  a0, _, _ = _unit(tl.load(q + at).to(tl.float32))
  tl.store(y + at, (a0 + weight * (z * _bounding(z))) * on)


@triton.jit
def read_rows_kernel(q, live, gain, mixing, beta, gamma, k, hidden, errors0, errors1, pairs0, pairs1, dy, dq, dmixing,
                     dbeta, dgamma, dgain, a0s, a1s, dz0s, dz1s, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
                     T: tl.constexpr, I: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
                     PRECISION: tl.constexpr):
  """Gradients of rows, made again: of q, of the decays, of the gain by tile; and what `read_sums_kernel` sums over
  rows: inputs a0s, a1s [B, R, C, G, T, I or H] and gradients of results dz0s, dz1s [.., H or I] of both matrices. Of
  dmixing, what lies behind the diagonal's tile of PART tokens stays unwritten."""
  pid = tl.cast(tl.program_id(0), tl.int64)
  n, tile = pid // (T // TILE), pid % (T // TILE)
  t = tile * TILE + tl.arange(0, TILE)
  memory, i, h, tiles = n // C, tl.arange(0, I), tl.arange(0, H), tl.cast((tile + 1) * TILE // PART, tl.int32)
  dtype: tl.constexpr = a0s.dtype.element_ty
  token = (memory // R * C + n % C) * T + t
  mix, dmix = mixing + (n * T + t)[:, None] * T, dmixing + (n * T + t)[:, None] * T
  pairs0, pairs1, k, hidden = pairs0 + n * 2 * I * H, pairs1 + n * 2 * I * H, k + n * T * I, hidden + n * T * H
  errors0, errors1 = errors0 + n * T * H, errors1 + n * T * I
  dstart, dnew, dweight = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([I], tl.float32)
  for g in range(G):
    start, new = tl.load(beta + n * T + t)[:, None], tl.load(gamma + n * T + t)[:, None]
    at = ((token * R + memory % R) * G + g)[:, None] * I + i[None, :]
    row = (n * G + g) * T + t
    wide, deep = row[:, None] * I + i[None, :], row[:, None] * H + h[None, :]
    a0, _, _ = _unit(tl.load(q + at).to(tl.float32))
    tl.store(a0s + wide, a0.to(dtype))
    z0 = _moved(a0, pairs0, k, errors0, mix, tiles, start, new, I, H, PART, PRECISION)
    s0 = _bounding(z0)
    n0 = z0 * s0
    a1 = n0 * tl.sigmoid(n0) * (1.0 / H ** 0.5)
    tl.store(a1s + deep, a1.to(dtype))
    z1 = _moved(a1, pairs1, hidden, errors1, mix, tiles, start, new, H, I, PART, PRECISION)
    s1 = _bounding(z1)
    answer = tl.load(dy + at) * tl.load(live + token)[:, None]
    dweight += tl.sum(answer * (z1 * s1), 0)
    dz1 = _through(z1, s1, answer * tl.load(gain + memory * I + i)[None, :])
    tl.store(dz1s + wide, dz1.to(dtype))
    tl.debug_barrier()  # dmix of the query before
    da1, one, two = _back(a1, dz1, pairs1, hidden, errors1, mix, dmix, g, tiles, start, new, H, I, PART, PRECISION)
    dstart += one
    dnew += two
    open0 = tl.sigmoid(n0)
    dz0 = _through(z0, s0, da1 * (open0 * (1 + n0 * (1 - open0)) * (1.0 / H ** 0.5)))
    tl.store(dz0s + deep, dz0.to(dtype))
    x = tl.load(q + at).to(tl.float32)
    a0, scale, gate = _unit(x)
    tl.debug_barrier()  # dmix of the other matrix
    da0, one, two = _back(a0, dz0, pairs0, k, errors0, mix, dmix, 1, tiles, start, new, I, H, PART, PRECISION)
    dstart += one
    dnew += two
    da0 += tl.load(dy + at) * tl.load(live + token)[:, None]
    da0 = scale * (da0 - a0 * tl.sum(a0 * da0, 1)[:, None])
    tl.store(dq + at, (da0 * gate * (1 + x * (1 - gate))).to(dq.dtype.element_ty))
  tl.store(dbeta + n * T + t, dstart)
  tl.store(dgamma + n * T + t, dnew)
  tl.store(dgain + pid * I + i, dweight)


@triton.jit
def read_sums_kernel(a, dz, keys, errors, mixing, beta, gamma, dpairs, dkeys, derrors, G: tl.constexpr,
                     T: tl.constexpr, I: tl.constexpr, O: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
  """Of one matrix [I, O] of a chunk, sums over the rows that read it: gradients of TILE tokens' keys and errors, or, by
  the last program of a chunk, of what it began with."""
  dtype: tl.constexpr = errors.dtype.element_ty
  TILES: tl.constexpr = T // TILE
  pid = tl.cast(tl.program_id(0), tl.int64)
  n, part = pid // (TILES + 1), pid % (TILES + 1)
  i, o, row = tl.arange(0, I), tl.arange(0, O), tl.arange(0, TILE)
  a += n * G * T * I
  dz += n * G * T * O
  if part < TILES:
    t = part * TILE + tl.arange(0, TILE)
    wide, deep = (n * T + t)[:, None] * I + i[None, :], (n * T + t)[:, None] * O + o[None, :]
    key, error = tl.load(keys + wide), tl.load(errors + deep)
    dkey, derror = tl.zeros([TILE, I], tl.float32), tl.zeros([TILE, O], tl.float32)
    for turn in range(G * (TILES - part)):  # later rows alone read what a token wrote
      g, u = turn // (TILES - part), (part + turn % (TILES - part)) * TILE + row
      x = tl.load(a + (g * T + u)[:, None] * I + i[None, :])
      dx = tl.load(dz + (g * T + u)[:, None] * O + o[None, :])
      mix = tl.load(mixing + n * T * T + u[None, :] * T + t[:, None])  # [keys, rows]
      shares = tl.dot(key, tl.trans(x), input_precision=PRECISION) * mix
      derror -= tl.dot(shares.to(dtype), dx, input_precision=PRECISION)
      shares = tl.dot(error, tl.trans(dx), input_precision=PRECISION) * mix
      dkey -= tl.dot(shares.to(dtype), x, input_precision=PRECISION)
    tl.store(dkeys + wide, dkey)
    tl.store(derrors + deep, derror.to(dtype))
  else:
    now, surprise = tl.zeros([I, O], tl.float32), tl.zeros([I, O], tl.float32)
    for step in range(G * TILES):
      t = step % TILES * TILE + row
      x = tl.trans(tl.load(a + (step * TILE + row)[:, None] * I + i[None, :]))
      dx = tl.load(dz + (step * TILE + row)[:, None] * O + o[None, :])
      start, new = tl.load(beta + n * T + t)[:, None], tl.load(gamma + n * T + t)[:, None]
      now += tl.dot(x, (start * dx).to(dtype), input_precision=PRECISION)
      surprise += tl.dot(x, (new * dx).to(dtype), input_precision=PRECISION)
    at = n * 2 * I * O + i[:, None] * O + o[None, :]
    tl.store(dpairs + at, now)
    tl.store(dpairs + I * O + at, surprise)
