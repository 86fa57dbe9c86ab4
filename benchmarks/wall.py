"""The wall time of finished runs and studies by part, for benchmarks.study."""
from __future__ import annotations

import collections
from pathlib import Path

import numpy as np

from nsa import progress


def of_run(run: Path) -> dict:
  """Seconds of one finished run by part; "rest" is imports, data, restoring, the last writes. evaluated: those that the
  device took for each run mode and split, a part of "evaluate"."""
  from nsa import config as config_lib, metrics
  config = config_lib.from_dict(metrics.read_json(run / "config.json"))
  per_step = config.data.global_batch * config.data.context
  records = [r for r in metrics.read_jsonl(run / "metrics.jsonl") if r["seed"] == config.seeds[0]]
  steps = in_steps(records, max(config.fork.step, 0) if config.fork.workdir and not config.fork.reset else 0, per_step)
  began, ended = ((run / name).stat().st_mtime for name in ("config.json", "DONE"))
  done = metrics.read_json(run / "DONE")
  paused = done.get("seconds_paused", {})
  wall = ended - began
  if wall < steps or wall <= 0:
    raise ValueError(f"--workdir: by the times of its files {run} took {wall:.0f} s, {steps:.0f} s of them steps: a "
                     "copy has no times of its own, take the study where it ran")
  return dict(run=run.name, wall=wall, began=began, ended=ended, steps=steps, **paused,
              rest=wall - steps - sum(paused.values()), evaluated=done.get("seconds_evaluated", {}))


def in_steps(records: list[dict], first: int, per_step: int, window: float = progress.WINDOW) -> float:
  """Seconds of training from step `first` to the last record of one seed, pauses left out.

  per_step: tokens of a step. A record's tokens_per_second is the mean over the last `window` seconds of training, or
  over all there were since the run began or went on (its `seconds` then fall): that many tokens before, training was
  that much younger.
  """
  total, start, before = 0.0, first, {}
  steps, ages = [start], [0.0]  # since the run began or went on
  for record in records:
    if record.get("seconds", 0.0) < before.get("seconds", 0.0):
      total, start = total + ages[-1], before["step"]
      steps, ages = [start], [0.0]
    before = record
    if not (speed := record.get("tokens_per_second")):
      continue
    looked_back = min((record["step"] - start) * per_step / speed, window)
    ages.append(float(np.interp(record["step"] - looked_back * speed / per_step, steps, ages)) + looked_back)
    steps.append(record["step"])
  return total + ages[-1]


def table(workdir: Path) -> list[dict]:
  """A row per finished run and, last, one of the whole. Raises ValueError if nothing is finished, or in a copy that
  lost its files' times."""
  runs = [of_run(path.parent) for path in sorted(workdir.rglob("DONE"))]
  if not runs:
    raise ValueError(f"--workdir={workdir}: no finished run below it (a DONE file)")
  whole, evaluated = collections.Counter(), collections.Counter()
  for run in runs:
    whole.update({name: x for name, x in run.items() if isinstance(x, float) and name not in ("began", "ended")})
    evaluated.update(run["evaluated"])
  whole.update({"wall": max(r["ended"] for r in runs) - min(r["began"] for r in runs) - whole["wall"]})
  rows = [*runs, dict(whole, run="the study", evaluated=dict(evaluated))]
  return [dict(row, share_in_steps=row["steps"] / row["wall"]) for row in rows]
