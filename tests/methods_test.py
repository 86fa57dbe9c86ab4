"""Tests of nsa/methods and nsa/model.py: each method against a slow reference, and what holds for all."""
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from methods_models import (
  ALL,
  KEY,
  METHODS,
  PRESERVING,
  REFERENCED,
  SELECTING,
  SMALL,
  WHOLE,
  B,
  T,
  V,
  logits_of,
  make_config,
  params_of,
  random_params,
  tokens_of,
  without_method,
)
import methods_oracle as oracle
import numpy as np
import one_layer
import pytest

from nsa import methods, model as model_lib, optim, schedule, sharding, stacking, step as step_lib

# --- one layer against the reference ----------------------------------------------


@functools.lru_cache(maxsize=None)
def attention_of(name):
  return one_layer.split(make_config(METHODS[name]))


@functools.lru_cache(maxsize=None)
def run_layer(name, mode):
  """Output, losses, block indices, and gradients of <output, weights> + index KL: one program."""
  graph, params = attention_of(name)
  rng = np.random.default_rng(5)
  h, weights = rng.standard_normal((2, B, T, 16)).astype(np.float32)

  def objective(params, h):
    call = one_layer.call(T, None, mode, KEY)
    seen = lambda q, k, indices, call: {} if indices is None else {"indices": indices}
    out, losses, seen, *_ = nnx.merge(graph, params)(h, call, None, seen)
    return jnp.sum(out * weights) + losses.get("index_kl", 0.0), (out, losses, seen)

  grads, (out, losses, seen) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, h)
  return h, weights, jax.device_get((grads, out, losses, seen.get("indices")))


def mask_of(name, mode, indices):
  if mode != "sparse" or name == "dense":
    return oracle.causal_mask(B, T, 2)
  return oracle.token_mask(indices, METHODS[name].block_size)


LAYERS = [(name, "sparse") for name in REFERENCED] + [("msa", "warmup")]


@pytest.mark.parametrize("name,mode", LAYERS)
def test_layer_output_equals_the_masked_reference(name, mode):
  h, _, (_, out, losses, indices) = run_layer(name, mode)
  params = oracle.as_float64(attention_of(name)[1])
  want, kl = oracle.layer(np, name, params, h.astype(np.float64), METHODS[name], mask_of(name, mode, indices))
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
  if name == "msa":
    assert kl > 0.01
    np.testing.assert_allclose(losses["index_kl"], kl, rtol=1e-4)
  else:
    assert not losses


@pytest.mark.parametrize("name,mode", LAYERS)
def test_layer_gradients_equal_those_of_the_masked_reference(name, mode):
  h, weights, (grads, _, _, indices) = run_layer(name, mode)
  plain = name if name in ("msa", "nsa", "gated") else "dense"  # the others differ by their mask alone
  want = oracle.gradients(plain, METHODS[name])(attention_of(name)[1], h, mask_of(name, mode, indices), weights)
  oracle.assert_gradients(grads, want)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", SELECTING)
def test_selected_sets_are_those_of_the_slow_selection(name):
  h, _, (_, _, _, indices) = run_layer(name, "sparse")
  options = METHODS[name]
  scores = oracle.block_scores(name, attention_of(name)[1], h, options)
  initial = options.num_initial
  assert initial == {"nsa": 1, "sink_window": 1}.get(name, 0) and options.num_local == (2 if name == "nsa" else 1)
  for b, t, r in np.ndindex(*indices.shape[:3]):
    own = t // options.block_size
    forced = set(range(max(0, own - options.num_local + 1), own + 1)) | set(range(initial))
    value = np.zeros(own + 1) if scores is None else scores[b, t, r]
    oracle.assert_chosen(indices[b, t, r].tolist(), range(own + 1), forced, value, options.num_blocks)


