"""Prints, or submits, one job for every point of a grid.

    python -m launch.sweep --grid=config.schedule.learning_rate.peak=1e-3,2e-3 --grid=config.seeds=0,1 \\
        -- launch.train --config=experiments/native.py --workdir=runs/sweep
    python -m launch.sweep --submit --cluster=slurm --name=lr --gpus=1 --grid=... -- launch.train ...

Every job gets a directory of its own below --workdir, named after its point, and with --submit the name
NAME-0, NAME-1, ... A grid over an argument of the experiment file is written as `--grid=:method=msa,nsa`.
"""
import itertools
import re
import shlex

from absl import flags

from launch import cli, submit

_GRID = flags.DEFINE_multi_string("grid", [], "FIELD=VALUE,VALUE,...; every combination of all grids is run.")
_SUBMIT = flags.DEFINE_bool("submit", False, "Submit the jobs (flags of launch.submit), not print them.")
for _flag in ("cluster", "name"):  # only needed to submit
  flags.FLAGS[_flag].validators.clear()


def points(grids: list[str]) -> list[dict[str, str]]:
  """All combinations. Raises ValueError naming a grid that is none."""
  axes = []
  for grid in grids:
    field, equals, values = grid.rpartition("=") if not grid.startswith(":") else grid.partition("=")
    if not equals or not re.fullmatch(r"config\..+|:.+", field) or not all(values.split(",")):
      raise ValueError(f"--grid={grid}: write FIELD=VALUE,VALUE, e.g. config.schedule.steps=1000,2000 or "
                       ":method=msa,nsa")
    axes.append([(field, value) for value in values.split(",")])
  return [dict(point) for point in itertools.product(*axes)]


def command(base: list[str], point: dict[str, str]) -> tuple[str, list[str]]:
  """The name of a point and its command line: overrides appended, its own --workdir and experiment arguments.

  Raises ValueError if `base` has no --workdir or no --config.
  """
  name = "-".join(f"{field.strip(':').split('.')[-1]}_{value}" for field, value in point.items()) or "base"
  name = re.sub(r"[^\w.+-]+", "-", name)
  arguments = ",".join(f"{field[1:]}={value}" for field, value in point.items() if field.startswith(":"))
  out, seen = [], set()
  for part in base:
    flag, _, value = part.partition("=")
    seen.add(flag)
    if flag == "--workdir":
      part = f"{part.rstrip('/')}/{name}"
    elif flag == "--config" and arguments:
      part += ("," if ":" in value else ":") + arguments
    out.append(part)
  for flag in ("--config", "--workdir"):
    if flag not in seen:
      raise ValueError(f"command {shlex.join(base)!r}: needs {flag}=... after --")
  return name, out + [f"--{field}={value}" for field, value in point.items() if not field.startswith(":")]


def main(base):
  if not _GRID.value:
    raise ValueError("--grid: missing; one FIELD=VALUE,VALUE or more, e.g. --grid=config.seeds=0,1")
  worst = 0
  for number, point in enumerate(points(_GRID.value)):
    name, argv = command(base, point)
    if not _SUBMIT.value:
      print(shlex.join(["python", "-m", *argv]))
      continue
    for flag in ("cluster", "name"):
      if not flags.FLAGS[flag].value:
        raise ValueError(f"--{flag}: needed with --submit")
    worst = max(worst, submit.submit(f"{flags.FLAGS['name'].value}-{number}", argv))
  return worst


if __name__ == "__main__":
  cli.run(main, arguments=True)
