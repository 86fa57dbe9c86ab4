"""Triton kernels of what stands between products: RMSNorm of a row and its gradient, SwiGLU's gate and its gradient,
the loss of a row of logits with its gradient.

A program has ROWS rows whole. R replicas of rows / R rows each have gains of their own.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward_kernel(x, more, gain, out, whole, ADD: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
                        D: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr):
  """Of x, or if ADD of whole = x + more, which is written."""
  row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  d = tl.arange(0, WIDTH)
  ok = (row < M)[:, None] & (d < D)[None, :]
  at = tl.cast(row, tl.int64)[:, None] * D + d[None, :]
  v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
  if ADD:
    added = (v + tl.load(more + at, mask=ok, other=0.0).to(tl.float32)).to(whole.dtype.element_ty)
    tl.store(whole + at, added, mask=ok)
    v = added.to(tl.float32)
  scale = tl.rsqrt(tl.sum(v * v, axis=1) / D + EPS)[:, None]
  g = tl.load(gain + tl.program_id(0) * ROWS // (M // R) * D + d, mask=d < D, other=0.0)[None, :]
  tl.store(out + at, (v * scale * g).to(out.dtype.element_ty), mask=ok)


@triton.jit
def norm_backward_kernel(x, gain, dout, beside, dx, dgain, M: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
                         EPS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, PIECE: tl.constexpr):
  """dx = beside + the norm's own. A program has TILES tiles and leaves its share of dgain, float32[programs, D].

  A row goes through in pieces, of which a few threads of one warp have all: sums over a row stay within a warp, those
  over rows within a thread until the end.
  """
  PIECES: tl.constexpr = (D + PIECE - 1) // PIECE
  pid = tl.program_id(0)
  d = tl.arange(0, PIECE)
  gain += pid * (ROWS * TILES) // (M // R) * D
  gains = ()
  for i in tl.static_range(PIECES):
    gains += (tl.load(gain + i * PIECE + d, mask=i * PIECE + d < D, other=0.0)[None, :],)
  totals = (tl.zeros([ROWS, PIECE], tl.float32),) * PIECES
  for tile in range(TILES):
    row = (pid * TILES + tile) * ROWS + tl.arange(0, ROWS)
    at = tl.cast(row, tl.int64)[:, None] * D + d[None, :]
    values, cotangents, others = (), (), ()
    for i in tl.static_range(PIECES):
      ok = (i * PIECE + d < D)[None, :]
      values += (tl.load(x + at + i * PIECE, mask=ok, other=0.0),)
      cotangents += (tl.load(dout + at + i * PIECE, mask=ok, other=0.0),)
      others += (tl.load(beside + at + i * PIECE, mask=ok, other=0.0),)
    squares = tl.zeros([ROWS, PIECE], tl.float32)
    for i in tl.static_range(PIECES):
      v = values[i].to(tl.float32)
      squares += v * v
    scale = tl.rsqrt(tl.sum(squares, axis=1) / D + EPS)[:, None]
    products = tl.zeros([ROWS, PIECE], tl.float32)
    sums = ()
    for i in tl.static_range(PIECES):
      share = cotangents[i].to(tl.float32) * (values[i].to(tl.float32) * scale)
      sums += (totals[i] + share,)
      products += share * gains[i]
    totals = sums
    mean = (tl.sum(products, axis=1) / D)[:, None]
    for i in tl.static_range(PIECES):
      ok = (i * PIECE + d < D)[None, :]
      own = scale * (cotangents[i].to(tl.float32) * gains[i] - values[i].to(tl.float32) * scale * mean)
      tl.store(dx + at + i * PIECE, (others[i].to(tl.float32) + own).to(dx.dtype.element_ty), mask=ok)
  for i in tl.static_range(PIECES):
    tl.store(dgain + pid * D + i * PIECE + d, tl.sum(totals[i], axis=0), mask=i * PIECE + d < D)


@triton.jit
def gate_forward_kernel(y, out, M: tl.constexpr, F: tl.constexpr, SIZE: tl.constexpr):
  """out[m, f] = silu(y[m, f]) y[m, F + f]."""
  i = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
  ok = i < M * F
  at = i // F * (2 * F) + i % F
  gate = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
  up = tl.load(y + at + F, mask=ok, other=0.0).to(tl.float32)
  tl.store(out + i, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=ok)


@triton.jit
def gate_backward_kernel(y, dout, dy, M: tl.constexpr, F: tl.constexpr, SIZE: tl.constexpr):
  i = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
  ok = i < M * F
  at = i // F * (2 * F) + i % F
  gate = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
  up = tl.load(y + at + F, mask=ok, other=0.0).to(tl.float32)
  d = tl.load(dout + i, mask=ok, other=0.0).to(tl.float32)
  share = 1 / (1 + tl.exp(-gate))
  tl.store(dy + at, (d * up * share * (1 + gate * (1 - share))).to(dy.dtype.element_ty), mask=ok)
  tl.store(dy + at + F, (d * gate * share).to(dy.dtype.element_ty), mask=ok)


@triton.jit
def nll_kernel(logits, targets, shares, nll, dlogits, V: tl.constexpr, SIZE: tl.constexpr):
  """Of one row: log(sum(exp(x))) - x[target], and share (exp(x) / sum(exp(x)) - 1 at the target).

  Each place of a tile has a maximum and a sum of its own until the row is read. The second time it comes from the L2
  cache: as many rows as there are multiprocessors fit in.
  """
  row = tl.cast(tl.program_id(0), tl.int64)
  v = tl.arange(0, SIZE)
  top = tl.full([SIZE], -3e38, tl.float32)
  total = tl.zeros([SIZE], tl.float32)
  for start in range(0, V, SIZE):
    x = tl.load(logits + row * V + start + v, mask=start + v < V, other=float("-inf"))
    new = tl.maximum(top, x)
    total = total * tl.exp(top - new) + tl.exp(x - new)
    top = new
  peak = tl.max(top, axis=0)
  lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
  target = tl.load(targets + row)
  tl.store(nll + row, lse - tl.load(logits + row * V + target, mask=(target >= 0) & (target < V), other=0.0))
  share = tl.load(shares + row)
  for start in range(0, V, SIZE):
    ok = start + v < V
    x = tl.load(logits + row * V + start + v, mask=ok, other=0.0)
    d = tl.where(start + v == target, tl.exp(x - lse) - 1, tl.exp(x - lse)) * share
    tl.store(dlogits + row * V + start + v, d.to(dlogits.dtype.element_ty), mask=ok)
