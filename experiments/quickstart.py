"""Does a retrofit reach native sparse attention, on a task that needs selection?

The smallest study that shows something:

    bash launch/quickstart.sh                       # or: python -m launch.study --config=experiments/quickstart.py --workdir=...

Associative recall with bindings and queries scattered over 128 tokens (8 pairs; Zoology, arXiv 2312.04927, with another
layout), a two-layer model, blocks of 4 of which a query sees 6 of up to 32. One dense trunk; MSA from the start; MSA put onto
the trunk in its stable phase, for the last 25 and 50 % of the steps; the trunk run with training-free selectors. Three seeds.

Nothing of it is text, so bits per byte are not an endpoint here, and the corpus cannot differ between Python versions.

Arguments: steps=500, seeds=3. Cost and result: README.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig, OptimizerConfig
from nsa.study import Study

BUDGETS = (0.25, 0.5)
CONTROLS = ("dense", "oracle", "quest", "block_topk", "sink_window", "random")


def get_config(arg=None):
  a = arguments.parse(arg, steps=500, seeds=3, rate=3e-3, batch=32, pairs=8, context=128, block=4, blocks=6, width=64, warm=0.05,
                      looks=10, examples=128, selector=5.0, decay=0.2)
  plan = dict(peak=a.rate, warmup=0.05, decay=a.decay)
  blocks = dict(block_size=a.block, num_blocks=a.blocks, num_initial=1, num_local=1)
  warmup = max(1, round(a.warm * a.steps))

  def arm(name, attention, stages, run_modes, fork=None, share=1.0):
    dense = isinstance(attention, methods.Dense)
    return Config(
        arm=name, size="0.1M", attention=attention, schedule=stages,
        model=ModelConfig(num_layers=2, d_model=a.width, num_heads=4, num_kv_heads=1, head_dim=16, mlp_dim=a.width * 11 // 4, short_conv=3),
        data=DataConfig(source="tasks", context=a.context, global_batch=a.batch, task_share=1.0, tasks=(f"mqar:pairs={a.pairs}",),
                        answer_weight=1.0, filler_weight=0.0, align=a.block),
        optimizer=OptimizerConfig(weight_decay=0.01, selector_learning_rate=a.selector),
        eval=EvalConfig(sequences=0, task_examples=a.examples, batch=32, run_modes=run_modes, blocks=blocks if dense else {},
                        near=(a.block, a.block * (a.blocks - 1)), every=max(1, round(a.steps * share / a.looks)),
                        during=("dense",) if dense else ("sparse",), during_examples=a.examples // 2),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=10)

  msa = methods.MSA(index_dim=16, **blocks)
  arms = [arm("dense", methods.Dense(), schedule.dense(a.steps, **plan), CONTROLS),
          arm("native_msa", msa, schedule.native(a.steps, selector_warmup=warmup / a.steps, **plan), ("sparse", "dense", "oracle"))]
  budgets = {f"retrofit_msa_{100 * budget:g}": budget for budget in BUDGETS}
  for name, budget in budgets.items():
    stages = schedule.retrofit_within(a.steps, budget, warmup_steps=warmup, **plan)
    arms.append(arm(name, msa, stages, ("sparse", "dense", "oracle"), ForkConfig("@dense", step=round(a.steps * (1 - budget))), budget))
  return Study(name="quickstart", question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(a.seeds)),
               reference="native_msa", dense="dense", budgets=budgets)
