"""nsa.report.frontier on planted grids: what it reads, how often it is wrong, and the experiment at toy size."""
import json

import numpy as np
import pytest
from scipy import special

from experiments import frontier as experiment
from nsa import config as config_lib, methods, records, report, schedule, study as study_lib, train
from nsa.report import archive, frontier

SIZE = "tiny-64"


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
  monkeypatch.setattr(frontier, "DRAWS", 1000)


def write(root, modes, examples=40, solved=0.5):
  """A study of one dense run: modes {run mode: (sparsity, {task: number of the first examples that are lost})}."""
  run = root / f"runs/dense-{SIZE}-s0"
  (run / "eval").mkdir(parents=True)
  config = config_lib.to_dict(config_lib.Config(arm="dense", size=SIZE, schedule=schedule.as_it_is()))
  (run / "config.json").write_text(json.dumps(config))
  (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "seed": 0, "loss": 1.0, "tokens": 64}) + "\n")
  rows = []
  for mode, (sparsity, lost) in modes.items():
    common = {"seed": 0, "arm": "dense", "size": SIZE, "step": 1, "run_mode": mode}
    for task, count in lost.items():
      for index in reversed(range(examples)):
        once = dict(tokens_visible=100.0 * (1 - sparsity), tokens_causal=100.0) if mode.startswith("snapkv") else {}
        right = float(index >= count)
        rows.append({**records.make("task", task=task, index=index, exact_match=right, **once), **common})
    for i, document in enumerate(("a", "a", "b")):
      rows.append({**records.make("language", split="val", document=document, start=i, corpus="novels",
                                  second_half_bits_per_byte=2.0 * (1 + sparsity / 10), second_half_bytes=100),
                   **common})
    if sparsity and not mode.startswith("snapkv"):
      rows.append({**records.make("layer", layer=0, tokens_visible=10 * (1 - sparsity), tokens_causal=10.0), **common})
  (run / "eval/1.json").write_text(json.dumps({"step": 1, "arm": "dense", "size": SIZE, "records": rows}))
  (run / "DONE").write_text("{}")
  (root / "study.json").write_text(json.dumps({
      "name": "frontier", "arms": ["dense"], "dense_arm": "dense", "reference_arm": "dense", "quantities": ["R"],
      "solved": solved, "sections": ["frontier"],
      "jobs": [{"run": f"runs/dense-{SIZE}-s0", "arm": "dense", "size": SIZE, "seeds": [0], "status": "done"}]}))
  return root


MODES = {
    "dense": (0.0, {"needle": 0, "book": 8, "common": 30}),   # of 40: common is solved by a quarter
    "quest:num_blocks=8": (0.25, {"needle": 0, "book": 8, "common": 30}),
    "quest:num_blocks=4": (0.5, {"needle": 1, "book": 8, "common": 40}),
    "quest:num_blocks=2": (0.75, {"needle": 1, "book": 24, "common": 40}),
    "snapkv:capacity=9": (0.5, {"needle": 40, "book": 40, "common": 40}),
    "oracle:num_blocks=2": (0.75, {"needle": 0, "book": 8, "common": 40}),
}


def test_what_is_read_is_by_example_and_the_same_from_what_is_published(tmp_path):
  root = write(tmp_path / "study", MODES)
  live = frontier.grid(archive.load([root]), SIZE)
  report.write([root], tmp_path / "out", publish=True)
  for found in (live, frontier.grid(archive.load([tmp_path / "out"]), SIZE)):
    needle, book = found.tasks
    assert (needle.name, book.name, found.cells[2].name) == ("needle", "book", "text novels")
    assert found.left_out == ["common: dense answers 25.0 %"]
    assert {way: len(steps) for way, steps in found.judged.items()} == {"quest": 2, "snapkv": 1}
    steps = found.ways["quest"]
    assert [s.sparsity for s in steps] == pytest.approx([0.25, 0.5, 0.75])  # mildest first, as measured
    assert [s.sparsity for s in found.ways["snapkv"]] == [0.5]              # of prompts
    assert [frontier.loss(s, needle) for s in steps] == pytest.approx([0, 1 / 40, 1 / 40])
    assert [frontier.loss(s, book) for s in steps] == pytest.approx([0, 0, 16 / 32])  # of the 32 that dense answers
    assert [frontier.loss(s, found.cells[2]) for s in steps] == pytest.approx([0.025, 0.05, 0.075])
    at = lambda cells, limit: frontier.within(cells, steps, limit)
    assert at([needle], 0.01)[0] == pytest.approx(0.25) and at([needle], 0.05)[0] == pytest.approx(0.75)
    assert at([needle, book], 0.05) == pytest.approx((0.5, 0.25, 0.5))  # 3 of 40 are lost in some draws
    assert frontier.judge(found, 0.05).word == "undecided"  # 40 examples do not show 5 %
  text = (tmp_path / "out/report.md").read_text()
  assert "## What sparsity is safe?" in text and "within 5 %: **undecided**" in text
  assert "dense answers too little of needle, book for any way to be shown safe" in text  # 40 and 32
  assert "| quest | quest:num_blocks=2 | 0.750 |" in text and "common: dense answers 25.0 %" in text
  assert (tmp_path / "out/plots/frontier.png").stat().st_size > 1000


