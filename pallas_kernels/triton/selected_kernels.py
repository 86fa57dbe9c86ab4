"""Triton kernels of selected attention; selected.py calls them.

Forward and dQ take one token and KV head at a time, its G heads padded to GP rows; dK and dV keep a block of keys and
gather the tokens that chose it (lists.py). Token t sees the keys low .. high - 1 of its blocks; a slot of -1 is read
as block 0 of which nothing is seen. Scores are in base 2: SCALE has a factor log2(e), and so has the lse of the
backward kernels.
"""
from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton.range_kernels import load_block, softmax_step, store_softmax


@triton.jit
def head_rows(item, T, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr):
  """Of (batch, token, KV head) number `item`: its batch, its KV head, its rows of q, whether there is such a row."""
  b = item // (T * K)
  m = tl.arange(0, GP)
  row = tl.cast(item, tl.int64) * G + m
  return b, item % K, row, m < G


@triton.jit
def slot(indices, item, n, J: tl.constexpr, JP: tl.constexpr):
  """The block of slot n, and whether it counts. JP > 0, J rounded up: slots may repeat a block, which counts once."""
  slots = indices + tl.cast(item, tl.int64) * J
  block = tl.load(slots + n)
  counts = block >= 0
  if JP > 0:
    before = tl.arange(0, JP)
    before = tl.load(slots + before, mask=before < n, other=-1)
    counts = counts & (tl.sum((before == block).to(tl.int32), axis=0) == 0)
  return block, counts


@triton.jit
def _place(indices, item, n, b, r, S, K: tl.constexpr, H: tl.constexpr, J: tl.constexpr, SIZE: tl.constexpr,
          first, stop, JP: tl.constexpr):
  """Of slot n: where its block of k or v begins, and which of its keys are seen, and which are there."""
  block, there = slot(indices, item, n, J, JP)
  block = tl.maximum(block, 0)
  c = block * SIZE + tl.arange(0, SIZE)
  at = (tl.cast(b, tl.int64) * S * K + r) * H + tl.cast(block, tl.int64) * (SIZE * K * H)
  return at, there & (c >= first) & (c < stop), c < S


@triton.jit
def _rows(pointer, ok, stride: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr):
  at = pointer + tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, H)[None, :]
  return tl.load(at, mask=ok[:, None], other=0.0)


