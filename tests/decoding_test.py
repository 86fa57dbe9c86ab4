"""Decoding with a cache, of every method: what it gives is what one pass over the whole text gives."""
import dataclasses
import re

import jax
import jax.numpy as jnp
from methods_models import ALL, KEY, METHODS, WHOLE, B, logits_of, make_config, params_of, random_params, tokens_of
import numpy as np
import one_layer
import pytest

from nsa import decoding, methods, model as model_lib


@pytest.mark.parametrize("name", ["moba", "seer", "infllm_v2"])
def test_packed_documents_decode_by_token_and_by_two(name):
  """Summaries of blocks that two documents share, in a loop's parameters; documents end elsewhere in each row."""
  config = make_config(METHODS[name], short_conv=0)
  params, tokens = jax.tree.map(jnp.asarray, random_params(model_lib.abstract_params(config))), tokens_of()[:, :46]
  segments = np.stack([np.searchsorted(ends, np.arange(46), side="right") for ends in ((13, 29), (5, 20))])
  segments = jnp.asarray(segments, jnp.int32)
  run = jax.jit(lambda params, tokens, cache=None, offset=0: model_lib.forward(
      config, params, tokens, segments, losses=False, cache=cache, offset=offset))
  out = run(params, tokens[:, :11], model_lib.init_cache(config, params, B, 46))
  logits, at, params_of_loop = [out.logits], 11, model_lib.by_layer(config, params)
  while at < 46:
    width = 2 if at % 5 == 0 else 1
    out = run(params_of_loop, tokens[:, at:at + width], out.cache, jnp.int32(at))
    logits.append(out.logits)
    at += width
  np.testing.assert_allclose(np.concatenate(logits, 1), run(params, tokens).logits, rtol=1e-4, atol=1e-4)


