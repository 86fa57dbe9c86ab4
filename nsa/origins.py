"""Where what a user registers comes from: the modules that a run needs besides this package.

A run's config.json names them (`Config.modules`), so that resuming, evaluating, reporting and dumping in a new process
find its methods, tasks and controls: by an importable name, or by the path of a file, relative to the working
directory where it lies below it.
"""
from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import os
import sys
import types

_ORIGINS: dict[type, tuple[str, str]] = {}  # class -> (what a new process has to import, the file); "" = none can
_count = 0  # see `registered`


def remember(cls: type, depth: int = 2) -> type:
  """Notes where a class is defined, by its module or by the file that called `depth` frames up; returns it."""
  global _count
  _count += 1
  module = sys.modules.get(cls.__module__)
  path = getattr(module, "__file__", None) or sys._getframe(depth).f_globals.get("__file__")
  if not path or not os.path.exists(path):  # a notebook or a prompt: no other process can import that
    _ORIGINS[cls] = "", ""
    return cls
  below = os.path.relpath(path)
  name = path if below.startswith(os.pardir) else below
  _ORIGINS[cls] = cls.__module__ if _importable(cls.__module__, path) else name, os.path.realpath(path)
  return cls


def _importable(name: str, path: str) -> bool:
  """Whether `import name` finds this file in a process that has not loaded it yet."""
  parent = name.rpartition(".")[0]
  where = getattr(sys.modules.get(parent), "__path__", None) if parent else None
  if parent and where is None:
    return False
  spec = importlib.machinery.PathFinder.find_spec(name, where)
  return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(path)


def registered() -> int:
  """How often a class was registered in this process. What is kept by name or printed form is made anew after that: a
  notebook's cell may be run again with other code under the same name."""
  return _count


def any_registered() -> bool:
  """Whether this process knows a class from outside of this package."""
  return bool(_ORIGINS)


def modules_of(classes) -> list[str]:
  """What a new process has to import for these classes; nothing for those of this package."""
  return sorted({_ORIGINS[cls][0] for cls in classes if cls in _ORIGINS} - {""})


def digests(modules) -> dict[str, str]:
  """SHA-256 of each module's file, for versions.json."""
  files = {name: file for name, file in _ORIGINS.values()}
  return {module: hashlib.sha256(open(files[module], "rb").read()).hexdigest() for module in modules
          if files.get(module)}


def load(module: str) -> None:
  """Imports one of `modules_of`, once: what a file has registered in this process is not made anew.

  Raises FileNotFoundError or ModuleNotFoundError that say what is missing and what to do.
  """
  why = "it defines methods, tasks or controls that this config needs"
  if not module.endswith(".py"):
    try:
      if not module or module.startswith("."):
        raise ModuleNotFoundError(name=module)
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      if error.name and not (module + ".").startswith(error.name + "."):
        raise  # the module is there, something that it imports is not
      raise ModuleNotFoundError(f"modules = {module!r}: no such module; {why}. Install it, or put its directory on "
                                "PYTHONPATH", name=module) from None
    return
  path = os.path.realpath(module)
  if path in {file for _, file in _ORIGINS.values()}:
    return
  if not os.path.exists(path):
    raise FileNotFoundError(f"modules = {module!r}: no such file, seen from {os.getcwd()}; {why}. Start where the "
                            "run was started, or correct \"modules\" in its config.json")
  name = "_".join(("nsa", "module", *filter(str.isidentifier, path.removesuffix(".py").split(os.sep))))
  loaded = types.ModuleType(name)
  loaded.__file__, sys.modules[name] = path, loaded  # dataclasses look their module up
  try:
    importlib.machinery.SourceFileLoader(name, path).exec_module(loaded)
  except BaseException:
    del sys.modules[name]
    raise
