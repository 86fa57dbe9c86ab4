"""What a run will cost, before it is run: here (`--dry_run`), or on a machine that is elsewhere (`launch.compile`)."""
from __future__ import annotations

from collections.abc import Iterator
import json
import time

import jax

from nsa import (
  capacity,
  config as config_lib,
  data,
  flops,
  held_out,
  schedule,
  sharding,
  step as step_lib,
  study as study_lib,
)
from nsa.planning import forecast, topology as topology_lib
from nsa.tasks import audit


def describe(config) -> Iterator[str]:
  """Config, parameters, FLOPs and memory of every stage, each as soon as it is known: compiles every stage's step.

  Raises ConfigError where the config does not fit the devices that are here, and what reading the data of training and
  evaluations raises.
  """
  config_lib.validate(config, jax.device_count())
  mesh = sharding.make_mesh(config)
  capacity.check_state(config, step_lib.abstract_state(config, mesh))
  corpora = _check_data(config)
  yield json.dumps(config_lib.to_dict(config), indent=2) + "\n"
  counts = flops.parameters(config)
  yield "parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
  yield "corpus: " + ", ".join(f"{split} {sha[:12]}" for split, sha in corpora.items())
  yield from (f"note: {remark}" for remark in config_lib.remarks(config))
  yield f"mesh: {dict(mesh.shape)} of {jax.devices()[0].device_kind}"
  for step in schedule.programs(config):
    first, end = config_lib.steps_of(config.schedule)[step.stage]
    parts = flops.training(config, step)
    total = sum(parts.values())
    learn = ", ".join(group for group in step.groups if group in counts)
    yield (f"\nstage {step.stage}: steps {first} to {end - 1}, {step.mode}, {step.batch} x {step.context} tokens, "
           f"{learn} learn")
    yield (f"  training FLOPs per token: {total:,.0f} = "
           + " + ".join(f"{name} {100 * cost / total:.1f} %" for name, cost in parts.items()))
    with capacity.told(config, "a training step"):
      program = step_lib.compile_step(config, step, mesh)
    capacity.check_step(config, program)
    memory = program.memory_analysis()
    if memory is not None:
      yield (f"  memory per device: state and batch {_mib(memory.argument_size_in_bytes)}, "
             f"temporaries {_mib(memory.temp_size_in_bytes)}")
  total = flops.cumulative(config, config.schedule.steps)
  tokens = config.schedule.steps * config.data.global_batch * config.data.context
  yield f"\nwhole run, one seed: {tokens:,} tokens, {total:.3e} FLOPs"


def describe_study(study, workdir) -> str:
  """The runs of a study in their order, with steps and FLOPs, and what its tasks could be answered from without
  selection.

  Raises ConfigError where that is more than half, unless the study says so on purpose, and what reading the data of
  training and evaluations raises.
  """
  lines, read = [f"study {study.name}: {study.question}"], set()
  for job in study_lib.jobs(study, workdir):
    config = job.config
    if (key := repr((config.data, config.schedule.stages, config.eval))) not in read:
      read.add(key)
      _check_data(config)
    own = flops.cumulative(config, config.schedule.steps) - flops.cumulative(config, max(config.fork.step, 0))
    lines.append(f"  {job.run:40s} {config.schedule.steps - max(config.fork.step, 0):6d} steps, "
                 f"{own * len(config.seeds):.2e} FLOPs" + (f", after {job.trunk}" if job.trunk else ""))
  if rows := audit.of_study(study):
    lines += ["", audit.text(rows)]
  study_lib.check_tasks(study)
  return "\n".join(lines)


def _check_data(config) -> dict[str, str]:
  """Reads all that a run will read; {split: SHA-256 of its documents}."""
  batches = data.make(config.data, config.seeds[0])
  for stage in config.schedule.stages:
    batches.check_context(stage.context or config.data.context)
  return {"train": batches.fingerprint, **held_out.check(config)}


def _mib(size: int) -> str:
  return f"{size / 2 ** 20:,.1f} MiB"


# --- machines that are not here -----------------------------------------------------


NATIVE_WARMUP = 0.015  # share of a native run in which the selector warms up, where it has a loss to do so


