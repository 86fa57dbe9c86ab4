"""The sections of the report, in their order: each takes the study and returns blocks of the document.

A part whose data are missing is one line that says which data, never an exception.
"""
from __future__ import annotations

import collections
import math

import numpy as np

from nsa.report import statistics
from nsa.report import analyses, document, endpoints, planning, verdict as verdict_lib
from nsa.report.document import Bullets, Heading, Picture, Table, Text
from nsa.report.endpoints import METRIC, Row
from nsa.report.runs import Study
from nsa.report.verdict import Comparison, Verdict

PICTURES = {  # file name: (function in plots.py, caption, alternative text, what is said where it is missing)
    "loss": ("loss_curves", "Training loss, one line per seed, averaged within bins of equal width in log "
             "tokens (left) and in tokens (right). Dashed: a run that failed or has not finished. Losses of "
             "a dense and of a sparse stage come from different forward passes",
             "Training loss over tokens per arm", "no metrics.jsonl holds a loss"),
    "held_out": ("held_out", "Held-out bits per byte of the second half of the context over training, each arm in its own run mode, "
                 "and minus the reference at the same step (exploratory). Marks: seeds; thick: means. A difference that still "
                 "shrinks is one of speed, not of what can be reached",
                 "Held-out bits per byte over training, and the difference from the reference",
                 "no evaluations on the way (eval.every was 0)"),
    "position": ("positions", "Held-out bits per byte by position in the context (exploratory). Marks: "
                 "seeds; lines: means", "Bits per byte by position in the context",
                 "no records of loss by position"),
    "recall": ("recall", "Exact match of each arm in its own run mode. Marks: seeds",
               "Exact match per task and arm", "no task was evaluated"),
    "layers": ("layers", "Share of the attention mass that the chosen blocks hold, against the best choice "
               "of as many blocks (dashed: one line per seed); share of blocks that neighbouring queries "
               "have in common. Marks: seeds; lines: means",
               "Captured and oracle attention mass and overlap per layer",
               "no layer diagnostics (eval.diagnostics was off, or no arm is sparse)"),
    "learning": ("masses_over_training", "Share of the attention mass that the chosen blocks hold (solid) and that as many best "
                 "blocks would hold (dashed), per layer, over the tokens that the arm itself trained on: a retrofit "
                 "begins where it leaves the trunk. Thin: seeds; thick: means",
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
OF_RECORDS = ("loss", "held_out", "position", "recall", "blocks")  # pictures of what results.csv and layers.csv do not hold


class Gallery:
  """Draws figures as the sections ask for them, and saves them under plots/."""

  def __init__(self, study: Study, folder, endings=("svg", "png")):
    from nsa.report import plots, style  # here: the verdict alone needs no matplotlib
    self.plots, self.style, self.study, self.folder, self.endings = plots, style, study, folder, endings
    self.look = style.Look(study)
    self.names = []

  def picture(self, name, size):
    """The picture `name` of PICTURES for one model size, and what it leaves out."""
    function, caption, alt, missing = PICTURES[name]
    figure = getattr(self.plots, function)(self.study, self.look, size)
    without = self.study.by_numbers(size) if name in OF_RECORDS else []
    finished = [run for run in self.study.finished if run.size == size]
    if without and len(without) == len(finished):
      missing = "it needs records, and of these runs numbers alone were published"
    blocks = [self.block(name, figure, caption, alt, "Not drawn: " + missing, size)]
    if 0 < len(without) < len(finished):
      blocks.append(Text(f"Left out: {len(without)} of {len(finished)} finished runs, of which numbers alone were published.",
                         "note"))
    return blocks

  def block(self, name, figure, caption, alt, missing, size=""):
    """A Picture, or the one line that says what is missing. `figure` is None where nothing can be drawn."""
    at = f" (size {size})" if size and len(self.study.sizes) > 1 else ""
    if figure is None:
      return Text(missing + at + ".", "note")
    if size and len(self.study.sizes) > 1:
      name = f"{name}_{_safe(size)}"
    self.style.save(figure, self.folder, name, self.endings)
    self.names.append(name)
    return Picture(name, caption + at, alt)


def all_sections(study: Study, table: list[Row], verdict: Verdict, gallery: Gallery) -> list:
  """The whole document."""
  blocks = [Text(study.question, "note")] if study.question else []
  blocks += answer(study, table, verdict)
  blocks += arms(study, table)
  blocks += budget(study, table, verdict.comparisons, gallery)
  for title, part in (("Loss curves", "loss"), ("Held-out loss over training", "held_out"), ("Loss by position", "position"), ("Recall by task", "recall"),
                      ("Train mode and run mode", modes), ("What the selector captures", "layers"),
                      ("Captured and oracle mass over training", "learning"),
                      ("What neighbouring queries share", locality), ("Which blocks one head selects", "blocks"),
                      ("Selector or backbone?", parts),
                      ("Spread over seeds, and what a main study could see", spread)):
    blocks.append(Heading(title))
    for size in study.sizes:
      blocks += part(study, table, size, gallery) if callable(part) else gallery.picture(part, size)
  blocks += costs(study)
  if study.notes.strip():
    blocks += [Heading("Notes"), *document.parse(study.notes, level=3)]
  return blocks + limits(study, table, verdict)


def answer(study: Study, table: list[Row], verdict: Verdict) -> list:
  """(1) The verdict, the comparisons behind it, and whether sparsity was on at all."""
  blocks = [Heading("Verdict"), Text(verdict.paragraph, "verdict")]
  primary = [c for c in verdict.comparisons if c.role == "primary" and c.judgement]
  if primary:
    blocks.append(_comparison_table(study, primary, f"Primary: {METRIC[study.primary].title}, "
                                    f"minus {study.reference}"))
  secondary = [c for c in verdict.comparisons if c.role == "secondary" and c.judgement]
  if secondary:
    blocks.append(_comparison_table(study, secondary, f"Secondary: {METRIC[study.secondary].title}, minus "
                                    f"{study.reference}; p after Holm over {len(secondary)} comparisons"))
  unjudged = [c for c in verdict.comparisons if c.role == "secondary" and not c.judgement]
  for reason in dict.fromkeys(c.reason for c in unjudged):
    names = ", ".join(dict.fromkeys(c.arm for c in unjudged if c.reason == reason))
    blocks.append(Text(f"Secondary ({METRIC[study.secondary].title}) **cannot be judged** for {names}: "
                       f"{reason}.", "note"))
  notes = analyses.controls(study, table)
  return blocks + ([Heading("Controls", 3), Bullets(notes)] if notes else [])


def arms(study: Study, table: list[Row]) -> list:
  """(2) Arm by arm: endpoints, cost, failures."""
  blocks = [Heading("Arms")]
  runs = collections.Counter(r.status for r in study.runs)
  counts = ", ".join(f"{runs[s]} {s}" for s in ("done", "failed", "unfinished", "pending") if runs[s])
  blocks.append(Text(f"{len(study.runs)} run{'s' * (len(study.runs) != 1)}: {counts}. Numbers are mean ± "
                     "half-width of the 95 % t interval over seeds; without ± there is one seed."))
  if numbers := study.by_numbers():
    by_arm = collections.defaultdict(list)
    for run in numbers:
      by_arm[run.arm if len(study.sizes) == 1 else f"{run.arm} {run.size}"] += run.seeds
    share = "all" if len(numbers) == len(study.finished) else f"{len(numbers)} of the {len(study.finished)}"
    blocks.append(Text(
        f"**Numbers alone were published of {share} finished runs**: their lines of results.csv and layers.csv. They count "
        "fully in the verdict's t intervals, in the tables of endpoints, and per layer. They are left out of what needs "
        "records: loss curves, held-out loss over training, loss by position, recall by task, the bootstrap over (seed, "
        "document), selected blocks, and the time that runs took. By arm (seeds): "
        + ", ".join(f"{arm} ({', '.join(map(str, sorted(seeds)))})" for arm, seeds in by_arm.items()) + "."))
  shown = [r for r in table if r.status == "done"] or table
  if shown and shown[0].status != "done":
    blocks.append(Text("No run has finished: these are the numbers of the latest evaluations.", "note"))
  for size in study.sizes:
    lines = []
    for arm, mode in dict.fromkeys((r.arm, r.run_mode) for r in shown if r.size == size):
      mine = [r for r in shown if (r.arm, r.run_mode, r.size) == (arm, mode, size)]
      if not mine[0].headline and arm not in (study.dense,) and study.declared:
        continue  # train mode x run mode has them
      shares = [share for r in study.arm_runs(arm, size)
                if mine[0].headline and math.isfinite(share := endpoints.visible_share(r))]
      lines.append([study.label(arm, mode), str(len({r.seed for r in mine}))]
                   + [endpoints.interval_text(METRIC[m], endpoints.finite(mine, m), False)
                      for m in ("bits_per_byte", "second_half_bits_per_byte", "exact_match")]
                   + [_quantity(_mean(mine, "tokens")), _quantity(_mean(mine, "flops")),
                      f"{100 * shares[0]:.1f}" if shares else "-",
                      *([_percent(mine, "queries_limited", ".0f"), _quantity(_mean(mine, "tokens_per_second")),
                         _percent(mine, "mfu", ".2g")] if mine[0].headline else ["-"] * 3)])
    if lines:
      blocks.append(Table(["arm", "seeds", "bits per byte", "second half (bits per byte)", "exact match (%)",
                           "training tokens", "training FLOPs per seed", "visible share (%)",
                           "queries with more blocks than they take (%)", "tokens/s", "MFU (%)"], lines,
                          f"Size {size}. Visible share: what the last query of a full context attends to. Tokens/s per "
                          "seed and MFU (FLOPs that the arm needs, over the device's peak): medians over its last stage. "
                          "\"arm -> mode\": the trained arm, run in another mode."))
    else:
      blocks.append(Text(f"Size {size}: no evaluation yet.", "note"))
  lost = [f"`{r.name}` ({r.arm}, {r.size}, seeds {', '.join(map(str, r.seeds))}) **failed**: "
          f"{r.message}" for r in study.runs if r.status == "failed"]
  lost += [f"`{r.name}` ({r.arm}, {r.size}) is {r.status}; it is in no comparison" for r in study.runs
           if r.status in ("unfinished", "pending")]
  lost += study.problems
  return blocks + ([Heading("Failed, unfinished, unreadable", 3), Bullets(lost)] if lost else [])


def budget(study, table, found: list[Comparison], gallery: Gallery) -> list:
  """(3) Delta(b)."""
  blocks = [Heading("Delta(b): retrofit minus native over the retrofit budget")]
  for size in study.sizes:
    points, fit = verdict_lib.curve(study, found, size)
    at = f"Size {size}: " if len(study.sizes) > 1 else ""
    why = ("no budgets are declared" if not study.budgets else
           "no retrofit shares a finished seed with the reference")
    figure = gallery.plots.budget_curve(study, points, fit)
    blocks.append(gallery.block(
        "delta_budget", figure,
        "Delta(b), paired by seed. Circles: seeds. Squares: mean with 95 % t interval. "
        "Blue band: equivalence margin", "Difference from the reference arm over the retrofit budget",
        f"Not drawn: {why}", size))
    if points:
      blocks.append(Text(at + (f"The limit Delta_inf {fit.reason}." if not fit.fitted else
                               "Delta(b) = Delta_inf + A · b^-gamma: "
                               f"{verdict_lib.fit_text(study, fit)}, gamma = {fit.gamma:.2f}.")))
    blocks += way_of_dense(study, table, size)
    head, lines = analyses.closed_gap(study, table, size)
    blocks += ([Text(head)] if head else []) + ([Bullets(lines)] if lines else [])
  return blocks


def way_of_dense(study, table, size) -> list:
  """Delta split at the dense model: does a retrofit reach what it came from, and how far is that from native?"""
  metric, lines = METRIC[study.primary], []
  for arm, (lost, gained) in analyses.by_way_of_dense(study, table, size).items():
    judged = statistics.judge(lost, study.margin)
    spread = lambda x: metric.text(float(np.std(x, ddof=1))) if len(x) > 1 else "-"
    lines.append([arm, str(len(lost)), metric.text(float(np.mean(lost + gained)), True), metric.text(float(np.mean(lost)), True),
                  metric.between(judged.interval), spread(lost), verdict_lib.p_text(judged.p_tost),
                  metric.text(float(np.mean(gained)), True), spread(gained)])
  if not lines:
    return []
  at = f"size {size}, " if len(study.sizes) > 1 else ""
  return [Table(["retrofit arm", "seeds", "Delta", f"minus {study.dense}", "95 % t interval", "SD over seeds",
                 f"p, two one-sided tests, ±{metric.text(study.margin)}", f"{study.dense} minus {study.reference}", "SD over seeds"],
                lines, f"{metric.title[0].upper()}{metric.title[1:]}; {at}paired by seed, over those that have all three. Delta by way of the dense model: what a "
                f"retrofit loses against {study.dense} of its seed, and what {study.reference} gains over it. Exploratory.")]


def modes(study, table, size, gallery) -> list:
  """(7) Rows are what was trained, columns how it is run."""
  shown = [r for r in table if r.size == size and (r.status == "done" or not study.finished)]
  first = ("dense", "sparse", "oracle", "random")
  columns = sorted({r.run_mode for r in shown}, key=lambda m: (first.index(m) if m in first else len(first), m))
  blocks = []
  for metric in (METRIC[study.primary], METRIC[study.secondary]):
    lines = []
    for arm in study.arms:
      cells = [endpoints.finite((r for r in shown if (r.arm, r.run_mode) == (arm, m)), metric.name)
               for m in columns]
      if any(cells):
        lines.append([arm] + [("**{}**" if m == study.headline_mode(arm) else "{}").format(
            endpoints.interval_text(metric, c)) if c else "-" for m, c in zip(columns, cells)])
    if lines:
      at = f"size {size}, " if len(study.sizes) > 1 else ""
      blocks.append(Table(["trained as"] + [f"run {m}" for m in columns], lines,
                          f"{metric.title[0].upper()}{metric.title[1:]}; {at}mean ± half-width (seeds), "
                          "bold = the arm's own mode. Exploratory but for that column."))
  return blocks or [Text("No evaluation yet.", "note")]


def parts(study, table, size, gallery) -> list:
  """(10) Delta = selector error + backbone mismatch, by the oracle run mode."""
  at = f" (size {size})" if len(study.sizes) > 1 else ""
  found = analyses.decompose(study, table, size)
  if not found:
    why = ("no reference arm is declared" if not study.reference else
           f"it needs the run mode \"oracle\" of {study.reference} and of a retrofit arm, on common seeds")
    return [Text(f"Not split{at}: {why}.", "note")]
  metric = METRIC[study.primary]
  lines = [[arm] + [endpoints.interval_text(metric, values.values()) for values in by_part.values()]
           for arm, by_part in found.items()]
  table_block = Table(
      ["retrofit arm"] + list(next(iter(found.values()))), lines,
      f"{metric.title[0].upper()}{metric.title[1:]}, mean ± half-width (seeds). Selector error: loss(own "
      f"blocks) - loss(oracle blocks) of the retrofit, minus the same of {study.reference}. Backbone "
      "mismatch: loss(oracle) of the retrofit minus that of "
      f"{study.reference}. The two add up to Delta. Exploratory.")
  return [table_block, gallery.block("decomposition", gallery.plots.decomposition(study, found),
                                     "Delta and its two parts. Marks: seeds; bars: means; lines: t intervals",
                                     "Selector error and backbone mismatch", "Not drawn", size)]


def locality(study, table, size, gallery) -> list:
  """What neighbouring queries share, and which way to attend on a GPU that favours."""
  lines = []
  for arm in study.arms:
    mine = [r for r in table if (r.arm, r.size) == (arm, size) and r.headline and r.status == "done"]
    if not endpoints.finite(mine, "tile_union"):
      continue
    by_layer = endpoints.group(endpoints.select(study, "layer", arm, size, study.headline_mode(arm)), ("layer",), "tile_union")
    unions = list(by_layer.values())
    even = planning.union_break_even(next((run.config for run in study.arm_runs(arm, size) if run.config), {}))
    word = ("-" if not unions or not math.isfinite(even) else "union tiles" if max(unions) < even else
            "KV-outer" if min(unions) > even else f"union tiles in {sum(u < even for u in unions)} of {len(unions)} layers")
    lines.append([arm, _percent(mine, "overlap", ".1f"), _percent(mine, "tile_common", ".1f"), f"{_mean(mine, 'tile_union'):.2f}",
                  f"{min(unions):.2f} to {max(unions):.2f}" if unions else "-",
                  "-" if math.isnan(even) else f"{even:.1f}", word])
  blocks = gallery.picture("sharing", size)
  if not lines:
    return blocks + [Text("No evaluation has measured what a tile of queries shares.", "note")]
  return blocks + [Table(
      ["arm", "next query's blocks in common (%)", "choices on common blocks (%)", "union of a tile / one query", "over layers",
       "break-even", "favours"], lines,
      "At the end of training, of queries with more blocks than they take. A tile: 128 query rows, all heads that share a list. "
      "Common: chosen by a third of its queries. Break-even: a tile that attends to the union of its blocks does that many "
      "times the products, and saves the partial result that KV-outer writes and reads for each (query, block); forward "
      "pass, both at the H200's data-sheet speed. Exploratory.")]


def spread(study, table, size, gallery) -> list:
  """The SD over seeds of each endpoint, and the smallest effect that a main study could see."""
  blocks = []
  for metric, margin in ((METRIC[study.primary], study.margin), (METRIC[study.secondary], study.secondary_margin)):
    lines = []
    for s in planning.spreads(study, table, size, metric.name, margin):
      paired = s.df > 0 and s.sd_difference > 0
      low, high = planning.statistics.standard_deviation_interval(s.sd_difference, s.df)
      seen = ["{} ({} to {})".format(*map(metric.text, s.detectable(n))) if paired else "-" for n in planning.SEEDS]
      least = s.seeds_for_margin if paired else None
      lines.append([s.arm or "**retrofits, pooled**", str(s.n), *map(metric.text, (s.mean, s.sd, s.sd_difference)),
                    f"{metric.text(low)} to {metric.text(high)}" if paired else "-", *seen,
                    ("-" if not paired else str(least) if least else f"over {planning.MOST_SEEDS}")])
    if lines:
      at = f"size {size}, " if len(study.sizes) > 1 else ""
      blocks.append(Table(
          ["arm", "seeds", "mean", "SD over seeds", f"SD of paired difference from {study.reference or 'the reference'}",
           "95 % interval of that SD"] + [f"smallest detectable, {n} seeds" for n in planning.SEEDS]
          + [f"seeds to see {metric.text(margin)}"], lines,
          f"{metric.title[0].upper()}{metric.title[1:]}; {at}each arm in its own run mode. Detectable: a mean paired difference "
          "found with 80 % power at 5 % two-sided, were the SD the one found (and at the ends of its chi-square interval). "
          "Pooled as if the retrofits' differences were independent; they share the reference's runs, so its interval is "
          "too narrow."))
  return blocks or [Text("No endpoint has a finished result.", "note")]


def costs(study: Study) -> list:
  """What a main study with these arms would cost, and where the time of this one went."""
  blocks = [Heading("What a main study would cost")]
  prices, rates, device = planning.prices(study)
  if not prices:
    return blocks + [Text("Not given: no finished run has logged tokens per second.", "note")]
  hours = lambda h: f"{h:.3g}"
  lines = [[p.size, f"{p.parameters / 1e6:.1f}M", _quantity(p.tokens), f"{p.ratio:.3g}"]
           + [hours(n * p.measured) for n in planning.SEEDS] + [hours(n * p.forecast) for n in planning.SEEDS] for p in prices]
  kinds = sorted({str(r.versions.get("device_kind", "?")) for r in study.finished})
  blocks.append(Table(
      ["size", "parameters", "tokens per run", "per parameter"] + [f"hours, {n} seeds, as measured" for n in planning.SEEDS]
      + [f"hours, {n} seeds, forecast" for n in planning.SEEDS], lines,
      f"Device hours of training for {len(rates)} arms ({', '.join(rates)}), forks from their fork on, at this study's "
      "context; parameters without embeddings. As measured: at the FLOP/s reached here at this study's size on "
      f"{', '.join(kinds)}, which larger models exceed. Forecast: one {device} by `nsa/planning/forecast.py`, a floor. Without "
      "compilation, evaluation and failures.", left=1))
  shown = {r: arm for arm, r in reversed(rates.items())}  # arms that end alike share one
  blocks.append(Bullets(["FLOP/s of one device, of those that the arm needs, of the longest run of each kind: " + ", ".join(
      f"{arm} {r / 1e12:.3g}T" for r, arm in reversed(shown.items()))]))
  paused = sum((collections.Counter(run.paused) for run in study.finished), collections.Counter())
  if paused:
    trained = sum(planning.training_seconds(run) for run in study.finished)
    which = "runs that have records" if study.by_numbers() else "runs"
    blocks[-1].items.append(f"The finished {which} took: " + ", ".join(
        f"{label} {s / 60:.1f} min" for label, s in (("training", trained), *sorted(paused.items()))) + ".")
  return blocks


def limits(study: Study, table: list[Row], verdict: Verdict) -> list:
  """(11) What the study cannot say."""
  seeds = sorted({len({r.seed for r in table if (r.arm, r.size) == k and r.headline and r.status == "done"})
                  for k in {(r.arm, r.size) for r in table if r.headline and r.status == "done"}})
  items = []
  if not seeds:
    items.append("No run has finished; nothing is concluded.")
  else:
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    items.append(f"**Seeds.** {n} per arm and size." + (
        " With one seed nothing can be said about arms, only about checkpoints." if seeds[0] == 1 else
        " The t interval takes differences between seeds as normal; with so few that cannot be checked."))
  tokens = endpoints.finite(table, "tokens")
  items.append(f"**Scale.** Sizes run: {', '.join(study.sizes) or 'none'}"
               + (f", at most {_quantity(max(tokens))} training tokens per run" if tokens else "")
               + ". Nothing here speaks of larger models, longer contexts or other data.")
  if study.declared:
    p, s = METRIC[study.primary], METRIC[study.secondary]
    items.append(f"**Endpoints.** Primary: {p.title}, margin {p.text(study.margin)} {p.unit}. Secondary: "
                 f"{s.title}, margin {s.text(study.secondary_margin)} {s.unit}, under Holm. Primary "
                 "comparisons are not adjusted for each other; their number stands in the table. Everything "
                 "else is exploratory.")
    items.append("**\"Matches\"** means equivalent within that margin, at these budgets, with this selector. "
                 "Whether the margin is small enough to matter is a judgement that statistics does not make.")
  bootstrapped = [c for c in verdict.comparisons if c.documents is not None and c.documents.bounded]
  if bootstrapped:
    items.append("**Documents.** The bootstrap over (seed, document) is a percentile interval and too narrow "
                 "with few seeds; the t interval over seeds decides.")
  splits = sorted({r.split for r in table})
  if splits and splits != ["val"]:
    items.append(f"**Split.** Evaluated on {', '.join(splits)}.")
  versions = sorted({f"{k} {v}" for one in [r.versions for r in study.runs] + study.versions for k, v in one.items()
                     if isinstance(v, (str, int, float))})
  if versions:
    items.append("**Ran with** " + ", ".join(versions[:16]) + ".")
  return [Heading("What this cannot say" if study.declared else "Limits"), Bullets(items)]


def _comparison_table(study, found, caption):
  metric = METRIC[found[0].metric]
  secondary = found[0].role == "secondary"
  many = len(study.sizes) > 1
  lines, fewer = [], False
  for c in found:
    i = c.judgement.interval
    covered = c.documents.n if c.documents else 0
    of = f" ({covered} of {i.n} seeds)" if covered < i.n and not secondary and c.metric in endpoints.OF_DOCUMENTS else ""
    fewer = fewer or bool(of)
    lines.append([c.arm] + ([c.size] if many else []) + [
        c.word, verdict_lib.percent(c.budget) if c.budget else "-", str(i.n), metric.text(i.mean, True),
        metric.between(i)] + ([] if secondary else [metric.between(c.documents) + of])
        + [verdict_lib.p_text(c.p_tost_holm if secondary else c.judgement.p_tost),
           verdict_lib.p_text(c.p_difference_holm if secondary else c.judgement.p_difference),
           metric.text(c.judgement.detectable)])
  header = ["arm"] + ["size"] * many + [
      "outcome", "budget", "seeds", f"difference ({metric.unit})", "95 % t interval"] + (
      [] if secondary else ["95 % bootstrap (seed, document)"]) + [
      f"p, two one-sided tests, ±{metric.text(found[0].margin)}", "p, difference from 0",
      "smallest detectable"]
  if fewer:
    caption += (". **The bootstrap covers fewer seeds than the t interval where it says so**: of the others no documents are "
                "known" + (", as numbers alone were published of them" if study.by_numbers() else ""))
  return Table(header, lines, caption, left=2 + many)


def _mean(table, name):
  values = endpoints.finite(table, name)
  return float(np.mean(values)) if values else math.nan


def _percent(table, name, form):
  value = _mean(table, name)
  return f"{100 * value:{form}}" if math.isfinite(value) else "-"


def _quantity(value):
  """1234567 -> 1.23e6: three figures, for numbers over many orders of magnitude."""
  if not math.isfinite(value):
    return "-"
  return f"{value:.0f}" if abs(value) < 1e4 else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")


def _safe(name):
  return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
