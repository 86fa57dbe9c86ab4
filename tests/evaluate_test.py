"""Tests of nsa/evaluate.py."""
import concurrent.futures
import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import config as config_lib, data, decoding, evaluate, held_out, methods, model as model_lib, scores, tasks
from nsa.data import recurrence

T = 64
BLOCKS = dict(block_size=8, num_blocks=3)
MODES = ("dense", "sparse", "oracle", "random", "block_topk", "sink_window")


def make_config(attention, **options):
  model = {k: options.pop(k) for k in list(options) if hasattr(config_lib.ModelConfig, k)}
  shape = dict(vocab_size=264, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16)
  config = config_lib.Config(model=config_lib.ModelConfig(**{**shape, **model}), attention=attention,
                             arm="arm", seeds=(3,))
  config.data.context = T
  config.eval = config_lib.EvalConfig(**{**dict(sequences=5, batch=4, run_modes=("dense",), task_examples=3),
                                         **options})
  return config_lib.validate(config)


@functools.lru_cache(maxsize=None)
def params_of(config_box):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32),
                      model_lib.abstract_params(config_box.value))


def records(config, **options):
  config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **options))
  params = params_of(model_lib.Static(dataclasses.replace(config, eval=None)))
  return evaluate.records(config, params, 7), params


def of_kind(rows, kind):
  return [row for row in rows if row["kind"] == kind]


# --- records --------------------------------------------------------------------------


def test_language_records_are_bits_per_byte_by_hand():
  config = make_config(methods.Dense())
  rows, params = records(config)
  windows = data.eval_windows(config.data, "val", 5, T)
  logits = np.asarray(jax.jit(lambda p, t: model_lib.forward(config, p, t, mode="dense").logits)(
      params, np.stack([w.inputs for w in windows])), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  bits, real = np.zeros((5, T)), np.zeros((5, T), bool)
  for i, w in enumerate(windows):
    for t in range(T):
      bits[i, t], real[i, t] = -log_p[i, t, w.targets[t]] / np.log(2), w.targets[t] < 256
  language = of_kind(rows, "language")
  assert len(language) == 5
  for i, (row, w) in enumerate(zip(language, windows)):
    assert (row["document"], row["start"], row["bytes"]) == (w.document, w.start, real[i].sum())
    np.testing.assert_allclose(row["bits_per_byte"], bits[i][real[i]].mean(), rtol=1e-5)
    np.testing.assert_allclose(row["second_half_bits_per_byte"], bits[i, 32:][real[i, 32:]].mean(), rtol=1e-5)
  position = of_kind(rows, "position")
  assert [(row["start"], row["end"]) for row in position] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16),
                                                              (16, 32), (32, 64)]
  for row in position:
    part = (slice(None), slice(row["start"], row["end"]))
    np.testing.assert_allclose(row["bits_per_byte"], bits[part][real[part]].mean(), rtol=1e-5)
  assert {(r["seed"], r["arm"], r["step"], r["run_mode"]) for r in rows} == {(3, "arm", 7, "dense")}


def test_what_is_compiled_ahead_is_what_an_evaluation_runs(monkeypatch):
  """Of all kinds of run modes; the programs' keys alone, nothing is compiled."""
  asked = []

  class Asked(Exception):
    pass

  def compiled(key, lower):
    asked.append(key)
    raise Asked

  monkeypatch.setattr(evaluate.programs, "compiled", compiled)
  for attention in (methods.Dense(), methods.MSA(index_dim=4, **BLOCKS)):
    modes = ("dense", "sparse:num_blocks=2", "oracle", "snapkv")
    config = make_config(attention, run_modes=modes, during=("block_topk",), every=10,
                         blocks=BLOCKS if isinstance(attention, methods.Dense) else {})
    asked.clear()
    for compilation in evaluate.compilations(config):
      with pytest.raises(Asked):
        compilation()
    ahead = list(asked)
    asked.clear()
    for mode in ("block_topk", *modes):
      if evaluate.how(config, mode) is not None:
        with pytest.raises(Asked):
          records(config, run_modes=(mode,), during=(mode,))
    assert ahead == asked and len(set(ahead)) == len(ahead) == (4 if attention.name == "dense" else 5)


