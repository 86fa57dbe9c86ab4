"""Runs a study in peace and under random kills and damage, and compares every run bit by bit.

    python -m benchmarks.soak --workdir=runs/soak
    python -m benchmarks.soak --workdir=runs/soak --study=experiments/soak.py:seeds=1 --seed=7

Writes WORKDIR/runs.csv (one row per run: what was done to it, and what agrees), WORKDIR/events.csv (what was done when)
and WORKDIR/summary.txt. A finished undisturbed study (WORKDIR/calm) is used again. Exits with 0 if all agree, with 1 if
not.
"""
import collections
import csv
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

from absl import flags

from launch import cli

_STUDY = flags.DEFINE_string("study", "experiments/soak.py", "Experiment file of a study, with its arguments.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of both studies.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the kills and damages; their moments also depend on the machine.")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "Mean time between the first sign of progress and a kill.")
_EARLY = flags.DEFINE_float("early", 0.15,
                            "Share of kills that do not wait for progress: imports, restore, compilation.")
_DAMAGE = flags.DEFINE_float("damage", 0.3, "Share of kills after which the newest checkpoint is damaged.")
flags.mark_flag_as_required("workdir")
cli.define_common()

DAMAGES = ("truncated", "missing", "garbage")
TIMING = {"tokens_per_second", "mfu", "seconds"}
ENDS = {0: "done", cli.PREEMPTED: "saved", -signal.SIGTERM: "died of SIGTERM", -signal.SIGKILL: "died of SIGKILL"}


def study(directory: Path, log) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, "-m", "launch.study", f"--config={_STUDY.value}", f"--workdir={directory}",
       f"--compilation_cache={flags.FLAGS.compilation_cache}"], stdout=log, stderr=subprocess.STDOUT)


def under_way(directory: Path) -> Path | None:
  """The run that was written to last and is not done."""
  records = [p for p in directory.glob("runs/*/metrics.jsonl") if not (p.parent / "DONE").exists()]
  return max(records, key=lambda p: p.stat().st_mtime).parent if records else None


def damage(checkpoint: Path, kind: str, rng: random.Random) -> str:
  """Spoils one file of a checkpoint; returns its name."""
  path = rng.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size))
  if kind == "missing":
    path.unlink()
  elif kind == "truncated":
    path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])
  else:
    path.write_bytes(rng.randbytes(path.stat().st_size))
  return str(path.relative_to(checkpoint))


def disturb(directory: Path, rng: random.Random, log) -> list[dict]:
  """Runs the study to its end through kills; returns what was done. Raises RuntimeError if it ends in any other way."""
  events, began = [], time.monotonic()
  while True:
    process = study(directory, log)
    seen, size = time.monotonic(), lambda: sum(p.stat().st_size for p in directory.glob("runs/*/metrics.jsonl"))
    before, early = size(), rng.random() < _EARLY.value
    wait = rng.uniform(0, 15) if early else rng.expovariate(1 / _SECONDS.value)
    while process.poll() is None and (not early and size() == before):
      time.sleep(0.01)
      seen = time.monotonic()
    while process.poll() is None and time.monotonic() - seen < wait:
      time.sleep(0.01)
    number = rng.choice((signal.SIGTERM, signal.SIGKILL))
    process.send_signal(number)  # nothing, if it has ended
    code = process.wait()
    if code not in ENDS:
      raise RuntimeError(f"the study ended with {code} after {number.name}: see the end of {log.name}")
    if code == 0:
      return events
    run = under_way(directory)
    event = {"second": round(time.monotonic() - began, 1), "signal": number.name, "end": ENDS[code],
             "run": run.name if run else "", "damage": "", "step": "", "file": ""}
    steps = sorted(int(p.name) for p in run.glob("checkpoints/*") if p.name.isdecimal()) if run else []
    if len(steps) > 1 and rng.random() < _DAMAGE.value:  # of the only one, somebody has to take care
      event["damage"], event["step"] = rng.choice(DAMAGES), steps[-1]
      event["file"] = damage(run / f"checkpoints/{steps[-1]}", event["damage"], rng)
    events.append(event)
    print(" ".join(str(value) for value in event.values() if value != ""), flush=True)


