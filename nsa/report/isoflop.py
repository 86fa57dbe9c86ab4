"""Larger and sparse, or smaller and dense? Loss at equal training FLOPs over model sizes, and what time makes of it.

Arms are named method_budget ("msa_32_1.5e15"): a method at several budgets of training FLOPs, each in several sizes.
Of every method and endpoint one least-squares fit over all its runs, a parabola per budget with one curvature:

    loss = a_C + b_C x + c x^2,  x = ln(parameters without embeddings, selectors and memories)

Losses are parabolas near their lowest point alone: a run that lies h above the lowest one of its budget has the weight
1 / (1 + (h / NEAR)^2). With equal weights far sizes, hundreds of steps long and whole bits behind, draw the optimum off
its place by more than its interval, and what they miss doubles the intervals of the loss (tests/isoflop_test.py).

A point is the mean over a run's seeds: what the parabola misses at a size, all of its seeds share, and they would count
it as often as they are. Optimum: x = -b_C / 2c, its loss a_C - b_C^2 / 4c. Exponent e: the same fit with b_C = g + h
ln C, so that the best size grows as C^e, e = -h / 2c. Intervals (95 %): DRAWS draws of the coefficients from their t
distribution, scattered by the residuals, misfit of the parabola included. An optimum is *bracketed* where its interval
lies within the sizes that were run at its budget; one that is not is shown and supports no word.

The verdict on "larger and sparse beats smaller and dense" (after Sparse Frontier, arXiv 2504.17768), of each endpoint
of text at the largest budget at which both optima are bracketed, all draws independent between methods, intervals
simultaneous over sparse methods and endpoints (Bonferroni):

  confirmed by selection   the optimum's loss is below dense's, and below that of the window of equal cost
  confirmed by locality    below dense's, as is the window's, and not shown to be below that: what a window has, too,
                           is no merit of selection
  confirmed, cause open    below dense's; which of the two it is, is not shown, or no window's optimum is bracketed
  refuted                  above dense's
  undecided                none of these

A difference below SMALLEST, however sure, is called less than what matters.

Recall is shown beside and not judged: it is there or not, and a parabola describes neither.
Equal time: the same optima by the device seconds of their training, read off the sizes that ran (linear in logarithms).
"""
from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re

import numpy as np

from nsa.report import endpoints, statistics
from nsa.report.endpoints import Row
from nsa.report.runs import Study

SMALLEST = 0.005                 # bits per byte between optima that matter
NEAR = 0.05                      # bits per byte (nats per token) above the lowest run of a budget: half the weight
DRAWS = 4000
LEVEL = 0.95
ARM = re.compile(r"(.+)_(\d[\d.]*(?:e\d+)?)$")


@dataclasses.dataclass(frozen=True)
class Point:
  """One seed of a run. parameters: without embeddings, selectors and memories. inference: {run mode: forward FLOPs per
  token}."""
  method: str
  budget: float
  size: str
  seed: int
  parameters: float
  seconds: float                   # of training at the usual speed; NaN where unknown
  inference: dict[str, float]
  row: Row
  modes: dict[str, Row]


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The best size of a method at one budget. Intervals are (low, high); draws float64[DRAWS] of the optimum's loss."""
  budget: float
  parameters: float
  between: tuple[float, float]
  loss: float
  loss_between: tuple[float, float]
  sizes: int
  bracketed: bool
  draws: np.ndarray
  seconds: float


@dataclasses.dataclass(frozen=True)
class Fit:
  """One method and endpoint. `parabola(C, parameters)` is the fitted loss; df: degrees of freedom of the residuals."""
  method: str
  optima: dict[float, Optimum]
  exponent: float
  exponent_between: tuple[float, float]
  residual: float                  # SD, weighted
  df: int
  centre: float
  coefficients: dict[float, tuple[float, float, float]]

  def parabola(self, budget: float, parameters: np.ndarray) -> np.ndarray:
    a, b, c = self.coefficients[budget]
    x = np.log(parameters) - self.centre
    return a + b * x + c * x ** 2


# --- reading ------------------------------------------------------------------------


