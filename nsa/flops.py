"""Analytic FLOPs and decode reads, every branch and the selector counted apart.

XLA's own cost analysis counts a scanned layer once and cannot see inside kernels, so costs are
arithmetic here. Dense-equivalent FLOPs are never what MFU divides by.
"""
from __future__ import annotations

import dataclasses

from nsa import config as config_lib
from nsa import methods, model as model_lib, optim, schedule

# Parts that pass no gradient: what a top-k is taken of, and what a loss holds constant.
_FORWARD_ONLY = ("index", "scores", "teacher")


def forward(config, context: int, mode: str) -> dict[str, float]:
  """Forward FLOPs per token by part, averaged over a causal sequence of `context` tokens.

  "projections" are 2 per weight of every matrix that the mode uses, "unembedding" the same for
  the output matrix; the other parts are attention branches, summed over the layers.
  """
  out = {"projections": sum(_projections(config, group) for group in schedule.GROUPS_OF[mode]),
         "unembedding": 2.0 * config.model.vocab_size * config.model.d_model}
  for method, count in model_lib.layout(config):
    for branch, cost in method.flops(config.model, context, mode).items():
      out[branch] = out.get(branch, 0.0) + count * cost
  return out


def _projections(config, group: str) -> float:
  """2 FLOPs per weight of the matrices of one parameter group."""
  decays = optim.split(model_lib.param_metadata(config, "decay")).get(group, {})
  leaves = optim.split(model_lib.abstract_params(config)).get(group, {})
  return sum(2.0 * leaf.size for path, leaf in leaves.items()
             if decays[path] and path not in ("embed", "head") and "compress" not in path)


def training(config, step: schedule.Step) -> dict[str, float]:
  """FLOPs per token of one optimizer step, by part: forward, and twice that for the backward pass.

  A part that does not learn and lies on no path of gradient (scores that a top-k is taken of, a
  frozen backbone while the selector is distilled) is counted forward only.
  """
  parts = forward(config, step.context, step.mode)
  for method, count in model_lib.layout(config) if step.losses else ():
    for loss, cost in method.loss_flops(config.model, step.context, step.mode).items():
      parts[loss] = parts.get(loss, 0.0) + count * cost
  if step.groups == ("selector",):
    learns = {loss for method, _ in model_lib.layout(config) for loss in method.selector_losses}
    return {part: cost * (3.0 if part in learns else 1.0) for part, cost in parts.items()}
  if step.groups == ("memory",):
    # Gradient passes through the frozen backbone, to memories below, but none is taken of its matrices.
    frozen = parts["projections"] - _projections(config, "memory")
    return {**{part: cost * (1.0 if part in _FORWARD_ONLY else 3.0) for part, cost in parts.items()},
            "projections": 3.0 * parts["projections"] - frozen, "unembedding": 2.0 * parts["unembedding"]}
  return {part: cost * (1.0 if part in _FORWARD_ONLY else 3.0) for part, cost in parts.items()}


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
  parts = forward(config, context, mode)
  return sum(cost for part, cost in parts.items() if part not in ("projections", "unembedding"))


def attention_reduction(attention_options: methods.Method, model, context: int) -> float:
  """Dense attention FLOPs over the method's, one layer, forward, the selector included.

  For MSA with 64/4 heads of 128, block 128, J 16, index width 128 and 2^20 tokens this is the
  published 28.4 (arXiv 2606.13392, eq. 12).
  """
  dense = methods.interface.dense_flops(model, context)
  return dense / sum(attention_options.flops(model, context, "sparse").values())


def measured(method: methods.Method, model, context: int, visible: float) -> float:
  """Attention FLOPs per query and layer, forward, of a query that attended to `visible` tokens (as measured).

  The selection is counted as for a causal sequence of `context` tokens; of a method that chooses once per prompt,
  for a prompt of half of that, and not at all for answers that an eviction serves.
  """
  attended = 4.0 * model.num_heads * model.head_dim * visible
  if isinstance(method, methods.PromptMethod):
    choosing = method.selection_flops(model, context // 2) if method.phase == "prefill" else {}
    return attended + sum(choosing.values())
  parts = method.flops(model, context, "sparse")
  return attended + sum(cost for part, cost in parts.items() if part != "selected")


def equal_window(config, context: int) -> int:
  """The window whose model costs per token what `config` costs in sparse mode, projections counted: at most as much.

  The arm that answers whether a memory is worth more than the longer window that its FLOPs would buy.
  The whole context if that costs less. Raises ValueError if a window of one token costs more.
  """
  target = sum(forward(config, context, "sparse").values())

  def cost(window):
    plain = dataclasses.replace(config, attention=methods.Window(window), layers=())
    return sum(forward(plain, context, "sparse").values())

  if not cost(1) <= target:
    raise ValueError(f"a window of 1 token costs {cost(1):,.0f} FLOPs per token, more than the {target:,.0f} to be matched")
  low, high = 1, context
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if cost(middle) <= target else (low, middle - 1)
  return low


def read_reduction(attention_options: methods.Method, model, context: int) -> float:
  """Positions that dense attention reads at decode over those that the method reads (NSA, table 4)."""
  return context / sum(attention_options.reads(model, context).values())


def parameters(config) -> dict[str, int]:
  """Number of parameters by group, and "non_embedding"."""
  groups = optim.split(model_lib.abstract_params(config))
  out = {group: sum(leaf.size for leaf in leaves.values()) for group, leaves in groups.items()}
  embedding = sum(leaf.size for path, leaf in groups["backbone"].items() if path in ("embed", "head"))
  return {**out, "total": sum(out.values()), "non_embedding": sum(out.values()) - embedding}
