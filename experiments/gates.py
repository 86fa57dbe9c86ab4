"""Which endpoints tell a model that selects from one that does not, and at which step does each kind of arm learn them?

Before any study that counts: an endpoint is admitted where dense attention is good at it, random blocks and a window
with a sink are not, and the best blocks are (the oracle's).

    python -m launch.study --config=experiments/gates.py:novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz \\
        --workdir=runs/gates
    python -m launch.study --config=experiments/gates.py:novels=...,code=...,arms=dense+native+native_half \\
        --workdir=runs/gates

One dense model of about 10M non-embedding parameters on 4,096 bytes, novels and code half each, and in every batch of 8
rows exactly one of tasks, a stated share of the loss: recall with bindings and queries scattered over the whole row, in
some rows packed with shorter examples, without which it is learnt late. It is evaluated as trained and, without
training, with the blocks of quest, block_topk, sink_window, random and oracle: `blocks` of 32 a query, and half of
them. Text by corpus, recall by answer; `far` answers have their evidence behind the first 128 tokens and farther back
than `blocks` of 32 reach.

Result (docs/results.md, "The instrument, checked"; three runs of one seed, minutes of one H200 each): recall passes
every gate. Text tells what selects from what does not, but the oracle's blocks miss its gate with 8 and 16 blocks of 32
and, on code, with 20 in one run of two. Native learns recall before dense.

arms (joined by +): dense, native (MSA, `blocks` of them), native_half (half as many), native_cold (no warm-up of the
selector), native_rate2 (twice the selector's rate), native_warm10 (10 % of the steps warm up, not 2), native_noconv and
dense_noconv (no short convolution on q, k and v), retrofit (the last 25 % of the steps, from the dense trunk).

Arguments: novels= and code= (archives or folders; none: the standard library's source), arms=dense, steps=3000,
rate=1.5e-3, batch=8, words=false (true: recall in words, variable tracking of 1 and 2 hops and the most common word are
trained on, too; evaluated with a held-out template and the held-out ledger beside them), task_loss=0.15, windows=320
(of 4,096 bytes, each corpus; -1 = all of val), examples=256 (per task), looks=10 (evaluations on the way),
context=4096, layers=6, width=384, lengths=64+256+1024+4096 (of the packed examples), blocks=0 (visible to a query; 0:
1/8 of the context, 16).
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig, OptimizerConfig
from nsa.study import Study

SELECTORS = ("quest", "block_topk", "sink_window", "random", "oracle")
TASKS = ("mqar:pairs=4", "mqar:pairs=16", "mqar:pairs=64")
WORDS = ("recall:pairs=8,distractors=1", "tracking:hops=1", "tracking:hops=2", "common")
NEVER_TRAINED = ("recall:pairs=8,distractors=1,template=held_out", "ledger")
RETROFIT = 0.25


def get_config(arg=None):
  a = arguments.parse(arg, novels="", code="", arms="dense", steps=3000, rate=1.5e-3, batch=8, words=False,
                      task_loss=0.15, windows=320, examples=256, looks=10, context=4096, layers=6, width=384,
                      lengths="64+256+1024+4096", blocks=0,
                      above_0=("steps", "looks", "context", "width"))
  make = Arms(a)
  known = {"dense": make.dense, "dense_noconv": lambda name: make.dense(name, short_conv=0), "native": make.native,
           "native_half": lambda name: make.native(name, blocks=make.count // 2),
           "native_cold": lambda name: make.native(name, warm=0),
           "native_rate2": lambda name: make.native(name, rate=2.0),
           "native_warm10": lambda name: make.native(name, warm=0.1),
           "native_noconv": lambda name: make.native(name, short_conv=0), "retrofit": make.retrofit}
  names = a.arms.split("+")
  for name in names:
    if name not in known:
      raise ValueError(f"experiment argument arms = {a.arms!r}: {name} is none of {', '.join(known)}")
  names = list(dict.fromkeys(["dense", *names]))  # the anchor, and the trunk
  return Study(name="gates", question=__doc__.splitlines()[0], arms=[known[name](name) for name in names],
               seeds=(0,), vmap_seeds=False, dense="dense", reference="native" if "native" in names else "dense",
               budgets={"retrofit": RETROFIT} if "retrofit" in names else {})


class Arms:

  def __init__(self, a):
    self.a = a
    self.plan = dict(peak=a.rate, warmup=0.02, decay=0.2)
    self.block = max(1, min(32, a.context // 64))
    self.count = a.blocks or a.context // 8 // self.block
    self.corpora = arguments.corpora(a)

  def arm(self, name, attention, stages, run_modes, during, rate=1.0, short_conv=3, fork=None, share=1.0):
    a = self.a
    dense = isinstance(attention, methods.Dense)
    return Config(
        arm=name, size="10M", attention=attention, schedule=stages,
        model=ModelConfig(num_layers=a.layers, d_model=a.width, num_heads=8, num_kv_heads=2, head_dim=64,
                          mlp_dim=64 * round(a.width / 24), short_conv=short_conv, tie_embeddings=False,
                          dtype="bfloat16"),
        data=DataConfig(corpora=self.corpora, context=a.context, global_batch=a.batch, task_rows=1,
                        task_loss=a.task_loss, tasks=TASKS + WORDS * a.words, filler_weight=0.0,
                        task_lengths=tuple(n for n in arguments.numbers("lengths", a.lengths) if n <= a.context)),
        optimizer=OptimizerConfig(selector_learning_rate=5.0 * rate),
        eval=EvalConfig(sequences=a.windows, task_examples=a.examples, batch=16, run_modes=run_modes,
                        tasks=TASKS[1:] + (WORDS + NEVER_TRAINED) * a.words,
                        blocks=dict(block_size=self.block, num_blocks=self.count) if dense else {},
                        near=(a.context // 32, self.count * self.block), ar_hits=True,
                        context_gain=tuple(n for n in (256, 1024) if n < 3 * a.context // 4 and a.context >= 1024),
                        diagnostics=not dense, diagnosed=32,
                        every=max(1, round(a.steps * share / a.looks)), during=during,
                        during_examples=min(64, a.examples)),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=10)

  def dense(self, name, short_conv=3):
    half = self.count // 2
    modes = ("dense", *SELECTORS, *(f"{selector}:num_blocks={half}" for selector in SELECTORS))
    return self.arm(name, methods.Dense(), schedule.dense(self.a.steps, **self.plan), modes, ("dense",),
                    short_conv=short_conv)

  def msa(self, blocks=0):
    return methods.MSA(index_dim=64, block_size=self.block, num_blocks=blocks or self.count)

  def native(self, name, blocks=0, warm=0.02, rate=1.0, short_conv=3):
    warm = max(1, round(warm * self.a.steps)) / self.a.steps if warm else 0  # of the steps, at least one
    return self.arm(name, self.msa(blocks), schedule.native(self.a.steps, selector_warmup=warm, **self.plan),
                    ("sparse", "dense", "oracle", "quest", "sink_window", "random"), ("sparse", "dense", "oracle"),
                    rate, short_conv)

  def retrofit(self, name):
    steps = self.a.steps
    stages = schedule.retrofit(steps, RETROFIT, selector_warmup=max(0.1, 1 / (steps * RETROFIT)), **self.plan)
    return self.arm(name, self.msa(), stages, ("sparse", "dense", "oracle", "quest"), ("sparse",),
                    fork=ForkConfig("@dense", step=round(steps * (1 - RETROFIT))), share=RETROFIT)
