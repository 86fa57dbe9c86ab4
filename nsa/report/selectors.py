"""Selectors that were trained beside those that need no training, at equal visible share and at equal cost.

A way to attend is the dense arm run with a training-free method, or another arm with its own selector, at its own or
another number of blocks. Of each: what it sees (the share of the (query, key) pairs of causal attention), what it costs
(attention FLOPs, the selection's own included, over those of dense attention to the same tokens; both as measured on
held-out text, the whole of it or, of methods that choose once per prompt, the prompts), and each primary endpoint minus
that of the dense arm with as many tokens (Study.control), paired by seed. Exploratory.
"""
from __future__ import annotations

import dataclasses

import numpy as np

from nsa.report import endpoints, frontier, statistics
from nsa.report.comparisons import own
from nsa.report.document import Table
from nsa.report.endpoints import Row
from nsa.report.runs import Study


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to attend. seen, cost: shares of dense attention; differences: {metric: {seed: minus dense}}."""
  arm: str
  mode: str
  kind: str                        # trained | training-free | control
  seen: float
  cost: float
  differences: dict[str, dict[int, float]]


def ways(study: Study, table: list[Row], size: str) -> list[Way]:
  """Those that were measured, the least visible first; [] where there are not both kinds."""
  shorter = {branch for arms in study.branches.values() for branch in arms}
  out = []
  for arm, mode in dict.fromkeys((r.arm, r.run_mode) for r in table if r.size == size and r.status == "done"):
    name = mode.partition(":")[0]
    free = arm == study.dense and name not in ("dense", "sparse")
    if not free and (name != "sparse" or study.headline_mode(arm) != "sparse") or arm in shorter:
      continue
    seen, cost = _shares(study, arm, size, mode)
    control = study.dense if free else study.control(arm)
    differences = {}
    for metric in (e.metric for e in study.endpoints if e.primary):
      seeds, values = statistics.paired_differences(endpoints.series(table, arm, size, mode, metric),
                                                    own(study, table, control, size, metric))
      differences[metric] = dict(zip(seeds, map(float, values)))
    if seen and any(differences.values()):
      kind = "control" if name in frontier.CONTROLS else "training-free" if free else "trained"
      out.append(Way(arm, mode, kind, seen, cost, differences))
  both = {"trained", "training-free"} <= {way.kind for way in out}
  return sorted(out, key=lambda way: (way.seen, way.cost)) if both else []


def _shares(study, arm, size, mode) -> tuple[float, float]:
  """(pairs seen, attention FLOPs) over those of dense attention; zeros where they were not measured."""
  known = [r for r in endpoints.select(study, "layer", arm, size, mode)
           if all(r.get(name) for name in ("tokens_visible", "tokens_causal", "attention_flops"))]
  model = next((run.config.get("model", {}) for run in study.arm_runs(arm, size) if run.config), {})
  causal = sum(r["tokens_causal"] for r in known)
  if not causal or not {"num_heads", "head_dim"} <= model.keys():
    return 0.0, 0.0
  per_pair = 4 * model["num_heads"] * model["head_dim"]  # a product for the score, one for the value
  return (sum(r["tokens_visible"] for r in known) / causal,
          sum(r["attention_flops"] for r in known) / (per_pair * causal))


def section(study: Study, table: list[Row], size: str, gallery) -> list:
  """A table of all ways, and a figure of them by what they see and by what they cost; [] without both kinds."""
  found = ways(study, table, size)
  if not found:
    return []
  metrics = [m for e in study.endpoints if e.primary and any(way.differences[e.metric] for way in found)
             for m in [endpoints.metric(e.metric)]]
  lines = []
  for way in found:
    values = [list(way.differences[m.name].values()) for m in metrics]
    lines.append([study.label(way.arm, way.mode), way.kind, str(max(map(len, values))), f"{100 * way.seen:.1f}",
                  f"{100 * way.cost:.0f}",
                  *(f"{m.text(i.mean, True)} ({m.between(i)})" if v and (i := statistics.t_interval(v)).bounded
                    else m.text(v[0], True) if v else "-" for m, v in zip(metrics, values))])
  at = study.at(size)
  blocks = [Table(["way", "", "seeds", "pairs seen (%)", "attention FLOPs (%)",
                   *(f"{m.title} ({m.unit})" for m in metrics)], lines,
                  f"Minus the dense arm with as many tokens{at}, with 95 % t intervals over seeds; pairs seen and "
                  "attention FLOPs, selection included, in % of dense attention. Exploratory", left=2)]
  caption = ("Trained selectors (single marks) and training-free ones (lines) minus the dense arm with as many tokens, "
             "by the share of pairs seen and by attention FLOPs; marks of the same share stand side by side. Dotted: "
             "controls. Bars: 95 % t intervals")
  return blocks + [gallery.block("selectors", figure(study, found, metrics, gallery.look), caption,
                                 "Trained and training-free selectors by cost", "Not drawn", size)]


def figure(study: Study, found: list[Way], metrics, look):
  """A row for each endpoint; of the trained arms the reference and the retrofits."""
  from nsa.report import style  # here: the verdict alone needs no matplotlib
  fig = style.Figure(figsize=(9.8, 0.5 + 3.2 * len(metrics)), layout="constrained")
  axes = fig.subplots(len(metrics), 2, squeeze=False, sharey="row")
  shown = [study.reference, *study.retrofits()]
  free = list(dict.fromkeys(way.mode.partition(":")[0] for way in found if way.kind != "trained"))
  for row, m in zip(axes, metrics):
    for ax, by, words in zip(row, ("seen", "cost"), ("pairs seen (% of dense)", "attention FLOPs (% of dense)")):
      ax.axhline(0, color="#888888", lw=1)
      for name in free:
        mine = [(100 * getattr(way, by), m.scale * np.mean(list(v))) for way in found
                if way.kind != "trained" and way.mode.partition(":")[0] == name
                and (v := way.differences[m.name].values())]
        ax.plot(*zip(*sorted(mine)), marker=".", color=frontier.COLOURS.get(name, "#93330f"), label=name, lw=1.3,
                ls=":" if name in frontier.CONTROLS else "-") if mine else None
      for way in found:
        values = list(way.differences[m.name].values())
        if way.kind == "trained" and way.arm in shown and values:
          colour, marker = look(way.arm)
          aside = 1.08 ** ((shown.index(way.arm) + 0.5) / len(shown) - 0.5)  # many see and cost the same: 4 % at most
          i, x = statistics.t_interval(values), 100 * getattr(way, by) * aside
          ax.plot([x], [m.scale * i.mean], marker, color=colour, ms=6,
                  label=way.arm if way.mode == study.headline_mode(way.arm) else None)
          if i.bounded:
            ax.vlines(x, m.scale * i.low, m.scale * i.high, color=colour, lw=1)
      ax.set_xscale("log")
      ax.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
      if m.lower_is_better:  # from nearly nothing to what random blocks lose
        ax.set_yscale("symlog", linthresh=0.01)
      ax.set_xlabel(words)
    row[0].set_ylabel(m.unit)
    row[0].set_title(m.title)
  style.key(fig, axes[0, 0])
  return fig
