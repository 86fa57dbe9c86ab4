"""Tests of the methods that choose once per prompt: sets and outputs against slow NumPy, no leak, decoding, cost.

The references below are written from the papers' formulas, one query and one KV head at a time, in float64.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import methods_oracle as oracle
import numpy as np
import pytest

from nsa import config as config_lib, decoding, evaluate, methods, model as model_lib
from nsa.methods.prompt import base as prompt_lib
from pallas_kernels import masked

B, T, N, K, H, V = 2, 48, 4, 2, 4, 32
G = N // K
PROMPT = np.array([40, 29], np.int32)
METHODS = {
    "minference_blocks": methods.MInferenceBlocks(block_size=8, num_blocks=3),
    "vertical_slash": methods.VerticalSlash(verticals=5, slashes=6, window=6, sinks=1, local=2),
    "flexprefill": methods.FlexPrefill(alpha=0.5, min_budget=3, window=6, sinks=1, local=2),
    "flexprefill_aware": methods.FlexPrefill(alpha=0.6, min_budget=3, window=6, sinks=1, local=2, tau=0.1,
                                             block_size=8),
    "xattention": methods.XAttention(threshold=0.6, stride=4, block_size=8),
    "snapkv": methods.SnapKV(capacity=9, window=5, kernel=3, local=3, prefix=2),
}
ALL = sorted(METHODS)


@functools.lru_cache(maxsize=None)
def case():
  rng = np.random.default_rng(1)
  draw = lambda heads: rng.standard_normal((B, T, heads, H)).astype(np.float32)
  return draw(N), draw(K), draw(K)


# --- slow references: the set of every query of the prompt, or what is kept of it -----------


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def largest(scores, count, forced=()):
  """Indices of the `count` largest, forced ones first."""
  order = sorted(range(len(scores)), key=lambda i: (i not in forced, -scores[i], i))
  return set(order[:count])


def cover(scores, share):
  """How many of the largest it takes to reach `share` of the sum."""
  order, total = sorted(scores, reverse=True), 0.0
  for count, x in enumerate(order, start=1):
    total += x
    if total >= share * sum(scores):
      return count
  return len(order)


def last_masses(q, k, P, window):
  """Mass per token and per distance of the last `window` queries, mean over the group."""
  tokens, distances = np.zeros(P), np.zeros(P)
  for t in range(max(0, P - window), P):
    for g in range(G):
      p = softmax(k[:t + 1] @ q[t, g] / np.sqrt(H))
      for s in range(t + 1):
        tokens[s] += p[s] / G
        distances[t - s] += p[s] / G
  return tokens, distances


def lines(tokens, distances, P):
  return [{s for s in range(t + 1) if s in tokens or t - s in distances} for t in range(P)]


def slow_vertical_slash(o, q, k, P):
  tokens, distances = last_masses(q, k, P, o.window)
  return lines(largest(tokens, o.verticals, range(o.sinks)), largest(distances, o.slashes, range(o.local)), P)


def block_tokens(blocks, size, t):
  return {s for c in blocks for s in range(c * size, (c + 1) * size) if s <= t}


def slow_flexprefill(o, q, k, P):
  tokens, distances = last_masses(q, k, P, o.window)
  if o.tau:
    size, rows = o.block_size, -(-P // o.block_size)
    parts = [slice(r * size, min((r + 1) * size, P)) for r in range(rows)]
    keys = [k[part].mean(0) for part in parts]
    last = q[max(0, P - o.window):P].mean(0)
    estimate = np.mean([softmax(np.array([key @ last[g] for key in keys]) / np.sqrt(H)) for g in range(G)], axis=0)
    true = np.array([tokens[part].sum() for part in parts]) / min(o.window, P)
    middle = (estimate + true) / 2
    divergence = (estimate * np.log(estimate / middle) + true * np.log(true / middle)).sum() / 2
    if np.sqrt(divergence) < o.tau:
      pairs = {}
      for r in range(rows):
        mean = q[parts[r]].mean(0)
        p = np.mean([softmax(np.array([keys[c] @ mean[g] for c in range(r + 1)]) / np.sqrt(H)) for g in range(G)],
                    axis=0)
        pairs.update({(r, c): p[c] for c in range(r + 1)})
      order = sorted(pairs, key=pairs.get, reverse=True)
      chosen = order[:cover(list(pairs.values()), o.alpha)]
      always = lines(range(o.sinks), range(o.local), P)
      return [always[t] | block_tokens([c for r, c in chosen if r == t // size], size, t) for t in range(P)]
  sizes = [max(o.min_budget, cover(x, o.alpha)) for x in (tokens, distances)]
  return lines(largest(tokens, sizes[0], range(o.sinks)), largest(distances, sizes[1], range(o.local)), P)


def slow_minference_blocks(o, q, k, P):
  size, rows = o.block_size, -(-P // o.block_size)
  parts = [slice(r * size, min((r + 1) * size, P)) for r in range(rows)]
  out = []
  for t in range(P):
    r = t // size
    scores = [q[parts[r]].mean(0).sum(0) @ k[parts[c]].mean(0) for c in range(r + 1)]
    out.append(block_tokens(largest(scores, o.num_blocks, {0, r}), size, t))
  return out


def slow_xattention(o, q, k, P):
  size, stride = o.block_size, o.stride
  groups, rows = -(-P // stride), -(-P // size)
  inside = lambda x, i: x[i] if i < P else np.zeros_like(x[0])
  mass = np.zeros((rows, rows))
  for i in range(groups):
    for g in range(G):
      scores = [sum(inside(q, i * stride + stride - 1 - j)[g] @ inside(k, l * stride + j) for j in range(stride))
                for l in range(i + 1)]
      for l, p in enumerate(softmax(np.array(scores) / np.sqrt(H) / stride)):
        mass[i * stride // size, l * stride // size] += p / G
  out = []
  for t in range(P):
    r = t // size
    chosen = {0, r}
    for c in sorted(range(r + 1), key=lambda c: -mass[r, c]):
      if sum(mass[r, c] for c in chosen) >= o.threshold * mass[r].sum():
        break
      chosen.add(c)
    out.append(block_tokens(chosen, size, t))
  return out


def slow_snapkv(o, q, k, P):
  tokens, _ = last_masses(q, k, P, o.window)
  half = o.kernel // 2
  smooth = [sum(tokens[s] for s in range(max(0, i - half), min(P, i + half + 1))) for i in range(P)]
  kept = largest(smooth, o.capacity, set(range(o.prefix)) | set(range(P - o.local, P)))
  return [set(range(t + 1)) if t < P else {s for s in range(t + 1) if s in kept or s >= P} for t in range(T)]


SLOW = {"minference_blocks": slow_minference_blocks, "vertical_slash": slow_vertical_slash,
        "flexprefill": slow_flexprefill,
        "flexprefill_aware": slow_flexprefill, "xattention": slow_xattention, "snapkv": slow_snapkv}


@functools.lru_cache(maxsize=None)
def slow_mask(name):
  """bool[B, T, K, T]: what every query sees, the answer's included."""
  q, k, _ = (x.astype(np.float64) for x in case())
  mask = np.zeros((B, T, K, T), bool)
  for b, r in np.ndindex(B, K):
    sets = SLOW[name](METHODS[name], q[b, :, r * G:(r + 1) * G], k[b, :, r], int(PROMPT[b]))
    for t in range(T):
      mask[b, t, r, sorted(sets[t] if t < len(sets) else range(t + 1))] = True
  return mask


