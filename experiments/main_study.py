r"""Does sparse attention put onto a dense-trained model reach dense attention, and does native go beyond it?

    python -m launch.study --plan \
        --config=experiments/main_study.py:novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz,tier=all
    python -m launch.study --config=experiments/main_study.py:novels=...,code=... --workdir=runs/main --only='*-M-s1'

The first writes results/main/PLAN.md and plan.json, to be committed before the first run that counts; the study puts
the plan into its study.json, and the report lists what deviates. Decisions and their reasons: the design of the pilots'
errata (results/pilot_98M/report.md): recall scattered over the context, novels and code apart, controls that can veto
an endpoint, budgets that do not fork inside a decay, a dense continuation for every budget on top.

R(b) has two families. Within budget (25, 50, 75 %): the retrofit leaves the trunk in its stable phase, with the tokens
and the decay of all. After the fact (1, 5, 13, 25 % on top): from the finished model, re-warmed to half the peak with a
decay of its own; its control is the dense model that goes on alike. The selector warms up for a stated number of steps
at a rate that does not decay. 4,096 bytes of context in blocks of 32; 24 of them are visible, 3/16: with 20 the
oracle's blocks passed the gate for text on code in one run of the gates and missed it by 0.0004 bits per byte in
another, with 16 they missed by 0.0005, with 8 by 0.013; with 24 they miss it here (docs/results.md). Every batch of 8
rows has exactly one of tasks.

The declared family is R(b) and A; Delta(b), their sum, is judged among the secondary comparisons: with it 15 tests an
endpoint and size would leave no power (PLAN.md has the numbers). The primary recall endpoint is exact match of far
answers, as the margin is stated in it (2 points); their NLL stands beside it as a secondary endpoint. Sizes: S 3M (100
MB), M 10M (200 MB), L 28M (400 MB) of non-embedding parameters, M8K: M at 8,192 bytes. Decay branches of dense and
native at a quarter and half of the bytes (S and M) are the byte axis, and what equal FLOPs are read off.

Tiers, in this order, so that a cut study is still a study: 1: dense, native, native cold, retrofits, continuations and
selector only at M and S; 2: curricula, other selectors, mixed, memory at M; 3: L, and M8K.

The study comes in slices: the archives of results/main, unpacked into --workdir, are the runs that are done; a trunk
that a further fork needs is trained again, to the same bits; with --other_bits to others, too, which its forks'
records say. `launch.report RUNS experiments/results/main --publish --out=experiments/results/main` adds an archive of
what is new.

Cost: 28 hours of one H200 are expected for all 453 runs (PLAN.md). Results so far: docs/results.md.

Peak rates are one per size, as forks share their trunk's: chosen with experiments/rates.py on val, on seed 0, which is
in no arm here.

Arguments: novels= and code= (archives or folders; none: the standard library's source), tier=1 (what is run now: 1, 2,
3 or all; plan and report are of the whole study), blocks=24, rate_m=2e-3, rate_s=3e-3, rate_l=1.5e-3 (the last one is
not tuned yet), scale=1 (of all steps), selector_steps=60 (of warm-up), seeds=0 (at most so many of each arm, from seed
1 on; 0: all), plan= (directory of the plan; empty: experiments/results/main).
"""

from experiments import arguments
from nsa import flops, methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig, OptimizerConfig
from nsa.study import Study

