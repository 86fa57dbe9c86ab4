"""The wall time of finished runs and studies by part, for benchmarks.study."""
from __future__ import annotations

import collections
from pathlib import Path


def of_run(run: Path) -> dict:
  """Seconds of one finished run by part; "rest" is imports, data, restoring, the last writes. evaluated: those that the
  device took for each run mode and split, a part of "evaluate"."""
  from nsa import config as config_lib, metrics
  config = config_lib.from_dict(metrics.read_json(run / "config.json"))
  per_step = config.data.global_batch * config.data.context
  records = [r for r in metrics.read_jsonl(run / "metrics.jsonl") if r["seed"] == config.seeds[0]]
  steps, before, speed = 0.0, config.fork.step if config.fork.workdir and not config.fork.reset else 0, None
  speeds = [r["tokens_per_second"] for r in records if r.get("tokens_per_second")]
  for record in records:
    speed = record.get("tokens_per_second") or speed or (speeds[0] if speeds else None)
    steps += (record["step"] - max(before, 0)) * per_step / speed if speed else 0.0
    before = record["step"]
  began, ended = ((run / name).stat().st_mtime for name in ("config.json", "DONE"))
  done = metrics.read_json(run / "DONE")
  paused = done.get("seconds_paused", {})
  wall = ended - began
  if wall < steps or wall <= 0:
    raise ValueError(f"--workdir: by the times of its files {run} took {wall:.0f} s, {steps:.0f} s of them steps: a "
                     "copy has no times of its own, take the study where it ran")
  return dict(run=run.name, wall=wall, began=began, ended=ended, steps=steps, **paused,
              rest=wall - steps - sum(paused.values()), evaluated=done.get("seconds_evaluated", {}))


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
