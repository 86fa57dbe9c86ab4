"""A job, and the text that starts it somewhere."""
from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import pkgutil
import re
import shlex

import launch

# Bash that the scripts share. `forward` is theirs: it passes a signal on to what runs.
WATCH = """\
again() {  # exit codes of launch/cli.py: 75 preempted, 4 a checkpoint or 6 a process failed; above 128: a signal
  case "$1" in 75 | 4 | 6) true ;; *) [ "$1" -gt 128 ] ;; esac
}
watch() {  # waits for process $1 although signals end `wait`; its exit code is left in $code
  while interrupted=""; wait "$1"; code=$?; [ -n "$interrupted" ]; do :; done
}"""


@dataclasses.dataclass(frozen=True)
class Job:
  """What runs, and where.

  Attributes:
    name: lower-case letters, digits and dashes, as all clusters accept them.
    command: entry point and its arguments, e.g. ("launch.train", "--config=experiments/native.py", ...).
    nodes: machines; one process each.
    gpus: GPUs per node; Slurm and GKE.
    max_restarts: of all kinds, before the job is given up.
    setup: shell command that makes `python` the project's own, run on every node first.
    options: what one kind of cluster alone knows, by name.
  """
  name: str
  command: tuple[str, ...]
  nodes: int = 1
  gpus: int = 0
  max_restarts: int = 100
  setup: str = ""
  options: dict[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
      raise ValueError(f"--name={self.name!r}: take lower-case letters, digits and dashes, at most 40, a letter first")
    if not self.command or not self.command[0].startswith("launch."):
      raise ValueError(f"command = {' '.join(self.command)!r}: name an entry point after --, e.g. "
                       "-- launch.train --config=experiments/native.py --workdir=runs/native")
    if importlib.util.find_spec(self.command[0]) is None:
      known = (module.name for module in pkgutil.iter_modules(launch.__path__))
      close = difflib.get_close_matches(self.command[0].removeprefix("launch."), known, 1)
      raise ValueError(f"command = {self.command[0]!r}: no such entry point"
                       + (f"; did you mean launch.{close[0]}?" if close else ""))
    for field, least in (("nodes", 1), ("gpus", 0), ("max_restarts", 0)):
      if getattr(self, field) < least:
        raise ValueError(f"--{field}={getattr(self, field)}: at least {least}")

  @property
  def python(self) -> str:
    """The command line on every node, quoted for a shell."""
    return shlex.join(("python", "-m", *self.command))

  def option(self, name: str, example: str) -> str:
    """A required option. Raises ValueError that names the flag."""
    if not self.options.get(name):
      raise ValueError(f"--{name}: needed here, e.g. --{name}={example}")
    return self.options[name]

  def need_remote_workdir(self, fix: str) -> None:
    """Raises ValueError if --workdir is on a disk that goes away with the machine."""
    for part in self.command:
      flag, _, value = part.partition("=")
      if flag == "--workdir" and "://" not in value:
        raise ValueError(f"--workdir={value}: a restart on another machine would not find it; {fix}")


@dataclasses.dataclass(frozen=True)
class Script:
  """A file, and the command that submits it; {file} in the command is the file's path."""
  suffix: str
  text: str
  submit: tuple[str, ...]
