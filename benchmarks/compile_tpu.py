"""Compiles training steps and kernels for TPUs that are not here, and says what they take.

  python -m benchmarks.compile_tpu --out=compiled.csv
  python -m benchmarks.compile_tpu --shrink --shapes= --out=experiments/results/kernels/tpu_steps.csv    # seconds each
  JAX_PLATFORMS=cpu python -m benchmarks.compile_tpu --configs=experiments/mine.py     # does mine fit a v5e?

Needs libtpu (the extra `tpu` or `test`), no TPU. A row is a program and a chip: the train step of a config on one
device (the last stage of its schedule), or an operation of `pallas_kernels`, forward and backward, at a shape of
`pallas_kernels.arg_specs`. Columns: CPU seconds that tracing and compiling took, bytes of HBM for arguments,
results and temporaries as XLA assigns them, the most bytes of VMEM that one kernel takes, and the kernels. That a
program compiles says that Mosaic and XLA accept it for the chip and that it fits; how fast it runs it does not say.
"""
from __future__ import annotations

import csv
import runpy

from absl import flags
import jax

from benchmarks import tpu_programs
from launch import cli
from nsa import config as config_lib
from pallas_kernels import arg_specs
from pallas_kernels.mosaic_tpu import aot

_CHIPS = flags.DEFINE_list("chips", list(aot.TOPOLOGIES), f"Of {', '.join(aot.TOPOLOGIES)}.")
_CONFIGS = flags.DEFINE_spaceseplist(
    "configs", ["experiments/native.py:method=msa", "experiments/native.py:method=nsa"],
    "Experiment files whose train step to compile.")
_SHAPES = flags.DEFINE_list("shapes", ["study_8k_j16", "headline_g16"], "Shapes at which to compile each operation.")
_SHRINK = flags.DEFINE_bool(
    "shrink", False, "Configs with one layer, 4 query heads and 256 tokens: compiled in seconds.")
_OUT = flags.DEFINE_string("out", None, "CSV file for the rows.")


def load(path):
  """The config of "FILE" or "FILE:ARGUMENTS"."""
  file, _, argument = path.partition(":")
  config = runpy.run_path(file)["get_config"](argument or None)
  config_lib.validate(config)
  return config


def programs():
  """(name, function, arguments, options of jit) of all that the flags ask for."""
  for path in _CONFIGS.value:
    config = tpu_programs.shrunk(load(path)) if _SHRINK.value else load(path)
    function, arguments = tpu_programs.train_step(config)
    yield f"train step {path}" + ", shrunk" * _SHRINK.value, function, arguments, dict(donate_argnums=0)
  for name in _SHAPES.value:
    for operation, (function, arguments) in tpu_programs.operations(arg_specs.get(name)).items():
      yield f"{operation} {name}", function, arguments, {}


def main():
  if aot.missing():
    raise ValueError(aot.missing())
  rows = []
  print(f"{'program':52} {'chip':6} {'CPU s':>9} {'VMEM MiB':>8} {'args MiB':>9} {'temp MiB':>9}")
  for name, function, arguments, options in programs():
    for chip in _CHIPS.value:
      rows.append(tpu_programs.row(name, chip, function, arguments, **options))
      mib = lambda key: f"{rows[-1][key] / 2**20:.1f}"
      print(f"{name:52} {chip:6} {rows[-1]['compile_cpu_seconds']:9} {mib('vmem_bytes'):>8} {mib('argument_bytes'):>9} "
            f"{mib('temporary_bytes'):>9}", flush=True)
      if _OUT.value:  # after each row: what compiled stays if a later program does not
        with open(_OUT.value, "w", newline="") as file:
          writer = csv.DictWriter(file, rows[0], lineterminator="\n")
          writer.writeheader()
          writer.writerows(rows)
  print(f"jax {jax.__version__}, libtpu {aot.version()}: all {len(rows)} compiled")


if __name__ == "__main__":
  cli.run(main)