def test_what_far_context_is_worth_by_hand(tmp_path):
  """AR hits by distance, and the last quarter of a window with less before it, against the model run on each window
  alone."""
  rng = np.random.default_rng(0)
  for split, size in (("train", 200), ("val", 64 * 4 + 1)):
    (tmp_path / split).mkdir()
    text = rng.integers(97, 123, size).astype(np.uint8)
    if split == "val":
      for at in range(0, 256, 64):
        text[at + 30:at + 50] = text[at + 5:at + 25]  # 25 back: 9 of the 20 complete a 12-gram
    (tmp_path / split / "a.txt").write_bytes(text.tobytes())
  config = make_config(methods.Dense(), sequences=-1, near=(0, 8), ar_hits=True)
  config.eval.context_gain = (16, 32)
  config.data = config_lib.DataConfig(context=T, source=f"files:{tmp_path}", align=16)
  params = params_of(model_lib.Static(dataclasses.replace(config, eval=None, data=config_lib.DataConfig(context=T))))
  rows = evaluate.records(config_lib.validate(config), params, 7)
  windows = data.eval_windows(config.data, "val", -1, T)
  run = jax.jit(lambda p, t, s: jax.nn.log_softmax(model_lib.forward(config, p, t, s, mode="dense").logits))
  loss = lambda segments: np.stack([-np.asarray(run(params, w.inputs[None], segments))[0, np.arange(T), w.targets]
                                    for w in windows])
  whole = loss(np.ones((1, T), np.int32))
  hit, = of_kind(rows, "ar_hit")
  assert (hit["start"], hit["end"]) == (16, 32) and hit["hits"] >= 9 * 3
  back = recurrence.of_windows(config.data.source, "val", -1, T, "bytes", "", 8)
  np.testing.assert_allclose(hit["nll"], whole[back == 25].mean(), rtol=1e-5)
  assert (back[back > 0] == 25).all()
  gain = {row["context"]: row["bits_per_byte"] for row in of_kind(rows, "context_gain")}
  assert set(gain) == {16, 32, 48}
  for before, value in gain.items():
    cut = loss((1 + (np.arange(T) >= 48 - before)).astype(np.int32)[None])
    np.testing.assert_allclose(value, cut[:, 48:].mean() / np.log(2), rtol=1e-5)
  np.testing.assert_allclose(gain[48], whole[:, 48:].mean() / np.log(2), rtol=1e-5)
  assert len(set(gain.values())) == 3
  assert not of_kind(
      evaluate.records(dataclasses.replace(config, eval=dataclasses.replace(config.eval, during=("dense",))), params, 3,
                       during=True), "ar_hit")


def flattened(rows):
  out = {}
  for i, row in enumerate(rows):
    for name, value in row.items():
      if isinstance(value, float):
        out[i, row["kind"], name] = value
  return out


def test_batches_do_not_change_the_records():
  config = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("sparse",), tasks=("mqar:pairs=2",))
  (three, _), (eight, _) = records(config, batch=3), records(config, batch=8)
  assert {row["kind"] for row in three} == {"language", "position", "task", "answer", "layer", "heat"}
  assert [{k: v for k, v in a.items() if not isinstance(v, float)} for a in three] == [
      {k: v for k, v in b.items() if not isinstance(v, float)} for b in eight]
  a, b = flattened(three), flattened(eight)
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_allclose(b[name], value, rtol=1e-4, atol=1e-6, err_msg=str(name))


