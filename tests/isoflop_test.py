"""nsa.report.isoflop on planted truths: how often its intervals and words are right; and the experiment's arms."""
import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import isoflop as experiment
from nsa import config as config_lib, flops, records, report
from nsa.report import archive, endpoints, isoflop, isoflop_section, runs

METRIC = "second_half_bits_per_byte"
BUDGETS = (5e14, 1.5e15, 4.5e15)
EXPONENT, BEND = 0.45, 0.03


def optimum(budget):
  return 2e6 * (budget / 1.5e15) ** EXPONENT


def best_loss(budget, gain=0.0):
  return 1.6 - 0.05 * math.log(budget / 1.5e15) - gain


def planted(rng, method, noise=0.006, gain=0.0, sizes=(0.44e6, 1.26e6, 2.8e6, 10e6, 28e6), budgets=BUDGETS):
  """Runs whose loss is a parabola in ln(parameters) with its lowest point at `optimum`, and noise."""
  out = []
  for budget in budgets:
    for n in sizes:
      loss = best_loss(budget, gain) + BEND * math.log(n / optimum(budget)) ** 2 + rng.normal(0, noise)
      row = endpoints.Row("r", f"{method}_{budget:g}", str(n), 0, "sparse", True, "done", "val", 1, {METRIC: loss})
      seconds = budget / (1e14 if method == "dense" else 5e13)
      out.append(isoflop.Point(method, budget, str(n), 0, n, seconds, {}, row, {"sparse": row}))
  return out


def test_intervals_hold_the_planted_optimum_in_their_stated_share():
  rng = np.random.default_rng(0)
  inside = {"parameters": [], "loss": [], "exponent": []}
  for draw in range(300):
    found = isoflop.fit(planted(rng, "dense"), METRIC, draw)
    for budget, o in found.optima.items():
      inside["parameters"].append(o.between[0] <= optimum(budget) <= o.between[1])
      inside["loss"].append(o.loss_between[0] <= best_loss(budget) <= o.loss_between[1])
    inside["exponent"].append(found.exponent_between[0] <= EXPONENT <= found.exponent_between[1])
  for name, hits in inside.items():
    assert 0.925 <= np.mean(hits) <= 0.98, (name, np.mean(hits))  # 95 %, and the error of 300 studies


def fits(rng, gains, **options):
  return {METRIC: {name: isoflop.fit(planted(rng, name, gain=gain, **options), METRIC, k)
                   for k, (name, gain) in enumerate(gains.items())}}


@pytest.mark.parametrize("msa, window, false, true", [
    (0.0, 0.0, ("confirmed by selection", "confirmed by locality", "refuted"), None),
    (0.03, 0.03, ("confirmed by selection", "refuted"), "confirmed by locality"),
    (0.03, 0.0, ("confirmed by locality", "refuted"), "confirmed by selection"),
    (-0.03, 0.0, ("confirmed by selection", "confirmed by locality"), "refuted")])
def test_words_are_seldom_false_and_found_where_true(msa, window, false, true):
  rng = np.random.default_rng(1)
  words = []
  for _ in range(120):
    (one,) = isoflop.judge(fits(rng, {"dense": 0.0, "msa_32": msa, "window_32": window}))
    assert one.budget == 4.5e15 and set(one.against) == {"dense", "window_32"}
    words.append(one.word)
  assert sum(word in false for word in words) <= 11  # 5 % of 120, and two standard errors
  assert true is None or words.count(true) >= 100


def test_locality_says_what_it_does_not_exclude():
  found = fits(np.random.default_rng(1), {"dense": 0.0, "msa_32": 0.03, "window_32": 0.03})
  (one,) = isoflop.judge(found)
  (text,) = isoflop_section._verdict(runs.Study("s", []), found)
  low = one.against["window_32"][1]
  assert one.word == "confirmed by locality" and low < -isoflop.SMALLEST
  assert f"that selection adds up to {-low:.4f} is not excluded)" in text.text


def test_what_is_not_bracketed_or_bends_down_supports_no_word():
  rng = np.random.default_rng(2)
  small = fits(rng, {"dense": 0.0, "msa_32": 0.2}, sizes=(0.2e6, 0.3e6, 0.44e6, 0.6e6))
  (one,) = isoflop.judge(small)
  assert one.word == "undecided" and math.isnan(one.budget)
  falling = [p for p in planted(rng, "dense", noise=0.0)]
  for p in falling:
    p.row.values[METRIC] = 2 - 0.1 * math.log(p.parameters) - 0.02 * math.log(p.parameters / 2e6) ** 2
  assert isoflop.fit(falling, METRIC) == "no minimum: the fitted curve bends down"
  assert isoflop.fit(falling[:2], METRIC) == "too few sizes for a parabola"


