"""Schedules: what is dense, sparse or frozen, at which length and learning rate, at a step.

Everything is a pure function of (config, step): nothing of it is saved, and a run that
resumes or forks at a step is where an undisturbed run would be.

Native, retrofit, selector-only, mixed and sparse-to-dense runs differ by their list of
stages alone; the constructors below write the common ones.
"""
from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from nsa import config as config_lib
from nsa.config import LearningRate, Restart, ScheduleConfig, Stage

# Parameter groups (methods.GROUPS): which learn in a step of a mode when everything trains.
GROUPS_OF = {
    "dense": ("backbone",),
    "warmup": ("backbone", "selector"),
    "sparse": ("backbone", "selector", "branch", "memory"),
}


@dataclasses.dataclass(frozen=True)
class Step:
  """What one step does. Steps with equal `program` run the same compiled function."""
  stage: int                          # index into schedule.stages
  mode: str                           # dense | warmup | sparse
  groups: tuple[str, ...]             # parameter groups that learn
  context: int                        # tokens per sequence
  batch: int                          # sequences over all devices
  loss_weights: tuple[tuple[str, float], ...]
  losses: bool                        # whether auxiliary losses are computed: not in stages of mode "dense"
  learning_rate: float
  selector_learning_rate: float       # of the group "selector"
  enter: str                          # weight surgery before this step, "" for none

  @property
  def program(self):
    return dataclasses.replace(self, stage=0, learning_rate=0.0, selector_learning_rate=0.0, enter="")

  @property
  def rates(self) -> np.ndarray:
    """What the train step takes: float32[2], the learning rates of selectors' parameters (second) and of all else
    (first)."""
    return np.array([self.learning_rate, self.selector_learning_rate], np.float32)


def at(config: config_lib.Config, step: int) -> Step:
  """What `step` (0 .. steps - 1) does."""
  stages = config.schedule.stages
  edges = config_lib.steps_of(config.schedule)
  index = next(i for i, (first, end) in enumerate(edges) if first <= step < end)
  stage = stages[index]
  mode = stage.mode
  if mode == "mixed":
    coin = zlib.crc32(b"mixed %d" % step) / 2 ** 32  # from the step alone: all seeds and all arms mix alike
    mode = "dense" if coin < stage.dense_share else "sparse"
  groups = GROUPS_OF[mode] if stage.train == "all" else (stage.train,)
  context = stage.context or config.data.context
  rate = learning_rate(config.schedule, step) * stage.learning_rate
  # In float32, as the optimizer multiplies.
  selector = float(np.float32(peak(config.schedule, step) if stage.hold_selector else rate)
                   * np.float32(config.optimizer.selector_learning_rate))
  weights = {name: loss.weight for method in config.methods for name, loss in method.losses.items()}
  return Step(index, mode, groups, context, config.data.global_batch * config.data.context // context,
              tuple(sorted({**weights, **stage.loss_weights}.items())), stage.mode != "dense",
              rate, selector, stage.enter if step == edges[index][0] else "")


def programs(config: config_lib.Config, first: int = 0) -> list[Step]:
  """Every different step from `first` to the end, in the order in which they come."""
  seen = {}
  for index, (begin, end) in enumerate(config_lib.steps_of(config.schedule)):
    begin = max(begin, first)
    mixed = config.schedule.stages[index].mode == "mixed"
    kinds = set()
    for step in range(begin, end):
      what = at(config, step)
      seen.setdefault(what.program, what)
      kinds.add(what.mode)
      if len(kinds) == 2 or not mixed:  # a mixed stage may meet its second kind late, or never
        break
  return list(seen.values())


def learning_rate(schedule: ScheduleConfig, step: int) -> float:
  """The plan of the whole run; a stage multiplies it.

  wsd: linear warm-up, constant, linear decay to `final` (arXiv 2404.06395, section 4);
  cosine: linear warm-up, half a cosine to `final`. The last step has peak * final.
  From `restart.step` on, wsd anew over the steps that are left, to `restart.peak` times the peak: its warm-up begins
  where the first plan ended (arXiv 2308.04014 re-warms finished models so).
  """
  plan, steps, again = schedule.learning_rate, schedule.steps, schedule.restart
  if again.step:
    if step >= again.step:
      first = plan.peak * plan.final
      return _again(first, peak(schedule, step), plan.final, again, step - again.step, steps - again.step)
    steps = again.step
  warmup = max(1, round(plan.warmup * steps)) if plan.warmup else 0
  if step < warmup:
    return plan.peak * (step + 1) / warmup
  if plan.plan == "cosine":
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return plan.peak * (plan.final + (1 - plan.final) * 0.5 * (1 + float(np.cos(np.pi * done))))
  decay = round(plan.decay * steps) if plan.plan == "wsd" else 0
  if decay and step >= steps - decay:
    left = (steps - 1 - step) / decay
    return plan.peak * (plan.final + (1 - plan.final) * left)
  return plan.peak


