"""From evaluation records to one number per arm, size, seed and run mode.

Bits per byte are bits over bytes of all windows (a long window weighs more); exact match is the
mean over tasks of the mean over items. A seed that is not finite is left out, and said.
"""
from __future__ import annotations

import collections
import csv
import dataclasses
import math
from pathlib import Path
from typing import Iterable

import numpy as np

from nsa.report import statistics
from nsa.report.runs import Run, Study


@dataclasses.dataclass(frozen=True)
class Metric:
  """How an endpoint is written. `scale` turns the stored number into the written one."""
  name: str
  unit: str
  title: str
  lower_is_better: bool = True
  scale: float = 1.0
  digits: int = 4

  def text(self, value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
      return "-" if math.isnan(value) else ("+" if value > 0 else "-") + "infinity"
    return f"{value * self.scale:{'+' if signed else ''}.{self.digits}f}"

  def between(self, interval: statistics.Interval | None) -> str:
    return "-" if interval is None or not interval.bounded else (
        f"{self.text(interval.low, True)} to {self.text(interval.high, True)}")


METRIC = {m.name: m for m in (
    Metric("second_half_bits_per_byte", "bits/byte", "bits per byte, second half of the context"),
    Metric("bits_per_byte", "bits/byte", "bits per byte"),
    Metric("exact_match", "points", "exact match (mean over tasks, %)", False, 100.0, 1),
    Metric("answer_nll", "nats/token", "answer NLL"),
)}


@dataclasses.dataclass
class Row:
  """Endpoints of one arm, size, seed and run mode: a line of results.csv. NaN = not measured."""
  run: str
  arm: str
  size: str
  seed: int
  run_mode: str
  headline: bool                   # whether this run mode is the arm's own
  status: str                      # of the run: done | failed | unfinished
  split: str
  step: int
  bits_per_byte: float = math.nan
  second_half_bits_per_byte: float = math.nan
  exact_match: float = math.nan    # fraction
  answer_nll: float = math.nan     # nats per answer token
  windows: int = 0
  bytes: int = 0
  task_items: int = 0
  captured_mass: float = math.nan  # mean over layers
  oracle_mass: float = math.nan
  queries_limited: float = math.nan  # share of the queries with more blocks than they could take
  overlap: float = math.nan        # share of a query's blocks that the next one chose too, mean over layers
  tile_union: float = math.nan     # blocks of a tile of 128 query rows over those of one query, mean over layers
  tile_common: float = math.nan    # share of the choices on blocks that a third of the tile chose, mean over layers
  tokens: float = math.nan         # training tokens, cumulative
  flops: float = math.nan          # training FLOPs of this seed, cumulative
  tokens_per_second: float = math.nan  # of this seed, median over the logged steps of the last stage
  mfu: float = math.nan            # model FLOP/s utilisation, fraction, median over the same steps


def rows(study: Study) -> list[Row]:
  """All rows of all runs that have an evaluation; of two runs with the same key the later one counts."""
  found = {}
  for run in study.runs:
    for row in _run_rows(run) if run.rows is None else run.rows:
      key = (row.arm, row.size, row.seed, row.run_mode)
      # A finished run is never replaced by one that is not.
      if key in found and found[key].status == "done" and row.status != "done":
        continue
      if key in found and found[key].run != row.run and found[key].status == row.status:
        study.problems.append(f"`{row.run}` and `{found[key].run}` both have {', '.join(map(str, key))}: "
                              "the first named counts")
      found[key] = row
      if row.windows and not math.isfinite(row.bits_per_byte) and not math.isfinite(row.second_half_bits_per_byte):
        study.problems.append(f"`{row.run}`: seed {row.seed}, run {row.run_mode}: bits per byte is not "
                              "finite, left out")
  order = {a: i for i, a in enumerate(study.arms)}
  return sorted(found.values(), key=lambda r: (order.get(r.arm, 99), study.sizes.index(r.size)
                if r.size in study.sizes else 99, not r.headline, r.run_mode, r.seed))


def series(table: Iterable[Row], arm: str, size: str, run_mode: str, metric: str) -> dict[int, float]:
  """{seed: value} of the finished runs, finite values alone."""
  values = {r.seed: getattr(r, metric) for r in table
            if (r.arm, r.size, r.run_mode, r.status) == (arm, size, run_mode, "done")}
  return {s: v for s, v in values.items() if math.isfinite(v)}


OF_DOCUMENTS = ("bits_per_byte", "second_half_bits_per_byte")  # metrics that each document of the held-out text has


def documents(study: Study, arm: str, size: str, run_mode: str, metric: str) -> dict:
  """{(seed, document): (bits, bytes)} of a language metric; {} for any other."""
  if metric not in OF_DOCUMENTS:
    return {}
  weight = "bytes" if metric == "bits_per_byte" else "second_half_bytes"
  out = collections.defaultdict(lambda: [0.0, 0.0])
  for record in select(study, "language", arm, size, run_mode):
    value, count = number(record.get(metric)), number(record.get(weight))
    if math.isfinite(value) and count > 0:
      cell = out[record["seed"], record.get("document", "?")]
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
    if kind == "language":
      records = [r for r in records if r.get("split", "val") == _split(run)]
    out += records
  return out


def over_training(study: Study, arm: str, size: str) -> dict[tuple[int, int], float]:
  """{(seed, step): bits per byte of the second half of held-out windows} of the arm's own run mode, at every evaluation."""
  out = {}
  for run in study.finished:
    if (run.arm, run.size) == (arm, size):
      for step, records in run.text.items():
        by_seed = group(own_text(run, records), ("seed",), "second_half_bits_per_byte", "second_half_bytes")
        out.update({(seed, step): value for (seed,), value in by_seed.items() if seed not in run.diverged})
  return out


def own_text(run: Run, records: list[dict]) -> list[dict]:
  """Those of the run's own run mode and split."""
  return [r for r in records if r.get("run_mode") == run.headline_mode and r.get("split", "val") == _split(run)]


def illustrated(study: Study, size: str) -> list[tuple[str, dict]]:
  """(arm, record of selected blocks) to draw: the reference arm first, the same layer, head and document; at most three."""
  order = [a for a in [study.reference] + study.retrofits()[::-1] + study.arms if a in study.arms]
  chosen, same = [], None
  for arm in dict.fromkeys(order):
    heats = select(study, "heat", arm, size)
    heats = [r for r in heats if r.get("run_mode") == study.headline_mode(arm)] or heats
    where = {(r.get("layer"), r.get("kv_head"), r.get("document")): r
             for r in reversed(heats) if r.get("heat")}
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
  return [v for v in (getattr(r, name) for r in table) if math.isfinite(v)]


def number(value) -> float:
  """The value, or NaN for what is missing or no number."""
  return float(value) if isinstance(value, (int, float)) else math.nan


def write_csv(table: list[Row], path: Path) -> None:
  """One line per row; a number that was not measured is an empty cell."""
  names = [f.name for f in dataclasses.fields(Row)]
  with open(path, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for row in table:
      cells = [getattr(row, n) for n in names]
      writer.writerow(["" if isinstance(c, float) and math.isnan(c) else c for c in cells])


def read_csv(path: Path) -> list[Row]:
  """What `write_csv` wrote, to the last digit; a column that an older table lacks has its default. ValueError for any other file."""
  read = {"str": str, "int": int, "bool": lambda cell: cell == "True", "float": lambda cell: float(cell) if cell else math.nan}
  fields = dataclasses.fields(Row)
  needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
  return _lines_of(path, needed, lambda line: Row(**{f.name: read[f.type](line[f.name]) for f in fields if f.name in line}))


def _lines_of(path, needed, convert):
  """convert(line) of every line of a CSV file that has the columns `needed`; ValueError names file, line and fix."""
  with open(path, newline="") as file:
    reader = csv.DictReader(file)
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
      raise ValueError(f"{path}: has no column {missing[0]!r}; take it from the repository again")
    out = []
    for line in reader:
      try:
        out.append(convert(line))
      except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}, line {reader.line_num}: cannot be read ({error}); take it from the repository again") from None
  return out


LAYER = ("captured_mass", "oracle_mass", "block_recall", "score_recall", "entropy", "overlap", "tile_union", "tile_common",
         "queries_limited")        # columns of layers.csv


def write_layers(study: Study, path: Path) -> None:
  """The diagnostics of every layer at every evaluation, of each arm's own run mode (a dense arm's, and what it would choose)."""
  with open(path, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("arm", "size", "seed", "step", "run_mode", "layer") + LAYER)
    for run in study.runs:
      for step, records in sorted(run.layers.items()):
        for r in records:
          if r.get("run_mode") in (run.headline_mode, "block_topk") and r.get("arm", run.arm) == run.arm:
            writer.writerow([run.arm, run.size, r.get("seed"), step, r["run_mode"], r.get("layer")]
                            + ["" if math.isnan(v := number(r.get(n))) else f"{v:.4g}" for n in LAYER])


def read_layers(path: Path) -> dict[tuple[str, str], dict[int, list[dict]]]:
  """What `write_layers` wrote: {(arm, size): {step: records}}, in the order of the file. ValueError for any other file."""
  def convert(line):
    record = {"kind": "layer", "seed": int(line["seed"] or 0), "run_mode": line["run_mode"], "layer": int(line["layer"])}
    return (line["arm"], line["size"]), int(line["step"]), record | {n: float(line[n]) for n in LAYER if line.get(n)}

  out = collections.defaultdict(lambda: collections.defaultdict(list))
  for key, step, record in _lines_of(path, ("arm", "size", "seed", "step", "run_mode", "layer"), convert):
    out[key][step].append(record)
  return out


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
  if run.rows is not None:
    return list({r.seed: r.tokens_per_second for r in run.rows if math.isfinite(r.tokens_per_second)}.values())
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


def _run_rows(run: Run) -> list[Row]:
  lost = set(run.diverged)
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for record in run.records:
    seed = record.get("seed", run.seeds[0])
    if seed not in lost:
      mode = record.get("run_mode", run.headline_mode)
      groups[record.get("arm", run.arm), seed, mode][record["kind"]].append(record)
  out = []
  for (arm, seed, mode), kinds in groups.items():
    language = [r for r in kinds["language"] if r.get("split", "val") == _split(run)]
    row = Row(run.name, arm, run.size, seed, mode, mode == run.headline_mode, run.status, _split(run),
              run.eval_step or 0, windows=len(language), task_items=len(kinds["task"]))
    row.bytes = int(sum(number(r.get("bytes")) for r in language if math.isfinite(number(r.get("bytes")))))
    row.bits_per_byte = _ratio(language, "bits_per_byte", "bytes")
    row.second_half_bits_per_byte = _ratio(language, "second_half_bits_per_byte", "second_half_bytes")
    for name in ("exact_match", "answer_nll"):
      by_task = group(kinds["task"], ("task",), name)
      setattr(row, name, float(np.mean(list(by_task.values()))) if by_task else math.nan)
    for name in ("captured_mass", "oracle_mass", "queries_limited", "overlap", "tile_union", "tile_common"):
      by_layer = group(kinds["layer"], ("layer",), name)
      setattr(row, name, float(np.mean(list(by_layer.values()))) if by_layer else math.nan)
    curve = run.curves.get(seed)
    if curve is not None and len(curve["step"]):
      row.tokens, row.flops = _last(curve["tokens"]), _last(curve["flops"])
      row.tokens_per_second, row.mfu = speed(curve, "tokens_per_second"), speed(curve, "mfu")
    out.append(row)
  return out


def _ratio(records, value, weight):
  """Weighted mean over all windows. One that is not finite makes the whole not finite: it is not hidden.

  fsum, as sum() has other last digits from Python 3.12 on: a published table can be written again to the byte.
  """
  pairs = [(number(r.get(value)), number(r.get(weight))) for r in records if r.get(value) is not None]
  pairs = [(v, w) for v, w in pairs if not w <= 0]
  total = math.fsum(w for _, w in pairs)
  return math.fsum(v * w for v, w in pairs) / total if total else math.nan


def _split(run):
  """The split whose windows count: val where there is one."""
  splits = {r.get("split", "val") for r in run.records if r["kind"] == "language"}
  return "val" if not splits or "val" in splits else sorted(splits)[0]


def _last(x):
  finite = x[np.isfinite(x)]
  return float(finite[-1]) if len(finite) else math.nan
