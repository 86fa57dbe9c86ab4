"""The judgement: which arms are compared, what the seeds say, and the words for it.

The primary comparison is every retrofit arm against the reference arm on the primary metric,
per model size, paired by seed. The same on the secondary metric is the secondary family, under
Holm. Everything else is exploratory and gets an interval, never a word.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np

from nsa.report import comparable, endpoints, statistics
from nsa.report.endpoints import METRIC, Row
from nsa.report.runs import Study

ALPHA = 0.05


@dataclasses.dataclass
class Comparison:
  """arm minus reference on one metric at one size. `judgement` is None where `reason` says why."""
  arm: str
  run_mode: str
  size: str
  metric: str
  margin: float
  role: str                                # primary | secondary | exploratory
  differences: dict[int, float] = dataclasses.field(default_factory=dict)  # by seed
  judgement: statistics.Judgement | None = None
  documents: statistics.Interval | None = None  # bootstrap over (seed, document); its n: the seeds whose documents are known
  budget: float | None = None
  reason: str = ""
  p_tost_holm: float = math.nan            # secondary only
  p_difference_holm: float = math.nan

  @property
  def word(self) -> str:
    """matches | better | worse | undecided | cannot be judged; in the secondary family after Holm."""
    j = self.judgement
    if j is None or j.word == "no interval":
      return "cannot be judged"
    if self.role == "secondary":
      word = ("matches" if self.p_tost_holm <= ALPHA else
              "differs" if self.p_difference_holm <= ALPHA else "undecided")
    else:
      word = j.word
    if word != "differs":
      return word
    return "worse" if (j.interval.mean > 0) == METRIC[self.metric].lower_is_better else "better"

  @property
  def name(self) -> str:
    b = "" if self.budget is None else f" ({percent(self.budget)} of the tokens)"
    return self.arm + b


@dataclasses.dataclass
class Verdict:
  """What the report says first. `headline` is one sentence; the paragraph repeats it and goes on."""
  headline: str
  paragraph: str
  comparisons: list[Comparison]


def compare(study: Study, table: list[Row], arm: str, run_mode: str, size: str, metric: str, margin: float,
            role: str) -> Comparison:
  """One paired comparison with the reference arm."""
  out = Comparison(arm, run_mode, size, metric, margin, role, budget=study.budgets.get(arm))
  reference_mode = study.headline_mode(study.reference)
  ours = endpoints.series(table, arm, size, run_mode, metric)
  theirs = endpoints.series(table, study.reference, size, reference_mode, metric)
  seeds, d = statistics.paired_differences(ours, theirs)
  if not seeds:
    out.reason = (f"no finished result of {study.reference}" if not theirs else "no finished result"
                  if not ours else f"no seed in common with {study.reference}")
    return out
  out.reason = comparable.reason(study, arm, study.reference, size)
  if out.reason:
    return out
  out.differences = dict(zip(seeds, map(float, d)))
  # Equality that says nothing: TOST would call it a match with p = 0.
  values = [s[seed] for s in (ours, theirs) for seed in seeds]
  if metric == "exact_match" and max(values) <= margin:
    out.reason = (f"at the floor: no seed of either arm gets more than {100 * max(values):.1f} % of the "
                  "answers right")
    return out
  if not d.any():
    out.reason = (f"identical to {study.reference} in every seed: both ran the same computation, or the "
                  "endpoint cannot tell them apart")
    return out
  out.judgement = statistics.judge(d, margin, ALPHA)
  if role == "primary":
    out.documents = _bootstrap(
        endpoints.documents(study, arm, size, run_mode, metric),
        endpoints.documents(study, study.reference, size, reference_mode, metric), seeds)
  return out


def comparisons(study: Study, table: list[Row]) -> list[Comparison]:
  """Primary, secondary (with Holm) and exploratory comparisons; [] without a reference arm."""
  if not study.reference:
    return []
  out, retrofits = [], study.retrofits()
  for size in study.sizes:
    here = {(r.arm, r.run_mode) for r in table if r.size == size}
    for role, metric, margin in (("primary", study.primary, study.margin),
                                 ("secondary", study.secondary, study.secondary_margin)):
      if role == "secondary" and not any(math.isfinite(getattr(r, metric)) for r in table):
        continue
      out += [compare(study, table, arm, study.headline_mode(arm), size, metric, margin, role)
              for arm in retrofits if role == "primary" or (arm, study.headline_mode(arm)) in here]
    others = [(a, m) for a in study.arms for m in sorted({m for arm, m in here if arm == a})
              if (m == study.headline_mode(a) and a not in retrofits and a != study.reference)
              or (a == study.dense and m != study.headline_mode(a))]
    out += [compare(study, table, arm, mode, size, study.primary, study.margin, "exploratory")
            for arm, mode in others]
  family = [c for c in out if c.role == "secondary" and c.judgement]
  for name in ("p_tost", "p_difference"):
    for c, p in zip(family, statistics.holm([getattr(c.judgement, name) for c in family])):
      setattr(c, name + "_holm", float(p))
  return out


def curve(study: Study, found: list[Comparison], size: str) -> tuple[list[Comparison], statistics.BudgetFit]:
  """The primary comparisons of one size with a budget, smallest first, and the fit of Delta(b) to them."""
  points = sorted((c for c in found if c.role == "primary" and c.size == size and c.budget and c.judgement),
                  key=lambda c: c.budget)
  seeds = sorted({s for c in points for s in c.differences})
  values = np.array([[c.differences.get(s, math.nan) for c in points] for s in seeds], np.float64)
  values = values.reshape(len(seeds), len(points))
  return points, statistics.fit_budget_curve([c.budget for c in points], values)


def sentence(study: Study, c: Comparison) -> str:
  """One comparison that has a judgement in plain words, with its interval and its tests."""
  m, j, size = METRIC[c.metric], c.judgement, f" at size {c.size}" if len(study.sizes) > 1 else ""
  i, margin = j.interval, f"±{m.text(c.margin)}"
  where = f"{m.text(i.mean, True)} {m.unit}"
  if not i.bounded:
    text = (f"**{c.name}**{size} against {study.reference} **cannot be judged**: 1 seed gives a difference "
            f"of {where} and no interval over seeds, so neither a match nor a difference can be claimed")
    if c.documents is not None and c.documents.bounded:
      text += (f" (documents alone put the difference of these two checkpoints between "
               f"{m.text(c.documents.low, True)} and {m.text(c.documents.high, True)}; "
               "that says nothing about another seed)")
    return text + "."
  verb = {"matches": f"**matches** {study.reference}", "worse": f"**is worse** than {study.reference}",
          "better": f"**is better** than {study.reference}",
          "undecided": f"against {study.reference} is **undecided**"}[c.word]
  p = j.p_tost if c.role != "secondary" else c.p_tost_holm
  tests = ("both one-sided tests against {} pass (p = {})" if p <= ALPHA else
           "the two one-sided tests against {} do not both pass (p = {})").format(margin, p_text(p))
  text = (f"**{c.name}**{size} {verb}: {where} (95 % t interval {m.between(i)}, {i.n} paired seeds); {tests}")
  if c.word == "matches" and i.excludes_zero:
    text += "; a difference is there, and it is smaller than the margin"
  if c.word == "undecided":
    text += "; the interval includes 0, which is not a match"
  return text + "."


def detectable(study: Study, found: list[Comparison]) -> str:
  """The smallest effect that the comparisons could have seen with their seeds and their scatter."""
  known = [c.judgement for c in found if c.judgement is not None and math.isfinite(c.judgement.detectable)]
  if not known:
    return ""
  m, effects = METRIC[found[0].metric], sorted(j.detectable for j in known)
  seeds = sorted({j.interval.n for j in known})
  span = " to ".join(dict.fromkeys((m.text(effects[0]), m.text(effects[-1]))))
  pairs = " to ".join(dict.fromkeys((str(seeds[0]), str(seeds[-1]))))
  return (f"With {pairs} paired seeds and the scatter found, the smallest effect the study could have seen "
          f"is {span} {m.unit} (80 % power, 5 % two-sided)" + (
              ": more than the margin, so a difference as large as the margin could have been missed."
              if effects[-1] > found[0].margin else "."))


def verdict(study: Study, table: list[Row]) -> Verdict:
  """The first paragraph of the report."""
  found = comparisons(study, table)
  failed = [r for r in study.runs if r.status == "failed"]
  waiting = [r for r in study.runs if r.status in ("pending", "unfinished")]
  counts = (f" {len(failed)} of {len(study.runs)} runs failed." if failed else "") + (
      f" {len(waiting)} of {len(study.runs)} runs have not finished and are left out." if waiting else "")
  if not study.reference:
    head = ("No verdict: study.json names no reference arm." if study.declared else
            "No verdict: no study.json says which arms were to be compared.")
    return Verdict(head, f"**{head}** What follows describes the runs.{counts}", found)
  primary = [c for c in found if c.role == "primary"]
  if not primary:
    head = f"No verdict: there is no arm to compare with {study.reference}."
    return Verdict(head, f"**{head}**{counts}", found)
  head = _headline(study, primary)
  shown = primary
  if len(primary) > 4:  # the largest budget of each size; the table has them all
    shown = [max((c for c in primary if c.size == s), key=lambda c: (c.judgement is not None, c.budget or 0))
             for s in study.sizes if any(c.size == s for c in primary)]
  sign = "worse" if METRIC[study.primary].lower_is_better else "better"
  parts = [f"**{head}**", f"Primary endpoint: {METRIC[study.primary].title}, "
           f"retrofit minus {study.reference} (above 0: {sign})."]
  parts += [sentence(study, c) for c in shown if c.judgement]
  for reason in dict.fromkeys(c.reason for c in shown if not c.judgement):
    names = ", ".join(c.name + (f" at size {c.size}" if len(study.sizes) > 1 else "")
                      for c in shown if c.reason == reason)
    parts.append(f"{names}: **cannot be judged**, {reason}.")
  if len(shown) < len(primary):
    parts.append(f"The other {len(primary) - len(shown)} primary comparisons stand in the table below.")
  parts.append(detectable(study, primary))
  parts += [_limit(study, found, size) for size in study.sizes]
  return Verdict(head, " ".join(p for p in parts if p) + counts, found)


def _headline(study, primary):
  words = [c.word for c in primary]
  judged = [w for w in words if w != "cannot be judged"]
  margin = f"{METRIC[study.primary].text(study.margin)} {METRIC[study.primary].unit}"
  if not judged:
    why = dict.fromkeys(c.reason or "there is only 1 seed per arm" for c in primary)
    return f"No verdict: {'; '.join(why)}."
  unjudged = f" ({len(words) - len(judged)} more cannot be judged)" if len(judged) < len(words) else ""
  many = f"in all {len(judged)} comparisons" if len(judged) > 1 else ""
  if set(judged) == {"matches"}:
    return f"Retrofit matches {study.reference} within {margin}{' ' * bool(many)}{many}{unjudged}."
  if len(set(judged)) == 1 and judged[0] in ("worse", "better"):
    return f"Retrofit is {judged[0]} than {study.reference}{' ' * bool(many)}{many}{unjudged}."
  if set(judged) == {"undecided"}:
    return (f"Undecided{' ' * bool(many)}{many}{unjudged}: the seeds show neither a difference from "
            f"{study.reference} nor a match within {margin}.")
  kinds = {"matches": "matching", "worse": "worse", "better": "better", "undecided": "undecided"}
  tally = ", ".join(f"{judged.count(w)} {text}" for w, text in kinds.items() if w in judged)
  return f"Retrofit against {study.reference}, {len(judged)} comparisons: {tally}{unjudged}."


def _limit(study, found, size):
  points, fit = curve(study, found, size)
  at = f" at size {size}" if len(study.sizes) > 1 else ""
  if not study.budgets:
    return "The study declares no budgets, so there is no curve Delta(b)." if size == study.sizes[0] else ""
  if not fit.fitted:
    return f"The limit Delta_inf of large budgets{at} {fit.reason}."
  return f"The fitted limit of large budgets{at} is {fit_text(study, fit)}."


def fit_text(study: Study, fit: statistics.BudgetFit) -> str:
  """Delta_inf with its interval and what it means."""
  m, i = METRIC[study.primary], fit.interval
  if not i.bounded and math.isnan(i.low):
    return f"Delta_inf = {m.text(i.mean, True)} {m.unit}, without an interval ({fit.note})"
  meaning = ("the interval excludes 0" if i.excludes_zero else "the interval includes 0")
  return (f"Delta_inf = {m.text(i.mean, True)} {m.unit} (95 % bootstrap interval over {i.n} seeds "
          f"{m.text(i.low, True)} to {m.text(i.high, True)}: {meaning}"
          + (f"; {fit.note}" if fit.note else "") + ")")


def percent(b: float) -> str:
  return f"{100 * b:.3g} %"


def p_text(p: float) -> str:
  return "-" if math.isnan(p) else "below 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


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
