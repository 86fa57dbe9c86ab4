"""One checkpoint on disk: written, described, read and checked, by Orbax.

A checkpoint is an Orbax checkpoint (OCDBT, Zarr 3). A state is stored as one flat mapping from a leaf's path, such as
`params/layers/attn/q`, to its array; the names and the nesting of optax tuples and dataclasses are therefore no part of
the format. Orbax writes into a temporary directory and renames it when everything is on disk, so a directory named by a
plain number is complete.

Neither Zarr nor OCDBT keeps a checksum of array values: a flipped byte would be restored as another weight. Each
checkpoint therefore carries two 32-bit sums per leaf (`fingerprint`), taken on the devices when it is saved and again
when it is restored. The sums do not depend on the sharding, and they travel in Orbax's own metadata file, inside the
same atomic commit.

All use of Orbax is in this file. Every process of a multi-host run must make the same calls.
"""
from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from nsa import fingerprint

TEMPORARY = (".orbax-checkpoint-tmp", ".deleted")  # directories that a killed save or deletion leaves
_FORMAT = 1  # of the manifest below


class CheckpointError(Exception):
  """A checkpoint cannot be saved or restored; the message names the directory, what is wrong and the fix."""


class CorruptCheckpointError(CheckpointError):
  """A checkpoint that counts as complete has lost or changed data."""


@functools.cache
def orbax():
  """(orbax.checkpoint.v1, orbax.checkpoint.path), imported by who needs them first: no first step waits the second that
  it takes."""
  from orbax.checkpoint import path, v1
  return v1, path


def is_complete(path: epath.Path) -> bool:
  """Whether the save of this checkpoint came to its end."""
  return orbax()[1].step.is_path_finalized(path)


def manifest_of(leaves: dict[str, Any], step: int) -> dict[str, dict]:
  """What a checkpoint says of each leaf: shape, dtype, sums. Raises CheckpointError for what cannot be saved."""
  for name, leaf in leaves.items():
    if not isinstance(leaf, jax.Array):
      raise CheckpointError(
          f"cannot save step {step}: leaf {name} is a {type(leaf).__name__}, not a jax.Array; put it on "
          "the mesh with jax.device_put(value, NamedSharding(mesh, P()))")
    if not fingerprint.supports(leaf.dtype):
      raise CheckpointError(
          f"cannot save step {step}: leaf {name} has dtype {leaf.dtype}; store its bits as an unsigned "
          "integer (a random key: jax.random.key_data)")
  sums = fingerprint.of_all(leaves)
  return {name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "fingerprint": sums[name].tolist()}
          for name, leaf in leaves.items()}


def write(path: epath.Path, leaves: dict[str, jax.Array], manifest: dict[str, dict]):
  """Begins to write a checkpoint; its `result` waits until it is complete, or raises what Orbax raises."""
  # Orbax refuses arrays without elements; the manifest alone restores them.
  return orbax()[0].save_async(path, {name: leaf for name, leaf in leaves.items() if leaf.size},
                               custom_metadata={"format": _FORMAT, "leaves": manifest})


def manifest_at(path: epath.Path) -> dict[str, dict]:
  """What `manifest_of` gave when it was saved. Reads metadata alone."""
  with _reading(path):
    custom = orbax()[0].metadata(path).custom_metadata
    if not isinstance(custom, dict) or "leaves" not in custom:
      raise ValueError("its metadata do not list the leaves: they are lost, or other code wrote it")
  if custom["format"] != _FORMAT:
    raise CheckpointError(f"{path} has format {custom['format']}, this code reads format {_FORMAT}")
  return custom["leaves"]


