"""Tests of nsa/methods/titans/memory.py and the Titans methods: against a token-by-token oracle, and as native,
retrofit and hybrid layers.

    PYTHONPATH=. python tests/memory_test.py [steps]

trains a memory of depth 4 for 10,000 steps as it is, with local backprop, and without any guard, and prints
what came of it (numbers in docs/memory.md).
"""
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import memory_oracle as oracle
import methods_models as shared
import numpy as np
import pytest

from experiments import titans
from nsa import (
  config as config_lib,
  evaluate,
  flops,
  layers,
  methods,
  model as model_lib,
  optim,
  schedule,
  sharding,
  stacking,
  step as step_lib,
)
from nsa.methods.titans import memory

B, T, R, G, H = 2, 11, 2, 2, 4
GATES = ("alpha", "eta", "theta")
VARIANTS = {
    "paper": methods.LMM(chunk=4, norm=False, clip=0.0),
    "linear": methods.LMM(chunk=4, depth=1, norm=False),
    "guarded": methods.LMM(chunk=4, clip=0.5, depth=3, backprop="local"),
    "public": methods.LMM(chunk=4, gradient="document", read="chunk"),
    "short": methods.LMM(chunk=16),  # the sequence is shorter than a chunk
}


@functools.lru_cache(maxsize=None)
def inputs(length=T):
  """Projections and gates of random tokens and a random memory, float64."""
  rng = np.random.default_rng(3)
  x = {"q": rng.standard_normal((B, length, R, G, H)), "k": rng.standard_normal((B, length, R, H)),
       "v": rng.standard_normal((B, length, R, H))}
  gates = oracle.sigmoid(rng.standard_normal((3, B, length, R)) + np.array([-2.0, 0.0, 0.0])[:, None, None, None])
  return {**x, **dict(zip(GATES, gates))}


@functools.lru_cache(maxsize=None)
def holder(name):
  model = config_lib.ModelConfig(d_model=8, num_heads=R * G, num_kv_heads=R, head_dim=H, short_conv=0)
  options = VARIANTS[name]
  mem = memory.Memory(layers.Init(jax.random.key(2)), model, options, project=False)
  rng = np.random.default_rng(4)
  weights = [rng.standard_normal(w.shape) for w in mem.weights()]
  return mem, {"initial": weights, "gain": 1 + 0.3 * rng.standard_normal((R, H)) if options.norm else None}


def with_weights(mem, p):
  graph, state = memory.nnx.split(mem)
  state = memory.nnx.to_pure_dict(state)
  state["initial"] = {f"w{i}": w for i, w in enumerate(p["initial"])}
  return memory.nnx.merge(graph, {**state, "gain": p["gain"]} if p["gain"] is not None else state)


def call(name, p, x, segments=None, state=None, offset=0):
  mem = with_weights(holder(name)[0], p)
  gates = memory.Gates(jnp.log1p(-x["alpha"]), jnp.log(x["eta"]), x["theta"])
  y, state = mem(x["q"].reshape(x["q"].shape[:2] + (R * G, H)), x["k"], x["v"], gates, state, offset=offset,
                 segment_ids=segments)
  return y.reshape(x["q"].shape), state


@functools.lru_cache(maxsize=None)
def program(name):
  """jit: (p, x, direction) -> y and the gradients of <y, direction>."""
  def objective(p, x, direction, segments):
    y, _ = call(name, p, x, segments)
    return jnp.sum(y * direction), y

  return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))


def as_float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def expected(name, p, x, segments=None, **bases):
  return oracle.run(p, *(x[n] for n in ("q", "k", "v", *GATES)), VARIANTS[name], segments, **bases)


DOCUMENTS = np.broadcast_to(np.searchsorted([4, 9], np.arange(T), side="right"), (B, T)).astype(np.int32)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_chunks_equal_the_recurrence_token_by_token(name):
  p, x, direction = holder(name)[1], inputs(), np.random.default_rng(5).standard_normal((B, T, R, G, H))
  for segments in (np.zeros((B, T), np.int32), DOCUMENTS):  # the third document begins inside a chunk
    (dp, dx), y = program(name)(as_float32(p), as_float32(x), direction, segments)
    bases = []
    np.testing.assert_allclose(y, expected(name, p, x, segments, record=bases), rtol=1e-5, atol=1e-5)
  fixed = bases if VARIANTS[name].backprop == "local" else None  # what "local" holds constant
  # Gradients, by central differences of the float64 oracle along a random direction of every input.
  rng, eps = np.random.default_rng(6), 1e-5
  leaves, tree = jax.tree.flatten((p, x))
  for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves((dp, dx)))):
    move = rng.standard_normal(leaf.shape)
    ends = []
    for sign in (1, -1):
      moved = jax.tree.unflatten(tree, leaves[:i] + [leaf + sign * eps * move] + leaves[i + 1:])
      ends.append((expected(name, *moved, DOCUMENTS, fixed=fixed) * direction).sum())
    want = (ends[0] - ends[1]) / (2 * eps)
    scale = np.sqrt((np.asarray(grad, np.float64) ** 2).sum())
    assert scale > 1e-3, (name, i)
    np.testing.assert_allclose((np.asarray(grad, np.float64) * move).sum(), want, rtol=1e-4, atol=1e-4 * scale)


