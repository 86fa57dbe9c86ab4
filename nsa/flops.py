"""Analytic FLOPs and decode reads, every branch and the selector counted apart.

XLA's own cost analysis counts a scanned layer once and cannot see inside kernels, so costs are
arithmetic here. Dense-equivalent FLOPs are never what MFU divides by.
"""
from __future__ import annotations

import dataclasses
import functools

from nsa import config as config_lib, methods, model as model_lib, optim, schedule, stacking


def costs(config, context: int, mode: str, losses: bool = False) -> list[tuple[str, methods.Cost]]:
  """What each part of all layers costs, forward, per token, averaged over a causal sequence of `context` tokens.

  First "projections", 2 FLOPs per weight of every matrix that the mode uses, and "unembedding", the same for the
  output matrix; then the attention branches of each stack of layers, and with `losses` its auxiliary losses.
  """
  weights = sum(_projections(config, group) for group in schedule.GROUPS_OF[mode])
  out = [("projections", methods.Cost(weights, kind="projections")),
         ("unembedding", methods.Cost(2.0 * config.model.vocab_size * config.model.d_model, kind="projections"))]
  for method, count in stacking.layout(config):
    parts = list(method.costs(config.model, context, mode).items())
    parts += method.loss_costs(config.model, context, mode).items() if losses else ()
    out += [(part, cost._replace(flops=count * cost.flops)) for part, cost in parts]
  return out


def by_part(parts: list[tuple[str, methods.Cost]]) -> dict[str, float]:
  """FLOPs summed by name."""
  out = {}
  for part, cost in parts:
    out[part] = out.get(part, 0.0) + cost.flops
  return out


def forward(config, context: int, mode: str) -> dict[str, float]:
  """Forward FLOPs per token by part."""
  return by_part(costs(config, context, mode))


def _projections(config, group: str) -> float:
  """2 FLOPs per weight of the matrices of one parameter group."""
  return _weights(model_lib.Static(model_lib.architecture(config))).get(group, 0.0)


@functools.lru_cache(maxsize=64)
def _weights(static) -> dict[str, float]:
  """`_projections` of all groups: asked for every run of a study and every record of a run."""
  config, out = static.value, {}
  groups, each_token = optim.groups_of(config), optim.by_path(model_lib.param_metadata(config, "tokens"))
  for path, leaf in optim.by_path(model_lib.abstract_params(config)).items():
    if each_token[path]:
      out[groups[path]] = out.get(groups[path], 0.0) + 2.0 * leaf.size
  return out


def training_costs(config, step: schedule.Step) -> list[tuple[str, methods.Cost]]:
  """`costs` of one optimizer step: forward, and twice that for the backward pass.

  A part that does not learn and lies on no path of gradient (scores that a top-k is taken of, a
  frozen backbone while the selector is distilled) is counted forward only.
  """
  parts = costs(config, step.context, step.mode, step.losses)
  if step.groups == ("selector",):
    return [(part, cost._replace(flops=cost.flops * (3.0 if cost.trains == "selector" else 1.0)))
            for part, cost in parts]
  both = [(part, cost._replace(flops=cost.flops * (3.0 if cost.gradient else 1.0))) for part, cost in parts]
  if step.groups == ("memory",):
    # Gradient passes through the frozen backbone, to memories below, but none is taken of its matrices.
    (_, projections), (_, unembedding) = parts[:2]
    frozen = projections.flops - _projections(config, "memory")
    both[:2] = [("projections", projections._replace(flops=3.0 * projections.flops - frozen)),
                ("unembedding", unembedding._replace(flops=2.0 * unembedding.flops))]
  return both


def training(config, step: schedule.Step) -> dict[str, float]:
  """FLOPs per token of one optimizer step, by part."""
  return by_part(training_costs(config, step))


def per_step(config, step: schedule.Step) -> float:
  """FLOPs of one optimizer step over the whole batch, of one seed."""
  return sum(training(config, step).values()) * step.context * step.batch


def cumulative(config, steps: int) -> float:
  """FLOPs of the run's first `steps` steps, of one seed; for a fork, its trunk's share included."""
  total, cost = 0.0, {}
  mixed = any(stage.mode == "mixed" for stage in config.schedule.stages)
  if not mixed:
    for first, end in config_lib.steps_of(config.schedule):
      if first < min(end, steps):
        total += (min(end, steps) - first) * per_step(config, schedule.at(config, first))
    return total
  for index in range(steps):
    step = schedule.at(config, index)
    if step.program not in cost:
      cost[step.program] = per_step(config, step)
    total += cost[step.program]
  return total


def attention(config, context: int, mode: str) -> float:
  """Attention FLOPs per token and sequence position, forward, all branches and the selector."""
  return sum(cost.flops for _, cost in costs(config, context, mode)[2:])


def attention_reduction(attention_options: methods.Method, model, context: int) -> float:
  """Dense attention FLOPs over the method's, one layer, forward, the selector included.

  For MSA with 64/4 heads of 128, block 128, J 16, index width 128 and 2^20 tokens this is the
  published 28.4 (arXiv 2606.13392, eq. 12).
  """
  dense = methods.interface.dense_flops(model, context)
  return dense / sum(attention_options.flops(model, context, "sparse").values())


def equal_window(config, context: int) -> int:
  """The window whose model costs per token what `config` costs in sparse mode, projections counted: at most as much.

  The arm that answers whether a memory is worth more than the longer window that its FLOPs would buy.
  The whole context if that costs less. Raises ValueError if a window of one token costs more.
  """
  target = sum(forward(config, context, "sparse").values())
  plain = dataclasses.replace(config, attention=methods.Window(1), layers=())
  fixed = sum(cost.flops for _, cost in costs(plain, context, "sparse")[:2])  # a window has no parameters of its own

  def cost(window):
    window = methods.Window(window).costs(config.model, context, "sparse")
    return fixed + config.model.num_layers * sum(part.flops for part in window.values())

  if not cost(1) <= target:
    raise ValueError(f"a window of 1 token costs {cost(1):,.0f} FLOPs per token, more than the {target:,.0f} to be "
                     "matched")
  low, high = 1, context
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if cost(middle) <= target else (low, middle - 1)
  return low


def parameters(config) -> dict[str, int]:
  """Number of parameters by group, and "non_embedding"."""
  params = model_lib.abstract_params(config)
  groups = optim.split(params, optim.groups_of(config))
  out = {group: sum(leaf.size for leaf in leaves.values()) for group, leaves in groups.items()}
  embedding = sum(params[name].size for name in ("embed", "head") if name in params)
  return {**out, "total": sum(out.values()), "non_embedding": sum(out.values()) - embedding}
