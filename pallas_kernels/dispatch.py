"""How a call of an operation reaches the implementation that computes it."""
from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels import backends, partition

Offset = int | np.integer | Int[Array, ""] | Int[Array, "B"]
Scale = float | Float[Array, ""]


def run(operation: str, implementation: str | None, **arguments: Any) -> Any:
  """The operation by the implementation that serves these validated arguments, cut as `partition` says."""
  # NumPy's integers wrap round in sums, and int8 at 127.
  arguments = {name: int(value) if isinstance(value, np.integer) else value for name, value in arguments.items()}

  def call(**arguments):
    chosen = backends.choose(operation, implementation, arguments)
    with jax.named_scope(f"{operation}_{chosen.name}"):
      return chosen.function(**arguments)

  return partition.apply(operation, call, arguments)


def scale_of(scale: Scale | None, q: Array) -> Scale:
  """`scale`, or H ** -0.5."""
  return q.shape[-1] ** -0.5 if scale is None else scale
