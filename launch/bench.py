"""Times an operation against cuDNN's dense attention on the device it runs on.

  python -m launch.bench --operation=selected_attention --out=results.json
  python -m launch.bench --shapes=study_8k_j16,headline_g4 --patterns=uniform
  python -m launch.bench --model --chip=v5p      # every operation, predicted from data sheets: no device

A row is a shape of `pallas_kernels.arg_specs` and a pattern of block indices.
Times are medians in milliseconds over `--repeats` groups of `--calls` calls, on
inputs that differ between calls. TFLOP/s count the visible tokens of the selected
blocks and nothing else: 4 H FLOPs per (query head, visible key) forward, 14 H
forward and backward. "vs dense" is the time of `jax.nn.dot_product_attention` with
implementation="cudnn" over the same queries and keys, causal, from the same run,
divided by ours; rows below 1.0 lose and are marked.
"""
from __future__ import annotations

import functools
import json
import statistics
import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from launch import cli
from launch import model_bench
import pallas_kernels
from pallas_kernels import arg_specs
from pallas_kernels import cost

PATTERNS = {
    "uniform": arg_specs.uniform,
    "neighbours80": functools.partial(arg_specs.neighbours, share=0.8),
    "stripes": arg_specs.stripes,
}

_OPERATION = flags.DEFINE_enum("operation", "selected_attention", ["selected_attention"], "What to time.")
_SHAPES = flags.DEFINE_list(
    "shapes", [spec.name for spec in arg_specs.HEADLINE + arg_specs.STUDY], "Names or prefixes.")
_PATTERNS = flags.DEFINE_list("patterns", list(PATTERNS), f"Of {', '.join(PATTERNS)}.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Name, or None for the best one.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")
_CALLS = flags.DEFINE_integer("calls", 4, "Calls per timed group.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Groups; the median counts.", lower_bound=1)
_MODEL = flags.DEFINE_boolean("model", False, "Predict the least times on --chip instead of measuring.")
_CHIP = flags.DEFINE_enum("chip", "v5p", list(cost.CHIPS), "For --model.")
_SEED = flags.DEFINE_integer("seed", None, "Of inputs and patterns; None takes the clock.")


def milliseconds(function, argument_sets, calls, repeats):
  """Median time of a call, in ms, over inputs that take turns; compilation excluded."""
  for arguments in argument_sets:
    jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    for i in range(calls):
      out = function(*argument_sets[i % len(argument_sets)])
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls * 1e3)
  return statistics.median(times)


def with_gradients(function):
  """function(q, k, v, ...) -> o to (q, k, v, do, ...) -> o, dq, dk, dv."""
  def both(q, k, v, do, *rest):
    o, vjp = jax.vjp(lambda q, k, v: function(q, k, v, *rest), q, k, v)
    return o, vjp(do)
  return jax.jit(both)


def visible_keys(indices, spec):
  """Keys that the queries of all KV heads see in their selected blocks."""
  position = np.arange(spec.T)[None, :, None, None]
  keys = np.clip(np.minimum(position + 1, spec.T) - indices * spec.block_size, 0, spec.block_size)
  return float(np.where(indices >= 0, keys, 0).sum(dtype=np.float64))


