"""Looks at hidden states: is what a model has seen often denser, and what is hard sparser, than noise and other text?

    python -m launch.look --workdir=runs/main --hidden_states --size=M            # a study: its arms side by side
    python -m launch.look --workdir=runs/main/runs/dense-M-s1 --hidden_states     # one run
    python -m launch.look --workdir=runs/smollm2 --hidden_states --passages=4     # an imported model: measured now

Reads hidden/<step>.json of the runs (eval.hidden_states writes them in training) and writes hidden_states.md and its
plots. A single run that has none, or --step, is measured at a checkpoint first; what it was trained with decides which
text there is. nsa/look/familiarity.py says what is judged, and how.
"""
from pathlib import Path

from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Study, published study, or run directory.")
_HIDDEN = flags.DEFINE_bool("hidden_states", False, "What to look at; there is nothing else yet.")
_OUT = flags.DEFINE_string("out", "", "Directory of the report; empty: hidden_report/ inside the workdir.")
_SIZE = flags.DEFINE_string("size", "", "Of a study with several; empty: the first that has snapshots.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a single run to measure now; -1 for the newest.",
                             lower_bound=-1)
_PASSAGES = flags.DEFINE_integer("passages", 12, "Of each corpus and kind of text, where a checkpoint is measured now.",
                                 lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 0, "Of a passage measured now; 0: 2,048, or the context.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", 0, "Passages per device call; 0: the run's eval.batch.", lower_bound=0)
flags.mark_flags_as_required(["workdir"])
cli.define_common()


def main():
  from nsa.look import hidden_report
  from nsa.report import archive
  if not _HIDDEN.value:
    raise ValueError("name what to look at: --hidden_states")
  workdir = Path(_WORKDIR.value)
  single = (workdir / "config.json").exists()
  if single and (_STEP.value is not None or not list(workdir.glob("hidden/*.json"))):
    _measure(workdir)
  study = archive.load([workdir])
  runs = [run for run in study.runs if run.hidden]
  size = _SIZE.value or next((run.size for run in runs), "")
  arms = {arm: [snapshot for run in runs if (run.arm, run.size) == (arm, size) for found in run.hidden.values()
                for snapshot in found] for arm in study.arms}
  planned = [config["arm"] for config in (study.plan or {}).get("configs", {}).values()
             if config.get("size") == size and config.get("eval", {}).get("hidden_states")]
  path = hidden_report.write(arms, Path(_OUT.value) if _OUT.value else workdir / "hidden_report", study.dense, planned)
  print(path)


def _measure(workdir):
  from nsa import evaluate
  from nsa.look import snapshots
  config, params, step = evaluate.open_run(workdir, -1 if _STEP.value is None else _STEP.value)
  if snapshots.path_of(workdir, step).exists():
    raise ValueError(f"--step={step}: {snapshots.path_of(workdir, step)} is there already; leave --step out to report "
                     "it")
  config.eval.batch = _BATCH.value or config.eval.batch
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  mesh, params = evaluate.place_here(config, params)
  snapshots.write(config, params, workdir, step, mesh=mesh, passages=_PASSAGES.value, tokens=_TOKENS.value)


if __name__ == "__main__":
  cli.run(main)
