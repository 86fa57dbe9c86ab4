"""Decoding with a cache, of every method: what it gives is what one pass over the whole text gives."""
import dataclasses

import jax
import jax.numpy as jnp
from methods_models import (
  ALL,
  KEY,
  METHODS,
  WHOLE,
  B,
  T,
  logits_of,
  make_config,
  params_of,
  random_params,
  tokens_of,
)
import numpy as np
import pytest

from nsa import decoding, model as model_lib


@pytest.mark.parametrize("name", ALL)
def test_decoding_in_chunks_and_by_token_equals_the_parallel_pass(name):
  config, params, tokens = make_config(METHODS[name]), params_of(name), tokens_of()
  step = jax.jit(lambda params, tokens, cache, offset: model_lib.forward(
      config, params, tokens, mode="sparse", key=KEY, losses=False, cache=cache, offset=offset))
  cache, logits, at = model_lib.init_cache(config, params, B, T), [], 0
  while at < T:
    width = 20 if at < 40 else 1  # two chunks of 20, not a multiple of the block; then token by token
    out = step(params, tokens[:, at:at + width], cache, jnp.int32(at))
    cache, at = out.cache, at + width
    logits.append(out.logits)
  want = logits_of(name)(params, tokens, WHOLE)
  np.testing.assert_allclose(np.concatenate(logits, 1), want, rtol=1e-4, atol=1e-4)


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
  out = model_lib.forward(config, params, tokens, cache=model_lib.init_cache(config, params, B, 3),
                          losses=False)
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
