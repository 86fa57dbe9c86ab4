"""nsa.report on synthetic study directories with planted truths, and on the ways real ones are broken."""
import base64
import csv
import dataclasses
import json
import math
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
import pytest

from nsa import config as config_lib
from nsa import report
from nsa.report import endpoints, runs, verdict

ARMS = {  # arm -> (bits/byte minus native, exact match minus native, share of tokens after dense)
    "dense": (-0.004, 0.01, None),
    "native_msa": (0.0, 0.0, None),
    "retrofit_msa_1": (0.030, -0.10, 0.01),
    "retrofit_msa_5": (0.012, -0.04, 0.05),
    "retrofit_msa_25": (0.002, 0.0, 0.25),
}
MODES = {"dense": ("dense", "oracle", "block_topk", "random"), None: ("dense", "sparse", "oracle", "random")}
PENALTY = {"dense": 0.0, "sparse": 0.0, "oracle": -0.006, "block_topk": 0.09, "random": 0.30}
TASKS = {"mqar": 0.95, "needle:keys=4": 0.82, "copy": 0.6}


def write_study(root: Path, arms=ARMS, seeds=(0, 1, 2), sizes=("tiny",), noise=0.0015, together=True) -> Path:
  """A study directory in which arm a is `arms[a][0]` bits per byte worse than native, plus noise.

  `together`: all seeds of an arm in one run directory, as one vmapped program writes them.
  """
  rng = np.random.default_rng(0)
  jobs = []
  for size_index, size in enumerate(sizes):
    for arm, (delta, exact, budget) in arms.items():
      for group in ([tuple(seeds)] if together else [(s,) for s in seeds]):
        name = f"runs/{arm}-{size}-{'_'.join(map(str, group))}"
        write_run(root / name, arm, size, group, delta, exact, budget, rng, noise, 2.1 - 0.2 * size_index)
        jobs.append({"run": name, "arm": arm, "size": size, "seeds": list(group), "status": "done"})
  plan = {"name": "native against retrofit", "question": "Can a retrofit match native sparse attention?",
          "arms": list(arms), "primary": {"metric": "second_half_bits_per_byte", "margin": 0.01},
          "secondary": {"metric": "exact_match", "margin": 0.02},
          "reference_arm": "native_msa", "dense_arm": "dense",
          "budgets": {a: b for a, (_, _, b) in arms.items() if b}, "jobs": jobs}
  (root / "study.json").write_text(json.dumps(plan))
  return root


