"""The figures. Every seed is a visible mark, units stand on the axes, the legend lies beside the data.

Each function takes one model size and returns a Figure, or None where there is nothing to draw.
"""
from __future__ import annotations

import math
import textwrap

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from nsa.report import comparisons, endpoints, statistics
from nsa.report.runs import Study
from nsa.report.style import Look, figure, key

OF_SIZES = tuple(zip(("#0072b2", "#c4511f", "#009e73", "#7b5ea7"), "osD^"))  # colour and marker of the first four


def budget_curve(study: Study, verdict, name: str, size: str) -> Figure | None:
  """R(b) and Delta(b) of one endpoint: every seed, mean and t interval per budget, A as a line; a row per arm where all
  have one budget.

  Hollow means: against a dense continuation of their own, not the trunk.
  """
  groups = {q: [c for c in verdict.of(q, name, size) if c.budget and c.judgement] for q in ("R", "Delta")}
  if not any(groups.values()):
    return None
  m = endpoints.metric(name)
  if len({c.budget for mine in groups.values() for c in mine}) == 1:
    parts = {}
    for label, mine in (("R(b): minus its dense control", groups["R"]), ("Delta(b) = R(b) + A", groups["Delta"]),
                        (f"A: minus {study.reference}", [c for c in verdict.of("A", name, size) if c.judgement])):
      for c in mine:
        parts.setdefault(c.arm, {})[label] = c.differences
    return decomposition(name, parts, c.endpoint.margin)
  fig, (ax,) = figure(7.8, 4.4)
  ax.set_xscale("log")
  budgets = sorted({c.budget for mine in groups.values() for c in mine})
  span = max(math.log(budgets[-1] / budgets[0]), 1.5)
  margin = next(iter(groups["R"] or groups["Delta"])).endpoint.margin * m.scale
  ax.axhspan(-margin, margin, color="#888888", alpha=0.16, lw=0,
             label=f"equivalence margin, ±{m.text(margin / m.scale)}")
  ax.axhline(0, color="#888888", lw=1)
  for c in verdict.of("A", name, size):
    if c.judgement:
      i = c.judgement.interval
      ax.axhline(i.mean * m.scale, color="#0072b2", lw=1.6, label=f"A: {c.arm} minus {c.against}")
      if i.bounded:
        for label, end in (("95 % t interval of A", i.low), (None, i.high)):
          ax.axhline(end * m.scale, color="#0072b2", lw=0.9, ls=(0, (4, 3)), label=label)
  styles = {"R": ("s", "#c4511f", -0.012, {False: f"R(b): minus {study.dense}", True: "R(b): minus its continuation"}),
            "Delta": ("D", "#333333", 0.012, dict.fromkeys((False, True), "Delta(b) = R(b) + A"))}
  for quantity, mine in groups.items():
    marker, color, shift, labels = styles[quantity]
    continued, named = {c.arm: study.control(c.arm) != study.dense for c in mine}, set()
    places = {c.arm: 100 * c.budget * math.exp((shift + 0.05 * continued[c.arm]) * span) for c in mine}
    for c in mine:
      y = np.array(list(c.differences.values())) * m.scale
      # beside the mean
      x = places[c.arm] * np.exp(span * math.copysign(1, shift) * (0.02 + 0.02 * np.arange(len(y)) / len(y)))
      ax.plot(x, y, marker, mfc="none", mec=color, mew=0.8, ms=3.5, alpha=0.6, zorder=3)
      label = labels[continued[c.arm]]
      _with_interval(ax, places[c.arm], c.judgement.interval, m.scale, marker, color,
                     None if label in named else label, mfc="white" if continued[c.arm] else color)
      named.add(label)
  ax.set_xticks([100 * b for b in budgets], [f"{100 * b:.3g}" for b in budgets])
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set_xlim(100 * budgets[0] * math.exp(-0.1 * span), 100 * budgets[-1] * math.exp(0.12 * span))
  ax.set_xlabel("retrofit budget b (% of the training tokens)")
  ax.set_ylabel(f"difference ({m.unit})\n{'above' if m.lower_is_better else 'below'} 0 is behind")
  ax.set_title(textwrap.fill(m.title, 46))  # the legend begins where the axes end
  key(fig, ax)
  return fig


