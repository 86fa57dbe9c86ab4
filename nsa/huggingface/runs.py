"""Import and export: run directories made of others' models, and folders that others read.

An imported run holds the parameters as its checkpoint 0, without an optimizer: runs fork from it with `fork.reset`,
launch.evaluate reads it. `hf/` in it keeps the model's own config.json and tokenizer.

An export is the backbone in the Hugging Face format, to be run dense by anything that reads it, and beside it what the
methods added: `method.json`, their options, and `method.safetensors`, their parameters in float32. An import of that
folder is the sparse model again.
"""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
import shutil
from typing import NamedTuple

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from nsa import (
  checkpoint,
  config as config_lib,
  methods,
  metrics,
  model as model_lib,
  provenance,
  rundir,
  sharding,
  stacking,
  step as step_lib,
)
from nsa.config import Config, ConfigError, DataConfig, EvalConfig
from nsa.data import tokenizer as data_tokenizer
from nsa.huggingface import (
  architectures,
  gguf_file,
  gguf_model,
  safetensors_files,
  tokenizer as tokenizer_files,
  weights,
)

GENERATION = "generation_config.json"  # what others sample with; kept for the way out
METHOD, METHOD_WEIGHTS = "method.json", "method.safetensors"
_FORMAT = 1  # of METHOD
CONTEXT = 4096


# --- in ---------------------------------------------------------------------------


def import_model(source, workdir, *, context: int = 0, tokenizer: str = "", data_source: str = "stdlib") -> Config:
  """Makes a run directory of a model's folder or GGUF file; returns its config.

  Args:
    context: tokens of the windows that launch.evaluate takes by default; 0 for CONTEXT, or what the model was made
      for where that is less.
    data_source: the text they are cut from, as in `data.source`.
    tokenizer: "bytes" or "hf:PATH"; "" for the model's own.

  Raises:
    ConfigError: something in the model that cannot be computed here, or `workdir` is not empty. It is left as it was.
    ModuleNotFoundError: without safetensors, or gguf.
  """
  source, workdir = Path(source), epath.Path(workdir)
  if not source.exists():
    raise ConfigError([("--source", str(source), "not there: give a model's folder, or a GGUF file")])
  _refuse_content(workdir, "--workdir")
  opened = _open_gguf(source) if source.is_file() else _open_folder(source)
  longest = opened.config.get("max_position_embeddings")
  longest = longest if architectures.is_size(longest) else 0
  context = context or min(CONTEXT, longest or CONTEXT)
  if longest and context > longest:
    logging.warning("--context = %d: the model was made for %d tokens (max_position_embeddings)", context, longest)
  config = Config(arm="dense", size=opened.name or "imported", model=opened.model, attention=methods.Dense(),
                  data=DataConfig(data_source, tokenizer="bytes", context=context),
                  eval=EvalConfig(run_modes=("dense",)))
  if opened.method:
    config.attention, config.layers, config.others = opened.method
    config.arm, config.eval.run_modes = config.attention.name, ("dense", "sparse")
  weights.check_shapes(opened.weights, opened.model)
  made = not workdir.exists()
  try:
    (workdir / rundir.FOLDER).mkdir(parents=True, exist_ok=True)
    if tokenizer:
      config.data.tokenizer = tokenizer
      rundir.keep_tokenizer(config, workdir)
    elif opened.write_tokenizer(workdir / rundir.FOLDER):
      config.data.tokenizer = f"hf:{workdir / rundir.FOLDER}"
    else:
      raise ConfigError([("--tokenizer", "", f"{source} has none that is read here: give --tokenizer=hf:PATH, or bytes "
                          "for a model that was trained on bytes")])
    try:
      config_lib.validate(config)
    except ConfigError as error:
      of = f"source: {source / METHOD}: " if opened.method else ""
      raise ConfigError([(of * name.startswith(("attention", "layers")) + name, *rest)
                         for name, *rest in error.problems]) from None
    if absent := provenance.missing(config, trunk=False):
      raise ConfigError(absent)
    params = weights.load_params(opened.weights, opened.model)
    if opened.method:
      params = _with_method(stacking.restack(params, config), config, source)
    (workdir / rundir.FOLDER / "config.json").write_text(json.dumps(opened.config, indent=2) + "\n")
    if source.is_dir() and (source / GENERATION).is_file():
      (workdir / rundir.FOLDER / GENERATION).write_bytes((source / GENERATION).read_bytes())
    mesh = sharding.make_mesh(config)
    abstract = step_lib.abstract_state(config, mesh)._replace(optimizer={})
    state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, {})
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
    checkpoint.Checkpoints(workdir).save(0, state, wait=True)
    metrics.write_json(workdir / "versions.json", {**provenance.versions(), "imported": config.size})
    written = config_lib.to_dict(config)
    if config.data.tokenizer.startswith("hf:"):
      written["data"]["tokenizer"] = f"hf:{rundir.FOLDER}"
    metrics.write_json(workdir / "config.json", written)  # last: now it is a run
  except BaseException:
    with contextlib.suppress(OSError):
      (workdir if made else workdir / rundir.FOLDER).rmtree(missing_ok=True)
      (workdir / "checkpoints").rmtree(missing_ok=True)
      (workdir / "versions.json").unlink(missing_ok=True)
    raise
  return rundir.read_config(workdir)


