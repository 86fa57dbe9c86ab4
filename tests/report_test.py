"""nsa.report on synthetic study directories with planted truths, and on the ways real ones are broken."""
import base64
import csv
import json
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
import pytest

from nsa import report
from nsa.report import endpoints, loading, runs, verdict
from report_planted import ARMS, MODES, write_study

@pytest.fixture(scope="module")
def study(tmp_path_factory):
  return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def written(study):
  return report.write([study], study / "report")


@pytest.fixture
def quick(monkeypatch):
  """Figures are made and not rendered, for tests that read the text."""
  from nsa.report import style
  def save(fig, folder, name, endings):
    for ending in endings:
      (folder / f"{name}.{ending}").write_text("<?xml")
  monkeypatch.setattr(style, "save", save)


# --- the verdict for planted truths -------------------------------------------


def with_retrofit(delta, exact=0.0):
  return {a: ARMS[a] for a in ("dense", "native_msa")} | {"retrofit_msa_5": (delta, exact, 0.05)}


def words(root):
  return " ".join(report.verdict_table(root).split())  # the terminal's line breaks are not the point


def test_an_equal_retrofit_matches(tmp_path):
  text = words(write_study(tmp_path, with_retrofit(0.0)))
  assert "Retrofit matches native_msa within 0.0100 bits/byte." in text
  assert "both one-sided tests against ±0.0100 pass" in text and "3 paired seeds" in text
  assert "smallest effect the study could have seen is" in text and "is worse than" not in text
  assert "need at least 3 budgets, and 1 has a result" in text


def test_a_worse_retrofit_is_worse_by_what_was_planted(tmp_path):
  root = write_study(tmp_path, with_retrofit(0.05))
  text = words(root)
  assert "Retrofit is worse than native_msa." in text and "matches" not in text
  study = loading.load([root])
  (primary,) = [c for c in verdict.comparisons(study, endpoints.rows(study)) if c.role == "primary"]
  i = primary.judgement.interval
  assert i.low < 0.05 < i.high and i.half_width < 0.02
  assert primary.documents.low < i.mean < primary.documents.high


def test_one_seed_gives_no_verdict(tmp_path, quick):
  root = write_study(tmp_path, with_retrofit(0.05), seeds=(0,))
  text = words(root)
  assert "No verdict: there is only 1 seed per arm." in text
  assert "cannot be judged: 1 seed gives a difference of +0.0" in text and "no interval over seeds" in text
  assert "matches" not in text and "is worse than" not in text
  paths = report.write([root], root / "report")
  assert "With one seed nothing can be said about arms" in paths.markdown.read_text()


def test_noise_that_hides_the_answer_is_undecided(tmp_path):
  assert "Undecided" in words(write_study(tmp_path, with_retrofit(0.004), noise=0.02))


def test_equality_that_says_nothing_is_no_match(tmp_path, quick):
  """All answers wrong in both arms, or the same numbers twice: TOST alone would say "matches" with p = 0."""
  arms = with_retrofit(0.0, exact=-2.0)
  arms["native_msa"] = (0.0, -2.0, None)
  root = write_study(tmp_path, arms)
  text = report.write([root], root / "report").markdown.read_text()
  assert "**cannot be judged** for retrofit_msa_5: at the floor: no seed of either arm gets" in text
  assert "Holm over" not in text
  native = json.loads((root / "runs/native_msa-tiny-0_1_2/eval/1000.json").read_text())
  for record in native["records"]:
    record["arm"] = "retrofit_msa_5"
  (root / "runs/retrofit_msa_5-tiny-0_1_2/eval/1000.json").write_text(json.dumps(native))
  assert "No verdict: identical to native_msa in every seed" in words(root)


@pytest.mark.parametrize("file, change, said", [
    ("eval/1000.json", lambda t: t["records"].remove(next(r for r in t["records"] if r["kind"] == "language" and r["run_mode"] == "sparse")),
     "evaluated on other questions: `native_msa-tiny-0_1_2` has text = val/emma: 1024, `retrofit_msa_5-tiny-0_1_2` val/emma: None"),
    ("eval/1000.json", lambda t: t.update(settings={"split": "val", "sequences": 1, "windows_sha256": "c" * 64}),
     "evaluated on other questions: `native_msa-tiny-0_1_2` has sequences = 6, `retrofit_msa_5-tiny-0_1_2` 1"),
    ("versions.json", lambda t: t.update(corpus_sha256="d" * 64),
     "trained on other documents: `native_msa-tiny-0_1_2` has corpus_sha256 = aaaaaaaaaaaa..., `retrofit_msa_5-tiny-0_1_2` dddddddddddd...")])
