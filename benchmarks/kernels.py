"""Times operations, whole layers and decoding against cuDNN's dense attention on the device it runs on.

  python -m benchmarks.kernels --operation=selected_attention --out=results.json
  python -m benchmarks.kernels --shapes=study_8k_j16,headline_g4 --patterns=uniform,file:selections.npz@3
  python -m benchmarks.kernels --shapes=study_4k_j16 --implementation=mosaic_gpu:union,mosaic_gpu:gather
  python -m benchmarks.kernels --operation=all --shapes=length,headline_g16,msa --out=results.json --plot=results.png
  python -m benchmarks.kernels --operation=decode,decode_paged --shapes=length_64k,msa_64k --batches=1,8,64
  python -m benchmarks.kernels --operation=decode,decode_paged --shapes=cache --batches=1,8

A row is an operation, a shape of `pallas_kernels.arg_specs`, a pattern of block indices where those come from outside
(benchmarks/cases.py), and an implementation. `file:PATH` or `file:PATH@LAYER` takes the lists of a trained model that
launch.dump_selections wrote.

Times are medians in milliseconds over `--repeats` groups of `--calls` calls, on inputs that differ between calls.
TFLOP/s count useful work. "limit" is what the device could do at best, the larger of useful FLOPs and unavoidable bytes
over the rates in `timing.CEILINGS`, divided by the time. "vs dense" is the time of cuDNN's causal attention over the
same queries and keys, from the same run, divided by ours; rows below 1.0 lose and are marked. The last lines say from
which length on an operation wins. Rows of the implementations `fla` and `cudnn_nsa` are kernels of
flash-linear-attention and cudnn-frontend in the same run, on the same block lists, where these packages are installed
(benchmarks/peer.py); what they refuse is said.
"""
from __future__ import annotations

import contextlib
import functools
import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, peer, timing
from launch import cli
from pallas_kernels import arg_specs, cudnn
from pallas_kernels.mosaic_gpu import shared_blocks

ALGORITHMS = {"union": True, "gather": False}  # of mosaic_gpu: common blocks get a pass of their own, or none

_OPERATION = flags.DEFINE_list("operation", ["selected_attention"],
                               f"Of {', '.join((*cases.OPERATIONS, *cases.DECODE_KINDS))}, or all.")
_SHAPES = flags.DEFINE_list(
    "shapes", [spec.name for spec in arg_specs.HEADLINE + arg_specs.STUDY], "Names or prefixes.")
_PATTERNS = flags.DEFINE_list("patterns", list(cases.PATTERNS),
                              f"Of {', '.join(cases.PATTERNS)}, or file:PATH@LAYER.")
_IMPLEMENTATION = flags.DEFINE_list("implementation", [""], "Names; the empty one is the best one, fastest the best "
                                    "one if gradients may differ in last bits. mosaic_gpu:union and "
                                    "mosaic_gpu:gather force one of selected_attention's two algorithms.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Sequences of a decoding step.")
_CHAIN = flags.DEFINE_enum("chain", "fed", cases.CHAINS, "What makes a decoded token wait for the one before: its "
                           "result is the next q, or 0 times the result is added to q, by a kernel more.")
_PEERS = flags.DEFINE_boolean("peers", True, "Times other packages too, where they are installed.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")
_PLOT = flags.DEFINE_string("plot", None, "Picture of the speed-up over the length.")
_CALLS = flags.DEFINE_integer("calls", 4, "Calls per timed group.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Groups; the median counts.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Of inputs and patterns; None takes the clock.")


def _try(what, function):
  try:
    return function()
  except Exception as error:  # memory, a shape that an implementation refuses; other rows go on
    print(f"{what}: {timing.of_error(error)}", file=sys.stderr)
    return None


