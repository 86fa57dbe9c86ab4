"""Statistics of a study: seeds are the replicates of claims about arms, documents those about a checkpoint.

Everything here takes plain numbers and returns plain numbers; which metric they are, and
whether less is better, the caller knows. Three words are used with care:

  "matches"    both one-sided tests against the margin pass at alpha (TOST)
  "differs"    the t test over seeds finds a difference from 0 at alpha, and the tests above did not both pass
  "undecided"  neither; a difference that was not significant is not a match

Every distribution comes from `scipy.special` (scipy is already a dependency of jax); `scipy.stats`
is avoided because its import alone takes longer than a report, and `scipy` imports `special` when it is first asked:
whoever only runs a study waits for neither.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from typing import Mapping, Sequence

import numpy as np
import scipy

ALPHA = 0.05         # of a test without a family
POWER = 0.8          # of the smallest effect that is called detectable
LEVEL = 0.95         # of intervals
EXACT = 16           # up to so many differences all their signs are flipped, 2^16 ways; beyond, so many at random


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean with its two-sided interval. `low` and `high` are NaN where n is too small to have one."""
  mean: float
  low: float
  high: float
  n: int                         # replicates
  standard_deviation: float = math.nan

  @property
  def half_width(self) -> float:
    return (self.high - self.low) / 2

  @property
  def bounded(self) -> bool:
    """Whether there is an interval at all."""
    return math.isfinite(self.low) and math.isfinite(self.high)

  @property
  def excludes_zero(self) -> bool:
    return self.low > 0 or self.high < 0  # False when either is NaN


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
  """Student's t interval of the mean of `values` (one per seed). With n = 1 there is none.

  Raises ValueError for no values, or for one that is not finite: a diverged seed is the caller's to count.
  """
  x = _finite("values", values)
  mean, n = float(x.mean()), len(x)
  if n == 1:
    return Interval(mean, math.nan, math.nan, 1)
  sd = float(x.std(ddof=1))
  half = float(scipy.special.stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)
  return Interval(mean, mean - half, mean + half, n, sd)


def paired_differences(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[int], np.ndarray]:
  """a - b over the seeds that both have: (seeds, float64[n]). n may be 0."""
  seeds = sorted(set(a) & set(b))
  return seeds, np.array([a[s] - b[s] for s in seeds], np.float64)


def t_test(differences: Sequence[float]) -> float:
  """Two-sided p of "the mean difference is 0". NaN with fewer than 2 differences."""
  less, more = _one_sided(differences, 0.0), _one_sided(np.negative(differences), 0.0)
  return float(np.minimum(1.0, 2 * np.minimum(less, more)))  # Python's min would make 1 of NaN


def flat(differences: Sequence[float]) -> bool:
  """Whether several seeds differ by the same, as few answers do by chance: without scatter every test has p = 0."""
  return len(differences) > 1 and float(np.ptp(differences)) < 1e-9


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


def judge(differences: Sequence[float], margin: float) -> Judgement:
  """The verdict on paired differences (one per seed): see the top of this file for the words. The interval is of
  95 %."""
  interval = t_interval(differences)
  if interval.n < 2:
    return Judgement("no interval", interval, margin, math.nan, math.nan, math.nan)
  p = tost(differences, margin)
  different = t_test(differences)
  word = "matches" if p <= ALPHA else "differs" if different <= ALPHA else "undecided"
  detectable = smallest_detectable_effect(interval.standard_deviation, interval.n)
  return Judgement(word, interval, margin, p, different, detectable)


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


