"""A checksum of an array that does not depend on how, or on which devices, the array is sharded.

It is what tells `nsa/stored.py` that a restored leaf holds the values that were saved: two sums modulo
2^32 over the bits and the positions of the elements. Integer addition has no rounding and no order, so one
device, eight devices and numpy agree exactly.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from nsa import programs


def supports(dtype) -> bool:
  """Whether `of_jax` can read this dtype's bits: bool, integers and floats of 1 to 8 whole bytes."""
  real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
  return real and dtype.name not in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")


def _mix(x):
  """uint32 -> uint32, a bijection that spreads every bit (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def _terms(words, index):
  """The summands of both sums. The first detects any change of a single word with certainty (its weight is
  odd, hence invertible modulo 2^32); the second, not linear in the words, tells most other changes."""
  salt = _mix(index)
  return words * (salt | np.uint32(1)), _mix(words ^ salt)


@jax.jit
def of_jax(x):
  """Two sums modulo 2^32 over the bits and positions of `x`, uint32[2]. No float arithmetic and no order:
  the result is the same for every sharding, device and compiler."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
  words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)  # 8 bytes: a last axis of 2 words is added
  index, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.stack([jnp.sum(term, dtype=jnp.uint32) for term in _terms(words, index)])


def of_all(leaves: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  """`of_jax` of each. One program where all lie on one mesh: a program for each shape would be compiled, and each leaf
  waited for, while nothing trains."""
  meshes = {getattr(x.sharding, "mesh", None) for x in leaves.values()}
  if len(meshes) == 1 and None not in meshes:
    return dict(zip(leaves, jax.device_get(compile_all(leaves)(list(leaves.values())))))
  # One after the other: on a CPU many programs that wait for all devices at once can starve each other of threads.
  return {name: jax.device_get(of_jax(x)) for name, x in leaves.items()}


def compile_all(leaves):
  """The compiled program of `of_all`. leaves: arrays, or jax.ShapeDtypeStructs with shardings, of one mesh."""
  abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves.values()]
  mesh = abstract[0].sharding.mesh

  def lower():
    whole = NamedSharding(mesh, P())
    return jax.jit(lambda arrays: [of_jax(x) for x in arrays], out_shardings=[whole] * len(abstract)).lower(abstract)

  kinds = repr([(x.shape, x.dtype.name, x.sharding.spec) for x in abstract])
  return programs.compiled(("fingerprints", kinds, mesh), lower)


def of_numpy(x: np.ndarray) -> np.ndarray:
  """`of_jax` in numpy, in pieces that fit a cache."""
  flat = np.ascontiguousarray(x).reshape(-1)
  words = flat.view(f"<u{min(x.dtype.itemsize, 4)}")
  sums, piece = np.zeros(2, np.uint32), 1 << 16
  for start in range(0, words.size, piece):
    part = words[start:start + piece].astype(np.uint32)
    index = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
    sums += np.array([np.sum(term, dtype=np.uint32) for term in _terms(part, index)], np.uint32)
  return sums
