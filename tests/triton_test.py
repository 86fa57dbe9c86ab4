"""Attention by Triton kernels and cuDNN, and what all Triton kernels share: lowering, and `gpu` tests.

`TRITON_INTERPRET=1 pytest tests/triton_test.py tests/triton_selections_test.py` runs the kernels' arithmetic on the CPU
where torch is installed.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends
from pallas_kernels import masked
from pallas_kernels import reference

pytest.importorskip("triton", reason="triton is not installed")
from pallas_kernels import cudnn  # noqa: E402
from pallas_kernels import cudnn_triton  # noqa: E402
from pallas_kernels.triton import call  # noqa: E402
from pallas_kernels.triton import ranged  # noqa: E402
from pallas_kernels.triton import selected  # noqa: E402
from pallas_kernels.triton import tuning  # noqa: E402

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
lowers = pytest.mark.skipif(call.unavailable() is not None or call.INTERPRET, reason=str(call.unavailable()))
try:
  import torch  # noqa: F401
except ImportError:
  torch = None
interprets = pytest.mark.skipif(not call.INTERPRET or torch is None, reason="needs TRITON_INTERPRET=1 and torch")


on_cpu = functools.partial(jax.default_device, jax.devices("cpu")[0])


def on_host(tree):
  """Arrays of a tree on the default device; other leaves stay."""
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)) if isinstance(x, jax.Array) else x, tree)


def with_gradients(f):
  """f(*differentiable) -> floating arrays, to (differentiable, cotangents) -> results and gradients."""
  def both(arguments, cotangents):
    out, vjp = jax.vjp(f, *arguments)
    finite = lambda x, c: jnp.where(jnp.isfinite(x), c, 0).astype(x.dtype)
    return (*jax.tree.leaves(out), *vjp(jax.tree.map(finite, out, cotangents)))
  return jax.jit(both)


def drawn_segments(rng, B, S, n=4):
  return jnp.asarray(np.sort(rng.integers(0, n, size=(B, S)), axis=1), jnp.int32)


def in_dtype(q, k, v, mask, scale):
  """What XLA makes of masked attention in q's dtype: the yardstick for the error of a kernel. mask [B, K, T, S]."""
  (B, T, N, H), K = q.shape, k.shape[2]
  s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
  s = jnp.where(mask[:, :, None], s * scale, -jnp.inf)
  lse = jax.nn.logsumexp(s, axis=-1)
  p = jnp.exp(s - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
  o = jnp.einsum("bkgts,bskh->btkgh", p.astype(q.dtype), v, preferred_element_type=jnp.float32)
  return o.astype(q.dtype).reshape(q.shape), lse.transpose(0, 3, 1, 2).reshape(B, T, N)


# --- attention, compressed attention, selected attention --------------------------

COMPRESSED = dict(block_len=32, block_stride=16)
CASES = {  # operation, shape of q, K, S, options
    "dense_g16": ("attention", (1, 300, 32, 128), 2, 300, {}),
    "window_g3_packed": ("attention", (2, 400, 6, 64), 2, 400, dict(window=70, segments=True)),
    "seen_from_both_sides": ("attention", (1, 200, 4, 64), 4, 200, dict(causal=False, segments=True)),
    "cache": ("attention", (2, 3, 16, 128), 2, 1000, dict(query_offset=990)),
    "beyond_a_cache": ("attention", (3, 1, 8, 64), 2, 2000, dict(query_offset=np.int32([5, 700, 1999]))),
    "compressed_g16": ("compressed_attention", (1, 1040, 16, 128), 1, 64, COMPRESSED),
    "compressed_packed": ("compressed_attention", (2, 700, 8, 64), 2, 42, dict(COMPRESSED, segments=True)),
    "compressed_decode": ("compressed_attention", (2, 1, 16, 128), 2, 300, dict(COMPRESSED, query_offset=4900)),
    "selected_g16": ("selected_attention", (1, 300, 16, 128), 1, 300, dict(block_size=64)),
    "selected_g3_packed": ("selected_attention", (2, 300, 6, 64), 2, 300, dict(block_size=32, segments=True)),
    "selected_g1_b128": ("selected_attention", (1, 500, 2, 128), 2, 500, dict(block_size=128)),
    "selected_decode": ("selected_attention", (4, 1, 16, 128), 2, 700, dict(block_size=64, query_offset=650)),
    "dense_h96": ("attention", (1, 300, 6, 96), 2, 300, {}),
    "compressed_h80": ("compressed_attention", (1, 700, 4, 80), 2, 42, COMPRESSED),
    "selected_g3_h96_b32": ("selected_attention", (1, 300, 6, 96), 2, 300, dict(block_size=32)),
    "selected_h256": ("selected_attention", (1, 300, 8, 256), 2, 300, dict(block_size=64)),
    "huge_logits": ("attention", (1, 256, 4, 128), 1, 256, dict(magnitude=6.0)),
}
CUDNN = {
    "dense_g16": CASES["dense_g16"],
    "window": ("attention", (2, 333, 6, 64), 2, 333, dict(window=70)),
    "compressed_g16": ("compressed_attention", (1, 2100, 16, 128), 1, 130, COMPRESSED),
    "compressed_8_by_4": ("compressed_attention", (2, 1111, 4, 64), 2, 276, dict(block_len=8, block_stride=4)),
}


def inputs_of(case, seed, dtype=jnp.bfloat16):
  """operation, (q, k, v), (do, dlse), keyword arguments, mask [B, 1 or K, T, S]."""
  operation, (B, T, N, H), K, S, options = case
  options, rng = dict(options), np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * options.get("magnitude", 1.0), dtype)
  arrays = draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H)
  options.pop("magnitude", None)
  offset = options.setdefault("query_offset", 0)
  tokens = S if operation != "compressed_attention" else max(int(np.max(offset)) + T, S * options["block_stride"] + 64)
  if options.pop("segments", False):
    options["segment_ids"] = drawn_segments(rng, B, tokens)
  pos, seg = reference._query_positions(T, jnp.asarray(offset), options.get("segment_ids"))
  if operation == "compressed_attention":
    mask = reference._visible_compressed(pos, seg, S, options.get("segment_ids"), options["block_len"],
                                         options["block_stride"])[:, None]
  elif operation == "selected_attention":
    blocks = rng.integers(-1, -(-S // options["block_size"]) + 1, size=(B, T, K, 4))
    blocks[:, :1] = -1 if T > 1 else blocks[:, :1]
    options["block_indices"] = jnp.asarray(blocks, jnp.int32)
    mask = reference._selected_tokens(options["block_indices"], pos, seg, slice(0, S), options.get("segment_ids"),
                                      options["block_size"])
  else:
    mask = masked.visible_tokens(pos, seg, slice(0, S), options.get("segment_ids"),
                                     causal=options.get("causal", True), window=options.get("window"))[:, None]
  cotangents = draw(B, T, N, H), jnp.asarray(rng.normal(size=(B, T, N)), jnp.float32)
  return operation, arrays, cotangents, options, jnp.broadcast_to(mask, (B, *mask.shape[1:]))


def check_error(case, implementation, seed=0):
  operation, arrays, cotangents, options, mask = inputs_of(case, seed)
  f = functools.partial(getattr(pk, operation), implementation=implementation, **options)
  got = with_gradients(f)(arrays, cotangents)
  with on_cpu():
    host = on_host((arrays, cotangents, options, mask))
    arrays, cotangents, _, mask = host
    scale = arrays[0].shape[-1] ** -0.5
    up = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    exact = functools.partial(getattr(reference, operation), **host[2])
    want = with_gradients(exact)(up(arrays), up(cotangents))
    theirs = with_gradients(lambda *a: in_dtype(*a, mask, scale))(arrays, cotangents)
  compare(got, theirs, want, ("o", "lse", "dq", "dk", "dv"))


def compare(got, theirs, want, names):
  for what, x, y, z in zip(names, got, theirs, want):
    x, y, z = (np.asarray(a, np.float64) for a in (x, y, z))
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(z), err_msg=what)
    finite = np.isfinite(z)
    x, y, z = x[finite], y[finite], z[finite]
    error, bar = np.linalg.norm(x - z), 3 if what.startswith("d") else 2
    assert error <= bar * np.linalg.norm(y - z) + 1e-6 * max(np.linalg.norm(z), 1e-3), (
        what, error, np.linalg.norm(y - z), np.linalg.norm(z))


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
  call_ = dict(block_len=8, block_stride=4, scale=0.3, segment_ids=None, query_offset=0)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  arrays, cotangents = (draw(2, 53, 4, 8), draw(2, 12, 2, 8), draw(2, 12, 2, 8)), (draw(2, 53, 4, 8), draw(2, 53, 4))
  got = with_gradients(functools.partial(cudnn.compressed_attention, **call_))(arrays, cotangents)
  want = with_gradients(functools.partial(reference.compressed_attention, **call_))(arrays, cotangents)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


# --- determinism, long arrays, dispatch -----------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name, implementation", [
    ("window_g3_packed", "triton"), ("compressed_packed", "triton"), ("selected_g16", "triton"),
    ("cache", "triton"), ("compressed_decode", "triton"), ("selected_decode", "triton"),
    ("dense_g16", "cudnn_triton"), ("compressed_g16", "cudnn_triton")])
