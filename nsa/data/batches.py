"""Batches: pure functions of (seed, step).

`Data` keeps documents and index arrays in memory, never a position: asking for
a step again, out of order, in another process or for some of its rows gives
the same bits. A run therefore resumes from its step number alone, on any number
of hosts.
"""
from __future__ import annotations

import functools
import hashlib
import itertools
from typing import TYPE_CHECKING

import numpy as np

from nsa.data import counter, mixture, planting, sources, text, tokenizer

if TYPE_CHECKING:  # data needs the fields, not the module: loading it pulls in JAX
  from nsa.config import DataConfig

# inputs, targets, segment_ids int32[B, T], weights float32[B, T], index int64[B]. See `Data.batch_at`.
Batch = dict[str, np.ndarray]


def make(config: DataConfig, seed: int) -> Data:
  """The training data of a run.

  Args:
    config: which text, tasks, context and batch; of a config that `nsa.config.validate` takes.
    seed: chooses cuts, order and tasks.

  Raises:
    ValueError, FileNotFoundError, ModuleNotFoundError: of texts that are not
      there, or tasks that do not fit, naming the field of `data`, its value
      and the fix.
  """
  return Data(config, seed)


class Data:
  """Training batches by step. Build it with `make`.

  Row `row` of step `step` has the number step * batch + row at its context.

  Tasks: with data.task_rows = R of every data.global_batch rows, at the same
  places of all batches; the text goes on behind them without a gap. With
  data.task_share = s each row is one with probability s and takes the place of
  the text row with its number, so an epoch shows each text row with probability
  1 - s, under other cuts in every epoch.

  Text: of data.source, or of data.corpora in a fixed pattern (see mixture.py).
  """

  def __init__(self, config: DataConfig, seed: int):
    from nsa import tasks  # here: tasks use this package's tokenizer and counter

    self.config, self.seed = config, int(seed)
    self.tokenizer = tokenizer.get(config.tokenizer)
    self.align = config.align
    self.tasks = [tasks.get(name) for name in config.tasks]
    self._render = tasks.rendering.example
    loaded = {name: sources.load(source, "train", data_dir=config.data_dir, tokens=config.tokenizer)
              for name, source in config.texts.items()}
    self.planting = None
    if config.planted:
      parts = {name: planting.set_aside(documents) for name, documents in loaded.items()}
      loaded = {name: kept for name, (kept, _) in parts.items()}
      aside = {name: documents for name, (_, documents) in parts.items()}
      self.planting = planting.Planting(aside, config.planted, self.align, self.seed)
    self.documents = [document for documents in loaded.values() for document in documents]  # of all corpora
    self.texts = [text.Text(config.texts[name], documents, self.tokenizer, self.align, self.seed)
                  for name, documents in loaded.items()]
    self.mixture = mixture.Mixture({name: config.weights.get(name, 1.0) for name in loaded})
    self.haystack = self.documents  # of tasks: in bytes
    if config.has_tasks and config.tokenizer != "bytes":
      names = {name: {d.name for d in documents} for name, documents in loaded.items()}
      self.haystack = [document for name, source in config.texts.items()
                       for document in sources.load(source, "train", data_dir=config.data_dir)
                       if document.name in names[name]]
    self.check_context(config.context)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the training documents; of several corpora, of their fingerprints in order."""
    prints = [sources.fingerprint(one.documents) for one in self.texts]
    return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()

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
        one, row = self._text_of(number)
        one.row(row, inputs[i], targets[i], weights[i], segment_ids[i])
        if self.planting:
          self.planting.plant(number - int(self._tasks_before(number)), inputs[i], targets[i], weights[i],
                              segment_ids[i])
      else:
        self._task_row(number, kind, inputs[i], targets[i], weights[i], segment_ids[i])
    return dict(inputs=inputs, targets=targets, weights=weights, segment_ids=segment_ids, index=numbers)

  def check_context(self, context: int) -> None:
    """Raises the ValueError that `batch_at` would raise at this context: call it before training begins."""
    batch = self._shape(context, None)[1]
    config = self.config
    short = context < planting.SIZE and planting.SIZE % context
    if self.planting and (short or config.planted * context > planting.SIZE):
      raise ValueError(f"data.planted = {config.planted}: passages have {planting.SIZE} tokens, at most one in a row; "
                       f"data.context = {context} is neither longer nor a part of that, or holds more")
    if config.task_rows and config.task_rows * batch % config.global_batch:
      raise ValueError(f"schedule.stages[*].context = {context}: data.task_rows = {config.task_rows} of "
                       f"{config.global_batch} rows are no whole number of a batch of {batch}; take another context or "
                       "another number of rows")
    if config.has_tasks and config.tokenizer == "bytes":
      for task in self.tasks:
        task.check_length(self._task_lengths(context, task)[-1] + 1)
    elif config.has_tasks:  # how many tokens a text has is known when it is written
      for task, length in itertools.product(self.tasks, self._task_lengths(context)):
        self._render(task, config.tokenizer, self.seed, 0, length + 1, "train", self.haystack)

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
    config = self.config
    if not config.has_tasks:
      return np.full(len(numbers), -1)
    key = counter.key("kind", self.seed, context)
    if config.task_rows:
      is_task = self._tasks_before(numbers + 1) > self._tasks_before(numbers)
    else:
      is_task = counter.uniform(key, 2 * numbers) < config.task_share
    return np.where(is_task, counter.integers(key, 2 * numbers + 1, len(self.tasks)), -1)

  def _tasks_before(self, number):
    """Rows of tasks among 0 .. number - 1, where their number in a batch is fixed."""
    return number * self.config.task_rows // self.config.global_batch

  def _text_of(self, number) -> tuple[text.Text, int]:
    """The corpus of a row of text, and the row's number in it."""
    corpus, row = self.mixture.locate(number - self._tasks_before(number))
    return self.texts[corpus], row

  # --- task rows ---

  def _task_lengths(self, context, task=None):
    """The lengths that the task fits into; all of them, for the error to name, where it fits into none."""
    lengths = [length for length in self.config.task_lengths if length <= context] or [context]
    if task is None or self.config.tokenizer != "bytes":
      return lengths
    return [length for length in lengths if length + 1 >= task.min_length] or lengths

  def _task_length(self, number, context, task):
    """Tokens of the examples in a task's row."""
    lengths = self._task_lengths(context, task)
    return lengths[counter.integers(counter.key("length", self.seed, context), [number], len(lengths))[0]]

  def _begins(self, length, context):
    """Where the examples of a task's row begin."""
    return range(0, context - length + 1, -(-length // self.align) * self.align)

  def _task_row(self, number, kind, inputs, targets, weights, segment_ids):
    """As many examples of one length as fit, a segment each; like pieces of text they begin at multiples of `align`."""
    context, config, task = len(inputs), self.config, self.tasks[kind]
    length = self._task_length(number, context, task)
    for j, begin in enumerate(self._begins(length, context)):
      at = slice(begin, begin + length)
      # Numbers are the row's own where examples fill it, so that lists of lengths leave those of one length as they
      # are.
      example = self._render(task, config.tokenizer, self.seed, number + (j << 40), length + 1, "train", self.haystack)
      inputs[at], targets[at] = example.tokens[:-1], example.tokens[1:]
      weights[at] = np.where(example.answer_mask[1:], config.answer_weight, config.filler_weight)
      segment_ids[at] = 1 + j
    if config.task_loss:  # so much of a batch whose other rows are full of text
      text_rows = config.global_batch - config.task_rows
      weights *= config.task_loss / (1 - config.task_loss) * text_rows * context / config.task_rows / weights.sum()

  # --- words ---

  def describe(self, batch: Batch) -> str:
    """One line per row of a batch (or of some of its rows): what it holds, for error messages."""
    context = batch["inputs"].shape[1]
    numbers = np.asarray(batch["index"], np.int64)
    return "\n".join(self._describe_row(number, kind, context)
                     for number, kind in zip(numbers.tolist(), self._kinds(numbers, context).tolist()))

  def _describe_row(self, number, kind, context):
    if kind >= 0:
      length = self._task_length(number, context, self.tasks[kind])
      many = f", {len(self._begins(length, context))} of {length} tokens" if length < context else ""
      return f"row {number}: task {self.config.tasks[kind]}, example {number} of seed {self.seed}{many}"
    one, row = self._text_of(number)
    words = f"row {number}: {one.describe(row, context)}"
    held = self.planting and self.planting.of_row(number - int(self._tasks_before(number)), context)
    if held:
      end = held[2] + min(planting.SIZE, context)
      words += f"; over it, from token {held[3]} on, {held[1].name} tokens {held[2]}..{end}"
    return words

  def planted(self, step: int) -> list[planting.Passage]:
    """Passages planted before `step`, at data.context, and how often each was; see planting.py."""
    rows = step * self.config.global_batch
    return self.planting.passages(rows - int(self._tasks_before(rows)), self.config.context) if self.planting else []
