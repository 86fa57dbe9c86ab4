"""The sections of the report, in their order: each takes the study and returns blocks of the document.

A part whose data are missing is one line that says which data, never an exception.
"""
from __future__ import annotations

import collections
import math

import numpy as np

from nsa.report import answer, curricula, endpoints, frontier, isoflop_section, lengths, planning, selectors
from nsa.report.document import Bullets, Heading, Picture, Table, Text, Written
from nsa.report.endpoints import Row
from nsa.report.runs import Study
from nsa.report.verdict import Verdict, judged_in

# file name: (function in plots.py or layer_plots.py, caption, alternative text, what is said where it is missing)
PICTURES = {
    "loss": ("loss_curves", "Training loss, averaged within bins of equal width in log tokens (left) and in tokens "
             "(right). Thin: seeds; thick: means. Dashed: a run that failed or has not finished. Losses of a dense and "
             "of a sparse stage come from different forward passes",
             "Training loss over tokens per arm", "no metrics.jsonl holds a loss"),
    "held_out": ("held_out", "Held-out bits per byte of the second half of the context over training, each arm in its "
                 "own run mode, and minus the reference at the same step (exploratory). Marks: seeds; thick: means. A "
                 "difference that still shrinks is one of speed, not of what can be reached",
                 "Held-out bits per byte over training, and the difference from the reference",
                 "no evaluations of text on the way (eval.every was 0, or nothing is text)"),
    "learnt": ("recall_over_training", "Exact match over training, each arm in its own run mode; a retrofit begins "
               "where it leaves its trunk. Thin: seeds; thick: means", "Exact match over training tokens per arm",
               "no evaluations of tasks on the way (eval.during_examples was 0)"),
    "position": ("positions", "Held-out bits per byte by position in the context (exploratory). Marks: "
                 "seeds; lines: means", "Bits per byte by position in the context",
                 "no records of loss by position"),
    "recall": ("recall", "Exact match of each arm in its own run mode. Marks: seeds",
               "Exact match per task and arm", "no task was evaluated"),
    "context": ("far_context", "Repeated n-grams: NLL of tokens that complete an n-gram seen before in the document, "
                "by the distance to it. Gain by context: bits per byte of the same last bytes with less and less "
                "context before them. Marks: seeds; lines: means",
                "Loss by distance of an earlier occurrence, and by context", "no records of far context"),
    "layers": ("layers", "Share of the attention mass that the chosen blocks hold, against the best choice "
               "of as many blocks (dashed); share of blocks that neighbouring queries have in common. Marks: seeds; "
               "lines: means",
               "Captured and oracle attention mass and overlap per layer",
               "no layer diagnostics (eval.diagnostics was off, or no arm is sparse)"),
    "learning": ("masses_over_training", "Share of the attention mass that the chosen blocks hold (solid) and that as "
                 "many best blocks would hold (dashed), per layer, over the tokens that the arm itself trained on: a "
                 "retrofit begins where it leaves the trunk. Thin: seeds; thick: means",
                 "Captured and oracle attention mass per layer over training",
                 "no evaluations on the way (eval.every was 0, or eval.diagnostics off)"),
    "sharing": ("overlap_over_training", "Share of a query's blocks that the next query chose too, per layer, over the "
                "tokens that the arm itself trained on. Thin: seeds; thick: means",
                "Overlap of neighbouring queries' blocks per layer over training",
                "no evaluations on the way of an arm that chooses blocks"),
    "blocks": ("heat_maps", "Share of the queries of a query block that select a key block: one head, one "
               "document, one seed; neighbouring blocks are averaged where there are many. An "
               "illustration, not a measurement", "Heat map of selected blocks",
               "no record of selected blocks"),
}


# name in Study.sections: (study, table, gallery) -> blocks
FURTHER = {"frontier": frontier.section, "isoflop": isoflop_section.section}