def agreement(calm: Path, cut: Path) -> dict[str, bool]:
  """What of two run directories is the same, bit by bit."""
  import numpy as np

  from nsa import checkpoint, metrics

  def leaves(tree, path=""):
    if not isinstance(tree, dict):
      return {path: (tree.dtype, tree.shape, np.asarray(tree).tobytes())}
    return {name: leaf for key, value in tree.items() for name, leaf in leaves(value, f"{path}/{key}").items()}

  one, two = (checkpoint.load_params(path, subtree="") for path in (calm, cut))
  out = {part: leaves(one[part]) == leaves(two[part]) for part in ("step", "params", "optimizer")}
  records = lambda path: [{k: v for k, v in row.items() if k not in TIMING}
                          for row in metrics.read_jsonl(path / "metrics.jsonl", dedupe=())]
  out["metrics"] = records(calm) == records(cut)
  evaluations = lambda path: {p.name: p.read_bytes() for p in path.glob("eval/*.json")}
  out["eval"] = evaluations(calm) == evaluations(cut) and bool(evaluations(calm))
  return out


def write_csv(path: Path, rows: list[dict]) -> None:
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def main():
  work = Path(_WORKDIR.value)
  if (work / "cut").exists():
    raise ValueError(f"--workdir={work}: has been soaked already; take a new one, or remove {work / 'cut'}")
  work.mkdir(parents=True, exist_ok=True)
  rng, began = random.Random(_SEED.value), time.monotonic()
  with open(work / "log.txt", "w") as log:
    undisturbed = not (work / "calm").exists()
    if code := study(work / "calm", log).wait():
      raise RuntimeError(f"the undisturbed study ended with {code}: see {log.name}")
    calm_seconds = time.monotonic() - began
    events = disturb(work / "cut", rng, log)
  rows = []
  for run in sorted(p.parent.name for p in (work / "calm").glob("runs/*/DONE")):
    mine = [event for event in events if event["run"] == run]
    done = collections.Counter(event[what] for event in mine for what in ("signal", "damage"))
    rows.append({"run": run, **{name: done[name] for name in ("SIGTERM", "SIGKILL", *DAMAGES)},
                 **{f"same_{part}": same
                    for part, same in agreement(work / "calm/runs" / run, work / "cut/runs" / run).items()}})
  write_csv(work / "runs.csv", rows)
  write_csv(work / "events.csv", events)
  equal = sum(all(value for name, value in row.items() if name.startswith("same_")) for row in rows)
  ends = collections.Counter(f"{event['signal']}, {event['end']}" for event in events)
  spoiled = collections.Counter(event["damage"] for event in events if event["damage"])
  text = (f"{equal} of {len(rows)} runs are bit by bit those of the undisturbed study: step, parameters, optimizer, "
          f"records, evaluations.\n{len(events)} kills "
          f"({', '.join(f'{n} {what}' for what, n in sorted(ends.items()))}), "
          f"{sum(bool(row['SIGTERM'] + row['SIGKILL']) for row in rows)} runs cut at least "
          f"once.\n{sum(spoiled.values())} newest checkpoints damaged "
          f"({', '.join(f'{n} {what}' for what, n in sorted(spoiled.items()))}).\n"
          f"{f'{calm_seconds:.0f} s undisturbed, ' * undisturbed}"
          f"{time.monotonic() - began - calm_seconds:.0f} s with kills. "
          f"--study={_STUDY.value} --seed={_SEED.value}\n")
  (work / "summary.txt").write_text(text)
  print(text, end="")
  return 0 if equal == len(rows) else 1


if __name__ == "__main__":
  cli.run(main)