def instructions(text):
  """{computation: {instruction: (shape, operation, what stands behind)}} of a compiled program's text, and the names of
  its loops' bodies with all that they call but for fusions."""
  computations, bodies = {}, []
  for line in text.splitlines():
    if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      inside = computations.setdefault(header[1], {})
    elif part := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\w+\[[\d,]*\])\S* ([\w-]+)\((.*)$", line):
      inside[part[1]] = part.groups()[1:]
      if part[3] == "while":
        bodies += re.findall(r"body=%?([\w.-]+)", part[4])
  for body in bodies:  # grows
    calls = " ".join(rest for _, operation, rest in computations[body].values() if operation != "fusion")
    bodies += [name for name in re.findall(r"%?([\w.-]+)", calls) if name in computations and name not in bodies]
  return computations, bodies


def written_and_kept(text, caches):
  """Of all arrays of the shapes of `caches` that a compiled program's loops make: instructions that write one whole,
  and those that write into it where it is."""
  shapes = {f"f32[{','.join(map(str, x.shape))}]" for x in caches}
  computations, bodies = instructions(text)
  written, kept = [], []
  for body in bodies:
    for name, (shape, operation, rest) in computations[body].items():
      if shape not in shapes or operation in ("parameter", "get-tuple-element", "bitcast"):
        continue
      where = computations[body]
      if operation == "fusion":
        where = computations[re.search(r"calls=%?([\w.-]+)", rest)[1]]
        operation, rest = next(x[1:] for x in reversed(where.values()) if x[0] == shape and x[1] != "bitcast")
      target = where.get(re.match(r"%?([\w.-]+)", rest)[1], ("", "", ""))[1]
      in_place = operation == "dynamic-update-slice" and target in ("parameter", "get-tuple-element")
      (kept if in_place else written).append(name)
  return written, kept


def assert_no_copies(text, cache, unread=0):
  streams = [x for layer in cache for key, x in layer.items() if key not in ("state", "tail", "pooled")]
  written, kept = written_and_kept(text, streams)
  assert not written and len(kept) == len(streams) - unread


@pytest.mark.parametrize("name", ALL)
def test_decoding_in_chunks_and_by_token_equals_the_parallel_pass_and_copies_no_cache(name):
  config, params, tokens = make_config(METHODS[name]), params_of(name), tokens_of()
  got, text = one_layer.decoded(config, params, tokens, 20, mode="sparse", key=KEY)  # 20: no multiple of the block
  np.testing.assert_allclose(got, logits_of(name)(params, tokens, WHOLE), rtol=1e-4, atol=1e-4)
  assert_no_copies(text, jax.eval_shape(lambda params: model_lib.init_cache(config, params, *tokens.shape), params),
                   unread={"lmm": 2, "msa_shared": 1}.get(name, 0))


def test_greedy_decoding_copies_no_cache():
  config, params = make_config(METHODS["msa"], num_layers=3), params_of("msa", num_layers=3)
  cache = jax.eval_shape(lambda params: model_lib.init_cache(config, params, B, 48), params)
  run = jax.jit(lambda params, cache, first: decoding.steps(config, params, cache, first, 40, 8, mode="sparse"))
  assert_no_copies(run.lower(params, cache, jax.ShapeDtypeStruct((B,), jnp.int32)).compile().as_text(), cache)


def test_a_copy_of_a_cache_in_a_loop_is_seen():
  """What decoding was: a scan over stacked caches, which cuts each layer's out and writes it whole."""
  one, both = jax.ShapeDtypeStruct((2, 48, 4), jnp.float32), jax.ShapeDtypeStruct((3, 2, 48, 4), jnp.float32)

  def layer(x, cache):
    cache = jax.lax.dynamic_update_slice_in_dim(cache, x[:, None], 7, axis=1)
    return x + jnp.tanh(cache).sum(1), cache

  text = jax.jit(lambda x, cache: jax.lax.scan(layer, x, cache)).lower(
      jax.ShapeDtypeStruct((2, 4), jnp.float32), both).compile().as_text()
  assert written_and_kept(text, [one])[0]


ALL_BLOCKS = dict(block_size=64, num_blocks=16)  # of 1,024 tokens: no choice that rounding could turn
ON_DEVICE = {
    "dense": methods.Dense(), "msa": methods.MSA(index_dim=64, **ALL_BLOCKS), "seer": methods.Seer(**ALL_BLOCKS),
    "quest": methods.Quest(**ALL_BLOCKS), "moba": methods.MoBA(**ALL_BLOCKS),
    "nsa": methods.NSA(window=256, **ALL_BLOCKS), "dsa": methods.DSA(level="block", **ALL_BLOCKS)}


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("name", ON_DEVICE)
def test_decoding_on_device_errs_as_one_pass_does(name, batch):
  """With kernels, parts of a cache and a single token's products: the distance from float32, in bfloat16."""
  model = dict(d_model=128, num_heads=6, num_kv_heads=2, head_dim=64, mlp_dim=256, short_conv=0)
  config = make_config(ON_DEVICE[name], dtype="bfloat16", **model)
  params = model_lib.init_params(config, 0)
  tokens = jax.random.randint(jax.random.key(1), (batch, 1024), 0, 32)
  whole = lambda config: jax.jit(lambda params: model_lib.forward(config, params, tokens, losses=False).logits[:, 999:])
  with jax.default_matmul_precision("highest"):
    exact = whole(make_config(ON_DEVICE[name], dtype="float32", **model))(params)

  @jax.jit
  def decoded(params):
    out = model_lib.forward(config, params, tokens[:, :1000], losses=False,
                            cache=model_lib.init_cache(config, params, batch, 1024))
    params = model_lib.by_layer(config, params)

    def step(cache, at):
      token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
      out = model_lib.forward(config, params, token, losses=False, cache=cache, offset=at)
      return out.cache, out.logits[:, 0]

    _, after = jax.lax.scan(step, out.cache, jnp.arange(1000, 1024))
    return jnp.concatenate([out.logits[:, 999:], jnp.moveaxis(after, 0, 1)], axis=1)

  error = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64) - exact)))
  assert error(decoded(params)) < 1.5 * error(whole(config)(params)) < 0.1 * np.std(exact)


def test_generate_is_greedy():
  name = "msa"
  config, params = make_config(METHODS[name]), params_of(name)
  prompt = tokens_of()[:, :3]
  got = np.asarray(decoding.generate(config, params, prompt, 13))
  text = np.concatenate([prompt, got], 1)
  padded = np.concatenate([text, tokens_of()[:, text.shape[1]:]], 1)
  logits = np.asarray(logits_of(name)(params, padded, WHOLE))
  best = np.sort(logits, -1)
  for i in range(13):  # the choice is the best logit, up to rounding between the two programs
    chosen = np.take_along_axis(logits[:, 2 + i], got[:, i:i + 1], -1)[:, 0]
    assert (best[:, 2 + i, -1] - chosen < 1e-4).all()


