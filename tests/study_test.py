"""A study shared out over processes, and arms with fewer seeds; what is trained is not at issue here."""
import json

import pytest

from nsa import methods, schedule, study as study_lib, train
from nsa.config import Config, ConfigError, ForkConfig


def make(**options):
  msa = methods.MSA(block_size=16, num_blocks=2, index_dim=16)
  arms = [Config(arm="dense", schedule=schedule.dense(10)),
          Config(arm="native", attention=msa, schedule=schedule.native(10, selector_warmup=0)),
          Config(arm="cold", attention=msa, schedule=schedule.native(10, selector_warmup=0)),
          Config(arm="retrofit", attention=msa, schedule=schedule.retrofit(10, 0.5), fork=ForkConfig("@dense", step=5))]
  return study_lib.Study(arms=arms, seeds=(0, 1), reference="native", **{"vmap_seeds": False, **options})


def test_runs_are_shared_out_and_every_process_writes_the_whole_plan(tmp_path, monkeypatch):
  trained = []

  def fake(config, workdir):
    trained.append(workdir.name)
    workdir.mkdir(parents=True)
    (workdir / "DONE").touch()

  monkeypatch.setattr(train, "train", fake)
  monkeypatch.setattr(train, "compilations", lambda *_: [])
  study = make(few={"cold": (0,)})
  quiet = dict(on_job=lambda line: None)
  study_lib.run(study, tmp_path, only=("*-s0",), **quiet)
  assert ([name.split("-")[0] for name in trained] == ["dense", "native", "cold", "retrofit"]
          and all(n.endswith("-s0") for n in trained))
  plan = json.loads((tmp_path / "study.json").read_text())
  assert plan["arms"] == ["dense", "native", "cold", "retrofit"] and len(plan["jobs"]) == 7
  assert {job["run"]: job["status"] for job in plan["jobs"] if job["seeds"] == [1]} == {
      run: "pending" for run in study_lib.unfinished(study, tmp_path)}
  study_lib.run(study, tmp_path, only=("dense-*", "retrofit*", "native-*-s1"), **quiet)
  assert sorted(trained[4:]) == sorted(n for n in {p.name for p in (tmp_path / "runs").iterdir()} if n.endswith("s1"))
  plan = json.loads((tmp_path / "study.json").read_text())
  assert {job["status"] for job in plan["jobs"]} == {"done"} and not study_lib.unfinished(study, tmp_path)
  with pytest.raises(ConfigError, match="--only = 'ntive-.': no run has such a name; there are runs/dense-"):
    study_lib.run(study, tmp_path, only=("ntive-*",), **quiet)


@pytest.mark.parametrize("options, message", [
    (dict(few={"nativ": (0,)}), r"few\['nativ'\].*there are \['cold', 'dense', 'native', 'retrofit'\]"),
    (dict(few={"cold": (0,)}, vmap_seeds=True), "few = .*set vmap_seeds = False"),
    (dict(few={"dense": (0,)}),
     r"arms\[retrofit\].fork.workdir = '@dense': no arm of size base and seeds .1. has that name"),
])
def test_wrong_seeds_of_arms_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    study_lib.jobs(make(**options), "study")


def test_what_is_asked_is_written_and_a_wrong_endpoint_is_named():
  asked = study_lib.asked(make(primary=("second_half_bits_per_byte:code", "far_exact_match"), secondary=("answer_nll",),
                               margin=0.004, branches={"dense": ("short",)}))
  assert asked["endpoints"] == [{"metric": "second_half_bits_per_byte:code", "margin": 0.004, "primary": True},
                                {"metric": "far_exact_match", "margin": 0.02, "primary": True},
                                {"metric": "answer_nll", "margin": 0.05, "primary": False}]
  assert (asked["reference_arm"] == "native" and asked["branches"] == {"dense": ["short"]}
          and asked["quantities"] == ["R", "A", "Delta"])
  with pytest.raises(ConfigError, match="secondary = 'loss': one of second_half_bits_per_byte"):
    study_lib.asked(make(secondary=("loss",)))


def test_seeds_by_arm_and_size():
  study = make(few={"cold-base": (1,)})
  assert [study_lib.seeds_of(study, arm) for arm in study.arms] == [(0, 1), (0, 1), (1,), (0, 1)]
  assert [job.run for job in study_lib.jobs(study, "x") if "cold" in job.run] == ["runs/cold-base-s1"]
