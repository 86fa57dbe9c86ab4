"""Tensors by their names in the Hugging Face format <-> the parameters of a dense model."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from nsa.config import ConfigError, ModelConfig
from nsa.huggingface import safetensors_files

# Path in a block -> tensor of layer i, and the axes that its [out, in] has here: [heads * head_dim, d_model] is "dnh".
_BLOCK = {
    ("attention_norm",): ("input_layernorm.weight", "d"), ("mlp_norm",): ("post_attention_layernorm.weight", "d"),
    ("attention", "q", "weight"): ("self_attn.q_proj.weight", "dnh"),
    ("attention", "k", "weight"): ("self_attn.k_proj.weight", "dkh"),
    ("attention", "v", "weight"): ("self_attn.v_proj.weight", "dkh"),
    ("attention", "q", "bias"): ("self_attn.q_proj.bias", "nh"),
    ("attention", "k", "bias"): ("self_attn.k_proj.bias", "kh"),
    ("attention", "v", "bias"): ("self_attn.v_proj.bias", "kh"),
    ("attention", "out"): ("self_attn.o_proj.weight", "nhd"),
    ("attention", "q", "norm"): ("self_attn.q_norm.weight", "h"),
    ("attention", "k", "norm"): ("self_attn.k_norm.weight", "h"),
    ("mlp", "gate"): ("mlp.gate_proj.weight", "df"), ("mlp", "up"): ("mlp.up_proj.weight", "df"),
    ("mlp", "down"): ("mlp.down_proj.weight", "fd")}
_TOP = {("embed",): ("model.embed_tokens.weight", "vd"), ("norm",): ("model.norm.weight", "d"),
        ("head",): ("lm_head.weight", "dv")}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Source(Protocol):
  """Tensors under their names in the Hugging Face format, [out, in]."""
  shapes: dict[str, tuple[int, ...]]

  def read(self, name: str) -> np.ndarray:
    """float32."""

  def place(self, name: str) -> str:
    """Where it is, for messages."""


def _tensors(model: ModelConfig):
  """(path here, layer or None, tensor's name, shape here, shape there, whether it is transposed)."""
  sizes = dict(d=model.d_model, n=model.num_heads, k=model.num_kv_heads, h=model.head_dim, f=model.mlp_dim,
               v=model.vocab_size)
  absent = {"bias": not model.qkv_bias, "norm": not model.qk_norm}
  for table, layers in ((_TOP, (None,)), (_BLOCK, range(model.num_layers))):
    for path, (name, letters) in table.items():
      if path == ("head",) and model.tie_embeddings or len(path) > 1 and absent.get(path[-1]):
        continue
      here = tuple(sizes[letter] for letter in letters)
      matrix = path[-1] in ("weight", "out", "gate", "up", "down", "head")
      split = 1 if letters[0] in "df" else 2  # axes of the input
      there = (int(np.prod(here[split:])), int(np.prod(here[:split]))) if matrix else here
      there = there if matrix or path[-1] != "bias" else (int(np.prod(here)),)
      for layer in layers:
        prefix = "" if layer is None else f"model.layers.{layer}."
        yield path, layer, prefix + name, here, there, matrix


def check_shapes(source: Source, model: ModelConfig) -> None:
  """Raises ConfigError if the source has not just the tensors of the model; no value is read."""
  used = set()
  for _, _, name, _, there, _ in _tensors(model):
    if name not in source.shapes:
      raise ConfigError([(f"source: {source.place(name)}", "missing", "the weights do not belong to this config")])
    if source.shapes[name] != there:
      raise ConfigError([(f"source: {source.place(name)}", source.shapes[name], f"the config makes it {there}")])
    used.add(name)
  unread = sorted(name for name in source.shapes if name not in used and not name.endswith(safetensors_files.NO_WEIGHT)
                  and not (model.tie_embeddings and name == HEAD))
  if unread:
    raise ConfigError([(f"source: {source.place(unread[0])}", f"one of {len(unread)}",
                        "tensors that the model here does not have: take another checkpoint")])


def load_params(source: Source | str | Path, model: ModelConfig) -> dict:
  """Float32 parameters of the dense model, NumPy, all layers in one stack.

  Raises ConfigError for tensors that are missing, left over, of another shape or type, or not finite.
  """
  source = safetensors_files.Tensors(Path(source)) if isinstance(source, (str, Path)) else source
  check_shapes(source, model)
  params = {}
  for path, layer, name, here, _, transposed in _tensors(model):
    x = source.read(name)
    if not np.isfinite(x).all():
      raise ConfigError(
          [(f"source: {source.place(name)}", "NaN or infinite", "the weights are damaged: fetch them again")])
    x = (x.T if transposed else x).reshape(here)
    node = params if layer is None else params.setdefault("stacks", {}).setdefault("stack0", {})
    for part in path[:-1]:
      node = node.setdefault(part, {})
    if layer is None:
      node[path[-1]] = x
    else:
      if path[-1] not in node:
        node[path[-1]] = np.empty((model.num_layers,) + here, np.float32)
      node[path[-1]][layer] = x
  # Some files hold the embedding twice. Another matrix there would be one that the model was trained with.
  if model.tie_embeddings and HEAD in source.shapes and (
      source.shapes[HEAD] != params["embed"].shape or not np.array_equal(source.read(HEAD), params["embed"])):
    raise ConfigError([(f"source: {source.place(HEAD)}", source.shapes[HEAD],
                        f"is not {EMBEDDING}, though config.json has tie_word_embeddings = true: set it to false "
                        "if the model has a head of its own")])
  return params


def save_params(params: dict, model: ModelConfig, folder, dtype: str, shard_bytes: int = 5 * 10 ** 9) -> None:
  """Writes the tensors of a dense model's parameters, in several files once they are more than `shard_bytes`."""
  folder = Path(folder)
  multiplier = model.embedding_multiplier or model.d_model ** 0.5
  width = jnp.dtype(dtype).itemsize
  names = list(_tensors(model))
  several = sum(int(np.prod(there)) * width for *_, there, _ in names) > shard_bytes
  shard, size, total, where = {}, 0, 0, {}

  def write():
    file = f"model-{len(set(where.values())) + 1:05d}.safetensors" if several else safetensors_files.SINGLE
    safetensors_files.save(shard, folder / file, {"format": "pt"})
    where.update(dict.fromkeys(shard, file))

  for path, layer, name, _, there, transposed in names:
    node = params if layer is None else params["stacks"]["stack0"]
    for part in path:
      node = node[part]
    x = np.asarray(node if layer is None else node[layer], np.float32)
    x = x.reshape(there[::-1]).T if transposed else x.reshape(there)
    if path == ("embed",) and multiplier != 1:
      x = x * np.float32(multiplier)
    x = np.ascontiguousarray(x).astype(jnp.dtype(dtype))
    if size and size + x.nbytes > shard_bytes:
      write()
      shard, size = {}, 0
    shard[name] = x
    size, total = size + x.nbytes, total + x.nbytes
  write()
  if several:
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / safetensors_files.INDEX).write_text(json.dumps(index, indent=2) + "\n")
