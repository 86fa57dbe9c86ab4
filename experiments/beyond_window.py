"""Can a neural memory give back what its window has lost?

    python -m launch.train --config=experiments/beyond_window.py:arm=mag --workdir=runs/beyond-mag

Multi-query associative recall, scattered: 64 tokens, of them 8 key-value pairs and 8 questions, the rest filler. Two
layers of width 64. A window of 8 tokens, with a memory beside it (MAG: 2 matrices, width 32, chunks of 8) or without.

Result (CPU, float32, seed 0, exact match in % on 256 unseen examples, by how far back the evidence is; chance is 0.8).
Two layers of a window pass on two of them. Forgetting is what the gates begin with, per token: 0.005 % in the code, the
others were set in nsa/methods/titans/memory.py.

| arm | peak | forgetting | steps | up to 8 | 9 to 16 | 17 to 63 | biases of forgetting, end |
|---|---|---|---|---|---|---|---|
| dense | 3e-3 | | 600 | 100.0 | 100.0 | 100.0 | |
| window | 3e-3 | | 600 | 100.0 | 1.9 | 0.3 | |
| mag | 3e-3 | 0.005 % | 600 | 99.8 | 14.6 | 2.5 | |
| mag | 3e-3 | 0.005 % | 1,000 | 99.4 | 93.3 | 82.9 | -11.9, -11.1 (from -10) |
| mag | 3e-3 | 0.67 % | 1,000 | 99.0 | 88.6 | 76.7 | -6.9, -6.1 (from -5) |
| mag | 3e-3 | 20 % | 1,000 | 100.0 | 35.1 | 0.8 | -2.1, -1.9 (from -1.4) |
| mag | 1e-3 | 0.67 % | 1,000 | 99.2 | 0.6 | 0.7 | -5.5, -5.5 (from -5) |
| mag | 1e-2 | 0.005 % | 1,000 | 99.2 | 98.9 | 96.1 | -15.9, -9.9 (from -10) |

So a memory can. It learns to after attention has learnt within the window, and not at the lowest rate. With 20 % what a
document begins with is halved in three tokens, with 0.67 % in 103. Three are to this window what 103 are to one of 256,
that of experiments/titans.py, whose slice had 0.67 %: nothing is learnt beyond the next window. One seed.

What keeps gradients from growing in longer chunks (docs/memory.md): does it still learn? Peak 3e-3, 1,000
steps, other versions of the libraries than above: the first row is the fourth one above, made again.

| memory | seed | up to 8 | 9 to 16 | 17 to 63 | largest gradient norm of the memory |
|---|---|---|---|---|---|
| full backprop | 0 | 84.4 | 87.3 | 92.1 | 1.6 |
| backprop="local" | 0 | 82.5 | 84.9 | 87.7 | 2.2 |
| backprop="local" | 1 | 84.4 | 89.9 | 91.3 | 2.4 |
| max_step=1/8, full | 0 | 22.8 | 21.4 | 40.1 | 0.1 |

Why experiments/titans.py learnt nothing behind its window, by single changes (peak 3e-3, backprop="local", 1,600 steps
of 8 rows, so 64 answers a step, a quarter of those above; seed 0, float32, CPU; last column: where the loss of recall,
mean of three records, first falls from its plateau of 4.9 nats below 4.5):

| change | up to 16 | 17 to 31 | 32 and more | largest gradient norm of the memory | below 4.5 nats at step |
|---|---|---|---|---|---|
| none: 8 rows of 64 | 74.2 | 37.8 | 23.5 | 3.0 | 540 |
| 256 tokens with the same 8 pairs | 10.2 | 0.4 | 0.1 | 0.1 | never |
| 8 rows of text besides, recall 15 % of the loss | 0.6 | 0.5 | 0.2 | 0.1 | never |
| chunks of 32 | 73.7 | 44.2 | 34.5 | 2.4 | 540 |
| bfloat16, model and memory's products | 71.5 | 25.8 | 22.8 | 2.6 | 540 |

    ...:arm=mag,steps=1600 --config.attention.backprop=local --config.data.global_batch=8
      --config.data.context=256
      --config.data.global_batch=16 --config.data.source=stdlib --config.data.task_share=0 --config.data.task_rows=8
      --config.data.task_loss=0.15
      --config.attention.chunk=32 --config.data.align=32
      --config.model.dtype=bfloat16 --config.attention.products=bfloat16

Arguments: arm=mag (mag, window or dense), steps=1000, peak=3e-3 (learning rate). Cost: minutes; mag eight, if busy.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig

WINDOW = 8


def get_config(arg=None):
  a = arguments.parse(arg, arm="mag", steps=1000, peak=3e-3)
  rate = dict(peak=a.peak, warmup=0.05, decay=0.3)
  native = schedule.native(a.steps, selector_warmup=0, **rate)
  arms = {
      "mag": (methods.MAG(window=WINDOW, chunk=WINDOW, recompute=False), native),
      "window": (methods.Window(WINDOW), native),
      "dense": (methods.Dense(), schedule.dense(a.steps, **rate)),
  }
  attention, plan = arguments.choice(a, "arm", arms)
  return Config(
      arm=a.arm, size="beyond", attention=attention, schedule=plan,
      model=ModelConfig(num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=176, short_conv=3),
      data=DataConfig(source="tasks", context=64, global_batch=32, task_share=1.0, align=WINDOW,
                      tasks=("mqar:pairs=8",), answer_weight=1.0, filler_weight=0.0),
      optimizer=OptimizerConfig(weight_decay=0.01),
      eval=EvalConfig(sequences=0, task_examples=256, batch=32, every=a.steps // 5, near=(1, 2 * WINDOW),
                      run_modes=("dense",) if a.arm == "dense" else ("sparse",)),
      checkpoint=CheckpointConfig(every=0, keep=1), log_every=20)