@functools.lru_cache(maxsize=None)
def both_of(**options):
  """y and all gradients of two documents in chunks of 16."""
  model = config_lib.ModelConfig(d_model=16, num_heads=4, num_kv_heads=2, head_dim=32, short_conv=0)
  mem = memory.Memory(layers.Init(jax.random.key(2)), model, methods.LMM(chunk=16, **options), project=False)
  graph, state = memory.nnx.split(mem)
  draw = lambda i, *shape: np.random.default_rng(i).standard_normal((2, 64) + shape).astype(np.float32)
  segments = np.broadcast_to(np.arange(64) // 32, (2, 64))

  def objective(state, q, k, v, h):
    mem = memory.nnx.merge(graph, state)
    y, _ = mem(q, k, v, mem.gates_of(h), None, segment_ids=segments)
    return jnp.sum(y * draw(4, 4, 32)), y

  grads, y = jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3, 4), has_aux=True))(
      state, draw(0, 4, 32), draw(1, 2, 32), draw(2, 2, 32), draw(3, 16))
  return [y, *jax.tree.leaves(grads)]


def test_rounded_products_stay_near_and_kept_interiors_change_nothing():
  want = both_of()
  for a, b in zip(both_of(recompute=False), want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
  away = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(both_of(products="bfloat16"), want)]
  assert 1e-4 < min(away) and max(away) < 1e-2, away  # rounded, and by no more than bfloat16 does


def test_calls_may_end_anywhere_in_a_chunk():
  name, x = "guarded", as_float32(inputs())
  p = as_float32(holder(name)[1])
  run = jax.jit(lambda x, state, offset: call(name, p, x, None, state, offset))
  want, state, parts = expected(name, holder(name)[1], inputs()), holder(name)[0].begin(B), []
  state = jax.tree.map(jnp.asarray, with_weights(holder(name)[0], p).begin(B))
  shapes = jax.tree.map(jnp.shape, state)
  for first, end in ((0, 5), (5, 10), (10, 11)):  # a traced offset, across chunks of 4; then one token
    y, state = run({n: v[:, first:end] for n, v in x.items()}, state, jnp.int32(first))
    assert jax.tree.map(jnp.shape, state) == shapes  # the state does not grow
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=1e-5, atol=1e-5)
  eight = {n: v[:, :8] for n, v in x.items()}  # two chunks long, and ends inside one
  begin = jax.tree.map(jnp.asarray, with_weights(holder(name)[0], p).begin(B))
  ends = jax.jit(lambda eight: [call(name, p, eight, None, state, 2)[1] for state in (begin, None)])(eight)
  for got, wanted in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_memory_at_its_initial_gates_outlives_a_long_document():
  """Forgotten towards zero, two matrices have no gradient any more: whatever comes later is neither kept nor learnt."""
  length, model = 4096, config_lib.ModelConfig(d_model=16, num_heads=1, num_kv_heads=1, head_dim=16, short_conv=0)
  mem = memory.Memory(layers.Init(jax.random.key(2)), model, methods.LMM(chunk=128), project=False)
  draw = lambda i, *shape: np.random.default_rng(i).standard_normal((1, length) + shape).astype(np.float32)
  q, k, gates = draw(0, 1, 16), draw(1, 1, 16), mem.gates_of(draw(3, 16))

  def last(v):
    y, state = mem(q, k, v, gates, None)
    return jnp.sum(y[0, -1] * np.arange(16)), state["now"]

  moved, now = jax.jit(jax.grad(last, has_aux=True))(draw(2, 1, 16))
  for w, first in zip(now, mem.weights()):
    assert np.linalg.norm(w) > 0.5 * np.linalg.norm(first)
  by_distance = np.abs(moved[0, :, 0]).mean(1)[::-1]
  for first, end in ((0, 256), (256, 1024), (1024, length)):
    assert by_distance[first:end].mean() > 1e-4, (first, end)


