"""nsa.report on synthetic study directories with planted truths, and on the ways real ones are broken."""
import base64
import csv
import json
import re
from types import SimpleNamespace

import commands
import numpy as np
import pytest
from report_cases import judged, with_retrofit, words

from benchmarks import planted
from benchmarks.planted import ARMS, MODES, write_study
from nsa import report
from nsa.report import analyses, archive, endpoints, reading, sections, statistics, verdict as verdict_lib


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def written(study):
  return report.write([study], study / "report")


# --- the report ---------------------------------------------------------------


def test_report_has_all_sections_in_order(written):
  text = written.markdown.read_text()
  titles = re.findall(r"^## (.*)$", text, re.M)
  assert titles == ["Verdict", "Arms", "R(b), A and Delta(b)", "Selector or backbone?",
                    "Loss curves", "Held-out loss over training", "Loss by position", "Recall by task", "Far context",
                    "Train mode and run mode",
                    "What the selector captures", "Captured and oracle mass over training",
                    "What neighbouring queries share", "Which blocks one head selects",
                    "Spread over seeds, and what another study could see", "Where the time went",
                    "What this cannot say"]
  assert "Not drawn" not in text and "nan" not in text.lower().replace("maintenance", "")
  assert "dense -> block_topk" in text and "Holm" in text and "### Which endpoints count" in text
  names = {p.name for p in written.plots}
  for name in ("against_dense", "budget_exact_match", "budget_second_half_bits_per_byte", "loss", "held_out",
               "position", "recall", "context", "layers", "learning", "sharing", "blocks",
               "errors_exact_match", "errors_second_half_bits_per_byte"):
    assert {f"{name}.png", f"{name}.svg"} <= names
  assert all(p.stat().st_size > 3000 for p in written.plots)


def test_one_figure_has_every_arm_behind_dense_on_the_same_side_and_fills_those_with_a_word(study):
  from nsa.report import plots
  loaded = archive.load([study])
  found = verdict_lib.verdict(loaded, endpoints.rows(loaded))
  axes = plots.against_dense(loaded, found).axes
  admitted = [e for e in loaded.endpoints if e.primary and found.of("A", e.metric, "tiny")[0].admitted]
  assert len(axes) == len(admitted) > 0
  for ax, e in zip(axes, admitted):
    labels = [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()]
    assert labels == ["1 % within", "5 % within", "25 % within", "native_msa"]
    means = {round(c.lines[0].get_xdata()[0]): c.lines[0] for c in ax.containers}
    for x, c in enumerate(found.of("R", e.metric, "tiny") + found.of("A", e.metric, "tiny")):
      mean = c.judgement.interval.mean * c.metric.scale * (-1 if c.quantity == "A" else 1)
      assert means[x].get_ydata()[0] == pytest.approx(mean)
      assert (means[x].get_markerfacecolor() == "white") == (c.word == "undecided")


def test_a_mean_of_one_seed_is_hollow(tmp_path):
  from nsa.report import plots
  loaded = archive.load([write_study(tmp_path, seeds=(0,))])
  found = verdict_lib.verdict(loaded, endpoints.rows(loaded))
  assert {c.word for c in found.of("R", planted.TEXT, "tiny")} == {"cannot be judged"}
  for ax in plots.against_dense(loaded, found).axes:
    assert {c.lines[0].get_markerfacecolor() for c in ax.containers} == {"white"}


def test_html_needs_no_network(written):
  page = written.html.read_text()
  images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', page)
  assert len(images) == 14 and page.count("<img") == 14 and "<table>" in page and "text-align:right" in page
  assert all(base64.b64decode(i).lstrip().startswith(b"<?xml") for i in images)
  assert "http" not in page and "<script" not in page and "<link" not in page and "@import" not in page


def test_errors_of_selector_and_backbone_add_up_and_are_what_was_planted(study):
  loaded = archive.load([study])
  table = endpoints.rows(loaded)
  parts = analyses.errors(loaded, table, planted.TEXT, "tiny")
  r = analyses.parts(loaded, table, planted.TEXT, "tiny")
  assert list(parts) == ["native_msa", "retrofit_msa_1", "retrofit_msa_5", "retrofit_msa_25"]
  for arm, d in parts.items():
    if arm in r:
      assert [d["selector error"][s] + d["backbone error"][s] for s in range(3)] == pytest.approx(list(r[arm][0]))
    # The generator puts the whole difference into the backbone, and 0.002 less into the selector: its oracle costs
    # that.
    assert np.mean(list(d["selector error"].values())) == pytest.approx(-0.002, abs=0.002)
    assert np.mean(list(d["backbone error"].values())) == pytest.approx(ARMS[arm][0] - ARMS["dense"][0] + 0.002,
                                                                        abs=0.005)