def points(study: Study, table: list[Row]) -> list[Point]:
  """The finished runs of arms that are named method_budget."""
  by_run = collections.defaultdict(dict)
  for row in table:
    if row.status == "done" and ARM.match(row.arm):
      by_run[row.arm, row.size, row.seed][row.run_mode] = row
  configs = {(run.arm, run.size): run for run in study.finished if run.config}
  out = []
  for (arm, size, seed), modes in by_run.items():
    own = next((row for row in modes.values() if row.headline), None)
    run = configs.get((arm, size))
    cost = None if run is None else _costs(tuple(sorted(modes)), json.dumps(run.config))
    if own is None or cost is None:
      continue
    method, budget = ARM.match(arm).groups()
    seconds = own["seconds"]
    if study.speeds is not None:  # what runs log that share a device is no time of theirs
      seconds = own["tokens"] / study.speeds.get(f"{arm}-{size}", math.nan)
    out.append(Point(method, float(budget), size, seed, cost[0], seconds, cost[1], own, modes))
  return out


@functools.lru_cache(maxsize=512)
def _costs(modes: tuple[str, ...], config: str) -> tuple[float, dict[str, float]] | None:
  """(parameters, {run mode: forward FLOPs per token at the run's context}) of a config in JSON; None if it cannot be
  read."""
  from nsa import evaluate, flops, methods  # here: the verdict alone does without jax
  parsed = endpoints.parsed(json.loads(config))
  if parsed is None:
    return None
  counts = flops.parameters(parsed)
  embeddings = counts["total"] - counts["non_embedding"]
  inference = {}
  for mode in modes:
    way = evaluate.how(parsed, mode)
    if way is None:
      continue
    run = way.config
    if way.selector != "own":
      run = dataclasses.replace(run, attention=methods.get(way.selector)(**run.attention.geometry))
    inference[mode] = sum(flops.forward(run, parsed.eval.context or parsed.data.context, way.mode).values())
  return counts["backbone"] - embeddings, inference


# --- fitting ------------------------------------------------------------------------


def fit(found: list[Point], metric: str, draw: int = 0) -> Fit | str:
  """The fit of one method's points, or why there is none. draw: seed of the draws, another for each method."""
  found = [p for p in found if math.isfinite(p.row[metric])]
  if not endpoints.metric(metric).lower_is_better:
    return "it has no minimum to be fitted"
  losses = collections.defaultdict(list)
  for p in found:
    losses[p.budget, p.parameters].append(p.row[metric])
  count = collections.Counter(budget for budget, _ in losses)
  budgets = sorted(c for c, sizes in count.items() if sizes > 1)
  cells = sorted(cell for cell in losses if cell[0] in budgets)
  df = len(cells) - 2 * len(budgets) - 1
  if not budgets or df < 1 or max(count.values()) < 3:
    return "too few sizes for a parabola"
  x = np.log([parameters for _, parameters in cells])
  centre = float(x.mean())
  x = x - centre
  y = np.array([np.mean(losses[cell]) for cell in cells])
  at = np.array([budgets.index(budget) for budget, _ in cells])
  one = (at[:, None] == np.arange(len(budgets))).astype(float)
  above = y - np.array([y[at == i].min() for i in at])
  weights = 1 / (1 + (above / NEAR) ** 2)
  solve = lambda *columns: statistics.least_squares(np.concatenate(columns, axis=1), y, DRAWS, draw, weights)
  best, sd, draws = solve(one, one * x[:, None], x[:, None] ** 2)
  if best[-1] <= 0:
    return "no minimum: the fitted curve bends down"
  if np.mean(draws[:, -1] <= 0) > (1 - LEVEL) / 2:
    return "no minimum: the curvature is not shown to be above 0"
  B = len(budgets)
  out, coefficients = {}, {}
  draws = draws[draws[:, -1] > 0]
  for i, c in enumerate(budgets):
    a, b, bend = best[i], best[B + i], best[-1]
    place = -draws[:, B + i] / (2 * draws[:, -1])
    lowest = draws[:, i] - draws[:, B + i] ** 2 / (4 * draws[:, -1])
    low, high = np.quantile(place, _ends(LEVEL))
    mine = [p for p in found if p.budget == c]
    inside = min(x[at == i]) <= low and high <= max(x[at == i])
    optimum = math.exp(centre - b / (2 * bend))
    out[c] = Optimum(c, optimum, (math.exp(centre + low), math.exp(centre + high)), float(a - b * b / (4 * bend)),
                     tuple(np.quantile(lowest, _ends(LEVEL)).tolist()), count[c], bool(inside), lowest,
                     _seconds(mine, optimum))
    coefficients[c] = (float(a), float(b), float(bend))
  exponent, between = math.nan, (math.nan, math.nan)
  if B > 1:
    log = np.log([budget for budget, _ in cells])
    log -= log.mean()
    best, _, draws = solve(one, x[:, None], (x * log)[:, None], x[:, None] ** 2)
    if best[-1] > 0:
      exponent = float(-best[-2] / (2 * best[-1]))
      draws = draws[draws[:, -1] > 0]
      between = tuple(np.quantile(-draws[:, -2] / (2 * draws[:, -1]), _ends(LEVEL)).tolist())
  return Fit(found[0].method, out, exponent, between, sd, df, centre, coefficients)