@functools.lru_cache(maxsize=None)
def run_layer(name):
  """Result of the layer on the case, and the chosen sets as a mask: one program."""
  options = METHODS[name]
  layer = options.layer(None, config_lib.ModelConfig(num_kv_heads=K))

  @jax.jit
  def run(q, k, v, prompt):
    call = methods.Call(prompt=prompt)
    chosen, _ = options.choose(q, k, prompt, call)
    result = layer(methods.Inputs(None, q, q, k), {"k": k, "v": v}, call)
    return result.o, result.measured, chosen(jnp.arange(T)).transpose(0, 2, 1, 3)

  return jax.device_get(run(*case(), PROMPT))


@pytest.mark.parametrize("name", ALL)
def test_sets_outputs_and_measures_equal_the_slow_reference(name):
  o, measured, chosen = run_layer(name)
  want = slow_mask(name)
  causal = np.tril(np.ones((T, T), bool))
  sparse = np.arange(T) >= PROMPT[:, None] if name == "snapkv" else np.arange(T) < PROMPT[:, None]
  for b, t in zip(*np.nonzero(sparse)):
    np.testing.assert_array_equal(chosen[b, t] & causal[t], want[b, t], err_msg=f"sequence {b}, query {t}")
  q, k, v = (x.astype(np.float64) for x in case())
  out, _ = oracle.attend(np, q, k, v, want)
  np.testing.assert_allclose(o, out, rtol=1e-4, atol=1e-5)
  _, p = oracle.attend(np, q, k, v, oracle.causal_mask(B, T, K))
  for b, r in np.ndindex(B, K):
    rows = np.flatnonzero(sparse[b])
    np.testing.assert_allclose(measured["tokens_visible"][b, r], want[b, rows, r].sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(measured["tokens_causal"][b, r], (rows + 1).mean(), rtol=1e-5)
    mass = (p[b, rows, r].mean(1) * want[b, rows, r]).sum(-1).mean()
    np.testing.assert_allclose(measured["captured_mass"][b, r], mass, rtol=1e-4)
    assert measured["tokens_visible"][b, r] < measured["tokens_causal"][b, r]


def test_flexprefill_heads_of_both_kinds_were_tested():
  lines_only = dataclasses.replace(METHODS["flexprefill_aware"], tau=0.0)
  q, k, _ = (x.astype(np.float64) for x in case())
  aware = [SLOW["flexprefill"](METHODS["flexprefill_aware"], q[b, :, r * G:(r + 1) * G], k[b, :, r], int(PROMPT[b]))
           != SLOW["flexprefill"](lines_only, q[b, :, r * G:(r + 1) * G], k[b, :, r], int(PROMPT[b]))
           for b, r in np.ndindex(B, K)]
  assert any(aware) and not all(aware)


def test_attention_by_chunks_of_queries_is_the_same(monkeypatch):
  q, k, v = case()
  mask = jnp.asarray(slow_mask("vertical_slash")).transpose(0, 2, 1, 3)
  segments = np.repeat([[0, 1]], [20, 28], axis=1).repeat(B, axis=0).astype(np.int32)
  call = methods.Call(segment_ids=segments)
  run = lambda: jax.jit(lambda q: prompt_lib.attend(q, k, v, lambda t: mask[:, :, t], call))(q)
  whole = run()
  monkeypatch.setattr(masked, "MAX_SCORES", B * N * T * 13)
  for a, b in zip(run(), whole):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  alike = segments[:, :, None, None] == segments[:, None, None, :]
  np.testing.assert_array_equal(whole[2], (slow_mask("vertical_slash") & alike).sum(-1))


# --- whole models: leaks, decoding ------------------------------------------------------


def make_config(attention, **kw):
  return config_lib.Config(attention=attention, model=config_lib.ModelConfig(
      vocab_size=V, num_layers=2, d_model=16, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=16, short_conv=3), **kw)


def random_params(config):
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32),
                      model_lib.abstract_params(config))


