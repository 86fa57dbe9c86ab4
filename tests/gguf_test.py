"""Tests of GGUF files in: written here by the package gguf, read by nsa/huggingface, compared with the same model as
safetensors."""
import dataclasses
import json
from pathlib import Path
import struct

import huggingface_test as shared
import jax
import numpy as np
import pytest

from nsa import checkpoint, config as config_lib, huggingface, model as model_lib
from nsa.data import tokenizer
from nsa.huggingface import gguf_file

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
MODEL = config_lib.ModelConfig(
    vocab_size=384, num_layers=5, d_model=32, num_heads=4, num_kv_heads=2, head_dim=12, mlp_dim=64, rope_theta=500.0,
    norm_eps=1e-5, embedding_multiplier=1.0, qk_norm=False)
MODELS = {
    "llama": MODEL,
    "qwen2": dataclasses.replace(MODEL, qkv_bias=True, tie_embeddings=False),
    "qwen3": dataclasses.replace(MODEL, qk_norm=True),
    "smollm3": dataclasses.replace(MODEL, no_rope_layers=(3,)),
}


def params_of(model, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (rng.standard_normal(x.shape) * 0.3).astype(np.float32),
                      model_lib.abstract_params(config_lib.Config(model=model)))


TOKENIZER = shared.byte_level_bpe()


def write(path, kind, model=MODEL, params=None, quantize=None, meta=(), tensors=(), without=()):
  """A GGUF file of the model, as llama.cpp's converter lays it out: [out, in], q and k of some kinds interleaved.

  meta: key -> value to set instead. tensors: name -> array in place of the model's, or further ones. without: keys to
  leave out.
  """
  params = params_of(model) if params is None else params
  writer = gguf.GGUFWriter(path, kind)
  tree = json.loads(TOKENIZER.to_str())["model"]
  vocab = sorted(tree["vocab"], key=tree["vocab"].get)
  merges = [m if isinstance(m, str) else " ".join(m) for m in tree["merges"]]
  keys = {
      f"{kind}.block_count": model.num_layers, f"{kind}.embedding_length": model.d_model,
      f"{kind}.feed_forward_length": model.mlp_dim, f"{kind}.attention.head_count": model.num_heads,
      f"{kind}.attention.head_count_kv": model.num_kv_heads, f"{kind}.attention.key_length": model.head_dim,
      f"{kind}.attention.value_length": model.head_dim, f"{kind}.rope.dimension_count": model.head_dim,
      f"{kind}.attention.layer_norm_rms_epsilon": model.norm_eps, f"{kind}.rope.freq_base": model.rope_theta,
      f"{kind}.context_length": 512, f"{kind}.vocab_size": model.vocab_size, "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocab, "tokenizer.ggml.merges": merges,
      "tokenizer.ggml.token_type": [3 if i < 2 else 1 for i in range(len(vocab))], "tokenizer.ggml.bos_token_id": 0,
      "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ x }}"}
  for key, value in {**keys, **dict(meta)}.items():
    if key in without:
      continue
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_array(key, value)
  flat = {"token_embd.weight": params["embed"], "output_norm.weight": params["norm"]}
  if not model.tie_embeddings:
    flat["output.weight"] = params["head"].T
  layers = params["stacks"]["stack0"]
  for i in range(model.num_layers):
    of = lambda *names: jax.tree.reduce(lambda node, name: node[name], names, layers)[i]
    at = f"blk.{i}."
    flat[at + "attn_norm.weight"], flat[at + "ffn_norm.weight"] = of("attention_norm"), of("mlp_norm")
    for name, heads in (("q", model.num_heads), ("k", model.num_kv_heads), ("v", model.num_kv_heads)):
      w = of("attention", name, "weight").reshape(model.d_model, -1).T
      if name != "v" and kind in ("llama", "smollm3"):  # halves of a head -> pairs
        w = w.reshape(heads, 2, model.head_dim // 2, model.d_model).swapaxes(1, 2).reshape(w.shape)
      flat[f"{at}attn_{name}.weight"] = w
      if model.qkv_bias:
        flat[f"{at}attn_{name}.bias"] = of("attention", name, "bias").reshape(-1)
      if model.qk_norm and name != "v":
        flat[f"{at}attn_{name}_norm.weight"] = of("attention", name, "norm")
    flat[at + "attn_output.weight"] = of("attention", "out").reshape(-1, model.d_model).T
    for name in ("gate", "up", "down"):
      flat[f"{at}ffn_{name}.weight"] = of("mlp", name).T
  for name, x in {**flat, **dict(tensors)}.items():
    x = np.ascontiguousarray(x, np.float32)
    if quantize is not None and x.ndim == 2 and x.shape[1] % 32 == 0:
      writer.add_tensor(name, gguf.quants.quantize(x, quantize), raw_dtype=quantize)
    else:
      writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return Path(path)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_gguf_file_and_safetensors_of_one_model_are_the_same_run(kind, tmp_path):
  model, params = MODELS[kind], params_of(MODELS[kind])
  source = write(tmp_path / "model.gguf", kind, model, params)
  config = huggingface.import_model(source, tmp_path / "run")
  assert config.model == model and config.size == "model"
  jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(tmp_path / "run"), params)
  # Out as safetensors, and in again: the same once more, by the other road.
  huggingface.export_model(tmp_path / "run", tmp_path / "out")
  again = huggingface.import_model(tmp_path / "out", tmp_path / "again")
  assert again.model == config.model
  jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(tmp_path / "again"), params)
  written = json.loads((tmp_path / "out/config.json").read_text())
  assert (written["bos_token_id"], written["eos_token_id"], written["max_position_embeddings"]) == (0, 1, 512)


