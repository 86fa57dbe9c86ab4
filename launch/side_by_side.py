"""The runs of a study side by side: one process for each, on the devices of this host, as many at a time as are named.

    python -m launch.study --config=... --workdir=runs/main --devices=0,0,1,1      # two on each of two GPUs

Forks wait for their trunks. A device that is named twice has its memory shared out. Each process writes
workdir/logs/<run>.log; what one has compiled the others find in the compilation cache.
"""
from __future__ import annotations

import dataclasses
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from nsa.study import Job

MEMORY = 0.9     # share of a device's memory that its processes take together
PATIENCE = 300   # seconds from SIGTERM until a process has saved its state


@dataclasses.dataclass
class Running:
  """A process at a run, on the `slot`-th of the devices named."""
  job: Job
  slot: int
  process: subprocess.Popen
  began: float


def environment(devices: list[str], slot: int) -> dict[str, str]:
  """Of the process on devices[slot]."""
  device = devices[slot]
  share = MEMORY / devices.count(device)
  return {**os.environ, "CUDA_VISIBLE_DEVICES": device, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}


def command(run: str) -> list[str]:
  """This process's own command, for one run."""
  mine, skip = [], False
  for argument in sys.argv[1:]:
    name = argument.lstrip("-").partition("=")[0]
    if not skip and name not in ("devices", "only"):
      mine.append(argument)
    skip = name in ("devices", "only") and "=" not in argument and not skip
  return [sys.executable, "-m", "launch.study", *mine, f"--only={run}"]


def ready(waiting: list[Job], at_work: list[Job], directory: Path) -> Job | None:
  """The first run that can begin.

  Of the forks of a trunk whose checkpoints are gone one goes first: it trains the trunk again.
  """
  gone = lambda trunk: trunk and not any((directory / trunk / "checkpoints").glob("*"))
  for job in waiting:
    there = not job.trunk or (directory / job.trunk / "DONE").exists()
    if there and not (gone(job.trunk) and any(other.trunk == job.trunk for other in at_work)):
      return job
  return None


def run(todo: list[Job], directory: Path, devices: list[str], on_line=print, make_command=command) -> bool:
  """Runs `todo`, trunks first, until each is done or failed. Whether a SIGTERM came, which is passed on.

  A process that ends and leaves its run neither done nor failed gets a FAILED with the end of its log. So does a fork
  whose trunk failed.
  """
  directory, stopped = Path(directory), []
  before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
  waiting, running, total = [j for j in todo if not (directory / j.run / "DONE").exists()], [], len(todo)
  for job in waiting:  # a failed run is tried again
    (directory / job.run / "FAILED").unlink(missing_ok=True)
  logs = directory / "logs"
  logs.mkdir(parents=True, exist_ok=True)
  log = lambda job: logs / f"{Path(job.run).name}.log"
  try:
    while (waiting or running) and not stopped:
      for lost in [j for j in waiting if j.trunk and (directory / j.trunk / "FAILED").exists()]:
        waiting.remove(lost)
        _fail(directory / lost.run, f"its trunk {lost.trunk} failed")
        on_line(f"{lost.run}: FAILED: its trunk failed")
      free = [slot for slot in range(len(devices)) if slot not in [one.slot for one in running]]
      while free and (job := ready(waiting, [one.job for one in running], directory)) is not None:
        waiting.remove(job)
        slot = free.pop(0)
        with open(log(job), "ab") as file:
          process = subprocess.Popen(make_command(Path(job.run).name), stdout=file, stderr=subprocess.STDOUT,
                                     stdin=subprocess.DEVNULL, env=environment(devices, slot))
        running.append(Running(job, slot, process, time.monotonic()))
        on_line(f"{job.run}: on device {devices[slot]}; {len(waiting)} wait")
      if not running:  # their trunks are not among the runs
        on_line(f"left for later, their trunks are not done: {', '.join(job.run for job in waiting)}")
        break
      time.sleep(0.2)
      for one in [one for one in running if one.process.poll() is not None]:
        running.remove(one)
        workdir = directory / one.job.run
        if not any((workdir / name).exists() for name in ("DONE", "FAILED")):
          end = log(one.job).read_text(errors="replace").strip()[-500:]
          _fail(workdir, f"its process ended with {one.process.returncode}: {end}")
        finished = sum((directory / j.run / "DONE").exists() for j in todo)
        on_line(f"{one.job.run}: {'done' if (workdir / 'DONE').exists() else 'FAILED'} in "
                f"{time.monotonic() - one.began:.0f} s; {finished} of {total} done")
    for one in running:
      one.process.terminate()
    for one in running:
      one.process.wait(timeout=PATIENCE)
  finally:
    for one in running:
      one.process.kill()
    signal.signal(signal.SIGTERM, before)
  return bool(stopped)


def _fail(workdir: Path, error: str) -> None:
  from nsa import metrics
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_json(workdir / "FAILED", {"error": error})
