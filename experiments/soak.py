"""Does a run that is cut again and again reach the bits of one that never was?

    python -m benchmarks.soak --workdir=runs/soak --seed=0
    python -m launch.study --config=experiments/soak.py --workdir=runs/soak     # the study alone, in peace

Thirty runs of one study, six arms of five seeds each, every run by itself: dense trunks, native MSA and NSA,
and three kinds of retrofit that fork from the trunks, so that a trunk's checkpoint is somebody else's beginning.
`benchmarks.soak` runs the study twice: once in peace, and once under random SIGTERMs and SIGKILLs and with
newest checkpoints truncated, deleted in part or overwritten. Then all states, records and evaluations have to agree.
Nothing is learned here; the models are as small as they get.

Result (experiments/results/soak; two busy CPU cores): yes. All 30 runs end with the bits of the undisturbed ones, after
60 kills (28 SIGKILL, 32 SIGTERM) and 13 damaged checkpoints; 20 runs were cut at least once.

Arguments: steps=60, seeds=5. Cost: 42 minutes on two busy cores, nearly all of it starting Python.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig
from nsa.study import Study

BLOCKS = dict(block_size=8, num_blocks=4)


def get_config(arg=None):
  a = arguments.parse(arg, steps=60, seeds=5)
  rate = dict(peak=3e-3)
  msa = methods.MSA(index_dim=8, **BLOCKS)
  nsa = methods.NSA(compress_len=8, compress_stride=4, window=16, **BLOCKS)

  def arm(name, attention, plan, fork=False):
    return Config(
        arm=name, size="tiny", attention=attention, schedule=plan,
        model=ModelConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, short_conv=2),
        data=DataConfig(source="stdlib", context=128, global_batch=4, align=8, task_share=0.25,
                        tasks=("mqar:pairs=4",)),
        eval=EvalConfig(every=a.steps // 3, sequences=4, batch=4, task_examples=4, diagnostics=False,
                        run_modes=("dense",) if name == "dense" else ("sparse",)),
        fork=ForkConfig("@dense", step=a.steps // 2) if fork else ForkConfig(),
        checkpoint=CheckpointConfig(every=4, keep=2), log_every=2)

  arms = [
      arm("dense", methods.Dense(), schedule.dense(a.steps, **rate)),
      arm("native_msa", msa, schedule.native(a.steps, selector_warmup=0.1, **rate)),
      arm("native_nsa", nsa, schedule.native(a.steps, selector_warmup=0, **rate)),
      arm("retrofit_msa", msa, schedule.retrofit(a.steps, 0.5, selector_warmup=0.2, **rate), fork=True),
      arm("retrofit_nsa", nsa, schedule.retrofit(a.steps, 0.5, selector_warmup=0, enter="copy_kv", **rate), fork=True),
      arm("selector_only", msa, schedule.selector_only(a.steps, 0.5, **rate), fork=True),
  ]
  return Study(name="soak", question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(a.seeds)), vmap_seeds=False,
               reference="native_msa", dense="dense")
