"""Tests of the files around a model: damaged ones are named, runs can be moved, exports are whole and hold the method's
parameters."""
import json
import os
import struct

import commands
import huggingface_test as shared
import jax
import ml_dtypes
import numpy as np
import pytest

from nsa import (
  checkpoint,
  config as config_lib,
  huggingface,
  methods,
  metrics,
  model as model_lib,
  rundir,
  stacking,
  step as step_lib,
  train,
)
from nsa.data import tokenizer

safetensors = pytest.importorskip("safetensors.numpy")


def refused(source, tmp_path, *said, **options):
  """The import ends in an error that says so, and leaves no directory."""
  with pytest.raises(config_lib.ConfigError) as error:
    huggingface.import_model(source, tmp_path / "run", **{"tokenizer": "bytes", **options})
  assert all(text in str(error.value) for text in said), error.value
  assert not (tmp_path / "run").exists()


# --- damaged and contradictory files ----------------------------------------------------


def test_damaged_safetensors_are_named(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  file = source / "model.safetensors"
  whole = file.read_bytes()
  for content, said in ((whole[:1000], "no whole safetensors file"), (whole[:-1], "no whole safetensors file"),
                        (b"", "no whole"),
                        (struct.pack("<Q", 2 ** 62) + whole[8:], "no whole"),
                        (struct.pack("<Q", 7) + whole[8:], "no whole"),
                        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")):
    file.write_bytes(content)
    refused(source, tmp_path, str(file), said)
  file.write_bytes(whole)
  tensors = safetensors.load_file(file)
  tensors["model.norm.weight"][3] = np.nan
  safetensors.save_file(tensors, file)
  refused(source, tmp_path, f"{file}: model.norm.weight", "NaN or infinite")
  safetensors.save_file({**shared.weights("qwen3"), "model.norm.weight": np.ones(shared.D, np.int8)}, file)
  refused(source, tmp_path, f"{file}: model.norm.weight = 'I8'", "save the model unquantized")


@pytest.mark.parametrize("content, said", [
    ("{", "no JSON"), ("[]", "holds a list"), ('{"metadata": {}}', "has no weight_map"),
    ('{"weight_map": []}', "has no weight_map"),
    ('{"weight_map": {"x": 3}}', "has no weight_map"),
    ('{"weight_map": {"x": "../x.safetensors"}}', "no file of this folder"),
    ('{"weight_map": {"x": "model-00003.safetensors"}}', "model-00003.safetensors, which are not there"),
    ("swapped", "where the index has it"), ("one less", "does not name model.norm.weight")])
def test_a_damaged_index_is_named(content, said, tmp_path):
  source = shared.write("llama", tmp_path / "source")
  index = source / huggingface.INDEX
  tree = json.loads(index.read_text())
  files = sorted(set(tree["weight_map"].values()))
  if content == "swapped":
    tree["weight_map"]["model.norm.weight"] = files[files[0] == tree["weight_map"]["model.norm.weight"]]
    content = json.dumps(tree)
  elif content == "one less":
    del tree["weight_map"]["model.norm.weight"]
    content = json.dumps(tree)
  index.write_text(content)
  refused(source, tmp_path, huggingface.INDEX, said)


def test_files_that_hold_a_tensor_twice_are_refused(tmp_path):
  source = shared.write("llama", tmp_path / "source")
  tensors = shared.weights("llama")
  first, second = sorted(source.glob("*.safetensors"))
  whole = safetensors.load_file(first)
  name = sorted(safetensors.load_file(second))[0]
  safetensors.save_file({**whole, name: 2 * tensors[name]}, first)
  refused(source, tmp_path, str(first), f"holds {name}, which {huggingface.INDEX} has in {second.name}")
  safetensors.save_file(whole, first)
  safetensors.save_file({**tensors, name: 2 * tensors[name]}, source / "model.safetensors")
  refused(source, tmp_path, str(source), f"holds model.safetensors and {huggingface.INDEX}", "leave one")


@pytest.mark.parametrize("kinds, declared", [
    ((np.float16, np.float16), "float16"), ((np.float32, np.float32), "bfloat16"),
    ((ml_dtypes.bfloat16, ml_dtypes.bfloat16), None), ((ml_dtypes.bfloat16, np.float32), "bfloat16"),
    ((np.float16, ml_dtypes.bfloat16), "float16")], ids=str)
def test_an_export_loses_no_bit_whatever_dtype_the_config_says(kinds, declared, tmp_path):
  """Half of the tensors are of either dtype; what is computed in is what the config says."""
  source = shared.write("qwen3", tmp_path / "source", torch_dtype=declared)
  tensors = {name: x.astype(np.float32).astype(kinds[i % 2])
             for i, (name, x) in enumerate(sorted(shared.weights("qwen3", np.float32).items()))}
  old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
  safetensors.save_file({**tensors, **old}, source / "model.safetensors")
  config = huggingface.import_model(source, tmp_path / "run", tokenizer="bytes")
  assert config.model.dtype == declared or declared is None and config.model.dtype == "float32"
  huggingface.export_model(tmp_path / "run", tmp_path / "out")
  back = safetensors.load_file(tmp_path / "out/model.safetensors")
  one = kinds[0] if kinds[0] is kinds[1] else np.float32
  assert {x.dtype for x in back.values()} == {np.dtype(one)}
  for name, x in tensors.items():
    np.testing.assert_array_equal(back[name].astype(np.float32), x.astype(np.float32))


def test_an_export_may_be_read_by_whoever_may_read_its_folder(tmp_path):
  huggingface.import_model(shared.write("qwen3", tmp_path / "source"), tmp_path / "run", tokenizer="bytes")
  before = os.umask(0o027)
  try:
    huggingface.export_model(tmp_path / "run", tmp_path / "out")
  finally:
    os.umask(before)
  assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_damaged_config_is_named_with_the_key(tmp_path):
  source = shared.write("llama", tmp_path / "source")
  config = source / "config.json"
  tree = json.loads(config.read_text())
  for content, said in (("{", "no JSON"), ("[1]", "holds a list"), ("", "no JSON"), ("[" * 100_000, "no JSON")):
    config.write_text(content)
    refused(source, tmp_path, str(config), said)
  for change, said in (
      (dict(num_attention_heads=3), "num_key_value_heads = 2: num_attention_heads = 3 is no multiple"),
      (dict(hidden_size="32"), "hidden_size = '32': a positive integer"),
      (dict(num_hidden_layers=-1), "num_hidden_layers = -1"),
      (dict(vocab_size=True), "vocab_size = True"), (dict(head_dim=7), "head_dim = 7: RoPE rotates pairs"),
      (dict(rms_norm_eps="1e-5"), "rms_norm_eps = '1e-5'"), (dict(model_type=["llama"]), "model_type = ['llama']"),
      (dict(rope_parameters=[1]), "rope_parameters = [1]: an object"),
      (dict(num_hidden_layers=10 ** 12), "num_hidden_layers = 1000000000000: more than 10,000"),
      (dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
       "rope_scaling = {'rope_type': 'linear', 'factor': 2.0}: rope_parameters"),
      (dict(rope_theta=[1e6]), "rope_theta = [1000000.0]: a number above 0"),
      (dict(rope_theta=1e6), "rope_theta and rope_parameters.rope_theta = [1000000.0, 500.0]"),
      (dict(model_type="mistral"), "sliding_window = 'absent': which means 4096"),
      (dict(model_type="mistral", sliding_window=64, use_sliding_window=False), "sliding_window = 64"),
      (dict(model_type="qwen2"), "model.layers.0.self_attn.q_proj.bias", ),
      (dict(no_rope_layers=[1, 0, 1]), "no_rope_layers = [1, 0, 1]: not known"),
      (dict(model_type="smollm3", no_rope_layers=[1, 0]), "no_rope_layers = [1, 0]: a list of 0 and 1 for 3 layers")):
    config.write_text(json.dumps({**tree, **change}))
    refused(source, tmp_path, said)
  config.write_text(json.dumps(tree))
  (source / "model-00001-of-00002.safetensors").rename(source / "x")
  refused(source, tmp_path, "model-00001-of-00002.safetensors, which are not there")
  refused(tmp_path / "nowhere", tmp_path, "--source", "not there")
  refused(config, tmp_path, "--source", "no GGUF file", "give the folder")


def test_a_head_beside_tied_embeddings_is_the_embedding_or_refused(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  tensors = shared.weights("qwen3")
  head = tensors["model.embed_tokens.weight"].copy()
  safetensors.save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors")
  huggingface.import_model(source, tmp_path / "same", tokenizer="bytes")
  head[5, 3] += 1
  safetensors.save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors")
  refused(source, tmp_path, "lm_head.weight", "tie_word_embeddings = true")


def test_qwen3_without_head_dim_has_heads_of_128(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  tree = json.loads((source / "config.json").read_text())
  del tree["head_dim"]
  (source / "config.json").write_text(json.dumps(tree))
  assert huggingface.read_config(source).head_dim == 128


def test_a_tokenizer_that_is_not_read_is_no_reason_to_count_bytes(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  refused(source, tmp_path, "--tokenizer = ''", "give --tokenizer=hf:PATH, or bytes", tokenizer="")
  (source / "tokenizer.model").write_bytes(b"\n")
  refused(source, tmp_path, "its tokenizer is in tokenizer.model", "save it with transformers", tokenizer="")
  refused(source, tmp_path, "tokenizer", "unknown", tokenizer="sentencepiece")
  shared.tiny_tokenizer(source)
  (source / "tokenizer_config.json").unlink()
  refused(source, tmp_path, f"{source / 'tokenizer_config.json'} names no eos_token", tokenizer="")
  shared.tiny_tokenizer(source)
  refused(source, tmp_path, "model.vocab_size = 288: the tokenizer has 350 tokens", tokenizer="")
  (source / "tokenizer.json").write_text('{"model": 3}')
  refused(source, tmp_path, "tokenizer.json is no tokenizer of the package tokenizers", tokenizer="")
  (source / "tokenizer.json").write_text("{")
  refused(source, tmp_path, "tokenizer.json is no JSON", tokenizer="")


def test_the_command_says_it_in_a_line(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  (source / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  _, err = commands.run("launch.import_hf", f"--source={source}", f"--workdir={tmp_path / 'run'}", code=2)
  assert "error: " in err and "a Git LFS pointer" in err
  assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_an_import_that_is_stopped_leaves_nothing(tmp_path):
  shared.write("qwen3", tmp_path / "source")
  (tmp_path / "stopped.py").write_text("""
import os, signal, time
from launch import cli, import_hf
from nsa.huggingface import weights

def stopped(*_):
  assert os.path.isdir("run/hf")
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)

weights.load_params = stopped
cli.run(import_hf.main)
""")
  commands.run("stopped", "--source=source", "--workdir=run", "--tokenizer=bytes", directory=tmp_path, code=143)
  assert not (tmp_path / "run").exists()


def test_a_directory_with_content_is_not_imported_into(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  (tmp_path / "run/checkpoints/0").mkdir(parents=True)  # of an import that was killed: its weights would have stayed
  with pytest.raises(config_lib.ConfigError, match="--workdir.*there is something in it already"):
    huggingface.import_model(source, tmp_path / "run", tokenizer="bytes")
  (tmp_path / "empty").mkdir()
  (source / "config.json").rename(source / "config")
  with pytest.raises(config_lib.ConfigError):
    huggingface.import_model(source, tmp_path / "empty", tokenizer="bytes")
  assert not any((tmp_path / "empty").iterdir())


def test_a_context_that_the_model_was_not_made_for_is_said(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr("nsa.huggingface.runs.logging.warning", lambda text, *args: said.append(text % args))
  source = shared.write("qwen3", tmp_path / "source")
  huggingface.import_model(source, tmp_path / "run", tokenizer="bytes", context=512)
  assert not said
  huggingface.import_model(source, tmp_path / "longer", tokenizer="bytes", context=513)
  assert said == ["--context = 513: the model was made for 512 tokens (max_position_embeddings)"]
  assert huggingface.import_model(source, tmp_path / "own", tokenizer="bytes").data.context == 512


def test_text_that_is_not_there_is_told_at_once(tmp_path):
  source = shared.write("qwen3", tmp_path / "source")
  with pytest.raises(config_lib.ConfigError, match="data.source = 'files:nowhere'.*: nowhere does not exist"):
    huggingface.import_model(source, tmp_path / "run", tokenizer="bytes", data_source="files:nowhere")
  assert not (tmp_path / "run").exists()


def test_a_model_may_be_called_nan(tmp_path):
  config = huggingface.import_model(shared.write("qwen3", tmp_path / "nan"), tmp_path / "run", tokenizer="bytes")
  assert config.size == "nan" and rundir.read_config(tmp_path / "run") == config


# --- runs that move ---------------------------------------------------------------------


def write_with_tokenizer(folder, monkeypatch, merges=None):
  monkeypatch.setitem(shared.CONFIGS, "qwen3", dict(shared.CONFIGS["qwen3"], vocab_size=352))
  monkeypatch.setattr(shared, "V", 352)
  source = shared.write("qwen3", folder)
  shared.tiny_tokenizer(source)
  if merges is not None:
    tree = json.loads((source / "tokenizer.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:merges]
    (source / "tokenizer.json").write_text(json.dumps(tree))
  return source


def test_a_run_that_was_renamed_keeps_its_tokenizer_whoever_takes_its_place(tmp_path, monkeypatch):
  a, b = (write_with_tokenizer(tmp_path / name, monkeypatch, merges) for name, merges in (("a", None), ("b", 10)))
  monkeypatch.chdir(tmp_path)
  huggingface.import_model(a, "runs/mm")
  length = lambda run: len(tokenizer.get(rundir.read_config(run).data.tokenizer).encode("def loads(s): return json"))
  before = length("runs/mm")
  os.rename("runs/mm", "runs/old")
  huggingface.import_model(b, "runs/mm")
  monkeypatch.chdir("/")  # a relative path to import by is no path to depend on
  assert length(tmp_path / "runs/old") == before < length(tmp_path / "runs/mm")
  assert str(tmp_path) not in (tmp_path / "runs/mm/config.json").read_text()


def test_a_trained_run_keeps_the_tokenizer_too_and_goes_on_with_no_other(tmp_path, monkeypatch):
  source = write_with_tokenizer(tmp_path / "source", monkeypatch)
  huggingface.import_model(source, tmp_path / "trunk")
  config = rundir.read_config(tmp_path / "trunk")
  rundir.open_workdir(config, train.epath.Path(tmp_path / "run"))
  os.rename(tmp_path / "trunk", tmp_path / "moved")
  assert rundir.read_config(tmp_path / "run").data.tokenizer == f"hf:{tmp_path / 'run/hf'}"
  config.data.tokenizer = f"hf:{tmp_path / 'moved/hf'}"  # the same at another place: the run goes on
  rundir.open_workdir(config, train.epath.Path(tmp_path / "run"))
  tree = json.loads((tmp_path / "moved/hf/tokenizer.json").read_text())
  tree["model"]["merges"].pop()
  (tmp_path / "moved/hf/tokenizer.json").write_text(json.dumps(tree))
  with pytest.raises(config_lib.ConfigError, match="data"):
    rundir.open_workdir(config, train.epath.Path(tmp_path / "run"))


# --- exports ----------------------------------------------------------------------------


def sparse_run(tmp_path, attention, layers=()):
  """A run with parameters of its method, none of them trivial; its backbone is the imported model's."""
  huggingface.import_model(shared.write("qwen3", tmp_path / "source"), tmp_path / "trunk", tokenizer="bytes")
  config = rundir.read_config(tmp_path / "trunk")
  config.attention, config.layers, config.arm = attention, layers, attention.name
  config.fork = config_lib.ForkConfig(str(tmp_path / "trunk"), reset=True)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), model_lib.abstract_params(config))
  backbone = stacking.restack(checkpoint.load_params(tmp_path / "trunk"), config)
  for name, stack in params["stacks"].items():
    method = {"method": stack["attention"]["method"]} if "method" in stack["attention"] else {}
    params["stacks"][name] = {**backbone["stacks"][name],
                              "attention": {**backbone["stacks"][name]["attention"], **method}}
  params = {**backbone, "stacks": params["stacks"]}
  checkpoint.Checkpoints(tmp_path / "run").save(0, jax.device_put(step_lib.TrainState(np.int32(0), params, {})),
                                                wait=True)
  metrics.write_json(tmp_path / "run/config.json", config_lib.to_dict(config))
  return config


@pytest.mark.parametrize("attention, layers", [
    (methods.MSA(index_dim=4, block_size=8, num_blocks=3), ("dense", "attention", "dense")),
    (methods.NSA(block_size=8, num_blocks=4, compress_len=4, compress_stride=2, window=12), ())], ids=["msa", "nsa"])
def test_what_a_method_added_goes_out_beside_the_backbone_and_comes_back_bit_for_bit(attention, layers, tmp_path):
  config = sparse_run(tmp_path, attention, layers)
  assert huggingface.export_model(tmp_path / "run", tmp_path / "out") == [attention.name]
  backbone = safetensors.load_file(tmp_path / "out/model.safetensors")
  for name, x in shared.weights("qwen3").items():
    np.testing.assert_array_equal(backbone[name].view(np.uint8), x.view(np.uint8))
  again = huggingface.import_model(tmp_path / "out", tmp_path / "again", tokenizer="bytes")
  assert (again.attention, again.layers, again.model) == (config.attention, config.layers, config.model)
  assert again.eval.run_modes == ("dense", "sparse")
  want, got = (checkpoint.load_params(tmp_path / name) for name in ("run", "again"))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert any("method" in stack["attention"] for stack in got["stacks"].values())
  added = safetensors.load_file(tmp_path / "out/method.safetensors")
  safetensors.save_file({name: added[name] for name in sorted(added)[1:]}, tmp_path / "out/method.safetensors")
  refused(tmp_path / "out", tmp_path / "x", f"method.safetensors: {sorted(added)[0]} = 'missing'")
  safetensors.save_file({**added, "layers.0.more": np.ones(1, np.float32)}, tmp_path / "out/method.safetensors")
  refused(tmp_path / "out", tmp_path / "x", "method.safetensors = ['layers.0.more']", "no such parameters")
  (tmp_path / "out/method.safetensors").write_bytes(b"x")
  refused(tmp_path / "out", tmp_path / "x", "method.safetensors", "export it again")


@pytest.mark.parametrize("change, said", [
    (dict(num_blocks="x"), "attention.num_blocks = 'x': of the type str, int is needed"),
    (dict(num_blocks=2.5), "attention.num_blocks = 2.5: of the type float"),
    (dict(num_blocks=True), "attention.num_blocks = True: of the type bool"),
    (dict(method=["msa"]), "attention = {'method': ['msa']"), (dict(more=1), "attention.more = 1: no such field"),
    (dict(index_dim=10 ** 13), "method.json: attention.index_dim = 10000000000000: must be below 2**32"),
    # As much memory is not asked for.
    (dict(index_dim=2 ** 31), "layers.1.selector.k.norm = ('float32', (4,)): method.json makes it")])
def test_a_damaged_method_is_named_with_its_field(change, said, tmp_path):
  sparse_run(tmp_path, methods.MSA(index_dim=4, block_size=8, num_blocks=3), ("dense", "attention", "dense"))
  huggingface.export_model(tmp_path / "run", tmp_path / "out")
  file = tmp_path / "out/method.json"
  tree = json.loads(file.read_text())
  file.write_text(json.dumps({**tree, "attention": {**tree["attention"], **change}}))
  refused(tmp_path / "out", tmp_path / "x", str(tmp_path / "out"), said)
  file.write_text(json.dumps({**tree, "others": [1]}))
  refused(tmp_path / "out", tmp_path / "x", f"{file}: others = [1]")


def test_an_export_takes_no_place_that_is_taken_and_leaves_nothing_half_written(tmp_path, monkeypatch):
  source = shared.write("qwen3", tmp_path / "source")
  huggingface.import_model(source, tmp_path / "run", tokenizer="bytes")
  before = (source / "model.safetensors").read_bytes()
  for folder in (source, tmp_path / "run", source / "config.json"):
    with pytest.raises(config_lib.ConfigError, match="--out.*there is something in it already"):
      huggingface.export_model(tmp_path / "run", folder, dtype="float32")
  assert (source / "model.safetensors").read_bytes() == before
  # Sharded, then whole: not into one folder, where the old index would be read.
  huggingface.export_model(tmp_path / "run", tmp_path / "out", shard_bytes=20_000)
  with pytest.raises(config_lib.ConfigError, match="--out"):
    huggingface.export_model(tmp_path / "run", tmp_path / "out")
  (tmp_path / "empty").mkdir()
  huggingface.export_model(tmp_path / "run", tmp_path / "empty")
  assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]

  def full(*args, **kwargs):
    raise OSError(28, "no space")

  monkeypatch.setattr(safetensors, "save_file", full)
  with pytest.raises(OSError):
    huggingface.export_model(tmp_path / "run", tmp_path / "new/deep")
  assert not any((tmp_path / "new").iterdir())


def test_a_fork_of_an_import_says_so_when_what_it_came_from_is_gone(tmp_path):
  config = config_lib.Config(fork=config_lib.ForkConfig(str(tmp_path / "trunk")))
  metrics.write_json(tmp_path / "run/config.json", config_lib.to_dict(config))
  with pytest.raises(config_lib.ConfigError, match="fork.workdir.*no run directory"):
    huggingface.export_model(tmp_path / "run", tmp_path / "out")
