"""experiments/smollm2.py from an imported model to its report, at the size of a toy."""
import json
from pathlib import Path

import huggingface_test as shared
import jax
import pytest

from experiments import smollm2
from nsa import checkpoint, huggingface, metrics, report, stacking, study as study_lib
from nsa.report import archive, endpoints, verdict

pytest.importorskip("safetensors.numpy")
pytest.importorskip("tokenizers")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
  """The argument string of a study with an imported model of 3 layers and two small corpora."""
  monkeypatch.setitem(shared.CONFIGS, "qwen3", dict(shared.CONFIGS["qwen3"], vocab_size=352))
  monkeypatch.setattr(shared, "V", 352)
  source = shared.write("qwen3", tmp_path / "source")
  shared.tiny_tokenizer(source)
  huggingface.import_model(source, tmp_path / "model", context=256)
  (tmp_path / "plan").mkdir()  # without a plan, as that of the experiment
  for corpus, module in (("novels", json.decoder), ("code", json.encoder)):
    for split in ("train", "val"):
      (tmp_path / corpus / split).mkdir(parents=True)
      (tmp_path / corpus / split / "a.py").write_text(Path(module.__file__).read_text())
  return (f"model={tmp_path}/model,novels={tmp_path}/novels,code={tmp_path}/code,plan={tmp_path}/plan,context=256,"
          "batch=2,budgets=0.001+0.002+0.003+0.004,selector_steps=2,block=16,blocks=4,tasks=needle:digits=3,"
          "lengths=250,windows=2,examples=2,decoded=1,eval_batch=2,remat=none")


def test_every_tier_is_what_its_docstring_says(arguments):
  """Each retrofit beside a dense continuation with its tokens and rates, forked from the same model."""
  arms = {}
  for tier in (*map(str, range(1, 11)), "all"):
    study = smollm2.get_config(f"{arguments},tier={tier}")
    jobs = study_lib.jobs(study, "study")
    assert jobs[0].config.arm == "dense" and all(job.config.fork.reset for job in jobs)
    arms = {one.arm: one for one in study.arms}
    assert set(study.controls) | {"dense"} | set(study.controls.values()) <= set(arms)
    for arm, control in study.controls.items():
      ours, theirs = arms[arm], arms[control]
      rates = lambda one: (one.schedule.steps, one.schedule.learning_rate)
      assert rates(ours) == rates(theirs)
      assert (ours.data, ours.fork, ours.eval.tasks) == (theirs.data, theirs.fork, theirs.eval.tasks)
      assert set(study_lib.seeds_of(study, ours)) <= set(study_lib.seeds_of(study, theirs))
  assert len(arms) == 4 * 4 * 2 + 4 * 2 + 1 + 4 + 2 + 2 + 6 + 8 + 4 + 2 + 8
  sparse = [one for name, one in arms.items() if not name.startswith("dense")]
  assert {(one.attention.name, one.schedule.steps) for one in sparse if "_b1" not in one.arm} == {
      (method, steps) for method in ("msa", "seer", "dsa", "gated") for steps in (2, 4, 6, 8)}
  for one in sparse:  # selector over backbone
    ratio = next((ratio for part, ratio in {"5to1": 5, "fast": 160}.items() if part in one.arm), 40)
    selector = round(one.schedule.learning_rate.peak * one.optimizer.selector_learning_rate, 9)
    assert (selector, one.optimizer.selector_learning_rate) == (4e-3 if ratio == 160 else 1e-3, ratio)
  for name, one in arms.items():  # recall in the batches, in other words than those that are evaluated
    assert one.data.task_rows == name.endswith("_recall")  # one of two rows here
    assert not {task.split(":")[0] for task in one.data.tasks} & {task.split(":")[0] for task in smollm2.TASKS}
  assert study.controls["msa_0.003M_fast_recall"] == study.controls["msa_0.003M_recall"] == "dense_0.003M_recall"
  assert study.controls["msa_0.003M_fast"] == "dense_0.003M" and "selector_only_0.003M_fast" in arms
  assert arms["msa_0.002M_first2"].layers == ("dense", "dense", "attention")
  assert arms["msa_0.002M_j2"].attention.num_blocks == 2
  orders = {name for name in arms if study_lib.seeds_of(study, arms[name]) == (0, 1, 2)}
  assert orders == {"dense", "msa_0.002M", "dense_0.002M", *(
      f"{kind}_0.003M{rows}" for kind in ("msa", "dense") for rows in ("", "_b1", "_b2_recall"))}
  small, plain = arms["msa_0.003M_far_b1"], arms["msa_0.003M_b1"]  # the tokens in twice the steps here, half warm-up
  assert (small.data.global_batch, small.schedule.steps, small.schedule.stages[0].fraction) == (1, 12, 0.5)
  assert small.attention.far_share == arms["msa_0.003M_far"].attention.far_share == 0.5 > plain.attention.far_share
  free = {once: set(smollm2.get_config(f"{arguments},once={once}").arms[0].eval.more_modes) for once in (True, False)}
  assert free[True] - free[False] == set(smollm2.ONCE) and set(smollm2.BLOCKS) < free[False]
  with pytest.raises(ValueError, match="tier = '11': 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 or all"):
    smollm2.get_config("tier=11")


