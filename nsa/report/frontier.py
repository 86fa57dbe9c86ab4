"""How much attention can be left out without training, task by task and for all tasks? The grid of Sparse Frontier.

arXiv 2504.17768 compares methods by the largest sparsity that costs each task little. Here a *way* to run a model is
a training-free method on the dense arm (or on another arm that is the same dense model), or the own selector of another
arm; its *steps* are its run modes, of which each leaves out another share of the attention. A *cell* is a task of which
the dense arm answers enough (Study.solved); text of each corpus stands beside them and has no part in the verdict.

  sparsity   1 - the share of the (query, key) pairs of dense attention that are attended to, as measured: of prompts
             where a method chooses once per prompt (of the answer's queries where it evicts), else of text
  loss       what is lost of the dense arm's score, as a share of it: on the same examples 1 - sum / sum of dense; of
             text what is added to the bits. Below 0 is a gain
  within x   the largest sparsity whose loss is at most x, and that of every step with less; 0 = dense alone. Its
             interval: weights of examples drawn, the same for all steps (documents of text, 95 %, percentiles)

The verdict on "there is no sparsity that is safe for all tasks", for each x of LIMITS and each size, at alpha .05, over
the steps that leave out at least LEAST of the attention, as the paper's grid does:

  confirmed  every such step of every way loses more than x on some cell: the lower limit is above x, one-sided, at
             alpha / cells. All steps have to be shown, so their number needs no correction
  refuted    the mildest such step of some way loses at most x on every cell: all upper limits are at most x, one-sided,
             at alpha / ways. All cells have to be shown, so their number needs no correction. How far up it holds:
             the steps of that way in their order, as long as they are safe
  undecided  neither; and in place of confirmed, as long as a planned run or step is missing, which might be safe. Ways
             that were planned count in alpha / ways, whether they have run or not

The oracle (which costs a dense pass) and random blocks are no ways to save anything: shown, not judged. Draws weight
the examples by exponential variates (the Bayesian bootstrap, Rubin 1981). Limits of tasks have one example more, that
dense answers, and the step does not (upper) or does, too (lower): of answers that are right or wrong and that no step
improves they are Clopper and Pearson's, exact for few losses and for none, where whole counts of examples would say
"safe" more than twice as often as alpha. Words are per size and limit. Examples speak of these checkpoints and of these
tasks. Prefill methods thin out the prompt and let the answer see all of it, snapkv the other
way round; the rest thin out both, text that is scored included: ways are not on one footing.
"""
from __future__ import annotations

import collections
import dataclasses
import math
import zlib

import numpy as np

from nsa import records as record_lib
from nsa.report import statistics, style
from nsa.report.document import Heading, Table, Text
from nsa.report.runs import Study
from nsa.report.verdict import SECTIONS

LIMITS = (0.01, 0.05)            # shares of the dense arm's score
LEAST = 0.5                      # sparsity that the verdict asks for
ALPHA = 0.05
DRAWS = 10_000
CONTROLS = ("oracle", "random")  # no ways to save anything
COLOURS = {"oracle": "#111111", "random": "#aaaaaa", "quest": "#0072b2", "block_topk": "#56b4e9",
            "sink_window": "#c4511f", "vertical_slash": "#009e73", "flexprefill": "#7b5ea7", "xattention": "#cc79a7",
            "snapkv": "#b8a500", "minference_blocks": "#117733"}
