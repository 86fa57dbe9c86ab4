"""Study directories with planted truths, for the tests of nsa.report."""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from nsa import config as config_lib

ARMS = {  # arm -> (bits/byte minus native, exact match minus native, share of tokens after dense)
    "dense": (-0.004, 0.01, None),
    "native_msa": (0.0, 0.0, None),
    "retrofit_msa_1": (0.030, -0.10, 0.01),
    "retrofit_msa_5": (0.012, -0.04, 0.05),
    "retrofit_msa_25": (0.002, 0.0, 0.25),
}
MODES = {"dense": ("dense", "oracle", "block_topk", "random"), None: ("dense", "sparse", "oracle", "random")}
PENALTY = {"dense": 0.0, "sparse": 0.0, "oracle": -0.006, "block_topk": 0.09, "random": 0.30}
TASKS = {"mqar": 0.95, "needle:keys=4": 0.82, "copy": 0.6}


def write_study(root: Path, arms=ARMS, seeds=(0, 1, 2), sizes=("tiny",), noise=0.0015, together=True) -> Path:
  """A study directory in which arm a is `arms[a][0]` bits per byte worse than native, plus noise.

  `together`: all seeds of an arm in one run directory, as one vmapped program writes them.
  """
  rng = np.random.default_rng(0)
  jobs = []
  for size_index, size in enumerate(sizes):
    for arm, (delta, exact, budget) in arms.items():
      for group in ([tuple(seeds)] if together else [(s,) for s in seeds]):
        name = f"runs/{arm}-{size}-{'_'.join(map(str, group))}"
        write_run(root / name, arm, size, group, delta, exact, budget, rng, noise, 2.1 - 0.2 * size_index)
        jobs.append({"run": name, "arm": arm, "size": size, "seeds": list(group), "status": "done"})
  plan = {"name": "native against retrofit", "question": "Can a retrofit match native sparse attention?",
          "arms": list(arms), "primary": {"metric": "second_half_bits_per_byte", "margin": 0.01},
          "secondary": {"metric": "exact_match", "margin": 0.02},
          "reference_arm": "native_msa", "dense_arm": "dense",
          "budgets": {a: b for a, (_, _, b) in arms.items() if b}, "jobs": jobs}
  (root / "study.json").write_text(json.dumps(plan))
  return root


def write_run(path, arm, size, seeds, delta, exact, budget, rng, noise, level):
  """One finished run directory."""
  (path / "eval").mkdir(parents=True)
  config = config_lib.to_dict(config_lib.Config(arm=arm, size=size, seeds=seeds))
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
  steps, last = 60, 1000
  first = 0 if not budget else 1 - budget
  lines = []
  for i in range(steps + 1):
    step = round(last * (first + (1 - first) * i / steps)) or 1
    for seed in seeds:
      loss = 1.45 * level / 2 + 3.5 * (step + 12) ** -0.45 + delta + rng.normal(0, 0.012)
      lines.append({"step": step, "seed": seed, "stage": int(bool(budget) and i > 0), "mode": "sparse",
                    "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": step * 8192,
                    "flops": step * 8192 * 6.2e6,
                    "tokens_per_second": 21000 + rng.normal(0, 300), "seconds": step * 0.4})
  (path / "metrics.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
  (path / "eval" / f"{last}.json").write_text(json.dumps(
      {"step": last, "arm": arm, "size": size,
       "records": [r for seed in seeds
                   for r in _records(arm, size, seed, last, delta, exact, rng, noise, level)]}))
  middle = round(last * (first + 1) / 2)
  (path / "eval" / f"{middle}.json").write_text(json.dumps(  # on the way: fewer modes and kinds
      {"step": middle, "arm": arm, "size": size,
       "records": [r for seed in seeds for r in _records(arm, size, seed, middle, delta, exact, rng, noise, level)
                   if r["run_mode"] in ("sparse", "block_topk") and r["kind"] == "layer" or r["kind"] == "language"]}))
  (path / "DONE").write_text(json.dumps({"step": last, "seconds_paused": {"compile": 60.0, "evaluate": 6.0}}))


def _records(arm, size, seed, step, delta, exact, rng, noise, level):
  seed_level = 0.01 * np.random.default_rng(100 + seed).normal()  # the same in all arms: pairing removes it
  own = rng.normal(0, noise)
  for mode in MODES.get(arm, MODES[None]):
    common = {"seed": seed, "arm": arm, "size": size, "step": step, "run_mode": mode}
    value = level + seed_level + delta + own + PENALTY[mode]
    for k, document in enumerate(("emma", "dracula", "walden", "origin", "ulysses", "middlemarch")):
      x = value + 0.04 * math.sin(7 * k) + rng.normal(0, noise)
      yield dict(common, kind="language", split="val", document=document, start=0,
                 bits_per_byte=x + 0.05, bytes=2048, second_half_bits_per_byte=x, second_half_bytes=1024)
    for start, end in ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)):
      yield dict(common, kind="position", start=start, end=end, bytes=(end - start) * 6,
                 bits_per_byte=value + 0.9 * (end / 64) ** -0.7 + delta * math.log2(end / 128) / 4
                 + rng.normal(0, 0.004))
    for task, ease in TASKS.items():
      for index in range(40):
        p = min(0.99, max(0.0, ease + exact - 2 * max(0, PENALTY[mode]) - 0.001 * index))
        yield dict(common, kind="task", task=task, index=index, exact_match=int(rng.random() < p),
                   answer_nll=0.2 + (1 - p), evidence_distance=int(2 ** rng.uniform(5, 11)), depth=index / 40)
    for layer in range(4):
      oracle = 0.93 - 0.05 * layer
      captured = {"dense": None, "oracle": oracle}.get(mode, oracle * (0.9 - 2 * max(0, delta)))
      yield dict(common, kind="layer", layer=layer, captured_mass=captured, oracle_mass=oracle,
                 block_recall=0.7, score_recall=None, entropy=2.0,
                 overlap=0.55 + 0.08 * layer - delta + rng.normal(0, 0.01),
                 tile_union=3.0 + 2 * layer, tile_common=0.8, queries_limited=0.86)
    if mode == "sparse":
      n = 32
      heat = [[min(1.0, (i == j) + (j == 0) * 0.6 + 0.9 * math.exp(-0.5 * (i - j)) + 0.35 * rng.random() ** 4)
               if j <= i else 0.0 for j in range(n)] for i in range(n)]
      yield dict(common, kind="heat", layer=1, kv_head=0, document="emma", heat=heat)
