"""Training: one loop that reads from top to bottom.

    train(config, workdir) -> the step it reached, with workdir holding
    config.json  versions.json  metrics.jsonl  checkpoints/<step>/  eval/<step>.json  profile/  DONE; LOCK while it
    runs; planted.json, where data.planted: which passages, and how often the whole run plants each;
    hidden/<step>.json, where eval.hidden_states names steps: measures of hidden states

A run that was cut (kill, SIGTERM, full disk) goes on from its newest good checkpoint when the same
command is given again, and reaches the same bits on the same mesh. With several processes each
calls `train` with the same config and a workdir that all of them see; process 0 writes the files.
"""
from __future__ import annotations

import collections
import contextlib
import errno
import functools
import json
import os
import time

from absl import logging
from etils import epath
import jax
import numpy as np

from nsa import (
  capacity,
  checkpoint,
  config as config_lib,
  data,
  evaluate,
  flops,
  forks,
  held_out,
  lock,
  metrics,
  processes,
  programs,
  provenance,
  rundir,
  schedule,
  sharding,
  stacking,
  start as start_lib,
  step as step_lib,
)
from nsa.look import snapshots
from nsa.progress import Progress


class Preempted(Exception):
  """SIGTERM came: everything is saved, the same command goes on."""


class Diverged(Exception):
  """The loss is not finite. `seed` names the replica."""

  def __init__(self, message: str, seed: int):
    super().__init__(message)
    self.seed = seed


def train(config: config_lib.Config, workdir: str | os.PathLike, *, progress: bool = True,
          hang_seconds: float = 1800, until: int = 0) -> int:
  """Trains, or goes on training, the run in `workdir`; returns its last step.

  `until`: a step at which a checkpoint is due and this call ends; the next one goes on. 0: the last.
  `hang_seconds`: with several processes, how long a step, save or evaluation may take before the
  process ends with a message (processes.Watchdog); 0 for ever.

  Raises:
    ConfigError: the config cannot run, or is not the one that `workdir` was started with.
    CheckpointError: a checkpoint cannot be read or written.
    Preempted: SIGTERM; the state is saved.
    Diverged: the loss became NaN or infinite; the message names step, rows and last good checkpoint.
    ProcessError: another process failed, or has another config, corpus or workdir.
    lock.Busy, a ProcessError: another run goes on in `workdir`.
    RuntimeError: an error in the middle of training that is of none of these kinds; its cause says which.
  """
  workdir, clock = epath.Path(workdir), start_lib.take()
  config_lib.validate(config)
  data.read_ahead(config.data.texts.values())
  clock.lap("checks")
  config_lib.validate(config, jax.device_count())
  clock.lap("devices")
  processes.agree(config=json.dumps(config_lib.to_dict(config)))
  with contextlib.ExitStack() as stack:
    with processes.together("opening the workdir"):
      rundir.make_workdir(workdir)
      held = stack.enter_context(lock.Lock(workdir)) if processes.first() else None
    return _train(config, workdir, held, progress, hang_seconds, until, clock)


def _train(config, workdir: epath.Path, held: lock.Lock | None, progress: bool, hang_seconds: float, until: int,
           clock: start_lib.Start) -> int:
  before = {path.name for path in workdir.iterdir()}
  rundir.open_workdir(config, workdir)
  mesh = sharding.make_mesh(config)
  total = config.schedule.steps
  checkpoints = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, keep_at=config.checkpoint.keep_at,
                                       keep_period=config.checkpoint.keep_period, every=config.checkpoint.every)
  done_before = (workdir / "DONE").exists() and (checkpoints.latest() or 0) >= total
  processes.agree(checkpoints=f"{checkpoints.latest()} {done_before}")
  if done_before:
    logging.info("%s is done", workdir)
    return total
  if until and (checkpoints.latest() or 0) >= until:
    return until

  try:
    with programs.ahead(compilations(config, mesh, forks.first_step(config, workdir))):
      return _run(config, workdir, held, mesh, checkpoints, progress, hang_seconds, until or total, clock)
  except (ValueError, FileNotFoundError, ModuleNotFoundError):
    # Its input was wrong, and nothing was trained: a corrected config may begin here.
    log = workdir / "metrics.jsonl"
    begun = checkpoints.latest() is not None or log.exists() and log.read_text()
    if "config.json" not in before and not begun and processes.first():
      rundir.clear(workdir, but=before)
    raise


