"""Arms that end in dense attention and did not leave a dense trunk: is a lead of sparse training one of its curriculum?

Sparse or a window first, dense at the end; short rows first; dense attention with more tokens. Each stands beside dense
attention as both end, and with as many FLOPs or as much time as the arm, read off the line through dense's decay
branches, itself and itself with more tokens; and beside the arm that goes on as it begins. Paired by seed. Exploratory.
"""
from __future__ import annotations

import dataclasses
import math

import numpy as np

from nsa.report import analyses, archive, endpoints, statistics
from nsa.report.comparisons import own
from nsa.report.document import Table, Text
from nsa.report.endpoints import Row
from nsa.report.runs import Study

TITLE = "Is it the curriculum?"


def arms(study: Study, size: str) -> dict[str, str]:
  """{arm: the arm of the same attention that goes on as it begins, "" where there is none}, of arms with runs of this
  size; the only ones of one stage are dense attention with another number of tokens. {} where none changes how it
  attends or what it reads."""
  configs = {arm: next((found for run in study.arm_runs(arm, size) if run.stages
                        and (found := endpoints.parsed(run.config)) is not None), None) for arm in study.arms}
  configs = {arm: c for arm, c in configs.items() if c is not None and not c.fork.workdir}
  dense, out = configs.get(study.dense), {}
  tokens = lambda c: (c.schedule.steps, c.data.global_batch, c.data.context)
  for arm, c in configs.items() if dense else ():
    first, last = c.schedule.stages[0].mode, c.schedule.stages[-1].mode
    if arm != study.dense and last == "dense" and (len(c.schedule.stages) > 1 or tokens(c) != tokens(dense)):
      out[arm] = next((other for other, o in configs.items() if first != "dense" and len(o.schedule.stages) == 1 and (
          o.attention, o.schedule.stages[0].mode, tokens(o)) == (c.attention, first, tokens(c))), "")
  return out if any(len(configs[arm].schedule.stages) > 1 for arm in out) else {}


def time_share(study: Study, size: str, arm: str, found: dict[str, str]) -> float:
  """The time of an arm's steps in times of dense attention's; NaN where unknown. found: of `arms`.

  By the speeds of both alone on their device where the study has them; else by logs alone: steps of a run's other
  stages over those of its last, dense one, in the same process. An arm that goes on as others begin takes theirs.
  """
  speeds, each = study.speeds or {}, []
  done = lambda one: [c for run in study.arm_runs(one, size) if run.status == "done" for c in run.curves.values()
                      if len(c["step"]) and np.isfinite(c["stage"]).all()]
  if {f"{one}-{size}" for one in (arm, study.dense)} <= set(speeds):
    each = [speeds[f"{study.dense}-{size}"] / speeds[f"{arm}-{size}"]]
  elif arm in found:
    each = [_per_token(c)[0] for c in done(arm)]
  else:
    each = [_per_token(c)[1] for one, start in found.items() if start == arm for c in done(one)]
  total = lambda one: max((c["tokens"][-1] for c in done(one)), default=math.nan)
  return float(np.mean(each)) * total(arm) / total(study.dense) if each else math.nan


def _per_token(curve) -> tuple[float, float]:
  """Seconds per token of the whole run and of its first stage, over those of its last stage."""
  stage, before, whole = curve["stage"], 0.0, 0.0
  ratio = lambda at: endpoints.speed(curve, "tokens_per_second") / float(
      np.nanmedian(curve["tokens_per_second"][stage == at]))
  for at in np.unique(stage):
    end = curve["tokens"][stage == at][-1]
    whole, before = whole + (end - before) * ratio(at), end
  return whole / before, ratio(stage[0])