class Gallery:
  """Draws figures as the sections ask for them, and saves them under plots/."""

  def __init__(self, study: Study, folder, endings=("svg", "png")):
    from nsa.report import layer_plots, plots, style  # here: the verdict alone needs no matplotlib
    self.plots, self.layer_plots, self.style = plots, layer_plots, style
    self.study, self.folder, self.endings = study, folder, endings
    self.look = style.Look(study)
    self.names = []

  def picture(self, name, size):
    """The picture `name` of PICTURES for one model size, and what it leaves out."""
    function, caption, alt, missing = PICTURES[name]
    figure = getattr(self.plots, function, None) or getattr(self.layer_plots, function)
    figure = figure(self.study, self.look, size)
    return [self.block(name, figure, caption, alt, "Not drawn: " + missing, size)]

  def block(self, name, figure, caption, alt, missing, size=""):
    """A Picture, or the one line that says what is missing. `figure` is None where nothing can be drawn."""
    at = self.study.at(size) if size else ""
    if figure is None:
      return Text(missing + at + ".", "note")
    if at:
      name = f"{name}_" + "".join(c if c.isalnum() or c in "-_." else "_" for c in size)
    self.style.save(figure, self.folder, name, self.endings)
    self.names.append(name)
    return Picture(name, caption.rstrip(".") + at, alt)


def all_sections(study: Study, table: list[Row], verdict: Verdict, gallery: Gallery,
                 opened: Verdict | None = None) -> list:
  """The whole document."""
  blocks = [Text(study.question, "note")] if study.question else []
  blocks += answer.verdict(verdict) + answer.picture(study, verdict, gallery) + answer.opened(study, verdict, opened)
  for name in study.sections:
    blocks += FURTHER[name](study, table, gallery) if name in FURTHER else [
        Text(f"The section {name!r} that the study asks for is not known to this version.", "note")]
  by_length = lengths.section(study, gallery)
  judges = lengths.TITLE in judged_in(study, verdict.admissions)
  first, blocks, absent = blocks + by_length * judges + answer.gates(study, table, verdict), [], []
  if any(sum(map(bool, run.tasks.values())) > 1 for run in study.runs):
    blocks.append(Heading("When recall is learnt"))
    for size in study.sizes:
      blocks += gallery.picture("learnt", size) + learnt(study, size)
  blocks += arms(study, table)
  blocks += answer.quantities(study, table, verdict, gallery) + answer.costs_of_anchor(study, table)
  blocks += answer.sizes_and_tokens(study, table, gallery)
  blocks += answer.exploratory(study, table, verdict) + by_length * (not judges)
  for title, part in ((curricula.TITLE, lambda *a: curricula.section(*a[:3], verdict.admissions, gallery)),
                      ("Selector or backbone?", answer.errors), ("Trained, or free of training?", selectors.section),
                      ("Loss curves", "loss"),
                      ("Held-out loss over training", "held_out"),
                      ("Loss by position", "position"), ("Recall by task", "recall"), ("Far context", "context"),
                      ("Train mode and run mode", modes), ("What the selector captures", "layers"),
                      ("Captured and oracle mass over training", "learning"),
                      ("What neighbouring queries share", locality), ("Which blocks one head selects", "blocks"),
                      ("Spread over seeds, and what another study could see", spread)):
    if (part == "context"
        and not any(r["kind"] in ("ar_hit", "context_gain") for run in study.runs for r in run.records)):
      continue  # not asked for
    mine = []
    for size in study.sizes:
      found = part(study, table, size, gallery) if callable(part) else gallery.picture(part, size)
      mine += [b for b in found if not (isinstance(b, Text) and b in mine)]  # what holds of all sizes is said once
    notes = [b.text for b in mine if isinstance(b, Text) and b.style == "note"]
    if len(notes) == len(mine):
      absent += [f"{title}: {note.removeprefix('Not drawn: ').rstrip('.')}" for note in notes]
    else:
      blocks += [Heading(title), *mine]
  notes = [Heading("Notes"), Written(study.notes)] if study.notes.strip() else []
  return first + answer.missing(study, absent) + notes + blocks + speeds(study) + limits(study, table, verdict)