@functools.lru_cache(maxsize=None)
def program(name):
  """(tokens, prompt) -> logits."""
  config = make_config(METHODS.get(name, methods.Dense()))
  run = jax.jit(lambda params, tokens, prompt: model_lib.forward(
      config, params, tokens, prompt=prompt, losses=False).logits)
  return functools.partial(run, random_params(config))


def tokens_of(seed=0):
  return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


@pytest.mark.parametrize("name", ALL)
def test_behind_the_prompt_nothing_leaks_and_within_it_prefill_methods_do(name):
  tokens, run = tokens_of(), program(name)
  before = np.asarray(run(tokens, PROMPT))
  for t in range(29, T, 6):  # a later token changes no earlier logit behind the prompt, and no answer token the prompt
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % V
    after = np.asarray(run(changed, PROMPT))
    for b, P in enumerate(PROMPT):
      free = slice(min(P - 1, t), t) if t < P else slice(0, t)
      np.testing.assert_array_equal(after[b, free], before[b, free])
      assert (after[b, t] != before[b, t]).any()
  # The stated exception: with other last tokens of the prompt earlier queries choose otherwise; eviction comes later.
  leaks = []
  for seed in range(1, 9):
    changed = tokens.copy()
    changed[0, 37:40] = tokens_of(seed)[0, 37:40]
    leaks.append((np.asarray(run(changed, PROMPT))[0, :37] != before[0, :37]).any())
  assert any(leaks) == (name != "snapkv")


