"""What is compared: which arms, on which seeds, and the tests of each difference.

Three quantities of every endpoint and size, paired by seed:

  R(b)      a retrofit of budget b minus its dense control: the trunk, or a dense continuation with its tokens and rates
  A         dense minus the reference (native), at equal tokens
  Delta(b)  R(b) + A: a retrofit against native

The primary endpoints share alpha by kind (text, recall); within a kind and a size all declared quantities, budgets and
endpoints are one family under Holm, the tests of equivalence and those of a difference each; a test of runs that are
missing counts as one that failed, so that a study that was cut is judged no more gently. Secondary endpoints, and
quantities that were not declared, are one family of their own.
An endpoint whose controls do not behave (gates.py) gets no word. Everything else is exploratory: an interval, never a
word.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from typing import Callable

import numpy as np

from nsa.report import comparable, endpoints, statistics
from nsa.report.endpoints import Row
from nsa.report.runs import Endpoint, Study

QUANTITIES = ("R", "A", "Delta")
FOUND = ("matches", "worse", "better")


@dataclasses.dataclass
class Comparison:
  """arm minus against on one metric at one size. `judgement` is None where `reason` says why."""
  quantity: str                            # R | A | Delta | "" (exploratory)
  arm: str
  run_mode: str
  against: str
  size: str
  endpoint: Endpoint
  family: str = ""                         # of its tests; "" for exploratory ones
  alpha: float = 0.05                      # of the family
  admitted: bool = True
  tested: bool = True                      # False: one seed was planned, so that there never was a test
  budget: float | None = None
  differences: dict[int, float] = dataclasses.field(default_factory=dict)  # by seed
  expected: int = 0                        # seeds with which all of its runs are there or still to come
  judgement: statistics.Judgement | None = None
  bootstrap: Callable[[], statistics.Interval | None] = lambda: None
  reason: str = ""
  p_tost: float = math.nan                 # after Holm
  p_difference: float = math.nan           # after Holm
  repeated: bool | None = None             # whether the opened evaluations say the same; None: they say nothing

  @property
  def metric(self) -> endpoints.Metric:
    return endpoints.metric(self.endpoint.metric)

  @functools.cached_property
  def documents(self) -> statistics.Interval | None:
    """Bootstrap over (seed, document) of a primary metric of text; its n: the seeds whose documents are known."""
    return self.bootstrap()

  @property
  def word(self) -> str:
    """What counts: `said`, but "not repeated" for a match or a difference that the opened evaluations do not repeat."""
    return "not repeated" if self.repeated is False and self.said in FOUND else self.said

  @property
  def said(self) -> str:
    """matches | better | worse | undecided, after Holm; cannot be judged; not admitted; "" of an exploratory
    comparison."""
    if not self.family:
      return ""
    if not self.admitted:
      return "not admitted"
    if self.judgement is None or self.judgement.word == "no interval":
      return "cannot be judged"
    if self.p_tost <= self.alpha:
      return "matches"
    if not self.p_difference <= self.alpha:
      return "undecided"
    return "worse" if (self.judgement.interval.mean > 0) == self.metric.lower_is_better else "better"

  @property
  def seeds(self) -> str:
    """"8 seeds", or "3 of 6 seeds so far"."""
    n = len(self.differences)
    return f"{n} of {self.expected} seeds so far" if n < self.expected else f"{n} seeds"

  @property
  def key(self) -> tuple[str, str, str, str]:
    return self.quantity, self.endpoint.metric, self.size, self.arm

  @property
  def name(self) -> str:
    return self.quantity + (f"({percent(self.budget)})" if self.budget is not None else "")

  @property
  def sign_flip(self) -> float:
    return statistics.sign_flip(list(self.differences.values())) if self.differences else math.nan

  @property
  def without_one(self) -> list[float]:
    """p without each seed in turn, before Holm: of equivalence where `said` is "matches", else of the t test."""
    test = statistics.t_test
    if self.said == "matches":
      test = functools.partial(statistics.tost, margin=self.endpoint.margin)
    return statistics.leave_one_out(list(self.differences.values()), test) if self.differences else []


def own(study: Study, table: list[Row], arm: str, size: str, metric: str) -> dict[int, float]:
  """{seed: value} of an arm in its own run mode."""
  return endpoints.series(table, arm, size, study.headline_mode(arm), metric)


def compare(study: Study, table: list[Row], quantity: str, arm: str, size: str, endpoint: Endpoint) -> Comparison:
  """One paired comparison; Delta of an arm with a control of its own is R + A over the seeds that have all four
  runs."""
  get = lambda a: own(study, table, a, size, endpoint.metric)
  against = {"R": study.control(arm), "A": study.reference, "Delta": study.reference}[quantity]
  out = Comparison(quantity, arm, study.headline_mode(arm), against, size, endpoint,
                   budget=study.budgets.get(arm) if quantity != "A" else None)
  ours, theirs = get(arm), get(against)
  if quantity == "Delta" and (control := study.control(arm)) != study.dense:
    extra = get(control), get(study.dense)
    ours = {s: ours[s] - extra[0][s] + extra[1][s] for s in ours if all(s in e for e in extra)}
  seeds, d = statistics.paired_differences(ours, theirs)
  if not seeds:
    none = lambda one: (f"{one} has no {out.metric.title}" if any(run.arm == one for run in study.finished) else
                        f"no finished result of {one}")
    out.reason = (none(against) if not theirs else none(arm) if not ours else
                  f"no seed of {arm} in common with {against}")
    return out
  four = (arm, against, study.control(arm), study.dense) if quantity == "Delta" else (arm, against)
  out.reason = next((found for other in four[1:] if (found := comparable.reason(study, arm, other, size))), "")
  if out.reason:
    return out
  out.differences = dict(zip(seeds, map(float, d)))
  to_come = lambda a: {seed for run in study.arm_runs(a, size) if run.status in ("pending", "unfinished")
                       for seed in set(run.seeds) - set(run.diverged)}
  out.expected = len(set.intersection(*({*get(a), *to_come(a)} for a in four)))
  if statistics.flat(d) or not d.any():
    out.reason = (f"{arm} is identical to {against} in every seed: both ran the same computation, or the endpoint "
                  "cannot tell them apart" if abs(d[0]) < 1e-9 else
                  f"{arm} minus {against} is {out.metric.text(d[0], True)} {out.metric.unit} in each of {len(d)} "
                  "seeds: without scatter there is no test")
    return out
  out.judgement = statistics.judge(d, endpoint.margin)
  if endpoint.primary and (quantity != "Delta" or study.control(arm) == study.dense):
    out.bootstrap = lambda: _bootstrap(*(endpoints.documents(study, a, size, study.headline_mode(a), endpoint.metric)
                                         for a in (arm, against)), seeds)
  return out


def comparisons(study: Study, table: list[Row], admitted: dict) -> list[Comparison]:
  """Every comparison of the declared family, and the exploratory ones: other arms, and other ways to run the dense
  arm."""
  out, retrofits = [], study.retrofits()
  if not study.reference:
    return out
  kinds = dict.fromkeys(endpoints.metric(e.metric).kind for e in study.endpoints if e.primary)
  sizes = list(dict.fromkeys([*study.sizes, *(run.size for run in study.runs)]))  # of those not begun tests count, too
  for e in study.endpoints:
    family = endpoints.metric(e.metric).kind
    for size in sizes:
      of_size = [r for r in table if r.size == size and r.status == "done"]
      if not e.primary and of_size and not any(math.isfinite(r[e.metric]) for r in of_size):
        continue  # it was not measured there
      for quantity in study.asked:
        main = e.primary and quantity in study.quantities
        for arm in [study.dense] if quantity == "A" else retrofits:
          if study.arm_runs(arm) and not study.arm_runs(arm, size):
            continue  # no run of this size was meant
          c = compare(study, table, quantity, arm, size, e)
          c.family = "secondary" if not main else family if len(sizes) == 1 else f"{family}, size {size}"
          c.alpha = study.alpha / len(kinds) if main else study.alpha
          c.admitted = (e.metric, size) not in admitted or admitted[e.metric, size].admitted
          c.tested = len({seed for run in study.arm_runs(arm, size) for seed in run.seeds}) != 1
          out.append(c)
  for family in dict.fromkeys(c.family for c in out):  # what is not admitted, or not to be judged, counts too
    mine = [c for c in out if c.family == family and c.tested]
    known = lambda c: c.judgement is not None and math.isfinite(c.judgement.p_tost)
    tests = lambda name: statistics.holm([getattr(c.judgement, name) if known(c) else 1.0 for c in mine])
    for c, p, q in zip(mine, tests("p_tost"), tests("p_difference")):
      if known(c):
        c.p_tost, c.p_difference = float(p), float(q)
  first = study.endpoints[0]
  for size in study.sizes:
    for arm, mode in dict.fromkeys((r.arm, r.run_mode) for r in table if r.size == size):
      plain = mode == study.headline_mode(arm)
      if (plain and arm not in (*retrofits, study.reference, study.dense)) or (not plain and arm == study.dense):
        c = Comparison("", arm, mode, study.reference, size, first)
        seeds, d = statistics.paired_differences(endpoints.series(table, arm, size, mode, first.metric),
                                                 own(study, table, study.reference, size, first.metric))
        if seeds:
          c.differences, c.judgement = dict(zip(seeds, map(float, d))), statistics.judge(d, first.margin)
          out.append(c)
  return out


def percent(b: float) -> str:
  """A share in words, to three figures."""
  return f"{100 * b:.3g} %"


def _bootstrap(ours, theirs, seeds):
  both = [(s, d) for s, d in ours if s in seeds and (s, d) in theirs]
  seeds, names = sorted({s for s, _ in both}), sorted({d for _, d in both})
  if not names:
    return None
  values, weights = np.full((2, len(seeds), len(names)), np.nan)
  for i, seed in enumerate(seeds):
    for j, name in enumerate(names):
      if (seed, name) in ours and (seed, name) in theirs:
        (a, n), (b, m) = ours[seed, name], theirs[seed, name]
        values[i, j], weights[i, j] = a / n - b / m, n
  if not np.isfinite(values).any():
    return None
  return statistics.hierarchical_bootstrap(values, np.nan_to_num(weights))
