"""Figures of one model: what a query selects, maps of a layer, losses by position, how a selector learns.

Figures of studies are in nsa/report/plots.py. All functions return a matplotlib Figure, which a notebook shows.
"""
from __future__ import annotations

import os

from etils import epath
import matplotlib
from matplotlib import colors, ticker
import numpy as np

from nsa import metrics
from nsa.look.views import View
from nsa.report import style

_DENSE, _CHOSEN, _QUERY = "#555555", "#0072b2", "#c4511f"


def one_query(view: View, query: int, layer: int, kv_head: int = 0):
  """Dense attention of one query over the tokens, and the blocks that it chose."""
  with matplotlib.rc_context(style.STYLE):
    part = view.layers[layer]
    weights = part.attention(query, kv_head)
    fig, (ax,) = style.figure(9.2, 3.1)
    ax.bar(np.arange(len(weights)), 100 * weights, width=1.0, color=_DENSE, label="dense attention (group mean)")
    title = f"layer {layer}, KV head {kv_head}, query {query}"
    if part.chosen is not None:
      blocks = np.flatnonzero(part.chosen[query, kv_head])
      for i, block in enumerate(blocks):
        ax.axvspan(block * view.block_size - 0.5, (block + 1) * view.block_size - 0.5, color=_CHOSEN, alpha=0.18, lw=0,
                   label="chosen block" if i == 0 else None)
      title += f": {len(blocks)} blocks hold {100 * part.mass[query, kv_head][blocks].sum():.0f} % of it"
    ax.axvline(query, color=_QUERY, lw=1.4, label="the query")
    ax.set_title(title)
    ax.set_xlabel("key position (tokens)")
    ax.set_ylabel("attention (%)")
    ax.set_xlim(-1, len(view.tokens))
    style.key(fig, ax)
    return fig


def maps(view: View, kv_head: int = 0):
  """Per layer: where dense attention puts its mass, and which blocks were chosen, averaged over query blocks."""
  with matplotlib.rc_context(style.STYLE):
    rows = len(view.layers)
    fig = style.Figure(figsize=(7.4, 0.6 + 2.9 * rows), layout="constrained")
    axes = fig.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    for i, part in enumerate(view.layers):
      pictures = [("dense attention", 100 * _by_query_block(part.mass[:, kv_head], view.block_size))]
      if part.chosen is not None:
        pictures.append(("chosen", 100 * _by_query_block(part.chosen[:, kv_head], view.block_size)))
      for ax, (what, picture) in zip(axes[i], pictures):
        upper = np.arange(picture.shape[1])[None] > np.arange(picture.shape[0])[:, None]
        image = ax.imshow(np.ma.masked_where(upper, picture), cmap="cividis", interpolation="nearest",
                          norm=colors.PowerNorm(0.5 if what == "dense attention" else 1.0, 0, 100))
        ax.set_title(f"layer {i}: {what}")
        ax.grid(False)
        unit = "queries that chose it (%)" if what == "chosen" else "mass (%)"
        fig.colorbar(image, ax=ax, shrink=0.85).set_label(unit)
      for ax in axes[i][len(pictures):]:
        ax.set_visible(False)
      axes[i][0].set_ylabel(f"query block ({view.block_size} tokens)")
    for ax in axes[-1]:
      ax.set_xlabel("key block")
    return fig


def _by_query_block(x, size):
  """[T, blocks] averaged over the queries of each block."""
  starts = np.arange(0, len(x), size)
  return np.add.reduceat(x.astype(np.float64), starts, axis=0) / np.diff(np.append(starts, len(x)))[:, None]


def by_position(views: dict[str, View], only=None):
  """Loss of every position in several run modes of one sequence; `only`, bool[T], marks positions of interest."""
  with matplotlib.rc_context(style.STYLE):
    fig, (ax,) = style.figure(9.2, 3.1)
    for i, (name, view) in enumerate(views.items()):
      x = np.arange(len(view.nll)) if only is None else np.flatnonzero(only)
      right = 100 * view.correct[x].mean() if len(x) else np.nan
      ax.plot(x, view.nll[x] / np.log(2), marker="os^Dv"[i % 5], ms=4.5, mfc="none", lw=1.1,
              color=(_DENSE, _CHOSEN, _QUERY, "#009e73", "#cc79a7")[i % 5], label=f"{name}: {right:.0f} % right")
    ax.set_xlabel("position (tokens)")
    ax.set_ylabel("loss (bits)")
    ax.set_title("loss by position" + ("" if only is None else ", marked positions only"))
    style.key(fig, ax)
    return fig