class _Opened(NamedTuple):
  name: str
  model: config_lib.ModelConfig
  config: dict                  # config.json
  weights: weights.Source
  write_tokenizer: object       # folder -> whether there is one
  method: tuple | None = None   # attention, layers, others


def _open_folder(source: Path) -> _Opened:
  model, tensors = architectures.read_config(source), safetensors_files.Tensors(source)
  config = safetensors_files.read_object(source / "config.json")
  # What an export is to be written in. Some files hold more than their config says.
  config |= {key: tensors.dtype for key in ("dtype", "torch_dtype")}
  return _Opened(source.resolve().name, model, config, tensors, lambda folder: tokenizer_files.copy(source, folder),
                 _read_method(source) if (source / METHOD).is_file() else None)


def _open_gguf(source: Path) -> _Opened:
  with open(source, "rb") as f:
    if f.read(4) != gguf_file.MAGIC:
      found = safetensors_files.pointer(source) or "no GGUF file"
      raise ConfigError([("--source", str(source), f"{found}; of safetensors give the folder, with config.json in it")])
  found = gguf_model.Model(source)

  def write_tokenizer(folder):
    for name, content in tokenizer_files.from_gguf(found.metadata, source).items():
      (folder / name).write_text(content)
    return True

  return _Opened(source.stem, found.model, found.hugging_face_config(), found, write_tokenizer)


def _refuse_content(folder, flag: str) -> None:
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError([(flag, str(folder), "there is something in it already: take another directory, or delete it")])


# --- out --------------------------------------------------------------------------


