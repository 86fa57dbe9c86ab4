"""The model shapes and methods whose train steps benchmarks.step times and benchmarks.decode decodes with, and how; the
memory of one layer alone, which benchmarks.memory times."""
from __future__ import annotations

from collections.abc import Callable, Iterable
import concurrent.futures
import dataclasses
import statistics
import tempfile
import time

from benchmarks import timing

PILOT = dict(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=1024, short_conv=3,
             tie_embeddings=False, dtype="bfloat16")
# SmolLM2-135M's shape (its config.json).
SMOLLM2 = dict(vocab_size=49_152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
               rope_theta=1e5, embedding_multiplier=1.0, qk_norm=False, dtype="bfloat16")
MODELS = {  # name -> fields of ModelConfig
    "pilot": PILOT,                                                    # experiments/pilot.py, 10M without embeddings
    "28m": dict(PILOT, num_layers=10, d_model=512, mlp_dim=1408),
    "smollm2": dict(SMOLLM2, remat="layer"),                           # as experiments/retrofit_hf.py trains it
    "smollm2_kept": dict(SMOLLM2, remat="none"),                       # nothing recomputed: four times the memory
    "tiny": dict(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=64),
}
# Selection geometry: the pilot's, and for an imported model that of experiments/retrofit_hf.py.
BLOCKS = dict.fromkeys(("smollm2", "smollm2_kept"), dict(block_size=64, num_blocks=16))
LEARNING_BYTES = 32  # of float32 weights, gradients and two moments, read and written, per parameter


