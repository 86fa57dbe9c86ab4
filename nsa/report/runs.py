"""A run and a study as a report sees them: what was asked of them, and what became of it."""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass
class Run:
  """One run directory. `curves[seed][name]` is float64[logged steps], NaN where a line had no value."""
  path: Path
  arm: str
  size: str
  seeds: tuple[int, ...]
  config: dict[str, Any]
  versions: dict[str, Any]
  curves: dict[int, dict[str, np.ndarray]]
  records: list[dict]              # of the last evaluation
  eval_step: int | None
  status: str                      # done | failed | unfinished | pending
  error: str = ""
  problems: list[str] = dataclasses.field(default_factory=list)
  # records of layers by step, of all evaluations
  layers: dict[int, list[dict]] = dataclasses.field(default_factory=dict)
  text: dict[int, list[dict]] = dataclasses.field(default_factory=dict)    # records of held-out text, likewise
  tasks: dict[int, list[dict]] = dataclasses.field(default_factory=dict)   # records of tasks, likewise
  paused: dict[str, float] = dataclasses.field(default_factory=dict)       # seconds of what was not training, by label
  # what the last evaluation asked (nsa/held_out.py)
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  hidden: dict[int, list[dict]] = dataclasses.field(default_factory=dict)  # snapshots by step (records.HIDDEN_STATES)
  sealed: dict[str, Any] = dataclasses.field(default_factory=dict)         # eval/<step>-sealed.json, as it lies there

  @property
  def name(self) -> str:
    return self.path.name

  @property
  def stages(self) -> list[dict]:
    return self.config.get("schedule", {}).get("stages", []) if self.config else []

  @property
  def headline_mode(self) -> str:
    """How the arm's own number is taken: dense where it ends dense, else sparse."""
    return "dense" if self.stages and self.stages[-1].get("mode") == "dense" else "sparse"

  def mode_at(self, step: int) -> str:
    """How its number is taken after so many steps: of an arm that ends dense, as it attended until then."""
    curve = next((c for c in self.curves.values() if np.isfinite(c["stage"]).any()), None)
    if self.headline_mode == "sparse" or curve is None:
      return self.headline_mode
    stage = int(curve["stage"][max(0, int(np.searchsorted(curve["step"], step, "right")) - 1)])
    return "sparse" if self.stages[stage].get("mode") in ("sparse", "mixed") else "dense"

  @functools.cached_property
  def split(self) -> str:
    """The split whose windows count: val where there is one."""
    splits = {r.get("split", "val") for r in self.records if r["kind"] == "language"}
    return "val" if not splits or "val" in splits else sorted(splits)[0]

  @property
  def first(self) -> int:
    """The step that the run's own training begins at: where it forks, or 0."""
    fork = self.config.get("fork", {}) if self.config else {}
    return max(0, int(fork.get("step", 0))) if fork.get("workdir") and not fork.get("reset") else 0

  @property
  def message(self) -> str:
    """Its error in one line."""
    text = self.error
    return (text.strip().splitlines() or ["no message"])[-1 if text.startswith("Traceback") else 0][:300]

  @property
  def diverged(self) -> list[int]:
    """Seeds whose loss was finite once and was not at the last logged step: they have no line in results.csv."""
    losses = {s: np.isfinite(c["loss"]) for s, c in self.curves.items()}
    return [s for s, finite in losses.items() if finite.any() and not finite[-1]]


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """What arms are judged by: a metric of endpoints.py, its equivalence margin in the metric's unit, and its role."""
  metric: str
  margin: float
  primary: bool = True


