"""AdamW and Muon per parameter group, so that selectors are clipped apart and stages can freeze groups.

Groups are named after the part of the path that says so: "selector" (index branches),
"branch" (what acts in sparse steps alone), "memory"; everything else is "backbone". A group
that does not learn in a step keeps its parameters and its optimizer state bit for bit.
The learning rate comes from the schedule, not from a counter in the optimizer.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nsa import model as model_lib

GROUPS = ("backbone", "selector", "branch", "memory")


def group_of(path: tuple) -> str:
  """The group of a parameter, from its tree path."""
  names = [getattr(key, "key", None) for key in path]
  return next((group for group in GROUPS[1:] if group in names), "backbone")


def split(params: dict) -> dict[str, dict[str, Any]]:
  """Parameters by group: {group: {path: array}}, without empty groups."""
  groups = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    groups.setdefault(group_of(path), {})[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
  return groups


def join(params: dict, groups: dict[str, dict[str, Any]]) -> dict:
  """The inverse of `split`, in the shape of `params`."""
  def pick(path, _):
    return groups[group_of(path)][jax.tree_util.keystr(path, simple=True, separator=".")]

  return jax.tree_util.tree_map_with_path(pick, params)


def make(config) -> dict[str, optax.GradientTransformation]:
  """One transformation per group that the model has: clip, precondition, decay; no learning rate."""
  o = config.optimizer
  params = split(model_lib.abstract_params(config))
  decays = split(model_lib.param_metadata(config, "decay"))
  return {group: _transform(o, params[group], decays[group], o.selector_clip if group == "selector" else o.clip)
          for group in params}


def _transform(o, params, decays, clip):
  adam = optax.scale_by_adam(o.b1, o.b2, o.eps)
  if o.name == "muon":
    # Muon acts on the matrix of each layer: dimensions that leave the residual stream
    # against those that enter it. Embeddings, norms and biases stay with Adam.
    labels = {path: "muon" if decays[path] and path not in ("embed", "head") else "adam" for path in params}
    shapes = {path: _muon_dimensions(path, params[path].ndim) for path, kind in labels.items() if kind == "muon"}
    precondition = optax.transforms.partition(
        {"adam": adam, "muon": optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=lambda tree: {
            path: shapes.get(path, masked) for path, masked in tree.items()})}, labels)
    # Muon's updates have unit spectral norm: bring their size to that of Adam's (arXiv 2502.16982, eq. 4).
    precondition = optax.chain(precondition, _match_adam(labels, shapes))
  else:
    precondition = adam
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  return optax.chain(*parts, precondition, optax.add_decayed_weights(o.weight_decay, mask=decays))


def _muon_dimensions(path: str, ndim: int):
  """Which dimensions of a stacked [layers, ...] weight make the matrix's rows and columns."""
  if path.endswith(".out"):                       # [L, N, H, D]
    return optax.contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))
  if path.endswith((".inner", ".outer")):         # [L, K, in, out]: one matrix per layer and head
    return optax.contrib.MuonDimensionNumbers(reduction_axis=(2,), output_axis=(3,))
  return optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=tuple(range(2, ndim)))


def _match_adam(labels, shapes):
  def scale(path, update):
    if labels[path] != "muon":
      return update
    d = shapes[path]
    rows = 1
    for axis in d.reduction_axis:
      rows *= update.shape[axis]
    columns = 1
    for axis in d.output_axis:
      columns *= update.shape[axis]
    return update * (0.2 * max(rows, columns) ** 0.5)

  return optax.stateless(lambda updates, params: {path: scale(path, u) for path, u in updates.items()})


def init(transforms: dict[str, optax.GradientTransformation], params: dict) -> dict:
  """Optimizer state per group."""
  groups = split(params)
  return {group: tx.init(groups[group]) for group, tx in transforms.items()}


def update(transforms, learns: tuple[str, ...], grads: dict, state: dict, params: dict,
           rates) -> tuple[dict, dict, dict]:
  """One step at `Step.rates`. Returns (params, state, norms), norms = {group: global gradient norm before clipping}.

  Groups that are not in `learns` pass through untouched.
  """
  grad_groups, param_groups = split(grads), split(params)
  new_state, norms = dict(state), {}
  for group, tx in transforms.items():
    if group not in learns:
      continue
    norms[group] = optax.tree.norm(grad_groups[group])
    updates, new_state[group] = tx.update(grad_groups[group], state[group], param_groups[group])
    rate = rates[int(group == "selector")]
    param_groups[group] = jax.tree.map(lambda p, u: p - jnp.asarray(rate, p.dtype) * u, param_groups[group], updates)
  return join(params, param_groups), new_state, norms
