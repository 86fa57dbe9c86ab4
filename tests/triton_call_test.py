"""How a Triton kernel becomes a call in an XLA program."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
from jaxlib import gpu_triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton_test import lowered, lowers, needs_gpu  # noqa: E402

from pallas_kernels.triton import call, compiled  # noqa: E402


@triton.jit
def sums_kernel(x, y, total, twice, SIZE: tl.constexpr, FACTOR: tl.constexpr):
  at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
  added = tl.load(x + at) + tl.load(y + at)
  tl.store(total + at, added)
  tl.store(twice + at, (FACTOR * added).to(tl.bfloat16))


@triton.jit
def negate_kernel(x, out, SIZE: tl.constexpr):
  at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
  tl.store(out + at, -tl.load(x + at))


def sums(x, y, kind=list):
  outputs = kind([jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)])
  return call.kernel_call(sums_kernel, (x, y), outputs, grid=(x.size // 128,), name="sums", num_warps=2, SIZE=128,
                          FACTOR=2.0)


def negate(x):
  return call.kernel_call(negate_kernel, (x,), jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(x.size // 128,),
                          name="negate", SIZE=128)


X = jax.ShapeDtypeStruct((5, 128), jnp.float32)


@pytest.fixture
def way(monkeypatch, tmp_path):
  """Sets which way calls go, as NSA_TRITON_CALL does."""
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  pytest.importorskip("jax_triton")
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # again: importing jax-triton 0.3 empties it
  cached = call.recorded, call.unavailable

  def set_way(name):
    monkeypatch.setattr(call, "WAY", name)
    for function in cached:
      function.cache_clear()

  yield set_way
  for function in cached:
    function.cache_clear()


def targets(text):
  return [line.split("@")[1].split("(")[0] for line in text.splitlines() if "custom_call" in line]


@lowers
@pytest.mark.parametrize("lacking", [False, True])
def test_jax_triton_calls_by_name_or_where_jaxlib_lacks_the_target(lacking, way, monkeypatch, caplog):
  caplog.set_level("INFO", "pallas_kernels")
  way("recorded" if lacking else "jax_triton")
  target = compiled.TARGET
  if lacking:
    monkeypatch.setattr(compiled, "TARGET", "another")
  assert call.unavailable() is None and not call.recorded()
  assert targets(lowered(lambda x: negate(x), X)) == ["triton_kernel_call"]
  reason = f"jaxlib {jax.lib.__version__} has no another" if lacking else "NSA_TRITON_CALL=jax_triton"
  assert caplog.messages == [f"Triton kernels: launched by jax-triton, because {reason}"]
  caplog.clear()
  monkeypatch.setattr(compiled, "TARGET", target)
  way("recorded")
  assert targets(lowered(lambda x: negate(x), X)) == ["triton_kernel_call_ffi"]
  assert caplog.messages == ["Triton kernels: recorded in XLA's CUDA graphs"]


@pytest.mark.skipif(call.INTERPRET, reason="the interpreter calls nothing")
def test_a_way_that_is_none_is_refused(way):
  way("graphs")
  assert call.unavailable() == "NSA_TRITON_CALL=graphs is neither recorded nor jax_triton"


@lowers
def test_the_call_has_inputs_then_outputs_in_order(monkeypatch):
  seen, real, real_call = [], gpu_triton.TritonKernel, gpu_triton.TritonKernelCall
  monkeypatch.setattr(gpu_triton, "TritonKernel", lambda *a: seen.append(a) or real(*a))
  monkeypatch.setattr(gpu_triton, "TritonKernelCall", lambda *a: seen.append(a) or real_call(*a))
  text = lowered(sums, X, X)
  line, = (line for line in text.splitlines() if "custom_call" in line)
  assert "@triton_kernel_call_ffi(%arg0, %arg1)" in line and "{opaque = " in line
  assert line.endswith("(tensor<5x128xf32>, tensor<5x128xf32>) -> (tensor<5x128xf32>, tensor<5x128xbf16>)")
  (name, warps, ctas, shared, ptx, _, capability), (_, *grid, parameters) = seen
  assert (name, warps, ctas, shared, capability) == ("sums_kernel", 2, 1, 0, 90)
  assert grid == [5, 1, 1] and len(parameters) == 4
  assert ptx.count("sums_kernel_param_") >= 6 and "sums_kernel_param_6" not in ptx  # with two of scratch memory
  assert "ld.global.v2.b32" in ptx or "ld.global.v2.u32" in ptx  # 64 threads: two numbers each, alignment is known


@lowers
def test_results_are_shaped_as_asked():
  assert jax.eval_shape(negate, X) == X
  for kind in (list, tuple):
    made = jax.eval_shape(lambda x: sums(x, x, kind), X)
    assert type(made) is kind and [x.dtype for x in made] == [jnp.float32, jnp.bfloat16]


@lowers
def test_another_process_finds_what_triton_made(monkeypatch, tmp_path):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  how = negate_kernel, ("*fp32", "*fp32"), (("SIZE", "int", 256),), 4, 2, 90
  compiled.compiled.cache_clear()
  first = compiled.compiled(*how).asm["ptx"]
  compiled.compiled.cache_clear()
  monkeypatch.setattr(triton.compiler.ASTSource, "make_ir", lambda *a: pytest.fail("compiled again"))
  assert compiled.compiled(*how).asm["ptx"] == first and ".target sm_90a" in first


@lowers
def test_constants_that_python_takes_for_one_are_several():
  whole = jax.ShapeDtypeStruct((5, 128), jnp.int32)
  twice = lambda x, factor: call.kernel_call(sums_kernel, (x, x), [whole, whole], grid=(5,), name="sums", SIZE=128,
                                             FACTOR=factor)
  text = lowered(lambda x: [twice(x, factor) for factor in (2, 2.0)], whole)
  first, second = (line.split("opaque = ")[1] for line in text.splitlines() if "custom_call" in line)
  assert first != second  # of integers, and of floats


@lowers
def test_a_cache_that_cannot_be_written_is_no_matter(monkeypatch, tmp_path):
  (tmp_path / "file").touch()
  monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file/cache"))
  compiled.compiled.cache_clear()
  assert "custom_call" in lowered(lambda x: negate(x), X) and triton.knobs.cache.dir != str(tmp_path / "file/cache")


@lowers
def test_a_kernel_that_needs_scratch_memory_is_refused(monkeypatch):
  metadata = types.SimpleNamespace(global_scratch_size=128, profile_scratch_size=0, shared=0)
  made = types.SimpleNamespace(name="negate_kernel", metadata=metadata)
  monkeypatch.setattr(triton, "compile", lambda *a, **kw: made)
  compiled.compiled.cache_clear()
  with pytest.raises(NotImplementedError, match="negate_kernel needs 128 bytes of scratch memory"):
    lowered(negate, X)


@pytest.mark.skipif(call.INTERPRET, reason="the interpreter needs no plugin")
def test_without_the_plugin_the_reason_names_what_to_install(monkeypatch):
  monkeypatch.delattr(gpu_triton, "TritonKernel", raising=False)
  assert "pip install 'jax[cuda13]'" in call.unavailable.__wrapped__()


@pytest.mark.gpu
@needs_gpu
def test_a_recorded_call_gives_the_bits_of_a_launched_one():
  """Arrays in other places, which a graph has to be told of."""
  def f(x):
    for _ in range(4):
      x, more = sums(x, jnp.sin(x))
      x = negate(x) + more
    return x

  inputs = [jax.random.normal(jax.random.key(n), (64, 128)) for n in range(4)]
  options = [{"xla_gpu_graph_min_graph_size": size} for size in (1, 2 ** 30)]
  if jax.__version_info__ >= (0, 11):  # as nsa/step.py compiles a step
    options.append(options[0] | {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"})
  recorded, *others = ([[np.asarray(way(x)) for x in inputs] for _ in range(3)]
                       for way in (jax.jit(f, compiler_options=how) for how in options))
  for other in others:
    np.testing.assert_array_equal(recorded, other)
  assert len({x.tobytes() for x in recorded[0]}) == 4
