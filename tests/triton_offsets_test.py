"""Triton kernels over arrays of more numbers than 32 bits count, in the interpreter, as triton_test.py says."""
import dataclasses

import jax
import jax.numpy as jnp
import kernels_cases as cases
import pytest

pytest.importorskip("triton", reason="triton is not installed")
from triton_test import interprets  # noqa: E402

from pallas_kernels.triton import call, heads, heads_kernels, kl  # noqa: E402


@interprets
def test_heads_of_a_long_sequence(monkeypatch):
  """The interpreter says where 32 bits overflow: at a tile that begins 2^31 numbers into its sequence, past its end."""
  import triton.language as tl
  from triton.runtime import interpreter
  N, H, walk = 2 ** 12, 128, heads.Walk(64, 64, 16, 4)  # the second tile begins at token 4,096
  monkeypatch.setattr(heads, "FORWARD", walk)
  monkeypatch.setattr(heads, "BACKWARD", walk)
  monkeypatch.setattr(heads, "_how", lambda y, walk: dict(
      grid=(1,), num_warps=4, num_stages=1, ROWS=walk.rows, TOKENS=walk.tokens, AHEAD=walk.ahead))
  monkeypatch.setattr(heads, "_programs", lambda y, walk: 2)  # whose shares have places
  builder, zero = interpreter.interpreter_builder, lambda: tl.program_id(0)
  monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
  monkeypatch.setattr(heads_kernels, "tile_of", lambda T, N, ROWS: (zero().to(tl.int64), zero() + 1, zero()))
  y, taps, first = jnp.ones((1, 1, N, H)), jnp.ones((3, N, H)), jnp.zeros((1, 1), jnp.int32)
  out, pull = jax.vjp(lambda y: heads.heads(y, taps, None, None, None, first, 1e-5), y)
  pull(out)


@interprets
def test_index_kl_where_q_idx_alone_has_so_many(monkeypatch):
  s = cases.shape(T=20, S=60, N=2, K=2, H=16, index_dim=32, block_size=16)  # q has half as many numbers as q_idx
  inputs, wide, kernel_call = cases.draw("index_kl", s, "segments"), [], call.kernel_call
  assert inputs.rest["q"].size < inputs.arrays[0].size
  monkeypatch.setattr(kl, "COUNTED", inputs.arrays[0].size)

  def asked(*a, **how):
    wide.extend([how["WIDE"]] if how["name"] == "index_kl_forward" else [])
    return kernel_call(*a, **how)

  monkeypatch.setattr(call, "kernel_call", asked)
  cases.of_index(kl.index_kl)(*inputs.arrays, **inputs.rest, block_size=s.block_size, scale=0.25, index_scale=0.2)
  assert wide == [True]
