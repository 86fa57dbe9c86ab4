"""Writes the block lists that a trained model chooses on held-out text, for the kernel bench.

    python -m launch.dump_selections --workdir=runs/native --layers=0,3,5 --windows=8 --out=selections.npz
    python -m benchmarks.kernels --shapes=study_4k_j16 --patterns=file:selections.npz@3
"""
from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint; -1 for the newest.", lower_bound=-1)
_SEED = flags.DEFINE_integer("seed", -1, "Of a run with several; -1 takes its first.", lower_bound=-1)
_LAYERS = flags.DEFINE_list("layers", ["0"], "Layers whose lists are kept.")
_WINDOWS = flags.DEFINE_integer("windows", 8, "Windows of text.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens of a window; 0: the run's own.", lower_bound=0)
_RUN_MODE = flags.DEFINE_string("run_mode", "sparse", "As in launch.evaluate.")
_OUT = flags.DEFINE_string("out", None, "File to write, .npz.")
flags.mark_flags_as_required(["workdir", "out"])
cli.define_common()


def main():
  import jax

  from nsa import config as config_lib, evaluate
  from nsa.look import selections
  config, params, step = evaluate.open_run(_WORKDIR.value, _STEP.value)
  seed = config.seeds[0] if _SEED.value < 0 else _SEED.value
  if seed not in config.seeds:
    raise config_lib.ConfigError([("--seed", seed, f"{_WORKDIR.value} has the seeds {config.seeds}")])
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  if len(config.seeds) > 1:
    params = jax.tree.map(lambda x: x[config.seeds.index(seed)], params)
  try:
    layers = tuple(int(layer) for layer in _LAYERS.value)
  except ValueError:
    raise config_lib.ConfigError([("--layers", ",".join(_LAYERS.value), "numbers, e.g. 0,3,5")]) from None
  found = selections.collect(config, params, step=step, layers=layers, windows=_WINDOWS.value, run_mode=_RUN_MODE.value,
                             context=_CONTEXT.value)
  selections.save(_OUT.value, found)
  print(f"{_OUT.value}: {' x '.join(map(str, found['block_indices'].shape))} (layers, windows, tokens, KV heads, J)")


if __name__ == "__main__":
  cli.run(main)
