"""How much attention can a dense model do without, untrained and task by task, and is any sparsity safe for all tasks?

    python -m launch.study --workdir=runs/frontier \
        --config=experiments/frontier.py:model=runs/smollm2,novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz
    GRID=lengths=4096,prompts=4096,tasks=mqar:pairs=4+mqar:pairs=16+mqar:pairs=64,block=32,text_tokens=65536
    TEXTS=novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz,plan=experiments/results/frontier_M
    python -m launch.study --workdir=runs/frontier-M \
        --config=experiments/frontier.py:model=runs/main/runs/dense-M-s1,$GRID,$TEXTS

The grid of Sparse Frontier (arXiv 2504.17768) at inference: method x budget x task x length. One dense model, an
imported one (experiments/smollm2.py says how) or one trained here, evaluated as it is; each length is a size of the
study. Claim on trial: "no sparsity is safe for all tasks".

| ways | steps: visible to the last query, or what a method takes in its place |
|---|---|
| quest, block_topk, sink_window | 1/2, 1/4, 1/8, 1/16, 1/32 of the context in blocks of `block` (at least two) |
| oracle, random (controls) | every other of these; 1/8 |
| vertical_slash, snapkv | 1/2, 1/4, 1/8, 1/16, tokens and distances half each |
| flexprefill, xattention | 95, 90, 80, 60 % of the attention mass |
| own selectors of trained runs (`trained`) | as the first |

The rule, stated before a run that counts (nsa/report/frontier.py has it in full). A task counts where the model, run
dense, answers half of its examples. Loss: the share of dense's exact match that is lost on the same examples; sparsity:
the share of (query, key) pairs left out, as measured. Limits are 1 and 5 %, alpha .05, per length, steps with at least
half left out. *Confirmed*: each of them, of every way, is shown to lose more than the limit on some task (lower limits,
alpha over tasks). *Refuted*: some way's mildest is shown to lose less on every task (upper limits, alpha over ways).
*Undecided* otherwise. Without a loss "within 5 %" takes 97 examples of every task that dense answers (of seven ways; 80
of three), "within 1 %" 492: 128 examples cannot show it, nor 5 % where dense answers less than three quarters, which
the report says. The largest sparsity within each limit is given per task and for all tasks with an interval over
examples. Text stands beside and is not judged; oracle and random are controls.

The model is run by one optimizer step at a rate of 0, so text of the split train is read; of corpora with a short one
nothing is tokenized in vain. Methods that choose once per prompt run masked at dense cost in float32: at `prompts`
lengths alone.

Result (experiments/results/frontier; SmolLM2-135M, 7 minutes of one H200): confirmed at 8,192 tokens, where three ways
were run; undecided at 2,048, where vertical_slash, flexprefill and snapkv lose little. Of the main study's dense M
there is a plan (experiments/results/frontier_M), not run yet.

Arguments: model= (run directory; none: a shape to be looked at), novels=, code= (archives or folders; none: the
standard library's source), lengths=2048+8192, prompts=2048, shares=2+4+8+16+32, tasks= (joined by +; empty:
smollm2.py's), examples=128 (per task and length), text_tokens=131072 (tokens of each corpus), block=64,
eval_tokens=16384 (of a device call), trained= (name:run directory, joined by +), plan= (its directory; empty:
experiments/results/frontier).
"""
import dataclasses

from experiments import arguments, smollm2
from nsa import flops, methods, rundir, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig
from nsa.study import Study

WAYS = ("quest", "block_topk", "sink_window")
NOTES = (
    "What is judged is the claim \"no sparsity is safe for all tasks\", per length and limit (1 and 5 % of dense's "
    "exact match), by the rule in nsa/report/frontier.py and this experiment's docstring, over the tasks of which "
    "dense answers half.",
    "Ways: quest, block_topk, sink_window, and at the lengths where they run vertical_slash, snapkv, flexprefill, "
    "xattention. Oracle and random blocks are controls. Text is shown and not judged.",
    "Limits are drawn by weighting examples at random, with one more that is lost (upper) or kept (lower): Clopper and "
    "Pearson's where a step improves no example.",
    "Nothing is trained: one seed, and intervals over examples. A word is about this checkpoint and these tasks.",
)
MASSES = (0.95, 0.9, 0.8, 0.6)   # of the methods whose sets follow the attention


