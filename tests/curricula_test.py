"""Arms that end dense without a dense trunk: what they are compared with, at which cost, how they learn."""
import json

import numpy as np
import pytest
from reanalysis_test import reanalysis

from benchmarks import planted
from nsa import config as config_lib, report
from nsa.report import archive, curricula, document, endpoints, sections

TEXT = planted.TEXT
MSA = {"method": "msa", "block_size": 32, "num_blocks": 8}
WINDOW = {"method": "window", "window": 256}
# arm -> (bits per byte, attention, stages, steps, FLOPs per token, tokens per second by stage)
ARMS = {"dense": (0.02, None, ("dense",), 1000, 8e6, (2e6,)), "dense_half": (0.06, None, ("dense",), 500, 8e6, (2e6,)),
        "native_msa": (0.0, MSA, ("warmup", "sparse"), 1000, 6e6, (2e6, 1e6)),
        "native_cold": (0.003, MSA, ("sparse",), 1000, 6e6, (9e6,)),
        "native_to_dense": (0.004, MSA, ("sparse", "dense"), 1000, 6.5e6, (1e6, 2e6)),
        "native_window": (0.05, WINDOW, ("sparse",), 1000, 5e6, (9e6,)),
        "window_to_dense_75": (0.021, WINDOW, ("sparse", "dense"), 1000, 7e6, (4e6, 2e6)),
        "context_512": (0.01, None, ("dense", "dense"), 1000, 7.5e6, (2.5e6, 2e6)),
        "dense_double": (-0.02, None, ("dense",), 2000, 8e6, (2e6,)),
        "retrofit_msa_25": (0.022, MSA, ("dense", "sparse"), 1000, 7e6, (2e6, 1e6))}