def against_dense(study: Study, verdict) -> Figure | None:
  """Every retrofit and the reference minus dense attention at equal tokens: a panel for each admitted primary endpoint,
  a colour for each size; every seed, mean and t interval. Filled means have a word, hollow ones have none."""
  panels = {}
  for e in study.endpoints:
    for size in study.sizes if e.primary else ():
      found = _behind_dense(verdict, e.metric, size)
      if study.reference in found and len(found) > 1:
        panels.setdefault(e.metric, {})[size] = found
  if not panels:
    return None
  arms = sorted(study.budgets, key=lambda a: (study.control(a) == study.dense, study.budgets[a])) + [study.reference]
  sizes = [size for size in study.sizes if any(size in of for of in panels.values())]
  fig, axes = figure(1.6 + 5.2 * len(panels), 3.9, len(panels))
  for ax, (name, by_size) in zip(axes, panels.items()):
    m = endpoints.metric(name)
    shown = [a for a in arms if any(a in found for found in by_size.values())]
    margin = next(e.margin for e in study.endpoints if e.metric == name) * m.scale
    ax.axhspan(-margin, margin, color="#888888", alpha=0.16, lw=0, label="equivalence margin")
    ax.axhline(0, color="#888888", lw=1, label=f"{study.dense}, the same tokens")
    for k, size in enumerate(sizes):
      color, marker = OF_SIZES[k % 4]
      for arm, c in by_size.get(size, {}).items():
        x = shown.index(arm) + 0.4 * ((k + 0.5) / len(sizes) - 0.5)
        y = m.scale * (-1 if c.quantity == "A" else 1) * np.array(list(c.differences.values()))
        beside = x + 0.1 * (np.arange(len(y)) / len(y) - 0.5)
        ax.plot(beside, y, marker, mfc="none", mec=color, ms=3, mew=0.7, alpha=0.5)
        _with_interval(ax, x, statistics.t_interval(list(y)), 1, marker, color, None,
                       mfc=color if c.word in comparisons.FOUND else "white")
      ax.plot([], [], marker, color=color, label=f"size {size}")
    for fill, what in (("#666666", "matches, better or worse"), ("white", "undecided")):
      ax.plot([], [], "o", color="#666666", mfc=fill, label=what)
    ax.set_xticks(range(len(shown)), [
        a if a == study.reference else
        f"{100 * study.budgets[a]:g} %\n" + ("within" if study.control(a) == study.dense else "after") for a in shown])
    ax.grid(visible=False, axis="x")
    ax.set_ylabel(f"minus dense ({m.unit})\n{'above' if m.lower_is_better else 'below'} 0 is behind")
    ax.set_title(textwrap.fill(m.title, 44))
  key(fig, axes[0])
  return fig


def _behind_dense(verdict, name, size):
  """{arm: its comparison with dense}, of admitted ones; A, the reference's, is the other way round."""
  return {(c.arm if quantity == "R" else c.against): c for quantity in "RA" for c in verdict.of(quantity, name, size)
          if c.judgement and c.admitted}


def anchor_over_tokens(found) -> Figure:
  """A over training tokens, a panel for each endpoint: {metric: {size: {tokens: {seed: difference}}}}."""
  fig, axes = figure(1.6 + 3.4 * len(found), 3.6, len(found))
  for ax, (m, of) in zip(axes, found.items()):
    ax.axhline(0, color="#888888", lw=1)
    for k, (size, points) in enumerate(of.items()):
      (color, marker), means = OF_SIZES[k % 4], []
      for tokens, d in sorted(points.items()):
        i = statistics.t_interval(list(d.values()))
        at = tokens * 1.03 ** (k - len(of) / 2)
        means.append((at, i.mean * m.scale))
        ax.plot([1.02 * at] * len(d), [m.scale * x for x in d.values()], marker, mfc="none", mec=color, ms=3, alpha=0.6)
        _with_interval(ax, at, i, m.scale, marker, color, None)
      if means:
        ax.plot(*zip(*means), color=color, lw=1.3, label=f"size {size}")
    ax.set_xscale("log")
    ends = sorted({tokens for points in of.values() for tokens in points})
    ax.set_xticks(ends, [f"{n / 1e6:.0f} M" for n in ends])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel("training tokens")
    ax.set_ylabel(f"A ({m.unit})")
    ax.set_title(textwrap.fill(m.title, 34))
  key(fig, axes[0])
  return fig


