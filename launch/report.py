"""Writes the report of one study, or of one or several runs.

    python -m launch.report RUN_OR_STUDY... [--out=DIR]
    python -m launch.report runs/gates --out=experiments/results/gates --publish
    python -m launch.report experiments/results/gates --out=DIR        # the same report, from what was published
    python -m launch.report runs/gates experiments/results/gates --out=experiments/results/gates --publish

The last takes the runs that runs/gates has not finished from what was published before. With --open --publish the
report has what the sealed evaluations (eval.sealed) say, too: of each tier of the plan, or the whole study, once all
its runs are there, not before and not a second time; a published report that was opened stays so. What people have to
say of it goes into a NOTES.md, in DIR or beside study.json: it becomes a section.
"""
from pathlib import Path

from absl import flags

from launch import cli

_OUT = flags.DEFINE_string("out", "", "Directory of the report; empty: report/ inside the first path.")
_OPEN = flags.DEFINE_bool("open", False, "Open the sealed evaluations, of the split that nothing was chosen by.")
_PUBLISH = flags.DEFINE_bool("publish",
                             False, "For a repository: no HTML, small PNGs, configs and records without this "
                             "machine's paths.")


def main(arguments):
  from nsa import report
  paths = [Path(p) for p in arguments]
  if not paths:
    raise ValueError("name at least one run or study: python -m launch.report RUN_OR_STUDY... [--out=DIR]")
  table = report.verdict_table(*paths)  # before anything is written: DIR may be one of the paths
  written = report.write(paths, Path(_OUT.value) if _OUT.value else paths[0] / "report", _PUBLISH.value, _OPEN.value)
  print(table)
  print("\nreport: " + "\n        ".join(str(path) for path in (written.html, written.markdown, written.csv) if path))


if __name__ == "__main__":
  cli.run(main, arguments=True)
