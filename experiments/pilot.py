"""Does the harness measure what the question asks: can a retrofit match native sparse attention?

The pilot of the main study at one size (about 10M non-embedding parameters), before any claim is made:

    python -m launch.study --config=experiments/pilot.py:corpus=/path/to/longdoc-v1.tar.xz --workdir=runs/pilot
    python -m launch.study --config=experiments/pilot.py:corpus=...,arms=dense+native_msa --workdir=runs/pilot   # a slice

4,096 bytes of context in blocks of 32, of which a query takes 16: 1/8 of the context. Documents whole, 12 % of the
sequences are recall tasks. All arms share weights, data order and a warm-up-stable-decay plan; retrofits leave the
dense trunk in the stable phase or in the decay, wherever their budget puts them, at the trunk's own learning rate.
From it: the standard deviation over seeds of each endpoint, learning rates per arm (`rate=`), task difficulty,
overlap of neighbouring selections, and the smallest effect that a main study can detect.

Arguments: corpus= (none: the standard library's source), steps=1000, seeds=3, rate=2e-3, batch=16, arms= (all; names
joined by +, trunks come along). Not yet run to the end: no result is claimed here.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig
from nsa.study import Study

BLOCKS = dict(block_size=32, num_blocks=16)
BUDGETS = (0.01, 0.05, 0.13, 0.25)
OWN = ("sparse", "dense", "oracle", "random", "sparse:num_blocks=8", "sparse:num_blocks=32")
CONTROLS = ("dense", "oracle", "random", "block_topk", "sink_window")


def get_config(arg=None):
  a = arguments.parse(arg, corpus="", steps=1000, seeds=3, rate=2e-3, batch=16, arms="")
  plan = dict(peak=a.rate, warmup=0.02, decay=0.2)
  msa = methods.MSA(index_dim=64, **BLOCKS)
  nsa = methods.NSA(compress_len=16, compress_stride=8, window=128, **BLOCKS)
  warmup = max(0.015, 1 / a.steps)

  def arm(name, attention, stages, run_modes=OWN, fork=None, share=1.0):
    """`share` of the steps is the arm's own: ten short evaluations on the way lie in it."""
    dense = isinstance(attention, methods.Dense)
    return Config(
        arm=name, size="10M", attention=attention, schedule=stages,
        model=ModelConfig(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=1024, short_conv=3,
                          dtype="bfloat16"),
        data=DataConfig(source=f"files:{a.corpus}" if a.corpus else "stdlib", context=4096, global_batch=a.batch,
                        task_share=0.12, tasks=("needle:keys=4", "phonebook:entries=20", "mqar:pairs=32")),
        eval=EvalConfig(sequences=64, task_examples=64, batch=8, run_modes=run_modes, blocks=BLOCKS if dense else {},
                        every=max(1, round(a.steps * share / 10)), during=("dense", "block_topk") if dense else ("sparse",)),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=10)

  arms = [
      arm("dense", methods.Dense(), schedule.dense(a.steps, **plan), CONTROLS),
      arm("native_msa", msa, schedule.native(a.steps, selector_warmup=warmup, **plan)),
      arm("native_msa_cold", msa, schedule.native(a.steps, selector_warmup=0, **plan)),
      arm("native_nsa", nsa, schedule.native(a.steps, selector_warmup=0, **plan)),
      arm("mixed_msa", msa, schedule.mixed(a.steps, **plan)),
  ]
  budgets = {}
  for budget in BUDGETS:
    trunk = ForkConfig("@dense", step=round(a.steps * (1 - budget)))
    name = f"retrofit_msa_{100 * budget:g}"
    budgets[name] = budget
    # At least one step of warm-up, even for the smallest budget of a short run.
    share = max(0.1, 1 / (a.steps * budget))
    arms.append(arm(name, msa, schedule.retrofit(a.steps, budget, selector_warmup=share, **plan), fork=trunk, share=budget))
  trunk = ForkConfig("@dense", step=round(a.steps * (1 - BUDGETS[-1])))
  arms.append(arm("selector_only", msa, schedule.selector_only(a.steps, BUDGETS[-1], **plan), fork=trunk, share=BUDGETS[-1]))

  if a.arms:
    wanted = a.arms.split("+")
    unknown = [name for name in wanted if name not in {one.arm for one in arms}]
    if unknown:
      raise ValueError(f"experiment argument arms = {a.arms!r}: {unknown[0]} is none of {', '.join(one.arm for one in arms)}")
    needed = {*wanted, "dense", "native_msa"}  # the trunk and anchor, and what all are compared with
    arms = [one for one in arms if one.arm in needed]
    budgets = {name: b for name, b in budgets.items() if name in needed}
  return Study(name="pilot", question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(a.seeds)), vmap_seeds=False,
               reference="native_msa", dense="dense", budgets=budgets)
