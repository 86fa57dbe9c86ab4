"""The first words of the report: what the comparisons (comparisons.py) say, in a sentence and in lines."""
from __future__ import annotations

import dataclasses
import math
from typing import Iterable

from nsa.report import endpoints, gates, lengths, statistics
from nsa.report.comparisons import FOUND, QUANTITIES, Comparison, comparisons, own, percent
from nsa.report.endpoints import Row
from nsa.report.runs import Study

# Of Study.sections: what they are called in the report. They have a rule of their own, and what it says is the verdict.
SECTIONS = {"frontier": "What sparsity is safe?", "isoflop": "Larger and sparse, or smaller and dense?"}
APART = 0.2        # exact match: seeds whose outcomes fall into two groups so far apart are counted, not averaged alone


@dataclasses.dataclass
class Verdict:
  """What the report says first: one sentence, then lines of one statement each."""
  headline: str
  lines: list[str]
  comparisons: list[Comparison]
  admissions: dict[tuple[str, str], gates.Admission]

  def of(self, quantity: str, metric: str, size: str) -> list[Comparison]:
    return [c for c in self.comparisons if (c.quantity, c.endpoint.metric, c.size) == (quantity, metric, size)]


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
            "repeat it: no word"}[c.repeated if c.said in FOUND else None]
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


_WORDS = (*FOUND, "not repeated", "undecided", "cannot be judged", "not admitted")


def _tally(group) -> str:
  """"worse at 1 %, 5 %; matches at 25 %; 3 more without a pair of runs"."""
  at = lambda c: (c.arm if c.budget is None else percent(c.budget) + f" ({c.arm})" * (
      len({o.arm for o in group if o.budget == c.budget}) > 1)) + (
          f" ({c.seeds})" if c.word in FOUND and len(c.differences) < c.expected else "")
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
  early = sum(c.word in FOUND and len(c.differences) < c.expected for c in group)
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


def p_text(p: float) -> str:
  """A p value in words, to two figures."""
  return "-" if math.isnan(p) else "below 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
