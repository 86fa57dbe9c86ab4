"""Statistics of a study: seeds are the replicates of claims about arms, documents those about a checkpoint.

Everything here takes plain numbers and returns plain numbers; which metric they are, and
whether less is better, the caller knows. Three words are used with care:

  "matches"    both one-sided tests against the margin pass at 5 % (TOST)
  "differs"    the 95 % t interval over seeds excludes 0, and the tests above did not both pass
  "undecided"  neither; a difference that was not significant is not a match

Every distribution comes from `scipy.special` (scipy is already a dependency of jax); `scipy.stats`
is avoided because its import alone takes longer than a report.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Mapping, Sequence

import numpy as np
from scipy import special

GAMMAS = (0.05, 4.0)  # exponents that `fit_budget_curve` searches


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean with its two-sided interval. `low` and `high` are NaN where n is too small to have one."""
  mean: float
  low: float
  high: float
  n: int                         # replicates
  standard_deviation: float = math.nan
  level: float = 0.95

  @property
  def half_width(self) -> float:
    return (self.high - self.low) / 2

  @property
  def standard_error(self) -> float:
    return self.standard_deviation / math.sqrt(self.n) if self.n else math.nan

  @property
  def bounded(self) -> bool:
    """Whether there is an interval at all."""
    return math.isfinite(self.low) and math.isfinite(self.high)

  @property
  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0  # False when either is NaN


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
  """Student's t interval of the mean of `values` (one per seed). With n = 1 there is none.

  Raises ValueError for no values, or for one that is not finite: a diverged seed is the caller's to count.
  """
  x = _finite("values", values)
  mean, n = float(x.mean()), len(x)
  if n == 1:
    return Interval(mean, math.nan, math.nan, 1, level=level)
  sd = float(x.std(ddof=1))
  half = float(special.stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)
  return Interval(mean, mean - half, mean + half, n, sd, level)


def paired_differences(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[int], np.ndarray]:
  """a - b over the seeds that both have: (seeds, float64[n]). n may be 0."""
  seeds = sorted(set(a) & set(b))
  return seeds, np.array([a[s] - b[s] for s in seeds], np.float64)


def t_test(differences: Sequence[float]) -> float:
  """Two-sided p of "the mean difference is 0". NaN with fewer than 2 differences."""
  return min(1.0, 2 * min(_one_sided(differences, 0.0), _one_sided(np.negative(differences), 0.0)))


def tost(differences: Sequence[float], margin: float) -> float:
  """p of the two one-sided tests of |mean difference| < margin: the larger of the two (Schuirmann 1987).

  At or below 0.05 the arms are equivalent at 5 %. NaN with fewer than 2 differences.
  Raises ValueError for a margin that is not above 0.
  """
  if not margin > 0:
    raise ValueError(f"margin = {margin!r}: an equivalence margin is above 0")
  return max(_one_sided(differences, -margin), _one_sided(np.negative(differences), -margin))


@dataclasses.dataclass(frozen=True)
class Judgement:
  """What the seeds say about one paired difference."""
  word: str            # matches | differs | undecided | no interval
  interval: Interval   # 95 % t interval of the mean difference
  margin: float
  p_tost: float        # the larger of the two one-sided tests
  p_difference: float  # two-sided t test against 0
  detectable: float    # smallest effect seen with 80 % power at 5 % two-sided, given the SD found


def judge(differences: Sequence[float], margin: float, alpha: float = 0.05) -> Judgement:
  """The verdict on paired differences (one per seed): see the top of this file for the words."""
  interval = t_interval(differences, 1 - alpha)
  if interval.n < 2:
    return Judgement("no interval", interval, margin, math.nan, math.nan, math.nan)
  p = tost(differences, margin)
  word = "matches" if p <= alpha else "differs" if interval.excludes_zero else "undecided"
  detectable = smallest_detectable_effect(interval.standard_deviation, interval.n, alpha=alpha)
  return Judgement(word, interval, margin, p, t_test(differences), detectable)


