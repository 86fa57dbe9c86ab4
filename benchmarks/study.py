"""Where the wall time of a finished study went: steps, compilation, evaluation, checkpoints, the rest.

  python -m benchmarks.study --workdir=runs/pilot --out=study.json

Read from what runs leave behind, nothing is run. Steps: by the speeds that records logged (compilation and evaluation
excluded). The other parts: DONE's `seconds_paused`; of evaluation, what the device took for
each run mode and split, greedy decoding left out: `seconds_evaluated`. Wall time of a run: from config.json to DONE by
their file times; a study's from its first config.json to its last DONE, reports excluded. Runs that were cut and went
on count their waiting, too: for a clean number take a study that ran in one go.
"""
from __future__ import annotations

from pathlib import Path

from absl import flags

from benchmarks import timing, wall
from launch import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "A study, or a folder with runs below it.", required=True)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")


def main():
  rows = wall.table(Path(_WORKDIR.value))
  others = ("run", "began", "ended", "share_in_steps", "evaluated")
  parts = list(dict.fromkeys(name for row in rows for name in row if name not in others))
  print(f"{'run':<32}" + "".join(f"{part:>12}" for part in parts) + f"{'in steps':>10}")
  for row in rows:
    numbers = "".join(f"{row.get(part, 0.0):12.1f}" for part in parts)
    print(f"{row['run']:<32}{numbers}{row['share_in_steps']:10.2f}")
  if evaluated := rows[-1]["evaluated"]:
    print("\nevaluation by run mode and split, seconds of the device and % of all wall time")
    host = rows[-1].get("evaluate", 0.0) - sum(evaluated.values())
    for name, seconds in (*sorted(evaluated.items(), key=lambda x: -x[1]), ("host, compiler, decoding", host)):
      print(f"{name:<32}{seconds:12.1f}{100 * seconds / rows[-1]['wall']:12.1f}")
  timing.write(_OUT.value, rows)


if __name__ == "__main__":
  cli.run(main)
