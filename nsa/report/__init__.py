"""Run directories in, a written answer out: report.md, report.html, results.csv, layers.csv and plots/.

    paths = report.write([Path("runs/study")], Path("runs/study/report"))
    print(report.verdict_table(Path("runs/study")))

reading.py makes runs and a study (runs.py) of what lies on disk, archive.py what goes into a repository and comes back;
endpoints.py reduces records (nsa/records.py) to one number per arm, seed, run mode and metric; gates.py says which
endpoints count, comparisons.py tests, verdict.py has the words, analyses.py splits, plan_file.py compares with what was
planned; answer.py, sections.py and plots.py say and show it, document.py writes it down; planning.py looks ahead.
lengths.py, frontier.py and isoflop_section.py are sections of studies that ask for them, statistics included (the last
one's in isoflop.py); selectors.py is the one on trained and training-free selectors,
curricula.py the one on arms that begin otherwise than they end.
A NOTES.md in the report's directory, or else in the study's, becomes a section: the report is written anew, the notes
stay.
"""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path
import textwrap

from nsa.report import archive, document, endpoints, gates, verdict as verdict_lib

__all__ = ["ReportPaths", "verdict_table", "write"]


@dataclasses.dataclass(frozen=True)
class ReportPaths:
  """Where the report lies, and its first sentence."""
  markdown: Path
  html: Path | None          # None where it was published
  csv: Path
  plots: tuple[Path, ...]
  headline: str


def write(paths: list[Path], out: Path, publish: bool = False, opened: bool = False) -> ReportPaths:
  """Reports a study with what was published of it before, or one or several run directories, into the directory `out`.

  publish: for a repository: small PNGs alone, no page, no path of this machine, and an archive from which the same
  report can be written again (archive.py). `out` may be one of `paths` that was published: all is read before anything
  is written.
  opened: opens the sealed evaluations (eval.sealed) of each tier whose runs are all there, once and for all:
    archive.open_sealed. With publish alone, which records it.

  Raises ValueError for what cannot be opened, for a path that is neither a run nor a study, for archives of another
  experiment, and where something in `out` would be lost. Parts that are missing become lines of the report.
  """
  out = Path(out)
  study = archive.load([Path(p) for p in paths])
  if opened and not publish:
    raise ValueError("--open: give --publish, too; what was sealed is opened once, and the archive records it")
  if opened:
    archive.open_sealed(study)
  archive.check_out(out, study, publish)
  if (out / "NOTES.md").is_file():
    study.notes = (out / "NOTES.md").read_text()
  if not publish:
    return _write(study, out, ("svg", "png"))
  notes = study.notes
  out.mkdir(parents=True, exist_ok=True)
  archive.publish(study, out)
  study = archive.load([out])  # the report is written from what is published
  study.notes = notes
  return _write(study, out, ("png",))


def _write(study, out, endings) -> ReportPaths:
  import matplotlib  # here: whoever wants the verdict alone does not wait for it

  from nsa.report import sections, style
  folder = out / "plots"
  folder.mkdir(parents=True, exist_ok=True)
  table = endpoints.rows(study)
  verdict, again, rows = _judged(study, table)
  with matplotlib.rc_context(style.STYLE):
    gallery = sections.Gallery(study, folder, endings)
    blocks = sections.all_sections(study, table, verdict, gallery, again)
  title = f"{'Study' if study.declared else 'Run' if len(study.runs) == 1 else 'Runs'}: {study.name}"
  page = "svg" in endings
  pictures = tuple(folder / f"{name}.{ending}" for name in gallery.names for ending in endings[::-1])
  result = ReportPaths(out / "report.md", out / "report.html" if page else None, out / "results.csv", pictures,
                       verdict.headline)
  endpoints.write_csv(table + rows, result.csv)
  endpoints.write_layers(study, out / "layers.csv")
  result.markdown.write_text(document.markdown(title, blocks))
  if page:
    result.html.write_text(document.page(title, blocks, folder))
  return result


def _judged(study, table):
  """(verdict, the same by what was sealed and has been opened or None, that one's rows)."""
  if not study.opened:
    return verdict_lib.verdict(study, table), None, []
  opened = archive.unsealed(study)
  rows, admitted = endpoints.rows(opened), gates.admissions(study, table)
  again = verdict_lib.verdict(opened, rows, admitted)
  return verdict_lib.verdict(study, table, admitted, again), again, rows


def verdict_table(*paths: Path) -> str:
  """The arms and the verdict as plain text for a terminal, at most 100 columns where names are short.

  Takes the paths that `write` takes, and raises its ValueErrors.
  """
  study = archive.load([Path(p) for p in paths])
  table = endpoints.rows(study)
  verdict = _judged(study, table)[0]
  shown = [r for r in table if r.status == "done"] or table
  metrics = [e.metric for e in study.endpoints if e.primary and any(math.isfinite(r[e.metric]) for r in shown)]
  many, quantity = len(study.sizes) > 1, "Delta" if {"Delta"} & {*study.asked} & {*study.quantities} else "R"
  header = ["arm"] + ["size"] * many + ["seeds"] + [_short(name) for name in metrics] + ["outcome"]
  lines = []
  for size in study.sizes:
    for arm, mode in dict.fromkeys((r.arm, r.run_mode) for r in shown if r.size == size):
      mine = [r for r in shown if (r.arm, r.run_mode, r.size) == (arm, mode, size)]
      own = mine[0].headline
      if not own and study.declared and arm != study.dense:
        continue
      values = [endpoints.interval_text(endpoints.metric(m), endpoints.finite(mine, m), False) for m in metrics]
      words = [c.word for m in metrics for c in verdict.of(quantity, m, size) if c.arm == arm] if own else []
      word = (" | ".join(words if len(set(words)) > 1 else words[:1])
              or ("reference" if own and arm == study.reference else ""))
      lines.append([study.label(arm, mode)] + [size] * many + [str(len({r.seed for r in mine}))] + values + [word])
  widths = [max(len(row[i]) for row in [header] + lines) for i in range(len(header))]
  left = 1 + many
  rule = ["  ".join("-" * w for w in widths)]
  text = ["  ".join(c.ljust(w) if i < left or i == len(row) - 1 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in [header] + lines]
  failed = [f"failed: {r.name}: {(r.error.strip().splitlines() or ['no message'])[0]}"
            for r in study.runs if r.status == "failed"]
  body = "\n".join(text[:1] + rule + text[1:]) if lines else "(no evaluation yet)"
  wrap = lambda line, **kw: textwrap.fill(document.plain(line), 100, **kw)
  return "\n".join([body, ""] + failed + [wrap(verdict.headline)]
                   + [wrap(line, initial_indent="- ", subsequent_indent="  ") for line in verdict.lines])


def _short(name: str) -> str:
  """A metric's heading in a terminal: its unit, or its name; and its part."""
  metric, part = endpoints.metric(name), name.partition(":")[2]
  heading = metric.unit if metric.kind == "text" else name.partition(":")[0] + (" %" if metric.scale == 100 else "")
  return heading + (f" {part}" if part else "")