def loss_curves(study: Study, look: Look, size: str) -> Figure | None:
  """Training loss over tokens, averaged in bins of log tokens (left), of tokens (right); seeds and their means."""
  curves = [(r, c) for r in study.runs if r.size == size for c in r.curves.values() if np.isfinite(c["loss"]).any()]
  if not curves:
    return None
  tokens = all(np.isfinite(c["tokens"]).any() for _, c in curves)
  axis = "tokens" if tokens else "step"
  fig, (ax, end) = figure(10.4, 4.2, columns=2, width_ratios=(1.3, 1))
  last = max(np.nanmax(c[axis]) for _, c in curves)
  arms, changes = {}, {}  # label -> [(x, y) of a seed]; and where its stages change
  for run, c in curves:
    ok = np.isfinite(c[axis]) & np.isfinite(c["loss"]) & (c[axis] > 0)
    if ok.any():
      label = run.arm + ("" if run.status == "done" else f" ({run.status})")
      arms.setdefault(label, []).append((c[axis][ok], c["loss"][ok]))
      changes.setdefault(label, set()).update(c[axis][ok][1:][np.diff(c["stage"][ok]) > 0])
  for label, seeds in arms.items():
    color, marker = look(label.split(" ")[0])
    x = np.concatenate([x for x, _ in seeds])
    edges = np.geomspace(x.min(), x.max() * 1.0001, 8 + int(14 * math.log(x.max() / x.min())))
    for a, bins in ((ax, edges), (end, np.linspace(0.7 * last, last * 1.0001, 13))):
      inside = [(x[at], y[at]) for x, y in seeds if (at := x >= bins[0]).any()]
      if not inside:
        continue
      style = dict(color=color, ls="-" if label in look.of else (0, (2, 1.5)))
      for one in inside if len(inside) > 1 else ():
        a.plot(*_binned(*one, bins), lw=0.5, alpha=0.45, **style)
      xs, ys = _binned(*map(np.concatenate, zip(*inside)), bins)
      a.plot(xs, ys, lw=1.4, label=label, marker=marker if len(xs) == 1 else "", **style)
      if a is end:
        a.plot(xs[-1], ys[-1], marker=marker, color=color, mfc="none", ms=5.5)
      for change in changes[label] if a is ax else ():
        nearest = np.abs(xs - change).argmin()
        a.plot(xs[nearest], ys[nearest], marker="|", color=color, ms=11, mew=2)
  ax.set_xscale("log")
  ax.set_title("whole run (| marks a change of stage)")
  end.set_title("last 30 %")
  for a in (ax, end):
    a.set_xlabel("training tokens" if tokens else "step")
    if tokens:
      a.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
  ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  end.xaxis.set_major_locator(ticker.MaxNLocator(4))
  ax.set_ylabel("training loss (nats/token)")
  key(fig, ax, look)
  return fig


def held_out(study: Study, look: Look, size: str) -> Figure | None:
  """Held-out bits per byte over the model's training tokens, its trunk's included, and minus the reference at the same
  step."""
  values, tokens = _over_training(study, size, endpoints.over_training)
  if not values:
    return None
  base = values.get(study.reference)
  fig, axes = figure(10.4 if base else 7.6, 4.2, columns=2 if base else 1)
  for arm, found in values.items():
    _over_tokens(axes[0], found, tokens, look(arm), arm)
    if base and arm != study.reference:
      _over_tokens(axes[1], {at: value - base[at] for at, value in found.items() if at in base}, tokens, look(arm))
  for ax in axes:
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
  axes[0].set_ylabel("bits per byte, second half")
  axes[0].set_title("held-out text")
  _minus_reference(study, axes[1:])
  key(fig, axes[0], look)
  return fig


