"""The runs of a study side by side: as many processes as devices are named, each takes one run after the other.

    python -m launch.study --config=... --workdir=runs/main --devices=0,0,1,1      # two on each of two GPUs

A process that stays has imported, read the texts, made the tasks of the evaluation and compiled what runs share. Forks
wait for their trunks. A device that is named twice has its memory shared out. Each run writes workdir/logs/<run>.log;
what one process has compiled the others find in the compilation cache.
"""
from __future__ import annotations

from collections.abc import Callable
import contextlib
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


class Worker:
  """A process on devices[slot] that takes names of runs, one a line, and answers each with a line once it has ended.

  Its last words, if it breaks before it can open a run's log, are in `log`.
  """

  def __init__(self, command: list[str], devices: list[str], slot: int, log: Path):
    self.job, self.slot, self.began, self.log, self.said = None, slot, 0.0, log, b""
    with open(log, "wb") as file:
      self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                                      env=environment(devices, slot))
    os.set_blocking(self.process.stdout.fileno(), False)

  def begin(self, job: Job) -> None:
    self.job, self.began, self.said = job, time.monotonic(), b""
    try:
      self.process.stdin.write(f"{Path(job.run).name}\n".encode())
      self.process.stdin.flush()
    except BrokenPipeError:  # it has ended, which `ended` sees
      pass

  def ended(self) -> bool:
    """Whether the run in hand is over: answered, or its process is gone."""
    self.said += self.process.stdout.read() or b""  # whatever an import has printed is no answer
    return self.process.poll() is not None or Path(self.job.run).name.encode() in self.said.splitlines()

  def end(self) -> None:
    self.process.kill()
    self.process.wait()
    self.process.stdin.close()
    self.process.stdout.close()


def serve(run: Callable[[str], None], logs: Path) -> None:
  """The other end of `Worker`: calls run(name) for each line of standard input, with logs/<name>.log as its output."""
  answers = os.fdopen(os.dup(1), "w")
  for line in sys.stdin:
    name = line.strip()
    with open(logs / f"{name}.log", "ab") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    run(name)
    sys.stdout.flush()
    sys.stderr.flush()
    print(name, file=answers, flush=True)


def environment(devices: list[str], slot: int) -> dict[str, str]:
  """Of the process on devices[slot]."""
  device = devices[slot]
  share = MEMORY / devices.count(device)
  return {**os.environ, "CUDA_VISIBLE_DEVICES": device, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}


def command() -> list[str]:
  """This process's own command, as a worker."""
  mine, skip = [], False
  for argument in sys.argv[1:]:
    name = argument.lstrip("-").partition("=")[0]
    if not skip and name not in ("devices", "only"):
      mine.append(argument)
    skip = name in ("devices", "only") and "=" not in argument and not skip
  return [sys.executable, "-m", "launch.study", *mine, "--worker"]


def ready(waiting: list[Job], at_work: list[Job], directory: Path) -> Job | None:
  """The first run that can begin.

  Of the forks whose checkpoint of their trunk is gone one goes at a time: it trains the trunk again as far as it needs.
  """
  def gone(job):
    step = job.config.fork.step
    return not any((directory / job.trunk / "checkpoints").glob("*" if step < 0 else str(step)))

  for job in waiting:
    beside = [other for other in at_work if other.trunk == job.trunk]
    if not job.trunk or (directory / job.trunk / "DONE").exists() and not (gone(job) and any(map(gone, beside))):
      return job
  return None


def run(todo: list[Job], directory: Path, devices: list[str], on_line=print, make_command=command) -> bool:
  """Runs `todo`, trunks first, until each is done, failed or left. Whether a SIGTERM came, which is passed on.

  A run that ends and is neither done nor failed gets a FAILED with the end of its log, unless another process has it. A
  fork whose trunk failed gets one, too. Behind a run that is not done another process takes the place.
  """
  directory, stopped = Path(directory), []
  before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
  waiting, total = [j for j in todo if not (directory / j.run / "DONE").exists()], len(todo)
  for job in waiting:  # a failed run is tried again
    (directory / job.run / "FAILED").unlink(missing_ok=True)
  logs = directory / "logs"
  logs.mkdir(parents=True, exist_ok=True)
  workers: dict[int, Worker] = {}
  busy = lambda: [one for one in workers.values() if one.job is not None]
  try:
    while (waiting or busy()) and not stopped:
      for lost in [j for j in waiting if j.trunk and (directory / j.trunk / "FAILED").exists()
                   and not (directory / j.trunk / "DONE").exists()]:
        waiting.remove(lost)
        _fail(directory / lost.run, f"its trunk {lost.trunk} failed")
        on_line(f"{lost.run}: FAILED: its trunk failed")
      at_work = [one.slot for one in busy()]
      free = [slot for slot in range(len(devices)) if slot not in at_work]
      while free and (job := ready(waiting, [one.job for one in busy()], directory)) is not None:
        waiting.remove(job)
        slot = free.pop(0)
        if slot not in workers:
          workers[slot] = Worker(make_command(), devices, slot, logs / f"worker{slot}.log")
        workers[slot].begin(job)
        on_line(f"{job.run}: on device {devices[slot]}; {len(waiting)} wait")
      if not busy():  # their trunks are not among the runs, or failed, or others train them
        if waiting:
          on_line(f"left for later, their trunks are not done: {', '.join(job.run for job in waiting)}")
        break
      time.sleep(0.2)
      for one in [one for one in busy() if one.ended()]:
        job, one.job = one.job, None
        workdir = directory / job.run
        gone, elsewhere = one.process.poll(), ""
        over = lambda workdir=workdir: any((workdir / name).exists() for name in ("DONE", "FAILED"))
        if not over() and not (elsewhere := _elsewhere(workdir)) and not over():  # it may have ended meanwhile
          how = "it was left" if gone is None else f"its process ended with {gone}"
          _fail(workdir, f"{how}: {_end(logs / f'{Path(job.run).name}.log') or _end(one.log)}")
        done = (workdir / "DONE").exists()
        if gone is not None or not (done or elsewhere):  # a device's error may stay with its process
          workers.pop(one.slot).end()
        finished = sum((directory / j.run / "DONE").exists() for j in todo)
        what = "done" if done else f"left for later ({elsewhere})" if elsewhere else "FAILED"
        on_line(f"{job.run}: {what} in {time.monotonic() - one.began:.0f} s; {finished} of {total} done")
    for one in workers.values():
      one.process.terminate()  # who has no run in hand has nothing to save
    for one in workers.values():
      with contextlib.suppress(subprocess.TimeoutExpired):  # a long evaluation: the run modes it has are on the disk
        one.process.wait(timeout=PATIENCE)
  finally:
    for one in workers.values():
      one.end()
    signal.signal(signal.SIGTERM, before)
  return bool(stopped)


def _end(log: Path) -> str:
  return log.read_text(errors="replace").strip()[-500:] if log.exists() else ""


def _elsewhere(workdir: Path) -> str:
  """Who else trains in `workdir`; "" for nobody, or where that cannot be told."""
  from nsa import lock
  try:
    with lock.Lock(workdir):
      return ""
  except lock.Busy as error:
    return str(error)
  except OSError:
    return ""


def _fail(workdir: Path, error: str) -> None:
  from nsa import metrics
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_json(workdir / "FAILED", {"error": error})
