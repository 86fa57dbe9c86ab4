"""Figures of what layers select: attention mass, overlap, maps of blocks. As plots.py: a Figure, or None without
data."""
from __future__ import annotations

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from nsa.records import number
from nsa.report import endpoints
from nsa.report.plots import seeds_and_mean
from nsa.report.runs import Study
from nsa.report.style import Look, figure, key


def layers(study: Study, look: Look, size: str) -> Figure | None:
  """Captured and oracle attention mass per layer, and the overlap of neighbouring queries' blocks."""
  found = {}
  for arm in study.arms:
    mode = study.headline_mode(arm)
    available = {r.get("run_mode") for r in endpoints.select(study, "layer", arm, size)}
    mode = mode if mode in available and mode != "dense" else next(
        (m for m in ("sparse", "block_topk", "sink_window", "oracle", "dense") if m in available), None)
    if mode:
      found[arm, mode] = endpoints.select(study, "layer", arm, size, mode)
  panels = [(names, title) for names, title in (
      (("captured_mass", "oracle_mass"), "attention mass in the chosen blocks"),
      (("overlap",), "overlap with the next query's"))
      if any(endpoints.group(r, ("layer",), n) for r in found.values() for n in names)]
  if not panels:
    return None
  fig, axes = figure(10.4 if len(panels) == 2 else 7.6, 4.1, columns=len(panels))
  for ax, (names, title) in zip(axes, panels):
    for (arm, mode), records in found.items():
      for name in names:
        by = {k: 100 * v for k, v in endpoints.group(records, ("seed", "layer"), name).items()}
        xs = sorted({layer for _, layer in by})
        if by and name == "oracle_mass":
          ax.plot(xs, [np.mean([v for (_, at), v in by.items() if at == x]) for x in xs], color=look(arm)[0], lw=1.1,
                  ls=(0, (4, 2)))
        elif by:
          seeds_and_mean(ax, by, xs, xs, look(arm), label=study.label(arm, mode))
    if "oracle_mass" in names:
      ax.plot([], [], color="#333333", lw=1.1, ls=(0, (4, 2)), label="best possible blocks")
    ax.set_title(title)
    ax.set_xlabel("layer (0 = first)")
    ax.set_ylabel("share (%)")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
  key(fig, axes[0], look)
  return fig


def masses_over_training(study: Study, look: Look, size: str) -> Figure | None:
  """Captured (solid) and oracle mass (dashed) per layer over the arm's own training tokens."""
  return _over_training(study, look, size, {"captured_mass": "-", "oracle_mass": (0, (4, 2))}, "attention mass (%)")


def overlap_over_training(study: Study, look: Look, size: str) -> Figure | None:
  """Overlap of neighbouring queries' blocks per layer over the arm's own training tokens."""
  return _over_training(study, look, size, {"overlap": "-"}, "blocks in common (%)")


def _over_training(study, look, size, names, unit):
  points = {}  # (arm, name, layer) -> {seed: [(tokens, value)]}, means over corpora
  labels = {}
  for run in study.finished:
    if run.size != size or len(run.layers) < 2:
      continue
    modes = set.intersection(*({r.get("run_mode") for r in records} for records in run.layers.values()))
    mode = next((m for m in (run.headline_mode, "sparse", "block_topk", "dense") if m in modes and m != "dense"),
                "dense" if "dense" in modes else None)
    batch, context = (run.config.get("data", {}).get(n, 0) for n in ("global_batch", "context"))
    for step, records in sorted(run.layers.items()):
      mine = [r for r in records if r.get("run_mode") == mode and r.get("seed") not in run.diverged]
      for name in names:
        for (layer, seed), value in endpoints.group(mine, ("layer", "seed"), name).items():
          labels[run.arm] = study.label(run.arm, mode)
          line = points.setdefault((run.arm, name, layer), {}).setdefault(seed, [])
          line.append(((step - run.first) * batch * context, 100 * value))
  depth = sorted({layer for _, _, layer in points})
  if not depth or all(len(line) < 2 for of_seed in points.values() for line in of_seed.values()):
    return None
  columns = min(3, len(depth))
  rows = -(-len(depth) // columns)
  fig = Figure(figsize=(10.4, 0.9 + 2.4 * rows), layout="constrained")
  axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  for ax, layer in zip(axes.flat, depth):
    for arm in study.arms:
      for name, dash in names.items():
        seeds = points.get((arm, name, layer), {})
        means = {}
        for line in seeds.values():
          x, y = zip(*line)
          ax.plot(x, y, color=look(arm)[0], ls=dash, lw=0.6, alpha=0.6)
          for a, b in line:
            means.setdefault(a, []).append(b)
        if means:
          xs = sorted(means)
          ax.plot(xs, [np.mean(means[x]) for x in xs], color=look(arm)[0], ls=dash, lw=1.7,
                  marker=look(arm)[1] if len(xs) == 1 else "", ms=4, label=labels.pop(arm, None))
    ax.set_title(f"layer {layer}")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  for ax in list(axes.flat)[len(depth):]:
    ax.set_visible(False)
  for ax in axes[-1]:
    ax.set_xlabel("own training tokens")
  for ax in axes[:, 0]:
    ax.set_ylabel(unit)
  if len(names) > 1:
    axes[0, 0].plot([], [], color="#333333", lw=1.1, ls=(0, (4, 2)), label="best possible blocks")
  key(fig, axes[0, 0], look)
  return fig


def heat_maps(study: Study, look: Look, size: str) -> Figure | None:
  """Which key blocks one head selects: the reference arm first, the same layer, head and document."""
  chosen = endpoints.illustrated(study, size)
  if not chosen:
    return None
  fig, axes = figure(3.2 * len(chosen) + 1.2, 3.9, columns=len(chosen), sharey=True)
  for ax, (arm, record) in zip(axes, chosen):
    rows = record["heat"]
    heat = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
      heat[i, :len(row)] = [number(v) for v in row]
    upper = np.arange(heat.shape[1])[None] > np.arange(heat.shape[0])[:, None]
    image = ax.imshow(np.ma.masked_where(upper | np.isnan(heat), 100 * heat), cmap="cividis",
                      vmin=0, vmax=100, interpolation="nearest", aspect="auto", extent=(0, 100, 100, 0))
    ax.set_title(study.label(arm, record.get("run_mode", "")), fontsize=9.5)
    ax.set_xlabel("keys (% of the context)")
    ax.grid(False)
    for a in (ax.xaxis, ax.yaxis):
      a.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes[0].set_ylabel("queries (% of the context)")
  fig.colorbar(image, ax=axes, shrink=0.82, pad=0.02).set_label("queries that select the block (%)")
  layer, head, document = (chosen[0][1].get(name) for name in ("layer", "kv_head", "document"))
  fig.suptitle(f"layer {layer}, KV head {head}, seed {chosen[0][1].get('seed')}\n{document}",
               fontsize=9 if len(chosen) > 1 else 7, x=0.02, ha="left")
  return fig