def test_the_plans_gradient_through_many_chunks_stays_bounded():
  """All gradients of a chunk are taken at one memory: those of similar tokens add up, a step past 2 / curvature
  overshoots, and with full backprop 32 of them multiply. Gates half open, and a forgetting of 0.67 % a token."""
  planned = titans.get_config("tiny=true").arms[1].attention
  draws, length, width = 8, 32 * planned.chunk, 16
  model = config_lib.ModelConfig(d_model=width, num_heads=1, num_kv_heads=1, head_dim=width, short_conv=0)
  rng = np.random.default_rng(0)
  shared, own = (rng.standard_normal((3, draws, n, 1, width)) for n in (1, length))
  q, k, v = np.float32(0.9 ** 0.5 * shared + 0.1 ** 0.5 * own)
  gate = lambda value: jnp.full((draws, length, 1), value, jnp.float32)

  def largest_gradient(**options):
    options = methods.LMM(chunk=planned.chunk, expansion=planned.expansion, **options)
    mem = memory.Memory(layers.Init(jax.random.key(2)), model, options, project=False)
    gates = memory.Gates(gate(np.log1p(-0.0067)), gate(np.log(0.5)), gate(options.max_step / 4))
    last = lambda v: jnp.vdot(mem(q, k, v, gates, None)[0][:, -planned.chunk:], v[:, :planned.chunk])
    return np.linalg.norm(jax.jit(jax.grad(last))(v).reshape(draws, -1), axis=1).max()

  assert largest_gradient(max_step=planned.max_step, backprop=planned.backprop) < 100
  assert largest_gradient(backprop="full") > 1e4, "these tokens would not show a gradient that grows"


# --- as layers -------------------------------------------------------------------------


LAYERS = {"mag": methods.MAG(chunk=8), "lmm": methods.LMM(chunk=8), "mal": methods.MAL(chunk=8, window=12),
          "mac": methods.MAC(chunk=4, segment=8)}


def onto(fresh, trunk):
  """A trunk's parameters, and fresh ones where it has none."""
  return {n: onto(x, trunk.get(n, {})) if isinstance(x, dict) else trunk.get(n, x) for n, x in fresh.items()}


def test_a_memory_beside_dense_attention_changes_nothing_at_insertion():
  dense, mag = shared.make_config(methods.Dense()), shared.make_config(LAYERS["mag"])
  trunk, tokens = shared.params_of("dense"), shared.tokens_of()
  params = onto(jax.jit(lambda: model_lib.init_params(mag, 0))(), trunk)
  run = lambda config: jax.jit(lambda p: model_lib.forward(config, p, tokens, mode="sparse").logits)
  want, with_memory = run(dense)(trunk), run(mag)
  np.testing.assert_allclose(with_memory(params), want, rtol=0, atol=1e-6)
  params["stacks"]["stack0"]["attention"]["method"]["memory"]["join"]["mix"] += 0.1
  assert np.abs(with_memory(params) - want).max() > 1e-2


def train_config(attention, plan, **options):
  config = shared.make_config(attention, vocab_size=264)
  config.schedule, config.data = plan, config_lib.DataConfig(context=32, global_batch=2, align=8)
  config.eval = config_lib.EvalConfig(sequences=0, run_modes=())
  return dataclasses.replace(config, **options)


def test_a_frozen_backbone_stays_bit_for_bit_and_the_memory_learns():
  plan = schedule.memory_only(4, 0.5, plan="constant", warmup=0.0)
  config = config_lib.validate(train_config(LAYERS["mag"], plan))
  steps = [schedule.at(config, i) for i in range(4)]
  assert [s.groups for s in steps] == [("backbone",)] * 2 + [("memory",)] * 2
  rng = np.random.default_rng(0)
  batch = dict(inputs=rng.integers(0, 256, (2, 32)), targets=rng.integers(0, 256, (2, 32)),
               weights=np.ones((2, 32), np.float32), segment_ids=np.ones((2, 32), np.int32))
  state = jax.jit(lambda: step_lib.init_state(config, step_lib.seeds_of(config)))()
  run = jax.jit(step_lib.make_step(config, steps[2], sharding.make_mesh(config, jax.devices()[:1])))
  before, losses = state, []
  for _ in range(12):
    state, got = run(state, batch, np.full(2, 1e-2, np.float32), step_lib.seeds_of(config))
    losses.append(float(got["loss"]))
  old, new = (optim.split(x.params, optim.groups_of(config)) for x in (before, state))
  assert set(old) == {"backbone", "memory"}
  for path, leaf in old["backbone"].items():
    np.testing.assert_array_equal(new["backbone"][path], leaf, err_msg=path)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before.optimizer["backbone"],
                                   state.optimizer["backbone"]))
  unchanged = [path for path, leaf in old["memory"].items() if (new["memory"][path] == leaf).all()]
  assert not unchanged and losses[-1] < losses[0] - 1e-3
  free = flops.training(config, dataclasses.replace(steps[2], groups=schedule.GROUPS_OF["sparse"]))
  frozen = flops.training(config, steps[2])
  backbone = flops.forward(config, 32, "dense")["projections"]
  assert free["projections"] - frozen["projections"] == pytest.approx(backbone)  # no gradient of its matrices
  assert frozen["memory_write"] == free["memory_write"] == 3 * flops.forward(config, 32, "sparse")["memory_write"]


