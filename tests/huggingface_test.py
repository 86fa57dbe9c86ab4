"""Tests of nsa/huggingface: models in and out, against NumPy and, where it is installed, transformers.

    /tmp/hf/bin/pip install -e ".[test,test_hf]"     # PyTorch and transformers
    /tmp/hf/bin/python -m pytest tests/huggingface_test.py
"""
import dataclasses
import json
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nsa import (
  checkpoint,
  config as config_lib,
  forks,
  huggingface,
  methods,
  metrics,
  model as model_lib,
  rundir,
  stacking,
  train,
)

safetensors = pytest.importorskip("safetensors.numpy")
V, D, F, L, N, K, H, T = 288, 32, 48, 3, 4, 2, 12, 40
SHAPE = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
             num_key_value_heads=K, hidden_act="silu", attention_bias=False, max_position_embeddings=512)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=24)
CONFIGS = {
    # As transformers 5 writes it.
    "llama": dict(SHAPE, model_type="llama", rms_norm_eps=1e-3, tie_word_embeddings=False, mlp_bias=False,
                  dtype="float32", rope_parameters=dict(LLAMA3, rope_theta=500.0)),
    # As transformers 4 wrote it.
    "qwen3": dict(SHAPE, model_type="qwen3", rms_norm_eps=1e-6, tie_word_embeddings=True, torch_dtype="bfloat16",
                  rope_theta=200.0,
                  rope_scaling=dict(type="linear", factor=2.0), sliding_window=None, use_sliding_window=False),
    "qwen2": dict(SHAPE, model_type="qwen2", rms_norm_eps=1e-6, tie_word_embeddings=True, torch_dtype="float32",
                  rope_theta=200.0, sliding_window=4096, use_sliding_window=False),
    "smollm3": dict(SHAPE, model_type="smollm3", rms_norm_eps=1e-6, tie_word_embeddings=True, torch_dtype="float32",
                    rope_theta=200.0, no_rope_layers=[1, 0, 1, 1]),
}
CONFIGS["qwen3"]["head_dim"] = H  # the other has D / N


