r"""Does a neural memory close more of what a window lacks than a longer window, or a selector, of the same cost?

    python -m launch.study --workdir=runs/titans \
        --config=experiments/titans.py:novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz
    python -m launch.study --config=experiments/titans.py:slice=true,novels=...,code=... --workdir=runs/titans_slice
    python -m benchmarks.memory                     # step times of the arms alone, and of the memory: `SPEEDS`

The recipe of `experiments/main_study.py` at size S (3M parameters, 4,096 bytes of context, 8 rows a batch of which one
is tasks), with `scale` of its steps, and documents that begin at multiples of the memory's chunk in all arms.

| arm | attention | memory | compared with |
|---|---|---|---|
| dense | dense | - | the anchor |
| native_mag | window of 256 | beside it (MAG), from step 0 | window_equal |
| window_equal | the longest window that costs no more than native_mag | - | |
| native | MSA, 24 blocks of 32 | - | native_mag |
| window | window of 256 | - | native_mag: what the memory adds |
| mag_window_free, mag_window_frozen | window of 256 | put onto the finished window | window_after |
| window_after | window of 256, going on alike | - | |
| native_mal | window of 256 over what the memory returned (MAL) | from step 0 | window_equal |
| mag_dense_free, mag_dense_frozen | dense | put onto the finished dense model | dense_after |
| dense_after | dense, going on alike | - | |
| dense_yarn, native_yarn | the finished models, RoPE stretched by YaRN, no step of training | - | |

The retrofits' gate begins at zero: their first step is the base's function, to the bit. `free` learns with the base,
`frozen` learns the memory alone; both, and the controls, take 25 % more steps at the second plan of the main study.

**Stated before the runs.** Every model is evaluated once, at four times the trained length: recall on examples of one,
two and four times it (mqar of 16 and 64 pairs, `examples` of each), text on windows of four times it, by position: the
second half of the trained length, the second one, the third and fourth. Positions beyond the trained length: a window
and a memory meet no distance that they have not seen; dense and MSA do, so their YaRN arms (factor 4) stand beside
them, and dense counts as an anchor at the trained length alone. *Far*: the evidence lies behind the first block and
farther back than window_equal reaches, the same for all arms. Four layers of a window pass on four windows.

- Endpoint: far exact match, mean over the two tasks, at 1x and at 4x. Smallest effect that matters: 10 points.
- Secondary: bits per byte of novels and of code by position. Smallest effect: 0.005 bits per byte.
- Family of tests: each arm with a memory minus what it is compared with, paired by seed, at 1x and 4x: twelve t tests
  of each question under Holm (nsa/report/lengths.py). All else is exploratory.
- Gate: no pair is judged unless dense answers 90 % at 1x.
- The report's general verdict is of windows of four times the trained length and of examples of all lengths; what is
  stated here its section on lengths judges. FLOPs of training of what is put onto a window count its trunk as dense.
- Seeds 1 to 3 train as one program. A run that diverges is counted.
- Costs: FLOPs per token counted at each length, and measured: the step alone on its device, not the study's runs, which
  share theirs. window_equal costs what native_mag costs in FLOPs. In time none can: native_mag's step takes 25 ms on
  one H200 (32 when this was planned, `SPEEDS`; both with full backprop), dense attention's 7.1 (docs/kernels.md), so a
  window of any length gets at least 3.5 times the tokens in that time. A win of the memory here is one per token and
  per FLOP.

Power for an effect of 10 points, with the scatter of the main study's recall where arms learn (SD of paired differences
1, 2, 3 points): of 3 seeds .71, .27, .13 where it is the first of the twelve under Holm, 1.0, .98, .81 where it is the
last; of 5 seeds 1.0, .99, .81 and 1.0. Three seeds see large effects alone. Where seeds fall into two groups, one that
learns and one that does not, neither holds, which is then said.

`slice`: the first look, of `SLICE`'s arms and seeds 1 and 2, six tests of each question. Two seeds leave one degree of
freedom: a difference of 10 points passes Holm's first step only where both seeds agree to 0.2 points, and the report's
word will be "undecided" for most. What it shows is by seed: whether an arm with a memory answers beyond the window at
all, and which side of its control both seeds are on. It is no evidence that two arms are alike.

Result: seven of the 14 arms have run (results/titans/report.md, NOTES.md). native_mag answers all within its window of
256 and 0.2 % behind it, as `window` does; dense 96 %. It has not learnt to: its window began to recall at step 1,080 to
1,180 of 2,289, in the toy (beyond_window.py) a memory learns after that, and 606 to 655 rows with 30,000 answers behind
the window were left. No fault was found: with keys and values as good as they can be, this memory gives 76 % of 16
pairs back at 4,096 tokens if bindings alone are written, and 2 % with the gates that it begins with, which write all
the filler too (docs/memory.md). How much is time and how much filler was not told apart. On text it is 0.003 (novels)
and 0.012 (code) bits per byte better than `window`, 0.022 and 0.146 worse than window_equal, in the second half of the
trained length. Put onto the dense model and trained with it, recall is 0.3 points above training on alone.

The slice before decides nothing, it ran with a fault (results/titans_slice/NOTES.md): gates began with a forgetting of
0.67 % per token, and a memory of two matrices then fades to zero. Since then they begin with 0.005 %, and the plan,
written anew before any run of it, has backprop="local": the memory that a chunk begins with is a constant of its inner
gradients. The memory's gradient, which had jumped by five orders, stayed below 0.15.

Cost: by the measured steps 0.3 hours of one H200, evaluation and compiling besides; PLAN.md counts FLOPs alone. Seven
arms took 16 minutes of training, 3 of compiling and 5 of evaluation, summed over programs; the slice 15, 2 and 6.

Arguments: novels=, code= (archives or folders; none: the standard library's source), slice=false, seeds=0 (0: 3, of a
slice 2), scale=0.75 (of the main study's steps), context=4096, batch=8, window=256, chunk=128, expansion=2 (of the
memory's MLP), backprop=local (through the memory; full is the paper's), blocks=24 (MSA), budget=0.25 (of the steps, on
top), rate=3e-3, examples=64 (per task and length), windows=64 (of each corpus; -1 = all),
unroll=1 (layers of a turn in arms with a memory, each of whose layers has loops to compile; 0 = as in all other arms),
tiny=false (true: a model for a CPU), plan= (its directory; empty: experiments/results/titans, of a slice
titans_slice).
"""
import dataclasses
import types

