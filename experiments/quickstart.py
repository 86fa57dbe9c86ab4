"""Does a retrofit reach native sparse attention?

The smallest study that runs end to end:

    python -m launch.study --config=experiments/quickstart.py --workdir=runs/quickstart

A two-layer byte model on the Python standard library's own source (256 bytes of context, blocks
of 8, 4 of them per query: at most 1/8 of the context is visible). One dense trunk; MSA from the
start; MSA put onto the trunk for the last 6, 12 and 25 % of the steps; the trunk run sparse
without training. Three seeds each, trained as one vmapped program.

What it can show is that everything works and what a report looks like. At a quarter of a million bytes of
training no arm has learned to use long context: expect differences near zero, and a verdict
that says how small an effect this study could have seen.

Arguments: steps=120, seeds=3. Cost and result: see README.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig
from nsa.study import Study

BLOCKS = dict(block_size=8, num_blocks=4, num_initial=0, num_local=1)
BUDGETS = (0.06, 0.12, 0.25)


def get_config(arg=None):
  a = arguments.parse(arg, steps=120, seeds=3)
  rate = dict(peak=4e-3, warmup=0.05, decay=0.2)

  def arm(name, attention, plan, run_modes, fork=None):
    return Config(
        arm=name, size="0.1M", attention=attention, schedule=plan,
        model=ModelConfig(num_layers=2, d_model=64, num_heads=4, num_kv_heads=1, head_dim=16, mlp_dim=176, short_conv=3),
        data=DataConfig(source="stdlib", context=256, global_batch=8, task_share=0.1, tasks=("copy:length=8",)),
        eval=EvalConfig(sequences=24, batch=8, run_modes=run_modes, blocks=BLOCKS if name == "dense" else {}, task_examples=16),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=5)

  msa = methods.MSA(index_dim=16, **BLOCKS)
  arms = [
      arm("dense", methods.Dense(), schedule.dense(a.steps, **rate),
          ("dense", "block_topk", "sink_window", "random", "oracle")),
      arm("native_msa", msa, schedule.native(a.steps, selector_warmup=0.05, **rate), ("sparse", "dense", "oracle")),
  ]
  budgets = {}
  for budget in BUDGETS:
    name = f"retrofit_msa_{100 * budget:g}"
    budgets[name] = budget
    arms.append(arm(name, msa, schedule.retrofit(a.steps, budget, selector_warmup=0.2, **rate), ("sparse", "dense", "oracle"),
                    ForkConfig("@dense", step=round(a.steps * (1 - budget)))))
  return Study(name="quickstart", question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(a.seeds)),
               reference="native_msa", dense="dense", budgets=budgets)
