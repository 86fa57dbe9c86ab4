"""Statements and questions anywhere in a text: every question behind the statements that its answer has to be read
from."""
from __future__ import annotations

import dataclasses

import numpy as np

from nsa.data import counter, tokenizer
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
  return assemble(body, [(int(starts[i]), int(starts[i]) + e.span[0], int(starts[i]) + e.span[1],
                          [(int(starts[j]) + entries[j].span[0], int(starts[j]) + entries[j].span[1]) for j in e.reads])
                         for i, e in enumerate(entries) if e.reads])


def assemble(body: bytes, asked: list[tuple[int, int, int, list[tuple[int, int]]]]) -> frame.Example:
  """BOS + body + EOS. asked: (query's first byte, answer's first byte, its end, [(first, end) of each piece of
  evidence])."""
  tokens = np.empty(len(body) + 2, np.int32)
  tokens[0], tokens[1:-1], tokens[-1] = tokenizer.BOS, np.frombuffer(body, np.uint8), tokenizer.EOS
  group = np.full(len(tokens), -1, np.int32)
  evidence = np.full((len(asked), max(len(a[3]) for a in asked), 2), -1, np.int32)
  for number, (_, first, end, pieces) in enumerate(asked):
    group[1 + first:1 + end] = number
    evidence[number, :len(pieces)] = np.array(pieces) + (1, 0)  # BOS comes before; the last token, not the end
  return frame.Example(tokens, group, np.array([1 + a[0] for a in asked], np.int32), evidence)


KNOWN, HELD_OUT = "known", "held_out"


def pick(draws: counter.Draws, templates: tuple, which: str):
  """One of the templates: the last is never trained on, the others are drawn evenly."""
  return templates[-1] if which == HELD_OUT else templates[draws.integer(len(templates) - 1)]


def check_template(task: frame.Task) -> None:
  """Raises ValueError unless `task.template` is one of the two words."""
  frame.check(task.template in (KNOWN, HELD_OUT), task, "template", f"{KNOWN} or {HELD_OUT} (evaluated, never trained)")