_OTHERS = ("#93330f", "#f2a65a", "#5e1c05", "#117733")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One task, or the text of one corpus: what dense has of each example, or document. `examples` are their names."""
  name: str
  task: bool
  examples: tuple
  dense: np.ndarray                # float64[n]: the score of a task; bits of text


@dataclasses.dataclass
class Step:
  """One run mode of one arm. `lost[cell]`: float64[n], of each of its examples; a text's is bits added."""
  arm: str
  mode: str
  sparsity: float
  lost: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Grid:
  """All that was run at one size. `ways`: name -> its steps, mildest first."""
  cells: list[Cell]
  ways: dict[str, list[Step]]
  left_out: list[str] = dataclasses.field(default_factory=list)
  missing: list[str] = dataclasses.field(default_factory=list)   # runs, and steps that could not be placed
  planned: int = 0                 # ways that are no controls, as planned

  @property
  def tasks(self) -> list[Cell]:
    return [cell for cell in self.cells if cell.task]

  @property
  def judged(self) -> dict[str, list[Step]]:
    """The steps that the verdict is about, by way."""
    steps = {way: [s for s in steps if s.sparsity >= LEAST] for way, steps in self.ways.items() if way not in CONTROLS}
    return {way: mine for way, mine in steps.items() if mine}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the examples say of one limit. `safe`: way -> the largest sparsity up to which it is safe for all tasks."""
  word: str                        # confirmed | refuted | undecided
  safe: dict[str, float]
  unsafe: int                      # steps that lose more on some task
  steps: int


# --- reading ------------------------------------------------------------------------


def grid(study: Study, size: str) -> Grid:
  """The grid of one size, of finished runs; seeds are averaged, example by example."""
  dense = study.dense
  mine = [run for run in study.finished if run.size == size]
  missing = [run.name for run in study.runs if run.size == size and run.status != "done"]
  found = collections.defaultdict(lambda: collections.defaultdict(list))  # (arm, mode) -> kind -> records
  for run in mine:
    for record in run.records:
      if record.get("seed", 0) not in run.diverged and record["kind"] in ("task", "language", "layer"):
        if record["kind"] != "language" or record.get("split", "val") == run.split:
          found[run.arm, record.get("run_mode", run.headline_mode)][record["kind"]].append(record)
  if (dense, "dense") not in found:
    return Grid([], {})
  base = _scores(found[dense, "dense"])
  same = {run.arm for run in mine if run.config.get("attention", {}).get("method", "dense") == "dense"}
  cells, left_out, lost = [], [], []
  for (task, name), values in base.items():
    share = float(np.mean(list(values.values())))
    if task and share < max(study.solved, 1e-9):
      left_out.append(f"{name}: {dense} answers {100 * share:.1f} %")
    else:
      cells.append(Cell(name, task, tuple(values), np.array(list(values.values()))))
  ways = collections.defaultdict(list)
  for (arm, mode), kinds in found.items():
    name = mode.partition(":")[0]
    if name == "dense" or arm not in same and name != "sparse":
      continue
    way = name if arm in same else arm
    step = Step(arm, mode, _sparsity(kinds))
    scores = _scores(kinds)
    for cell in cells:
      values = scores.get((cell.task, cell.name), {})
      if set(values) == set(cell.examples):
        got = np.array([values[e] for e in cell.examples])
        step.lost[cell.name] = cell.dense - got if cell.task else got - cell.dense
    if math.isnan(step.sparsity):
      lost.append(f"{arm} run {mode}")
      left_out.append(f"{arm} run {mode}: no record says how many tokens its queries see (eval.diagnosed)")
    elif any(cell.name not in step.lost for cell in cells):
      lost.append(f"{arm} run {mode}")
      left_out.append(f"{arm} run {mode}: not asked what {dense} was asked")
    else:
      ways[way].append(step)
  return Grid(cells, {way: sorted(steps, key=lambda s: s.sparsity) for way, steps in ways.items()}, left_out,
              missing + lost, len(_planned(study, size)))


def _planned(study: Study, size: str) -> set[str]:
  """The ways of the plan's arms of this size, without controls; {} of a study without a plan."""
  out = set()
  for config in (study.plan or {}).get("configs", {}).values():
    dense = config.get("attention", {}).get("method", "dense") == "dense"
    for mode in config.get("eval", {}).get("run_modes", ()) if config.get("size") == size else ():
      name = mode.partition(":")[0]
      if name != "dense" and (dense or name == "sparse"):
        out.add(name if dense else config["arm"])
  return out - set(CONTROLS)


