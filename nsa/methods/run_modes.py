"""Ways to run a trained model, as evaluations name them.

"dense", "sparse" (with the method's own selector), a control (a training-free selection in the selector's place), or a
method that chooses once per prompt, put on the model's dense attention; with options as in "sparse:num_blocks=8".
"""
from __future__ import annotations

import dataclasses
import functools
import typing

from nsa.methods import blocks, registry
from nsa.methods.prompt.base import PromptMethod
from nsa.methods.training_free import TrainingFree


def names() -> tuple[str, ...]:
  """The run modes that there are now: a registered control or prompt method is one."""
  found = (name for name, cls in registry.METHODS.items() if issubclass(cls, (TrainingFree, PromptMethod)))
  return "dense", "sparse", *found


def run_mode_fields(name: str) -> dict[str, type]:
  """The options that a run mode takes, and their types: a prompt method's own, or the geometry of blocks."""
  cls = registry.METHODS.get(name)
  return dict(_fields(cls if cls is not None and issubclass(cls, PromptMethod) else blocks.BlockMethod))


@functools.cache
def _fields(cls):
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def parse_run_mode(text: str) -> tuple[str, dict[str, int | float]]:
  """"sparse:num_blocks=8" -> ("sparse", {"num_blocks": 8}). Raises ValueError naming what is wrong."""
  name, _, rest = text.partition(":")
  if name not in names():
    raise ValueError(f"one of {', '.join(names())}, not {name!r}; a control of your own is known once config.modules "
                     "(launch.evaluate: --modules) names its file")
  fields = run_mode_fields(name)
  options = {}
  for part in filter(None, rest.split(",")):
    key, _, value = part.partition("=")
    try:
      if key not in fields or value[:1] == "-":
        raise ValueError
      options[key] = fields[key](value)
    except ValueError:
      raise ValueError(f"{part!r} is no option; write name=number with {', '.join(sorted(fields))}") from None
  if name == "dense" and options:
    raise ValueError("a dense run has no geometry")
  return name, options
