"""The report on trained and training-free selectors, on A over tokens, and on arms beside the family."""
import numpy as np
import pytest

from nsa import config as config_lib, methods, schedule
from nsa.report import analyses, answer, document, endpoints, runs, sections, selectors, verdict

TEXT, SEEDS = "second_half_bits_per_byte", (1, 2, 3)
NOISE = dict(zip(SEEDS, (0.0, 0.001, 0.002)))
# arm -> (tokens, {run mode: (bits per byte, tokens that a query sees of 10, attention FLOPs of a query)})
ARMS = {
    "dense": (100, {"dense": (2.0, None, None), "quest": (2.3, 4.0, 180.0), "quest:num_blocks=1": (2.6, 2.0, 100.0),
                    "random": (3.0, 2.0, 64.0)}),
    "native": (100, {"sparse": (2.1, 4.0, 240.0), "sparse:num_blocks=1": (2.2, 2.0, 176.0),
                     "dense": (2.05, None, None)}),
    "after": (120, {"sparse": (1.95, 4.0, 240.0)}),
    "dense_after": (120, {"dense": (1.9, None, None)}),
    "dense_half": (50, {"dense": (2.5, None, None)}),
    "native_half": (50, {"sparse": (2.8, 4.0, 240.0)}),
    "to_dense": (100, {"dense": (2.02, None, None)}),
}


def run_of(arm, path):
  tokens, modes = ARMS[arm]
  dense = "sparse" not in modes
  model = config_lib.ModelConfig(num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_dim=2, mlp_dim=32)
  config = config_lib.to_dict(config_lib.Config(
      arm=arm, size="s", seeds=SEEDS, model=model, attention=methods.Dense() if dense else methods.MSA(index_dim=2),
      schedule=schedule.dense(10) if dense else schedule.native(10, selector_warmup=0)))
  records = []
  for seed in SEEDS:
    for mode, (bits, seen, cost) in modes.items():
      common = dict(seed=seed, arm=arm, size="s", run_mode=mode)
      shift = NOISE[seed] * (arm != "dense")
      records.append({"kind": "language", "split": "val", "document": "d", "second_half_bytes": 10,
                      TEXT: bits + shift, **common})
      if seen:
        records += [{"kind": "layer", "layer": k, "tokens_visible": seen, "tokens_causal": 10.0,
                     "attention_flops": cost, **common} for k in range(2)]
  logged = dict(step=1.0, stage=0.0, tokens=float(tokens), tokens_per_second=1.0, flops=1.0, mfu=0.1, loss=1.0)
  curves = {seed: {name: np.array([value]) for name, value in logged.items()} for seed in SEEDS}
  return runs.Run(path / arm, arm, "s", SEEDS, config, {}, curves, records, 10, "done")


@pytest.fixture
def study(tmp_path):
  return runs.Study("selectors", [run_of(arm, tmp_path) for arm in ARMS], declared=True, arms=list(ARMS), sizes=["s"],
                    endpoints=[runs.Endpoint(TEXT, 0.005)], reference="native", budgets={"after": 0.2},
                    controls={"after": "dense_after"},
                    branches={"dense": ["dense_half"], "native": ["native_half"]})


def test_ways_are_compared_with_the_dense_arm_of_as_many_tokens_by_what_they_see_and_cost(study, tmp_path):
  table = endpoints.rows(study)
  found = {(way.arm, way.mode): way for way in selectors.ways(study, table, "s")}
  assert list(found) == [("dense", "random"), ("dense", "quest:num_blocks=1"), ("native", "sparse:num_blocks=1"),
                         ("dense", "quest"), ("native", "sparse"), ("after", "sparse")]  # no shorter runs
  dense = 4 * 4 * 2 * 10.0  # FLOPs of a query that attends to 10 tokens
  for key, kind, seen, cost, minus in ((("dense", "quest"), "training-free", 0.4, 180, 0.3),
                                       (("dense", "random"), "control", 0.2, 64, 1.0),
                                       (("native", "sparse:num_blocks=1"), "trained", 0.2, 176, 0.2),
                                       (("after", "sparse"), "trained", 0.4, 240, 0.05)):
    way = found[key]
    assert (way.kind, way.seen, way.cost) == (kind, pytest.approx(seen), pytest.approx(cost / dense))
    assert way.differences[TEXT][1] == pytest.approx(minus)
  gallery = sections.Gallery(study, tmp_path, ("png",))
  page = document.markdown("x", selectors.section(study, table, "s", gallery))
  assert "| dense -> quest | training-free | 3 | 40.0 | 56 | +0.3000 (+0.3000 to +0.3000) |" in page
  assert (tmp_path / "selectors.png").stat().st_size > 5000
  study.runs = study.runs[:1]  # without a trained one there is nothing to compare
  assert selectors.ways(study, endpoints.rows(study), "s") == []


