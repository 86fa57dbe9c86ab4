"""Tests of nsa/config: what is written is read, every wrong field is named with value and fix."""
import copy
import dataclasses
import json

import pytest

from launch import overrides
from nsa import config as config_lib, methods, rundir
from nsa.config import ConfigError, Restart, Stage

METHODS = ("dense", "msa", "nsa", "block_topk", "sink_window", "random", "oracle")


def make_config(method="msa"):
  attention = methods.get(method)()
  if hasattr(attention, "block_size"):
    attention.block_size, attention.num_blocks = 16, 4
  config = config_lib.Config(attention=attention)
  config.data.context = 1024
  return config


@pytest.mark.parametrize("method", METHODS)
def test_json_round_trip(method):
  config = make_config(method)
  config.seeds, config.profile = (0, 3), (2, 4)
  config.schedule.stages = [Stage(0.25, "dense", context=512), Stage(0.75, "mixed", dense_share=0.1)]
  config.schedule.stages[1].loss_weights = {"index_kl": 2.0} if method == "msa" else {}
  config.data.tasks, config.data.task_share = ("mqar", "needle:keys=4"), 0.5
  config.eval.blocks, config.eval.run_modes = {"num_blocks": 2}, ("dense", "sparse:num_blocks=8")
  config.fork.workdir, config.mesh.tensor, config.checkpoint.keep_at = "trunk", 2, (10, 20)
  config_lib.validate(config)
  tree = json.loads(json.dumps(config_lib.to_dict(config)))
  assert tree["attention"]["method"] == method
  again = config_lib.from_dict(tree)
  assert again == config and type(again.attention) is type(config.attention)
  assert config_lib.to_dict(again) == tree
  again.schedule.stages[0].fraction = 0.5
  assert again != config  # nothing is shared


def test_unknown_fields_and_methods_are_named():
  for path, expected in [(("model",), "model.widht"), (("attention",), "attention.widht"), ((), "widht"),
                         (("schedule", "learning_rate"), "schedule.learning_rate.widht")]:
    tree = config_lib.to_dict(make_config())
    node = tree
    for name in path:
      node = node[name]
    node["widht"] = 3
    with pytest.raises(ConfigError, match="no such field") as error:
      config_lib.from_dict(tree)
    assert error.value.problems[0][:2] == (expected, 3)
  tree = config_lib.to_dict(make_config())
  tree["attention"]["method"] = "moe"
  with pytest.raises(ConfigError, match="attention.*moe.*msa"):
    config_lib.from_dict(tree)


def test_an_unknown_field_of_a_run_is_named_with_its_file(tmp_path):
  tree = {**config_lib.to_dict(make_config()), "widht": 3}
  (tmp_path / "config.json").write_text(json.dumps(tree))
  with pytest.raises(ConfigError, match=f"  {tmp_path}/config.json: widht = 3: no such field"):
    rundir.read_config(tmp_path)