from experiments import arguments, main_study
from nsa import flops, methods, schedule
from nsa.config import EvalConfig, ForkConfig, RopeScaling, ScheduleConfig, Stage
from nsa.study import Study

MULTIPLES = (1, 2, 4)   # of the trained length, at evaluation
PAIRS = (16, 64)
TINY = dict(num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, mlp_dim=128)
SLICE = ("dense", "native_mag", "window_equal", "native", "mag_dense_free", "mag_dense_frozen", "dense_after")
# "dense-S", ... -> tokens per second of one seed's step alone on one H200, where measured (8 x 4,096, packed)
SPEEDS = {"dense-S": 4.64e6, "dense_after-S": 4.64e6, "native-S": 2.87e6, "window-S": 6.21e6, "window_after-S": 6.21e6,
          "window_equal-S": 5.12e6, "native_mag-S": 1.02e6, "mag_dense_free-S": 0.95e6, "mag_dense_frozen-S": 1.03e6}

NOTES = (
    "What is judged is the section on lengths (nsa/report/lengths.py): each arm with a memory minus what it is "
    "compared with, paired by seed, far exact match at 1x and 4x of the trained length, twelve t tests under Holm; no "
    "pair is judged unless dense answers 90 % at 1x. Smallest effect that matters: 10 points of far exact match, 0.005 "
    "bits per byte. The general verdict of the report is of all lengths together and is not what was asked.",
    "Three seeds see large effects alone (experiments/titans.py has the power). A run that diverges is counted.",
)
OF_A_SLICE = ("A first look: two seeds leave one degree of freedom, and six tests of each question under Holm, not "
              "twelve. Seeds are shown one by one; no word of likeness can come of it.")


def get_config(arg=None):
  a = arguments.parse(arg, novels="", code="", slice=False, seeds=0, scale=0.75, context=4096, batch=8, window=256,
                      chunk=128, expansion=2, backprop="local", blocks=24, budget=0.25, rate=3e-3, examples=64,
                      windows=64, unroll=1, tiny=False, plan="",
                      above_0=("scale", "context", "batch", "window", "chunk", "expansion", "blocks", "examples"))
  make = Arms(a)
  arms = [arm for arm in make.all() if not a.slice or arm.arm in SLICE]
  named = {arm.arm for arm in arms}
  two = bool(a.novels and a.code)
  text = [f"second_half_bits_per_byte:{name}" for name in ("novels", "code")] if two else ["second_half_bits_per_byte"]
  retrofits = [arm for arm in ("mag_window_free", "mag_window_frozen", "mag_dense_free", "mag_dense_frozen")
               if arm in named]
  controls = {"native_mag": "window_equal", "native_mal": "window_equal",
              **{arm: f"{arm.split('_')[1]}_after" for arm in retrofits}}
  seeds, where = (2, "titans_slice") if a.slice else (3, "titans")
  return Study(name=where, question=__doc__.splitlines()[0], arms=arms, seeds=tuple(range(1, 1 + (a.seeds or seeds))),
               dense="dense", reference="native_mag", budgets=dict.fromkeys(retrofits, a.budget),
               controls={arm: control for arm, control in controls.items() if arm in named},
               primary=("far_exact_match", *text), task_margin=0.1, quantities=("R", "A"),
               speeds={} if a.tiny else SPEEDS, notes=(*NOTES[:1], OF_A_SLICE) if a.slice else NOTES,
               plan=a.plan or f"experiments/results/{where}")


