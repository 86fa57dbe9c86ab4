"""What a run will cost, before it is run: the answer of `--dry_run`."""
from __future__ import annotations

import json

import jax

from nsa import config as config_lib
from nsa import flops, schedule, sharding, step as step_lib, study as study_lib


def describe(config) -> str:
  """Config, parameters, FLOPs and memory of every stage; compiles every stage's step.

  Raises ConfigError where the config does not fit the devices that are here.
  """
  config_lib.validate(config, jax.device_count())
  mesh = sharding.make_mesh(config)
  lines = [json.dumps(config_lib.to_dict(config), indent=2), ""]
  counts = flops.parameters(config)
  lines.append("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
  lines.append(f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}")
  for step in schedule.programs(config):
    first, end = config_lib.steps_of(config.schedule)[step.stage]
    parts = flops.training(config, step)
    total = sum(parts.values())
    lines.append(f"\nstage {step.stage}: steps {first} to {end - 1}, {step.mode}, {step.batch} x {step.context} tokens, "
                 f"{', '.join(step.groups)} learn")
    lines.append(f"  training FLOPs per token: {total:,.0f} = "
                 + " + ".join(f"{name} {100 * cost / total:.1f} %" for name, cost in parts.items()))
    memory = step_lib.compile_step(config, step, mesh).memory_analysis()
    if memory is not None:
      lines.append(f"  memory per device: state and batch {_mib(memory.argument_size_in_bytes)}, "
                   f"temporaries {_mib(memory.temp_size_in_bytes)}")
  total = flops.cumulative(config, config.schedule.steps)
  tokens = config.schedule.steps * config.data.global_batch * config.data.context
  lines.append(f"\nwhole run, one seed: {tokens:,} tokens, {total:.3e} FLOPs")
  return "\n".join(lines)


def describe_study(study, workdir) -> str:
  """The runs of a study in their order, with steps and FLOPs."""
  lines = [f"study {study.name}: {study.question}"]
  for job in study_lib.jobs(study, workdir):
    config = job.config
    own = flops.cumulative(config, config.schedule.steps) - flops.cumulative(config, max(config.fork.step, 0))
    lines.append(f"  {job.run:40s} {config.schedule.steps - max(config.fork.step, 0):6d} steps, "
                 f"{own * len(config.seeds):.2e} FLOPs" + (f", after {job.trunk}" if job.trunk else ""))
  return "\n".join(lines)


def _mib(size: int) -> str:
  return f"{size / 2 ** 20:,.1f} MiB"