def time_dense(spec, seed, calls, repeats):
  """ms of cuDNN's causal attention, forward and forward + backward; None where it cannot run."""
  sets = [_inputs(spec, seed + i) for i in range(2)]
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  forward = jax.jit(lambda q, k, v, do: dense(q, k, v))
  try:
    return tuple(milliseconds(f, sets, calls, repeats) for f in (forward, with_gradients(dense)))
  except Exception as error:  # cuDNN is missing, or refuses the shape
    print(f"cudnn dense, {spec.name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return None, None


def _inputs(spec, seed):
  arrays = arg_specs.arrays(spec, seed)
  return tuple(arrays[name] for name in ("q", "k", "v", "do"))


def selected_functions(spec, implementation):
  """Jitted (q, k, v, do, blocks) -> o and -> o, dq, dk, dv; all patterns of a shape share them."""
  attend = lambda q, k, v, blocks: pallas_kernels.selected_attention(
      q, k, v, blocks, block_size=spec.block_size, implementation=implementation)[0]
  return jax.jit(lambda q, k, v, do, blocks: attend(q, k, v, blocks)), with_gradients(attend)


def time_selected(spec, pattern, functions, seed, calls, repeats):
  """One row: ms and TFLOP/s of `pallas_kernels.selected_attention`."""
  indices = [PATTERNS[pattern](spec, seed=seed + i) for i in range(2)]
  sets = [(*_inputs(spec, seed + i), jnp.asarray(indices[i], jnp.int32)) for i in range(2)]
  forward, both = (milliseconds(function, sets, calls, repeats) for function in functions)
  pairs = np.mean([visible_keys(i, spec) for i in indices]) * spec.G
  return dict(
      shape=spec.name, pattern=pattern, forward_ms=forward, both_ms=both,
      forward_tflops=4 * spec.H * pairs / forward / 1e9, both_tflops=14 * spec.H * pairs / both / 1e9,
      B=spec.B, T=spec.T, N=spec.N, K=spec.K, H=spec.H, J=spec.J, block_size=spec.block_size,
      dtype=spec.dtype)


def _line(row):
  ratio = lambda name: "   n/a" if row[name] is None else f"{row[name]:5.2f}x"
  losing = [part for part in ("forward", "both") if row[f"{part}_vs_dense"] and row[f"{part}_vs_dense"] < 1]
  return (f"{row['shape']:<16} {row['pattern']:<13} {row['forward_ms']:9.3f} {row['both_ms']:9.3f} "
          f"{row['forward_tflops']:8.1f} {row['both_tflops']:8.1f}   {ratio('forward_vs_dense')}  "
          f"{ratio('both_vs_dense')}{'   LOSES: ' + ', '.join(losing) if losing else ''}")


def main():
  names = []
  for name in _SHAPES.value:
    found = [known for known in arg_specs.ALL if known == name or known.startswith(name + "_")]
    if not found:
      raise ValueError(f"--shapes: {name!r} is unknown; take some of {', '.join(arg_specs.ALL)}")
    names += found
  unknown = [pattern for pattern in _PATTERNS.value if pattern not in PATTERNS]
  if unknown:
    raise ValueError(f"--patterns: {unknown[0]!r} is unknown; take some of {', '.join(PATTERNS)}")
  if _MODEL.value:
    return model_bench.main(names, {name: PATTERNS[name] for name in _PATTERNS.value}, _CHIP.value, _OUT.value)
  seed = int(time.time()) % 1_000_000 if _SEED.value is None else _SEED.value
  device = jax.devices()[0]
  print(f"{_OPERATION.value} on {device.device_kind} ({device.platform}), jax {jax.__version__}, seed {seed}")
  print(f"{'shape':<16} {'pattern':<13} {'ms fwd':>9} {'ms f+b':>9} {'TF/s fwd':>8} {'TF/s f+b':>8}   "
        "vs dense: fwd, f+b")
  rows = []
  for name in dict.fromkeys(names):
    spec = arg_specs.get(name)
    dense_forward, dense_both = time_dense(spec, seed, _CALLS.value, _REPEATS.value)
    functions = selected_functions(spec, _IMPLEMENTATION.value)
    for pattern in _PATTERNS.value:
      row = time_selected(spec, pattern, functions, seed, _CALLS.value, _REPEATS.value)
      row.update(
          operation=_OPERATION.value, device=device.device_kind, jax=jax.__version__, seed=seed,
          dense_forward_ms=dense_forward, dense_both_ms=dense_both,
          forward_vs_dense=dense_forward and dense_forward / row["forward_ms"],
          both_vs_dense=dense_both and dense_both / row["both_ms"])
      rows.append(row)
      print(_line(row), flush=True)
      if _OUT.value:  # after each row: what was measured stays if a later shape fails
        with open(_OUT.value, "w") as file:
          json.dump(rows, file, indent=1)
  losing = [row for row in rows if any((row[f"{part}_vs_dense"] or 1) < 1 for part in ("forward", "both"))]
  print(f"{len(losing)} of {len(rows)} rows lose to dense cuDNN somewhere")


if __name__ == "__main__":
  cli.run(main)
