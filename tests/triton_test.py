"""Attention by Triton kernels and cuDNN, and what all Triton kernels share: lowering, and `gpu` tests.

`TRITON_INTERPRET=1 pytest tests/triton_test.py tests/triton_selections_test.py` runs the kernels' arithmetic on the CPU
where torch is installed.
"""
import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import kernels_cases as cases
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, reference

pytest.importorskip("triton", reason="triton is not installed")
from pallas_kernels import cudnn, cudnn_triton  # noqa: E402
from pallas_kernels.triton import call, ranged, selected, tuning  # noqa: E402

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
lowers = pytest.mark.skipif(call.unavailable() is not None or call.INTERPRET, reason=str(call.unavailable()))
try:
  import torch  # noqa: F401
except ImportError:
  torch = None
interprets = pytest.mark.skipif(not call.INTERPRET or torch is None, reason="needs TRITON_INTERPRET=1 and torch")


# --- attention, compressed attention, selected attention --------------------------

COMPRESSED = dict(block_len=32, block_stride=16)
SHAPE = functools.partial(cases.shape, dtype="bfloat16", **COMPRESSED)
PACKED, AT_THE_END = "segments", cases.Situation(offset=(1,))
CASES = {  # operation, shape, situation, options
    "dense_g16": ("attention", SHAPE(B=1, T=300, N=32, H=128), "from_the_start", {}),
    "window_g3_packed": ("attention", SHAPE(T=400, N=6, H=64), PACKED, dict(window=70)),
    "seen_from_both_sides": ("attention", SHAPE(B=1, T=200, K=4, H=64), PACKED, dict(causal=False)),
    "cache": ("attention", SHAPE(T=3, N=16, H=128, S=1000), cases.Situation(offset=(0.993,)), {}),
    "beyond_a_cache": ("attention", SHAPE(B=3, T=1, N=8, H=64, S=2000), cases.Situation(offset=(0.0025, 0.35, 1)), {}),
    "compressed_g16": ("compressed_attention", SHAPE(B=1, T=1040, N=16, K=1, H=128), "from_the_start", {}),
    "compressed_packed": ("compressed_attention", SHAPE(T=700, N=8, H=64), PACKED, {}),
    "compressed_decode": ("compressed_attention", SHAPE(T=1, N=16, H=128, S=4900), AT_THE_END, {}),
    "selected_g16": ("selected_attention", SHAPE(B=1, T=300, N=16, K=1, H=128, block_size=64), "half_empty", {}),
    "selected_g3_packed": ("selected_attention", SHAPE(T=300, N=6, H=64, block_size=32), PACKED, {}),
    "selected_g1_b128": ("selected_attention", SHAPE(B=1, T=500, N=2, H=128, block_size=128), "from_the_start", {}),
    "selected_decode": ("selected_attention", SHAPE(B=4, T=1, N=16, H=128, block_size=64, S=700), AT_THE_END, {}),
    "dense_h96": ("attention", SHAPE(B=1, T=300, N=6, H=96), "from_the_start", {}),
    "compressed_h80": ("compressed_attention", SHAPE(B=1, T=700, H=80), "from_the_start", {}),
    "selected_g3_h96_b32": ("selected_attention", SHAPE(B=1, T=300, N=6, H=96, block_size=32), "from_the_start", {}),
    "selected_h256": ("selected_attention", SHAPE(B=1, T=300, N=8, H=256, block_size=64), "from_the_start", {}),
    "huge_logits": ("attention", SHAPE(B=1, T=256, K=1, H=128), "huge_logits", {}),
    **{f"inherited, {operation}, {situation}": (operation, SHAPE(T=250, N=6, H=64, block_size=32, S=300), situation, {})
       for operation in ("attention", "compressed_attention", "selected_attention")
       for situation in cases.situations(operation)},
}
CUDNN = {
    "dense_g16": CASES["dense_g16"],
    "window": ("attention", SHAPE(T=333, N=6, H=64), "from_the_start", dict(window=70)),
    "compressed_g16": ("compressed_attention", SHAPE(B=1, T=2100, N=16, K=1, H=128), "from_the_start", {}),
    "compressed_8_by_4": ("compressed_attention", SHAPE(T=1111, H=64, block_len=8, block_stride=4), "from_the_start",
                          {}),
}


def check_error(case, implementation):
  operation, shape, situation, options = case
  f = functools.partial(getattr(pk, operation), implementation=implementation)
  cases.check_on_device(operation, f, shape, situation, **options)