@pytest.mark.parametrize("name", ["vertical_slash", "xattention", "snapkv"])
def test_prefill_and_decoding_equal_the_pass_with_a_prompt(name):
  config, tokens, P = make_config(METHODS[name]), tokens_of(), 29
  params = random_params(config)

  @jax.jit
  def run(params, tokens):
    out = model_lib.forward(config, params, tokens[:, :P], cache=model_lib.init_cache(config, params, B, T), prompt=P,
                            losses=False)

    def step(cache, x):
      token, offset = x
      out = model_lib.forward(config, params, token[:, None], cache=cache, offset=offset, losses=False)
      return out.cache, out.logits[:, 0]

    _, after = jax.lax.scan(step, out.cache, (tokens[:, P:].T, jnp.arange(P, T)))
    return jnp.concatenate([out.logits, after.swapaxes(0, 1)], axis=1)

  got = run(params, tokens)
  want = program(name)(tokens, np.full(B, P, np.int32))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  dense = program("dense")(tokens, PROMPT)
  assert np.abs(want - dense).max() > 1e-2
  if name == "snapkv":  # the prompt is dense
    np.testing.assert_allclose(want[:, :P], dense[:, :P], rtol=1e-5, atol=1e-5)
    text = np.asarray(decoding.generate(config, params, tokens[:, :P], 3))  # the prompt that it is given is the prompt
    logits = np.asarray(program(name)(np.concatenate([tokens[:, :P], text, tokens[:, P + 3:]], 1),
                                      np.full(B, P, np.int32)))
    best = np.take_along_axis(logits[:, P - 1:P + 2], text[..., None], -1)[..., 0]
    assert (logits[:, P - 1:P + 2].max(-1) - best < 1e-4).all()


EVERYTHING = {
    "minference_blocks": dict(num_blocks=6), "vertical_slash": dict(verticals=T, slashes=T),
    "xattention": dict(threshold=1.0),
    "flexprefill": dict(min_budget=T), "flexprefill_aware": dict(alpha=1.0, tau=9.0), "snapkv": dict(capacity=40)}


@pytest.mark.parametrize("name", ALL)
def test_a_large_enough_budget_is_dense_attention(name):
  options = dataclasses.replace(METHODS[name], **EVERYTHING[name])
  q, k, _ = case()
  chosen = np.asarray(jax.jit(lambda prompt: options.choose(q, k, prompt, methods.Call())[0](jnp.arange(T)))(PROMPT))
  sparse = np.arange(T) >= PROMPT[:, None] if name == "snapkv" else np.arange(T) < PROMPT[:, None]
  for b, t in zip(*np.nonzero(sparse)):
    assert chosen[b, :, t, :t + 1].all()


def test_without_a_prompt_they_refuse():
  config = make_config(METHODS["xattention"])
  params = jax.tree.map(jnp.asarray, random_params(config))
  with pytest.raises(ValueError, match="'xattention' chooses once per prompt.*leak"):
    model_lib.forward(config, params, tokens_of())
  with pytest.raises(ValueError, match="offset = 3: a prompt begins at position 0"):
    model_lib.forward(config, params, tokens_of(), prompt=PROMPT, offset=3,
                      cache=model_lib.init_cache(config, params, B, T + 3))
  config = make_config(METHODS["snapkv"], schedule=config_lib.ScheduleConfig(10, [config_lib.Stage(mode="sparse")]))
  config.model.vocab_size = 264
  with pytest.raises(config_lib.ConfigError, match="snapkv chooses once per prompt and would leak in training"):
    config_lib.validate(config)


@pytest.mark.parametrize("name, wrong", [
    ("minference_blocks", dict(num_blocks=1)), ("vertical_slash", dict(local=7)), ("vertical_slash", dict(sinks=9)),
    ("flexprefill", dict(alpha=0.0)), ("xattention", dict(stride=3)), ("xattention", dict(threshold=1.5)),
    ("snapkv", dict(kernel=4)), ("snapkv", dict(capacity=4))])
def test_wrong_options_are_named(name, wrong):
  assert not METHODS[name].check(None, T)
  (field, value, fix), = dataclasses.replace(METHODS[name], **wrong).check(None, T)
  assert fix and (field in wrong and value == wrong[field] or field in ("slashes", "verticals"))


# --- evaluation and cost -------------------------------------------------------------------


RUN_MODES = ("dense", "snapkv:capacity=9,window=5,kernel=3,local=3,prefix=2",
             "flexprefill:alpha=0.5,min_budget=3,window=6,sinks=1,local=2", "quest:block_size=8,num_blocks=2")


@functools.lru_cache(maxsize=None)
def evaluated(msa: bool):
  """Records by run mode of one backbone, as a dense model or as one with MSA in its second layer."""
  layers, modes = (("dense", "attention"), RUN_MODES[1:3]) if msa else ((), RUN_MODES)
  config = config_lib.Config(
      attention=methods.MSA(index_dim=4, block_size=8, num_blocks=2) if msa else methods.Dense(), layers=layers,
      model=config_lib.ModelConfig(vocab_size=264, num_layers=2, d_model=16, num_heads=N, num_kv_heads=K, head_dim=H,
                                   mlp_dim=16),
      data=config_lib.DataConfig(context=64),
      eval=config_lib.EvalConfig(sequences=3, batch=2, task_examples=3, tasks=("mqar:pairs=2",), run_modes=modes))
  config_lib.validate(config)
  tree = random_params(dataclasses.replace(config, attention=methods.Dense(), layers=()))
  if msa:
    stack, mine = tree["stacks"]["stack0"], random_params(config)
    first, second = (jax.tree.map(lambda x: x[i:i + 1], stack) for i in (0, 1))
    method = mine["stacks"]["stack1"]["attention"]["method"]
    second = {**second, "attention": {**second["attention"], "method": method}}
    tree = {**tree, "stacks": {"stack0": first, "stack1": second}}
  rows = evaluate.records(config, tree, 1)
  return {mode: [row for row in rows if row["run_mode"] == mode] for mode in modes}


