"""Selected blocks of few queries, of a contiguous cache or of one of pages: what decoding waits for is latency.

A token of a batch of 8 reads 17 MB, 4 us of an H200's memory, and a kernel that begins takes 1 us. So a program loads
the keys and values of its slots at once, before any product, and as few kernels as can be do the work. `Way` has the
choices; None, the default until a device has timed them, leaves tokens to selected.py and paged.py.

* splits > 1, cluster: the programs of an item are one cluster of thread blocks. Each writes what its slots give, all
  wait for each other at the cluster's barrier, and each combines some of the rows: one kernel, no atomics, no counter.
  The parts lie in an output of the call, which no other call has.
* splits > 1 without: a second kernel combines.
* splits = 1: nothing is combined. `columns` programs share an item: each has all scores and some columns of V.
"""
from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton import call, ranged
from pallas_kernels.triton.range_kernels import softmax_step
from pallas_kernels.triton.selected_kernels import head_rows


class Way(NamedTuple):
  """How the work on one (batch, token, KV head) is shared out. splits and columns are powers of two."""
  splits: int    # programs that share the slots
  columns: int   # programs that share the columns of V
  slots: int     # of a tile, a power of two
  warps: int
  stages: int    # of the compiler's software pipeline, where there are several tiles
  cluster: bool  # whether the parts are combined in the kernel


MAX_TILE = 256 * 128  # numbers of K in a tile

_WAY: list[Way | None] = [None]


@contextlib.contextmanager
def override(way: Way | None):
  """Inside, tokens go `way`: for measuring. Compiled functions keep what they have."""
  _WAY.append(way)
  try:
    yield
  finally:
    _WAY.pop()


def way_of(J, size, H) -> Way | None:
  """The way of a token with J slots of `size` keys; None: of selected.py and paged.py."""
  way = _WAY[-1]
  if way is None or way.splits > J or way.columns * 16 > H or way.slots * size * H > MAX_TILE:
    return None
  if way.cluster and (way.splits > 8 or way.columns > 1 or call.capability() < 90 or
                      not (call.INTERPRET or call.recorded())):
    return None
  return way


