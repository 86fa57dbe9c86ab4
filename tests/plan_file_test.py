"""A plan is written before the data; the report lists what deviates from it."""
import copy
import json

import pytest

from benchmarks.planted import ARMS, write_study
from experiments import main_study
from nsa import config as config_lib, report, schedule, study as study_lib
from nsa.report import archive, plan_file


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """A study as write_study makes it, with its plan in study.json."""
  root = write_study(tmp_path_factory.mktemp("study"), {a: ARMS[a] for a in ("dense", "native_msa", "retrofit_msa_5")},
                     rich=False)
  arms = [config_lib.from_dict(json.loads(file.read_text())) for file in sorted(root.glob("runs/*/config.json"))]
  for arm in arms:
    if arm.fork.workdir:
      arm.fork.workdir = "@dense"
    arm.data.source = "files:/elsewhere/corpus.tar.xz"
  study = study_lib.Study(name="native against retrofit", question="Can a retrofit match native sparse attention?",
                          arms=arms, dense="dense", reference="native_msa", budgets={"retrofit_msa_5": 0.05},
                          expected_sd={"text R": 0.002})
  plan = plan_file.make(study)
  tree = json.loads((root / "study.json").read_text())
  (root / "study.json").write_text(json.dumps({**tree, "plan": plan}))
  return root, study, plan


def lines(root, change=lambda tree: None):
  tree = json.loads((root / "study.json").read_text())
  change(tree)
  (root / "changed").mkdir(exist_ok=True)
  (root / "changed/study.json").write_text(json.dumps(tree))
  if not (root / "changed/runs").exists():
    (root / "changed/runs").symlink_to(root / "runs")
  return plan_file.deviations(archive.load([root / "changed"]))


def test_what_ran_as_planned_has_no_deviation_and_every_other_thing_is_named(planned):
  root, _, plan = planned
  assert lines(root) == []
  assert plan_file.deviations(archive.load([write_study(root / "none", {"dense": ARMS["dense"]}, rich=False)])) is None
  (found,) = lines(root, lambda t: t["endpoints"][0].update(margin=0.02))
  assert found == "endpoints[0].margin: planned 0.005, judged by 0.02."
  (found,) = lines(root, lambda t: t["plan"]["seeds"].update({"dense-tiny": [0, 1]})
                   or t["plan"].update(hash=plan_file.digest(t["plan"])))
  assert found == "dense-tiny: seeds 2 ran and were not planned."
  found = lines(root, lambda t: t["plan"]["seeds"].update({"dense-tiny": [0, 1, 2, 3], "late-tiny": [0]}))
  assert found[0].startswith("plan.json was changed after it was written: it gives the hash")
  assert found[1:] == ["Not run, or not yet, of size tiny: dense (seeds 3), late."]
  dashed = lambda plan: (plan["seeds"].update({"late-2M-64": [0]}), plan["configs"].update(
      {"late-2M-64": {**plan["configs"]["dense-tiny"], "arm": "late", "size": "2M-64"}}))
  found = lines(root, lambda t: dashed(t["plan"]))
  assert found[1:] == ["Not run, or not yet, of size 2M-64: late."]
  key = "retrofit_msa_5-tiny"
  found = lines(root, lambda t: t["plan"]["configs"][key]["attention"].update(num_blocks=9)
                or t["plan"]["configs"].pop("dense-tiny"))
  assert "dense-tiny: was not planned." in found and f"{key}.attention.num_blocks: planned 9, ran 8." in found
  (found,) = lines(root, lambda t: t["plan"]["gates"].update({"dense exact match at least": 0.5})
                   or t["plan"].update(hash=plan_file.digest(t["plan"])))
  assert found == "gates.dense exact match at least: planned 0.5, judged by 0.95."


def test_a_field_that_a_later_version_adds_to_configs_is_no_deviation(planned, tmp_path):
  root, study, plan = planned
  older = copy.deepcopy(plan)
  for config in older["configs"].values():
    del config["eval"]["decoded"]
  older["hash"] = plan_file.digest(older)
  assert lines(root, lambda t: t.update(plan=older)) == []
  (tmp_path / "plan.json").write_text(json.dumps(older))
  assert older["hash"] in plan_file.write(study, tmp_path).read_text()
  assert json.loads((tmp_path / "plan.json").read_text()) == older, "what was committed stays"


