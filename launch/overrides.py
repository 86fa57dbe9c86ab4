"""Overrides of config fields that ml_collections leaves out: entries of dicts, and words for an index that is not
there.

    --config.eval.blocks.block_size=8      --config.schedule.stages[0].loss_weights.index_kl=2
"""
from __future__ import annotations

import ast
import re
import sys
import typing

_OVERRIDE = re.compile(r"--?config\.([^=]+)=(.*)", re.DOTALL)


def take_entries(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """(argv without overrides of a dict field or of an entry of one, these as (path, value)); sys.argv, which
  ml_collections reads again, loses them too."""
  names, taken, rest = _dict_fields(), [], []
  for argument in argv:
    found = _OVERRIDE.fullmatch(argument)
    parts = found.group(1).split(".") if found else [""]
    if parts[-1] in names or len(parts) > 1 and parts[-2] in names:
      taken.append(found.groups())
      sys.argv = [one for one in sys.argv if one != argument]
    else:
      rest.append(argument)
  return rest, taken


def apply_entries(config, taken: list[tuple[str, str]]) -> None:
  """Sets what `take_entries` has taken. Raises ValueError that names field, value and fix."""
  names = _dict_fields()
  for path, text in taken:
    parts = path.split(".")
    key = None if parts[-1] in names else parts.pop()
    kind = names[parts[-1]]
    owner = walk(config, ".".join(parts[:-1])) if parts[:-1] else config
    if not isinstance(getattr(owner, parts[-1], None), dict):
      raise ValueError(f"override: config.{path} = {text!r}: {type(owner).__name__} has no dict {parts[-1]!r}")
    if key is None:
      setattr(owner, parts[-1], {str(k): _value(f"{path}[{k!r}]", repr(v), kind) for k, v in _dict(path, text).items()})
    else:
      getattr(owner, parts[-1])[key] = _value(path, text, kind)


def walk(config, path: str):
  """The field at "schedule.stages[0].mode". Raises ValueError for an index that is not there, AttributeError for a
  field."""
  here, said = config, "config"
  for part in path.split("."):
    name, *indices = re.findall(r"[^\[\]]+", part)
    here, said = getattr(here, name), f"{said}.{name}"
    for index in indices:
      if not index.isdecimal() or int(index) >= len(here):
        raise ValueError(f"override: {said}[{index}]: there are {len(here)}, counted from 0")
      here, said = here[int(index)], f"{said}[{index}]"
  return here


def _dict_fields() -> dict[str, type]:
  """Name of every dict field of a config or study whose values are numbers or strings -> their type."""
  from nsa import config, study  # here: --help needs none of it
  classes = [c for c in (*vars(config).values(), study.Study)
             if isinstance(c, type) and hasattr(c, "__dataclass_fields__")]
  found = {}
  for cls in classes:
    for name, hint in typing.get_type_hints(cls).items():
      kinds = typing.get_args(hint)
      if typing.get_origin(hint) is dict and kinds[1] in (int, float, str):
        found[name] = kinds[1]
  return found


def _dict(path, text) -> dict:
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = None
  if not isinstance(value, dict):
    raise ValueError(f"override: config.{path} = {text!r}: takes a dict such as {{'name': value}}; or set one entry, "
                     f"--config.{path}.name=value")
  return value


def _value(path, text, kind):
  if kind is str:
    return text.strip("'\"")
  try:
    return kind(text)
  except ValueError:
    raise ValueError(
        f"override: config.{path} = {text!r}: takes {'a whole number' if kind is int else 'a number'}") from None
