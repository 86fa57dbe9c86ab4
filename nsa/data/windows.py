"""Windows of held-out text: fixed places in the documents of a split, nothing random."""
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from nsa.data import sources, text, tokenizer

if TYPE_CHECKING:  # data needs the fields, not the module: loading it pulls in JAX
  from nsa.config import DataConfig


@dataclasses.dataclass(frozen=True)
class EvalWindow:
  """`context` consecutive tokens of one document; `start` counts from its BOS (0).

  prefix: bytes of the first target that are no text of the document, see `Document`.
  """
  document: str
  start: int
  inputs: np.ndarray       # int32[T]
  targets: np.ndarray      # int32[T]
  weights: np.ndarray      # float32[T], all 1
  segment_ids: np.ndarray  # int32[T], all 1
  prefix: int = 0


def eval_windows(config: DataConfig, split: str, count: int, context: int, corpus: str = "") -> list[EvalWindow]:
  """`count` windows spread evenly over the documents of a split and over each document; nothing is random.

  count: -1 = as many as fit without overlap.
  corpus: which of `config.corpora`; "" = `config.source`.

  Windows overlap only when the documents together hold fewer than `count`
  separate ones. Documents shorter than context + 1 tokens (BOS and EOS
  included) are skipped.

  Raises:
    ValueError: no document is long enough, or the source has no text.
  """
  source = config.corpora[corpus] if corpus else config.source
  documents = sources.load(source, split, data_dir=config.data_dir, tokens=config.tokenizer)
  kind = tokenizer.get(config.tokenizer)
  if not documents:
    raise ValueError(f"data.source = {source!r}: no text to evaluate on; set eval.sequences = 0 "
                     "or take a source with text")
  lengths = np.array([len(d.tokens) + 2 for d in documents])
  long = np.flatnonzero(lengths > context)
  if not len(long):
    at = int(lengths.argmax())
    raise ValueError(f"data.context = {context}: no document of {source!r} ({split}) has "
                     f"{context + 1} tokens; the longest, {documents[at].name}, has {lengths[at]}; take a "
                     "smaller context or a source with longer documents")
  fit = (lengths[long] - 1) // context
  windows, weights, segment_ids = [], np.ones(context, np.float32), np.ones(context, np.int32)
  for shared in (weights, segment_ids):
    shared.setflags(write=False)
  for d, share in zip(long.tolist(), (fit if count < 0 else _shares(fit, count)).tolist()):
    slack = int(lengths[d]) - 1 - share * context  # tokens that no window needs; below 0 they must overlap
    for j in range(share):
      if slack >= 0:
        start = j * context + slack * (2 * j + 1) // (2 * share)
      else:
        start = j * (int(lengths[d]) - 1 - context) // max(share - 1, 1)
      inputs, targets = np.empty(context, np.int32), np.empty(context, np.int32)
      text.read(kind, documents[d].tokens, start, inputs, targets)
      windows.append(EvalWindow(documents[d].name, start, inputs, targets, weights, segment_ids,
                                0 if start else documents[d].prefix))
  return windows


def _shares(capacity, count):
  """How many of `count` windows each document gets: equal shares, but no more than fit without overlap."""
  shares = np.zeros(len(capacity), np.int64)
  while count > 0:
    free = np.flatnonzero(shares < capacity)
    if not len(free):  # everything is covered: overlap, equally much everywhere
      free = np.arange(len(capacity))
    if count < len(free):  # fewer than one for each: every so-many-th document
      free = free[np.arange(count) * len(free) // count]
    shares[free] += 1
    count -= len(free)
  return shares
