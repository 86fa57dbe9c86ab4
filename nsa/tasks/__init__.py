"""Synthetic tasks of recall: pure functions of (seed, index), with disjoint strings for train and test.

    task = tasks.get("needle:keys=4")
    example = task.example(seed, index, length, "val", documents)
    batch = tasks.batch("mqar:pairs=32", seed=0, count=8, length=1024, split="test")
    batch = tasks.batch("needle@512", seed=0, count=8, length=1024, split="test")  # of 512 tokens, the rest is padding
"""
from __future__ import annotations

import dataclasses
import functools

import numpy as np

from nsa import origins
from nsa.data import tokenizer
from nsa.tasks import rendering
from nsa.tasks.common import Common
from nsa.tasks.copy import Copy
from nsa.tasks.frame import Example, Task
from nsa.tasks.mqar import MQAR
from nsa.tasks.needle import Needle
from nsa.tasks.phonebook import Phonebook
from nsa.tasks.recall import Ledger, Recall
from nsa.tasks.tracking import Tracking

__all__ = ["Example", "TASKS", "Task", "batch", "get", "length_of", "register"]

TASKS: dict[str, type[Task]] = {
    cls.family: cls for cls in (Common, Copy, Ledger, MQAR, Needle, Phonebook, Recall, Tracking)}


def register(cls: type[Task]) -> type[Task]:
  """Makes a task of a user's file known by its family's name; usable as a decorator over
  @dataclasses.dataclass(frozen=True).

  Raises ValueError that names the task and what is wrong with it: its first example of each split is made here.
  """
  def need(ok, field, fix):
    if not ok:
      raise ValueError(f"task {cls.__name__}: {field}: {fix}")

  need(issubclass(cls, Task) and "__dataclass_fields__" in vars(cls), "class", "a dataclass derived from tasks.Task")
  name = getattr(cls, "family", "")
  need(name.isidentifier(), f"family = {name!r}", "a name of its own: letters, digits and _")
  known = TASKS.get(name, cls)
  need(known.__qualname__ == cls.__qualname__, f"family = {name!r}",
       f"taken by {known.__module__}.{known.__qualname__}")
  fields = {f.name: f.default for f in dataclasses.fields(cls)}
  need(dataclasses.MISSING not in fields.values(), f"fields {', '.join(fields)}", "give each parameter a default")
  need(set(getattr(cls, "sizes", ())) <= set(fields), "sizes", f"names of parameters: {', '.join(fields)}")
  task = cls()
  for split in ("train", "val", "test"):
    example = task.example(0, 0, task.min_length, split)
    need(example.tokens.shape == example.answer_group.shape == (task.min_length,), f"example(split={split!r})",
         f"tokens and answer_group of exactly length = {task.min_length} numbers")
    need(example.answer_mask.any() and example.evidence.shape[:1] == example.query.shape, f"example(split={split!r})",
         "at least one answer token, and evidence for every query")
  TASKS[name] = cls
  get.cache_clear()
  return origins.remember(cls)


@functools.lru_cache(maxsize=None)
def get(name: str) -> Task:
  """The task of a name such as "mqar" or "needle:keys=4,depth=0.5"; "@512" behind it is left to `length_of`.

  Raises ValueError for an unknown task or parameter, a value of the wrong type
  or one out of range; the message names what is known.
  """
  family, _, text = name.partition("@")[0].partition(":")
  if family not in TASKS:
    raise ValueError(f"task {name!r}: unknown; the tasks are {', '.join(TASKS)}. One of your own is known once "
                     "config.modules (launch.evaluate: --modules) names its file")
  cls = TASKS[family]
  defaults = {f.name: f.default for f in dataclasses.fields(cls)}
  parameters = {}
  for part in filter(None, text.split(",")):
    key, equals, value = (s.strip() for s in part.partition("="))
    if key not in defaults or not equals:
      raise ValueError(f"task {name!r}: {part!r} is no parameter of {family}; write name=value with "
                       f"{', '.join(f'{k} (now {v!r})' for k, v in defaults.items())}")
    kind = type(defaults[key])
    try:
      parameters[key] = kind(value)
    except ValueError:
      raise ValueError(f"task {name!r}: {key} = {value!r} is no {kind.__name__}; for example "
                       f"{key}={defaults[key]}") from None
  return cls(**parameters)


def length_of(name: str, context: int) -> int:
  """Tokens of an evaluation's examples of a task: `context`, or what the name says, "needle@512".

  Raises ValueError for what is no length from 1 to `context`.
  """
  _, at, text = name.partition("@")
  if not at:
    return context
  if not text.isdecimal() or not 0 < int(text) <= context:
    raise ValueError(f"task {name!r}: @{text} is no length; take 1 to {context} tokens")
  return int(text)


def batch(task_name: str, seed: int, count: int, length: int, split: str, haystack=None, *,
          first: int = 0, tokens: str = "bytes") -> dict[str, np.ndarray]:
  """Examples number first .. first + count - 1 of a task, ready for a model and for scoring.

  Args:
    task_name: see `get`, `length_of`.
    seed, first, count: which examples.
    length: T, tokens of context; an example has one more, its last target. A shorter one is padded behind.
    split: train, val, test or ood.
    haystack: documents of that split, in bytes; none = noise sentences.
    tokens: the tokenizer, as in data.tokenizer.

  Returns:
    inputs, targets, segment_ids (1, and 0 at padding): int32[count, T]; weights
    float32[count, T], 1 where the target is an answer token; answer_group
    int32[count, T], the query that the target answers (an exact match needs
    all targets of a group), -1 elsewhere; evidence_distance int64[count] and
    depth float64[count], means of each example; query int32[count, Q] and
    evidence int32[count, Q, E, 2], see `Example`, -1 where an example has fewer.
  """
  task, own = get(task_name), length_of(task_name, length)
  examples = [rendering.example(task, tokens, seed, first + i, own + 1, split, haystack) for i in range(count)]
  behind = lambda x, value: np.pad(x, ((0, 0), (0, length - own)), constant_values=value)
  ids = np.stack([e.tokens for e in examples])
  group = behind(np.stack([e.answer_group for e in examples])[:, 1:], -1)
  pad = tokenizer.get(tokens).pad
  return dict(
      inputs=behind(ids[:, :-1], pad), targets=behind(ids[:, 1:], pad), weights=(group >= 0).astype(np.float32),
      segment_ids=behind(np.ones((count, own), np.int32), 0), answer_group=group,
      evidence_distance=np.array([e.evidence_distance for e in examples]),
      depth=np.array([e.depth for e in examples]),
      query=_padded([e.query for e in examples]), evidence=_padded([e.evidence for e in examples]))


def _padded(arrays):
  """int32 arrays of the same rank stacked, filled up with -1."""
  out = np.full((len(arrays), *np.max([a.shape for a in arrays], axis=0)), -1, np.int32)
  for row, a in zip(out, arrays):
    row[tuple(map(slice, a.shape))] = a
  return out
