"""The contract of a method, checked: what interface.py asks a method to declare, against what its layer is.

`check` reads the class, `probe` builds a layer of it on shapes alone, `parameters` looks at each layer that a model
is made of. All raise ContractError, which names the method, the field, what it says and what to do.
"""
from __future__ import annotations

import dataclasses
import typing

from flax import nnx
import jax
import jax.numpy as jnp

from nsa import layers
from nsa.architecture import ModelConfig
from nsa.methods import interface

RESERVED = ("own", "attention", "sparse", "warmup", "mixed")  # what configs and run modes call other things
OPTION_TYPES = (int, float, bool, str)
_PROBE_CONTEXT = 8192


class ContractError(ValueError):
  """A method declares something that does not hold."""

  def __init__(self, cls, field: str, value, fix: str):
    super().__init__(f"method {getattr(cls, '__name__', cls)}: {field} = {value!r}: {fix}")


def check(cls: type) -> None:
  """What can be read off the class."""
  def need(ok, field, value, fix):
    if not ok:
      raise ContractError(cls, field, value, fix)

  need(isinstance(cls, type) and issubclass(cls, interface.Method), "class", cls, "derive it from interface.Method")
  need("__dataclass_fields__" in vars(cls), "class", cls, "put @dataclasses.dataclass under @methods.register")
  need(isinstance(cls.name, str) and cls.name.isidentifier(), "name", cls.name,
       "a name of its own: letters, digits and _")
  need(not cls.has_sparse or cls.layer is not interface.Method.layer, "layer", cls.layer,
       "define layer(), which returns the method's own: the base's is dense attention")
  need(cls.name not in RESERVED, "name", cls.name, "means something else in configs")
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    need(field.default is not dataclasses.MISSING, field.name, hints[field.name], "give the option a default")
    need(hints[field.name] in OPTION_TYPES, field.name, hints[field.name], "options are int, float, bool or str")
  need(isinstance(cls.groups, tuple) and set(cls.groups) <= set(interface.GROUPS[1:]), "groups", cls.groups,
       f"a tuple of {', '.join(interface.GROUPS[1:])}")
  for name, loss in cls.losses.items():
    need(isinstance(loss, interface.Loss), f"losses[{name!r}]", loss, "an interface.Loss")
    need(loss.trains in ("backbone", *cls.groups), f"losses[{name!r}].trains", loss.trains,
         f"backbone, or one of groups = {cls.groups}")
  need(isinstance(cls.enters, tuple), "enters", cls.enters, "a tuple of names")
  need(not cls.enters or cls.enter is not interface.Method.enter, "enters", cls.enters,
       "define enter(), which performs it")
  options = {field.name for field in dataclasses.fields(cls)} | set(vars(cls))
  need(not cls.grid or hasattr(cls, cls.grid) or cls.grid in options, "grid", cls.grid, "names one of its options")


def probe(cls: type[interface.Method]) -> None:
  """What a layer with default options is, on shapes alone, against what the class declares."""
  model = ModelConfig(num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32, short_conv=2)
  options = cls()
  for mode in interface.MODES:
    for what, costs in (("costs", options.costs(model, _PROBE_CONTEXT, mode)),
                        ("loss_costs", options.loss_costs(model, _PROBE_CONTEXT, mode))):
      for part, cost in costs.items():
        field = f"{what}(mode={mode!r})[{part!r}]"
        if not isinstance(cost, interface.Cost) or not cost.flops >= 0:
          raise ContractError(cls, field, cost, "an interface.Cost with FLOPs of 0 or more")
        if cost.kind not in ("", "dense", "selected") or cost.trains not in interface.GROUPS:
          raise ContractError(cls, field, cost,
                              f'kind is "dense", "selected" or "", trains one of {", ".join(interface.GROUPS)}')
  for field, value in (("reads", sum(options.reads(model, _PROBE_CONTEXT).values())),
                       ("tokens_visible", options.tokens_visible(_PROBE_CONTEXT))):
    if not value >= 0:
      raise ContractError(cls, field, value, "0 or more")

  def streams():
    layer = build(options, layers.Init(jax.random.key(0), group=""), model)
    x = lambda *shape: jnp.zeros((1, 1) + shape, model.dtype)
    heads = lambda count: x(count, model.head_dim)
    inputs = interface.Inputs(x(model.d_model), heads(model.num_heads), heads(model.num_heads),
                              heads(model.num_kv_heads))
    return layer.streams(inputs, interface.Call(losses=False))

  found = {name: x.size for name, x in jax.eval_shape(streams).items() if name not in ("k", "v")}
  declared = {name: s.heads * s.width for name, s in options.streams(model).items() if s.cached}
  if found != declared:
    raise ContractError(cls, "streams", declared, f"numbers per token; the layer's streams have {found}: declare these")


def build(options: interface.Method, init, model) -> interface.Layer:
  """The layer of a method, every parameter of which belongs to a group that the method declares."""
  try:
    layer = options.layer(init, model)
  except NameError as error:
    raise ContractError(type(options), "layer", error.name,
                        "not defined yet: a method is checked where it is registered, put its layer's class above it"
                        ) from None
  if not isinstance(layer, interface.Layer):
    raise ContractError(type(options), "layer", layer, "returns an interface.Layer")
  _, state = nnx.split(layer)
  for path, leaf in nnx.to_flat_state(state):
    group = getattr(leaf, "group", None)
    if group not in options.groups:
      raise ContractError(type(options), "groups", options.groups,
                          f"parameter {'.'.join(map(str, path))} is of the group {group!r}: create it with "
                          "init.child(name, group=...), init.param or init.normal, and declare the group")
  return layer
