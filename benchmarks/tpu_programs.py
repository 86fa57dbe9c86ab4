"""The programs that benchmarks.compile_tpu compiles: train steps for one device, operations with their gradients."""
from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from nsa import schedule, sharding, step as step_lib
import pallas_kernels
from pallas_kernels.mosaic_tpu import aot


def shrunk(config):
  """The config with little of everything, for compilation in seconds: the same kernels at small shapes."""
  config.model.num_layers, config.model.d_model, config.model.num_heads, config.model.mlp_dim = 1, 128, 4, 256
  config.data.context, config.data.global_batch = 256, 1
  return config


def train_step(config):
  """The train step of the last stage of a config on one device, and the shapes of its arguments."""
  what = schedule.at(config, config.schedule.steps - 1)
  function, arguments, _ = step_lib.program(config, what, sharding.make_mesh(config, jax.devices()[:1]))
  return function, arguments


def operations(spec):
  """{name: (function, shapes of its arguments)} of the operations that have TPU kernels, with gradients."""
  s, dtype = spec, jnp.dtype(spec.dtype)
  of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  q, k, cmp = of(s.B, s.T, s.N, s.H), of(s.B, s.T, s.K, s.H), of(s.B, s.num_compressed, s.K, s.H)
  q_idx, k_idx = of(s.B, s.T, s.K, s.index_dim), of(s.B, s.T, s.index_dim)
  lse = jax.ShapeDtypeStruct((s.B, s.T, s.N), jnp.float32)
  blocks = jax.ShapeDtypeStruct((s.B, s.T, s.K, s.J), jnp.int32)
  ids = jax.ShapeDtypeStruct((s.B, s.T), jnp.int32)
  lengths = dict(block_len=s.block_len, block_stride=s.block_stride)
  choice = dict(block_size=s.block_size, num_blocks=s.J, num_initial=s.num_initial, num_local=s.num_local)

  def attend(name, **options):
    def both(q, k, v, do, dlse, ids, *rest):
      f = functools.partial(getattr(pallas_kernels, name), segment_ids=ids, **options)
      out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, *rest), q, k, v)
      return out, vjp((do, dlse))
    return both

  def kl(q, k, lse, q_idx, k_idx, blocks, ids, dloss):
    f = lambda q_idx, k_idx: pallas_kernels.index_kl(q, k, lse, q_idx, k_idx, blocks, block_size=s.block_size,
                                                     segment_ids=ids)
    loss, vjp = jax.vjp(f, q_idx, k_idx)
    return loss, vjp(dloss)

  return {
      "attention": (attend("attention"), (q, k, k, q, lse, ids)),
      "attention, window": (attend("attention", window=s.window), (q, k, k, q, lse, ids)),
      "compressed_attention": (attend("compressed_attention", **lengths), (q, cmp, cmp, q, lse, ids)),
      "compressed_top_k": (lambda q, k, lse, ids: pallas_kernels.compressed_top_k(
          q, k, lse, segment_ids=ids, **lengths, **choice), (q, cmp, lse, ids)),
      "index_top_k": (lambda q, k, ids: pallas_kernels.index_top_k(q, k, segment_ids=ids, **choice),
                      (q_idx, k_idx, ids)),
      "selected_attention": (attend("selected_attention", block_size=s.block_size), (q, k, k, q, lse, ids, blocks)),
      "index_kl": (kl, (q, k, lse, q_idx, k_idx, blocks, ids,
                        jax.ShapeDtypeStruct((s.B, s.T, s.K), jnp.float32))),
  }


def row(program, chip, function, arguments, **jit_options):
  """One line of the table."""
  start = time.process_time()
  compiled = aot.compile_for(chip, function, *arguments, **jit_options)
  seconds = time.process_time() - start
  return {"program": program, "chip": chip, "compile_cpu_seconds": round(seconds, 1), **aot.facts(compiled),
          "kernels": " ".join(sorted(aot.kernels_of(compiled))), "jax": jax.__version__, "libtpu": aot.version()}