def test_a_gain_without_a_window_to_compare_with_has_no_cause():
  (one,) = isoflop.judge(fits(np.random.default_rng(5), {"dense": 0.0, "msa_8": 0.03, "window_32": 0.03}))
  assert one.word == "confirmed, cause open" and set(one.against) == {"dense"} and one.window is None


def test_seeds_of_a_run_are_no_further_sizes():
  """What the parabola misses at a size is the same for its seeds: three of them must not narrow the intervals."""
  rng, inside = np.random.default_rng(6), []
  for draw in range(100):
    one = planted(rng, "dense")
    found = isoflop.fit(one + [dataclasses.replace(p, seed=s) for p in one for s in (1, 2)], METRIC, draw)
    assert found.df == 15 - 7
    inside += [o.loss_between[0] <= best_loss(c) <= o.loss_between[1] for c, o in found.optima.items()]
  assert np.mean(inside) >= 0.92


def test_the_multiplier_is_what_was_planted():
  """A gain of .05 ln 2 at every budget is worth twice the FLOPs, and equal seconds at half the speed."""
  of = fits(np.random.default_rng(3), {"dense": 0.0, "msa_32": 0.05 * math.log(2)}, noise=0.002)[METRIC]
  for by, true in (("budget", 2.0), ("seconds", 1.0)):
    value, low, high, bound = isoflop.multiplier(of["msa_32"], of["dense"], by)
    assert low < true < high and value == pytest.approx(true, rel=0.15) and high / low < 1.6 and not bound
    again = isoflop.multiplier(of["dense"], of["msa_32"], by)
    assert again[0] == pytest.approx(1 / value) and again[1:3] == pytest.approx((1 / high, 1 / low))
  far = fits(np.random.default_rng(3), {"dense": 0.0, "msa_32": 0.3}, noise=0.002)[METRIC]  # better at a ninth already
  assert isoflop.multiplier(far["msa_32"], far["dense"])[0::3] == (pytest.approx(9), True)


def test_losses_that_are_no_parabolas_are_bracketed_as_often_as_it_says():
  """As the main study has them, at budgets where the largest sizes have seen too few tokens and are whole bits off."""
  sizes = np.array([0.44e6, 1.26e6, 2.83e6, 10.05e6, 28.2e6])
  cost = lambda n: 6 * n + 8e7 * (n / 3e6) ** 0.5   # FLOPs per token, long attention included
  truth = lambda n, c: 1.13 + 0.26 * (n / 5e6) ** -0.34 + 0.36 * (c / cost(n) / 5e7) ** -0.67
  rng, inside, off = np.random.default_rng(7), [], []
  grid = np.geomspace(sizes[0], sizes[-1], 2000)
  for draw in range(60):
    points = planted(rng, "dense", sizes=tuple(sizes))
    for p in points:
      p.row.values[METRIC] = truth(p.parameters, p.budget) + rng.normal(0, 0.006)
    for budget, o in isoflop.fit(points, METRIC, draw).optima.items():
      best = grid[truth(grid, budget).argmin()]
      if o.bracketed:
        inside.append((o.between[0] <= best <= o.between[1], o.loss_between[0] <= truth(best, budget)
                       <= o.loss_between[1]))
        off.append(o.loss_between[1] - o.loss_between[0])
  assert len(inside) >= 60 and (np.mean(inside, axis=0) >= 0.92).all(), np.mean(inside, axis=0)
  assert np.median(off) < 0.2  # with equal weights .4


