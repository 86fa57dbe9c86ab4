"""Greedy decoding with the KV cache: continuations of prompts, and the answers of tasks as a user would get them."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nsa import model as model_lib


def generate(config, params: dict, tokens: Int[Array, "B T"], num_tokens: int, *,
             mode: str = "sparse") -> Int[Array, "B num_tokens"]:
  """Greedy continuation of prompts of one length: int32[B, num_tokens]."""
  return _generate(model_lib.Static(config), params, tokens, num_tokens, mode=mode)


def answers(config, params: dict, tokens: Int[Array, " T"], begins: Int[Array, " Q"], num_tokens: int, *,
            mode: str = "sparse") -> Int[Array, "Q num_tokens"]:
  """Greedy continuations of several beginnings of one text: int32[Q, num_tokens].

  The text goes through the model once and fills the cache. Each continuation begins behind position begins[q], writes
  its own tokens over those of the text and sees none of what stands behind; tokens past the text's end mean nothing.
  Of methods that attend to what lies in a cache by position: no neural memory, nothing that chooses once per prompt.
  """
  return _answers(model_lib.Static(config), params, tokens, begins, num_tokens, mode=mode)


def steps(config, params, cache, first, offset, num_tokens, **how):
  """The tokens `first` int32[B], written at position `offset` behind what the cache holds, and what follows greedily:
  int32[B, num_tokens]. Part of a program; `how` is mode, selector and key of `model.forward`."""
  params = model_lib.by_layer(config, params)

  def step(carry, i):
    cache, token = carry
    out = model_lib.forward(config, params, token[:, None], losses=False, cache=cache, offset=offset + i, **how)
    return (out.cache, jnp.argmax(out.logits[:, -1], -1).astype(token.dtype)), token

  _, produced = jax.lax.scan(step, (cache, first), jnp.arange(num_tokens))
  return produced.T


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames="mode")
def _generate(config_box, params, tokens, num_tokens, *, mode):
  config = config_box.value
  B, T = tokens.shape
  cache = model_lib.init_cache(config, params, B, T + num_tokens)
  out = model_lib.forward(config, params, tokens, losses=False, cache=cache, prompt=T, mode=mode)
  first = jnp.argmax(out.logits[:, -1], -1).astype(tokens.dtype)
  return steps(config, params, out.cache, first, T, num_tokens, mode=mode)


@functools.partial(jax.jit, static_argnums=(0, 4), static_argnames="mode")
def _answers(config_box, params, tokens, begins, num_tokens, *, mode):
  config = config_box.value
  cache = model_lib.init_cache(config, params, 1, tokens.shape[0])
  out = model_lib.forward(config, params, tokens[None], losses=False, cache=cache, mode=mode)
  first = jnp.argmax(model_lib.unembed(config, params, out.hidden[0, begins]), -1).astype(tokens.dtype)
  one = lambda x: steps(config, params, out.cache, x[0][None], x[1] + 1, num_tokens, mode=mode)[0]
  return jax.lax.map(one, (first, begins))
