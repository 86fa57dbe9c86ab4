"""Attention and selection for TPUs, as far as a CPU can tell: numbers, races, and that libtpu compiles them."""
import dataclasses
import functools

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import kernels_cases as cases
import numpy as np
import pytest

from pallas_kernels import backends, reference
from pallas_kernels.mosaic_tpu import aot, attention, compressed_attention, compressed_top_k, flash, index_top_k

FUNCTIONS = dict(attention=attention.attention, compressed_attention=compressed_attention.compressed_attention,
                 compressed_top_k=compressed_top_k.compressed_top_k, index_top_k=index_top_k.index_top_k)
H = 16
COMPRESSED = dict(block_len=8, block_stride=4)
SHAPE = functools.partial(cases.shape, H=H)
ATTENTIONS = {  # operation, options, tiles, shape
    "window": ("attention", dict(window=21), (16, 16), SHAPE(T=37, S=61)),
    "dense_g3": ("attention", {}, (16, 32), SHAPE(T=33, S=64, N=3, K=1)),
    "everything": ("attention", dict(causal=False, scale=0.3), (32, 16), SHAPE(T=21, S=40, N=2)),
    "compressed": ("compressed_attention", COMPRESSED, (16, 8), SHAPE(T=40, S=70, K=1)),
}


@functools.cache
def program(name):
  operation, options, tiles, _ = ATTENTIONS[name]
  return cases.with_gradients(FUNCTIONS[operation], **options, tiles=tiles, interpret=True)


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(flash, "PART_QUERIES", 8)  # two and more to a tile


@pytest.mark.parametrize("situation", cases.situations("attention"))
@pytest.mark.parametrize("name", cases.with_older_jax(ATTENTIONS, ["window", "compressed"]))
def test_attention_is_the_references(name, situation, small_parts):
  operation, options, _, shape = ATTENTIONS[name]
  exact = 2.0 ** -16 if situation == "huge_logits" else 2e-6
  cases.check(operation, program(name), cases.draw(operation, shape, situation), options=options, exact=exact)


def test_bfloat16_errs_as_bfloat16_does(small_parts):
  """And works on several parts of a tile at a time, which float32 does not."""
  operation, options, _, shape = ATTENTIONS["window"]
  inputs = cases.draw(operation, dataclasses.replace(shape, dtype="bfloat16"), "segments")
  cases.check(operation, program("window"), inputs, options=options, rounded=5e-3)


def test_huge_logits(small_parts):
  """o and lse hold; P of the backward pass is exp(s - lse), and a lse of 1e5 is 0.01 coarse in float32."""
  operation, options, _, shape = ATTENTIONS["window"]
  inputs = cases.draw(operation, shape, "segments", seed=1)
  q, k, v = (jnp.round(x) for x in inputs.arrays)  # scores are exact
  inputs = inputs._replace(arrays=(q * 1e4, k, v))
  got, want = program("window")(inputs), cases.truth(operation, **options)(inputs)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
  assert all(np.isfinite(x).all() for x in got[2:])


# --- selections ---------------------------------------------------------------

FREE, FORCED = dict(num_initial=0, num_local=0), dict(num_initial=1, num_local=1)
CHOICES = {  # operation, shape, tiles
    "index_free": ("index_top_k", dict(block_size=16, J=3, **FREE), (128, 128, 1)),
    "index_forced": ("index_top_k", dict(block_size=8, J=4), (128, 64, 1)),
    "index_all": ("index_top_k", dict(block_size=16, J=9, **FORCED), (128, 128, 1)),
    "nsa": ("compressed_top_k", dict(block_size=16, J=4, **FORCED), (128, 32)),
    "wide": ("compressed_top_k", dict(block_len=24, block_size=8, J=3, **FORCED), (128, 16)),
    "mean": ("compressed_top_k", dict(block_len=16, block_stride=16, block_size=16, J=5, **FORCED), (128, 8)),
}