def time_dense(spec, seed):
  """ms of cuDNN's causal attention, forward and forward + backward; None where it cannot run."""
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  case = cases.Case(lambda x, blocks: dense(x["q"], x["k"], x["v"]), (), ("q", "k", "v"), (0.0, 0.0))
  sets = [(cases.arrays(spec, seed + i), None) for i in range(2)]
  return _try(f"cudnn dense, {spec.name}", lambda: _times(cases.functions(case), sets)) or (None, None)


def time_case(operation, spec, pattern, implementation, seed):
  """Columns of a row: ms, TFLOP/s and the fraction of the limit, forward and with gradients."""
  spec, sets, keys = cases.at(operation, spec), [], []
  implementation, _, algorithm = (implementation or "").partition(":")
  patterned = cases.make(operation, spec).patterned
  for i in range(2):
    blocks = cases.draw_pattern(pattern, spec, seed + i) if patterned else None
    keys += [cases.visible_keys(blocks, spec)] if patterned else []
    sets.append((cases.arrays(spec, seed + i), None if blocks is None else jnp.asarray(blocks, jnp.int32)))
  case = cases.make(operation, spec, implementation or None, float(np.mean(keys)) if patterned else None)
  with shared_blocks.override(ALGORITHMS[algorithm]) if algorithm else contextlib.nullcontext():
    least = cases.least_bytes(case, sets[0][0], jax.eval_shape(case.function, *sets[0]))
    return _columns(case, _times(cases.functions(case), sets), least)


def peer_columns(operation, spec, found):
  """The same columns for what benchmarks.peer measured, whose times and visible keys leave `found`."""
  times, keys = (found.pop("forward_ms"), found.pop("both_ms")), found.pop("keys")
  case = cases.make(operation, spec, keys=keys)
  x = jax.eval_shape(lambda: cases.arrays(cases.at(operation, spec), 0))
  lists = jax.ShapeDtypeStruct((spec.B, spec.T, spec.K, spec.J), jnp.int32)
  return _columns(case, times, cases.least_bytes(case, x, jax.eval_shape(case.function, x, lists)))


def _times(functions, sets):
  return [None if f is None else timing.milliseconds(f, sets, _CALLS.value, _REPEATS.value) for f in functions]


def _columns(case, times, least):
  flop_rate, byte_rate = timing.CEILINGS.get(jax.devices()[0].device_kind, (None, None))
  row = {}
  for part, ms, flops, data in zip(("forward", "both"), times, case.flops, least):
    limit = None if ms is None or flop_rate is None else max((flops or 0) / flop_rate, data / byte_rate) * 1e3
    row |= {f"{part}_ms": ms, f"{part}_tflops": ms and flops and flops / ms / 1e9, f"{part}_limit_ms": limit,
            f"{part}_of_limit": limit and limit / ms}
  return row


def time_decode(operation, spec, batch, implementation):
  chain = _CHAIN.value
  case, x = cases.decode(operation, spec, batch, implementation, chain)
  time_of = lambda f: _times([jax.jit(f)], [(x, None)])[0] / cases.DECODE_STEPS
  row = _columns(case, (time_of(case.function), None), (case.bytes, None))
  return row, _try(f"cudnn decode, {spec.name}", lambda: time_of(functools.partial(cases.dense_decode, chain=chain)))


def _line(row):
  number = lambda name, form, width: f"{row[name]:{form}}" if row[name] is not None else " " * (width - 1) + "-"
  losing = [part for part in ("forward", "both") if row[f"{part}_vs_dense"] and row[f"{part}_vs_dense"] < 1]
  return (f"{row['operation']:<21} {row['shape']:<13} {row['pattern']:<12} {row['implementation']:<10} "
          f"{number('forward_ms', '9.3f', 9)} {number('both_ms', '9.3f', 9)} {number('forward_tflops', '6.0f', 6)} "
          f"{number('both_tflops', '6.0f', 6)} {number('forward_of_limit', '6.2f', 6)} "
          f"{number('both_of_limit', '6.2f', 6)} {number('forward_vs_dense', '7.2f', 7)} "
          f"{number('both_vs_dense', '7.2f', 7)}{'  LOSES: ' + ', '.join(losing) if losing else ''}")