def positions(study: Study, look: Look, size: str) -> Figure | None:
  """Bits per byte by position in the context, and the same minus the reference arm."""
  values = {}
  for arm in study.arms:
    records = endpoints.select(study, "position", arm, size, study.headline_mode(arm))
    by = endpoints.group(records, ("seed", "start", "end"), "bits_per_byte", "bytes")
    if by:
      values[arm] = {(s, (a, b)): v for (s, a, b), v in by.items()}
  if not values:
    return None
  base = values.get(study.reference)
  panels = 2 if base and len(values) > 1 else 1
  fig, axes = figure(10.4 if panels == 2 else 7.6, 4.2, columns=panels)
  edges = sorted({e for by in values.values() for _, e in by})
  for k, (arm, by) in enumerate(values.items()):
    seeds_and_mean(axes[0], by, range(len(edges)), edges, look(arm), label=arm)
    if panels == 2 and arm != study.reference:
      shift = 0.4 * ((k + 0.5) / len(values) - 0.5)
      difference = {e: v - base[e] for e, v in by.items() if e in base}
      seeds_and_mean(axes[1], difference, np.arange(len(edges)) + shift, edges, look(arm))
  for ax in axes:
    ax.set_xticks(range(len(edges)), [f"{_short(a)}–{_short(b)}" for a, b in edges],
                  rotation=35, ha="right", rotation_mode="anchor")
    ax.set_xlabel("position in the context (tokens)")
  axes[0].set_ylabel("bits per byte")
  axes[0].set_title("loss by position")
  _minus_reference(study, axes[1:])
  key(fig, axes[0], look)
  return fig


def recall_over_training(study: Study, look: Look, size: str) -> Figure | None:
  """Exact match over the model's training tokens, its trunk's included."""
  values, tokens = _over_training(study, size, endpoints.recall_over_training)
  if not values:
    return None
  fig, (ax,) = figure(7.6, 4.2, columns=1)
  for arm, found in values.items():
    _over_tokens(ax, {at: 100 * value for at, value in found.items()}, tokens, look(arm), arm)
  ax.set_ylim(-3, 103)
  ax.set_ylabel("exact match (%), mean over tasks")
  key(fig, ax, look)
  return fig


def recall(study: Study, look: Look, size: str) -> Figure | None:
  """Exact match per task and arm, every seed; and over the distance to the evidence."""
  values, near = {}, {}
  for arm in study.arms:
    records = endpoints.select(study, "task", arm, size, study.headline_mode(arm))
    by = endpoints.group(records, ("seed", "task"), "exact_match")
    if by:
      answers = endpoints.select(study, "answer", arm, size, study.headline_mode(arm))
      values[arm], near[arm] = by, endpoints.group(answers, ("seed", "end"), "exact_match", "answers")
  if not values:
    return None
  tasks = sorted({t for by in values.values() for _, t in by})
  edges = sorted({e for by in near.values() for _, e in by})
  panels = 2 if len(edges) > 1 else 1
  height = max(3.6, 1.1 + 0.16 * len(tasks) * (len(values) + 1))
  fig = Figure(figsize=(10.4 if panels == 2 else 7.6, height), layout="constrained")
  grid = fig.add_gridspec(2, panels, height_ratios=(1, max(height / 4.2 - 1, 1e-3)))  # many tasks make one panel tall
  axes = [fig.add_subplot(grid[0 if k and height > 5 else slice(2), k]) for k in range(panels)]
  for k, (arm, by) in enumerate(values.items()):
    color, marker = look(arm)
    shift, tall = 0.7 * ((k + 0.5) / len(values) - 0.5), 0.3 / len(values)
    for row, task in enumerate(tasks):
      x = [100 * v for (s, t), v in by.items() if t == task]
      if x:
        y = row + shift
        axes[0].plot([np.mean(x)] * 2, [y - tall, y + tall], color=color, lw=2.4, alpha=0.55)
        axes[0].plot(x, [y] * len(x), marker, mfc="none", mec=color, ms=5, mew=1.1, ls="none")
    axes[0].plot([], [], color=color, label=arm)
    if panels == 2:
      seeds_and_mean(axes[1], {e: 100 * v for e, v in near[arm].items()}, edges, edges, look(arm))
  axes[0].set_yticks(range(len(tasks)), tasks)
  axes[0].set_ylim(len(tasks) - 0.5, -0.5)
  axes[0].grid(axis="y", visible=False)
  for row in range(1, len(tasks)):
    axes[0].axhline(row - 0.5, color="#d0d0d0", lw=0.8)
  axes[0].set_xlim(-3, 103)
  axes[0].set_xlabel("exact match (%); bar = mean over seeds")
  axes[0].set_title("by task")
  if panels == 2:
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(edges, [_short(e) for e in edges])
    axes[1].set_ylim(-3, 103)
    axes[1].set_xlabel("tokens from evidence to question, at most")
    axes[1].set_ylabel("exact match (%), all tasks")
    axes[1].set_title("by distance")
  key(fig, axes[0], look)
  return fig


