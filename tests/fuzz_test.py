"""Wrong values in every field there is, of configs, methods' options and studies: refused by name, or listed here."""
import copy
import dataclasses
import math
import typing

import pytest

from experiments import quickstart
from launch import overrides
from nsa import config as config_lib, methods, study as study_lib
from nsa.config import ConfigError

# What a number below 0 means, and strings that are free: names, paths. All else is refused.
NEGATIVE = {("mesh.data", -1), ("eval.sequences", -1), ("fork.step", -1)}
FREE = {"arm", "size", "data.data_dir", "fork.workdir", "name", "question", "stopping", "plan", "notes",
        "sections", "primary", "secondary"}  # the last three are asked where reports know them
WRONG_TYPES = {int: (1.5, "8", None, True), float: ("x", None), str: (5, None), bool: ("yes", None, 2),
               tuple: (5, "dense", None, [], (None,)), list: (5, "x", None), dict: (5, None, {3: object()})}


def fields(node, path=""):
  """(path, annotation, value) of every field that holds no dataclass."""
  hints = typing.get_type_hints(type(node))
  for field in dataclasses.fields(node):
    value, name = getattr(node, field.name), f"{path}.{field.name}".lstrip(".")
    if dataclasses.is_dataclass(value):
      yield from fields(value, name)
      continue
    yield name, hints[field.name], value
    if field.name == "stages":
      for i, stage in enumerate(value):
        yield from fields(stage, f"{name}[{i}]")


def wrong(name, hint):
  """Values that the field cannot have."""
  kind, items = typing.get_origin(hint) or hint, typing.get_args(hint)
  yield from WRONG_TYPES.get(kind, ())
  item = items[-2 if kind is tuple else -1] if items else kind
  bad = {int: [n for n in (-3, -1, 10 ** 12) if (name, n) not in NEGATIVE],
         float: [-0.5, math.nan, math.inf, -math.inf],
         str: [] if name in FREE else ["nosuch:x=0"]}.get(item, ())
  for value in bad:
    yield {"x": value} if kind is dict else (value,) if kind is tuple else value


def refused(config, name, value, check):
  *parents, last = name.split(".")
  changed = copy.deepcopy(config)
  setattr(overrides.walk(changed, ".".join(parents)) if parents else changed, last, value)
  try:
    check(changed)
  except ConfigError as error:
    return any(last in field or last in fix for field, _, fix in error.problems)
  except ModuleNotFoundError as error:
    return last == "modules" and "modules = " in str(error)
  return False


@pytest.mark.parametrize("method", sorted(methods.registry.METHODS))
def test_no_field_of_a_config_takes_a_wrong_value(method):
  attention = methods.get(method)()
  for name, value in dict(block_size=16, num_blocks=64, window=16).items():
    if hasattr(attention, name):
      setattr(attention, name, value)
  config = config_lib.Config(attention=attention)
  config.data.context, config.eval.run_modes = 1024, ("dense",)
  config_lib.validate(config)
  everything = [(name, value) for name, hint, _ in fields(config) for value in wrong(name, hint)
                if method == "dense" or name.startswith("attention.")]
  assert len(everything) > (300 if method == "dense" else 0)
  taken = [(name, value) for name, value in everything if not refused(config, name, value, config_lib.validate)]
  assert not taken


def test_no_field_of_a_study_takes_a_wrong_value(tmp_path):
  study = quickstart.get_config("steps=20")
  check = lambda changed: study_lib.jobs(changed, tmp_path)
  check(study)
  own = [field.name for field in dataclasses.fields(study)]
  taken = [(name, value) for name, hint, _ in fields(study) if name in own for value in wrong(name, hint)
           if not refused(study, name, value, check)]
  assert not taken