def _ends(level):
  return [(1 - level) / 2, (1 + level) / 2]


def _seconds(found: list[Point], parameters: float) -> float:
  """Device seconds of training at that size, linear in logarithms between those that ran; NaN outside of them."""
  by_size = collections.defaultdict(list)
  for p in found:
    if math.isfinite(p.seconds) and p.seconds > 0:
      by_size[p.parameters].append(p.seconds)
  at = sorted(by_size)
  if len(at) < 2 or not at[0] <= parameters <= at[-1]:
    return math.nan
  return math.exp(np.interp(math.log(parameters), np.log(at), [np.mean(np.log(by_size[n])) for n in at]))


def difference(one: Optimum, other: Optimum, level: float) -> tuple[float, float, float]:
  """(loss of the one minus the other's, low, high)."""
  n = min(len(one.draws), len(other.draws))
  low, high = np.quantile(one.draws[:n] - other.draws[:n], _ends(level))
  return one.loss - other.loss, float(low), float(high)


def multiplier(one: Fit, other: Fit, by: str = "budget") -> tuple[float, float, float, bool] | None:
  """How many times the cost of `one` its `other` needs for the same loss: (value, low, high, whether it is a bound).

  by: "budget" (training FLOPs) or "seconds". The loss: the higher of the two at the largest budget of both, so that
  what it costs the better one lies between its own optima (linear, loss over the logarithm of the cost). Where its
  cheapest optimum is better still, the number is a bound. None where fewer than two costs are known.
  """
  lines = []
  top = max(set(one.optima) & set(other.optima), default=None)
  for f in (one, other):
    known = [o for c, o in sorted(f.optima.items()) if top is not None and c <= top and getattr(o, by) > 0]
    if len(known) < 2 or known[-1].budget != top:
      return None
    lines.append(known)
  n = min(len(o.draws) for o in [*lines[0], *lines[1]])
  x = [np.log([getattr(o, by) for o in known]) for known in lines]
  losses = [np.minimum.accumulate([np.append(o.loss, o.draws[:n]) for o in known]) for known in lines]
  target = np.maximum(losses[0][-1], losses[1][-1])
  ours, theirs = ([np.interp(-t, -column, at) for t, column in zip(target, loss.T)] for at, loss in zip(x, losses))
  times = np.exp(np.subtract(theirs, ours))
  low, high = np.quantile(times[1:], _ends(LEVEL))
  return float(times[0]), float(low), float(high), bool(target[0] > min(losses[0][0, 0], losses[1][0, 0]))


@dataclasses.dataclass(frozen=True)
class Judgement:
  """One sparse method on one endpoint of text."""
  method: str
  metric: str
  budget: float
  word: str
  against: dict[str, tuple[float, float, float]]   # method -> difference, simultaneous
  window: tuple[float, float, float] | None = None  # the window of equal cost minus dense


def judge(fits: dict[str, dict[str, Fit | str]], dense: str = "dense") -> list[Judgement]:
  """The verdicts; `fits`: metric -> method -> fit. Sparse methods are those that are neither dense nor windows."""
  tests = [(metric, method) for metric, of in fits.items() if endpoints.metric(metric).kind == "text"
           for method in of if method != dense and not method.startswith("window")]
  out = []
  for metric, method in tests:
    mine, theirs = fits[metric][method], fits[metric].get(dense)
    window = fits[metric].get("window_" + method.rpartition("_")[2])
    good = lambda f: {c for c, o in f.optima.items() if o.bracketed} if isinstance(f, Fit) else set()
    common = good(mine) & good(theirs)
    if not common:
      out.append(Judgement(method, metric, math.nan, "undecided", {}))
      continue
    budget = max(common)
    level = 1 - (1 - LEVEL) / len(tests)
    against = {dense: difference(mine.optima[budget], theirs.optima[budget], level)}
    equal = None
    if budget in good(window):
      against[window.method] = difference(mine.optima[budget], window.optima[budget], level)
      equal = difference(window.optima[budget], theirs.optima[budget], level)
    below = lambda found: found is not None and found[2] < 0
    word = ("refuted" if against[dense][1] > 0 else "undecided" if not below(against[dense])
            else "confirmed by selection" if equal and below(against[window.method])
            else "confirmed by locality" if below(equal) else "confirmed, cause open")
    out.append(Judgement(method, metric, budget, word, against, equal))
  return out
