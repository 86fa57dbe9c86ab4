"""Batches and evaluation windows: pure functions of (seed, step).

`Data` keeps documents and index arrays in memory, never a position: asking for
a step again, out of order, in another process or for some of its rows gives
the same bits. A run therefore resumes from its step number alone, on any number
of hosts.
"""
from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from nsa.data import counter, packing, sources, tokenizer

if TYPE_CHECKING:  # data needs the fields, not the module: loading it pulls in JAX
  from nsa.config import DataConfig

# inputs, targets, segment_ids int32[B, T], weights float32[B, T], index int64[B]. See `Data.batch_at`.
Batch = dict[str, np.ndarray]


def make(config: DataConfig, seed: int) -> Data:
  """The training data of a run.

  Args:
    config: which text, tasks, context and batch.
    seed: chooses cuts, order and tasks.

  Raises:
    ValueError, FileNotFoundError, ModuleNotFoundError: naming the field of
      `data` that is wrong, its value and the fix.
  """
  return Data(config, seed)


class Data:
  """Training batches by step. Build it with `make`.

  Text and tasks: row `row` of step `step` has the number step * batch + row at
  its context. A task row takes the place of the text row with that number, so
  with data.task_share = s an epoch shows each text row with probability 1 - s,
  under other cuts in every epoch.
  """

  def __init__(self, config: DataConfig, seed: int):
    from nsa import tasks  # here: tasks use this package's tokenizer and counter

    self.config, self.seed = config, int(seed)
    self.tokenizer = tokenizer.get(config.tokenizer)
    self.align = config.align
    if self.align < 1:
      raise ValueError(f"data.align = {config.align}: tokens, at least 1")
    if not 0 <= config.task_share <= 1:
      raise ValueError(f"data.task_share = {config.task_share}: a share between 0 and 1")
    self.tasks = [tasks.get(name) for name in config.tasks]
    if config.task_share > 0 and not self.tasks:
      raise ValueError(f"data.task_share = {config.task_share}: data.tasks is empty; "
                       "name a task or set the share to 0")
    self.documents = sources.load(config.source, "train", data_dir=config.data_dir, tokens=config.tokenizer)
    if config.task_share < 1 and not self.documents:
      raise ValueError(f"data.source = {config.source!r}: no text, so data.task_share must be 1 "
                       f"(it is {config.task_share})")
    self._lengths = np.array([len(d.tokens) for d in self.documents], np.int64)
    self._edges: dict[int, tuple[int, ...]] = {}  # context -> number of the first row of each epoch so far
    self._index = functools.lru_cache(maxsize=4)(self._epoch_index)
    self.check_context(config.context)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the training documents."""
    return sources.fingerprint(self.documents)

  # --- batches ---

  def batch_at(self, step: int, *, context: int | None = None, batch: int | None = None,
               rows: slice | None = None) -> Batch:
    """The batch of one step.

    Args:
      step: 0 or more.
      context: T, tokens per row; None = data.context.
      batch: B, rows; None = as many as keep tokens per step at
        data.context * data.global_batch.
      rows: only these rows of the batch, with the content they have in the whole.

    Returns:
      inputs int32[B, T], targets int32[B, T] (targets[p] follows inputs[p]),
      weights float32[B, T] (0 at padding), segment_ids int32[B, T] (1, 2, ...
      per packed piece, 0 at padding), index int64[B] (the number of the row;
      `describe` turns it into words).

    Raises:
      ValueError: a negative step, or a context that does not divide the tokens.
    """
    context, batch = self._shape(context, batch)
    if step < 0:
      raise ValueError(f"step = {step}: steps count from 0")
    numbers = np.arange(batch, dtype=np.int64)[rows if rows is not None else slice(None)] + step * batch
    b, t = len(numbers), context
    inputs = np.full((b, t), self.tokenizer.pad, np.int32)
    targets = np.full((b, t), self.tokenizer.pad, np.int32)
    weights, segment_ids = np.zeros((b, t), np.float32), np.zeros((b, t), np.int32)
    kinds = self._kinds(numbers, context)
    for i, (number, kind) in enumerate(zip(numbers.tolist(), kinds.tolist())):
      if kind < 0:
        self._text_row(number, context, inputs[i], targets[i], weights[i], segment_ids[i])
      else:
        self._task_row(number, kind, inputs[i], targets[i], weights[i], segment_ids[i])
    return dict(inputs=inputs, targets=targets, weights=weights, segment_ids=segment_ids, index=numbers)

  def check_context(self, context: int) -> None:
    """Raises the ValueError that `batch_at` would raise at this context: call it before training begins."""
    self._shape(context, None)
    if self.config.task_share > 0:
      for task in self.tasks:
        for length in self._task_lengths(context):
          task.check_length(length + 1)

  def _shape(self, context, batch):
    config = self.config
    context = context or config.context
    if batch is None:
      batch, rest = divmod(config.global_batch * config.context, context)
      if rest or not batch:
        raise ValueError(f"schedule.stages[*].context = {context}: must divide data.context * "
                         f"data.global_batch = {config.context * config.global_batch} tokens per step")
    return context, batch

  def _kinds(self, numbers, context):
    """int64[B]: -1 for a text row, otherwise which task."""
    if not self.config.task_share:
      return np.full(len(numbers), -1)
    key = counter.key("kind", self.seed, context)
    is_task = counter.uniform(key, 2 * numbers) < self.config.task_share
    return np.where(is_task, counter.integers(key, 2 * numbers + 1, len(self.tasks)), -1)

  # --- task rows ---

  def _task_lengths(self, context):
    return [length for length in self.config.task_lengths if length <= context] or [context]

  def _task_length(self, number, context):
    """Tokens of the examples in a task's row."""
    lengths = self._task_lengths(context)
    return lengths[counter.integers(counter.key("length", self.seed, context), [number], len(lengths))[0]]

  def _task_row(self, number, kind, inputs, targets, weights, segment_ids):
    """As many examples of one length as fit, a segment each."""
    context = len(inputs)
    length = self._task_length(number, context)
    for j in range(context // length):
      at = slice(j * length, (j + 1) * length)
      # Numbers are the row's own where examples fill it, so that lists of lengths leave those of one length as they are.
      example = self.tasks[kind].example(self.seed, number + (j << 40), length + 1, "train", self.documents)
      inputs[at], targets[at] = example.tokens[:-1], example.tokens[1:]
      weights[at] = np.where(example.answer_mask[1:], self.config.answer_weight, self.config.filler_weight)
      segment_ids[at] = 1 + j

  # --- text rows ---

  def _epoch_index(self, context, epoch):
    return packing.epoch_index(self._lengths, context, self.align, self.seed, epoch)

  def _locate(self, number, context):
    """Row number -> (epoch, row of the epoch). Epochs have slightly different numbers of rows."""
    edges = self._edges.get(context, (0,))
    while edges[-1] <= number:
      rows = packing.count_rows(self._lengths, context, self.align, self.seed, len(edges) - 1)
      edges += (edges[-1] + rows,)
      self._edges[context] = edges  # a whole tuple at once: safe when threads read ahead
    epoch = bisect.bisect_right(edges, number) - 1
    return epoch, number - edges[epoch]

  def _text_row(self, number, context, inputs, targets, weights, segment_ids):
    epoch, row = self._locate(number, context)
    index = self._index(context, epoch)
    pieces = range(index.first[row], index.first[row + 1])
    for segment, piece in enumerate(pieces, start=1):
      begin, length = index.offset[piece], index.length[piece]
      at = slice(begin, begin + length)
      _read(self.tokenizer, self.documents[index.document[piece]].tokens, index.start[piece], inputs[at], targets[at])
      weights[at] = 1
      segment_ids[at] = segment

  # --- words ---

  def describe(self, batch: Batch) -> str:
    """One line per row of a batch (or of some of its rows): what it holds, for error messages."""
    context = batch["inputs"].shape[1]
    numbers = np.asarray(batch["index"], np.int64)
    return "\n".join(self._describe_row(number, kind, context)
                     for number, kind in zip(numbers.tolist(), self._kinds(numbers, context).tolist()))

  def _describe_row(self, number, kind, context):
    if kind >= 0:
      length = self._task_length(number, context)
      many = f", {context // length} of {length} tokens" if length < context else ""
      return f"row {number}: task {self.config.tasks[kind]}, example {number} of seed {self.seed}{many}"
    epoch, row = self._locate(number, context)
    index = self._index(context, epoch)
    pieces = []
    for piece in range(index.first[row], index.first[row + 1]):
      start = index.start[piece]
      name = self.documents[index.document[piece]].name
      pieces.append(f"{name} tokens {start}..{start + index.length[piece]}")
    return f"row {number}: epoch {epoch}, {self.config.source}: {'; '.join(pieces)}"

  def epoch_at(self, step: int, *, context: int | None = None, batch: int | None = None) -> float:
    """How many times the text was read before `step`: epochs and a fraction, task rows counted as read."""
    context, batch = self._shape(context, batch)
    if not self.documents:
      return 0.0
    epoch, row = self._locate(step * batch, context)
    edges = self._edges[context]
    return epoch + row / (edges[epoch + 1] - edges[epoch])


def _read(kind, tokens, start, inputs, targets):
  """Copies [start, start + n) of BOS, tokens, EOS to the n inputs, and what follows each to the targets."""
  n = len(inputs)
  if start:
    inputs[:] = tokens[start - 1:start - 1 + n]
  else:
    inputs[0] = kind.bos
    inputs[1:] = tokens[:n - 1]
  if start + n <= len(tokens):
    targets[:] = tokens[start:start + n]
  else:
    targets[:-1] = tokens[start:]
    targets[-1] = kind.eos


# --- evaluation ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvalWindow:
  """`context` consecutive tokens of one document; `start` counts from its BOS (0)."""
  document: str
  start: int
  inputs: np.ndarray       # int32[T]
  targets: np.ndarray      # int32[T]
  weights: np.ndarray      # float32[T], all 1
  segment_ids: np.ndarray  # int32[T], all 1


def eval_windows(config: DataConfig, split: str, count: int, context: int) -> list[EvalWindow]:
  """`count` windows spread evenly over the documents of a split and over each document; nothing is random.

  Windows overlap only when the documents together hold fewer than `count`
  separate ones. Documents shorter than context + 1 tokens (BOS and EOS
  included) are skipped.

  Raises:
    ValueError: no document is long enough, or the source has no text.
  """
  documents = sources.load(config.source, split, data_dir=config.data_dir, tokens=config.tokenizer)
  kind = tokenizer.get(config.tokenizer)
  if not documents:
    raise ValueError(f"data.source = {config.source!r}: no text to evaluate on; set eval.sequences = 0 "
                     "or take a source with text")
  lengths = np.array([len(d.tokens) + 2 for d in documents])
  long = np.flatnonzero(lengths > context)
  if not len(long):
    at = int(lengths.argmax())
    raise ValueError(f"data.context = {context}: no document of {config.source!r} ({split}) has "
                     f"{context + 1} tokens; the longest, {documents[at].name}, has {lengths[at]}; take a "
                     "smaller context or a source with longer documents")
  windows = []
  for d, share in zip(long.tolist(), _shares((lengths[long] - 1) // context, count).tolist()):
    slack = int(lengths[d]) - 1 - share * context  # tokens that no window needs; below 0 they must overlap
    for j in range(share):
      if slack >= 0:
        start = j * context + slack * (2 * j + 1) // (2 * share)
      else:
        start = j * (int(lengths[d]) - 1 - context) // max(share - 1, 1)
      inputs, targets = np.empty(context, np.int32), np.empty(context, np.int32)
      _read(kind, documents[d].tokens, start, inputs, targets)
      windows.append(EvalWindow(documents[d].name, start, inputs, targets, np.ones(context, np.float32),
                                np.ones(context, np.int32)))
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