BATCH, CONTEXT, BLOCK = 8, 4096, 32
WITHIN, AFTER = (0.25, 0.5, 0.75), (0.01, 0.05, 0.13, 0.25)
SIZES = {  # shape, bytes of training, seeds of dense and native, seeds of the rest
    "S": (dict(num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, mlp_dim=704), 100e6, 12, 6),
    "M": (dict(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, mlp_dim=1024), 200e6, 8, 6),
    "L": (dict(num_layers=10, d_model=512, num_heads=8, num_kv_heads=2, mlp_dim=1408), 400e6, 4, 4),
    "M8K": (dict(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, mlp_dim=1024), 200e6, 3, 3),
}
SELECTOR_ONLY = (0.05, 0.25)
BRANCHES = (0.25, 0.5)      # of the bytes: shorter runs of dense and native with a decay of their own
CURRICULUM, OTHERS = 4, 3   # seeds of tier 2
# Whose hidden states are measured, at M.
LOOKED, LOOKED_SEEDS = ("dense", "native", "within_25", "native_window"), (1, 2, 3, 4)
TASKS = ("mqar:pairs=4", "mqar:pairs=16", "mqar:pairs=64")
# GATES: of every dense model, on all of val; the others, and other numbers of blocks, of MORE_SEEDS.
GATES = ("oracle", "random", "sink_window")
FREE = ("block_topk", "quest", "vertical_slash", "flexprefill", "xattention")
MORE_SEEDS = (1, 2, 3)                       # of these seeds alone: each costs as much as 500 steps of training
PRIMARY = ("second_half_bits_per_byte:novels", "second_half_bits_per_byte:code", "far_exact_match")
# "dense-M", "native-M", ... -> tokens per second alone on one H200, where measured: the study's runs share their GPUs
SPEEDS = {"dense-M": 1_939_763, "native-M": 1_386_685, "dense-S": 4_600_796, "native-S": 2_819_030,
          "native_window-M": 2_639_345}  # by later kernels, with which dense and it are 1.03 times as fast


def _then_dense(arm, share):
  return 1 / (share / SPEEDS[f"{arm}-M"] + (1 - share) / SPEEDS["dense-M"])


# By arithmetic from these: arms of the same steps, or of two kinds of them.
SPEEDS |= {"native_cold-M": SPEEDS["native-M"], "native_to_dense-M": _then_dense("native", 0.75),
           "window_to_dense_25-M": _then_dense("native_window", 0.75),
           "window_to_dense_75-M": _then_dense("native_window", 0.25)}
# SDs of paired differences over seeds, from the pilots: text after 98 MB scaled by (bytes)^-0.45, recall of retrofits
# of 13 and 25 %.
QUESTION = ("Does sparse attention put onto a dense-trained model reach dense attention, does native go beyond it, "
            "and what is missing?")
NOTES = (
    "Words come from val, by which nothing but rates, number of blocks and tasks were chosen, on seed 0. Each run "
    "evaluates test once, at its end and sealed; it is opened when all runs of a tier are there, its comparisons "
    "stand beside, and a word that test does not repeat is not used in the answer.",
    "One peak rate per size: forks share their trunk's. Dense was tuned at full length at both sizes (M 1, 2, 4e-3; S"
    " 1.5, 3e-3 and 6e-3 cut in its decay), native at S (1.5, 3e-3) and at M over the first 37 %; native's other "
    "rates at M ride along, exploratory.",
    "Selector warm-ups differ by design: native's 2 % lie inside the warm-up of the rate, within's 60 steps are at 5 "
    "times the peak, after's 60 (half of the budget where that is less) are held at 5 times half the peak; "
    "selector-only arms follow the second plan.",
    "Epochs of text: M sees 1.05 of novels and 1.09 of code, after_25 1.31 and 1.36, dense_double and L 2.1 and 2.2; "
    "a retrofit's control sees the same. 1 % of the text is passages planted 0 to 64 times, the same in all arms of a"
    " seed.",
    "Far: the evidence lies behind the first block and farther back than 24 blocks. With several layers of a window "
    "it is beyond one window, not out of reach; NSA's compressed branch sees all of it.",
    "Controls that no gate and no primary endpoint asks for (other training-free selectors, other numbers of blocks) "
    "are run on seeds 1 to 3 alone.",
    "native_to_dense has no selector warm-up: compare it with native_cold. In context_512 a planted passage goes on "
    "over four rows.",
    "Runs come in slices on machines of one H200 each or several side by side, two or three runs sharing a GPU: "
    "speeds are not compared by them. Steps are deterministic; a trunk whose checkpoints are gone is trained again "
    "and has to log the same bits.",
)
EXPECTED_SD = {"text A": 0.008, "text R": 0.002, "text Delta": 0.008, "recall A": 0.011, "recall R": 0.03,
               "recall Delta": 0.03}


