"""What a training step waits for besides the devices: the loop, its input, its checkpoints.

    python -m benchmarks.overhead --config=experiments/native.py:method=dense --config.data.global_batch=4
    python -m benchmarks.overhead --config=experiments/native.py --device_ms=50 --out=overhead.json

A CPU is no device beside the host: there, `--device_ms=50` puts a stand-in in the place of the compiled step that takes
50 ms for each step in its turn and lets the host go on meanwhile, as accelerators do.

Measured (experiments/results/overhead): a 10M model, 16 sequences of 8,192 tokens, a stand-in of 50 ms, two CPU cores
that others used too: bare 50.2 ms, loop 50.4 ms per step, 0.4 % more. A batch takes 1.3 ms on an idle host with 12 %
task rows, 6.0 ms with nothing else, so no thread reads ahead. Saving 122 MB holds the loop up for 0.16 s of 1.2 s.

bare: the compiled step again and again on one batch that lies on the devices, milliseconds per step.
loop: the same step in `nsa.train.train`, with its input, records and progress line; from the times of its records,
  compilation, evaluation and checkpoints excluded. Bare and loop are taken `--repeats` times in turn; medians count.
input: one `batch_at` and its way to the devices. It runs while the devices work, so it costs nothing until it takes
  longer than a step.
checkpoint: how long `save` holds up the loop, and how long the writing behind it takes.
"""
import contextlib
import statistics
import tempfile
import time
from unittest import mock

from absl import flags
from ml_collections import config_flags

from benchmarks import timing
from launch import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file of a run.", lock_config=True)
_STEPS = flags.DEFINE_integer("steps", 200, "Steps per timing.", lower_bound=20)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of each kind.", lower_bound=1)
_DEVICE_MS = flags.DEFINE_float("device_ms", 0, "Milliseconds per step of a stand-in for the device; 0: the real one.")
_PARTS = flags.DEFINE_list("parts", ["loop", "input", "checkpoint"], "What to measure.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints are written; none: a temporary directory.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the numbers.")
flags.mark_flag_as_required("config")
cli.define_common()


class StandIn:
  """A device with a queue: a call returns at once, and its metrics can be read when it and all before it are done."""

  class Metric:
    def __init__(self, ready):
      self.ready = ready

    def __array__(self, dtype=None, copy=None):
      import numpy as np
      time.sleep(max(0.0, self.ready - time.perf_counter()))
      return np.ones((), np.float32)

  def __init__(self, milliseconds: float):
    self.seconds, self.ready = milliseconds / 1e3, 0.0

  def __call__(self, state, batch, learning_rate, seeds):
    self.ready = max(self.ready, time.perf_counter()) + self.seconds
    return state, dict.fromkeys(("loss", "bits_per_byte", "grad_norm"), self.Metric(self.ready))


def bare(config, mesh, steps: int) -> float:
  """Milliseconds per step of the compiled step alone."""
  import jax

  from nsa import schedule, step as step_lib
  what = schedule.at(config, config.schedule.steps - 1)
  seeds, batch = step_lib.seeds_of(config), step_lib.Batches(config, mesh).at(0)
  program, rate = step_lib.compile_step(config, what, mesh), what.rates
  state = step_lib.compile_init(config, mesh)(seeds)
  for _ in range(5):
    state, values = program(state, batch, rate, seeds)
  jax.device_get(values)
  began = time.perf_counter()
  for _ in range(steps):
    state, values = program(state, batch, rate, seeds)
  jax.device_get(values)
  return (time.perf_counter() - began) / steps * 1e3


def loop(config, workdir) -> float:
  """Milliseconds per step of a whole run, from its second record to its last."""
  from nsa import metrics, train
  train.train(config, workdir, progress=False)
  rows = metrics.read_jsonl(f"{workdir}/metrics.jsonl")
  return (rows[-1]["seconds"] - rows[1]["seconds"]) / (rows[-1]["step"] - rows[1]["step"]) * 1e3