def test_same_bits_over_20_runs(name, implementation):
  case = CUDNN[name] if implementation == "cudnn_triton" else CASES[name]
  operation, arrays, cotangents, options, _ = inputs_of(case, 1)
  run = with_gradients(functools.partial(getattr(pk, operation), implementation=implementation, **options))
  first = [np.asarray(x).view(np.uint8) for x in run(arrays, cotangents)]
  for _ in range(19):
    for x, y in zip(first, run(arrays, cotangents)):
      np.testing.assert_array_equal(x, np.asarray(y).view(np.uint8))


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
    return o_cmp.astype(jnp.float32).sum() + o.astype(jnp.float32).sum() + loss.sum() + mass.sum()

  text = lowered(jax.grad(everything, (0, 1, 2, 3, 4)), q, k, k_cmp, q_idx, k_idx, ids)
  for kernel in ("range_attention_forward", "range_attention_dq", "range_attention_dkv", "compressed_scores",
                 "index_scores", "choose_blocks", "selected_attention_forward", "selected_attention_dkv",
                 "index_kl_forward", "index_kl_backward", "sum_units", "block_mass"):
    assert kernel in names, kernel
  assert len(set(names)) <= text.count("@triton_kernel_call") <= len(names)  # equal calls may be merged


@lowers
@pytest.mark.parametrize("name", ["beyond_a_cache", "compressed_decode", "selected_decode"])
def test_decoding_lowers_for_h100_to_one_kernel(name):
  operation, arrays, _, options, _ = inputs_of(CASES[name], 0)
  f = functools.partial(getattr(pk, operation), implementation="triton", **options)
  assert lowered(f, *arrays).count("@triton_kernel_call") == 1