def test_the_tokenizer_of_a_gguf_file_is_the_one_it_was_written_from(tmp_path):
  config = huggingface.import_model(write(tmp_path / "m.gguf", "llama"), tmp_path / "run")
  got = tokenizer.get(config.data.tokenizer)
  text = "def loads(s):\n  return 1984, 'naïve', ['x', -2.5e3]  # №7\n\n\t\"\"\"json\"\"\""
  assert got.encode(text).tolist() == TOKENIZER.encode(text, add_special_tokens=False).ids
  assert got.decode(got.encode(text)) == text
  assert (got.bos, got.eos) == (0, 1) and got.encode("<|endoftext|>").tolist() == [1]
  # Digits are tokens of their own, whatever was merged: 1984 is four.
  assert len(got.encode("1984")) == 4 and got.token_bytes[got.encode(text)].sum() == len(text.encode())
  assert json.loads((tmp_path / "run/hf/tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"


def test_numbers_are_cut_as_llama_3_and_qwen_2_cut_them():
  meta = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.eos_token_id": 1,
          "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
          "tokenizer.ggml.tokens": ["?", "<end>", "1", "2", "3", "4", "12", "123", "1234", "\u0120"]}
  from nsa.huggingface import tokenizer as made
  cut = lambda pre, text: tokenizers.Tokenizer.from_str(
      made.from_gguf({**meta, "tokenizer.ggml.pre": pre}, "x.gguf")["tokenizer.json"]).encode(text).tokens
  assert cut("gpt-2", "1234") == ["1234"]
  assert cut("llama-bpe", "1234") == ["123", "4"] and cut("llama-bpe", " 12") == ["\u0120", "12"]
  assert cut("qwen2", "123") == cut("smollm", "123") == ["1", "2", "3"]


@pytest.mark.parametrize("kind, step, relative", [
    ("Q8_0", 0.5 / 127 + 2 ** -11, 0), ("Q4_0", 1 / 8 + 2 ** -11, 0), ("Q5_0", 1 / 16 + 2 ** -11, 0),
    ("Q4_1", 1 / 15 + 3 * 2 ** -11, 0), ("Q5_1", 1 / 31 + 3 * 2 ** -11, 0), ("BF16", 0, 2 ** -8), ("F16", 0, 2 ** -10)])
def test_quantized_tensors_are_near_what_they_stand_for(kind, step, relative, tmp_path):
  """Half a step of the block's largest (Q4_0, Q5_0: a whole one at its positive end; Q4_1, Q5_1: of the span from the
  least to the largest), scale and least value rounded to float16; or a rounding."""
  params = params_of(MODEL)
  source = write(tmp_path / "m.gguf", "llama", params=params, quantize=getattr(gguf.GGMLQuantizationType, kind))
  config = huggingface.import_model(source, tmp_path / "run")
  assert config.model.dtype == ("float16" if kind == "F16" else "bfloat16")
  got = checkpoint.load_params(tmp_path / "run")["embed"]
  want = params["embed"]  # a row is a block
  bound = np.abs(want).max(1, keepdims=True) * step + np.abs(want) * relative + 1e-6
  assert (np.abs(got - want) <= bound).all() and np.abs(got - want).max() > 0
  np.testing.assert_array_equal(checkpoint.load_params(tmp_path / "run")["norm"], params["norm"])  # float32 as it was


HALF, QUARTER = (np.float16(x).tobytes() for x in (0.5, 0.25))
# 8 scales of 3 and 8 least values of 2, 6 bits each: the first four of both, then low halves of the others' bits.
SCALES = bytes([3] * 4 + [2] * 4 + [3 | 2 << 4] * 4)
K_QUANTS = {
    "Q4_K": (HALF + QUARTER + SCALES + bytes([0x55] * 128), 0.5 * 3 * 5 - 0.25 * 2),  # 4 bits: 5
    # The fifth bits in front: 5 + 16.
    "Q5_K": (HALF + QUARTER + SCALES + bytes([0xff] * 32 + [0x55] * 128), 0.5 * 3 * 21 - 0.25 * 2),
    "Q6_K": (bytes([0] * 192 + [3] * 16) + HALF, 0.5 * 3 * (0 - 32)),                 # 6 bits less 32, 8-bit scales
}


@pytest.mark.parametrize("kind", sorted(K_QUANTS))
def test_k_quants_are_unpacked(kind, tmp_path):
  """Blocks of 256 by the format's own layout, every number in them the same."""
  content, value = K_QUANTS[kind]
  writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
  writer.add_tensor("x", np.stack([np.frombuffer(content, np.uint8)] * 2),
                    raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
  writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
  found = gguf_file.GGUF(tmp_path / "x.gguf")
  assert found.tensors["x"].shape == (2, 256)
  np.testing.assert_array_equal(found.read("x"), np.full((2, 256), value))


def test_llama_3s_factors_become_its_scaling(tmp_path):
  """Divisors by the released formula, wave by wave: 1, a mean, 8."""
  model = dataclasses.replace(MODEL, rope_theta=5e5, head_dim=32,
                              rope_scaling=config_lib.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
  factors = []
  for i in range(16):
    turns = 8192 * 5e5 ** (-i / 16) / (2 * np.pi)
    smooth = min(max((turns - 1) / 3, 0), 1)
    factors.append(1 / ((1 - smooth) / 8 + smooth))
  assert factors[0] == 1 and factors[-1] == 8 and any(1.1 < f < 7.9 for f in factors)
  source = write(tmp_path / "m.gguf", "llama", model, tensors={"rope_freqs.weight": np.array(factors)})
  assert huggingface.import_model(source, tmp_path / "run").model == model
  factors[3] = 2.0
  source = write(tmp_path / "n.gguf", "llama", model, tensors={"rope_freqs.weight": np.array(factors)})
  with pytest.raises(config_lib.ConfigError, match=r"n.gguf: rope_freqs.weight = \[1.0.*not the factors of Llama 3"):
    huggingface.import_model(source, tmp_path / "again")


@pytest.mark.parametrize("meta, without, said", [
    ({"llama.expert_count": 8}, (), "llama.expert_count = 8: a dense model"),
    ({"llama.attention.sliding_window": 128}, (), "llama.attention.sliding_window = 128: not known"),
    ({"llama.rope.scaling.type": "longrope"}, (), "llama.rope.scaling.type = 'longrope': known are"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, (),
     "original_context_length = None: yarn needs it"),
    ({"llama.rope.scaling.factor": 4.0}, (), "llama.rope.scaling.factor = 4.0"),
    ({"llama.rope.dimension_count": 8}, (), "llama.rope.dimension_count = 8: only 12"),
    ({"llama.attention.head_count": 3}, (), "llama.attention.head_count_kv = 2: a divisor"),
    ({}, ("llama.block_count",), "llama.block_count = None: a positive integer"),
    ({"llama.block_count": 6}, (), "m.gguf: blk.5.attn_norm.weight = 'missing'"),
    ({"llama.block_count": 4}, (),
     "m.gguf: blk.4.attn_norm.weight = 'one of 9': tensors that the model here does not have"),
    ({"llama.feed_forward_length": 96}, (),
     r"m.gguf: blk.0.ffn_gate.weight = \(64, 32\): the config makes it \(96, 32\)"),
    ({"llama.vocab_size": 400}, (), "llama.vocab_size = 400: token_embd.weight has 384 rows"),
    ({"split.count": 2}, (), "split.count = 2: one part"),
    ({"tokenizer.ggml.pre": "tekken"}, (), "tokenizer.ggml.pre = 'tekken': known are gpt-2, smollm"),
    ({"tokenizer.ggml.model": "llama"}, (), "tokenizer.ggml.model = 'llama'"),
    ({"tokenizer.ggml.add_space_prefix": True}, (), "tokenizer.ggml.add_space_prefix = True"),
    ({"tokenizer.ggml.eos_token_id": 351}, (), "tokenizer.ggml.eos_token_id = 351: one of 350"),
    ({"tokenizer.ggml.merges": ["a b c"]}, (), "tokenizer.ggml.merges"),
])
def test_what_is_not_understood_is_refused_by_its_key(meta, without, said, tmp_path):
  source = write(tmp_path / "m.gguf", "llama", meta=meta, without=without)
  with pytest.raises(config_lib.ConfigError, match=said):
    huggingface.import_model(source, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_damaged_file_is_named_with_its_field_and_nothing_is_written(tmp_path):
  whole = write(tmp_path / "whole.gguf", "llama").read_bytes()
  source = tmp_path / "m.gguf"

  def refused(content, said):
    source.write_bytes(content)
    with pytest.raises(config_lib.ConfigError, match=said) as error:
      huggingface.import_model(source, tmp_path / "run")
    assert str(source) in str(error.value) and not (tmp_path / "run").exists()

  for cut in [5, 23, 24, 31, 40, 60, *range(100, len(whole), 9973), len(whole) - 1]:
    refused(whole[:cut], "cut or damaged")
  refused(whole[:3], "no GGUF file")
  refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer")
  put = lambda at, kind, value: whole[:at] + struct.pack(kind, value) + whole[at + struct.calcsize(kind):]
  refused(put(4, "<I", 7), "version = 7")
  refused(put(8, "<Q", 2 ** 62), "number of tensors")
  refused(put(16, "<Q", 2 ** 62), "number of keys")
  refused(put(24, "<Q", 2 ** 63), "key 0")  # the length of the first key
  array = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4
  refused(put(array + 4, "<Q", 2 ** 61), "tokenizer.ggml.token_type")  # scalars: no loop over what is not there
  refused(put(array, "<I", 99), "token_type.*an array of the type 99")
  tensor = whole.index(b"token_embd.weight") + len("token_embd.weight")  # dimensions, two sizes, type, offset
  refused(put(tensor, "<I", 2 ** 31), "token_embd.weight's dimensions")
  refused(put(tensor + 4, "<Q", 2 ** 63), "token_embd.weight = ")
  refused(put(tensor + 20, "<I", 99), "token_embd.weight's type = 99: not known")
  refused(put(tensor + 20, "<I", int(gguf.GGMLQuantizationType.Q8_K)), "token_embd.weight")
  refused(put(tensor + 24, "<Q", 2 ** 60), "token_embd.weight = ")
  huggingface.import_model(tmp_path / "whole.gguf", tmp_path / "run")  # and the place was left free