def peak(schedule: ScheduleConfig, step: int) -> float:
  """The highest learning rate of the plan that `step` belongs to."""
  again = schedule.restart
  return schedule.learning_rate.peak * (again.peak if again.step and step >= again.step else 1.0)


def _again(first, top, final, again, step, steps):
  """The rate at `step` of the second plan's `steps`: from `first` up to `top`, constant, down to `top * final`."""
  warmup, decay = round(again.warmup * steps), round(again.decay * steps)
  if step < warmup:
    return first + (top - first) * (step + 1) / warmup
  if decay and step >= steps - decay:
    return top * (final + (1 - final) * (steps - 1 - step) / decay)
  return top


# --- common schedules ---------------------------------------------------------------


def dense(steps: int, **kw) -> ScheduleConfig:
  """Dense from first to last step; the trunk that retrofits fork from."""
  return ScheduleConfig(steps, [Stage()], LearningRate(**kw))


def native(steps: int, selector_warmup: float = 0.02, **kw) -> ScheduleConfig:
  """Sparse from the start, after a selector warm-up on `selector_warmup` of the steps (0: none at all)."""
  stages = [Stage(1.0, "sparse")]
  if selector_warmup:
    stages = [Stage(selector_warmup, "warmup"), Stage(1 - selector_warmup, "sparse")]
  return ScheduleConfig(steps, stages, LearningRate(**kw))


def retrofit(steps: int, budget: float, selector_warmup: float = 0.1, *, enter: str = "", **kw) -> ScheduleConfig:
  """Dense for 1 - budget of the steps, then sparse with all parameters.

  budget: share of all steps after leaving dense attention, selector warm-up included.
  selector_warmup: share of the budget in which the output stays dense and the selector learns.
  """
  stages = [Stage(1 - budget, "dense")]
  if selector_warmup:
    stages.append(Stage(budget * selector_warmup, "warmup"))
  stages.append(Stage(budget * (1 - selector_warmup), "sparse", enter=enter))
  return ScheduleConfig(steps, stages, LearningRate(**kw))


def retrofit_within(steps: int, budget: float, *, warmup_steps: int, enter: str = "", **kw) -> ScheduleConfig:
  """A retrofit that leaves the dense trunk in its stable phase and shares its decay: all arms see `steps` and one plan.

  budget: share of all steps after leaving dense attention, selector warm-up included.
  warmup_steps: steps of it in which the output stays dense and the selector learns; 0 for none.

  Raises:
    ValueError: the fork would lie in the decay (rate and budget could not be told apart), or the warm-up is longer
      than the budget.
  """
  plan, fork = LearningRate(**kw), round((1 - budget) * steps)
  if fork > steps - round(plan.decay * steps):
    raise ValueError(f"budget = {budget}: the fork at step {fork} would lie in the decay, the last {plan.decay:g} of "
                     f"the steps; take a budget of at least {plan.decay:g}, or retrofit_after")
  return ScheduleConfig(steps, _adopt(steps, fork, warmup_steps, enter, hold=False), plan)


def retrofit_after(steps: int, budget: float, *, warmup_steps: int, restart: Restart | None = None, train: str = "all",
                   enter: str = "", **kw) -> ScheduleConfig:
  """A retrofit of a finished model: `budget` * steps more steps on top of its `steps`, at a plan of their own.

  The selector's rate neither warms up nor decays in its warm-up, so that small budgets teach it too.

  warmup_steps: of the further steps, those in which the output stays dense and the selector learns; 0 for none.
  restart: the second plan's peak, warm-up and decay; its step is set here.
  train: "all", or "selector": the backbone stays frozen, all further steps are selector warm-up and `warmup_steps` is
  unused.

  Raises:
    ValueError: the warm-up is longer than the budget, or the budget is no step at all.
  """
  total = steps + _more(steps, budget)
  if train == "selector":
    stages = [Stage(steps / total, "dense"), Stage(1 - steps / total, "warmup", train="selector")]
  else:
    stages = _adopt(total, steps, warmup_steps, enter, hold=True)
  return ScheduleConfig(total, stages, LearningRate(**kw), dataclasses.replace(restart or Restart(), step=steps))