def sign_flip(differences: Sequence[float]) -> float:
  """Two-sided p of the exact test that flips the signs of paired differences (Fisher 1935): no normality is assumed.

  The smallest p that n pairs can give is 2^(1 - n): .0625 with 5. NaN with fewer than 2; above EXACT pairs of 2^EXACT
  flips at random (seed 0), the observed one counted.
  """
  x = _finite("differences", differences)
  n = len(x)
  if n < 2:
    return math.nan
  if n <= EXACT:
    # one half: the other is its mirror image
    signs = 1.0 - 2.0 * ((np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1)
  else:
    signs = 1.0 - 2.0 * np.random.default_rng(0).integers(0, 2, (2 ** EXACT, n))
    signs[0] = 1.0
  sums = np.abs(signs @ x)
  return float(np.mean(sums >= abs(x.sum()) * (1 - 1e-12)))


def leave_one_out(differences: Sequence[float], test=t_test) -> list[float]:
  """p of `test` (the two-sided t test, or another of one list) without each one of the differences; [] with fewer
  than 3."""
  x = _finite("differences", differences)
  return [test(np.delete(x, i)) for i in range(len(x))] if len(x) > 2 else []


def two_groups(values: Sequence[float], apart: float) -> tuple[list[float], list[float]] | None:
  """(low, high) where sorted values fall into two groups: the widest gap is at least `apart` and half of the range.

  For outcomes that are there or not, such as a selector that is learnt: their mean describes no seed. None otherwise.
  """
  x = np.sort(_finite("values", values))
  gaps = np.diff(x)
  if not len(gaps) or gaps.max() < max(apart, 0.5 * (x[-1] - x[0])):
    return None
  cut = int(gaps.argmax()) + 1
  return list(map(float, x[:cut])), list(map(float, x[cut:]))


def power(effect: float, sd: float, n: int, alpha: float = ALPHA) -> float:
  """Power of the two-sided paired t test with n pairs, whose differences have mean `effect` and SD `sd`."""
  critical = scipy.special.stdtrit(n - 1, 1 - alpha / 2)
  shift = effect * math.sqrt(n) / sd
  # |Z + shift| < critical * s, with s the SD found over the true one; special.nctdtr has no values for large shifts.
  z = np.linspace(-9, 9, 3601)
  weight = np.exp(-z ** 2 / 2)
  missed = scipy.special.chdtrc(n - 1, (n - 1) * ((z + shift) / critical) ** 2)
  return float(1 - weight @ missed / weight.sum())


def smallest_detectable_effect(sd: float, n: int, alpha: float = ALPHA) -> float:
  """The mean difference that n pairs find with 80 % power at 5 % two-sided: noncentral t, by bisection.

  `sd` is the standard deviation of the paired differences; the answer is in its unit. NaN below
  2 pairs, 0 where the SD is 0.
  """
  if n < 2 or not math.isfinite(sd):
    return math.nan
  return sd * _detectable_in_sd(n, alpha) if sd else 0.0


@functools.lru_cache(maxsize=None)
def _detectable_in_sd(n: int, alpha: float) -> float:
  low, high = 0.0, 1.0
  while power(high, 1.0, n, alpha) < POWER:
    low, high = high, 2 * high
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if power(middle, 1.0, n, alpha) < POWER else (low, middle)
  return high


def tost_power(sd: float, n: int, margin: float, alpha: float = ALPHA) -> float:
  """The share of studies in which n pairs of SD `sd` show equivalence within the margin when there is no difference.

  By 20,000 simulated means and variances (seed 0): both are independent of normal values.
  """
  rng = np.random.default_rng(0)
  mean, error = rng.normal(0, sd / math.sqrt(n), 20_000), sd * np.sqrt(rng.chisquare(n - 1, 20_000) / (n - 1) / n)
  return float(np.mean(np.abs(mean) + scipy.special.stdtrit(n - 1, 1 - alpha) * error <= margin))


def standard_deviation_interval(sd: float, df: int) -> tuple[float, float]:
  """Interval of a standard deviation that was estimated with `df` degrees of freedom: chi-square, of normal values.

  (NaN, NaN) without degrees of freedom.
  """
  if df < 1:
    return math.nan, math.nan
  tail = (1 - LEVEL) / 2
  return sd * math.sqrt(df / scipy.special.chdtri(df, tail)), sd * math.sqrt(df / scipy.special.chdtri(df, 1 - tail))


def hierarchical_bootstrap(differences, weights=None, draws: int = 4000, seed: int = 0) -> Interval:
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
    return Interval(mean, math.nan, math.nan, 1)
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Interval(mean, float(low), float(high), S)


def weighted_ratios(above, below, draws: int, seed: int = 0) -> np.ndarray:
  """float64[draws, K]: sums of above[n, K] over the sum of below[n], with exponential weights of the n items that are
  drawn anew each time and the same for all K (the Bayesian bootstrap, Rubin 1981).

  For items that are 0 or 1 quantiles of these are those of a beta distribution: with one more item that is 1 (0) the
  upper (lower) limits of Clopper and Pearson (1934). `below` has a sum above 0.
  """
  weights = _exponential(len(below), draws, seed)
  return weights @ np.asarray(above, np.float64) / (weights @ np.asarray(below, np.float64))[:, None]


@functools.lru_cache(maxsize=16)
def _exponential(n: int, draws: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_exponential((draws, n))


def least_squares(design: np.ndarray, y: np.ndarray, draws: int, seed: int = 0,
                  weights: np.ndarray | float = 1.0) -> tuple[np.ndarray, float, np.ndarray]:
  """(coefficients float64[P], SD of the residuals, draws of the coefficients float64[draws, P]).

  Of design float64[N, P], N > P, and y float64[N]. Draws are from the coefficients' t distribution, of N - P degrees of
  freedom and independent normal residuals of one SD: weights, float64[N], say what counts and not what scatters less.
  """
  weights = np.broadcast_to(weights, y.shape)
  root = np.sqrt(weights)
  solve = np.linalg.pinv(design * root[:, None]) * root  # [P, N]
  best = solve @ y
  df = len(y) - design.shape[1]
  free = np.sum(weights) - np.sum(weights * np.sum(design * solve.T, axis=1))  # N - P where all weights are 1
  sd = math.sqrt(float(np.sum(weights * (y - design @ best) ** 2)) / free)
  rng = np.random.default_rng(seed)
  scale = sd / np.sqrt(rng.chisquare(df, draws) / df)  # each draw has a variance of its own
  return best, sd, best + scale[:, None] * (rng.standard_normal((draws, len(y))) @ solve.T)


def _one_sided(x, bound: float) -> float:
  """p of the t test of "mean <= bound" against "mean > bound"."""
  x = _finite("differences", x)
  if len(x) < 2:
    return math.nan
  distance, error = float(x.mean()) - bound, float(x.std(ddof=1)) / math.sqrt(len(x))
  if error == 0:
    return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
  return float(scipy.special.stdtr(len(x) - 1, -distance / error))


def _finite(name, values) -> np.ndarray:
  x = np.asarray(values, np.float64).reshape(-1)
  if not len(x):
    raise ValueError(f"{name} is empty: at least one number is needed")
  if not np.isfinite(x).all():
    raise ValueError(f"{name} = {x.tolist()}: leave out what is not finite, and count it")
  return x
