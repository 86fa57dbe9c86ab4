"""What recall tasks could be answered from without selecting anything: counted on examples, no model asked.

An answer counts as held by a set of blocks if all that it has to be read from lies in them, as they stand for the token
that has to predict it. A task that the first blocks and a window hold says nothing about selection: in the first pilots
every binding lay in block 0, and a window with a sink scored 99.5 %.
"""
from __future__ import annotations

import dataclasses
import functools

import numpy as np

from nsa import tasks

SEED = 20_26   # of evaluation: the same examples
EXAMPLES = 64  # that are counted
TOKEN = 4      # bytes that a token of an imported tokenizer is taken for
LIMIT = 0.5    # above it an endpoint does not test selection


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Blocks of a query: J of `block_size` tokens, of which the first and the latest few are forced."""
  block_size: int
  num_blocks: int
  num_initial: int = 0
  num_local: int = 1

  def __str__(self):
    return f"{self.num_blocks} x {self.block_size}"


@dataclasses.dataclass(frozen=True)
class Row:
  """Shares of the answers of one task that need no selection, 0 to 1.

  first: in the forced first blocks; local: in the forced latest ones; forced: in both together; window: in the first
  block and a window, as many blocks as a selection has; answers: how many were counted.
  """
  task: str
  length: int        # tokens of context
  geometry: Geometry
  first: float
  local: float
  forced: float
  window: float
  answers: int


@functools.lru_cache(maxsize=256)
def row(task_name: str, length: int, geometry: Geometry, split: str = "val", token_bytes: int = 1) -> Row:
  """Counts the answers of the first `EXAMPLES` examples, in noise instead of documents.

  token_bytes: bytes that a token is taken for: a text of so many times the length stands for one in others' tokens.
  """
  task, g, size = tasks.get(task_name), geometry, geometry.block_size * token_bytes
  examples, predicting = _examples(task, length * token_bytes, split)
  own = np.concatenate(predicting)[:, None] // size  # the block of the token that predicts each answer
  block = np.arange(length * token_bytes // size + 1)
  first = np.broadcast_to(block < g.num_initial, (len(own), len(block)))
  local = (block > own - g.num_local) & (block <= own)
  window = (block == 0) | (block > own - (g.num_blocks - 1)) & (block <= own)
  read = _read_from_all_evidence if type(task).answerable is tasks.Task.answerable else _read_one_by_one
  held = {name: float(np.mean(read(task, examples, visible, size)))
          for name, visible in (("first", first), ("local", local), ("forced", first | local), ("window", window))}
  return Row(task_name, length, geometry, **held, answers=len(own))


def _read_one_by_one(task, examples, visible, size) -> list[bool]:
  """Whether each answer can be read from its visible blocks, bool[answers, blocks] of `size` tokens."""
  answers = ((example, answer) for example in examples for answer in range(len(example.query)))
  return [task.answerable(example, answer, np.repeat(blocks, size)[:len(example.tokens)])
          for (example, answer), blocks in zip(answers, visible)]


def _read_from_all_evidence(task, examples, visible, size) -> np.ndarray:
  """The same of tasks whose answers are read from all of their evidence, which is most: of all answers at once."""
  most = max(example.evidence.shape[1] for example in examples)
  pieces = np.full((sum(len(example.evidence) for example in examples), most, 2), -1)
  row = 0
  for example in examples:
    count, of_each = example.evidence.shape[:2]
    pieces[row:row + count, :of_each] = example.evidence
    row += count
  begin, end = pieces[..., 0] // size, pieces[..., 1] // size + 1
  before = np.pad(np.cumsum(visible, axis=1), ((0, 0), (1, 0)))  # visible blocks before each
  count = np.take_along_axis(before, end, 1) - np.take_along_axis(before, begin, 1)
  return ((count == end - begin) | (pieces[..., 0] < 0)).all(axis=1)


@functools.lru_cache(maxsize=32)
def _examples(task, length, split):
  """(examples, the tokens that predict the first token of each one's answers), the same for all geometries."""
  examples = [task.example(SEED, index, length + 1, split) for index in range(EXAMPLES)]
  return examples, [np.argmax(example.answer_group == np.arange(len(example.query))[:, None], axis=1) - 1
                    for example in examples]


def geometries(config) -> list[Geometry]:
  """The different numbers of blocks that a run is evaluated with, fewest first."""
  from nsa import methods  # here: it brings JAX along

  found = set()
  for mode in sum(config.eval.named.values(), ()):
    name, options = methods.parse_run_mode(mode)
    own = config.attention if isinstance(config.attention, methods.blocks.BlockMethod) else None
    if name == "dense" or own is None and not config.eval.blocks:
      continue
    base = (own or methods.blocks.BlockMethod(**config.eval.blocks)).geometry
    both = {**base, **(config.eval.blocks if own is None else {}), **options}
    found.add(Geometry(**{f.name: both[f.name] for f in dataclasses.fields(Geometry)}))
  return sorted(found, key=lambda g: (g.num_blocks * g.block_size, g.block_size, g.num_initial, g.num_local))


def of_config(config) -> list[Row]:
  """Every task of a run's evaluation, at its length, in every geometry of its run modes."""
  context, token_bytes = config.eval.context or config.data.context, 1 if config.data.tokenizer == "bytes" else TOKEN
  return [row(name, tasks.length_of(name, context), geometry, token_bytes=token_bytes)
          for name in config.eval.tasks or config.data.tasks for geometry in geometries(config)]


def of_study(study) -> list[Row]:
  """The rows of all arms, each once. `study`: a nsa.study.Study."""
  return list(dict.fromkeys(one for config in study.arms for one in of_config(config)))


def problems(study) -> list[tuple[str, object, str]]:
  """(field, value, fix) of every task that a window of equal size answers more than half of, unless
  `study.shortcuts`."""
  if study.shortcuts:
    return []
  return [("eval.tasks", one.task,
           f"{100 * one.window:.0f} % of its answers at {one.length} tokens lie in the first block or a window of "
           f"{one.geometry} tokens: it does not test selection. Scatter the evidence, take a longer context or fewer "
           "blocks, or set the study's shortcuts = True on purpose") for one in of_study(study) if one.window > LIMIT]


def text(rows: list[Row]) -> str:
  """The rows as a table: one line per task, length and geometry, % of the answers."""
  wide = max([28, *(len(one.task) for one in rows)])
  lines = ["% of answers that need no selection: their evidence lies in the forced first or latest blocks, in both, in "
           "a window",
           f"{'task':{wide}s} {'length':>7s} {'blocks':>9s} {'first':>6s} {'local':>6s} {'forced':>7s} {'window':>7s}"]
  for one in rows:
    lines.append(f"{one.task:{wide}s} {one.length:7d} {one.geometry!s:>9s} {100 * one.first:6.1f} "
                 f"{100 * one.local:6.1f} {100 * one.forced:7.1f} {100 * one.window:7.1f}"
                 + "  no test of selection" * (one.window > LIMIT))
  return "\n".join(lines)