def test_dense_layers_of_a_hybrid_leave_nothing_out():
  seen = dict(tokens_visible=12.0, tokens_causal=64.0)
  assert frontier._sparsity({"task": [], "layer": [{"layer": 0}, {"layer": 1, **seen}]}) == pytest.approx(
      0.5 * (1 - 12 / 64))
  assert frontier._sparsity({"task": [{}, seen], "layer": []}) == pytest.approx(1 - 12 / 64)


def planted(rng, n, losses, level=0.9):
  """A grid of two tasks: losses {way: [[true loss of each task] of each step]}, of a dense score of `level`."""
  dense = [(rng.random(n) < level).astype(float) for _ in range(2)]
  cells = [frontier.Cell(f"task {i}", True, tuple(range(n)), d) for i, d in enumerate(dense)]
  ways = {}
  for way, steps in losses.items():
    ways[way] = []
    for k, of_step in enumerate(steps):
      # right answers are lost at the true rate and a tenth more, which wrong ones that come right make up for
      lost = {}
      for cell, d, x in zip(cells, dense, of_step):
        back = 0.1 * x * level / (1 - level)
        lost[cell.name] = np.where(d > 0, rng.random(n) < 1.1 * x, -1.0 * (rng.random(n) < back))
      ways[way].append(frontier.Step("dense", way, 0.5 + 0.2 * k, lost))
  return frontier.Grid(cells, ways)


@pytest.mark.parametrize("losses, false, true", [
    # Every way loses just the limit on one task: neither "some way is safe" nor, of the first, "all are unsafe".
    ({"a": [[0.0, 0.05], [0.3, 0.3]], "b": [[0.05, 0.0]], "c": [[0.05, 0.05]]}, ("refuted", "confirmed"), None),
    ({"a": [[0.01, 0.05], [0.3, 0.3]], "b": [[0.4, 0.4]]}, ("refuted", "confirmed"), None),
    ({"a": [[0.0, 0.0], [0.3, 0.3]], "b": [[0.4, 0.4]]}, ("confirmed",), "refuted"),
    ({"a": [[0.0, 0.2], [0.3, 0.3]], "b": [[0.4, 0.0]]}, ("refuted",), "confirmed")])
def test_words_are_seldom_false_and_found_where_true(losses, false, true):
  rng = np.random.default_rng(1)
  words = [frontier.judge(planted(rng, 128, losses), 0.05).word for _ in range(100)]
  assert sum(word in false for word in words) <= 9  # 5 % of 100, and two standard errors
  assert true is None or words.count(true) >= 95


def test_a_cut_grid_confirms_nothing(tmp_path):
  """What has not run may be safe; and the ways that were planned share alpha, whether they have run or not."""
  rng = np.random.default_rng(1)
  found = planted(rng, 128, {"a": [[0.0, 0.2], [0.3, 0.3]], "b": [[0.4, 0.0]]})
  assert frontier.judge(found, 0.05).word == "confirmed"
  found.missing = ["once-tiny-64-s0"]
  assert frontier.judge(found, 0.05).word == "undecided"
  safe = planted(rng, 128, {"a": [[0.0, 0.0]]})
  assert frontier.judge(safe, 0.05).word == "refuted"
  safe.planned = 40  # 128 examples without a loss do not show 5 % at alpha / 40
  assert frontier.judge(safe, 0.05).word == "undecided"
  root = write(tmp_path / "study", MODES)
  plan = json.loads((root / "study.json").read_text())
  once = {"run": f"runs/once-{SIZE}-s0", "arm": "once", "size": SIZE, "seeds": [0], "status": "pending"}
  configs = {f"{arm}-{SIZE}": {"arm": arm, "size": SIZE, "eval": {"run_modes": modes}} for arm, modes in (
      ("dense", list(MODES)), ("once", ["flexprefill:alpha=0.9", "flexprefill:alpha=0.8", "xattention"]))}
  (root / "study.json").write_text(json.dumps({**plan, "jobs": [*plan["jobs"], once], "plan": {"configs": configs}}))
  study = archive.load([root])
  cut = frontier.grid(study, SIZE)
  assert cut.missing == [f"once-{SIZE}-s0"] and cut.planned == 4  # quest, snapkv, flexprefill, xattention
  assert frontier._verdicts(study, cut, SIZE)[0].text == f"Missing at size {SIZE}: once-{SIZE}-s0."


def test_limits_hold_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(2)
  for n, true in ((128, 0.0), (128, 0.03), (128, 0.5), (48, 0.1)):
    inside = []
    for _ in range(100):
      found = planted(rng, n, {"a": [[true, true]]})
      inside += [low <= true <= high for cell in found.cells
                 for low, high in frontier.limits(cell, found.ways["a"], 0.025, 0.025)]
    assert np.mean(inside) > 0.92, (n, true, np.mean(inside))