def methods_of(model: str) -> dict:
  """{name: options} of the methods at a model's geometry."""
  from nsa import methods
  blocks = BLOCKS.get(model, dict(block_size=32, num_blocks=16))
  size = blocks["block_size"]
  nsa = dict(compress_len=size // 2, compress_stride=size // 4, window=4 * size if size < 64 else 512)
  return {"dense": methods.Dense(), "msa": methods.MSA(index_dim=64, **blocks), "nsa": methods.NSA(**nsa, **blocks),
          "gated": methods.Gated(index_dim=64, **blocks), "seer": methods.Seer(**blocks),
          "dsa": methods.DSA(level="block", **blocks), "dsa_token": methods.DSA(), "quest": methods.Quest(**blocks)}


def config_of(model: str, method: str, sequences: int, tokens: int, seeds: int = 1, implementation: str = "",
              one_pass: bool = True):
  """The config of a row: the pilot's data and optimizer, one stage. Raises ValueError naming what is unknown."""
  from experiments import pilot
  from nsa import config as config_lib, schedule
  if model not in MODELS:
    raise ValueError(f"--models: {model!r} is unknown; take some of {', '.join(MODELS)}")
  name, _, mode = method.partition(":")
  known = methods_of(model)
  if name not in known:
    raise ValueError(f"--methods: {name!r} is unknown; take some of {', '.join(known)}, or NAME:MODE")
  plan = schedule.dense(100)
  plan.stages[0].mode = mode or ("dense" if name == "dense" else "sparse")
  base = pilot.get_config().arms[0]
  config = dataclasses.replace(
      base, arm=method, size=model, seeds=tuple(range(seeds)), model=config_lib.ModelConfig(**MODELS[model]),
      attention=known[name], schedule=plan, implementation=implementation,
      one_pass=one_pass,
      data=dataclasses.replace(base.data, context=tokens, global_batch=sequences,
                               task_lengths=tuple(n for n in base.data.task_lengths if n <= tokens)))
  return config_lib.validate(config)


def floor_ms(config, what, device_kind: str) -> float | None:
  """The least milliseconds of a step: see the module; None for a device whose rates nobody measured."""
  from nsa import flops
  if device_kind not in timing.CEILINGS:
    return None
  flop_rate, byte_rate = timing.CEILINGS[device_kind]
  parameters = flops.parameters(config)
  learning = sum(parameters.get(group, 0) for group in what.groups)
  return len(config.seeds) * (flops.per_step(config, what) / flop_rate + LEARNING_BYTES * learning / byte_rate) * 1e3


def compiled(makers: Iterable[Callable], threads: int) -> list[Callable]:
  """Functions that return what each of `makers` makes and what its `compile` gave, or raise what one of both raised.

  One thread traces while others compile; all is compiled once this returns, so that nothing is while something is
  timed.
  """
  pool, futures = concurrent.futures.ThreadPoolExecutor(threads), []
  for make in makers:
    try:
      one = make()
      futures.append(pool.submit(lambda one=one: (one, one.compile())))
    except Exception as error:  # a shape that an implementation refuses
      futures.append(concurrent.futures.Future())
      futures[-1].set_exception(error)
  concurrent.futures.wait(futures)
  return [future.result for future in futures]


class Row:
  """One row: traced when it is made, compiled by whoever calls `compile`, timed by `measure`."""

  def __init__(self, config, profile: bool = False):
    import jax

    from nsa import schedule, sharding, step as step_lib
    self.config, self.profile = config, profile
    self.mesh = sharding.make_mesh(config)
    self.what = schedule.at(config, config.schedule.steps // 2)
    function, arguments, options = step_lib.program(config, self.what, self.mesh)
    began = time.perf_counter()
    self.lowered = jax.jit(function, **options).lower(*arguments)
    self.seconds = time.perf_counter() - began

  def compile(self):
    """(the program, the same with a time for each kernel or None, seconds); any thread may: XLA needs no Python."""
    import jax

    from nsa import step as step_lib
    step_lib.compile_init(self.config, self.mesh)
    began = time.perf_counter()
    program = self.lowered.compile()
    seconds, apart = time.perf_counter() - began, program if self.profile else None
    if self.profile and jax.default_backend() == "gpu":  # kernels in a command buffer have no times of their own
      apart = self.lowered.compile(compiler_options={"xla_gpu_graph_min_graph_size": 2 ** 30})
    return program, apart, self.seconds + seconds

  def measure(self, compiled, *, steps: int, repeats: int) -> dict:
    """The columns of a row."""
    import jax
    import numpy as np

    from nsa import flops, metrics, step as step_lib
    program, apart, compile_seconds = compiled
    config, what, mesh = self.config, self.what, self.mesh
    seeds, batch = step_lib.seeds_of(config), step_lib.Batches(config, mesh).at(0)
    state = step_lib.compile_init(config, mesh)(seeds)

    def run(program, state, times):
      for _ in range(times):
        state, values = program(state, batch, what.rates, seeds)
      return state, jax.block_until_ready(values)

    state, values = run(program, state, 3)
    groups = []
    for _ in range(repeats):
      began = time.perf_counter()
      state, values = run(program, state, steps)
      groups.append((time.perf_counter() - began) / steps * 1e3)
    ms, device = statistics.median(groups), jax.devices()[0]
    useful = flops.per_step(config, what) * len(config.seeds)
    peak, floor = metrics.peak_tflops(device.device_kind), floor_ms(config, what, device.device_kind)
    memory = program.memory_analysis()
    row = dict(ms=ms, ms_of_groups=groups, tokens_per_second=what.batch * what.context * len(config.seeds) / ms * 1e3,
               useful_tflop=useful / 1e12, mfu=peak and metrics.mfu(useful / ms * 1e3, peak, jax.device_count()),
               floor_ms=floor, of_floor=floor and floor / ms, compile_seconds=compile_seconds,
               temporary_bytes=memory and memory.temp_size_in_bytes, loss=float(np.mean(values["loss"])),
               mode=what.mode, device=device.device_kind, jax=jax.__version__)
    if apart is not None:
      state, _ = run(apart, state, 2)
      with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
          run(apart, state, 3)
        row["kinds_ms"] = {kind: total / 3 for kind, total in timing.by_kind(directory).items()}
    return row


class MemoryLayer:
  """Titans' memory of one layer, alone: traced when it is made, compiled by whoever calls `compile`, timed by
  `measure`."""

  def __init__(self, model, options, batch: int, tokens: int, implementation: str | None = None):
    from flax import nnx
    import jax
    import jax.numpy as jnp

    from nsa import layers
    from nsa.methods.titans import memory
    self.model, self.options, self.batch, self.tokens = model, options, batch, tokens
    self.implementation = implementation
    net = memory.Memory(layers.Init(jax.random.key(0)), model, options, project=False)
    graph, self.state = nnx.split(net)
    dtype, shape = jnp.dtype(model.dtype), (batch, tokens)
    N, K, H = model.num_heads, model.num_kv_heads, model.head_dim
    sizes = (shape + (N, H), shape + (K, H), shape + (K, H), shape + (model.d_model,))
    self.inputs = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]

    def run(state, q, k, v, h):
      net = nnx.merge(graph, state)
      segments = jnp.ones(shape, jnp.int32)  # as in training, where documents are packed
      return net(q, k, v, net.gates_of(h), None, segment_ids=segments, implementation=implementation)[0].astype(dtype)

    def both(state, *inputs):
      return jax.value_and_grad(lambda *a: jnp.sum(run(*a).astype(jnp.float32)), argnums=(0, 1, 2, 3, 4))(
          state, *inputs)

    self.lowered = {"forward": jax.jit(run).lower(self.state, *self.inputs),
                    "both": jax.jit(both).lower(self.state, *self.inputs)}

  def compile(self):
    """(programs, seconds)."""
    began = time.perf_counter()
    return {name: lowered.compile() for name, lowered in self.lowered.items()}, time.perf_counter() - began

  def measure(self, compiled, repeats: int) -> dict:
    """The columns of a row."""
    import jax
    programs, seconds = compiled
    keys = jax.random.split(jax.random.key(1), len(self.inputs))
    inputs = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, self.inputs)]
    useful = self.batch * self.tokens * sum(c.flops for c in self.options.memory_costs(self.model).values())
    row = dict(tokens=self.tokens, sequences=self.batch, chunk=self.options.chunk,
               chunks=-(-self.tokens // self.options.chunk), products=self.options.products,
               recompute=self.options.recompute, implementation=self.implementation, compile_seconds=seconds)
    for name, passes in (("forward", 1), ("both", 3)):
      ms = timing.milliseconds(programs[name], [(self.state, *inputs)], 3, repeats)
      row |= {f"{name}_ms": ms, f"{name}_tflops": passes * useful / ms / 1e9}
    return row


# --- decoding ---


def decoding_floor_ms(config, mode: str, batch: int, context: int, device_kind: str) -> float | None:
  """The least milliseconds of a token of all sequences: see benchmarks/decode.py."""
  import jax.numpy as jnp

  from nsa import flops, methods, stacking
  if device_kind not in timing.CEILINGS:
    return None
  m, width = config.model, jnp.dtype(config.model.dtype).itemsize
  read = float(flops.parameters(config)["total"])
  for method, count in stacking.layout(config):
    visible = sum((methods.Dense() if mode == "dense" else method).reads(m, context).values())
    read += batch * count * visible * 2 * m.num_kv_heads * m.head_dim
  return width * read / timing.CEILINGS[device_kind][1] * 1e3


def measure_decoding(config, params, mode: str, batch: int, context: int, steps: int, repeats: int) -> dict:
  """The columns of a row of benchmarks.decode."""
  import jax
  import jax.numpy as jnp

  from nsa import decoding, model as model_lib
  dtype = jnp.dtype(config.model.dtype)
  params = model_lib.init_params(config, 0) if params is None else params
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  prompt = jax.random.randint(jax.random.key(1), (1, context - steps), 0, config.model.vocab_size)

  @jax.jit
  def prefill(params):
    cache = model_lib.init_cache(config, params, 1, context)
    out = model_lib.forward(config, params, prompt, mode=mode, losses=False, cache=cache)
    return jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), out.cache)

  @jax.jit
  def decode(params, cache, first):
    return decoding.steps(config, params, cache, first, context - steps, steps, mode=mode)

  cache, first = prefill(params), jnp.zeros(batch, jnp.int32)
  began = time.perf_counter()
  jax.block_until_ready(decode(params, cache, first))
  compile_seconds, times = time.perf_counter() - began, []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(decode(params, cache, first))
    times.append((time.perf_counter() - began) / steps * 1e3)
  ms, device = statistics.median(times), jax.devices()[0]
  floor = decoding_floor_ms(config, mode, batch, context, device.device_kind)
  return dict(ms=ms, ms_of_repeats=times, tokens_per_second=batch / ms * 1e3, floor_ms=floor,
              of_floor=floor and floor / ms, compile_seconds=compile_seconds, device=device.device_kind,
              jax=jax.__version__, cache_bytes=sum(x.nbytes for x in jax.tree.leaves(cache)))
