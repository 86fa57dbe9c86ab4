"""What a step with Titans' memory costs, what the memory alone costs, and what bounds it.

  python -m benchmarks.memory --out=memory.jsonl                                   # minutes of one GPU
  python -m benchmarks.memory --steps= --layers=4096/128,4096/16 --products=bfloat16
  python -m benchmarks.memory --tiny                                               # on a CPU, to see that it runs

--steps names arms of experiments/titans.py: the train step of their last stage, their size, one seed. --layers
names TOKENS/CHUNK pairs: the memory of one layer alone (writing and reading with q, k, v and gates given), as many
sequences as make --tokens, forward and forward + backward.

Each row is printed as it is measured and appended to --out, a JSON object a line. compiling: programs that
were still being compiled meanwhile, which makes times doubtful. ms: median over groups of calls.
tflops: useful FLOPs (`Titans.memory_costs`; backward twice the forward) over ms. chunks: steps that have to follow one
another. implementation: null, the kernels of pallas_kernels/memory.py where they serve, without a loop, or
"reference", the scan. kernels: of one chunk, forward and backward, counted in the compiled loops; chunk_us: ms over
chunks; us_per_kernel: chunk_us over kernels, near a launch where launches are the bound and far above it where
products or traffic are. state_gbs: the least traffic of the carried matrices over ms (read and written once a chunk;
with a backward pass also saved, read again, and so their gradients). gbs: what XLA reckons that the kernels of one
chunk, forward and backward, read and write, times chunks, over ms.
"""
from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import time

from absl import flags

from launch import cli

_STEPS = flags.DEFINE_list("steps", ["dense", "window_equal", "window", "native", "native_mag", "native_mal"],
                           "Arms of experiments/titans.py whose train steps are timed.")
_LAYERS = flags.DEFINE_list("layers", ["4096/128", "4096/64", "4096/256", "16384/128", "16384/256", "4096/16"],
                            "TOKENS/CHUNK of the memory alone.")
