"""The report's section on lengths, on planted records."""
import copy
import math

import numpy as np
import pytest

from nsa import config as config_lib, flops, methods, schedule
from nsa.report import document, endpoints, lengths, runs, sections, verdict

TRAINED, SEEDS = 64, (1, 2, 3)
# arm -> (attention, far exact match at 1x and 4x, bits per byte at 1x and 4x)
PLANTED = {
    "dense": (methods.Dense(), (1.0, 0.3), (2.0, 3.0)),
    "with_memory": (methods.MAG(window=16, chunk=8), (0.9, 0.8), (2.1, 2.2)),
    "window": (methods.Window(24), (0.4, 0.78), (2.1, 2.3)),
}
NOISE = dict(zip(SEEDS, (-0.004, 0.001, 0.003)))


def run_of(arm, path):
  attention, recall, bits = PLANTED[arm]
  stages = schedule.dense(10) if arm == "dense" else schedule.native(10, selector_warmup=0)
  model = config_lib.ModelConfig(num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32)
  config = config_lib.to_dict(config_lib.Config(
      arm=arm, size="s", seeds=SEEDS, attention=attention, schedule=stages, model=model,
      data=config_lib.DataConfig(context=TRAINED, align=8)))
  records = []
  for seed in SEEDS:
    common = dict(seed=seed, arm=arm, size="s", run_mode="dense" if arm == "dense" else "sparse")
    noise = NOISE[seed] * (arm == "with_memory")
    for n, share in zip((TRAINED, 4 * TRAINED), recall):
      for pairs, apart in ((4, 0.0), (16, -0.1)):  # a mean over tasks, however many answers each has
        for far in (1, pairs):
          records.append({"kind": "task", "task": f"mqar:pairs={pairs}@{n}", "far_answers": far,
                          "far_exact_match": share + apart + noise, **common})
    records.append({"kind": "task", "task": "mqar:pairs=4", "far_answers": 9, "far_exact_match": 0.0, **common})
    for first, end, value in ((0, 32, 9.0), (32, 64, bits[0]), (64, 128, 9.0), (128, 256, bits[1])):
      records.append({"kind": "position", "start": first, "end": end, "bits_per_byte": value, "bytes": 10, **common})
  return runs.Run(path / arm, arm, "s", SEEDS, config, {}, {}, records, 10, "done")


@pytest.fixture
def study(tmp_path):
  return runs.Study("lengths", [run_of(arm, tmp_path) for arm in PLANTED], declared=True, arms=list(PLANTED),
                    sizes=["s"], endpoints=[runs.Endpoint("far_exact_match", 0.1)], reference="with_memory",
                    controls={"with_memory": "window"}, speeds={"dense-s": 1e6, "with_memory-s": 2e6})


def test_recall_and_text_are_taken_apart_by_length(study):
  assert lengths.lengths(study, "s") == (64, [64, 256])
  recall = lengths.recall(study, "with_memory", "s")
  assert recall == {(n, seed): pytest.approx(share - 0.05 + NOISE[seed])
                    for n, share in ((64, 0.9), (256, 0.8)) for seed in SEEDS}
  assert lengths.text(study, "dense", "s", [64, 256]) == {
      ("text", n, seed): value for n, value in ((64, 2.0), (256, 3.0)) for seed in SEEDS}


def test_arms_with_a_control_are_judged_at_the_shortest_and_the_longest_length(study):
  short, long = lengths.compare(study, "s")
  assert [(c.arm, c.against, c.multiple) for c in (short, long)] == [("with_memory", "window", m) for m in (1, 4)]
  assert short.interval.mean == pytest.approx(0.5) and short.word == "differs by enough"
  assert long.interval.mean == pytest.approx(0.02) and long.word == "no more than that apart"
  assert short.p <= long.p <= 0.05  # a difference of 2 points is seen, and is too small to matter
  alone = copy.deepcopy(study)
  for run in alone.runs:
    run.records = [r for r in run.records if r["seed"] == 1]
  assert [c.word for c in lengths.compare(alone, "s")] == ["one seed"] * 2
  for window in (0.0, 1.0):  # of 3 seeds: an interval of no width, apart by 100 points and by none
    for run in study.runs:
      run.records, run.old = [{**r, "far_exact_match": window if run.arm == "window" else 1.0} for r in run.records
                              if r["kind"] == "task"], run.records
    flat = lengths.compare(study, "s")
    assert [c.word for c in flat] == ["no scatter"] * 2 and all(math.isnan(c.p) for c in flat)
    for run in study.runs:
      run.records = run.old
  for r in study.runs[0].records:  # what dense has to answer, the study says; tasks of which it does not are left out
    r["exact_match"] = r["far_exact_match"] = 0.4 if "pairs=16" in r.get("task", "") else 0.6
  assert [c.word for c in lengths.compare(study, "s")] == ["not judged"] * 2
  study.solved = 0.5
  assert lengths.recall(study, "window", "s")[64, 1] == pytest.approx(0.4)  # the other task has 0.3
  assert [c.word for c in lengths.compare(study, "s")] == ["differs by enough", "no more than that apart"]
  dense, study.runs[0].records = study.runs[0].records, []
  assert [c.word for c in lengths.compare(study, "s")] == ["not judged"] * 2
  study.runs[0].records, study.controls = dense, {}
  assert lengths.compare(study, "s") == []