def weights(name, dtype=None):
  """Tensors under their names in the format, none of them trivial; bfloat16 of qwen3, float32 of the others."""
  c, rng = CONFIGS[name], np.random.default_rng(3)
  h = c.get("head_dim", D // N)
  dtype = dtype or (ml_dtypes.bfloat16 if name == "qwen3" else np.float32)
  draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(dtype)
  gain = lambda n: (1 + 0.3 * rng.standard_normal(n)).astype(dtype)
  out = {"model.embed_tokens.weight": draw(V, D), "model.norm.weight": gain(D)}
  for i in range(L):
    at = f"model.layers.{i}."
    out.update({at + "input_layernorm.weight": gain(D), at + "post_attention_layernorm.weight": gain(D),
                at + "self_attn.q_proj.weight": draw(N * h, D), at + "self_attn.k_proj.weight": draw(K * h, D),
                at + "self_attn.v_proj.weight": draw(K * h, D), at + "self_attn.o_proj.weight": draw(D, N * h),
                at + "mlp.gate_proj.weight": draw(F, D), at + "mlp.up_proj.weight": draw(F, D),
                at + "mlp.down_proj.weight": draw(D, F)})
    if name == "qwen2":
      out.update({f"{at}self_attn.{part}_proj.bias": draw(heads * h) for part, heads in (("q", N), ("k", K), ("v", K))})
    if name == "qwen3":
      out.update({at + "self_attn.q_norm.weight": gain(h), at + "self_attn.k_norm.weight": gain(h)})
  if name == "llama":
    out["lm_head.weight"] = draw(V, D)
  return out


def write(name, folder, **changes):
  """The model as a folder: one file (qwen3) or two and their index (llama)."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
  tensors = weights(name)
  files = {"model.safetensors": tensors}
  if name == "llama":
    half = sorted(tensors)[:11]
    files = {"model-00001-of-00002.safetensors": {n: tensors[n] for n in half},
             "model-00002-of-00002.safetensors": {n: x for n, x in tensors.items() if n not in half}}
    where = {n: file for file, part in files.items() for n in part}
    (folder / huggingface.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
  for file, part in files.items():
    safetensors.save_file(part, folder / file)
  return folder


def slow_logits(name, tokens):
  """The forward pass by the format's own conventions, float64, one sequence."""
  c, w = CONFIGS[name], {n: x.astype(np.float64) for n, x in weights(name).items()}
  h = c.get("head_dim", D // N)
  norm = lambda x, gain: x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * gain
  theta = 500.0 if name == "llama" else 200.0
  frequency = np.array([theta ** (-2 * i / h) for i in range(h // 2)])
  if name == "qwen3":
    frequency = frequency / 2
  elif name == "llama":
    s = LLAMA3
    for i, f in enumerate(frequency):
      wave, original = 2 * np.pi / f, s["original_max_position_embeddings"]
      if wave > original / s["low_freq_factor"]:
        frequency[i] = f / s["factor"]
      elif wave > original / s["high_freq_factor"]:
        smooth = (original / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequency[i] = (1 - smooth) * f / s["factor"] + smooth * f
  angle = np.arange(len(tokens))[:, None] * np.concatenate([frequency, frequency])
  rotated = lambda x: x * np.cos(angle) + np.concatenate([-x[:, h // 2:], x[:, :h // 2]], -1) * np.sin(angle)
  x = w["model.embed_tokens.weight"][tokens]
  for i in range(L):
    of = lambda part: w[f"model.layers.{i}.{part}.weight"]
    y = norm(x, of("input_layernorm"))
    q, k, v = (y @ of(f"self_attn.{p}_proj").T + w.get(f"model.layers.{i}.self_attn.{p}_proj.bias", 0) for p in "qkv")
    turn = rotated if c.get("no_rope_layers", [1] * L)[i] else lambda x: x
    heads = []
    for n in range(N):
      r = n // (N // K)
      qn, kn, vn = q[:, n * h:(n + 1) * h], k[:, r * h:(r + 1) * h], v[:, r * h:(r + 1) * h]
      if name == "qwen3":
        qn, kn = norm(qn, of("self_attn.q_norm")), norm(kn, of("self_attn.k_norm"))
      s = turn(qn) @ turn(kn).T / np.sqrt(h)
      s[np.triu_indices(len(tokens), 1)] = -np.inf
      p = np.exp(s - s.max(-1, keepdims=True))
      heads.append(p / p.sum(-1, keepdims=True) @ vn)
    x = x + np.concatenate(heads, -1) @ of("self_attn.o_proj").T
    y = norm(x, of("post_attention_layernorm"))
    gate = y @ of("mlp.gate_proj").T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ of("mlp.up_proj").T)) @ of("mlp.down_proj").T
  return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


TOKENS = np.random.default_rng(0).integers(0, V, (1, T)).astype(np.int32)


def our_logits(config, params):
  model = dataclasses.replace(config.model, dtype="float32")
  config = dataclasses.replace(config, model=model)
  return np.asarray(jax.jit(lambda p: model_lib.forward(config, p, jnp.asarray(TOKENS),
                                                        mode="dense").logits)(params))[0]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_the_formats_own_and_export_changes_no_bit(name, tmp_path):
  source = write(name, tmp_path / "source")
  (source / "generation_config.json").write_text("{}")
  config = huggingface.import_model(source, tmp_path / "run", tokenizer="bytes")
  assert config_lib.from_dict(metrics.read_json(tmp_path / "run/config.json")) == config
  assert config.model.dtype == ("bfloat16" if name == "qwen3" else "float32")
  want = slow_logits(name, TOKENS[0])
  np.testing.assert_allclose(our_logits(config, checkpoint.load_params(tmp_path / "run")), want, rtol=1e-3,
                             atol=1e-4 * np.abs(want).max())
  # 20 kB a file: more than one.
  assert huggingface.export_model(tmp_path / "run", tmp_path / "out", shard_bytes=20_000) == []
  files = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())["weight_map"]
  assert len(set(files.values())) > 1 and (tmp_path / "out/generation_config.json").exists()
  back = {n: safetensors.load_file(tmp_path / "out" / file)[n] for n, file in files.items()}
  tensors = weights(name)
  assert back.keys() == tensors.keys()
  for n, x in tensors.items():
    assert back[n].dtype == x.dtype
    np.testing.assert_array_equal(back[n].view(np.uint8), x.view(np.uint8), err_msg=n)
  again = huggingface.read_config(tmp_path / "out")
  assert again == config.model
  written, base = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("out", "source"))
  assert written["max_position_embeddings"] == base["max_position_embeddings"]


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=16,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0], long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 9.0])
THEIRS = {  # class in transformers, and what differs from SHAPE
    "llama3": ("Llama", dict(rms_norm_eps=1e-3, rope_parameters=dict(LLAMA3, rope_theta=500.0))),
    "llama_linear": (
        "Llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4))),
    "llama_yarn": ("Llama", dict(rope_parameters=dict(YARN, rope_theta=100.0))),
    "llama_dynamic": ("Llama", dict(max_position_embeddings=24, rope_parameters=dict(
        rope_type="dynamic", factor=3.0, rope_theta=100.0))),
    "llama_dynamic_within": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=3.0, rope_theta=100.0))),
    "llama_longrope": ("Llama", dict(rope_parameters=dict(LONGROPE, rope_theta=100.0))),
    "llama_longrope_within": ("Llama", dict(rope_parameters=dict(
        LONGROPE, original_max_position_embeddings=64, factor=8.0, rope_theta=100.0))),
    "llama_longrope_factor": ("Llama", dict(rope_parameters=dict(LONGROPE, attention_factor=0.7, rope_theta=100.0))),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_yarn": (
        "Qwen2", dict(rope_parameters=dict(YARN, rope_theta=1e3, beta_fast=4.0, beta_slow=0.5, attention_factor=0.7))),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=5, pad_token_id=0)),
    "smollm3_list": ("SmolLM3", dict(no_rope_layers=[0, 1, 1], pad_token_id=0)),
}


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_logits_equal_those_of_transformers_before_and_after(name, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(0)
  kind, changes = THEIRS[name]
  shape = {**SHAPE, **(dict() if "smollm3" in name else dict(head_dim=H)), "initializer_range": 0.3, **changes}
  built = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
  with torch.no_grad():
    for parameter_name, x in built.named_parameters():
      if "norm" in parameter_name or parameter_name.endswith("bias"):
        x += 0.3 * torch.randn_like(x)
  built.save_pretrained(tmp_path / "source", max_shard_size="30KB" if name == "llama3" else "5GB")

  def their_logits(folder):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
      return loaded(torch.tensor(TOKENS)).logits.numpy()[0]

  config = huggingface.import_model(tmp_path / "source", tmp_path / "run", tokenizer="bytes")
  want = their_logits(tmp_path / "source")
  got = our_logits(config, checkpoint.load_params(tmp_path / "run"))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
  huggingface.export_model(tmp_path / "run", tmp_path / "out")
  np.testing.assert_array_equal(their_logits(tmp_path / "out"), want)


@pytest.mark.parametrize("name, change, said", [
    ("llama", dict(model_type="gemma2"), ["model_type = 'gemma2'", "known are llama, mistral"]),
    ("llama", dict(attention_bias=True), ["attention_bias = True", "another checkpoint"]),
    ("llama", dict(hidden_act="gelu"), ["hidden_act = 'gelu'", "silu"]),
    ("llama", dict(rope_parameters=dict(rope_type="proportional", factor=2.0)),
     ["rope_parameters.rope_type = 'proportional'", "llama3"]),
    ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=None),
     ["max_position_embeddings = None", "dynamic needs it"]),
    ("llama", dict(rope_parameters=dict(LONGROPE, long_factor=2.0)), ["rope_parameters.long_factor = 2.0", "numbers"]),
    ("llama", dict(rope_parameters=LONGROPE), ["model.rope_scaling.long_factors = (1.0", "longrope has 4 numbers"]),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=2.0)),
     ["rope_parameters.low_freq_factor = None", "needs it"]),
    ("qwen3", dict(rope_scaling=dict(type="linear", factor=2.0, beta=3)), ["rope_scaling.beta = 3", "linear"]),
    ("qwen3", dict(sliding_window=128, use_sliding_window=True), ["use_sliding_window = True", "sliding_window = 128"]),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types = ['sliding_attention']"]),
    ("qwen3", dict(quantization_config=dict(bits=4)), ["quantization_config", "another checkpoint"]),
    ("llama", dict(logit_scale=0.5), ["logit_scale = 0.5", "not known here"]),
    ("llama", dict(num_hidden_layers=4), ["model.layers.3.input_layernorm.weight = 'missing'", "do not belong"]),
    ("llama", dict(num_hidden_layers=2), ["model.layers.2.", "tensors that the model here does not have"]),
    ("llama", dict(vocab_size=289), ["model.embed_tokens.weight = (288, 32)", "(289, 32)"]),
])
def test_what_cannot_be_computed_is_refused_by_name(name, change, said, tmp_path):
  source = write(name, tmp_path / "source", **change)
  with pytest.raises(config_lib.ConfigError) as error:
    huggingface.import_model(source, tmp_path / "run", tokenizer="bytes")
  assert all(text in str(error.value) for text in said), error.value
  assert not (tmp_path / "run/config.json").exists()


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="no config.json there"):
    huggingface.import_model(tmp_path, tmp_path / "run", tokenizer="bytes")
  with pytest.raises(config_lib.ConfigError, match="model.short_conv = 3"):
    huggingface.write_config(config_lib.ModelConfig(short_conv=3, tie_embeddings=False), "float32")
  with pytest.raises(config_lib.ConfigError, match="model.embedding_multiplier = 0.0: tied"):
    huggingface.write_config(config_lib.ModelConfig(), "float32")


