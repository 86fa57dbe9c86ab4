"""At equal training FLOPs and long context: a larger model with sparse attention, or a smaller dense one?

    python -m launch.study --plan --workdir=runs/isoflop \
        --config=experiments/isoflop.py:novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz
    python -m launch.study --workdir=runs/isoflop --config=experiments/isoflop.py:novels=...,code=...,slice=true
    python -m experiments.isoflop reduction.png  # 28.4x at 1M tokens by arithmetic, beside measured time

Sparse Frontier (arXiv 2504.17768) says larger and sparse, of models that it did not train. Here they are trained: T =
16,384 bytes, where attention is most of a dense model's training FLOPs, and at each budget of FLOPs every size of the
ladder 2XS 0.4M, XS 1.3M, S 2.8M, M 10M, L 28M, XL 75M (the backbone without embeddings) whose run has at least `least`
steps and at most `most` tokens.

| arm | attention |
|---|---|
| dense | dense |
| msa_8, msa_32 | MSA, 1/8 and 1/32 of the context visible in blocks of 64; native, 2 % of the steps warm the selector |
| window_32 | the window whose forward pass costs what msa_32's does, its index branch counted |

A cut study is one of smaller budgets: --only='*_5e14-*,*_1.5e15-*,*' runs them in this order.

Stated before the runs (the weights of the fits while the slice ran, before its records were read). Effect that matters:
0.005 bits per byte between the optima. Fits, intervals and the rule: nsa/report/isoflop.py; what a window of equal cost
has too is no merit of selection. Text of each corpus is judged; recall (exact match and NLL of far answers) is shown in
a panel of its own. Half of the rows are recall, with 15 % of the loss, in all arms. x is training FLOPs, analytic,
selector and its loss counted. A second figure has device time, for which each run needs a device of its own; a third
the models of the largest budget run with other numbers of blocks. Controls: the window; one peak rate per size for all
arms (from experiments/rates.py at 4,096 bytes: not tuned here, a limit). Seed 0 is a pilot, by which the next sizes may
be chosen; seeds 1 to 3 at all points are the replicates, and the first that count as training scatter.

`slice`: a tenth of the budgets, sizes to L, MSA at 1/32 alone. Its power, of 100 simulated studies each (losses that
are parabolas of curvature .03, residuals with an SD of .003, .006, .012 bits per byte): a gain of .02 is confirmed in
100, 89, 39, of .01 in 90, 40, 13. Of losses as the main study's runs have them at 4,096 bytes, 1.13 + .26 (N / 5M)^-.34
+ .36 (D / 50M bytes)^-.67, continued to the slice's few steps, which no parabola follows: a gain of .15 in 40 of 40, of
.10 in 15, of .05 in none. It sees large differences alone, and the smallest effect that matters never.

A pilot that can bracket: budgets=5e15+8e15,shares=32,sizes=2XS+XS+S+M+L,least=150,most=5e8,view=false,shared=true,
plan=experiments/results/isoflop_pilot. Its plan stands there, older than any of its 28 runs (seed 0).
By the losses just named, with noise of .003 and .006 (30 studies each, MSA as good as dense at equal tokens or .01
behind), each of the three optima is bracketed at the larger budget in 29 or 30; with .012 in 26 to 30. Budgets of 3e15
and 6e15 bracket dense's in half. By the slice's speed it takes 25 minutes of one H200.

Result of the slice (experiments/results/isoflop_slice; 5 minutes of one H200, 30 of its 38 runs, one seed): undecided,
as the smallest model is the best one of every method at every budget. The whole grid has not been run.

Arguments: novels=, code= (archives or folders; none: the standard library's source), slice=false, budgets= (joined by
+; empty: 5e15+1.5e16+4.5e16, of a slice 5e14+1.5e15+4.5e15), shares= (MSA's; empty: 8+32, of a slice 32), windows=32
(shares whose cost a window gets), sizes= (joined by +; empty: all), least=0, most=0 (0: 300 steps and 4e8 tokens, of a
slice 100 and 2.5e8), seeds=0 (joined by +), context=16384, batch=2, block=64, windows_of_text=24 (of each corpus),
examples=32 (per task), view=true (other numbers of blocks at the largest budget), shared=false (true: runs share
devices, and no time is drawn), plan= (its directory; empty: experiments/results/isoflop, of a slice isoflop_slice).
"""
import functools
import json
import pathlib
import sys

