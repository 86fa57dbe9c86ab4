"""Operations over a device mesh: each device computes its own rows, queries and KV heads.

XLA's partitioner cannot cut a custom call, so a kernel inside `jax.jit` would have all its operands gathered to
every device. Inside `partitioned(mesh, ...)` every operation of `api` runs under `jax.shard_map` instead: rows
over the axes of `batch`, KV heads with their groups over `heads`, queries over `time`. Keys and values of all
positions stay whole: what a query selects may lie anywhere, which does not suit a ring. Their gradients are summed
over the shards of the queries. Heads share nothing, so no operation communicates inside.

A dimension that its axes do not divide is not cut in that call; every device of those axes then computes all of it.
"""
from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

# One letter per dimension: b rows, t queries, h heads (query or KV), . whole.
_ARGUMENTS = {
    "q": "bth.", "k": "b.h.", "v": "b.h.", "k_cmp": "b.h.", "v_cmp": "b.h.", "lse": "bth", "q_idx": "bth.",
    "k_idx": "b..", "block_indices": "bth.", "scores": "bth.", "segment_ids": "b.",
    "index_weights": "bth.", "token_sets": "bth.", "k_pages": "..h.", "v_pages": "..h.", "page_table": "b.",
}
_RESULTS = {
    "attention": ("bth.", "bth"), "compressed_attention": ("bth.", "bth"), "selected_attention": ("bth.", "bth"),
    "compressed_top_k": "bth.", "index_top_k": "bth.", "block_top_k": "bth.", "index_kl": "bth",
    "block_mass": ("bth.", "bth"), "block_peak": "bth.", "lightning_scores": "bth.", "lightning_kl": "bth",
    "paged_attention": ("bth.", "bth"), "token_top_k": "bth.", "token_attention": ("bth.", "bth"),
}


@dataclasses.dataclass(frozen=True)
class _Partition:
  mesh: jax.sharding.Mesh
  axes: dict[str, tuple[str, ...]]  # letter -> mesh axes

  def size(self, letter: str) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes[letter])


_current: contextvars.ContextVar[_Partition | None] = contextvars.ContextVar("partition", default=None)


@contextlib.contextmanager
def partitioned(mesh, *, batch=(), time=(), heads=()):
  """Operations traced inside the block are cut over `mesh`.

  Args:
    mesh: of `Auto` axes; one of a single device changes nothing.
    batch, time, heads: the mesh axes, a name or several, of rows, queries and KV heads.

  It acts while a function is traced. Keep what `jax.jit` caches apart: a function that was traced outside keeps
  its uncut program inside, and the reverse.
  """
  axes = {"b": batch, "t": time, "h": heads}
  axes = {letter: (names,) if isinstance(names, str) else tuple(names or ()) for letter, names in axes.items()}
  token = _current.set(_Partition(mesh, axes) if mesh.size > 1 else None)
  try:
    yield
  finally:
    _current.reset(token)


def active() -> bool:
  """Whether operations are cut over several devices here."""
  return _current.get() is not None


def apply(operation: str, function, arguments: dict):
  """function(**arguments), cut as the surrounding `partitioned` says."""
  partition = _current.get()
  if partition is None:
    return function(**arguments)
  arrays = {name: x for name, x in arguments.items() if name in _ARGUMENTS and x is not None}
  rest = {name: x for name, x in arguments.items() if name not in arrays}
  offset = rest.get("query_offset", 0)
  cut = _cut(partition, arrays)
  spec = lambda letters: P(*(partition.axes[letter] if letter in cut else None for letter in letters))
  specs = {name: spec(_ARGUMENTS[name]) for name in arrays}
  static = isinstance(offset, (int, np.integer))
  if "query_offset" in rest and (not static or "t" in cut):
    arrays["query_offset"] = jnp.asarray(offset, jnp.int32)
    specs["query_offset"] = spec("b") if arrays["query_offset"].ndim else P()

  def local(arrays):
    arrays = dict(arrays)
    if "t" in cut and "query_offset" in arrays:
      some = next(name for name in arrays if "t" in _ARGUMENTS.get(name, ""))  # that has the queries' dimension
      arrays["query_offset"] += lax.axis_index(partition.axes["t"]) * arrays[some].shape[1]
    return function(**{**rest, **arrays})

  results = _RESULTS[operation]
  out = spec(results) if isinstance(results, str) else tuple(spec(letters) for letters in results)
  # Kernels say nothing of how their results vary over the mesh, hence no check_vma.
  return jax.shard_map(local, mesh=partition.mesh, in_specs=(specs,), out_specs=out, check_vma=False)(arrays)


def _cut(partition, arrays) -> set[str]:
  """The letters whose axes divide that dimension in all arguments."""
  out = set()
  for letter in partition.axes:
    sizes = [x.shape[_ARGUMENTS[name].index(letter)] for name, x in arrays.items() if letter in _ARGUMENTS[name]]
    parts = partition.size(letter)
    if parts > 1 and sizes and all(size % parts == 0 for size in sizes):
      out.add(letter)
  return out