def test_words_are_after_holm_over_the_declared_family(study, tmp_path):
  found = judged(study)
  text = [c for c in found.comparisons if c.family == "text"]
  assert len(text) == 7 and {c.alpha for c in text} == {0.025}  # R and Delta of three budgets, and A
  raw = [c.judgement.p_difference for c in text]
  assert min(c.p_difference for c in text) == pytest.approx(7 * min(raw))
  assert [c.p_tost for c in text] == pytest.approx(list(statistics.holm([c.judgement.p_tost for c in text])))
  exploratory = {(c.arm, c.run_mode) for c in found.comparisons if not c.family}
  assert exploratory == {("dense", m) for m in MODES["dense"] if m != "dense"}
  assert all(c.word == "" for c in found.comparisons if not c.family)
  plan = json.loads((study / "study.json").read_text())
  plan["endpoints"][1]["primary"] = False
  (tmp_path / "study.json").write_text(json.dumps({**plan, "quantities": ["R"]}))
  (tmp_path / "runs").symlink_to(study / "runs")
  found = judged(tmp_path)
  families = [(c.quantity, c.family, c.alpha) for c in found.comparisons if c.family]
  assert families[:3] == [("R", "text", 0.05)] * 3 and {f for q, f, _ in families if q != "R"} == {"secondary"}
  assert families[7:] == ([("R", "secondary", 0.05)] * 3 + [("A", "secondary", 0.05)]
                          + [("Delta", "secondary", 0.05)] * 3)
  assert found.headline.startswith("Retrofit against its dense control, 3 comparisons")


def test_csv_is_exact(tmp_path, quick):
  run = tmp_path / "run"
  (run / "eval").mkdir(parents=True)
  (run / "config.json").write_text(json.dumps({"arm": "native_msa", "size": "s", "seeds": [7], "schedule": {
      "stages": [{"mode": "dense"}, {"mode": "sparse"}]}}))
  (run / "metrics.jsonl").write_text("".join(json.dumps(
      {"step": s, "seed": 7, "loss": 1.0, "tokens": 100 * s, "flops": 1e6 * s, "tokens_per_second": v}) + "\n"
      for s, v in ((1, 5.0), (2, 9.0), (3, 7.0))))
  base = {"seed": 7, "arm": "native_msa", "size": "s", "step": 3, "run_mode": "sparse"}
  records = [
      dict(base, kind="language", split="val", document="a", start=0, bits_per_byte=2.0, bytes=100,
           second_half_bits_per_byte=1.0, second_half_bytes=50),
      dict(base, kind="language", split="val", document="b", start=0, bits_per_byte=3.0, bytes=300,
           second_half_bits_per_byte=2.0, second_half_bytes=150),
      dict(base, kind="language", split="test", document="c", start=0, bits_per_byte=9.0, bytes=300,
           second_half_bits_per_byte=9.0, second_half_bytes=150),
      dict(base, kind="task", task="mqar", index=0, exact_match=1, answer_nll=0.5),
      dict(base, kind="task", task="mqar", index=1, exact_match=0, answer_nll=1.5),
      dict(base, kind="task", task="copy", index=0, exact_match=0.25, answer_nll=3.0),
      dict(base, kind="layer", layer=0, captured_mass=0.5, oracle_mass=0.75, queries_limited=None),
      dict(base, kind="layer", layer=1, captured_mass=0.25, oracle_mass=1.0),
      dict(base, kind="language", run_mode="dense", split="val", document="a", bits_per_byte=1.5, bytes=100,
           second_half_bits_per_byte=None, second_half_bytes=0)]
  (run / "eval" / "2.json").write_text(json.dumps({"step": 2, "records": []}))
  (run / "eval" / "3.json").write_text(json.dumps({"step": 3, "arm": "native_msa", "size": "s", "records": records}))
  (run / "DONE").write_text("")
  paths = report.write([run], tmp_path / "report")
  sparse, dense = list(csv.DictReader(open(paths.csv)))
  expected = {"run": "run", "arm": "native_msa", "size": "s", "seed": "7", "run_mode": "sparse",
              "headline": "True",
              "status": "done", "split": "val", "step": "3", "bits_per_byte": "2.75",
              "second_half_bits_per_byte": "1.75",
              "exact_match": "0.375", "exact_match:copy": "0.25", "exact_match:mqar": "0.5", "answer_nll": "2",
              "answer_nll:copy": "3", "answer_nll:mqar": "1", "windows": "2", "bytes": "400", "task_items": "3",
              "captured_mass": "0.375", "oracle_mass": "0.875", "queries_limited": "", "overlap": "", "tile_union": "",
              "tile_common": "", "tokens": "300", "flops": "3000000", "seconds": "42.8571428571",
              "tokens_per_second": "7", "mfu": ""}
  assert sparse == expected
  assert (dense["run_mode"], dense["headline"], dense["bits_per_byte"]) == ("dense", "False", "1.5")
  assert dense["second_half_bits_per_byte"] == dense["exact_match"] == ""
  text = paths.markdown.read_text()
  assert "No verdict: no study.json" in text and "1.7500" in text and "37.5" in text


