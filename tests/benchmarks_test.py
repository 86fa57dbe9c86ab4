"""benchmarks.kernels: what it counts and what it concludes; times need a device."""
import dataclasses
import json
import sys
import types

import commands
import jax
import numpy as np
import pytest

from benchmarks import cases, kernels, models, peer, timing
from nsa import config as config_lib, flops, methods, schedule
from nsa.look import selections
import pallas_kernels as pk
from pallas_kernels import arg_specs


def test_counted_pairs_are_those_of_the_masks():
  assert cases.causal_pairs(5) == 15 and cases.causal_pairs(5, window=2) == 1 + 4 * 2
  spec = arg_specs.get("tiny_g2")  # T 64, compressed blocks of 8 every 4
  seen = sum(c * 4 + 7 <= t for t in range(64) for c in range(spec.num_compressed))
  assert cases.compressed_pairs(spec) == seen
  every = np.broadcast_to(np.arange(4), (spec.B, spec.T, spec.K, 4))  # all blocks: dense
  assert cases.visible_keys(every, spec) == spec.B * spec.K * cases.causal_pairs(64)


def test_useful_flops_of_a_layer_are_those_of_its_operations():
  spec = arg_specs.get("tiny_g2")
  forward = lambda name: cases.make(name, spec).flops[0]
  parts = ("compressed_and_top_k", "selected_attention", "window")
  assert forward("nsa_layer") == pytest.approx(sum(map(forward, parts)))
  assert forward("msa_attention") == pytest.approx(forward("index_top_k") + forward("selected_attention"))
  assert forward("msa_layer") == pytest.approx(sum(map(forward, ("index_top_k", "selected_attention", "index_kl"))))


def test_a_pattern_from_a_file(tmp_path):
  spec = dataclasses.replace(arg_specs.get("tiny_g2"), B=3)
  lists = np.random.default_rng(0).integers(-1, 4, (2, 2, spec.T, spec.K, spec.J)).astype(np.int16)
  path = tmp_path / "lists.npz"
  selections.save(path, {"block_indices": lists, "layers": np.asarray([1, 4], np.int16),
                         "meta": np.asarray(json.dumps({"block_size": spec.block_size}))})
  read = cases.draw_pattern(f"file:{path}@4", spec, seed=0)
  assert read.dtype == np.int32 and (read == lists[1, [0, 1, 0]]).all()
  assert (cases.draw_pattern(f"file:{path}", spec, seed=0) == lists[0, [0, 1, 0]]).all()
  with pytest.raises(ValueError, match=r"needs \(60, 2, 3, 16\)"):
    cases.draw_pattern(f"file:{path}", dataclasses.replace(spec, T=60), seed=0)
  with pytest.raises(ValueError, match=r"layers \[1, 4\]"):
    cases.draw_pattern(f"file:{path}@2", spec, seed=0)


