"""Why does native sparse attention lead dense attention at the beginning: selection, or seeing little?

    python -m launch.train --config=experiments/locality.py:arm=window,corpus=longdoc-v1.tar.xz --workdir=runs/window
    python -m launch.train --config=experiments/locality.py:arm=msa,corpus=/path/to/longdoc-v1.tar.xz --workdir=runs/msa

A small model (0.5M parameters, 3 layers, 512 bytes of context) on a CPU, float32, reference operations. MSA takes 8
blocks of 8 bytes; the window has as many bytes and nothing to select.

Result (one seed, two of dense; bits per byte of the second half of 64 held-out windows, each arm as it was trained):

| steps of 4,096 bytes | 250 | 500 | 750 | 1,000 | run dense |
|---|---|---|---|---|---|
| dense | 2.705, 2.757 | 2.357, 2.368 | 2.171, 2.198 | 2.043, 2.053 | |
| native MSA | 2.624 | 2.318 | 2.153 | 2.028 | 2.041 |
| native window | 2.566 | 2.280 | 2.137 | 2.013 | 3.481 |

Arguments: arm=dense (dense, msa or window), corpus= (none: the standard library's source), steps=1000, seed=0.
Cost: most of an hour an arm on two busy cores, by its first 150 steps.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig

BLOCKS = dict(block_size=8, num_blocks=8)


def get_config(arg=None):
  a = arguments.parse(arg, arm="dense", corpus="", steps=1000, seed=0)
  plan = dict(peak=1.5e-3, warmup=0.02, decay=0.2)
  arms = {
      "dense": (methods.Dense(), schedule.dense(a.steps, **plan), ("dense", "oracle")),
      "msa": (methods.MSA(index_dim=32, **BLOCKS), schedule.native(a.steps, selector_warmup=0.02, **plan),
              ("dense", "sparse", "oracle")),
      "window": (methods.Window(window=64), schedule.native(a.steps, selector_warmup=0, **plan), ("dense", "sparse")),
  }
  attention, stages, run_modes = arguments.choice(a, "arm", arms)
  return Config(
      arm=a.arm, size="0.5M", seeds=(a.seed,), attention=attention, schedule=stages,
      model=ModelConfig(num_layers=3, d_model=128, num_heads=4, num_kv_heads=1, head_dim=32, mlp_dim=256, short_conv=3,
                        tie_embeddings=False),
      data=DataConfig(source=f"files:{a.corpus}" if a.corpus else "stdlib", context=512, global_batch=8),
      optimizer=OptimizerConfig(selector_learning_rate=5.0),
      eval=EvalConfig(sequences=64, batch=8, run_modes=run_modes,
                      during=run_modes[:1] if a.arm == "dense" else ("sparse",),
                      blocks={} if a.arm == "msa" else BLOCKS, every=a.steps // 4, diagnostics=False),
      checkpoint=CheckpointConfig(every=0, keep=1))
