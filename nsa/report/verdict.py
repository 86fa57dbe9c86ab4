"""The judgement: which arms are compared, what the seeds say, and the words for it.

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
from typing import Callable, Iterable

import numpy as np

from nsa.report import comparable, endpoints, gates, lengths, statistics
from nsa.report.endpoints import Row
from nsa.report.runs import Endpoint, Study

QUANTITIES = ("R", "A", "Delta")
# Of Study.sections: what they are called in the report. They have a rule of their own, and what it says is the verdict.
SECTIONS = {"frontier": "What sparsity is safe?", "isoflop": "Larger and sparse, or smaller and dense?"}
_FOUND = ("matches", "worse", "better")
APART = 0.2        # exact match: seeds whose outcomes fall into two groups so far apart are counted, not averaged alone


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
    return "not repeated" if self.repeated is False and self.said in _FOUND else self.said

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


@dataclasses.dataclass
class Verdict:
  """What the report says first: one sentence, then lines of one statement each."""
  headline: str
  lines: list[str]
  comparisons: list[Comparison]
  admissions: dict[tuple[str, str], gates.Admission]

  def of(self, quantity: str, metric: str, size: str) -> list[Comparison]:
    return [c for c in self.comparisons if (c.quantity, c.endpoint.metric, c.size) == (quantity, metric, size)]


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


def levels_off(found: Iterable[Comparison]) -> tuple[bool, str]:
  """Whether R(b) of one endpoint and size is shown to level off: its two largest budgets are equivalent within the
  margin.

  A limit of large budgets is claimed only then, as the level of the largest budget that was run: Delta(b) goes to 0 as
  b goes to 1 by construction, so that nothing is extrapolated.
  """
  points = sorted((c for c in found if c.quantity == "R" and c.budget and len(c.differences) > 1),
                  key=lambda c: c.budget)
  if len({c.budget for c in points}) < 3:
    return False, "R(b) has fewer than 3 budgets with 2 seeds: no limit can be read from it"
  low, high = points[-2:]
  _, d = statistics.paired_differences(high.differences, low.differences)
  p = statistics.tost(d, high.endpoint.margin) if len(d) > 1 else math.nan
  m, between = high.metric, f"between {percent(low.budget)} and {percent(high.budget)}"
  if not p <= 0.05:
    return False, (f"R(b) is not shown to level off {between} (both one-sided tests of the change: p = {p_text(p)}): "
                   "no limit is claimed")
  i = statistics.t_interval(list(high.differences.values()))
  return True, (f"R(b) levels off {between} (its change lies within ±{m.text(high.endpoint.margin)}, p = "
                f"{p_text(p)} by itself), at {m.text(i.mean, True)} {m.unit} (95 % t interval {m.between(i)})")


def counted(study: Study, table: list[Row], metric: str, size: str) -> list[str]:
  """Arms whose seeds fall into two groups on a recall endpoint: learnt or not, as counts."""
  m = gates.gated(metric)
  if m.kind != "recall":
    return []
  out = []
  for arm in study.arms:
    values = own(study, table, arm, size, m.name)
    groups = statistics.two_groups(list(values.values()), APART) if values else None
    if groups:
      low, high = groups
      span = lambda x: " to ".join(dict.fromkeys((m.text(x[0]), m.text(x[-1]))))
      out.append(f"{arm}: {len(high)} of {len(values)} seeds at {span(high)} %, {len(low)} at {span(low)} %")
  return out


def sentence(study: Study, c: Comparison) -> str:
  """One comparison in plain words, with its interval and its tests."""
  m, j, size = c.metric, c.judgement, f" at size {c.size}" if len(study.sizes) > 1 else ""
  if j is None:
    return f"{c.name}{size}: **cannot be judged**: {c.reason}."
  i = j.interval
  where = f"{m.text(i.mean, True)} {m.unit}"
  if not i.bounded:
    return (f"{c.name}{size}: **{c.arm} against {c.against} cannot be judged**: 1 seed gives a difference of {where} "
            "and no interval over seeds.")
  if c.word == "not admitted":
    return f"{c.name}{size}: {c.arm} minus {c.against} is {where} (95 % t interval {m.between(i)}); no verdict."
  verb = {"matches": "matches {}", "worse": "is worse than {}", "better": "is better than {}",
          "undecided": "against {} is undecided"}[c.said].format(c.against)
  p = (f"equivalence within ±{m.text(c.endpoint.margin)}, p = {p_text(c.p_tost)}" if c.said == "matches" else
       f"difference, p = {p_text(c.p_difference)}" if c.said in ("worse", "better") else
       f"p = {p_text(c.p_tost)} for equivalence within ±{m.text(c.endpoint.margin)}, {p_text(c.p_difference)} for a "
       "difference")
  stands = {None: "", True: ", repeated by the sealed evaluations", False: " here, and the sealed evaluations do not "
            "repeat it: no word"}[c.repeated if c.said in _FOUND else None]
  text = (f"{c.name}{size}: **{c.arm} {verb}**{stands}: {where} (95 % t interval {m.between(i)}, {c.seeds}; after Holm "
          f"{p})")
  if c.said == "matches" and i.excludes_zero:
    text += "; a difference is there, and it is smaller than the margin"
  if c.said == "matches" and (without := max(c.without_one, default=0.0) * c.p_tost / j.p_tost) > c.alpha:
    text += f"; but without one of the seeds p = {p_text(min(1.0, without))} after Holm"
  if c.said in ("worse", "better"):
    without = max(c.without_one, default=0.0)  # of 2 seeds there is none
    weak = [f"sign flips give p = {p_text(c.sign_flip)}"] * (c.sign_flip > 0.05) + [
        f"without one of the seeds p = {p_text(without)}"] * (without > 0.05)
    text += f"; but {' and '.join(weak)}" if weak else ""
  return text + "."


def detectable(found: list[Comparison]) -> str:
  """The smallest effect that the comparisons of one metric could have seen with their seeds and their scatter."""
  known = [c.judgement for c in found if c.judgement is not None and math.isfinite(c.judgement.detectable)]
  if not known:
    return ""
  m, effects = found[0].metric, sorted(j.detectable for j in known)
  seeds = sorted({j.interval.n for j in known})
  span, pairs = (" to ".join(dict.fromkeys(x))
                 for x in ((m.text(effects[0]), m.text(effects[-1])), (str(seeds[0]), str(seeds[-1]))))
  return (f"With {pairs} paired seeds and the scatter found, the smallest effect a single comparison could have seen "
          f"is {span} {m.unit} (80 % power, 5 % two-sided, before Holm)" + (
              ": more than the margin, so a difference as large as the margin could have been missed."
              if effects[-1] > found[0].endpoint.margin else "."))


def verdict(study: Study, table: list[Row], admitted: dict | None = None, again: Verdict | None = None) -> Verdict:
  """The first words of the report.

  admitted: by which controls, where they are not in this table (gates.admissions).
  again: the same by evaluations that had been sealed; a word that they do not repeat is not used.
  """
  admitted = gates.admissions(study, table) if admitted is None else admitted
  found = comparisons(study, table, admitted)
  if again is not None:
    there = {c.key: c.said for c in again.comparisons if c.judgement is not None}
    runs = {(c.quantity, c.size, c.arm) for c in again.comparisons if c.judgement is not None}
    for c in found:  # of an endpoint that was not sealed nothing is repeated
      c.repeated = there.get(c.key) == c.said if (c.quantity, c.size, c.arm) in runs else None
  failed = sum(r.status == "failed" for r in study.runs)
  waiting = sum(r.status in ("pending", "unfinished") for r in study.runs)
  lost = sum(len(r.diverged) for r in study.finished)
  counts = [f"{failed} of {len(study.runs)} runs failed."] * bool(failed) + [
      f"{lost} seed{'s' * (lost > 1)} of runs that finished diverged: no comparison has them."] * bool(lost) + [
      f"{waiting} of {len(study.runs)} runs have not finished and are left out."] * bool(waiting)
  if elsewhere := judged_in(study, admitted):
    return Verdict("What this study judges is in the next section" + "s" * (len(elsewhere) > 1) + ": "
                   + "; ".join(elsewhere), counts, found, admitted)
  primary = [c for c in found if c.family not in ("", "secondary")]
  if not study.reference or not primary:
    head = ("No verdict: no study.json says which arms were to be compared." if not study.declared else
            "No verdict: study.json names no reference arm." if not study.reference else
            f"No verdict: there is no arm to compare with {study.reference}.")
    return Verdict(head, counts, found, admitted)
  result = Verdict("", [], found, admitted)
  begun = [size for size in study.sizes if any(r.status == "done" and r.size == size for r in study.runs)]
  for e in study.endpoints:
    for size in begun or study.sizes:
      result.lines += _of_endpoint(study, table, result, e, size)
  result.headline = _headline(study, [c for c in primary if c.size in begun] or primary)
  if begun and (rest := [size for size in study.sizes if size not in begun]):
    counts = [f"Of size {' and '.join(rest)} no run has finished."] + counts
  result.lines += counts
  return result


def judged_in(study: Study, admitted: dict) -> list[str]:
  """The sections that judge instead of R, A and Delta: those that the study asks for; by length, where it compares arms
  with controls at several lengths and no endpoint's gates were run."""
  if study.sections:
    return [SECTIONS[name] for name in study.sections if name in SECTIONS]
  run = [gate for one in admitted.values() for gate in one.gates if gate.control != study.dense
         and math.isfinite(gate.found)]
  return [lengths.TITLE] * (bool(admitted) and not run and any(lengths.planned(study, size) for size in study.sizes))