def ahead(config, topology: topology_lib.Topology, *, compile_steps: bool = True, inactive: float = 0.0) -> dict:
  """The plan of a run: per different step its memory, collectives, FLOPs and time, and the chip hours of the run.

  JSON-ready. `inactive` as in forecast.of_step. Raises ConfigError where the config cannot run on that many devices.
  """
  config_lib.validate(config, topology.devices)
  chip, rows = topology.chip, []
  for step in schedule.programs(config):
    guess = forecast.of_step(config, step, chip, topology.devices, inactive)
    bounds, compiled, needs = guess.bounds, None, guess.bytes
    row = {"mode": step.mode, "context": step.context, "batch": step.batch}
    if compile_steps:
      began = time.monotonic()
      try:
        compiled = topology_lib.compile_step(config, step, topology)
        needs = compiled.total + guess.memory.get("experts", 0.0) if compiled else needs
      except topology_lib.DoesNotFit as error:
        needs = error.bytes + guess.memory.get("experts", 0.0)
      row["seconds_to_compile"] = round(time.monotonic() - began, 1)
    if compiled:
      row["compiled"] = {"arguments_bytes": compiled.arguments, "temporaries_bytes": compiled.temporaries,
                         "collectives_bytes": compiled.collectives}
      exchanged = guess.network.get("tokens to experts", 0.0)
      bounds["network"] = sum(compiled.collectives.values()) / (chip.link * 1e9) + exchanged
    seconds = max(bounds.values())
    fits = needs <= chip.hbm * 1e9
    row |= {"bytes": needs, "fits": fits, "memory_bytes": guess.memory, "collectives_bytes": guess.collectives,
            "flops": guess.flops, "seconds": seconds, "seconds_without_overlap": sum(bounds.values()),
            "bounds_seconds": bounds, "bound": max(bounds, key=bounds.get),
            "mfu": guess.useful_flops / (seconds * chip.tflops * 1e12)}
    if not fits:
      row["change"] = forecast.what_to_change(config, step, chip, topology.devices, needs, inactive)
    rows.append(row)
  steps = config.schedule.steps
  per_step = {row["mode"]: row["seconds"] * topology.chips / 3600 for row in rows}
  runs = {}
  if "dense" in per_step:
    runs["dense"] = per_step["dense"] * steps
  if "sparse" in per_step:
    warm = NATIVE_WARMUP if "warmup" in per_step else 0.0
    runs["native"] = ((1 - warm) * per_step["sparse"] + warm * per_step.get("warmup", 0.0)) * steps
    planned = sum((end - first) * per_step[schedule.at(config, first).mode]
                  for first, end in config_lib.steps_of(config.schedule) if end > first)
    runs["retrofit" if "dense" in per_step else "as scheduled"] = planned
  tokens = steps * config.data.global_batch * config.data.context
  counts = flops.parameters(config)
  return {"topology": topology.name, "chips": topology.chips, "devices": topology.devices, "arm": config.arm,
          "size": config.size,
          "mesh": sharding.mesh_shape(config, topology.devices), "parameters": counts["total"],
          "inactive_parameters": inactive,
          "tokens": tokens, "jax": jax.__version__, "steps": rows, "chip_hours": runs}


def check_fits(made: dict) -> None:
  """Raises ConfigError naming the next thing to change, for each step that does not fit its device."""
  problems = [(f"{row['mode']} step on {made['topology']}", f"{row['bytes'] / 1e9:.1f} GB per device",
               f"does not fit: the next thing to change is {row['change']}") for row in made["steps"]
              if not row["fits"]]
  if problems:
    raise config_lib.ConfigError(problems)


def report(made: dict) -> str:
  """The plan as text."""
  gb = lambda size: f"{size / 1e9:.2f} GB"
  listed = lambda parts, unit: ", ".join(f"{name} {unit(size)}" for name, size in parts.items() if size)
  lines = [f"{made['arm']} {made['size']} on {made['topology']}: {made['chips']} chips, mesh {made['mesh']}, "
           f"{made['parameters']:,} parameters" + (f" + {made['inactive_parameters']:.3g} of experts not visited" if
                                                   made["inactive_parameters"] else "")]
  for row in made["steps"]:
    total = sum(row["flops"].values())
    lines += [f"\n{row['mode']}: {row['batch']} x {row['context']} tokens, {gb(row['bytes'])} per device"
              + ("" if row["fits"] else f", DOES NOT FIT: the next thing to change is {row['change']}"),
              f"  by arithmetic: {listed(row['memory_bytes'], gb)}"]
    if "compiled" in row:
      c = row["compiled"]
      lines.append(f"  compiled in {row['seconds_to_compile']} s: state and batch {gb(c['arguments_bytes'])}, "
                   f"temporaries {gb(c['temporaries_bytes'])}; received per step: {listed(c['collectives_bytes'], gb)}")
    lines += [f"  received per step, by arithmetic: {listed(row['collectives_bytes'], gb)}",
              f"  FLOPs per device: {total:.3g} = " + ", ".join(f"{part} {100 * cost / total:.1f} %" for part, cost in
                                                                row["flops"].items()),
              f"  {row['seconds']:.2f} s per step, bound by {row['bound']} ("
              + ", ".join(f"{name} {value:.2f}" for name, value in row["bounds_seconds"].items())
              + f"; {row['seconds_without_overlap']:.2f} without overlap), MFU {100 * row['mfu']:.0f} %"]
  lines.append(f"\nchip hours for {made['tokens']:.3g} tokens: "
               + ", ".join(f"{name} {hours:,.0f}" for name, hours in made["chip_hours"].items()))
  return "\n".join(lines)