@pytest.mark.parametrize("name", cases.with_older_jax(CHOICES, ["index_forced", "nsa", "wide"]))
def test_choices_are_the_oracles(name):
  operation, shape, tiles = CHOICES[name]
  size = dict(T=24, S=200, K=2, index_dim=H) if operation == "index_top_k" else dict(T=10, S=90, N=2, K=1)
  s = SHAPE(**size, **shape)
  how = dict(cases.options_of(operation, s), tiles=tiles, interpret=True)
  choose = jax.jit(functools.partial(FUNCTIONS[operation], **how))
  for situation in cases.situations(operation):
    for whole in (False, True):
      cases.check_selection(operation, choose, s, cases.draw(operation, s, situation, whole=whole), whole=whole)


def test_no_mass_anywhere_goes_to_the_lower_blocks():
  """Queries too early for a compressed block: every score is 0, and ties go to the lower block."""
  s = SHAPE(T=7, S=70, block_size=4, J=2, **FREE)
  (q, k), options = cases.draw("compressed_top_k", s).arrays, cases.options_of("compressed_top_k", s)
  lse = jnp.full(q.shape[:3], -jnp.inf)
  kernel = functools.partial(compressed_top_k.compressed_top_k, tiles=(128, 16), interpret=True, **options)
  got = jax.jit(kernel)(q, k, lse)
  np.testing.assert_array_equal(got, jax.jit(functools.partial(reference.compressed_top_k, **options))(q, k, lse))
  assert np.asarray(got)[:, 4:].tolist() == [[[[0, 1]] * 2] * 3] * 2


def test_a_score_that_is_no_number():
  cases.check_nan_scores(index_top_k=functools.partial(index_top_k.index_top_k, tiles=(128, 64, 1), interpret=True))


# --- races ---------------------------------------------------------------------