def test_the_first_tier_runs_from_an_imported_model_to_a_report(arguments, tmp_path, monkeypatch, quick):
  monkeypatch.setattr(smollm2, "BLOCKS", ("oracle", "random", "sink_window"))  # the gates' own; each is a program
  monkeypatch.setattr(smollm2, "ONCE", ("snapkv",))
  study = smollm2.get_config(f"{arguments},seeds=2,tier=1")
  # Of two budgets, one of them in every order of the data; the others are the same at other lengths.
  kept = ("dense", "selector_only_0.003M", *(f"{kind}_{m}M" for kind in ("dense", "msa") for m in ("0.001", "0.003")))
  study.arms = [one for one in study.arms if one.arm in kept]
  study.controls, study.budgets, study.few = ({name: of[name] for name in of if name in kept}
                                              for of in (study.controls, study.budgets, study.few))
  jobs = study_lib.run(study, tmp_path / "study", on_job=lambda line: None)
  assert len(jobs) == 9 and all(job.status == "done" for job in jobs), [job.error for job in jobs]

  params = lambda run: stacking.backbone(checkpoint.load_params(tmp_path / run))
  runs = f"study/runs/{{}}-{study.arms[0].size}-s0"
  same = lambda a, b: all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  imported = params("model")
  assert same(params(runs.format("dense")), imported)             # not a bit of it learnt
  assert same(params(runs.format("selector_only_0.003M")), imported)
  assert not any(same(params(runs.format(arm)), imported) for arm in ("dense_0.003M", "msa_0.003M"))

  log = metrics.read_jsonl(tmp_path / runs.format("msa_0.003M") / "metrics.jsonl")
  assert log[-1]["mode"] == "sparse" and log[-1]["step"] == 6
  rows = metrics.read_json(tmp_path / runs.format("msa_0.003M") / "eval/6.json")["records"]
  kinds = {(row["kind"], row["run_mode"]) for row in rows}
  assert {("language", "sparse"), ("position", "sparse"), ("layer", "oracle"), ("task", "sparse:num_blocks=2")} <= kinds
  of_task = [row for row in rows if row["kind"] == "task" and row["run_mode"] == "sparse"]
  assert [row.get("greedy_exact_match") for row in of_task] == [of_task[0]["exact_match"], None]

  found = archive.load([tmp_path / "study"])
  judged = [c for c in verdict.verdict(found, endpoints.rows(found)).comparisons if c.family]
  assert {c.quantity for c in judged} == {"R"} and {c.arm for c in judged} == set(study.budgets)
  assert {c.arm for c in judged if c.tested} == {"msa_0.003M"}  # of one order of the data: no test

  paths = report.write([tmp_path / "study"], tmp_path / "report")
  text = paths.markdown.read_text()
  assert "A: dense minus dense" not in text and "Delta(b)" not in text and "| msa_0.003M - dense_0.003M |" in text
  assert "needle:digits=3@250" in text and "answers 50 % or more" in text
  assert paths.headline.startswith("No verdict: dense")  # of random weights: no task that the model can do
