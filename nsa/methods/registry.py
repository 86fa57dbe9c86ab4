"""Which methods there are, by name: those of this package and those that a user's file registers."""
from __future__ import annotations

from nsa import origins
from nsa.methods import contract
from nsa.methods.interface import Method

METHODS: dict[str, type[Method]] = {}


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
  return origins.remember(cls)


def get(name: str) -> type[Method]:
  """The options dataclass of a method. Raises ValueError for an unknown name."""
  if name not in METHODS:
    raise ValueError(f"attention method = {name!r}: no such method; known are {', '.join(sorted(METHODS))}. One of "
                     "your own is known once its file has been imported: name it in config.modules")
  return METHODS[name]
