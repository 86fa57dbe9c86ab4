"""The model in a GGUF file: its metadata as a ModelConfig, its tensors under their Hugging Face names and layout.

Files of the architectures llama and smollm3 hold the rows of q and k in the order of interleaved rotary embedding,
pairs side by side; here, as in the Hugging Face format, the halves of a head are rotated with one another, so the rows
are put back. A GGUF file does not say whether its model was trained with a sliding window (Mistral 7B v0.1), nor which
layers of a SmolLM3 have no rotary embedding: every fourth, as in all released ones.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nsa import layers
from nsa.config import ConfigError, ModelConfig, RopeScaling
from nsa.huggingface import architectures, gguf_file


class Family(NamedTuple):
  hugging_face: str      # model_type
  interleaved: bool      # rows of q and k


FAMILIES = {"llama": Family("llama", True), "qwen2": Family("qwen2", False), "qwen3": Family("qwen3", False),
            "smollm3": Family("smollm3", True)}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.x: what the factors in a file came from, apart from the factor itself.
_LLAMA3 = dict(context=8192, low_frequency=1.0, high_frequency=4.0)


class Model:
  """A `weights.Source` of a GGUF file, with `model` (ModelConfig) and `metadata`.

  Raises ConfigError for whatever cannot be computed here; it names the file and the key.
  """

  def __init__(self, path: Path):
    self._file = gguf_file.GGUF(path)
    self.path, self.metadata = Path(path), self._file.metadata
    self.model = self._read_model()
    self._names = {}
    for name in self._file.tensors:
      if name != ROPE_FACTORS:
        self._names[_hugging_face_name(name) or name] = name
    self.shapes = {name: self._file.tensors[theirs].shape for name, theirs in self._names.items()}

  def place(self, name: str) -> str:
    return f"{self.path}: {self._names.get(name) or _gguf_name(name)}"

  def read(self, name: str) -> np.ndarray:
    x = self._file.read(self._names[name])
    heads = {"q_proj": self.model.num_heads, "k_proj": self.model.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or not FAMILIES[self.metadata["general.architecture"]].interleaved:
      return x
    # [heads, pair, which of the two, ...] -> [heads, which of the two, pair, ...]
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

  def hugging_face_config(self) -> dict[str, Any]:
    """config.json of the model. Its weights are float32: what the quantized ones stand for is no bfloat16."""
    end = {f"{name}_token_id": self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    kind = self.metadata["general.architecture"]
    base = {"model_type": FAMILIES[kind].hugging_face, **{k: v for k, v in end.items() if v is not None}}
    if (longest := self.metadata.get(f"{kind}.context_length")) is not None:
      base["max_position_embeddings"] = longest
    return architectures.write_config(self.model, "float32", base)

  # --- metadata -----------------------------------------------------------------

  def _read_model(self) -> ModelConfig:
    meta, need = self.metadata, architectures.Needs(self.path)
    kind = meta.get("general.architecture")
    need(isinstance(kind, str) and kind in FAMILIES, "general.architecture", kind,
         f"known are {', '.join(FAMILIES)}; add its differences to nsa/huggingface/gguf_model.py")
    need.end()
    need(meta.get("split.count", 1) in (0, 1), "split.count", meta.get("split.count"),
         "one part of a model: join its files")
    own = {key[len(kind) + 1:]: value for key, value in meta.items() if key.startswith(kind + ".")}
    size = {}
    for ours, key in (("num_layers", "block_count"), ("d_model", "embedding_length"),
                      ("mlp_dim", "feed_forward_length"),
                      ("num_heads", "attention.head_count")):
      size[ours] = own.pop(key, None)
      need(architectures.is_size(size[ours]) and (ours != "num_layers" or size[ours] <= architectures.MOST_LAYERS),
           f"{kind}.{key}", size[ours], "a positive integer is needed, and a number of layers that a model can have")
    need.end()
    heads = size["num_heads"]
    kv_heads, eps = own.pop("attention.head_count_kv", heads), own.pop("attention.layer_norm_rms_epsilon", None)
    need(architectures.is_size(kv_heads) and heads % kv_heads == 0, f"{kind}.attention.head_count_kv", kv_heads,
         f"a divisor of {kind}.attention.head_count = {heads} is needed")
    need(architectures.is_number(eps) and eps > 0, f"{kind}.attention.layer_norm_rms_epsilon", eps,
         "a number above 0 is needed")
    head_dim = own.pop("attention.key_length", size["d_model"] // heads)
    need(architectures.is_size(head_dim) and head_dim % 2 == 0, f"{kind}.attention.key_length", head_dim,
         "a positive even number is needed")
    for key in ("attention.value_length", "rope.dimension_count"):
      value = own.pop(key, head_dim)
      need(value == head_dim, f"{kind}.{key}", value, f"only {head_dim}, the width of a head, is known here")
    theta = own.pop("rope.freq_base", 10_000.0)
    need(architectures.is_number(theta) and theta > 0, f"{kind}.rope.freq_base", theta, "a number above 0 is needed")
    scaling = self._scaling(own, kind, need)
    embedding = self._file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else 0
    need(embedding is not None, "token_embd.weight", "missing", "no such tensor: fetch the file again")
    need(own.pop("vocab_size", rows) == rows, f"{kind}.vocab_size", meta.get(f"{kind}.vocab_size"),
         f"token_embd.weight has {rows} rows")
    for key, fine in (("context_length", None), ("expert_count", 0), ("expert_used_count", 0)):
      value = own.pop(key, fine)
      need(fine is None or value == fine, f"{kind}.{key}", value, "a dense model is needed")
    for key, value in own.items():
      need(False, f"{kind}.{key}", value, "not known here: take another file")
    need.end()
    family = architectures.FAMILIES[FAMILIES[kind].hugging_face]
    model = ModelConfig(
        vocab_size=rows, **size, num_kv_heads=kv_heads, head_dim=head_dim, rope_theta=float(theta),
        rope_scaling=scaling, no_rope_layers=tuple(range(3, size["num_layers"], 4)) if family.nope else (),
        norm_eps=float(str(np.float32(eps))),  # 1e-5 and not the float32 next to it
        embedding_multiplier=1.0, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm,
        tie_embeddings="output.weight" not in self._file.tensors,
        dtype={"F32": "float32", "F16": "float16"}.get(embedding.kind.name, "bfloat16"))
    return self._with_factors(model)

  def _scaling(self, own, kind, need) -> RopeScaling:
    name, factor = own.pop("rope.scaling.type", "none"), own.pop("rope.scaling.factor", None)
    original = own.pop("rope.scaling.original_context_length", None)
    at = f"{kind}.rope.scaling"
    if not need(name in ("none", "linear", "yarn"), f"{at}.type", name, "known are none, linear and yarn"):
      return RopeScaling()
    if name == "none":
      need(factor in (None, 0.0, 1.0), f"{at}.factor", factor, f"{at}.type does not say what it is a factor of")
      return RopeScaling()
    fine = need(architectures.is_number(factor) and factor > 0, f"{at}.factor", factor, "a number above 0 is needed")
    if name == "linear":
      return RopeScaling("linear", factor=float(factor)) if fine else RopeScaling()
    if (not need(architectures.is_size(original), f"{at}.original_context_length", original, "yarn needs it")
        or not fine):
      return RopeScaling()
    return RopeScaling("yarn", factor=float(factor), context=original, low_frequency=1.0, high_frequency=32.0)

  def _with_factors(self, model: ModelConfig) -> ModelConfig:
    """The model with Llama 3's scaling, if the file has that as a tensor of divisors of the frequencies."""
    if ROPE_FACTORS not in self._file.tensors:
      return model
    found = self._file.read(ROPE_FACTORS).reshape(-1)
    scaling = RopeScaling("llama3", factor=float(np.round(found.max(), 6)), **_LLAMA3)
    plain = model.rope_theta ** -(np.arange(0, model.head_dim, 2) / model.head_dim)
    if model.rope_scaling.kind or found.shape != plain.shape or not scaling.factor > 1 or not np.allclose(
        plain / found, layers.scale_frequencies(plain, scaling, model.rope_theta, 0), rtol=1e-5):
      fix = "not the factors of Llama 3.x (a context of 8,192, frequencies 1 and 4): take its safetensors"
      raise ConfigError([(f"{self.path}: {ROPE_FACTORS}", found.tolist(), fix)])
    return dataclasses.replace(model, rope_scaling=scaling)


def _hugging_face_name(name: str) -> str | None:
  if name in _TOP:
    return _TOP[name]
  block, _, rest = name.partition(".")
  number, _, rest = rest.partition(".")
  part, _, what = rest.partition(".")
  if (block != "blk" or number != str(int(number) if number.isdecimal() else "") or part not in _BLOCK
      or what not in ("weight", "bias")):
    return None
  return f"model.layers.{int(number)}.{_BLOCK[part]}.{what}"


def _gguf_name(name: str) -> str:
  """The inverse, for a tensor that the file lacks."""
  top, block = ({ours: theirs for theirs, ours in table.items()} for table in (_TOP, _BLOCK))
  if name in top:
    return top[name]
  _, _, number, *part, what = name.split(".")
  return f"blk.{number}.{block['.'.join(part)]}.{what}"