def _of_endpoint(study, table, result, e, size) -> list[str]:
  m, at = endpoints.metric(e.metric), f" at size {size}" if len(study.sizes) > 1 else ""
  gate = result.admissions.get((e.metric, size))
  title = f"{'' if e.primary else 'Secondary: '}{m.title}{at}"
  if gate is None:
    return [f"**{title}**: no result."]
  if not gate.admitted:
    return [f"**{title} does not test selection here** ({gate.failures()}). Its numbers are shown; they support no "
            "verdict, in neither direction."]
  lines = []
  mine = [c for q in QUANTITIES for c in result.of(q, e.metric, size)]
  for quantity in QUANTITIES:
    group = [c for c in mine if c.quantity == quantity]
    if group:  # the largest budget; the table has them all
      c = max(group, key=lambda c: (c.judgement is not None, c.budget or 0))
      lines.append(f"**{title}.** " * (not lines) + sentence(study, c))
      lines[-1] += f" All {quantity}(b): {_tally(group)}." if len(group) > 1 else ""
  deltas = [c for c in mine if c.quantity == "Delta" and c.judgement]
  if len(deltas) > 1:
    words = {c.word for c in mine if c.quantity == "R"}
    lines.append(f"The {len(deltas)} Delta(b) share the runs of {study.reference} and the one comparison A "
                 f"({study.dense} minus {study.reference}): they are one finding about {study.reference}, not "
                 f"{len(deltas)}"
                 + (f", and with every R(b) a match they are A again, {len(deltas)} times." if words == {"matches"}
                    else "."))
  if e.primary and study.budgets:
    lines.append(levels_off([c for c in mine if study.control(c.arm) == study.dense])[1] + ".")
  groups = counted(study, table, e.metric, size)
  if groups and not m.gated_by:
    lines.append("Seeds fall into two groups, which a mean does not describe: " + "; ".join(groups) + ".")
  if m.kind == "recall" and (n := max((c.judgement.interval.n for c in mine if c.word == "matches"), default=0)):
    lines.append(f"A match is of the mean over seeds that scatter as these do: {n} seeds leave room for a failure that "
                 f"none of them shows in up to {100 * (1 - 0.05 ** (1 / n)):.0f} % of seeds (95 %).")
  return lines + ([d] if e.primary and (d := detectable(mine)) else [])


