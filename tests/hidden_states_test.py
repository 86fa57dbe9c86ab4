"""Measures of hidden states against NumPy in float64, and the snapshots that a run takes of them."""
import copy
import json
import shutil

import commands
import jax
import numpy as np
import pytest

from nsa import config as config_lib, data, evaluate, methods, model as model_lib, records, schedule, train
from nsa.data import counter, planting
from nsa.look import hidden_states, snapshots

# --- measures ---


def reference(x):
  """MEASURES of one vector, float64."""
  D = len(x)
  p = np.sort(x ** 2)[::-1] / np.sum(x ** 2)
  positive = p[p > 0]
  hoyer = (np.sqrt(D) - np.abs(x).sum() / np.sqrt(np.sum(x ** 2))) / (np.sqrt(D) - 1)
  return [hoyer, p[:round(0.05 * D)].sum(), p[:round(0.1 * D)].sum(), np.sum(x ** 2) ** 2 / np.sum(x ** 4) / D,
          np.exp(-np.sum(positive * np.log(positive))) / D]


def spectral_reference(x):
  values = np.linalg.eigvalsh(np.cov(x.T))
  return values.sum() ** 2 / np.sum(values ** 2) / x.shape[1]


def draws(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def test_measures_are_those_of_float64():
  x = draws(20, 96) * np.exp(draws(20, 1)) * np.exp(draws(96, seed=1))  # some dimensions far larger than others
  x[0, 5:] = 0
  np.testing.assert_allclose(hidden_states.measures(x), [reference(one) for one in x], rtol=2e-5, atol=1e-6)
  x = draws(3, 50, 24) @ np.diag(np.exp(draws(24, seed=2)))
  np.testing.assert_allclose(hidden_states.spectral_participation(x), [spectral_reference(one) for one in x], rtol=1e-4)


def test_measures_at_their_bounds_and_of_noise():
  D = 100
  alone, alike = np.eye(1, D)[0], np.ones(D)
  np.testing.assert_allclose(hidden_states.measures(np.stack([alone, alike])),
                             [[1, 1, 1, 1 / D, 1 / D], [0, 0.05, 0.1, 1, 1]], atol=1e-5)
  noise = hidden_states.gaussian(256, 2000)
  # sqrt D (1 - sqrt(2 / pi)) / (sqrt D - 1); 2 (z phi(z) + Q(z)) of the share's z; 1/3; exp(-(psi(3/2) + log 2)).
  root = np.sqrt(2000)
  expected = [root * (1 - np.sqrt(2 / np.pi)) / (root - 1), 0.2791, 0.4390, 1 / 3, 0.4821]
  assert noise["mean"][:5] == pytest.approx(expected, abs=1.5e-3)
  assert noise["mean"][5] == pytest.approx(256 / (256 + 2000), rel=0.02) and (noise["sd"] < 1e-3).all()


@pytest.mark.parametrize("scale", (1e-6, 37.0, 1e5))
def test_scale_changes_no_measure_and_a_rotation_only_those_of_vectors(scale):
  x = draws(2, 60, 64) * np.exp(2 * draws(64, seed=3))
  turned = x @ hidden_states.rotation(64)
  np.testing.assert_allclose(hidden_states.measures(scale * x), hidden_states.measures(x), rtol=1e-4)
  for other in (scale * x, turned):
    np.testing.assert_allclose(hidden_states.spectral_participation(other), hidden_states.spectral_participation(x),
                               rtol=1e-3)
  np.testing.assert_allclose(hidden_states.rotation(64) @ hidden_states.rotation(64).T, np.eye(64), atol=1e-5)
  before, after = (np.asarray(hidden_states.measures(y)).mean((0, 1)) for y in (x, turned))
  assert before[1] > 0.8 and after[1] < 0.4  # a few large dimensions are spread over all


def test_the_largest_dimensions_are_left_out():
  x = draws(200, 100)
  x[:, 17] *= 1000
  (keep,) = hidden_states.kept(np.mean(x ** 2, 0)[None])
  assert sorted(set(range(100)) - set(keep)) == [17]
  found = hidden_states.summary(x[None], np.full((1, 200), 1 / 200), hidden_states.rotation(100), keep)
  own, _, trimmed = np.asarray(found["measures"])[0]
  np.testing.assert_allclose(trimmed, np.mean([reference(one) for one in np.delete(x, 17, 1)], 0), rtol=1e-4)
  assert own[1] > 0.9 and trimmed[1] < 0.3
  expected = [spectral_reference(y) for y in (x, np.delete(x, 17, 1))]
  np.testing.assert_allclose(np.asarray(found["spectral"])[0], expected, rtol=1e-3)


# --- snapshots ---

T = 128  # tokens of a passage here


@pytest.fixture(scope="module", autouse=True)
def short_passages():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(planting, "SIZE", T)
    patch.setattr(snapshots, "EXAMPLES", 4)
    patch.setattr(snapshots, "PASSAGES", 3)
    yield


def archive(tmp_path):
  for split, count in (("train", 3), ("val", 2), ("ood", 1)):
    (tmp_path / split).mkdir()
    for i in range(count):
      noise = counter.integers(counter.key("hidden", split, i), np.arange(12_000 if split == "train" else 1_000), 60)
      (tmp_path / split / f"{i}.txt").write_bytes((32 + noise).astype(np.uint8).tobytes())
  return tmp_path


def make_config(tmp_path, attention=None, steps=6):
  attention = attention or methods.MSA(index_dim=8, block_size=32, num_blocks=3)
  shape = dict(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32)
  dense = attention.name == "dense"
  stages = schedule.dense(steps) if dense else schedule.native(steps, selector_warmup=0.5)
  return config_lib.Config(
      arm=attention.name, size="tiny", seeds=(3,), attention=attention, model=config_lib.ModelConfig(**shape),
      schedule=stages,
      data=config_lib.DataConfig(source=f"files:{archive(tmp_path)}", context=T, global_batch=4, task_rows=1,
                                 tasks=("mqar:pairs=4",), planted=0.9),
      eval=config_lib.EvalConfig(sequences=1, batch=4, run_modes=("dense",), task_examples=1,
                                 hidden_states=(0, 2, steps)),
      checkpoint=config_lib.CheckpointConfig(every=3), log_every=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp("hidden")
  (root / "text").mkdir()
  config = make_config(root / "text")
  train.train(copy.deepcopy(config), root / "run", progress=False)
  return config, root / "run"


def read(workdir, step):
  (found,) = json.loads((workdir / f"hidden/{step}.json").read_text())["snapshots"]
  return found


def test_what_was_trained_stays_when_something_fails_behind_it(run, tmp_path, monkeypatch):
  config, write = copy.deepcopy(run[0]), train.metrics.write_json
  def fail(path, what, **options):
    if path.name == "DONE":
      raise FileNotFoundError(path)
    write(path, what, **options)
  monkeypatch.setattr(train.metrics, "write_json", fail)
  with pytest.raises(FileNotFoundError):
    train.train(config, tmp_path / "run", progress=False)
  assert {"config.json", "metrics.jsonl", "checkpoints", "eval"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_measures_at_its_steps(run):
  config, workdir = run
  assert sorted(p.name for p in (workdir / "hidden").iterdir()) == ["0.json", "2.json", "6.json"]
  first, early, last = (read(workdir, step) for step in (0, 2, 6))
  assert first.keys() == records.HIDDEN_STATES.keys()
  assert [s["run_mode"] for s in (first, early, last)] == ["dense", "dense", "sparse"]
  kinds = [snap["kind"] for snap in (first, early, last)]
  counts = {kind: kinds[0].count(kind) for kind in dict.fromkeys(kinds[0])}
  assert counts == {"planted": 20, "held_out": 3, "ood": 3, "shuffled": 3, "recall": 20}
  assert kinds[0] == kinds[1] == kinds[2]
  source = data.make(config.data, 3)
  assert first["planted"][:20] == [0] * 20
  assert last["planted"][:20] == [p.planted for p in source.planted(6)] and sum(last["planted"][:20]) == int(18 * 0.9)
  assert sum(early["planted"][:20]) == int(6 * 0.9) and last["times"][:20] == [0, 1, 4, 16, 64] * 4
  items = len(kinds[0])
  for snap in (first, early, last):
    assert snap["points"] == [0, 1, "norm"]
    for variant, of in snap["values"].items():
      for measure, rows in of.items():
        rows = np.array(rows, float)
        assert rows.shape == (items, 3), (variant, measure)
        of_recall = np.isfinite(rows[29:])  # a single state, of the last points
        assert np.isfinite(rows[:29]).all() and not of_recall[:, 0].any()
        assert (of_recall[:, 1:] == (not measure.startswith("spectral"))).all()
        assert (rows[:29] > 0).all() and (rows[:29] <= 1).all()
    assert set(snap["values"]["rotated"]) == set(hidden_states.MEASURES)
    entropy = np.array(snap["entropy"])
    assert entropy.shape == (items, 2) and (entropy > 0).all() and (entropy < np.log(T)).all()
  assert first["captured_mass"][0] == [None, None] and 0 < last["captured_mass"][0][1] < 1
  # Untrained, a byte costs about what 320 ids do; shuffled text has the bytes of held-out text.
  assert np.mean(first["bits_per_byte"][:20]) == pytest.approx(np.log2(320), abs=1.5)
  found = snapshots.items(config, 2, source)
  for a, b in zip(*([i for i in found if i.kind == kind] for kind in ("held_out", "shuffled"))):
    assert sorted(a.tokens) == sorted(b.tokens) and (a.tokens != b.tokens).any()


def test_what_is_measured_is_what_the_model_says(run):
  """One passage and one recall item by hand, from the parameters of the last checkpoint."""
  config, workdir = run
  _, params, _ = evaluate.open_run(workdir)
  last = read(workdir, 6)
  found = snapshots.items(config, 6, data.make(config.data, 3))
  for at in (7, last["kind"].index("recall") + 3):
    tokens, states = found[at].tokens.astype(np.int32), []

    def keep(x, layer):
      return {"x": x}

    out = model_lib.forward(config, params, tokens[None, :-1], mode="sparse", losses=False, states=keep,
                            observe=lambda *_: {})
    states = [*np.asarray(out.layers[0]["x"], np.float64)[:, 0], np.asarray(out.hidden, np.float64)[0]]
    nll = -np.asarray(jax.nn.log_softmax(out.logits))[0, np.arange(T), tokens[1:]] / np.log(2)
    rows = slice(-1, None) if found[at].last else slice(None)
    assert last["bits_per_byte"][at] == pytest.approx(nll[rows].mean(), rel=1e-4)
    turn = np.asarray(hidden_states.rotation(32), np.float64)
    for point, x in enumerate(states):
      if found[at].last and not point:
        continue
      left = np.delete(x, last["trimmed"][point], 1)
      for variant, y in (("own", x), ("rotated", x @ turn), ("trimmed", left)):
        expected = np.mean([reference(one) for one in y[rows]], 0)
        measured = [last["values"][variant][m][at][point] for m in hidden_states.MEASURES]
        np.testing.assert_allclose(measured, expected, rtol=2e-4, err_msg=f"{variant} {point}")


def test_recall_ends_with_a_query_of_one_of_its_pairs():
  for pairs in snapshots.PAIRS:
    for item in snapshots._recall(pairs, 512):
      key, value = item.tokens[-2:]
      assert len(item.tokens) == 513 and 1 <= key < 128 <= value
      before = np.flatnonzero(item.tokens[:-2] == key)
      assert len(before) == 1 and item.tokens[before[0] + 1] == value and 511 - (before[0] + 1) == item.distance
      assert (item.tokens < 128).sum() == 2 * pairs


def test_measuring_changes_no_bit_of_training_and_nothing_is_measured_twice(run, tmp_path, monkeypatch):
  config, workdir = run
  plain = copy.deepcopy(config)
  plain.eval.hidden_states = ()
  train.train(plain, tmp_path / "plain", progress=False)
  assert not (tmp_path / "plain/hidden").exists()
  assert commands.logged(tmp_path / "plain") == commands.logged(workdir)
  for a, b in zip(*(jax.tree.leaves(evaluate.open_run(w)[1]) for w in (tmp_path / "plain", workdir))):
    np.testing.assert_array_equal(a, b)
  # Cut at step 3, with the snapshots of steps 0 and 2 there; the rest of the run takes the last one alone.
  took, real = [], snapshots.take
  monkeypatch.setattr(snapshots, "take", lambda *a, **k: took.append(a[3]) or real(*a, **k))
  real_at = train.schedule.at

  def cut(config, step):
    if step == 4 and len(took) < 3:
      raise OSError("cut")
    return real_at(config, step)

  monkeypatch.setattr(train.schedule, "at", cut)
  with pytest.raises(RuntimeError):
    train.train(copy.deepcopy(config), tmp_path / "cut", progress=False)
  monkeypatch.setattr(train.schedule, "at", real_at)
  assert took == [0, 2]
  train.train(copy.deepcopy(config), tmp_path / "cut", progress=False)
  assert took == [0, 2, 6]
  for step in (0, 2, 6):
    assert read(tmp_path / "cut", step) == read(workdir, step)


def test_a_fork_measures_from_behind_its_fork_on(run, tmp_path):
  config, workdir = run
  fork = copy.deepcopy(config)
  fork.arm, fork.fork = "fork", config_lib.ForkConfig(str(workdir), step=3)
  fork.eval.hidden_states = (0, 2, 3, 5)
  train.train(fork, tmp_path / "fork", progress=False)
  assert [p.name for p in (tmp_path / "fork/hidden").iterdir()] == ["5.json"]
  assert read(tmp_path / "fork", 5)["arm"] == "fork"


def test_steps_beyond_the_run_are_refused(tmp_path):
  config = make_config(tmp_path)
  config.eval.hidden_states = (0, 7)
  with pytest.raises(config_lib.ConfigError, match="eval.hidden_states = .0, 7.: steps from 0 to schedule.steps = 6"):
    config_lib.validate(config)


def test_the_launcher_reports_a_run_and_measures_one_that_was_not(run, tmp_path):
  config, workdir = run

  def look(*arguments, code=0):
    return commands.run("launch.look", *arguments, code=code)[1]

  look(f"--workdir={workdir}", "--hidden_states", f"--out={tmp_path / 'out'}")
  text = (tmp_path / "out/hidden_states.md").read_text()
  assert "| msa | 3 | 0, 2, 6 | 3 | sparse |" in text and "planted 20" in text
  assert "No slope over exposure: it takes two documents or seeds" in text
  # A run that was not measured in training, and has nothing planted.
  plain = shutil.copytree(workdir, tmp_path / "plain", ignore=shutil.ignore_patterns("hidden"))
  tree = json.loads((plain / "config.json").read_text())
  tree["data"]["planted"] = 0.0
  (plain / "config.json").write_text(json.dumps(tree))
  look(f"--workdir={plain}", "--hidden_states", "--passages=2")
  found, theirs = read(plain, 6), read(workdir, 6)
  counts = {kind: found["kind"].count(kind) for kind in dict.fromkeys(found["kind"])}
  assert counts == {"held_out": 2, "ood": 2, "shuffled": 2, "recall": 80} and found["run_mode"] == "sparse"
  assert "Nothing is judged here" in (plain / "hidden_report/hidden_states.md").read_text()
  mine, other = (snap["bits_per_byte"][snap["kind"].index("recall")] for snap in (found, theirs))
  assert mine == pytest.approx(other, rel=1e-3)
  assert "--step=6: " in look(f"--workdir={plain}", "--hidden_states", "--step=6", code=2)
  assert "--hidden_states" in look(f"--workdir={plain}", code=2)