def learning(workdir: str | os.PathLike, seed: int | None = None):
  """How a selector learns: its loss over training, and exact match and captured mass at the evaluations.

  Args:
    workdir: a run directory; evaluations on the way need `eval.every`.
    seed: None takes the run's first.

  Raises ValueError if the run has no records yet.
  """
  workdir = epath.Path(workdir)
  lines = list(metrics.read_jsonl(workdir / "metrics.jsonl")) if (workdir / "metrics.jsonl").exists() else []
  if not lines:
    raise ValueError(f"workdir = {os.fspath(workdir)!r}: no records in metrics.jsonl")
  seed = lines[0]["seed"] if seed is None else seed
  lines = [line for line in lines if line["seed"] == seed]
  evaluations = sorted((metrics.read_json(p) for p in (workdir / "eval").glob("*.json") if p.stem.isdecimal()),
                       key=lambda e: e["step"])
  with matplotlib.rc_context(style.STYLE):
    fig, (left, right) = style.figure(10.4, 3.6, columns=2)
    names = [name for name in ("loss", "index_kl", "align") if any(name in line for line in lines)]
    for name, color in zip(names, (_DENSE, _CHOSEN, "#009e73")):
      some = [(line["step"], line[name]) for line in lines if name in line]
      left.plot(*zip(*some), color=color, label={"loss": "language model loss"}.get(name, name))
    for before, after in zip(lines, lines[1:]):
      if before["stage"] != after["stage"]:
        left.axvline(before["step"], color="#bbbbbb", ls=(0, (2, 2)), label=f"{before['mode']} to {after['mode']}")
    left.set_yscale("log")
    left.yaxis.set_minor_formatter(ticker.NullFormatter())
    left.set_xlabel("step")
    left.set_ylabel("nats")
    left.set_title("training")
    left.legend()
    right.set_title("at the evaluations")
    _evaluations(right, evaluations, seed)
    return fig


def _evaluations(ax, evaluations, seed):
  def points(kind, mode, value):
    out = []
    for evaluation in evaluations:
      found = [r[value] for r in evaluation["records"]
               if (r["kind"], r["run_mode"], r["seed"]) == (kind, mode, seed) and value in r]
      if found:
        out.append((evaluation["step"], 100 * np.mean(found)))
    return out

  modes = list(dict.fromkeys(r["run_mode"] for e in evaluations for r in e["records"]))
  for i, mode in enumerate(modes):
    if some := points("task", mode, "exact_match"):
      ax.plot(*zip(*some), marker="os^Dv"[i % 5], mfc="none", label=f"exact match, run {mode}",
              color=(_DENSE, _CHOSEN, _QUERY, "#cc79a7", "#b8a500")[i % 5])
  for value, line in (("captured_mass", "-"), ("oracle_mass", (0, (4, 2)))):
    if some := points("layer", "sparse", value):
      ax.plot(*zip(*some), color="#009e73", ls=line, lw=1.3, label=value.replace("_", " ") + " (mean over layers)")
  ax.set_ylim(-3, 103)
  ax.set_xlabel("step")
  ax.set_ylabel("%")
  if ax.lines:
    ax.legend()
  else:
    ax.text(0.5, 0.5, "no evaluations on the way: set eval.every", ha="center", transform=ax.transAxes)


def bars(values: dict[str, float], title: str, unit: str, most: int = 12):
  """The largest values as horizontal bars, e.g. of nsa.look.profile; what is left becomes one bar."""
  with matplotlib.rc_context(style.STYLE):
    shown = dict(sorted(values.items(), key=lambda item: -item[1])[:most])
    rest = sum(values.values()) - sum(shown.values())
    if len(values) > most:
      shown[f"{len(values) - most} others"] = rest
    fig, (ax,) = style.figure(7.4, 0.9 + 0.26 * len(shown))
    ax.barh(range(len(shown)), list(shown.values()), color=_CHOSEN, height=0.7)
    ax.set_yticks(range(len(shown)), list(shown))
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(unit)
    ax.set_title(title)
    return fig