def read(path: epath.Path, wanted: dict[str, Any], partial: bool) -> dict[str, Any]:
  """Leaf path -> array, checked. `wanted` holds ShapeDtypeStructs (jax.Arrays come back) or numpy arrays (numpy);
  partial: whether there may be more than that, which is not read.

  Raises CorruptCheckpointError for data that are missing or differ, CheckpointError for other leaves than `wanted`.
  """
  manifest = manifest_at(path)
  problems = _mismatches(wanted, manifest, partial)
  if problems:
    more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
    shown = "".join(f"\n  {problem}" for problem in problems[:12] + more)
    raise CheckpointError(
        f"{path} does not fit this configuration:{shown}\nFix: restore with the configuration of the run "
        'that saved it, or take the parameters alone with load_params(workdir, step, "params").')
  abstract = {name: leaf for name, leaf in wanted.items() if math.prod(leaf.shape)}
  # One process of several may fail alone; all must raise, or the others hang in the next collective.
  failure, loaded = None, {}
  try:
    with _reading(path):
      ocp = orbax()[0]
      context = ocp.Context()
      context.pytree.loading.partial_load = True  # load_params asks for a subtree
      with context:
        loaded = ocp.load(path, abstract) if abstract else {}
  except CheckpointError as error:
    failure = error
  if _anywhere(failure is not None):
    raise failure or CorruptCheckpointError(f"checkpoint {path} is damaged: a process cannot read it.")
  loaded = {name: loaded[name] if name in abstract else _empty(leaf) for name, leaf in wanted.items()}
  sums = {name: fingerprint.of_numpy(leaf) for name, leaf in loaded.items() if not isinstance(leaf, jax.Array)}
  sums.update(fingerprint.of_all({name: leaf for name, leaf in loaded.items() if name not in sums}))
  changed = [name for name in loaded if sums[name].tolist() != manifest[name]["fingerprint"]]
  if changed:
    raise CorruptCheckpointError(
        f"checkpoint {path} is damaged: the values of {', '.join(changed[:4])}"
        f"{f' and {len(changed) - 4} more leaves' * (len(changed) > 4)} are not those that were saved "
        "(checksums differ).")
  return loaded


def delete(path: epath.Path) -> None:
  """Deletes a checkpoint such that one cut short never looks complete."""
  if "://" in str(path):
    (path / "commit_success.txt").unlink(missing_ok=True)  # what makes it complete on an object store
  else:
    path = path.rename(path.parent / f"{path.name}{TEMPORARY[1]}")
  path.rmtree(missing_ok=True)


def named_leaves(tree) -> dict[str, Any]:
  """Leaf path -> leaf, in the order of jax.tree.leaves."""
  out = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not name or name in out or name.count("/") != len(path) - 1:
      raise CheckpointError(f'leaf path "{name}" is empty, not unique, or has a key with "/": rename the key')
    out[name] = leaf
  return out


def _mismatches(wanted, manifest, partial) -> list[str]:
  """What keeps a checkpoint from filling `wanted`. Leaves that only the checkpoint has count too, unless a part of it
  will do."""
  out = [f"{name}: in the state, missing in the checkpoint" for name in wanted if name not in manifest]
  if not partial:
    out += [f"{name}: in the checkpoint, missing in the state" for name in manifest if name not in wanted]
  for name, leaf in wanted.items():
    if name in manifest:
      here = f"{leaf.dtype.name}{list(leaf.shape)}"
      there = f"{manifest[name]['dtype']}{manifest[name]['shape']}"
      if here != there:
        out.append(f"{name}: {here} in the state, {there} in the checkpoint")
  return out


def _empty(leaf):
  """An array without elements, like `leaf`."""
  if isinstance(leaf, np.ndarray):
    return leaf
  zeros = np.zeros(leaf.shape, leaf.dtype)
  return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: zeros[index])


@contextlib.contextmanager
def _reading(path):
  """Turns what Orbax raises for unreadable data into CorruptCheckpointError that names `path`.

  Errors that say nothing about the data (no memory, no permission) pass as they are, lest a good
  checkpoint be called damaged.
  """
  try:
    yield
  except (CheckpointError, MemoryError, PermissionError):
    raise
  except Exception as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise
    raise CorruptCheckpointError(
        f"checkpoint {path} is damaged: {type(error).__name__} when reading it ({shortened(error)}).") from error


def _anywhere(failed: bool) -> bool:
  """True if `failed` is true in any process; every process must ask."""
  if jax.process_count() == 1:
    return failed
  return bool(multihost_utils.process_allgather(np.array(failed)).any())


def shortened(error) -> str:
  """The error on one line, its first 600 characters."""
  text = " ".join(str(error).split())
  return text if len(text) <= 600 else text[:600] + " ..."
