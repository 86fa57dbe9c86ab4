"""What does it take to put sparse attention onto a model that was trained dense?

From a trunk that was trained with `experiments/native.py:method=dense` and kept the fork point:

    python -m launch.train --config=experiments/native.py:method=dense --workdir=runs/dense \\
        --config.checkpoint.keep_at='(3480,)'
    python -m launch.train --config=experiments/retrofit.py:trunk=runs/dense,budget=0.13 --workdir=runs/retrofit-13

Without `trunk=` the run is staged: it trains its own dense part first, and ends with the same bits. The
budget is the share of all steps after leaving dense attention, a tenth of it selector warm-up; every arm
follows one learning-rate plan, so a fork leaves the trunk at the trunk's own learning rate.

The gate of seer is distilled on the frozen trunk; ssa mixes dense and sparse steps.

Arguments: method=msa (msa, nsa, dsa, seer, moba, infllm_v2 or ssa), budget=0.13, trunk=, steps=4000. `--dry_run`
shows the cost. Not yet run to the end: no result is claimed here.
"""
from experiments import arguments, native
from nsa import schedule
from nsa.config import ForkConfig


def get_config(arg=None):
  a = arguments.parse(arg, method="msa", budget=0.13, trunk="", steps=4000)
  if a.method == "dense":
    raise ValueError("experiment argument method = 'dense': a retrofit needs a sparse method, such as msa")
  if not 0 < a.budget < 1:
    raise ValueError(f"experiment argument budget = {a.budget}: a share of the steps between 0 and 1, e.g. 0.13")
  config = native.get_config(f"method={a.method},steps={a.steps}")
  config.arm = f"retrofit_{a.method}_{100 * a.budget:g}"
  if a.method == "seer":
    config.schedule = schedule.selector_only(a.steps, a.budget, **native.RATE)
  elif a.method == "ssa":
    config.schedule = schedule.mixed_retrofit(a.steps, a.budget, **native.RATE)
  else:  # only a selector with a loss can warm up; NSA's new branches start from the trained keys and values
    warmup = 0.1 if config.attention.selector_losses else 0.0
    enter = "copy_kv" if "copy_kv" in config.attention.enters else ""
    config.schedule = schedule.retrofit(a.steps, a.budget, selector_warmup=warmup, enter=enter, **native.RATE)
  if a.trunk:
    config.fork = ForkConfig(a.trunk, step=round(a.steps * (1 - a.budget)))
  return config
