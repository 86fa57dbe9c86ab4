"""What a pilot is for: how much seeds differ, what a main study could see of that, and how fast its arms trained."""
from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from nsa.report import endpoints, statistics
from nsa.report.endpoints import Row
from nsa.report.runs import Run, Study

SEEDS = (3, 5)                    # of the main study
DEVICE = "NVIDIA H200"            # what a plan is priced for
MOST_SEEDS = 60                   # that "seeds for the margin" looks at


# --- spread -------------------------------------------------------------------------


@dataclasses.dataclass
class Spread:
  """How much the seeds of one arm differ on one endpoint, alone and paired with the reference."""
  arm: str                        # "" for the retrofits pooled
  n: int
  mean: float                     # NaN for pooled
  sd: float                       # over seeds; NaN with one
  sd_difference: float            # of the paired differences; NaN for the reference
  df: int                         # degrees of freedom of sd_difference
  margin: float

  def detectable(self, seeds: int) -> tuple[float, float, float]:
    """The smallest mean difference that so many pairs find with 80 % power at 5 % two-sided; and at the ends of the
    95 % interval of the SD."""
    unit = statistics.smallest_detectable_effect(1.0, seeds)
    low, high = statistics.standard_deviation_interval(self.sd_difference, self.df)
    return unit * self.sd_difference, unit * low, unit * high

  @property
  def seeds_for_margin(self) -> int | None:
    """The fewest pairs that would find a difference as large as the margin; None if MOST_SEEDS are too few."""
    return next((n for n in range(2, MOST_SEEDS + 1)
                 if statistics.smallest_detectable_effect(self.sd_difference, n) <= self.margin), None)


def spreads(study: Study, table: list[Row], size: str, metric: str, margin: float) -> list[Spread]:
  """One per arm in its own run mode, then the retrofits' differences pooled (arm "") where several have some."""
  get = lambda arm: endpoints.series(table, arm, size, study.headline_mode(arm), metric)
  reference, out = get(study.reference) if study.reference else {}, []
  for arm in study.arms:
    values = get(arm)
    if not values:
      continue
    differences = statistics.paired_differences(values, reference)[1] if arm != study.reference else np.array([])
    sd = lambda x: float(np.std(x, ddof=1)) if len(x) > 1 else math.nan
    of_seeds = list(values.values())
    out.append(Spread(arm, len(values), float(np.mean(of_seeds)), sd(of_seeds), sd(differences),
                      max(0, len(differences) - 1), margin))
  paired = [s for s in out if s.arm in study.retrofits() and s.df and s.sd_difference > 0]
  if len(paired) > 1:
    df = sum(s.df for s in paired)
    pooled = math.sqrt(sum(s.df * s.sd_difference ** 2 for s in paired) / df)
    out.append(Spread("", max(s.n for s in paired), math.nan, math.nan, pooled, df, margin))
  return out


# --- cost ---------------------------------------------------------------------------


def rate(run: Run) -> float:
  """FLOP/s of one device over the last stage, all seeds of the run together; NaN where it was not logged."""
  from nsa import config as config_lib, flops  # here and below: the verdict alone does without jax
  config, devices = endpoints.parsed(run.config), run.versions.get("devices", 1)
  if config is None or devices is None:
    return math.nan
  stage = config_lib.steps_of(config.schedule)[-1]
  if stage[0] >= stage[1]:
    return math.nan
  work = flops.cumulative(config, stage[1]) - flops.cumulative(config, stage[0])
  per_token = work / ((stage[1] - stage[0]) * config.data.global_batch * config.data.context)
  speeds = endpoints.speeds(run)
  if not speeds:
    return math.nan
  return float(np.mean(speeds)) * len(config.seeds) * per_token / int(devices)


def training_seconds(run: Run) -> float:
  """Seconds of the run's own steps at its usual speed, without pauses; 0 where no speed was logged."""
  curve = next(iter(run.curves.values()), None)
  if curve is None or not len(curve["step"]):
    return 0.0
  per_step = curve["tokens"][-1] / curve["step"][-1]
  seconds = (curve["step"][-1] - run.first) * per_step / endpoints.speed(curve, "tokens_per_second")
  return seconds if math.isfinite(seconds) else 0.0


def rates(study: Study) -> dict[str, float]:
  """FLOP/s of one device by arm, a mean over its finished runs at the study's first size; arms without a speed are left
  out."""
  found = {arm: [r for run in study.finished if (run.arm, run.size) == (arm, study.sizes[0])
                 and math.isfinite(r := rate(run))] for arm in study.arms}
  return {arm: float(np.mean(of_arm)) for arm, of_arm in found.items() if of_arm}


def bare(config):
  """What costs something in a config and nothing else: equal for arms that cost the same."""
  from nsa import config as config_lib
  return config_lib.Config(
      model=config.model, attention=config.attention, layers=config.layers, others=config.others,
      schedule=config.schedule, optimizer=config.optimizer,
      data=config_lib.DataConfig(context=config.data.context, global_batch=config.data.global_batch))


@functools.lru_cache(maxsize=256)
def own_work(static, first: int, kind: str) -> tuple[float, float]:
  """(FLOPs, forecast seconds on one device) of the steps from `first` on."""
  from nsa import chips, config as config_lib, flops, schedule
  from nsa.planning import forecast
  config, seconds = static.value, 0.0
  for begin, end in config_lib.steps_of(config.schedule):
    begin, steps = max(begin, first), {}
    if begin >= end:
      continue
    mixed = config.schedule.stages[schedule.at(config, begin).stage].mode == "mixed"
    for index in range(begin, end if mixed else begin + 1):
      step = schedule.at(config, index)
      steps.setdefault(step.mode, []).append(step)
    of_kind = [forecast.of_step(config, same[0], chips.find(kind), 1).seconds * len(same) for same in steps.values()]
    seconds += sum(of_kind) if mixed else of_kind[0] * (end - begin)
  return flops.cumulative(config, config.schedule.steps) - flops.cumulative(config, first), seconds
