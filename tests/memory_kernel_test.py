"""The kernels of pallas_kernels/memory.py: against the scan of nsa/methods/titans/memory.py, and where they serve.

`TRITON_INTERPRET=1 pytest tests/memory_kernel_test.py` runs their arithmetic on the CPU, in float32, where torch is
installed; a GPU multiplies bfloat16.
"""
from flax import nnx
import jax
import jax.numpy as jnp
from kernels_cases import kernels_run
import numpy as np
import pytest

from nsa import config as config_lib, layers, methods
from nsa.methods.titans import memory
from pallas_kernels import backends, memory as kernel

ON_GPU = jax.default_backend() == "gpu"
CHUNK, CHUNKS, B, WIDTH = 32, 3, 2, 16


def layer(implementation, chunk=CHUNK, tokens=CHUNKS * CHUNK, width=WIDTH, **options):
  """(parameters, x) -> (y, state, gradients of <y, a direction> and <state, another>); and parameters and x.

  The second sequence has two documents, of which one begins at the last chunk.
  """
  model = config_lib.ModelConfig(d_model=16, num_heads=4, num_kv_heads=2, head_dim=width, short_conv=0)
  mem = memory.Memory(layers.Init(jax.random.key(2)), model, methods.LMM(chunk=chunk, **options), project=False)
  graph, state = nnx.split(mem)
  state = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), state)  # no gain is 1
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), (B, tokens) + shape)
  segments = jnp.stack([jnp.zeros(tokens, int), jnp.arange(tokens) // (tokens - chunk)])

  def objective(state, q, k, v, h):
    mem = nnx.merge(graph, state)
    y, left = mem(q, k, v, mem.gates_of(h), None, segment_ids=segments, implementation=implementation)
    ends = left["now"] + left["surprise"]
    score = jnp.sum(y * draw(4, 4, width)) + sum(
        jnp.sum(x * jax.random.normal(jax.random.key(9 + i), x.shape)) for i, x in enumerate(ends))
    return score, (y, ends)

  return (jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3, 4), has_aux=True)),
          (state, draw(0, 4, width), draw(1, 2, width), draw(2, 2, width), draw(3, 16)))


def errors(got, want):
  return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
          for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [dict(clip=0.05), dict(clip=0.0, backprop="local"), dict(read="chunk")],
                         ids=["clipped", "local", "read at the start"])
@pytest.mark.parametrize("seeds", [0, 2])
def test_it_writes_what_the_scan_writes(options, seeds, monkeypatch):
  """Values, states and all gradients; `seeds`: as many memories of their own, vmapped."""
  interprets = kernels_run()
  if seeds and options != dict(clip=0.05):
    pytest.skip("one of them is enough")

  def program(implementation, **more):
    run, inputs = layer(implementation, **options, **more)
    if not seeds:
      return run, inputs
    several = jax.tree.map(lambda x: jnp.stack([x * (1 + 0.3 * i) for i in range(seeds)]), inputs)
    return jax.jit(jax.vmap(run)), several

  def both(implementation):
    run, inputs = program(implementation)
    return run(*inputs)

  if not interprets:
    (exact, inputs), (rounded, _), (run, _) = (
        program("reference"), program("reference", products="bfloat16"), program(None, products="bfloat16"))
    got = run(*inputs)
    for _ in range(20):
      assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, run(*inputs)))
    squares = []
    for i in range(8):  # some gradients are six numbers: of one draw either way may be near by chance
      moved = jax.tree.map(lambda x, i=i: x + 0.3 * jax.random.normal(jax.random.key(100 * i + x.size % 97), x.shape),
                           inputs)
      want = exact(*moved)
      squares.append([np.square(errors(way(*moved), want)) for way in (run, rounded)])
    for mine, its in zip(*np.sqrt(np.mean(squares, axis=0))):
      assert 1e-5 < mine < 1.5 * its + 1e-3, (mine, its)
    return
  from pallas_kernels.triton import memory as kernels
  monkeypatch.setattr(kernels, "TOGETHER", 16)
  monkeypatch.setattr(kernels, "COLUMNS", kernels.COLUMNS._replace(rows=16))  # several parts
  from pallas_kernels.triton import memory_read
  for name in ("FORWARD", "ROWS", "SUMS"):
    monkeypatch.setattr(memory_read, name, getattr(memory_read, name)._replace(rows=16))  # several of a chunk
  want, called = both("reference"), []
  monkeypatch.setattr(kernel, "serves", lambda *a, **how: called.append("write") or True)
  monkeypatch.setattr(kernel, "reads", lambda *a, read, **how: called.append("read") or read == "token")
  got = both(None)
  assert "read" in called and max(errors(got, want)) < 2e-6, errors(got, want)


