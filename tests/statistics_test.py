"""nsa.report.statistics against hand computations, closed forms and simulations with fixed seeds."""
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from nsa.report import statistics


def test_t_interval_by_hand_and_for_one_and_two_values():
  x = [0.1, 0.2, 0.4]  # mean 7/30, sd = sqrt(7/300), t(2, 0.975) = 4.302653
  interval = statistics.t_interval(x)
  half = 4.302652729911275 * math.sqrt(7 / 300) / math.sqrt(3)
  assert interval.mean == pytest.approx(7 / 30) and interval.half_width == pytest.approx(half, rel=1e-9)
  assert interval.high - interval.mean == pytest.approx(half, rel=1e-9) and not interval.excludes_zero
  two = statistics.t_interval([1.0, 3.0])
  assert two.half_width == pytest.approx(12.706204736, rel=1e-8)  # t(1, 0.975) * sqrt(2) / sqrt(2)
  one = statistics.t_interval([0.3])
  assert one.mean == 0.3 and one.n == 1 and math.isnan(one.low) and not one.bounded and not one.excludes_zero


def test_t_interval_covers_the_truth_in_95_percent_of_studies():
  rng = np.random.default_rng(0)
  for n in (2, 3, 5):
    studies = [statistics.t_interval(x) for x in rng.normal(0.7, 0.2, (4000, n))]
    coverage = np.mean([i.low <= 0.7 <= i.high for i in studies])
    assert abs(coverage - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_paired_differences_keep_only_common_seeds():
  seeds, d = statistics.paired_differences({0: 1.0, 2: 5.0, 7: 3.0}, {2: 4.0, 0: 1.5, 9: 0.0})
  assert seeds == [0, 2]
  np.testing.assert_allclose(d, [-0.5, 1.0])
  assert statistics.paired_differences({0: 1.0}, {1: 1.0})[0] == []


def test_words_follow_both_one_sided_tests_and_the_interval():
  assert statistics.judge([0.001, -0.001, 0.0005], 0.01).word == "matches"
  assert statistics.judge([0.049, 0.052, 0.051], 0.01).word == "differs"
  assert statistics.judge([0.02, -0.03, 0.01], 0.01).word == "undecided"
  # A difference that is surely there and surely below the margin: it matches, and the interval shows it.
  small = statistics.judge([0.0050, 0.0051, 0.0049], 0.01)
  assert small.word == "matches" and small.interval.excludes_zero and small.p_difference < 0.01
  one = statistics.judge([0.0], 0.01)
  assert one.word == "no interval" and math.isnan(one.p_tost) and math.isnan(one.detectable)
  # TOST by hand: mean 0.002, sd 0.001, n 4: t = (0.01 - 0.002) / 0.0005 = 16, and with 3 degrees of
  # freedom P(T > t) = 1/2 - (u / (1 + u^2) + arctan u) / pi, u = t / sqrt(3).
  u = 16 / math.sqrt(3)
  x = np.array([-1.0, -1.0, 1.0, 1.0]) * math.sqrt(3) / 2 * 0.001 + 0.002
  assert statistics.tost(x, 0.01) == pytest.approx(0.5 - (u / (1 + u * u) + math.atan(u)) / math.pi, rel=1e-9)


def test_tost_is_wrong_at_most_5_percent_of_the_time_on_the_margin():
  rng = np.random.default_rng(1)
  passed = np.mean([statistics.tost(x, 0.01) <= 0.05 for x in rng.normal(0.01, 0.002, (4000, 3))])
  assert 0.03 < passed < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(1e-3, 1))
def test_matches_means_both_tests_and_differs_means_zero_is_excluded(values, margin):
  judgement = statistics.judge(values, margin)
  mirrored = statistics.judge([-v for v in values], margin)
  assert judgement.word == mirrored.word
  assert (judgement.word == "matches") == (judgement.p_tost <= 0.05)
  if judgement.word == "differs":
    assert judgement.interval.low > 0 or judgement.interval.high < 0
  if judgement.word == "matches":  # TOST at 5 % is the 90 % interval inside the margin
    ninety = statistics.t_interval(values, 0.90)
    assert -margin <= ninety.low + 1e-12 and ninety.high - 1e-12 <= margin


def test_values_that_cannot_be_judged_are_refused():
  with pytest.raises(ValueError, match="values is empty"):
    statistics.t_interval([])
  with pytest.raises(ValueError, match="not finite"):
    statistics.t_interval([0.1, math.nan])
  with pytest.raises(ValueError, match="margin = 0"):
    statistics.tost([0.1, 0.2], 0)


def test_holm_by_hand():
  # 0.01*4, 0.02*3, 0.03*2, 0.04*1 and the running maximum.
  np.testing.assert_allclose(statistics.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
  np.testing.assert_allclose(statistics.holm([0.5, math.nan, 0.01]), [0.5, math.nan, 0.02])
  np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1.0, 1.0])
  assert statistics.holm([]).shape == (0,)