def test_crossovers_and_plot(tmp_path):
  row = lambda T, forward, both: dict(
      operation="nsa_layer", pattern="", implementation="", N=8, K=2, H=64, block_size=32, J=16, T=T,
      forward_vs_dense=forward, both_vs_dense=both)
  rows = [row(8192, 1.5, 2.0), row(4096, 0.8, 1.1), row(2048, 1.2, None)]
  lines = kernels.crossovers(rows)
  assert any("forward: wins from 8,192 tokens" in line and "shortest" not in line for line in lines)
  assert any("both: wins from 4,096 tokens (the shortest measured)" in line for line in lines)
  kernels.plot(rows, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").stat().st_size > 1000


def test_another_package_gets_the_same_columns_and_a_comparison(monkeypatch):
  monkeypatch.setitem(timing.CEILINGS, jax.devices()[0].device_kind, (1e12, 1e9))
  spec = arg_specs.get("tiny_g2")
  measured = dict(forward_ms=2.0, both_ms=None, keys=300.0, refused="AssertionError: heads")
  columns = kernels.peer_columns("selected_attention", spec, measured)
  assert measured == {"refused": "AssertionError: heads"}
  numbers = 2 * spec.B * spec.T * (spec.N + spec.K) * spec.H  # q, k, v and o in float32
  assert columns["forward_limit_ms"] == pytest.approx(4 * numbers / 1e9 * 1e3)
  assert columns["forward_tflops"] == pytest.approx(4 * 16 * 300 * spec.G / 2.0 / 1e9)
  assert columns["both_ms"] is None and columns["both_of_limit"] is None
  row = dict(operation="selected_attention", shape="tiny_g2", pattern="uniform")
  rows = [dict(row, implementation=name, forward_ms=ms, both_ms=both)
          for name, ms, both in (("", 1.5, 4.0), ("triton", 1.0, 5.0), ("fla", 2.0, None))]
  line, = kernels.against_peer(rows)
  assert "fla 2.000 ms, here 1.000 ms, 2.00 times as fast" in line


def test_pooled_compression_has_one_key_per_selection_block():
  spec = arg_specs.get("tiny_g2")
  pooled = cases.at("pooled_and_top_k", spec)
  assert pooled.num_compressed == spec.num_blocks and cases.at("compressed_and_top_k", spec) == spec
  seen = sum((c + 1) * 16 - 1 <= t for t in range(64) for c in range(4))
  assert cases.make("pooled_and_top_k", spec).flops[0] == 6 * spec.H * spec.B * spec.N * seen


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_from_pages_is_decoding_from_the_cache(batch):
  spec = dataclasses.replace(arg_specs.get("tiny_g2"), J=3)
  for kind in cases.DECODE_KINDS["decode_paged"](spec):
    case, x = cases.decode(kind, spec, batch, "reference")
    assert sorted(np.asarray(x["table"]).ravel()) == list(range(batch * 4))
    blocks = np.sort(x["blocks"])
    assert (blocks[..., 1:] > blocks[..., :-1]).all() and (blocks[..., -1] == 3).all()
    assert case.bytes == batch * 2 * spec.K * spec.H * 4 * (64 if "dense" in kind else 48)
    assert jax.eval_shape(case.function, x, None).shape == x["q"].shape


@pytest.mark.parametrize("kind", ["decode_dense", "decode_selected"])
def test_a_decoded_token_waits_for_the_one_before(kind, monkeypatch):
  monkeypatch.setattr(cases, "DECODE_STEPS", 2)
  spec = dataclasses.replace(arg_specs.get("tiny_g2"), J=3)
  case, x = cases.decode(kind, spec, 2, "reference")
  one = lambda q: {
      "decode_dense": lambda: pk.attention(q, x["k"], x["v"], query_offset=63, implementation="reference"),
      "decode_selected": lambda: pk.selected_attention(q, x["k"], x["v"], x["blocks"], block_size=16, query_offset=63,
                                                       implementation="reference")}[kind]()[0]
  np.testing.assert_allclose(case.function(x, None), one(one(x["q"])), rtol=1e-6)
  case, x = cases.decode(kind, spec, 2, "reference", chain="added")
  np.testing.assert_array_equal(case.function(x, None), x["q"])


def test_the_peer_is_not_handed_the_empty_triton_cache_of_jax_triton(monkeypatch):
  monkeypatch.setenv("TRITON_CACHE_DIR", "")
  monkeypatch.setattr(peer, "missing", lambda name: None)
  seen = []

  class Process:
    stdout = ('{"operation": "selected_attention"}\n', "a warning\n")

    def __init__(self, command, env, **kwargs):
      seen.append(env)

    def wait(self):
      return 0

  monkeypatch.setattr(peer.subprocess, "Popen", Process)
  assert list(peer.measure(["selected_attention"], [], [], 0, 1, 1)) == [{"operation": "selected_attention"}]
  assert "TRITON_CACHE_DIR" not in seen[0]
  monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
  list(peer.measure(["selected_attention"], [], [], 0, 1, 1))
  assert seen[1]["TRITON_CACHE_DIR"] == "/somewhere"


def test_a_row_of_a_step_counts_useful_work(monkeypatch):
  """The floor by hand: FLOPs over the product's rate, then 32 bytes per parameter that learns over the copy's."""
  config = models.config_of("pilot", "msa", 8, 4096)
  what = schedule.at(config, 50)
  assert what.mode == "sparse" and (what.batch, what.context) == (8, 4096) and config.attention.num_blocks == 16
  monkeypatch.setitem(timing.CEILINGS, "chip", (1e12, 1e9))
  count = flops.parameters(config)
  want = flops.per_step(config, what) / 1e12 + 32 * (count["backbone"] + count["selector"]) / 1e9
  assert models.floor_ms(config, what, "chip") == pytest.approx(1e3 * want)
  assert models.floor_ms(config, what, "another") is None
  warmup = models.config_of("smollm2", "msa:warmup", 1, 1024, seeds=2)
  assert schedule.at(warmup, 0).mode == "warmup" and warmup.seeds == (0, 1) and warmup.model.num_heads == 9
  for bad in (("gpt5", "msa"), ("pilot", "moe")):
    with pytest.raises(ValueError, match="is unknown; take some of"):
      models.config_of(*bad, 1, 1024)


def test_a_row_of_a_step_runs():
  row = models.Row(models.config_of("tiny", "dense", 2, 64))
  measured = row.measure(row.compile(), steps=2, repeats=3)
  assert len(measured["ms_of_groups"]) == 3 and 2 < measured["loss"] < 6  # nats: of 6.3 at the start, after 9 steps


def test_kinds_of_kernels():
  names = {"selected_attention_backward": "selected_attention_backward",
           "jit_range_attention_dkv_0": "range_attention_dkv_0",
           "dkv_kernel": "dkv_kernel", "heads_backward_kernel_3": "heads_backward_kernel",
           "splitKreduce_kernel": "reductions", "nvjet_tst_128x64": "products", "gemm_fusion_dot_3": "products",
           "loop_dynamic_update_slice_fusion_2": "stacking and slicing",
           "DeviceRadixSortOnesweepKernel": "sorts", "input_reduce_fusion_7": "reductions",
           "loop_add_fusion": "elementwise and the rest",
           "MemcpyD2D": "copies and transposes",
           "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention of cuDNN"}
  assert {name: timing.kind(name) for name in names} == names


def test_cudnns_peer_gets_its_layout_and_is_compared(monkeypatch, capsys):
  """A stand-in that goes by the package's own description: packed tokens, lists in front, causal in chosen blocks."""
  torch = pytest.importorskip("torch")

  def attend(q, k, v, blocks, counts, ends, more_ends, *, block_size, scale_softmax, max_s_q, max_s_k, is_causal):
    assert blocks.dtype == counts.dtype == ends.dtype == torch.int32 and is_causal and max_s_q == max_s_k
    o = torch.zeros_like(q)
    for begin, end in zip(ends[:-1].tolist(), more_ends[1:].tolist()):
      for t in range(begin, end):
        for n in range(q.shape[1]):
          r = n // (q.shape[1] // k.shape[1])
          chosen = blocks[t, r, :counts[t, r]]
          at = begin + (chosen[:, None] * block_size + torch.arange(block_size)).flatten()
          at = at[at <= t].long()
          o[t, n] = ((q[t, n] @ k[at, r].T * scale_softmax).softmax(-1) @ v[at, r]) * wrong
    return dict(o_tensor=o)

  monkeypatch.setitem(sys.modules, "cutlass", types.SimpleNamespace(__version__="4.8"))
  monkeypatch.setitem(sys.modules, "cudnn", types.SimpleNamespace(
      __version__="1.32", NSA=types.SimpleNamespace(selection_attention_wrapper=attend)))
  request = dict(operations=["selected_attention", "pooled_and_top_k"], shapes=["tiny_g2"], peers=["cudnn_nsa"],
                 patterns=["uniform"], seed=0, calls=1, repeats=1)
  wrong = 1.0
  peer.main(request, "cpu")
  (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert (row["implementation"], row["refused"], row["both_ms"]) == ("cudnn_nsa", None, None)
  assert (row["cudnn"], row["cutlass"]) == ("1.32", "4.8")
  assert row["o_error"] < 1e-5 and row["keys"] > 0 and row["forward_ms"] == 0.0
  wrong = 1.1
  peer.main(request, "cpu")
  assert "wrong: o differs from float32 attention by 0.1" in json.loads(capsys.readouterr().out)["refused"]


@pytest.mark.parametrize("arguments, words", [
    ((), "takes one argument, .*: there are 0"),
    (("{}", "{}"), "there are 2"),
    (("uniform",), "'uniform' is none: Expecting value"),
    (("[1]",), "it lacks operations, shapes"),
    ((dict(seed=None),), "it lacks seed"),
    ((dict(operations=["window"]),), "operations: 'window' is unknown; take some of selected_attention"),
    ((dict(peers=["other"]),), "peers: 'other' is unknown; take some of fla"),
    ((dict(shapes=["large"]),), "shapes: 'large' is unknown; take some of tiny_g2"),
    (({},), "cudnn_nsa is not timed: cudnn not installed"),
])
def test_a_request_of_the_peers_by_hand_that_is_wrong(monkeypatch, arguments, words):
  monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None if name == "cudnn" else name)
  right = dict(operations=["selected_attention"], shapes=["headline_g8"], peers=["cudnn_nsa"], patterns=["uniform"],
               seed=0, calls=1, repeats=1)
  change = lambda more: json.dumps({name: value for name, value in (right | more).items() if value is not None})
  arguments = [one if isinstance(one, str) else change(one) for one in arguments]
  with pytest.raises(ValueError, match=words):
    peer.request_of(arguments)
  monkeypatch.setattr(peer, "missing", lambda name: None)
  assert peer.request_of([json.dumps(right)]) == right


def test_a_decoded_token_reads_the_weights_and_what_it_sees():
  """SmolLM2 at 8,192 tokens: 134,515,008 weights, keys and values of 3 heads of 64 in 30 layers, two bytes each."""
  weights, copied = 134_515_008 * 2, 4.3e12
  of_token = 2 * 3 * 64 * 30 * 2
  dense, msa = (models.config_of("smollm2", name, 1, 8192) for name in ("dense", "msa"))
  assert models.decoding_floor_ms(dense, "dense", 32, 8192, "NVIDIA H200") == pytest.approx(
      (weights + 32 * 8192 * of_token) / copied * 1e3, rel=1e-6)
  added = 576 * (3 + 1) * 64 + 2 * 64  # the index: projections of 3 queries and a key, their norms
  index = 8192 * 64 * 30 * 2           # of width 64, one for all heads
  assert models.decoding_floor_ms(msa, "sparse", 1, 8192, "NVIDIA H200") == pytest.approx(
      (weights + 30 * added * 2 + 1024 * of_token + index) / copied * 1e3, rel=1e-6)
  assert models.decoding_floor_ms(dense, "dense", 1, 8192, "cpu") is None


def test_decoding_is_timed_from_a_cache_that_is_full_in_the_end():
  config = models.config_of("tiny", "dense", 1, 64)
  row = models.measure_decoding(config, None, "dense", 3, 64, steps=2, repeats=1)
  assert row["cache_bytes"] == 3 * 64 * 2 * 2 * 2 * 16 * 4  # layers, k and v, heads of 16, float32
  assert row["tokens_per_second"] == pytest.approx(3 / row["ms"] * 1e3) and row["floor_ms"] is None


def test_the_memory_alone_is_timed_and_counted():
  model, options = config_lib.ModelConfig(d_model=16, num_heads=2, num_kv_heads=1, head_dim=8), methods.MAG(chunk=8)
  makers = [lambda: models.MemoryLayer(model, options, 2, 32), lambda: models.config_of("gpt5", "msa", 1, 64)]
  good, bad = models.compiled(makers, threads=2)
  layer, programs = good()
  got = layer.measure(programs, repeats=1)
  assert (got["chunks"], got["sequences"], got["implementation"]) == (4, 2, None)
  count = 2 * 32 * sum(cost.flops for cost in options.memory_costs(model).values())
  assert got["forward_tflops"] * got["forward_ms"] == pytest.approx(count / 1e9)
  assert got["both_tflops"] * got["both_ms"] == pytest.approx(3 * count / 1e9)
  with pytest.raises(ValueError, match="gpt5.* is unknown"):
    bad()


@pytest.mark.parametrize("module", ["tune", "support"])
def test_without_triton_a_line_says_what_to_install(tmp_path, module):
  (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no Triton here')")
  out, err = commands.run(f"benchmarks.{module}", code=2, directory=tmp_path)
  assert err.startswith("error: no Triton here: ") and "pip install" in err and not out


@pytest.mark.parametrize("text", ["0", "-3", "x", "1.5", ""])
def test_what_is_no_count_is_named(text):
  assert timing.counts("--batches", ["1", "32"]) == [1, 32]
  with pytest.raises(ValueError, match=f"--batches: '{text}'; take NUMBER"):
    timing.counts("--batches", ["1", text])
