"""config.json <-> ModelConfig: what of which model family is computed here.

| model_type | differences |
|---|---|
| llama, mistral | none; Mistral without sliding window |
| qwen2 | biases on q, k and v |
| qwen3 | RMSNorm on every query and key head; heads of 128 if it does not say |
| smollm3 | no rotary embedding in some layers |

Absent keys have the defaults of the family's class in transformers 5.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from nsa.config import ConfigError, ModelConfig, RopeScaling
from nsa.huggingface import safetensors_files

DTYPES = ("float32", "bfloat16", "float16")
MOST_LAYERS = 10_000  # above, a damaged number


class Family(NamedTuple):
  """What a model_type says beyond its config.json, and the defaults of keys that are absent."""
  architecture: str
  qkv_bias: bool = False
  qk_norm: bool = False
  nope: bool = False           # some layers have no rotary embedding
  kv_heads: int = 0            # 0 = as many as query heads
  head_dim: int = 0            # 0 = hidden_size / num_attention_heads
  theta: float = 10_000.0
  tied: bool = False
  windows: str = "never"       # sliding_window: never there | if use_sliding_window says so | always, None is none


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", kv_heads=8, windows="always"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, kv_heads=32, windows="if"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, kv_heads=32, head_dim=128, windows="if"),
    "smollm3": Family("SmolLM3ForCausalLM", nope=True, kv_heads=4, theta=2e6, tied=True, windows="if"),
}
# Keys that say nothing about the forward pass of a trained model.
_IRRELEVANT = {
    "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "initializer_range",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "pretraining_tp",
    "attention_dropout", "max_window_layers", "return_dict", "output_attentions", "output_hidden_states",
    "task_specific_params", "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "tokenizer_class", "is_llama_config", "transformers.js_config"}
# Keys with one value that the model here computes; absent or null is that value.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
          "partial_rotary_factor": 1.0, "quantization_config": None, "rope_interleaved": False, "auto_map": None}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ = {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
         "rope_scaling", "rope_parameters", "sliding_window", "layer_types"}
_NOPE = {"no_rope_layers", "no_rope_layer_interval"}


def is_number(value) -> bool:
  """Whether a value of a JSON file is a finite number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_size(value) -> bool:
  """Whether it is a whole number above 0."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Needs:
  """Collects what is wrong with a file's keys; `or_else` stands behind every fix."""

  def __init__(self, path, or_else: str = ""):
    self.path, self.or_else, self.problems = path, or_else, []

  def __call__(self, ok, key, value, fix) -> bool:
    if not ok:
      self.problems.append((f"{self.path}: {key}", value, fix + self.or_else))
    return bool(ok)

  def end(self) -> None:
    """Raises ConfigError of what was wrong so far."""
    if self.problems:
      raise ConfigError(self.problems)


def read_config(folder) -> ModelConfig:
  """The model of a folder's config.json. Raises ConfigError for whatever cannot be computed here."""
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise ConfigError([("source", str(folder), "no config.json there: give the folder of a downloaded model, or a GGUF "
                        "file")])
  return model_of(safetensors_files.read_object(path), path)