def test_biases_and_layers_without_rotary_embedding_decode_as_in_one_pass():
  config = make_config(METHODS["nsa"], qkv_bias=True, no_rope_layers=(1,))
  params, tokens = random_params(model_lib.abstract_params(config)), tokens_of()[:, :17]
  branch = params["stacks"]["stack0"]["attention"]["method"]["branch"]
  assert branch["k_win"]["bias"].shape == (2, 2, 4)  # so that copy_kv copies it
  want = model_lib.forward(config, params, tokens, losses=False).logits
  step = jax.jit(lambda tokens, cache, offset: model_lib.forward(
      config, params, tokens, losses=False, cache=cache, offset=offset))
  out = step(tokens[:, :16], model_lib.init_cache(config, params, B, 17), jnp.int32(0))
  last = step(tokens[:, 16:], out.cache, jnp.int32(16))
  np.testing.assert_allclose(np.concatenate([out.logits, last.logits], 1), want, rtol=1e-4, atol=1e-4)
  # The second layer knows no order: with the first one's attention shut, past tokens change places and nothing is
  # moved.
  shut = jax.tree.map(np.copy, params)
  shut["stacks"]["stack0"]["attention"]["out"][0] = 0
  run = lambda config, tokens: np.asarray(
      model_lib.forward(config, shut, tokens, mode="dense", losses=False).logits[:, -1])
  plain = make_config(METHODS["nsa"], qkv_bias=True, no_rope_layers=(1,), short_conv=0)
  shut = {**shut, "stacks": {"stack0": {**shut["stacks"]["stack0"], "attention": {
      name: {k: v for k, v in x.items() if k != "taps"} if isinstance(x, dict) and name in "qkv" else x
      for name, x in shut["stacks"]["stack0"]["attention"].items()}}}}
  shut["stacks"]["stack0"]["attention"]["method"] = {"branch": {
      name: {k: v for k, v in x.items() if k != "taps"} if isinstance(x, dict) else x for name, x in branch.items()}}
  swapped = np.concatenate([tokens[:, 3:8], tokens[:, :3], tokens[:, 8:]], 1)
  np.testing.assert_allclose(run(plain, swapped), run(plain, tokens), rtol=1e-4, atol=1e-5)
  rotated = make_config(METHODS["nsa"], qkv_bias=True, short_conv=0)
  assert np.abs(run(rotated, swapped) - run(rotated, tokens)).max() > 1e-3


def test_nsa_takes_a_prompt_shorter_than_a_compressed_block():
  config, params, tokens = make_config(METHODS["nsa"]), params_of("nsa"), tokens_of()[:, :3]
  out = model_lib.forward(config, params, tokens, cache=model_lib.init_cache(config, params, B, 3), losses=False)
  want = logits_of("nsa")(params, tokens_of(), WHOLE)[:, :3]
  np.testing.assert_allclose(out.logits, want, rtol=1e-4, atol=1e-4)
  cache = model_lib.init_cache(config, params, B, 3)
  with pytest.raises(ValueError, match="offset = 2: a cache of 3 positions has no room for 3 tokens"):
    model_lib.forward(config, params, tokens, cache=cache, offset=2)
  with pytest.raises(ValueError, match="segment_ids with a cache"):  # the convolution would reach across
    model_lib.forward(config, params, tokens, WHOLE[:, :3], cache=model_lib.init_cache(config, params, B, 3))


def test_nsa_decodes_before_its_first_compressed_block_as_it_does_in_one_pass():
  """The position is traced, the cache too short for a compressed key: the query's own block must be chosen still."""
  long = dataclasses.replace(METHODS["nsa"], compress_len=32, compress_stride=8, num_blocks=3)
  config, tokens = make_config(long), tokens_of()[:, :17]
  params = random_params(model_lib.abstract_params(config))
  want = jax.jit(lambda tokens: model_lib.forward(config, params, tokens, losses=False).logits)(tokens)
  step = jax.jit(lambda tokens, cache, offset: model_lib.forward(
      config, params, tokens, losses=False, cache=cache, offset=offset))
  cache, got = model_lib.init_cache(config, params, B, 17), []
  for first, end in ((0, 9), (9, 10), (10, 16), (16, 17)):
    out = step(tokens[:, first:end], cache, jnp.int32(first))
    got.append(out.logits)
    cache = out.cache
  np.testing.assert_allclose(np.concatenate(got, 1), want, rtol=1e-4, atol=1e-4)