def test_a_over_tokens_is_of_runs_that_were_decayed_there(study, tmp_path):
  table = endpoints.rows(study)
  found = analyses.over_tokens(study, table, TEXT, "s")
  assert list(found) == [50, 100]
  assert found[50][3] == pytest.approx(-0.3) and found[100] == {s: pytest.approx(-0.1 - NOISE[s]) for s in SEEDS}
  gallery = sections.Gallery(study, tmp_path, ("png",))
  page = document.markdown("x", answer.sizes_and_tokens(study, table, gallery))
  assert "| s | 50 | 3 | -0.3000 |" in page and gallery.names == ["anchor"]
  study.branches = {}
  assert answer.sizes_and_tokens(study, table, gallery) == []


def test_what_a_difference_is_worth_in_tokens_is_read_off_denses_curve(study, tmp_path, monkeypatch):
  loss = lambda tokens: 1.2 + 0.5 * (tokens / 100) ** -0.7
  for arm, tokens, of in (("dense_quarter", 25, loss), ("dense_half", 50, loss), ("dense", 100, loss),
                          ("native_half", 50, lambda n: loss(0.9 * n)), ("native", 100, lambda n: loss(0.8 * n))):
    monkeypatch.setitem(ARMS, arm, (tokens, {mode: (of(tokens), 0, 0) for mode in ARMS.get(arm, (0, ["dense"]))[1]}))
  for seed in SEEDS:
    monkeypatch.setitem(NOISE, seed, 0.0)
  study.runs = [run_of(arm, tmp_path) for arm in ARMS]
  study.arms, study.branches = [*study.arms, "dense_quarter"], {"dense": ["dense_quarter", "dense_half"]}
  table = endpoints.rows(study)
  found = analyses.curve(study, table, TEXT, "s")
  assert (found.floor, found.exponent, found.at(100)) == tuple(map(pytest.approx, (1.2, 0.7, 1.7)))
  assert found.rho(100, loss(80) - loss(100)) == pytest.approx(0.8) and found.rho(50, 0.0) == pytest.approx(1.0)
  assert found.rho(100, -0.6) == float("inf")  # below the floor
  study.branches["native"] = ["native_quarter", "native_half"]
  page = document.markdown("x", answer.sizes_and_tokens(study, table, sections.Gallery(study, tmp_path, ("png",))))
  assert f"| s | native | 100 | 3 | {loss(80) - loss(100):+.4f} | 80.0 | 80.0 to 80.0 |" in page
  assert f"| s | native | 50 | 3 | {loss(45) - loss(50):+.4f} | 90.0 | 90.0 to 90.0 |" in page
  study.branches["dense"] = ["dense_half"]
  assert analyses.curve(study, table, TEXT, "s") is None


def test_arms_beside_the_family_stand_against_both_ends(study):
  """A curriculum arm says nothing beside native alone: what of native's lead, or lag, does it have?"""
  table = endpoints.rows(study)
  page = document.markdown("x", answer.exploratory(study, table, verdict.verdict(study, table)))
  row = next(line for line in page.splitlines() if line.startswith("| to_dense |"))
  assert row.startswith("| to_dense | 3 | -0.0800 (-0.0800 to -0.0800) | +0.0210 (")
  assert "quest" not in page  # the section on selectors has the run modes
