"""What a run directory says of its run, wherever it lies: config.json, and the tokenizer in hf/.

A run that does not count bytes keeps the tokenizer's files in hf/, and whoever reads its config is told of those. So a
run directory can be moved or renamed, and another model at the tokenizer's old place changes none of its figures.
"""
from __future__ import annotations

import os

from etils import epath

from nsa import config as config_lib, metrics
from nsa.config import Config, ConfigError
from nsa.data import tokenizer

FOLDER = "hf"


def read_config(workdir, field: str = "--workdir") -> Config:
  """The run's config; its tokenizer is the one in the directory.

  Raises ConfigError if there is no config.json, or none of a run; `field` names what has led there.
  """
  workdir = epath.Path(workdir)
  path = workdir / "config.json"
  if not path.exists():
    raise ConfigError([(field, str(workdir), "no run directory: config.json is missing")])
  tree = metrics.read_json(path)
  if not isinstance(tree, dict):
    raise ConfigError([(field, str(path), f"holds a {type(tree).__name__}, no config of a run")])
  config = config_lib.from_dict(tree)
  if config.data.tokenizer.startswith("hf:") and (workdir / FOLDER / "tokenizer.json").exists():
    config.data.tokenizer = f"hf:{_absolute(workdir) / FOLDER}"
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


def _absolute(path: epath.Path) -> epath.Path:
  """A URL such as gs:// is absolute already."""
  return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(os.fspath(path)))
