"""The re-analysis of the main study gives the verdict's own numbers, by other code."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import planted
from benchmarks.planted import write_study
from nsa import records
from nsa.report import archive, endpoints, statistics, verdict

SCRIPT = Path(__file__).parents[1] / "experiments/results/main/reanalysis.py"
spec = importlib.util.spec_from_file_location("reanalysis", SCRIPT)
reanalysis = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reanalysis)


def compare(path, sealed=False):
  """Asserts that both find the same; returns the words."""
  study = archive.load([path])
  table = endpoints.rows(study)
  result = verdict.verdict(study, table)
  if sealed:
    shown = archive.unsealed(study)
    result = verdict.verdict(shown, endpoints.rows(shown), result.admissions)
  found, admitted, lines = reanalysis.analyse(reanalysis.published(path) or [path], sealed)
  assert {key: all(gates.values()) for key, gates in admitted.items()} == {
      key: one.admitted for key, one in result.admissions.items()}
  theirs = {(c.endpoint.metric, c.size, c.quantity, c.arm): c for c in result.comparisons if c.family}
  assert {(c["metric"], c["size"], c["quantity"], c["arm"]) for c in found} == set(theirs)
  for c in found:
    one = theirs[c["metric"], c["size"], c["quantity"], c["arm"]]
    assert c["word"] == one.word and c["alpha"] == one.alpha
    assert (one.judgement is None) == (c["n"] == 0)
    if one.judgement is None:
      continue
    assert c["differences"] == pytest.approx(one.differences, abs=1e-12)
    i = one.judgement.interval
    if i.n < 2:
      continue
    ours = [c[n] for n in ("mean", "low", "high", "tost_holm", "difference_holm", "flips", "detectable")] + c["without"]
    expected = [i.mean, i.low, i.high, one.p_tost, one.p_difference, one.sign_flip, one.judgement.detectable]
    np.testing.assert_allclose(ours, expected + one.without_one, rtol=1e-6, atol=1e-12)
  return {(c["metric"], c["size"], c["quantity"], c["arm"]): c["word"] for c in found}, lines


def change(root, **fields):
  plan = json.loads((root / "study.json").read_text())
  (root / "study.json").write_text(json.dumps({**plan, **fields}))


@pytest.mark.parametrize("case, said", [("native ahead", {"worse", "matches"}), ("noisy", {"undecided"}),
                                        ("block-0 shortcut", {"not admitted", "worse"})])
def test_planted_studies(case, said, tmp_path):
  words, _ = compare(planted.write_case(tmp_path, planted.CASES[case], draw=3))
  assert len(words) == 14 and said <= set(words.values())


def test_a_study_with_all_there_can_be(tmp_path):
  """Two sizes, a control of its own, parts of endpoints, a cut study, a diverged seed, failures, two groups, and what
  is sealed."""
  arms = {"dense": (0.02, 0.0, None), "native_msa": (0.0, 0.0, None), "dense_more": (0.012, 0.0, None),
          "dense_double": (-0.3, 0.0, None), "within_25": (0.021, -0.01, 0.25), "within_50": (0.02, 0.0, 0.5),
          "within_75": (0.02, 0.0, 0.75), "after_5": (0.03, -0.3, 0.05), "never": (0.0, 0.0, 0.1)}
  root = write_study(tmp_path / "study", arms, seeds=range(5), sizes=("S", "M"), together=False, noise=0.0005,
                     match_noise=0.01, items=40, rich=False)
  for file in [f for arm in ("dense_more", "dense_double") for f in root.glob(f"runs/{arm}-*/config.json")]:
    config = json.loads(file.read_text())
    config["schedule"]["stages"] = [{"fraction": 1.0, "mode": "dense"}]
    file.write_text(json.dumps(config))
    for of in file.parent.glob("eval/*.json"):
      tree = json.loads(of.read_text())
      rows = [{**r, "run_mode": "dense"} for r in tree["records"] if r["run_mode"] == "sparse"]
      of.write_text(json.dumps({**tree, "records": rows}))
  for log in root.glob("runs/dense_double-*/metrics.jsonl"):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**line, "tokens": 2 * line["tokens"]}) + "\n" for line in lines))
  rng = np.random.default_rng(1)
  for file in root.glob("runs/*/eval/*.json"):
    tree, seed = json.loads(file.read_text()), int(file.parents[1].name.rpartition("-")[2])
    for r in tree["records"]:
      if r["kind"] == "language":
        r["corpus"] = "novels" if r["document"] == "emma" else "code"
        r["second_half_bytes"] += len(r["document"])
      if r["kind"] == "task":
        r["far_answers"] = int(rng.integers(0, 5)) if len(tree["records"]) % 3 else 4
        if r["far_answers"]:
          r["far_exact_match"] = r["exact_match"] * (0.2 if tree["arm"] == "after_5" and seed % 2 else 1)
          r["far_answer_nll"] = r["answer_nll"] + rng.normal(0, 0.01)
    common = {name: tree["records"][0][name] for name in records.COMMON}
    hits = lambda: records.make("ar_hit", start=64, end=128, nll=2 + rng.normal(0, 0.01), hits=int(rng.integers(1, 9)))
    modes = sorted({r["run_mode"] for r in tree["records"]})
    tree["records"] += [{**hits(), **common, "run_mode": mode} for mode in modes]
    file.write_text(json.dumps(tree))
    if file.stem == "1000":
      own = "dense" if tree["arm"].startswith("dense") else "sparse"
      rows = [r for r in tree["records"] if r["run_mode"] == own and r["kind"] in ("language", "task")]
      shift = rng.normal(0, 0.01)
      for r in rows:
        if r["kind"] == "language":
          r["split"] = "test"
          r["second_half_bits_per_byte"] += shift
      sealed = {**tree, "settings": {"split": "test"}, "records": rows}
      (file.parent / "1000-sealed.json").write_text(json.dumps(sealed))
  (root / "runs/within_25-S-4/DONE").unlink()
  (root / "runs/within_25-S-4/FAILED").write_text(json.dumps({"error": "Diverged"}))
  with open(root / "runs/within_50-S-1/metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 1010, "seed": 1, "loss": "nan", "tokens": 1}) + "\n")
  jobs = json.loads((root / "study.json").read_text())["jobs"]
  for job in jobs:
    if job["run"].startswith("runs/never") or job["run"] in [f"runs/native_msa-M-{seed}" for seed in (0, 1, 2)]:
      for path in sorted((root / job["run"]).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
      (root / job["run"]).rmdir()
      job["status"] = "pending"
    if job["run"] == "runs/within_25-S-4":
      job["status"] = "failed"
  jobs = [job for job in jobs if not job["run"].startswith("runs/after_5-M")]  # only of one size
  jobs += [{"run": f"runs/{arm}-L-{seed}", "arm": arm, "size": "L", "seeds": [seed], "status": "pending"}
           for arm in arms for seed in range(5)]  # a size not begun: its tests count as failed ones
  text, recall = "second_half_bits_per_byte", "far_exact_match"
  change(root, jobs=jobs, controls={"after_5": "dense_more"}, quantities=["R", "A"], branches={},
         endpoints=[{"metric": f"{text}:novels", "margin": 0.005, "primary": True},
                    {"metric": f"{text}:code", "margin": 0.005, "primary": True},
                    {"metric": recall, "margin": 0.02, "primary": True},
                    {"metric": "far_answer_nll", "margin": 0.05, "primary": False},
                    {"metric": "ar_hit_nll", "margin": 0.005, "primary": False}])
  for path in sorted(root.glob("runs/after_5-M-*")):
    for one in sorted(path.rglob("*"), reverse=True):
      one.rmdir() if one.is_dir() else one.unlink()
    path.rmdir()
  words, lines = compare(root)
  assert set(words.values()) >= {"matches", "worse", "cannot be judged"}
  assert any("after_5: 3 of 5 seeds" in line for line in lines) and any("1 failed" in line for line in lines)
  study = archive.load([root])
  levels = [verdict.levels_off([c for c in verdict.verdict(study, endpoints.rows(study)).of("R", recall, "S")
                                       if study.control(c.arm) == "dense"])[1]]
  p = [line.rpartition("p = ")[2] for line in lines if line.startswith(f"{recall} S: R between")]
  assert all(f"p = {one}" in text for one, text in zip(p, levels)) and len(p) == 1
  (tmp_path / "published").mkdir()
  (tmp_path / "published" / archive.NAME).write_bytes(archive.pack(study))
  assert compare(tmp_path / "published")[0] == words
  with pytest.raises(SystemExit, match="has not been opened"):
    compare(root, sealed=True)
  for tiers, opened in (({}, [""]), ({"1": [f"{arm}-S" for arm in arms]}, ["1"])):
    seeds = {key: list(range(5)) for keys in tiers.values() for key in keys}
    change(root, opened=opened, plan={"tiers": tiers, "seeds": seeds})
    study = archive.load([root])
    assert {run.size for run in archive.unsealed(study).runs if run.sealed} == ({"S"} if tiers else {"S", "M"})
    compare(root, sealed=True)
    (tmp_path / "published" / archive.NAME).write_bytes(archive.pack(study))
    compare(tmp_path / "published", sealed=True)


def test_its_statistics_are_the_reports():
  x = np.random.default_rng(0).normal(0.3, 1, 7)
  ours = reanalysis.tests(dict(enumerate(x)), 0.5)
  theirs = statistics.judge(x, 0.5)
  assert (ours["tost"], ours["difference"]) == pytest.approx((theirs.p_tost, theirs.p_difference))
  assert ours["detectable"] == pytest.approx(theirs.detectable)
  p = [0.01, 0.04, 0.03, 0.6, 1.0]
  assert reanalysis.holm(p) == pytest.approx(list(statistics.holm(p)))
