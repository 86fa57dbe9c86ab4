"""Does every method learn to recall what its selector has to find?

    python -m launch.train --config=experiments/methods.py:arm=moba --workdir=runs/methods-moba

Multi-query associative recall (Zoology, arXiv 2312.04927): 128 tokens, 8 key-value pairs, then each key once; only
the values asked for are learned and scored. Two layers of width 64, four query heads on one KV head, blocks of 4, 3
of them per query, one of which is its own: a query sees 12 of up to 128 tokens and has two choices for the four
blocks that hold the pairs. (DSA chooses 12 single tokens; NSA sees a window of 8 and 63 compressed keys besides.)

Result (CPU, float32, seed 0, 800 steps of 32 sequences; exact match in % on 256 unseen examples, which pure chance
among the values would bring to 0.8). By steps as each arm is meant to run, dense or sparse; then the last model run
dense, and with the oracle's blocks in place of its own:

| arm | 160 | 320 | 480 | 640 | 800 | run dense | oracle |
|---|---|---|---|---|---|---|---|
| dense | 2.9 | 7.9 | 99.5 | 99.9 | 100.0 | | |
| msa | 2.0 | 5.1 | 96.5 | 99.8 | 100.0 | 100.0 | 100.0 |
| dsa | 2.8 | 54.8 | 99.2 | 99.9 | 100.0 | 100.0 | 100.0 |
| nsa | 1.4 | 97.1 | 99.1 | 99.1 | 99.2 | 4.2 | 99.2 |
| moba | 2.0 | 6.0 | 42.4 | 83.9 | 91.4 | 99.5 | 99.3 |
| ssa | 0.5 | 0.2 | 4.3 | 85.2 | 87.5 | 99.7 | 100.0 |
| block_topk | 1.9 | 5.1 | 9.0 | 58.3 | 73.1 | 97.8 | 98.7 |
| seer | 3.0 | 7.4 | 27.5 | 28.7 | 53.1 | 99.9 | 100.0 |
| infllm_v2 | 2.1 | 4.0 | 9.2 | 44.6 | 48.4 | 89.4 | 97.0 |

Every model has learned recall: with the oracle's blocks all are above 96 %. What separates them is the selector, and
with two free blocks those that pool keys (the last five) do not get there in 800 steps. NSA hardly depends on it here
(its compressed keys and window reach everything). MoBA chooses per head, eight blocks for the four heads of the group,
against two in block_topk. Seer's gate begins to learn at step 640, on a frozen dense model, and was still improving
(KL 0.41 after 10 of them, 0.26 at the end). SSA's loss at weight 1 instead of 10 learns sooner (75.1 at 480 steps) and
ends alike (84.8).

The index projections of MSA and DSA are convolved like the model's own q and k (nsa/methods/msa.py). Without it MSA
ends at 26.3 (85.9 run dense, 93.8 with the oracle's blocks), at half the rate and twice the steps at 27.9, with its KL
over all tokens at 25.9; DSA at 82.0, and at level "block" at 50.4 (99.5 with the oracle's). The model matches a query
with the token before the value, which its convolution brings to the value's key; an index key that knows its own
token alone cannot tell one value from another, whatever its loss. 8 of 32 blocks (experiments/mqar.py) hid it: they
are enough to hold all pairs.

A retrofit's index has to learn in few steps what attention has already settled on, at whatever rate is left.
arm=msa_retrofit (dense, from step 640 on 40 steps of warm-up, then sparse) ends at 24.1 (97.9 with the oracle's
blocks) with the index at the model's rate, and at 100.0 with selector_rate=5. Native MSA ends at 100.0 with 1, 5 and
10. A retrofit that fails at 1 says nothing about retrofits: give native and retrofit the same factor, and one at which
the retrofit's index has converged. The weight of the KL cannot stand in for it: Adam divides it out.

One seed: differences of a few points say nothing, and orders may change with steps, widths and budgets. (Native MSA
with seed 1: 99.4.)

Arguments: arm=dense (dense, msa, nsa, moba, dsa, infllm_v2, ssa, block_topk, seer, msa_retrofit), steps=800,
peak=2e-3 (learning rate), alignment=10 (weight of SSA's loss), selector_rate=1 (factor on the learning rate of what
learns from a KL: msa, dsa, seer). Cost: minutes per arm (dense: 63 s of one core for 600 steps, start included).
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig

BLOCKS = dict(block_size=4, num_blocks=3, num_initial=0, num_local=1)


def get_config(arg=None):
  a = arguments.parse(arg, arm="dense", steps=800, peak=2e-3, alignment=10.0, selector_rate=1.0)
  rate = dict(peak=a.peak, warmup=0.05, decay=0.3)
  warm, cold = (schedule.native(a.steps, selector_warmup=share, **rate) for share in (0.05, 0))
  mixed = schedule.mixed(a.steps, **rate)
  mixed.stages[0].loss_weights = {"alignment": a.alignment}
  arms = {
      "dense": (methods.Dense(), schedule.dense(a.steps, **rate)),
      "msa": (methods.MSA(index_dim=16, **BLOCKS), warm),
      "nsa": (methods.NSA(compress_len=4, compress_stride=2, window=8, **BLOCKS), cold),
      "moba": (methods.MoBA(**BLOCKS), cold),
      "dsa": (methods.DSA(index_heads=2, index_dim=16, **BLOCKS), warm),
      "infllm_v2": (methods.InfLLMV2(pool_len=4, pool_stride=2, **BLOCKS), cold),
      "ssa": (methods.SSA(**BLOCKS), mixed),
      "block_topk": (methods.BlockTopK(**BLOCKS), cold),
      "msa_retrofit": (methods.MSA(index_dim=16, **BLOCKS),
                       schedule.retrofit(a.steps, 0.2, selector_warmup=0.25, **rate)),
      # Not native: the gate is distilled on a dense model, which is frozen for the last fifth of the steps.
      "seer": (methods.Seer(gate_dim=16, **BLOCKS), schedule.selector_only(a.steps, 0.2, **rate)),
  }
  attention, plan = arguments.choice(a, "arm", arms)
  return Config(
      arm=a.arm, size="methods", attention=attention, schedule=plan,
      model=ModelConfig(num_layers=2, d_model=64, num_heads=4, num_kv_heads=1, head_dim=16, mlp_dim=176, short_conv=3),
      data=DataConfig(source="tasks", context=128, global_batch=32, task_share=1.0,
                      tasks=("mqar:pairs=8,layout=paper",), answer_weight=1.0, filler_weight=0.0),
      optimizer=OptimizerConfig(weight_decay=0.01, selector_learning_rate=a.selector_rate),
      eval=EvalConfig(sequences=0, task_examples=256, batch=32, run_modes=("dense", "sparse"), every=a.steps // 5),
      checkpoint=CheckpointConfig(every=0, keep=1), log_every=10)