def minus_dense(study: Study, table: list[Row], metric: str, size: str, arm: str, found: dict[str, str]
                ) -> dict[str, dict[int, float]]:
  """{"as they end" | "for its FLOPs" | "for its time": {seed: arm minus dense}}; for its cost of the seeds whose line
  of dense attention goes there, and of no arm that is on that line. found: of `arms`."""
  get = lambda one, name: own(study, table, one, size, name)
  minus = lambda theirs: dict(zip(*map(list, statistics.paired_differences(get(arm, metric), theirs))))
  line = [one for one in found if len(_stages(study, one, size)) == 1]
  out = {"as they end": minus(get(study.dense, metric)), "for its FLOPs": {}, "for its time": {}}
  share = time_share(study, size, arm, found)
  costs = {"for its FLOPs": ("flops", get(arm, "flops")),
           "for its time": ("tokens", {seed: share * n for seed, n in get(study.dense, "tokens").items()})}
  for words, (name, at) in costs.items() if arm not in line else ():
    points = {}
    for one in [*study.branches.get(study.dense, ()), study.dense, *line]:
      for seed in set(cost := get(one, name)) & set(loss := get(one, metric)):
        points.setdefault(seed, []).append((cost[seed], loss[seed]))
    dense = {seed: analyses.on_line(points[seed], at[seed]) for seed in set(points) & set(at)}
    out[words] = minus({seed: x for seed, x in dense.items() if math.isfinite(x)})
  return out


def _stages(study, arm, size):
  return next((run.stages for run in study.arm_runs(arm, size) if run.stages), [])


def section(study: Study, table: list[Row], size: str, admissions: dict, gallery) -> list:
  """A table, a figure for each admitted endpoint, and two of training; [] where no such arm has a finished run. Other
  arms stand beside them on the same seeds."""
  found = arms(study, size)
  seeds = {r.seed for r in table if r.arm in found and (r.size, r.status) == (size, "done")}
  mine = [r for r in table if r.seed in seeds and (r.size, r.status) == (size, "done")]
  there = {r.arm: {o.seed for o in mine if o.arm == r.arm} for r in mine}
  shown = [arm for arm in dict.fromkeys([study.reference, *found.values(), *found]) if arm in there]
  if study.dense not in there:
    return []
  lines, pictures, dense = [], [], study.dense
  of = lambda arm: {seed for run in study.arm_runs(arm, size) for seed in run.seeds}
  planned = {arm: len(of(arm) & set().union(*map(of, found))) for arm in shown}
  percent = lambda x: f"{100 * x:.0f}" if math.isfinite(x) else "-"
  work = {arm: _ratio(*(own(study, mine, one, size, "flops") for one in (arm, dense))) for arm in shown}
  time = {arm: time_share(study, size, arm, found) for arm in shown}
  for e in (e for e in study.endpoints if e.primary):
    m, one = endpoints.metric(e.metric), admissions.get((e.metric, size))
    parts = {arm: minus_dense(study, mine, m.name, size, arm, found) for arm in shown}
    for arm, minus in parts.items():
      n, start = len(minus["as they end"]), found.get(arm)
      cell = lambda d: "-" if not d else m.text((i := statistics.t_interval(list(d.values()))).mean, True) + (
          f" ({m.between(i)})" * i.bounded + f", {len(d)} seed{'s' * (len(d) > 1)}" * (len(d) != n))
      before = dict(zip(*map(list, statistics.paired_differences(
          *(own(study, mine, one, size, m.name) for one in (arm, start)))))) if start else {}
      lines.append([m.title + " (not admitted)" * (one is not None and not one.admitted), arm,
                    f"{n}" + f" of {planned[arm]}" * (n < planned[arm]), percent(work[arm]),
                    percent(time[arm]), *map(cell, minus.values()), f"{start}: {cell(before)}" if before else "-"])
    if one is None or one.admitted:
      rows = {f"{arm}\n({percent(work[arm])} % of {dense}'s FLOPs)": {words: d for words, d in minus.items() if d}
              for arm, minus in parts.items()}
      pictures.append(gallery.block(
          "curricula_" + m.name.replace(":", "_"), gallery.plots.decomposition(m.name, rows, e.margin),
          f"Minus {dense}, paired by seed: as both end, and {dense} with as many FLOPs, or as much time, as the arm. "
          "Marks: seeds; bars: means; lines: 95 % t intervals. Exploratory", f"Curricula minus {dense}", "Not drawn",
          size))
  pairs = min(len(there[arm]) for arm in shown if arm in found)
  return [Text(_beside(study, table, size, found, shown, pairs)), Table(
      ["endpoint", "arm", "seeds", f"FLOPs, % of {dense}'s", f"time, % of {dense}'s", f"minus {dense}",
       "for its FLOPs", "for its time", "minus the arm that goes on as it begins"], lines,
      f"Mean (95 % t interval){study.at(size)}, paired by seed. For its FLOPs or time: minus {dense} with as many, on "
      "the line between its decay branches, itself and itself with more tokens; the line flatters what is cheaper. "
      "Time: alone on a device where that is known, else by logs, steps of other stages over those of the same run's "
      "dense one; runs share devices. A window selects nothing: as far as dense after a window does what "
      f"{study.reference} does, that is no merit of selection", left=2), *pictures,
          *_training(study, [dense, *shown], size, seeds, gallery)]