def test_a_method_that_acts_in_dense_attention_too_is_not_exported(tmp_path):
  config = config_lib.Config(attention=methods.MoBA(key_conv=3))
  metrics.write_json(tmp_path / "config.json", config_lib.to_dict(config))
  with pytest.raises(config_lib.ConfigError, match="attention = 'moba': its parameters act in dense attention"):
    huggingface.export_model(tmp_path, tmp_path / "out")


def test_a_model_trained_here_is_exported_with_its_embedding_factor(tmp_path):
  """With untied embeddings sqrt(d_model) goes into the table."""
  model = config_lib.ModelConfig(vocab_size=V, num_layers=1, d_model=D, num_heads=N, num_kv_heads=K, head_dim=H,
                                 mlp_dim=F, tie_embeddings=False)
  params = jax.tree.map(lambda x: np.random.default_rng(1).standard_normal(x.shape).astype(np.float32) * 0.2,
                        model_lib.abstract_params(config_lib.Config(model=model)))
  huggingface.save_params(params, model, tmp_path, "float32")
  (tmp_path / "config.json").write_text(json.dumps(huggingface.write_config(model, "float32")))
  there = huggingface.read_config(tmp_path)
  assert there == dataclasses.replace(model, embedding_multiplier=1.0)
  np.testing.assert_allclose(our_logits(config_lib.Config(model=there), huggingface.load_params(tmp_path, there)),
                             our_logits(config_lib.Config(model=model), params), rtol=1e-4, atol=1e-5)