def crossovers(rows):
  """Lines: per operation, heads and pattern, the shortest measured length from which on it beats dense attention."""
  found = {}
  for row in rows:
    key = tuple(row[name] for name in ("operation", "pattern", "implementation", "N", "K", "H", "block_size", "J"))
    found.setdefault(key, []).append(row)
  lines = []
  for (operation, pattern, implementation, N, K, H, size, J), group in found.items():
    for part in ("forward", "both"):
      ratios = sorted((row["T"], row[f"{part}_vs_dense"]) for row in group if row[f"{part}_vs_dense"])
      if operation.startswith("decode") or len(ratios) < 2:
        continue
      losing = [T for T, ratio in ratios if ratio < 1]
      winning = [T for T, _ in ratios if not losing or T > max(losing)]
      start = f"from {min(winning):,} tokens" if winning else f"not up to {ratios[-1][0]:,} tokens"
      lines.append(f"{operation} {pattern} {implementation} {N}/{K} heads of {H}, block {size} x {J}, {part}: wins "
                   f"{start}{'' if losing else ' (the shortest measured)'}")
  return lines


def against_peer(rows):
  """Lines: what the other package takes over the fastest of ours, per operation, shape and pattern."""
  lines = []
  for row in (row for row in rows if row["implementation"] in peer.PEERS):
    same = lambda other: all(other[name] == row[name] for name in ("operation", "shape", "pattern"))
    ours = [other for other in rows if same(other) and other["implementation"] not in peer.PEERS]
    for part, words in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
      best = min((other[part] for other in ours if other[part]), default=None)
      if best and row[part]:
        lines.append(f"{row['operation']} {row['shape']} {row['pattern']}, {words}: {row['implementation']} "
                     f"{row[part]:.3f} ms, here {best:.3f} ms, {row[part] / best:.2f} times as fast")
  return lines


