"""The table of `python -m benchmarks.kernels --model`: what kernels cannot be faster than, from data sheets.

Nothing is run and no device is touched. Rows are shapes and operations; `bound` is what takes most of the time.
Where experiments/results has measurements of the chip, they stand beside the predictions with the ratio.
"""
from __future__ import annotations

import json
import pathlib

from benchmarks import timing
from pallas_kernels import arg_specs, cost

MEASURED = pathlib.Path(__file__).parent.parent / "experiments" / "results" / "kernels"


def rows(spec, chip, patterns):
  """One dict per operation, of selected attention per pattern {name: function of the spec}."""
  for operation in cost.OPERATIONS:
    selected = operation == "selected_attention"
    for pattern, draw in (patterns.items() if selected else [("", None)]):
      indices = draw(spec) if selected else None
      forward = cost.predict(operation, spec, chip, indices=indices)
      both = None
      if not operation.endswith("top_k"):
        both = cost.predict(operation, spec, chip, indices=indices, backward=True)
      parts = [forward] if both is None else [forward, both]
      yield dict(
          predicted=True, chip=chip.name, operation=operation, shape=spec.name, pattern=pattern,
          forward_ms=forward.seconds * 1e3, forward_bound=forward.bound,
          both_ms=None if both is None else (forward.seconds + both.seconds) * 1e3,
          both_bound=None if both is None else both.bound,
          teraflop=sum(p.total("flops") for p in parts) / 1e12, gigabytes=sum(p.total("bytes") for p in parts) / 1e9,
          copies=sum(p.total("copies") for p in parts), on_chip_bytes=max(p.most("on_chip") for p in parts),
          smem_bytes=max(p.most("smem") for p in parts))


def measured(chip):
  """{(operation, shape, pattern): (forward ms, forward and backward ms)} of a chip."""
  path = MEASURED / f"selected_attention_{chip.name}.json"
  found = {}
  for row in json.loads(path.read_text()) if path.exists() else []:
    found["selected_attention", row["shape"], row["pattern"]] = row["forward_ms"], row["both_ms"]
    found["attention", row["shape"], ""] = row["dense_forward_ms"], row["dense_both_ms"]
  return found


def main(names, patterns, chip_name, out=None):
  """Prints the table for shapes by name and, with `out`, writes its rows as JSON."""
  chip = cost.CHIPS[chip_name]
  known = measured(chip)
  print(f"PREDICTED for {chip.name}, the least time by data sheet ({chip.flops / 1e12:.0f} TFLOP/s bfloat16, "
        f"{chip.bandwidth / 1e9:.0f} GB/s): nothing was run")
  print(f"{'operation':<21} {'shape':<16} {'pattern':<13} {'ms fwd':>8} {'bound':<12} {'ms f+b':>8} "
        f"{'bound of bwd':<12} {'TFLOP':>7} {'GB':>7} {'copies':>9} {'on chip':>8}"
        + ("   measured fwd, f+b (predicted / measured)" if known else ""))
  table = []
  for name in dict.fromkeys(names):
    for row in rows(arg_specs.get(name), chip, patterns):
      table.append(row)
      both = "" if row["both_ms"] is None else f"{row['both_ms']:.3f}"
      line = (f"{row['operation']:<21} {row['shape']:<16} {row['pattern']:<13} {row['forward_ms']:8.3f} "
              f"{row['forward_bound']:<12} {both:>8} {row['both_bound'] or '':<12} {row['teraflop']:7.2f} "
              f"{row['gigabytes']:7.2f} {row['copies']:9.0f} {row['on_chip_bytes'] / 2**20:6.1f}Mi")
      clock = known.get((row["operation"], name, row["pattern"]))
      if clock:
        row["measured_forward_ms"], row["measured_both_ms"] = clock
        line += (f"   {clock[0]:.3f}, {clock[1]:.3f} ({row['forward_ms'] / clock[0]:.2f}, "
                 f"{row['both_ms'] / clock[1]:.2f})")
      print(line, flush=True)
  timing.write(out, table)