def test_task_records_score_whole_answers():
  config = make_config(methods.Dense(), tasks=("mqar:pairs=2",), sequences=0)
  rows, params = records(config)
  examples = tasks.batch("mqar:pairs=2", held_out.TASK_SEED, 3, T, "val", data.load("stdlib", "val"))
  run = jax.jit(lambda p, t: model_lib.forward(config, p, t, mode="dense").logits)
  logits = np.asarray(run(params, examples["inputs"]))
  log_p = np.asarray(jax.nn.log_softmax(logits))
  items, everything = of_kind(rows, "task"), []
  assert [row["index"] for row in items] == [0, 1, 2]
  for i, row in enumerate(items):
    group, targets = examples["answer_group"][i], examples["targets"][i]
    right = logits[i].argmax(-1) == targets
    answers = [right[group == g].all() for g in range(group.max() + 1)]
    assert row["exact_match"] == np.mean(answers)
    nll = [-log_p[i, t, targets[t]] for t in np.flatnonzero(group >= 0)]
    np.testing.assert_allclose(row["answer_nll"], np.mean(nll), rtol=1e-5)
    # One by one, and those alone whose evidence lies behind the first 2 tokens and more than 8 before the query.
    far = []
    for g, (query, evidence, correct, loss) in enumerate(row["answers"]):
      assert (query, evidence) == (examples["query"][i, g], examples["evidence"][i, g, 0, 1]) and correct == answers[g]
      np.testing.assert_allclose(loss, -log_p[i, query, targets[query]], atol=6e-5)  # the key's target is its value
      far += [g] * (evidence >= 2 and query - evidence > 8)
      everything.append((query - evidence, g in far, loss))
    assert row["far_answers"] == len(far)
    if far:
      assert row["far_exact_match"] == np.mean([answers[g] for g in far])
      np.testing.assert_allclose(row["far_answer_nll"], np.mean([row["answers"][g][3] for g in far]), atol=6e-5)
    else:
      assert "far_exact_match" not in row
  assert sum(row["far_answers"] for row in items) > 0
  by_distance = of_kind(rows, "answer")
  assert sum(row["answers"] for row in by_distance) == len(everything)
  for row in by_distance:
    mine = [loss for distance, far, loss in everything
            if row["start"] <= distance < row["end"] and far != row["forced"]]
    assert row["answers"] == len(mine) and row["end"] in (32, 64)
    np.testing.assert_allclose(row["answer_nll"], np.mean(mine), atol=6e-5)


def test_exact_match_is_what_greedy_decoding_gives():
  """Every answer token the argmax behind the right ones before it: the same as decoding the answer, token by token."""
  config = make_config(methods.Dense(), tasks=("copy:length=6",), sequences=0)
  rows, params = records(config)
  examples = tasks.batch("copy:length=6", held_out.TASK_SEED, 3, T, "val", data.load("stdlib", "val"))
  group = examples["answer_group"]
  begins = np.argmax(group >= 0, axis=1)  # the same in all: the answer ends the example
  # of random weights
  assert (begins == begins[0]).all() and all(row["exact_match"] == 0 for row in of_kind(rows, "task"))
  prompt = examples["inputs"][:, :begins[0] + 1]
  decoded = np.asarray(decoding.generate(config, params, prompt, 6, mode="dense"))[:, -6:]
  way = evaluate.Way(config, "dense", "own")
  run = evaluate._runner(evaluate._program(way), None)
  decode = functools.partial(evaluate._decoder(way), params)

  def scored(answers):
    """Exact match; that of the evaluation's own decoding, which goes on with its own tokens, is the same."""
    targets, inputs = examples["targets"].copy(), examples["inputs"].copy()
    targets[group >= 0] = answers.ravel()
    inputs[:, 1:] = targets[:, :-1]
    found = scores.task(run, params, "copy:length=6", {**examples, "inputs": inputs, "targets": targets},
                        dataclasses.replace(config.eval, decoded=2), True, decode)
    exact, greedy = ([row.get(name) for row in of_kind(found, "task")]
                     for name in ("exact_match", "greedy_exact_match"))
    assert greedy == [*exact[:2], None]
    return exact

  assert scored(decoded) == [1, 1, 1]
  for place in (0, 3, 5):
    wrong = decoded.copy()
    wrong[1, place] = (wrong[1, place] + 1) % 256
    assert scored(wrong) == [1, 0, 1]


@pytest.mark.parametrize("name, attention", [
    ("dense", methods.Dense()), ("msa", methods.MSA(index_dim=4, **BLOCKS)),
    ("seer", methods.Seer(gate_dim=4, **BLOCKS)),
    ("dsa", methods.DSA(index_dim=4, **BLOCKS)), ("gated", methods.Gated(index_dim=4, **BLOCKS)),
    ("quest", methods.Quest(**BLOCKS)), ("block_topk", methods.BlockTopK(**BLOCKS)),
    ("nsa", methods.NSA(compress_len=4, compress_stride=2, window=8, **{**BLOCKS, "num_blocks": 4})),
    ("moba", methods.MoBA(**BLOCKS)), ("infllm_v2", methods.InfLLMV2(**BLOCKS, pool_len=4, pool_stride=2,
                                                                     num_initial=0, num_local=1))])
