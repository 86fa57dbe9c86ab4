"""Are states denser for what was seen more often, and sparser for what is harder? Statistics of snapshots.

Stated before the data. Endpoint: `top_5` behind the final norm, in the model's own basis, at each arm's last snapshot
(arXiv 2603.03415 takes the last layer, all positions but one). Exposure is randomised: which passage is planted how
often is drawn by seed, so its slope needs no covariate; it is per doubling of 1 + plantings until then. Unit: seed x
document, whose passages share an author. Family of tests: the slope of each arm, and of each arm's difference from
dense on the same passages, by Holm. A slope of SMALLEST matters. With simultaneous intervals of the family, a slope is

  "matters"    all of its interval is beyond SMALLEST, on one side
  "too small"  all of its interval is within SMALLEST
  "undecided"  neither

A negative slope is what the claim says: less energy in the largest dimensions, denser. All other measures, points and
steps are shown and not judged. Difficulty is judged by correlations over examples, never over means of levels.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy

from nsa.report import statistics

MEASURE, POINT = "top_5", "norm"
SMALLEST = 0.002  # of top-5 % energy per doubling of exposure


@dataclasses.dataclass(frozen=True)
class Slope:
  """A slope with its 95 % interval. passages, units: how many of them it rests on, after those that say nothing."""
  slope: float
  error: float
  freedom: float
  passages: int
  units: int

  def interval(self, level: float = 0.95) -> tuple[float, float]:
    half = float(scipy.special.stdtrit(self.freedom, (1 + level) / 2)) * self.error if self.freedom > 0 else math.nan
    return self.slope - half, self.slope + half

  @property
  def p(self) -> float:
    """Two-sided, of no slope."""
    if not self.freedom > 0:
      return math.nan
    if not self.error:
      return float(not self.slope)
    return 2 * float(scipy.special.stdtr(self.freedom, -abs(self.slope) / self.error))


def slope(x, y, units, *covariates) -> Slope:
  """Least squares within units (each has a level of its own), with a standard error by unit.

  x, y, covariates: float[n]. units: [n]. Errors may differ between units and be correlated inside of them: the
  cluster-robust error of Bell and McCaffrey 2002 (CR2), for one regressor, and the degrees of freedom that it has for
  equal independent errors. NaN with fewer than 2 units.
  """
  keep = np.isfinite(np.stack([x, y, *covariates]).astype(np.float64)).all(0)
  _, unit = np.unique([repr(u) for u, k in zip(units, keep) if k], return_inverse=True)
  count = np.maximum(np.bincount(unit), 1) if keep.any() else np.ones(0)
  x, y, *others = (np.asarray(z, np.float64)[keep] for z in (x, y, *covariates))
  x, y, *others = (z - (np.bincount(unit, z) / count)[unit] for z in (x, y, *others))
  if others:
    z = np.stack(others, 1)
    x, y = (a - z @ np.linalg.lstsq(z, a, rcond=None)[0] for a in (x, y))
  share = np.bincount(unit, x * x) / np.sum(x * x) if np.any(x) else np.zeros(0)
  told = share > 1e-12
  if told.sum() < 2:
    return Slope(math.nan, math.nan, math.nan, len(x), int(told.sum()))
  b = float(np.sum(x * y) / np.sum(x * x))
  score = np.bincount(unit, x * (y - b * x))[told] / np.sqrt(1 - share[told])
  error = float(np.sqrt(np.sum(score ** 2)) / np.sum(x * x))
  return Slope(b, error, float(1 / np.sum(share ** 2)), len(x), int(told.sum()))


@dataclasses.dataclass(frozen=True)
class Tested:
  """A slope of the family. low, high: simultaneous intervals. p: by Holm. word: see above."""
  arm: str
  against: str           # "" for the arm's own slope, or the arm whose slope is subtracted
  found: Slope
  low: float
  high: float
  p: float
  word: str


def exposure(snapshot: dict) -> np.ndarray:
  """float[items]: log2 of 1 + plantings until then, NaN of what is no planted passage."""
  return np.array([np.log2(1 + n) if kind == "planted" else math.nan
                   for kind, n in zip(snapshot["kind"], snapshot["planted"])])


def values(snapshot: dict, measure: str = MEASURE, point=POINT, variant: str = "own") -> np.ndarray:
  """float[items] of a measure at a point; point may be "mean", of all layers."""
  of = snapshot["values"][variant]
  rows = np.array(of.get(measure, snapshot["values"]["own"][measure]), np.float64)  # a rotation changes no spectrum
  return rows[:, snapshot["points"].index(point)]


def units(snapshot: dict) -> list[tuple]:
  """(seed, corpus, document) of each passage: those of one unit are not independent."""
  return [(snapshot["seed"], corpus, document) for corpus, document in zip(snapshot["corpus"], snapshot["document"])]


def attention(snapshot: dict, name: str) -> np.ndarray:
  """float[items]: "entropy" or "captured_mass", mean over the layers that have it."""
  rows = np.array(snapshot[name], np.float64)
  has = np.isfinite(rows)
  return np.where(has.any(1), np.where(has, rows, 0).sum(1) / np.maximum(has.sum(1), 1), math.nan)


def slope_of(snapshots: list[dict], of, *covariates) -> Slope:
  """The slope over exposure of `of`, (snapshot) -> float[items], in one snapshot of each seed."""
  join = lambda f: np.concatenate([f(s) for s in snapshots])
  return slope(join(exposure), join(of), [u for s in snapshots for u in units(s)], *(join(c) for c in covariates))


def difference(a: list[dict], b: list[dict], of) -> Slope:
  """The slope of a - b on the same passages of the seeds that both have; NaN where their passages are not the same."""
  theirs = {s["seed"]: s for s in b}
  pairs = [(s, theirs[s["seed"]]) for s in a if s["seed"] in theirs]
  same = lambda s: (s["kind"], s["corpus"], s["document"], s["start"], s["planted"])
  pairs = [(s, t) for s, t in pairs if same(s) == same(t)]
  if not pairs:
    return Slope(math.nan, math.nan, math.nan, 0, 0)
  x, y = (np.concatenate(z) for z in zip(*((exposure(s), of(s) - of(t)) for s, t in pairs)))
  return slope(x, y, [u for s, _ in pairs for u in units(s)])


def last(snapshots: list[dict]) -> list[dict]:
  """Of the snapshots of an arm those of its last step that any seed has reached, one of each seed."""
  step = max(s["step"] for s in snapshots)
  return [s for s in snapshots if s["step"] == step]


def judge(arms: dict[str, list[dict]], dense: str = "dense", missing: int = 0) -> list[Tested]:
  """The family of tests, of the last snapshots of each arm. Slopes that cannot be had are left out.

  missing: arms that were planned and have no snapshot yet; the two tests of each count as failed ones.
  """
  ends = {arm: last(found) for arm, found in arms.items() if found}
  found = [(arm, "", slope_of(end, values)) for arm, end in ends.items()]
  found += [(arm, dense, difference(end, ends[dense], values)) for arm, end in ends.items()
            if dense in ends and arm != dense]
  found = [one for one in found if not math.isnan(one[2].p)]
  out = []
  for (arm, against, one), p in zip(found, statistics.holm([one[2].p for one in found] + [1.0] * 2 * missing)):
    low, high = one.interval(1 - 0.05 / (len(found) + 2 * missing))
    beyond, within = low > SMALLEST or high < -SMALLEST, -SMALLEST < low and high < SMALLEST
    word = "matters" if beyond else "too small" if within else "undecided"
    out.append(Tested(arm, against, one, low, high, float(p), word))
  return out


# --- difficulty -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Correlation:
  """Of one example's measure with its difficulty. r: mean over seeds, by Fisher's z, and its interval of 95 %.

  The interval is of other seeds and other examples; as all seeds see the same ones, more seeds do not narrow that part.
  """
  what: str
  r: float
  low: float
  high: float
  examples: int
  seeds: int
  of_means: float = math.nan  # of the levels' means: what is not judged


def correlation(x, y, groups=None, *covariates) -> float:
  """Pearson's, within groups, and partial of the covariates; NaN where there is nothing to correlate."""
  groups = np.zeros(len(x)) if groups is None else np.unique([repr(g) for g in groups], return_inverse=True)[1]
  keep = np.isfinite(np.stack([x, y, *covariates]).astype(np.float64)).all(0)
  if keep.sum() < 4:
    return math.nan
  design = np.stack([*(np.equal(groups[keep], g) for g in np.unique(groups[keep])),
                     *(np.asarray(c, np.float64)[keep] for c in covariates)], 1).astype(np.float64)
  x, y = (np.asarray(z, np.float64)[keep] for z in (x, y))
  rest = [z - design @ np.linalg.lstsq(design, z, rcond=None)[0] for z in (x, y)]
  size = math.sqrt(np.sum(rest[0] ** 2) * np.sum(rest[1] ** 2))
  return float(np.sum(rest[0] * rest[1]) / size) if size > 1e-12 else math.nan


