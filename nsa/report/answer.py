"""The first part of the report: the verdict, the gates that admit endpoints, what is missing, and the quantities."""
from __future__ import annotations

import collections

import numpy as np

from nsa.report import analyses, archive, curricula, endpoints, gates as gate_lib, plan_file, selectors, statistics
from nsa.report.comparisons import QUANTITIES, own, percent
from nsa.report.document import Bullets, Heading, Table, Text
from nsa.report.endpoints import Row
from nsa.report.runs import Study
from nsa.report.verdict import Verdict, p_text


def verdict(found: Verdict) -> list:
  """The judgement, in a sentence and in lines."""
  blocks = [Heading("Verdict"), Text(f"**{found.headline}**", "verdict")]
  return blocks + ([Bullets(found.lines)] if found.lines else [])


def picture(study: Study, found: Verdict, gallery) -> list:
  """All that was compared with dense attention in one figure, where there is more than one thing to compare."""
  figure = gallery.plots.against_dense(study, found)
  return [] if figure is None else [gallery.block(
      "against_dense", figure, f"Retrofits and {study.reference} minus {study.dense}, paired by seed. Small marks: "
      "seeds; large: means with 95 % t intervals, filled where there is a word, hollow where undecided. After: on top "
      "of the finished dense model, against one that goes on alike; within: the last part of the same tokens",
      "Every arm's distance from dense attention", "")]


def missing(study: Study, absent: list[str]) -> list:
  """Runs that are in no comparison, what could not be read or drawn (`absent`), and how what ran departs from the
  plan."""
  counts = collections.Counter(r.status for r in study.runs)
  words = ", ".join(f"{counts[s]} {s}" for s in ("done", "failed", "unfinished", "pending") if counts[s])
  lines = [f"{len(study.runs)} run{'s' * (len(study.runs) != 1)}: {words}."]
  lines += [f"`{r.name}` ({r.arm}, {r.size}, seeds {', '.join(map(str, r.seeds))}) **failed**: {r.message}"
            for r in study.runs if r.status == "failed"]
  lines += [f"`{r.name}` ({r.arm}, {r.size}) is {r.status}; it is in no comparison" for r in study.runs
            if r.status == "unfinished"]
  if study.plan and counts["pending"]:
    lines.append("Pending and in no comparison: deviations from the plan say which.")
  elif counts["pending"]:
    meant, pending = {}, {}
    for r in study.runs:
      for seeds in [meant] + [pending] * (r.status == "pending"):
        seeds.setdefault((r.arm, r.size), set()).update(r.seeds)
    lines += [f"Pending and in no comparison, of size {size}: {arms}."
              for size, arms in plan_file.by_size(meant, pending).items()]
  lines += study.problems + ([f"Not drawn: {'; '.join(absent)}."] if absent else [])
  blocks = [Heading("What is missing", 3), Bullets(lines)]
  deviations = plan_file.deviations(study)
  if deviations is not None:
    blocks += [Heading("Deviations from the plan", 3),
               Bullets(deviations) if deviations else Text("None: what ran is what was planned before the data."),
               Text(f"Plan hash: `{study.plan.get('hash')}` (PLAN.md).")]
  return blocks


