"""The report of hidden states: hidden_states.md and its plots, of the snapshots of one or many runs.

Every figure has beside the states what independent normal numbers give (the null), and the same states in a random
basis.
"""
from __future__ import annotations

import math
import os
from pathlib import Path

import matplotlib
from matplotlib import ticker
import numpy as np

from nsa.look import familiarity
from nsa.look.hidden_states import MEASURES, VARIANTS
from nsa.report import document, style

LABELS = {
    "hoyer": "Hoyer sparsity", "top_5": "energy of the top 5 % (share)", "top_10": "energy of the top 10 % (share)",
    "participation": "participation ratio / D", "effective_rank": "effective rank / D",
    "spectral_participation": "spectral participation / D"}
_RAMP = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")
_KINDS = {"held_out": ("#111111", "held out"), "ood": ("#c4511f", "other kinds of text"),
          "shuffled": ("#8c6bb1", "shuffled")}
_PLANTED = ("planted 0 times", "1 time", "2 to 7 times", "8 to 31 times", "32 and more")


def write(arms: dict[str, list[dict]], out: str | os.PathLike, dense: str = "dense", planned=()) -> Path:
  """Writes out/hidden_states.md and out/plots/hidden_*.png; returns the former.

  arms: {arm: its snapshots}, of one size. planned: arms that were to have some.
  Raises ValueError where there is no snapshot.
  """
  arms = {arm: found for arm, found in arms.items() if found}
  if not arms:
    raise ValueError("no run has a snapshot in hidden/: train with eval.hidden_states, or name a checkpoint of one run "
                     "with --step")
  out = Path(out)
  (out / "plots").mkdir(parents=True, exist_ok=True)
  blocks = _sections(arms, dense, [arm for arm in planned if arm not in arms])
  with matplotlib.rc_context(style.STYLE):
    for name, figure, caption in figures(arms):
      if figure is not None:
        style.save(figure, out / "plots", name, ("png",))
        blocks.append(document.Picture(name, caption, caption.partition(".")[0]))
  path = out / "hidden_states.md"
  path.write_text(document.markdown("Hidden states: familiarity and difficulty", blocks))
  return path


