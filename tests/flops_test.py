"""Tests of nsa/flops.py: published ratios, counts by hand, and XLA's own count where it can see."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import config as config_lib, flops, methods, model as model_lib, schedule
from nsa.config import ModelConfig

L, D, N, K, H, F, V = 3, 16, 4, 2, 4, 24, 320
PROJECTIONS = 2 * L * (D * N * H + 2 * D * K * H + N * H * D + 3 * D * F)
T = 50


def make_config(attention, plan=None, **model):
  shape = dict(vocab_size=V, num_layers=L, d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=F)
  config = config_lib.Config(model=ModelConfig(**{**shape, **model}), attention=attention,
                             schedule=plan or schedule.dense(1))
  config.data.context, config.data.global_batch = T, 2
  return config


def test_msa_reductions_are_the_published_ones():
  model = ModelConfig(num_heads=64, num_kv_heads=4, head_dim=128)
  assert methods.MSA() == methods.MSA(block_size=128, num_blocks=16, index_dim=128)
  for power, want in ((15, 6.4), (16, 10.7), (17, 16.0), (19, 25.6), (20, 28.4)):
    assert flops.attention_reduction(methods.MSA(), model, 2 ** power) == pytest.approx(want, rel=0.03), power
  assert flops.attention_reduction(methods.MSA(), model, 2 ** 20) == pytest.approx(28.44, abs=0.05)


def test_nsa_reads_are_the_published_ones():
  model = ModelConfig(num_heads=64, num_kv_heads=4, head_dim=192)
  for context, tokens in ((8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)):
    assert sum(methods.NSA().reads(model, context).values()) == pytest.approx(tokens)


def mean_over_queries(count):
  return sum(count(t) for t in range(T)) / T


def test_dense_forward_by_hand():
  parts = flops.forward(make_config(methods.Dense()), T, "dense")
  assert parts == {"projections": PROJECTIONS, "unembedding": 2 * V * D,
                   "dense": pytest.approx(L * 4 * N * H * mean_over_queries(lambda t: t + 1))}


def test_msa_forward_by_hand():
  attention, Hi = methods.MSA(block_size=8, num_blocks=3, index_dim=6), 6
  config = make_config(attention)
  selector = 2 * L * (D * K * Hi + D * Hi)
  parts = flops.forward(config, T, "sparse")
  assert parts == {"projections": PROJECTIONS + selector, "unembedding": 2 * V * D,
                   "selected": pytest.approx(L * 4 * N * H * mean_over_queries(lambda t: min(t + 1, 24))),
                   "index": pytest.approx(L * 2 * K * Hi * mean_over_queries(lambda t: t + 1))}
  assert flops.forward(config, T, "dense") == flops.forward(make_config(methods.Dense()), T, "dense")
  config.layers = ("dense",) + ("attention",) * (L - 1)
  prefix = flops.forward(config, T, "sparse")
  assert prefix["index"] == pytest.approx(parts["index"] * 2 / 3) and prefix["dense"] > 0
  assert prefix["projections"] == PROJECTIONS + selector * 2 // 3


def test_nsa_forward_by_hand():
  attention = methods.NSA(block_size=8, num_blocks=3, compress_len=4, compress_stride=2, window=12)
  parts = flops.forward(make_config(attention), T, "sparse")
  visible = mean_over_queries(lambda t: sum(c * 2 + 3 <= t for c in range(T)))
  block = 2 * (4 * H * 2 * H + 2 * H * H)  # one compressed vector of one head: [4 H] -> [2 H] -> [H]
  assert parts == {
      "projections": PROJECTIONS + 2 * L * (4 * D * K * H + D * N * 3), "unembedding": 2 * V * D,
      "compressed": pytest.approx(L * 4 * N * H * visible), "scores": pytest.approx(L * 2 * N * H * visible),
      "compression_mlp": pytest.approx(L * 2 * K * block / 2),
      "selected": pytest.approx(L * 4 * N * H * mean_over_queries(lambda t: min(t + 1, 24))),
      "window": pytest.approx(L * 4 * N * H * mean_over_queries(lambda t: min(t + 1, 12)))}


def test_training_counts_backward_passes_where_gradient_flows():
  attention, Hi = methods.MSA(block_size=8, num_blocks=3, index_dim=6), 6
  config = make_config(attention, schedule.selector_only(10, 0.5))
  kl, teacher = L * 2 * K * Hi * (T + 1) / 2, L * 2 * N * H * (T + 1) / 2
  forward = flops.forward(config, T, "warmup")
  distil = flops.training(config, schedule.at(config, 9))
  assert distil == {**forward, "index_kl": pytest.approx(3 * kl), "teacher": pytest.approx(teacher)}
  config.schedule = schedule.native(10, 0.5)
  warmup = flops.training(config, schedule.at(config, 0))
  assert warmup == {**{part: 3 * cost for part, cost in forward.items()}, "index_kl": pytest.approx(3 * kl),
                    "teacher": pytest.approx(teacher)}
  sparse, forward = flops.training(config, schedule.at(config, 9)), flops.forward(config, T, "sparse")
  assert sparse["selected"] == 3 * forward["selected"]
  assert sparse["index"] == forward["index"]  # a top-k has no gradient
  assert sparse["index_kl"] == pytest.approx(3 * L * 2 * K * Hi * mean_over_queries(lambda t: min(t + 1, 24)))


def test_cumulative_adds_up_steps_of_all_stages():
  stages = [config_lib.Stage(0.3, "dense", context=25), config_lib.Stage(0.7, "mixed", dense_share=0.4)]
  for plan in (schedule.retrofit(20, 0.5, 0.2), config_lib.ScheduleConfig(20, stages)):
    config = make_config(methods.MSA(block_size=8, num_blocks=2, index_dim=4), plan)
    each = [flops.per_step(config, schedule.at(config, step)) for step in range(20)]
    for steps in (0, 7, 20):
      assert flops.cumulative(config, steps) == pytest.approx(sum(each[:steps]))
    assert len(set(each)) >= 3


def test_parameters_are_counted_by_group():
  config = make_config(methods.MSA(block_size=8, num_blocks=2, index_dim=6), tie_embeddings=False)
  count = flops.parameters(config)
  assert count["selector"] == L * (D * K * 6 + 6 + D * 6 + 6)
  assert count["total"] - count["non_embedding"] == 2 * V * D
  assert count["total"] == sum(x.size for x in jax.tree.leaves(model_lib.abstract_params(config)))


def test_dense_count_is_near_xlas():
  model = dict(vocab_size=64, num_layers=1, d_model=128, num_heads=2, num_kv_heads=1, head_dim=128,
               mlp_dim=256, qk_norm=False)
  config, length = make_config(methods.Dense(), **model), 128
  params = model_lib.abstract_params(config)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  run = jax.jit(lambda p, t: model_lib.forward(config, p, t, mode="dense").logits)
  analysis = run.lower(params, tokens).cost_analysis()
  ours = flops.forward(config, length, "dense")
  # XLA multiplies the masked half too.
  expected = length * (ours["projections"] + ours["unembedding"] + ours["dense"] * 2 * length / (length + 1))
  np.testing.assert_allclose(analysis["flops"], expected, rtol=0.05)
