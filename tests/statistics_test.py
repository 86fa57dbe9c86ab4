"""nsa.report.statistics against hand computations, closed forms and simulations with fixed seeds."""
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
from scipy import special

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
  assert math.isnan(statistics.t_test([0.1])) and math.isnan(statistics.tost([0.1], 0.2))  # no hypothesis under Holm


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
  for n, alpha in ((2, 0.05), (3, 0.025), (6, 0.025 / 16)):  # few seeds, Holm's first test: a large noncentrality
    rng, effect = np.random.default_rng(n), statistics.smallest_detectable_effect(1.0, n, alpha=alpha)
    x = rng.normal(effect, 1, (200_000, n))
    t = x.mean(1) * math.sqrt(n) / x.std(1, ddof=1)
    assert np.mean(np.abs(t) > special.stdtrit(n - 1, 1 - alpha / 2)) == pytest.approx(0.8, abs=0.004)
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


def test_sign_flip_by_hand_and_at_its_stated_rate():
  # 3 of one sign: of 8 flips two are as far from 0 as +++ (+++ and ---).
  assert statistics.sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
  # |1 + 2 - 3| = 0: every flip is as far. |1 - 2 + 4| = 3: +-+3, ++-1, +++7, -++5 and mirrors: 6 of 8 are at least 3.
  assert statistics.sign_flip([1.0, 2.0, -3.0]) == 1.0
  assert statistics.sign_flip([1.0, -2.0, 4.0]) == pytest.approx(6 / 8)
  assert statistics.sign_flip([0.1] * 5) == pytest.approx(0.0625) and math.isnan(statistics.sign_flip([1.0]))
  assert statistics.sign_flip(np.ones(20)) == pytest.approx(2.0 ** -16, rel=1e-9)
  rng = np.random.default_rng(6)
  rate = np.mean([statistics.sign_flip(x) <= 0.0625 for x in rng.standard_cauchy((2000, 6))])  # no normality needed
  assert abs(rate - 0.0625) < 3 * math.sqrt(0.0625 * 0.9375 / 2000)


def test_leave_one_out_and_two_groups():
  p = statistics.leave_one_out([0.010, 0.011, 0.009, -0.02])
  assert len(p) == 4 and p[3] < 0.05 < min(p[:3]) and statistics.leave_one_out([1.0, 2.0]) == []
  assert p[3] == pytest.approx(statistics.t_test([0.010, 0.011, 0.009]))
  assert statistics.two_groups([0.95, 0.3, 0.97, 0.35, 0.99], 0.2) == ([0.3, 0.35], [0.95, 0.97, 0.99])
  assert (statistics.two_groups([0.90, 0.95, 0.99], 0.2) is None
          and statistics.two_groups([0.1, 0.4, 0.7, 1.0], 0.2) is None)
  assert statistics.two_groups([0.5], 0.2) is None
