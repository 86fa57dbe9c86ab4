"""Which methods there are: by name, from this package and from a user's files, and which files a config needs.

A run's config.json records the modules outside of this package that its methods, tasks and controls come from, so
that resuming, evaluating and reporting in a new process find them: an importable name, or a path (relative to the
working directory if it lies below it).
"""
from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types

from nsa.methods import contract
from nsa.methods.interface import Method

METHODS: dict[str, type[Method]] = {}
_ORIGINS: dict[type, str] = {}  # class -> the module that a new process has to import, "" = none can


def add(cls: type[Method]) -> type[Method]:
  """Makes a method of this package known; tests/methods_contract_test.py probes them all."""
  contract.check(cls)
  METHODS[cls.name] = cls
  return cls


def register(cls: type[Method]) -> type[Method]:
  """Makes a method known by its name, so that configs, checkpoints and reports find it; usable as a decorator.

  Raises ContractError naming the method and what it declares wrongly, or a name that is taken.
  """
  known = METHODS.get(getattr(cls, "name", ""), cls)
  if known.__qualname__ != cls.__qualname__:
    raise contract.ContractError(cls, "name", cls.name, f"taken by {known.__module__}.{known.__qualname__}: give the "
                                 "method a name of its own")
  contract.check(cls)
  contract.probe(cls)
  METHODS[cls.name] = cls
  remember(cls)
  return cls


def get(name: str) -> type[Method]:
  """The options dataclass of a method. Raises ValueError for an unknown name."""
  if name not in METHODS:
    raise ValueError(f"attention method = {name!r}: no such method; known are {', '.join(sorted(METHODS))}. One of your "
                     "own is known once its file has been imported: name it in config.modules")
  return METHODS[name]


# --- modules from outside of the package ----------------------------------------------


def remember(cls: type, depth: int = 2) -> None:
  """Notes where a class from outside of the package was defined: by the caller `depth` frames up, or its own module."""
  module = sys.modules.get(cls.__module__)
  path = getattr(module, "__file__", None) or sys._getframe(depth).f_globals.get("__file__")
  if not path or not os.path.exists(path):  # a notebook, or a prompt
    _ORIGINS[cls] = ""
    return
  path = os.path.realpath(path)
  spec = None
  if module is not None and cls.__module__ != "__main__":
    spec = getattr(module, "__spec__", None)
  importable = spec is not None and spec.origin and os.path.realpath(spec.origin) == path and _finds(cls.__module__, path)
  below = os.path.relpath(path)
  _ORIGINS[cls] = cls.__module__ if importable else path if below.startswith(os.pardir) else below


def _finds(name: str, path: str) -> bool:
  """Whether a new process would find this file by the module's name."""
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError, AttributeError):
    return False
  return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == path


def modules_of(classes) -> list[str]:
  """The modules that these classes need in a new process; none for those of this package."""
  return sorted({_ORIGINS[cls] for cls in classes if _ORIGINS.get(cls)})


def load(module: str) -> None:
  """Imports a module of `modules_of`, once: what a file has registered already is not made anew.

  Raises FileNotFoundError or ModuleNotFoundError that say what is missing.
  """
  if not module.endswith(".py"):
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      if error.name and not (module + ".").startswith(error.name + "."):
        raise  # the module is there, something that it imports is not
      raise ModuleNotFoundError(f"modules = {module!r}: no such module; it defines methods, tasks or controls of this "
                                "run. Put its directory on PYTHONPATH", name=module) from None
    return
  path = os.path.realpath(module)
  if path in {os.path.realpath(origin) for origin in _ORIGINS.values() if origin.endswith(".py")}:
    return
  if not os.path.exists(path):
    raise FileNotFoundError(f"modules = {module!r}: no such file in {os.getcwd()}; it defines methods, tasks or controls "
                            "of this run. Start where it lies, or change \"modules\" in the run's config.json")
  name = "nsa_module_" + "".join(c if c.isalnum() else "_" for c in os.path.relpath(path))
  loader = importlib.machinery.SourceFileLoader(name, path)
  loaded = types.ModuleType(name)
  loaded.__file__, sys.modules[name] = path, loaded
  try:
    loader.exec_module(loaded)
  except BaseException:
    del sys.modules[name]
    raise