def strictly(function, *args, **options):
  """The result under the interpreter that simulates copies, memory that begins as NaN, and watches for races."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
  got = jax.block_until_ready(jax.jit(functools.partial(function, interpret=params, **options))(*args))
  assert not interpret_pallas_call.races.races_found
  return got


def test_attention_does_not_race():
  inputs, window = cases.draw("attention", SHAPE(B=1, T=48, N=2, K=1), "segments"), dict(window=20)
  cases.check("attention", lambda inputs: strictly(
      lambda inputs, **how: cases.with_gradients(attention.attention, tiles=(32, 16), **window, **how).both(inputs),
      inputs),
      inputs, options=window)


def test_choices_do_not_race():
  s = SHAPE(B=1, T=40, S=200, J=2, num_initial=0, num_local=1, index_dim=H)
  for operation, tiles in (("compressed_top_k", (128, 16)), ("index_top_k", (128, 64, 2))):
    choose = functools.partial(strictly, FUNCTIONS[operation], tiles=tiles, **cases.options_of(operation, s))
    inputs = cases.draw(operation, s, cases.Situation(documents=lambda S: 9, offset=(0.94,)))
    cases.check_selection(operation, choose, s, inputs)


# --- compilation and dispatch ---------------------------------------------------


def branches(q, k, v, k_cmp, q_idx, k_idx, do):
  """The four operations of an NSA and an MSA layer, with gradients."""
  import pallas_kernels as pk
  lengths = dict(block_len=32, block_stride=16)

  def attend(q, k, v, k_cmp):
    o, _ = pk.attention(q, k, v, window=512)
    o_cmp, lse = pk.compressed_attention(q, k_cmp, k_cmp, **lengths)
    return o + o_cmp, lse

  (o, lse), vjp = jax.vjp(attend, q, k, v, k_cmp)
  chosen = pk.compressed_top_k(q, k_cmp, lse, **lengths, block_size=64, num_blocks=16)
  return o, vjp((do, lse)), chosen, pk.index_top_k(q_idx, k_idx, block_size=64, num_blocks=16)


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("chip", cases.with_older_jax(aot.TOPOLOGIES, ["v5e"]))
def test_libtpu_compiles_the_kernels(chip):
  B, T, N, K, head_dim = 1, 1024, 8, 2, 128
  sds = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  q, k = sds(B, T, N, head_dim), sds(B, T, K, head_dim)
  compiled = aot.compile_for(chip, branches, q, k, k, sds(B, T // 16 - 1, K, head_dim), sds(B, T, K, 64),
                             sds(B, T, 64), q)
  kernels = " ".join(aot.kernels_of(compiled))
  for name in ("attention_forward", "attention_backward_q", "attention_backward_kv", "compressed_top_k",
               "index_top_k"):
    assert name in kernels
  assert aot.facts(compiled)["vmem_bytes"] < 16 * 2**20
  # Q, O and their gradients a few times over; 
  assert aot.facts(compiled)["temporary_bytes"] < 20 * T * N * head_dim * 2


@pytest.mark.parametrize("operation", FUNCTIONS)
def test_calls_on_a_tpu_come_here(operation):
  sds = jax.ShapeDtypeStruct
  q, k = sds((1, 64, 4, 64), jnp.bfloat16), sds((1, 64, 2, 64), jnp.bfloat16)
  selection = dict(block_size=32, num_blocks=2, num_initial=0, num_local=1)
  arguments = {
      "attention": dict(q=q, k=k, v=k, causal=True, window=None),
      "compressed_attention": dict(q=q, k_cmp=k, v_cmp=k, **COMPRESSED),
      "compressed_top_k": dict(q=q, k_cmp=k, lse=sds((1, 64, 4), jnp.float32), **COMPRESSED, **selection),
      "index_top_k": dict(q_idx=q, k_idx=sds((1, 64, 64), jnp.bfloat16), **selection),
  }[operation]
  common = dict(scale=0.5, segment_ids=None, query_offset=0)
  with backends.target_platform("tpu"):
    assert backends.choose(operation, None, {**arguments, **common}).name == "mosaic_tpu"


def test_supports_says_why_not():
  sds = jax.ShapeDtypeStruct
  bf16 = lambda *shape: sds(shape, jnp.bfloat16)
  q, k = bf16(1, 64, 4, 64), bf16(1, 64, 2, 64)
  half = lambda x: sds(x.shape, jnp.float16)
  assert attention.supports(q, k, k) is None
  assert attention.supports(half(q), k, k).startswith("q.dtype")
  assert attention.supports(q, half(k), k).startswith("k.dtype")
  assert attention.supports(bf16(1, 64, 4, 40), bf16(1, 64, 2, 40), bf16(1, 64, 2, 40)).startswith("q has head dim 40")
  assert attention.supports(bf16(1, 64, 512, 64), k, k).startswith("q has 256 heads")
  assert attention.supports(q, bf16(1, 0, 2, 64), bf16(1, 0, 2, 64)).endswith("is empty")
  assert attention.supports(q, k, k, scale=jnp.ones(())).startswith("scale")
  assert "SMEM" in attention.supports(bf16(1, 2**26, 4, 64), k, k)
  selection = dict(block_size=32, num_blocks=2)
  assert compressed_top_k.supports(q, k, **COMPRESSED, **selection) is None
  assert compressed_top_k.supports(q, k, block_len=8, block_stride=5, **selection).startswith("block_size = 32")
  assert compressed_top_k.supports(q, k, block_len=8, block_stride=1, block_size=64, num_blocks=2).startswith(
      "block_len = 8")
  q_idx, k_idx = bf16(1, 64, 2, 64), bf16(1, 64, 64)
  assert index_top_k.supports(q_idx, k_idx, **selection) is None
  assert index_top_k.supports(q_idx, k_idx, block_size=12, num_blocks=2).startswith("block_size = 12")
  assert index_top_k.supports(q_idx, k_idx, block_size=32, num_blocks=65).startswith("num_blocks = 65")
  assert index_top_k.supports(q_idx, bf16(1, 2**23, 64), **selection).startswith("the scores of 262144 blocks")
  assert attention.supports(*[bf16(1, 16, 2, 8)] * 3).startswith("q has head dim 8")