def _scores(kinds) -> dict[tuple[bool, str], dict]:
  """{(whether a task, name): {example: score, a mean over seeds}}; of text {document: bits of the second half}."""
  out = {}
  by_task = collections.defaultdict(lambda: collections.defaultdict(list))
  for record in kinds["task"]:
    by_task[record["task"]][record.get("seed", 0)].append(record)
  for task, seeds in by_task.items():
    values = [record_lib.each(mine, "exact_match", "exact_matches") for mine in seeds.values()]
    if len({len(v) for v in values}) == 1:
      out[True, task] = dict(enumerate(np.mean(values, axis=0).tolist()))
  seeds = {record.get("seed", 0) for record in kinds["language"]}
  for record in kinds["language"]:
    if record.get("second_half_bytes") and record.get("second_half_bits_per_byte") is not None:
      of_corpus = out.setdefault((False, f"text {record.get('corpus', '')}".strip()), {})
      bits = record["second_half_bits_per_byte"] * record["second_half_bytes"] / len(seeds)
      document = record.get("document", "?")
      of_corpus[document] = of_corpus.get(document, 0.0) + bits
  return out


def _sparsity(kinds) -> float:
  """1 - tokens attended to over those of dense attention: of tasks where they are measured there, else of text. A layer
  that does not say how many it attends to, as a hybrid's dense ones, counts as dense."""
  for kind in ("task", "layer"):
    known = [r for r in kinds[kind] if "tokens_visible" in r]
    if known:
      causal = known[0]["tokens_causal"]
      pairs = [(r.get("tokens_visible", causal), r.get("tokens_causal", causal), r.get("items", 1))
               for r in (known if kind == "task" else kinds[kind])]
      return 1 - sum(v * n for v, _, n in pairs) / sum(c * n for _, c, n in pairs)
  return math.nan


# --- what examples say --------------------------------------------------------------


def loss(step: Step, cell: Cell) -> float:
  """What is lost of the dense score, as a share of it."""
  return float(step.lost[cell.name].sum() / cell.dense.sum())


def drawn(cell: Cell, steps: list[Step], more: float | None = None) -> np.ndarray:
  """float64[DRAWS, steps]: losses under drawn weights of the cell's examples, the same for all steps.

  more: what every step loses on one more example that dense answers; None = no such example.
  """
  lost = np.stack([step.lost[cell.name] for step in steps], axis=1)
  base = cell.dense
  if more is not None:
    lost, base = np.concatenate([lost, np.full((1, lost.shape[1]), more)]), np.append(base, 1.0)
  return statistics.weighted_ratios(lost, base, DRAWS, zlib.crc32(cell.name.encode()))  # a cell's own draws


def limits(cell: Cell, steps: list[Step], low: float, high: float) -> list[tuple[float, float]]:
  """One-sided (lower limit at level 1 - low, upper limit at level 1 - high) of each step's loss."""
  kept, lost = (0.0, 1.0) if cell.task else (None, None)
  lower = np.quantile(drawn(cell, steps, kept), low, axis=0)
  upper = np.quantile(drawn(cell, steps, lost), 1 - high, axis=0)
  return list(zip(lower.tolist(), upper.tolist()))


def largest(steps: list[Step], losses: np.ndarray, limit: float) -> np.ndarray:
  """The largest sparsity within the limit: float64[...] of losses [..., steps], steps in their order."""
  holds = np.logical_and.accumulate(losses <= limit, axis=-1).sum(-1)
  return np.array([0.0, *(step.sparsity for step in steps)])[holds]


def within(cells: list[Cell], steps: list[Step], limit: float) -> tuple[float, float, float]:
  """(largest sparsity within the limit on all of the cells, lower and upper end of its interval)."""
  at = np.min([largest(steps, np.array([loss(s, cell) for s in steps]), limit) for cell in cells])
  draws = np.min([largest(steps, drawn(cell, steps), limit) for cell in cells], axis=0)
  low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
  return float(at), float(low), float(high)


