"""What all tasks share: examples, parameters, disjoint strings, haystacks.

A task is a frozen dataclass whose fields are its parameters. `example` is a
pure function of its arguments. Strings that carry an answer (keys and values)
of the splits train, val and test are disjoint: a string belongs to the split
that its CRC-32 falls into, so no list has to be kept.
"""
from __future__ import annotations

import abc
import dataclasses
from typing import Callable, ClassVar
import zlib

import numpy as np

from nsa.data import counter, tokenizer
from nsa.data.sources import Document

# Sentences of the haystack without a text source, after RULER (Hsieh et al. 2024, arXiv:2404.06654).
NOISE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

# Tenths of the strings: 80 % train, 10 % val, 10 % test. `ood` is a matter of the haystack.
BUCKETS = {"train": range(0, 8), "val": range(8, 9), "test": range(9, 10), "ood": range(9, 10)}


@dataclasses.dataclass(frozen=True)
class Example:
  """One example of a task.

  tokens: int32[L].
  answer_group: int32[L], the query (0, 1, ...) that an answer token belongs to, -1 elsewhere.
  query: int32[Q], the first token of each query.
  evidence: int32[Q, E, 2], first and last token of each piece of text that the answer to a query has to be read
    from (a value, not the key beside it); -1 where a query needs fewer than E pieces.
  """
  tokens: np.ndarray
  answer_group: np.ndarray
  query: np.ndarray
  evidence: np.ndarray

  @property
  def answer_mask(self) -> np.ndarray:
    """bool[L], the positions in `tokens` that are answer tokens."""
    return self.answer_group >= 0

  @property
  def distances(self) -> np.ndarray:
    """int64[Q]: tokens from the last evidence token to the query's first (adjacent = 1)."""
    return self.query - self.evidence[:, :, 1].max(axis=1)

  @property
  def evidence_distance(self) -> int:
    """The mean of `distances`, rounded."""
    return int(round(float(self.distances.mean())))

  @property
  def depth(self) -> float:
    """Place of the evidence, 0 (begin) to 1 (just before the query); the mean over the queries."""
    return float(np.mean(self.evidence[:, :, 1].max(axis=1) / np.maximum(self.query - 1, 1)))


class Task(abc.ABC):
  """A family of examples; the dataclass fields of a subclass are its parameters."""
  family: ClassVar[str]
  sizes: ClassVar[tuple[str, ...]]  # the parameters that make an example longer
  trainable: ClassVar[bool] = True   # False: held out, evaluated and never trained on; may depend on the parameters
  in_words: ClassVar[bool] = True    # bytes of text, which any tokenizer can write; False: token ids of its own
  vocab_size = 259  # the model needs at least as many token ids (bytes and 3 special ones)

  @property
  @abc.abstractmethod
  def min_length(self) -> int:
    """Tokens that every example fits into, whatever is drawn; the context may be one shorter."""

  @abc.abstractmethod
  def example(self, seed: int, index: int, length: int, split: str = "train",
              haystack: list[Document] | None = None) -> Example:
    """Example number `index`, of exactly `length` tokens (a context of length - 1 and its last target).

    Args:
      seed, index: choose the example.
      length: L, tokens.
      split: train, val, test or ood; keys and values of train, val and test are disjoint.
      haystack: documents of that split to hide the evidence in; none = noise sentences.

    Raises:
      ValueError: `length` is too small for the parameters, or they ask for
        more different strings than there are.
    """

  def answerable(self, example: Example, answer: int, visible: np.ndarray) -> bool:
    """Whether `visible` tokens, bool[L], alone hold what answer number `answer` has to be read from: all its
    evidence."""
    pieces = example.evidence[answer]
    return all(visible[first:last + 1].all() for first, last in pieces[pieces[:, 0] >= 0])

  def begin(self, seed: int, index: int, length: int, split: str) -> counter.Draws:
    """Checks split and length and gives the random numbers of one example."""
    if split not in BUCKETS:
      raise ValueError(f"split = {split!r}: unknown; tasks know {', '.join(BUCKETS)}")
    self.check_length(length)
    return counter.Draws(self.identity, seed, index, split)

  @property
  def identity(self) -> str:
    """What the random numbers depend on besides seed, index and split: the task with all its parameters."""
    return repr(self)

  def check_length(self, length: int) -> None:
    """Raises ValueError if an example of `length` tokens (a context of one less) cannot hold the task."""
    if length < self.min_length:
      named = ", ".join(f"{name}={getattr(self, name)}" for name in self.sizes)
      raise ValueError(f"data.context = {length - 1}: task {self.family} with {named} needs at least "
                       f"{self.min_length - 1} tokens; take a larger context or a smaller "
                       f"{' or '.join(self.sizes)}")


