"""Can native sparse attention learn associative recall as dense attention does?

    python -m launch.train --config=experiments/mqar.py:arm=dense --workdir=runs/mqar-dense
    python -m launch.train --config=experiments/mqar.py:arm=msa --workdir=runs/mqar-msa
    python -m launch.train --config=experiments/mqar.py:arm=nsa --workdir=runs/mqar-nsa

Multi-query associative recall (Zoology, arXiv 2312.04927): 256 tokens, 16 key-value pairs, then each
key once; only the values asked for are learned and scored. Two layers of width 64. The sparse arms take
8 blocks of 8 tokens (of 32 blocks); NSA also has 63 compressed keys and a window of 16.

Result (one H200, reference operations, float32, seed 0, exact match on 256 unseen examples, each arm run as
it was trained): dense 100 % (first above 95 % at step 1,125), NSA 97.4 % (1,125); MSA, on a CPU, 99.3 % (1,500). At a
peak of 3e-3 dense is there at step 375, MSA at 750 (100 %), and NSA ends at 94.4 %.

Arguments: arm=dense (dense, msa or nsa), steps=1500. Cost: minutes; some twenty on two busy cores.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig


def get_config(arg=None):
  a = arguments.parse(arg, arm="dense", steps=1500, above_0=("steps",))
  rate = dict(peak=1e-3, warmup=0.05, decay=0.3)
  arms = {
      "dense": (methods.Dense(), schedule.dense(a.steps, **rate)),
      "msa": (methods.MSA(block_size=8, num_blocks=8, index_dim=16),
              schedule.native(a.steps, selector_warmup=max(0.02, 1 / a.steps), **rate)),
      "nsa": (methods.NSA(block_size=8, num_blocks=8, compress_len=8, compress_stride=4, window=16),
              schedule.native(a.steps, selector_warmup=0, **rate)),
  }
  attention, plan = arguments.choice(a, "arm", arms)
  return Config(
      arm=a.arm, size="mqar", attention=attention, schedule=plan,
      model=ModelConfig(num_layers=2, d_model=64, num_heads=4, num_kv_heads=1, head_dim=16, mlp_dim=176, short_conv=3),
      data=DataConfig(source="tasks", context=256, global_batch=32, task_share=1.0,
                      tasks=("mqar:pairs=16,layout=paper",), answer_weight=1.0, filler_weight=0.0),
      optimizer=OptimizerConfig(weight_decay=0.01),
      eval=EvalConfig(sequences=0, task_examples=256, batch=32, run_modes=("dense", "sparse"), every=a.steps // 4),
      checkpoint=CheckpointConfig(every=0, keep=1), log_every=10)
