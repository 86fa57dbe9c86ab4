"""Tests of nsa/schedule.py and nsa/optim.py: what learns when and how fast, and what stays bit for bit."""
import dataclasses

from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import config as config_lib, methods, model as model_lib, optim, schedule, stacking
from nsa.config import LearningRate, ScheduleConfig, Stage

ALL = ("backbone", "selector", "branch", "memory")


def make_config(plan, attention=None, **model):
  shape = dict(vocab_size=320, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
               short_conv=2)
  config = config_lib.Config(model=config_lib.ModelConfig(**{**shape, **model}), schedule=plan,
                             attention=attention or methods.MSA(block_size=8, num_blocks=2, index_dim=4))
  config.data.context, config.data.global_batch = 64, 4
  return config


def modes(plan):
  config = make_config(plan)
  return [schedule.at(config, step).mode for step in range(plan.steps)]


# --- stages -------------------------------------------------------------------------


@given(steps=st.integers(1, 5000), weights=st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_stages_cover_every_step_once(steps, weights):
  weights = weights if sum(weights) else [1] * len(weights)
  plan = ScheduleConfig(steps, [Stage(w / sum(weights)) for w in weights])
  edges = config_lib.steps_of(plan)
  assert [step for first, end in edges for step in range(first, end)] == list(range(steps))
  for (first, end), weight in zip(edges, weights):
    assert abs((end - first) - steps * weight / sum(weights)) <= 1.000001  # each edge by a half


@pytest.mark.parametrize("plan,want", [
    (schedule.dense(5), {"dense": 5}),
    (schedule.native(100, 0.1), {"warmup": 10, "sparse": 90}),
    (schedule.native(7, 0), {"sparse": 7}),
    (schedule.retrofit(100, 0.25, 0.2), {"dense": 75, "warmup": 5, "sparse": 20}),
    (schedule.retrofit(100, 0.25, 0), {"dense": 75, "sparse": 25}),
    (schedule.retrofit(10, 1.0, 0.5), {"warmup": 5, "sparse": 5}),
    (schedule.selector_only(50, 0.2), {"dense": 40, "warmup": 10}),
    (schedule.sparse_to_dense(50, 0.1), {"sparse": 45, "dense": 5}),
    (schedule.retrofit_within(200, 0.25, warmup_steps=7), {"dense": 150, "warmup": 7, "sparse": 43}),
    (schedule.retrofit_after(300, 0.05, warmup_steps=4), {"dense": 300, "warmup": 4, "sparse": 11}),
    (schedule.retrofit_after(300, 0.05, warmup_steps=0, train="selector"), {"dense": 300, "warmup": 15}),
    (schedule.dense_continuation(300, 0.05), {"dense": 315}),
    (schedule.context_curriculum(40, 32, 0.5, "sparse"), {"sparse": 40}),
    (schedule.retrofit_of_import(20, warmup_steps=6), {"warmup": 6, "sparse": 14}),
    (schedule.retrofit_of_import(20, warmup_steps=0), {"sparse": 20}),
    (schedule.retrofit_of_import(20, warmup_steps=6, train="selector"), {"warmup": 20}),
    (schedule.as_it_is(), {"dense": 1}),
])
def test_common_schedules(plan, want):
  config_lib.validate(make_config(plan))
  assert modes(plan) == [mode for mode, count in want.items() for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_mixed_takes_its_share_of_dense_steps_and_all_its_programs_are_known(share):
  plan = schedule.mixed(2000, share)
  seen = modes(plan)
  assert abs(seen.count("dense") / 2000 - share) < 4 * (0.25 / 2000) ** 0.5
  assert modes(plan) == seen
  config = make_config(plan)
  known = {step.program for step in schedule.programs(config)}
  assert known == {schedule.at(config, step).program for step in range(2000)}


def test_programs_begin_where_the_run_begins_and_are_shared():
  config = make_config(schedule.retrofit(100, 0.5, 0.2))
  assert [step.mode for step in schedule.programs(config)] == ["dense", "warmup", "sparse"]
  assert [step.mode for step in schedule.programs(config, 60)] == ["sparse"]
  native = make_config(schedule.native(100, 0.2))
  assert schedule.at(native, 90).program == schedule.at(config, 90).program
  config.schedule.stages.append(dataclasses.replace(config.schedule.stages[0], fraction=0.0))
  assert len(schedule.programs(config)) == 3


def test_stages_set_context_weights_learning_rate_and_groups():
  plan = ScheduleConfig(10, [Stage(0.5, "sparse", context=32, loss_weights={"index_kl": 0.5}),
                             Stage(0.3, "sparse", train="selector", learning_rate=0.1, enter="copy_kv"),
                             Stage(0.2, "dense")], LearningRate(peak=1.0, plan="constant", warmup=0))
  config = make_config(plan)
  first, second, again, last = (schedule.at(config, step) for step in (0, 5, 6, 9))
  assert (first.context, first.batch, first.loss_weights) == (32, 8, (("index_kl", 0.5),))
  assert first.groups == ALL and second.groups == ("selector",) and last.groups == ("backbone",)
  assert (second.context, second.batch, second.learning_rate) == (64, 4, pytest.approx(0.1))
  assert (second.enter, again.enter) == ("copy_kv", "") and second.program == again.program
  assert schedule.at(make_config(schedule.native(10, 0.5)), 0).groups == ("backbone", "selector")


def rates(**kw):
  plan = ScheduleConfig(kw.pop("steps", 100), learning_rate=LearningRate(**kw))
  return np.array([schedule.learning_rate(plan, step) for step in range(plan.steps)])


def test_learning_rates():
  wsd = rates(peak=2.0, plan="wsd", warmup=0.1, decay=0.2, final=0.1)
  np.testing.assert_allclose(wsd[:10], 2.0 * np.arange(1, 11) / 10)
  np.testing.assert_allclose(wsd[10:80], 2.0)
  np.testing.assert_allclose(wsd[80:], 0.2 + 1.8 * np.arange(19, -1, -1) / 20)
  cosine = rates(peak=2.0, plan="cosine", warmup=0.1, final=0.1)
  np.testing.assert_allclose(cosine[:10], wsd[:10])
  np.testing.assert_allclose(cosine[10:], 0.2 + 0.9 * (1 + np.cos(np.pi * np.arange(90) / 89)))
  np.testing.assert_allclose(rates(peak=3.0, plan="constant", warmup=0.02)[2:], 3.0)
  for plan in ("wsd", "cosine"):
    assert rates(peak=1.0, plan=plan, final=0.05)[-1] == pytest.approx(0.05)
    assert np.isfinite(rates(peak=1.0, plan=plan, steps=1)).all()


def test_a_finished_model_is_warmed_up_again_and_its_control_has_the_same_rates():
  kw = dict(peak=2.0, warmup=0.1, decay=0.2, final=0.1)
  plan = schedule.retrofit_after(100, 0.5, warmup_steps=20, restart=config_lib.Restart(peak=0.5, warmup=0.2, decay=0.4),
                                 **kw)
  got = np.array([schedule.learning_rate(plan, step) for step in range(150)])
  # the finished model's own plan, not a stretched one
  np.testing.assert_array_equal(got[:100], rates(**kw))
  np.testing.assert_allclose(got[100:110], 0.2 + 0.8 * np.arange(1, 11) / 10)
  np.testing.assert_allclose(got[110:130], 1.0)
  np.testing.assert_allclose(got[130:], 0.1 + 0.9 * np.arange(19, -1, -1) / 20)
  control = schedule.dense_continuation(100, 0.5, restart=config_lib.Restart(peak=0.5, warmup=0.2, decay=0.4), **kw)
  assert [schedule.learning_rate(control, step) for step in range(150)] == list(got)
  # The selector learns at its peak throughout its warm-up, then as the plan says.
  config = make_config(plan)
  config.optimizer.selector_learning_rate = 5.0
  selector = [schedule.at(config, step).selector_learning_rate for step in range(150)]
  np.testing.assert_allclose(selector[100:120], 5.0)
  np.testing.assert_allclose(selector[120:], 5 * got[120:])


@pytest.mark.parametrize("make,words", [
    (lambda: schedule.retrofit_within(100, 0.1, warmup_steps=2, decay=0.2), "budget = 0.1.*decay.*retrofit_after"),
    (lambda: schedule.retrofit_within(100, 0.3, warmup_steps=30), "warmup_steps = 30.*below the budget's 30 steps"),
    (lambda: schedule.retrofit_after(100, 0.001, warmup_steps=0), "budget = 0.001.*no step"),
])
def test_budgets_that_measure_something_else_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


# --- the optimizer ------------------------------------------------------------------


METHODS = {"msa": methods.MSA(block_size=8, num_blocks=2, index_dim=4),
           "nsa": methods.NSA(block_size=8, num_blocks=3, compress_len=4, compress_stride=2, window=8)}


def random_tree(tree, seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), tree)


def flat(params):
  return optim.by_path(params)


def setup(method, **options):
  config = make_config(schedule.dense(1), METHODS[method])
  config.optimizer = config_lib.OptimizerConfig(**options)
  params = random_tree(model_lib.abstract_params(config), 0)
  transforms = optim.make(config)
  return config, params, transforms, optim.init(transforms, params)


@pytest.mark.parametrize("name,optimizer", [("msa", "adamw"), ("msa", "muon"), ("nsa", "adamw")])
def test_frozen_groups_stay_bit_for_bit(name, optimizer):
  _, params, transforms, state = setup(name, name=optimizer)
  other = "selector" if name == "msa" else "branch"
  step = jax.jit(lambda learns, grads, state, params: optim.update(transforms, learns, grads, state, params,
                                                                   (1e-2, 1e-2)),
                 static_argnums=0)
  for learns in (("backbone",), (other,)):
    new, new_state, norms = params, state, None
    for i in range(3):
      new, new_state, norms = step(learns, random_tree(params, 1 + i), new_state, new)
    assert set(norms) == set(learns)
    before, after = optim.split(params, transforms.groups), optim.split(new, transforms.groups)
    for group in before:
      for path, leaf in before[group].items():
        assert bool((leaf == after[group][path]).all()) == (group not in learns), path
      same = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), state[group], new_state[group]))
      assert all(same) == (group not in learns)