def of_kind(rows, kind):
  return [row for row in rows if row["kind"] == kind]


def test_run_modes_are_scored_behind_the_prompt_alone_and_say_what_they_cost():
  found = evaluated(False)
  for mode in RUN_MODES[1:3]:
    assert all("bits_per_byte" not in row and row["bytes"] == row["second_half_bytes"] <= 32
               for row in of_kind(found[mode], "language"))
    assert [(row["start"], row["end"]) for row in of_kind(found[mode], "position")] == [(32, 64)]
    assert [row["index"] for row in of_kind(found[mode], "task")] == [0, 1, 2]
    assert len(of_kind(found[mode], "layer")) == 2
  assert all("bits_per_byte" in row
             for row in of_kind(found["dense"], "language") + of_kind(found[RUN_MODES[3]], "language"))
  product = 4 * N * H  # FLOPs of one visible token
  snap, flex, quest = (of_kind(found[mode], "layer")[0] for mode in RUN_MODES[1:])
  # 9 of the prompt, and the answer's own 1 .. 32.
  assert snap["tokens_visible"] == pytest.approx(9 + 33 / 2) and snap["tokens_causal"] == pytest.approx(32 + 33 / 2)
  assert snap["attention_flops"] == pytest.approx(product * snap["tokens_visible"])
  # The last 6 queries of a prompt of 32 see 27 .. 32 tokens.
  choosing = 2 * N * H * sum(range(27, 33)) / 32
  assert flex["attention_flops"] == pytest.approx(product * flex["tokens_visible"] + choosing)
  assert 3 < flex["tokens_visible"] < flex["tokens_causal"] == pytest.approx(33 / 2)
  # Two pages of 8: 1 .. 8, then a whole one and the own; two products per page of the half that is visible.
  assert quest["tokens_visible"] == pytest.approx((36 + 7 * (8 * 8 + 36)) / 64)
  assert quest["tokens_causal"] == pytest.approx(65 / 2)
  assert quest["attention_flops"] == pytest.approx(product * quest["tokens_visible"] + 2 * K * H * 65 / 8)


def test_they_run_the_same_backbone_whatever_the_model_was_trained_with():
  dense, msa = evaluated(False), evaluated(True)
  for mode in RUN_MODES[1:3]:
    for a, b in zip(dense[mode], msa[mode], strict=True):
      for name, value in a.items():
        assert b[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (mode, name)


def test_analytic_cost():
  model = config_lib.ModelConfig(num_heads=32, num_kv_heads=8, head_dim=128)
  context, dense = 32_768, 2 * 32 * 128 * 32_769
  quest = methods.Quest()  # 1,024 tokens, pages of 16
  assert quest.tokens_visible(context) == 1024
  assert quest.reads(model, context) == {"selected": 1024.0, "scores": 2048.0}  # a page's two keys are one position
  x = methods.XAttention(stride=8)
  assert x.flops(model, context, "sparse") == {"selected": pytest.approx(dense),
                                               "scores": dense / 16}  # K^T alone, an eighth
  snap = methods.SnapKV()
  assert snap.reads(model, context) == {"kept": 1024.0}
  assert snap.flops(model, context, "sparse")["dense"] == dense
  lines = methods.VerticalSlash()
  parts = lines.flops(model, context, "sparse")
  assert parts["scores"] == 2 * 32 * 128 * sum(range(context - 63, context + 1)) / context
  assert parts["selected"] == pytest.approx(4 * 32 * 128 * (sum(range(1, 1025)) + (context - 1024) * 1024) / context)
  assert lines.measured_flops(model, 2 * context, 700.0) == 4 * 32 * 128 * 700 + parts["scores"]
  blocks = methods.MInferenceBlocks()
  pairs = 512 * 513 / 2  # blocks of 64, one product of the group's sum each
  assert blocks.selection_costs(model, context)["scores"].flops == pytest.approx(2 * 8 * 128 * pairs / context)
