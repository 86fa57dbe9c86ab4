"""The train state and the pure train step: one per program of the schedule, compiled ahead.

A state of several seeds has a leading axis on every leaf but `step`; the same step function
is vmapped over it.
"""
from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from nsa import data, model as model_lib, optim, origins, programs, schedule, sharding
from pallas_kernels import backends, fused

LN2 = float(np.log(2.0))
UNROLLED_LAYERS = 32  # stacks of up to so many layers are unrolled where a loop costs more; see `layers_per_turn`
MAX_LOGITS = 2 ** 28  # float32 numbers on a device at a time (1 GiB); more go in chunks
GRAPH_MODE = "xla_gpu_command_buffer_scheduling_mode"
BATCH_KEYS = ("inputs", "targets", "weights", "segment_ids")


class TrainState(NamedTuple):
  step: jax.Array        # int32[], optimizer steps done
  params: dict           # nested dict, float32
  optimizer: dict        # {group: optax state}


def seeds_of(config) -> np.ndarray:
  """The run's seeds as the argument of its programs: uint32[], or uint32[seeds] if there are several."""
  return np.asarray(config.seeds[0] if len(config.seeds) == 1 else config.seeds, np.uint32)


def init_state(config, seeds) -> TrainState:
  """The state at step 0, a pure function of config and `seeds_of(config)`; jit it with the wanted shardings."""
  transforms = optim.make(config)

  def one(seed):
    params = model_lib.init_params(config, seed)
    return params, optim.init(transforms, params)

  params, optimizer = one(seeds) if len(config.seeds) == 1 else jax.vmap(one)(seeds)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer)


