"""MSA against dense cuDNN attention at lengths where one call takes seconds and its arrays half the memory.

  XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 python -m benchmarks.long --tokens=262144,1048576 --out=long.json  # H200, 2 min
  python -m benchmarks.long --tokens=512 --tiny                          # on a CPU, to see that it runs

64/4 heads of 128, blocks of 128, J 16, index 4 x 128, bfloat16, one sequence. Rows: dense, forward and forward +
backward up to `--dense_backward` tokens; index top-k, that and selected attention (`msa_attention`), both forward; the
layer with its index KL, forward + backward. Arrays are drawn in pieces, since no draw has 2^31 numbers. ms: the median
of `--repeats` calls behind a first one; of dense one call alone, the first of its compiled program. What does not fit
says so, and the rest goes on.
"""
from __future__ import annotations

import dataclasses
import functools
import statistics
import time

from absl import flags
import jax
import jax.numpy as jnp

from benchmarks import cases, timing
from launch import cli
from pallas_kernels import arg_specs

_TOKENS = flags.DEFINE_list("tokens", ["262144", "1048576"], "Lengths.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Calls of a row; the median counts.", lower_bound=1)
_DENSE_BACKWARD = flags.DEFINE_integer("dense_backward", 262144, "Longest sequence of dense forward + backward.")
_TINY = flags.DEFINE_boolean("tiny", False, "Small heads in float32, dense by XLA.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")
cli.define_common()

PIECE = 65536  # tokens that are drawn at a time


def draw(spec, names):
  """The named arrays of `arg_specs.arrays`, standard normal, piece by piece."""
  shapes = dict(q=(spec.N, spec.H), k=(spec.K, spec.H), v=(spec.K, spec.H), do=(spec.N, spec.H),
                q_idx=(spec.K, spec.index_dim), k_idx=(spec.index_dim,))
  pieces, out = max(1, spec.T // PIECE), {}
  for i, name in enumerate(names):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0, impl="unsafe_rbg"), i), pieces)
    one = lambda key, shape=(spec.T // pieces, *shapes[name]): jax.random.normal(key, shape, jnp.dtype(spec.dtype))
    out[name] = jax.lax.map(one, keys).reshape(spec.B, spec.T, *shapes[name])
  return out


def rows_of(spec, dense):
  """[(name, case, whether gradients are taken, whether one call is all)]."""
  pairs = spec.B * spec.N * cases.causal_pairs(spec.T)
  of_dense = cases.Case(lambda x, blocks: dense(x["q"], x["k"], x["v"]), ("q", "k", "v"), ("q", "k", "v"),
                        (4 * spec.H * pairs, 14 * spec.H * pairs))
  out = [("dense", of_dense, False, True), *[("dense", of_dense, True, True)] * (spec.T <= _DENSE_BACKWARD.value)]
  for name, gradients in (("index_top_k", False), ("msa_attention", False), ("msa_layer", True)):
    out.append((name, cases.make(name, spec), gradients, False))
  return out


def measure(spec, case, gradients: bool, once: bool) -> dict:
  """The columns of a row."""
  make = jax.jit(functools.partial(draw, spec, [*case.uses, *(["do"] if gradients else [])]))
  program = cases.functions(case)[gradients].lower(jax.eval_shape(make), None).compile()
  x, times = jax.block_until_ready(make()), []
  for _ in range(1 if once else 1 + _REPEATS.value):
    began = time.perf_counter()
    jax.block_until_ready(program(x, None))
    times.append((time.perf_counter() - began) * 1e3)
  ms = times[0] if once else statistics.median(times[1:])
  memory = program.memory_analysis()
  return dict(ms=ms, calls=len(times), tflops=case.flops[gradients] / ms / 1e9,
              temporary_bytes=memory and memory.temp_size_in_bytes)


def main():
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  device, rows = jax.devices()[0], []
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True,
                            implementation=None if _TINY.value else "cudnn")
  base = arg_specs.get("tiny_g2" if _TINY.value else "msa_64k")
  print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
  for T in timing.counts("--tokens", _TOKENS.value):
    spec = dataclasses.replace(base, B=1, T=T, num_initial=0, num_local=1)
    for name, case, gradients, once in rows_of(spec, dense):
      row = dict(operation=name, T=T, part="forward + backward" if gradients else "forward",
                 device=device.device_kind, jax=jax.__version__)
      try:
        row.update(measure(spec, case, gradients, once))
        against = next((r.get("ms") for r in rows if name.startswith("msa") and r["operation"] == "dense"
                        and (r["T"], r["part"]) == (T, row["part"])), None)
        print(f"{name:<14} {T:>9,} {row['part']:<19} {row['ms']:10.1f} ms {row['tflops']:6.0f} TFLOP/s"
              + (f", dense takes {against / row['ms']:.1f} times as long" if against else ""), flush=True)
      except Exception as error:  # memory; the rest goes on
        row["error"] = timing.of_error(error)
        print(f"{name:<14} {T:>9,} {row['part']:<19} {row['error']}", flush=True)
      rows.append(row)
      timing.write(_OUT.value, rows)


if __name__ == "__main__":
  cli.run(main)
