"""Models of the Hugging Face format: Llama and Qwen3 in, and out again.

    import_model("Qwen3-0.6B", "runs/qwen3")     a folder with config.json and safetensors -> a run directory
    export_model("runs/retrofit", "exported")    a run directory -> such a folder

The run directory holds the parameters as its checkpoint 0, without an optimizer: runs fork from it with
`fork.reset`, launch.evaluate reads it. `hf/` in it keeps the model's own config.json and tokenizer.

Nothing of a model's forward pass is ignored: a key of config.json that this code does not know, or a value that the
model here cannot compute, is an error that names the key, the value and what to do. Weights become float32 and keep
their values; matrices are transposed (theirs are [out, in]) and heads split, and that is all: RoPE's layout and norms
are the same here. Export writes the dtype that the model had, so that an import and an export change no bit.

Reading needs the package `safetensors` (extra `hf`).
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from nsa import checkpoint, config as config_lib, metrics, methods, model as model_lib, sharding, train
from nsa import step as step_lib
from nsa.config import Config, ConfigError, DataConfig, EvalConfig, ModelConfig, RopeScaling

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
DTYPES = ("float32", "bfloat16", "float16")

# Keys that say nothing about the forward pass of a trained model.
_IRRELEVANT = {
    "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "initializer_range",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "pretraining_tp",
    "attention_dropout", "max_window_layers", "return_dict", "output_attentions", "output_hidden_states",
    "task_specific_params", "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "tokenizer_class"}
# Keys with one value that the model here computes; absent or null is that value.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
          "partial_rotary_factor": 1.0, "quantization_config": None}
_READ = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
         "rope_parameters", "sliding_window", "layer_types"}


# --- config.json ----------------------------------------------------------------


def read_config(path) -> ModelConfig:
  """The model of a folder's config.json. Raises ConfigError for whatever cannot be computed here."""
  path = Path(path) / "config.json"
  if not path.is_file():
    raise ConfigError([("source", str(path.parent), "no config.json there: give the folder of a downloaded model")])
  tree = json.loads(path.read_text())
  problems = []

  def need(ok, key, value, fix):
    if not ok:
      problems.append((f"{path}: {key}", value, fix))

  kind = tree.get("model_type")
  need(kind in ("llama", "qwen3"), "model_type", kind,
       "only llama and qwen3 are known; add its differences to nsa/huggingface.py")
  for key, value in tree.items():
    if key in _FIXED:
      need(value in (None, _FIXED[key]), key, value,
           f"the model here has {key} = {_FIXED[key]!r} alone: take another checkpoint")
    elif key not in _IRRELEVANT | _READ:
      need(value is None, key, value,
           "not known here: if it changes nothing in the forward pass, remove it from config.json")
  need(tree.get("sliding_window") is None or tree.get("use_sliding_window") is False, "sliding_window",
       tree.get("sliding_window"), "attention is over all previous tokens here: take another checkpoint")
  others = sorted(set(tree.get("layer_types") or ()) - {"full_attention"})
  need(not others, "layer_types", others, "attention is over all previous tokens here: take another checkpoint")
  for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
    need(isinstance(tree.get(key), int), key, tree.get(key), "an integer is needed")
  theta, scaling = _rope(tree, need)
  dtype = tree.get("dtype") or tree.get("torch_dtype") or "float32"
  need(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
  if problems:
    raise ConfigError(problems)
  heads = tree["num_attention_heads"]
  return ModelConfig(
      vocab_size=tree["vocab_size"], num_layers=tree["num_hidden_layers"], d_model=tree["hidden_size"], num_heads=heads,
      num_kv_heads=tree.get("num_key_value_heads") or heads,
      head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
      mlp_dim=tree["intermediate_size"], rope_theta=theta, rope_scaling=scaling,
      norm_eps=tree.get("rms_norm_eps", 1e-6), embedding_multiplier=1.0, qk_norm=kind == "qwen3",
      tie_embeddings=tree.get("tie_word_embeddings", False), dtype=dtype)


def _rope(tree, need) -> tuple[float, RopeScaling]:
  """Base and scaling, from "rope_parameters" or from "rope_theta" and "rope_scaling" (before transformers 5)."""
  key = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
  found = dict(tree.get(key) or {})
  theta = float(found.pop("rope_theta", None) or tree.get("rope_theta") or 10_000.0)
  kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
  found.pop("type", None)
  names = {"default": {}, "linear": {"factor": "factor"},
           "llama3": {"factor": "factor", "original_max_position_embeddings": "context",
                      "low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"}}
  need(kind in names, f"{key}.rope_type", kind, f"known are {', '.join(names)}: take another checkpoint")
  fields = names.get(kind, {})
  if kind == "default" and found.get("partial_rotary_factor", 1.0) == 1.0:
    found.pop("partial_rotary_factor", None)
  for name, value in found.items():
    need(name in fields or kind not in names or value is None, f"{key}.{name}", value,
         f"not known for the rope_type {kind}")
  for name in fields:
    need(isinstance(found.get(name), (int, float)), f"{key}.{name}", found.get(name), f"the rope_type {kind} needs it")
  if kind == "default" or any(not isinstance(found.get(name), (int, float)) for name in fields):
    return theta, RopeScaling()
  values = {ours: found[name] for name, ours in fields.items()}
  return theta, RopeScaling(kind, **{n: int(v) if n == "context" else float(v) for n, v in values.items()})


def write_config(model: ModelConfig, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
  """config.json of a model; of `base`, the one it came from, what this code does not read stays.

  Raises ConfigError for a model that is neither Llama nor Qwen3.
  """
  problems = [(f"model.{name}", value, "Llama and Qwen3 have none: this model cannot be exported")
              for name, value in (("short_conv", model.short_conv), ("output_gate", model.output_gate)) if value]
  multiplier = model.embedding_multiplier or model.d_model ** 0.5
  if multiplier != 1 and model.tie_embeddings:
    problems.append(("model.embedding_multiplier", model.embedding_multiplier, "tied embeddings cannot take the factor "
                     "sqrt(d_model) in: train with embedding_multiplier = 1, or with tie_embeddings = False"))
  if problems:
    raise ConfigError(problems)
  kind = "qwen3" if model.qk_norm else "llama"
  out = {"architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"], "model_type": kind,
         "attention_bias": False, "hidden_act": "silu", "use_cache": True, "max_position_embeddings": 32768,
         **(base or {}),
         "vocab_size": model.vocab_size, "hidden_size": model.d_model, "intermediate_size": model.mlp_dim,
         "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
         "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim, "rms_norm_eps": model.norm_eps,
         "tie_word_embeddings": model.tie_embeddings}
  s = model.rope_scaling
  rope = {"linear": {"rope_type": "linear", "factor": s.factor},
          "llama3": {"rope_type": "llama3", "factor": s.factor, "original_max_position_embeddings": s.context,
                     "low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency}}.get(s.kind)
  # Both spellings: transformers reads the first before version 5 and the second since.
  out.update(rope_theta=model.rope_theta, rope_scaling=rope, torch_dtype=dtype, dtype=dtype,
             rope_parameters={"rope_theta": model.rope_theta, **(rope or {"rope_type": "default"})})
  return out


# --- weights --------------------------------------------------------------------


class _Tensors:
  """The tensors of a folder, one file or several, read one by one."""

  def __init__(self, folder: Path):
    safetensors = _safetensors()
    if (folder / INDEX).is_file():
      where = json.loads((folder / INDEX).read_text())["weight_map"]
      missing = sorted({file for file in where.values() if not (folder / file).is_file()})
      if missing:
        raise ConfigError([("source", str(folder),
                            f"{INDEX} names {', '.join(missing)}, which are not there: fetch them again")])
      self._files = {name: safetensors.safe_open(folder / name, framework="np") for name in set(where.values())}
      self._where = {tensor: self._files[file] for tensor, file in where.items()}
    elif (folder / "model.safetensors").is_file():
      file = safetensors.safe_open(folder / "model.safetensors", framework="np")
      self._where = {tensor: file for tensor in file.keys()}
    else:
      raise ConfigError([("source", str(folder),
                          f"neither model.safetensors nor {INDEX}: save the model as safetensors")])
    self.unread = set(self._where)

  def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in self._where:
      raise ConfigError([("source", name, "no such tensor: the files do not belong to this config.json")])
    x = self._where[name].get_tensor(name)
    self.unread.discard(name)
    if x.shape != shape:
      raise ConfigError([(f"source: {name}", x.shape, f"config.json makes it {shape}")])
    if x.dtype.name not in DTYPES:
      raise ConfigError([(f"source: {name}", x.dtype.name,
                          f"weights are one of {', '.join(DTYPES)}: save the model unquantized")])
    return x.astype(np.float32)


def _safetensors():
  try:
    import ml_dtypes  # noqa: F401  with it NumPy knows bfloat16
    import safetensors.numpy
    return safetensors
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: models of the Hugging Face format need it: pip install safetensors") from None


# Path in a block -> tensor of layer i, and the axes that its [out, in] has here: [heads * head_dim, d_model] is "dnh".
_BLOCK = {
    ("attention_norm",): ("input_layernorm", "d"), ("mlp_norm",): ("post_attention_layernorm", "d"),
    ("attention", "q", "weight"): ("self_attn.q_proj", "dnh"),
    ("attention", "k", "weight"): ("self_attn.k_proj", "dkh"),
    ("attention", "v", "weight"): ("self_attn.v_proj", "dkh"), ("attention", "out"): ("self_attn.o_proj", "nhd"),
    ("attention", "q", "norm"): ("self_attn.q_norm", "h"), ("attention", "k", "norm"): ("self_attn.k_norm", "h"),
    ("mlp", "gate"): ("mlp.gate_proj", "df"), ("mlp", "up"): ("mlp.up_proj", "df"),
    ("mlp", "down"): ("mlp.down_proj", "fd")}
_TOP = {("embed",): ("model.embed_tokens", "vd"), ("norm",): ("model.norm", "d"), ("head",): ("lm_head", "dv")}


def _tensors(model: ModelConfig):
  """(path here, layer or None, tensor's name, shape here, shape there, whether it is transposed)."""
  sizes = dict(d=model.d_model, n=model.num_heads, k=model.num_kv_heads, h=model.head_dim, f=model.mlp_dim,
               v=model.vocab_size)
  for table, layers in ((_TOP, (None,)), (_BLOCK, range(model.num_layers))):
    for path, (name, letters) in table.items():
      if path == ("head",) and model.tie_embeddings or path[-1] == "norm" and len(path) > 1 and not model.qk_norm:
        continue
      here = tuple(sizes[letter] for letter in letters)
      transposed = len(letters) > 1 and path != ("embed",)
      split = 1 if letters[0] in "df" else 2  # axes of the input
      there = (int(np.prod(here[split:])), int(np.prod(here[:split]))) if transposed else here
      for layer in layers:
        prefix = "" if layer is None else f"model.layers.{layer}."
        yield path, layer, f"{prefix}{name}.weight", here, there, transposed


def load_params(folder, model: ModelConfig) -> dict:
  """Float32 parameters of the dense model, NumPy, all layers in one stack."""
  read, params = _Tensors(Path(folder)), {}
  for path, layer, name, here, there, transposed in _tensors(model):
    x = read(name, there)
    x = (x.T if transposed else x).reshape(here)
    node = params if layer is None else params.setdefault("stacks", {}).setdefault("stack0", {})
    for part in path[:-1]:
      node = node.setdefault(part, {})
    if layer is None:
      node[path[-1]] = x
    else:
      node.setdefault(path[-1], np.empty((model.num_layers,) + here, np.float32))[layer] = x
  unread = {name for name in read.unread if not name.endswith("rotary_emb.inv_freq")}
  if model.tie_embeddings:
    unread.discard("lm_head.weight")  # some files hold the embedding twice
  if unread:
    raise ConfigError([("source", sorted(unread)[:8],
                        "tensors that the model here does not have: take another checkpoint")])
  return params


def save_params(params: dict, model: ModelConfig, folder, dtype: str, shard_bytes: int = 5 * 10 ** 9) -> None:
  """Writes the tensors of a dense model's parameters, in several files once they are more than `shard_bytes`."""
  safetensors, folder = _safetensors(), Path(folder)
  shards, size, total = [{}], 0, 0
  multiplier = model.embedding_multiplier or model.d_model ** 0.5
  width = jnp.dtype(dtype).itemsize
  names = list(_tensors(model))
  count = sum(int(np.prod(there)) * width for *_, there, _ in names)
  where = {}

  def write():
    file = "model.safetensors" if count <= shard_bytes else f"model-{len(where_files) + 1:05d}.safetensors"
    safetensors.numpy.save_file(shards[-1], folder / file, metadata={"format": "pt"})
    where.update({name: file for name in shards[-1]})
    where_files.append(file)

  where_files = []
  for path, layer, name, _, there, transposed in names:
    node = params if layer is None else params["stacks"]["stack0"]
    for part in path:
      node = node[part]
    x = np.asarray(node if layer is None else node[layer], np.float32)
    x = x.reshape(there[::-1]).T if transposed else x
    if path == ("embed",) and multiplier != 1:
      x = x * np.float32(multiplier)
    x = np.ascontiguousarray(x).astype(jnp.dtype(dtype))
    if size and size + x.nbytes > shard_bytes:
      write()
      shards, size = [{}], 0
    shards[-1][name] = x
    size, total = size + x.nbytes, total + x.nbytes
  write()
  if len(where_files) > 1:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")


# --- run directories ------------------------------------------------------------------


def import_model(source, workdir, *, context: int = 4096) -> Config:
  """Makes a run directory of a model's folder; returns its config.

  context: tokens of the windows that launch.evaluate takes by default.

  Raises:
    ConfigError: something in the model that cannot be computed here, or `workdir` is taken.
    ModuleNotFoundError: without safetensors.
  """
  source, workdir = Path(source), epath.Path(workdir)
  if (workdir / "config.json").exists():
    raise ConfigError([("--workdir", str(workdir), "there is a run in it already: take another directory")])
  model = read_config(source)
  params = load_params(source, model)
  (workdir / "hf").mkdir(parents=True, exist_ok=True)
  for name in ("config.json", *TOKENIZER_FILES):
    if (source / name).is_file():
      (workdir / "hf" / name).write_bytes((source / name).read_bytes())
  tokenizer = f"hf:{workdir / 'hf'}" if (workdir / "hf/tokenizer.json").exists() else "bytes"
  config = Config(arm="dense", size=source.name or "imported", model=model, attention=methods.Dense(),
                  data=DataConfig(tokenizer=tokenizer, context=context), eval=EvalConfig(run_modes=("dense",)))
  mesh = sharding.make_mesh(config)
  abstract = step_lib.abstract_state(config, mesh)._replace(optimizer={})
  state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, {})
  state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
  checkpoints = checkpoint.Checkpoints(workdir)
  checkpoints.save(0, state, wait=True)
  metrics.write_json(workdir / "versions.json", {**train.versions(), "imported": source.name})
  metrics.write_json(workdir / "config.json", config_lib.to_dict(config))  # last: now it is a run
  return config


def export_model(workdir, folder, *, step: int = -1, seed: int = -1, dtype: str = "",
                 shard_bytes: int = 5 * 10 ** 9) -> list[str]:
  """Writes a run's model as a folder of the Hugging Face format; returns what the model had that it leaves out.

  Parameters of selectors and branches have no place there: what is written is the backbone, to be run dense.

  Args:
    step: checkpoint; -1 for the newest.
    seed: of a run with several; -1 for the first.
    dtype: of the weights; "" for the imported model's, float32 without one.

  Raises ConfigError for a model that is not the same without its method's parameters, or neither Llama nor Qwen3;
  CheckpointError without a checkpoint.
  """
  workdir, folder = epath.Path(workdir), Path(folder)
  if not (workdir / "config.json").exists():
    raise ConfigError([("--workdir", str(workdir), "no run directory: config.json is missing")])
  config = config_lib.from_dict(metrics.read_json(workdir / "config.json"))
  acting = sorted({method.name for method in config.methods if method.acts_when_dense})
  if acting:
    raise ConfigError([("attention", ", ".join(acting),
                        "its parameters act in dense attention too, and the format has no place for them")])
  origin = _origin(workdir, config)
  base = metrics.read_json(origin / "config.json") if origin else None
  dtype = dtype or (base or {}).get("dtype") or (base or {}).get("torch_dtype") or "float32"
  written = write_config(config.model, dtype, base)
  params = checkpoint.load_params(workdir, None if step < 0 else step)
  if len(config.seeds) > 1:
    if seed not in (-1, *config.seeds):
      raise ConfigError([("--seed", seed, f"the run has the seeds {config.seeds}")])
    params = jax.tree.map(lambda x: x[config.seeds.index(seed) if seed >= 0 else 0], params)
  dropped = sorted({method.name for method in config.methods} - {"dense"})
  folder.mkdir(parents=True, exist_ok=True)
  save_params(model_lib.backbone(params), config.model, folder, dtype, shard_bytes)
  (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
  for name in TOKENIZER_FILES if origin else ():
    if (origin / name).exists():
      (folder / name).write_bytes((origin / name).read_bytes())
  return dropped


def _origin(workdir, config):
  """The hf/ folder of the run, or of the run that it was forked from, and so on; None without one."""
  seen = set()
  while str(workdir) not in seen:
    seen.add(str(workdir))
    if (workdir / "hf/config.json").exists():
      return workdir / "hf"
    if not config.fork.workdir or not (epath.Path(config.fork.workdir) / "config.json").exists():
      return None
    workdir = epath.Path(config.fork.workdir)
    config = config_lib.from_dict(metrics.read_json(workdir / "config.json"))
  return None