def test_random_blocks_are_uniform_and_differ_between_heads_queries_and_keys():
  options = methods.RandomBlocks(block_size=4, num_blocks=3)
  q, k = jnp.zeros((4, 64, 2, 4)), jnp.zeros((4, 64, 2, 4))
  pick = lambda seed: np.asarray(options.choose(q, k, methods.Call(key=jax.random.key(seed))))
  indices = pick(0)
  late = indices[:, 60:]  # the last block's queries: their own and 2 of the other 15
  counts = np.bincount(np.concatenate([pick(s)[:, 60:].ravel() for s in range(8)]), minlength=16)
  draws = 8 * late.size // 3
  assert counts[15] == draws
  expected = draws * 2 / 15
  assert ((counts[:15] - expected) ** 2 / expected).sum() < 36  # chi-square, 14 degrees of freedom, p = 0.001
  assert (indices != pick(1)).any() and (late[:, 0] != late[:, 1]).any()
  assert (late[:, :, 0] != late[:, :, 1]).any()
  with pytest.raises(ValueError, match="random key"):
    options.choose(q, k, methods.Call())


# --- what holds for whole models ----------------------------------------------------


@pytest.mark.parametrize("name", PRESERVING)
def test_enough_blocks_make_it_dense(name):
  params, tokens = params_of(name), tokens_of()
  dense = logits_of("dense")(without_method(params), tokens, WHOLE)
  np.testing.assert_allclose(logits_of(name, num_blocks=T // 8)(params, tokens, WHOLE), dense, rtol=1e-5, atol=1e-5)
  few = logits_of(name)(params, tokens, WHOLE)
  assert np.abs(few - dense).max() > 1e-2  # sparsity is on: no silent dense fallback
  np.testing.assert_allclose(few[:, :SMALL["block_size"] * 3], dense[:, :SMALL["block_size"] * 3], rtol=1e-5,
                             atol=1e-5)


CALLS = [(name, "sparse") for name in ALL] + [("msa", "warmup"), ("msa", "dense"), ("nsa", "dense")]


@pytest.mark.parametrize("name,mode", CALLS)
def test_no_token_changes_an_earlier_logit_by_a_bit(name, mode):
  params, tokens, run = params_of(name), tokens_of(), logits_of(name, mode)
  before = np.asarray(run(params, tokens, WHOLE))
  for t in (1, 37, T - 1):
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % V
    after = np.asarray(run(params, changed, WHOLE))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert (after[:, t] != before[:, t]).any()


@pytest.mark.parametrize("name", ALL)
def test_a_context_that_fits_no_grid_is_the_beginning_of_a_longer_one(name):
  length = 13  # no multiple of a block, a chunk, a segment or a compressed block
  got = jax.jit(lambda params, tokens: model_lib.forward(
      make_config(METHODS[name]), params, tokens, key=KEY, losses=False).logits)(
          params_of(name), tokens_of()[:, :length])
  want = logits_of(name)(params_of(name), tokens_of(), WHOLE)[:, :length]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_packed_documents_equal_documents_on_their_own(name):
  params, tokens, run = params_of(name), tokens_of(), logits_of(name)
  edges = (0, 24, 40, T)  # multiples of the block
  packed = np.broadcast_to(np.searchsorted(edges[1:], np.arange(T), side="right"), (B, T)).astype(np.int32)
  together = np.asarray(run(params, tokens, packed))
  for i, (first, end) in enumerate(zip(edges[:-1], edges[1:])):
    # Nothing of the other documents is seen, not by a bit.
    others = np.where(packed == i, tokens, tokens_of(9))
    np.testing.assert_array_equal(np.asarray(run(params, others, packed))[:, first:end], together[:, first:end])
    if name == "random":  # draws by absolute position: a document on its own sees other blocks
      continue
    alone = tokens_of(11)
    alone[:, :end - first] = tokens[:, first:end]
    segments = np.broadcast_to(np.arange(T) >= end - first, (B, T)).astype(np.int32)
    np.testing.assert_allclose(run(params, alone, segments)[:, :end - first], together[:, first:end],
                               rtol=1e-5, atol=1e-5)


@functools.lru_cache(maxsize=None)
def gradients_of(name, mode="sparse", **model):
  """jit: (params, a, b) -> gradients of a * LM loss + b * auxiliary losses, and both."""
  config = make_config(METHODS[name], **model)
  tokens = tokens_of()

  def objective(params, a, b):
    out = model_lib.forward(config, params, tokens[:, :-1], None, mode=mode, key=KEY)
    lm = -jnp.take_along_axis(jax.nn.log_softmax(out.logits), tokens[:, 1:, None], -1).mean()
    kl = sum(out.losses.values(), start=0.0)
    return a * lm + b * kl, (lm, kl)

  return jax.jit(jax.grad(objective, has_aux=True))


def largest_by_group(name, grads):
  groups = optim.groups_of(make_config(METHODS[name]))
  return {group: max(float(np.abs(g).max()) for g in leaves.values())
          for group, leaves in optim.split(grads, groups).items()}


@pytest.mark.parametrize("name,mode", [("msa", "sparse"), ("msa", "warmup"), ("dsa", "sparse"), ("seer", "sparse")])
def test_kl_trains_the_selector_alone_and_nothing_else_does(name, mode):
  params, gradients = params_of(name), gradients_of(name, mode)
  of_kl, (_, kl) = gradients(params, 0.0, 1.0)
  of_lm, _ = gradients(params, 1.0, 0.0)
  kl_groups, lm_groups = largest_by_group(name, of_kl), largest_by_group(name, of_lm)
  assert kl > 0 and kl_groups["selector"] > 1e-4 and kl_groups["backbone"] == 0
  assert lm_groups["selector"] == 0 and lm_groups["backbone"] > 1e-4


def test_the_lm_loss_trains_a_gated_selector_once_its_gain_is_not_zero():
  params, gradients = params_of("gated"), gradients_of("gated", "sparse")
  groups = largest_by_group("gated", gradients(params, 1.0, 0.0)[0])
  assert groups["selector"] > 1e-4 and groups["backbone"] > 1e-4
  at_zero = jax.tree_util.tree_map_with_path(lambda path, x: x * ("gain" not in str(path[-1])), params)
  grads = gradients(at_zero, 1.0, 0.0)[0]["stacks"]["stack0"]["attention"]["method"]
  assert np.abs(grads["gain"]).max() > 1e-5                                       # it leaves 0 by itself,
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads["selector"]))  # the index learns from then on
  shared = {k: v for k, v in at_zero["stacks"]["stack0"]["attention"]["method"].items() if k != "gain"}
  msa = {**at_zero, "stacks": {"stack0": {**at_zero["stacks"]["stack0"], "attention": {
      **at_zero["stacks"]["stack0"]["attention"], "method": shared}}}}
  np.testing.assert_allclose(logits_of("gated")(at_zero, tokens_of(), WHOLE), logits_of("msa")(msa, tokens_of(), WHOLE),
                             rtol=1e-5, atol=1e-5)  # a retrofit enters as MSA