def get_config(arg=None):
  a = arguments.parse(arg, model="", novels="", code="", lengths="2048+8192", prompts="2048", shares="2+4+8+16+32",
                      tasks="", examples=128, text_tokens=131072, block=64, eval_tokens=16384, trained="", plan="",
                      above_0=("block", "eval_tokens", "text_tokens", "examples"))
  make = Arms(a)
  lengths, trained = make.numbers("lengths"), [one.partition(":")[::2] for one in a.trained.split("+") if one]
  if not lengths:
    raise ValueError(f"experiment argument lengths = {a.lengths!r}: at least one length, in tokens")
  if wrong := [name for name, directory in trained if not (name and directory)]:
    raise ValueError(f"experiment argument trained = {a.trained!r}: {wrong[0]!r} names no run; take name:run "
                     "directory, joined by +")
  arms = []
  for length in lengths:
    arms += [make.dense(length), *([make.once(length)] if length in make.numbers("prompts") else [])]
    arms += [make.own(*one, length) for one in trained]
  corpora = tuple(f"second_half_bits_per_byte:{name}" for name in make.corpora) if len(make.corpora) > 1 else (
      "second_half_bits_per_byte",)
  return Study(name="frontier", question=__doc__.splitlines()[0], arms=arms, seeds=(0,), vmap_seeds=False,
               dense="dense", reference="dense", primary=(*corpora, "exact_match"), quantities=("R",), solved=0.5,
               sections=("frontier",), shortcuts=True,  # tasks are those of the claim, windows among the ways
               notes=NOTES, plan=a.plan or "experiments/results/frontier")


class Arms:
  """The model at each length, and trained runs beside it."""

  def __init__(self, a):
    self.a = a
    self.corpora = arguments.corpora(a)
    self.tasks = tuple(a.tasks.split("+")) if a.tasks else smollm2.TASKS
    self.model, self.tokenizer = smollm2.source(a.model)
    self.parameters = f"{flops.parameters(Config(model=self.model))['total'] / 1e6:.3g}M"

  def numbers(self, name):
    return arguments.numbers(name, getattr(self.a, name))

  def arm(self, name, length, attention, modes, directory, layers=(), others=None, blocks=None):
    a = self.a
    return Config(
        arm=name, size=f"{self.parameters}-{length}", attention=attention, layers=layers, others=others or {},
        one_pass=False,  # as it was planned
        schedule=schedule.as_it_is(), model=dataclasses.replace(self.model, remat="layer"),
        data=DataConfig(corpora=self.corpora, tokenizer=self.tokenizer, context=length, global_batch=1, align=a.block),
        eval=EvalConfig(sequences=max(1, a.text_tokens // length), batch=max(1, a.eval_tokens // length),
                        run_modes=modes, tasks=self.tasks, task_examples=a.examples, diagnosed=1,
                        blocks=blocks or {}),
        checkpoint=CheckpointConfig(every=0, keep=1), fork=ForkConfig(directory, reset=bool(directory)))

  def counts(self, length, block):
    """Blocks of each share of the context: two at least, for one is the query's own."""
    found = dict.fromkeys(length // share // block for share in self.numbers("shares"))
    if not (counts := [count for count in found if count >= 2]):
      raise ValueError(f"experiment arguments shares, block = {self.a.shares!r}, {block}: no share of {length} tokens "
                       "has two blocks")
    return counts

  def dense(self, length):
    counts = self.counts(length, self.a.block)
    middle = counts[len(counts) // 2]
    name = lambda way, n: way if n == middle else f"{way}:num_blocks={n}"
    modes = [name(way, n) for way in WAYS for n in counts]
    modes += [name("oracle", n) for n in counts[len(counts) // 2 % 2::2]] + ["random"]
    return self.arm("dense", length, methods.Dense(), ("dense", *modes), self.a.model,
                    blocks=dict(block_size=self.a.block, num_blocks=middle))

  def once(self, length):
    """The same model in run modes that choose once per prompt: an arm, and so a process, of its own."""
    kept = [length // share for share in self.numbers("shares") if share <= 16]
    modes = [f"vertical_slash:verticals={n // 2},slashes={n // 2},local={min(64, n // 4)}" for n in kept]
    modes += [f"snapkv:capacity={n},local={min(128, n // 4)}" for n in kept]
    modes += [f"flexprefill:alpha={share},min_budget={max(8, length // 32)},local={min(64, length // 64)}"
              for share in MASSES]
    modes += [f"xattention:threshold={share},block_size={self.a.block}" for share in MASSES]
    return self.arm("once", length, methods.Dense(), tuple(modes), self.a.model)

  def own(self, name, directory, length):
    """A trained run with the selector that it has."""
    run = rundir.read_config(directory, field="experiment argument trained")
    if (run.data.tokenizer == "bytes") != (self.tokenizer == "bytes") or run.model.vocab_size != self.model.vocab_size:
      raise ValueError(f"experiment argument trained = {directory!r}: reads other tokens than the dense model")
    size = getattr(run.attention, "block_size", 0)
    modes = tuple(f"sparse:num_blocks={n}" for n in self.counts(length, size)) if size else ("sparse",)
    return self.arm(name, length, run.attention, modes, directory, run.layers, run.others)