def on_device(case, seed=0, **how):
  """A program with gradients and its inputs."""
  operation, shape, situation, options = case
  program = cases.with_gradients(getattr(pk, operation), **cases.options_of(operation, shape), **options, **how)
  return program, cases.draw(operation, shape, situation, seed, always=False)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_error_on_device_is_that_of_the_dtype(name):
  check_error(CASES[name], "triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("implementation", ["cudnn", "cudnn_triton"])
@pytest.mark.parametrize("name", CUDNN)
def test_error_of_cudnn_is_that_of_the_dtype(name, implementation):
  check_error(CUDNN[name], implementation)


def test_stairs_are_causal_attention(monkeypatch):
  monkeypatch.setattr(cudnn, "_dense", lambda q, k, v, causal, window, scale: reference.attention(
      q, k, v, causal=causal, window=window, scale=scale))
  strides = dict(block_len=8, block_stride=4, scale=0.3)
  inputs = cases.draw("compressed_attention", cases.shape(T=53, H=8), "from_the_start", always=False)
  cases.check("compressed_attention", cases.with_gradients(cudnn.compressed_attention, **strides), inputs,
              options=strides, exact=1e-5)


# --- determinism, long arrays, dispatch -----------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name, implementation", [
    ("window_g3_packed", "triton"), ("compressed_packed", "triton"), ("selected_g16", "triton"),
    ("cache", "triton"), ("compressed_decode", "triton"), ("selected_decode", "triton"),
    ("dense_g16", "cudnn_triton"), ("compressed_g16", "cudnn_triton")])
def test_same_bits_over_20_runs(name, implementation):
  case = CUDNN[name] if implementation == "cudnn_triton" else CASES[name]
  cases.same_bits(*on_device(case, seed=1, implementation=implementation))


@pytest.mark.gpu
@needs_gpu
def test_more_than_2_to_31_numbers():
  T, N, H, window, tail = 270_000, 64, 128, 64, 300
  key = jax.random.key(0)
  q = jax.random.normal(key, (1, T, N, H), jnp.bfloat16)
  k = jax.random.normal(jax.random.key(1), (1, T, 4, H), jnp.bfloat16)
  assert q.size > 2 ** 31

  def run(q, k):
    f = lambda q, k: pk.attention(q, k, k, window=window, implementation="triton")[0]
    o, vjp = jax.vjp(f, q, k)
    return o, *vjp(q)

  o, dq, dk = (x[:, -tail + window:] for x in jax.jit(run)(q, k))
  short = [x[:, window:] for x in jax.jit(run)(q[:, -tail:], k[:, -tail:])]
  for x, y in zip((o, dq, dk), short):  # another tiling: the sums of dK come in another order
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    assert np.linalg.norm(x - y) <= 4e-3 * np.linalg.norm(y)


@pytest.mark.gpu
@needs_gpu
def test_dispatch_on_a_gpu():
  sds = jax.ShapeDtypeStruct
  q, k, blocks = sds((1, 512, 8, 64), jnp.bfloat16), sds((1, 512, 2, 64), jnp.bfloat16), sds((1, 512, 2, 4), jnp.int32)
  where = dict(scale=0.1, segment_ids=sds((1, 512), jnp.int32), query_offset=0)
  chosen = lambda operation, **a: backends.choose(operation, None, {**where, **a}).name
  assert chosen("attention", q=q, k=k, v=k, causal=True, window=64) == "triton"
  assert chosen("selected_attention", q=q, k=k, v=k, block_indices=blocks, block_size=32) == (
      "mosaic_gpu" if call.capability() == 90 else "triton")
  one = sds((1, 1, 8, 64), jnp.bfloat16)
  assert chosen("selected_attention", q=one, k=k, v=k, block_indices=sds((1, 1, 2, 4), jnp.int32),
                block_size=32) == "triton"


def test_cudnn_is_chosen_only_where_its_sums_have_an_order(monkeypatch):
  a = call_of("attention", T=512)
  monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
  assert "XLA_FLAGS" in cudnn.avoid(**a)
  for flag in ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_deterministic_ops --xla_foo=1"):
    monkeypatch.setenv("XLA_FLAGS", flag)
    assert cudnn.avoid(**a) is None
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
  assert cudnn.avoid(**a) is not None


