"""Times greedy decoding with the KV cache: whole models, a token at a time, dense against methods that select.

  python -m benchmarks.decode --models=smollm2 --methods=dense,msa,seer,quest --batches=1,32 --out=decode.json
  python -m benchmarks.decode --workdir=runs/smollm2-msa --batches=1,32   # a run's checkpoint, and the same run dense
  python -m benchmarks.decode --models=tiny --context=256 --batches=2 --steps=3 --repeats=1   # on a CPU: does it run?

A row: `--steps` tokens by one program, from a cache that holds all of `--context` but those: that of one text of random
tokens, as many times as there are sequences. Weights are held in the compute dtype, as a server would.

ms: of one token of all sequences, median over `--repeats`. tokens/s: of all sequences. vs dense: dense's ms over this
one's. floor: the time of a copy of what has to be read, weights and the cache's visible keys and values
(`Method.reads`), at the device's measured copy rate; of floor: floor over ms.
"""
from __future__ import annotations

import collections

from absl import flags

from benchmarks import models, timing
from launch import cli

_MODELS = flags.DEFINE_list("models", ["smollm2"], f"Of {', '.join(models.MODELS)}; random weights.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory to take weights and method from, in place of --models.")
_METHODS = flags.DEFINE_list("methods", ["dense", "msa", "seer", "quest"], "Of the named shapes.")
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "Sequences.")
_CONTEXT = flags.DEFINE_integer("context", 8192, "Tokens in the cache at the end.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 64, "Tokens of a timed program.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "The median counts.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")
cli.define_common()


def runs():
  """(model, method, config, parameters or None for random ones, mode) of every row's model."""
  if _WORKDIR.value:
    from nsa import evaluate
    config, params, _ = evaluate.open_run(_WORKDIR.value)
    for mode in ("dense", "sparse") if config.attention.has_sparse else ("dense",):
      yield config.size, config.arm if mode == "sparse" else "dense", config, params, mode
    return
  for model in _MODELS.value:
    for method in _METHODS.value:
      config = models.config_of(model, method, 1, _CONTEXT.value)
      yield model, method, config, None, "dense" if method == "dense" else "sparse"


def main():
  import jax
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_CONTEXT.value} tokens in the cache")
  print(f"{'model':<12} {'method':<16} {'batch':>5} {'ms':>9} {'tokens/s':>9} {'of floor':>8} {'vs dense':>8}")
  rows, dense = [], collections.defaultdict(lambda: None)
  for model, method, config, params, mode in runs():
    for batch in timing.counts("--batches", _BATCHES.value):
      row = dict(model=model, method=method, batch=batch, context=_CONTEXT.value)
      try:
        row |= models.measure_decoding(config, params, mode, batch, _CONTEXT.value, _STEPS.value, _REPEATS.value)
      except Exception as error:  # memory, a shape that an implementation refuses; other rows go on
        row["error"] = timing.of_error(error)
        print(f"{model:<12} {method:<16} {batch:>5} {row['error']}", flush=True)
      else:
        if method == "dense":
          dense[model, batch] = row["ms"]
        row["vs_dense"] = dense[model, batch] and dense[model, batch] / row["ms"]
        part = lambda name: f"{row[name]:8.2f}" if row[name] else f"{'-':>8}"
        print(f"{model:<12} {method:<16} {batch:>5} {row['ms']:9.3f} {row['tokens_per_second']:9.0f} "
              f"{part('of_floor')} {part('vs_dense')}", flush=True)
      rows.append(row)
      timing.write(_OUT.value, rows)


if __name__ == "__main__":
  cli.run(main)