def test_answers_in_the_middle_of_a_text_are_decoded_as_if_nothing_came_after_them(name, attention):
  """Against the whole pass over each beginning, token by token: summaries of blocks do not see what stands behind."""
  config = make_config(attention, sequences=0)
  mode = "dense" if name == "dense" else "sparse"
  params = params_of(model_lib.Static(dataclasses.replace(config, eval=None)))
  text = np.random.default_rng(1).integers(0, 256, T).astype(np.int32)
  begins = np.array([9, 30, 43, 57], np.int32)
  forward = jax.jit(lambda tokens: model_lib.forward(config, params, tokens[None], mode=mode, losses=False).logits[0])
  want = np.zeros((4, 5), np.int32)
  for row, begin in zip(want, begins):
    tokens = np.where(np.arange(T) <= begin, text, 0).astype(np.int32)
    for i in range(5):
      row[i] = tokens[begin + 1 + i] = np.argmax(forward(tokens)[begin + i])
  np.testing.assert_array_equal(decoding.answers(config, params, text, begins, 5, mode=mode), want)
  assert len({tuple(row) for row in want}) > 1


def test_a_task_may_have_examples_of_a_length_of_its_own():
  """Padded behind, and scored as if that were the context."""
  names = ("needle:haystack=noise,digits=3@200", "needle:haystack=noise,digits=3")
  config = make_config(methods.Dense(), tasks=names[:1], sequences=0, context=256)
  rows, params = records(config)
  alone = records(make_config(methods.Dense(), tasks=names[1:], sequences=0, context=200, near=(8, 32)))[0]
  for row, same in zip(of_kind(rows, "task"), of_kind(alone, "task")):
    assert row["task"] == names[0] and row["evidence_distance"] == same["evidence_distance"]
    np.testing.assert_allclose(row["answer_nll"], same["answer_nll"], rtol=1e-5)
  for bad in ("needle@300", "needle@x", "needle@0"):
    with pytest.raises(config_lib.ConfigError, match="take 1 to 256 tokens"):
      make_config(methods.Dense(), tasks=(bad,), context=256)
  with pytest.raises(config_lib.ConfigError, match="data.tasks.*name it without @"):
    config.data.tasks, config.data.task_share = ("needle@200",), 0.5
    config_lib.validate(config)


def test_corpora_have_records_of_their_own(tmp_path):
  """Each as it would be alone; diagnostics are of a sample; on the way tasks are looked at where that is asked for."""
  for name, letter in (("a", b"ab"), ("b", b"xyz")):
    (tmp_path / name / "val").mkdir(parents=True)
    (tmp_path / name / "val" / f"{name}.txt").write_bytes(letter * 300)
  config = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("sparse",), during=("sparse",), during_examples=2,
                       sequences=-1, diagnosed=1, batch=4, tasks=("mqar:pairs=2",))
  config.data.corpora = {name: f"files:{tmp_path / name}" for name in "ab"}
  params = params_of(model_lib.Static(dataclasses.replace(config, eval=None, data=config_lib.DataConfig(context=T))))
  rows = evaluate.records(config, params, 7)
  assert {(r.get("corpus"), r.get("document")) for r in of_kind(rows, "language")} == {("a", "a.txt"), ("b", "b.txt")}
  # of 601 and 901 bytes
  assert [sum(r["corpus"] == name for r in of_kind(rows, "language")) for name in "ab"] == [9, 14]
  assert all(len([r for r in of_kind(rows, kind) if r["corpus"] == name]) == n
             for kind, n in (("position", 7), ("layer", 2)) for name in "ab")
  alone = dataclasses.replace(config, data=config_lib.DataConfig(context=T, source=f"files:{tmp_path / 'b'}"),
                              eval=dataclasses.replace(config.eval, tasks=(), diagnosed=64))
  alone = evaluate.records(alone, params, 7)
  of_b = [{k: v for k, v in r.items() if k != "corpus"} for r in rows if r.get("corpus") == "b"]
  assert of_kind(of_b, "language") + of_kind(of_b, "position") == of_kind(alone, "language") + of_kind(
      alone, "position")
  assert of_kind(of_b, "layer") != of_kind(alone, "layer")  # a sample of 4 windows, not all 14
  short = evaluate.records(config, params, 7, during=True)
  assert [r["index"] for r in of_kind(short, "task")] == [0, 1] and "answers" not in of_kind(short, "task")[0]
  assert of_kind(short, "task")[0]["exact_match"] == of_kind(rows, "task")[0]["exact_match"]
  config.eval.during_sequences = 3
  few = evaluate.records(config, params, 7, during=True)
  asked = [(r["corpus"], r["start"]) for r in of_kind(few, "language")]
  assert of_kind(few, "language") == [r for r in of_kind(short, "language") if (r["corpus"], r["start"]) in asked]
  assert [corpus for corpus, _ in asked] == list("aaabbb")