def learnt(study: Study, size: str) -> list:
  """The first evaluation at which an arm answers half, and nine tenths, of its questions, by seed."""
  rows = []
  for arm in study.arms:
    found = endpoints.recall_over_training(study, arm, size)
    if len({step for _, step in found}) < 2:
      continue
    seeds = sorted({seed for seed, _ in found})
    def first(level):
      steps = collections.Counter(min((step for (s, step), v in found.items() if s == seed and v >= level),
                                      default=math.inf) for seed in seeds)
      return ", ".join(("never" if step == math.inf else str(step)) + f" ({count})" * (len(seeds) > 1)
                       for step, count in sorted(steps.items()))
    rows.append([arm, first(0.5), first(0.9)])
  return [Table(["arm", "50 % at step (seeds)", "90 % at step (seeds)"], rows,
                "The first evaluation that found so many answers right. Exploratory")]


def arms(study: Study, table: list[Row]) -> list:
  """Arm by arm: endpoints in its own run mode, those of the dense arm in others, cost."""
  blocks = [Heading("Arms"), Text(
      "Mean ± half-width of the 95 % t interval over seeds; without ± there is one seed. Visible share: what the last "
      "query of a full context attends to. Limited queries: those with more blocks than they take. Tokens/s per seed "
      "and MFU (FLOPs that the arm needs, over the device's peak): medians over its last stage. \"arm -> mode\": the "
      "trained arm, run in another mode.")]
  shown = [r for r in table if r.status == "done"] or table
  if shown and shown[0].status != "done":
    blocks.append(Text("No run has finished: these are the numbers of the latest evaluations.", "note"))
  shown_metrics = list(
      dict.fromkeys(e.metric for e in study.endpoints if any(math.isfinite(r[e.metric]) for r in table)))
  for size in study.sizes:
    own, others, costs = [], [], []
    for arm, mode in dict.fromkeys((r.arm, r.run_mode) for r in shown if r.size == size):
      mine = [r for r in shown if (r.arm, r.run_mode, r.size) == (arm, mode, size)]
      if not mine[0].headline and arm != study.dense and study.declared:
        continue  # train mode x run mode has them
      name = [study.label(arm, mode), str(len({r.seed for r in mine}))]
      (own if mine[0].headline else others).append(name + [
          endpoints.interval_text(endpoints.metric(m), endpoints.finite(mine, m), False) for m in shown_metrics])
      if mine[0].headline:
        quantities = [endpoints.quantity(_mean(mine, n)) for n in ("tokens", "flops", "tokens_per_second")]
        share = next((100 * s for r in study.arm_runs(arm, size) if math.isfinite(s := endpoints.visible_share(r))),
                     math.nan)
        costs.append(name + quantities + [_percent(mine, "mfu", ".1f"), "-" if math.isnan(share) else f"{share:.1f}",
                                          "-" if mode == "dense" else _percent(mine, "queries_limited", ".0f")])
    header = ["arm", "seeds", *(endpoints.metric(m).title for m in shown_metrics)]
    for lines, caption in ((own, "each arm in its own run mode"), (others, "finished arms in other run modes")):
      if lines:
        blocks.append(Table(header, lines, f"Size {size}: {caption}"))
    if costs:
      blocks.append(Table(["arm", "seeds", "training tokens", "training FLOPs per seed", "tokens/s", "MFU (%)",
                           "visible share (%)", "limited queries (%)"], costs, f"Size {size}: cost and sparsity"))
    if not own + others:
      blocks.append(Text(f"Size {size}: no evaluation yet.", "note"))
  return blocks