def judge(found: Grid, limit: float) -> Verdict | None:
  """The verdict on one limit; None without a task or a way."""
  tasks, ways = found.tasks, found.judged
  if not tasks or not ways:
    return None
  safe, unsafe, count = {}, 0, 0
  for way, steps in ways.items():
    of_cells = [limits(cell, steps, ALPHA / len(tasks), ALPHA / max(len(ways), found.planned)) for cell in tasks]
    unsafe += sum(any(cell[i][0] > limit for cell in of_cells) for i in range(len(steps)))
    count += len(steps)
    for i, step in enumerate(steps):
      if not all(cell[i][1] <= limit for cell in of_cells):
        break
      safe[way] = step.sparsity
  word = "refuted" if safe else "confirmed" if unsafe == count and not found.missing else "undecided"
  return Verdict(word, safe, unsafe, count)


# --- the section --------------------------------------------------------------------


def section(study: Study, table, gallery) -> list:
  """The blocks of the report."""
  blocks = [Heading(SECTIONS["frontier"]), Text(
      f"Ways to run {study.dense} without training (and the own selectors of other arms), by the share of attention "
      "that they leave out. Prefill methods thin out the prompt, snapkv what the answer sees of it, the others every "
      "query. Claim on trial: *no sparsity is safe for all tasks* (Sparse Frontier, arXiv 2504.17768). "
      "The rule is in nsa/report/frontier.py.")]
  for size in study.sizes:
    found = grid(study, size)
    if not found.cells or not found.ways:
      blocks.append(Text(f"Size {size}: no run of {study.dense} in a sparse run mode yet.", "note"))
      continue
    blocks += _verdicts(study, found, size) + _tables(study, found, size)
    caption = ("Loss against dense by sparsity, as shares of dense's score. Dotted: the limits. Bars: 95 % intervals "
               "over examples. Worst: the largest loss of a task")
    blocks.append(gallery.block("frontier", figure(found), caption, "Loss by sparsity for each task", "", size))
  return blocks


def _verdicts(study, found, size) -> list:
  lines = []
  for limit in LIMITS:
    one = judge(found, limit)
    if one is None:
      return [Text(f"Size {size}: no verdict: no way, or no task of which {study.dense} answers "
                   f"{100 * study.solved:g} %.", "note")]
    number = max(len(found.judged), found.planned)
    few = [cell.name for cell in found.tasks if 1 - (ALPHA / number) ** (1 / cell.dense.sum()) > limit]
    how = {"confirmed": "every step loses more on some task",
           "refuted": "safe for all tasks: " + ", ".join(f"{way} up to {s:.2f}" for way, s in one.safe.items()),
           "undecided": "no way is shown to be safe, nor every step to be unsafe" if one.unsafe < one.steps else
                        "every step that was run loses more on some task; not all were run"}[one.word]
    how += f"; {study.dense} answers too little of {', '.join(few)} for any way to be shown safe" * bool(few)
    lines.append(f"within {100 * limit:g} %: **{one.word}** ({how}; {one.unsafe} of {one.steps} steps are shown to "
                 "lose more)")
  blocks = [Text(f"Missing at size {size}: {', '.join(found.missing)}.", "note")] * bool(found.missing)
  return blocks + [Text(f"**Size {size}**, {len(found.tasks)} tasks, {len(found.judged)} ways with {LEAST:g} and more "
                        "left out; \"no sparsity is safe for all tasks\", " + "; ".join(lines) + ".", "verdict")]