def check(ok: bool, task: Task, parameter: str, fix: str) -> None:
  """Raises ValueError about a task's parameter unless `ok`."""
  if not ok:
    raise ValueError(f"task {task.family}: {parameter} = {getattr(task, parameter)!r}: {fix}")


def in_bucket(text: str, split: str) -> bool:
  """Whether a key or value string belongs to `split`."""
  return zlib.crc32(text.encode()) % 10 in BUCKETS[split]


def draw_strings(draws: counter.Draws, make: Callable[[int], str], space: int, count: int, split: str,
                 what: str) -> list[str]:
  """`count` different strings of `split` among make(0), ..., make(space - 1).

  `what` names the parameter in the ValueError when there are not that many.
  """
  found: dict[str, None] = {}
  share = len(BUCKETS[split]) / 10
  for _ in range(64):
    tries = int(1.3 * (count - len(found)) / share) + 8
    for number in draws.integers(space, tries).tolist():
      text = make(number)
      if in_bucket(text, split):
        found[text] = None
        if len(found) == count:
          return list(found)
  raise ValueError(f"{what}: {count} different strings are wanted but the split {split!r} has about "
                   f"{int(space * share)}; take fewer")


def draw_numbers(draws: counter.Draws, digits: int, count: int, split: str, what: str) -> list[str]:
  """`draw_strings` among the numbers of so many digits."""
  low = 10 ** (digits - 1)
  return draw_strings(draws, lambda n: str(low + n), 9 * low, count, split, what)


def word(number: int, length: int) -> str:
  """Letters a-z as the digits of `number`, the lowest first: 26 ** length different ones."""
  return "".join(chr(ord("a") + number // 26 ** i % 26) for i in range(length))


def filler(draws: counter.Draws, count: int, haystack: list[Document] | None) -> bytes:
  """`count` bytes of text that holds no evidence: from the documents, or noise sentences without any."""
  if not haystack:
    begin = draws.integer(len(NOISE))
    return (NOISE * (count // len(NOISE) + 2))[begin:begin + count]
  text = b""
  while len(text) < count:
    tokens = haystack[draws.integer(len(haystack))].tokens
    need = count - len(text)
    begin = draws.integer(max(len(tokens) - need, 0) + 1)
    # A document that is too short is followed by another one.
    text += tokens[begin:begin + need].astype(np.uint8).tobytes() + b"\n\n"
  return text[:count]


def word_start(text: bytes, at: int) -> int:
  """The last place at or before `at` where a word of `text` begins."""
  return max(text.rfind(b" ", 0, at), text.rfind(b"\n", 0, at)) + 1


def finish(before: bytes, query: bytes, answer: bytes, end: bytes, evidence_end: int) -> Example:
  """BOS + before + query + answer + end + EOS, with the answer's bytes marked.

  `evidence_end` is the offset in `before` just behind the answer where it stands there.
  """
  first = len(before) + len(query)
  asked = len(before), first, first + len(answer), [(evidence_end - len(answer), evidence_end)]
  return assemble(before + query + answer + end, [asked])


def assemble(body: bytes, asked: list[tuple[int, int, int, list[tuple[int, int]]]]) -> Example:
  """BOS + body + EOS. asked: (query's first byte, answer's first byte, its end, [(first, end) of each piece of
  evidence])."""
  tokens = np.empty(len(body) + 2, np.int32)
  tokens[0], tokens[1:-1], tokens[-1] = tokenizer.BOS, np.frombuffer(body, np.uint8), tokenizer.EOS
  group = np.full(len(tokens), -1, np.int32)
  evidence = np.full((len(asked), max(len(a[3]) for a in asked), 2), -1, np.int32)
  for number, (_, first, end, pieces) in enumerate(asked):
    group[1 + first:1 + end] = number
    evidence[number, :len(pieces)] = np.array(pieces) + (1, 0)  # BOS comes before; the last token, not the end
  return Example(tokens, group, np.array([1 + a[0] for a in asked], np.int32), evidence)