def test_two_that_answer_nothing_are_not_alike(study, tmp_path):
  """Apart by less than what matters, whatever they are: neither has as much to lose."""
  for run in study.runs:
    for r in run.records if run.arm != "dense" else ():
      if r["kind"] == "task":
        r["far_exact_match"] *= 0.1
  short, long = lengths.compare(study, "s")
  assert (short.word, long.word) == ("both answer too little",) * 2
  assert short.levels == pytest.approx((0.085, 0.035)) and short.interval.high < 0.1
  page = document.markdown("x", lengths.section(study, sections.Gallery(study, tmp_path, ("png",))))
  assert "| with_memory | window | 1x | 8.5, 3.5 | +5.0 |" in page and "no more than that apart" not in page


def test_two_seeds_can_differ_and_are_never_alike(study):
  for run in study.runs:
    run.records = [r for r in run.records if r["seed"] < 3]
  short, long = lengths.compare(study, "s")
  assert (short.word, long.word) == ("differs by enough", "undecided")
  assert -0.1 < long.interval.low and long.interval.high < 0.1  # within the margin, of the two that there are


def test_a_pair_whose_runs_are_missing_counts_as_a_test_that_failed(study, tmp_path):
  short, long = lengths.compare(study, "s")
  study.runs.append(runs.Run(tmp_path / "gone", "gone", "s", SEEDS, {}, {}, {}, [], None, "pending"))
  study.controls["gone"] = "window"
  again = lengths.compare(study, "s")
  assert len(again) == 2 and [c.p for c in again] == pytest.approx([4 / 2 * short.p, 3 * long.p])
  gallery = sections.Gallery(study, tmp_path, ("png",))
  gates_not_run = verdict.verdict(study, endpoints.rows(study))  # so what is judged is what is judged by length
  assert gates_not_run.headline == "What this study judges is in the next section: By length"
  page = document.markdown("x", sections.all_sections(study, endpoints.rows(study), gates_not_run, gallery))
  assert page.index("## By length") < page.index("### Which endpoints count")
  assert "of 4 pairs" in page and "2 of 4 planned pairs are missing" in page
  assert "counted as tests that failed: gone minus window at 1x, gone minus window at 4x." in page
  assert "**differs by enough**: with_memory minus window at 1x (+50.0 points)" in page


@pytest.mark.parametrize("true, false", [(0.1, ["differs by enough"]), (0.1, ["no more than that apart"]),
                                         (0.0, ["differs", "differs by enough"])])
def test_words_are_of_the_whole_family(true, false, study, monkeypatch):
  """Six pairs at two lengths: where the truth is no difference, or just the smallest that matters, few studies have a
  false word at all. Intervals for themselves would have one in a quarter of them."""
  rng = np.random.default_rng(0)
  study.controls = {f"memory {i}": "window" for i in range(6)}
  cells = lambda of: {(n, seed): of() for n in (64, 256) for seed in SEEDS}
  monkeypatch.setattr(lengths, "recall", lambda study, arm, size: cells(
      (lambda: true + 0.02 * rng.standard_normal()) if "memory" in arm else (lambda: float(arm == "dense"))))
  wrong = [any(c.word in false for c in lengths.compare(study, "s")) for _ in range(200)]
  assert np.mean(wrong) <= 0.08  # 5 %, and two standard errors


def test_the_section_shows_both_costs_and_is_left_out_where_one_length_was_asked(study, tmp_path):
  gallery = sections.Gallery(study, tmp_path, ("png",))
  page = document.markdown("x", lengths.section(study, gallery))
  assert gallery.names == ["lengths"] and (tmp_path / "lengths.png").stat().st_size > 1000
  config = config_lib.from_dict(study.runs[1].config)
  cost = [f"{sum(flops.forward(config, n, 'sparse').values()) / 1e6:.2f}" for n in (64, 256)]
  row = next(line for line in page.splitlines() if line.startswith("| with_memory | 3 | 85.0"))
  assert f"| {cost[0]} | {cost[1]} | 500 |" in row and "| window | 3 | 35.0 ± 0.0 | 73.0 ± 0.0 |" in page
  assert "| dense | 2.0000 ± 0.0000 | 3.0000 ± 0.0000 |" in page and "smallest effect that matters: 10.0 points" in page
  assert "recall says nothing" not in page and "planned pairs are missing" not in page
  assert "of window to dense closed, 1x (%)" in page and "| 500 | 83 |" in page  # of 35 to 95, 85
  for r in study.runs[0].records:
    r["far_exact_match"] = 0.5
  assert "dense answers 50.0 % at 1x, less than 90 %" in document.markdown("x", lengths.section(study, gallery))
  study.runs[0].status = "unfinished"
  assert "dense was not asked for far answers at 1x, or has not finished: recall says" in document.markdown(
      "x", lengths.section(study, gallery))
  for run in study.runs:
    run.records = [r for r in run.records if "@256" not in r.get("task", "")]
  assert lengths.section(study, gallery) == []


def test_a_config_that_cannot_be_read_costs_its_place_in_the_figure_alone(study):
  study.runs[1].config = {"model": {"no_such": 1}}
  assert math.isnan(lengths.flops_per_token(study.runs[1], 64))
  assert np.isfinite(lengths.flops_per_token(study.runs[0], 64))