def test_split_and_join_are_inverses_and_groups_are_those_that_parameters_name():
  config, params, _, _ = setup("nsa")
  groups = optim.split(params, optim.groups_of(config))
  assert set(groups) == {"backbone", "branch"}
  assert {"embed", "stacks.stack0.attention.k.weight", "stacks.stack0.mlp.down"} <= set(groups["backbone"])
  assert all(".branch." in path for path in groups["branch"])
  jax.tree.map(np.testing.assert_array_equal, optim.join(params, groups), params)


def test_adamw_takes_the_textbook_step_with_each_group_clipped_apart():
  config, params, transforms, state = setup("msa", clip=0.5, selector_clip=0.25, weight_decay=0.1)
  grads = random_tree(params, 1, 1e-4)
  scale = lambda leaves, by: jax.tree.map(lambda g: g * by, leaves)
  grads = optim.join(grads, {group: scale(leaves, 1e6 if group == "selector" else 1.0)
                             for group, leaves in optim.split(grads, transforms.groups).items()})
  step = jax.jit(lambda state, params: optim.update(transforms, ALL, grads, state, params, (0.01, 0.02)))
  new, new_state, norms = step(state, params)
  new, _, _ = step(new_state, new)
  decays = flat(model_lib.param_metadata(config, "decay"))
  got, start, flat_grads = flat(new), flat(params), flat(grads)
  o = config.optimizer
  norm = {}
  for group, leaves in optim.split(grads, transforms.groups).items():
    norm[group] = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in leaves.values()))
    np.testing.assert_allclose(norms[group], norm[group], rtol=1e-5)
  assert norm["selector"] > 1 and norm["backbone"] < 0.5  # and the backbone is not clipped
  for path, p in start.items():
    group = "selector" if ".selector." in path else "backbone"
    g = np.asarray(flat_grads[path], np.float64) * (0.25 / norm[group] if group == "selector" else 1.0)
    p, m, v = np.asarray(p, np.float64), 0.0, 0.0
    for t in (1, 2):
      m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g * g
      u = m / (1 - o.b1 ** t) / (np.sqrt(v / (1 - o.b2 ** t)) + o.eps)
      p = p - 0.01 * (2.0 if group == "selector" else 1.0) * (u + (0.1 * p if decays[path] else 0.0))
    np.testing.assert_allclose(got[path], p, rtol=1e-4, atol=1e-6, err_msg=path)
  assert {path for path, decay in decays.items() if not decay} == {
      path for path in decays if path.endswith(("norm", "taps"))}