def opened(study: Study, found: Verdict, again: Verdict | None) -> list:
  """The declared comparisons by the sealed evaluations, beside those by which everything was chosen."""
  if again is None:
    return []
  shown = [run.sealed for run in archive.unsealed(study).finished if run.sealed]
  split = next((one["settings"]["split"] for one in shown if one.get("settings")), "")
  before, lines, many = {c.key: c for c in found.comparisons}, [], len(study.sizes) > 1
  for c in again.comparisons:
    if c.family in ("", "secondary") or c.judgement is None:
      continue
    i, old = c.judgement.interval, before[c.key]
    lines.append([c.name, f"{c.arm} - {c.against}", c.metric.title] + [c.size] * many + [
        c.metric.text(old.judgement.interval.mean, True) if old.judgement else "-", old.said, str(i.n),
        c.metric.text(i.mean, True), c.metric.between(i), c.said if c.said == old.said else f"**{c.said}**"])
  title = f"On {split}, which nothing was chosen by"
  count = f"{len(shown)} of {len(study.finished)} finished runs have a sealed evaluation that was opened"
  if not lines:
    return [Heading(title, 3), Text(f"No comparison: {count}.")]
  return [Heading(title, 3), Table(
      ["", "difference", "endpoint"] + ["size"] * many
      + ["before", "outcome", "seeds", f"on {split}", "95 % t interval", "outcome"], lines,
      count + (f" (tier {', '.join(study.opened)})" if any(study.opened) else "") + ", each made at the end of its run "
      "and read by no report before all runs of its tier were there. Same tests, families and margins; endpoints are "
      "admitted by their controls as above. Bold: another outcome; a word that is not repeated is not used",
      left=3 + many)]


def gates(study: Study, table: list[Row], found: Verdict) -> list:
  """What each endpoint's controls show, and what a failed gate forbids."""
  if not found.admissions:
    return []
  many, tables = len(study.sizes) > 1, {}
  for (metric, size), one in found.admissions.items():
    m = gate_lib.gated(metric)
    title = endpoints.metric(metric).title + (f", by {m.title}" if m.name != metric else "")
    cells = [m.text(gate.found, m.kind == "text") if gate.passed else "**not run**" if gate.found != gate.found
             else f"**{m.text(gate.found, m.kind == 'text')} failed**" for gate in one.gates]
    header = tuple(f"{gate.control}: {gate.needs}" for gate in one.gates)
    tables.setdefault(header, []).append([title] + [size] * many + cells + ["yes" if one.admitted else "**no**"])
  blocks = [Heading("Which endpoints count", 3)]
  for size in study.sizes if study.solved else ():
    can = endpoints.recall_of_dense(study, size)
    blocks.append(Table(["task", f"{study.dense}, exact match (%)", "counts"],
                        [[task, f"{100 * share:.1f}", "yes" if share >= study.solved else "no"]
                         for task, share in sorted(can.items())],
                        f"Recall endpoints are means over the tasks of which {study.dense} answers "
                        f"{100 * study.solved:g} % or more" + study.at(size), left=1))
  blocks.append(Text(
      "Each control and what it has to be; means over seeds. Of text: what the control loses to dense attention "
      "(dense: to the best arm). An endpoint with a failed gate, or with a control that was not run, does not test "
      "selection here and supports no verdict."))
  blocks += [Table(["endpoint"] + ["size"] * many + [*header, "counts"], lines, left=1 + many)
             for header, lines in tables.items()]
  if study.audit:
    shares = ("first", "local", "forced", "window")
    names = list(dict.fromkeys(name for row in study.audit for name in row))
    blocks.append(Table([f"{name} (%)" if name in shares else name for name in names],
                        [[_percent(row.get(name)) if name in shares else str(row.get(name, "-")) for name in names]
                         for row in study.audit],
                        "Shortcut audit, by counting and without a model: the share of answers whose evidence lies in "
                        "blocks that need no selection: the forced first ones, the latest ones, both (forced), or as "
                        "many as are selected, the first and a window", left=1))
  return blocks + [Text(note) for size in study.sizes if (note := analyses.limited(study, table, size))]