def _tables(study, found: Grid, size) -> list:
  ways, blocks = list(found.ways), []
  text = [cell for cell in found.cells if not cell.task]
  for limit in LIMITS:
    lines = []
    rows = [([cell], cell.name, len(cell.examples)) for cell in found.tasks]
    rows += [(found.tasks, "**all tasks**", 0)] if found.tasks else []
    for cells, name, count in rows + [([cell], cell.name, len(cell.examples)) for cell in text]:
      level = f"{100 * cells[0].dense.mean():.1f} %" if len(cells) == 1 and cells[0].task else "-"
      values = ["{:.2f} ({:.2f} to {:.2f})".format(*within(cells, found.ways[way], limit)) for way in ways]
      lines.append([name, str(count or "-"), level, *values])
    blocks.append(Table(["", "examples", study.dense, *ways], lines,
                        f"Largest sparsity within {100 * limit:g} % of {study.dense}, size {size}; 0 = dense alone. In "
                        "brackets: 95 % intervals over examples (documents of text). Oracle and random are controls"))
  lines = []
  for way in ways:
    steps = found.ways[way]
    of_cell = {cell.name: limits(cell, steps, ALPHA / 2, ALPHA / 2) for cell in found.cells}
    for i, step in enumerate(steps):
      numbers = [[100 * x for x in (loss(step, cell), *of_cell[cell.name][i])] for cell in found.cells]
      lines.append([way, step.mode, f"{step.sparsity:.3f}", *map("{0[0]:+.1f} ({0[1]:+.1f} to {0[2]:+.1f})".format,
                                                                 numbers)])
  blocks.append(Table(["way", "run mode", "sparsity", *(cell.name for cell in found.cells)], lines,
                      f"Loss in % of {study.dense}'s score (of its bits), size {size}, with 95 % intervals over "
                      "examples, each for itself. Exploratory beside the verdict", left=2))
  if found.left_out:
    blocks.append(Text("Left out: " + "; ".join(found.left_out) + ".", "note"))
  return blocks


def figure(found: Grid):
  """Loss over sparsity: a panel for each cell, and one for the worst task."""
  panels = [*found.cells, *([None] if len(found.tasks) > 1 else [])]
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  fig = style.Figure(figsize=(2.2 + 3.3 * columns, 0.6 + 2.9 * rows), layout="constrained")
  axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  others = iter(_OTHERS * 9)
  colours = {way: COLOURS.get(way) or next(others) for way in found.ways}
  for number, ax in enumerate(axes.flat):
    if number >= len(panels):
      ax.set_visible(False)
      continue
    cell = panels[number]
    for limit in LIMITS:
      ax.axhline(100 * limit, color="#888888", ls=":", lw=1)
    for way, steps in found.ways.items():
      losses = 100 * np.array([[loss(s, c) for c in ([cell] if cell else found.tasks)] for s in steps]).max(axis=1)
      x = [step.sparsity for step in steps]
      ax.plot(x, losses, color=colours[way], marker="o", ms=3.5, lw=1.3, ls=":" if way in CONTROLS else "-", label=way)
      if cell:
        ends = 100 * np.quantile(drawn(cell, steps), [0.025, 0.975], axis=0)
        ax.vlines(x, *ends, color=colours[way], lw=0.8, alpha=0.6)
    ax.set_yscale("symlog", linthresh=5)
    ax.set_yticks([0, 1, 5, 20, 100], ["0", "1", "5", "20", "100"])
    ax.set_xlim(0, 1)
    ax.set_title(cell.name if cell else "worst of the tasks", fontsize=9)
    if number % columns == 0:
      ax.set_ylabel("loss (% of dense)")
    if number + columns >= len(panels):
      ax.set_xlabel("sparsity (share left out)")
      ax.tick_params(labelbottom=True)  # where nothing is drawn below, the shared axis hides them
  shown = [ax.dataLim for ax in axes.flat[:len(panels)]]
  axes[0, 0].set_ylim(min(-0.5, 1.1 * min(d.y0 for d in shown)), max(120.0, 1.2 * max(d.y1 for d in shown)))
  style.key(fig, axes[0, 0])
  return fig