def decomposition(name: str, parts: dict, margin: float = 0.0) -> Figure:
  """A row per arm, its seeds, means and intervals: parts[arm][part] = {seed: value}, in the metric's stored unit.

  margin: of equivalence, a band around 0; without one the parts are what is lost.
  """
  metric = endpoints.metric(name)
  names = list(dict.fromkeys(part for by_part in parts.values() for part in by_part))
  colors = dict(zip(names, ("#c4511f", "#333333", "#0072b2") if margin else ("#333333", "#999999")))
  labelled = set()
  fig, (ax,) = figure(7.6, max(2.6, 1.4 + 0.45 * len(parts)))
  if margin:
    ax.axvspan(-margin * metric.scale, margin * metric.scale, color="#888888", alpha=0.16, lw=0,
               label=f"equivalence margin, ±{metric.text(margin)}")
  for row, by_part in enumerate(parts.values()):
    for k, part in enumerate(by_part):
      y = row + 0.26 * (k - 0.5 * (len(by_part) - 1))
      values = np.array(list(by_part[part].values())) * metric.scale
      i = statistics.t_interval(values)
      if i.bounded:
        ax.plot([i.low, i.high], [y, y], color=colors[part], lw=2, solid_capstyle="butt")
      ax.plot(i.mean, y, "|", color=colors[part], ms=13, mew=2.4)
      ax.plot(values, [y] * len(values), "osD"[names.index(part)], mfc="white", mec=colors[part], ms=5, mew=1.2,
              ls="none", zorder=3, label=None if part in labelled else part)
      labelled.add(part)
  ax.axvline(0, color="#666666", lw=1)
  ax.xaxis.set_major_locator(ticker.MaxNLocator(5 if margin else 6))
  ax.set_yticks(range(len(parts)), list(parts))
  ax.set_ylim(len(parts) - 0.5, -0.5)
  ax.grid(axis="y", visible=False)
  behind = f"difference ({{}}), {'above' if metric.lower_is_better else 'below'} 0 is behind"
  ax.set_xlabel((behind if margin else "lost ({})").format(metric.unit))
  fig.suptitle(metric.title, fontsize=10.5, weight="bold", x=0.01, ha="left")  # of the axes it would meet the legend
  key(fig, ax)
  return fig


