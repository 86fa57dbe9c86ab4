"""Does a retrofit reach native sparse attention, on a task that needs selection?

The smallest study that shows something:

    bash launch/quickstart.sh  # or: python -m launch.study --config=experiments/quickstart.py --workdir=runs/quickstart

Associative recall with bindings and queries scattered over 64 tokens (4 pairs; Zoology, arXiv 2312.04927, with another
layout), a two-layer model, blocks of 4 of which a query sees 4 of up to 16: the first, its own and two of its choice.
One dense trunk; MSA from the start; MSA put onto the trunk in its stable phase, for the last 25 and 50 % of the steps;
the trunk run with training-free selectors. Three seeds.

Nothing of it is text, so bits per byte are not an endpoint here, and the corpus cannot differ between Python versions.

Arguments: steps=400, seeds=3. Cost and result: README.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig, OptimizerConfig
from nsa.study import Study

BLOCKS = dict(block_size=4, num_blocks=4, num_initial=1, num_local=1)
BUDGETS = (0.25, 0.5)
CONTROLS = ("dense", "oracle", "quest", "block_topk", "sink_window", "random")


def get_config(arg=None):
  a = arguments.parse(arg, steps=400, seeds=3, above_0=("steps", "seeds"))
  plan = dict(peak=4e-3, warmup=0.05, decay=0.2)
  warmup = max(1, a.steps // 20)  # steps in which the selector learns and the output stays dense

  def arm(name, attention, stages, run_modes, fork=None, share=1.0):
    dense = isinstance(attention, methods.Dense)
    return Config(
        arm=name, size="0.1M", attention=attention, schedule=stages,
        model=ModelConfig(num_layers=2, d_model=64, num_heads=4, num_kv_heads=1, head_dim=16, mlp_dim=176,
                          short_conv=3),
        data=DataConfig(source="tasks", context=64, global_batch=32, task_share=1.0, tasks=("mqar:pairs=4",),
                        answer_weight=1.0, filler_weight=0.0, align=4),
        optimizer=OptimizerConfig(weight_decay=0.01, selector_learning_rate=5.0),
        eval=EvalConfig(sequences=0, task_examples=128, batch=32, run_modes=run_modes, blocks=BLOCKS if dense else {},
                        near=(4, 16), every=max(1, round(a.steps * share / 10)),
                        during=("dense",) if dense else ("sparse",), during_examples=64),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=10)

  msa = methods.MSA(index_dim=16, **BLOCKS)
  arms = [arm("dense", methods.Dense(), schedule.dense(a.steps, **plan), CONTROLS),
          arm("native_msa", msa, schedule.native(a.steps, selector_warmup=warmup / a.steps, **plan),
              ("sparse", "dense", "oracle"))]
  budgets = {f"retrofit_msa_{100 * budget:g}": budget for budget in BUDGETS}
  for name, budget in budgets.items():
    stages = schedule.retrofit_within(a.steps, budget, warmup_steps=warmup, **plan)
    arms.append(arm(name, msa, stages, ("sparse", "dense", "oracle"),
                    ForkConfig("@dense", step=round(a.steps * (1 - budget))), budget))
  return Study(name="quickstart", question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(a.seeds)),
               reference="native_msa", dense="dense", budgets=budgets)
