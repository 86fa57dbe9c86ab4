"""Larger and sparse, or smaller and dense? Loss at equal training FLOPs over model sizes, and what time makes of it.

Arms are named method_budget ("msa_32_1.5e15"): a method at several budgets of training FLOPs, each in several sizes.
Of every method and endpoint one least-squares fit over all its runs, a parabola per budget with one curvature:

    loss = a_C + b_C x + c x^2,  x = ln(parameters without embeddings, selectors and memories)

Every seed is a point. Optimum: x = -b_C / 2c, its loss a_C - b_C^2 / 4c. Exponent e: the same fit with b_C = g + h
ln C, so that the best size grows as C^e, e = -h / 2c. Intervals (95 %): DRAWS draws of the coefficients from their t
distribution, scattered by the residuals, misfit of the parabola included. An optimum is *bracketed* where its interval
lies within the sizes that were run at its budget; one that is not is shown and supports no word.

The verdict on "larger and sparse beats smaller and dense" (after Sparse Frontier, arXiv 2504.17768), of each endpoint
of text at the largest budget at which both optima are bracketed, all draws independent between methods, intervals
simultaneous over sparse methods and endpoints (Bonferroni):

  confirmed by selection   the optimum's loss is below dense's, and below that of the window of equal cost
  confirmed by locality    below dense's, and not shown to be below the window's: what a window has too is no merit of
                           selection
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
import math
import re

import numpy as np

from nsa.report import endpoints, style
from nsa.report.document import Heading, Table, Text
from nsa.report.endpoints import Row
from nsa.report.runs import Study

SMALLEST = 0.005                 # bits per byte between optima that matter
DRAWS = 4000
LEVEL = 0.95
ARM = re.compile(r"(.+)_(\d[\d.]*(?:e\d+)?)$")
_COLOURS = {"dense": "#555555", "msa_32": "#0072b2", "msa_8": "#56b4e9", "window_32": "#c4511f", "window_8": "#f2a65a"}
_OTHERS = ("#009e73", "#cc79a7", "#7b5ea7", "#b8a500")
_MARKERS = "osD^vP"


@dataclasses.dataclass(frozen=True)
class Point:
  """One run. parameters: without embeddings, selectors and memories. flops: of training. inference: {run mode: forward
  FLOPs per token}."""
  method: str
  budget: float
  size: str
  seed: int
  parameters: float
  flops: float
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
  residual: float                  # SD
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
    cost = None if run is None else _costs(repr(sorted(modes)), _Config(run.config))
    if own is None or cost is None:
      continue
    method, budget = ARM.match(arm).groups()
    out.append(Point(method, float(budget), size, seed, cost[0], own["flops"], own["seconds"], cost[1], own, modes))
  return out


class _Config:
  """A config.json that can be a key."""

  def __init__(self, tree):
    self.tree, self.text = tree, repr(tree)

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


@functools.lru_cache(maxsize=512)
def _costs(modes: str, config: _Config) -> tuple[float, dict[str, float]] | None:
  """(parameters, {run mode: forward FLOPs per token at the run's context}); None of a config that cannot be read."""
  import ast

  from nsa import evaluate, flops, methods  # here: the verdict alone does without jax
  parsed = endpoints.parsed(config.tree)
  if parsed is None:
    return None
  counts = flops.parameters(parsed)
  embeddings = counts["total"] - counts["non_embedding"]
  inference = {}
  for mode in ast.literal_eval(modes):
    found = evaluate.how(parsed, mode)
    if found is None:
      continue
    run, kind, selector = found
    if selector != "own":
      run = dataclasses.replace(run, attention=methods.get(selector)(**run.attention.geometry))
    inference[mode] = sum(flops.forward(run, parsed.eval.context or parsed.data.context, kind).values())
  return counts["backbone"] - embeddings, inference


# --- fitting ------------------------------------------------------------------------


def fit(found: list[Point], metric: str, draw: int = 0) -> Fit | str:
  """The fit of one method's points, or why there is none. draw: seed of the draws, another for each method."""
  found = [p for p in found if math.isfinite(p.row[metric])]
  if not endpoints.metric(metric).lower_is_better:
    return "it has no minimum to be fitted"
  budgets = sorted({p.budget for p in found})
  sizes = {c: {p.parameters for p in found if p.budget == c} for c in budgets}
  budgets = [c for c in budgets if len(sizes[c]) > 1]
  found = [p for p in found if p.budget in budgets]
  df = len(found) - 2 * len(budgets) - 1
  if not budgets or df < 1 or max(len(sizes[c]) for c in budgets) < 3:
    return "too few sizes for a parabola"
  centre = float(np.mean([math.log(p.parameters) for p in found]))
  x = np.array([math.log(p.parameters) for p in found]) - centre
  y = np.array([p.row[metric] for p in found])
  at = np.array([budgets.index(p.budget) for p in found])
  one = (at[:, None] == np.arange(len(budgets))).astype(float)
  design = np.concatenate([one, one * x[:, None], x[:, None] ** 2], axis=1)
  best, sd, draws = _least_squares(design, y, draw)
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
    losses = draws[:, i] - draws[:, B + i] ** 2 / (4 * draws[:, -1])
    low, high = np.quantile(place, _ends(LEVEL))
    mine = [p for p in found if p.budget == c]
    inside = min(x[at == i]) <= low and high <= max(x[at == i])
    optimum = math.exp(centre - b / (2 * bend))
    out[c] = Optimum(c, optimum, (math.exp(centre + low), math.exp(centre + high)), float(a - b * b / (4 * bend)),
                     tuple(np.quantile(losses, _ends(LEVEL)).tolist()), len(sizes[c]), bool(inside), losses,
                     _seconds(mine, optimum))
    coefficients[c] = (float(a), float(b), float(bend))
  exponent, between = math.nan, (math.nan, math.nan)
  if B > 1:
    log = np.array([math.log(p.budget) for p in found])
    log -= log.mean()
    straight = np.concatenate([one, x[:, None], (x * log)[:, None], x[:, None] ** 2], axis=1)
    best, _, draws = _least_squares(straight, y, draw)
    if best[-1] > 0:
      exponent = float(-best[-2] / (2 * best[-1]))
      draws = draws[draws[:, -1] > 0]
      between = tuple(np.quantile(-draws[:, -2] / (2 * draws[:, -1]), _ends(LEVEL)).tolist())
  return Fit(found[0].method, out, exponent, between, sd, df, centre, coefficients)


def _ends(level):
  return [(1 - level) / 2, (1 + level) / 2]


def _least_squares(design, y, draw) -> tuple[np.ndarray, float, np.ndarray]:
  """(coefficients, SD of the residuals, float64[DRAWS, coefficients] draws from their t distribution)."""
  best = np.linalg.lstsq(design, y, rcond=None)[0]
  df = len(y) - design.shape[1]
  sd = math.sqrt(float(np.sum((y - design @ best) ** 2)) / df)
  rng = np.random.default_rng(draw)
  # R of a QR: the covariance is sd^2 (R^T R)^-1. Each draw has a variance of its own, chi-square of df.
  right = np.linalg.qr(design, mode="r")
  scale = sd / np.sqrt(rng.chisquare(df, DRAWS) / df)
  return best, sd, best + scale[:, None] * np.linalg.solve(right, rng.standard_normal((len(best), DRAWS))).T


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


def multiplier(one: Fit, other: Fit, by: str = "budget") -> tuple[float, float, float] | None:
  """How many times the cost of `one` its `other` needs for the loss that `one` has at its largest budget: (value, low,
  high).

  by: "budget" (training FLOPs) or "seconds". Along the line through other's optima, loss over the logarithm of the
  cost, continued beyond its ends; None where that line does not fall, or a cost is unknown.
  """
  budgets = sorted(set(one.optima) & set(other.optima))
  if len(budgets) < 2:
    return None
  ours, theirs = one.optima[budgets[-1]], [other.optima[c] for c in budgets]
  cost = lambda o: math.log(getattr(o, by)) if getattr(o, by) > 0 else math.nan
  x = np.array([cost(o) for o in theirs])
  if not np.isfinite([*x, cost(ours)]).all() or np.ptp(x) == 0:
    return None
  n = min(len(o.draws) for o in [ours, *theirs])
  losses = np.stack([np.concatenate([[o.loss], o.draws[:n]]) for o in theirs])    # [budgets, 1 + n]
  middle = x - x.mean()
  slope = (middle[:, None] * losses).sum(0) / (middle ** 2).sum()
  target = np.concatenate([[ours.loss], ours.draws[:n]])
  with np.errstate(divide="ignore", over="ignore"):
    times = np.where(slope < 0, np.exp(x.mean() + (target - losses.mean(0)) / slope - cost(ours)), np.nan)
  if math.isnan(times[0]) or np.isnan(times).mean() > (1 - LEVEL) / 2:
    return None
  low, high = np.nanquantile(times[1:], _ends(LEVEL))
  return float(times[0]), float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Judgement:
  """One sparse method on one endpoint of text."""
  method: str
  metric: str
  budget: float
  word: str
  against: dict[str, tuple[float, float, float]]   # method -> difference, simultaneous


def judge(study: Study, fits: dict[str, dict[str, Fit | str]], dense: str = "dense") -> list[Judgement]:
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
    if budget in good(window):
      against[window.method] = difference(mine.optima[budget], window.optima[budget], level)
    below = {name: high < 0 for name, (_, _, high) in against.items()}
    word = ("refuted" if against[dense][1] > 0 else "undecided" if not below[dense]
            else "confirmed by selection" if len(below) == 2 and all(below.values()) else "confirmed by locality")
    out.append(Judgement(method, metric, budget, word, against))
  return out


# --- the section --------------------------------------------------------------------


def section(study: Study, table: list[Row], gallery) -> list:
  """The blocks of the report."""
  blocks = [Heading("Larger and sparse, or smaller and dense?")]
  found = points(study, table)
  if not found:
    return [*blocks, Text("No finished run of an arm named method_budget yet.", "note")]
  names = list(dict.fromkeys(p.method for p in found))
  metrics = [e.metric for e in study.endpoints if any(math.isfinite(p.row[e.metric]) for p in found)]
  fits = {metric: {name: fit([p for p in found if p.method == name], metric, k) for k, name in enumerate(names)}
          for metric in metrics}
  blocks += [Text("How it is fitted and judged was stated before the runs: nsa/report/isoflop.py. Training FLOPs are "
                  "analytic, selectors and their losses counted; parameters are those of the backbone.")]
  blocks += _verdict(study, fits)
  for metric in metrics:
    blocks += _table(fits[metric], metric) if endpoints.metric(metric).lower_is_better else []
  blocks += _multipliers(fits, names)
  shown = [("isoflop", curves(found, fits), "Held-out loss over parameters at equal training FLOPs, a colour for each "
            "method, a marker for each budget; lines: fitted parabolas, stars: their optima with 95 % intervals. "
            "Recall is a panel of its own, not judged", "Loss over model size at equal training FLOPs"),
           ("isoflop_cost", frontiers(fits), "Loss at each method's best size, by training FLOPs and by device time of "
            "training. Bars: 95 % intervals. Hollow: the optimum is not bracketed", "Loss by training cost"),
           ("isoflop_inference", inference(found, metrics), "Models of the largest budget, run with other numbers of "
            "blocks than they were trained with: loss by forward FLOPs per token, selection counted. Line: the lower "
            "edge of each method", "Loss by inference FLOPs")]
  for name, figure, caption, alt in shown:
    blocks.append(gallery.block(name, figure, caption, alt, f"Not drawn ({name}): too few runs"))
  return blocks


def _verdict(study, fits) -> list:
  judged = judge(study, fits)
  if not judged:
    return [Text("No verdict: no sparse method has runs.", "note")]
  lines = []
  for one in judged:
    m = endpoints.metric(one.metric)
    of = "; ".join(f"minus {name} {m.text(d, True)} ({m.text(low, True)} to {m.text(high, True)})"
                   for name, (d, low, high) in one.against.items())
    of += "; less than what matters" * (bool(of) and abs(next(iter(one.against.values()))[0]) < SMALLEST)
    at = f"at {one.budget:.2g} FLOPs, {of}" if of else "no budget at which its optimum and dense's are bracketed"
    lines.append(f"{one.method}, {m.title}: **{one.word}** ({at})")
  seeds = "one seed: a word about these runs, not about training" if _one_seed(study) else ""
  return [Text("\"Larger and sparse beats smaller and dense\": " + "; ".join(lines) + "."
               + f" **{seeds[0].upper()}{seeds[1:]}.**" * bool(seeds), "verdict")]


def _one_seed(study) -> bool:
  return len({seed for run in study.finished for seed in run.seeds}) < 2


def _table(of: dict[str, Fit | str], name: str) -> list:
  m = endpoints.metric(name)
  lines, without = [], []
  for method, one in of.items():
    if isinstance(one, str):
      without.append(f"{method}: {one}")
      continue
    e = "-" if math.isnan(one.exponent) else (f"{one.exponent:.2f} ({one.exponent_between[0]:.2f} to "
                                             f"{one.exponent_between[1]:.2f})")
    for k, o in enumerate(one.optima.values()):
      million = lambda n: f"{n / 1e6:.2g}M"
      lines.append([method if not k else "", f"{o.budget:.2g}", str(o.sizes),
                    f"{million(o.parameters)} ({million(o.between[0])} to {million(o.between[1])})",
                    "yes" if o.bracketed else "**no**",
                    f"{m.text(o.loss)} ({m.text(o.loss_between[0])} to {m.text(o.loss_between[1])})",
                    "-" if math.isnan(o.seconds) else f"{o.seconds:.3g}", e if not k else "",
                    f"{m.text(one.residual)} ({one.df})" if not k else ""])
  caption = (f"{m.title[0].upper()}{m.title[1:]}: the best size at each budget of training FLOPs, and how it grows "
             "with the budget. 95 % intervals; SD of the residuals with its degrees of freedom"
             + (". Exploratory" if m.kind != "text" else ""))
  blocks = [Table(["method", "training FLOPs", "sizes", "best parameters", "bracketed", f"loss there ({m.unit})",
                   "device seconds", "exponent", "residual SD"], lines, caption)] if lines else []
  return blocks + ([Text(f"No fit of {m.title}: " + "; ".join(without) + ".", "note")] if without else [])


def _multipliers(fits, names) -> list:
  lines = []
  for metric, of in fits.items():
    if endpoints.metric(metric).kind != "text":
      continue
    for name in names:
      mine, dense = of[name], of.get("dense")
      if name == "dense" or isinstance(mine, str) or not isinstance(dense, Fit):
        continue
      cells = ["-" if (x := multiplier(mine, dense, by)) is None else "{:.2f} ({:.2f} to {:.2f})".format(*x)
               for by in ("budget", "seconds")]
      lines.append([endpoints.metric(metric).title, name, *cells])
  if not lines:
    return []
  return [Table(["endpoint", "method", "times its FLOPs", "times its device time"], lines,
                "What dense needs for the loss that a method has at its largest budget, along the line of dense's own "
                "optima (beyond its ends where it must be). Above 1: the method is cheaper. 95 % intervals of the "
                "fits; exploratory", left=2)]


# --- figures ------------------------------------------------------------------------


def _colour(method, k=0):
  return _COLOURS.get(method, _OTHERS[k % len(_OTHERS)])


def curves(found: list[Point], fits):
  """Loss over parameters: a panel for each endpoint."""
  metrics = list(fits)
  if not metrics:
    return None
  fig, axes = style.figure(2.4 + 3.9 * len(metrics), 4.2, len(metrics))
  budgets = sorted({p.budget for p in found})
  names = list(dict.fromkeys(p.method for p in found))
  for ax, metric in zip(axes, metrics):
    m = endpoints.metric(metric)
    for k, name in enumerate(names):
      colour, one = _colour(name, k), fits[metric][name]
      for i, c in enumerate(budgets):
        mine = [p for p in found if (p.method, p.budget) == (name, c) and math.isfinite(p.row[metric])]
        ax.plot([p.parameters / 1e6 for p in mine], [p.row[metric] * m.scale for p in mine], _MARKERS[i % 6],
                color=colour, ms=4, mfc="none", label=name if not i else None)
        if isinstance(one, Fit) and c in one.optima:
          at = np.geomspace(min(p.parameters for p in mine), max(p.parameters for p in mine), 50)
          ax.plot(at / 1e6, one.parabola(c, at) * m.scale, color=colour, lw=1.1, alpha=0.8)
          o = one.optima[c]
          if at[0] <= o.parameters <= at[-1]:
            ax.plot(o.parameters / 1e6, o.loss * m.scale, "*", color=colour, ms=9)
            low, high = np.clip(o.between, at[0], at[-1]) / 1e6
            ax.hlines(o.loss * m.scale, low, high, color=colour, lw=1)
    for i, c in enumerate(budgets):
      ax.plot([], [], _MARKERS[i % 6], color="#999999", mfc="none", label=f"{c:.2g} FLOPs")
    ax.set_xscale("log")
    ax.set_xlabel("parameters of the backbone, without embeddings (M)")
    ax.set_ylabel(f"{m.unit}")
    ax.set_title(m.title.partition(" (")[0].partition(", second")[0], fontsize=9)
  style.key(fig, axes[0])
  return fig


def frontiers(fits):
  """Loss at the optimum by FLOPs and by seconds, a row for each endpoint of text."""
  metrics = [metric for metric in fits if endpoints.metric(metric).kind == "text"
             and any(isinstance(f, Fit) for f in fits[metric].values())]
  if not metrics:
    return None
  fig = style.Figure(figsize=(9.6, 0.4 + 3.3 * len(metrics)), layout="constrained")
  axes = fig.subplots(len(metrics), 2, squeeze=False, sharey="row")
  for row, metric in zip(axes, metrics):
    m = endpoints.metric(metric)
    for ax, by, words in zip(row, ("budget", "seconds"), ("training FLOPs", "device seconds of training")):
      for k, (name, one) in enumerate(fits[metric].items()):
        if isinstance(one, str):
          continue
        mine = [o for o in one.optima.values() if getattr(o, by) > 0]
        ax.plot([getattr(o, by) for o in mine], [o.loss for o in mine], color=_colour(name, k), lw=1.2, label=name)
        for o in mine:
          ax.plot(getattr(o, by), o.loss, "o", color=_colour(name, k), ms=5, mfc=None if o.bracketed else "none")
          ax.vlines(getattr(o, by), *o.loss_between, color=_colour(name, k), lw=1)
      ax.set_xscale("log")
      ax.set_xlabel(words)
    row[0].set_ylabel(m.unit)
    row[0].set_title(m.title, fontsize=9)
  style.key(fig, axes[0, 0])
  return fig


def inference(found: list[Point], metrics: list[str]):
  """Loss by forward FLOPs per token of the models of the largest budget, in all their run modes."""
  top = max(p.budget for p in found)
  mine = [p for p in found if p.budget == top]
  if not any(len(p.modes) > 1 for p in mine):
    return None
  fig, axes = style.figure(2.4 + 3.9 * len(metrics), 4.2, len(metrics))
  names = list(dict.fromkeys(p.method for p in mine))
  for ax, metric in zip(axes, metrics):
    m = endpoints.metric(metric)
    for k, name in enumerate(names):
      of = [(p.inference[mode], row[metric] * m.scale, mode, row.headline) for p in mine if p.method == name
            for mode, row in p.modes.items() if mode in p.inference and math.isfinite(row[metric])]
      sign = 1 if m.lower_is_better else -1
      edge = [(x, y) for x, y, *_ in sorted(of) if all(sign * y < sign * v for u, v, *_ in of if u < x)]
      ax.plot([x for x, *_ in of], [y for _, y, *_ in of], ".", color=_colour(name, k), ms=4, alpha=0.6)
      ax.plot([x for x, _ in edge], [y for _, y in edge], color=_colour(name, k), lw=1.2, label=name)
      ax.plot([x for x, *_, own in of if own], [y for _, y, _, own in of if own], "o", color=_colour(name, k),
              mfc="none", ms=6)
    ax.set_xscale("log")
    ax.set_xlabel("forward FLOPs per token")
    ax.set_ylabel(m.unit)
    ax.set_title(m.title.partition(" (")[0].partition(", second")[0], fontsize=9)
  style.key(fig, axes[0])
  return fig