class Arms:
  """Makes the arms, with the main study's config of size S as the base of each."""

  def __init__(self, a):
    self.a = a
    main = types.SimpleNamespace(novels=a.novels, code=a.code, blocks=a.blocks, scale=a.scale, rate_m=a.rate,
                                 rate_s=a.rate, rate_l=a.rate)
    self.make = make = main_study.Arms(main, "S")
    make.context, make.batch = a.context, a.batch
    if a.tiny:
      make.shape, make.steps = TINY, max(4, round(a.scale * 40))
      make.warmup = max(1, round(0.02 * make.steps)) / make.steps
    self.steps, self.plan = make.steps, make.plan
    memory = dict(chunk=a.chunk, expansion=a.expansion, backprop=a.backprop, products="bfloat16")
    self.mag = methods.MAG(window=a.window, **memory)
    self.mal = methods.MAL(window=a.window, persistent=0, **memory)
    self.beside = methods.MAG(**memory)
    self.window = methods.Window(a.window)
    self.equal = methods.Window(flops.equal_window(self.base("native_mag", self.mag, self.native()), a.context))

  def all(self):
    dense, equal, window = methods.Dense(), self.equal, self.window
    going_on = schedule.dense_continuation(self.steps, self.a.budget, **self.plan)
    windowed = dataclasses.replace(going_on, stages=[Stage(1.0, "sparse")])
    msa = schedule.native(self.steps, selector_warmup=self.make.warmup, **self.plan)
    arms = [
        self.arm("dense", dense, schedule.dense(self.steps, **self.plan)),
        self.arm("native_mag", self.mag, self.native()),
        self.arm("window_equal", equal, self.native()),
        self.arm("native", self.make.msa, msa),
        self.arm("window", window, self.native()),
        self.retrofit("mag_window_free", self.mag, "window", "all"),
        self.retrofit("mag_window_frozen", self.mag, "window", "memory"),
        self.arm("window_after", window, windowed, ForkConfig("@window", step=self.steps)),
        self.arm("native_mal", self.mal, self.native()),
        self.retrofit("mag_dense_free", self.beside, "dense", "all"),
        self.retrofit("mag_dense_frozen", self.beside, "dense", "memory"),
        self.arm("dense_after", dense, going_on, ForkConfig("@dense", step=self.steps)),
        self.stretched("dense_yarn", dense, "dense", "dense"),
        self.stretched("native_yarn", self.make.msa, "native", "sparse"),
    ]
    return arms

  def native(self):
    return schedule.native(self.steps, selector_warmup=0, **self.plan)

  def retrofit(self, name, attention, trunk, train):
    stages = schedule.retrofit_after(self.steps, self.a.budget, warmup_steps=0, **self.plan)
    stages.stages[-1].train = train
    return self.arm(name, attention, stages, ForkConfig(f"@{trunk}", step=self.steps))

  def stretched(self, name, attention, trunk, mode):
    """The finished trunk with YaRN (arXiv 2309.00071), evaluated as it is."""
    still = ScheduleConfig(1, [Stage(mode=mode, learning_rate=0.0)])
    out = self.arm(name, attention, still, ForkConfig(f"@{trunk}", reset=True))
    scaling = RopeScaling("yarn", float(MULTIPLES[-1]), self.a.context, high_frequency=32.0)
    return dataclasses.replace(out, model=dataclasses.replace(out.model, rope_scaling=scaling))

  def base(self, name, attention, stages, fork=None):
    out = self.make.arm(name, attention, stages, fork, modes=("dense" if attention.name == "dense" else "sparse",))
    lengths = tuple(n for n in out.data.task_lengths if n <= self.a.context)
    # Tasks whose examples have no room in a short context are left out of it.
    out.data = dataclasses.replace(out.data, task_lengths=lengths, align=max(out.data.align, self.a.chunk))
    return out

  def arm(self, name, attention, stages, fork=None):
    a, out = self.a, self.base(name, attention, stages, fork)
    tasks = tuple(f"mqar:pairs={n}@{a.context * k}" for k in MULTIPLES for n in PAIRS)
    out.eval = EvalConfig(
        sequences=a.windows, context=a.context * MULTIPLES[-1], batch=4, run_modes=out.eval.run_modes, tasks=tasks,
        task_examples=a.examples, near=(main_study.BLOCK, self.equal.window), context_gain=(a.context,),
        diagnostics=False)
    out.unroll = a.unroll * ("memory" in attention.groups)
    return out