def inputs(config, mesh, steps: int) -> dict[str, float]:
  """Milliseconds of one batch, on the host alone and up to the devices."""
  import jax

  from nsa import schedule, step as step_lib
  batches = step_lib.Batches(config, mesh)
  batches.at(0)
  host, whole = [], []
  for step in range(1, steps + 1):
    what = schedule.at(config, min(step, config.schedule.steps - 1))
    began = time.perf_counter()
    for source in batches.sources:
      source.batch_at(step, context=what.context, batch=what.batch)
    host.append(time.perf_counter() - began)
    began = time.perf_counter()
    jax.block_until_ready(batches.at(min(step, config.schedule.steps - 1)))
    whole.append(time.perf_counter() - began)
  return {"host_ms": statistics.median(host) * 1e3, "host_max_ms": max(host) * 1e3,
          "to_devices_ms": statistics.median(whole) * 1e3}


def saving(config, mesh, workdir) -> dict[str, float]:
  """Seconds that `save` holds up its caller, and until the checkpoint is complete; medians of 5 after a first one."""
  import jax

  from nsa import checkpoint, step as step_lib
  state = jax.block_until_ready(step_lib.compile_init(config, mesh)(step_lib.seeds_of(config)))
  checkpoints = checkpoint.Checkpoints(workdir, keep=1)
  held, complete = [], []
  for step in range(6):
    began = time.perf_counter()
    checkpoints.save(step, state)
    held.append(time.perf_counter() - began)
    checkpoints.wait()
    complete.append(time.perf_counter() - began)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  return {"state_mb": size / 1e6, "held_up_s": statistics.median(held[1:]),
          "complete_s": statistics.median(complete[1:])}


def main():
  import jax

  from nsa import config as config_lib, provenance, sharding, step as step_lib
  config = config_lib.validate(_CONFIG.value)
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  config.schedule.steps = _STEPS.value
  # One program: what is timed is one step, not a schedule.
  config.schedule.stages = config.schedule.stages[-1:]
  config.schedule.stages[0].fraction = 1.0
  config.eval.sequences, config.eval.run_modes, config.eval.every = 0, (), 0
  config.checkpoint.every, config.checkpoint.keep_at, config.checkpoint.keep_period = 0, (), 0
  config_lib.validate(config, jax.device_count())
  mesh = sharding.make_mesh(config)
  device = contextlib.nullcontext()
  if _DEVICE_MS.value:
    device = mock.patch.object(step_lib, "compile_step", lambda *_: StandIn(_DEVICE_MS.value))
  out = {"device_ms": _DEVICE_MS.value, "config": config_lib.to_dict(config), "versions": provenance.versions()}
  text = lambda values: ", ".join(f"{name} {value:.3f}" for name, value in values.items())
  with device, tempfile.TemporaryDirectory(dir=_WORKDIR.value) as directory:
    if "loop" in _PARTS.value:
      alone, looped = [], []
      for number in range(_REPEATS.value):
        alone.append(bare(config, mesh, _STEPS.value))
        looped.append(loop(config, f"{directory}/{number}"))
      share = statistics.median(looped) / statistics.median(alone) - 1
      out.update(bare_ms=alone, loop_ms=looped, overhead=share)
      row = lambda values: " ".join(f"{value:.2f}" for value in values)
      print(f"bare {row(alone)} ms, loop {row(looped)} ms per step: {share:+.2%}", flush=True)
    if "input" in _PARTS.value:
      out["input"] = inputs(config, mesh, 30)
      print(f"input {text(out['input'])}", flush=True)
    if "checkpoint" in _PARTS.value:
      out["checkpoint"] = saving(config, mesh, f"{directory}/saving")
      print(f"checkpoint {text(out['checkpoint'])}", flush=True)
  timing.write(_OUT.value, out)


if __name__ == "__main__":
  cli.run(main)
