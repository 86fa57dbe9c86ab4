"""One table of sharding rules: logical axis -> mesh axes. GSPMD does the rest ("pjit-style").

Every parameter names its dimensions ("embed", "heads", "kv_heads", "mlp", "vocab"), activations
name theirs ("batch", "time"). `config.validate` sees to it that a mesh divides what it has to; a
dimension beyond that (a norm's, a compressed block's) that its axes do not divide stays whole.

The mesh, outermost first, neighbours in the fastest network last:

| axis | cuts | price per layer and step |
|---|---|---|
| data | rows of the batch | gradients summed once per step |
| fsdp | rows; parameters and optimizer state | parameters gathered, gradients scattered |
| context | queries (time); parameters and optimizer state | K, V and index keys of the whole sequence gathered |
| tensor | KV heads with their query heads; F | two sums of [B, T, D] activations, forward and backward |
"""
from __future__ import annotations

import contextlib
import dataclasses

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from nsa import model as model_lib, optim
import pallas_kernels as pk

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
  """Mesh axes of each logical axis; None = not sharded."""
  batch: tuple[str, ...] | str | None = ("data", "fsdp")
  time: tuple[str, ...] | str | None = "context"
  embed: tuple[str, ...] | str | None = ("fsdp", "context")
  heads: tuple[str, ...] | str | None = "tensor"
  kv_heads: tuple[str, ...] | str | None = "tensor"
  mlp: tuple[str, ...] | str | None = "tensor"
  vocab: tuple[str, ...] | str | None = None


RULES = Rules()


def mesh_shape(config, devices: int) -> dict[str, int]:
  """Devices along each axis; data = -1 takes what the others leave. `config.validate` has checked that it fits."""
  m = config.mesh
  data = devices // (m.fsdp * m.context * m.tensor) if m.data == -1 else m.data
  return dict(zip(AXES, (data, m.fsdp, m.context, m.tensor)))


def make_mesh(config, devices=None) -> Mesh:
  """The device mesh."""
  devices = jax.devices() if devices is None else devices
  shape, types = tuple(mesh_shape(config, len(devices)).values()), (AxisType.Auto,) * 4
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # no axis of a TPU slice has that size: tensor = 4 of 8 x 8 x 8
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=types)


def abstract_mesh(config, devices: int, device=None) -> AbstractMesh:
  """The mesh of devices that are not here: enough for shapes, shardings and lowering.

  device: jax.sharding.AbstractDevice, for kernels that ask what they are lowered for.
  """
  return AbstractMesh(tuple(mesh_shape(config, devices).values()), AXES, axis_types=(AxisType.Auto,) * 4,
                      abstract_device=device)


def _over(target) -> tuple[str, ...]:
  """One entry of the rules as a tuple of mesh axes."""
  return (target,) if isinstance(target, str) else target or ()


def named(mesh: Mesh, axes, shape, rules: Rules = RULES, replicas: bool = False) -> NamedSharding:
  """The sharding of an array with these logical axes. `replicas`: a leading axis of seeds, never sharded."""
  spec = []
  for name, size in zip(axes, shape[1:] if replicas else shape):
    target = getattr(rules, name) if name else None
    parts = int(np.prod([mesh.shape[axis] for axis in _over(target)], dtype=np.int64))
    spec.append(target if parts > 1 and size % parts == 0 else None)
  return NamedSharding(mesh, P(*([None] if replicas else []), *spec))


def constrain(mesh: Mesh):
  """(x, logical axes) -> x with a sharding constraint; the identity on one device."""
  if mesh.size == 1:
    return lambda x, axes: x
  return lambda x, axes: jax.lax.with_sharding_constraint(x, named(mesh, axes, x.shape))


def operations(mesh: Mesh) -> contextlib.AbstractContextManager:
  """Inside the block the attention operations are traced for each device's rows, queries and KV heads."""
  return pk.partitioned(mesh, batch=_over(RULES.batch), time=_over(RULES.time), heads=_over(RULES.kv_heads))


def gathered(part: jax.Array, spec: P, dtype) -> jax.Array:
  """Under `jax.shard_map`: the whole of an array that is cut as `spec` says, rounded to `dtype` on its way, as float32.

  Its gradient is summed over the devices once, in float32 whatever `dtype` is, and each gets that of its part.
  """
  cuts = [(dim, axes) for dim, axes in enumerate(spec) if axes]

  @jax.custom_vjp
  def gather(part):
    whole = part.astype(dtype)
    for dim, axes in cuts:
      whole = jax.lax.all_gather(whole, axes, axis=dim, tiled=True)
    return whole.astype(part.dtype)

  def scatter(_, gradient):
    for dim, axes in reversed(cuts):
      gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
    return gradient,

  gather.defvjp(lambda part: (gather(part), None), scatter)
  return gather(part)


def of_state(config, abstract_state, mesh: Mesh):
  """Shardings of a TrainState: parameters by their axes, moments like their parameter, the rest replicated."""
  replicas = len(config.seeds) > 1
  is_axes = lambda x: isinstance(x, model_lib.Axes)
  axes = model_lib.param_metadata(config, "axes")
  params = jax.tree.map(lambda a, p: named(mesh, a, p.shape, replicas=replicas), axes, abstract_state.params,
                        is_leaf=is_axes)
  placed = optim.by_path(params)
  by_path = {path: (placed[path], leaf.shape) for path, leaf in optim.by_path(abstract_state.params).items()}

  def like_parameter(path, leaf):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    sharding, shape = by_path.get(names[-1], (None, None)) if names else (None, None)
    return sharding if shape == leaf.shape else NamedSharding(mesh, P())

  optimizer = jax.tree_util.tree_map_with_path(like_parameter, abstract_state.optimizer)
  return abstract_state._replace(step=NamedSharding(mesh, P()), params=params, optimizer=optimizer)


def of_batch(config, mesh: Mesh) -> NamedSharding:
  """[batch, time] arrays, with a leading axis of seeds if there are several."""
  return NamedSharding(mesh, P(*([None] if len(config.seeds) > 1 else []), RULES.batch, RULES.time))


def place(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
  """An array that every process has whole, onto the devices: each process hands over its own devices' parts."""
  if sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def place_rows(mesh: Mesh, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """[batch] and [batch, time] arrays, onto the devices."""
  return {name: place(NamedSharding(mesh, P(RULES.batch, *[RULES.time] * (x.ndim - 1))), x)
          for name, x in arrays.items()}
