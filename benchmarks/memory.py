r"""What a step with Titans' memory costs, and what the memory alone costs.

  python -m benchmarks.memory --out=memory.jsonl                                   # minutes of one GPU
  python -m benchmarks.memory --steps= --layers=4096/128,4096/16 --products=bfloat16
  JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
      python -m benchmarks.memory --tiny --steps=native_mag --layers=4096/128      # on a CPU, to see that it runs

--steps names arms of experiments/titans.py: the train step of their last stage, their size, one seed. --layers
names TOKENS/CHUNK pairs: the memory of one layer alone (writing and reading with q, k, v and gates given), as many
sequences as make --tokens, forward and forward + backward; the first of them also with recompute = False.

All is compiled before anything is timed. Each row is printed as it is measured and appended to --out, a JSON object a
line. ms: median over groups of calls. tflops: useful FLOPs (`Titans.memory_costs`; backward twice the forward) over ms.
chunks: steps that have to follow one another. implementation: null, the kernels of pallas_kernels/memory.py where they
serve, or "reference", the scan.
"""
from __future__ import annotations

import dataclasses
import functools
import json

from absl import flags

from launch import cli

_STEPS = flags.DEFINE_list("steps", ["dense", "window_equal", "window", "native", "native_mag", "native_mal"],
                           "Arms of experiments/titans.py whose train steps are timed.")
_LAYERS = flags.DEFINE_list("layers", ["4096/128", "4096/64", "4096/256", "16384/128", "16384/256", "4096/16"],
                            "TOKENS/CHUNK of the memory alone.")
_PRODUCTS = flags.DEFINE_list("products", ["bfloat16"], "Of the memory alone: bfloat16, float32.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["best", "reference"], "Of the memory alone: best, reference.")
_TOKENS = flags.DEFINE_integer("tokens", 32_768, "Of all sequences of the memory alone.", lower_bound=1)
_ARGUMENTS = flags.DEFINE_string("arguments", "", "Of experiments/titans.py, e.g. chunk=64.")
_TINY = flags.DEFINE_boolean("tiny", False, "Shapes that a CPU can take.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Groups; the median counts.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 8, "Programs that compile at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "File for the rows.")
cli.define_common()


def main():
  import jax

  from benchmarks import models, timing
  from experiments import titans
  from nsa import flops
  from nsa.config import ForkConfig
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  tiny = "tiny=true,context=256,batch=2,chunk=32" if _TINY.value else ""
  study = titans.get_config(",".join(filter(None, (tiny, _ARGUMENTS.value))))
  arms = {config.arm: config for config in study.arms}
  if unknown := [name for name in _STEPS.value if name not in arms]:
    raise ValueError(f"--steps: {unknown[0]!r} is no arm of experiments/titans.py; take some of {', '.join(arms)}")
  pairs = [timing.numbers("--layers", text, "TOKENS/CHUNK", "4096/128") for text in _LAYERS.value]
  total = _TOKENS.value
  if _TINY.value:
    pairs, total = [(tokens // 16, chunk // 4) for tokens, chunk in pairs], 512
  device, memory = jax.devices()[0], arms["native_mag"]
  print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)

  def step_of(name):
    plan = arms[name].schedule
    own = dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[-1], fraction=1.0)])  # a retrofit's own
    return models.Row(dataclasses.replace(arms[name], seeds=(1,), schedule=own, fork=ForkConfig()))

  def layer_of(tokens, chunk, products, recompute, implementation):
    options = dataclasses.replace(memory.attention, chunk=chunk, products=products, recompute=recompute)
    return models.MemoryLayer(memory.model, options, max(1, total // tokens), tokens,
                              None if implementation == "best" else implementation)

  def measure(one, compiled):
    if isinstance(one, models.MemoryLayer):
      return dict(row="layer", **one.measure(compiled, _REPEATS.value))
    row, what = one.measure(compiled, steps=2 if _TINY.value else 8, repeats=_REPEATS.value), one.config
    return dict(row="step", arm=what.arm, tokens=what.data.context, sequences=what.data.global_batch,
                forward_flops_per_token=sum(flops.forward(what, what.data.context, one.what.mode).values()),
                tflops=row["useful_tflop"] / row["ms"] * 1e3, **row)

  layers = [(tokens, chunk, products, True, implementation) for products in _PRODUCTS.value
            for implementation in _IMPLEMENTATIONS.value for tokens, chunk in pairs]
  layers[1:1] = [(*layers[0][:3], False, layers[0][4])] if layers else []
  made = {f"step of {name}": functools.partial(step_of, name) for name in _STEPS.value}
  made |= {"layer {}/{} {} recompute={} {}".format(*what): functools.partial(layer_of, *what) for what in layers}
  for label, one in zip(made, models.compiled(made.values(), _THREADS.value)):
    try:
      row = measure(*one())
    except Exception as error:  # a shape that is refused, memory, a compiler that gives up; other rows go on
      row = dict(row="failed", what=label, error=timing.of_error(error))
    row |= dict(device=device.device_kind, jax=jax.__version__)
    print(json.dumps({n: float(f"{x:.4g}") if isinstance(x, float) else x for n, x in row.items()}), flush=True)
    if _OUT.value:  # after each row: what was measured stays if a later one fails
      with open(_OUT.value, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
  cli.run(main)
