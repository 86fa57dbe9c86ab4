"""Whether a run fits into the memory of its devices, said before its first step and in fields that can be changed."""
from __future__ import annotations

import contextlib
import math
import os

import jax

from nsa.config import ConfigError


def available() -> int:
  """Bytes that one of this process's devices may use; of a CPU, its share of the machine's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def check_state(config, abstract) -> None:
  """Raises ConfigError if parameters and optimizer state alone, a tree of ShapeDtypeStructs with shardings, do not
  fit."""
  size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
  _need(config, size, "parameters and optimizer state")


def check_step(config, compiled) -> None:
  """Raises ConfigError if a compiled train step does not fit."""
  memory = compiled.memory_analysis()
  if memory is not None:
    _need(config, memory.argument_size_in_bytes + memory.temp_size_in_bytes, "a training step")


@contextlib.contextmanager
def told(config, what: str, evaluation: bool = False):
  """Turns the device's own words for a full memory into ConfigError."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ConfigError([_problem(config, "more memory than is free", what, evaluation)]) from error


def _need(config, size, what):
  if size > available():
    raise ConfigError([_problem(config, f"{size / 1e9:.2f} GB per device", what, False)])


def _problem(config, needs, what, evaluation):
  fields = []
  if evaluation:
    fields += [f"eval.batch = {max(1, config.eval.batch // 2)}"] * (config.eval.batch > 1)
    fields += ["eval.diagnostics = False"] * config.eval.diagnostics
  else:
    if len(config.seeds) > 1:
      fields.append("fewer seeds at once (a study's vmap_seeds = False)")
    if config.model.remat == "none":
      fields.append('model.remat = "layer"')
    if config.data.global_batch > 1:
      fields.append(f"data.global_batch = {config.data.global_batch // 2} with twice the schedule.steps")
  fields.append(f"mesh.fsdp = {2 * config.mesh.fsdp} on more devices")
  if config.mesh.context == 1:
    fields.append("mesh.context = 2 on more devices")
  return (what, needs, f"{jax.local_devices()[0].device_kind} has {available() / 1e9:.2f} GB: take "
                       f"{', or '.join(fields[:3])}")
