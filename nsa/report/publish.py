"""What of a study goes into a repository beside its report: the configs, without paths of the machine it ran on."""
from __future__ import annotations

import copy
from pathlib import PurePath
import re

from nsa.report.runs import Study


def description(study: Study) -> dict:
  """What was asked, the config of every arm (of its first run, with all seeds), and the software it ran with."""
  arms = {}
  for run in study.runs:
    if not run.config:
      continue
    name = run.arm if len(study.sizes) == 1 else f"{run.arm}-{run.size}"
    if name not in arms:
      arms[name] = copy.deepcopy(run.config)
      arms[name]["seeds"] = []
    arms[name]["seeds"] = sorted({*arms[name]["seeds"], *run.seeds})
  directories = {run.path.name: run.arm for run in study.runs}
  for config in arms.values():
    data, fork = config.get("data", {}), config.get("fork", {})
    for field in ("source", "tokenizer", "data_dir"):
      kind, colon, path = str(data.get(field, "")).rpartition(":")
      data[field] = kind + colon + PurePath(path).name
    if fork.get("workdir"):
      name = PurePath(fork["workdir"]).name
      fork["workdir"] = f"@{directories[name]}" if name in directories else name
  versions = []
  for run in study.runs:
    if run.versions and run.versions not in versions:
      versions.append(run.versions)
  return {"name": study.name, "question": study.question, "reference_arm": study.reference, "dense_arm": study.dense,
          "budgets": study.budgets, "primary": {"metric": study.primary, "margin": study.margin},
          "secondary": {"metric": study.secondary, "margin": study.secondary_margin},
          "runs": [{"run": run.name, "arm": run.arm, "size": run.size, "seeds": list(run.seeds), "status": run.status}
                   for run in study.runs], "arms": arms, "versions": versions}


def without_paths(study: Study, text: str) -> str:
  """`text` with the directories of the runs left out: an error message may name them."""
  places = {str(p) for run in study.runs for p in (run.path.parent, run.path.parent.resolve())}
  for place in sorted(places, key=len, reverse=True):
    text = re.sub(re.escape(place) + r"/?", "", text) if len(place) > 1 else text
  return text