def modes(study, table, size, gallery) -> list:
  """Rows are what was trained, columns how it is run, of the run modes that not dense alone was run in."""
  shown = [r for r in table if r.size == size and (r.status == "done" or not study.finished)]
  first = ("dense", "sparse", "oracle", "random")
  columns = sorted({r.run_mode for r in shown if r.headline or r.arm != study.dense},
                   key=lambda m: (first.index(m) if m in first else len(first), m))
  blocks = []
  for metric in map(endpoints.metric, dict.fromkeys(e.metric for e in study.endpoints)):
    lines = []
    for arm in study.arms:
      cells = [endpoints.finite((r for r in shown if (r.arm, r.run_mode) == (arm, m)), metric.name) for m in columns]
      if any(cells):
        lines.append([arm] + [("**{}**" if m == study.headline_mode(arm) else "{}").format(
            endpoints.interval_text(metric, c)) if c else "-" for m, c in zip(columns, cells)])
    if lines:
      at = f"size {size}, " if len(study.sizes) > 1 else ""
      blocks.append(Table(["trained as"] + [f"run {m}" for m in columns], lines,
                          f"{metric.heading}; {at}mean ± half-width (seeds), bold: the arm's own mode. Exploratory "
                          "but for that"))
  return blocks or [Text("No evaluation yet.", "note")]


def locality(study, table, size, gallery) -> list:
  """What neighbouring queries share: what kernels that take a tile of them at a time can share, too."""
  lines = []
  for arm in study.arms:
    mine = [r for r in table if (r.arm, r.size) == (arm, size) and r.headline and r.status == "done"]
    if not endpoints.finite(mine, "tile_union"):
      continue
    by_layer = endpoints.group(endpoints.select(study, "layer", arm, size, study.headline_mode(arm)), ("layer",),
                               "tile_union")
    unions = list(by_layer.values())
    lines.append([arm, _percent(mine, "overlap", ".1f"), _percent(mine, "tile_common", ".1f"),
                  f"{_mean(mine, 'tile_union'):.2f}", f"{min(unions):.2f} to {max(unions):.2f}" if unions else "-"])
  blocks = gallery.picture("sharing", size)
  if not lines:
    return blocks + [Text("No evaluation has measured what a tile of queries shares.", "note")]
  return blocks + [Table(
      ["arm", "next query's blocks in common (%)", "choices on common blocks (%)", "union of a tile / one query",
       "over layers"], lines,
      "At the end of training, of queries with more blocks than they take. A tile: 128 query rows, all heads that "
      "share a list. Common: chosen by a third of its queries. Exploratory.")]


def spread(study, table, size, gallery) -> list:
  """The SD over seeds of each endpoint, and the smallest effect that a main study could see."""
  blocks, at = [], study.at(size)
  for metric, margin in ((endpoints.metric(e.metric), e.margin) for e in study.endpoints):
    lines = []
    for s in planning.spreads(study, table, size, metric.name, margin):
      if s.n < 2:
        continue
      paired = s.df > 0 and s.sd_difference > 0
      low, high = planning.statistics.standard_deviation_interval(s.sd_difference, s.df)
      seen = [metric.with_interval(*s.detectable(n)) if paired else "-" for n in planning.SEEDS]
      least = s.seeds_for_margin if paired else None
      lines.append([s.arm or "**retrofits, pooled**", str(s.n), *map(metric.text, (s.mean, s.sd, s.sd_difference)),
                    f"{metric.text(low)} to {metric.text(high)}" if paired else "-", *seen,
                    ("-" if not paired else str(least) if least else f"over {planning.MOST_SEEDS}")])
    if lines:
      blocks.append(Table(
          ["arm", "seeds", "mean", "SD over seeds",
           f"SD of paired difference from {study.reference or 'the reference'}", "95 % interval of that SD"]
          + [f"smallest detectable, {n} seeds" for n in planning.SEEDS]
          + [f"seeds to see {metric.text(margin)}"], lines, f"{metric.heading}{at}"))
  return [Text("Arms of two seeds and more, each in its own run mode. Detectable: a mean paired difference found with "
               "80 % power at 5 % two-sided, were the SD the one found (and at the ends of its chi-square interval). "
               "Pooled as if the retrofits' differences were independent; they share the reference's runs, so its "
               "interval is too narrow."), *blocks] if blocks else [Text(f"No arm has two finished seeds{at}.", "note")]