from experiments import arguments
from nsa import flops, methods, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig
from nsa.study import Study

LADDER = {  # shape with four query heads of 64 to a KV head; peak rate
    "2XS": (dict(num_layers=2, d_model=128, num_heads=4, num_kv_heads=1, mlp_dim=352), 5e-3),
    "XS": (dict(num_layers=3, d_model=192, num_heads=4, num_kv_heads=1, mlp_dim=512), 4e-3),
    "S": (dict(num_layers=4, d_model=256, num_heads=4, num_kv_heads=1, mlp_dim=704), 3e-3),
    "M": (dict(num_layers=6, d_model=384, num_heads=8, num_kv_heads=2, mlp_dim=1024), 2e-3),
    "L": (dict(num_layers=10, d_model=512, num_heads=8, num_kv_heads=2, mlp_dim=1408), 1.5e-3),
    "XL": (dict(num_layers=12, d_model=768, num_heads=12, num_kv_heads=3, mlp_dim=2048), 1e-3),
}
TASKS = ("mqar:pairs=4", "mqar:pairs=16", "mqar:pairs=64")
WARMUP = 0.02                    # share of MSA's steps
NOTES = (
    "What is judged is the section on equal FLOPs (nsa/report/isoflop.py): for each corpus the loss at the best size, "
    "MSA minus dense and MSA minus the window of equal cost, at the largest budget at which both optima are bracketed. "
    "A of single sizes, which the report has too, is at equal FLOPs and not judged.",
    "Confirmed by selection: below dense and below the window. Confirmed by locality: below dense, as is the window, "
    "and not shown to be below that. Confirmed, cause open: below dense else. Refuted: above dense. Undecided: else. "
    "95 % intervals, simultaneous over sparse methods and corpora. Smallest effect that matters: 0.005 bits per byte "
    "between optima.",
    "Seed 0 is a pilot: sizes and budgets of what follows may be chosen by it, and its words are about its runs. Seeds "
    "1 to 3 at all points of that follow.",
    "One peak rate per size for all arms, from runs at 4,096 bytes; small budgets have few steps, for which it may be "
    "low. Random and the oracle's blocks are not run: no endpoint is admitted as a test of selection here.",
)


