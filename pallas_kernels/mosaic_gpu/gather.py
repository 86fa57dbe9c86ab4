"""Gathers scattered query rows into shared memory tiles that `wgmma` reads.

The tensor copy engine of Hopper writes boxes of at least 8 rows into a swizzled tile,
so a token with G < 8 rows cannot go through it. Ampere's `cp.async` moves 16 bytes per
thread to any address: each thread computes the swizzled place itself, and any G costs
the same. Every function is for one warpgroup (128 threads) and Lane semantics. With
`interpret` they do the same by Pallas operations that the interpreter knows, and wait.
"""
from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels.lists import TILE_ROWS
from pallas_kernels.mosaic_gpu import ptx


def barrier_unless(interpret):
  """All threads of the warpgroup reach this point before any passes it; the interpreter has one thread."""
  if interpret:
    return

  @plgpu.inline_mgpu()
  def do(ctx):
    del ctx
    ptx.warpgroup_barrier()
  do()


def commit(interpret=False):
  """Closes the group of gathers issued since the last commit."""
  if interpret:
    return

  @plgpu.inline_mgpu()
  def do(ctx):
    del ctx
    ptx.effect("cp.async.commit_group;")
  do()


def wait(newest: int, interpret=False):
  """Waits until all but the `newest` committed groups have landed; `commit_smem` must follow before use."""
  if interpret:
    return

  @plgpu.inline_mgpu()
  def do(ctx):
    del ctx
    ptx.effect(f"cp.async.wait_group {newest};")
  do()


def load_lists(sources, destinations, first, tokens, *, copied, interpret):
  """Copies int32 sources[i][first : first + tokens] into the shared lists, fills their rest with 0 (in the interpreter
  with whatever follows in the sources), and waits. copied: a barrier for the interpreter."""
  size = destinations[0].shape[0]
  if interpret:
    return _copy([source.at[pl.ds(first, size)] for source in sources], destinations, copied)
  number = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(arg_types=(
      [plgpu.RefType()] * len(sources), [plgpu.RefType()] * len(destinations), number, number))
  def do(ctx, sources, destinations, first, tokens):
    del ctx
    first, tokens = first.registers.item(), tokens.registers.item()
    for base in range(0, size, ptx.THREADS):
      index = ptx.add(ptx.thread(), base)
      inside = ptx.less(index, tokens)
      take = ptx.choose(inside, ptx.constant(4), 0)
      # The address of an element that is not read still has to lie inside the array.
      element = ptx.wide(ptx.add(first, ptx.choose(inside, index, 0)))
      for source, destination in zip(sources, destinations):
        operands = (ptx.add(ptx.shared_address(destination), ptx.mul(index, 4)),
                    ptx.byte(ptx.global_address(source), element, 4), take)
        text = "cp.async.ca.shared.global [$0], [$1], 4, $2;"
        if size % ptx.THREADS:
          text = "{ .reg .pred p; setp.lt.s32 p, $3, %d; @p %s }" % (size, text)
          ptx.effect(text, "r,l,r,r", *operands, index)
        else:
          ptx.effect(text, "r,l,r", *operands)
  do(list(sources), list(destinations), first, tokens)
  commit()
  wait(0)