def holm(p_values: Sequence[float]) -> np.ndarray:
  """Adjusted p of each hypothesis (Holm 1979). NaNs stay NaN and are not counted as hypotheses."""
  p = np.asarray(p_values, np.float64)
  adjusted = np.full(p.shape, np.nan)
  known = np.flatnonzero(~np.isnan(p))
  running = 0.0
  for rank, i in enumerate(known[np.argsort(p[known], kind="stable")]):
    running = max(running, min(1.0, (len(known) - rank) * p[i]))
    adjusted[i] = running
  return adjusted


def power(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
  """Power of the two-sided paired t test with n pairs, whose differences have mean `effect` and SD `sd`."""
  critical = special.stdtrit(n - 1, 1 - alpha / 2)
  shift = effect * math.sqrt(n) / sd
  return float(1 - special.nctdtr(n - 1, shift, critical) + special.nctdtr(n - 1, shift, -critical))


def smallest_detectable_effect(sd: float, n: int, power_wanted: float = 0.8, alpha: float = 0.05) -> float:
  """The mean difference that n pairs find with 80 % power at 5 % two-sided: noncentral t, by bisection.

  `sd` is the standard deviation of the paired differences; the answer is in its unit. NaN below
  2 pairs, 0 where the SD is 0.
  """
  if n < 2 or not math.isfinite(sd):
    return math.nan
  if sd == 0:
    return 0.0
  low, high = 0.0, 1.0  # in units of sd
  while power(high, 1.0, n, alpha) < power_wanted:
    low, high = high, 2 * high
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if power(middle, 1.0, n, alpha) < power_wanted else (low, middle)
  return high * sd


def standard_deviation_interval(sd: float, df: int, level: float = 0.95) -> tuple[float, float]:
  """Interval of a standard deviation that was estimated with `df` degrees of freedom: chi-square, of normal values.

  (NaN, NaN) without degrees of freedom.
  """
  if df < 1:
    return math.nan, math.nan
  tail = (1 - level) / 2
  return sd * math.sqrt(df / special.chdtri(df, tail)), sd * math.sqrt(df / special.chdtri(df, 1 - tail))


def hierarchical_bootstrap(differences, weights=None, draws: int = 4000, seed: int = 0,
                           level: float = 0.95) -> Interval:
  """Percentile interval of the weighted mean of differences[seed, document], both resampled.

  float[S, D] paired differences per seed and document (NaN = missing) and weights of the same
  shape (e.g. bytes; None = equal). All arms and seeds read the same documents, so a document is
  drawn for all seeds at once (clustered by document; the crossed bootstrap of Owen 2007): drawn
  apart for each seed its effect would average out and the interval come out too narrow. With one
  seed only documents are drawn, and the interval speaks of that checkpoint alone. With few seeds
  the percentile interval is too narrow: it stands beside the t interval, never instead of it.
  """
  x = np.atleast_2d(np.asarray(differences, np.float64))
  w = np.ones_like(x) if weights is None else np.broadcast_to(np.asarray(weights, np.float64), x.shape)
  w = np.where(np.isfinite(x), w, 0.0)
  x = np.where(np.isfinite(x), x, 0.0)
  if not w.sum() > 0:
    raise ValueError(f"differences of shape {x.shape}: no finite value has a weight above 0")
  S, D = x.shape
  rng = np.random.default_rng(seed)
  seeds = rng.multinomial(S, np.full(S, 1 / S), size=draws).astype(np.float64)      # [draws, S]
  documents = rng.multinomial(D, np.full(D, 1 / D), size=draws).astype(np.float64)  # [draws, D]
  total = ((seeds @ (x * w)) * documents).sum(1)
  weight = ((seeds @ w) * documents).sum(1)
  means = total[weight > 0] / weight[weight > 0]
  mean = float((x * w).sum() / w.sum())
  if S == D == 1:
    return Interval(mean, math.nan, math.nan, 1, level=level)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Interval(mean, float(low), float(high), S, level=level)


@dataclasses.dataclass(frozen=True)
class BudgetFit:
  """Delta(b) = delta_inf + a * b**(-gamma), or the reason why there is none."""
  reason: str = ""             # "" = fitted
  interval: Interval | None = None  # of delta_inf: its mean is the fit to all seeds
  a: float = math.nan
  gamma: float = math.nan
  note: str = ""               # what the reader must know of a fit that exists

  @property
  def fitted(self) -> bool:
    return not self.reason

  def __call__(self, b):
    return self.interval.mean + self.a * np.asarray(b, np.float64) ** -self.gamma


def fit_budget_curve(budgets: Sequence[float], deltas, draws: int = 2000, seed: int = 0,
                     level: float = 0.95) -> BudgetFit:
  """Least squares of Delta(b) = delta_inf + a b^-gamma on deltas[seed, budget] (NaN = missing).

  `budgets` are shares of the training tokens, 0 < b <= 1. gamma is searched within `GAMMAS`, the
  rest is linear. The interval of delta_inf resamples seeds (a seed with all its budgets at once),
  with the quantiles widened for small n (expanded percentile, Hesterberg 2015, eq. 8); a resample
  that does not level off counts as an unbounded delta_inf. Needs 3 budgets for a fit and 3 seeds
  for an interval; `reason` and `note` say what is missing.
  """
  b = np.asarray(budgets, np.float64)
  y = np.atleast_2d(np.asarray(deltas, np.float64))
  if y.shape[1] != len(b):
    raise ValueError(f"deltas of shape {y.shape}: the second axis must have the {len(b)} budgets")
  if len(b) and not ((b > 0) & (b <= 1)).all():
    raise ValueError(f"budgets = {list(b)}: shares of the training tokens lie above 0 and at most 1")
  used = np.isfinite(y).any(0)
  count = len(np.unique(b[used]))
  if count < 3:
    return BudgetFit(f"cannot be fitted: three unknowns need at least 3 budgets, and {count} "
                     f"{'has' if count == 1 else 'have'} a result")
  b, y = b[used], y[:, used]
  y = y[np.isfinite(y).any(1)]
  level_of_budget = np.nanmean(y, 0)
  if np.ptp(level_of_budget) <= 1e-9 * max(1.0, np.abs(level_of_budget).max()):
    return BudgetFit("cannot be fitted: the difference is the same at every budget, which leaves gamma open")
  S = len(y)
  delta_inf, a, gamma = (float(v[0]) for v in _solve(b, y, np.ones((1, S))))
  if gamma <= GAMMAS[0] * 1.01:
    return BudgetFit("cannot be fitted: the difference does not level off over the budgets that were run "
                     "(gamma runs to 0), so no limit can be read from it")
  notes = []
  if count == 3:
    notes.append("3 budgets for 3 unknowns: the curve can pass through the means, and nothing tests its form")
  if gamma >= GAMMAS[1] * 0.99:
    notes.append(f"gamma is at the end of its range ({GAMMAS[1]:g}): all change lies at the smallest budget")
  if a < 0:
    notes.append("a < 0: the difference grows with the budget")
  if S < 3:
    notes.append(f"no interval: {S} seed{'s' * (S > 1)} cannot be resampled, 3 are needed")
    return BudgetFit("", Interval(delta_inf, math.nan, math.nan, S, level=level), a, gamma, "; ".join(notes))
  weights = np.random.default_rng(seed).multinomial(S, np.full(S, 1 / S), size=draws).astype(np.float64)
  limits, slopes, gammas = _solve(b, y, weights)
  limits = np.where(gammas <= GAMMAS[0] * 1.01, np.where(slopes > 0, -np.inf, np.inf), limits)
  lost = int(np.isnan(limits).sum())
  if lost:
    notes.append(f"{lost} of {draws} resamples had fewer than 3 budgets and are left out")
  limits = limits[~np.isnan(limits)]
  tail = float(special.ndtr(special.stdtrit(S - 1, (1 - level) / 2) * math.sqrt(S / (S - 1))))
  low = float(np.quantile(limits, tail, method="inverted_cdf"))
  high = float(np.quantile(limits, 1 - tail, method="inverted_cdf"))
  return BudgetFit("", Interval(delta_inf, low, high, S, level=level), a, gamma, "; ".join(notes))


def _solve(b, y, weights):
  """(delta_inf, a, gamma), each [R], for R weightings [R, S] of the seeds; NaN with under 3 budgets."""
  present = np.isfinite(y)
  w = weights @ present                                               # [R, B]
  means = weights @ np.where(present, y, 0.0) / np.maximum(w, 1e-300)
  ok = ((w > 0).sum(1) >= 3)
  scale = b / b.min()
  total = np.maximum(w.sum(1), 1e-300)[:, None]
  grid = np.broadcast_to(np.geomspace(*GAMMAS, 161), (len(w), 161))
  for final in (False, False, True):
    x = scale ** -grid[:, :, None]                                    # [R, grid, B], largest 1
    x_mean = (x * w[:, None]).sum(2) / total
    y_mean = (means * w).sum(1, keepdims=True) / total
    dx, dy = x - x_mean[:, :, None], (means - y_mean)[:, None]
    xx, xy = (w[:, None] * dx * dx).sum(2), (w[:, None] * dx * dy).sum(2)
    slope = xy / np.maximum(xx, 1e-300)
    error = (w[:, None] * (dy - slope[:, :, None] * dx) ** 2).sum(2)
    best = error.argmin(1)
    rows = np.arange(len(w))
    if not final:  # look closer between the neighbours of the best
      lo, hi = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, grid.shape[1] - 1)]
      grid = lo[:, None] * (hi / lo)[:, None] ** np.linspace(0, 1, 41)
  gamma, slope = grid[rows, best], slope[rows, best]
  delta_inf = y_mean[:, 0] - slope * x_mean[rows, best]
  nan = np.where(ok, 0.0, np.nan)
  return delta_inf + nan, slope * b.min() ** gamma + nan, gamma + nan


