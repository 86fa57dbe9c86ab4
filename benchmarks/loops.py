"""Loops that a device goes through step by step: their kernels, and the memory of one layer alone as one."""
from __future__ import annotations

import re
import time

_NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"}
_CALLS = re.compile(r"(?:to_apply|body|called_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)")


def kernels(text: str) -> list[int]:
  """Kernels of one turn of every loop of a compiled program (`Compiled.as_text()`), the largest first: operations that
  are no mere names of others' results; those of a command buffer count one by one."""
  computations, name = {}, None
  for line in text.splitlines():
    if head := re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
      name, computations[head[1]] = head[1], []
    elif name and (operation := re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", line)):
      computations[name].append((operation[1], line))

  def count(computation):
    total = 0
    for kind, line in computations.get(computation, ()):
      if kind in ("call", "while", "conditional"):
        total += sum(count(inner) for inner in _CALLS.findall(line))
      elif kind not in _NO_KERNEL:
        total += 1
    return total

  bodies = [re.search(r"body=%?([\w.\-]+)", line)[1] for lines in computations.values() for kind, line in lines
            if kind == "while"]
  return sorted(map(count, bodies), reverse=True)


class MemoryLayer:
  """The memory of one layer, alone: traced when made, compiled by whoever calls `compile`."""

  def __init__(self, model, options, batch: int, tokens: int, implementation: str | None = None):
    from flax import nnx
    import jax
    import jax.numpy as jnp

    from nsa import layers
    from nsa.methods.titans import memory
    self.model, self.options, self.batch, self.tokens = model, options, batch, tokens
    self.implementation = implementation
    self.chunks = -(-tokens // options.chunk)
    net = memory.Memory(layers.Init(jax.random.key(0)), model, options, project=False)
    graph, self.state = nnx.split(net)
    dtype, shape = jnp.dtype(model.dtype), (batch, tokens)
    N, K, H = model.num_heads, model.num_kv_heads, model.head_dim
    sizes = (shape + (N, H), shape + (K, H), shape + (K, H), shape + (model.d_model,))
    self.inputs = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]

    def run(state, q, k, v, h):
      segments = jnp.ones(shape, jnp.int32)  # as in training, where documents are packed
      net = nnx.merge(graph, state)
      return net(q, k, v, net.gates_of(h), None, segment_ids=segments,
                 implementation=implementation)[0].astype(dtype)

    def both(state, *inputs):
      return jax.value_and_grad(lambda *a: jnp.sum(run(*a).astype(jnp.float32)), argnums=(0, 1, 2, 3, 4))(
          state, *inputs)

    self.lowered = {"forward": jax.jit(run).lower(self.state, *self.inputs),
                    "both": jax.jit(both).lower(self.state, *self.inputs)}
    shape = (batch, options.chunk)
    self.one = jax.jit(both).lower(self.state, *(jax.ShapeDtypeStruct(shape + x.shape[2:], dtype)
                                                 for x in self.inputs))

  def compile(self, options: dict | None = None):
    """(programs, what XLA reckons of one chunk, seconds); options: of the compiler."""
    began = time.perf_counter()
    programs = {name: lowered.compile(compiler_options=options) for name, lowered in self.lowered.items()}
    seconds = time.perf_counter() - began
    return programs, self.one.compile(compiler_options=options).cost_analysis() or {}, seconds

  def state_bytes(self) -> float:
    """Of one pass over the matrices and surprises of all sequences, float32."""
    heads = self.options.memory_shape(self.model)[0]
    return 2 * 4.0 * self.batch * heads * sum(a * b for a, b in self.options.memory_sizes(self.model))

  def useful(self) -> float:
    """FLOPs of a forward pass."""
    return self.batch * self.tokens * sum(c.flops for c in self.options.memory_costs(self.model).values())

  def measure(self, compiled, repeats: int) -> dict:
    import jax

    from benchmarks import timing
    programs, analysis, seconds = compiled
    keys = jax.random.split(jax.random.key(1), len(self.inputs))
    inputs = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, self.inputs)]
    row = dict(row="layer", tokens=self.tokens, sequences=self.batch, chunk=self.options.chunk,
               products=self.options.products, recompute=self.options.recompute, chunks=self.chunks,
               implementation=self.implementation,
               compile_seconds=seconds)
    for name, factor, passes in (("forward", 1, 2), ("both", 3, 6)):
      ms = timing.milliseconds(programs[name], [(self.state, *inputs)], 3, repeats)
      loops = kernels(programs[name].as_text())[:1 if name == "forward" else 2]
      per_chunk = 1e3 * ms / self.chunks
      row |= {f"{name}_ms": ms, f"{name}_tflops": factor * self.useful() / ms / 1e9,
              f"{name}_state_gbs": passes * self.chunks * self.state_bytes() / ms / 1e6,
              f"{name}_kernels": loops, f"{name}_chunk_us": per_chunk,
              f"{name}_us_per_kernel": per_chunk / sum(loops) if loops else None}
    moved = self.chunks * float(analysis.get("bytes accessed", float("nan")))
    return row | {"both_bytes": moved, "both_gbs": moved / row["both_ms"] / 1e6}
