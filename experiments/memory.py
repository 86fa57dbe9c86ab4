"""Is a neural memory worth more when it is trained in from the start than when it is put onto a dense model?

    python -m launch.study --config=experiments/memory.py --workdir=runs/memory
    python -m launch.study --config=experiments/memory.py:hybrid=true --workdir=runs/hybrid  # layers of several methods

| arm | attention | memory joins |
|---|---|---|
| dense | dense | never; the trunk |
| native_mag | dense | at step 0 |
| retrofit_mag_frozen, retrofit_mag_free | dense | after 1 - budget of its steps; only the memory learns, or all |
| native_mag_window | a sliding window of 1/8 of the context | at step 0 |
| window | the longest window that costs no more than native_mag_window | never |
| lmm, mac, mal | none; in segments; a window over the memory's output | at step 0 |

native_mag and the retrofits have the same options, the same initial memory and the same zero at the gate: they differ
in when the memory joins alone. Persistent tokens are in none of them, because they would change the trunk's function.
"window" is the arm that native_mag_window has to beat: FLOPs per token, projections and the memory's inner gradients
counted, are equal to within one token of window (`flops.equal_window`).

hybrid=true compares four-layer models instead: dense, then window, MSA, window; the same with a memory for MSA; dense
first and MSA in the other three; all dense.

Result at the default size (2 layers of width 32, 61,440 bytes of training, CPU, one seed; bits per byte of the second
half of 8 held-out windows, training FLOPs): dense 3.387 at 2.44e10, native_mag 3.386 at 3.06e10, retrofit_mag_free
3.387 at 2.59e10, retrofit_mag_frozen 3.530 at 2.49e10 (its backbone stops at the trunk's step 45, before the learning
rate decays), native_mag_window 3.366 at 2.133e10, window 3.386 at 2.132e10, mac 3.339 at 2.40e10, mal 3.366 at 2.22e10,
lmm 3.376 at 1.69e10. One seed of 60 steps: it runs, and no difference means anything yet. The hybrids have not been run
to the end.

Arguments: steps=60, seeds=1, context=512, budget=0.25, hybrid=false. Cost: 8 minutes on two busy cores, most of it
compiling.
"""
from experiments import arguments
from nsa import flops, methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig
from nsa.study import Study


def get_config(arg=None):
  a = arguments.parse(arg, steps=60, seeds=1, context=512, budget=0.25, hybrid=False)
  rate = dict(peak=4e-3, warmup=0.05, decay=0.2)
  native = lambda: schedule.native(a.steps, selector_warmup=0, **rate)

  def arm(name, attention, plan, fork=None, **options):
    return Config(
        arm=name, size="tiny", attention=attention, schedule=plan,
        model=ModelConfig(num_layers=4 if a.hybrid else 2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8,
                          mlp_dim=88, short_conv=3),
        data=DataConfig(source="stdlib", context=a.context, global_batch=2, align=64),
        eval=EvalConfig(sequences=8, batch=4, run_modes=("dense",) if name == "dense" else ("sparse", "dense")),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=10, **options)

  dense = arm("dense", methods.Dense(), schedule.dense(a.steps, **rate))
  near = methods.Window(a.context // 8)
  if a.hybrid:
    far = methods.MSA(block_size=8, num_blocks=2, index_dim=8)
    mag = methods.MAG(window=near.window)
    plan = lambda: schedule.native(a.steps, selector_warmup=0.05, **rate)
    arms = [dense,
            arm("dense_first_msa", far, plan(), layers=("dense",) + ("attention",) * 3),
            arm("window_msa", far, plan(), layers=("dense", "window", "attention", "window"), others={"window": near}),
            arm("window_mag", mag, native(), layers=("dense", "window", "attention", "window"),
                others={"window": near})]
    return Study(name="hybrid", question="What do layers of several methods cost and reach?", arms=arms,
                 seeds=tuple(range(a.seeds)), reference="dense_first_msa", dense="dense")

  fork = lambda: ForkConfig("@dense", step=round(a.steps * (1 - a.budget)))
  beside = arm("native_mag_window", methods.MAG(window=near.window), native())
  arms = [
      dense,
      arm("native_mag", methods.MAG(), native()),
      arm("retrofit_mag_frozen", methods.MAG(), schedule.memory_only(a.steps, a.budget, **rate), fork()),
      arm("retrofit_mag_free", methods.MAG(), schedule.retrofit(a.steps, a.budget, selector_warmup=0, **rate), fork()),
      beside,
      arm("window", methods.Window(flops.equal_window(beside, a.context)), native()),
      arm("lmm", methods.LMM(), native()),
      arm("mac", methods.MAC(), native()),
      arm("mal", methods.MAL(window=near.window), native()),
  ]
  return Study(name="memory", question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(a.seeds)),
               reference="native_mag", dense="dense",
               budgets={"retrofit_mag_frozen": a.budget, "retrofit_mag_free": a.budget})