def far_context(study: Study, look: Look, size: str) -> Figure | None:
  """NLL of repeated n-grams by distance, and loss of the same bytes by the context before them."""
  panels = []
  for kind, keys, value, weight in (("ar_hit", ("start",), "nll", "hits"),
                                    ("context_gain", ("context",), "bits_per_byte", "bytes")):
    found = {}
    for arm in study.arms:
      records = endpoints.select(study, kind, arm, size, study.headline_mode(arm))
      if by := endpoints.group(records, ("seed", *keys), value, weight):
        found[arm] = by
    panels += [(kind, found)] if found else []
  if not panels:
    return None
  fig, axes = figure(10.4 if len(panels) == 2 else 7.6, 4.2, columns=len(panels))
  words = {"ar_hit": ("least distance to the earlier occurrence (tokens)", "NLL (nats/token)", "repeated n-grams"),
           "context_gain": ("context before what is scored (tokens)", "bits per byte", "gain by context")}
  for ax, (kind, found) in zip(axes, panels):
    xs = sorted({x for by in found.values() for _, x in by})
    for arm, by in found.items():
      seeds_and_mean(ax, by, xs, xs, look(arm), label=arm)
    ax.set_xscale("log", base=2)
    ax.set_xticks(xs, [_short(x) for x in xs])
    ax.set_xlabel(words[kind][0])
    ax.set_ylabel(words[kind][1])
    ax.set_title(words[kind][2])
  key(fig, axes[0], look)
  return fig


def _over_training(study, size, measured):
  """{arm: its values}, {} where none was measured twice; and the tokens of a step."""
  values = {arm: found for arm in study.arms if (found := measured(study, arm, size))}
  if all(len({step for _, step in found}) < 2 for found in values.values()):
    return {}, 0
  data = next(run.config.get("data", {}) for run in study.finished if run.size == size and run.arm in values)
  return values, data.get("global_batch", 1) * data.get("context", 1)


def _over_tokens(ax, points, tokens_per_step, look, label=None):
  """A thin line per seed through points[seed, step] and a thick one through their means, over the training tokens."""
  color, marker = look
  steps = sorted({step for _, step in points})
  for seed in sorted({seed for seed, _ in points}):
    line = [step for step in steps if (seed, step) in points]
    ax.plot([step * tokens_per_step for step in line], [points[seed, step] for step in line], color=color, lw=0.6,
            alpha=0.6, marker=marker, mfc="none", ms=3.5)
  means = [np.mean([v for (_, at), v in points.items() if at == step]) for step in steps]
  ax.plot([step * tokens_per_step for step in steps], means, color=color, lw=1.7, label=label)
  ax.set_xlabel("training tokens")
  ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))


def _minus_reference(study, axes):
  """The words on the panel of differences, if there is one."""
  for ax in axes:
    ax.axhline(0, color="#0072b2", lw=1.4)
    ax.set_ylabel("difference (bits per byte)")
    ax.set_title(f"minus {study.reference}, paired by seed")


def seeds_and_mean(ax, by, xs, names, look, label=None):
  """Marks for by[seed, name] at xs, and a line through the means over seeds."""
  color, marker = look
  groups = [(x, [v for (_, n), v in by.items() if n == name]) for x, name in zip(xs, names)]
  groups = [(x, v) for x, v in groups if v]
  ax.plot([x for x, _ in groups], [np.mean(v) for _, v in groups], color=color, lw=1.5, label=label, zorder=3)
  ax.plot([x for x, v in groups for _ in v], [y for _, v in groups for y in v], marker, mfc="none",
          mec=color, ms=4.5, mew=1.0, alpha=0.85, ls="none", zorder=4)


def _with_interval(ax, x, interval, scale, marker, color, label, mfc=None):
  error = None
  if interval.bounded:
    error = [[(interval.mean - interval.low) * scale], [(interval.high - interval.mean) * scale]]
    error = np.maximum(error, 0)  # a bootstrap interval need not hold the estimate
  ax.errorbar(x, interval.mean * scale, error, fmt=marker, color=color, ms=7, capsize=4, lw=1.8, zorder=4,
              label=label, mfc=mfc or color)


def _binned(x, y, edges):
  place = np.clip(np.digitize(x, edges), 1, len(edges) - 1)
  filled = np.unique(place)
  return (np.array([x[place == k].mean() for k in filled]), np.array([y[place == k].mean() for k in filled]))


def _short(value):
  return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
