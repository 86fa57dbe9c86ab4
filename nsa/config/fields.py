"""The fields of a config, with a comment and a unit each.

Annotations here and in the methods' options are real types, not strings (no `from __future__ import
annotations`): `ml_collections.config_flags` reads them to parse overrides.
"""
from dataclasses import dataclass, field
import math
from typing import Any

from nsa import methods
from nsa.architecture import ModelConfig


class ConfigError(ValueError):
  """A configuration that cannot run. `problems` is a list of (field, value, fix)."""

  def __init__(self, problems):
    if isinstance(problems, str):  # ml_collections makes an error again from the text of one
      self.problems = []
      super().__init__(problems)
      return
    self.problems = list(problems)
    lines = [f"  {name} = {value!r}: {fix}" for name, value, fix in self.problems]
    super().__init__("the configuration cannot run:\n" + "\n".join(lines))


@dataclass
class Stage:
  """One stage of a schedule: what the model runs and what it learns."""
  fraction: float = 1.0           # share of the run's steps; the shares of all stages add up to 1
  mode: str = "dense"             # dense | sparse | warmup (dense output + selector loss) | mixed
  train: str = "all"              # all | selector | memory: the parameter groups that learn
  context: int = 0                # tokens per sequence; 0 = data.context. Tokens per step stay the same
  learning_rate: float = 1.0      # factor on the schedule's learning rate
  dense_share: float = 0.5        # mixed only: share of the steps that run dense
  loss_weights: dict[str, float] = field(default_factory=dict)  # auxiliary losses by name; absent = the method's
                                                                # default, 1 or its paper's
  enter: str = ""                 # what happens to the weights at the first step, e.g. "copy_kv" (see nsa/schedule.py)
  hold_selector: bool = False     # selectors learn at the plan's peak x optimizer.selector_learning_rate, wherever the
                                  # plan stands


@dataclass
class LearningRate:
  """The learning-rate plan of the whole run: a pure function of the step, the same for all arms."""
  peak: float = 1e-3              # at the end of the warm-up
  plan: str = "wsd"               # wsd (warm up, hold, decay linearly) | cosine | constant
  warmup: float = 0.02            # share of the steps
  decay: float = 0.2              # share of the steps, wsd only
  final: float = 0.05             # last learning rate / peak


@dataclass
class Restart:
  """A second plan for what is done to a finished model: warm up again, hold, decay linearly to `LearningRate.final`."""
  step: int = 0                   # optimizer steps of the finished model; the first plan is over then; 0 = no second
                                  # plan
  peak: float = 0.5               # share of learning_rate.peak
  warmup: float = 0.1             # share of the steps that are left
  decay: float = 0.2              # share of the steps that are left


@dataclass
class ScheduleConfig:
  """What the steps of a run do, and at which rates (constructors: nsa/schedule.py)."""
  steps: int = 1000               # optimizer steps of the whole run
  stages: list[Stage] = field(default_factory=lambda: [Stage()])
  learning_rate: LearningRate = field(default_factory=LearningRate)
  restart: Restart = field(default_factory=Restart)


@dataclass
class DataConfig:
  """What is read: text, recall tasks, and how batches are made of them."""
  source: str = "stdlib"          # stdlib | files:PATH (a folder or a .tar.xz) | tfds:NAME | tasks (no text)
  tokenizer: str = "bytes"        # bytes: 256 + BOS, EOS, PAD | hf:PATH: a tokenizer.json or its folder (extra `hf`)
  corpora: dict[str, str] = field(default_factory=dict)  # name -> source: a mixture in place of `source`; each has
                                                         # endpoints of its own
  weights: dict[str, float] = field(default_factory=dict)  # of the corpora, rows of text; absent = 1
  data_dir: str = ""              # tfds only: where the builder's files lie; "" = TFDS's own default
  context: int = 1024             # T, tokens per sequence
  global_batch: int = 8           # sequences per step over all devices, at `context` tokens
  align: int = 64                 # packed documents begin at multiples of this; the same in all arms that are compared
  task_share: float = 0.0         # share of the sequences that are synthetic tasks, each drawn for itself, 0 to 1
  task_rows: int = 0              # instead of a share: so many of every `global_batch` sequences, in every batch
  task_loss: float = 0.0          # with task_rows: share of a batch's loss weight on tasks; 0 = as answer_weight makes
                                  # it
  tasks: tuple[str, ...] = ()     # e.g. ("mqar", "needle:keys=4"); drawn with equal probability
  task_lengths: tuple[int, ...] = ()  # tokens: a task's row is packed with examples of a length drawn from those
                                      # of these that it fits into; () = context
  planted: float = 0.0            # share of the text that is passages planted a known number of times
                                  # (data/planting.py)
  answer_weight: float = 5.0      # loss weight of a task's answer tokens
  filler_weight: float = 1.0      # loss weight of a task's other tokens; 0 = learn from answers alone

  @property
  def texts(self) -> dict[str, str]:
    """Name -> source of every corpus; the name is "" where there is but `source`."""
    return self.corpora or {"": self.source}

  @property
  def has_tasks(self) -> bool:
    """Whether rows of tasks are trained on."""
    return self.task_share > 0 or self.task_rows > 0