def get_config(arg=None):
  a = arguments.parse(arg, novels="", code="", tier="1", blocks=24, rate_m=2e-3, rate_s=3e-3, rate_l=1.5e-3, scale=1.0,
                      selector_steps=60, seeds=0, plan="", above_0=("blocks", "scale", "selector_steps"))
  if a.tier not in ("1", "2", "3", "all"):
    raise ValueError(f"experiment argument tier = {a.tier!r}: 1, 2, 3 or all")
  wanted = ("1", "2", "3") if a.tier == "all" else (a.tier,)
  few, tiers, names = {}, {}, {}
  for tier in ("1", "2", "3"):
    mine = [one for size in {"1": "MS", "2": "M", "3": ("L", "M8K")}[tier] for one in _of_tier(a, tier, size)]
    tiers[tier] = tuple(f"{config.arm}-{config.size}" for config, _ in mine)
    for config, seeds in mine:
      few[f"{config.arm}-{config.size}"] = tuple(range(1, 1 + min(seeds, a.seeds or seeds)))
      names[f"{config.arm}-{config.size}"] = config
  now = [key for tier in wanted for key in tiers[tier]]
  now += [f"{names[key].fork.workdir[1:]}-{names[key].size}" for key in now if names[key].fork.workdir]
  # Whatever is run now: the plan, the families of tests and the report are of the whole study.
  arms = list(names.values())
  two = bool(a.novels and a.code)
  of_retrofits = {**{f"within_{100 * b:g}": b for b in WITHIN}, **{f"after_{100 * b:g}": b for b in AFTER}}
  return Study(
      name="main", question=QUESTION, arms=arms, seeds=max(few.values(), key=len), few=few,
      now=tuple(dict.fromkeys(now)), vmap_seeds=False, dense="dense", reference="native", budgets=of_retrofits,
      controls={f"after_{100 * b:g}": f"dense_after_{100 * b:g}" for b in AFTER},
      branches={arm: tuple(f"{arm}_{100 * b:g}" for b in BRANCHES) for arm in ("dense", "native")},
      primary=PRIMARY if two else ("second_half_bits_per_byte", "far_exact_match"),
      secondary=("far_answer_nll", "ar_hit_nll"), quantities=("R", "A"), speeds=SPEEDS,
      plan=a.plan or "experiments/results/main", notes=NOTES,
      tiers=tiers, expected_sd=EXPECTED_SD, flops_per_second=1e14, training_share=0.5)


def _of_tier(a, tier, size):
  """(config, seeds) of the arms that a tier adds at one size."""
  make = Arms(a, size)
  main, rest = make.seeds
  if tier == "2":
    return make.tier_two()
  if size == "M8K":
    return [(make.dense(), main), (make.native(), main), (make.within(0.25), main), (make.after(0.05), main),
            (make.continued(0.05), main)]
  out = [(make.dense(), main), (make.native(), main), (make.cold(), main)]
  out += [(make.within(b), rest) for b in WITHIN]
  out += [(one(b), rest) for b in AFTER for one in (make.after, make.continued)]
  out += [(make.selector_only(b), rest) for b in SELECTOR_ONLY]
  branches = (make.dense_branch, make.native_branch) if size in ("S", "M") else ()
  return out + [(one(b), rest) for b in BRANCHES for one in branches]