def write_run(path, arm, size, seeds, delta, exact, budget, rng, noise, level):
  """One finished run directory."""
  (path / "eval").mkdir(parents=True)
  config = config_lib.to_dict(config_lib.Config(arm=arm, size=size, seeds=seeds))
  if arm != "dense":
    config["attention"] = {"method": "msa", "block_size": 32, "num_blocks": 8}
    config["schedule"]["stages"] = [dataclasses.asdict(config_lib.Stage(fraction=1 - (budget or 1))),
                                    dataclasses.asdict(config_lib.Stage(fraction=budget or 1, mode="sparse"))]
  config["data"] |= {"source": f"files:{path.parent}/corpus.tar.xz", "context": 2048, "global_batch": 4}
  config["schedule"]["steps"], config["model"]["dtype"] = 1000, "bfloat16"
  if budget:
    trunk = path.parent / f"dense-{size}-{'_'.join(map(str, seeds))}"
    config["fork"] |= {"workdir": str(trunk), "step": round(1000 * (1 - budget))}
  (path / "config.json").write_text(json.dumps(config))
  (path / "versions.json").write_text(json.dumps({"jax": "0.10.2", "python": "3.11.9"}))
  steps, last = 60, 1000
  first = 0 if not budget else 1 - budget
  lines = []
  for i in range(steps + 1):
    step = round(last * (first + (1 - first) * i / steps)) or 1
    for seed in seeds:
      loss = 1.45 * level / 2 + 3.5 * (step + 12) ** -0.45 + delta + rng.normal(0, 0.012)
      lines.append({"step": step, "seed": seed, "stage": int(bool(budget) and i > 0), "mode": "sparse",
                    "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": step * 8192,
                    "flops": step * 8192 * 6.2e6,
                    "tokens_per_second": 21000 + rng.normal(0, 300), "seconds": step * 0.4})
  (path / "metrics.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
  (path / "eval" / f"{last}.json").write_text(json.dumps(
      {"step": last, "arm": arm, "size": size,
       "records": [r for seed in seeds
                   for r in _records(arm, size, seed, last, delta, exact, rng, noise, level)]}))
  middle = round(last * (first + 1) / 2)
  (path / "eval" / f"{middle}.json").write_text(json.dumps(  # on the way: fewer modes and kinds
      {"step": middle, "arm": arm, "size": size,
       "records": [r for seed in seeds for r in _records(arm, size, seed, middle, delta, exact, rng, noise, level)
                   if r["run_mode"] in ("sparse", "block_topk") and r["kind"] == "layer" or r["kind"] == "language"]}))
  (path / "DONE").write_text(json.dumps({"step": last, "seconds_paused": {"compile": 60.0, "evaluate": 6.0}}))


def _records(arm, size, seed, step, delta, exact, rng, noise, level):
  seed_level = 0.01 * np.random.default_rng(100 + seed).normal()  # the same in all arms: pairing removes it
  own = rng.normal(0, noise)
  for mode in MODES.get(arm, MODES[None]):
    common = {"seed": seed, "arm": arm, "size": size, "step": step, "run_mode": mode}
    value = level + seed_level + delta + own + PENALTY[mode]
    for k, document in enumerate(("emma", "dracula", "walden", "origin", "ulysses", "middlemarch")):
      x = value + 0.04 * math.sin(7 * k) + rng.normal(0, noise)
      yield dict(common, kind="language", split="val", document=document, start=0,
                 bits_per_byte=x + 0.05, bytes=2048, second_half_bits_per_byte=x, second_half_bytes=1024)
    for start, end in ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)):
      yield dict(common, kind="position", start=start, end=end, bytes=(end - start) * 6,
                 bits_per_byte=value + 0.9 * (end / 64) ** -0.7 + delta * math.log2(end / 128) / 4
                 + rng.normal(0, 0.004))
    for task, ease in TASKS.items():
      for index in range(40):
        p = min(0.99, max(0.0, ease + exact - 2 * max(0, PENALTY[mode]) - 0.001 * index))
        yield dict(common, kind="task", task=task, index=index, exact_match=int(rng.random() < p),
                   answer_nll=0.2 + (1 - p), evidence_distance=int(2 ** rng.uniform(5, 11)), depth=index / 40)
    for layer in range(4):
      oracle = 0.93 - 0.05 * layer
      captured = {"dense": None, "oracle": oracle}.get(mode, oracle * (0.9 - 2 * max(0, delta)))
      yield dict(common, kind="layer", layer=layer, captured_mass=captured, oracle_mass=oracle,
                 block_recall=0.7, score_recall=None, entropy=2.0,
                 overlap=0.55 + 0.08 * layer - delta + rng.normal(0, 0.01),
                 tile_union=3.0 + 2 * layer, tile_common=0.8, queries_limited=0.86)
    if mode == "sparse":
      n = 32
      heat = [[min(1.0, (i == j) + (j == 0) * 0.6 + 0.9 * math.exp(-0.5 * (i - j)) + 0.35 * rng.random() ** 4)
               if j <= i else 0.0 for j in range(n)] for i in range(n)]
      yield dict(common, kind="heat", layer=1, kv_head=0, document="emma", heat=heat)


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
  study = runs.load([root])
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


