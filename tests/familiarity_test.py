"""Statistics of hidden states on simulated snapshots with planted truths, and the report that shows them."""
import json
import re

import numpy as np
import pytest

from nsa import records
from nsa.look import familiarity, hidden_report
from nsa.look.hidden_states import MEASURES, VARIANTS

SEEDS, DOCUMENTS, PASSAGES = (1, 2, 3, 4), 7, 60


def simulated(arm, seed, step=100, slope=0.0, pairs_slope=0.0, draw=0, noise=0.0005):
  """A snapshot whose top_5 in the model's basis has `slope` per doubling of exposure, and `pairs_slope` of pairs.

  Passages and documents have levels of their own, the same for all arms of a seed; exposures are drawn by seed.
  """
  shared, own = np.random.default_rng((seed, draw)), np.random.default_rng((seed, draw, sum(map(ord, arm)), step))
  planted = shared.permutation(np.tile([0, 1, 4, 16, 64], PASSAGES // 5)).tolist()
  document = shared.integers(DOCUMENTS, size=PASSAGES)
  level = 0.28 + 0.004 * shared.standard_normal(DOCUMENTS)[document] + 0.002 * shared.standard_normal(PASSAGES)
  pairs = np.repeat([2, 4, 8, 16, 32], 16)
  kinds = ["planted"] * PASSAGES + ["held_out"] * 10 + ["ood"] * 10 + ["recall"] * len(pairs)
  y = np.concatenate([level + slope * np.log2(1 + np.array(planted)), 0.28 + 0.002 * shared.standard_normal(20),
                      0.28 + pairs_slope * np.log2(pairs) + 0.01 * shared.standard_normal(len(pairs))])
  y = y + noise * own.standard_normal(len(y))
  n, rest = len(kinds), len(kinds) - PASSAGES
  pad = lambda x, fill=None: x + [fill] * rest
  rows = np.round(np.stack([y, y - 0.001, y + 0.003], 1), 5).tolist()
  flat = (0.28 + 0.001 * own.standard_normal((n, 3))).round(5).tolist()
  of = lambda variant: {m: rows if (variant, m) == ("own", "top_5") else flat for m in MEASURES}
  values = {variant: of(variant) for variant in VARIANTS}
  values["own"]["spectral_participation"] = values["trimmed"]["spectral_participation"] = flat
  return records.snapshot(
      seed=seed, arm=arm, size="tiny", step=step, run_mode="dense", tokens=2048, width=64, points=[0, 1, "norm"],
      trimmed=[[0]] * 3, trimmed_energy=[0.05] * 3,
      null={v: {m: [0.279, 1e-4] for m in (*MEASURES, "spectral_participation")} for v in ("own", "trimmed")},
      kind=kinds, corpus=["code"] * n, document=[f"d{d}" for d in document] + ["other"] * rest,
      start=list(range(n)), times=pad(planted), planted=pad(planted, 0),
      pairs=[None] * (n - len(pairs)) + pairs.tolist(), distance=[None] * (n - len(pairs)) + own.integers(
          2, 500, len(pairs)).tolist(), bits_per_byte=own.uniform(1, 3, n).round(4).tolist(),
      correct=own.uniform(0, 1, n).round(4).tolist(), entropy=flat, captured_mass=[[None] * 3] * n, values=values)


def arms_of(steps=(100,), **slopes):
  """{arm: snapshots}; slopes by arm."""
  return {arm: [simulated(arm, seed, step, slope * (step == max(steps))) for seed in SEEDS for step in steps]
          for arm, slope in slopes.items()}


def test_a_slope_is_that_of_least_squares_and_its_error_that_of_cr2():
  rng = np.random.default_rng(0)
  unit = rng.integers(6, size=50)
  x, z, e = rng.standard_normal((3, 50))
  y = 0.7 * x + 2.0 * z + unit + e
  found = familiarity.slope(x, y, unit.tolist(), z)
  design = np.stack([x, z, *(np.equal(unit, u) for u in range(6))], 1).astype(float)
  b = np.linalg.lstsq(design, y, rcond=None)[0]
  assert found.slope == pytest.approx(b[0]) and found.units == 6 and found.passages == 50
  # By matrices, for x and z partialled out: (I - H_u)^(-1/2) on each unit's residuals.
  other = design[:, 1:]
  r, s = (a - other @ np.linalg.lstsq(other, a, rcond=None)[0] for a in (x, y))
  total = 0.0
  for u in range(6):
    mine = unit == u
    values, vectors = np.linalg.eigh(np.eye(mine.sum()) - np.outer(r[mine], r[mine]) / (r @ r))
    total += (r[mine] @ vectors @ np.diag(values ** -0.5) @ vectors.T @ (s - b[0] * r)[mine]) ** 2
  assert found.error == pytest.approx(np.sqrt(total) / (r @ r), rel=1e-6)
  assert np.isnan(familiarity.slope(x, y, [0] * 50).p) and np.isnan(familiarity.slope([], [], []).slope)


def test_intervals_hold_what_they_say_where_passages_share_a_document():
  """1,000 draws without a slope, with slopes of the documents' own: 5 % of the intervals leave out 0."""
  rng, outside = np.random.default_rng(1), 0
  for _ in range(1000):
    unit = np.repeat(np.arange(28), 1 + rng.multinomial(240 - 28, np.full(28, 1 / 28)))
    x = np.log2(1 + rng.choice([0, 1, 4, 16, 64], 240))
    y = rng.standard_normal(28)[unit] + 0.2 * rng.standard_normal(28)[unit] * x + rng.standard_normal(240)
    low, high = familiarity.slope(x, y, unit.tolist()).interval()
    outside += low > 0 or high < 0
  assert 0.03 <= outside / 1000 <= 0.075


def test_a_planted_slope_is_found_and_one_that_is_not_there_is_not():
  judged = {(t.arm, t.against): t for t in familiarity.judge(arms_of(dense=0.0, native=-0.003, small=-0.0005))}
  assert set(judged) == {("dense", ""), ("native", ""), ("small", ""), ("native", "dense"), ("small", "dense")}
  native, small, dense = (judged[arm, ""] for arm in ("native", "small", "dense"))
  assert native.word == "matters" and native.found.slope == pytest.approx(-0.003, abs=3e-4) and native.p < 1e-6
  assert small.word == "too small" and small.p < 0.05 and dense.word == "too small" and dense.p > 0.05
  assert judged["native", "dense"].word == "matters" and judged["small", "dense"].word == "too small"
  assert native.found.passages == len(SEEDS) * PASSAGES and native.found.units == len(SEEDS) * DOCUMENTS
  # The same passages: what they have of their own is gone from a difference.
  assert judged["native", "dense"].found.error < 0.8 * native.found.error
  # An arm that is missing is two tests that failed, and the rest is judged as with them.
  cut = {(t.arm, t.against): t for t in familiarity.judge(arms_of(dense=0.0, native=-0.003, small=-0.0005), missing=1)}
  assert cut["native", ""].p == pytest.approx(7 / 5 * native.p) and cut["native", ""].low < native.low
  few = [simulated("native", 1, noise=0.05)]
  assert [t.word for t in familiarity.judge({"native": few})] == ["undecided"]
  other = [simulated("dense", seed, draw=9) for seed in SEEDS]  # other passages
  assert [t.against for t in familiarity.judge({"dense": other, **arms_of(native=0.0)})] == ["", ""]


def test_exposure_is_what_was_planted_by_then():
  snapshot = simulated("dense", 1)
  x = familiarity.exposure(snapshot)
  assert sorted(set(x[:PASSAGES])) == pytest.approx(np.log2([1, 2, 5, 17, 65])) and np.isnan(x[PASSAGES:]).all()
  snapshot["planted"][:PASSAGES] = [0] * PASSAGES  # before the first planting there is nothing to regress on
  assert familiarity.judge({"dense": [snapshot]}) == []


def test_difficulty_is_correlated_by_example_and_not_by_level():
  found = {c.what: c for c in familiarity.difficulty([simulated("dense", s, pairs_slope=0.001) for s in SEEDS])}
  by_pairs = found["log2 of the pairs of recall"]
  # SD of log2 pairs 1.41, of the noise .0102: r = .00141 / sqrt(.00141^2 + .0102^2) = .137.
  assert 0.02 < by_pairs.r < 0.27 and by_pairs.of_means > 2 * by_pairs.r
  assert (by_pairs.examples, by_pairs.seeds) == (80, 4)
  # As wide as 80 examples make it, whatever the seeds: 1.96 / sqrt(77) = .223.
  assert 0.2 < by_pairs.r - by_pairs.low < 0.4
  assert found["the same, given loss and distance"].r == pytest.approx(by_pairs.r, abs=0.1)
  assert abs(found["loss of recall"].r) < 0.25 and found["loss of held-out text"].examples == 10
  quintiles = familiarity.by_quintile([simulated("dense", s) for s in SEEDS])
  assert len(quintiles) == 5 and [loss for loss, _ in quintiles] == sorted(loss for loss, _ in quintiles)


def test_a_correlation_is_partial_of_its_covariates_and_within_its_groups():
  rng = np.random.default_rng(2)
  z, e, f = rng.standard_normal((3, 4000))
  assert familiarity.correlation(z + e, z + f) == pytest.approx(0.5, abs=0.04)
  assert familiarity.correlation(z + e, z + f, None, z) == pytest.approx(0, abs=0.04)
  group = rng.integers(2, size=4000)
  assert familiarity.correlation(9 * group + e, 9 * group + f) > 0.9
  assert familiarity.correlation(9 * group + e, 9 * group + f, group) == pytest.approx(0, abs=0.04)
  assert np.isnan(familiarity.correlation([1, 1, 1, 1], [1, 2, 3, 4]))


def test_the_report_says_what_is_judged_and_draws_noise_and_rotation(tmp_path, request):
  arms = arms_of((0, 10, 100), dense=0.0, native=-0.003)
  text = hidden_report.write(arms, tmp_path).read_text()
  row = next(line for line in text.splitlines() if line.startswith("| native |") and "matters" in line)
  assert re.search(r"\| -0\.00[23]\d+ \|", row) and "| too small |" in text
  assert "A slope of 0.002 per doubling of exposure matters" in text and "not there yet" not in text
  request.getfixturevalue("quick")
  cut = hidden_report.write(arms, tmp_path / "cut", planned=("dense", "native", "window")).read_text()
  assert "Planned and not there yet: window." in cut
  for name, figure, caption in hidden_report.figures(arms):
    assert (tmp_path / f"plots/{name}.png").stat().st_size > 5000 and f"plots/{name}.png" in text
    assert "independent normal numbers" in caption and "a random one" in caption
    assert len(figure.axes) == 4 and all(any(line.get_label() == "noise" for line in ax.lines) for ax in figure.axes)
    assert [figure.axes[i].get_ylabel().splitlines()[1] for i in (0, 2)] == ["own basis", "rotated basis"]
  one = {"dense": [simulated("dense", 1)]}
  one["dense"][0]["planted"] = [0] * len(one["dense"][0]["planted"])
  assert "Slope over exposure" not in hidden_report.write(one, tmp_path / "one").read_text()
  with pytest.raises(ValueError, match="no run has a snapshot"):
    hidden_report.write({"dense": []}, tmp_path)
  json.dumps(arms["dense"][0])