# --- retrofit, end to end ---------------------------------------------------------------


def byte_level_bpe():
  """A byte-level BPE of SmolLM2's kind, of 350 tokens, trained on the spot."""
  tokenizers = pytest.importorskip("tokenizers")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
      [tokenizers.pre_tokenizers.Digits(individual_digits=True),
       tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=350, special_tokens=["<|begin|>", "<|endoftext|>"],
                                           show_progress=False,
                                           initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made.train_from_iterator([Path(json.__file__).read_text()], trainer)
  return made


def tiny_tokenizer(folder):
  """Puts it beside a model."""
  byte_level_bpe().save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|endoftext|>"}))


def test_import_retrofit_evaluate_export(tmp_path, monkeypatch):
  from experiments import retrofit_hf
  monkeypatch.setitem(CONFIGS, "qwen3", dict(CONFIGS["qwen3"], vocab_size=352))
  monkeypatch.setattr(f"{__name__}.V", 352)
  source = write("qwen3", tmp_path / "source")
  tiny_tokenizer(source)
  out, _ = commands.run("launch.import_hf", f"--source={source}", f"--workdir={tmp_path / 'trunk'}", "--context=64")
  assert "parameters, 3 layers" in out
  imported = rundir.read_config(tmp_path / "trunk")
  assert imported.data.tokenizer == f"hf:{tmp_path / 'trunk/hf'}"
  before = checkpoint.load_params(tmp_path / "trunk")

  small = "steps=10,context=64,batch=2,block_size=8,num_blocks=3,dense_layers=1"
  control = retrofit_hf.get_config(f"trunk={tmp_path / 'trunk'},method=dense,{small}")
  assert {stage.mode for stage in control.schedule.stages} == {"dense"} and control.arm == "dense_continued"
  config_lib.validate(control)
  config = retrofit_hf.get_config(f"trunk={tmp_path / 'trunk'},{small}")
  config.seeds, config.log_every, config.attention.index_dim, config.model.remat = (7,), 1, 8, "none"
  text = Path(json.decoder.__file__).read_text()
  for split in ("train", "val"):
    (tmp_path / "text" / split).mkdir(parents=True)
    (tmp_path / "text" / split / "decoder.py").write_text(text)
  config.data.source = f"files:{tmp_path / 'text'}"
  config.eval = config_lib.EvalConfig(sequences=2, batch=2, run_modes=("dense", "sparse"), diagnostics=False)
  assert config.data.tokenizer == imported.data.tokenizer and config.fork.reset
  assert train.train(config, tmp_path / "run", progress=False) == 10
  rows = metrics.read_json(tmp_path / "run/eval/10.json")["records"]
  language = {mode: [r for r in rows if r["kind"] == "language" and r["run_mode"] == mode]
              for mode in ("dense", "sparse")}
  assert all(len(found) == 2 and all(np.isfinite(r["bits_per_byte"]) for r in found) for found in language.values())
  assert language["dense"][0]["bytes"] > 64  # 64 tokens stand for more bytes
  log = metrics.read_jsonl(tmp_path / "run/metrics.jsonl")
  assert log[0]["mode"] == "warmup" and log[-1]["mode"] == "sparse"
  # Bits per token of the untrained model's first batch over its bytes per token: below the loss in bits per token.
  assert 0.3 < log[0]["bits_per_byte"] / (log[0]["loss"] / np.log(2)) < 1

  # At step 0 it was the imported model: two stacks of what was one.
  fresh = forks.fork(config, train.sharding.make_mesh(config), train.step_lib.compile_init(
      config, train.sharding.make_mesh(config))(train.step_lib.seeds_of(config)))
  stacks = fresh.params["stacks"]
  assert [x["attention_norm"].shape[0] for x in stacks.values()] == [1, 2] and "method" in stacks["stack1"]["attention"]
  jax.tree.map(np.testing.assert_array_equal, stacking.backbone(fresh.params), before)
  with pytest.raises(config_lib.ConfigError, match="fork.reset = False.*no optimizer state"):
    forks.fork(dataclasses.replace(config, seeds=(0,), fork=config_lib.ForkConfig(str(tmp_path / "trunk"))),
               train.sharding.make_mesh(config), fresh)

  assert huggingface.export_model(tmp_path / "run", tmp_path / "out") == ["msa"]
  assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
  after = stacking.backbone(checkpoint.load_params(tmp_path / "run"))
  exported = huggingface.load_params(tmp_path / "out", huggingface.read_config(tmp_path / "out"))
  round_to = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, round_to(np.asarray(b))), exported, after)
  assert any((x != y).any() for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(before)))


def test_configs_of_before_are_read_and_their_runs_go_on(tmp_path):
  config = config_lib.Config(attention=methods.MSA())
  old = config_lib.to_dict(config)
  for name in ("norm_eps", "rope_scaling", "embedding_multiplier"):
    del old["model"][name]
  assert config_lib.from_dict(old) == config
  metrics.write_json(tmp_path / "config.json", old)
  rundir.open_workdir(config, train.epath.Path(tmp_path))
  changed = dataclasses.replace(config, model=dataclasses.replace(config.model, norm_eps=1e-5))
  with pytest.raises(config_lib.ConfigError, match="norm_eps"):
    rundir.open_workdir(changed, train.epath.Path(tmp_path))