class Arms:
  """Makes the arms of one size."""

  def __init__(self, a, size):
    shape, self.bytes, main, rest = SIZES[size]
    self.a, self.size, self.shape, self.seeds = a, size, shape, (main, rest)
    self.context = 2 * CONTEXT if size == "M8K" else CONTEXT
    self.batch = BATCH * CONTEXT // self.context
    self.steps = max(100, round(a.scale * self.bytes / (BATCH * CONTEXT)))
    self.plan = dict(peak={"S": a.rate_s, "L": a.rate_l}.get(size, a.rate_m), warmup=0.02, decay=0.2)
    self.geometry = dict(block_size=BLOCK, num_blocks=a.blocks)
    self.msa = methods.MSA(index_dim=64, **self.geometry)
    self.warmup = max(1, round(0.02 * self.steps)) / self.steps
    self.corpora = arguments.corpora(a)

  def arm(self, name, attention, stages, fork=None, share=1.0, modes=None):
    dense = isinstance(attention, methods.Dense)
    wide = [f"{mode}:num_blocks={n}" for mode in ("oracle", "random", "sink_window", "block_topk", "quest")
            for n in (8, 16)]
    more = () if modes else (*FREE, *wide) if dense else ("dense", "random", "sparse:num_blocks=8")
    modes = modes or (("dense", *GATES) if dense else ("sparse", "oracle"))
    own = round(stages.steps * share)  # of its steps: those behind its fork
    return Config(
        arm=name, size=self.size, attention=attention, schedule=stages, one_pass=False,  # as it was planned
        model=ModelConfig(head_dim=64, short_conv=3, tie_embeddings=False, dtype="bfloat16", **self.shape),
        data=DataConfig(corpora=self.corpora, context=self.context, global_batch=self.batch, task_rows=1,
                        task_loss=0.15, tasks=TASKS,
                        planted=0.01 if self.corpora else 0.0,  # the standard library has too few passages
                        task_lengths=(64, 256, 1024, 4096), filler_weight=0.0),
        optimizer=OptimizerConfig(selector_learning_rate=5.0),
        eval=EvalConfig(sealed="test", sequences=-1, task_examples=256, batch=16, run_modes=modes, more_modes=more,
                        more_seeds=MORE_SEEDS, tasks=TASKS[1:], blocks=self.geometry if dense else {},
                        near=(BLOCK, self.a.blocks * BLOCK), ar_hits=True, context_gain=(256, 1024), diagnosed=32,
                        every=round(own / 8) if own >= self.steps / 8 else 0,  # a short one is seen at its end alone
                        during=("dense",) if dense else ("sparse", "dense"), during_examples=64, during_sequences=128,
                        hidden_states=self.snapshots(name, stages.steps, own), hidden_seeds=LOOKED_SEEDS),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=fork or ForkConfig(), log_every=20)

  def snapshots(self, name, steps, own):
    """When hidden states are measured: at the initial weights, and 8 times at log-spaced ones of an arm's own steps."""
    if self.size != "M" or name not in LOOKED:
      return ()
    return (0,) * (own == steps) + tuple(steps - own + max(1, round(own / 2 ** k)) for k in range(7, -1, -1))

  def dense(self):
    return self.arm("dense", methods.Dense(), schedule.dense(self.steps, **self.plan))

  def native(self):
    return self.arm("native", self.msa, schedule.native(self.steps, selector_warmup=self.warmup, **self.plan))

  def cold(self):
    return self.arm("native_cold", self.msa, schedule.native(self.steps, selector_warmup=0, **self.plan))

  def within(self, b):
    stages = schedule.retrofit_within(self.steps, b, warmup_steps=self.selector_steps(b), **self.plan)
    return self.arm(f"within_{100 * b:g}", self.msa, stages, ForkConfig("@dense", step=round((1 - b) * self.steps)), b)

  def after(self, b, attention=None, name="after", **options):
    attention = attention or self.msa
    # Where the selector learns from a loss of its own.
    warmup = self.selector_steps(b) if attention.selector_losses else 0
    stages = schedule.retrofit_after(self.steps, b, warmup_steps=warmup, **options, **self.plan)
    return self.arm(f"{name}_{100 * b:g}", attention, stages, ForkConfig("@dense", step=self.steps), b)

  def selector_only(self, b):
    return self.after(b, name="selector_only", train="selector")

  def continued(self, b):
    stages = schedule.dense_continuation(self.steps, b, **self.plan)
    return self.arm(f"dense_after_{100 * b:g}", methods.Dense(), stages,
                    ForkConfig("@dense", step=self.steps), b, ("dense",))

  def selector_steps(self, b):
    """The stated number of steps, and no more than half of a small budget."""
    return max(1, min(self.a.selector_steps, round(b * self.steps / 2)))

  def dense_branch(self, b):
    return self.branch("dense", b, methods.Dense(), schedule.dense)

  def native_branch(self, b):
    warm = lambda steps, **kw: schedule.native(steps, selector_warmup=round(self.warmup * self.steps) / steps, **kw)
    return self.branch("native", b, self.msa, warm)

  def branch(self, trunk, b, attention, make):
    """`b` of the steps, forked from the trunk where their own decay begins."""
    steps = round(b * self.steps)
    stages = make(steps, **{**self.plan, "warmup": self.plan["warmup"] / b})
    fork = ForkConfig(f"@{trunk}", step=steps - round(self.plan["decay"] * steps))
    return self.arm(f"{trunk}_{100 * b:g}", attention, stages, fork,
                    self.plan["decay"], ("dense",) if trunk == "dense" else ("sparse", "oracle"))

  def tier_two(self):
    window = methods.Window(window=BLOCK * self.a.blocks)
    double = schedule.dense(2 * self.steps, **{**self.plan, "warmup": self.plan["warmup"] / 2})
    mag = methods.MAG(window=window.window)
    beside = self.arm("native_mag", mag, schedule.native(self.steps, selector_warmup=0, **self.plan),
                      modes=("sparse", "dense"))
    equal = methods.Window(flops.equal_window(beside, self.context))
    out = [(self.arm("native_to_dense", self.msa, schedule.sparse_to_dense(self.steps, 0.25, **self.plan),
                     modes=("dense",)), CURRICULUM),
           *((self.arm(f"window_to_dense_{100 * b:g}", window, schedule.sparse_to_dense(self.steps, b, **self.plan),
                       modes=("dense",)), CURRICULUM)
             for b in (0.25, 0.75)),
           (self.arm("context_512", methods.Dense(), schedule.context_curriculum(self.steps, 512, 0.5, **self.plan),
                     modes=("dense",)), CURRICULUM),
           (self.arm("dense_double", methods.Dense(), double, modes=("dense",)), CURRICULUM),
           (self.arm("native_window", window, schedule.native(self.steps, selector_warmup=0, **self.plan),
                     modes=("sparse", "dense")), CURRICULUM),
           (self.arm("mixed", methods.SSA(**self.geometry), schedule.mixed(self.steps, **self.plan)), CURRICULUM),
           (self.arm("mixed_within_25", methods.SSA(**self.geometry),
                     schedule.mixed_retrofit(self.steps, 0.25, **self.plan),
                     ForkConfig("@dense", step=round(0.75 * self.steps)), 0.25), CURRICULUM),
           (beside, OTHERS),
           (self.arm("window_equal_mag", equal, schedule.native(self.steps, selector_warmup=0, **self.plan),
                     modes=("sparse", "dense")), OTHERS)]
    others = {"nsa": methods.NSA(compress_len=64, compress_stride=32, window=BLOCK * 2, num_initial=0, num_local=1,
                                 **self.geometry),
              "dsa": methods.DSA(**self.geometry),
              "moba": methods.MoBA(**self.geometry),
              "infllm_v2": methods.InfLLMV2(num_initial=0, num_local=1, pool_len=16, pool_stride=8, **self.geometry),
              "seer": methods.Seer(**self.geometry),
              "quest": methods.Quest(**self.geometry),
              "gated": methods.Gated(index_dim=64, **self.geometry),
              "shared": methods.SharedMSA(index_dim=64, **self.geometry)}
    for name, attention in others.items():
      warm = self.warmup if attention.selector_losses else 0
      stages = schedule.native(self.steps, selector_warmup=warm, **self.plan)
      out.append((self.arm(f"native_{name}", attention, stages), OTHERS))
      out += [(self.after(b, attention, f"{name}_after"), OTHERS) for b in (0.05, 0.25)]
    return out