def test_the_experiment_spends_its_budgets_and_its_report_says_so(tmp_path, request):
  study = experiment.get_config("slice=true,context=1024,block=32,budgets=1e13+3e13+9e13,least=1,most=1e9,sizes="
                                "2XS+XS+S+M,examples=4")
  for one in study.arms:
    method, budget = isoflop.ARM.match(one.arm).groups()
    spent = flops.cumulative(one, one.schedule.steps)
    assert spent == pytest.approx(float(budget), rel=0.6 / one.schedule.steps), one.arm
  forward = lambda one: sum(flops.forward(one, 1024, one.schedule.stages[-1].mode).values())
  cost = {(one.arm, one.size): forward(one) for one in study.arms}
  for size in ("2XS", "M"):
    assert 0.98 <= cost["window_32_9e13", size] / cost["msa_32_9e13", size] <= 1.0
  top = {one.arm: one.eval.run_modes for one in study.arms if one.size == "M"}
  assert top["msa_32_9e13"] == ("sparse", "sparse:num_blocks=2", "dense")
  assert top["msa_32_1e13"] == ("sparse",)
  for wrong, said in (("sizes=M+Q", "sizes = 'M.Q': Q is none of 2XS, XS"), ("shares=0", "shares = '0': whole numbers"),
                      ("budgets=nan", "budgets = 'nan': numbers of at least 1"), ("batch=0", "batch = 0: above 0"),
                      ("block=4096", "shares, block = 32, 4096: 1/32 of 16384 tokens has no block")):
    with pytest.raises(ValueError, match=said):
      experiment.get_config(wrong)

  rng, jobs = np.random.default_rng(4), []
  for one in study.arms:
    method, budget = isoflop.ARM.match(one.arm).groups()
    n = flops.parameters(one)["non_embedding"]
    loss = 1.6 - 0.05 * math.log(float(budget) / 3e13) + 0.05 * math.log(n / 2e6) ** 2 - 0.04 * (method != "dense")
    run = tmp_path / f"study/runs/{one.arm}-{one.size}-s0"
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config_lib.to_dict(one)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": k, "seed": 0, "stage": 0, "loss": 1.0, "tokens": 1e6 * k, "tokens_per_second": 1e5,
         "flops": float(budget)}) + "\n" for k in (1, 2)))
    rows = [{**records.make("language", split="val", document=f"d{i}", start=0, second_half_bytes=10,
                            second_half_bits_per_byte=loss + 0.2 * ("num_blocks=2" in mode) + rng.normal(0, 0.002)),
             "seed": 0, "arm": one.arm, "size": one.size, "step": 2, "run_mode": mode}
            for mode in one.eval.run_modes for i in range(3)]
    (run / "eval/2.json").write_text(json.dumps({"step": 2, "records": rows}))
    (run / "DONE").write_text("{}")
    jobs.append({"run": f"runs/{run.name}", "arm": one.arm, "size": one.size, "seeds": [0], "status": "done"})
  (tmp_path / "study/study.json").write_text(json.dumps({
      "name": "isoflop", "arms": list(dict.fromkeys(one.arm for one in study.arms)), "dense_arm": study.dense,
      "reference_arm": study.reference, "quantities": ["A"], "sections": ["isoflop"], "jobs": jobs}))
  loaded = archive.load([tmp_path / "study"])
  found = isoflop.points(loaded, endpoints.rows(loaded))
  assert len(found) == len(study.arms)
  sparse = next(p for p in found if (p.method, p.size, p.budget) == ("msa_32", "M", 9e13))
  dense = next(p for p in found if (p.method, p.size, p.budget) == ("dense", "M", 9e13))
  assert sparse.parameters == dense.parameters                   # the selector's are left out
  assert sparse.inference["sparse"] == pytest.approx(cost["msa_32_9e13", "M"])
  assert (sparse.inference["sparse"] < sparse.inference["sparse:num_blocks=2"]
          < sparse.inference["dense"] == pytest.approx(dense.inference["dense"]))
  assert dense.seconds == pytest.approx(20)
  shared = dataclasses.replace(loaded, speeds={"msa_32_9e13-M": 1e4})  # of runs that share devices, where measured
  seconds = {(p.method, p.size, p.budget): p.seconds for p in isoflop.points(shared, endpoints.rows(shared))}
  assert seconds["msa_32", "M", 9e13] == pytest.approx(200) and math.isnan(seconds["dense", "M", 9e13])
  text = report.write([tmp_path / "study"], tmp_path / "out").markdown.read_text()
  assert "msa_32, bits per byte, second half of the context: **confirmed by locality** (at 9e+13 FLOPs" in text
  assert "One seed: a word about these runs" in text and "| dense | 1e+13 | 4 |" in text
  head = text.partition("### Which endpoints count")[0]  # what is judged stands there, and no other verdict does
  assert "next section: Larger and sparse, or smaller and dense?**" in head and "**confirmed by locality**" in head
  assert "No verdict" not in head and "not excluded" not in text and "runs are missing" not in text
  for name in ("isoflop", "isoflop_cost", "isoflop_inference"):
    assert (tmp_path / f"out/plots/{name}.png").stat().st_size > 5000
  for name in ("window_32_9e13-M-s0", "window_32_9e13-S-s0"):
    (tmp_path / f"study/runs/{name}/DONE").unlink()
  request.getfixturevalue("quick")
  text = report.write([tmp_path / "study"], tmp_path / "cut").markdown.read_text()
  assert "2 of 36 runs are missing, and fits do without them: window_32_9e13 (S, M)." in text


def test_the_reduction_of_a_million_tokens_is_the_published_one(tmp_path):
  found = {(what, n): ratio for what, n, ratio in experiment.reduction(tmp_path / "reduction.png")}
  assert found["attention FLOPs, blocks of 128", 2 ** 20] == pytest.approx(28.4, abs=0.05)
  assert found["measured, forward, blocks of 128", 65536] == pytest.approx(3.89, abs=0.01)
  assert found["measured, forward, blocks of 128", 2 ** 20] == pytest.approx(35594.82 / 1171.69, abs=0.01)
  assert found["measured, forward and backward, blocks of 128", 2 ** 18] == pytest.approx(7329.06 / 329.94, abs=0.01)