def _run(config, workdir, held: lock.Lock | None, mesh, checkpoints, progress: bool, hang_seconds: float,
         until: int, clock: start_lib.Start) -> int:
  """The run itself, while a thread compiles what it will need."""
  total = config.schedule.steps
  with processes.together("reading the data"):
    batches = step_lib.Batches(config, mesh)
    read = provenance.corpora(config, workdir, batches, resumed=checkpoints.latest() is not None)
  processes.agree(corpus=json.dumps(read))
  clock.lap("data")
  first = processes.first()
  if first:
    provenance.write(config, workdir, batches, read, resumed=checkpoints.latest() is not None)
  clock.lap("versions")
  capacity.check_state(config, step_lib.abstract_state(config, mesh))
  with capacity.told(config, "parameters and optimizer state"):
    state, start = forks.initial_state(config, mesh, checkpoints)
  clock.lap("state")
  writer = metrics.JsonlWriter(workdir / "metrics.jsonl", tensorboard=config.tensorboard) if first else None
  if first:
    writer.truncate_after(start)
    for remark in config_lib.remarks(config):
      logging.warning("%s", remark)
  name = f"{config.arm} s{','.join(map(str, config.seeds))}"
  bar = Progress(name, total, start_step=start, stream=None if progress and first else open(os.devnull, "w"))

  programs.begun()
  compiled, needed, evaluated = {}, schedule.programs(config, start), collections.Counter()
  keys = [*(step_lib.step_key(config, step, mesh) for step in needed), held_out.made(config)]
  log = _Log(config, writer, bar, start, clock, keys[0])

  def make_ready(step):
    with bar.pause("compile"), capacity.told(config, "a training step"):
      compiled[step.program] = step_lib.compile_step(config, step, mesh)
      capacity.check_step(config, compiled[step.program])

  # Several processes compile everything now, in one order, while none waits for another's step.
  for step in needed if jax.process_count() > 1 else needed[:1]:
    make_ready(step)
  clock.lap("program")

  seeds = step_lib.seeds_of(config)
  with (_under_way(workdir), processes.preemption() as preempted, processes.Watchdog(hang_seconds) as watchdog,
        writer or contextlib.nullcontext(), checkpoints, capacity.told(config, "training or evaluating")):
    cut = (bool(start) and _evaluates(config, start) and start in checkpoints.steps()
           and not evaluate.is_there(config, workdir, start, during=start < total))
    processes.agree(evaluation=str(cut))
    if cut:
      with bar.pause("evaluate"):      # the run was cut between this checkpoint and its evaluation
        evaluate.write(config, state.params, workdir, start, mesh, start < total, own=True, seconds=evaluated)
      clock.lap("evaluation")
    ours = not start or start in checkpoints.steps()  # not the trunk's state, which a fork begins with
    if ours and snapshots.due(config, workdir, start):
      with bar.pause("hidden states"):
        snapshots.write(config, state.params, workdir, start, batches.sources, mesh)
      clock.lap("hidden states")
    batch = batches.at(start) if start < total else None
    clock.lap("batch")
    pending = None                     # (step, device metrics) of the step before
    for index in range(start, total):
      watchdog.expect(f"step {index}")
      step = schedule.at(config, index)
      programs.check(keys)             # also of what comes later: a run that cannot end shall not go on for hours
      if step.program not in compiled:
        make_ready(step)
      if step.enter:
        state = state._replace(params=stacking.enter(config, state.params, step.enter))  # the optimizer's state stays
      if config.profile and index == config.profile[0]:
        jax.profiler.start_trace(os.fspath(workdir / "profile"))
      state, device_metrics = compiled[step.program](state, batch, step.rates, seeds)
      # While the devices work: the next batch, and the metrics of the step before.
      try:
        batch = batches.at(index + 1) if index + 1 < total else None
        failed = None
      except Exception as error:  # told below, once what is trained has been saved
        failed = error
      if pending is not None:
        log.step(*pending, batches, checkpoints)
      pending = index, device_metrics
      if failed:
        if jax.process_count() == 1:  # of several the others are at their next step
          log.step(*pending, batches, checkpoints)
          held.check()
          writer.sync()
          checkpoints.save(index + 1, state, wait=True)
        raise failed
      if config.profile and index == config.profile[1]:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()

      done = index + 1
      stop = preempted(done)
      evaluating = _evaluates(config, done)
      saving = done == total or checkpoints.should_save(done)
      looking = not stop and snapshots.due(config, workdir, done)
      if stop or evaluating or saving or looking:
        log.step(*pending, batches, checkpoints)    # a state that is not finite is never saved
        pending = None
      if stop or saving:
        watchdog.expect(f"the checkpoint of step {done}")
        with bar.pause("checkpoint"):
          if first:
            held.check()
            writer.sync()              # a checkpoint never is ahead of the records
          checkpoints.save(done, state, wait=stop)
      if stop:
        raise Preempted(f"{workdir}: saved at step {done} of {total}; the same command goes on from there")
      if evaluating:
        watchdog.expect(f"the evaluation at step {done}")
        with bar.pause("evaluate"):
          evaluate.write(config, state.params, workdir, done, mesh, done < total, own=True, seconds=evaluated)
      if looking:
        watchdog.expect(f"the hidden states at step {done}")
        with bar.pause("hidden states"):
          snapshots.write(config, state.params, workdir, done, batches.sources, mesh)
      if done == until < total:
        bar.close()
        return done                    # the checkpoints' context waits for the last one
    bar.close()
    watchdog.expect("the last checkpoint")
    checkpoints.close()
  if first:
    metrics.write_json(workdir / "DONE", {"step": total, "seconds_paused": dict(bar.paused),
                                          "seconds_evaluated": dict(evaluated), "seconds_to_first_step": clock.seconds,
                                          "seconds_of_its_program": programs.took(keys[0])})
  processes.barrier("nsa.train.done")
  return total