def attend(q, k, v, slots, table, low, high, way, *, block_size, scale):
  """o [B, T, N, H] in q.dtype and lse float32[B, T, N] of the blocks in `slots`, each once.

  Args:
    q: [B, T, N, H].
    k, v: [B, S, K, H], or [pages, block_size, K, H] with a table.
    slots: int32[B, T, K, J]; what is below 0 or not there is empty.
    table: int32[B, blocks], pages; what is below 0 or not there has no tokens. None: k and v are contiguous.
    low, high: int32[B, T], the tokens that a query sees.
    way: a `Way`.
    block_size: 16 or more.
    scale: of the scores, a positive number.
  """
  (B, T, N, H), (S, K), J, items = q.shape, k.shape[1:3], slots.shape[3], q.shape[0] * q.shape[1] * k.shape[2]
  splits = way.splits
  part = [jax.ShapeDtypeStruct((splits, B, T, N, H), jnp.float32 if splits > 1 else q.dtype),
          jax.ShapeDtypeStruct((splits, B, T, N), jnp.float32)]
  whole = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)]
  if table is None:
    table, blocks, pages = low, -(-S // block_size), 0  # any array: it is not read
  else:
    blocks, pages = table.shape[1], k.shape[0]
  inputs = (q, k, v, slots.astype(jnp.int32), table.astype(jnp.int32), low, high)
  constants = dict(
      T=T, S=S, K=K, G=N // K, GP=max(call.next_power_of_2(N // K), ranged.MIN_ROWS), H=H, J=J,
      JP=call.next_power_of_2(J), SIZE=block_size, SLOTS=way.slots, SCALE=float(scale) * call.LOG2E,
      COLUMNS=way.columns, STAGES=way.stages, BLOCKS=blocks, PAGES=pages,
      PRECISION="ieee" if q.dtype == jnp.float32 else "tf32")
  shared = dict(ITEMS=items, SPLITS=splits)
  rows = max(call.next_power_of_2(N // K) // splits, 1)  # that a program combines
  how = dict(num_warps=way.warps, num_stages=1)
  programs = items * way.columns
  if way.cluster and splits > 1 and not call.INTERPRET:  # whose programs run one after the other: none can wait
    *_, o, lse = call.kernel_call(token_kernel, inputs, part + whole, grid=(programs,), cluster=splits,
                                  name="selected_token", R=rows, **how, **shared, **constants)
    return o, lse
  parts = call.kernel_call(parts_kernel, inputs, part, grid=(programs * splits,), name="selected_token", **how,
                           **shared, **constants)
  if splits == 1:
    return parts[0][0], parts[1][0]
  return tuple(call.kernel_call(
      combine_token_kernel, parts, whole, grid=(items * splits,), name="combine_token", num_warps=4, G=N // K, H=H,
      R=rows, **shared))


@triton.jit
def parts_kernel(q, k, v, slots, table, low, high, o, lse, ITEMS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                 K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, J: tl.constexpr,
                 JP: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr,
                 COLUMNS: tl.constexpr, STAGES: tl.constexpr, BLOCKS: tl.constexpr, PAGES: tl.constexpr,
                 PRECISION: tl.constexpr):
  """What one of SPLITS parts of the slots gives: o [SPLITS, B, T, N, H], lse [SPLITS, B, T, N]."""
  part = tl.program_id(0) % SPLITS
  column = tl.program_id(0) // SPLITS % COLUMNS
  item = tl.program_id(0) // (SPLITS * COLUMNS)
  b, r, row, ok = head_rows(item, T, K, G, GP)
  HV: tl.constexpr = H // COLUMNS
  PER: tl.constexpr = (J + SPLITS - 1) // SPLITS
  ROWS: tl.constexpr = SLOTS * SIZE
  h = tl.arange(0, H)[None, :]
  j = tl.arange(0, JP)
  slots += tl.cast(item, tl.int64) * J
  table += tl.cast(b, tl.int64) * BLOCKS
  here = tl.cast(b, tl.int64) * S
  end = tl.minimum(part * PER + PER, J)
  # What places depend on, then what is small: nothing else is waited for once keys and values are on the way.
  first, stop = tl.load(low + item // K), tl.load(high + item // K)
  blocks = tl.load(slots + j, mask=j < J, other=-1)
  queries = tl.load(q + row[:, None] * H + h, mask=ok[:, None], other=0.0)
  again = tl.sum(((blocks[None, :] == blocks[:, None]) & (j[None, :] < j[:, None])).to(tl.int32), axis=1) > 0
  blocks = tl.where(again | (blocks >= BLOCKS), -1, blocks)  # a block that stands in several slots counts once
  pages = blocks
  if PAGES > 0:
    pages = tl.load(table + blocks, mask=blocks >= 0, other=-1)
    blocks = tl.where((pages >= 0) & (pages < PAGES), blocks, -1)
  m = tl.arange(0, ROWS)
  acc = tl.zeros((GP, HV), tl.float32)
  top = tl.full((GP,), float("-inf"), tl.float32)
  total = tl.zeros((GP,), tl.float32)
  if PER <= SLOTS and COLUMNS == 1:
    # One load of both, a key and its value in turn: Triton takes a tile to shared memory before it loads the next.
    twice = tl.arange(0, 2 * ROWS)
    at, there = _place(blocks, pages, j, part * PER, end, twice // 2, first, stop, here, SIZE, SLOTS, PAGES)
    both = tl.where(twice % 2 == 0, k, v) + at * (K * H) + r * H
    both = tl.load(both[:, None] + h, mask=there[:, None], other=0.0)
    _, seen = _place(blocks, pages, j, part * PER, end, m, first, stop, here, SIZE, SLOTS, PAGES)
    s = tl.dot(queries, tl.trans(both), input_precision=PRECISION)
    s, _ = tl.split(tl.reshape(s, (GP, ROWS, 2)))
    s = tl.where(seen[None, :], s, float("-inf"))
    p, decay, top, total = softmax_step(s, top, total, SCALE, True)
    p = tl.reshape(tl.join(tl.zeros_like(p), p), (GP, 2 * ROWS))
    acc = tl.dot(p.to(both.dtype), both, input_precision=PRECISION)
  else:
    for i in tl.range(0, (PER + SLOTS - 1) // SLOTS, num_stages=STAGES):
      at, there = _place(blocks, pages, j, part * PER + i * SLOTS, end, m, first, stop, here, SIZE, SLOTS, PAGES)
      at = (at * (K * H) + r * H)[:, None]
      keys = tl.load(k + at + h, mask=there[:, None], other=0.0)
      values = tl.load(v + at + (column * HV + tl.arange(0, HV))[None, :], mask=there[:, None], other=0.0)
      s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
      s = tl.where(there[None, :], s, float("-inf"))
      p, decay, top, total = softmax_step(s, top, total, SCALE, True)
      acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
  row += tl.cast(part, tl.int64) * (ITEMS * G)
  safe = tl.where(total > 0, total, 1.0)
  at = row[:, None] * H + column * HV + tl.arange(0, HV)[None, :]
  tl.store(o + at, (acc / safe[:, None]).to(o.dtype.element_ty), mask=ok[:, None])
  natural = (top + tl.log2(safe)) * 0.6931471805599453
  tl.store(lse + row, tl.where(total > 0, natural, float("-inf")), mask=ok & (column == 0))


@triton.jit
def _place(blocks, pages, j, begin, end, m, first, stop, here, SIZE: tl.constexpr, SLOTS: tl.constexpr,
           PAGES: tl.constexpr):
  """Of key m % SIZE of slot begin + m // SIZE: its token in memory, and whether it is there and its query sees it.

  Blocks come out of registers: loads would have to arrive before those of keys and values begin."""
  block = tl.full(m.shape, -1, tl.int32)
  page = block
  for x in tl.static_range(SLOTS):
    own = (m // SIZE == x) & (begin + x < end)
    block = tl.where(own, tl.max(tl.where(j == begin + x, blocks, -1), axis=0), block)
    if PAGES > 0:
      page = tl.where(own, tl.max(tl.where(j == begin + x, pages, -1), axis=0), page)
  c = block * SIZE + m % SIZE
  there = (block >= 0) & (c >= first) & (c < stop)
  if PAGES > 0:
    return tl.cast(page, tl.int64) * SIZE + m % SIZE, there
  else:
    return here + c, there


@triton.jit
def combine_token_kernel(parts, part_lse, o, lse, ITEMS: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
                         SPLITS: tl.constexpr, R: tl.constexpr):
  """R of the G rows of an item, the parts in their order; past the first level of caches, whose lines may be old."""
  m = tl.program_id(0) % SPLITS * R + tl.arange(0, R)
  row = tl.cast(tl.program_id(0) // SPLITS, tl.int64) * G + m
  ok = m < G
  at = row[:, None] * H + tl.arange(0, H)[None, :]
  every, results, top = (), (), tl.full((R,), float("-inf"), tl.float32)
  for n in tl.static_range(SPLITS):
    every += (tl.load(part_lse + n * (ITEMS * G) + row, mask=ok, other=float("-inf"), cache_modifier=".cg"),)
    results += (tl.load(parts + n * (ITEMS * G * H) + at, mask=ok[:, None], other=0.0, cache_modifier=".cg"),)
  for n in tl.static_range(SPLITS):
    top = tl.maximum(top, every[n])
  shift = tl.where(top > float("-inf"), top, 0.0)
  total, acc = tl.zeros((R,), tl.float32), tl.zeros((R, H), tl.float32)
  for n in tl.static_range(SPLITS):
    weight = tl.exp(every[n] - shift)
    total += weight
    acc += weight[:, None] * results[n]
  safe = tl.where(total > 0, total, 1.0)
  tl.store(o + at, (acc / safe[:, None]).to(o.dtype.element_ty), mask=ok[:, None])
  tl.store(lse + row, tl.where(total > 0, top + tl.log(safe), float("-inf")), mask=ok)


@triton.jit
def token_kernel(q, k, v, slots, table, low, high, parts, part_lse, o, lse, ITEMS: tl.constexpr, T: tl.constexpr,
                 S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, J: tl.constexpr,
                 JP: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr,
                 COLUMNS: tl.constexpr, STAGES: tl.constexpr, BLOCKS: tl.constexpr, PAGES: tl.constexpr,
                 PRECISION: tl.constexpr, R: tl.constexpr):
  """Both: the SPLITS programs of an item are one cluster, at whose barrier what all have written can be read by all."""
  parts_kernel(q, k, v, slots, table, low, high, parts, part_lse, ITEMS, T, S, K, G, GP, H, J, JP, SIZE, SLOTS, SCALE,
               SPLITS, COLUMNS, STAGES, BLOCKS, PAGES, PRECISION)
  tl.inline_asm_elementwise(
      "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;",
      "=r,r,~{memory}", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
  combine_token_kernel(parts, part_lse, o, lse, ITEMS, G, H, SPLITS, R)