def _sections(arms, dense, missing) -> list:
  ends = {arm: familiarity.last(found) for arm, found in arms.items()}
  planted = any("planted" in s["kind"] for end in ends.values() for s in end)
  blocks = [document.Text(
      f"Judged: {LABELS[familiarity.MEASURE]} behind the final norm, at each arm's last snapshot. A slope of "
      f"{familiarity.SMALLEST} per doubling of exposure matters; that was stated before the data "
      "(nsa/look/familiarity.py). All else is shown and not judged." if planted else
      "Nothing is judged here: no passage was planted in training, and kinds of text differ in more than familiarity.")]
  snapshots = [[arm, str(len(found)), ", ".join(map(str, sorted({s["step"] for s in found}))),
                ", ".join(map(str, sorted({s["seed"] for s in found}))), ends[arm][0]["run_mode"],
                " ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds))]
               for arm, found in arms.items() for kinds in (ends[arm][0]["kind"],)]
  if missing:
    blocks.append(document.Text(f"Planned and not there yet: {', '.join(missing)}. Their tests count as failed ones.",
                                "note"))
  header = ["arm", "snapshots", "steps", "seeds", "run mode at the end", "items of each"]
  blocks.append(document.Table(header, snapshots, left=6))
  blocks.append(document.Heading("Means at the last snapshot"))
  blocks.append(_means(ends))
  judged = familiarity.judge(arms, dense, missing=len(missing))
  if judged:
    blocks += [document.Heading("Slope over exposure"), _judged(judged), *_beside(ends)]
  elif planted:
    blocks.append(document.Text("No slope over exposure: it takes two documents or seeds whose passages were planted "
                                "different numbers of times."))
  rows = [[arm, c.what, f"{c.r:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}",
           f"{100 * c.r ** 2:.1f}", "" if math.isnan(c.of_means) else f"{c.of_means:+.3f}", str(c.examples),
           str(c.seeds)]
          for arm, end in ends.items() for c in familiarity.difficulty(end)]
  if rows:
    blocks += [document.Heading("Difficulty"), document.Table(
        ["arm", "correlated with", "r", "95 %", "% of variance", "r of level means", "examples", "seeds"],
        rows, "One example, one point: the means of levels hide how examples scatter. Positive: sparser where harder.",
        left=2)]
  quintiles = [[arm, *(f"{value:.4f} ({loss:.2f})" for loss, value in found)]
               for arm, end in ends.items() if (found := familiarity.by_quintile(end))]
  if quintiles:
    blocks.append(document.Table(
        ["arm", *(f"quintile {i + 1}" for i in range(5))], quintiles,
        f"{LABELS[familiarity.MEASURE]} (bits per byte) by quintiles of held-out passages' loss."))
  return blocks


def _groups(snapshot) -> dict[str, np.ndarray]:
  """Name -> bool[items]: planted passages by how often they had been planted, and the other kinds."""
  kind = np.array(snapshot["kind"])
  times = np.array([n if k == "planted" else -1 for k, n in zip(snapshot["kind"], snapshot["planted"])])
  edges = ((0, 0), (1, 1), (2, 7), (8, 31), (32, 10 ** 9))
  out = {name: (times >= low) & (times <= high) for name, (low, high) in zip(_PLANTED, edges)}
  out |= {label: kind == k for k, (_, label) in _KINDS.items()}
  return {name: mine for name, mine in out.items() if mine.any()}


def _null(snapshot, variant="own") -> float:
  """Of noise: the same in a random basis."""
  return snapshot["null"]["trimmed" if variant == "trimmed" else "own"][familiarity.MEASURE][0]


def _mean(snapshots, group, point=familiarity.POINT, variant="own") -> float:
  parts = [familiarity.values(s, point=point, variant=variant)[g[group]]
           for s in snapshots if group in (g := _groups(s))]
  return float(np.mean(np.concatenate(parts))) if parts else math.nan


def _means(ends):
  names = list(dict.fromkeys(group for end in ends.values() for s in end for group in _groups(s)))
  rows = []
  for arm, end in ends.items():
    for variant in VARIANTS:
      cells = [f"{m:.4f}" if math.isfinite(m := _mean(end, name, variant=variant)) else "" for name in names]
      rows.append([arm, variant, *cells, f"{_null(end[0], variant):.4f}"])
  return document.Table(["arm", "basis", *names, "noise"], rows,
                        f"{LABELS[familiarity.MEASURE]} behind the final norm, means over passages and seeds. trimmed: "
                        "without the 1 % largest dimensions.", left=2)


def _judged(judged):
  rows = [[f"{t.arm} - {t.against}" if t.against else t.arm, f"{t.found.slope:+.5f}",
           f"{t.low:+.5f} to {t.high:+.5f}", f"{t.p:.2g}", t.word, str(t.found.passages), str(t.found.units)]
          for t in judged]
  return document.Table(
      ["arm", "slope per doubling", "simultaneous interval", "p (Holm)", "outcome", "passages", "units"], rows,
      "Negative: denser with exposure. Units are seed x document; a difference is on the same passages.")


def _beside(ends) -> list:
  """Slopes that are not judged: of every measure in every basis, given the loss, and of attention."""
  of = lambda measure, variant="own": lambda s: familiarity.values(s, measure, variant=variant)
  rows = []
  for arm, end in ends.items():
    for measure in (*MEASURES, "spectral_participation"):
      found = [familiarity.slope_of(end, of(measure, variant)) for variant in VARIANTS]
      given = familiarity.slope_of(end, of(measure), lambda s: np.array(s["bits_per_byte"], np.float64))
      rows.append([arm, measure, *(_cell(one) for one in (*found, given))])
  other = {"bits per byte": lambda s: np.array(s["bits_per_byte"], np.float64),
           "attention entropy (nats)": lambda s: familiarity.attention(s, "entropy"),
           "captured mass": lambda s: familiarity.attention(s, "captured_mass")}
  more = [[arm, name, _cell(familiarity.slope_of(end, f))] for arm, end in ends.items() for name, f in other.items()]
  more = [row for row in more if row[2]]
  return [document.Table(["arm", "measure", *VARIANTS, "own, given the loss"], rows,
                         "Slopes per doubling of exposure with 95 % intervals, behind the final norm; not judged. "
                         "spectral_participation is the same in every basis.", left=2),
          document.Table(["arm", "what else moves", "slope"], more,
                         "The same of loss and of attention, means over layers.", left=2)]


def _cell(one):
  if math.isnan(one.slope):
    return ""
  low, high = one.interval()
  return f"{one.slope:+.5f} ({low:+.5f} to {high:+.5f})"


# --- figures --------------------------------------------------------------------------


def figures(arms: dict[str, list[dict]]) -> list[tuple]:
  """(name, Figure or None, caption) of each figure."""
  noise = "Dotted: independent normal numbers; upper row the model's basis, lower row a random one."
  label, ends = LABELS[familiarity.MEASURE], {arm: familiarity.last(found) for arm, found in arms.items()}
  has = lambda kind: any(kind in s["kind"] for found in arms.values() for s in found)
  trained = any(len({s["step"] for s in found}) > 1 for found in arms.values())
  return [
      ("hidden_training", _figure(arms, "optimizer steps + 1", over_training, 10) if trained else None,
       f"{label} over training, behind the final norm. {noise}"),
      ("hidden_exposure", _figure(ends, "plantings so far + 1", by_exposure, 2) if has("planted") else None,
       f"{label} of each planted passage at the last snapshot, by plantings until then. {noise}"),
      ("hidden_layers", _figure(ends, "behind layer (0 = first)", by_layer),
       f"{label} by layer at the last snapshot. {noise}"),
      ("hidden_difficulty", _figure(ends, "pairs", by_pairs, 2) if has("recall") else None,
       f"{label} of the state that answers, by pairs of recall, at the last snapshot. {noise}")]


def _figure(arms, xlabel, draw, base=0):
  """A column for each arm, a row for each basis: draw(axes, snapshots, basis). base: of x in logarithms."""
  fig = style.Figure(figsize=(2.0 + 3.1 * len(arms), 5.6), layout="constrained")
  axes = fig.subplots(2, len(arms), squeeze=False, sharex="col", sharey=True)
  for column, (arm, found) in enumerate(arms.items()):
    axes[0, column].set_title(arm)
    axes[1, column].set_xlabel(xlabel)
    for ax, variant in zip(axes[:, column], ("own", "rotated")):
      draw(ax, found, variant)
      ax.axhline(_null(found[0]), color="#888888", ls=":", lw=1.6, label="noise")
      if base:
        ax.set_xscale("log", base=base)
  for ax, variant in zip(axes[:, 0], ("own", "rotated")):
    ax.set_ylabel(f"{LABELS[familiarity.MEASURE]}\n{variant} basis")
  style.key(fig, axes[0, 0])
  return fig


def _colour(group):
  kinds = {label: colour for colour, label in _KINDS.values()}
  return kinds.get(group) or _RAMP[_PLANTED.index(group)]


def over_training(ax, found, variant):
  """Means of each group of passages over optimizer steps."""
  of_step = {step: [s for s in found if s["step"] == step] for step in sorted({s["step"] for s in found})}
  for group in dict.fromkeys(g for s in found for g in _groups(s)):
    ax.plot(np.array(list(of_step)) + 1, [_mean(mine, group, variant=variant) for mine in of_step.values()],
            color=_colour(group), marker="o", ms=3, lw=1.3, label=group)


def by_exposure(ax, end, variant):
  """Every planted passage and the fitted slope."""
  of = lambda s: familiarity.values(s, variant=variant)
  x, y = (np.concatenate([f(s) for s in end]) for f in (familiarity.exposure, of))
  mine = np.isfinite(x)
  ax.plot(2 ** x[mine], y[mine], ".", color="#4292c6", ms=3, alpha=0.6, label="a passage")
  found = familiarity.slope_of(end, of)
  if math.isfinite(found.slope):
    at = np.array([x[mine].min(), x[mine].max()])
    ax.plot(2 ** at, y[mine].mean() + found.slope * (at - x[mine].mean()), color="#08306b", lw=1.6,
            label="slope within seed x document")


def by_layer(ax, end, variant):
  """Means of groups of passages behind each layer and behind the final norm."""
  points = end[0]["points"]
  for group in dict.fromkeys(g for s in end for g in _groups(s)):
    ax.plot(range(len(points)), [_mean(end, group, point, variant) for point in points], color=_colour(group),
            marker="o", ms=3, lw=1.3, label=group)
  every = max(1, len(points) // 8)
  ax.xaxis.set_major_locator(ticker.FixedLocator([*range(0, len(points) - every, every), len(points) - 1]))
  ax.xaxis.set_major_formatter(lambda value, _: str(points[int(value)]) if value < len(points) else "")


def by_pairs(ax, end, variant):
  """Every recall example, right ones and wrong ones apart."""
  pairs, right, y = (np.concatenate([np.array(f(s), np.float64) for s in end]) for f in (
      lambda s: s["pairs"], lambda s: s["correct"], lambda s: familiarity.values(s, variant=variant)))
  for answered, colour, label, shift in ((True, "#0072b2", "answered right", 0.96), (False, "#c4511f", "wrong", 1.04)):
    mine = ((right > 0.5) == answered) & np.isfinite(pairs)
    ax.plot(shift * pairs[mine], y[mine], ".", color=colour, ms=3, alpha=0.6, label=label)