# --- what real directories look like ------------------------------------------


def test_repeated_steps_and_a_cut_line(tmp_path, quick):
  root = write_study(tmp_path, with_retrofit(0.0), seeds=(0, 1))
  run = root / "runs" / "native_msa-tiny-0_1"
  lines = (run / "metrics.jsonl").read_text().splitlines()
  resumed = [json.dumps(dict(json.loads(l), loss=9.5)) for l in lines[40:44]]  # two steps once more
  (run / "metrics.jsonl").write_text("\n".join(lines + resumed) + '\n{"step": 1001, "seed": 0, "lo')
  loaded = reading.load_run(run)
  steps = loaded.curves[0]["step"]
  assert len(steps) == 61 and (np.diff(steps) > 0).all()
  assert list(loaded.curves[0]["loss"][20:22]) == [9.5, 9.5] and loaded.curves[0]["loss"][22] < 9
  assert any("1 unreadable line in metrics.jsonl" in p for p in loaded.problems)
  assert "1 unreadable line" in report.write([root], root / "report").markdown.read_text()
  (root / "runs/dense-tiny-0_1/config.json").write_text("{")
  assert "config.json cannot be read" in report.write([root], root / "report").markdown.read_text()


def test_failed_diverged_unfinished_and_pending_runs_are_listed_and_left_out(tmp_path, quick):
  root = write_study(tmp_path, ARMS, seeds=(0, 1, 2), together=False)
  def run(name):
    return root / "runs" / name
  (run("retrofit_msa_5-tiny-1") / "FAILED").write_text(json.dumps(
      {"error": "loss is not finite at step 700", "traceback": "Traceback ..."}))
  (run("retrofit_msa_5-tiny-1") / "DONE").unlink()
  (run("retrofit_msa_25-tiny-2") / "DONE").unlink()
  with open(run("retrofit_msa_1-tiny-0") / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 1010, "seed": 0, "loss": "nan", "tokens": 1}) + "\n")
  plan = json.loads((root / "study.json").read_text())
  plan["jobs"].append({"run": "runs/native_msa-tiny-3", "arm": "native_msa", "size": "tiny", "seeds": [3],
                       "status": "pending"})
  plan["jobs"].append({"run": "runs/dense-tiny-3", "arm": "dense", "size": "tiny", "seeds": [3],
                       "status": "failed", "error": "out of memory"})
  (root / "study.json").write_text(json.dumps(plan))
  text = report.write([root], root / "report").markdown.read_text()
  assert "17 runs: 13 done, 2 failed, 1 unfinished, 1 pending" in text
  assert "`retrofit_msa_5-tiny-1` (retrofit_msa_5, tiny, seeds 1) **failed**: loss is not finite" in text
  assert "**failed**: out of memory" in text
  assert "Pending and in no comparison, of size tiny: native_msa (seeds 3)." in text
  assert "`retrofit_msa_1-tiny-0`: seed 0 diverged" in text and "2 of 17 runs failed" in text
  assert "1 seed of runs that finished diverged: no comparison has them." in text
  seeds = {c.arm: sorted(c.differences) for c in judged(root).of("Delta", planted.TEXT, "tiny")}
  assert seeds == {"retrofit_msa_1": [1, 2], "retrofit_msa_5": [0, 2], "retrofit_msa_25": [0, 1]}
  assert "failed: dense-tiny-3: out of memory" in report.verdict_table(root)