def test_seeds_are_paired_and_not_pooled(tmp_path):
  """Seed levels vary by 0.01 here and the paired noise by 0.0015: only a paired analysis can match."""
  study = runs.load([write_study(tmp_path, with_retrofit(0.0))])
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
  loaded = runs.load([study])
  found = analyses.decompose(loaded, endpoints.rows(loaded), "tiny")
  for arm in ("retrofit_msa_1", "retrofit_msa_25"):
    d = found[arm]
    for seed in (0, 1, 2):
      assert d["Delta"][seed] == pytest.approx(d["selector error"][seed] + d["backbone mismatch"][seed])
    # The generator puts the whole difference into the backbone.
    assert np.mean(list(d["backbone mismatch"].values())) == pytest.approx(ARMS[arm][0], abs=0.005)
    assert abs(np.mean(list(d["selector error"].values()))) < 0.005


def test_secondary_words_are_after_holm(study):
  loaded = runs.load([study])
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


# --- what a pilot is for -------------------------------------------------------


def test_the_spread_of_paired_differences_and_what_it_lets_a_main_study_see(study):
  from nsa.report import planning
  loaded = runs.load([study])
  table = endpoints.rows(loaded)
  found = {s.arm: s for s in planning.spreads(loaded, table, "tiny", loaded.primary, 0.01)}
  a, b = (endpoints.series(table, arm, "tiny", "sparse", loaded.primary) for arm in ("retrofit_msa_5", "native_msa"))
  one = found["retrofit_msa_5"]
  assert one.sd == pytest.approx(np.std(list(a.values()), ddof=1))
  assert one.sd_difference == pytest.approx(np.std([a[s] - b[s] for s in a], ddof=1)) and one.sd_difference < one.sd
  # 2 degrees of freedom: 95 % of chi-square lie between 0.0506 and 7.378; noncentral t: 3 pairs see 3.26 SD, 5 see 1.68.
  middle, low, high = one.detectable(3)
  assert [low / middle, high / middle] == pytest.approx([math.sqrt(2 / 7.378), math.sqrt(2 / 0.05064)], rel=1e-3)
  assert middle == pytest.approx(3.26 * one.sd_difference, rel=0.01)
  assert one.detectable(5)[0] == pytest.approx(1.68 * one.sd_difference, rel=0.01)
  assert one.seeds_for_margin and one.detectable(one.seeds_for_margin)[0] <= 0.01 < one.detectable(one.seeds_for_margin - 1)[0]
  pooled = found[""]
  variances = [s.sd_difference ** 2 for s in found.values() if s.arm.startswith("retrofit")]
  assert pooled.df == 6 and pooled.sd_difference == pytest.approx(math.sqrt(np.mean(variances)))


def test_the_anchor_splits_delta_and_lies_on_the_way(study):
  """Delta = (dense - native) + (retrofit - dense), seed by seed, as the report's control says it; every evaluation counts."""
  from nsa.report import analyses
  loaded = runs.load([study])
  table = endpoints.rows(loaded)
  dense, native, retrofit = ({seed: v for (seed, step), v in endpoints.over_training(loaded, arm, "tiny").items() if step == 1000}
                             for arm in ("dense", "native_msa", loaded.retrofits()[-1]))
  assert native == pytest.approx(endpoints.series(table, "native_msa", "tiny", "sparse", loaded.primary))
  assert dense == pytest.approx(endpoints.series(table, "dense", "tiny", "dense", loaded.primary))
  gained, lost = (np.mean([a[s] - b[s] for s in a]) for a, b in ((dense, native), (retrofit, dense)))
  (line,) = [note for note in analyses.controls(loaded, table) if note.startswith("The anchor")]
  assert f"dense ends {gained:+.4f} bits/byte from native_msa" in line and f"ends {lost:+.4f} bits/byte from dense" in line
  assert {step for _, step in endpoints.over_training(loaded, "retrofit_msa_5", "tiny")} == {975, 1000}