def test_a_hybrid_stack_decodes_and_packs_as_its_layers_do():
  """Dense first, then a window, blocks and a memory, interleaved; `shared` compares its decoding and its packing."""
  others = {"window": methods.Window(12), "mag": LAYERS["mag"], "msa": shared.METHODS["msa"]}
  config = shared.make_config(methods.Dense(), layers=("dense", "window", "msa", "mag", "window"), num_layers=5)
  config.others = others
  config.data.context, config.data.align = 64, 8
  config_lib.validate(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=320)))
  assert [(m.name, n) for m, n in stacking.layout(config)] == [
      ("dense", 1), ("window", 1), ("msa", 1), ("mag", 1), ("window", 1)]
  params, tokens = as_float32(shared.random_params(model_lib.abstract_params(config))), shared.tokens_of()
  run = jax.jit(
      lambda tokens, segments: model_lib.forward(config, params, tokens, segments, mode="sparse", losses=False).logits)
  want = np.asarray(run(tokens, shared.WHOLE))
  step = jax.jit(lambda tokens, cache, offset: model_lib.forward(
      config, params, tokens, mode="sparse", losses=False, cache=cache, offset=offset))
  cache, at = model_lib.init_cache(config, params, shared.B, shared.T), 0
  for width in [20, 20] + [1] * 4:
    out = step(tokens[:, at:at + width], cache, jnp.int32(at))
    np.testing.assert_allclose(out.logits, want[:, at:at + width], rtol=1e-4, atol=1e-4)
    cache, at = out.cache, at + width
  packed = np.broadcast_to(np.arange(shared.T) >= 24, tokens.shape).astype(np.int32)
  second = np.roll(tokens, -24, axis=1)
  np.testing.assert_allclose(run(tokens, packed)[:, 24:], run(second, shared.WHOLE)[:, :40], rtol=1e-4, atol=1e-4)
  parts = flops.forward(config, 64, "sparse")
  window = methods.Window(12).flops(config.model, 64, "sparse")["window"]
  assert parts["window"] == pytest.approx(2 * window)
  assert parts["dense"] == pytest.approx(2 * methods.interface.dense_flops(config.model, 64))
  # As evaluation runs it, and a dense run of the same tree.
  assert (evaluate.how(config, "sparse")[1:] == ("sparse", "own")
          and evaluate.how(config, "dense")[1:] == ("dense", "own"))