def test_layers_share_the_choice_of_the_layer_that_has_the_index():
  params = params_of("msa_shared", num_layers=4)
  config = make_config(METHODS["msa_shared"], num_layers=4)
  seen = lambda method, q, k, lists, call: {"lists": lists}
  out = jax.jit(lambda params: model_lib.forward(config, params, tokens_of(), mode="sparse", observe=seen))(params)
  first, second, third, fourth = out.layers[0]["lists"]
  np.testing.assert_array_equal(first, second)
  np.testing.assert_array_equal(third, fourth)
  assert (np.sort(np.asarray(first), -1) != np.sort(np.asarray(third), -1)).any()
  alone = make_config(dataclasses.replace(METHODS["msa_shared"], period=1), num_layers=4)
  msa = make_config(METHODS["msa"], num_layers=4)
  got, want = (jax.jit(lambda params, c=c: model_lib.forward(c, params, tokens_of(), mode="sparse"))(params)
               for c in (alone, msa))
  np.testing.assert_array_equal(got.logits, want.logits)
  np.testing.assert_array_equal(got.losses["index_kl"], want.losses["index_kl"])
  # The loss is the mean over the layers that choose, and their indices alone learn.
  loss = lambda p: model_lib.forward(config, p, tokens_of(), mode="sparse").losses["index_kl"]
  grads = jax.jit(jax.grad(loss))(params)["stacks"]["stack0"]["attention"]["method"]["selector"]["q"]["weight"]
  assert [bool(np.abs(g).max() > 0) for g in grads] == [True, False, True, False]


