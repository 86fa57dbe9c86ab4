"""Block lists of a trained model, kept for kernel benchmarks and for the study of locality.

Kernels differ most by how much neighbouring queries share, and only trained models know. A file holds the lists
of some layers over windows of held-out text:

  block_indices  int16[layers, windows, T, K, J], ascending, -1 last
  layers         int16[layers], their numbers
  meta           JSON: block_size, T, method, arm, step, run_mode, split, documents

(numpy's compressed .npz; ascending lists of neighbours compress to a quarter of their size or less.)
"""
from __future__ import annotations

import functools
import json
import os

from etils import epath
import jax
import numpy as np

from nsa import data, evaluate, model as model_lib


def collect(config, params, *, step: int, layers: tuple[int, ...], windows: int, run_mode: str = "sparse",
            context: int = 0) -> dict[str, np.ndarray]:
  """The block lists of `layers` over `windows` windows of the config's evaluation text.

  Args:
    params: of one seed (no leading axis of seeds).
    step: of the checkpoint, for the record.
    context: tokens of a window; 0 = data.context.

  Raises ValueError if the model has no such run mode or layer, chooses no blocks, or was trained without text.
  """
  corpus, source = next(iter(config.data.texts.items()))  # the first of several
  if source == "tasks":
    raise ValueError('data.source = "tasks": the model was trained without text; take another run')
  way = evaluate.how(config, run_mode)
  if way is None or way.mode != "sparse":
    raise ValueError(f"run_mode = {run_mode!r}: {config.arm} chooses no blocks in it")
  bad = [layer for layer in layers if not 0 <= layer < config.model.num_layers]
  if bad:
    raise ValueError(f"layers = {layers}: the model has the layers 0 to {config.model.num_layers - 1}")
  context = context or config.data.context
  text = data.eval_windows(config.data, config.eval.split, windows, context, corpus)
  run = _runner(model_lib.Static((model_lib.architecture(way.config), way.mode, way.selector)))
  lists = []
  for window in text:
    seen = [x for stack in jax.device_get(run(params, window.inputs[None], window.segment_ids[None])) for x in stack]
    if not seen:
      raise ValueError(f"run_mode = {run_mode!r}: no layer of {config.arm} returned block lists")
    lists.append([np.sort(np.where(seen[layer][0] < 0, np.iinfo(np.int16).max, seen[layer][0]), axis=-1)
                  for layer in layers])
  stacked = np.asarray(lists).swapaxes(0, 1).astype(np.int16)
  meta = {"block_size": way.config.attention.block_size, "T": context, "method": way.config.attention.name,
          "arm": config.arm,
          "step": step, "run_mode": run_mode, "split": config.eval.split, "documents": [w.document for w in text]}
  return {"block_indices": np.where(stacked == np.iinfo(np.int16).max, -1, stacked).astype(np.int16),
          "layers": np.asarray(layers, np.int16), "meta": np.asarray(json.dumps(meta))}


def save(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
  """Writes what `collect` returns."""
  with epath.Path(path).open("wb") as file:
    np.savez_compressed(file, **arrays)


@functools.lru_cache(maxsize=4)
def _runner(static):
  config, mode, selector = static.value
  observe = lambda method, q, k, block_indices, call: {} if block_indices is None else {"lists": block_indices}

  @jax.jit
  def run(params, tokens, segment_ids):
    out = model_lib.forward(config, params, tokens, segment_ids, mode=mode, selector=selector, key=jax.random.key(0),
                            losses=False, observe=observe)
    return [stack["lists"] for stack in out.layers if "lists" in stack]

  return run
