"""What the paths that a report is asked for hold, together: a study, what was published of it before, single runs."""
from __future__ import annotations

from pathlib import Path

from nsa.report import comparable, published, runs


def load(paths: list[Path]) -> runs.Study:
  """One study and what was published of it before, or the given runs side by side.

  A run that the study has not finished is taken from the first published directory that has it finished, from one with
  records rather than numbers alone. Raises ValueError for a path that is none of these, for published directories of
  another experiment, and for single runs beside them that are of another one or in the study already.
  """
  paths = [Path(p) for p in paths]
  if not paths:
    raise ValueError("paths = []: give at least one run directory or one study directory")
  plans = [(p, runs.read_plan(p)) for p in paths if (p / "study.json").is_file()]
  plans.sort(key=lambda one: published.is_published(one[1]))  # the live one first
  studies = [p for p, _ in plans]
  live = [str(p) for p, plan in plans if not published.is_published(plan)]
  if len(live) > 1:
    raise ValueError(f"paths = {live}: one report holds one study; give one each time, with what was published of it")
  singles = []
  for path in paths:
    if path in studies:
      continue
    if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
      hint = "it does not exist" if not path.exists() else "it has neither"
      raise ValueError(f"{path}: {hint}; expected a run directory (config.json, metrics.jsonl) "
                       "or a study directory (study.json)")
    singles.append(runs.load_run(path))
  study = runs.Study(singles[0].name if len(singles) == 1 else f"{len(singles)} runs", runs=[])
  for i, (path, plan) in enumerate(plans):
    one = published.load(path, plan) if published.is_published(plan) else runs.load_study(path, plan)
    study = published.merge(study, one, path) if i else one
  for run in singles if studies else ():
    if run.name in [other.name for other in study.runs]:
      raise ValueError(f"{run.path}: the study has a run of that name; leave it out, or rename it")
    if any(published.is_published(plan) for _, plan in plans):
      published.same_arms(study, [run], run.path)
  study.runs += singles
  notes = (studies + paths)[0] / "NOTES.md"
  study.notes = notes.read_text() if notes.is_file() else ""
  for run in study.runs:
    for arm in [run.arm] + sorted({str(r.get("arm", run.arm)) for r in run.records} | {r.arm for r in run.rows or ()}):
      study.arms += [arm] if arm not in study.arms else []
    study.sizes += [run.size] if run.size not in study.sizes else []
    study.problems += [f"`{run.name}`: {p}" for p in run.problems]
    for seed in run.diverged:
      why = "has no line in the published results.csv" if run.rows else "diverged (its last loss is not finite)"
      study.problems.append(f"`{run.name}`: seed {seed} {why}, left out")
  study.problems += comparable.problems(study)
  return study
