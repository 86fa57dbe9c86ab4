"""Which endpoints count: one is admitted only if its controls behave, and no word is said of one that is not.

The controls are ways to run the finished dense arm. On an endpoint that tests selection dense attention solves the
task, the oracle's blocks lose next to nothing, and blocks that nobody selected (random ones, sink + window) lose much.
Otherwise the endpoint is shown, named "does not test selection here", and supports no verdict. A control that was not
run is a gate that failed. Means over seeds decide.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np

from nsa.report import endpoints
from nsa.report.endpoints import Row
from nsa.report.runs import Study

SOLVED = 0.95      # exact match of dense attention on recall
BEST = 0.02        # or so close to the best arm of no more tokens: points of exact match, or a share of its bits/byte
HALF = 0.5         # exact match that random blocks and sink + window may have at most; below half of dense's, too
FORCED = ("random", "sink_window")


@dataclasses.dataclass(frozen=True)
class Gate:
  """One control of one endpoint. `found` is in the metric's stored unit: a level for recall, what is lost to dense for
  text."""
  control: str
  needs: str
  found: float
  passed: bool


@dataclasses.dataclass(frozen=True)
class Admission:
  """The gates of one endpoint at one size."""
  metric: str
  size: str
  gates: tuple[Gate, ...]

  @property
  def admitted(self) -> bool:
    return all(gate.passed for gate in self.gates)

  def failures(self) -> str:
    """Which gates failed, and by what."""
    m = gated(self.metric)
    return "; ".join(f"{gate.control}: " + ("not run" if math.isnan(gate.found) else
                                            f"{m.text(gate.found, m.kind == 'text')}, {gate.needs}")
                     for gate in self.gates if not gate.passed)


def gated(name: str) -> endpoints.Metric:
  """The metric whose controls are looked at for `name`: exact match speaks for the NLL of the same answers."""
  return endpoints.metric(endpoints.metric(name).gated_by or name)


def admission(study: Study, table: list[Row], name: str, size: str) -> Admission:
  """The gates of the endpoint `name` at `size`."""
  m = gated(name)
  get = lambda mode: endpoints.series(table, study.dense, size, mode, m.name)
  dense, oracle = get("dense"), get("oracle")
  level = lambda values: float(np.mean(list(values.values()))) if values else math.nan
  sign = 1 if m.lower_is_better else -1
  lost = lambda values: sign * level({s: values[s] - dense[s] for s in values if s in dense})
  ahead, allowed, others = _best(study, table, m, size, dense)
  best = "the best arm" + (" of its tier" if _later(study, size) else "")
  best = best if others else f"{best}, and none but {study.dense} has as few tokens"
  if m.kind == "recall":
    gates = [Gate(study.dense, f"at least {m.text(SOLVED)} % or within {m.text(BEST)} of {best}", level(dense),
                  level(dense) >= SOLVED or ahead <= BEST)]
    for mode in FORCED:
      found = level(get(mode))
      gates.append(Gate(f"{study.dense} -> {mode}", f"at most {m.text(HALF)} %, and below half of {study.dense}", found,
                        found <= HALF and found < level(dense) / 2))
    gates.append(Gate(f"{study.dense} -> oracle", f"at most {m.text(m.near)} points below {study.dense}", level(oracle),
                      lost(oracle) <= m.near + 1e-12))
  else:
    gates = [Gate(study.dense, f"within {100 * BEST:g} % of {best}", ahead, ahead <= allowed)]
    for mode in FORCED:
      gates.append(Gate(f"{study.dense} -> {mode}", f"at least {m.text(m.behind, True)} {m.unit} from {study.dense}",
                        lost(get(mode)), lost(get(mode)) >= m.behind - 1e-12))
    gates.append(Gate(f"{study.dense} -> oracle", f"at most {m.text(m.near, True)} {m.unit} from {study.dense}",
                      lost(oracle), lost(oracle) <= m.near + 1e-12))
  return Admission(name, size, tuple(gates))


def _best(study, table, m, size, dense) -> tuple[float, float, bool]:
  """(how far the best arm is ahead of dense, how far it may be), over the seeds that both have, and whether there is
  another arm than dense to be the best; NaN and True without dense.

  Arms that saw more tokens than dense are no measure of it: twice the bytes are better without any selection. Nor are
  those of a later tier of the plan: they answer other questions (is it the curriculum?), and what was said of a tier
  whose test was opened does not change with runs that are made afterwards.
  """
  tokens = {arm: [r["tokens"] for r in table if (r.arm, r.size) == (arm, size) and r.headline] for arm in study.arms}
  limit = 1.005 * max(tokens.get(study.dense) or [math.nan])
  found, others = [(math.nan, math.nan)], not dense
  later = _later(study, size)
  for arm in study.arms:
    values = endpoints.series(table, arm, size, study.headline_mode(arm), m.name) if arm not in later else {}
    if (common := sorted(set(values) & set(dense))) and not max(tokens[arm], default=math.nan) > limit:
      others |= arm != study.dense
      gap = float(np.mean([dense[s] - values[s] for s in common])) * (1 if m.lower_is_better else -1)
      found.append((gap, BEST * float(np.mean([values[s] for s in common])) if m.lower_is_better else BEST))
  return *max(found[1:] or found, key=lambda pair: pair[0] - pair[1]), others


def _later(study, size) -> set[str]:
  """The arms of one size that are planned for later tiers than dense alone."""
  tiers = [{key for key, _ in runs} for runs in study.tiers().values()]
  own = next((i for i, keys in enumerate(tiers) if f"{study.dense}-{size}" in keys), len(tiers))
  later = set().union(*tiers[own + 1:]) - set().union(*tiers[:own + 1])
  return {arm for arm in study.arms if f"{arm}-{size}" in later}


def admissions(study: Study, table: list[Row]) -> dict[tuple[str, str], Admission]:
  """{(metric, size): its gates} of every endpoint that some row has a value of."""
  return {(e.metric, size): admission(study, table, e.metric, size) for e in study.endpoints for size in study.sizes
          if any(r.size == size and math.isfinite(r[e.metric]) for r in table)}
