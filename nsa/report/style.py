"""How figures look: fonts, a colour and a marker per arm that all of them share, a legend beside the data.

The dense arm is grey, the reference arm blue, retrofits go from light to dark orange with their
budget, other arms take what is left of the Okabe-Ito colours; colour is doubled by a marker shape. Arms of which no run
has begun take none.
"""
from __future__ import annotations

import io

from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image  # matplotlib's own

from nsa import metrics
from nsa.report.runs import Study

STYLE = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.labelsize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.8,
    "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False, "legend.fontsize": 9,
    "lines.linewidth": 1.8, "lines.markersize": 6, "savefig.dpi": 150, "svg.hashsalt": "report",
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "axes.formatter.useoffset": False,
}
_RAMP = LinearSegmentedColormap.from_list("budgets", ("#f2a65a", "#e07b39", "#c4511f", "#93330f", "#5e1c05"))
_OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#b8a500", "#7b5ea7", "#117733")
_MARKERS = "sD^vP*XphH<>"


class Look:
  """Colour and marker of every arm, the same in all figures of a report."""

  def __init__(self, study: Study):
    self.study = study
    arms = [a for a in study.arms if any(run.status != "pending" for run in study.arm_runs(a))]
    retrofits = [a for a in study.retrofits() if a in arms and (a in study.budgets or a.startswith("retrofit"))]
    self.of = {}
    others = 0
    for arm in arms:
      if arm == study.reference:
        self.of[arm] = ("#0072b2", "o")
      elif arm == study.dense:
        self.of[arm] = ("#555555", "D")
      elif arm in retrofits:
        k = retrofits.index(arm)
        place = 0.5 if len(retrofits) == 1 else k / (len(retrofits) - 1)
        self.of[arm] = (to_hex(_RAMP(place)), "s^vP*Xp"[k % 7])
      else:
        self.of[arm] = (_OTHERS[others % len(_OTHERS)], _MARKERS[::-1][others % len(_MARKERS)])
        others += 1

  def __call__(self, arm):
    """(colour, marker)"""
    return self.of.get(arm, ("#000000", "."))

  def marker(self, label):
    """The marker of the arm that a legend's label begins with; none for other labels."""
    return self.of.get(label.split(" ")[0], ("", ""))[1]


def save(fig: Figure, folder, name: str, endings=("svg", "png")) -> None:
  """folder/name.svg and folder/name.png; no date inside, so that the same data give the same file. A PNG alone is
  small."""
  if endings == ("png",):
    data = io.BytesIO()
    fig.savefig(data, dpi=130)
    # An octree keeps the arms' colours (to 3 of 255); median cut turned blue lines green where there were few of them.
    palette = Image.open(data).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(data := io.BytesIO(), "png", optimize=True)
    metrics.write_bytes(folder / f"{name}.png", data.getvalue())  # whole or not at all, on a full disk too
    return
  for ending in endings:
    fig.savefig(data := io.BytesIO(), format=ending,
                metadata={"Date": None, "Creator": None} if ending == "svg" else {"Software": None})
    metrics.write_bytes(folder / f"{name}.{ending}", data.getvalue())
    fig.set_layout_engine("none")  # keep the layout just found: finding it again would double the time


def figure(width, height, columns=1, width_ratios=None, **kw):
  """A figure of `columns` axes side by side (inches), and the axes in a list."""
  fig = Figure(figsize=(width, height), layout="constrained")
  axes = fig.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": width_ratios}, **kw)
  return fig, list(axes[0])


def key(fig, ax, look=None):
  """One legend, right of the axes, never on the data: a figure that is too low for it grows. `look` adds every arm's
  marker."""
  handles, labels = ax.get_legend_handles_labels()
  if look:
    handles = [Line2D([], [], color=h.get_color(), ls=h.get_linestyle(), lw=1.6, mfc="none", ms=5.5,
                      marker=look.marker(label)) for h, label in zip(handles, labels)]
  if handles:
    lines = sum(1 + label.count("\n") for label in labels)
    fig.set_figheight(max(fig.get_figheight(), 0.22 * lines + 0.2))  # inches, of 9 points and what is between
    fig.legend(handles, labels, loc="outside right upper")