def quantities(study: Study, table: list[Row], found: Verdict, gallery) -> list:
  """R, A and Delta with their parts; A at equal cost; selector and backbone error."""
  if not any(c.family for c in found.comparisons):
    return []
  native = len(study.asked) > 1
  blocks = [Heading("R(b), A and Delta(b)" if native else "R(b)"), Text(
      "R(b): a retrofit minus its dense control. "
      + f"A: {study.dense} minus {study.reference}. Delta(b) = R(b) + A. " * native
      + "Of bits per byte and NLL above 0 is behind, of exact match below 0.")]
  for e in study.endpoints:
    for size in study.sizes:
      mine = [c for q in QUANTITIES for c in found.of(q, e.metric, size) if c.judgement]
      if not mine:
        continue
      blocks.append(_comparison_table(study, found, mine, size))
      blocks += _parts(study, table, e.metric, size) if native else []
      if not e.primary or not study.budgets:
        continue
      figure = gallery.plots.budget_curve(study, found, e.metric, size)
      admission = found.admissions.get((e.metric, size))
      blocks.append(gallery.block(
          "budget_" + e.metric.replace(":", "_"), figure,
          ("R(b) and Delta(b), paired by seed. " if native else "R(b), paired by seed. ")
          + ("Marks: seeds; bars: means; lines: 95 % t intervals" if len({c.budget for c in mine if c.budget}) == 1 else
             "Line: A. " * native + "Small marks: seeds. Large: mean with 95 % t interval")
          + ". Grey band: equivalence margin around 0"
          + ("" if admission is None or admission.admitted else ". This endpoint is not admitted by its controls"),
          "Differences over the retrofit budget", "Not drawn: no budget has a finished seed", size))
  return blocks


def costs_of_anchor(study, table) -> list:
  """A at equal tokens, FLOPs and device time."""
  lines, reasons = [], []
  for size in study.sizes if study.reference not in ("", study.dense) else ():
    for m in (endpoints.metric(e.metric) for e in study.endpoints if e.primary):
      rows = analyses.equal_cost(study, table, m.name, size)
      for one in rows if any(one.differences for one in rows) else ():
        words = analyses.BASES[one.basis]
        if one.reason:
          reasons.append(f"Not given at equal {words}{study.at(size)}: {one.reason}.")
        if one.differences:
          i = statistics.t_interval(list(one.differences.values()))
          line = ", ".join(f"{arm}: {m.text(low)} to {m.text(high)}" for arm, (low, high) in one.between.items())
          lines.append([m.title, words] + [size] * (len(study.sizes) > 1)
                       + [endpoints.quantity(one.cost) + " s" * (one.basis == "seconds"), str(i.n),
                          m.text(i.mean, True), m.unit, m.between(i), line or "-"])
  if not lines:
    return []
  return [Heading("A at equal cost", 3), Table(
      ["endpoint", "at equal"] + ["size"] * (len(study.sizes) > 1)
      + ["at", "seeds", "A", "unit", "95 % t interval", "read off between"], lines,
      f"A, {study.dense} minus {study.reference}. Equal FLOPs and time: at the end of the cheaper of the two, the "
      "other read off its decay branches. Where its ends lie far apart the line says little. Exploratory but for equal "
      "tokens", left=2)] + ([Bullets(list(dict.fromkeys(reasons)))] if reasons else [])


def sizes_and_tokens(study: Study, table: list[Row], gallery) -> list:
  """A over the tokens of training, at each size: of runs that were decayed at that point, and of nothing in between."""
  metrics = [endpoints.metric(e.metric) for e in study.endpoints if e.primary and study.branches]
  found = {m: {size: analyses.over_tokens(study, table, m.name, size) for size in study.sizes} for m in metrics}
  lines = [[m.title, size, f"{tokens:.3g}", str(len(d)), m.text(float(np.mean(list(d.values()))), True),
            m.between(statistics.t_interval(list(d.values())))]
           for m, of in found.items() for size, points in of.items() for tokens, d in points.items()]
  if not any(len(points) > 1 for of in found.values() for points in of.values()):
    return []
  what = f"A, {study.dense} minus {study.reference}"
  return [Table(["endpoint", "size", "training tokens", "seeds", "A", "95 % t interval"], lines,
                f"{what}, over the tokens of training: decay branches of both, and both to the end, paired by seed. "
                "Points can rest on other seeds. Exploratory", left=2),
          gallery.block("anchor", gallery.plots.anchor_over_tokens(found),
                        f"{what}, over the tokens of training. Small marks: seeds; lines: means with 95 % t intervals",
                        "Dense minus native over tokens and sizes", "Not drawn")] + _in_tokens(study, table, found)


