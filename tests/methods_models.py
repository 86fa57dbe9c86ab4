"""Small models of every method, their parameters and tokens, for tests."""
import dataclasses
import functools

import jax
import numpy as np
from one_layer import random_params

from nsa import config as config_lib, methods, model as model_lib

B, T, V = 2, 64, 32
KEY = jax.random.key(7)
SMALL = dict(block_size=8, num_blocks=3)
METHODS = {
    "dense": methods.Dense(),
    "msa": methods.MSA(index_dim=4, **SMALL),
    "gated": methods.Gated(index_dim=4, **SMALL),
    "msa_shared": methods.SharedMSA(index_dim=4, **SMALL),
    # Blocks of 4 strides, compressed blocks of 2: the weights are 1, 2, 2, 2, 1 as in the paper's geometry.
    "nsa": methods.NSA(block_size=8, num_blocks=4, compress_len=4, compress_stride=2, window=12),
    "dsa": methods.DSA(index_heads=2, index_dim=4, **SMALL),
    "seer": methods.Seer(gate_dim=4, **SMALL),
    "moba": methods.MoBA(**SMALL),
    # As in the paper's geometry: a max-pool of kernel 5, stride 4 and padding 1.
    "infllm_v2": methods.InfLLMV2(pool_len=4, pool_stride=2, num_initial=0, num_local=1, **SMALL),
    "ssa": methods.SSA(**SMALL),
    "block_topk": methods.BlockTopK(**SMALL),
    "sink_window": methods.SinkWindow(**SMALL),
    "random": methods.RandomBlocks(**SMALL),
    "oracle": methods.Oracle(**SMALL),
    "quest": methods.Quest(**SMALL),
    "window": methods.Window(12),
    "mag": methods.MAG(chunk=8, window=12, persistent=2),
    "mal": methods.MAL(chunk=8, window=12, persistent=2),
    "mac": methods.MAC(chunk=4, segment=8, persistent=2),
    "lmm": methods.LMM(chunk=8),
}
ALL = sorted(METHODS)
# Those of tests/methods_oracle.py; the other methods have a test file with a reference of their own.
REFERENCED = ["block_topk", "dense", "gated", "msa", "nsa", "oracle", "quest", "random", "sink_window"]
SELECTING = [name for name in REFERENCED if name != "dense"]
# With J at least the number of blocks these are dense attention.
PRESERVING = [name for name in SELECTING if name not in ("nsa", "gated")]


def make_config(attention, layers=(), **model):
  shape = dict(vocab_size=V, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16,
               short_conv=3)
  return config_lib.Config(model=config_lib.ModelConfig(**{**shape, **model}), attention=attention, layers=layers)


@functools.lru_cache(maxsize=None)
def params_of(name, **model):
  return random_params(model_lib.abstract_params(make_config(METHODS[name], **model)))


def without_method(params):
  """The parameters that the dense method has."""
  return {k: without_method(v) if isinstance(v, dict) else v for k, v in params.items() if k != "method"}


@functools.lru_cache(maxsize=None)
def logits_of(name, mode="sparse", **model):
  """jit: (params, tokens, segment_ids) -> logits."""
  geometry = {k: model.pop(k) for k in ("num_blocks",) if k in model}
  config = make_config(dataclasses.replace(METHODS[name], **geometry), **model)
  return jax.jit(lambda params, tokens, segments: model_lib.forward(
      config, params, tokens, segments, mode=mode, key=KEY, losses=False).logits)


def tokens_of(seed=0):
  return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


WHOLE = np.zeros((B, T), np.int32)