@pytest.mark.parametrize("change, reason", [
    (dict(depth=3), "depth = 3"), (dict(norm=False), "norm = False"), (dict(width=48), "width, hidden width = 48, 128"),
    (dict(gradient="document"), "gradient = 'document'"), (dict(products="float32"), "products = 'float32'"),
    (dict(hidden=256), "at most 8192"), (dict(chunk=8), "chunk = 8"), (dict(chunks=257), "chunks = 257"),
    (dict(begins_a_chunk=False), "offset, state"),
    ({}, "platform: ")])
def test_what_it_refuses_is_named(change, reason):
  asked = dict(chunk=128, chunks=32, width=64, hidden=128, depth=2, norm=True, gradient="chunk", products="bfloat16",
               begins_a_chunk=True)
  with backends.target_platform("cpu"):
    assert reason in kernel.refuses(**{**asked, **change})
    assert not kernel.serves(None, **asked)
  with backends.target_platform("gpu"):
    assert not kernel.serves("reference", **asked)
    assert not kernel.serves(None, **{**asked, "depth": 3})


@pytest.mark.parametrize("change, reason", [
    (dict(read="chunk"), "read = 'chunk'"), (dict(chunk=256), "chunk = 256"), (dict(queries=32), "queries = 32"),
    (dict(depth=3), "depth = 3")])
def test_what_it_does_not_read_is_named(change, reason, monkeypatch):
  pytest.importorskip("triton", reason="triton is not installed")
  from pallas_kernels.triton import call
  monkeypatch.setattr(call, "unavailable", lambda: None)
  monkeypatch.setattr(call, "small_memory", lambda: False)
  asked = dict(chunk=128, chunks=32, width=64, hidden=128, depth=2, norm=True, gradient="chunk", products="bfloat16",
               begins_a_chunk=True, read="token", queries=2)
  with backends.target_platform("gpu"):
    assert kernel.refuses_reading(**asked) is None and kernel.reads(None, **asked)
    assert reason in kernel.refuses_reading(**{**asked, **change})
    assert not kernel.reads(None, **{**asked, **change})
    monkeypatch.setattr(call, "small_memory", lambda: True)
    assert "shared memory" in kernel.refuses_reading(**asked)


def test_a_gpu_of_little_shared_memory_takes_no_long_rows(monkeypatch):
  pytest.importorskip("triton", reason="triton is not installed")
  from pallas_kernels.triton import call
  monkeypatch.setattr(call, "small_memory", lambda: True)
  monkeypatch.setattr(call, "unavailable", lambda: None)
  asked = dict(chunk=128, chunks=32, depth=2, norm=True, gradient="chunk", products="bfloat16", begins_a_chunk=True)
  with backends.target_platform("gpu"):
    assert kernel.refuses(width=32, hidden=256, **asked) is None
    assert "shared memory" in kernel.refuses(width=16, hidden=512, **asked)


@pytest.mark.parametrize("seeds", [0, 3])
def test_a_layer_lowers_to_two_calls_a_chunk_forward_and_two_backward(seeds):
  """As the study trains it, without a GPU; of several seeds as well. Decays take a call each way, reading one and
  three."""
  pytest.importorskip("triton", reason="triton is not installed")
  from pallas_kernels.triton import call
  if call.unavailable() is not None or call.INTERPRET or not call.recorded():
    pytest.skip(str(call.unavailable()))
  run, inputs = layer(None, chunk=128, tokens=256, width=64, products="bfloat16")
  shape = lambda x: jax.ShapeDtypeStruct((seeds,) * bool(seeds) + x.shape, x.dtype)
  with backends.target_platform("gpu"):
    traced = jax.jit(jax.vmap(run) if seeds else run).trace(*jax.tree.map(shape, inputs))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("triton_kernel_call_ffi") == 2 * (2 + 2) + 2 + 4 and "stablehlo.while" not in text


def test_a_sequence_that_goes_on_is_scanned(monkeypatch):
  """A state, an offset inside a chunk and a length that ends in one are asked about, and refused."""
  run, inputs = layer(None)
  asked = []
  monkeypatch.setattr(kernel, "serves", lambda implementation, **how: asked.append(how["begins_a_chunk"]) and False)
  jax.eval_shape(run, *inputs)
  jax.eval_shape(layer(None, tokens=CHUNK + 8)[0], *layer(None, tokens=CHUNK + 8)[1])
  assert asked == [True, False]
