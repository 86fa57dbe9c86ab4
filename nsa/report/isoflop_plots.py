"""Figures of isoflop.py: a Figure, or None without data. Losses are in the unit of their endpoint, `fits` as there:
metric -> method -> fit, or why there is none."""
from __future__ import annotations

import math

from matplotlib import ticker
import numpy as np

from nsa.report import endpoints, style
from nsa.report.isoflop import Point

_COLOURS = {"dense": "#555555", "msa_32": "#0072b2", "msa_8": "#56b4e9", "window_32": "#c4511f", "window_8": "#f2a65a"}
_OTHERS = ("#009e73", "#cc79a7", "#7b5ea7", "#b8a500")
_MARKERS = "osD^vP"


def _colour(method, k=0):
  return _COLOURS.get(method, _OTHERS[k % len(_OTHERS)])


def _unit(m):
  return "%" if m.scale == 100 else m.unit


def curves(found: list[Point], fits):
  """Loss over parameters: a panel for each endpoint."""
  metrics = list(fits)
  if not metrics:
    return None
  fig, axes = style.figure(2.4 + 3.9 * len(metrics), 4.2, len(metrics))
  budgets = sorted({p.budget for p in found})
  names = list(dict.fromkeys(p.method for p in found))
  for ax, metric in zip(axes, metrics):
    m = endpoints.metric(metric)
    for k, name in enumerate(names):
      colour, one = _colour(name, k), fits[metric][name]
      for i, c in enumerate(budgets):
        mine = [p for p in found if (p.method, p.budget) == (name, c) and math.isfinite(p.row[metric])]
        ax.plot([p.parameters / 1e6 for p in mine], [p.row[metric] * m.scale for p in mine], _MARKERS[i % 6],
                color=colour, ms=4, mfc="none", label=name if not i else None)
        if not isinstance(one, str) and c in one.optima:
          at = np.geomspace(min(p.parameters for p in mine), max(p.parameters for p in mine), 50)
          ax.plot(at / 1e6, one.parabola(c, at) * m.scale, color=colour, lw=1.1, alpha=0.8)
          o = one.optima[c]
          if at[0] <= o.parameters <= at[-1]:
            ax.plot(o.parameters / 1e6, o.loss * m.scale, "*", color=colour, ms=9)
            low, high = np.clip(o.between, at[0], at[-1]) / 1e6
            ax.hlines(o.loss * m.scale, low, high, color=colour, lw=1)
    for i, c in enumerate(budgets):
      ax.plot([], [], _MARKERS[i % 6], color="#999999", mfc="none", label=f"{c:.2g} FLOPs")
    ax.set_xscale("log")
    at = sorted({p.parameters / 1e6 for p in found})
    ax.set_xticks(at, [f"{n:.2g}" for n in at])
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.set_xlabel("parameters of the backbone, without embeddings (M)")
    ax.set_ylabel(_unit(m))
    ax.set_title(m.title.partition(" (")[0].partition(", second")[0], fontsize=9)
  style.key(fig, axes[0])
  return fig


def frontiers(fits):
  """Loss at the optimum by FLOPs and, where they are known, by seconds; a row for each endpoint of text."""
  metrics = [metric for metric in fits if endpoints.metric(metric).kind == "text"
             and any(not isinstance(f, str) for f in fits[metric].values())]
  if not metrics:
    return None
  timed = any(o.seconds > 0 for metric in metrics for one in fits[metric].values() if not isinstance(one, str)
              for o in one.optima.values())
  costs = [("budget", "training FLOPs"), *[("seconds", "device seconds of training")] * timed]
  fig = style.Figure(figsize=(1.4 + 4.1 * len(costs), 0.4 + 3.3 * len(metrics)), layout="constrained")
  axes = fig.subplots(len(metrics), len(costs), squeeze=False, sharey="row")
  for row, metric in zip(axes, metrics):
    m = endpoints.metric(metric)
    for ax, (by, words) in zip(row, costs):
      for k, (name, one) in enumerate(fits[metric].items()):
        if isinstance(one, str):
          continue
        mine = [o for o in one.optima.values() if getattr(o, by) > 0]
        ax.plot([getattr(o, by) for o in mine], [o.loss * m.scale for o in mine], color=_colour(name, k), lw=1.2,
                label=name)
        for o in mine:
          ax.plot(getattr(o, by), o.loss * m.scale, "o", color=_colour(name, k), ms=5,
                  mfc=None if o.bracketed else "none")
          ax.vlines(getattr(o, by), *(m.scale * end for end in o.loss_between), color=_colour(name, k), lw=1)
      ax.set_xscale("log")
      ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
      ax.xaxis.set_minor_formatter(ticker.NullFormatter())  # they run into each other
      ax.set_xlabel(words)
    budgets = sorted({c for one in fits[metric].values() if not isinstance(one, str) for c in one.optima})
    row[0].set_xticks(budgets, [f"{c:.2g}" for c in budgets])
    row[0].set_ylabel(m.unit)
    row[0].set_title(m.title, fontsize=9)
  style.key(fig, axes[0, 0])
  return fig


def inference(found: list[Point], metrics: list[str]):
  """Loss by forward FLOPs per token of the models of the largest budget, in all their run modes."""
  top = max(p.budget for p in found)
  mine = [p for p in found if p.budget == top]
  if not any(len(p.modes) > 1 for p in mine):
    return None
  fig, axes = style.figure(2.4 + 3.9 * len(metrics), 4.2, len(metrics))
  names = list(dict.fromkeys(p.method for p in mine))
  for ax, metric in zip(axes, metrics):
    m = endpoints.metric(metric)
    for k, name in enumerate(names):
      of = [(p.inference[mode], row[metric] * m.scale, mode, row.headline) for p in mine if p.method == name
            for mode, row in p.modes.items() if mode in p.inference and math.isfinite(row[metric])]
      sign = 1 if m.lower_is_better else -1
      edge = [(x, y) for x, y, *_ in sorted(of) if all(sign * y < sign * v for u, v, *_ in of if u < x)]
      ax.plot([x for x, *_ in of], [y for _, y, *_ in of], ".", color=_colour(name, k), ms=4, alpha=0.6)
      ax.plot([x for x, _ in edge], [y for _, y in edge], color=_colour(name, k), lw=1.2, label=name)
      ax.plot([x for x, *_, own in of if own], [y for _, y, _, own in of if own], "o", color=_colour(name, k),
              mfc="none", ms=6)
    ax.set_xscale("log")
    ax.set_xlabel("forward FLOPs per token")
    ax.set_ylabel(_unit(m))
    ax.set_title(m.title.partition(" (")[0].partition(", second")[0], fontsize=9)
  style.key(fig, axes[0])
  return fig
