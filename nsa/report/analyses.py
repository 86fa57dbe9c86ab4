"""What stands behind the verdict: A at equal cost, what a difference is worth in tokens, selector or backbone."""
from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy

from nsa.report import endpoints, statistics
from nsa.report.comparisons import own
from nsa.report.endpoints import Row
from nsa.report.runs import Study

BASES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "device time"}


@dataclasses.dataclass(frozen=True)
class EqualCost:
  """dense minus the reference where both have had as much of `basis`; `reason`: why no seed, or not all, has one."""
  basis: str
  differences: dict[int, float] = dataclasses.field(default_factory=dict)  # by seed
  cost: float = math.nan           # at which they are compared, mean over seeds
  reason: str = ""
  # arm that is read off its line -> its values at the line's two ends, means over seeds: far apart, the line is a guess
  between: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def equal_cost(study: Study, table: list[Row], metric: str, size: str) -> list[EqualCost]:
  """A at equal tokens, FLOPs and device time, per seed.

  Both are taken at the cost of the one that ends cheaper; the other is read off the line through its own decay branches
  (Study.branches: shorter runs with a decay of their own), linear in the logarithm of the cost. An evaluation before
  the decay is no such point: it would count the decay against one side alone.
  """
  out = []
  for basis, words in BASES.items():
    curves, seeds = {}, {}
    for arm in (study.dense, study.reference):
      if basis == "seconds" and study.speeds is not None and f"{arm}-{size}" not in study.speeds:
        seeds[arm] = set()
        continue
      for one in [*study.branches.get(arm, ()), arm]:
        cost = own(study, table, one, size, basis)
        if basis == "seconds" and study.speeds is not None:
          speed = study.speeds[f"{arm}-{size}"]
          cost = {seed: tokens / speed for seed, tokens in own(study, table, one, size, "tokens").items()}
        value = own(study, table, one, size, metric)
        for seed in set(cost) & set(value):
          curves.setdefault((arm, seed), []).append((cost[seed], value[seed]))
      seeds[arm] = {s for a, s in curves if a == arm}
    differences, costs, reasons, ends = {}, [], {}, {}
    for seed in sorted(set.intersection(*seeds.values())):
      at = min(max(x for x, _ in curves[arm, seed]) for arm in seeds)
      values = []
      for arm in seeds:
        points = sorted(curves[arm, seed])
        if at < points[0][0] * (1 - 0.005):
          reasons[seed] = (f"needs a decay branch of {arm} that ends at {endpoints.quantity(at)} "
                           f"{'s of ' * (basis == 'seconds')}{words}, {at / points[-1][0]:.2f} of its own")
        values.append(on_line(points, max(at, points[0][0])))
        above = next((n for n, (x, _) in enumerate(points) if x >= at * (1 - 1e-9)), len(points) - 1)
        if above and points[above][0] > 1.005 * at and points[above - 1][0] < at / 1.005:
          ends.setdefault(arm, []).append((points[above - 1][1], points[above][1]))
      if seed not in reasons:
        differences[seed] = values[0] - values[1]
        costs.append(at)
    missing = f"no speed alone on its device of {' and '.join(a for a in seeds if not seeds[a])}"
    none = missing if basis == "seconds" and study.speeds is not None else f"no seed with {words} of both"
    reason = next(iter(reasons.values()), "" if differences else none)
    if reasons and differences:
      reason = f"seeds {', '.join(map(str, reasons))}: {reason}"
    between = {arm: tuple(np.mean(pairs, axis=0).tolist()) for arm, pairs in ends.items()} if differences else {}
    out.append(EqualCost(basis, differences, float(np.mean(costs)) if differences else math.nan, reason, between))
  return out


def on_line(points: list[tuple[float, float]], cost: float) -> float:
  """The value at `cost` on the line through (cost, value), linear in its logarithm; NaN beyond its ends, by more than
  half a percent."""
  x, y = zip(*sorted(points))
  inside = x[0] * (1 - 0.005) <= cost <= x[-1] * (1 + 0.005)
  return float(np.interp(math.log(cost), np.log(x), y)) if inside else math.nan


def over_tokens(study: Study, table: list[Row], metric: str, size: str) -> dict[float, dict[int, float]]:
  """{training tokens: {seed: dense minus the reference}}, of their decay branches (Study.branches, in their order) and
  of both to the end."""
  out = {}
  ends = [[*study.branches.get(arm, ()), arm] for arm in (study.dense, study.reference)]
  for dense, native in zip(*ends) if len(ends[0]) == len(ends[1]) else ():
    ours, theirs = own(study, table, dense, size, metric), own(study, table, native, size, metric)
    seeds, differences = statistics.paired_differences(ours, theirs)
    if seeds:
      tokens = own(study, table, dense, size, "tokens")
      out[float(np.mean([tokens[seed] for seed in seeds if seed in tokens] or [math.nan]))] = dict(
          zip(seeds, map(float, differences)))
  return out


