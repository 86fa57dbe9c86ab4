"""A run's own evaluations, those made by hand, and the documents that both read: nothing changes unseen between
them."""
import dataclasses
import json
import threading

import commands
import numpy as np
import pytest

from nsa import (
  config as config_lib,
  evaluate,
  held_out,
  methods,
  metrics,
  programs,
  report,
  schedule,
  train as train_lib,
)
from nsa.data import sources
from nsa.planning import plan


@pytest.fixture
def corpus(tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (("train", 4), ("val", 3), ("test", 3)):
    (tmp_path / "corpus" / split).mkdir(parents=True)
    for i in range(count):
      (tmp_path / "corpus" / split / f"{i}.txt").write_bytes(rng.integers(97, 123, 400, np.uint8).tobytes())
  return tmp_path / "corpus"


def make_config(corpus, steps=4, **options):
  config = config_lib.Config(
      attention=methods.MSA(block_size=4, num_blocks=3, index_dim=4), schedule=schedule.native(steps, 0), log_every=1,
      model=config_lib.ModelConfig(vocab_size=264, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4,
                                   mlp_dim=8),
      data=config_lib.DataConfig(source=f"files:{corpus}", context=32, global_batch=2, align=4),
      eval=config_lib.EvalConfig(sequences=3, batch=2, run_modes=("sparse",), every=2, during=("dense",),
                                 diagnostics=False),
      checkpoint=config_lib.CheckpointConfig(every=2))
  for name, value in options.items():
    setattr(config, name, value)
  return config


def train(config, workdir):
  return train_lib.train(config, workdir, progress=False)


def by_hand(workdir, **options):
  config, params, step = evaluate.open_run(workdir)
  config.eval = dataclasses.replace(config.eval, **options)
  return evaluate.write(config, params, workdir, step)[1].name


def files(workdir):
  return {path.name: path.read_text() for path in (workdir / "eval").iterdir()}


def write(path, data):
  """Changes a corpus, as seen by a process that begins then."""
  path.write_bytes(data)
  forget()


def forget():
  """What this process has read."""
  sources._load.cache_clear()
  held_out._windows.cache_clear()


def break_off(monkeypatch, step, error):
  """The run ends with `error` where its evaluation at `step` begins."""
  real = evaluate.write

  def write(config, params, workdir, at, *rest, **kw):
    if at == step:
      raise error
    return real(config, params, workdir, at, *rest, **kw)

  monkeypatch.setattr(train_lib.evaluate, "write", write)


def test_an_evaluation_by_hand_leaves_the_runs_own_alone(tmp_path, corpus, monkeypatch):
  train(make_config(corpus), tmp_path / "run")
  before = files(tmp_path / "run")
  assert before.keys() == {"2.json", "4.json"}
  asked = json.loads(before["4.json"])["settings"]
  assert (asked["split"], asked["context"], asked["sequences"], asked["run_modes"]) == ("val", 32, 3, ["sparse"])
  assert json.loads(before["2.json"])["settings"]["run_modes"] == ["dense"]
  assert metrics.read_json(tmp_path / "run/versions.json")["held_out_sha256"] == {"val": asked["corpus_sha256"]}
  assert by_hand(tmp_path / "run") == "4.json", "the same questions: the same file"
  assert files(tmp_path / "run") == before
  monkeypatch.setattr(evaluate, "records", lambda *_: [])  # what follows is about files
  for name, options in [("4-sequences=1.json", dict(sequences=1)),
                        ("4-run_modes=", dict(run_modes=("dense", "sparse"))),
                        ("4-split=test-context=16.json", dict(split="test", context=16)),
                        ("4-blocks=", dict(blocks={"num_blocks": 2})),
                        ("4-tasks=", dict(tasks=("copy:length=4",), task_examples=1)),
                        ("4-diagnostics=16.json", dict(diagnostics=True))]:
    assert by_hand(tmp_path / "run", **options).startswith(name)
  write(corpus / "val/0.txt", b"another document" * 30)
  assert by_hand(tmp_path / "run").startswith("4-corpus_sha256=")
  after = files(tmp_path / "run")
  assert len(after) == 9 and {name: after[name] for name in before} == before
  (tmp_path / "run/eval/4.json").write_text("[]")  # somebody else's
  assert by_hand(tmp_path / "run") != "4.json" and files(tmp_path / "run")["4.json"] == "[]"


def test_the_sealed_split_is_evaluated_once_at_the_end_in_the_arms_own_mode(tmp_path, corpus, monkeypatch):
  config = make_config(corpus)
  config.eval = dataclasses.replace(config.eval, sealed="test", run_modes=("dense", "sparse"), more_modes=("random",),
                                    more_seeds=(0,), diagnostics=True)
  train(config, tmp_path / "run")
  assert files(tmp_path / "run").keys() == {"2.json", "4.json", "4-sealed.json"}
  plain, sealed = (metrics.read_json(tmp_path / "run/eval" / name) for name in ("4.json", "4-sealed.json"))
  assert {r["run_mode"] for r in plain["records"]} == {"dense", "sparse", "random"}
  assert {(r["run_mode"], r["split"]) for r in sealed["records"] if r["kind"] == "language"} == {("sparse", "test")}
  assert {r["kind"] for r in sealed["records"]} == {"language", "position"}
  read = metrics.read_json(tmp_path / "run/versions.json")["held_out_sha256"]
  assert read == {s["settings"]["split"]: s["settings"]["corpus_sha256"] for s in (plain, sealed)} and len(read) == 2
  asked = ("launch.evaluate", "--workdir", tmp_path / "run", "--split=test", "--run_modes=sparse")
  _, err = commands.run(*asked, code=2)
  assert "--split = 'test': is sealed" in err
  report.write([tmp_path / "run"], tmp_path / "report", publish=True, opened=True)
  _, err = commands.run(*asked, "--opened", tmp_path / "report")
  assert "--opened" not in err
  (hand,) = (tmp_path / "run/eval").glob("4-*split=test*.json")
  text = lambda rows: [r for r in rows if r["kind"] == "language"]
  assert text(metrics.read_json(hand)["records"]) == text(sealed["records"])
  # The run of a study with a plan, which the report does not have; then of another experiment.
  metrics.write_json(tmp_path / "study.json", {"plan": {"hash": "a1b2"}})
  (tmp_path / "runs").mkdir()
  (tmp_path / "run").rename(tmp_path / "runs/run")
  asked = tuple(tmp_path / "runs/run" if part == tmp_path / "run" else part for part in asked)
  _, err = commands.run(*asked, "--opened", tmp_path / "report")
  assert f"report: was opened by the plan None, {tmp_path / 'study.json'} has the plan a1b2." in err
  changed = metrics.read_json(tmp_path / "runs/run/config.json")
  changed["optimizer"]["weight_decay"] = 0.5
  metrics.write_json(tmp_path / "runs/run/config.json", changed)
  _, err = commands.run(*asked, "--opened", tmp_path / "report", code=2)
  assert "report': another experiment, " in err and "optimizer.weight_decay = 0.5, and 0.1 in 'run': name the" in err
  with pytest.raises(config_lib.ConfigError, match="eval.sealed = 'val': val, test or ood, but not eval.split"):
    config_lib.validate(make_config(corpus, eval=dataclasses.replace(config.eval, sealed="val")))


def test_an_evaluation_that_is_cut_goes_on_behind_the_run_modes_it_has(tmp_path, corpus, monkeypatch):
  config = make_config(corpus)
  config.eval = dataclasses.replace(config.eval, every=0, run_modes=("dense", "sparse", "random"))
  train(config, tmp_path / "calm")
  made, cut, real = [], [], evaluate._of_mode

  def of_mode(it, run_mode, way):
    made.append(run_mode)
    if run_mode in cut:
      raise KeyboardInterrupt
    return real(it, run_mode, way)

  monkeypatch.setattr(evaluate, "_of_mode", of_mode)
  for name, kept, settings in (("run", ["sparse", "random"], None), ("other", ["dense", "sparse", "random"], {})):
    cut[:] = ["sparse", "random"]  # two modes are under way at a time
    with pytest.raises(KeyboardInterrupt):
      train(config, tmp_path / name)
    (part,) = (tmp_path / name / "eval/4-parts").iterdir()
    if settings is not None:  # of other questions
      metrics.write_json(part, {"settings": settings, "records": []})
    cut.clear()
    made.clear()
    train(config, tmp_path / name)
    assert sorted(made) == sorted(kept) and files(tmp_path / name) == files(tmp_path / "calm")


def test_a_run_makes_its_own_evaluation_whatever_was_made_by_hand(tmp_path, corpus, monkeypatch):
  train(make_config(corpus), tmp_path / "calm")
  with monkeypatch.context() as patch:
    break_off(patch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
      train(make_config(corpus), tmp_path / "run")
  assert by_hand(tmp_path / "run", sequences=1) == "4-sequences=1.json"
  # as older versions wrote it
  (tmp_path / "run/eval/4.json").write_text((tmp_path / "run/eval/4-sequences=1.json").read_text())
  train(make_config(corpus), tmp_path / "run")
  assert files(tmp_path / "run")["4.json"] == files(tmp_path / "calm")["4.json"]


def test_what_evaluations_need_is_read_before_the_first_step(tmp_path, corpus):
  for options, said in [(dict(split="ood"), r"there is no ood/ folder in it \(found: test, train, val\)"),
                        (dict(context=512), "eval.context = 512: no document of .* has 513 tokens"),
                        (dict(tasks=("mqar:pairs=30",)), "data.context = 32: task mqar with pairs=30")]:
    config = make_config(corpus)
    config.eval = dataclasses.replace(config.eval, **options)
    with pytest.raises((FileNotFoundError, ValueError), match=said):
      list(plan.describe(config))
    with pytest.raises((FileNotFoundError, ValueError), match=said):
      train(config, tmp_path / "run")
    assert not any((tmp_path / "run").iterdir()), "nothing that would refuse the corrected config"


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_documents_are_refused_on_resume_and_on_fork(tmp_path, corpus, split, monkeypatch):
  with monkeypatch.context() as patch:
    break_off(patch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
      train(make_config(corpus, 8), tmp_path / "trunk")
  fork = lambda **data: make_config(corpus, 8, fork=config_lib.ForkConfig(str(tmp_path / "trunk"), 2),
                                    data=dataclasses.replace(
      make_config(corpus).data, **data))
  config = make_config(corpus, 8)
  recorded = (tmp_path / "trunk/versions.json").read_text()
  write(corpus / split / "new.txt", b"one more document" * 20)
  said = rf"data.source = 'files:.*the documents of '{split}' are not those that .*trunk has read"
  for wrong, workdir in ((config, "trunk"), (fork(), "fork")):
    with pytest.raises(config_lib.ConfigError, match=said):
      train(wrong, tmp_path / workdir)
  assert (tmp_path / "trunk/versions.json").read_text() == recorded
  (corpus.parent / "other").symlink_to(corpus)                     # another data.source: on purpose
  assert train(fork(source=f"files:{corpus.parent}/other"), tmp_path / "meant") == 8
  (corpus / split / "new.txt").unlink()
  forget()
  assert train(config, tmp_path / "trunk") == 8


def test_a_run_begins_with_one_example_of_each_task(tmp_path, corpus, monkeypatch):
  """The others are made by who compiles ahead; what is wrong with them ends the run at its next step."""
  counts, real = [], held_out.tasks.batch

  def batch(name, seed, count, *rest, **options):
    counts.append(count)
    if count == 6:
      raise ValueError("no sixth example")
    return real(name, seed, count, *rest, **options)

  monkeypatch.setattr(held_out.tasks, "batch", batch)
  monkeypatch.setattr(programs, "_begun", threading.Event())  # no run of this process has begun yet
  e = dict(tasks=("copy:length=4",), task_examples=5, during_examples=2)
  config = make_config(corpus, eval=dataclasses.replace(make_config(corpus).eval, **e))
  assert train(config, tmp_path / "run") == 4
  assert counts[0] == 1 and set(counts) == {1, 2, 5}
  e["task_examples"] = 6
  config.eval, config.schedule = dataclasses.replace(config.eval, **e, every=3000), schedule.native(3000, 0)
  config.checkpoint.every = 0
  with pytest.raises(RuntimeError, match="in the middle of training.*no sixth example"):
    train(config, tmp_path / "wrong")
  assert len(metrics.read_jsonl(tmp_path / "wrong/metrics.jsonl")) < 2000  # not at its first evaluation
  held_out.check(config, 1)
  with pytest.raises(ValueError, match="no sixth example"):
    held_out.check(config)