def test_arms_that_read_or_were_asked_something_else_are_not_judged(tmp_path, quick, file, change, said):
  root = write_study(tmp_path, with_retrofit(0.05))
  for run in (root / "runs").iterdir():
    for name, extra in (("versions.json", {"corpus_sha256": "a" * 64}),
                        ("eval/1000.json", {"settings": {"split": "val", "sequences": 6, "windows_sha256": "b" * 64}})):
      (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), **extra}))
  assert "Retrofit is worse than native_msa." in words(root)
  path = root / "runs/retrofit_msa_5-tiny-0_1_2" / file
  tree = json.loads(path.read_text())
  change(tree)
  path.write_text(json.dumps(tree))
  text = words(root)
  assert f"No verdict: {said}".replace("`", "") in text and "worse than" not in text
  text = report.write([root], root / "report", publish=True).markdown.read_text()
  assert said.replace("native_msa-", "dense-") in text           # named among the problems too, against the first run
  assert json.loads((root / "report/study.json").read_text())
  assert f"No verdict: {said}".replace("`", "") in words(root / "report")  # and what is published says so again


def test_seeds_are_paired_and_not_pooled(tmp_path):
  """Seed levels vary by 0.01 here and the paired noise by 0.0015: only a paired analysis can match."""
  study = loading.load([write_study(tmp_path, with_retrofit(0.0))])
  table = endpoints.rows(study)
  a, b = (endpoints.series(table, arm, "tiny", "sparse", study.primary)
          for arm in ("native_msa", "retrofit_msa_5"))
  assert np.std(list(a.values()), ddof=1) > 0.004
  (c,) = [c for c in verdict.comparisons(study, table) if c.role == "primary"]
  assert c.differences == {s: pytest.approx(b[s] - a[s]) for s in (0, 1, 2)}
  assert c.judgement.interval.standard_deviation < 0.004 and c.word == "matches"


# --- the report ---------------------------------------------------------------


def test_report_has_all_sections_in_order(written):
  text = written.markdown.read_text()
  titles = re.findall(r"^## (.*)$", text, re.M)
  assert titles == ["Verdict", "Arms", "Delta(b): retrofit minus native over the retrofit budget",
                    "Loss curves", "Held-out loss over training", "Loss by position", "Recall by task", "Train mode and run mode",
                    "What the selector captures", "Captured and oracle mass over training", "What neighbouring queries share",
                    "Which blocks one head selects", "Selector or backbone?",
                    "Spread over seeds, and what a main study could see", "What a main study would cost", "What this cannot say"]
  assert "Not drawn" not in text and "nan" not in text.lower().replace("maintenance", "")
  assert "dense -> block_topk" in text and "Holm" in text and "closes" in text
  names = {p.name for p in written.plots}
  for name in ("delta_budget", "loss", "held_out", "position", "recall", "layers", "learning", "sharing", "blocks", "decomposition"):
    assert {f"{name}.png", f"{name}.svg"} <= names
  assert all(p.stat().st_size > 3000 for p in written.plots)


def test_html_needs_no_network(written):
  page = written.html.read_text()
  images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', page)
  assert len(images) == 10 and page.count("<img") == 10
  assert all(base64.b64decode(i).lstrip().startswith(b"<?xml") for i in images)
  assert "http" not in page and "<script" not in page and "<link" not in page and "@import" not in page


def test_decomposition_adds_up_and_planted_parts_are_found(study):
  from nsa.report import analyses
  loaded = loading.load([study])
  found = analyses.decompose(loaded, endpoints.rows(loaded), "tiny")
  for arm in ("retrofit_msa_1", "retrofit_msa_25"):
    d = found[arm]
    for seed in (0, 1, 2):
      assert d["Delta"][seed] == pytest.approx(d["selector error"][seed] + d["backbone mismatch"][seed])
    # The generator puts the whole difference into the backbone.
    assert np.mean(list(d["backbone mismatch"].values())) == pytest.approx(ARMS[arm][0], abs=0.005)
    assert abs(np.mean(list(d["selector error"].values()))) < 0.005