def test_smallest_detectable_effect_has_the_power_it_claims():
  rng = np.random.default_rng(2)
  for n in (3, 5, 12):
    effect = statistics.smallest_detectable_effect(0.02, n)
    found = np.mean([statistics.t_interval(x).excludes_zero for x in rng.normal(effect, 0.02, (4000, n))])
    assert abs(found - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 4000)
  # The textbook value: n = 34 pairs find half a standard deviation (Cohen 1988: n = 33.4).
  assert statistics.smallest_detectable_effect(1.0, 34) == pytest.approx(0.5, abs=0.01)
  # Large n: (1.95996 + 0.84162) / sqrt(n).
  assert statistics.smallest_detectable_effect(1.0, 10_000) == pytest.approx(2.80158 / 100, rel=1e-3)
  assert math.isfinite(statistics.smallest_detectable_effect(1.0, 2))
  assert math.isnan(statistics.smallest_detectable_effect(1.0, 1))
  assert statistics.smallest_detectable_effect(0.0, 3) == 0


def test_hierarchical_bootstrap_sees_seeds_and_documents():
  rng = np.random.default_rng(3)
  covered, naive = 0, 0
  for study in range(300):
    seed_effect, document_effect = rng.normal(0, 0.01, (8, 1)), rng.normal(0, 0.02, (1, 12))
    x = 0.05 + seed_effect + document_effect + rng.normal(0, 0.01, (8, 12))
    interval = statistics.hierarchical_bootstrap(x, draws=400, seed=study)
    covered += interval.low <= 0.05 <= interval.high
    flat = x.reshape(-1)
    half = 1.96 * flat.std(ddof=1) / math.sqrt(flat.size)
    naive += abs(flat.mean() - 0.05) <= half
  assert 0.88 < covered / 300 <= 1.0 and naive / 300 < 0.75  # pooling all windows claims far too much
  # Weights and missing values: the mean is the weighted one, and one seed resamples documents only.
  interval = statistics.hierarchical_bootstrap([[1.0, 3.0, math.nan]], [[3.0, 1.0, 5.0]])
  assert interval.mean == pytest.approx(1.5) and (interval.low, interval.high) == (1.0, 3.0)
  with pytest.raises(ValueError, match="no finite value"):
    statistics.hierarchical_bootstrap([[math.nan]])


BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.13, 0.25, 0.5)


def test_budget_curve_is_recovered():
  truth = 0.02 + 0.003 * np.array(BUDGETS) ** -0.6
  exact = statistics.fit_budget_curve(BUDGETS, [truth, truth + 1e-6, truth - 1e-6])
  assert exact.fitted and exact.interval.mean == pytest.approx(0.02, abs=1e-4)
  assert exact.gamma == pytest.approx(0.6, abs=0.01) and exact.a == pytest.approx(0.003, rel=0.03)
  np.testing.assert_allclose(exact(BUDGETS), truth, atol=2e-5)
  rng = np.random.default_rng(4)
  covered = 0
  for study in range(60):
    y = truth + rng.normal(0, 0.004, (5, 1)) + rng.normal(0, 0.001, (5, 7))
    fit = statistics.fit_budget_curve(BUDGETS, y, draws=200, seed=study)
    covered += fit.interval.low <= 0.02 <= fit.interval.high
  assert covered / 60 >= 0.85


def test_budget_curve_says_why_it_cannot_be_fitted():
  fit = statistics.fit_budget_curve
  assert "at least 3 budgets, and 2 have" in fit([0.01, 0.1], [[1.0, 2.0]]).reason
  assert "and 1 has" in fit([0.01, 0.1, 0.2], [[1.0, math.nan, math.nan]]).reason
  assert "and 0 have" in fit([], np.zeros((1, 0))).reason
  assert "same at every budget" in fit([0.01, 0.1, 0.2], [[0.3, 0.3, 0.3]]).reason
  straight = -np.log([0.01, 0.1, 0.5])  # a line in log b: no level
  assert "does not level off" in fit([0.01, 0.1, 0.5], [straight] * 3).reason
  two = fit(BUDGETS, [0.02 + 0.003 * np.array(BUDGETS) ** -0.6] * 2)
  assert two.fitted and not two.interval.bounded and "2 seeds cannot be resampled" in two.note
  with pytest.raises(ValueError, match="above 0"):
    fit([0.0, 0.1, 0.2], [[1.0, 2.0, 3.0]])
  with pytest.raises(ValueError, match="must have the 2 budgets"):
    fit([0.1, 0.2], [[1.0, 2.0, 3.0]])


def test_budget_curve_of_noise_does_not_claim_a_limit():
  rng = np.random.default_rng(5)
  wrong = 0
  for study in range(40):
    fit = statistics.fit_budget_curve(BUDGETS, rng.normal(0, 0.003, (3, 7)), draws=200, seed=study)
    wrong += fit.fitted and fit.interval.excludes_zero
  assert wrong <= 8  # 3 seeds: conservative or close to it, not a machine for discoveries


def test_closed_fraction_needs_a_gap():
  free, native = {0: 1.5, 1: 1.6, 2: 1.55}, {0: 1.0, 1: 1.1, 2: 1.05}
  half = {s: (free[s] + native[s]) / 2 + d for s, d in zip(free, (0.01, -0.01, 0.0))}
  closed = statistics.closed_fraction(free, half, native)
  assert not closed.reason and closed.interval.mean == pytest.approx(0.5) and closed.interval.n == 3
  noisy = statistics.closed_fraction({0: 1.0, 1: 1.2, 2: 0.9}, native, {0: 1.1, 1: 1.0, 2: 1.0})
  assert "below 3 standard" in noisy.reason and noisy.interval is None
  assert "1 paired seed" in statistics.closed_fraction({0: 1.5}, {0: 1.2}, {0: 1.0}).reason
