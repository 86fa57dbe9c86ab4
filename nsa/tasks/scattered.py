"""Statements and questions anywhere in a text: every question behind the statements that its answer has to be read
from."""
from __future__ import annotations

import dataclasses

import numpy as np

from nsa.data import counter
from nsa.data.sources import Document
from nsa.tasks import frame


@dataclasses.dataclass(frozen=True)
class Entry:
  """A statement, or a question with its answer.

  owner: entries of one owner keep their order; those of different owners come in any.
  text: what stands in the text, without the answer's end.
  span: (first, end) of what is to be read from a statement, or of the answer of a question, in `text`.
  reads: of a question, the numbers of the entries that it needs; () = a statement.
  """
  owner: int
  text: bytes
  span: tuple[int, int] = (0, 0)
  reads: tuple[int, ...] = ()


def fill(template: bytes, **values: str) -> tuple[bytes, tuple[int, int]]:
  """A template with its {names} replaced, and where its {value} lies: (first, end)."""
  before, _, after = template.decode().partition("{value}")
  before, after, value = before.format(**values), after.format(**values), values["value"]
  first = len(before.encode())
  return (before + value + after).encode(), (first, first + len(value.encode()))


def interleave(draws: counter.Draws, owner: np.ndarray, slots: int) -> np.ndarray:
  """A slot of 0 .. slots - 1 for every entry, all different and drawn evenly, rising for the entries of each owner."""
  slot = draws.permutation(slots)[:len(owner)]
  taken = np.lexsort((slot, owner))                     # the slots of each owner in order of place
  turn = np.lexsort((np.arange(len(owner)), owner))     # its entries in their order
  placed = np.empty(len(owner), np.int64)
  placed[turn] = slot[taken]
  return placed


def lay_out(draws: counter.Draws, entries: list[Entry], length: int, haystack: list[Document] | None,
            order=None) -> frame.Example:
  """BOS, a text of `length` - 2 bytes with the entries at random places of it, EOS.

  order: the entries' numbers as they come; None = drawn, with each owner's in order.
  """
  if order is None:
    order = np.argsort(interleave(draws, np.array([e.owner for e in entries]), len(entries))).tolist()
  free = length - 2 - sum(len(e.text) for e in entries)
  text = frame.filler(draws, free, haystack)
  cuts = [frame.word_start(text, int(cut)) for cut in np.sort(draws.integers(free + 1, len(entries)))]
  parts, at, size, starts = [], 0, 0, np.zeros(len(entries), np.int64)
  for number, cut in zip(order, cuts):
    # Behind the space that a word begins after, so that what follows the entry keeps a space of its own.
    parts += [text[at:cut], entries[number].text]
    starts[number] = size + cut - at
    size, at = size + cut - at + len(entries[number].text), cut
  body = b"".join(parts) + text[at:]
  spans = lambda i, *ends: tuple(int(starts[i]) + end for end in ends)
  return frame.assemble(body, [(*spans(i, 0, *e.span), [spans(j, *entries[j].span) for j in e.reads])
                               for i, e in enumerate(entries) if e.reads])


KNOWN, HELD_OUT = "known", "held_out"


class Templated(frame.Task):
  """A task that is said in one of several ways; its parameter `template` chooses those of training, or the last."""
  template: str

  def check_template(self) -> None:
    frame.check(self.template in (KNOWN, HELD_OUT), self, "template",
                f"{KNOWN} or {HELD_OUT} (evaluated, never trained)")

  @property
  def trainable(self):
    return self.template != HELD_OUT

  def pick(self, draws: counter.Draws, templates: tuple):
    return templates[-1] if self.template == HELD_OUT else templates[draws.integer(len(templates) - 1)]