# (field to set, wrong value, field that the error names, words of the fix)
WRONG = [
    ("model.num_layers", 0, "model.num_layers", "at least 1"),
    ("model.d_model", -4, "model.d_model", "at least 1"),
    ("model.num_heads", 7, "model.num_heads", "multiple of model.num_kv_heads"),
    ("model.num_kv_heads", 0, "model.num_kv_heads", "at least 1"),
    ("model.num_kv_heads", 3, "model.num_heads", "multiple of model.num_kv_heads = 3"),
    ("model.head_dim", 7, "model.head_dim", "even"),
    ("model.vocab_size", 258, "model.vocab_size", "259"),
    ("model.remat", "all", "model.remat", "layer"),
    ("model.dtype", "int8", "model.dtype", "bfloat16"),
    ("model.short_conv", -1, "model.short_conv", "0 for none"),
    ("layers", ("dense", "attention"), "layers", "model.num_layers = 4"),
    ("layers", ("dense", "msb", "attention", "attention"), "layers", "msb"),
    ("others", {"nsa": methods.MSA()}, "others.nsa", "options of the method nsa"),
    ("model.rope_theta", 0.0, "model.rope_theta", "above 0"),
    ("profile", (5, 3), "profile", "first step, last step"),
    ("implementation", "fast", "implementation", "mosaic_gpu"),
    ("data.answer_weight", -1.0, "data.answer_weight", "0 or more"),
    ("data.tokenizer", "bpe", "data.tokenizer", "bytes"),
    ("data.context", 0, "data.context", "at least 1"),
    ("data.global_batch", 0, "data.global_batch", "at least 1"),
    ("data.task_share", 1.5, "data.task_share", "between 0 and 1"),
    ("data.task_share", 0.5, "data.tasks", "at least one task"),
    ("data.source", "tasks", "data.task_share", "data.task_share = 1"),
    ("data.task_rows", 8, "data.task_rows", "0 to data.global_batch - 1 = 7"),
    ("data.task_rows", 1, "data.tasks", "at least one task"),
    ("data.task_loss", 0.2, "data.task_loss", "set data.task_rows"),
    ("data.corpora", {"code": "wiki"}, "data.corpora[code]", "files:PATH"),
    ("data.weights", {"code": 1.0}, "data.weights[code]", "data.corpora has none"),
    ("eval.near", (5,), "eval.near", "tokens before a query"),
    ("eval.sequences", -2, "eval.sequences", "-1 for all"),
    ("data.source", "wiki", "data.source", "files:PATH"),
    ("data.tasks", ("nosuch",), "data.tasks", "mqar"),
    ("data.tasks", ("recall", "ledger"), "data.tasks", "held out of training"),
    ("data.tasks", ("needle@512",), "data.tasks", "name it without @"),
    ("eval.tasks", ("needle:kees=1",), "eval.tasks", "keys"),
    ("schedule.steps", 0, "schedule.steps", "at least 1"),
    ("schedule.stages", [], "schedule.stages", "at least one stage"),
    ("schedule.stages", [Stage(0.5)], "schedule.stages[*].fraction", "add up to 1"),
    ("schedule.stages", [Stage(1.5), Stage(-0.5)], "schedule.stages[1].fraction", "negative"),
    ("schedule.stages", [Stage(mode="sparce")], "schedule.stages[0].mode", "sparse"),
    ("schedule.stages", [Stage(train="head")], "schedule.stages[0].train", "selector"),
    ("schedule.stages", [Stage(train="memory")], "schedule.stages[0].train", "no memory"),
    ("schedule.stages", [Stage(dense_share=2.0)], "schedule.stages[0].dense_share", "between 0 and 1"),
    ("schedule.stages", [Stage(learning_rate=-1.0)], "schedule.stages[0].learning_rate", "negative"),
    ("schedule.stages", [Stage(enter="copy_kv")], "schedule.stages[0].enter", "none"),
    ("schedule.stages", [Stage(loss_weights={"kl": 1.0})], "schedule.stages[0].loss_weights", "index_kl"),
    ("schedule.stages", [Stage(context=3000)], "schedule.stages[0].context", "divide"),
    ("schedule.learning_rate.plan", "step", "schedule.learning_rate.plan", "cosine"),
    ("schedule.learning_rate.peak", 0.0, "schedule.learning_rate.peak", "above 0"),
    ("schedule.learning_rate.warmup", 1.0, "schedule.learning_rate.warmup", "below 1"),
    ("schedule.learning_rate.decay", 0.99, "schedule.learning_rate.decay", "at most 1"),
    ("schedule.restart", Restart(step=10 ** 6), "schedule.restart.step", "below schedule.steps"),
    ("schedule.restart", Restart(peak=2.0), "schedule.restart.peak", "above 0 to 1"),
    ("schedule.restart", Restart(warmup=0.9), "schedule.restart.decay", "at most 1"),
    ("attention.block_size", 0, "attention.block_size", "at least 1"),
    ("attention.block_size", 2048, "attention.block_size", "context of 1024"),
    ("attention.num_blocks", 0, "attention.num_blocks", "at least 1"),
    ("attention.num_initial", -1, "attention.num_initial", "negative"),
    ("attention.num_initial", 4, "attention.num_blocks", "num_initial + num_local = 5"),
    ("attention.num_local", 0, "attention.num_local", "own block"),
    ("attention.index_dim", 3, "attention.index_dim", "even"),
    ("optimizer.name", "sgd", "optimizer.name", "adamw or muon"),
    ("eval.split", "train", "eval.split", "val"),
    ("eval.context", 8, "attention.block_size", "context of 8"),
    ("eval.blocks", {"blocks": 2}, "eval.blocks", "num_blocks"),
    ("eval.run_modes", ("topk",), "eval.run_modes", "oracle"),
    ("eval.run_modes", ("sparse:num_blocks=x",), "eval.run_modes", "name=number"),
    ("eval.run_modes", ("dense:num_blocks=2",), "eval.run_modes", "no geometry"),
    ("seeds", (), "seeds", "one or more"),
    ("seeds", (1, 1), "seeds", "different"),
    ("profile", (3,), "profile", "last step"),
    ("fork.step", 1000, "fork.step", "schedule.steps = 1000"),
    ("checkpoint.keep_at", (1001,), "checkpoint.keep_at", "schedule.steps = 1000"),
    ("checkpoint.keep", 0, "checkpoint.keep", "at least 1"),
    ("checkpoint.keep_period", 300, "checkpoint.keep_period", "multiple of checkpoint.every"),
    ("log_every", 0, "log_every", "at least 1"),
    ("eval.run_modes", ("sparse:num_blocks=0",), "eval.run_modes", "at least 1"),
    ("eval.blocks", {"block_size": 4096}, "eval.run_modes", "context of 1024"),
    ("eval.batch", 0, "eval.batch", "at least 1"),
    ("eval.task_examples", 0, "eval.task_examples", "at least 1"),
    ("eval.every", -1, "eval.every", "0 for the end"),
    ("checkpoint.every", -1, "checkpoint.every", "0 for the last"),
    ("data.align", -1, "data.align", "multiple of attention.block_size"),
    ("optimizer.b1", 1.0, "optimizer.b1", "below 1"),
    ("optimizer.eps", -1.0, "optimizer.eps", "above 0"),
    ("optimizer.eps", 0.0, "optimizer.eps", "above 0"),
    ("optimizer.weight_decay", float("inf"), "optimizer.weight_decay", "finite"),
    ("model.rope_theta", float("inf"), "model.rope_theta", "finite"),
    ("schedule.stages", [Stage(loss_weights={"index_kl": float("nan")})], "schedule.stages[0].loss_weights['index_kl']",
     "finite"),
    ("peak_tflops", -1.0, "peak_tflops", "0 to look it up"),
    ("optimizer.clip", -1.0, "optimizer.clip", "negative"),
    ("schedule.learning_rate.final", 5.0, "schedule.learning_rate.final", "0 to 1"),
    ("schedule.stages", [Stage(0.0001, "warmup"), Stage(0.9999, "sparse")], "schedule.stages[0].fraction", "no step"),
    ("seeds", (-1,), "seeds", "2**32"),
    ("mesh.fsdp", 0, "mesh.fsdp", "at least 1"),
    ("mesh.data", -2, "mesh.data", "-1"),
    ("mesh.tensor", 4, "mesh.tensor", "model.num_kv_heads = 2"),
    ("mesh.context", 0, "mesh.context", "at least 1"),
    ("mesh.context", 3, "data.context", "multiple of mesh.context = 3"),
]


