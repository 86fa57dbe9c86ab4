"""Which layers share a stack of parameters, and what moves parameters between stacks: a fork, a stage, an export.

Consecutive layers of one method are stacked, so that a scan goes over them (nsa/model.py).
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nsa import methods


def in_order(stacks) -> list:
  """The stacks as the layers follow one another. Trees of parameters sort their names, and "stack10" comes before
  "stack2"."""
  return [stacks[f"stack{i}"] for i in range(len(stacks))]


def layout(config) -> list[tuple[methods.Method, int]]:
  """Runs of consecutive layers with one method, as `config.layers` says."""
  runs = []
  for name in config.layers or ("attention",) * config.model.num_layers:
    if runs and runs[-1][0] == name:
      runs[-1][1] += 1
    else:
      runs.append([name, 1])
  return [(config.method_of(name), count) for name, count in runs]


def backbone(params: dict, axis: int = 0) -> dict:
  """The parameters of the model without its methods' own: those of the same model with dense attention in every layer.

  Layers of different methods are joined to one stack. Nothing is copied where there is nothing to drop or join.
  axis: of the layers; 1 if several seeds come before them.
  """
  def strip(tree):
    return {name: strip(x) if isinstance(x, dict) else x for name, x in tree.items() if name != "method"}

  stacks = [strip(stack) for stack in in_order(params["stacks"])]
  whole = stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs, axis), *stacks)
  return {**params, "stacks": {"stack0": whole}}


def enter(config, params: dict, surgery: str) -> dict:
  """`Stage.enter`: the surgery on the attention parameters of all layers whose method knows it (`Method.enter`)."""
  stacks = {f"stack{i}": stack for i, stack in enumerate(in_order(params["stacks"]))}
  for (name, stack), (method, _) in zip(stacks.items(), layout(config)):
    if surgery in method.enters:
      stacks[name] = {**stack, "attention": method.enter(surgery, stack["attention"])}
  return {**params, "stacks": stacks}


def restack(params: dict, config) -> dict:
  """A backbone's parameters, its layers in the stacks that the config's model has."""
  if len(params["stacks"]) == len(layout(config)) == 1:
    return params
  axis = 0 if len(config.seeds) == 1 else 1
  whole = backbone(params, axis)["stacks"]["stack0"]
  edges = np.cumsum([0] + [count for _, count in layout(config)])
  stacks = {f"stack{i}": jax.tree.map(lambda x: jax.lax.slice_in_dim(x, first, end, axis=axis), whole)
            for i, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist()))}
  return {**params, "stacks": stacks}
