"""What stands behind the verdict: was sparsity on, how much of a gap is closed, where Delta comes from."""
from __future__ import annotations

import numpy as np

from nsa.report import statistics
from nsa.report import endpoints
from nsa.report.endpoints import METRIC, Row
from nsa.report.runs import Study

TRAINING_FREE = ("block_topk", "sink_window")  # run modes of the dense arm that a retrofit starts from


def controls(study: Study, table: list[Row]) -> list[str]:
  """Whether sparsity was on and mattered, in lines of text: without that a match says little."""
  notes, metric = [], METRIC[study.primary]
  if not study.reference:
    return notes
  for size in study.sizes:
    at = f"Size {size}: " if len(study.sizes) > 1 else ""
    for arm, mode, instead in ((study.reference, study.headline_mode(study.reference), "their own choice"),
                               (study.dense, "dense", "dense attention")):
      _, d = statistics.paired_differences(endpoints.series(table, arm, size, "random", study.primary),
                                           endpoints.series(table, arm, size, mode, study.primary))
      if not len(d):
        continue
      i = statistics.t_interval(d if metric.lower_is_better else -d)
      spread = f"95 % t interval {metric.between(i)}" if i.bounded else "1 seed"
      costs = (i.low if i.bounded else i.mean) > study.margin
      notes.append(f"{at}Random blocks cost {arm} {metric.text(i.mean, True)} {metric.unit} ({spread}) "
                   f"against {instead}: " + ("sparsity is on and the choice of blocks matters." if costs else
                      "**not shown to be more than the margin, so a match between arms says little here.**"))
    notes += _anchor(study, table, size, at)
    native = [r for r in table if r.size == size and r.arm == study.reference and r.headline]
    limited = endpoints.finite(native, "queries_limited")
    if limited:
      share = float(np.mean(limited))
      most = ": **for most queries sparse attention was dense attention.**"
      notes.append(f"{at}{100 * share:.0f} % of the queries of {study.reference} had more blocks than "
                   f"they could take{'.' if share >= 0.5 else most}")
  return notes


def by_way_of_dense(study: Study, table: list[Row], size: str) -> dict:
  """{retrofit arm: (retrofit minus dense, dense minus reference)}, float64[seeds] each, over the seeds that all three have.

  Delta is their sum, and its scatter may be of the second alone, which no retrofit has a part in.
  """
  own = lambda arm: endpoints.series(table, arm, size, study.headline_mode(arm), study.primary)
  out, dense, native = {}, own(study.dense), own(study.reference) if study.reference else {}
  for arm in study.retrofits():
    ours = own(arm)
    seeds = sorted(set(ours) & set(dense) & set(native))
    if seeds:
      out[arm] = (np.array([ours[s] - dense[s] for s in seeds]), np.array([dense[s] - native[s] for s in seeds]))
  return out


def _anchor(study, table, size, at):
  """Where dense attention ends: Delta mixes what retrofitting costs with what native gains over dense."""
  metric, words = METRIC[study.primary], []
  split = by_way_of_dense(study, table, size)
  if not split:
    return []
  longest = list(split)[-1]
  lost, gained = split[longest]
  for arm, other, d in ((study.dense, study.reference, gained), (longest, study.dense, lost)):
    i = statistics.t_interval(d)
    words.append(f"{arm} ends {metric.text(i.mean, True)} {metric.unit} from {other}"
                 + (f" (95 % t interval {metric.between(i)})" if i.bounded else " (1 seed)"))
  return [f"{at}The anchor: {words[0]}, and {words[1]}. Delta is the sum of the two: what native gains over dense attention, and "
          "what a retrofit loses against the dense model that it came from."]


def closed_gap(study: Study, table: list[Row], size: str) -> tuple[str, list[str]]:
  """The share of the gap training-free to native that each retrofit closes: a heading, and a line per arm."""
  if not study.reference:
    return "", []
  get = lambda arm, mode: endpoints.series(table, arm, size, mode, study.primary)
  mode = next((m for m in TRAINING_FREE if get(study.dense, m)), None)
  if mode is None:
    return f"Closed share of the gap: not given, there is no training-free run of {study.dense}.", []
  lines = []
  for arm in study.retrofits():
    ours = get(arm, study.headline_mode(arm))
    if ours:
      closed = statistics.closed_fraction(get(study.dense, mode), ours,
                                          get(study.reference, study.headline_mode(study.reference)))
      i = closed.interval
      lines.append(f"{arm}: " + (closed.reason or (
          f"{100 * i.mean:.0f} % (95 % t interval {100 * i.low:.0f} to {100 * i.high:.0f} %, {i.n} seeds)")))
  head = (f"Share of the gap between `{study.dense} -> {mode}` (training-free) and {study.reference} "
          "that a retrofit closes; exploratory:")
  return (head, lines) if lines else ("", [])


def decompose(study: Study, table: list[Row], size: str) -> dict:
  """{arm: {"Delta", "selector error", "backbone mismatch": {seed: value}}} where all four losses exist."""
  out, native = {}, study.reference
  get = lambda arm, mode: endpoints.series(table, arm, size, mode, study.primary)
  if not native or study.headline_mode(native) != "sparse":
    return out
  n_own, n_oracle = get(native, "sparse"), get(native, "oracle")
  for arm in study.retrofits():
    own, oracle = get(arm, "sparse"), get(arm, "oracle")
    seeds = sorted(set(own) & set(oracle) & set(n_own) & set(n_oracle))
    if seeds and study.headline_mode(arm) == "sparse":
      out[arm] = {
          "Delta": {s: own[s] - n_own[s] for s in seeds},
          "selector error": {s: (own[s] - oracle[s]) - (n_own[s] - n_oracle[s]) for s in seeds},
          "backbone mismatch": {s: oracle[s] - n_oracle[s] for s in seeds}}
  return out
