"""From evaluation records to one number per arm, size, seed, run mode and metric.

Bits per byte are bits over bytes of all windows (a long window weighs more); exact match is the
mean over tasks of the mean over items. A seed that is not finite is left out, and said. A metric may name a part:
"second_half_bits_per_byte:code" is of the corpus `code`, "far_exact_match:mqar" of the tasks of that family.
"""
from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import math
from pathlib import Path
import re
from typing import Iterable

import numpy as np

from nsa.records import LAYER, SCHEMA, mean, number
from nsa.report import statistics
from nsa.report.runs import Run, Study


@dataclasses.dataclass(frozen=True)
class Metric:
  """How an endpoint is written, and what its controls must show before it counts (gates.py).

  scale: turns the stored number into the written one. behind: what random blocks and sink + window must lose against
  dense attention. near: how far from it the oracle's blocks may be. gated_by: the metric whose controls speak for this
  one.
  """
  name: str
  kind: str                        # text | recall
  record: str                      # kind of record it is read from
  unit: str
  title: str
  lower_is_better: bool = True
  scale: float = 1.0
  digits: int = 4
  behind: float = 0.02
  near: float = 0.005
  gated_by: str = ""

  @property
  def heading(self) -> str:
    """The title at the beginning of a sentence."""
    return self.title[0].upper() + self.title[1:]

  def text(self, value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
      return "-" if math.isnan(value) else ("+" if value > 0 else "-") + "infinity"
    return f"{value * self.scale:{'+' if signed else ''}.{self.digits}f}"

  def with_interval(self, value: float, low: float, high: float, signed: bool = False) -> str:
    """A value and the ends of its interval."""
    return f"{self.text(value, signed)} ({self.text(low, signed)} to {self.text(high, signed)})"

  def between(self, interval: statistics.Interval | None) -> str:
    return "-" if interval is None or not interval.bounded else (
        f"{self.text(interval.low, True)} to {self.text(interval.high, True)}")


METRIC = {m.name: m for m in (
    Metric("second_half_bits_per_byte", "text", "language", "bits/byte", "bits per byte, second half of the context"),
    Metric("bits_per_byte", "text", "language", "bits/byte", "bits per byte"),
    Metric("ar_hit_nll", "text", "ar_hit", "nats/token", "NLL of tokens that complete an n-gram seen before",
           behind=0.1, near=0.02),
    Metric("exact_match", "recall", "task", "points", "exact match (mean over tasks, %)", False, 100.0, 1, near=0.02),
    Metric("far_exact_match", "recall", "task", "points", "exact match where the evidence is far (mean over tasks, %)",
           False, 100.0, 1, near=0.02),
    Metric("greedy_exact_match", "recall", "task", "points",
           "exact match, decoded greedily with the KV cache (mean over tasks, %)", False, 100.0, 1,
           gated_by="exact_match"),
    Metric("answer_nll", "recall", "task", "nats/token", "answer NLL", gated_by="exact_match"),
    Metric("far_answer_nll", "recall", "task", "nats/token", "answer NLL where the evidence is far",
           gated_by="far_exact_match"),
)}
_FIELD = {"ar_hit_nll": "nll"}     # where a record calls it otherwise


@functools.lru_cache(maxsize=None)
def metric(name: str) -> Metric:
  """The metric of "name" or "name:part"."""
  base, _, part = name.partition(":")
  found = METRIC[base]
  if not part:
    return found
  return dataclasses.replace(found, name=name, title=f"{part}: {found.title}",
                             gated_by=found.gated_by and f"{found.gated_by}:{part}")


def is_metric(name) -> bool:
  """Whether it names a metric, or a part of one."""
  return isinstance(name, str) and name.partition(":")[0] in METRIC


_COLUMNS = tuple(name for name, field in SCHEMA["layer"].items() if field.column)


@dataclasses.dataclass
class Row:
  """Endpoints of one arm, size, seed and run mode: a line of results.csv."""
  run: str
  arm: str
  size: str
  seed: int
  run_mode: str
  headline: bool                   # whether this run mode is the arm's own
  status: str                      # of the run: done | failed | unfinished
  split: str
  step: int
  # metrics, means over layers, tokens, flops, seconds, speed
  values: dict[str, float] = dataclasses.field(default_factory=dict)

  def __getitem__(self, name: str) -> float:
    """A metric, a mean over layers, or one of: bytes, windows, task_items; tokens and flops (training, cumulative, of
    this seed), tokens_per_second and mfu (medians of the last stage), seconds (tokens at that speed). NaN = not
    measured."""
    return self.values.get(name, math.nan)


def rows(study: Study) -> list[Row]:
  """All rows of all runs that have an evaluation; of two runs with the same key the later one counts."""
  found = {}
  unsolved = {size: {task for task, share in recall_of_dense(study, size).items() if share < study.solved}
              for size in study.sizes}
  for run in study.runs:
    for row in _run_rows(study, run, unsolved.get(run.size, set())):
      key = (row.arm, row.size, row.seed, row.run_mode)
      # A finished run is never replaced by one that is not.
      if key in found and found[key].status == "done" and row.status != "done":
        continue
      if key in found and found[key].run != row.run and found[key].status == row.status:
        study.problems.append(f"`{row.run}` and `{found[key].run}` both have {', '.join(map(str, key))}: "
                              "the first named counts")
      found[key] = row
      if (row["windows"] and not math.isfinite(row["bits_per_byte"])
          and not math.isfinite(row["second_half_bits_per_byte"])):
        study.problems.append(f"`{row.run}`: seed {row.seed}, run {row.run_mode}: bits per byte is not "
                              "finite, left out")
  order = {a: i for i, a in enumerate(study.arms)}
  return sorted(found.values(), key=lambda r: (order.get(r.arm, 99), study.sizes.index(r.size)
                if r.size in study.sizes else 99, not r.headline, r.run_mode, r.seed))


def series(table: Iterable[Row], arm: str, size: str, run_mode: str, metric: str) -> dict[int, float]:
  """{seed: value} of the finished runs, finite values alone."""
  values = {r.seed: r[metric] for r in table
            if (r.arm, r.size, r.run_mode, r.status) == (arm, size, run_mode, "done")}
  return {s: v for s, v in values.items() if math.isfinite(v)}


def recall_of_dense(study: Study, size: str) -> dict[str, float]:
  """{task: exact match} of the dense arm, a mean over its seeds and items."""
  records = select(study, "task", study.dense, size, study.headline_mode(study.dense))
  return {task: share for (task,), share in group(records, ("task",), "exact_match").items()}


def documents(study: Study, arm: str, size: str, run_mode: str, name: str) -> dict:
  """{(seed, document): (bits, bytes)} of a metric that each document of the held-out text has; {} for any other."""
  base, _, part = name.partition(":")
  if METRIC[base].record != "language":
    return {}
  weight = SCHEMA["language"][base].weight
  out = collections.defaultdict(lambda: [0.0, 0.0])
  for record in select(study, "language", arm, size, run_mode):
    value, count = number(record.get(base)), number(record.get(weight))
    if math.isfinite(value) and count > 0 and part in ("", record.get("corpus")):
      cell = out[record["seed"], (record.get("corpus", ""), record.get("document", "?"))]
      cell[0] += value * count
      cell[1] += count
  return dict(out)


def select(study: Study, kind: str, arm: str, size: str, run_mode: str | None = None) -> list[dict]:
  """The records of finished runs, of seeds that did not diverge."""
  out = []
  for run in study.finished:
    if run.size != size:
      continue
    lost = set(run.diverged)
    records = [r for r in run.records if r["kind"] == kind and r.get("seed", 0) not in lost
               and r.get("arm", run.arm) == arm and run_mode in (None, r.get("run_mode"))]
    out += [r for r in records if r.get("split", "val") == run.split] if kind == "language" else records
  return out


def over_training(study: Study, arm: str, size: str) -> dict[tuple[int, int], float]:
  """{(seed, step): bits per byte of the second half of held-out windows} as the arm attends at that step, at every
  evaluation."""
  out = {}
  for run in study.finished:
    if (run.arm, run.size) == (arm, size):
      for step, records in run.text.items():
        own = [r for r in records if r.get("run_mode") == run.mode_at(step) and r.get("split", "val") == run.split]
        by_seed = group(own, ("seed",), "second_half_bits_per_byte", "second_half_bytes")
        out.update({(seed, step): value for (seed,), value in by_seed.items() if seed not in run.diverged})
  return out


def recall_over_training(study: Study, arm: str, size: str) -> dict[tuple[int, int], float]:
  """{(seed, step): exact match, a mean over tasks} as the arm attends at that step, at every evaluation that asked
  tasks."""
  out = {}
  for run in study.finished:
    if (run.arm, run.size) == (arm, size):
      for step, records in run.tasks.items():
        own = [r for r in records if r.get("run_mode") == run.mode_at(step)]
        by_task = group(own, ("seed", "task"), "exact_match")
        for seed in {seed for seed, _ in by_task} - set(run.diverged):
          out[seed, step] = float(np.mean([value for (s, _), value in by_task.items() if s == seed]))
  return out


def illustrated(study: Study, size: str) -> list[tuple[str, dict]]:
  """(arm, record of selected blocks) to draw: the reference arm first, the same layer, head and document; at most
  three."""
  order = [a for a in [study.reference] + study.retrofits()[::-1] + study.arms if a in study.arms]
  chosen, same = [], None
  for arm in dict.fromkeys(order):
    heats = select(study, "heat", arm, size)
    heats = [r for r in heats if r.get("run_mode") == study.headline_mode(arm)] or heats
    where = {(r.get("layer"), r.get("kv_head"), r.get("document")): r for r in reversed(heats) if r.get("heat")}
    if where:
      same = same or next(reversed(where))
      if same in where:
        chosen.append((arm, where[same]))
  return chosen[:3]


def group(records: list[dict], keys: tuple[str, ...], value: str, weight: str | None = None) -> dict:
  """{(record[key], ...): weighted mean of record[value]}; missing and non-finite values are left out."""
  sums = collections.defaultdict(lambda: [0.0, 0.0])
  for record in records:
    v, w = number(record.get(value)), number(record.get(weight)) if weight else 1.0
    if math.isfinite(v) and w > 0:
      cell = sums[tuple(record.get(k) for k in keys)]
      cell[0] += v * w
      cell[1] += w
  return {k: total / count for k, (total, count) in sums.items()}


def quantity(value: float) -> str:
  """1234567 -> 1.23e6: three figures, for numbers over many orders of magnitude."""
  if not math.isfinite(value):
    return "-"
  return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e4 else (
      f"{value:.2e}".replace("e+0", "e").replace("e+", "e"))


def interval_text(metric: Metric, values: Iterable[float], show_n: bool = True) -> str:
  """mean ± half-width of the 95 % t interval (n); without ± where there is one seed."""
  values = list(values)
  if not values:
    return "-"
  i = statistics.t_interval(values)
  spread = f" ± {metric.text(i.half_width)}" if i.bounded else ""
  return f"{metric.text(i.mean)}{spread}" + (f" ({i.n})" if show_n else "")


def finite(table: Iterable[Row], name: str) -> list[float]:
  """The finite values of one column."""
  return [v for v in (r[name] for r in table) if math.isfinite(v)]


def write_csv(table: list[Row], path: Path) -> None:
  """results.csv: one line per row, 12 digits; a number that was not measured is an empty cell."""
  fixed = [f.name for f in dataclasses.fields(Row) if f.name != "values"]
  names = list(dict.fromkeys(name for row in table for name in row.values))
  with open(path, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(fixed + names)
    for row in table:
      writer.writerow([getattr(row, n) for n in fixed]
                      + ["" if math.isnan(row[n]) else f"{row[n]:.12g}" for n in names])


def write_layers(study: Study, path: Path) -> None:
  """layers.csv: the diagnostics of every layer at every evaluation, of each arm's own run mode (a dense arm's, and what
  it would choose)."""
  with open(path, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("arm", "size", "seed", "step", "run_mode", "corpus", "layer") + LAYER)
    for run in study.runs:
      for step, records in sorted(run.layers.items()):
        for r in records:
          if r.get("run_mode") in (run.headline_mode, "block_topk") and r.get("arm", run.arm) == run.arm:
            writer.writerow([run.arm, run.size, r.get("seed"), step, r["run_mode"], r.get("corpus"), r.get("layer")]
                            + ["" if math.isnan(v := number(r.get(n))) else f"{v:.4g}" for n in LAYER])


def speed(curve: dict[str, np.ndarray], name: str) -> float:
  """Median of a column of the metrics over the last stage, which is the arm's own; NaN without values."""
  x = curve[name][last_stage(curve)]
  return float(np.nanmedian(x)) if np.isfinite(x).any() else math.nan


def last_stage(curve: dict[str, np.ndarray]) -> np.ndarray:
  """bool[logged steps]; all of them where the stage was not logged."""
  stage = curve["stage"]
  return stage == stage[-1] if np.isfinite(stage[-1]) else np.ones(len(stage), bool)


def speeds(run: Run) -> list[float]:
  """Tokens per second of each seed over the last stage, as far as they are known."""
  found = [speed(c, "tokens_per_second") for c in run.curves.values() if len(c["step"])]
  return [s for s in found if math.isfinite(s)]


def visible_share(run: Run) -> float:
  """Share of a full context that the last query attends to, of the run's own mode; NaN where unknown."""
  if not run.config:
    return math.nan
  if run.headline_mode == "dense":
    return 1.0
  config = parsed(run.config)
  if config is None:
    return math.nan
  context = config.eval.context or config.data.context
  return min(1.0, config.attention.tokens_visible(context) / context)


def parsed(config: dict):
  """The nsa.config.Config of a config.json; None where it is none that can be read."""
  from nsa import config as config_lib  # here: it imports jax, which the statistics do without
  try:
    return config_lib.from_dict(config)
  except (ValueError, TypeError, KeyError, AttributeError):
    return None


def _run_rows(study: Study, run: Run, unsolved: set[str]) -> list[Row]:
  lost = set(run.diverged)
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for record in run.records:
    seed = record.get("seed", run.seeds[0])
    if seed not in lost:
      mode = record.get("run_mode", run.headline_mode)
      groups[record.get("arm", run.arm), seed, mode][record["kind"]].append(record)
  out = []
  for (arm, seed, mode), kinds in groups.items():
    kinds["language"] = [r for r in kinds["language"] if r.get("split", "val") == run.split]
    kinds["task"] = [r for r in kinds["task"] if r["task"] not in unsolved]
    row = Row(run.name, arm, run.size, seed, mode, mode == run.headline_mode, run.status, run.split, run.eval_step or 0)
    row.values = _metrics(study, kinds)
    row.values |= {"windows": sum(r.get("windows", 1) for r in kinds["language"]),
                   "task_items": sum(r.get("items", 1) for r in kinds["task"]),
                   "bytes": sum(n for r in kinds["language"] if math.isfinite(n := number(r.get("bytes"))))}
    for name in _COLUMNS:
      row.values[name] = _mean_over(kinds["layer"], "layer", name)
    curve = run.curves.get(seed)
    if curve is not None and len(curve["step"]):
      tokens, rate = _last(curve["tokens"]), speed(curve, "tokens_per_second")
      row.values |= {"tokens": tokens, "flops": _last(curve["flops"]), "seconds": tokens / rate,
                     "tokens_per_second": rate, "mfu": speed(curve, "mfu")}
    out.append(row)
  return out


def _metrics(study, kinds) -> dict[str, float]:
  """Every metric that the records have, as a whole and by part where there are several, and those that the study asks
  for."""
  names, asked = [], [e.metric for e in study.endpoints]
  for name, m in METRIC.items():
    of_kind = [r for r in kinds[m.record] if r.get(_FIELD.get(name, name)) is not None]
    parts = {_part(r) for r in of_kind}
    names += [name] if of_kind else []
    names += [f"{name}:{part}" for part in sorted(parts - {""})] if len(parts) > 1 else []
  out = {}
  for name in dict.fromkeys(names + asked + [metric(n).gated_by for n in asked if metric(n).gated_by]):
    base, _, part = name.partition(":")
    records = [r for r in kinds[METRIC[base].record] if part in ("", _part(r), r.get("task"))]
    if not records:
      continue
    field = _FIELD.get(base, base)
    out[name] = _mean_over(records, "task", field) if METRIC[base].record == "task" else mean(records, field)
  return out


def _part(record) -> str:
  """The corpus of a record of text, the family of a task's."""
  return re.split("[:@]", record["task"])[0] if "task" in record else record.get("corpus") or ""


def _mean_over(records, key, name) -> float:
  """The mean over the values of `key` of the means of their records; of what has a value."""
  by = collections.defaultdict(list)
  for record in records:
    if math.isfinite(number(record.get(name))):
      by[record.get(key)].append(record)
  values = [v for mine in by.values() if math.isfinite(v := mean(mine, name))]
  return math.fsum(values) / len(values) if values else math.nan


def _last(x):
  finite = x[np.isfinite(x)]
  return float(finite[-1]) if len(finite) else math.nan
