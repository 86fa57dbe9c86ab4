"""What tiles of neighbouring tokens have in common, in one kernel: see `pallas_kernels.mosaic_gpu.shared_blocks.split`,
whose plain jnp is the slow twin."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton import call


def split(block_indices, first, end, *, group, rows, slots, votes, blocks):
  """The shared blocks of each tile, and what is left.

  Args:
    block_indices: int32[B, T, K, J].
    first, end: int32[B, T], the keys that each query sees.
    group: G.
    rows: of a tile, at least G; it has rows // G tokens.
    slots: candidates of a tile, up to 32.
    votes: tokens that have to choose a block.
    blocks: of keys.

  Returns:
    blocks, count, rows, words, first, end of `shared_blocks.Common`, and int32[B, T, K, J], the selection without
    them. Blocks past the count are undefined.
  """
  f = functools.partial(_split, group=group, rows=rows, slots=slots, votes=votes, blocks=blocks)
  return call.one_by_one(f)(block_indices, first, end)


def _split(block_indices, first, end, *, group, rows, slots, votes, blocks):
  B, T, K, J = block_indices.shape
  tokens = rows // group
  tiles = B * K * -(-T // tokens)
  numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  per_program = call.next_power_of_2(tokens) * call.next_power_of_2(J)
  out = call.kernel_call(
      kernel, (block_indices.astype(jnp.int32), first, end),
      [numbers(tiles * slots), numbers(tiles), *[numbers(tiles * rows)] * 4, numbers(B, T, K, J)],
      grid=(tiles,), name="shared_blocks_split", num_warps=1 if per_program <= 256 else 4, T=T, K=K, J=J,
      JP=call.next_power_of_2(J), G=group, TOKENS=tokens, TP=call.next_power_of_2(tokens), ROWS=rows, SLOTS=slots,
      SAMPLES=-(-slots // J), VOTES=votes, BLOCKS=blocks)
  return tuple(out)


@triton.jit
def _once(indices, row, there, slot, block, J: tl.constexpr, BLOCKS: tl.constexpr):
  """`block`, read from slot `slot` of each row, and -1 where that is none, or one that an earlier slot names."""
  ok = there & (block >= 0) & (block < BLOCKS)
  for j in range(0, J - 1):
    ok = ok & ((tl.load(indices + row * J + j, mask=there, other=-1) != block) | (slot <= j))
  return tl.where(ok, block, -1)


@triton.jit
def kernel(indices, first, end, blocks, count, rows, words, row_first, row_end, rest, T: tl.constexpr, K: tl.constexpr,
           J: tl.constexpr, JP: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, TP: tl.constexpr,
           ROWS: tl.constexpr, SLOTS: tl.constexpr, SAMPLES: tl.constexpr, VOTES: tl.constexpr, BLOCKS: tl.constexpr):
  TILES: tl.constexpr = (T + TOKENS - 1) // TOKENS
  tile = tl.program_id(0)
  head = tile // TILES
  b, r = head // K, head % K
  begin = tile % TILES * TOKENS
  at = tl.cast(b, tl.int64) * T
  # Candidates: the choices of a few tokens.
  c = tl.arange(0, SLOTS)
  of = c // J
  token = begin + (2 * of + 1) * TOKENS // (2 * SAMPLES)
  there = token < T
  row = (at + token) * K + r
  block = tl.load(indices + row * J + c % J, mask=there, other=-1)
  candidate = _once(indices, row, there, c % J, block, J, BLOCKS)
  # What the tokens chose.
  nth = tl.arange(0, TP)
  slot = tl.arange(0, JP)
  there = (nth < TOKENS) & (begin + nth < T)
  row = (at + begin + nth) * K + r
  here = there[:, None] & (slot < J)[None, :]
  place = row[:, None] * J + slot[None, :]
  block = tl.load(indices + place, mask=here, other=-1)
  block = _once(indices, row[:, None] + tl.zeros((TP, JP), tl.int64), here, slot[None, :], block, J, BLOCKS)
  left = block
  word = tl.zeros((TP,), tl.int32)
  taken = 0
  for n in range(SLOTS):
    wanted = tl.sum(tl.where(c == n, candidate, 0), axis=0)
    earlier = tl.sum(((c < n) & (candidate == wanted)).to(tl.int32), axis=0)
    hit = (block == wanted) & (wanted >= 0) & (earlier == 0)
    chose = tl.max(hit.to(tl.int32), axis=1)
    if tl.sum(chose, axis=0) >= VOTES:
      word = word | (chose << n)
      left = tl.where(hit, -1, left)
      tl.store(blocks + tile * SLOTS + taken, wanted * SLOTS + n)
      taken += 1
  tl.store(count + tile, taken)
  tl.store(rest + place, left, mask=here)
  for member in range(0, G):
    to = tile.to(tl.int64) * ROWS + nth * G + member
    safe = tl.minimum(begin + nth, T - 1)
    mine = nth < TOKENS
    tl.store(rows + to, (((at + safe) * K + r) * G + member).to(tl.int32), mask=mine)
    tl.store(words + to, word, mask=mine)
    tl.store(row_first + to, tl.load(first + at + begin + nth, mask=there, other=0), mask=mine)
    tl.store(row_end + to, tl.load(end + at + begin + nth, mask=there, other=0), mask=mine)
  if TOKENS * G < ROWS:  # rows that no token fills
    n = TOKENS * G + tl.arange(0, 16)
    to = tile.to(tl.int64) * ROWS + n
    none = tl.zeros((16,), tl.int32)
    tl.store(rows + to, none, mask=n < ROWS)
    tl.store(words + to, none, mask=n < ROWS)
    tl.store(row_first + to, none, mask=n < ROWS)
    tl.store(row_end + to, none, mask=n < ROWS)