def _ratio(ours, theirs):
  common = set(ours) & set(theirs)
  return float(np.mean([ours[s] / theirs[s] for s in common])) if common else math.nan


def _beside(study, table, size, found, shown, pairs) -> str:
  """What a reader has to know of the numbers, and what dense attention's curve said of more tokens."""
  text = "Exploratory: intervals and no word. " + (f"With {pairs} pairs an exact test of signs cannot go below p = "
                                                   f"{2.0 ** (1 - pairs):.2g}. ") * (pairs > 1)
  if any(run.sealed and f"{run.arm}-{size}" not in archive.shown(study) for arm in found
         for run in study.arm_runs(arm, size)):
    text += "What is sealed of these arms is in no number: it is opened when all runs of their tier are there. "
  for arm in found:
    config = next((run.config for run in study.arm_runs(arm, size) if run.stages), {})
    whole = config.get("data", {}).get("context", 0)
    short = min((n for one in config["schedule"]["stages"] if 0 < (n := one.get("context", 0)) < whole), default=0)
    if short:
      text += (f"Rows of {short:,} tokens are cut and ordered anew: with them a step of {arm} reads {whole / short:g} "
               f"times as many pieces of text as one of {study.dense}, so that more than their length differs. ")
  judged = [study.dense, study.reference, *study.retrofits()]
  commits = lambda of: {str(run.versions["commit"])[:12] for arm in of for run in study.arm_runs(arm, size)
                        if run.status == "done" and run.versions.get("commit")}
  if known := commits(judged):
    later = {arm: new for arm in shown if arm not in judged and (new := commits([arm]) - known)}
    text += (f"Of other code than {study.dense}, which may end elsewhere by itself: " + ", ".join(
        f"{arm} ({', '.join(sorted(new))})" for arm, new in later.items()) + ". ") * bool(later)
  for m in (endpoints.metric(e.metric) for e in study.endpoints if e.primary):
    curve = analyses.curve(study, table, m.name, size)
    for arm in (arm for arm in found if curve and len(_stages(study, arm, size)) == 1):
      ours, theirs, tokens = (own(study, table, *of) for of in (
          (arm, size, m.name), (study.dense, size, m.name), (arm, size, "tokens")))
      if common := set(ours) & set(theirs):
        n = max(tokens[seed] for seed in common)
        gain = float(np.mean([ours[seed] - theirs[seed] for seed in common]))
        said = m.text(curve.at(n) - curve.at(curve.tokens), True)
        text += (f"{m.heading}: with {endpoints.quantity(n)} tokens instead of {endpoints.quantity(curve.tokens)} the "
                 f"curve through {study.dense}'s branches and end says {said}, {arm} has {m.text(gain, True)}. ")
  return text.strip()


def _training(study, shown, size, seeds, gallery) -> list:
  """Recall and text over training, of these seeds, without what attends as the reference does."""
  attention = lambda arm: next(run.config.get("attention") for run in study.arm_runs(arm, size) if run.config)
  method = lambda arm: (attention(arm) or {}).get("method")
  like = {arm for arm in shown if len(_stages(study, arm, size)) == 1 and study.headline_mode(arm) == "sparse"
          and arm != study.reference and study.reference in shown and method(arm) == method(study.reference)}
  part = dataclasses.replace(study, arms=[arm for arm in study.arms if arm in shown and arm not in like],
                             runs=[run for run in study.runs if seeds & set(run.seeds)])
  look, of = gallery.style.Look(part), dataclasses.replace(part, reference=study.dense)
  later = f"; right: minus {study.dense} at the same step, where an arm with more tokens has not decayed yet"
  return [gallery.block(
      f"curricula_{name}", getattr(gallery.plots, name)(of, look, size),
      f"{words} over training, each arm as it attends at that step, rows of full length{more}. Thin: seeds; thick: "
      "means. Exploratory", f"{words} over training, curricula", "Not drawn: no evaluations on the way", size)
      for name, words, more in (("recall_over_training", "Exact match", ""),
                                ("held_out", "Held-out bits per byte", later))]