def model_of(tree: dict, path) -> ModelConfig:
  """The model of a config.json's content; `path` is for messages."""
  need = Needs(path)
  kind = tree.get("model_type")
  need(isinstance(kind, str) and kind in FAMILIES, "model_type", kind,
       f"known are {', '.join(FAMILIES)}; add its differences to nsa/huggingface/architectures.py")
  need.end()
  family = FAMILIES[kind]
  known = _IRRELEVANT | _READ | (_NOPE if family.nope else set())
  for key, value in tree.items():
    if key in _FIXED:
      need(value in (None, _FIXED[key]), key, value,
           f"the model here has {key} = {_FIXED[key]!r} alone: take another checkpoint")
    elif key not in known:
      need(value is None, key, value,
           "not known here: if it changes nothing in the forward pass, remove it from config.json")
  _check_windows(tree, family, need)
  for key in _SIZES:
    need(is_size(tree.get(key)), key, tree.get(key), "a positive integer is needed")
  need(not is_size(tree.get("num_hidden_layers")) or tree["num_hidden_layers"] <= MOST_LAYERS, "num_hidden_layers",
       tree.get("num_hidden_layers"), f"more than {MOST_LAYERS:,}: fetch it again")
  need.end()
  for key in ("num_key_value_heads", "head_dim"):
    need(tree.get(key) is None or is_size(tree[key]), key, tree.get(key), "a positive integer, or null")
  eps = 1e-6 if tree.get("rms_norm_eps") is None else tree["rms_norm_eps"]
  need(is_number(eps) and eps > 0, "rms_norm_eps", eps, "a number above 0 is needed")
  tied = family.tied if tree.get("tie_word_embeddings") is None else tree["tie_word_embeddings"]
  need(isinstance(tied, bool), "tie_word_embeddings", tied, "true or false")
  theta, scaling = _rope(tree, family, need)
  dtype = tree.get("dtype") or tree.get("torch_dtype") or "float32"
  need(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
  without = _layers_without_rope(tree, family, need)
  need.end()
  heads = tree["num_attention_heads"]
  kv_heads = tree.get("num_key_value_heads") or ("num_key_value_heads" not in tree and family.kv_heads) or heads
  head_dim = tree.get("head_dim") or family.head_dim or tree["hidden_size"] // heads
  need(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"num_attention_heads = {heads} is no multiple of it")
  need(head_dim % 2 == 0, "head_dim", head_dim, "RoPE rotates pairs: an even number is needed")
  need.end()
  return ModelConfig(
      vocab_size=tree["vocab_size"], num_layers=tree["num_hidden_layers"], d_model=tree["hidden_size"], num_heads=heads,
      num_kv_heads=kv_heads, head_dim=head_dim, mlp_dim=tree["intermediate_size"], rope_theta=theta,
      rope_scaling=scaling, no_rope_layers=without, norm_eps=float(eps), embedding_multiplier=1.0,
      qkv_bias=family.qkv_bias, qk_norm=family.qk_norm, tie_embeddings=tied, dtype=dtype)


def _check_windows(tree, family, need):
  fix = "attention is over all previous tokens here: take a checkpoint without a window"
  window = tree.get("sliding_window")
  if family.windows == "always":
    need("sliding_window" in tree, "sliding_window", "absent", "which means 4096 to transformers; " + fix)
    need(window is None, "sliding_window", window, fix)
  elif family.windows == "never" or tree.get("use_sliding_window"):
    need(window is None or tree.get("use_sliding_window") is False, "sliding_window", window, fix)
  kinds = tree.get("layer_types") or []
  others = sorted({str(kind) for kind in kinds} - {"full_attention"}) if isinstance(kinds, list) else kinds
  need(not others, "layer_types", others, fix)


def _layers_without_rope(tree, family, need) -> tuple[int, ...]:
  """Numbers of the layers that are not rotated. In the list a 1 stands for a layer that is."""
  count = tree["num_hidden_layers"]
  if not family.nope:
    return ()
  rotated, every = tree.get("no_rope_layers"), tree.get("no_rope_layer_interval", 4)
  if rotated is None:
    if not need(is_size(every), "no_rope_layer_interval", every, "a positive integer is needed"):
      return ()
    return tuple(range(every - 1, count, every))
  fine = isinstance(rotated, list) and len(rotated) >= count and all(x in (0, 1) for x in rotated)
  if not need(fine, "no_rope_layers", rotated, f"a list of 0 and 1 for {count} layers is needed"):
    return ()
  return tuple(i for i in range(count) if not rotated[i])


# --- rotary embedding -----------------------------------------------------------------

# Keys of every kind -> fields of RopeScaling, the obligatory ones and the others.
_ORIGINAL = "original_max_position_embeddings"
_NEEDED = {"default": {}, "linear": {"factor": "factor"}, "dynamic": {"factor": "factor"},
           "llama3": {"factor": "factor", _ORIGINAL: "context", "low_freq_factor": "low_frequency",
                      "high_freq_factor": "high_frequency"},
           "yarn": {"factor": "factor", _ORIGINAL: "context"},
           "longrope": {_ORIGINAL: "context", "short_factor": "short_factors", "long_factor": "long_factors"}}
_OPTIONAL = {"yarn": {"beta_slow": "low_frequency", "beta_fast": "high_frequency",
                      "attention_factor": "attention_factor"},
             "longrope": {"factor": "factor", "attention_factor": "attention_factor"}}
_YARN = dict(low_frequency=1.0, high_frequency=32.0)


def _rope(tree, family, need) -> tuple[float, RopeScaling]:
  """Base and scaling, from "rope_parameters" or from "rope_theta" and "rope_scaling" (before transformers 5).

  Some files have both spellings; they have to say the same.
  """
  found = {}
  for key in ("rope_parameters", "rope_scaling"):
    if tree.get(key):
      if not need(isinstance(tree[key], dict), key, tree[key], "an object is needed"):
        return family.theta, RopeScaling()
      found[key] = _scaling(tree[key], key, tree.get("max_position_embeddings"), need)
  if len(found) == 2:
    need(found["rope_parameters"][1] == found["rope_scaling"][1], "rope_scaling", tree["rope_scaling"],
         f"rope_parameters = {tree['rope_parameters']} says something else: leave one of the two in config.json")
  bases = {f"{key}.rope_theta": theta for key, (theta, _) in found.items()}
  bases = {key: theta for key, theta in {"rope_theta": tree.get("rope_theta"), **bases}.items() if theta is not None}
  for key, theta in bases.items():
    need(is_number(theta) and theta > 0, key, theta, "a number above 0 is needed")
  given = list(bases.values())
  need(all(theta == given[0] for theta in given), " and ".join(bases), given,
       "they have to be the same: which is right?")
  theta = next(iter(bases.values()), family.theta)
  scaling = next((scaling for _, scaling in found.values()), RopeScaling())
  return float(theta) if is_number(theta) else family.theta, scaling


def _scaling(given: dict, key: str, longest, need) -> tuple[Any, RopeScaling]:
  """(base, scaling) of one of the two spellings; longest: max_position_embeddings, which two kinds read."""
  given = dict(given)
  theta = given.pop("rope_theta", None)
  kinds = {given.pop(name) for name in ("rope_type", "type") if isinstance(given.get(name), str)} or {"default"}
  if not need(len(kinds) == 1 and kinds <= _NEEDED.keys(), f"{key}.rope_type", " and ".join(sorted(kinds)),
              f"known are {', '.join(_NEEDED)}: take another checkpoint"):
    return theta, RopeScaling()
  kind = kinds.pop()
  fields = {**_NEEDED[kind], **_OPTIONAL.get(kind, {})}
  fixed = {"partial_rotary_factor": 1.0, **({"truncate": True} if kind == "yarn" else {})}
  for name, value in given.items():
    need(name in fields or value is None or name in fixed and value == fixed[name], f"{key}.{name}", value,
         f"not known for the rope_type {kind}")
  values = dict(_YARN) if kind == "yarn" else {}
  for name, field in fields.items():
    value = given.get(name)
    if value is None and name not in _NEEDED[kind]:
      continue
    several = field.endswith("factors")
    numbers = value if several and isinstance(value, list) else [value]
    if need(all(is_number(x) and x > 0 for x in numbers) and isinstance(value, list) == several, f"{key}.{name}", value,
            f"the rope_type {kind} needs it: {'numbers' if several else 'a number'} above 0"):
      values[field] = (tuple(map(float, numbers)) if several else int(value) if field == "context" else float(value))
  if kind == "dynamic" or kind == "longrope" and given.get("factor") is None:
    if need(is_size(longest), "max_position_embeddings", longest, f"the rope_type {kind} needs it"):
      values |= {"context": longest} if kind == "dynamic" else {"factor": longest / values.get("context", longest)}
  return theta, RopeScaling("" if kind == "default" else kind, **values)


def _rope_object(scaling: RopeScaling) -> dict | None:
  if not scaling.kind:
    return None
  fields = {**_NEEDED[scaling.kind], **_OPTIONAL.get(scaling.kind, {})}
  values = {name: getattr(scaling, field) for name, field in fields.items()}
  return {"rope_type": scaling.kind, **{name: list(value) if isinstance(value, tuple) else value
                                        for name, value in values.items() if value}}


# --- and back -----------------------------------------------------------------------


def write_config(model: ModelConfig, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
  """config.json of a model; of `base`, the one it came from, what this code does not read stays.

  Raises ConfigError for a model of none of the families.
  """
  problems = [(f"model.{name}", value, "none of the families has one: this model cannot be exported")
              for name, value in (("short_conv", model.short_conv), ("output_gate", model.output_gate)) if value]
  multiplier = model.embedding_multiplier or model.d_model ** 0.5
  if multiplier != 1 and model.tie_embeddings:
    problems.append(("model.embedding_multiplier", model.embedding_multiplier, "tied embeddings cannot take the factor "
                     "sqrt(d_model) in: train with embedding_multiplier = 1, or with tie_embeddings = False"))
  traits = (model.qkv_bias, model.qk_norm, bool(model.no_rope_layers))
  fitting = [name for name, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm, f.nope) == traits]
  if not fitting:
    problems.append(("model.qkv_bias, qk_norm, no_rope_layers", traits,
                     "no family has these together: this model cannot be exported"))
  if problems:
    raise ConfigError(problems)
  kind = (base or {}).get("model_type")
  kind = kind if kind in fitting else fitting[0]
  out = {"attention_bias": False, "hidden_act": "silu", "use_cache": True, "max_position_embeddings": 32768,
         **(base or {}), "architectures": [FAMILIES[kind].architecture], "model_type": kind,
         "vocab_size": model.vocab_size, "hidden_size": model.d_model, "intermediate_size": model.mlp_dim,
         "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
         "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim, "rms_norm_eps": model.norm_eps,
         "tie_word_embeddings": model.tie_embeddings}
  if FAMILIES[kind].nope:
    out["no_rope_layers"] = [int(i not in model.no_rope_layers) for i in range(model.num_layers)]
  if FAMILIES[kind].windows == "always":
    out["sliding_window"] = None
  if model.rope_scaling.kind == "dynamic":
    out["max_position_embeddings"] = model.rope_scaling.context
  rope = _rope_object(model.rope_scaling)
  # Both spellings: transformers reads the first before version 5 and the second since.
  out.update(rope_theta=model.rope_theta, rope_scaling=rope, torch_dtype=dtype, dtype=dtype,
             rope_parameters={"rope_theta": model.rope_theta, **(rope or {"rope_type": "default"})})
  return out