@triton.jit
def forward_kernel(q, k, v, indices, low, high, o, lse, ITEMS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                   K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, J: tl.constexpr,
                   SIZE: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr, JP: tl.constexpr,
                   PRECISION: tl.constexpr):
  """o [SPLITS, B, T, N, H] and lse [SPLITS, B, T, N], from one of SPLITS parts of the slots."""
  part = tl.program_id(0) % SPLITS
  item = tl.program_id(0) // SPLITS
  b, r, row, ok = head_rows(item, T, K, G, GP)
  first, stop = tl.load(low + item // K), tl.load(high + item // K)
  queries = tl.load(q + row[:, None] * H + tl.arange(0, H)[None, :], mask=ok[:, None], other=0.0)
  acc = tl.zeros((GP, H), tl.float32)
  top = tl.full((GP,), float("-inf"), tl.float32)
  total = tl.zeros((GP,), tl.float32)
  PER: tl.constexpr = (J + SPLITS - 1) // SPLITS
  for n in range(part * PER, tl.minimum(part * PER + PER, J)):
    at, seen, there = _place(indices, item, n, b, r, S, K, H, J, SIZE, first, stop, JP)
    s = tl.dot(queries, tl.trans(_rows(k + at, there, K * H, H, SIZE)), input_precision=PRECISION)
    s = tl.where(seen[None, :], s, float("-inf"))
    p, decay, top, total = softmax_step(s, top, total, SCALE, True)
    values = _rows(v + at, there, K * H, H, SIZE)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
  store_softmax(acc, top, total, row + tl.cast(part, tl.int64) * (ITEMS * G), ok, o, lse, H)


@triton.jit
def dq_kernel(q, k, v, do, lse, delta, indices, low, high, dq, T: tl.constexpr, S: tl.constexpr,
              K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, J: tl.constexpr, SIZE: tl.constexpr,
              SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
  item = tl.program_id(0)
  b, r, row, ok = head_rows(item, T, K, G, GP)
  first, stop = tl.load(low + item // K), tl.load(high + item // K)
  square = row[:, None] * H + tl.arange(0, H)[None, :]
  queries = tl.load(q + square, mask=ok[:, None], other=0.0)
  cotangents = tl.load(do + square, mask=ok[:, None], other=0.0)
  norm = tl.load(lse + row, mask=ok, other=0.0)
  shift = tl.load(delta + row, mask=ok, other=0.0)
  acc = tl.zeros((GP, H), tl.float32)
  for n in range(J):
    at, seen, there = _place(indices, item, n, b, r, S, K, H, J, SIZE, first, stop, 0)
    keys = _rows(k + at, there, K * H, H, SIZE)
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * SCALE - norm[:, None]
    p = tl.exp2(tl.where(seen[None, :], s, float("-inf")))
    dp = tl.dot(cotangents, tl.trans(_rows(v + at, there, K * H, H, SIZE)), input_precision=PRECISION)
    ds = p * (dp - shift[:, None])
    acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
  tl.store(dq + square, (acc * FACTOR).to(dq.dtype.element_ty), mask=ok[:, None])


@triton.jit
def dkv_kernel(q, k, v, do, lse, delta, rows, spans, units, dk, dv, S: tl.constexpr, K: tl.constexpr,
               G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr,
               FACTOR: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
  """float32[units, SIZE, H] each: what the tokens of a unit give to their block; dK times FACTOR."""
  unit = units + tl.program_id(0) * 6
  first, count = tl.load(unit), tl.load(unit + 1)
  b, r, block = tl.load(unit + 3), tl.load(unit + 4), tl.load(unit + 5)
  base = (tl.cast(b, tl.int64) * S * K + r) * H
  keys = load_block(k + base, block, S, K * H, H, SIZE, True)
  values = load_block(v + base, block, S, K * H, H, SIZE, True)
  c = tl.arange(0, SIZE)
  m = tl.arange(0, TOKENS * GP)
  acc_k = tl.zeros((SIZE, H), tl.float32)
  acc_v = tl.zeros((SIZE, H), tl.float32)
  for begin in range(0, count, TOKENS):
    i = begin + m // GP
    ok = (i < count) & (m % GP < G)
    row = tl.load(rows + first + i, mask=ok, other=0).to(tl.int64) * G + m % GP
    span = tl.load(spans + first + i, mask=ok, other=0)
    seen = (c[:, None] >= (span >> 16)[None, :]) & (c[:, None] < (span & 0xffff)[None, :])
    square = row[:, None] * H + tl.arange(0, H)[None, :]
    queries = tl.load(q + square, mask=ok[:, None], other=0.0)
    cotangents = tl.load(do + square, mask=ok[:, None], other=0.0)
    norm = tl.load(lse + row, mask=ok, other=0.0)
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * SCALE - norm[None, :]
    p = tl.exp2(tl.where(seen & ok[None, :], s, float("-inf")))
    acc_v = tl.dot(p.to(values.dtype), cotangents, acc_v, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(cotangents), input_precision=PRECISION)
    ds = p * (dp - tl.load(delta + row, mask=ok, other=0.0)[None, :])
    acc_k = tl.dot(ds.to(keys.dtype), queries, acc_k, input_precision=PRECISION)
  if count > 0:
    out = tl.program_id(0).to(tl.int64) * (SIZE * H) + c[:, None] * H + tl.arange(0, H)[None, :]
    tl.store(dk + out, acc_k * FACTOR)
    tl.store(dv + out, acc_v)