def get_config(arg=None):
  a = arguments.parse(arg, novels="", code="", slice=False, budgets="", shares="", windows="32", sizes="", least=0,
                      most=0.0, seeds="0", context=16384, batch=2, block=64, windows_of_text=24, examples=32, view=True,
                      shared=False, plan="", above_0=("context", "batch", "block"))
  make = Arms(a)
  budgets = a.budgets or ("5e14+1.5e15+4.5e15" if a.slice else "5e15+1.5e16+4.5e16")
  budgets = arguments.numbers("budgets", budgets, float)
  shares = arguments.numbers("shares", a.shares or ("32" if a.slice else "8+32"))
  seeds = arguments.numbers("seeds", a.seeds, least=0)
  sizes = a.sizes.split("+") if a.sizes else list(LADDER)[:5 if a.slice else 6]
  if unknown := [size for size in sizes if size not in LADDER]:
    raise ValueError(f"experiment argument sizes = {a.sizes!r}: {unknown[0]} is none of {', '.join(LADDER)}")
  least, most = a.least or (100 if a.slice else 300), a.most or (2.5e8 if a.slice else 4e8)
  if a.context // max(shares) < a.block:
    raise ValueError(f"experiment arguments shares, block = {a.shares or max(shares)}, {a.block}: 1/{max(shares)} of "
                     f"{a.context} tokens has no block; take a smaller share or block")
  windows = arguments.numbers("windows", a.windows)
  names = ["dense", *(f"msa_{s}" for s in shares), *(f"window_{s}" for s in windows)]
  arms = []
  for name in names:
    for budget in budgets:
      of_sizes = [make.arm(name, budget, size, a.view and budget == max(budgets)) for size in sizes]
      arms += [one for one in of_sizes
               if least <= one.schedule.steps and one.schedule.steps * a.batch * a.context <= most]
  if not arms:
    raise ValueError(f"experiment arguments budgets, least, most = {a.budgets!r}, {least}, {most}: no size is left")
  there = [one.arm for one in arms]
  last = lambda name: [arm for arm in there if arm.startswith(f"{name}_")][-1:] or there[-1:]
  corpora = tuple(f"second_half_bits_per_byte:{name}" for name in make.corpora) if len(make.corpora) > 1 else (
      "second_half_bits_per_byte",)
  return Study(
      name="isoflop", question=__doc__.splitlines()[0], arms=arms, seeds=seeds, vmap_seeds=False,
      dense=last("dense")[0], reference=last(names[1])[0], primary=corpora,
      secondary=("far_answer_nll", "far_exact_match"), quantities=("A",),
      sections=("isoflop",), notes=NOTES, speeds={} if a.shared else None,
      plan=a.plan or f"experiments/results/isoflop{'_slice' * a.slice}", flops_per_second=1e14, training_share=0.7,
      tiers={name: tuple(f"{one.arm}-{one.size}" for one in arms if one.arm.startswith(f"{name}_")) for name in names})