@pytest.mark.parametrize("right, lost", [(128, 0), (128, 1), (97, 0), (64, 7)])
def test_limits_of_few_losses_are_exact(right, lost, monkeypatch):
  """Those of Clopper and Pearson: whole counts of examples would call 1 of 128 safe within 5 % at alpha / 7."""
  monkeypatch.setattr(frontier, "DRAWS", 20_000)
  cell = frontier.Cell("task", True, tuple(range(right + 9)), np.repeat([1.0, 0.0], [right, 9]))
  step = frontier.Step("dense", "a", 0.5, {"task": (np.arange(right + 9) < lost).astype(float)})
  (low, high), = frontier.limits(cell, [step], 0.05 / 3, 0.05 / 7)
  assert high == pytest.approx(special.betaincinv(lost + 1, right - lost, 1 - 0.05 / 7), rel=0.05)
  assert low == pytest.approx(special.betaincinv(lost, right - lost + 1, 0.05 / 3) if lost else 0, rel=0.2)


@pytest.mark.parametrize("lost, word", [((0, 0, 0), "undecided"), ((1, 0, 0), "undecided"), ((1, 1, 1), "confirmed")])
def test_few_examples_show_little(lost, word):
  """Of three none lost says nothing of 5 %; all three would be lost once in 8,000 times at 5 %."""
  cell = frontier.Cell("task", True, (0, 1, 2), np.ones(3))
  found = frontier.Grid([cell], {"a": [frontier.Step("dense", "a", 0.5, {"task": np.array(lost, float)})]})
  assert frontier.judge(found, 0.05).word == word


def test_the_experiment_runs_from_a_model_to_its_section(tmp_path, quick):
  config = config_lib.Config(
      size="t", model=config_lib.ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8,
                                             mlp_dim=64),
      attention=methods.MSA(block_size=8, num_blocks=4, index_dim=8), arm="msa",
      schedule=schedule.native(2, selector_warmup=0, peak=1e-3),
      data=config_lib.DataConfig(context=128, global_batch=2), eval=config_lib.EvalConfig(sequences=0, run_modes=()))
  train.train(config, tmp_path / "run")
  study = experiment.get_config(
      f"model={tmp_path}/run,lengths=64+128,prompts=128,shares=2+4+8,tasks=copy:length=4,examples=4,text_tokens=256,"
      f"block=8,eval_tokens=256,trained=own:{tmp_path}/run")
  assert [(one.arm, one.size.rpartition("-")[2], len(one.eval.run_modes)) for one in study.arms] == [
      ("dense", "64", 9), ("own", "64", 2), ("dense", "128", 12), ("once", "128", 14), ("own", "128", 3)]
  study.arms = study.arms[2:]
  few = {"dense": ("dense", "quest", "quest:num_blocks=8"), "once": ("xattention:threshold=0.6,block_size=8",),
         "own": ("sparse:num_blocks=8", "sparse:num_blocks=2")}
  for one in study.arms:
    assert set(few[one.arm]) <= set(one.eval.run_modes)
    one.eval.run_modes, one.model.remat = few[one.arm], "none"
  study.solved = 0.0
  jobs = study_lib.run(study, tmp_path / "study", on_job=lambda line: None)
  assert [job.status for job in jobs] == ["done"] * 3, [job.error for job in jobs]
  loaded = archive.load([tmp_path / "study"])
  found = frontier.grid(loaded, loaded.sizes[0])
  assert set(found.ways) == {"quest", "xattention", "own"} and not found.tasks  # of a model that answers nothing
  (quest, half), own = found.ways["quest"], found.ways["own"]
  assert (quest.mode, half.mode) == ("quest:num_blocks=8", "quest")  # eval.blocks: the middle share
  causal = 128 * 129 / 2
  seen = sum(min(t + 1, 8 * 7 + t % 8 + 1) for t in range(128))  # all of seven blocks, and its own up to itself
  assert quest.sparsity == pytest.approx(1 - seen / causal, rel=1e-5)
  assert [s.mode for s in own] == ["sparse:num_blocks=8", "sparse:num_blocks=2"]
  once = [r for r in loaded.runs[1].records if r["kind"] == "task" and r["run_mode"].startswith("xattention")]
  assert all(0 < r["tokens_visible"] < r["tokens_causal"] < 128 for r in once) and len(once) == 4
  assert "no verdict" in report.write([tmp_path / "study"], tmp_path / "report").markdown.read_text()
  for wrong, said in (("lengths=2x", "lengths = '2x': whole numbers of at least 1"), ("shares=0", "shares = '0'"),
                      ("block=0", "block = 0: above 0"), ("trained=x", "'x' names no run; take name:run directory")):
    with pytest.raises(ValueError, match=said):
      experiment.get_config(wrong)
