"""A config to JSON-ready dicts and back: what config.json holds."""
import dataclasses
import json
import re
import typing

from nsa import methods, origins, tasks
from nsa.config import kinds
from nsa.config.fields import Config, ConfigError


def to_dict(config: Config) -> dict:
  """The config as JSON-ready nested dicts; `attention` carries its method's name, `modules` what has to be imported."""
  out = dataclasses.asdict(config)
  out["modules"] = sorted({*config.modules, *origins.modules_of(_classes(config))})
  out["attention"] = {"method": config.attention.name, **out["attention"]}
  out["others"] = {name: {"method": config.others[name].name, **options} for name, options in out["others"].items()}
  return json.loads(json.dumps(out))


def from_dict(tree: dict, file: str = "") -> Config:
  """The inverse of `to_dict`: imports its modules first.

  Raises ConfigError for an unknown field or method, with the name of the `file` that it is in; FileNotFoundError or
  ModuleNotFoundError for a module that is gone.
  """
  try:
    return _config(dict(tree))
  except ConfigError as error:
    if not file:
      raise
    raise ConfigError([(f"{file}: {name}", *rest) for name, *rest in error.problems]) from None


def _config(tree: dict) -> Config:
  for module in tree.get("modules", ()):
    origins.load(module)
  attention = _method(tree.pop("attention", {"method": "dense"}), "attention")
  others = _convert(dict, tree.pop("others", {}), "others")
  others = {name: _method(options, f"others.{name}") for name, options in others.items()}
  config = _build(Config, {"one_pass": False, **tree}, "")  # runs from before there was such a field went on without
  config.attention, config.others = attention, others
  return config


def _classes(config: Config) -> set[type]:
  """The methods, controls and tasks that a config names."""
  modes = [mode.partition(":")[0] for mode in sum(config.eval.named.values(), ())]
  families = [re.split("[:@]", name)[0] for name in (*config.data.tasks, *config.eval.tasks)]
  named = [methods.registry.METHODS.get(name) for name in (*config.layers, *modes)]
  named += [tasks.TASKS.get(family) for family in families]
  return {cls for cls in named if cls} | {type(method) for method in (config.attention, *config.others.values())}


def _method(options: dict, where: str) -> methods.Method:
  if not isinstance(options, dict) or not isinstance(options.get("method"), str):
    raise ConfigError([(where, options, 'an object with the name of a "method" is needed')])
  options = dict(options)
  name = options.pop("method")
  try:
    method = methods.get(name)
  except ValueError as error:
    raise ConfigError([(f"{where}.method", name, str(error))]) from None
  return _build(method, options, f"{where}.")


def _build(cls, tree, prefix):
  hints = kinds.hints(cls)
  names = {f.name for f in dataclasses.fields(cls)}
  kwargs = {}
  for name, value in tree.items():
    if name not in names:
      raise ConfigError([(prefix + name, value, f"no such field; {cls.__name__} has {', '.join(sorted(names))}")])
    kwargs[name] = _convert(hints[name], value, prefix + name)
  return cls(**kwargs)


def _convert(hint, value, where):
  """The value as its field holds it. Raises ConfigError if it is of another type: files may be others'."""
  origin = typing.get_origin(hint)
  if origin is tuple and isinstance(value, list):  # JSON has no tuples
    value = tuple(value)
  if wrong := kinds.problem(dict if dataclasses.is_dataclass(hint) else hint, value, where):
    raise ConfigError([wrong])
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, where + ".")
  if origin is list:
    (item,) = typing.get_args(hint)
    return [_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
  if origin is tuple:
    return tuple(_convert(typing.get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
  if hint is float and isinstance(value, int):
    return float(value)
  return value