def call_of(operation, T, B=1, N=64, H=128):
  """Arguments of a call that cuDNN serves."""
  sds = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  where = dict(q=sds(B, T, N, H), scale=0.1, segment_ids=None, query_offset=0)
  if operation == "attention":
    return dict(where, k=sds(B, T, 4, H), v=sds(B, T, 4, H), causal=True, window=512)
  k = sds(B, T // 16 - 1, 4, H)
  return dict(where, k_cmp=k, v_cmp=k, **COMPRESSED)


WORKSPACES = [  # operation, T, B, GiB, and whether that is too much
    ("attention", 65536, 1, "512.0", True), ("compressed_attention", 65536, 1, "32.0", True),
    ("attention", 8192, 1, "8.0", True), ("attention", 4096, 2, "4.0", False), ("attention", 4096, 3, "6.0", True),
    ("compressed_attention", 16384, 1, "2.0", False),
]


@pytest.mark.parametrize("operation, T, B, gib, refused", WORKSPACES)
def test_cudnn_with_a_large_workspace_is_served_by_name_only(operation, T, B, gib, refused, monkeypatch, caplog):
  monkeypatch.setattr(cudnn, "unavailable", lambda: None)
  monkeypatch.setattr(backends, "_logged", set())
  caplog.set_level("INFO", logger="pallas_kernels")
  a = call_of(operation, T, B)
  chosen = lambda name: backends.choose(operation, name, a).name
  with backends.target_platform("gpu"):
    backends.available(operation)  # imports what there is, so that nothing replaces the stand-in
    for name in ("cudnn_triton", "triton"):
      monkeypatch.setitem(backends._registered[operation], name,
                          backends.Implementation(name, None, ("gpu",), lambda **_: None))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=true")
    assert f"{cudnn.workspace_bytes(a['q'], a.get('k', a.get('k_cmp'))) / 2 ** 30:.1f}" == gib
    assert chosen("cudnn") == "cudnn"
    if refused:
      assert f"{gib} GiB, more than 4" in cudnn.avoid(**a) and chosen(None) == "cudnn_triton"
      assert caplog.records[-1].message == f"{operation}: cudnn_triton (gpu), not cudnn: {cudnn.avoid(**a)}"
    else:
      assert cudnn.avoid(**a) is None and chosen(None) == "cudnn"
    assert chosen("fastest") == "cudnn"
    monkeypatch.delenv("XLA_FLAGS")
    assert chosen(None) == "cudnn_triton" and "XLA_FLAGS" in cudnn.avoid(**a)
    assert chosen("fastest") == "cudnn"


# --- lowering, and the interpreter ----------------------------------------------


def lowered(f, *arguments):
  try:
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="gpu")
  except TypeError:  # jax before 0.11 knows no platform of an abstract device
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132)
  with backends.target_platform("gpu"), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@lowers
def test_lowers_for_h100(monkeypatch):
  names, real = [], call.kernel_call
  monkeypatch.setattr(call, "kernel_call", lambda *a, name, **kw: names.append(name) or real(*a, name=name, **kw))
  sds = jax.ShapeDtypeStruct
  B, T, N, K, H, C = 2, 1024, 8, 2, 64, 63
  q, k, k_cmp = (sds(s, jnp.bfloat16) for s in ((B, T, N, H), (B, T, K, H), (B, C, K, H)))
  q_idx, k_idx, ids = sds((B, T, K, H), jnp.bfloat16), sds((B, T, H), jnp.bfloat16), sds((B, T), jnp.int32)
  choice = dict(block_size=32, num_blocks=4, implementation="triton")

  def everything(q, k, k_cmp, q_idx, k_idx, ids):
    o_cmp, lse = pk.compressed_attention(q, k_cmp, k_cmp, segment_ids=ids, implementation="triton", **COMPRESSED)
    by_cmp = pk.compressed_top_k(q, k_cmp, lse, segment_ids=ids, **COMPRESSED, **choice)
    by_idx = pk.index_top_k(q_idx, k_idx, segment_ids=ids, **choice)
    o, lse = pk.selected_attention(q, k, k, by_cmp, block_size=32, segment_ids=ids, implementation="triton")
    loss = pk.index_kl(q, k, lse, q_idx, k_idx, by_idx, block_size=32, segment_ids=ids, implementation="triton")
    mass, _ = pk.block_mass(q, k, lse, block_size=32, segment_ids=ids, implementation="triton")
    for lists in (None, by_idx):
      mass += pk.block_peak(q, k, lse, lists, block_size=32, segment_ids=ids, implementation="triton")
    heads = jnp.stack([q_idx, q_idx], 3), q_idx[..., :2], k_idx
    scores = pk.lightning_scores(*heads, block_size=32, segment_ids=ids, implementation="triton")
    by_score = pk.block_top_k(scores, segment_ids=ids, **choice)
    for lists in (None, by_score):
      loss += pk.lightning_kl(q, k, lse, *heads, lists, block_size=32, segment_ids=ids, implementation="triton")
    return o_cmp.astype(jnp.float32).sum() + o.astype(jnp.float32).sum() + loss.sum() + mass.sum()

  text = lowered(jax.grad(everything, (0, 1, 2, 3, 4)), q, k, k_cmp, q_idx, k_idx, ids)
  for kernel in ("range_attention_forward", "range_attention_dq", "range_attention_dkv", "compressed_scores",
                 "index_scores", "choose_blocks", "selected_attention_forward", "selected_attention_dkv", "sum_keys",
                 "index_kl_forward", "index_kl_merge", "index_kl_backward", "index_kl_gather_sum", "sum_units",
                 "block_mass", "block_peak", "lightning_scores",
                 "lightning_kl_forward", "lightning_kl_ds", "lightning_kl_dq", "lightning_kl_dk"):
    assert kernel in names, kernel
  assert len(set(names)) <= text.count("@triton_kernel_call") <= len(names)  # equal calls may be merged