@dataclasses.dataclass(frozen=True)
class Curve:
  """loss = floor + scale * tokens^-exponent, through three means of dense attention."""
  floor: float
  scale: float
  exponent: float
  tokens: float                    # of the longest of the three

  def at(self, tokens: float) -> float:
    return self.floor + self.scale * tokens ** -self.exponent

  def rho(self, tokens: float, behind: float) -> float:
    """The share of `tokens` with which dense attention is as far behind; 0 where it is at no number of tokens, inf
    where the loss lies below its floor."""
    above = self.at(tokens) + behind - self.floor
    return math.inf if above <= 0 else (above / self.scale) ** (-1 / self.exponent) / tokens


def curve(study: Study, table: list[Row], metric: str, size: str) -> Curve | None:
  """Dense attention's loss over training tokens, by its two decay branches and its end, means over the seeds that have
  all three; None where they are not there, or where no such curve goes through them."""
  arms = [*study.branches.get(study.dense, ()), study.dense]
  values = [own(study, table, arm, size, metric) for arm in arms]
  seeds = set.intersection(*map(set, values)) if values else set()
  if len(arms) != 3 or not seeds or not endpoints.metric(metric).lower_is_better:
    return None
  mean = lambda of: float(np.mean([of[seed] for seed in seeds]))
  points = sorted((mean(own(study, table, arm, size, "tokens")), mean(value)) for arm, value in zip(arms, values))
  (d1, y1), (d2, y2), (d3, y3) = points
  power = lambda beta: (d1 ** -beta - d2 ** -beta) / (d2 ** -beta - d3 ** -beta) - (y1 - y2) / (y2 - y3)
  if not (y1 > y2 > y3 and d1 < d2 < d3) or power(1e-3) * power(8.0) > 0:
    return None
  beta = float(scipy.optimize.brentq(power, 1e-3, 8.0))
  scale = (y2 - y3) / (d2 ** -beta - d3 ** -beta)
  return Curve(y3 - scale * d3 ** -beta, scale, beta, d3)


def errors(study: Study, table: list[Row], metric: str, size: str) -> dict[str, dict[str, dict[int, float]]]:
  """{arm: {"selector error": loss(own blocks) - loss(oracle blocks), "backbone error": loss(oracle blocks) -
  loss(dense)}}.

  By seed, of the reference and the retrofits; above 0 is lost (of exact match: points lost). The dense arm is the
  trunk.
  """
  m = endpoints.metric(metric)
  sign = 1.0 if m.lower_is_better else -1.0
  out, trunk = {}, own(study, table, study.dense, size, metric)
  for arm in [study.reference, *study.retrofits()]:
    mine, oracle = own(study, table, arm, size, metric), endpoints.series(table, arm, size, "oracle", metric)
    if arm and study.headline_mode(arm) == "sparse" and (seeds := sorted(set(mine) & set(oracle) & set(trunk))):
      out[arm] = {"selector error": {s: sign * (mine[s] - oracle[s]) for s in seeds},
                  "backbone error": {s: sign * (oracle[s] - trunk[s]) for s in seeds}}
  return out


def parts(study: Study, table: list[Row], metric: str, size: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{retrofit: (R, A) by seed}, float64[seeds] each, over the seeds that have all the runs; Delta is their sum."""
  get = lambda arm: own(study, table, arm, size, metric)
  out, dense, native = {}, get(study.dense), get(study.reference) if study.reference else {}
  for arm in study.retrofits():
    ours, control = get(arm), get(study.control(arm))
    seeds = sorted(set(ours) & set(control) & set(dense) & set(native))
    if seeds:
      out[arm] = (np.array([ours[s] - control[s] for s in seeds]), np.array([dense[s] - native[s] for s in seeds]))
  return out


def limited(study: Study, table: list[Row], size: str) -> str:
  """Whether sparse attention was sparse: the share of the queries that had blocks to leave out, of the reference, or of
  the first retrofit where that is dense."""
  for arm in (study.reference, *study.retrofits()):
    shares = endpoints.finite((r for r in table if (r.arm, r.size) == (arm, size) and r.headline), "queries_limited")
    if shares and study.headline_mode(arm) != "dense":
      share = float(np.mean(shares))
      return (f"{100 * share:.0f} % of the queries of {arm}{study.at(size)} had more blocks than they could take"
              + ("." if share >= 0.5 else ": **for most queries sparse attention was dense attention.**"))
  return ""