_PRODUCTS = flags.DEFINE_list("products", ["bfloat16"], "Of the memory alone: bfloat16, float32.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["best", "reference"], "Of the memory alone: best, reference.")
_KEEP = flags.DEFINE_boolean("keep", True, "Times the first of --layers with recompute = False too.")
_TOKENS = flags.DEFINE_integer("tokens", 32_768, "Of all sequences of the memory alone.", lower_bound=1)
_ARGUMENTS = flags.DEFINE_string("arguments", "", "Of experiments/titans.py, e.g. chunk=64.")
_TINY = flags.DEFINE_boolean("tiny", False, "Shapes that a CPU can take.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Groups; the median counts.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 8, "Programs that compile at a time.", lower_bound=1)
_SECONDS = flags.DEFINE_integer("seconds", 0, "What is not compiled after so many is left out; 0: all is measured.")
_OPTIONS = flags.DEFINE_list("compiler_options", [], "NAME=VALUE of XLA, for all programs: "
                             "xla_gpu_enable_triton_gemm=false.")
_OUT = flags.DEFINE_string("out", None, "File for the rows.")
cli.define_common()


def main():
  import jax

  from benchmarks import loops, models, timing
  from experiments import titans
  from nsa import flops
  from nsa.config import ForkConfig
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  tiny = "context=256,batch=2,chunk=32" if _TINY.value else ""
  study = titans.get_config(",".join(filter(None, (tiny, _ARGUMENTS.value))))
  arms = {config.arm: config for config in study.arms}
  if unknown := [name for name in _STEPS.value if name not in arms]:
    raise ValueError(f"--steps: {unknown[0]!r} is no arm of experiments/titans.py; take some of {', '.join(arms)}")
  pairs = [timing.numbers("--layers", text, "TOKENS/CHUNK", "4096/128") for text in _LAYERS.value]
  if _TINY.value:
    pairs = [(tokens // 16, chunk // 4) for tokens, chunk in pairs]
  device, began = jax.devices()[0], time.monotonic()
  print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)
  model, options = arms["native_mag"].model, {}
  for text in _OPTIONS.value:
    name, _, value = text.partition("=")
    try:
      options[name] = json.loads(value)
    except ValueError:
      raise ValueError(f"--compiler_options: {text!r}; take NAME=true, NAME=false or NAME=NUMBER") from None
  total = _TOKENS.value if not _TINY.value else 512

  def write(row):
    row |= dict(device=device.device_kind, jax=jax.__version__, **({"compiler_options": options} if options else {}))
    print(json.dumps({n: float(f"{x:.4g}") if isinstance(x, float) else x for n, x in row.items()}), flush=True)
    if _OUT.value:  # after each row: what was measured stays if a later one fails
      with open(_OUT.value, "a") as file:
        file.write(json.dumps(row) + "\n")

  def step_of(name):
    plan = arms[name].schedule
    own = dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[-1], fraction=1.0)])  # a retrofit's own
    return lambda: models.Row(dataclasses.replace(arms[name], seeds=(1,), schedule=own, fork=ForkConfig()))

  def layer_of(tokens, chunk, products, recompute, implementation):
    options = dataclasses.replace(arms["native_mag"].attention, chunk=chunk, products=products, recompute=recompute)
    return lambda: loops.MemoryLayer(model, options, max(1, total // tokens), tokens,
                                     None if implementation == "best" else implementation)

  def measure(one, compiled):
    if isinstance(one, loops.MemoryLayer):
      return one.measure(compiled, _REPEATS.value)
    row, what = one.measure(compiled, steps=2 if _TINY.value else 8, repeats=_REPEATS.value), one.config
    costs = flops.forward(what, what.data.context, one.what.mode)
    kept = {n: row[n] for n in ("ms", "ms_of_groups", "tokens_per_second", "useful_tflop", "mfu", "compile_seconds",
                                "temporary_bytes", "loss", "mode")}
    return dict(row="step", arm=what.arm, tokens=what.data.context, sequences=what.data.global_batch,
                forward_flops_per_token=sum(costs.values()), tflops=row["useful_tflop"] / row["ms"] * 1e3,
                kernels=loops.kernels(compiled[0].as_text()), **kept)

  layers = [(tokens, chunk, products, True, implementation) for products in _PRODUCTS.value
            for implementation in _IMPLEMENTATIONS.value for tokens, chunk in pairs]
  layers[1:1] = [(*layers[0][:3], False, layers[0][4])] if _KEEP.value and layers else []
  made = [(f"step of {name}", step_of(name)) for name in _STEPS.value]
  made += [("layer {}/{} {} recompute={} {}".format(*what), layer_of(*what)) for what in layers]
  compilers, work = concurrent.futures.ThreadPoolExecutor(_THREADS.value), []
  for label, make in made:
    try:
      one = make()
      work.append((label, one, compilers.submit(one.compile, options)))
    except Exception as error:  # a shape that an implementation refuses
      write(dict(row="failed", what=label, error=timing.of_error(error)))
  print(f"traced in {time.monotonic() - began:.0f} s", flush=True)
  # Nothing compiles while something is timed, unless that takes more than half of the time.
  concurrent.futures.wait([future for *_, future in work], timeout=0.5 * _SECONDS.value or None)
  while work:
    ready = [item for item in work if item[2].done()]
    left = _SECONDS.value - (time.monotonic() - began) if _SECONDS.value else None
    print(f"compiled {len(ready)} of {len(work)} in {time.monotonic() - began:.0f} s", flush=True)
    if not ready:
      if left is not None and left < 0:
        for label, *_ in work:
          write(dict(row="failed", what=label, error=f"not compiled within --seconds={_SECONDS.value}"))
        break
      concurrent.futures.wait([future for *_, future in work], left, concurrent.futures.FIRST_COMPLETED)
    for item in ready:
      work.remove(item)
      label, one, future = item
      try:
        write({**measure(one, future.result()), "compiling": sum(not f.done() for *_, f in work)})
      except Exception as error:  # memory, a compiler that gives up; other rows go on
        write(dict(row="failed", what=label, error=timing.of_error(error)))
  print(f"done in {time.monotonic() - began:.0f} s", flush=True)
  if work:
    os._exit(0)  # a compiler cannot be stopped otherwise


if __name__ == "__main__":
  cli.run(main)
