"""The typed argument string of an experiment file: `file.py:steps=200,method=nsa`."""
from __future__ import annotations

import math
import types

_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}


def parse(text: str | None, above_0: tuple[str, ...] = (), **defaults) -> types.SimpleNamespace:
  """"steps=200,method=nsa" -> a namespace with the types of `defaults`.

  Raises ValueError naming an unknown key, a value of the wrong type, or one of `above_0` that is not.
  """
  values = dict(defaults)
  for part in filter(None, (text or "").split(",")):
    key, equals, value = (piece.strip() for piece in part.partition("="))
    if key not in defaults or not equals:
      known = ", ".join(f"{name}={default}" for name, default in defaults.items())
      raise ValueError(f"experiment argument {part!r}: write name=value with one of {known}")
    kind = type(defaults[key])
    try:
      values[key] = _TRUTH[value.lower()] if kind is bool else kind(value)
      wrong = kind is float and not math.isfinite(values[key])
    except (ValueError, KeyError):
      wrong = True
    if wrong:
      raise ValueError(f"experiment argument {key} = {value!r}: takes {_WORDS[kind]}, e.g. {defaults[key]}")
    if key in above_0 and values[key] <= 0:
      raise ValueError(f"experiment argument {key} = {value}: above 0, e.g. {defaults[key]}")
  return types.SimpleNamespace(**values)


def choice(arguments: types.SimpleNamespace, name: str, known: dict):
  """What the argument `name` stands for in `known`. Raises ValueError that lists what there is."""
  value = getattr(arguments, name)
  if value not in known:
    raise ValueError(f"experiment argument {name} = {value!r}: one of {', '.join(known)}")
  return known[value]


def numbers(name: str, text: str, kind: type = int, least: int = 1) -> tuple:
  """"8+32" -> (8, 32), of an argument's text. Raises ValueError for what is no number of at least `least`."""
  try:
    found = tuple(kind(one) for one in text.replace("e+", "e").split("+") if one)
    if all(n >= least and math.isfinite(n) for n in found):
      return found
  except ValueError:
    pass
  what = "whole numbers" if kind is int else "numbers"
  raise ValueError(f"experiment argument {name} = {text!r}: {what} of at least {least}, joined by +")


def corpora(arguments: types.SimpleNamespace) -> dict[str, str]:
  """Corpus -> source, of the arguments novels and code: archives or folders, "" for none."""
  return {name: f"files:{path}" for name, path in (("novels", arguments.novels), ("code", arguments.code)) if path}