_WORDS = (*_FOUND, "not repeated", "undecided", "cannot be judged", "not admitted")


def _tally(group) -> str:
  """"worse at 1 %, 5 %; matches at 25 %; 3 more without a pair of runs"."""
  at = lambda c: (c.arm if c.budget is None else percent(c.budget) + f" ({c.arm})" * (
      len({o.arm for o in group if o.budget == c.budget}) > 1)) + (
          f" ({c.seeds})" if c.word in _FOUND and len(c.differences) < c.expected else "")
  ran = [c for c in group if c.differences] or group
  words = [f"{word} at {', '.join(at(c) for c in ran if c.word == word)}"
           for word in _WORDS if any(c.word == word for c in ran)]
  return "; ".join(words + [f"{len(group) - len(ran)} more without a pair of runs"] * (len(ran) < len(group)))


def _headline(study, primary):
  quantity = next((q for q in ("Delta", "R", "A") if q in study.quantities), "")
  group = [c for c in primary if c.quantity == quantity] or primary
  against = study.reference if quantity != "R" else "its dense control"
  who = study.dense if quantity == "A" else "Retrofit"
  out = [c for c in group if not c.admitted]
  if len(out) == len(group):
    return "No verdict: no primary endpoint is admitted by its controls."
  left_out = sorted({c.metric.title for c in out})
  note = f" ({'; '.join(left_out)}: not admitted)" if left_out else ""
  early = sum(c.word in _FOUND and len(c.differences) < c.expected for c in group)
  note += f" ({early} of these words with seeds still to come)" if early else ""
  kept = [c for c in group if c.admitted]
  judged = [c for c in kept if c.word != "cannot be judged"]
  if not judged:
    reasons = dict.fromkeys(c.reason or "there is only 1 seed per arm" for c in kept)
    return f"No verdict: {'; '.join(reasons)}{note}."
  words, count = {c.word for c in judged}, len(judged)
  many = f" in all {count} comparisons" if count > 1 else ""
  unjudged = f" ({len(kept) - count} more cannot be judged)" if count < len(kept) else ""
  if words == {"undecided"}:
    return (f"Undecided{many}{unjudged}{note}: the seeds show neither a difference from {against} nor a match within "
            "the margin.")
  if words == {"matches"}:
    margins = " and ".join(dict.fromkeys(f"{c.metric.text(c.endpoint.margin)} {c.metric.unit}" for c in judged))
    return f"{who} matches {against} within {margins}{many}{unjudged}{note}."
  if words in ({"worse"}, {"better"}):
    return f"{who} is {words.pop()} than {against}{many}{unjudged}{note}."
  words = [c.word for c in judged]
  tally = ", ".join(f"{words.count(w)} {w}" for w in _WORDS if w in words)
  return f"{who} against {against}, {count} comparisons: {tally}{unjudged}{note}."


def percent(b: float) -> str:
  """A share in words, to three figures."""
  return f"{100 * b:.3g} %"


def p_text(p: float) -> str:
  """A p value in words, to two figures."""
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
