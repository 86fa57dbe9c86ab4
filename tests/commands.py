"""Commands as processes of their own, without the second that each would take to import everything.

A server that has imported the project forks itself for every command, which then has arguments, an environment, signals
and an exit code of its own. What happens as the interpreter ends is for tests that start one.
"""
import multiprocessing
import os
from pathlib import Path
import runpy
import signal
import sys
import tempfile

from nsa import metrics

ROOT = Path(__file__).resolve().parent.parent
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["nsa.train", "nsa.evaluate", "nsa.processes", "nsa.report", "nsa.study", "launch.cli"])


def _become(module, arguments, directory, environment, files):
  for number, file in zip((1, 2), files):
    os.dup2(os.open(file, os.O_WRONLY), number)
  os.chdir(directory)
  os.environ.update(environment)
  import jax
  jax.config.update("jax_platforms", "cpu")  # its environment was read when the server began
  sys.argv = [module, *arguments]
  sys.path[:0] = [directory, str(ROOT)]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def logged(workdir) -> list[dict]:
  """What a run has logged, without what its clock says."""
  return [{name: value for name, value in record.items() if name not in ("tokens_per_second", "mfu", "seconds")}
          for record in metrics.read_jsonl(f"{workdir}/metrics.jsonl")]


class Command:
  """`python -m module arguments` on the CPU, begun."""

  def __init__(self, module, *arguments, directory=ROOT, **environment):
    self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
    self._process = _server.Process(target=_become, args=(
        module, [*map(str, arguments)], os.fspath(directory), environment, [file.name for file in self._files]))
    self._process.start()

  def running(self) -> bool:
    return self._process.is_alive()

  def terminate(self) -> None:
    os.kill(self._process.pid, signal.SIGTERM)

  def end(self, code=0, timeout=300) -> tuple[str, str]:
    """Waits for its end, with that exit code; gives what it wrote to stdout and stderr."""
    self._process.join(timeout)
    out, err = (file.read() for file in self._files)
    if self._process.exitcode is None:
      self._process.kill()
    assert self._process.exitcode == code, f"exit code {self._process.exitcode}\n{out}\n{err}"
    return out, err


def run(module, *arguments, code=0, **how):
  return Command(module, *arguments, **how).end(code)
