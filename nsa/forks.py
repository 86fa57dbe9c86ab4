"""The state that a run begins with: its own newest checkpoint, a trunk's, or fresh weights."""
from __future__ import annotations

from absl import logging
import jax

from nsa import checkpoint, config as config_lib, optim, rundir, stacking, step as step_lib


def first_step(config, workdir) -> int:
  """Where the run in `workdir` will begin, as far as that is known without reading a checkpoint."""
  fork = 0 if not config.fork.workdir or config.fork.reset else max(config.fork.step, 0)
  return max(checkpoint.Checkpoints(workdir, read_only=True).latest() or 0, fork)


def initial_state(config, mesh, checkpoints) -> tuple[step_lib.TrainState, int]:
  """The newest good checkpoint; else the fork point; else fresh weights. Returns (state, step)."""
  abstract = step_lib.abstract_state(config, mesh)
  if checkpoints.latest() is not None:
    state = checkpoints.restore(abstract, fall_back=True)
    return state, int(state.step)
  fresh = step_lib.compile_init(config, mesh)(step_lib.seeds_of(config))
  if not config.fork.workdir:
    return fresh, 0
  state = fork(config, mesh, fresh)
  return state, int(state.step)


def fork(config, mesh, fresh: step_lib.TrainState) -> step_lib.TrainState:
  """The trunk's checkpoint, in this run's tree.

  Parameters that the trunk does not have (a selector, NSA's branches) and their optimizer state
  keep their initial values: the very ones they would have in a run that had carried them along
  unused. Raises ConfigError naming what does not fit.
  """
  where = config.fork.workdir
  trunk_config, source, step = trunk_of(config)
  if trunk_config.data != config.data and not config.fork.reset:
    changed = [f for f in vars(config.data) if getattr(config.data, f) != getattr(trunk_config.data, f)]
    logging.warning("the trunk %s was trained with other data (%s): this is no staged run", where, ", ".join(changed))
  abstract = step_lib.abstract_state(trunk_config, mesh)
  if config.fork.reset:  # parameters alone: an imported model has nothing else
    trunk = source.restore(abstract._replace(optimizer={}), step, partial=True)
  elif any(name.startswith("optimizer/") for name in source.describe(step)):
    trunk = source.restore(abstract, step)
  else:
    raise config_lib.ConfigError([("fork.reset", False, f"{where} has no optimizer state (an imported model): set "
                                                        "fork.reset = True")])
  seeds = config.seeds if set(config.seeds) <= set(trunk_config.seeds) else (trunk_config.seeds[0],) * len(config.seeds)
  trunk = step_lib.pick_seeds(trunk, trunk_config.seeds, seeds)
  theirs = trunk.params
  if config.fork.reset and not set(optim.groups_of(trunk_config).values()) - {"backbone"}:
    theirs = stacking.restack(theirs, config)
  params = _overlay(fresh.params, theirs, config)
  if config.fork.reset:
    return fresh._replace(params=params)
  optimizer = {group: jax.tree.map(_place, state, trunk.optimizer[group]) if group in trunk.optimizer else state
               for group, state in fresh.optimizer.items()}
  return step_lib.TrainState(_place(fresh.step, trunk.step), params, optimizer)


def trunk_of(config) -> tuple[config_lib.Config, checkpoint.Checkpoints, int]:
  """(the trunk's config, its checkpoints, the step of the one to begin with). Raises the ConfigError of `fork` where
  one of them is not there."""
  where = config.fork.workdir
  trunk_config = rundir.read_config(where, field="fork.workdir")
  if not set(config.seeds) <= set(trunk_config.seeds) and not config.fork.reset:
    raise config_lib.ConfigError([("seeds", config.seeds, f"the trunk {where} has the seeds {trunk_config.seeds}")])
  source = checkpoint.Checkpoints(where, read_only=True)
  step = source.latest() if config.fork.step < 0 else config.fork.step
  if step is None or step not in source.steps():
    raise config_lib.ConfigError([("fork.step", config.fork.step, f"{where} has checkpoints at {source.steps()}")])
  return trunk_config, source, step


def _overlay(fresh: dict, trunk: dict, config) -> dict:
  problems, group_of = [], optim.groups_of(config)

  def merge(mine, theirs, path):
    out = dict(mine)
    for name, value in mine.items():
      here = path + (name,)
      if isinstance(value, dict):
        out[name] = merge(value, theirs.get(name, {}), here)
      elif name in theirs and theirs[name].shape == value.shape:
        out[name] = _place(value, theirs[name])
      elif name in theirs:
        problems.append(
            ("/".join(here), theirs[name].shape, f"this model needs {value.shape}: give both the same model config"))
      elif group_of[".".join(here)] == "backbone":
        problems.append(("/".join(here), "missing", f"{config.fork.workdir} has no such parameter: give both the same "
                                                    "model config"))
    return out

  merged = merge(fresh, trunk, ())
  if problems:
    raise config_lib.ConfigError([(f"fork.workdir: parameter {name}", value, fix) for name, value, fix in problems])
  return merged


def _place(mine, theirs):
  return jax.device_put(theirs, mine.sharding)
