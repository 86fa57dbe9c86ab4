"""The section on isoflop.py's question: the words, the tables and the figures of its fits."""
from __future__ import annotations

import collections
import math

from nsa.report import endpoints, isoflop, isoflop_plots as plots
from nsa.report.document import Heading, Table, Text
from nsa.report.endpoints import Row
from nsa.report.runs import Study
from nsa.report.verdict import SECTIONS


def section(study: Study, table: list[Row], gallery) -> list:
  """The blocks of the report."""
  blocks = [Heading(SECTIONS["isoflop"])]
  found = isoflop.points(study, table)
  if not found:
    return [*blocks, Text("No finished run of an arm named method_budget yet.", "note")]
  names = list(dict.fromkeys(p.method for p in found))
  metrics = [e.metric for e in study.endpoints if any(math.isfinite(p.row[e.metric]) for p in found)]
  fits = {metric: {name: isoflop.fit([p for p in found if p.method == name], metric, k)
                   for k, name in enumerate(names)} for metric in metrics}
  blocks += [Text("How it is fitted and judged is in nsa/report/isoflop.py. Training FLOPs are analytic, "
                  "selectors and their losses counted; parameters are those of the backbone.")]
  blocks += _verdict(study, fits) + _missing(study)
  for metric in metrics:
    blocks += _table(fits[metric], metric) if endpoints.metric(metric).lower_is_better else []
  blocks += _multipliers(fits, names)
  shown = [("isoflop", plots.curves(found, fits), "Held-out loss over parameters at equal training FLOPs, a colour for "
            "each method, a marker for each budget; lines: fitted parabolas, stars: their optima with 95 % intervals. "
            "Recall is a panel of its own, not judged", "Loss over model size at equal training FLOPs"),
           ("isoflop_cost", plots.frontiers(fits), "Loss at each method's best size, by training FLOPs and, where runs "
            "had a device of their own, by its time. Bars: 95 % intervals. Hollow: the optimum is not bracketed",
            "Loss by training cost"),
           ("isoflop_inference", plots.inference(found, metrics), "Models of the largest budget, run with other "
            "numbers of blocks than they were trained with: loss by forward FLOPs per token, selection counted. Line: "
            "the lower edge of each method", "Loss by inference FLOPs")]
  for name, figure, caption, alt in shown:
    blocks.append(gallery.block(name, figure, caption, alt, f"Not drawn ({name}): too few runs"))
  return blocks


def _verdict(study, fits) -> list:
  judged = isoflop.judge(fits)
  if not judged:
    return [Text("No verdict: no sparse method has runs.", "note")]
  lines = []
  for one in judged:
    m = endpoints.metric(one.metric)
    said = lambda d, *ends: m.with_interval(d, *ends, True) + ", less than what matters" * (abs(d) < isoflop.SMALLEST)
    of = "; ".join(f"minus {name} {said(*found)}" for name, found in one.against.items())
    of += f"; that window minus dense {said(*one.window)}" if one.window else ""
    hidden = min((low for name, (_, low, _) in one.against.items() if name != "dense"), default=0.0)
    if one.word == "confirmed by locality" and hidden < -isoflop.SMALLEST:
      of += f"; that selection adds up to {m.text(-hidden)} is not excluded"
    without = [name for name in (one.method, "dense") if not isinstance(fits[one.metric].get(name), isoflop.Fit)]
    at = (f"at {one.budget:.2g} FLOPs, {of}" if of else f"no fit of {' and '.join(without)}" if without else
          "no budget at which its optimum and dense's are bracketed")
    lines.append(f"{one.method}, {m.title}: **{one.word}** ({at})")
  seeds = "one seed: a word about these runs, not about training" if _one_seed(study) else ""
  return [Text("\"Larger and sparse beats smaller and dense\": " + "; ".join(lines) + "."
               + f" **{seeds[0].upper()}{seeds[1:]}.**" * bool(seeds), "verdict")]


def _missing(study) -> list:
  """Which runs the fits do without."""
  all_runs = [run for run in study.runs if isoflop.ARM.match(run.arm)]
  left = collections.defaultdict(list)
  for run in all_runs:
    if run.status != "done":
      left[run.arm].append(run.size + f" seed {run.seeds[0]}" * (not _one_seed(study)))
  named = "; ".join(f"{arm} ({', '.join(of)})" for arm, of in left.items())
  return [Text(f"{sum(map(len, left.values()))} of {len(all_runs)} runs are missing, and fits do without them: "
               f"{named}.", "note")] if left else []


def _one_seed(study) -> bool:
  return len({seed for run in study.finished for seed in run.seeds}) < 2


def _table(of: dict[str, isoflop.Fit | str], name: str) -> list:
  m = endpoints.metric(name)
  lines, without = [], []
  for method, one in of.items():
    if isinstance(one, str):
      without.append(f"{method}: {one}")
      continue
    e = "-" if math.isnan(one.exponent) else (f"{one.exponent:.2f} ({one.exponent_between[0]:.2f} to "
                                             f"{one.exponent_between[1]:.2f})")
    for k, o in enumerate(one.optima.values()):
      million = lambda n: f"{n / 1e6:.2g}M"
      lines.append([method if not k else "", f"{o.budget:.2g}", str(o.sizes),
                    f"{million(o.parameters)} ({million(o.between[0])} to {million(o.between[1])})",
                    "yes" if o.bracketed else "**no**",
                    m.with_interval(o.loss, *o.loss_between),
                    "-" if math.isnan(o.seconds) else f"{o.seconds:.3g}", e if not k else "",
                    f"{m.text(one.residual)} ({one.df})" if not k else ""])
  caption = (f"{m.heading}: the best size at each budget of training FLOPs, and how it grows "
             "with the budget. 95 % intervals; SD of the residuals with its degrees of freedom"
             + (". Exploratory" if m.kind != "text" else ""))
  blocks = [Table(["method", "training FLOPs", "sizes", "best parameters", "bracketed", f"loss there ({m.unit})",
                   "device seconds", "exponent", "residual SD"], lines, caption)] if lines else []
  return blocks + ([Text(f"No fit of {m.title}: " + "; ".join(without) + ".", "note")] if without else [])


def _multipliers(fits, names) -> list:
  lines = []
  for metric, of in fits.items():
    if endpoints.metric(metric).kind != "text":
      continue
    for name in names:
      mine, dense = of[name], of.get("dense")
      if name == "dense" or isinstance(mine, str) or not isinstance(dense, isoflop.Fit):
        continue
      cells = ["-" if (x := isoflop.multiplier(mine, dense, by)) is None else
               "{:.2f} ({:.2f} to {:.2f})".format(*x) if not x[3] else f"{'above' if x[0] > 1 else 'below'} {x[0]:.2f}"
               for by in ("budget", "seconds")]
      lines.append([endpoints.metric(metric).title, name, *cells])
  if not lines:
    return []
  return [Table(["endpoint", "method", "times its FLOPs", "times its device time"], lines,
                "What dense costs over what a method costs at the same loss, the one that the worse of the two has at "
                "the largest budget; the better one's cost lies between its own optima, or below all of them "
                "(\"above\", \"below\"). Above 1: the method is cheaper. 95 % intervals of the fits; exploratory",
                left=2)]