@dataclass
class OptimizerConfig:
  """AdamW or Muon, one for each parameter group (nsa/optim.py)."""
  name: str = "adamw"             # adamw | muon (matrices by Muon, all else by AdamW)
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1       # decoupled; matrices only
  clip: float = 1.0               # global gradient norm of the backbone; 0 = no clipping
  selector_clip: float = 1.0      # the same for the selector's own parameters, clipped apart
  selector_learning_rate: float = 1.0  # factor on the selector's learning rate; see experiments/methods.py for
                                       # retrofits


@dataclass
class MeshConfig:
  """Devices per mesh axis. -1 on `data` takes what is left."""
  data: int = -1                  # copies of the model
  fsdp: int = 1                   # shards of parameters and optimizer state; each has rows of its own
  context: int = 1                # shards of T; each has all keys and values, and a share of the parameters
  tensor: int = 1                 # shards of KV heads and of F


@dataclass
class EvalConfig:
  """What is asked of a run, when, and in which run modes."""
  every: int = 0                  # steps between evaluations; 0 = only at the end
  split: str = "val"              # val | test | ood
  sealed: str = ""                # a further split, evaluated at the end in the arm's own run mode into
                                  # eval/<step>-sealed.json, which no report reads before the study is opened
                                  # (launch.report --open)
  sequences: int = 32             # windows of `context` tokens of each corpus, spread evenly over the documents;
                                  # -1 = all of the split
  context: int = 0                # tokens; 0 = data.context
  batch: int = 8                  # sequences per device call
  run_modes: tuple[str, ...] = ("dense", "sparse")  # also the others of methods/run_modes.py, with options:
                                                    # "sparse:num_blocks=8"
  during: tuple[str, ...] = ()    # run modes at steps before the last, without heat maps; () = as at the end
  during_examples: int = 0        # examples per task at these; 0 = text alone
  during_sequences: int = 0       # windows of each corpus at these, evenly spread among those of the end; 0 = as at the
                                  # end
  more_modes: tuple[str, ...] = ()  # further run modes at the end, of the seeds in more_seeds alone: what no verdict
                                    # asks of every seed
  more_seeds: tuple[int, ...] = ()
  blocks: dict[str, int] = field(default_factory=dict)  # geometry of sparse run modes, e.g. {"block_size": 32};
                                                        # {} = the method's
  tasks: tuple[str, ...] = ()     # () = data.tasks; "needle@512": examples of 512 tokens, not of the whole context
  task_examples: int = 32         # per task
  decoded: int = 0                # of so many examples per task the answers are also decoded greedily, at the end
  near: tuple[int, ...] = ()      # (first, last) tokens of what any arm sees unselected: `far` answers have evidence
                                  # behind the first and before the last; () = (context / 32, context / 8),
                                  # which is told where a window of the tokens of a selection reaches further back
  ar_hits: bool = False           # loss of rare n-grams seen before in the window, by distance (data/recurrence.py), at
                                  # the end
  context_gain: tuple[int, ...] = ()  # loss of a window's last quarter given so many tokens before it, and all; at the
                                      # end; dense, sparse
  hidden_states: tuple[int, ...] = ()  # optimizer steps at which hidden states are measured, 0 = the initial weights
                                       # (nsa/look/snapshots.py)
  hidden_seeds: tuple[int, ...] = ()   # of these seeds alone; () = of all
  diagnostics: bool = True        # per layer: recall, captured and oracle mass, entropy, overlap
  diagnosed: int = 16             # of so many windows of each corpus, at most, on the way of one batch: they take
                                  # longer than the model

  def modes(self, seeds: tuple[int, ...]) -> tuple[str, ...]:
    """Run modes at the end that any of `seeds` is evaluated in."""
    return tuple(dict.fromkeys((*self.run_modes, *(self.more_modes if set(seeds) & set(self.more_seeds) else ()))))

  @property
  def named(self) -> dict[str, tuple[str, ...]]:
    """Field -> the run modes that it names."""
    return {name: getattr(self, name) for name in ("run_modes", "more_modes", "during")}