@contextlib.contextmanager
def _under_way(workdir):
  """Turns errors that elsewhere mean wrong input, with nothing touched, into what they are once training has begun."""
  try:
    yield
  except (ValueError, OSError, ModuleNotFoundError) as error:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      raise                              # a full disk is told as such
    raise RuntimeError(f"{workdir}: an error in the middle of training; the same command goes on from the newest "
                       f"checkpoint. {type(error).__name__}: {error}") from error


def _evaluates(config, done: int) -> bool:
  """Whether an evaluation follows the first `done` steps."""
  return done == config.schedule.steps or bool(config.eval.every) and done % config.eval.every == 0


# --- what a run compiles ----------------------------------------------------------


def compilations(config, mesh, start: int = 0):
  """What a run compiles from step `start` on, imports and counts, in the order in which it needs it: for
  `programs.ahead`."""
  yield functools.partial(step_lib.compile_init, config, mesh)
  for number, step in enumerate(schedule.programs(config, start)):
    yield functools.partial(step_lib.compile_step, config, step, mesh)
    if not number:
      yield programs.when_begun
      yield from held_out.made_ahead(config)
  yield from snapshots.compilations(config, start, mesh)
  yield from evaluate.compilations(config, mesh)
  yield from checkpoint.compilations(step_lib.abstract_state(config, mesh))
  yield from held_out.counted_ahead(config)


# --- logging, failure, preemption ---------------------------------------------------


class _Log:
  """Turns the metrics of finished steps into records, and a loss that is not finite into an error."""

  def __init__(self, config, writer, bar, start, clock: start_lib.Start, program):
    self.config, self.writer, self.bar, self.start = config, writer, bar, start
    self.clock, self.program = clock, program  # of the first step
    self.tokens_per_step = config.data.global_batch * config.data.context
    self.peak = config.peak_tflops or metrics.peak_tflops(jax.devices()[0].device_kind)
    self.began = time.monotonic()

  def step(self, index, device_metrics, batches, checkpoints):
    values = {name: np.atleast_1d(np.asarray(x)) for name, x in jax.device_get(device_metrics).items()}
    config, done = self.config, index + 1
    if index == self.start:
      self.clock.lap("first step")
      self.bar.say(self.clock.line(programs.took(self.program)))
    values["bits_per_byte"] = values["bits_per_byte"] * batches.tokens_per_byte(index)
    for replica, seed in enumerate(config.seeds):
      if not all(np.isfinite(x[replica]) for x in values.values()):
        checkpoints.wait()
        raise Diverged(
            f"seed {seed}: not finite at step {index}: "
            + ", ".join(f"{name} = {x[replica]}" for name, x in values.items() if not np.isfinite(x[replica]))
            + f". The last good checkpoint is step {checkpoints.latest()}. The batch held:\n"
            + batches.describe(index, replica), seed)
    now = schedule.at(config, index)
    self.bar.update(done, tokens=(done - self.start) * self.tokens_per_step * len(config.seeds),
                    loss=float(values["loss"].mean()), bpb=float(values["bits_per_byte"].mean()), mode=now.mode)
    if self.writer is None or (done % config.log_every and done != config.schedule.steps):
      return
    speed = self.bar.tokens_per_second
    for replica, seed in enumerate(config.seeds):
      record = {"step": done, "seed": seed, "stage": now.stage, "mode": now.mode,
                **{name: float(x[replica]) for name, x in values.items()},
                "learning_rate": now.learning_rate, "tokens": done * self.tokens_per_step,
                "flops": flops.cumulative(config, done)}
      if speed:
        record["tokens_per_second"] = speed / len(config.seeds)
        if self.peak:
          per_token = flops.per_step(config, now) / self.tokens_per_step
          record["mfu"] = metrics.mfu(speed * per_token, self.peak, jax.device_count())
      record["seconds"] = time.monotonic() - self.began
      self.writer.write(record)