def assign(config, path, value):
  *parents, name = path.split(".")
  for parent in parents:
    config = getattr(config, parent)
  assert hasattr(config, name)
  setattr(config, name, value)


def problems_of(config, *devices):
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config, *devices)
  for name, value, fix in error.value.problems:
    assert f"{name} = {value!r}: {fix}" in str(error.value)
  return error.value.problems


@pytest.mark.parametrize("path,value,field,words", WRONG, ids=[f"{w[0]}={w[1]}"[:60] for w in WRONG])
def test_each_wrong_field_is_named_with_its_value_and_the_fix(path, value, field, words):
  config = make_config()
  config_lib.validate(config)
  assign(config, path, value)
  found = problems_of(config)
  assert any(name == field and words in fix for name, _, fix in found), found


@pytest.mark.parametrize("method,field,value,words", [
    ("nsa", "compress_len", 24, "multiple of compress_stride"), ("nsa", "compress_stride", 0, "multiple of"),
    ("nsa", "block_size", 40, "multiple of compress_stride"),
    ("nsa", "window", 4096, "context of 1024"), ("nsa", "window", 0, "between 1"),
    ("nsa", "compress_len", 2048, "longer than the context"), ("seer", "gate_dim", 5, "even"),
    ("moba", "key_conv", -1, "0 for none"), ("infllm_v2", "pool_stride", 0, "at least 1 token"),
    ("infllm_v2", "pool_len", 24, "multiple of pool_stride = 16"),
    ("infllm_v2", "block_size", 40, "multiple of pool_stride = 16"),
    ("infllm_v2", "pool_len", 2048, "longer than the context of 1024"),
    ("infllm_v2", "coarse_lse", True, "must see all blocks")])
def test_options_of_methods_are_named(method, field, value, words):
  config = make_config(method)
  if method == "infllm_v2":
    config.attention.num_local = 2
  config_lib.validate(config)
  setattr(config.attention, field, value)
  found = [(name, fix) for name, _, fix in problems_of(config) if words in fix]
  assert any(name == f"attention.{field}" or f"{field} = {value}" in fix for name, fix in found), found


@pytest.mark.parametrize("method", ["dense", "nsa", "block_topk"])
def test_methods_without_a_selector_loss_cannot_warm_up(method):
  config = make_config(method)
  for stage, field in [(Stage(mode="warmup"), "schedule.stages[0].mode"),
                       (Stage(train="selector"), "schedule.stages[0].train")]:
    config.schedule.stages = [stage]
    assert [name for name, _, _ in problems_of(config)] == [field]


