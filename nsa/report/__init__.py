"""Run directories in, a written answer out: report.md, report.html, results.csv, layers.csv and plots/.

    paths = report.write([Path("runs/study")], Path("runs/study/report"))
    print(report.verdict_table(Path("runs/study")))

runs.py reads what lies on disk, published.py what publish.py wrote into a repository, loading.py both; endpoints.py reduces it
to one number per arm, seed and run mode, verdict.py and analyses.py judge, planning.py looks ahead, sections.py and plots.py
say and show it, document.py writes it down.
A NOTES.md in the report's directory, or else in the study's, becomes a section: the report is written anew, the notes stay.
"""
from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
import textwrap

from nsa.report import document, endpoints, loading, publish as publish_lib, published, verdict as verdict_lib
from nsa.report.endpoints import METRIC

__all__ = ["ReportPaths", "verdict_table", "write"]


@dataclasses.dataclass(frozen=True)
class ReportPaths:
  """Where the report lies, and its first sentence."""
  markdown: Path
  html: Path | None          # None where it was published
  csv: Path
  plots: tuple[Path, ...]
  headline: str


def write(paths: list[Path], out: Path, publish: bool = False) -> ReportPaths:
  """Reports a study with what was published of it before, or one or several run directories, into the directory `out`.

  publish: for a repository: small PNGs alone, no page, no path of this machine, study.json with every arm's config and
  records.tar.xz, from which the same report can be written again. `out` may be one of `paths` that was published: all
  is read before anything is written.

  Raises ValueError for a path that is neither a run nor a study, for published directories of another experiment, and
  where something in `out` would be lost: the study.json of a study that runs, or runs that were published there and are
  not in the new report. Parts that are missing become lines of the report.
  """
  out = Path(out)
  study = loading.load([Path(p) for p in paths])
  published.check_out(out, study, publish)
  archive = b""
  if publish:
    archive = publish_lib.records(study)
    for run in study.runs:
      run.error = publish_lib.bare(study, run.message) if run.status == "failed" else run.error
      run.problems = [publish_lib.bare(study, problem) for problem in run.problems]
    study.problems = [publish_lib.bare(study, problem) for problem in study.problems]
  import matplotlib  # here: whoever wants the verdict alone does not wait for it
  from nsa.report import sections, style
  folder = out / "plots"
  folder.mkdir(parents=True, exist_ok=True)
  if (out / "NOTES.md").is_file():
    study.notes = (out / "NOTES.md").read_text()
  table = endpoints.rows(study)
  verdict = verdict_lib.verdict(study, table)
  with matplotlib.rc_context(style.STYLE):
    gallery = sections.Gallery(study, folder, ("png",) if publish else ("svg", "png"))
    blocks = sections.all_sections(study, table, verdict, gallery)
  title = f"{'Study' if study.declared else 'Run' if len(study.runs) == 1 else 'Runs'}: {study.name}"
  pictures = tuple(folder / f"{name}.{ending}" for name in gallery.names for ending in gallery.endings[::-1])
  result = ReportPaths(out / "report.md", None if publish else out / "report.html", out / "results.csv", pictures,
                       verdict.headline)
  endpoints.write_csv(table, result.csv)
  endpoints.write_layers(study, out / "layers.csv")
  text = document.markdown(title, blocks)
  if publish:
    result.markdown.write_text(publish_lib.without_paths(study, text))
    (out / publish_lib.RECORDS).unlink(missing_ok=True)  # of what was published here before
    if archive:
      (out / publish_lib.RECORDS).write_bytes(archive)
    files = {path.name: path.read_bytes() for path in (result.csv, out / "layers.csv", out / publish_lib.RECORDS) if path.is_file()}
    (out / "study.json").write_text(json.dumps(publish_lib.description(study, files), indent=1) + "\n")
  else:
    result.markdown.write_text(text)
    result.html.write_text(document.page(title, blocks, folder))
  return result


def verdict_table(*paths: Path) -> str:
  """The arms and the verdict as plain text for a terminal, at most 100 columns where names are short.

  Takes the paths that `write` takes, and raises its ValueErrors.
  """
  study = loading.load([Path(p) for p in paths])
  table = endpoints.rows(study)
  verdict = verdict_lib.verdict(study, table)
  primary, secondary = METRIC[study.primary], METRIC[study.secondary]
  many = len(study.sizes) > 1
  header = ["arm"] + ["size"] * many + [
      "seeds", primary.unit, study.secondary + (" %" if secondary.scale == 100 else ""),
      f"minus {study.reference or 'reference'}", "outcome"]
  shown = [r for r in table if r.status == "done"] or table
  lines = []
  for size in study.sizes:
    by_arm = {c.arm: c for c in verdict.comparisons if c.role == "primary" and c.size == size}
    for arm, mode in dict.fromkeys((r.arm, r.run_mode) for r in shown if r.size == size):
      mine = [r for r in shown if (r.arm, r.run_mode, r.size) == (arm, mode, size)]
      own = mine[0].headline
      if not own and study.declared and arm != study.dense:
        continue
      c = by_arm.get(arm) if own else None
      difference = endpoints.interval_text(primary, c.differences.values(), False) if c else ""
      values = [endpoints.interval_text(m, [v for r in mine if math.isfinite(v := getattr(r, m.name))], False)
                for m in (primary, secondary)]
      lines.append([study.label(arm, mode)] + [size] * many + [str(len({r.seed for r in mine}))] + values
                   + [difference, c.word if c else "reference" if own and arm == study.reference else ""])
  widths = [max(len(row[i]) for row in [header] + lines) for i in range(len(header))]
  left = 1 + many
  rule = ["  ".join("-" * w for w in widths)]
  text = ["  ".join(c.ljust(w) if i < left or i == len(row) - 1 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in [header] + lines]
  failed = [f"failed: {r.name}: {(r.error.strip().splitlines() or ['no message'])[0]}"
            for r in study.runs if r.status == "failed"]
  body = "\n".join(text[:1] + rule + text[1:]) if lines else "(no evaluation yet)"
  words = textwrap.fill(document.plain(verdict.paragraph), 100)
  return "\n".join([body, ""] + failed + [words])