def _in_tokens(study, table, anchors) -> list:
  """What differences of text are worth in training tokens, by dense attention's own curve."""
  lines, curves, within = [], [], [arm for arm in study.retrofits() if study.control(arm) == study.dense]
  for m, of in anchors.items():
    for size, points in of.items():
      if (curve := analyses.curve(study, table, m.name, size)) is None:
        continue
      curves.append(f"{m.title}{study.at(size)}: {curve.floor:.4f} + {curve.at(curve.tokens) - curve.floor:.4f} "
                    f"(tokens / {curve.tokens:.3g})^-{curve.exponent:.2f}")
      get = lambda arm: own(study, table, arm, size, m.name)
      behind = [(study.reference, tokens, [-x for x in d.values()]) for tokens, d in points.items()]
      behind += [(arm, curve.tokens, statistics.paired_differences(get(arm), get(study.dense))[1]) for arm in within]
      for arm, tokens, d in behind:
        if len(d):
          i, share = statistics.t_interval(d), lambda x: f"{100 * curve.rho(tokens, x):.1f}"
          lines.append([m.title, size, arm, f"{tokens:.3g}", str(i.n), m.text(i.mean, True), share(i.mean),
                        f"{share(i.high)} to {share(i.low)}" if i.bounded else "-"])
  header = ["endpoint", "size", "arm", "training tokens", "seeds", f"minus {study.dense}", "worth, % of its tokens",
            "of the 95 % t interval"]
  return [Table(header, lines,
                f"The share of the tokens with which {study.dense} reaches the arm's loss, by the curve through its "
                f"own decay branches and its end, means over seeds ({'; '.join(curves)}). The curve's own uncertainty "
                "is not in the intervals. Exploratory", left=3)] if lines else []


def errors(study: Study, table: list[Row], size: str, gallery) -> list:
  """Selector or backbone: by the oracle run mode."""
  blocks = [Text("Selector error: loss(own blocks) - loss(oracle blocks). Backbone error: loss(oracle blocks) - "
                 f"loss({study.dense}). Above 0 is lost. Mean ± half-width (seeds); exploratory.")]
  for e in (e for e in study.endpoints if e.primary):
    m, parts = endpoints.metric(e.metric), analyses.errors(study, table, e.metric, size)
    if not parts:
      continue
    lines = [[arm] + [endpoints.interval_text(m, values.values()) for values in by_part.values()]
             for arm, by_part in parts.items()]
    blocks.append(Table(["arm", *next(iter(parts.values()))], lines, f"{m.heading}{study.at(size)}: {m.unit}"))
    if len(parts) > 1:
      blocks.append(
          gallery.block("errors_" + e.metric.replace(":", "_"), gallery.plots.decomposition(e.metric, parts),
                        "Selector and backbone error. Marks: seeds; bars: means; lines: t intervals",
                        "Selector error and backbone error", "Not drawn", size))
  return blocks if len(blocks) > 1 else [Text(
      f"Not split{study.at(size)}: it needs the run mode \"oracle\" of sparse arms and {study.dense} on common "
      "seeds.", "note")]