def dense_continuation(steps: int, budget: float, *, restart: Restart | None = None, **kw) -> ScheduleConfig:
  """The control of `retrofit_after`: the same further steps at the same rates, dense to the end."""
  total = steps + _more(steps, budget)
  return ScheduleConfig(total, [Stage()], LearningRate(**kw), dataclasses.replace(restart or Restart(), step=steps))


def retrofit_of_import(steps: int, *, warmup_steps: int, train: str = "all", enter: str = "", **kw) -> ScheduleConfig:
  """A retrofit of a checkpoint from elsewhere, which has no steps of ours (fork.reset): all `steps` are the budget.

  Its control is `dense(steps)` at the same plan. The selector's rate neither warms up nor decays in its warm-up.

  warmup_steps: those in which the output stays dense and the selector learns; 0 for none.
  train: "all", or "selector": the backbone stays frozen, all steps are selector warm-up and `warmup_steps` is unused.

  Raises:
    ValueError: the warm-up is as long as the budget.
  """
  if train == "selector":
    stages = [Stage(1.0, "warmup", train="selector")]
  else:
    stages = _adopt(steps, 0, warmup_steps, enter, hold=True)[1:]
  return ScheduleConfig(steps, stages, LearningRate(**kw))


def as_it_is() -> ScheduleConfig:
  """One dense step at a rate of 0: a forked model is evaluated as an arm, not a bit of it changed."""
  return ScheduleConfig(1, [Stage(learning_rate=0.0)])


def _more(steps, budget):
  more = round(budget * steps)
  if more < 1:
    raise ValueError(f"budget = {budget}: rounds to no step of {steps}; take a larger budget or more steps")
  return more


def _adopt(total, fork, warmup_steps, enter, hold):
  """Dense to `fork`, a selector warm-up of so many steps, sparse to `total`."""
  if not 0 <= warmup_steps < total - fork:
    raise ValueError(f"warmup_steps = {warmup_steps}: must be from 0 to below the budget's {total - fork} steps")
  stages = [Stage(fork / total, "dense")]
  if warmup_steps:
    stages.append(Stage(warmup_steps / total, "warmup", hold_selector=hold))
  return stages + [Stage((total - fork - warmup_steps) / total, "sparse", enter=enter)]


def selector_only(steps: int, budget: float, **kw) -> ScheduleConfig:
  """Dense for 1 - budget, then the frozen backbone's selector is distilled on dense attention."""
  return ScheduleConfig(steps, [Stage(1 - budget, "dense"), Stage(budget, "warmup", train="selector")],
                        LearningRate(**kw))


def memory_only(steps: int, budget: float, **kw) -> ScheduleConfig:
  """Dense for 1 - budget, then a memory learns beside the frozen backbone."""
  return ScheduleConfig(steps, [Stage(1 - budget, "dense"), Stage(budget, "sparse", train="memory")],
                        LearningRate(**kw))


def mixed(steps: int, dense_share: float = 0.5, **kw) -> ScheduleConfig:
  """Every step dense or sparse for the whole model, at random (SSA, arXiv 2511.20102; its loss is its method's)."""
  return ScheduleConfig(steps, [Stage(1.0, "mixed", dense_share=dense_share)], LearningRate(**kw))


def mixed_retrofit(steps: int, budget: float, dense_share: float = 0.5, **kw) -> ScheduleConfig:
  """Dense for 1 - budget of the steps, then `mixed`: SSA put onto a dense model."""
  return ScheduleConfig(steps, [Stage(1 - budget, "dense"), Stage(budget, "mixed", dense_share=dense_share)],
                        LearningRate(**kw))


def sparse_to_dense(steps: int, dense_budget: float, **kw) -> ScheduleConfig:
  """The reverse retrofit: sparse first, dense for the last `dense_budget` (MoBA's hybrid recipe, arXiv 2502.13189).

  With the method "window" the sparse part selects nothing: what it gains over dense is a curriculum, not selection.
  """
  return ScheduleConfig(steps, [Stage(1 - dense_budget, "sparse"), Stage(dense_budget, "dense")], LearningRate(**kw))


def context_curriculum(steps: int, short: int, share: float, mode: str = "dense", **kw) -> ScheduleConfig:
  """Sequences of `short` tokens for `share` of the steps, of data.context after that; tokens per step stay the same."""
  return ScheduleConfig(steps, [Stage(share, mode, context=short), Stage(1 - share, mode)], LearningRate(**kw))
