"""Study directories with planted truths: does the report say what is true, and how often does it say what is not?

    python -m benchmarks.planted --studies=500 --out=experiments/results/planted.csv

Every study is written in the format of real ones (study.json, configs, metrics, records made by nsa.records) and read
back by nsa.report. A truth fixes what every arm and control scores; noise of seeds, documents and items is drawn anew
for each study. A word is false if it contradicts the truth: "matches" where the true difference is at the margin or
beyond, "worse" or "better" where it is 0 or of the other sign. All primary comparisons of a study are looked at
together: one false word makes it false.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
from pathlib import Path
import tempfile

import numpy as np

from nsa import config as config_lib, records

ARMS = {  # arm -> (bits/byte minus native, exact match minus native, share of tokens after dense)
    "dense": (0.004, 0.0, None),
    "native_msa": (0.0, 0.0, None),
    "retrofit_msa_1": (0.034, -0.12, 0.01),
    "retrofit_msa_5": (0.016, -0.06, 0.05),
    "retrofit_msa_25": (0.004, 0.0, 0.25),
}
MODES = {"dense": ("dense", "oracle", "block_topk", "random", "sink_window"),
         None: ("dense", "sparse", "oracle", "random")}
# What a run mode costs: (bits/byte, exact match).
COSTS = {"dense": (0.0, 0.0), "sparse": (0.0, 0.0), "oracle": (0.002, 0.0), "block_topk": (0.03, -0.4),
         "random": (0.30, -0.65),
         "sink_window": (0.05, -0.6)}
_DEFAULTS = json.dumps(config_lib.to_dict(config_lib.Config()))
TASKS = ("mqar", "needle:keys=4", "copy")
LEVEL, EASE = 2.1, 0.975


def write_study(root: Path, arms=ARMS, seeds=(0, 1, 2), sizes=("tiny",), noise=0.0015, together=True, costs=None,
                of_arm=None, draw=0, shared=0.01, match_noise=0.003, items=2048, rich=True) -> Path:
  """A study directory in which arm a is `arms[a][0]` bits per byte worse than native, plus noise.

  together: all seeds of an arm in one run directory, as one vmapped program writes them. costs: of run modes, over
  COSTS.
  of_arm: {(arm, run mode): (bits/byte, exact match)} to add to one arm's. draw: seed of all noise. shared: SD of what
  all arms of a seed have in common; noise, match_noise: SD of each run's own bits per byte and exact match. rich: with
  curves, layers, positions, maps of blocks and an evaluation on the way, for reports; without, endpoints alone.
  """
  rng = np.random.default_rng(draw)
  truth = _Truth({**COSTS, **(costs or {})}, of_arm or {}, shared * np.random.default_rng((draw, 1)).normal(size=100),
                 noise, match_noise, items, rich)
  jobs = []
  for size_index, size in enumerate(sizes):
    for arm, (delta, exact, budget) in arms.items():
      for group in ([tuple(seeds)] if together else [(s,) for s in seeds]):
        name = f"runs/{arm}-{size}-{'_'.join(map(str, group))}"
        _write_run(root / name, arm, size, group, delta, exact, budget, rng, LEVEL - 0.2 * size_index, truth)
        jobs.append({"run": name, "arm": arm, "size": size, "seeds": list(group), "status": "done"})
  plan = {"name": "native against retrofit", "question": "Can a retrofit match native sparse attention?",
          "arms": list(arms), "endpoints": [{"metric": "second_half_bits_per_byte", "margin": 0.005, "primary": True},
                                            {"metric": "exact_match", "margin": 0.02, "primary": True}],
          "reference_arm": "native_msa", "dense_arm": "dense",
          "budgets": {a: b for a, (_, _, b) in arms.items() if b}, "jobs": jobs}
  (root / "study.json").write_text(json.dumps(plan))
  return root


@dataclasses.dataclass
class _Truth:
  costs: dict
  of_arm: dict
  shared: np.ndarray
  noise: float
  match_noise: float
  items: int
  rich: bool


def _write_run(path, arm, size, seeds, delta, exact, budget, rng, level, truth):
  """One finished run directory."""
  (path / "eval").mkdir(parents=True)
  config = json.loads(_DEFAULTS) | {"arm": arm, "size": size, "seeds": list(seeds)}
  if arm != "dense":
    config["attention"] = {"method": "msa", "block_size": 32, "num_blocks": 8}
    config["schedule"]["stages"] = [dataclasses.asdict(config_lib.Stage(fraction=1 - (budget or 1))),
                                    dataclasses.asdict(config_lib.Stage(fraction=budget or 1, mode="sparse"))]
  config["data"] |= {"source": f"files:{path.parent}/corpus.tar.xz", "context": 2048, "global_batch": 4}
  config["schedule"]["steps"], config["model"]["dtype"] = 1000, "bfloat16"
  if budget:
    trunk = path.parent / f"dense-{size}-{'_'.join(map(str, seeds))}"
    config["fork"] |= {"workdir": str(trunk), "step": round(1000 * (1 - budget))}
  (path / "config.json").write_text(json.dumps(config))
  (path / "versions.json").write_text(json.dumps({"jax": "0.10.2", "python": "3.11.9"}))
  steps, last = 60 if truth.rich else 1, 1000
  first = 0 if not budget else 1 - budget
  lines = []
  for i in range(steps + 1):
    step = round(last * (first + (1 - first) * i / steps)) or 1
    for seed in seeds:
      loss = 1.45 * level / 2 + 3.5 * (step + 12) ** -0.45 + delta + rng.normal(0, 0.012)
      lines.append({"step": step, "seed": seed, "stage": int(bool(budget) and i > 0), "mode": "sparse",
                    "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": step * 8192,
                    "flops": step * 8192 * (6.2e6 if arm != "dense" else 7.4e6),
                    "tokens_per_second": 21000 + rng.normal(0, 300), "seconds": step * 0.4})
  (path / "metrics.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
  write = lambda step, rows: (path / "eval" / f"{step}.json").write_text(
      json.dumps({"step": step, "arm": arm, "size": size, "records": rows}))
  write(last, [r for seed in seeds for r in _records(arm, size, seed, last, delta, exact, rng, level, truth)])
  if truth.rich:
    middle = round(last * (first + 1) / 2)  # on the way: fewer modes and kinds
    write(middle, [r for seed in seeds for r in _records(arm, size, seed, middle, delta, exact, rng, level, truth)
                   if r["run_mode"] in ("sparse", "block_topk") and r["kind"] == "layer" or r["kind"] == "language"])
  (path / "DONE").write_text(json.dumps({"step": last, "seconds_paused": {"compile": 60.0, "evaluate": 6.0}}))


def _records(arm, size, seed, step, delta, exact, rng, level, truth):
  own, own_match = rng.normal(0, truth.noise), rng.normal(0, truth.match_noise)
  modes = MODES.get(arm, MODES[None])
  for mode in modes if truth.rich or arm == "dense" else ("sparse", "oracle"):
    common = {"seed": seed, "arm": arm, "size": size, "step": step, "run_mode": mode}
    make = lambda kind, **fields: {**records.make(kind, **fields), **common}
    text, match = (a + b for a, b in zip(truth.costs[mode], truth.of_arm.get((arm, mode), (0.0, 0.0))))
    value = level + truth.shared[seed] + delta + own + text  # what is shared, pairing removes
    for k, document in enumerate(
        ("emma", "dracula", "walden", "origin", "ulysses", "middlemarch")[:6 if truth.rich else 2]):
      x = value + 0.04 * math.sin(7 * k) + rng.normal(0, truth.noise / 3)
      yield make("language", split="val", document=document, start=0, bits_per_byte=x + 0.05, bytes=2048,
                 second_half_bits_per_byte=x, second_half_bytes=1024)
    for task in TASKS if truth.rich else TASKS[:1]:
      p = min(1.0, max(0.0, EASE + exact + match + own_match))
      items = 40 if truth.rich else truth.items
      right = int(rng.binomial(items, p))
      for index in range(items if truth.rich else 1):  # single items, or what they come to
        share = float(index < right) if truth.rich else right / items
        yield make("task", task=task, index=index, exact_match=share, answer_nll=0.2 + 4 * (1 - p), depth=index / 40,
                   evidence_distance=int(2 ** rng.uniform(5, 11)), items=1 if truth.rich else items)
    if not truth.rich:
      continue
    for end in (64, 256, 1024, 2048):
      share_right = max(0.0, p - 0.02 * math.log2(end / 64))
      yield make("answer", task=TASKS[0], start=end // 4, end=end, forced=end == 64, answers=160,
                 exact_match=share_right, answer_nll=1 - share_right)
      yield make("ar_hit", start=end // 4, end=end, nll=2.5 + 10 * delta * math.log2(end / 32) + rng.normal(0, 0.02),
                 hits=300)
      yield make("context_gain", context=end, bits_per_byte=value + 0.5 * (end / 64) ** -0.6, bytes=4000)
    for start, end in ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)):
      yield make("position", start=start, end=end, bytes=(end - start) * 6,
                 bits_per_byte=value + 0.9 * (end / 64) ** -0.7 + delta * math.log2(end / 128) / 4
                 + rng.normal(0, 0.004))
    for layer in range(4):
      oracle = 0.93 - 0.05 * layer
      captured = {"dense": None, "oracle": oracle}.get(mode, oracle * (0.9 - 2 * max(0, delta)))
      yield make("layer", layer=layer, captured_mass=captured, oracle_mass=oracle, block_recall=0.7, score_recall=None,
                 entropy=2.0, overlap=0.55 + 0.08 * layer - delta + rng.normal(0, 0.01), tile_union=3.0 + 2 * layer,
                 tile_common=0.8, queries_limited=0.86)
    if mode == "sparse":
      n = 32
      heat = [[min(1.0, (i == j) + (j == 0) * 0.6 + 0.9 * math.exp(-0.5 * (i - j)) + 0.35 * rng.random() ** 4)
               if j <= i else 0.0 for j in range(n)] for i in range(n)]
      yield make("heat", layer=1, kv_head=0, document="emma", heat=heat)


# --- truths -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """One planted truth: dense minus native and each retrofit minus dense, as (bits/byte, exact match); what is special
  about it."""
  about: str
  dense: tuple[float, float] = (0.0, 0.0)
  retrofits: tuple[tuple[float, float], ...] = ((0.0, 0.0),) * 3  # of 5, 25 and 50 % of the tokens
  costs: dict = dataclasses.field(default_factory=dict)
  of_arm: dict = dataclasses.field(default_factory=dict)
  refused: tuple[str, ...] = ()           # endpoints that must not be admitted
  noise: float = 0.001
  match_noise: float = 0.003


TEXT, MATCH = "second_half_bits_per_byte", "exact_match"
BUDGETS = {"retrofit_msa_5": 0.05, "retrofit_msa_25": 0.25, "retrofit_msa_50": 0.5}
CASES = {
    "equal": Case("no arm differs: R = A = 0"),
    "native ahead": Case("native ahead of dense by 0.02 bits/byte and 3.5 points; a small retrofit behind dense, "
                         "larger ones level with it",
                         (0.02, -0.035), ((0.02, -0.08), (0.0, 0.0), (0.0, 0.0))),
    "dense ahead": Case("native behind dense by 0.02 bits/byte and 6 points; retrofits level with dense",
                        (-0.02, 0.06)),
    "on the margin": Case("A and every R exactly at the margin: no match is true", (0.005, -0.02),
                          ((0.005, -0.02),) * 3),
    "noisy": Case("no arm differs, and the seeds scatter by ten times as much", noise=0.01, match_noise=0.03),
    "selector failure": Case("retrofits of 5 and 25 % lose 40 and 20 points by their own blocks, none by the oracle's",
                             (0.0, 0.0), ((0.0, -0.4), (0.0, -0.2), (0.0, 0.0)),
                             of_arm={("retrofit_msa_5", "oracle"): (0.0, 0.4),
                                     ("retrofit_msa_25", "oracle"): (0.0, 0.2)}),
    "block-0 shortcut": Case("sink + window answers the recall tasks", (0.02, 0.0),
                             costs={"sink_window": (0.05, 0.0)}, refused=(MATCH,)),
    "useless text": Case("sink + window loses 0.008 bits/byte of text", (0.0, -0.035),
                         costs={"sink_window": (0.008, -0.6)}, refused=(TEXT,)),
    "neither": Case("both of the last two", (0.02, -0.035), costs={"sink_window": (0.008, 0.0)}, refused=(TEXT, MATCH)),
}


def write_case(root: Path, case: Case, draw: int, seeds: int = 6) -> Path:
  """One study of a truth, endpoints alone."""
  arms = {"dense": (*case.dense, None), "native_msa": (0.0, 0.0, None)}
  arms |= {arm: (case.dense[0] + r[0], case.dense[1] + r[1], b) for (arm, b), r in zip(BUDGETS.items(), case.retrofits)}
  ease = 0.992 - EASE - max(arm[1] for arm in arms.values())  # the best arm is that good: the truth is not cut at 1
  arms = {arm: (text, exact + ease, b) for arm, (text, exact, b) in arms.items()}
  return write_study(root, arms, tuple(range(seeds)), noise=case.noise, match_noise=case.match_noise, costs=case.costs,
                     of_arm=case.of_arm, draw=draw, rich=False)


def truths(case: Case) -> dict[tuple[str, str, str], float]:
  """{(quantity, arm, metric): the true difference}."""
  out = {}
  for i, metric in enumerate((TEXT, MATCH)):
    out["A", "dense", metric] = case.dense[i]
    for arm, r in zip(BUDGETS, case.retrofits):
      out["R", arm, metric], out["Delta", arm, metric] = r[i], r[i] + case.dense[i]
  return out


def words_of(case: Case, root: Path) -> dict:
  """What the report says of one study: words with their truth, and which endpoints it admitted."""
  from nsa.report import analyses, archive, endpoints, verdict
  study = archive.load([root])
  table = endpoints.rows(study)
  found = verdict.verdict(study, table)
  true, margins = truths(case), {TEXT: 0.005, MATCH: 0.02}
  right = false = claims = undecided = 0
  for c in found.comparisons:
    if not c.family:
      continue
    truth = true[c.quantity, c.arm, c.endpoint.metric] * (1 if c.endpoint.metric == TEXT else -1)  # above 0 is worse
    margin = margins[c.endpoint.metric]
    claims += c.word in ("matches", "worse", "better")
    undecided += c.word == "undecided"
    false += (c.word == "matches" and abs(truth) >= margin - 1e-12) or (c.word == "worse" and truth <= 1e-12) or (
        c.word == "better" and truth >= -1e-12)
    expected = ("matches" if abs(truth) < margin / 2 else "worse" if truth > 1.5 * margin
                else "better" if truth < -1.5 * margin else None)
    right += c.admitted and c.word == expected
  refused = tuple(m for m in (TEXT, MATCH) if not found.admissions[m, "tiny"].admitted)
  said = " ".join([found.headline, *found.lines])
  parts = analyses.errors(study, table, MATCH, "tiny")["retrofit_msa_5"]
  return {"right": right, "false": false, "claims": claims, "undecided": undecided, "refused": refused, "said": said,
          "selector": float(np.mean(list(parts["selector error"].values()))),
          "backbone": float(np.mean(list(parts["backbone error"].values())))}


def run(name: str, studies: int, first: int = 0) -> dict:
  """The summary of `studies` studies of one truth."""
  case, found = CASES[name], []
  for draw in range(first, first + studies):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
      found.append(words_of(case, write_case(Path(folder), case, draw)))
  share = lambda test: sum(map(test, found)) / studies
  expected = sum(m not in case.refused and (abs(t) < 0.5 * s or abs(t) > 1.5 * s)
                 for (_, _, m), t in truths(case).items()
                 for s in [0.005 if m == TEXT else 0.02])
  mean = lambda key: float(np.mean([one[key] for one in found]))
  return {"truth": name, "about": case.about, "studies": studies,
          "refused as it must be": share(lambda o: o["refused"] == case.refused),
          "words to get right per study": expected,
          "words right": mean("right") / expected if expected else math.nan,
          "all words right": share(lambda o: o["right"] == expected) if expected else math.nan,
          "a false word": share(lambda o: o["false"] > 0), "undecided per study": mean("undecided"),
          "selector error of 5 %": mean("selector"), "backbone error of 5 %": mean("backbone")}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--studies", type=int, default=500, help="of each truth")
  parser.add_argument("--out", default="", help="CSV of the summary")
  parser.add_argument("--truths", default=",".join(CASES), help="names, joined by commas")
  options = parser.parse_args()
  rows = []
  for name in options.truths.split(","):
    rows.append(run(name, options.studies))
    print(rows[-1], flush=True)
  if options.out:
    with open(options.out, "w", newline="") as file:
      writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
      writer.writeheader()
      writer.writerows([{k: ("" if v != v else f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                        for row in rows])


if __name__ == "__main__":
  main()