def exploratory(study: Study, table: list[Row], found: Verdict) -> list:
  """Arms and run modes beside the question: intervals and no word."""
  blocks = []
  for size in study.sizes:
    # Of the dense arm's run modes the section on selectors has more.
    modes, elsewhere = not selectors.ways(study, table, size), curricula.arms(study, size)
    mine = [c for c in found.comparisons if not c.family and c.judgement and c.size == size
            and c.arm not in elsewhere and (modes or c.run_mode == study.headline_mode(c.arm))]
    metrics = [endpoints.metric(e.metric) for e in study.endpoints if e.primary]
    against = list(dict.fromkeys((study.reference, study.dense)))
    lines = []
    for c in mine:
      cells, seeds = [], []
      for m, other in ((m, other) for m in metrics for other in against):
        _, d = statistics.paired_differences(endpoints.series(table, c.arm, size, c.run_mode, m.name),
                                             own(study, table, other, size, m.name))
        seeds.append(len(d))
        i = statistics.t_interval(d) if len(d) else None
        cells.append("-" if i is None else m.text(i.mean, True) + f" ({m.between(i)})" * i.bounded)
      lines.append([study.label(c.arm, c.run_mode), str(max(seeds)), *cells])
    if lines:
      blocks.append(Table(["arm", "seeds", *(f"{m.title} ({m.unit}), minus {other}" for m in metrics
                                             for other in against)], lines,
                          f"Other arms{' and run modes' * modes}{study.at(size)}, paired by seed, with 95 % t "
                          "intervals. Exploratory: outside the family of tests", left=1))
  return blocks


def _comparison_table(study, found, mine, size):
  c0 = mine[0]
  m, words = c0.metric, not all(c.word == "not admitted" for c in mine)
  some = any(c.documents is not None for c in mine)
  lines = []
  for c in mine:
    i, without = c.judgement.interval, c.without_one
    lines.append([c.name, f"{c.arm} - {c.against}" if c.quantity != "Delta" else c.arm, c.word, str(i.n),
                  m.text(i.mean, True), m.between(i)]
                 + ([m.between(c.documents)] if some else [])
                 + [p_text(c.p_tost), p_text(c.p_difference), p_text(c.sign_flip),
                    f"{p_text(min(without))} to {p_text(max(without))}" if without else "-",
                    m.text(c.judgement.detectable)])
  families = {c.family: (sum(o.family == c.family and o.tested for o in found.comparisons), c.alpha) for c in mine}
  tests = ", ".join(f"\"{name}\": {count} tests at alpha {alpha:g}" for name, (count, alpha) in families.items())
  return Table(["", "difference", "outcome", "seeds", m.unit, "95 % t interval"] 
               + ["95 % bootstrap (seed, document)"] * some
               + [f"p, equivalence within ±{m.text(c0.endpoint.margin)}", "p, difference", "p, sign flips",
                  "p, without one seed", "smallest detectable"], lines,
               f"{m.heading}{study.at(size)}"
               + (f". Family {tests}; the first two p after Holm, the others as they are (without one seed: of "
                  "equivalence where the word is matches)" if words
                  else ". **Not admitted by its controls: numbers without a verdict**"), left=3)


def _parts(study, table, metric, size) -> list:
  m, lines = endpoints.metric(metric), []
  tokens = lambda arm: endpoints.finite((r for r in table if (r.arm, r.size) == (arm, size) and r.headline), "tokens")
  mean = lambda arm: endpoints.quantity(float(np.mean(tokens(arm)))) if tokens(arm) else "-"
  sides = lambda ours, theirs: " - ".join(dict.fromkeys((mean(ours), mean(theirs))))  # one number where they are equal
  sd = lambda x: m.text(float(np.std(x, ddof=1))) if len(x) > 1 else "-"
  for arm, (r, a) in analyses.parts(study, table, metric, size).items():
    lines.append([arm, percent(study.budgets[arm]) if arm in study.budgets else "-", str(len(r)),
                  m.text(float(np.mean(r + a)), True), m.text(float(np.mean(r)), True), sd(r),
                  m.text(float(np.mean(a)), True), sd(a),
                  sides(arm, study.control(arm)), sides(study.dense, study.reference)])
  return [Table(["retrofit", "budget", "seeds", "Delta", "= R", "SD of R", "+ A", "SD of A",
                 "tokens of R's sides", "tokens of A's sides"], lines,
                f"Delta in its two parts: {m.title}{study.at(size)}, over the seeds that have every run")
          ] if lines else []


def _percent(share):
  return "-" if share is None else f"{100 * share:.1f}"
