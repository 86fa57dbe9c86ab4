"""What a field may hold, by its annotation: of a config in Python, and of the JSON that it is read from."""
import dataclasses
import functools
import types
import typing
from typing import Any, Iterator

_HELD_BY = {int: int, float: (int, float), bool: bool, str: str, list: list, tuple: tuple, dict: dict}

Problem = tuple[str, Any, str]

hints = functools.cache(typing.get_type_hints)


def problem(hint, value, where: str) -> Problem | None:
  """(field, value, fix) where the value itself is of another type than `hint` says; what is in it is not looked at."""
  kind = typing.get_origin(hint) or hint
  held = _HELD_BY.get(kind, kind if dataclasses.is_dataclass(kind) else object)
  if isinstance(value, held) and not (kind in (int, float) and isinstance(value, bool)):
    return None
  instead = f": write {tuple(value) if isinstance(value, list) else (value,)}" if kind is tuple else ""
  return where, value, f"of the type {type(value).__name__}, {getattr(kind, '__name__', kind)} is needed{instead}"


def problems(hint, value, where: str = "") -> Iterator[Problem]:
  """The same of a value and of everything in it. `X | None` may be None; Any holds anything."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    if value is None:
      return
    hint = typing.get_args(hint)[0]
  wrong = problem(hint, value, where)
  kind, items = typing.get_origin(hint) or hint, typing.get_args(hint)
  if wrong:
    yield wrong
  elif dataclasses.is_dataclass(kind):
    for field in dataclasses.fields(value):
      name = f"{where}.{field.name}".lstrip(".")
      yield from problems(hints(type(value))[field.name], getattr(value, field.name), name)
  elif kind is dict and items:
    for key, one in value.items():
      yield from (*problems(items[0], key, where), *problems(items[1], one, f"{where}[{key!r}]"))
  elif kind is list and items or items[1:] == (...,):
    for i, one in enumerate(value):
      yield from problems(items[0], one, f"{where}[{i}]")
