"""A run's directory, and what it says of its run wherever it lies: config.json, and the tokenizer in hf/.

A run that does not count bytes keeps the tokenizer's files in hf/, and whoever reads its config is told of those. So a
run directory can be moved or renamed, and another model at the tokenizer's old place changes none of its figures.
"""
from __future__ import annotations

import errno
import json
import os
import tempfile

from etils import epath
import jax

from nsa import config as config_lib, metrics, processes
from nsa.config import Config, ConfigError
from nsa.data import tokenizer

FOLDER = "hf"
# Fields that may change when a run is resumed: they do not touch the numbers.
_FREE_FIELDS = ("log_every", "profile", "eval", "checkpoint", "mesh", "implementation", "unroll",
                "peak_tflops", "tensorboard", "modules")


def make_workdir(workdir: epath.Path) -> None:
  """Makes the directory. Raises ConfigError where there can be none, or nothing can be written into it."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if "://" not in os.fspath(workdir):
      tempfile.TemporaryFile(dir=workdir).close()
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    fix = f"cannot be made or written to ({error.strerror}): take a directory of your own"
    raise ConfigError([("--workdir", str(workdir), fix)]) from None


def clear(workdir: epath.Path, but: set[str]) -> None:
  """Removes what is in the directory, all `but` these names."""
  for path in workdir.iterdir():
    if path.name not in but:
      path.rmtree() if path.is_dir() else path.unlink()


def open_workdir(config, workdir: epath.Path) -> None:
  """Writes config.json, or checks that the run there has the same config."""
  path = workdir / "config.json"
  wanted = config_lib.to_dict(config)
  with processes.together("opening the workdir"):
    if path.exists():
      found = read_config(workdir)                 # fields it does not know yet have their defaults
      if has_tokenizer_of(config, workdir):        # wherever it was read from
        found.data.tokenizer = config.data.tokenizer
      found = config_lib.to_dict(found)
      different = [one for key in wanted if key not in _FREE_FIELDS
                   for one in changed(key, wanted[key], found.get(key))]
      if different:
        raise ConfigError(
            [(key, json.dumps(new), f"{workdir} was started with {json.dumps(old)}: take another --workdir, or the old "
              "value") for key, new, old in different])
  with processes.together("writing config.json"):
    if processes.first():
      keep_tokenizer(config, workdir)
      metrics.write_json(path, wanted)
      (workdir / "FAILED").unlink(missing_ok=True)
  with processes.together("opening the workdir"):
    if not path.exists():
      fix = (f"process {jax.process_index()} does not see the config.json that process 0 has written: take a directory "
             "that all hosts share")
      raise ConfigError([("--workdir", str(workdir), fix)])


def changed(name: str, new, old) -> list[tuple]:
  """(field, new value, old value) of all that differs, as deep as both have the same fields."""
  if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
    return [one for key in new for one in changed(f"{name}.{key}", new[key], old[key])]
  return [(name, new, old)] if new != old else []


def read_config(workdir, field: str = "--workdir") -> Config:
  """The run's config; its tokenizer is the one in the directory.

  Raises ConfigError if there is no config.json, or none of a run; `field` names what has led there.
  """
  workdir = epath.Path(workdir)
  path = workdir / "config.json"
  if not path.exists():
    found = f"its runs are in {workdir / 'runs'}" if (workdir / "study.json").exists() else "config.json is missing"
    raise ConfigError([(field, str(workdir), f"no run directory: {found}")])
  tree = metrics.read_json(path)
  if not isinstance(tree, dict):
    raise ConfigError([(field, str(path), f"holds a {type(tree).__name__}, no config of a run")])
  config = config_lib.from_dict(tree, os.fspath(path))
  if config.data.tokenizer.startswith("hf:") and (workdir / FOLDER / "tokenizer.json").exists():
    here = os.fspath(workdir)  # a URL such as gs:// is absolute already
    config.data.tokenizer = f"hf:{epath.Path(here if '://' in here else os.path.abspath(here)) / FOLDER}"
  return config


def has_tokenizer_of(config: Config, workdir) -> bool:
  """Whether the directory keeps the very tokenizer that the config names."""
  folder = epath.Path(workdir) / FOLDER
  if not config.data.tokenizer.startswith("hf:") or not (folder / "tokenizer.json").exists():
    return False
  files = tokenizer.get(config.data.tokenizer).files
  return all((folder / name).exists() and (folder / name).read_bytes() == content for name, content in files.items())


def keep_tokenizer(config: Config, workdir) -> None:
  """Copies the tokenizer of a run into its directory, whole or not at all.

  Raises ConfigError if another one is there: the run was started with that.
  """
  if not config.data.tokenizer.startswith("hf:"):
    return
  folder = epath.Path(workdir) / FOLDER
  files = tokenizer.get(config.data.tokenizer).files
  if (folder / "tokenizer.json").exists():
    if not has_tokenizer_of(config, workdir):
      raise ConfigError([("data.tokenizer", config.data.tokenizer,
                          f"not the one in {folder}, which the run was started with: take another --workdir")])
    return
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in sorted(files.items(), reverse=True):  # tokenizer.json last: it says that all are there
    unfinished = folder / f".{name}.tmp"
    unfinished.write_bytes(content)
    unfinished.replace(folder / name)
