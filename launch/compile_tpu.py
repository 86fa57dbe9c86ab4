"""Compiles training steps and kernels for TPUs that are not here, and says what they take.

  python -m launch.compile_tpu --out=compiled.csv
  python -m launch.compile_tpu --shrink --shapes= --out=experiments/results/kernels/tpu_steps.csv    # seconds each
  JAX_PLATFORMS=cpu python -m launch.compile_tpu --configs=experiments/mine.py     # does mine fit a v5e?

Needs libtpu (the extra `tpu` or `test`), no TPU. A row is a program and a chip: the train step of a config on one
device (the last stage of its schedule), or an operation of `pallas_kernels`, forward and backward, at a shape of
`pallas_kernels.arg_specs`. Columns: CPU seconds that tracing and compiling took, bytes of HBM for arguments,
results and temporaries as XLA assigns them, the most bytes of VMEM that one kernel takes, and the kernels. That a
program compiles says that Mosaic and XLA accept it for the chip and that it fits; how fast it runs it does not say.
"""
from __future__ import annotations

import csv
import functools
import runpy
import time

from absl import flags
import jax
import jax.numpy as jnp

from launch import cli
from nsa import config as config_lib, schedule, step as step_lib
import pallas_kernels
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


def shrunk(config):
  """The config with little of everything, for compilation in seconds: the same kernels at small shapes."""
  config.model.num_layers, config.model.d_model, config.model.num_heads, config.model.mlp_dim = 1, 128, 4, 256
  config.data.context, config.data.global_batch = 256, 1
  return config


def train_step(config):
  """The train step of the last stage of a config, and the shapes of its arguments."""
  what = schedule.at(config, config.schedule.steps - 1)
  seeds = step_lib.seeds_of(config)
  state = jax.eval_shape(lambda: step_lib.init_state(config, seeds))
  shape = (*seeds.shape, what.batch, what.context)
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32)
           for name in step_lib.BATCH_KEYS}
  return step_lib.make_step(config, what), (state, batch, jax.ShapeDtypeStruct((), jnp.float32), seeds)


def operations(spec):
  """{name: (function, shapes of its arguments)} of the operations that have TPU kernels, with gradients."""
  s, dtype = spec, jnp.dtype(spec.dtype)
  of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  q, k, cmp = of(s.B, s.T, s.N, s.H), of(s.B, s.T, s.K, s.H), of(s.B, s.num_compressed, s.K, s.H)
  q_idx, k_idx = of(s.B, s.T, s.K, s.index_dim), of(s.B, s.T, s.index_dim)
  lse = jax.ShapeDtypeStruct((s.B, s.T, s.N), jnp.float32)
  blocks = jax.ShapeDtypeStruct((s.B, s.T, s.K, s.J), jnp.int32)
  ids = jax.ShapeDtypeStruct((s.B, s.T), jnp.int32)
  lengths = dict(block_len=s.block_len, block_stride=s.block_stride)
  choice = dict(block_size=s.block_size, num_blocks=s.J, num_initial=s.num_initial, num_local=s.num_local)

  def attend(name, **options):
    def both(q, k, v, do, dlse, ids, *rest):
      f = functools.partial(getattr(pallas_kernels, name), segment_ids=ids, **options)
      out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, *rest), q, k, v)
      return out, vjp((do, dlse))
    return both

  def kl(q, k, lse, q_idx, k_idx, blocks, ids, dloss):
    f = lambda q_idx, k_idx: pallas_kernels.index_kl(q, k, lse, q_idx, k_idx, blocks, block_size=s.block_size,
                                                     segment_ids=ids)
    loss, vjp = jax.vjp(f, q_idx, k_idx)
    return loss, vjp(dloss)

  return {
      "attention": (attend("attention"), (q, k, k, q, lse, ids)),
      "attention, window": (attend("attention", window=s.window), (q, k, k, q, lse, ids)),
      "compressed_attention": (attend("compressed_attention", **lengths), (q, cmp, cmp, q, lse, ids)),
      "compressed_top_k": (lambda q, k, lse, ids: pallas_kernels.compressed_top_k(
          q, k, lse, segment_ids=ids, **lengths, **choice), (q, cmp, lse, ids)),
      "index_top_k": (lambda q, k, ids: pallas_kernels.index_top_k(q, k, segment_ids=ids, **choice),
                      (q_idx, k_idx, ids)),
      "selected_attention": (attend("selected_attention", block_size=s.block_size), (q, k, k, q, lse, ids, blocks)),
      "index_kl": (kl, (q, k, lse, q_idx, k_idx, blocks, ids,
                        jax.ShapeDtypeStruct((s.B, s.T, s.K), jnp.float32))),
  }


def row(program, chip, function, arguments, **jit_options):
  """One line of the table."""
  start = time.process_time()
  compiled = aot.compile_for(chip, function, *arguments, **jit_options)
  seconds = time.process_time() - start
  return {"program": program, "chip": chip, "compile_cpu_seconds": round(seconds, 1), **aot.facts(compiled),
          "kernels": " ".join(sorted(aot.kernels_of(compiled))), "jax": jax.__version__, "libtpu": aot.version()}


def programs():
  """(name, function, arguments, options of jit) of all that the flags ask for."""
  for path in _CONFIGS.value:
    config = shrunk(load(path)) if _SHRINK.value else load(path)
    function, arguments = train_step(config)
    yield f"train step {path}" + ", shrunk" * _SHRINK.value, function, arguments, dict(donate_argnums=0)
  for name in _SHAPES.value:
    for operation, (function, arguments) in operations(arg_specs.get(name)).items():
      yield f"{operation} {name}", function, arguments, {}


def main():
  if aot.missing():
    raise ValueError(aot.missing())
  rows = []
  print(f"{'program':52} {'chip':6} {'CPU s':>9} {'VMEM MiB':>8} {'args MiB':>9} {'temp MiB':>9}")
  for name, function, arguments, options in programs():
    for chip in _CHIPS.value:
      rows.append(row(name, chip, function, arguments, **options))
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
