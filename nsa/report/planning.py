"""What a pilot is for: how much seeds differ, what a main study could see of that, and what it would cost."""
from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from nsa.report import endpoints, statistics
from nsa.report.endpoints import Row
from nsa.report.runs import Run, Study

SEEDS = (3, 5)                    # of the main study
PLANNED = {                       # its sizes, by non-embedding parameters; 4 heads of 64 share a KV head
    "10M": dict(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=1024),
    "40M": dict(num_layers=9, d_model=640, num_heads=12, num_kv_heads=3, head_dim=64, mlp_dim=1728),
    "120M": dict(num_layers=11, d_model=1024, num_heads=16, num_kv_heads=4, head_dim=64, mlp_dim=2752),
}
TOKENS_PER_PARAMETER = 20.0       # priced beside the study's own ratio
DEVICE = "NVIDIA H200"            # priced where the runs do not name a device with a known peak
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


@dataclasses.dataclass
class Price:
  """One size of the main study at a number of tokens per parameter: device hours for one seed of every arm."""
  size: str
  parameters: int                 # non-embedding
  tokens: float                   # of a whole run
  ratio: float                    # tokens per parameter
  measured: float                 # hours at the FLOP/s that the arms of this study reached
  forecast: float                 # hours by nsa.planning.forecast


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
  per_token = work / _tokens(config, stage[1] - stage[0])
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


def prices(study: Study) -> tuple[list[Price], dict[str, float], str]:
  """(prices, FLOP/s of one device by arm, the device's kind): of the arms that have finished at the smallest size.

  Arms that end in the same computation (a native arm and its retrofits) are priced at the FLOP/s of the one that
  trained longest: ten steps between evaluations say little of speed.
  """
  from nsa import chips, flops, model as model_lib
  runs = {arm: of_arm for arm in study.arms
          if (of_arm := [r for r in study.finished if (r.arm, r.size) == (arm, study.sizes[0])])}
  known = {arm: [r for r in map(rate, of_arm) if math.isfinite(r)] for arm, of_arm in runs.items()}
  own_rates = {arm: float(np.mean(of_arm)) for arm, of_arm in known.items() if of_arm}
  configs = {arm: config for arm, of_arm in runs.items() if (config := endpoints.parsed(of_arm[0].config))}
  stage = {arm: c.schedule.stages[-1] for arm, c in configs.items()}
  ends = {arm: repr((c.attention, c.layers, stage[arm].mode, stage[arm].train)) for arm, c in configs.items()}
  by_length = sorted((arm for arm in configs if arm in own_rates), key=lambda arm: runs[arm][0].first)
  longest = {ends[arm]: arm for arm in reversed(by_length)}  # of equals the first named
  rates = {arm: own_rates[longest[ends[arm]]] for arm in configs if ends[arm] in longest}
  configs = {arm: configs[arm] for arm in rates}
  if not configs:
    return [], {}, ""
  kind = next(iter(runs.values()))[0].versions.get("device_kind", "")
  chip = chips.find(kind)
  chip = chip if chip and chip.tflops and chip.hbm else chips.find(DEVICE)
  own = configs.get(study.dense) or next(iter(configs.values()))
  ratio = _tokens(own, own.schedule.steps) / flops.parameters(own)["non_embedding"]
  shapes = {**({study.sizes[0]: {}} if study.sizes[0] not in PLANNED else {}), **PLANNED}
  out = []
  for size, shape in shapes.items():
    measured = forecast_ = 0.0  # hours per token of a whole run
    shaped = dataclasses.replace(own, model=dataclasses.replace(own.model, **shape))
    parameters = flops.parameters(shaped)["non_embedding"]
    for arm, config in configs.items():
      work, seconds = own_work(model_lib.Static(bare(config, **shape)), runs[arm][0].first, chip.kind)
      whole = 3600 * _tokens(config, config.schedule.steps)
      measured += work / rates[arm] / whole
      forecast_ += seconds / whole
    close = math.isclose(ratio, TOKENS_PER_PARAMETER, rel_tol=0.05)
    for each in (ratio,) if close else (ratio, TOKENS_PER_PARAMETER):
      tokens = each * parameters
      out.append(Price(size, parameters, tokens, each, measured * tokens, forecast_ * tokens))
  return out, rates, chip.kind


def bare(config, **shape):
  """What costs something in a config, at another shape of the model, and nothing else: equal for arms that cost the
  same."""
  from nsa import config as config_lib
  return config_lib.Config(
      model=dataclasses.replace(config.model, **shape), attention=config.attention, layers=config.layers,
      others=config.others, schedule=config.schedule, optimizer=config.optimizer,
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


def _tokens(config, steps: int) -> float:
  return float(steps) * config.data.global_batch * config.data.context


# --- which kernel -------------------------------------------------------------------


def union_break_even(config: dict) -> float:
  """The union of a tile, over the blocks of one query, up to which attending to unions can be faster on an H200.

  A tile attends to all blocks that one of its queries chose: its products grow with the union. Block by block (KV
  outer) each (query, block) has a partial result, log-sum-exp included, that is written and read again. Both as
  fast as its data sheet allows, forward. NaN without blocks.
  """
  from pallas_kernels import cost
  options, model = config.get("attention", {}), config.get("model", {})
  block, head_dim = options.get("block_size"), model.get("head_dim")
  if not block or not head_dim:
    return math.nan
  width = 4 if model.get("dtype") == "float32" else 2
  chip = cost.CHIPS["h200"]
  products = 4 * head_dim * block / chip.flops
  return max(2 * (width * head_dim + 4) / chip.bandwidth, products) / products