@pytest.mark.parametrize("name", ["msa", "nsa"])
def test_remat_changes_neither_losses_nor_gradients(name):
  params = params_of(name)
  grads, losses = gradients_of(name, "sparse")(params, 1.0, 1.0)
  again, losses_again = gradients_of(name, remat="layer")(params, 1.0, 1.0)
  np.testing.assert_allclose(losses_again, losses, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, grads)


@pytest.mark.parametrize("name", ["msa", "dsa"])
def test_an_index_sees_the_tokens_that_attention_sees(name):
  """Keys and queries of both change at the same positions when one hidden state does: no index is blind to what
  the convolution brings to the attention that it has to imitate."""
  graph, params = attention_of(name)
  layer = nnx.merge(graph, params)
  h = np.random.default_rng(5).standard_normal((1, T, 16)).astype(np.float32)

  @jax.jit
  def seen(h):
    call = methods.Call(rope=lambda x, offset=0, stride=1: x)
    x, streams = layer.project(h, call)
    q_idx = jax.tree.leaves(layer.method.selector.queries(x.h, call))[0]
    return [y.reshape(T, -1) for y in (streams["k"], streams["k_idx"], x.q, q_idx)]

  moved = h.copy()
  moved[0, 20] += 1.0
  reach = [np.flatnonzero(np.abs(a - b).max(-1) > 1e-3).tolist() for a, b in zip(seen(h), seen(moved))]
  assert reach == [[20, 21, 22]] * 4, reach  # short_conv = 3


def test_an_index_with_the_weights_of_the_only_head_is_that_head():
  """MSA with one query head: its index branch can be the very attention that it learns from."""
  options = methods.MSA(index_dim=4, block_size=8, num_blocks=2)
  config = make_config(options, num_heads=1, num_kv_heads=1)
  params = random_params(model_lib.abstract_params(config))
  attention = params["stacks"]["stack0"]["attention"]
  run = jax.jit(lambda params: model_lib.forward(config, params, tokens_of()).losses["index_kl"])
  assert run(params) > 0.01
  attention["method"]["selector"] = {"q": attention["q"], "k": attention["k"]}
  assert abs(run(params)) < 1e-6


def leaves_of(params):
  return optim.by_path(params)


def test_all_arms_start_from_the_same_weights():
  initial = {name: leaves_of(model_lib.init_params(make_config(METHODS[name]), 5)) for name in ("dense", "msa", "nsa")}
  for name in ("msa", "nsa"):
    assert set(initial["dense"]) < set(initial[name])
    for path, leaf in initial["dense"].items():
      np.testing.assert_array_equal(initial[name][path], leaf, err_msg=path)
    added = set(initial[name]) - set(initial["dense"])
    assert all((".selector." if name == "msa" else ".branch.") in path for path in added)


@pytest.mark.parametrize("name", ["msa", "nsa", "dsa", "seer", "moba", "infllm_v2", "ssa"])
def test_dense_mode_is_the_dense_method_bit_for_bit(name):
  params = params_of(name)
  np.testing.assert_array_equal(logits_of(name, "dense")(params, tokens_of(), WHOLE),
                                logits_of("dense")(without_method(params), tokens_of(), WHOLE))


def test_dense_prefix_keeps_the_first_layers_dense():
  whole, prefixed = params_of("msa"), params_of("msa", layers=("dense", "attention"))
  assert [set(stack["attention"]) & {"method"} for stack in prefixed["stacks"].values()] == [set(), {"method"}]
  # The same weights, in two stacks: layer 1 selects, layer 0 does not.
  stack = whole["stacks"]["stack0"]
  first, second = (jax.tree.map(lambda x: x[i:i + 1], stack) for i in (0, 1))
  params = {**whole, "stacks": {"stack0": without_method(first), "stack1": second}}
  dense = logits_of("dense")(without_method(whole), tokens_of(), WHOLE)
  run = logits_of("msa", layers=("dense", "attention"))
  half, both = run(params, tokens_of(), WHOLE), logits_of("msa")(whole, tokens_of(), WHOLE)
  assert np.abs(half - dense).max() > 1e-2 and np.abs(half - both).max() > 1e-2
  # With nothing to select from, at the start of a sequence, all three agree.
  np.testing.assert_allclose(half[:, :24], dense[:, :24], rtol=1e-5, atol=1e-5)