FORKS = ("dense_half", "retrofit_msa_25")  # from the trunk
FIRST = 0.75  # of the steps, where there are two stages


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A study of these arms with four seeds; of native_window one has not run."""
  root = planted.write_study(tmp_path_factory.mktemp("curricula"), {
      arm: (x[0], 0.0, 0.25 if arm.startswith("retrofit") else None) for arm, x in ARMS.items()},
                             seeds=range(4), noise=1e-5, together=False, rich=False)
  plan = json.loads((root / "study.json").read_text())
  for job in plan["jobs"]:
    _, attention, modes, steps, flops, speeds = ARMS[job["arm"]]
    path, (seed,) = root / job["run"], job["seeds"]
    config = json.loads((path / "config.json").read_text())
    shares = [1.0] if len(modes) == 1 else [FIRST, 1 - FIRST]
    stages = [{"fraction": f, "mode": mode} for f, mode in zip(shares, modes)]
    if job["arm"] == "context_512":
      stages[0]["context"] = 512
    config["attention"] = attention or {"method": "dense"}
    if job["arm"] == "native_cold":  # of a later version, whose file has a field that others leave at its default
      config["attention"] = {**attention, "index_dim": config_lib.from_dict(config).attention.index_dim}
    if job["arm"] in FORKS:
      config["fork"] |= {"workdir": str(root / f"runs/dense-tiny-{seed}"), "step": 400}
    config["schedule"] |= {"steps": steps, "stages": stages}
    (path / "config.json").write_text(json.dumps(config))
    stage = lambda step: int(len(modes) == 2 and step > FIRST * steps)
    lines = [{"step": step, "seed": seed, "stage": stage(step), "loss": 1.0, "tokens": step * 8192,
              "flops": step * 8192 * flops, "tokens_per_second": speeds[stage(step)]}
             for step in range(steps // 20, steps + 1, steps // 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = path / "eval/1000.json"
    tree = json.loads(last.read_text())
    if modes[-1] == "dense" and job["arm"] != "dense":
      tree["records"] = [{**r, "run_mode": "dense"} for r in tree["records"] if r["run_mode"] == "sparse"]
    last.unlink()
    (path / f"eval/{steps}.json").write_text(json.dumps({**tree, "step": steps}))
    (path / f"eval/{steps}-sealed.json").write_text(json.dumps({**tree, "settings": {"split": "test"}}))
    for step in (steps // 4, int(FIRST * steps), int(0.9 * steps)):  # as it attends, 0.2; as it does not, 0.9
      now = "dense" if modes[stage(step)] == "dense" or modes[-1] == "dense" and stage(step) else "sparse"
      rows = [{**r, "run_mode": mode, "exact_match": 0.2 + 0.7 * (mode != now), "step": step}
              for r in tree["records"] if r["kind"] == "task" and r["run_mode"] in ("dense", "sparse")
              for mode in ("dense", "sparse")]
      rows += [{**r, "run_mode": mode, "step": step} for r in tree["records"] if r["kind"] == "language"
               and r["run_mode"] in ("dense", "sparse") for mode in ("dense", "sparse")]
      (path / f"eval/{step}.json").write_text(json.dumps({**tree, "step": step, "records": rows}))
    if job["run"] == "runs/native_window-tiny-3":
      for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
      path.rmdir()
      job["status"] = "pending"
  plan |= {"branches": {"dense": ["dense_half"]}, "quantities": ["R", "A"]}
  (root / "study.json").write_text(json.dumps(plan))
  return root


def test_each_is_compared_with_dense_at_equal_cost_and_with_what_goes_on_as_it_begins(root):
  study = archive.load([root])
  found = curricula.arms(study, "tiny")
  assert found == {"native_to_dense": "native_cold", "window_to_dense_75": "native_window", "context_512": "",
                   "dense_double": ""}
  table = endpoints.rows(study)
  mean = lambda arm, words: np.mean(list(curricula.minus_dense(study, table, TEXT, "tiny", arm, found)[words].values()))
  # Dense on a line in the logarithm of its cost: 0.06 at half of it, 0.02, -0.02 at twice as much.
  dense = lambda cost: 0.02 - 0.04 * np.log2(cost)
  for arm, (value, _, _, _, flops, speeds) in ARMS.items():
    if arm not in ("native_to_dense", "window_to_dense_75", "context_512"):
      continue
    time = FIRST * 2e6 / speeds[0] + 1 - FIRST
    assert curricula.time_share(study, "tiny", arm, found) == pytest.approx(time)
    assert mean(arm, "as they end") == pytest.approx(value - 0.02, abs=1e-4)
    assert mean(arm, "for its FLOPs") == pytest.approx(value - dense(flops / 8e6), abs=1e-4)
    assert mean(arm, "for its time") == pytest.approx(value - dense(time), abs=1e-4)
  # What goes on as others begin has no dense steps in its log: theirs say how long its own take.
  assert curricula.time_share(study, "tiny", "native_window", found) == pytest.approx(0.5)
  double = curricula.minus_dense(study, table, TEXT, "tiny", "dense_double", found)
  assert np.mean(list(double["as they end"].values())) == pytest.approx(-0.04, abs=1e-4)
  assert not double["for its FLOPs"] and curricula.time_share(study, "tiny", "dense_double", found) == pytest.approx(2)
  study.speeds = {"dense-tiny": 3e6, "native_msa-tiny": 2e6}  # alone on the device
  assert curricula.time_share(study, "tiny", "native_msa", found) == pytest.approx(1.5)


def test_the_reanalysis_finds_the_same(root):
  study = archive.load([root])
  table, arms = endpoints.rows(study), curricula.arms(study, "tiny")
  theirs = {(c["metric"], c["arm"], c["what"]): c for c in reanalysis.curricula(*reanalysis.read(root))}
  count = 0
  for e in study.endpoints:
    for arm in ("native_msa", "native_cold", "native_window", *arms):
      for words, d in curricula.minus_dense(study, table, e.metric, "tiny", arm, arms).items():
        assert bool(d) == ((e.metric, arm, words) in theirs)
        if d:
          one = theirs[e.metric, arm, words]
          assert (one["n"], one["mean"]) == (len(d), pytest.approx(np.mean(list(d.values())), abs=1e-12))
          count += 1
  assert count > 30 and theirs[TEXT, "window_to_dense_75", "minus native_window"]["n"] == 3
  assert theirs[TEXT, "native_to_dense", "minus native_cold"]["mean"] == pytest.approx(0.001, abs=1e-4)


def test_the_report_says_all_of_it_and_no_word(root, tmp_path):
  written = report.write([root], tmp_path / "report")
  text = written.markdown.read_text()
  whole = text[text.index(f"## {curricula.TITLE}"):]
  mine = whole[:whole.index("\n## ", 5)]
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in mine.splitlines() if line.startswith("| ")]
  title = endpoints.metric(TEXT).title
  of = {row[1]: row for row in rows if row[0].startswith(title)}
  assert of["native_to_dense"][2:5] == ["4", "81", "175"]
  assert of["native_to_dense"][8].startswith("native_cold: +0.0010")
  assert of["window_to_dense_75"][8].endswith(", 3 seeds") and "Of other code" not in mine
  assert of["native_window"][2:5] == ["3 of 4", "62", "50"] and of["dense_double"][3:5] == ["200", "200"]
  assert of["native_to_dense"][5].startswith("-0.0160 (") and of["native_msa"][5].startswith("-0.0200 (")
  assert "no word" in mine and "cannot go below p = 0.12" in mine
  assert "What is sealed of these arms is in no number" in mine
  assert "Rows of 512 tokens are cut and ordered anew: with them a step of context_512 reads 4 times as many" in mine
  assert mine.count("ordered anew") == 1
  assert not any(word in mine for word in ("matches", "better", "worse"))
  others = text[:text.index(f"## {curricula.TITLE}")]
  assert not any(line.startswith("| native_to_dense | 4 | ") and "-0.0160" in line for line in others.splitlines())
  names = {path.stem for path in written.plots}
  assert {"curricula_second_half_bits_per_byte", "curricula_recall_over_training"} <= names


def test_of_some_seeds_all_stand_on_those_and_another_code_is_named(root, tmp_path):
  """Half of the seeds are in, made by a later commit; of native_window one."""
  study = archive.load([root])
  late = {"native_to_dense": (0, 1), "window_to_dense_75": (0, 1), "native_window": (1,), "native_cold": (0, 1)}
  study.runs = [run for run in study.runs if run.arm not in ("context_512", "dense_double")
                and run.seeds[0] in late.get(run.arm, range(4))]
  for run in study.runs:
    run.versions["commit"] = "b" * 40 if run.arm in late and run.arm != "native_cold" else "a" * 40
  drawn = {}

  class Gallery(sections.Gallery):
    def block(self, name, figure, *words):
      drawn[name.removesuffix("_tiny")] = figure
      return super().block(name, figure, *words)

  table = endpoints.rows(study)
  blocks = curricula.section(study, table, "tiny", {}, Gallery(study, tmp_path, ("png",)))
  page = document.markdown("x", blocks)
  assert (f"Of other code than dense, which may end elsewhere by itself: native_window ({'b' * 12}), "
          f"native_to_dense ({'b' * 12}), window_to_dense_75 ({'b' * 12}).") in page
  assert ", 1 seed |" in page and "1 seeds" not in page and "With 2 pairs" in page
  seeds = [line for line in drawn["curricula_held_out"].axes[0].lines if line.get_linewidth() < 1]
  assert len(seeds) == 2 + 2 + 2 + 2 + 1  # dense and native have four


def test_on_the_way_each_is_taken_as_it_attends_then(root):
  study = archive.load([root])
  for arm in ("native_to_dense", "window_to_dense_75", "context_512", "native_cold"):
    found = endpoints.recall_over_training(study, arm, "tiny")
    assert [round(found[0, step], 6) for step in (250, 750, 900)] == [0.2, 0.2, 0.2], arm


def test_a_study_without_a_change_of_attention_has_no_such_section(tmp_path):
  study = archive.load([planted.write_study(tmp_path, seeds=(0, 1), rich=False)])
  assert curricula.arms(study, "tiny") == {}