def test_memory_flops_by_hand_and_the_window_that_costs_as_much():
  model = config_lib.ModelConfig(num_layers=1, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16)
  options = methods.MAG(chunk=8, depth=2, expansion=3, window=10)
  config = config_lib.Config(model=model, attention=options)
  W, edges = 2 * 4 * 12, 2 * (4 + 12)
  parts = options.flops(model, 64, "sparse")
  # Two memories write; four heads read. Forward, inner backward but for the first matrix's input, two outer products.
  assert parts["memory_write"] == 2 * (2 * W + 2 * W // 2 + 4 * W + 6 * W / 8 + 2 * 64)
  assert parts["memory_read"] == 4 * (4 * W + 9 * edges)
  assert parts["window"] == pytest.approx(4 * 16 * sum(min(t + 1, 10) for t in range(64)) / 64)
  assert options.flops(model, 64, "dense") == {"dense": methods.interface.dense_flops(model, 64)}
  assert options.reads(model, 64)["memory"] == pytest.approx(3 * 2 * W / (2 * 4 * 2))  # float32 beside float32
  assert (options.tokens_visible(64), methods.MAC(segment=16, chunk=8).tokens_visible(70),
          methods.LMM().tokens_visible(64)) == (10, 6, 0)
  context = 4096
  window = flops.equal_window(config, context)
  cost = lambda attention: sum(
      flops.forward(dataclasses.replace(config, attention=attention), context, "sparse").values())
  assert 10 < window < context and cost(methods.Window(window)) <= cost(options) < cost(methods.Window(window + 1))


@pytest.mark.parametrize("method,field,value,fix", [
    ("mag", "chunk", 0, "at least 1"), ("mag", "depth", 0, "at least 1"), ("lmm", "max_step", 0.0, "above 0"),
    ("lmm", "clip", -1.0, "no clipping"), ("lmm", "gradient", "token", "document"),
    ("lmm", "read", "now", "token or chunk"),
    ("lmm", "backprop", "none", "local or full"), ("mag", "heads", 3, "divisor"),
    ("mal", "window", 128, "context of 64"),
    ("mag", "persistent", -1, "negative"), ("mag", "join", "sum", "product"),
    ("mal", "products", "float16", "bfloat16"),
    ("mac", "segment", 6, "multiple of chunk = 4")])
def test_wrong_options_name_field_and_fix(method, field, value, fix):
  options = dataclasses.replace(LAYERS[method], **{field: value})
  assert [(n, v) for n, v, f in options.check(config_lib.ModelConfig(), 64) if fix in f] == [(field, value)]
  with pytest.raises(config_lib.ConfigError, match="data.align.*multiple of attention.segment = 24"):
    config_lib.validate(config_lib.Config(attention=methods.MAC(segment=24, chunk=8)))


# --- training for long -------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def long_run(context, chunk=16, **options):
  """(carry, jit: (carry, first step) -> (carry, losses, gradient norms of the memory)), 50 steps a call, one layer of
  depth 4.

  Text: 8 keys and their values, drawn anew for every sequence, in random order; the loss is of the values.
  """
  config = shared.make_config(methods.LMM(depth=4, chunk=chunk, **options), vocab_size=16, num_layers=1, num_heads=2,
                              num_kv_heads=1, head_dim=8, short_conv=2)
  transforms = optim.make(config)

  def step(carry, index):
    params, state = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
    asked = jax.random.randint(keys[0], (2, context // 2), 0, 8)
    answers = jnp.take_along_axis(jax.random.randint(keys[1], (2, 8), 8, 16), asked, 1)
    tokens = jnp.stack([asked, answers], -1).reshape(2, context)

    def loss(p):
      nll = -jax.nn.log_softmax(model_lib.forward(config, p, tokens, losses=False).logits[:, :-1])
      return jnp.take_along_axis(nll, tokens[:, 1:, None], -1)[:, context // 2::2].mean()

    value, grads = jax.value_and_grad(loss)(params)
    rate = 3e-3 * jnp.minimum(1.0, (index + 1) / 200)
    params, state, norms = optim.update(transforms, ("backbone", "memory"), grads, state, params, (rate, rate))
    return (params, state), (value, norms["memory"])

  def start():
    params = model_lib.init_params(config, 0)
    return params, optim.init(transforms, params)

  run = jax.jit(lambda carry, first: jax.lax.scan(step, carry, first + jnp.arange(50)))
  return jax.jit(start)(), run


def test_a_memory_of_depth_4_trains_and_stays_finite():
  """The short version of this file's program."""
  carry, run = long_run(32, chunk=8)
  losses = []
  for first in range(0, 400, 50):
    carry, (loss, norm) = run(carry, first)
    assert np.isfinite(loss).all() and np.isfinite(norm).all() and norm.max() < 100
    losses.append(float(loss.mean()))
  assert losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
  total = int((sys.argv + ["10000"])[1])
  for name, options in {"as it is": {}, "local": dict(backprop="local"), "bare": dict(norm=False, clip=0.0)}.items():
    carry, run = long_run(64, **options)
    history = []
    for first in range(0, total, 50):
      carry, out = run(carry, first)
      history.append(np.stack(out))
      if not np.isfinite(history[-1]).all():
        break
    loss, norm = np.concatenate(history, 1)
    fine = np.isfinite(loss) & np.isfinite(norm)
    print(f"{name}: {'finite' if fine.all() else f'not finite at step {fine.argmin()}'} of {total}, last loss "
          f"{loss[fine][-200:].mean():.4f} nats, largest gradient norm {norm[fine].max():.3g}", flush=True)
