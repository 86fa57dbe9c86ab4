"""AdamW and Muon per parameter group, so that selectors are clipped apart and stages can freeze groups.

Every parameter names its group when it is created (nsa.layers.Init; methods.GROUPS has them). A group
that does not learn in a step keeps its parameters and its optimizer state bit for bit.
The learning rate comes from the schedule, not from a counter in the optimizer.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nsa import model as model_lib


class Optimizer(NamedTuple):
  """One transformation per group that the model has: clip, precondition, decay; no learning rate."""
  groups: dict[str, str]  # as `groups_of` returns them
  transforms: dict[str, optax.GradientTransformation]


def by_path(params: dict) -> dict[str, Any]:
  """The leaves of a parameter tree, {"stacks.stack0.mlp.up": leaf}."""
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def groups_of(config) -> dict[str, str]:
  """The group of each parameter, by its path."""
  return by_path(model_lib.param_metadata(config, "group"))


def split(params: dict, groups: dict[str, str]) -> dict[str, dict[str, Any]]:
  """Parameters by group: {group: {path: array}}, without empty groups."""
  out = {}
  for path, leaf in by_path(params).items():
    out.setdefault(groups[path], {})[path] = leaf
  return out


def join(params: dict, split_params: dict[str, dict[str, Any]]) -> dict:
  """The inverse of `split`, in the shape of `params`."""
  leaves = {path: leaf for group in split_params.values() for path, leaf in group.items()}
  return jax.tree.unflatten(jax.tree.structure(params), [leaves[path] for path in by_path(params)])


def make(config) -> Optimizer:
  """The optimizer of a config's model."""
  o, groups = config.optimizer, groups_of(config)
  params = split(model_lib.abstract_params(config), groups)
  decays, matrices = (by_path(model_lib.param_metadata(config, name)) for name in ("decay", "matrix"))
  return Optimizer(groups, {group: _transform(o, leaves, {path: decays[path] for path in leaves}, matrices,
                                              o.selector_clip if group == "selector" else o.clip)
                            for group, leaves in params.items()})


def _transform(o, params, decays, matrices, clip):
  adam = optax.scale_by_adam(o.b1, o.b2, o.eps)
  if o.name == "muon":
    # Muon acts on each matrix of each layer; embeddings, norms and biases stay with Adam.
    labels = {path: "muon" if matrices[path] else "adam" for path in params}
    shapes = {path: _muon_dimensions(matrices[path], params[path].ndim) for path, kind in labels.items()
              if kind == "muon"}
    precondition = optax.transforms.partition(
        {"adam": adam, "muon": optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=lambda tree: {
            path: shapes.get(path, masked) for path, masked in tree.items()})}, labels)
    # Muon's updates have unit spectral norm: bring their size to that of Adam's (arXiv 2502.16982, eq. 4).
    precondition = optax.chain(precondition, _match_adam(labels, shapes))
  else:
    precondition = adam
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  return optax.chain(*parts, precondition, optax.add_decayed_weights(o.weight_decay, mask=decays))


def _muon_dimensions(matrix: tuple[int, ...], ndim: int):
  """Which dimensions of a stacked [layers, ...] weight make the matrix's rows and columns."""
  rows = tuple(ndim + i for i in matrix)
  return optax.contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=tuple(range(rows[-1] + 1, ndim)))


def _match_adam(labels, shapes):
  def scale(path, update):
    if labels[path] != "muon":
      return update
    d = shapes[path]
    rows, columns = (math.prod(update.shape[axis] for axis in axes) for axes in (d.reduction_axis, d.output_axis))
    return update * (0.2 * max(rows, columns) ** 0.5)

  return optax.stateless(lambda updates, params: {path: scale(path, u) for path, u in updates.items()})


def init(optimizer: Optimizer, params: dict) -> dict:
  """Optimizer state per group."""
  groups = split(params, optimizer.groups)
  return {group: tx.init(groups[group]) for group, tx in optimizer.transforms.items()}


def update(optimizer: Optimizer, learns: tuple[str, ...], grads: dict, state: dict, params: dict,
           rates) -> tuple[dict, dict, dict]:
  """One step at `Step.rates`. Returns (params, state, norms), norms = {group: global gradient norm before clipping}.

  Groups that are not in `learns` pass through untouched.
  """
  grad_groups, param_groups = split(grads, optimizer.groups), split(params, optimizer.groups)
  new_state, norms = dict(state), {}
  for group, tx in optimizer.transforms.items():
    if group not in learns:
      continue
    norms[group] = optax.tree.norm(grad_groups[group])
    updates, new_state[group] = tx.update(grad_groups[group], state[group], param_groups[group])
    rate = rates[int(group == "selector")]
    param_groups[group] = jax.tree.map(lambda p, u: p - jnp.asarray(rate, p.dtype) * u, param_groups[group], updates)
  return join(params, param_groups), new_state, norms