def export_model(workdir, folder, *, step: int = -1, seed: int = -1, dtype: str = "",
                 shard_bytes: int = 5 * 10 ** 9) -> list[str]:
  """Writes a run's model as a folder of the Hugging Face format, all of it or nothing; returns the names of the methods
  whose parameters lie beside the backbone.

  Args:
    folder: to make; one that is there has to be empty.
    step: checkpoint; -1 for the newest.
    seed: of a run with several; -1 for the first.
    dtype: of the backbone's weights; "" for the imported model's, float32 without one.

  Raises ConfigError for a folder with content, a model that is not the same without its method's parameters, or one of
  no family in architectures.py; CheckpointError without a checkpoint.
  """
  workdir, folder = epath.Path(workdir), Path(folder)
  config = rundir.read_config(workdir)
  _refuse_content(folder, "--out")
  acting = sorted({method.name for method in config.methods if method.acts_when_dense})
  if acting:
    raise ConfigError([("attention", ", ".join(acting),
                        "its parameters act in dense attention too, and the format has no place for them")])
  origin = _origin(workdir, config)
  base = json.loads((origin / "config.json").read_text()) if origin else None
  dtype = dtype or (base or {}).get("dtype") or (base or {}).get("torch_dtype") or "float32"
  written = architectures.write_config(config.model, dtype, base)
  params = checkpoint.load_params(workdir, None if step < 0 else step)
  if len(config.seeds) > 1:
    if seed not in (-1, *config.seeds):
      raise ConfigError([("--seed", seed, f"the run has the seeds {config.seeds}")])
    params = jax.tree.map(lambda x: x[config.seeds.index(seed) if seed >= 0 else 0], params)
  added = sorted({method.name for method in config.methods} - {"dense"})
  with _whole(folder) as unfinished:
    weights.save_params(stacking.backbone(params), config.model, unfinished, dtype, shard_bytes)
    if added:
      _write_method(params, config, unfinished)
    for name in (GENERATION, *tokenizer_files.FILES) if origin else ():
      if (origin / name).exists():
        (unfinished / name).write_bytes((origin / name).read_bytes())
    if config.data.tokenizer.startswith("hf:") and not (unfinished / tokenizer_files.TOKENIZER).exists():
      for name, content in data_tokenizer.get(config.data.tokenizer).files.items():
        (unfinished / name).write_bytes(content)
    (unfinished / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
  return added


@contextlib.contextmanager
def _whole(folder: Path):
  """A folder beside `folder` that takes its place in the end, and is gone after an error."""
  folder = Path(os.path.abspath(folder))
  unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
  unfinished.mkdir(parents=True)
  try:
    yield unfinished
    if folder.exists():
      folder.rmdir()  # only an empty one can be
    unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _origin(workdir, config):
  """The hf/ folder of the run, or of the run that it was forked from, and so on; None without one.

  Raises ConfigError if a run on the way is gone: what it would have said of the model is not known.
  """
  seen = set()
  while str(workdir) not in seen:
    seen.add(str(workdir))
    if (workdir / rundir.FOLDER / "config.json").exists():
      return workdir / rundir.FOLDER
    if not config.fork.workdir:
      return None
    workdir = epath.Path(config.fork.workdir)
    config = rundir.read_config(workdir, field="fork.workdir")
  return None


# --- what methods add -----------------------------------------------------------------


def _method_leaves(params: dict, config):
  """(name of layer i's tensor, its stack's leaf, number of the layer in it, a way to set it) of all that methods
  added."""
  first = 0
  for i, (_, count) in enumerate(stacking.layout(config)):
    def walk(node, path):
      for key, value in sorted(node.items()):
        if isinstance(value, dict):
          yield from walk(value, (*path, key))
        else:
          yield (*path, key), node, key

    added = params["stacks"][f"stack{i}"]["attention"].get("method", {})
    for path, node, key in walk(added, ()):
      for layer in range(count):
        yield f"layers.{first + layer}.{'.'.join(path)}", node, key, layer
    first += count


def _write_method(params: dict, config, folder: Path) -> None:
  tensors = {name: np.ascontiguousarray(node[key][layer]) for name, node, key, layer in _method_leaves(params, config)}
  safetensors_files.save(tensors, folder / METHOD_WEIGHTS)
  tree = config_lib.to_dict(config)
  (folder / METHOD).write_text(json.dumps(
      {"format": _FORMAT, **{name: tree[name] for name in ("attention", "layers", "others")}}, indent=2) + "\n")


def _read_method(folder: Path) -> tuple:
  """(attention, layers, others) of METHOD."""
  tree = safetensors_files.read_object(folder / METHOD)
  if tree.pop("format", None) != _FORMAT or not tree.keys() <= {"attention", "layers", "others"}:
    raise ConfigError([("source", str(folder / METHOD), f"not of the format {_FORMAT}: export it again")])
  config = config_lib.from_dict(tree, f"source: {folder / METHOD}")
  return config.attention, config.layers, config.others


def _with_method(params: dict, config, folder: Path) -> dict:
  """The backbone's parameters with those of METHOD_WEIGHTS."""
  path = folder / METHOD_WEIGHTS
  try:
    found = safetensors_files.library().numpy.load_file(path)
  except ModuleNotFoundError:
    raise
  except Exception as error:
    raise ConfigError([("source", str(path), f"no whole safetensors file ({error}): export it again")]) from None
  abstract = model_lib.abstract_params(config)
  wanted = {name: (node[key].dtype.name, node[key].shape[1:])
            for name, node, key, _ in _method_leaves(abstract, config)}
  for name, want in wanted.items():
    got = (found[name].dtype.name, found[name].shape) if name in found else "missing"
    if got != want:
      raise ConfigError([(f"source: {path}: {name}", got, f"{METHOD} makes it {want}: export it again")])
  if left := sorted(found.keys() - wanted):
    raise ConfigError([(f"source: {path}", left[:8], f"{METHOD} has no such parameters: export it again")])
  for i in range(len(abstract["stacks"])):
    added = abstract["stacks"][f"stack{i}"]["attention"].get("method")
    if added:
      params["stacks"][f"stack{i}"]["attention"]["method"] = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), added)
  for name, node, key, layer in _method_leaves(params, config):
    node[key][layer] = found[name]
  return params
