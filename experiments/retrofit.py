"""What does it take to put sparse attention onto a model that was trained dense?

From a trunk that was trained with `experiments/native.py:method=dense` and kept the fork point:

    python -m launch.train --config=experiments/native.py:method=dense --workdir=runs/dense --config.checkpoint.keep_at='(3480,)'
    python -m launch.train --config=experiments/retrofit.py:trunk=runs/dense,budget=0.13 --workdir=runs/retrofit-13

Without `trunk=` the run is staged: it trains its own dense part first, and ends with the same bits. The
budget is the share of all steps after leaving dense attention, a tenth of it selector warm-up; every arm
follows one learning-rate plan, so a fork leaves the trunk at the trunk's own learning rate.

Arguments: method=msa (msa or nsa), budget=0.13, trunk=, steps=4000. Not yet run to the end: no result is claimed here.
"""
from experiments import arguments, native
from nsa import schedule
from nsa.config import ForkConfig


def get_config(arg=None):
  a = arguments.parse(arg, method="msa", budget=0.13, trunk="", steps=4000)
  if a.method == "dense":
    raise ValueError("experiment argument method = 'dense': a retrofit needs a sparse method, msa or nsa")
  if not 0 < a.budget < 1:
    raise ValueError(f"experiment argument budget = {a.budget}: a share of the steps between 0 and 1, e.g. 0.13")
  config = native.get_config(f"method={a.method},steps={a.steps}")
  config.arm = f"retrofit_{a.method}_{100 * a.budget:g}"
  # NSA has no selector loss to warm up; its new branches start from the trained keys and values.
  warmup, enter = (0.0, "copy_kv") if a.method == "nsa" else (0.1, "")
  config.schedule = schedule.retrofit(a.steps, a.budget, selector_warmup=warmup, enter=enter, **native.RATE)
  if a.trunk:
    config.fork = ForkConfig(a.trunk, step=round(a.steps * (1 - a.budget)))
  return config