@dataclasses.dataclass(frozen=True)
class ClosedFraction:
  """How much of the gap training-free -> native a retrofit closes (1 = all), or why it is not said."""
  reason: str = ""
  interval: Interval | None = None


def closed_fraction(training_free: Mapping[int, float], retrofit: Mapping[int, float],
                    native: Mapping[int, float]) -> ClosedFraction:
  """(training_free - retrofit) / (training_free - native), paired by seed, t interval over seeds.

  Given only where the mean gap exceeds 3 of its standard errors: a fraction of a gap that may be
  zero means nothing.
  """
  seeds = sorted(set(training_free) & set(retrofit) & set(native))
  if len(seeds) < 2:
    return ClosedFraction(f"not given: {len(seeds)} paired seed{'s' * (len(seeds) != 1)}, and the gap's "
                          "standard error needs 2")
  gaps = np.array([training_free[s] - native[s] for s in seeds])
  gap = t_interval(gaps)
  if not abs(gap.mean) > 3 * gap.standard_error:
    return ClosedFraction(f"not given: the gap training-free to native is {gap.mean:+.4f}, below 3 standard "
                          f"errors ({gap.standard_error:.4f} each)")
  if (gaps == 0).any():
    return ClosedFraction("not given: one seed has no gap at all")
  return ClosedFraction("", t_interval([(training_free[s] - retrofit[s]) / g for s, g in zip(seeds, gaps)]))


def _one_sided(x, bound: float) -> float:
  """p of the t test of "mean <= bound" against "mean > bound"."""
  x = _finite("differences", x)
  if len(x) < 2:
    return math.nan
  distance, error = float(x.mean()) - bound, float(x.std(ddof=1)) / math.sqrt(len(x))
  if error == 0:
    return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
  return float(special.stdtr(len(x) - 1, -distance / error))


def _finite(name, values) -> np.ndarray:
  x = np.asarray(values, np.float64).reshape(-1)
  if not len(x):
    raise ValueError(f"{name} is empty: at least one number is needed")
  if not np.isfinite(x).all():
    raise ValueError(f"{name} = {x.tolist()}: leave out what is not finite, and count it")
  return x