def test_output_gate_and_untied_head():
  gated, params = params_of("dense", output_gate=True), params_of("dense")
  stack = params["stacks"]["stack0"]
  attention = {**stack["attention"], "out": 2 * stack["attention"]["out"],
               "gate": np.zeros_like(gated["stacks"]["stack0"]["attention"]["gate"])}
  closed = {**params, "stacks": {"stack0": {**stack, "attention": attention}}}
  plain = np.asarray(logits_of("dense")(params, tokens_of(), WHOLE))
  run = logits_of("dense", output_gate=True)
  np.testing.assert_allclose(run(closed, tokens_of(), WHOLE), plain, rtol=1e-5, atol=1e-5)  # sigmoid(0) = 1/2
  assert np.abs(run(gated, tokens_of(), WHOLE) - plain).max() > 1e-2
  untied = {**params, "head": params["embed"].T[:, ::-1]}
  np.testing.assert_allclose(logits_of("dense", tie_embeddings=False)(untied, tokens_of(), WHOLE),
                             plain[..., ::-1],
                             rtol=1e-5, atol=1e-5)


def test_more_than_ten_stacks_are_run_in_their_order():
  """12 layers by turns of two methods, 12 stacks, run dense: the same model with all layers in one stack, decoding
  too."""
  plain = make_config(methods.Dense(), num_layers=12)
  turns = make_config(methods.BlockTopK(**SMALL), layers=("attention", "dense") * 6, num_layers=12)
  turns.others["dense"] = methods.Dense()
  params = random_params(model_lib.abstract_params(plain))
  tokens = tokens_of()[:1, :12]
  run = lambda config: jax.jit(functools.partial(model_lib.forward, config, mode="dense", losses=False))
  want = run(plain)(params, tokens).logits
  params = stacking.restack(params, turns)
  assert len(params["stacks"]) == 12
  np.testing.assert_allclose(run(turns)(params, tokens).logits, want, rtol=1e-4, atol=1e-4)
  cache, step = model_lib.init_cache(turns, params, 1, 12), run(turns)
  for at in (0, 6):
    out = step(params, tokens[:, at:at + 6], cache=cache, offset=jnp.int32(at))
    cache = out.cache
    np.testing.assert_allclose(out.logits, want[:, at:at + 6], rtol=1e-4, atol=1e-4)


def test_padding_counts_in_no_loss():
  """A document of 40 tokens, behind it 24 of padding, and a row of padding alone: losses and gradients are the
  document's own. One layer of each method that has losses."""
  names = ("msa", "dsa", "seer", "ssa")
  config = make_config(METHODS["msa"], layers=names, num_layers=4)
  config.others = {name: METHODS[name] for name in names}
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  losses = sorted({loss for name in names for loss in METHODS[name].losses})
  step = schedule.Step(0, "sparse", schedule.GROUPS_OF["sparse"], T, B, tuple((loss, 1.0) for loss in losses), True,
                       1.0, 1.0, "")
  params = random_params(model_lib.abstract_params(config))
  tokens = np.where(np.arange(T) < 40, tokens_of(), 0)[:1]

  @jax.jit
  def of(params, tokens, real):
    batch = dict(inputs=tokens, targets=tokens, weights=real, segment_ids=real.astype(jnp.int32))
    loss = lambda p: step_lib.loss_and_metrics(config, p, batch, KEY, step, lambda x, axes: x, mesh)
    return jax.value_and_grad(loss, has_aux=True)(params)

  real = (np.arange(T) < 40).astype(np.float32)[None]
  want = of(params, tokens[:, :40], real[:, :40])
  got = of(params, np.concatenate([tokens, 0 * tokens]), np.concatenate([real, 0 * real]))
  assert all(want[0][1][loss] > 1e-3 for loss in losses)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)
