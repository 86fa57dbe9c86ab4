"""Recall and text by the length that a model is asked at, in multiples of the trained one, against what a token costs.

Of studies whose evaluations ask examples of several lengths ("mqar@4096", "mqar@8192", ...): what the other sections
mean over, this one takes apart. Text at k times the trained length is that of the second half of the first k lengths of
a window. Judged are the arms that the study compares with a control (Study.controls), minus it, paired by seed, at the
shortest and the longest length. Three questions are asked of every pair, each of the family under Holm: is there a
difference (two-sided t test), is it beyond the smallest effect that matters (the same test against that), is it within
(two one-sided tests, of LIKENESS seeds at least)? Where both answer less than that effect they are alike
whatever they are, and no such word is said. The family is of all pairs that were planned: one whose runs are
missing counts as a test that failed. No pair is judged where dense answers less than Study.solved, or ANCHOR where the
study states none, at the shortest length.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np

from nsa.report import endpoints, statistics
from nsa.report.document import Heading, Table, Text
from nsa.report.runs import Run, Study

TITLE = "By length"
RECALL = "far_exact_match"
FLOOR = "window"  # the arm whose distance from dense others close, where a study has it
SMALLEST = 0.1   # of far exact match, where the study states no margin of it
ANCHOR = 0.9     # what dense has to answer at the shortest length, where the study states nothing (Study.solved)
LIKENESS = 3     # seeds that a word of likeness takes: two that agree by chance would have a width of next to nothing


@dataclasses.dataclass(frozen=True)
class Compared:
  """An arm minus its control at one length, in shares of the answers. interval: of 95 %, of the mean over seeds, for
  itself. p: of a difference, by Holm over the family.

  levels: what both answer, means over these seeds. word: "differs by enough", "no more than that apart", "differs",
  "undecided"; "both answer too little" in place of the second where they could not be farther apart; "one seed"; "no
  scatter" where all seeds differ by the same, or not at all, as few answers do by chance: no test, and p is NaN; "not
  judged" where the anchor fails.
  """
  arm: str
  against: str
  multiple: float
  interval: statistics.Interval
  levels: tuple[float, float]
  p: float
  word: str


def lengths(study: Study, size: str) -> tuple[int, list[int]]:
  """(tokens of the trained context, tokens of the examples asked, ascending); (0, []) where there is but one length."""
  runs = [run for run in study.finished if run.size == size]
  asked = sorted({_tokens(r["task"]) for run in runs for r in run.records if r["kind"] == "task"} - {0})
  trained = next((int(n) for run in runs if (n := (run.config or {}).get("data", {}).get("context"))), 0)
  return (trained, asked) if trained and len(asked) > 1 else (0, [])


def recall(study: Study, arm: str, size: str) -> dict[tuple[int, int], float]:
  """{(tokens of the examples, seed): far exact match, a mean over tasks}, of the arm's own run mode.

  Tasks of which dense answers less than Study.solved at that length are left out.
  """
  lacking = {task for task, share in endpoints.recall_of_dense(study, size).items() if share < study.solved}
  records = [r for r in endpoints.select(study, "task", arm, size, study.headline_mode(arm))
             if r["task"] not in lacking]
  found = endpoints.group(records, ("task", "seed"), RECALL, "far_answers")
  cells: dict[tuple[int, int], list[float]] = {}
  for (task, seed), value in found.items():
    if _tokens(task):
      cells.setdefault((_tokens(task), seed), []).append(value)
  return {cell: float(np.mean(values)) for cell, values in cells.items()}


def anchor(study: Study, size: str) -> list[float]:
  """What the dense arm answers at the shortest length, 0 to 1, one number per seed."""
  _, asked = lengths(study, size)
  return [value for (tokens, _), value in recall(study, study.dense, size).items() if tokens in asked[:1]]


def text(study: Study, arm: str, size: str, asked: list[int]) -> dict[tuple[str, int, int], float]:
  """{(corpus, tokens, seed): bits per byte at the positions from tokens / 2 to tokens}, of the arm's own run mode."""
  out = {}
  for n in asked:
    mine = [r for r in endpoints.select(study, "position", arm, size, study.headline_mode(arm))
            if n // 2 <= r["start"] and r["end"] <= n]
    found = endpoints.group(mine, ("corpus", "seed"), "bits_per_byte", "bytes")
    out |= {(corpus or "text", n, seed): value for (corpus, seed), value in found.items()}
  return out


def flops_per_token(run: Run, tokens: int) -> float:
  """Forward FLOPs per token of the run's own mode over `tokens`, all parts; NaN where the config says nothing."""
  config = endpoints.parsed(run.config) if run.config else None
  if config is None:
    return math.nan
  from nsa import flops  # here: it imports jax, which the statistics do without
  return sum(flops.forward(config, tokens, run.headline_mode).values())


def planned(study: Study, size: str) -> list[tuple[str, str, int]]:
  """The pairs to be judged: (arm, its control, tokens of the examples)."""
  _, asked = lengths(study, size)
  return [(arm, against, n) for arm, against in study.controls.items() if study.arm_runs(arm, size)
          for n in ((asked[0], asked[-1]) if asked else ())]


def compare(study: Study, size: str) -> list[Compared]:
  """The family of tests; a pair without a common seed is left out, and counts as a test that failed."""
  trained, _ = lengths(study, size)
  margin = _margin(study)
  family, found = planned(study, size), []
  for arm, against, n in family:
    at = lambda values: {seed: value for (tokens, seed), value in values.items() if tokens == n}
    ours, theirs = (at(recall(study, one, size)) for one in (arm, against))
    seeds, differences = statistics.paired_differences(ours, theirs)
    if seeds:
      levels = tuple(float(np.mean([of[seed] for seed in seeds])) for of in (ours, theirs))
      found.append((arm, against, n, levels, differences))
  tests = [differences for *_, differences in found]

  def corrected(test, *options):
    p = np.array([math.nan if statistics.flat(d) else test(d, *options) for d in tests])
    holm = statistics.holm([*np.nan_to_num(p, nan=1.0), *[1.0] * (len(family) - len(tests))])
    return np.where(np.isnan(p), np.nan, holm[:len(p)])

  different, enough, within = (corrected(*test) for test in (
      (statistics.t_test,), (_beyond, margin), (_within, margin)))
  admitted = np.mean(anchor(study, size) or [0.0]) >= (study.solved or ANCHOR)
  out = []
  for k, (arm, against, n, levels, differences) in enumerate(found):
    i = statistics.t_interval(differences)
    word = ("not judged" if not admitted else "one seed" if not i.bounded else
            "no scatter" if statistics.flat(differences) else
            "differs by enough" if enough[k] <= study.alpha else
            ("no more than that apart" if max(levels) >= margin else "both answer too little")
            if within[k] <= study.alpha else
            "differs" if different[k] <= study.alpha else "undecided")
    out.append(Compared(arm, against, n / trained, i, levels, float(different[k]), word))
  return out


def _beyond(differences, margin: float) -> float:
  """p of "the mean is the margin, or nearer to 0": two-sided, in the direction of the mean found. NaN of one seed."""
  mean = float(np.mean(differences))
  if len(differences) > 1 and abs(mean) <= margin:
    return 1.0
  return statistics.t_test(differences - math.copysign(margin, mean))


def _within(differences, margin: float) -> float:
  """p of "the mean is the margin away, or more"; 1 of fewer than LIKENESS seeds, a test that failed."""
  return statistics.tost(differences, margin) if len(differences) >= LIKENESS else 1.0


def section(study: Study, gallery) -> list:
  """Heading, tables and a figure for each size that was asked at several lengths; [] where none was."""
  sizes = [size for size in study.sizes if lengths(study, size)[1]]
  return [Heading(TITLE)] * bool(sizes) + [block for size in sizes for block in _of_size(study, size, gallery)]


def _of_size(study, size, gallery):
  trained, asked = lengths(study, size)
  times = [f"{n / trained:g}x" for n in asked]
  runs = {run.arm: run for run in study.finished[::-1] if run.size == size}
  runs = {arm: runs[arm] for arm in study.arms if arm in runs}
  values = {arm: recall(study, arm, size) for arm in runs}
  speed = lambda arm: (study.speeds or {}).get(f"{arm}-{size}", math.nan)
  speed = speed if any(math.isfinite(speed(arm)) for arm in runs) else None
  blocks, found, least = [], anchor(study, size), study.solved or ANCHOR
  if not found or np.mean(found) < least:
    said = (f"answers {100 * np.mean(found):.1f} % at {times[0]}, less than {100 * least:.0f} %" if found else
            f"was not asked for far answers at {times[0]}, or has not finished")
    blocks.append(Text(f"**{study.dense} {said}: recall says nothing of what the others lack.**", "note"))
  blocks.append(_recall_and_cost(study, runs, values, trained, asked, times, speed))
  blocks += _text_by_position(study, size, runs, asked, times) + _judged(study, size, trained)
  caption = ("Recall of far evidence against what a token costs, at each length. Pale marks: seeds; full ones: their "
             "means")
  return blocks + [gallery.block("lengths", _figure(gallery, runs, values, asked, times, speed), caption,
                                 "Recall against cost per token by length", "No recall by length", size)]


def _recall_and_cost(study, runs, values, trained, asked, times, speed) -> Table:
  exact = endpoints.METRIC[RECALL]
  of = lambda arm, n: [v for (tokens, _), v in values[arm].items() if tokens == n]
  level = {arm: np.mean(of(arm, asked[0]) or [math.nan]) for arm in runs}
  gap = level.get(study.dense, math.nan) - level.get(FLOOR, math.nan)
  gap = gap if gap > _margin(study) else math.nan
  rows = []
  for arm, run in runs.items():
    cost = [flops_per_token(run, n) / 1e6 for n in asked]
    rows.append([arm, str(len({seed for _, seed in values[arm]}))]
                + [endpoints.interval_text(exact, of(arm, n), False) for n in asked]
                + [f"{c:.2f}" if math.isfinite(c) else "-" for c in cost]
                + ([f"{1e9 / speed(arm):.0f}" if math.isfinite(speed(arm)) else "-"] if speed else [])
                + ([f"{round(100 * (level[arm] - level[FLOOR]) / gap) + 0}"] if math.isfinite(gap) else []))
  return Table(
      ["arm", "seeds"] + [f"recall, {t} (%)" for t in times] + [f"MFLOPs per token, {t}" for t in times]
      + ["training step, ns per token"] * bool(speed)
      + [f"of {FLOOR} to {study.dense} closed, {times[0]} (%)"] * math.isfinite(gap), rows,
      "Exact match where the evidence is far, mean over tasks"
      + f" of which {study.dense} answers {100 * study.solved:g} %" * bool(study.solved)
      + f", on examples of so many times the trained {trained:,} "
      "tokens; ± is the half-width of the 95 % t interval over seeds. FLOPs: counted, forward."
      + (" Training step: one seed alone on its device, at the trained length." if speed else ""))


def _text_by_position(study, size, runs, asked, times) -> list[Table]:
  found, bits = {arm: text(study, arm, size, asked) for arm in runs}, endpoints.METRIC["bits_per_byte"]
  corpora = list(dict.fromkeys(corpus for cells in found.values() for corpus, *_ in cells))
  at = [(corpus, n) for corpus in corpora for n in asked]
  return [Table(
      ["arm"] + [f"{corpus}, {t}" for corpus in corpora for t in times],
      [[arm] + [endpoints.interval_text(bits, [v for (*k, _), v in cells.items() if tuple(k) == cell], False)
                for cell in at] for arm, cells in found.items()],
      "Bits per byte of held-out text in the second half of so many times the trained length: all windows are of the "
      "longest one")] if corpora else []


def _judged(study, size, trained) -> list:
  exact, family, whole, blocks = endpoints.METRIC[RECALL], compare(study, size), planned(study, size), []
  there = {(c.arm, c.against, round(c.multiple * trained)) for c in family}
  missing = [f"{one[0]} minus {one[1]} at {one[2] / trained:g}x" for one in whole if one not in there]
  if family:
    said = lambda c: f"{c.arm} minus {c.against} at {c.multiple:g}x ({exact.text(c.interval.mean, True)} points)"
    words = "; ".join(f"**{word}**: " + ", ".join(said(c) for c in family if c.word == word)
                      for word in dict.fromkeys(c.word for c in family))
    blocks.append(Text(f"Far exact match, an arm against its control{study.at(size)}: {words}."
                       + f" {len(missing)} of {len(whole)} planned pairs are missing." * bool(missing), "verdict"))
    blocks.append(Table(
        ["arm", "minus", "at", "both answer (%)", "points", "95 % interval", "p (Holm)", "word"],
        [[c.arm, c.against, f"{c.multiple:g}x", ", ".join(map(exact.text, c.levels)),
          exact.text(c.interval.mean, True), exact.between(c.interval),
          f"{c.p:.3f}" if math.isfinite(c.p) else "-", c.word] for c in family],
        f"Far exact match, paired by seed. The smallest effect that matters: {exact.text(_margin(study))} points. "
        f"Words: t tests under Holm, of {len(whole)} pairs; that two arms are alike takes {LIKENESS} seeds, and one "
        "that answers as much as that effect. Everything else in this section is exploratory", left=2))
  if missing:
    blocks.append(Text("Not compared, for want of runs or of far answers, and counted as tests that failed: "
                       + ", ".join(missing) + ".", "note"))
  return blocks


def _figure(gallery, runs, values, asked, times, speed):
  counted = lambda arm, n: flops_per_token(runs[arm], n) / 1e6
  panels = [(f"{t} the trained length", n, "MFLOPs per token, forward", counted) for t, n in zip(times, asked)]
  if speed is not None:
    panels.append((f"{times[-1]}, by measured cost", asked[-1], "training step, ns per token",
                   lambda arm, n: 1e9 / speed(arm)))
  fig, axes = gallery.style.figure(3.1 * len(panels) + 1.6, 3.6, columns=len(panels), sharey=True)
  drawn = False
  for ax, (title, n, label, cost) in zip(axes, panels):
    for arm in runs:
      mine, x = [100 * v for (tokens, _), v in values[arm].items() if tokens == n], cost(arm, n)
      if not mine or not math.isfinite(x):
        continue
      colour, marker = gallery.look(arm)
      ax.plot([x] * len(mine), mine, marker, color=colour, alpha=0.45, ms=4)
      ax.plot([x], [np.mean(mine)], marker, color=colour, label=arm)
      drawn = True
    ax.set_title(title)
    ax.set_xlabel(label)
  axes[0].set_ylabel("far exact match (%)")
  axes[0].set_ylim(-3, 103)
  gallery.style.key(fig, max(axes, key=lambda ax: len(ax.lines)))
  return fig if drawn else None


def _margin(study) -> float:
  return next((e.margin for e in study.endpoints if e.metric == RECALL), SMALLEST)


def _tokens(task: str) -> int:
  """Of the examples of a task whose name says it; 0 for others."""
  _, at, text = task.partition("@")
  return int(text) if at and text.isdecimal() else 0
