"""Documents cut into pieces and packed into rows of `context` tokens.

Coordinates: a document of n tokens is read as BOS, its n tokens, EOS, so that
position 0 is BOS and position n + 1 is EOS. A *piece* (document, start, length)
has inputs [start, start + length) and targets [start + 1, start + length + 1).
Over one epoch the pieces cover every document exactly: each token but EOS is
an input once, each token but BOS is a target once, and no target lies in
another document than its input.

Full pieces (`context` tokens) are rows by themselves. What is left of a
document at its two ends is packed, several pieces to a row, each starting at a
multiple of `align`, so that attention over blocks of `align` tokens never mixes
two documents in a block. Only these index arrays are kept, never the rows.
"""
from __future__ import annotations

import dataclasses

import numpy as np

from nsa.data import counter


@dataclasses.dataclass(frozen=True)
class EpochIndex:
  """The pieces of one epoch, row after row in reading order.

  Row r has the pieces [first[r], first[r + 1]) of P; `offset` is the piece's
  place in the row. All int64: first[R + 1], the rest [P].
  """
  first: np.ndarray
  document: np.ndarray
  start: np.ndarray
  length: np.ndarray
  offset: np.ndarray

  @property
  def num_rows(self) -> int:
    return len(self.first) - 1


def epoch_index(lengths: np.ndarray, context: int, align: int, seed: int, epoch: int) -> EpochIndex:
  """The rows of one epoch: a pure function of its arguments.

  Args:
    lengths: int64[documents], tokens of each document, without BOS and EOS.
    context: tokens per row.
    align: packed pieces start at multiples of this many tokens.
    seed, epoch: choose the phase at which each document is cut and the order of
      the rows.
  """
  full, short, num_packed, row, offset = _layout(lengths, context, align, seed, epoch)
  rows = np.concatenate([np.arange(len(full[0])), len(full[0]) + row])
  offset = np.concatenate([np.zeros(len(full[0]), np.int64), offset])
  document, start, length = (np.concatenate([a, b]) for a, b in zip(full, short))
  num_rows = len(full[0]) + num_packed
  place = counter.permutation(counter.key("rows", seed, epoch, context), num_rows)[rows]
  order = np.lexsort((offset, place))
  first = np.searchsorted(place[order], np.arange(num_rows + 1))
  return EpochIndex(first, document[order], start[order], length[order], offset[order])


def count_rows(lengths: np.ndarray, context: int, align: int, seed: int, epoch: int) -> int:
  """`epoch_index(...).num_rows` without the permutation; it differs a little from epoch to epoch."""
  full, _, num_packed, _, _ = _layout(lengths, context, align, seed, epoch)
  return len(full[0]) + num_packed


def _layout(lengths, context, align, seed, epoch):
  """Full pieces, short pieces, number of packed rows, and row and offset of each short piece."""
  inputs = np.asarray(lengths, np.int64) + 1  # BOS and every token; EOS is only a target
  ids = np.arange(len(inputs))
  # Document d gets the d-th number of this epoch: a phase of its own for (seed, epoch, document).
  phase = 1 + counter.integers(counter.key("phase", seed, epoch, context), ids, context)
  head = np.minimum(phase, inputs)
  count, tail = np.divmod(inputs - head, context)
  # Full pieces of a document: `count` behind the head.
  which = np.repeat(ids, count)
  nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
  whole, cut = head == context, head < context
  full = (np.concatenate([ids[whole], which]),
          np.concatenate([np.zeros(whole.sum(), np.int64), head[which] + nth * context]))
  full += (np.full(len(full[0]), context, np.int64),)
  short = (np.concatenate([ids[cut], ids[tail > 0]]),
           np.concatenate([np.zeros(cut.sum(), np.int64), (inputs - tail)[tail > 0]]),
           np.concatenate([head[cut], tail[tail > 0]]))
  row, offset, num_packed = _pack(short[2], context, align)
  return full, short, num_packed, row, offset


def _pack(lengths, context, align):
  """Best fit, longest piece first. Returns row and offset of each piece, and the number of rows.

  Open rows are kept by the block at which they are filled; one bit per block
  says whether there are any, so that finding the fullest row that still takes
  a piece costs one look at an integer.
  """
  rows = np.zeros(len(lengths), np.int64)
  offsets = np.zeros(len(lengths), np.int64)
  open_rows: dict[int, list[int]] = {}
  occupied, num_rows = 0, 0
  order = np.argsort(-lengths, kind="stable")
  for piece, length in zip(order.tolist(), lengths[order].tolist()):
    last = (context - length) // align  # the last block at which the piece may start
    block = (occupied & ((1 << (last + 1)) - 1)).bit_length() - 1
    if block >= 0:
      row = open_rows[block].pop()
      if not open_rows[block]:
        occupied ^= 1 << block
    else:
      block, row, num_rows = 0, num_rows, num_rows + 1
    rows[piece], offsets[piece] = row, block * align
    block += -(-length // align)
    if block * align < context:
      open_rows.setdefault(block, []).append(row)
      occupied |= 1 << block
  return rows, offsets, num_rows