def test_deviations_stand_in_the_report_and_survive_publishing(planned, tmp_path, quick):
  root, _, _ = planned
  text = report.write([root], tmp_path / "out", publish=True).markdown.read_text()
  assert "### Deviations from the plan\n\nNone: what ran is what was planned before the data." in text
  assert plan_file.deviations(archive.load([tmp_path / "out"])) == []


def test_a_plan_is_written_once_and_says_what_it_must(planned, tmp_path):
  _, study, plan = planned
  text = plan_file.write(study, tmp_path).read_text()
  assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(plan)) and plan["hash"] in text
  for heading in ("Arms", "Endpoints", "Gates", "Family of tests", "Seeds, and when it stops", "Power", "Cost"):
    assert f"\n## {heading}\n" in text
  # SD .002, 3 seeds, alpha .025: 3 pairs see 4.62 SD; a family of 3 text tests.
  assert "text, alpha 0.025, 3 tests (tiny)" in text and "| 0.002 | 3 | 0.0092 / 0.0" in text
  study.margin = 0.01
  with pytest.raises(ValueError, match=r"endpoints\[0\].margin = 0.005 was planned, and 0.01 is asked for"):
    plan_file.write(study, tmp_path)
  study.margin = 0.005


def test_the_main_study_is_the_protocol():
  study = main_study.get_config("tier=1")
  jobs = study_lib.jobs(study, "x")
  count = lambda arm, size: sum(j.config.arm == arm and j.config.size == size for j in jobs)
  assert ([count("dense", "S"), count("native", "M"), count("within_25", "M"), count("dense_after_5", "S")]
          == [12, 8, 6, 6])
  by = {(c.arm, c.size): c for c in study.arms}
  m = by["dense", "M"]
  assert (m.schedule.steps * m.data.global_batch * m.data.context == pytest.approx(200e6, rel=1e-3)
          and m.data.task_rows == 1)
  for b in main_study.WITHIN:  # no fork inside the decay, at the trunk's own rate
    arm = by[f"within_{100 * b:g}", "M"]
    assert arm.schedule.steps == m.schedule.steps and arm.fork.step <= 0.8 * m.schedule.steps
    for s in (arm.fork.step, 6000):
      assert schedule.learning_rate(arm.schedule, s) == schedule.learning_rate(m.schedule, s)
  for b in main_study.AFTER:  # the control has the retrofit's tokens and rates
    arm, control = by[f"after_{100 * b:g}", "M"], by[study.controls[f"after_{100 * b:g}"], "M"]
    assert control.schedule.steps == arm.schedule.steps and arm.fork.step == m.schedule.steps
    steps = range(m.schedule.steps, arm.schedule.steps, 7)
    assert [schedule.learning_rate(arm.schedule, s) for s in steps] == [
        schedule.learning_rate(control.schedule, s) for s in steps]
  half = by["dense_50", "M"]  # a decay branch: the trunk's rate up to the fork
  assert schedule.learning_rate(half.schedule, half.fork.step - 1) == schedule.learning_rate(
      m.schedule, half.fork.step - 1)
  assert {c.attention.num_blocks for c in study.arms if c.attention.name == "msa"} == {24}
  # Hidden states: at M, as far as steps are an arm's own; every run of text holds planted passages.
  looked = {c.arm: c.eval.hidden_states for c in study.arms if c.eval.hidden_states}
  assert set(looked) == set(main_study.LOOKED) and looked["dense"] == looked["native"] == looked["native_window"]
  assert looked["dense"] == (0, 48, 95, 191, 382, 763, 1526, 3052, 6104) and min(looked["within_25"]) == 4578 + 12
  assert {c.size for c in study.arms if c.eval.hidden_states} == {"M"} and m.data.planted == 0
  assert all(c.data.planted == 0.01 for c in main_study.get_config("tier=all,novels=a.tar.xz,code=b.tar.xz").arms)
  everything = main_study.get_config("tier=all")
  part = main_study.get_config("tier=3")  # another part of the same study is run
  assert ([c.arm for c in part.arms] == [c.arm for c in study.arms]
          and {n.rpartition("-")[2] for n in part.now} == {"L", "M8K"})
  assert {c.size for c in everything.arms} == {"S", "M", "L", "M8K"} and list(everything.tiers) == ["1", "2", "3"]
  assert {f"{c.arm}-{c.size}" for c in everything.arms} == {name for tier in everything.tiers.values() for name in tier}