def test_secondary_words_are_after_holm(study):
  loaded = loading.load([study])
  found = verdict.comparisons(loaded, endpoints.rows(loaded))
  secondary = [c for c in found if c.role == "secondary"]
  assert len(secondary) == 3 and all(c.metric == "exact_match" for c in secondary)
  raw = [c.judgement.p_difference for c in secondary]
  assert min(c.p_difference_holm for c in secondary) == pytest.approx(3 * min(raw))
  exploratory = {(c.arm, c.run_mode) for c in found if c.role == "exploratory"}
  assert exploratory == {("dense", m) for m in MODES["dense"]}


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
  (run / "eval" / "3.json").write_text(json.dumps(
      {"step": 3, "arm": "native_msa", "size": "s", "records": records}))
  (run / "DONE").write_text("")
  paths = report.write([run], tmp_path / "report")
  sparse, dense = list(csv.DictReader(open(paths.csv)))
  expected = {"run": "run", "arm": "native_msa", "size": "s", "seed": "7", "run_mode": "sparse",
              "headline": "True",
              "status": "done", "split": "val", "step": "3", "bits_per_byte": "2.75",
              "second_half_bits_per_byte": "1.75",
              "exact_match": "0.375", "answer_nll": "2.0", "windows": "2", "bytes": "400", "task_items": "3",
              "captured_mass": "0.375", "oracle_mass": "0.875", "queries_limited": "", "overlap": "", "tile_union": "",
              "tile_common": "", "tokens": "300.0", "flops": "3000000.0", "tokens_per_second": "7.0", "mfu": ""}
  assert sparse == expected
  assert (dense["run_mode"], dense["headline"], dense["bits_per_byte"]) == ("dense", "False", "1.5")
  assert dense["second_half_bits_per_byte"] == dense["exact_match"] == ""
  text = paths.markdown.read_text()
  assert "No verdict: no study.json" in text and "2.7500" in text and "37.5" in text


# --- what real directories look like ------------------------------------------


def test_repeated_steps_and_a_cut_line(tmp_path, quick):
  root = write_study(tmp_path, with_retrofit(0.0), seeds=(0, 1))
  run = root / "runs" / "native_msa-tiny-0_1"
  lines = (run / "metrics.jsonl").read_text().splitlines()
  resumed = [json.dumps(dict(json.loads(l), loss=9.5)) for l in lines[40:44]]  # two steps once more
  (run / "metrics.jsonl").write_text("\n".join(lines + resumed) + '\n{"step": 1001, "seed": 0, "lo')
  loaded = runs.load_run(run)
  steps = loaded.curves[0]["step"]
  assert len(steps) == 61 and (np.diff(steps) > 0).all()
  assert list(loaded.curves[0]["loss"][20:22]) == [9.5, 9.5] and loaded.curves[0]["loss"][22] < 9
  assert any("1 unreadable line in metrics.jsonl" in p for p in loaded.problems)
  assert "1 unreadable line" in report.write([root], root / "report").markdown.read_text()


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
  assert "**failed**: out of memory" in text and "`native_msa-tiny-3` (native_msa, tiny) is pending" in text
  assert "`retrofit_msa_1-tiny-0`: seed 0 diverged" in text and "2 of 17 runs failed" in text
  study = loading.load([root])
  found = verdict.comparisons(study, endpoints.rows(study))
  seeds = {c.arm: sorted(c.differences) for c in found if c.role == "primary"}
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
  assert "No verdict" in text and text.count("Not drawn") == 9 and "No run has finished" in text
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
  assert "in all 2 comparisons" in paths.headline


def test_wrong_paths_and_plans_name_the_fix(study, tmp_path):
  with pytest.raises(ValueError, match=r"nowhere: it does not exist; expected a run directory"):
    report.write([tmp_path / "nowhere"], tmp_path / "out")
  with pytest.raises(ValueError, match=r"it has neither; expected .* study directory \(study.json\)"):
    report.write([study / "runs"], tmp_path / "out")
  with pytest.raises(ValueError, match="one report holds one study"):
    report.write([study, study], tmp_path / "out")
  with pytest.raises(ValueError, match="give at least one"):
    report.write([], tmp_path / "out")
  assert not (tmp_path / "out").exists()
  for plan, message in (({"primary": {"metric": "loss"}}, "primary.metric = 'loss': one of second_half"),
                        ({"secondary": {"margin": 0}}, "secondary.margin = 0: a number above 0"),
                        ({"budgets": {"a": 5}}, "budgets.a = 5: a share")):
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=re.escape(message)):
      report.verdict_table(tmp_path)


def test_launcher_writes_the_same_report(study, written, tmp_path):
  """Another process, from the command line: every file comes out the same to the byte."""
  command = [sys.executable, "-m", "launch.report", str(study), f"--out={tmp_path}"]
  done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "outcome" in done.stdout and "Retrofit against native_msa" in done.stdout
  for path in (written.markdown, written.html, written.csv):
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