class Arms:
  """Makes the runs of a method, a budget and a size."""

  def __init__(self, a):
    self.a = a
    self.corpora = arguments.corpora(a)

  def arm(self, name, budget, size, view):
    """Its steps are those that cost the budget, nearest whole number; at least one."""
    _, peak = LADDER[size]
    a, attention = self.a, self.attention(name, size)
    dense, learns = isinstance(attention, methods.Dense), isinstance(attention, methods.MSA)

    def stages(steps):
      plan = dict(peak=peak, warmup=0.02, decay=0.2)
      warm = max(1, round(WARMUP * steps)) / steps if learns else 0
      return schedule.dense(steps, **plan) if dense else schedule.native(steps, selector_warmup=warm, **plan)

    counts = [n for n in (2, 8, 32) if learns and n != attention.num_blocks and n * a.block <= a.context // 8]
    more = [f"sparse:num_blocks={n}" for n in counts] + ["dense"] * (not dense)
    more += [f"quest:num_blocks={n}" for share in (8, 32) if dense and (n := a.context // share // a.block)]
    own = "dense" if dense else "sparse"
    config = Config(
        arm=f"{name}_{label(budget)}", size=size, attention=attention, schedule=stages(1000),
        model=_model(size, dtype="bfloat16"), one_pass=False,  # as it was planned
        data=DataConfig(corpora=self.corpora, context=a.context, global_batch=a.batch, task_rows=max(1, a.batch // 2),
                        task_loss=0.15, tasks=TASKS, filler_weight=0.0,
                        task_lengths=tuple(n for n in (64, 256, 1024, 4096, 16384) if n <= a.context)),
        optimizer=OptimizerConfig(selector_learning_rate=5.0),
        eval=EvalConfig(sequences=a.windows_of_text, task_examples=a.examples, batch=4, diagnostics=False,
                        run_modes=(own, *(more if view else ())), tasks=TASKS[1:],
                        blocks=dict(block_size=a.block) if dense else {}),
        checkpoint=CheckpointConfig(every=0, keep=1), log_every=10)
    config.schedule = stages(max(1, round(1000 * budget / flops.cumulative(config, 1000))))
    return config

  def attention(self, name, size):
    kind, _, share = name.partition("_")
    if kind == "dense":
      return methods.Dense()
    sparse = int(share), self.a.block, self.a.context
    return _msa(*sparse) if kind == "msa" else methods.Window(_window(size, *sparse))


def _msa(share, block, context):
  return methods.MSA(index_dim=64, block_size=block, num_blocks=context // share // block)


def _model(size, **options):
  return ModelConfig(head_dim=64, short_conv=3, tie_embeddings=False, **LADDER[size][0], **options)


@functools.lru_cache(maxsize=None)
def _window(size, share, block, context):
  """Tokens of the longest window whose forward pass costs no more than MSA's."""
  beside = Config(attention=_msa(share, block, context), model=_model(size), data=DataConfig(context=context))
  return flops.equal_window(beside, context)


def label(budget: float) -> str:
  """1.5e15, as arms are named."""
  return f"{budget:.3g}".replace("e+", "e")


# --- 28.4x --------------------------------------------------------------------------


def reduction(out) -> list[tuple[str, int, float]]:
  """Draws dense over MSA by context: attention FLOPs by arithmetic, and what one layer takes on an H200.

  The shape of arXiv 2606.13392: 64/4 heads of 128, J 16, index width 128, blocks of 128; measured with blocks of 64,
  too: rows of experiments/results/kernels, from 262,144 tokens on those of benchmarks.long (forward: without the index
  KL). Returns (what, context, ratio) of every measured point, and of 1M tokens by arithmetic.
  """
  import matplotlib
  import numpy as np

  from nsa.report import style
  kernels = pathlib.Path(__file__).parent / "results/kernels"
  read = lambda name: json.loads((kernels / name).read_text())
  rows = [r for r in read("layers_h200.json") if r["operation"] == "msa_layer" and r["H"] == 128]
  rows += against_dense(read("long_h200.json"))
  shape = ModelConfig(d_model=3072, num_heads=64, num_kv_heads=4, head_dim=128)
  with matplotlib.rc_context(style.STYLE):
    fig, (ax,) = style.figure(10, 4.4)
  found = []
  at = 2 ** np.arange(13, 21)
  for size, colour in ((128, "#0072b2"), (64, "#c4511f")):
    msa = methods.MSA(block_size=size, num_blocks=16, index_dim=128)
    ax.plot(at, [flops.attention_reduction(msa, shape, int(n)) for n in at], color=colour,
            label=f"attention FLOPs, blocks of {size}")
    found.append((f"attention FLOPs, blocks of {size}", 2 ** 20, flops.attention_reduction(msa, shape, 2 ** 20)))
    for key, words, marker in (("forward_vs_dense", "forward", "o"), ("both_vs_dense", "forward and backward", "s")):
      mine = sorted((r["T"], r[key]) for r in rows if r["block_size"] == size and key in r)
      ax.plot(*zip(*mine), marker, color=colour, mfc="none", label=f"measured time of a layer, {words}, {size}")
      found += [(f"measured, {words}, blocks of {size}", n, ratio) for n, ratio in mine]
  ax.axhline(1, color="#888888", lw=1, ls=":")
  ax.set_xscale("log", base=2)
  ax.set_yscale("log", base=2)
  ax.set_yticks([0.5, 1, 2, 4, 8, 16, 28.4], ["0.5", "1", "2", "4", "8", "16", "28.4"])
  ax.set_xlabel("context (tokens)")
  ax.set_ylabel("dense over MSA")
  style.key(fig, ax)
  fig.savefig(out, dpi=130)
  return found


def against_dense(rows: list[dict]) -> list[dict]:
  """MSA's rows of benchmarks.long, with dense's time over theirs where both were timed."""
  keys = {"forward": "forward_vs_dense", "forward + backward": "both_vs_dense"}
  dense = {(row["T"], row["part"]): row["ms"] for row in rows if row["operation"] == "dense" and "ms" in row}
  return [dict(row, block_size=128) | {keys[row["part"]]: dense[row["T"], row["part"]] / row["ms"]} for row in rows
          if row["operation"] in ("msa_attention", "msa_layer") and "ms" in row and (row["T"], row["part"]) in dense]


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("name the figure to be written: python -m experiments.isoflop reduction.png")
  for what, context, ratio in reduction(sys.argv[1]):
    print(f"{what:48s} {context:9,d} tokens: {ratio:.2f}")