def difficulty(snapshots: list[dict]) -> list[Correlation]:
  """Of one snapshot of each seed: with the number of pairs of recall, with the same among examples of equal loss and
  distance, with the loss of recall, and with the loss of held-out text within its corpus."""
  column = lambda s, name: np.array(s[name], np.float64)
  of_kind = lambda s, kind: np.array([k == kind for k in s["kind"]])
  only = lambda s, kind, x: np.where(of_kind(s, kind), x, math.nan)
  pairs = lambda s: np.log2(column(s, "pairs"))
  loss, y = (lambda s: column(s, "bits_per_byte")), values
  asked = {
      "log2 of the pairs of recall": lambda s: correlation(pairs(s), y(s)),
      "the same, given loss and distance": lambda s: correlation(pairs(s), y(s), None, loss(s), column(s, "distance")),
      "loss of recall": lambda s: correlation(only(s, "recall", loss(s)), y(s)),
      "loss of held-out text": lambda s: correlation(only(s, "held_out", loss(s)), y(s), s["corpus"]),
  }
  out = []
  for what, r_of in asked.items():
    found = [(s, r) for s in snapshots if not math.isnan(r := r_of(s))]
    if not found:
      continue
    kind = "held_out" if "text" in what else "recall"
    examples, seeds = int(of_kind(found[0][0], kind).sum()), len(found)
    z = np.arctanh(np.clip([r for _, r in found], -0.999999, 0.999999))
    variances = np.array([1 / max(examples - 3, 1), np.var(z, ddof=1) / seeds if seeds > 1 else 0.0])
    freedom = variances.sum() ** 2 / np.sum(variances ** 2 / [max(examples - 3, 1), max(seeds - 1, 1)])  # Welch's
    half = scipy.special.stdtrit(freedom, 0.975) * math.sqrt(variances.sum())
    means = math.nan
    if what.startswith("log2"):
      levels = [np.unique(pairs(s)[np.isfinite(pairs(s))]) for s, _ in found]
      means = float(np.mean([correlation(at, np.array([np.nanmean(y(s)[pairs(s) == x]) for x in at]))
                             for (s, _), at in zip(found, levels)]))
    out.append(Correlation(what, *np.tanh(z.mean() + half * np.array([0, -1, 1])).tolist(), examples, seeds, means))
  return out


def by_quintile(snapshots: list[dict]) -> list[tuple[float, float]]:
  """(mean loss, mean measure) of held-out passages by quintile of their loss, of all seeds together; [] without any."""
  rows = [(loss, value) for s in snapshots
          for kind, loss, value in zip(s["kind"], s["bits_per_byte"], values(s)) if kind == "held_out"]
  rows.sort()
  return [tuple(np.mean(part, 0).tolist()) for part in np.array_split(rows, 5)] if len(rows) >= 5 else []
