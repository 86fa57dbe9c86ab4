"""Evaluates a run's checkpoint and writes workdir/eval/<step>.json.

What differs in anything from the run's own evaluation (run modes, split, context, windows, ...) goes to a file of its
own, eval/<step>-<what differs>.json, which reports leave out.

    python -m launch.evaluate --workdir=runs/native
    python -m launch.evaluate --workdir=runs/native --step=400 --run_modes="sparse sparse:num_blocks=8"
    python -m launch.evaluate --workdir=runs/smollm2 --context=1024 --sequences=0 --decoded=4 \\
        --tasks="needle:digits=4 phonebook"
"""
from absl import flags
from etils import epath

from launch import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint; -1 for the newest.", lower_bound=-1)
_RUN_MODES = flags.DEFINE_string("run_modes", "",
                                 "Separated by spaces, e.g. 'dense sparse sparse:num_blocks=8'; empty: the run's own.")
_MODULES = flags.DEFINE_list("modules", [],
                             "Files or modules that define further controls or tasks, besides the run's own.")
_SPLIT = flags.DEFINE_string("split", "", "val, test or ood; empty: the run's own.")
_OPENED = flags.DEFINE_string("opened", "", "For the split that the run has sealed (eval.sealed): the published report "
                              "in which launch.report --open opened the run's tier.")
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens; 0: the run's own.", lower_bound=0)
_SEQUENCES = flags.DEFINE_integer("sequences", None,
                                  "Windows of text, -1 for all of the split; left out: the run's own.")
_TASKS = flags.DEFINE_string("tasks", "", "Recall tasks, separated by spaces, e.g. 'needle:digits=4 phonebook@2048'; "
                             "empty: the run's own.")
_EXAMPLES = flags.DEFINE_integer("task_examples", None, "Of each task; left out: the run's own.", lower_bound=1)
_DECODED = flags.DEFINE_integer("decoded", None, "Of so many of them answers are also decoded greedily, with the KV "
                                "cache; left out: the run's own.", lower_bound=0)
_RECALL = {"exact_match": "exact match", "far_exact_match": "of far answers", "greedy_exact_match": "decoded"}
flags.mark_flag_as_required("workdir")
cli.define_common()


def main():
  from nsa import capacity, config as config_lib, evaluate, processes, records, rundir
  config, params, step = evaluate.open_run(_WORKDIR.value, _STEP.value)
  config.modules = (*config.modules, *_MODULES.value)
  e = config.eval
  if _RUN_MODES.value:
    e.run_modes, e.more_modes = tuple(_RUN_MODES.value.split()), ()
  e.split, e.context = _SPLIT.value or e.split, _CONTEXT.value or e.context
  if e.split == e.sealed:
    _need_opened(config, _WORKDIR.value, _OPENED.value)
    e.sealed = ""
  e.tasks = tuple(_TASKS.value.split()) or e.tasks
  for name, flag in (("sequences", _SEQUENCES), ("task_examples", _EXAMPLES), ("decoded", _DECODED)):
    setattr(e, name, getattr(e, name) if flag.value is None else flag.value)
  if e.sequences >= 0 and (_SEQUENCES.value, _EXAMPLES.value) != (None, None):  # no rows that ask nothing
    e.batch = max(1, min(e.batch, max(e.sequences, e.task_examples if e.tasks or config.data.tasks else 0)))
  config_lib.validate(config)
  evaluate.refuse_absent(config, _RUN_MODES.value.split(), "--run_modes")
  cli.compilation_cache(flags.FLAGS.compilation_cache, programs=flags.FLAGS.keep_programs)
  mesh, params = evaluate.place_here(config, params)
  rundir.make_workdir(epath.Path(_WORKDIR.value))  # raises before anything is computed for it
  with capacity.told(config, "evaluating", evaluation=True):
    rows, path = evaluate.write(config, params, _WORKDIR.value, step, mesh)
  if not processes.first():
    return
  for run_mode in dict.fromkeys(row["run_mode"] for row in rows):
    for seed in config.seeds:
      of_kind = lambda kind: [r for r in rows if (r["kind"], r["run_mode"], r["seed"]) == (kind, run_mode, seed)]
      text, asked, layers = map(of_kind, ("language", "task", "layer"))
      parts = [f"{run_mode:24s} seed {seed}"]
      for name, unit in (("bits_per_byte", "bits/byte"), ("second_half_bits_per_byte", "in the second half")):
        if any(name in r for r in text):  # a method that chooses once per prompt is scored behind the prompt alone
          parts.append(f"{records.mean(text, name):.4f} {unit}")
      if asked:
        parts.append(f"{100 * records.mean(asked, 'exact_match'):.1f} % exact match")
      if any("tokens_visible" in r for r in layers):
        parts.append("{:.0f} of {:.0f} tokens per query".format(
            *(records.mean(layers, name) for name in ("tokens_visible", "tokens_causal"))))
      print("  ".join(parts))
      for name in dict.fromkeys(r["task"] for r in asked):
        mine = [r for r in asked if r["task"] == name]
        scored = [(what, [r[score] for r in mine if score in r]) for score, what in _RECALL.items()]
        print(f"  {name:24s}", ", ".join(f"{100 * sum(x) / len(x):.1f} % {what} ({len(x)} examples)"
                                         for what, x in scored if x))
  print(f"{len(rows)} records in {path}")


def _need_opened(config, workdir: str, report: str) -> None:
  """Raises ConfigError unless the sealed evaluation of the run was opened in that report, of the same experiment.
  Another plan, and what deviates from it, is told and not refused, as in reports."""
  from pathlib import Path

  from absl import logging

  from nsa import config as config_lib, metrics
  from nsa.report import archive, plan_file, reading
  study, key = archive.load([Path(report)]) if report else None, f"{config.arm}-{config.size}"
  if study is not None and key not in archive.shown(study):
    raise config_lib.ConfigError([("--opened", report, f"has not opened {key}; name the report that did (launch.report "
                                   "--open)")])
  if study is None:
    raise config_lib.ConfigError([("--split", config.eval.split, "is sealed (eval.sealed): the run evaluates it once, "
                                   "at its end. Once launch.report --open has opened the run's tier, name that report "
                                   "with --opened")])
  try:
    archive.same_arms(study, [reading.load_run(Path(workdir))], Path(workdir))
  except ValueError as error:
    other = str(error).partition(": not the same")[0]
    raise config_lib.ConfigError([("--opened", report, f"another experiment, {other}: name the report that opened "
                                   "this run's tier")]) from None
  remarks = [line for line in plan_file.deviations(study) or () if line.startswith(("plan.json", f"{key}:", f"{key}."))]
  mine = Path(workdir).absolute().parent.parent / "study.json"
  planned, opened = ((plan or {}).get("hash") for plan in (
      metrics.read_json(mine).get("plan") if mine.is_file() else study.plan, study.plan))
  if planned != opened:
    remarks.append(f"was opened by the plan {opened}, {mine} has the plan {planned}.")
  for remark in remarks:
    logging.warning("--opened = %s: %s", report, remark)


if __name__ == "__main__":
  cli.run(main)
