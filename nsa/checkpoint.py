"""The checkpoints of one run: asynchronous, atomic, checked, and free of the mesh that wrote them.

Layout: `workdir/checkpoints/<step>/`, each as nsa/stored.py writes it. Here is which stay, what a save that failed or
was killed leaves, and what is taken in place of a damaged one. Every process of a multi-host run must make the same
calls.
"""
from __future__ import annotations

from collections.abc import Sequence
import errno
import functools
import os
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from nsa import fingerprint, stored
from nsa.stored import CheckpointError, CorruptCheckpointError

_DAMAGED = ".damaged"  # what `restore` sets aside
_LAST_SECONDS = 60  # that one process of several waits for a save on its way out of an error


def compilations(abstract_state: Any):
  """What saving a state of these shapes and shardings compiles and imports: for `programs.ahead`."""
  yield functools.partial(fingerprint.compile_all, stored.named_leaves(abstract_state))
  yield stored.orbax


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints/<step>/`.

  Args:
    workdir: the run directory, local or `gs://...`.
    keep: how many of the newest checkpoints stay, at least 1.
    keep_at: steps that are saved and never deleted (fork points).
    keep_period: checkpoints at multiples of it are never deleted either; 0 = none.
    every: steps between checkpoints; 0 = only at `keep_at`.
    read_only: `save` is an error; nothing on disk is ever changed.
  """

  def __init__(self, workdir: str | epath.Path, *, keep: int = 2, keep_at: Sequence[int] = (), keep_period: int = 0,
               every: int = 0, read_only: bool = False):
    if keep < 1:
      raise ValueError(f"keep = {keep}: keep at least 1 checkpoint")
    if every < 0:
      raise ValueError(f"every = {every}: steps between checkpoints, 0 for none")
    # Orbax wants an absolute path; a URL such as gs:// is one already.
    workdir = os.fspath(workdir) if "://" in os.fspath(workdir) else os.path.abspath(os.fspath(workdir))
    self.directory = epath.Path(workdir) / "checkpoints"
    self._keep, self._keep_at, self._every, self._read_only = keep, frozenset(keep_at), every, read_only
    self._keep_period = keep_period
    self._pending = None  # (step, Orbax's response) of the save that is being written

  def should_save(self, step: int) -> bool:
    """True at every multiple of `every` and at the steps of `keep_at`."""
    return step in self._keep_at or (self._every > 0 and step % self._every == 0)

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending. A save in progress or cut short is not among them."""
    if not self.directory.exists():
      return []
    found = (p for p in self.directory.iterdir() if p.name.isdecimal())
    return sorted(int(p.name) for p in found if stored.is_complete(p))

  def latest(self) -> int | None:
    """The newest complete step, or None."""
    steps = self.steps()
    return steps[-1] if steps else None

  # --- saving -------------------------------------------------------------------

  def save(self, step: int, state: Any, *, wait: bool = False) -> None:
    """Saves `state`; returns once the values are copied, while a thread writes them.

    The caller may donate `state` to the next step at once. A save that is still being written is waited
    for first. A complete checkpoint of this step is left as it is.

    Args:
      step: optimizer steps done.
      state: any pytree of jax.Arrays, sharded in any way.
      wait: return only when the checkpoint is complete.

    Raises:
      CheckpointError: this save, or the one before it, failed (a full disk, say). Earlier checkpoints stay.
    """
    if self._read_only:
      raise CheckpointError(f"cannot save step {step}: {self.directory} was opened with read_only=True")
    if step < 0:
      raise ValueError(f"step = {step}: a step is 0 or more")
    self.wait()
    if step in self.steps():
      logging.info("checkpoint %s exists already and stays as it is", self.directory / str(step))
      return
    leaves = stored.named_leaves(state)
    manifest = stored.manifest_of(leaves, step)
    self._discard_leftovers(only=step)
    try:
      response = stored.write(self.directory / str(step), leaves, manifest)
    except Exception as error:
      raise self._save_failed(step, error) from error
    self._pending = step, response
    if wait:
      self.wait()

  def wait(self) -> None:
    """Returns when the save in progress is complete, and deletes checkpoints that are no longer kept.

    Raises CheckpointError if that save failed; it is raised once, and the next `save` starts afresh.
    """
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    try:
      response.result()
    except Exception as error:
      raise self._save_failed(step, error) from error
    steps = self.steps()
    if step not in steps:
      raise CheckpointError(f"the checkpoint of step {step} vanished from {self.directory} as it was saved")
    if jax.process_index() == 0:
      for old in set(steps[:-self._keep]) - self._keep_at - {step}:
        if not self._keep_period or old % self._keep_period:
          stored.delete(self.directory / str(old))
    self._discard_leftovers()

  def close(self) -> None:
    """Waits for the save in progress; call it before the process ends. Raises as `wait` does."""
    self.wait()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    """Nothing that was saved is lost, whatever ends the block: an interpreter that ends would cut its writing short."""
    if error is None:
      return self.close()
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    # Its processes write in threads of their own: one alone may wait for it, and deletes nothing. If another one is
    # dead, it never ends.
    try:
      response.result(timeout=None if jax.process_count() == 1 else _LAST_SECONDS)
    except Exception as failure:
      logging.warning("%s", self._message_of_failed(step, failure))

  def _save_failed(self, step, error) -> CheckpointError:
    try:
      self._discard_leftovers(only=step)
    except OSError as cleanup:
      logging.warning("could not remove what the failed save of step %d left: %s", step, cleanup)
    return CheckpointError(self._message_of_failed(step, error))

  def _message_of_failed(self, step, error) -> str:
    steps = self.steps()
    intact = f"the newest complete one is step {steps[-1]}" if steps else "there is no earlier one"
    if _disk_is_full(error):
      cause, fix = "the disk is full or a quota is reached", "free some space, or lower checkpoint.keep"
    else:
      cause, fix = type(error).__name__, "see the error below, and whether the directory can be written"
    return (f"the checkpoint of step {step} in {self.directory} was not saved: {cause}; {intact}. Fix: {fix}.\n"
            f"{stored.shortened(error)}")

  def _discard_leftovers(self, only: int | None = None) -> None:
    """Deletes what killed or failed saves left: of one step, or of all but the pending one."""
    if jax.process_index() == 0 and self.directory.exists():
      for path in self.directory.iterdir():
        number = path.name.split(".")[0]
        if not number.isdecimal() or _DAMAGED in path.name or (only is not None and int(number) != only):
          continue
        if any(mark in path.name for mark in stored.TEMPORARY) or not stored.is_complete(path):
          logging.warning("removing %s, which an interrupted save or deletion left", path)
          path.rmtree(missing_ok=True)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("nsa.checkpoint.discard")

  # --- reading ------------------------------------------------------------------

  def restore(self, abstract_state: Any, step: int | None = None, *, fall_back: bool = False,
              partial: bool = False) -> Any:
    """Restores a checkpoint onto the shardings of `abstract_state`, whatever mesh saved it.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct, each with a sharding.
      step: the step to restore; None = the newest.
      fall_back: if that checkpoint is damaged, warn and restore the newest good one before it. Nothing is
        deleted; unless `read_only`, the damaged ones are renamed to <step>.damaged, so that the run saves
        those steps again.
      partial: whether the checkpoint may hold more than `abstract_state` asks for, which is then not read.

    Returns:
      The state, with the structure of `abstract_state`.

    Raises:
      CorruptCheckpointError: data are missing or differ from what was saved.
      CheckpointError: there is no such checkpoint, or its leaves are not those of `abstract_state`.
    """
    self.wait()
    wanted = stored.named_leaves(abstract_state)
    for name, leaf in wanted.items():
      if getattr(leaf, "sharding", None) is None:
        raise CheckpointError(
            f"cannot restore: leaf {name} of the abstract state has no sharding; give every leaf a "
            "NamedSharding, jax.ShapeDtypeStruct(shape, dtype, sharding=...)")
    step = self._existing(step)
    try:
      leaves = stored.read(self.directory / str(step), wanted, partial)
    except CorruptCheckpointError as error:
      older = [s for s in self.steps() if s < step]
      leaves, good = self._newest_good(older, wanted, partial)
      path = self.directory / str(step)
      if good is None:
        raise CorruptCheckpointError(
            f"{error} No earlier checkpoint is good. Fix: move {path} away and start anew.") from error
      if not fall_back:
        raise CorruptCheckpointError(
            f"{error} Fix: delete {path}; the newest good one is step {good} (restore(..., fall_back=True) "
            "takes it and deletes nothing).") from error
      skipped = [step] + [s for s in older if s > good]
      logging.warning("skipped damaged checkpoints %s and restored step %d instead: %s", skipped, good, error)
      if not self._read_only:
        self._set_aside(skipped)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in wanted])

  def _set_aside(self, steps) -> None:
    """Renames checkpoints, so that they are neither listed nor in the way of new ones."""
    if jax.process_index() == 0:
      taken = {p.name for p in self.directory.iterdir()}
      for step in steps:
        names = (f"{step}{_DAMAGED}{f'-{again}' * (again > 1)}" for again in range(1, len(taken) + 2))
        (self.directory / str(step)).rename(self.directory / next(name for name in names if name not in taken))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("nsa.checkpoint.set_aside")

  def describe(self, step: int | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Leaf path -> (shape, dtype name) of a checkpoint (None = the newest).

    Reads metadata alone: it works on a machine without the devices that saved, and allocates nothing.
    """
    return {name: (tuple(leaf["shape"]), leaf["dtype"])
            for name, leaf in stored.manifest_at(self.directory / str(self._existing(step))).items()}

  def _existing(self, step):
    steps = self.steps()
    if not steps:
      raise CheckpointError(f"there is no complete checkpoint in {self.directory}")
    if step is not None and step not in steps:
      raise CheckpointError(f"there is no complete checkpoint of step {step} in {self.directory}; "
                            f"there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step

  def _newest_good(self, steps, wanted, partial):
    for step in reversed(steps):
      try:
        return stored.read(self.directory / str(step), wanted, partial), step
      except CheckpointError as error:
        logging.warning("%s", error)
    return None, None


def load_params(workdir: str | epath.Path, step: int | None = None, subtree: str = "params") -> Any:
  """Reads one subtree of a checkpoint into numpy arrays, without knowing the rest of the state.

  For evaluation, and for a fork into a configuration with another optimizer. Only the subtree is read, and
  it is checked as `Checkpoints.restore` checks it.

  Args:
    workdir: the run directory that holds `checkpoints/`.
    step: the step to read; None = the newest.
    subtree: path of the subtree, e.g. "params" or "params/layers"; "" = everything.

  Returns:
    Nested dict of numpy arrays; positions of tuples and lists become keys "0", "1", ...

  Raises:
    CheckpointError: there is no such checkpoint or subtree, or the data are damaged.
  """
  checkpoints = Checkpoints(workdir, read_only=True)
  path = checkpoints.directory / str(checkpoints._existing(step))
  manifest = stored.manifest_at(path)
  prefix = subtree.strip("/") + "/" if subtree.strip("/") else ""
  wanted = {name: np.empty(leaf["shape"], jnp.dtype(leaf["dtype"]))
            for name, leaf in manifest.items() if name.startswith(prefix)}
  if not wanted:
    raise CheckpointError(f'{path} has no subtree "{subtree}"; its top level is '
                          + ", ".join(dict.fromkeys(name.split("/")[0] for name in manifest)))
  tree = {}
  for name, leaf in stored.read(path, wanted, partial=True).items():
    *parents, last = name[len(prefix):].split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _disk_is_full(error) -> bool:
  text = str(error)
  numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return getattr(error, "errno", None) in numbers or any(
      mark in text for mark in ("No space left", "ENOSPC", "quota exceeded", "File too large"))