SMALL = {  # for the interpreter
    "attention": ("attention", (2, 29, 6, 16), 2, 29, dict(window=9, segments=True)),
    "attention_parts": ("attention", (1, 3, 4, 16), 2, 300, dict(query_offset=290)),
    "compressed": ("compressed_attention", (1, 60, 2, 16), 1, 14, dict(block_len=8, block_stride=4, segments=True)),
    "selected": ("selected_attention", (1, 20, 4, 16), 2, 40, dict(block_size=16, query_offset=20)),
}
TINY = tuning.Tuned(16, 16, 1, 1)


@interprets
@pytest.mark.parametrize("name", [*SMALL, "attention, another forward pass", "compressed, another forward pass"])
def test_interpreted_kernels_agree(name, monkeypatch):
  """Another forward pass: cudnn_triton's gradients from the o and lse that cuDNN, here the reference, leaves."""
  name, _, other = name.partition(", ")
  operation, arrays, cotangents, options, _ = inputs_of(SMALL[name], 0, jnp.float32)
  options = {**dict(scale=0.25, segment_ids=None), **options}
  used = []
  if other:
    options["segment_ids"] = None
    of_cudnn = lambda *a, **kw: used.append(operation) or getattr(reference, operation)(*a, **kw)
    monkeypatch.setattr(cudnn, operation, of_cudnn)
  module = cudnn_triton if other else selected if operation == "selected_attention" else ranged
  if operation == "attention":
    options = {**dict(causal=True, window=None), **options}
  with tuning.override("range_forward", TINY), tuning.override("range_dq", TINY), tuning.override("range_dkv", TINY), \
       tuning.override("range_decode", TINY):
    got = with_gradients(functools.partial(getattr(module, operation), **options))(arrays, cotangents)
  want = with_gradients(functools.partial(getattr(reference, operation), **options))(arrays, cotangents)
  assert bool(used) == bool(other)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@interprets
def test_interpreted_head_dim_that_is_no_power_of_two():
  operation, arrays, cotangents, options, _ = inputs_of(
      ("selected_attention", (1, 20, 6, 12), 2, 20, dict(block_size=16)), 0, jnp.float32)
  f = functools.partial(getattr(pk, operation), **options)
  with backends.target_platform("gpu"):
    got = with_gradients(functools.partial(f, implementation="triton"))(arrays, cotangents)
  for x, y in zip(got, with_gradients(functools.partial(f, implementation="reference"))(arrays, cotangents)):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@interprets
def test_interpreted_under_vmap():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, ids = draw(2, 1, 20, 2, 16), draw(2, 1, 20, 1, 16), drawn_segments(rng, 1, 20)

  def run(module, q, k, ids):
    f = lambda q, k: module.attention(q, k, k, causal=True, window=9, scale=0.3, segment_ids=ids, query_offset=0)
    (o, lse), vjp = jax.vjp(f, q, k)
    return o, lse, *vjp((o, lse))

  with tuning.override("range_forward", TINY), tuning.override("range_dq", TINY), tuning.override("range_dkv", TINY), \
       tuning.override("range_decode", TINY):
    got = jax.vmap(functools.partial(run, ranged), in_axes=(0, 0, None))(q, k, ids)
  want = jax.vmap(functools.partial(run, reference), in_axes=(0, 0, None))(q, k, ids)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
