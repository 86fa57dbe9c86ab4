"""A trunk that came without its checkpoints is trained again, to the same bits, for a fork that needs one."""
from __future__ import annotations

import contextlib
import copy
import os

from absl import logging
from etils import epath
import jax

from nsa import autotune, checkpoint, lock, metrics, processes, provenance, rundir, train
from nsa.config import EvalConfig


class Unlike(Exception):
  """A finished trunk that was trained again has become another one."""


def bring_back(trunk, step: int, known: dict, directory, other_bits: bool = False) -> None:
  """Trains a finished trunk (a nsa.study.Job, like those `known` by their runs) again if its checkpoint of `step` (-1:
  the newest) is gone, and puts its checkpoints where they were.

  It runs in again/, without evaluations, as far as this fork needs it; for a later fork it goes on from there.
  Raises Unlike if what it logs is not what the finished run has logged, to the last bit, but with `other_bits`.
  """
  workdir = directory / trunk.run
  def there():
    have = checkpoint.Checkpoints(workdir, read_only=True).steps()
    return step in have or step < 0 and bool(have)

  if there():
    return
  if trunk.trunk in known:
    bring_back(known[trunk.trunk], trunk.config.fork.step, known, directory, other_bits)
  logging.info("%s has no checkpoint to fork from: it is trained again", workdir)
  again = directory / "again" / epath.Path(trunk.run).name
  rundir.make_workdir(again)
  with contextlib.ExitStack() as stack:
    if jax.process_count() == 1:  # another process may be at the same trunk, for another fork: its checkpoints will do
      stack.enter_context(lock.waiting(again))
    if there():
      return
    have = checkpoint.Checkpoints(again / "run", read_only=True).steps()
    with processes.together("looking at the trunk trained again"):
      if processes.first() and 0 <= step < max(have, default=0) and step not in have:
        (again / "run").rmtree()  # it has passed a step that no fork needed then
    config = copy.deepcopy(trunk.config)
    config.eval = EvalConfig(sequences=0, task_examples=1, run_modes=())
    train.train(config, again / "run", until=max(step, 0))
    with processes.together("putting checkpoints back"):
      if processes.first():
        if parted := _same_run(workdir, again / "run", other_bits):
          metrics.write_json(workdir / provenance.AGAIN, parted)
        (workdir / "checkpoints").mkdir(exist_ok=True)
        for one in (again / "run/checkpoints").iterdir():
          if not (workdir / "checkpoints" / one.name).exists():
            coming = again / one.name
            if coming.exists():
              coming.rmtree()
            _copy(one, coming)
            coming.rename(workdir / "checkpoints" / one.name)
        if (again / "run/DONE").exists():
          (again / "run").rmtree()


def _copy(source, target) -> None:
  """A directory; its files are links where the file system has them."""
  target.mkdir()
  for one in source.iterdir():
    if one.is_dir():
      _copy(one, target / one.name)
      continue
    try:
      os.link(one, target / one.name)
    except OSError:  # an object store, a file system without links
      one.copy(target / one.name)


def _same_run(finished, again, other_bits: bool) -> dict | None:
  """None where two runs have logged the same numbers. With `other_bits` what parts them, for a record; else raises
  Unlike, as it does where there is nothing to compare."""
  logged = lambda path: {(r["step"], r.get("seed", 0)): r for r in metrics.read_jsonl(path / "metrics.jsonl")}
  old, new = (logged(path) if (path / "metrics.jsonl").exists() else {} for path in (finished, again))
  common = sorted(set(old) & set(new))
  if not common:
    raise Unlike(f"{finished} has logged nothing that {again} could be compared with: without its metrics.jsonl "
                 "nothing can fork from it")
  for at in common:
    for name in sorted((set(old[at]) & set(new[at])) - {"tokens_per_second", "mfu", "seconds"}):
      if old[at][name] == new[at][name]:
        continue
      if other_bits:
        far = {key: new[key]["bits_per_byte"] - old[key]["bits_per_byte"] for key in common}
        last = common[-1][0]
        return {"from_step": at[0], "last_step": last, "largest_difference": max(map(abs, far.values())),
                "difference_at_end": max((far[key] for key in common if key[0] == last), key=abs)}
        # of training bits per byte, again - finished; of several seeds the largest
      raise Unlike(f"the trunk {finished} was trained again and is another one from step {at[0]} on: {name} = "
                   f"{new[at][name]}, and {old[at][name]} was logged. On a GPU most likely XLA's autotuner "
                   f"chose otherwise (what it chose then has to lie in {finished.parent.parent / autotune.FOLDER}, see "
                   f"docs/running.md), else the devices or the software are others. Take those that trained it and "
                   f"delete {again}, or train it and its forks anew, or take it as it is now: --other_bits")
  return None
