"""The rules of the house that a program can check: arrows point one way, a broken backend costs only itself."""
import ast
import functools
import importlib.abc
import importlib.util
import inspect
from pathlib import Path
import sys
import types

import pytest

import pallas_kernels as pk
from pallas_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "nsa", "experiments", "launch", "benchmarks")
BACKENDS = {  # package or module of a backend -> other backends that it is made of
    "mosaic_gpu": (), "mosaic_tpu": (), "triton": (), "cudnn": (), "cudnn_triton": ("cudnn", "triton"),
}
PARTS = {("mosaic_gpu", "index_top_k"): ("triton",)}  # operations of a backend that another one's kernels end
THIRD_PARTY = {"mosaic_gpu": "jax.experimental.pallas.mosaic_gpu", "mosaic_tpu": "jax.experimental.pallas.tpu",
               "triton": "triton"}


@functools.cache
def imports(path):
  """[(module, whether the import is in a function or may fail)] of all that a file imports."""
  tree = ast.parse(path.read_text())
  may_fail = lambda f: isinstance(f, ast.Try) and [getattr(h.type, "id", "") for h in f.handlers] == ["Exception"]
  inside = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) or may_fail(f)
            for node in ast.walk(f)}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    found += ((name, id(node) in inside) for name in names)
  return found


def test_arrows_point_one_way():
  """benchmarks -> launch -> experiments -> nsa -> pallas_kernels, and no backend imports another."""
  for rank, package in enumerate(PACKAGES):
    for path in (ROOT / package).rglob("*.py"):
      for name, _ in imports(path):
        top = name.split(".")[0]
        assert top not in PACKAGES[rank + 1:], f"{path.relative_to(ROOT)} imports {name}"
  for path in (ROOT / "pallas_kernels").rglob("*.py"):
    mine = path.relative_to(ROOT / "pallas_kernels").parts[0].removesuffix(".py")
    for name, inside in imports(path):
      other = (name.split(".") + ["", ""])[1] if name.startswith("pallas_kernels.") else ""
      if other in BACKENDS and other != mine and not inside:
        assert other in (*BACKENDS.get(mine, ()),
                         *PARTS.get((mine, path.stem), ())), f"{path.relative_to(ROOT)} imports {name}"


def test_no_file_needs_itself():
  """No circle of imports, those in functions and those for types alone counted."""
  files = {}
  for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  of = lambda name: name if name in files else name.rpartition(".")[0]
  needs = {name: {of(found) for found, _ in imports(path)} & files.keys() - {name} for name, path in files.items()}
  while ends := {name for name, needed in needs.items() if not needed}:
    needs = {name: needed - ends for name, needed in needs.items() if name not in ends}
  assert not needs, f"a circle is among {sorted(needs)}, or above one"


def stand_in_for_triton():
  """As much of Triton as importing kernels needs, for machines without it."""
  triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
  triton.jit, triton.language, language.constexpr = lambda f: f, language, lambda x: x
  return {"triton": triton, "triton.language": language}


class Broken(importlib.abc.MetaPathFinder):
  """Importing one module raises what nobody expects of an import."""

  def __init__(self, module):
    self.module = module

  def find_spec(self, name, path, target=None):
    if name == self.module:
      raise RuntimeError(f"{name} is broken")


@pytest.fixture
def unloaded(monkeypatch):
  """No backend is loaded, and afterwards those that were are again."""
  ours = lambda name: name.startswith(tuple(f"pallas_kernels.{backend}" for backend in BACKENDS))
  before = {name: module for name, module in sys.modules.items() if ours(name)}
  attributes = {name: vars(pk)[name] for name in BACKENDS if name in vars(pk)}
  if importlib.util.find_spec("triton") is None:
    for name, module in stand_in_for_triton().items():
      monkeypatch.setitem(sys.modules, name, module)

  def unload():
    for name in list(filter(ours, sys.modules)):
      del sys.modules[name]
    for name in BACKENDS:
      vars(pk).pop(name, None)
    reference = {operation: {"reference": found["reference"]} for operation, found in backends._registered.items()}
    monkeypatch.setattr(backends, "_registered", reference)
    monkeypatch.setattr(backends, "_import_errors", {})

  yield unload
  unload()
  sys.modules.update(before)
  vars(pk).update(attributes)


def test_a_backend_that_does_not_import_costs_only_itself(unloaded, monkeypatch):
  """Blocks each backend's module, and what it imports from others, in turn: all others are there and are chosen."""
  everything = lambda: {operation: pk.available(operation) for operation in backends.OPERATIONS}
  unloaded()
  whole = everything()
  assert {name for names in whole.values() for name in names} == {*BACKENDS, "reference"}
  cases = [(name, f"pallas_kernels.{name}") for name in BACKENDS] + list(THIRD_PARTY.items())
  for broken, module in cases:
    lost = {broken, *(name for name, parts in BACKENDS.items() if broken in parts)}
    unloaded()
    with monkeypatch.context() as patch:
      for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        patch.delitem(sys.modules, name)
      patch.setattr(sys, "meta_path", [Broken(module), *sys.meta_path])
      got = everything()
    stays = lambda name, operation: name not in lost and broken not in PARTS.get((name, operation), ())
    assert got == {operation: tuple(n for n in names if stays(n, operation))
                   for operation, names in whole.items()}, module
    told = backends._import_errors[f"pallas_kernels.{broken}"]
    assert "RuntimeError" in told and f"{module} is broken" in told
    for name, error in backends._import_errors.items():
      assert (error is None) == (name.split(".")[-1] not in lost), (module, name, error)


def test_the_page_of_kernels_tells_what_is_served(unloaded):
  """docs/kernels.md has the table that every `supports` gives today."""
  from benchmarks import support
  unloaded()
  text = support.PAGE.read_text()
  assert support.page(text) == text, "python -m benchmarks.support --write"


def test_operations_are_typed():
  """Each argument and result of the public operations has a type, arrays with their shape in letters."""
  for operation in backends.OPERATIONS:
    signature = inspect.signature(getattr(pk, operation))
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
      assert parameter.annotation is not parameter.empty, f"{operation}: {parameter.name}"