def test_the_price_at_the_studys_own_size_is_the_time_that_its_steps_took(study):
  from nsa.report import planning
  loaded = runs.load([study])
  own, other, *planned = planning.prices(loaded)[0]
  expected = 0.0  # all three seeds of an arm ran together: one seed costs a third of the run
  for run in loaded.runs:
    fastest = run if run.arm == "dense" else next(r for r in loaded.runs if r.arm == "native_msa")  # what the retrofits end as
    speed = np.mean([np.median(c["tokens_per_second"]) for c in fastest.curves.values()])
    expected += (1000 - run.first) * 8192 / (3 * speed) / 3600
  assert own.size == "tiny" and own.tokens == 1000 * 8192 and own.measured == pytest.approx(expected, rel=1e-3)
  assert other.ratio == 20 and other.measured / other.tokens == pytest.approx(own.measured / own.tokens)
  assert [p.size for p in planned[::2]] == ["10M", "40M", "120M"]
  assert all(abs(p.parameters / 1e6 / float(p.size[:-1]) - 1) < 0.03 for p in planned)
  assert all(0 < p.forecast for p in planned) and planned[-1].measured > planned[-3].measured


def test_where_unions_of_a_tile_stop_to_pay_by_hand():
  from nsa.report import planning
  config = {"attention": {"block_size": 64}, "model": {"head_dim": 128, "dtype": "bfloat16"}}
  # H200: 4 * 128 * 64 FLOPs at 989.5e12/s; a partial result of 128 bf16 numbers and a float32, written and read at 4.8e12 B/s.
  assert planning.union_break_even(config) == pytest.approx((2 * 260 / 4.8e12) / (4 * 128 * 64 / 989.5e12), rel=0.01)
  assert math.isnan(planning.union_break_even({"attention": {"method": "dense"}, "model": {"head_dim": 128}}))


def test_a_published_picture_is_one_small_file(study, tmp_path):
  from PIL import Image
  from nsa.report import plots, style
  loaded = runs.load([study])
  look = style.Look(loaded)
  style.save(plots.masses_over_training(loaded, look, "tiny"), tmp_path, "learning", ("png",))
  (file,) = tmp_path.iterdir()
  assert file.suffix == ".png" and 3_000 < file.stat().st_size < 100_000
  colors = np.array([c for _, c in Image.open(file).convert("RGB").getcolors(2 ** 24)])
  for arm in loaded.arms:  # a palette must not turn one arm's colour into another's
    wanted = [int(look(arm)[0][i:i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(colors - wanted).max(1).min() <= 4, arm


def test_a_published_report_knows_no_paths_and_keeps_notes(study, tmp_path, quick):
  (tmp_path / "NOTES.md").write_text("# Surprises\n\n- one **bold**\n  claim\n- two\n\nA paragraph.\n\n| a | b |\n|--|--|\n| c | 1 |\n")
  paths = report.write([study], tmp_path, publish=True)
  files = [p for p in tmp_path.rglob("*") if p.is_file()]
  assert {p.suffix for p in files} == {".md", ".csv", ".json", ".png"} and paths.html is None
  assert not any(str(study).encode() in p.read_bytes() for p in files)
  text = paths.markdown.read_text()
  assert "## Notes\n\n### Surprises\n\n- one **bold** claim\n- two\n\nA paragraph.\n\n| a | b |\n| :-- | --: |\n| c | 1 |\n" in text
  arms = json.loads((tmp_path / "study.json").read_text())["arms"]
  assert arms["retrofit_msa_5"]["fork"]["workdir"] == "@dense" and arms["dense"]["data"]["source"] == "files:corpus.tar.xz"
  layers = list(csv.DictReader(open(tmp_path / "layers.csv")))
  assert {r["step"] for r in layers if r["arm"] == "retrofit_msa_5"} == {"975", "1000"}
  assert "| union tiles in 2 of 4 layers |" in text  # planted: 3, 5, 7 and 9 times the blocks of one query


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
  study = runs.load([root])
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