def test_a_study_of_nothing_yet_and_one_without_its_reference(tmp_path, quick):
  empty = tmp_path / "empty"
  empty.mkdir()
  (empty / "study.json").write_text(json.dumps({
      "name": "x", "arms": ["dense", "native_msa", "retrofit_msa_5"],
      "reference_arm": "native_msa", "budgets": {"retrofit_msa_5": 0.05}, "jobs": [
          {"run": "runs/a", "arm": "native_msa", "size": "s", "seeds": [0], "status": "pending"}]}))
  text = report.write([empty], empty / "report").markdown.read_text()
  assert "No verdict" in text and "No run has finished" in text
  absent = next(line for line in text.splitlines() if line.startswith("- Not drawn: "))
  assert absent.count("; ") == 11 and "Recall by task: no task was evaluated" in absent
  partial = write_study(tmp_path / "partial", {a: ARMS[a] for a in ("dense", "retrofit_msa_5")})
  text = words(partial)
  assert "No verdict" in text and "no finished result of native_msa" in text
  report.write([partial], partial / "report")


def test_single_run_and_several_runs(study, tmp_path, quick):
  names = ["native_msa-tiny-0_1_2", "retrofit_msa_5-tiny-0_1_2"]
  one = report.write([study / "runs" / names[0]], tmp_path / "one")
  assert "Run: native_msa" in one.markdown.read_text()
  assert {p.stem for p in one.plots} >= {"loss", "position", "recall"}
  two = report.write([study / "runs" / n for n in names], tmp_path / "two")
  assert "retrofit_msa_5" in two.markdown.read_text() and "No verdict" in two.headline
  assert "native_msa -> dense" in report.verdict_table(study / "runs" / names[0])


def test_several_sizes_have_a_plot_and_a_comparison_each(tmp_path, quick):
  root = write_study(tmp_path, with_retrofit(0.0), seeds=(0, 1, 2), sizes=("tiny", "small"))
  paths = report.write([root], tmp_path / "report")
  assert {"loss_tiny.png", "loss_small.png"} <= {p.name for p in paths.plots}
  assert ("4 comparisons" in paths.headline and "Bits per byte, second half of the context (size small)"
          in paths.markdown.read_text())


def test_wrong_paths_and_plans_name_the_fix(study, tmp_path):
  with pytest.raises(ValueError, match=r"nowhere: it does not exist; expected a run directory"):
    report.write([tmp_path / "nowhere"], tmp_path / "out")
  with pytest.raises(ValueError, match=r"it has neither; expected .* study directory \(study.json\) or a published"):
    report.write([study / "runs"], tmp_path / "out")
  with pytest.raises(ValueError, match="one report holds one study"):
    report.write([study, study], tmp_path / "out")
  with pytest.raises(ValueError, match="give at least one"):
    report.write([], tmp_path / "out")
  assert not (tmp_path / "out").exists()
  for plan, message in (({"endpoints": [{"metric": "loss"}]}, "endpoints[0].metric = 'loss': one of second_half"),
                        ({"endpoints": [{"metric": "exact_match:mqar", "margin": 0}]},
                         "endpoints[0].margin = 0: a number above 0"),
                        ({"jobs": [{"run": "../x"}]}, "jobs[0].run = '../x': a directory inside the study's"),
                        ({"budgets": {"a": 5}}, "budgets.a = 5: a share")):
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=re.escape(message)):
      report.verdict_table(tmp_path)


def test_launcher_writes_the_same_report(study, written, tmp_path):
  """Another process, from the command line: every file comes out the same to the byte."""
  out, _ = commands.run("launch.report", study, f"--out={tmp_path}")
  assert "outcome" in out and "Retrofit against native_msa, 6 comparisons" in out
  for path in (written.markdown, written.html, written.csv):
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_recall_is_followed_over_training_in_the_arms_own_mode():
  task = lambda mode, task, seed, value: dict(kind="task", run_mode=mode, task=task, seed=seed, exact_match=value)
  records = lambda a, b: [task("sparse", "x", 0, a), task("sparse", "y", 0, b), task("dense", "x", 0, 1.0),
                          task("sparse", "x", 1, 0.0)]
  run = SimpleNamespace(arm="a", size="s", mode_at=lambda step: "sparse", diverged={},
                        tasks={10: records(0.0, 0.2), 20: [], 30: records(0.9, 0.5)})
  study = SimpleNamespace(arms=["a"], finished=[run])
  assert endpoints.recall_over_training(study, "a", "s") == {(0, 10): 0.1, (1, 10): 0.0, (0, 30): 0.7, (1, 30): 0.0}
  (table,) = sections.learnt(study, "s")
  assert table.rows == [["a", "30 (1), never (1)", "never (2)"]]