def speeds(study: Study) -> list:
  """How fast the arms trained, and where the time of the finished runs went."""
  heading, found = Heading("Where the time went"), planning.rates(study)
  if not found:
    return [heading, Text("Not given: no finished run has logged tokens per second.", "note")]
  lines = ["FLOP/s of one device, of those that the arm needs: "
           + ", ".join(f"{arm} {r / 1e12:.3g}T" for arm, r in found.items()) + "."]
  if paused := sum((collections.Counter(run.paused) for run in study.finished), collections.Counter()):
    trained = sum(planning.training_seconds(run) for run in study.finished)
    lines.append("The finished runs took: " + ", ".join(
        f"{label} {s / 60:.1f} min" for label, s in (("training", trained), *sorted(paused.items()))) + ".")
  return [heading, Bullets(lines)]


def limits(study: Study, table: list[Row], verdict: Verdict) -> list:
  """(11) What the study cannot say."""
  seeds = sorted({len({r.seed for r in table if (r.arm, r.size) == k and r.headline and r.status == "done"})
                  for k in {(r.arm, r.size) for r in table if r.headline and r.status == "done"}})
  items = []
  if not seeds:
    items.append("No run has finished; nothing is concluded.")
  else:
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    items.append(f"**Seeds.** {n} per arm and size."
                 + " With one seed nothing can be said about arms, only about checkpoints." * (seeds[0] == 1)
                 + (" The t interval takes differences between seeds as normal; with so few that cannot be checked."
                    * (seeds[-1] > 1)))
  tokens = endpoints.finite(table, "tokens")
  items.append(f"**Scale.** Sizes run: {', '.join(study.sizes) or 'none'}"
               + (f", at most {endpoints.quantity(max(tokens))} training tokens per run" if tokens else "")
               + ". Nothing here speaks of larger models, longer contexts or other data.")
  if study.declared:
    listed = lambda primary: "; ".join(f"{m.title}, margin {m.text(e.margin)} {m.unit}" for e in study.endpoints
                                       if e.primary == primary and (m := endpoints.metric(e.metric)))
    items.append(f"**Endpoints.** Primary: {listed(True)}" + (f". Secondary: {listed(False)}" if listed(False) else "")
                 + f". The families of the primary endpoints share alpha {study.alpha:g}, under Holm within. "
                 "Everything else is exploratory.")
    items.append("**A match** means equivalent within that margin, at these budgets, with this selector. "
                 "Whether the margin is small enough to matter is a judgement that statistics does not make.")
  bootstrapped = [c for c in verdict.comparisons if c.documents is not None and c.documents.bounded]
  if bootstrapped:
    items.append("**Documents.** The bootstrap over (seed, document) is a percentile interval and too narrow "
                 "with few seeds; the t interval over seeds decides.")
  splits = sorted({r.split for r in table})
  if splits and splits != ["val"]:
    items.append(f"**Split.** Evaluated on {', '.join(splits)}.")
  commits = sorted({r.versions["commit"][:12] + " with changes" * bool(r.versions.get("dirty")) for r in study.runs
                    if r.versions.get("commit")})
  if commits:
    items.append("**Code.** Commit " + ", ".join(commits) + ".")
  versions = sorted({f"{k} {v[:12] if k.endswith('sha256') else v}" for r in study.runs for k, v in r.versions.items()
                     if isinstance(v, (str, int, float)) and k not in ("commit", "dirty")})
  if versions:
    items.append("**Ran with** " + ", ".join(versions[:16]) + ".")
  return [Heading("What this cannot say" if study.declared else "Limits"), Bullets(items)]


def _mean(table, name):
  values = endpoints.finite(table, name)
  return float(np.mean(values)) if values else math.nan


def _percent(table, name, form):
  value = _mean(table, name)
  return f"{100 * value:{form}}" if math.isfinite(value) else "-"
