"""Examples in the tokens of an imported model: the same text as for bytes, lengths and places in its tokens."""
from __future__ import annotations

import codecs
import re

import numpy as np

from nsa.data import counter, tokenizer
from nsa.data.sources import Document
from nsa.tasks import frame

TRIES = 12  # text lengths that are tried, and then the one that fits best is filled up


def example(task: frame.Task, tokens: str, seed: int, index: int, length: int, split: str = "train",
            haystack: list[Document] | None = None) -> frame.Example:
  """Example number `index` of a task, of exactly `length` tokens of the tokenizer called `tokens`.

  The text is written and tokenized as a whole. It is as long as fits, and what is left is filled up with text in front.
  A token that holds a byte of an answer belongs to the answer, one that holds a byte of the evidence to the evidence.

  haystack: documents in bytes, whatever the tokenizer.

  Raises ValueError for a task that is not written in words, or a length that it does not fit into.
  """
  if tokens == "bytes":
    return task.example(seed, index, length, split, haystack)
  if not task.in_words:
    raise ValueError(f"task {task.family}: has token ids of its own, data.tokenizer is {tokens}; take recall, "
                     "tracking, needle or another one that is written in words")
  kind = tokenizer.get(tokens)
  room = length - 2
  best, size = None, max(task.min_length, 3 * length)
  low, high = task.min_length, None  # bytes known to fit, or the least; bytes known not to
  for _ in range(TRIES):
    written = task.example(seed, index, size, split, haystack)
    body, ids = _encode(kind, written.tokens[1:-1].astype(np.uint8).tobytes())
    if len(ids) <= room:
      if best is None or len(ids) > len(best[2]):
        best = written, body, ids
      low = size
      if len(ids) > 0.97 * room:
        break
    else:
      high = size
    guess = int(size * 0.99 * room / len(ids))
    size = min(max(guess, low), high - 1 if high else guess)
    if high is not None and high - low <= 1:
      break
  if best is None:
    raise ValueError(f"data.context = {length - 1}: task {task.family} with "
                     + ", ".join(f"{name}={getattr(task, name)}" for name in task.sizes)
                     + f" has more tokens of {tokens} than that; take a larger context or a smaller "
                     + " or ".join(task.sizes))
  return _mapped(kind, *best, counter.Draws(task.identity, "front", seed, index, split), room, haystack)


def _mapped(kind, written, body, ids, draws, room, haystack):
  """The example in tokens, filled up in front."""
  ends = np.cumsum(kind.token_bytes[ids])
  surplus = int(ends[-1]) - len(body)
  missing = room - len(ids)
  front = _encode(kind, frame.filler(draws, 16 * missing + 64, haystack))[1][:missing]
  if len(front) < missing:  # of very long tokens
    front = np.resize(front, missing)
  whole = np.concatenate([[kind.bos], front, ids, [kind.eos]]).astype(np.int32)
  # The token of byte b of the text is the first one that ends behind it; bytes of the example count BOS, too.
  place = lambda byte: 1 + missing + np.searchsorted(ends, np.asarray(byte) - 1 + surplus, side="right")
  group = np.full(len(whole), -1, np.int32)
  for answer in range(len(written.query)):
    at = place(np.flatnonzero(written.answer_group == answer))
    group[at] = answer
  evidence = np.where(written.evidence < 0, -1, place(np.maximum(written.evidence, 1)))
  return frame.Example(whole, group, place(written.query).astype(np.int32), evidence.astype(np.int32))


def _encode(kind, text: bytes):
  """(text, its tokens), which stand for every byte of it, so that places in it are known.

  Documents may spell a special token ("<filename>"), which stands for no byte, or be in a form of Unicode that the
  tokenizer changes. Question marks take the place of as little as brings the bytes back; other texts stay as they are.
  """
  text = text.decode("utf-8", errors="nsa_question_marks").encode()  # for every byte that is no UTF-8: no place moves
  marks = lambda found: b"?" * len(found[0])
  special = b"|".join(re.escape(name) for name in sorted(kind.special, key=len, reverse=True))
  for pattern in (b"", special, b"[^\x00-\x7f]"):
    if pattern:
      text = re.sub(pattern, marks, text)
    ids = kind.encode(text)
    made = int(kind.token_bytes[ids].sum())
    if made - len(text) in (0, 1):  # 1: a space before the first word, which some tokenizers add
      return text, ids
  raise ValueError(f"data.tokenizer = {kind.name!r}: its tokens stand for {made} bytes of a text of {len(text)} in "
                   "ASCII that spells no special token; take a tokenizer that gives back its text")


codecs.register_error("nsa_question_marks", lambda error: ("?" * (error.end - error.start), error.end))