@dataclass
class CheckpointConfig:
  """Which checkpoints are written, and which stay."""
  every: int = 200                # steps between checkpoints; the last step is always saved
  keep: int = 2                   # newest checkpoints that stay
  keep_at: tuple[int, ...] = ()   # steps saved and never deleted (fork points)
  keep_period: int = 0            # checkpoints at multiples of this many steps are never deleted; 0 = all may be


@dataclass
class ForkConfig:
  """Start from another run's checkpoint instead of from scratch."""
  workdir: str = ""               # the run to fork from; "" = no fork
  step: int = -1                  # its checkpoint; -1 = the newest
  reset: bool = False             # True: begin at step 0 with a fresh optimizer (a foreign checkpoint)


@dataclass
class Config:
  """All options of one run. `validate` checks them; JSON in and out: `to_dict`, `from_dict`."""
  arm: str = "dense"              # name of the arm, a column of every record
  size: str = "base"              # name of the model size, a column of every record
  seeds: tuple[int, ...] = (0,)   # several seeds train as one vmapped program
  modules: tuple[str, ...] = ()   # what defines methods, tasks and controls outside of the package, by import name or
                                  # file: config.json names it by itself (nsa/origins.py)
  model: ModelConfig = field(default_factory=ModelConfig)
  attention: Any = field(default_factory=lambda: methods.get("dense")())  # a method's own dataclass
  layers: tuple[str, ...] = ()    # method of each layer: "attention" (the field above) or a method's name;
                                  # () = attention in all
  others: dict[str, Any] = field(default_factory=dict)  # options of the other methods in `layers`, by name;
                                                        # absent = their defaults
  schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  fork: ForkConfig = field(default_factory=ForkConfig)
  log_every: int = 10             # steps between metric records
  tensorboard: bool = False       # mirror metrics.jsonl for TensorBoard (extra `tb`)
  profile: tuple[int, ...] = ()   # (first, last) step to trace into workdir/profile
  implementation: str = ""        # of the attention operations; "" = the best one for the platform;
                                  # "fastest" lets last bits differ between runs
  one_pass: bool = True           # on a GPU in bfloat16, what stands between products in one pass over memory each
                                  # (pallas_kernels/fused.py): faster, always the same bits, but not those of False
  unroll: int = 0                 # layers per turn of the train step's loop over layers; 0 = measured
                                  # (step.layers_per_turn)
  peak_tflops: float = 0.0        # of one device, for MFU; 0 = looked up by device kind, absent if unknown

  def method_of(self, name: str) -> methods.Method:
    """The options of the method that `layers` calls `name`. Raises ValueError for an unknown method."""
    if name == "attention":
      return self.attention
    return self.others[name] if name in self.others else methods.get(name)()

  @property
  def methods(self) -> list[methods.Method]:
    """The different methods of all layers."""
    return [self.method_of(name) for name in dict.fromkeys(self.layers or ("attention",))]


def steps_of(schedule: ScheduleConfig) -> list[tuple[int, int]]:
  """First and one-past-last step of every stage. Boundaries are rounded, none is lost."""
  edges = [0]
  total = 0.0
  for stage in schedule.stages:
    total += stage.fraction
    edges.append(min(schedule.steps, math.floor(total * schedule.steps + 0.5)))
  edges[-1] = schedule.steps
  return list(zip(edges[:-1], edges[1:]))
