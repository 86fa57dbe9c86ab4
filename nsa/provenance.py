"""What a run was made of, for versions.json: software, devices, the commit, and the documents that it reads."""
from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import subprocess

from etils import epath
import jax

from nsa import config as config_lib, data, forks, held_out, metrics, origins, rundir, step as step_lib

AGAIN = "trained_again.json"  # of a trunk whose checkpoints are of a run with other bits: where they part


def corpora(config, workdir: epath.Path, batches: step_lib.Batches, resumed: bool) -> dict:
  """Reads what the run and its evaluations will read; SHA-256 of the documents of each split, for versions.json.

  Raises ConfigError if the run in `workdir` that goes on has read others. So must a fork, of its trunk, unless it names
  another data.source or tokenizer, or begins anew.
  """
  few = 1 if jax.process_count() == 1 else None  # the others are made while the run goes on (held_out.made_ahead)
  read = {"corpus_sha256": batches.fingerprint, "held_out_sha256": held_out.check(config, few)}
  if resumed:
    before = _recorded(workdir)
    _same_corpora(config, read, before, workdir, "bring them back, or begin again in another workdir")
    return {**read, "held_out_sha256": {**before.get("held_out_sha256", {}), **read["held_out_sha256"]}}
  trunk = epath.Path(config.fork.workdir)
  if config.fork.workdir and not config.fork.reset and (trunk / "config.json").exists():
    theirs = config_lib.from_dict(metrics.read_json(trunk / "config.json"), f"{trunk}/config.json").data
    alike = theirs.tokenizer == config.data.tokenizer or rundir.has_tokenizer_of(config, trunk)
    if alike and theirs.texts == config.data.texts:
      _same_corpora(config, read, _recorded(trunk), trunk,
                    "bring them back, train the trunk again, or give these a data.source of their own")
  return read


def missing(config, trunk: bool) -> list[tuple[str, object, str]]:
  """(field, value, fix) of the corpora that are not there, and with `trunk` of what the run forks from. No text is
  read."""
  problems = []
  for name, source in config.data.texts.items():
    try:
      data.check(source, config.data.data_dir)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
      problems.append((f"data.corpora[{name}]" if name else "data.source", source,
                       str(error).removeprefix(f"data.source = {source!r}: ")))
  if config.fork.workdir and trunk:
    try:
      forks.trunk_of(config)
    except config_lib.ConfigError as error:
      problems += error.problems
  return problems


def write(config, workdir: epath.Path, batches: step_lib.Batches, read: dict, resumed: bool) -> None:
  """versions.json, with what `corpora` has `read`; planted.json of a run whose text has planted passages."""
  own = origins.digests(config_lib.to_dict(config)["modules"])
  metrics.write_json(workdir / "versions.json", {
      **versions(), **read, **({"modules": own} if own else {}), **_trunk_again(config, workdir, resumed)})
  if config.data.planted:
    metrics.write_json(workdir / "planted.json",
                       {str(seed): [dataclasses.asdict(passage) for passage in source.planted(config.schedule.steps)]
                        for seed, source in zip(config.seeds, batches.sources)})


def _trunk_again(config, workdir: epath.Path, resumed: bool) -> dict:
  """For versions.json: where a trunk that was trained again parts from its records, if the run began with its bits."""
  if resumed:
    before = _recorded(workdir)
    return {name: before[name] for name in ("trunk_again",) if name in before}
  path = epath.Path(config.fork.workdir) / AGAIN
  return {"trunk_again": metrics.read_json(path)} if config.fork.workdir and path.exists() else {}


def _recorded(workdir) -> dict:
  return metrics.read_json(workdir / "versions.json") if (workdir / "versions.json").exists() else {}


def _same_corpora(config, read, before, workdir, fix):
  theirs = {"train": before.get("corpus_sha256"), **before.get("held_out_sha256", {})}
  problems = [("data.source", config.data.source, f"the documents of {split!r} are not those that {workdir} has read "
               f"(SHA-256 {ours[:12]}..., and {theirs[split][:12]}... there): {fix}")
              for split, ours in {"train": read["corpus_sha256"], **read["held_out_sha256"]}.items()
              if theirs.get(split, ours) not in (ours, None)]
  if problems:
    raise config_lib.ConfigError(problems)


def versions() -> dict:
  """What a later reader needs to know about the software and the devices."""
  packages = {}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "nsa"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      packages[name] = importlib.metadata.version(name)
  device = jax.devices()[0]
  return {"python": platform.python_version(), **packages, **_checkout(), "platform": device.platform,
          "device_kind": device.device_kind, "devices": jax.device_count(), "processes": jax.process_count()}


def _checkout() -> dict:
  """The commit of the code that runs, and whether files differ from it; null outside a git checkout of it."""
  def git(*arguments):
    return subprocess.run(["git", "-C", os.fspath(pathlib.Path(__file__).parents[1]), *arguments], capture_output=True,
                          text=True, timeout=20, check=True).stdout.strip()

  try:
    if not git("ls-files", "nsa/train.py"):  # somebody else's repository, with this package below it
      return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
  except (OSError, subprocess.SubprocessError):
    return {"commit": None, "dirty": None}