def gather_tile(rows, spans, matrices, tiles, vectors, lanes, span_rows, *, group, transforms, left, copied,
                interpret):
  """Starts the copies of one tile: row i of each tile becomes row rows[i // G] * G + i % G of its matrix.

  Args:
    rows, spans: int32[TILE_ROWS // G] in shared memory. Rows that no token fills, where G does not divide TILE_ROWS,
      become rows of the last token and get an empty span.
    matrices: [R, H] in global memory.
    tiles: [TILE_ROWS, H] in shared memory, with `transforms`.
    vectors: float32[R] in global memory, at most two.
    lanes: float32[TILE_ROWS] in shared memory, one per vector.
    span_rows: int32[TILE_ROWS] in shared memory, gets the span of each row.
    group: G.
    transforms: tiling and swizzle of the tiles.
    left, copied, interpret: with `interpret` tokens from left() on get an empty span, and `copied` is the barrier of
      the copies, which are awaited.
  """
  if interpret:
    return _gather_by_copies(rows, spans, [*matrices, *vectors], [*tiles, *lanes], span_rows, group, left(), copied)
  row_bytes = matrices[0].shape[1] * jnp.dtype(matrices[0].dtype).itemsize
  swizzle = transforms[1].swizzle
  per_row = row_bytes // 16           # 16-byte pieces of a row
  per_tile = swizzle // 16            # those in a row of a swizzled tile
  whole_rows = ptx.THREADS % per_row == 0  # all threads copy whole rows at a time
  tokens = TILE_ROWS // group
  reference = plgpu.RefType()
  tile_type = plgpu.RefType(tuple(transforms))
  assert len(vectors) <= ptx.THREADS // TILE_ROWS

  def token_of(row):
    token = ptx.div(row, group)
    return token if TILE_ROWS % group == 0 else ptx.choose(ptx.less(token, tokens), token, tokens - 1)

  def source_row(rows, row):
    member = arith.extui(ptx.i64(), ptx.rem(row, group))
    return ptx.add(ptx.mul(ptx.wide(ptx.load(rows, token_of(row))), group), member)

  @plgpu.inline_mgpu(arg_types=(
      reference, reference, [reference] * len(matrices), [tile_type] * len(tiles), [reference] * len(vectors),
      [reference] * len(lanes), reference))
  def do(ctx, rows, spans, matrices, tiles, vectors, lanes, span_rows):
    del ctx
    ptx.warpgroup_barrier()  # whoever still reads the old tile has to be done
    thread = ptx.thread()
    sources = [ptx.global_address(matrix) for matrix in matrices]
    places = [ptx.shared_address(tile) for tile in tiles]
    for i in range(TILE_ROWS * per_row // ptx.THREADS):
      if i == 0 or not whole_rows:
        nth = ptx.add(thread, i * ptx.THREADS)
        piece, row = ptx.rem(nth, per_row), ptx.div(nth, per_row)
        tile_column, in_tile = ptx.div(piece, per_tile), ptx.rem(piece, per_tile)
        within = arith.extui(ptx.i64(), ptx.mul(piece, 16))
        begins = [ptx.add(source, within) for source in sources]
      else:
        row = ptx.add(row, ptx.THREADS // per_row)
      element = source_row(rows, row)
      in_eight = ptx.rem(row, 8)
      # The hardware's swizzle: the number of the 128-byte line, within eight rows, flips bits of the piece.
      line = in_eight if swizzle == 128 else ptx.div(in_eight, 128 // swizzle)
      tile = ptx.add(ptx.mul(ptx.div(row, 8), row_bytes // swizzle), tile_column)
      offset = ptx.add(ptx.mul(tile, 8 * swizzle), ptx.mul(in_eight, swizzle),
                       ptx.mul(arith.xori(in_tile, line), 16))
      for source, place in zip(begins, places):
        ptx.effect("cp.async.cg.shared.global [$0], [$1], 16;", "r,l", ptx.add(place, offset),
                   ptx.byte(source, element, row_bytes))
    # 64 threads per vector; all spread the spans, each twice the same.
    half, row = ptx.div(thread, TILE_ROWS), ptx.rem(thread, TILE_ROWS)
    if vectors:
      element = source_row(rows, row)
      for i, (vector, lane) in enumerate(zip(vectors, lanes)):
        ptx.effect("{ .reg .pred p; setp.eq.s32 p, $2, %d; @p cp.async.ca.shared.global [$0], [$1], 4; }" % i,
                   "r,l,r", ptx.add(ptx.shared_address(lane), ptx.mul(row, 4)),
                   ptx.byte(ptx.global_address(vector), element, 4), half)
    span = ptx.load(spans, token_of(row))
    if TILE_ROWS % group:
      span = ptx.choose(ptx.less(row, tokens * group), span, 0)
    ptx.store(span, span_rows, row)
  do(rows, spans, list(matrices), list(tiles), list(vectors), list(lanes), span_rows)


# --- the same in operations that the interpreter knows ----------------------------


def _copy(sources, places, copied):
  for source, place in zip(sources, places):
    plgpu.copy_gmem_to_smem(source, place, copied)
    plgpu.barrier_wait(copied)


def _gather_by_copies(rows, spans, matrices, tiles, span_rows, group, left, copied):
  for i in range(-(-TILE_ROWS // group)):
    size = min(group, TILE_ROWS - i * group)
    token = min(i, TILE_ROWS // group - 1)
    source, place = pl.ds(rows[token] * group, size), pl.ds(i * group, size)
    _copy([matrix.at[source] for matrix in matrices], [tile.at[place] for tile in tiles], copied)
    span_rows[place] = jnp.full((size,), jnp.where((i < left) & (size == group), spans[token], 0), jnp.int32)