def test_who_reckons_does_not_keep_the_device_from_another():
  """The second asks while the first still holds what it was told; neither asks between the other's batches."""
  turns, order, told = scores.Turns(), [], threading.Event()
  arrays = {name: np.arange(20).reshape(5, 4) for name in ("inputs", "targets", "segment_ids", "prompt")}

  def ask(name):
    def run(params, batch, watch):
      order.append(name)
      time.sleep(0.01)
      return batch["inputs"] * params, None, watch and {name: 1}

    said = turns.ask(name, run, 3, arrays, 2, {1})
    told.set() if name == "second" else told.wait(10)
    return said

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.submit(ask, "first"), pool.submit(ask, "second")
  assert told.is_set() and sorted((order[:3], order[3:])) == [["first"] * 3, ["second"] * 3]
  for name, said in (("first", first.result()), ("second", second.result())):
    rows = np.concatenate([nll[:rows.stop - rows.start] for rows, nll, *_ in said])
    assert rows.tolist() == (arrays["inputs"] * 3).tolist()
    assert [layers for *_, layers in said] == [(), {name: 1}, ()]
    assert turns.seconds[name] >= 0.03


def test_nobody_waits_for_a_compiler_in_a_turn(monkeypatch):
  config = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("dense", "sparse"))
  here, waited, real, ask = threading.local(), [], evaluate._compiled, scores.Turns.ask

  def compiled(*key):
    if key not in waited:  # the first of a program compiles it
      waited.append(key)
      assert not getattr(here, "asks", False)
    return real(*key)

  def asks(*args):
    here.asks = True
    try:
      return ask(*args)
    finally:
      here.asks = False

  monkeypatch.setattr(evaluate, "_compiled", compiled)
  monkeypatch.setattr(scores.Turns, "ask", asks)
  rows, _ = records(config, tasks=("copy:length=6",))
  assert len(waited) == 2 and {row["kind"] for row in rows} >= {"language", "task"}


def test_a_run_mode_reckons_with_text_while_its_task_is_asked(monkeypatch):
  config, begun = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("sparse",)), threading.Event()
  text, task = scores.text, scores.task

  def reckons(*args):
    rows = text(*args)
    assert begun.wait(60)
    return rows

  monkeypatch.setattr(scores, "text", reckons)
  monkeypatch.setattr(scores, "task", lambda *args: begun.set() or task(*args))
  rows, _ = records(config, tasks=("copy:length=6",))
  kinds = [row["kind"] for row in rows]
  assert kinds.index("task") > max(i for i, kind in enumerate(kinds) if kind == "language")