def plot(rows, path):
  """Speed-up over cuDNN's dense attention, by length."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
  groups = {}
  for row in rows:
    if not row["operation"].startswith("decode"):
      name = " ".join(filter(None, (row["operation"], row["pattern"], row["implementation"])))
      groups.setdefault((name, row["N"], row["K"], row["H"], row["block_size"], row["J"]), []).append(row)
  for ax, part in zip(axes, ("forward", "both")):
    for (name, N, K, H, size, J), group in groups.items():
      points = sorted((row["T"], row[f"{part}_vs_dense"]) for row in group if row[f"{part}_vs_dense"])
      if len(points) > 1:
        ax.plot(*zip(*points), marker="o", label=f"{name}, {N}/{K} of {H}, {J} blocks of {size}")
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="tokens",
           title={"forward": "forward", "both": "forward + backward"}[part])
    ax.set_xscale("log", base=2)
  axes[0].set_ylabel("times as fast as cuDNN dense")
  axes[1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def _names():
  names = []
  for name in _SHAPES.value:
    found = [known for known in arg_specs.ALL if known == name or known.startswith(name + "_")]
    if not found:
      raise ValueError(f"--shapes: {name!r} is unknown; take some of {', '.join(arg_specs.ALL)}")
    names += found
  return list(dict.fromkeys(names))


def _operations():
  known = (*cases.OPERATIONS, *cases.DECODE_KINDS)
  unknown = [name for name in _OPERATION.value if name not in (*known, "all")]
  if unknown:
    raise ValueError(f"--operation: {unknown[0]!r} is unknown; take some of {', '.join(known)}, or all")
  return known if "all" in _OPERATION.value else _OPERATION.value


def main():
  names, operations = _names(), _operations()
  known = cases.PATTERNS
  unknown = [name for name in _PATTERNS.value if name not in known and not name.startswith("file:")]
  if unknown:
    raise ValueError(f"--patterns: {unknown[0]!r} is unknown; take some of {', '.join(known)}, or file:PATH")
  unknown = [name for name in _IMPLEMENTATION.value if ":" in name and name.partition(":")[2] not in ALGORITHMS]
  if unknown:
    raise ValueError(f"--implementation: {unknown[0]!r} is unknown; an algorithm is one of {', '.join(ALGORITHMS)}")
  seed = int(time.time()) % 1_000_000 if _SEED.value is None else _SEED.value
  device = jax.devices()[0]
  peers = set(operations) & set(peer.OPERATIONS) if _PEERS.value else ()
  print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, seed {seed}", *(
      f"{name} {peer.missing(name) or ('is timed after the rest' if peers else 'is not asked for')}"
      for name in peer.PEERS), sep="; ")
  if cudnn.deterministic():
    print("XLA_FLAGS asks for determinism: the dense baseline is cuDNN's deterministic one")
  print(f"{'operation':<21} {'shape':<13} {'pattern':<12} {'implement.':<10} {'ms fwd':>9} {'ms f+b':>9} {'TF/s f':>6} "
        f"{'TF/s b':>6} {'lim f':>6} {'lim b':>6} {'vs f':>7} {'vs f+b':>7}")
  rows = []

  def record(operation, spec, pattern, implementation, columns, dense, **more):
    row = dict(operation=operation, shape=spec.name, pattern=pattern, implementation=implementation or "", **columns,
               dense_forward_ms=dense[0], dense_both_ms=dense[1], device=device.device_kind, jax=jax.__version__,
               seed=seed, B=spec.B, T=spec.T, N=spec.N, K=spec.K, H=spec.H, J=spec.J, block_size=spec.block_size,
               dtype=spec.dtype, **more)
    for part, ms in zip(("forward", "both"), dense):
      row[f"{part}_vs_dense"] = ms and row[f"{part}_ms"] and ms / row[f"{part}_ms"]
    rows.append(row)
    print(_line(row) + (f"  REFUSES: {row['refused']}" if row.get("refused") else ""), flush=True)
    timing.write(_OUT.value, rows)

  denses = {}
  for name in names:
    spec = arg_specs.get(name)
    dense = denses[name] = time_dense(spec, seed) if set(operations) - set(cases.DECODE_KINDS) else None
    for operation in operations:
      for implementation in (i or None for i in _IMPLEMENTATION.value):
        if operation in cases.DECODE_KINDS:
          for kind in cases.DECODE_KINDS[operation](spec):
            for batch in timing.counts("--batches", _BATCHES.value):
              timed = _try(f"{kind}, {name}", lambda: time_decode(kind, spec, batch, implementation))
              if timed:
                record(kind, spec, f"batch {batch}", implementation, timed[0], (timed[1], None), batch=batch,
                       chain=_CHAIN.value)
          continue
        for pattern in _PATTERNS.value if cases.make(operation, spec).patterned else ("",):
          columns = _try(f"{operation}, {name}", lambda: time_case(operation, spec, pattern, implementation, seed))
          if columns:
            record(operation, spec, pattern, implementation, columns, dense)
  for found in peer.measure(sorted(peers), names, _PATTERNS.value, seed, _CALLS.value, _REPEATS.value):
    operation, spec, pattern = found.pop("operation"), arg_specs.get(found.pop("shape")), found.pop("pattern")
    record(operation, spec, pattern, found.pop("implementation"), peer_columns(operation, spec, found),
           denses[spec.name], **found)
  losing = [row for row in rows if any((row[f"{part}_vs_dense"] or 1) < 1 for part in ("forward", "both"))]
  print(f"{len(losing)} of {len(rows)} rows lose to dense cuDNN somewhere", *crossovers(rows), *against_peer(rows),
        sep="\n")
  if _PLOT.value:
    plot(rows, _PLOT.value)


if __name__ == "__main__":
  cli.run(main)