def test_all_problems_are_listed_at_once():
  config = make_config()
  config.model.head_dim, config.schedule.steps = 7, 0
  config.optimizer.name, config.attention.num_local = "sgd", 0
  assert {"model.head_dim", "schedule.steps", "optimizer.name",
          "attention.num_local"} <= {p[0] for p in problems_of(config)}


@pytest.mark.parametrize("mesh,devices,field,words", [
    (dict(data=3), 8, "mesh", "there are 8 devices"), (dict(fsdp=3), 8, "mesh", "must divide the 8 devices"),
    (dict(data=4, fsdp=4), 8, "mesh", "= 16"), (dict(), 16, "data.global_batch", "take a multiple"),
    (dict(), 16, "eval.batch", "multiple of data * fsdp = 16"), (dict(fsdp=3), 3, "model.d_model", "= 3"),
    (dict(fsdp=2, context=3), 6, "model.d_model", "mesh.fsdp * mesh.context = 6")])
def test_meshes_are_checked_against_the_devices(mesh, devices, field, words):
  config = make_config()
  config.mesh = config_lib.MeshConfig(**mesh)
  assert any(name == field and words in fix for name, _, fix in problems_of(config, devices))


def test_stage_contexts_are_checked_for_method_and_mesh():
  config = make_config()
  config.schedule.stages = [Stage(0.5, context=2048), Stage(0.5)]
  config_lib.validate(config, 4)
  assert any(name == "data.global_batch" for name, _, _ in problems_of(config, 8))  # 4 sequences over 8 devices
  config.schedule.stages = [dataclasses.replace(s, context=8) for s in config.schedule.stages]
  assert any(name == "attention.block_size" for name, _, _ in problems_of(config))


def test_more_blocks_than_there_are_are_told():
  config = make_config()  # 4 blocks of 16 tokens
  config.schedule.stages = [Stage(0.5), Stage(0.5, "sparse", context=80)]
  assert config_lib.remarks(config) == []
  config.schedule.stages[1].context = 64
  assert config_lib.remarks(config) == [
      "attention.num_blocks = 4: the longest context, 64 tokens, has 4 blocks of attention.block_size = 16: nothing is "
      "left out, which is dense attention"]


def test_answers_called_far_within_what_a_window_sees_are_told():
  config = make_config()  # 4 blocks of 16 tokens: as far as a window sees, of 512 tokens / 8
  config.data.context, config.data.tasks = 512, ("mqar:pairs=4",)
  assert config_lib.remarks(config) == []
  for change in (lambda c: setattr(c, "attention", methods.Window(window=80)),
                 lambda c: setattr(c.eval, "context", 504),
                 lambda c: setattr(c.eval, "run_modes", ("random:num_blocks=5",))):
    changed = copy.deepcopy(config)
    change(changed)
    (told,) = config_lib.remarks(changed)
    assert told.startswith("eval.near = (): ") and ("(block_size, 80)" in told or "63 tokens back" in told)
    changed.eval.near = (16, 64)
    assert config_lib.remarks(changed) == []


# --- overrides that ml_collections leaves out ---


def override(*arguments):
  config = make_config()
  config.schedule.stages = [Stage(0.5), Stage(0.5)]
  rest, taken = overrides.take_entries(["program", *arguments])
  overrides.apply_entries(config, taken)
  return config, rest


def test_entries_of_dicts_are_overridden():
  config, rest = override("--config.eval.blocks.block_size=8", "--config.schedule.stages[1].loss_weights.index_kl=2.5",
                          "--config.data.weights={'a': 3}", "--config.data.corpora.a=files:/x/y.z",
                          "--config.model.d_model=8")
  assert (config.eval.blocks == {"block_size": 8} and config.data.weights == {"a": 3.0}
          and rest == ["program", "--config.model.d_model=8"])
  assert [stage.loss_weights for stage in config.schedule.stages] == [{}, {"index_kl": 2.5}]
  assert config.data.corpora == {"a": "files:/x/y.z"}


@pytest.mark.parametrize("argument, words", [
    ("--config.eval.blocks.block_size=x", "config.eval.blocks.block_size = 'x': takes a whole number"),
    ("--config.eval.blocks=8", "config.eval.blocks = '8': takes a dict"),
    ("--config.schedule.stages[2].loss_weights.index_kl=1",
     r"config.schedule.stages\[2\]: there are 2, counted from 0"),
    ("--config.model.blocks.block_size=8", "ModelConfig has no dict 'blocks'")])
def test_wrong_overrides_of_entries_are_named(argument, words):
  with pytest.raises(ValueError, match=words):
    override(argument)