@lowers
@pytest.mark.parametrize("name, kernels", [("beyond_a_cache", 2), ("compressed_decode", 1), ("selected_decode", 2)])
def test_decoding_lowers_for_h100_to_two_kernels_at_most(name, kernels):
  """Of parts of the keys, where there are several, and of what they come to."""
  operation, shape, situation, options = CASES[name]
  inputs = cases.draw(operation, shape, situation, always=False)
  options = {**cases.options_of(operation, shape), **options}
  f = lambda q, k, v: getattr(pk, operation)(q, k, v, implementation="triton", **inputs.rest, **options)
  assert lowered(f, *inputs.arrays).count("@triton_kernel_call") == kernels


SMALL = {  # for the interpreter
    "attention": ("attention", cases.shape(T=29, N=6, H=16), PACKED, dict(window=9)),
    "attention_parts": ("attention", cases.shape(B=1, T=3, H=16, S=300), cases.Situation(offset=(0.976,)), {}),
    "compressed": ("compressed_attention", cases.shape(B=1, T=60, N=2, K=1, H=16), PACKED, {}),
    "selected, one token": ("selected_attention", cases.shape(T=1, H=16, block_size=16, S=70, J=5),
                            "duplicates_and_strangers", {}),
    "selected": ("selected_attention", cases.shape(B=1, T=20, H=16, block_size=16, S=40), "random", {}),
    **{f"inherited, {situation}": ("selected_attention", cases.shape(T=20, H=16, block_size=16, S=70, J=3), situation,
                                   {})
       for situation in cases.situations("selected_attention")},
}
TINY = tuning.Tuned(16, 16, 1, 1)


@contextlib.contextmanager
def tiny_tiles(*kernels):
  with contextlib.ExitStack() as stack:
    for kernel in kernels or ("range_forward", "range_dq", "range_dkv", "range_decode"):
      stack.enter_context(tuning.override(kernel, TINY))
    yield


@interprets
@pytest.mark.parametrize("name", [*SMALL, "attention/another forward pass", "compressed/another forward pass"])
def test_interpreted_kernels_agree(name, monkeypatch):
  """Another forward pass: cudnn_triton's gradients from the o and lse that cuDNN, here the reference, leaves."""
  name, _, other = name.partition("/")
  operation, shape, situation, options = SMALL[name]
  inputs = cases.draw(operation, shape, "from_the_start" if other else situation, always=False)
  options = {**cases.options_of(operation, shape), "scale": 0.25, **options}
  used = []
  if other:
    of_cudnn = lambda *a, **kw: used.append(operation) or getattr(reference, operation)(*a, **kw)
    monkeypatch.setattr(cudnn, operation, of_cudnn)
  module = cudnn_triton if other else selected if operation == "selected_attention" else ranged
  if operation == "attention":
    options = {**dict(causal=True, window=None), **options}
  exact = 2.0 ** -16 if situation == "huge_logits" else 2e-6
  with tiny_tiles():
    cases.check(operation, cases.with_gradients(getattr(module, operation), **options), inputs, options=options,
                exact=exact)
  assert bool(used) == bool(other)


@interprets
def test_interpreted_head_dim_that_is_no_power_of_two():
  shape = cases.shape(B=1, T=20, N=6, H=12, block_size=16)
  f = functools.partial(pk.selected_attention, block_size=16, implementation="triton")
  with backends.target_platform("gpu"):
    cases.check("selected_attention", cases.with_gradients(f),
                cases.draw("selected_attention", shape, "from_the_start"), options=dict(block_size=16))


@interprets
def test_interpreted_under_vmap():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k = draw(2, 1, 20, 2, 16), draw(2, 1, 20, 1, 16)
  ids = jnp.asarray(np.sort(rng.integers(0, 4, size=(1, 20)), axis=1), jnp.int32)

  def run(module, q, k, ids):
    f = lambda q, k: module.attention(q, k, k, causal=True, window=9, scale=0.3, segment_ids=ids, query_offset=0)
    (o, lse), vjp = jax.vjp(f, q, k)
    return o, lse, *vjp((o, lse))

  with tiny_tiles():
    got = jax.vmap(functools.partial(run, ranged), in_axes=(0, 0, None))(q, k, ids)
  want = jax.vmap(functools.partial(run, reference), in_axes=(0, 0, None))(q, k, ids)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
