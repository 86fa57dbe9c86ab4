"""What does a model cost and reach whose attention is sparse from the first step?

    python -m launch.train --config=experiments/native.py --workdir=runs/native
    python -m launch.train --config=experiments/native.py:method=nsa --workdir=runs/native-nsa
    python -m launch.train --config=experiments/native.py:method=dense --workdir=runs/dense

About 10M non-embedding parameters, 4,096 bytes of context, blocks of 32, 16 of them per query (1/8 of
the context). Meant for one accelerator; `--dry_run` shows parameters, FLOPs and memory before you rent it.
For another corpus: `--config.data.source=files:/path/to/longdoc-v1.tar.xz`.

Arguments: method=msa (dense, msa, nsa, dsa, seer, moba, infllm_v2 or ssa), steps=4000. Not yet run to the end: no
result is claimed here.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig

BLOCKS = dict(block_size=32, num_blocks=16)
RATE = dict(peak=2e-3, warmup=0.02, decay=0.2)


def get_config(arg=None):
  a = arguments.parse(arg, method="msa", steps=4000)
  cold, warm = (schedule.native(a.steps, selector_warmup=share, **RATE) for share in (0, 0.015))
  arms = {
      "dense": (methods.Dense(), schedule.dense(a.steps, **RATE)),
      "msa": (methods.MSA(index_dim=64, **BLOCKS), warm),
      "nsa": (methods.NSA(compress_len=16, compress_stride=8, window=128, **BLOCKS), cold),
      "dsa": (methods.DSA(index_dim=32, **BLOCKS), warm),
      "seer": (methods.Seer(gate_dim=64, **BLOCKS), warm),  # meant for a frozen model: see retrofit.py
      "moba": (methods.MoBA(**BLOCKS), cold),
      "infllm_v2": (methods.InfLLMV2(pool_len=16, pool_stride=8, num_local=5, **BLOCKS), cold),
      "ssa": (methods.SSA(**BLOCKS), schedule.mixed(a.steps, **RATE)),
  }
  attention, plan = arguments.choice(a, "method", arms)
  return Config(
      arm=f"native_{a.method}" if a.method != "dense" else "dense", size="10M", attention=attention, schedule=plan,
      model=ModelConfig(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=1024, short_conv=3,
                        tie_embeddings=False, dtype="bfloat16"),
      data=DataConfig(source="stdlib", context=4096, global_batch=16, task_share=0.12,
                      tasks=("needle:keys=4", "phonebook:entries=20")),
      # at the backbone's own rate a retrofit's selector lags (methods.py)
      optimizer=OptimizerConfig(selector_learning_rate=5.0),
      eval=EvalConfig(every=a.steps // 4, run_modes=("dense", "sparse", "oracle", "random"),
                      blocks=BLOCKS if a.method == "dense" else {}),
      checkpoint=CheckpointConfig(every=500, keep=2))