def test_zero_clip_means_no_clipping():
  _, params, transforms, state = setup("msa", clip=0.0, selector_clip=0.0, weight_decay=0.0, eps=1.0)
  grads = random_tree(params, 1, 100.0)
  new, _, _ = jax.jit(lambda: optim.update(transforms, ALL, grads, state, params, (1.0, 1.0)))()
  assert float(jnp.abs(new["embed"] - params["embed"]).mean()) > 0.9  # clipped: 1e-3


def muon_matrix(path, x):
  """One layer's update as the matrix that Muon orthogonalises: [matrices, rows, columns]."""
  if path.endswith(".out"):
    return x.reshape(len(x), -1, x.shape[-1])
  if path.endswith((".inner", ".outer")):
    return x.reshape(-1, *x.shape[2:])
  return x.reshape(len(x), x.shape[1], -1)


@pytest.mark.parametrize("name", ["msa", "nsa"])
def test_muon_updates_are_orthogonal_with_the_rms_of_adam(name):
  config, params, transforms, state = setup(name, name="muon", weight_decay=0.0, clip=0.0, selector_clip=0.0)
  grads = random_tree(params, 1)
  new, _, _ = jax.jit(lambda: optim.update(transforms, ALL, grads, state, params, (1.0, 1.0)))()
  decays, before, after = flat(model_lib.param_metadata(config, "decay")), flat(params), flat(new)
  for path, p in before.items():
    update = np.asarray(p - after[path], np.float64)
    if not decays[path] or path == "embed":  # Adam's first step is the gradient's sign
      np.testing.assert_allclose(update, np.sign(flat(grads)[path]), atol=1e-3, err_msg=path)
      continue
    for matrix in muon_matrix(path, update):
      rows, columns = matrix.shape
      singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
      # Five Newton-Schulz steps bring singular values near 1, the smallest ones of a square matrix aside.
      assert singular.max() < 1.3 and np.median(singular) > 0.6, path
      rms = np.sqrt((matrix ** 2).mean())
      assert 0.1 < rms < 0.3, (path, rms)  # Adam's is about 0.2 (arXiv 2502.16982)


def test_copy_kv_copies_into_every_branch_and_nothing_else():
  config, params, _, _ = setup("nsa")
  new = stacking.enter(config, params, "copy_kv")
  attention, old = new["stacks"]["stack0"]["attention"], params["stacks"]["stack0"]["attention"]
  branch = attention["method"]["branch"]
  for x in "kv":
    for target in (f"{x}_cmp", f"{x}_win"):
      for part in branch[target]:
        np.testing.assert_array_equal(branch[target][part], old[x][part])
  np.testing.assert_array_equal(branch["k_cmp_norm"], old["k"]["norm"])
  changed = {path for path, leaf in flat(params).items() if not bool((leaf == flat(new)[path]).all())}
  assert changed == {path for path in flat(params) if any(f".{x}_{t}" in path for x in "kv" for t in ("cmp", "win"))}
  moba = make_config(schedule.dense(1), methods.MoBA(key_conv=3))  # has a group "branch" too, and no such surgery
  params = model_lib.abstract_params(moba)
  assert stacking.enter(moba, params, "copy_kv") == params
