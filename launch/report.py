"""Writes the report of one study, or of one or several runs.

    python -m launch.report RUN_OR_STUDY... [--out=DIR]
"""
from pathlib import Path

from absl import flags

from launch import cli

_OUT = flags.DEFINE_string("out", "", "Directory of the report; empty: report/ inside the first path.")


def main(arguments):
  from nsa import report
  paths = [Path(p) for p in arguments]
  if not paths:
    raise ValueError("name at least one run or study: python -m launch.report RUN_OR_STUDY... [--out=DIR]")
  written = report.write(paths, Path(_OUT.value) if _OUT.value else paths[0] / "report")
  print(report.verdict_table(paths[0]) if len(paths) == 1 else written.headline)
  print(f"\nreport: {written.html}\n        {written.markdown}\n        {written.csv}")


if __name__ == "__main__":
  cli.run(main, arguments=True)
