"""Times the real train step of named model shapes with named methods: the whole step, the batch on the device.

  python -m benchmarks.step --models=pilot,28m,smollm2 --methods=dense,msa,nsa --batch=8x4096 --out=steps.json
  python -m benchmarks.step --models=pilot --methods=dense,msa --batch=8x4096,2x16384 --profile
  python -m benchmarks.step --models=smollm2 --methods=dense,msa,msa:warmup --batch=8x8192
  python -m benchmarks.step --models=tiny --batch=2x256 --steps=2 --repeats=1     # on a CPU, to see that it runs

A row is a model and a method (benchmarks/models.py; `msa:warmup` is the step in which the output stays dense and the
selector learns) and a batch of sequences x tokens: packed documents of the pilot's data, recall tasks included, as
`nsa.train` would see them. A vocabulary larger than the bytes tokenizer's costs what it costs and is not filled.

ms: median over `--repeats` groups of `--steps` steps, each of which needs the state of the one before. compile: seconds
of tracing and compiling, little where the compilation cache has the program. MFU: useful FLOPs (nsa.flops: visible
pairs alone, recomputation not counted) over the chip's published peak. floor: the least time of this device for those
FLOPs at the measured rate of a large product, plus, one after the other, the bytes that the optimizer cannot avoid
(weights, gradients and two moments, read and written in float32: 32 per parameter that learns) at the measured rate of
a large copy; "of floor" is floor / ms. vs dense: the dense step's time of the same model, batch and `--one_pass` over
this one's.
"""
from __future__ import annotations

import collections
import functools

from absl import flags

from benchmarks import models, timing
from launch import cli

_MODELS = flags.DEFINE_list("models", ["pilot"], f"Of {', '.join(models.MODELS)}.")
_METHODS = flags.DEFINE_list("methods", ["dense", "msa", "nsa"],
                             "dense, msa, nsa, gated, seer, dsa, dsa_token (of 2,048 tokens) or quest; NAME:MODE takes "
                             "a step of that mode.")
_BATCH = flags.DEFINE_list("batch", ["8x4096"], "SEQUENCESxTOKENS.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds that train as one program.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps per timed group.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Groups; the median counts.", lower_bound=1)
_IMPLEMENTATION = flags.DEFINE_string("implementation", "", "Of the attention operations; empty: the best one.")
_ONE_PASS = flags.DEFINE_list("one_pass", ["true"], "Config.one_pass: what stands between products in one pass each; "
                              "false,true times each row without and with it.")
_PROFILE = flags.DEFINE_boolean("profile", False, "Adds the device time by kind of kernel.")
_THREADS = flags.DEFINE_integer("threads", 8, "Programs that compile at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")
cli.define_common()


def _name(row) -> str:
  method = row["method"] + ("" if row["one_pass"] else ", XLA's")
  return f"{row['model']:<8} {method:<20} {row['batch']:<9}"


def _line(row) -> str:
  number = lambda name, form: f"{row[name]:{form}}" if row.get(name) is not None else "-"
  return (f"{_name(row)} {row['ms']:9.2f} "
          f"{row['tokens_per_second'] / 1e3:9.0f} {number('mfu', '.3f'):>6} {number('of_floor', '.2f'):>8} "
          f"{number('vs_dense', '.2f'):>8} {row['compile_seconds']:8.1f}")


def main():
  import jax
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  batches = [timing.numbers("--batch", text, "SEQUENCESxTOKENS", "8x4096") for text in _BATCH.value]
  if not set(_ONE_PASS.value) <= {"false", "true"}:
    raise ValueError(f"--one_pass={','.join(_ONE_PASS.value)}: take false, true, or false,true")
  how = _SEEDS.value, _IMPLEMENTATION.value
  plan = [(model, batch, method, one_pass, models.config_of(model, method, *batch, *how, one_pass))  # all checked first
          for model in _MODELS.value for batch in batches for method in _METHODS.value
          for one_pass in (value == "true" for value in _ONE_PASS.value)]
  device = jax.devices()[0]
  print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, seeds in a program: {_SEEDS.value}")
  print(f"{'model':<8} {'method':<20} {'batch':<9} {'ms':>9} {'ktok/s':>9} {'MFU':>6} {'of floor':>8} {'vs dense':>8} "
        f"{'compile':>8}")
  rows, dense = [], collections.defaultdict(lambda: None)
  made = models.compiled((functools.partial(models.Row, config, _PROFILE.value) for *_, config in plan), _THREADS.value)
  for (model, (sequences, tokens), method, one_pass, _), of in zip(plan, made):
    row = dict(model=model, method=method, batch=f"{sequences}x{tokens}", seeds=_SEEDS.value, one_pass=one_pass)
    try:
      one, programs = of()
      row.update(one.measure(programs, steps=_STEPS.value, repeats=_REPEATS.value))
    except Exception as error:  # a shape that is refused, memory, a compiler that gives up; other rows go on
      row["error"] = timing.of_error(error)
      print(f"{_name(row)} {row['error']}", flush=True)
    else:
      if method == "dense":
        dense[model, row["batch"], one_pass] = row["ms"]
      baseline = dense[model, row["batch"], one_pass]
      row["vs_dense"] = baseline and baseline / row["ms"]
      print(_line(row), flush=True)
      for kind, ms in row.get("kinds_ms", {}).items():
        print(f"    {kind:<34} {ms:9.3f} ms")
    rows.append(row)
    timing.write(_OUT.value, rows)


if __name__ == "__main__":
  cli.run(main)