def abstract_state(config, mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state."""
  shapes = jax.eval_shape(lambda: init_state(config, seeds_of(config)))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      shapes, sharding.of_state(config, shapes, mesh))


def mean_nll(config, params, out: model_lib.Output, targets, weights, mesh):
  """(float32[], float32[B, T]): the weighted mean of the targets' negative log-likelihood in nats, and each target's,
  for metrics: it has no gradient where logits come in chunks.

  Logits of long sequences over large vocabularies would outgrow all else: past MAX_LOGITS on a device they are made,
  and their gradient with them, chunk by chunk; so are smaller ones, whole, where a kernel makes both in one pass. On a
  mesh each device does so with its own tokens and the whole output matrix, under `jax.shard_map`: XLA's partitioner
  would gather the matrix and sum its gradient over the devices in every chunk. Over "tensor" the positions are cut too,
  as there are no heads to cut here.
  """
  B, T = targets.shape
  total = jnp.maximum(jnp.sum(weights), 1e-9)
  local = B * T * config.model.vocab_size / (mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"])
  one_pass = config.one_pass and fused.serves(out.hidden)
  if local <= MAX_LOGITS and not one_pass:
    nll = target_nll(out.logits, targets)
    return jnp.sum(nll * weights) / total, nll
  name = "embed" if config.model.tie_embeddings else "head"
  how = config.model.tie_embeddings, one_pass
  shares = weights / total
  if mesh.size == 1:
    return _nll_in_chunks(how, params[name], out.hidden, targets, shares)
  tokens = sharding.named(mesh, ("batch", "time"), (B, T), sharding.Rules(time=("context", "tensor"))).spec
  if tokens[1] is None:
    tokens = sharding.named(mesh, ("batch", "time"), (B, T)).spec
  matrix = sharding.named(mesh, model_lib.param_metadata(config, "axes")[name], params[name].shape).spec

  def of_device(part, hidden, targets, shares):
    whole = sharding.gathered(part, matrix, hidden.dtype)
    mean, nll = _nll_in_chunks(how, whole, hidden, targets, shares)
    return mean[None, None], nll

  means, nll = jax.shard_map(of_device, mesh=mesh, in_specs=(matrix, tokens, tokens, tokens),
                             out_specs=(tokens, tokens), check_vma=False)(params[name], out.hidden, targets, shares)
  return jnp.sum(means), nll


def target_nll(logits, targets):
  """float32[B, T], nats, of logits [B, T, V]. The target's logit is a sum over the others' zeros: no scatter in the
  gradient."""
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)


def _is_target(logits, targets):
  return targets[..., None] == jnp.arange(logits.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll_in_chunks(how, matrix, hidden, targets, shares):
  """mean_nll of one device's tokens: `matrix` is the embedding [V, D] or the head [D, V], `hidden` [B, T, D], `shares`
  float32[B, T] what each target counts; `how`: whether it is the embedding, and whether pallas_kernels/fused.py
  serves."""
  return _by_chunks(how, matrix, hidden, targets, shares, False)[0]


def _nll_forward(how, matrix, hidden, targets, shares):
  return _by_chunks(how, matrix, hidden, targets, shares, True)


def _nll_backward(how, saved, cotangents):
  dmatrix, dhidden, targets, shares = saved
  dmean, _ = cotangents
  return ((dmatrix * dmean).astype(dmatrix.dtype), (dhidden * dmean).astype(dhidden.dtype),
          np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(shares))


_nll_in_chunks.defvjp(_nll_forward, _nll_backward)


def _by_chunks(how, matrix, hidden, targets, shares, gradients):
  """((mean, nll), what the backward pass needs). The gradients are made while a chunk's logits are there: to make
  these again would take a product and three more passes over them. What the mean's own gradient multiplies is known
  beforehand, `shares`."""
  (tied, one_pass), (B, T) = how, targets.shape
  V = matrix.shape[0 if tied else 1]
  chunks = next((n for n in range(1, T + 1) if T % n == 0 and B * T * V / n <= MAX_LOGITS), T)
  split = lambda x: jnp.moveaxis(x.reshape((B, chunks, T // chunks) + x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape((B, T) + x.shape[3:])
  weight, letters = matrix.astype(hidden.dtype), "vd" if tied else "dv"
  # Halves the bytes of the largest array that there is; float16 would lose what is small.
  narrow = hidden.dtype if hidden.dtype == jnp.bfloat16 else jnp.float32

  def part(dmatrix, chunk):
    hidden, targets, shares = chunk
    logits = jnp.einsum(f"btd,{letters}->btv", hidden, weight, preferred_element_type=jnp.float32)
    if not gradients:
      return dmatrix, (target_nll(logits, targets), None)
    make = fused.nll if one_pass else _nll_and_gradient
    nll, dlogits = make(logits, targets, shares, narrow)
    dmatrix += jnp.einsum(f"btv,btd->{letters}", dlogits, hidden, preferred_element_type=jnp.float32)
    return dmatrix, (nll, jnp.einsum(f"btv,{letters}->btd", dlogits, weight).astype(hidden.dtype))

  start = jnp.zeros(matrix.shape if gradients else (), jnp.float32)
  dmatrix, (nll, dhidden) = jax.lax.scan(part, start, tuple(map(split, (hidden, targets, shares))))
  nll = join(nll)
  saved = (dmatrix.astype(matrix.dtype), join(dhidden), targets, shares) if gradients else None
  return (jnp.sum(nll * shares), nll), saved


def _nll_and_gradient(logits, targets, shares, dtype):
  """What `fused.nll` computes."""
  probabilities = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1)[..., None])
  return target_nll(logits, targets), ((probabilities - _is_target(logits, targets)) * shares[..., None]).astype(dtype)


def layers_per_turn(config) -> int:
  """Layers that one turn of the train step's loop holds: `config.unroll`, or what was measured to be faster.

  On a GPU all layers of a stack of up to UNROLLED_LAYERS, unless they are recomputed: a loop writes what the backward
  pass needs of each layer into stacked arrays and reads it from there again. On one H200, 10M parameters in 6 layers,
  8 x 4,096 tokens: dense 17.1 ms instead of 22.0, MSA 20.6 instead of 29.1; three of the six at a time gain nothing
  (22.1). The dense program compiles in 17 s, of the loop in 27. SmolLM2's 30 layers, 8 x 8,192 tokens: dense 265 ms
  instead of 315, MSA 237 instead of 320, compiled in 23 and 25 s instead of 7 and 8. With recomputation one array per
  layer is stacked. On a CPU a loop compiles faster.
  """
  if config.unroll:
    return config.unroll
  if backends.current_platform() != "gpu" or config.model.remat != "none" or config.model.num_layers > UNROLLED_LAYERS:
    return 1
  return config.model.num_layers


def loss_and_metrics(config, params, batch, key, step: schedule.Step, constrain, mesh):
  """(objective in nats, metrics): weighted cross-entropy plus the weighted auxiliary losses."""
  out = model_lib.forward(config, params, batch["inputs"], batch["segment_ids"], mode=step.mode, key=key,
                          losses=step.losses, counted=batch["segment_ids"] > 0, constrain=constrain,
                          unroll=layers_per_turn(config))
  weights = batch["weights"]
  loss, nll = mean_nll(config, params, out, batch["targets"], weights, mesh)
  real = (weights > 0).astype(jnp.float32)
  # Per target token, which with the bytes tokenizer is a byte; train.py makes it bytes for others.
  metrics = {"loss": loss, "bits_per_byte": jnp.sum(nll * real) / jnp.maximum(jnp.sum(real), 1.0) / LN2}
  factors = dict(step.loss_weights)
  objective = loss
  for name, value in out.losses.items():
    metrics[name] = value
    objective = objective + factors.get(name, 1.0) * value
  return objective, metrics


def make_step(config, step: schedule.Step, mesh):
  """(state, batch, `Step.rates` float32[2], seeds) -> (state, metrics); metrics have the seeds' axis if there is
  one."""
  transforms = optim.make(config)
  constrain = sharding.constrain(mesh)

  def one(params, optimizer, batch, seed, count, rates):
    key = jax.random.fold_in(jax.random.key(seed), count)
    with sharding.operations(mesh):
      grads, metrics = jax.grad(
          lambda p: loss_and_metrics(config, p, batch, key, step, constrain, mesh), has_aux=True)(params)
    params, optimizer, norms = optim.update(transforms, step.groups, grads, optimizer, params, rates)
    metrics["grad_norm"] = norms.get("backbone", norms.get("selector", jnp.zeros(())))
    metrics.update({f"grad_norm_{group}": norm for group, norm in norms.items() if group != "backbone"})
    return params, optimizer, metrics

  def train_step(state: TrainState, batch: dict[str, jax.Array], rates, seeds):
    run = one if len(config.seeds) == 1 else jax.vmap(one, in_axes=(0, 0, 0, 0, None, None))
    params, optimizer, metrics = run(state.params, state.optimizer, batch, seeds, state.step, rates)
    return TrainState(state.step + 1, params, optimizer), metrics

  return train_step


def _key(config, mesh):
  """Of programs that runs share which differ in seeds, data or schedule alone."""
  return (repr((model_lib.architecture(config), config.optimizer, config.unroll)), origins.registered(),
          len(config.seeds), mesh)


def compile_init(config, mesh):
  """The compiled seeds -> state at step 0."""
  def lower():
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.jit(lambda seeds: init_state(config, seeds), out_shardings=shardings).lower(seeds_of(config))

  return programs.compiled(("init", *_key(config, mesh)), lower)


def program(config, step: schedule.Step, mesh) -> tuple[Any, tuple, dict]:
  """(the train step, its abstract arguments, the options of jax.jit): all that compiling it takes, for any mesh."""
  state = abstract_state(config, mesh)
  placed = sharding.of_batch(config, mesh)
  seeds = () if len(config.seeds) == 1 else (len(config.seeds),)
  shape = seeds + (step.batch, step.context)
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32, sharding=placed)
           for name in BATCH_KEYS}
  arguments = state, batch, jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct(seeds, jnp.uint32)
  out = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, P())
  return make_step(config, step, mesh), arguments, dict(donate_argnums=0, out_shardings=out, **_side_by_side(mesh))


def _side_by_side(mesh) -> dict:
  """Options of jax.jit that let kernels of a CUDA graph which need nothing of each other run side by side: the same
  bits. On one H200, 8 x 4,096 tokens of 10M parameters: MSA 13.3 ms in place of 13.8, NSA 16.8 for 17.5, dense 13.1
  for 13.2. On several devices and with jax before 0.11 nobody tried it. An XLA_FLAGS that names the option wins, as
  XLA would take a program's own options first."""
  if (backends.current_platform() != "gpu" or mesh.size > 1 or jax.__version_info__ < (0, 11)
      or GRAPH_MODE in os.environ.get("XLA_FLAGS", "")):
    return {}
  return dict(compiler_options={GRAPH_MODE: "CONCURRENT"})


def compile_step(config, step: schedule.Step, mesh):
  """The compiled train step, the state donated."""
  def lower():
    function, arguments, options = program(config, step, mesh)
    return jax.jit(function, **options).lower(*arguments)

  return programs.compiled(step_key(config, step, mesh), lower)


def step_key(config, step: schedule.Step, mesh):
  """What `programs` calls the step that `compile_step` makes."""
  return ("step", *_key(config, mesh), step.program)


class Batches:
  """The batches of all seeds of a run, on the devices: a pure function of the step. A process reads its own rows."""

  def __init__(self, config, mesh):
    self.config = config
    self.placed = sharding.of_batch(config, mesh)
    self.sources = [data.make(config.data, seed) for seed in config.seeds]
    self._tokens_per_byte = {}
    for stage in config.schedule.stages:
      self.sources[0].check_context(stage.context or config.data.context)

  def at(self, step: int) -> dict[str, jax.Array]:
    what = schedule.at(self.config, step)
    whole, read = None, {}  # all rows; (first, last) row -> arrays
    if self.config.data.tokenizer != "bytes":  # what a byte costs is asked of the whole batch
      rows = [source.batch_at(step, context=what.context, batch=what.batch) for source in self.sources]
      self._tokens_per_byte = {**{s: x for s, x in self._tokens_per_byte.items() if s > step - 4},
                               step: np.array([self._ratio(row) for row in rows])}
      whole = self._stacked(rows)

    def part(name, index):
      rows, time = index[-2:]
      if whole is not None:
        return whole[name][..., rows, time]
      if (rows.start, rows.stop) not in read:
        read[rows.start, rows.stop] = self._stacked([
            source.batch_at(step, context=what.context, batch=what.batch, rows=rows) for source in self.sources])
      return read[rows.start, rows.stop][name][..., time]

    shape = (len(self.sources),) * (len(self.sources) > 1) + (what.batch, what.context)
    return {name: jax.make_array_from_callback(shape, self.placed, functools.partial(part, name))
            for name in BATCH_KEYS}

  @staticmethod
  def _stacked(of_seeds):
    return (of_seeds[0] if len(of_seeds) == 1
            else {key: np.stack([arrays[key] for arrays in of_seeds]) for key in BATCH_KEYS})

  def _ratio(self, row) -> float:
    real, tokenizer = row["weights"] > 0, self.sources[0].tokenizer
    spaces = tokenizer.prefix * (row["inputs"][real] == tokenizer.bos).sum()  # put before documents, no bytes of theirs
    return real.sum() / max(tokenizer.token_bytes[row["targets"][real]].sum() - spaces, 1)

  def tokens_per_byte(self, step: int) -> np.ndarray | float:
    """Learned targets over the bytes they stand for, float64[seeds], of one of the last batches; 1 for the bytes
    tokenizer."""
    return 1.0 if self.config.data.tokenizer == "bytes" else self._tokens_per_byte[step]

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the training documents."""
    return self.sources[0].fingerprint

  def describe(self, step: int, replica: int) -> str:
    """Which rows the batch of `step` holds, for error messages."""
    what = schedule.at(self.config, step)
    source = self.sources[replica]
    return source.describe(source.batch_at(step, context=what.context, batch=what.batch))


def pick_seeds(state, have: tuple[int, ...], want: tuple[int, ...]):
  """The part of a state that belongs to the seeds `want`, in their order."""
  if have == want:
    return state
  index = [have.index(seed) for seed in want]
  if len(have) == len(want) == 1:
    return state

  def take(x):
    if len(have) == 1:
      return jnp.broadcast_to(x, (len(index),) + x.shape)
    return x[index[0]] if len(index) == 1 else x[jnp.asarray(index)]

  return state._replace(params=jax.tree.map(take, state.params), optimizer=jax.tree.map(take, state.optimizer))
