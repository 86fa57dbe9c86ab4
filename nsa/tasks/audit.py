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
  task, g = tasks.get(task_name), geometry
  held = {name: [] for name in ("first", "local", "forced", "window")}
  for example in _examples(task, length * token_bytes, split):
    block = np.arange(length * token_bytes + 1) // (g.block_size * token_bytes)
    for answer in range(len(example.query)):
      own = block[int(np.argmax(example.answer_group == answer)) - 1]  # of the token that predicts it
      first, local = block < g.num_initial, (block > own - g.num_local) & (block <= own)
      window = (block == 0) | (block > own - (g.num_blocks - 1)) & (block <= own)
      for name, visible in (("first", first), ("local", local), ("forced", first | local), ("window", window)):
        held[name].append(task.answerable(example, answer, visible))
  return Row(task_name, length, geometry, **{name: float(np.mean(x)) for name, x in held.items()},
             answers=len(held["first"]))


@functools.lru_cache(maxsize=32)
def _examples(task, length, split):
  """The same for all geometries."""
  return [task.example(SEED, index, length + 1, split) for index in range(EXAMPLES)]


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