def test_a_dense_model_runs_under_training_free_selectors():
  rows, _ = records(make_config(methods.Dense()), run_modes=MODES, blocks=BLOCKS)
  by_mode = {mode: [row for row in rows if row["run_mode"] == mode] for mode in MODES}
  assert not by_mode["sparse"]  # it has no selector of its own
  # observed in the geometry of eval.blocks
  dense, oracle = (of_kind(by_mode[mode], "layer") for mode in ("dense", "oracle"))
  assert len(dense) == 2 and not any("captured_mass" in row for row in dense)
  # layer 0 has the same input in both
  assert dense[0]["oracle_mass"] == pytest.approx(oracle[0]["oracle_mass"], rel=1e-5)
  loss = {mode: np.mean([r["bits_per_byte"] for r in of_kind(by_mode[mode],
                                                             "language")]) for mode in MODES if by_mode[mode]}
  assert len(set(loss.values())) == 5
  layers = {mode: of_kind(by_mode[mode], "layer") for mode in MODES[2:]}
  for found in layers.values():
    assert [row["layer"] for row in found] == [0, 1]
    for row in found:
      assert row["captured_mass"] <= row["oracle_mass"] + 1e-6 and 0 < row["queries_limited"] < 1
  first = {mode: found[0]["captured_mass"] for mode, found in layers.items()}
  assert first["oracle"] == max(first.values()) and first["oracle"] > first["random"]
  everything, _ = records(make_config(methods.Dense()), run_modes=("dense", "block_topk:num_blocks=8"), blocks=BLOCKS)
  dense, full = ([r["bits_per_byte"] for r in of_kind(everything, "language") if r["run_mode"] == mode]
                 for mode in ("dense", "block_topk:num_blocks=8"))
  np.testing.assert_allclose(full, dense, rtol=1e-5)
  assert not records(make_config(methods.Dense()), run_modes=("oracle",))[0]  # no geometry given
  evaluate.refuse_absent(make_config(methods.Dense()), ("dense", "quest", "oracle:num_blocks=3"), "--run_modes")
  with pytest.raises(config_lib.ConfigError) as error:  # by hand it is no silence
    evaluate.refuse_absent(make_config(methods.Dense()), ("quest", "oracle", "sparse"), "--run_modes")
  assert [problem[:2] for problem in error.value.problems] == [("--run_modes", "oracle"), ("--run_modes", "sparse")]
  assert "oracle:num_blocks=16,block_size=64" in str(error.value)


def test_a_dense_prefix_is_observed_too():
  config = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("sparse",))
  config.layers = ("dense", "attention")
  first, second = of_kind(records(config)[0], "layer")
  assert first["layer"] == 0 and "captured_mass" not in first and first["oracle_mass"] > 0
  assert second["layer"] == 1 and second["captured_mass"] > 0


# --- on the way -----------------------------------------------------------------------


def test_evaluations_on_the_way_are_short_and_of_their_own_modes(tmp_path):
  config = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("sparse", "dense"), during=("sparse",),
                       tasks=("copy:length=4",))
  params = params_of(model_lib.Static(dataclasses.replace(config, eval=None)))
  one_batch = dataclasses.replace(config, eval=dataclasses.replace(config.eval, diagnosed=config.eval.batch))
  whole = evaluate.records(one_batch, params, 7)
  # whose layers are those of one batch, however many it asks for
  short = evaluate.records(config, params, 7, during=True)
  kept = [row for row in whole if row["run_mode"] == "sparse" and row["kind"] in ("language", "position", "layer")]
  assert short == kept and {row["kind"] for row in short} == {"language", "position", "layer"}
  one_batch.eval.during = ()
  assert evaluate.records(one_batch, params, 7, during=True) == whole


def test_more_run_modes_are_asked_of_some_seeds_alone():
  config = make_config(methods.MSA(index_dim=4, **BLOCKS), run_modes=("sparse",), more_modes=("dense", "random"),
                       more_seeds=(1, 5), tasks=("copy:length=4",))
  params = params_of(model_lib.Static(dataclasses.replace(config, eval=None)))
  of = lambda rows: {(r["seed"], r["run_mode"]) for r in rows}
  assert config.seeds == (3,) and of(evaluate.records(config, params, 7)) == {(3, "sparse")}
  pair = dataclasses.replace(config, seeds=(3, 1))
  both = jax.tree.map(lambda x: jnp.stack([x, x]), params)
  rows = evaluate.records(pair, both, 7)
  assert of(rows) == {(3, "sparse"), (1, "sparse"), (1, "dense"), (1, "random")}
  assert of(evaluate.records(pair, both, 7, during=True)) == of(rows)  # no modes of their own on the way
  own = dataclasses.replace(config.eval, run_modes=("sparse", "dense", "random"), more_modes=())
  one = dataclasses.replace(config, seeds=(1,), eval=own)
  assert [r for r in rows if r["seed"] == 1] == evaluate.records(one, params, 7)