@dataclasses.dataclass
class Study:
  """The runs of one report, and what was asked of them before they started."""
  name: str
  runs: list[Run]
  declared: bool = False           # whether a study.json says what to compare
  question: str = ""
  arms: list[str] = dataclasses.field(default_factory=list)   # in their order
  sizes: list[str] = dataclasses.field(default_factory=list)
  endpoints: list[Endpoint] = dataclasses.field(default_factory=lambda: [Endpoint("second_half_bits_per_byte", 0.005),
                                                                         Endpoint("exact_match", 0.02)])
  quantities: tuple[str, ...] = ("R", "A", "Delta")           # the declared family of tests, of each endpoint
  alpha: float = 0.05                                         # shared by the families of the primary endpoints
  reference: str = ""
  dense: str = "dense"
  budgets: dict[str, float] = dataclasses.field(default_factory=dict)
  # arm -> the dense arm with its tokens and rates
  controls: dict[str, str] = dataclasses.field(default_factory=dict)
  # arm -> its decay branches, shorter runs of the same
  branches: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  # recall is a mean over the tasks of which the dense arm answers so much; 0 = over all
  solved: float = 0.0
  sections: tuple[str, ...] = ()   # further sections that the study asks for (sections.py: FURTHER)
  # "arm-size" -> tokens per second of the arm alone on its device; None = as the runs logged it
  speeds: dict[str, float] | None = None
  plan: dict | None = None         # what was planned before the data (plan_file.py)
  # rows of the shortcut audit (nsa.tasks), as study.json has them
  audit: list[dict] = dataclasses.field(default_factory=list)
  # tiers of the plan whose sealed evaluations are reported; "" = of all runs, where the plan has no tiers
  opened: tuple[str, ...] = ()
  autotune: dict[str, bytes] = dataclasses.field(default_factory=dict)  # nsa.autotune.read
  notes: str = ""                  # NOTES.md beside study.json: what people have to say of it
  problems: list[str] = dataclasses.field(default_factory=list)

  @property
  def primary(self) -> str:
    """The metric that figures show: the first primary endpoint."""
    return next((e.metric for e in self.endpoints if e.primary), self.endpoints[0].metric)

  @property
  def asked(self) -> tuple[str, ...]:
    """The quantities that there can be: R alone where no arm is native."""
    return ("R",) if self.reference == self.dense else ("R", "A", "Delta")

  @property
  def finished(self) -> list[Run]:
    return [r for r in self.runs if r.status == "done"]

  def arm_runs(self, arm: str, size: str | None = None) -> list[Run]:
    return [r for r in self.runs if r.arm == arm and size in (None, r.size)]

  def tiers(self) -> dict[str, set[tuple[str, int]]]:
    """The runs of each tier of the plan, {(arm-size, seed)}; under "" all runs, where the plan has no tiers."""
    plan = self.plan or {}
    if not plan.get("tiers"):
      return {"": {(f"{run.arm}-{run.size}", seed) for run in self.runs for seed in run.seeds}}
    return {tier: {(key, seed) for key in keys for seed in plan["seeds"][key]} for tier, keys in plan["tiers"].items()}

  def headline_mode(self, arm: str) -> str:
    runs = [r for r in self.arm_runs(arm) if r.config]
    return runs[0].headline_mode if runs else "dense" if arm in (self.dense, *self.controls.values()) else "sparse"

  def label(self, arm: str, run_mode: str) -> str:
    """The name in tables: the arm, or "arm -> run mode" where that is not its own."""
    return arm if run_mode == self.headline_mode(arm) else f"{arm} -> {run_mode}"

  def at(self, size: str) -> str:
    """" (size S)" where there are several, for the end of a sentence."""
    return f" (size {size})" if len(self.sizes) > 1 else ""

  def retrofits(self) -> list[str]:
    """The arms that are compared with their dense control: those with a budget, smallest budget first."""
    budgeted = sorted((a for a in self.arms if a in self.budgets), key=self.budgets.get)
    named = [a for a in self.arms if a.startswith("retrofit") and a not in budgeted]
    others = [a for a in self.arms if a not in (self.reference, self.dense, *self.controls.values())]
    return budgeted + named or others

  def control(self, arm: str) -> str:
    """The dense arm that a retrofit has to reach: the trunk, or a dense continuation with the retrofit's tokens."""
    return self.controls.get(arm, self.dense)
