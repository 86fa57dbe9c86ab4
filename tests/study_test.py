"""A study shared out over processes and machines, and arms with fewer seeds."""
import contextlib
import json
import os
import shutil

from commands import logged
from etils import epath
import pytest

from experiments import quickstart
from nsa import lock, methods, rundir, schedule, study as study_lib, train
from nsa.config import Config, ConfigError, ForkConfig
from nsa.report import archive, endpoints, plan_file, verdict


def make(**options):
  msa = methods.MSA(block_size=16, num_blocks=2, index_dim=16)
  arms = [Config(arm="dense", schedule=schedule.dense(10)),
          Config(arm="native", attention=msa, schedule=schedule.native(10, selector_warmup=0)),
          Config(arm="cold", attention=msa, schedule=schedule.native(10, selector_warmup=0)),
          Config(arm="retrofit", attention=msa, schedule=schedule.retrofit(10, 0.5), fork=ForkConfig("@dense", step=5))]
  return study_lib.Study(arms=arms, seeds=(0, 1), reference="native", **{"vmap_seeds": False, **options})


def test_what_all_runs_lack_is_told_once(tmp_path, monkeypatch):
  problem = ("num_layers", [4, 4], "not a number")
  monkeypatch.setattr(study_lib.provenance, "missing", lambda *_: [problem])
  with pytest.raises(ConfigError) as error:
    study_lib.run(make(shortcuts=True), tmp_path / "study", on_job=print)
  assert str(error.value).count("num_layers") == 1 and not (tmp_path / "study").exists()


def test_a_finished_run_of_another_config_is_told(tmp_path, monkeypatch):
  said, study = [], make(shortcuts=True)
  monkeypatch.setattr(study_lib.logging, "warning", lambda text, *args: said.append(text % args))
  for job in study_lib.jobs(study, tmp_path):
    rundir.make_workdir(epath.Path(tmp_path / job.run))
    rundir.open_workdir(job.config, epath.Path(tmp_path / job.run))
    (tmp_path / job.run / "DONE").touch()
  todo = study_lib.jobs(make(shortcuts=True), tmp_path)
  todo[0].config.data.source = "files:elsewhere"  # the same corpus on another machine
  study_lib.check(study, tmp_path, todo)
  assert not said
  todo[0].config.schedule.learning_rate.peak = 0.5
  study_lib.check(study, tmp_path, todo)
  assert len(said) == 2 and "schedule.learning_rate.peak = 0.001 and not 0.5: it is taken as it is" in said[0]


def test_runs_are_shared_out_and_every_process_writes_the_whole_plan(tmp_path, monkeypatch):
  trained = []

  def fake(config, workdir):
    trained.append(workdir.name)
    workdir.mkdir(parents=True)
    (workdir / "DONE").touch()

  monkeypatch.setattr(train, "train", fake)
  monkeypatch.setattr(train, "compilations", lambda *_: [])
  monkeypatch.setattr(study_lib.again, "bring_back", lambda *_: None)
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
  order = [job.run.removeprefix("runs/") for job in study_lib.wanted(study, tmp_path, ("native-*", "*-s1", "*"))[0]]
  assert order == ["native-base-s0", "native-base-s1", "dense-base-s1", "dense-base-s0", "cold-base-s0",
                   "retrofit-base-s1", "retrofit-base-s0"]  # trunks first
  study.now = ("dense-base", "native-base")  # the others are listed all the same
  assert [job.run for job in study_lib.run(study, tmp_path / "part", only=("*-s0",), **quiet)] == [
      "runs/dense-base-s0", "runs/native-base-s0"]
  assert len(json.loads((tmp_path / "part/study.json").read_text())["jobs"]) == 7
  study.now = ()
  with pytest.raises(ConfigError, match="--only = 'ntive-.': no run has such a name; there are runs/dense-"):
    study_lib.run(study, tmp_path, only=("*-s0", "ntive-*"), **quiet)


@pytest.mark.parametrize("options, message", [
    (dict(few={"nativ": (0,)}), "few = 'nativ': no arm has that name; there are cold, dense, native, retrofit"),
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


# --- from machine to machine --------------------------------------------------------


QUIET = dict(on_job=lambda line: None)


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
  """(study, directory of seed 0, of seed 1): two machines that trained one seed each, and their plan."""
  root = tmp_path_factory.mktemp("slices")
  study = quickstart.get_config("steps=20,seeds=2")
  study.vmap_seeds, study.plan = False, str(root / "plan")
  study.arms = [arm for arm in study.arms if arm.arm != "retrofit_msa_50"]
  study.budgets = {"retrofit_msa_25": 0.25}
  for arm in study.arms:
    arm.model.num_layers, arm.model.d_model, arm.model.mlp_dim, arm.log_every = 1, 16, 32, 1
    arm.data.global_batch, arm.eval.batch, arm.eval.task_examples, arm.eval.during_examples = 2, 2, 4, 2
    arm.eval.run_modes, arm.eval.diagnostics = arm.eval.run_modes[:1], False
    arm.eval.every = 10 * (arm.arm == "dense")
  plan_file.write(study, study.plan)
  for seed in (0, 1):
    study_lib.run(study, root / f"machine{seed}", only=(f"*-s{seed}",), **QUIET)
  return study, root / "machine0", root / "machine1"


def brought_home(machine, to, *without):
  """Finished runs without their checkpoints, as they are brought home."""
  for run in (machine / "runs").iterdir():
    if run.name not in without:
      shutil.copytree(run, to / "runs" / run.name, ignore=shutil.ignore_patterns("checkpoints", "LOCK"))


def test_slices_of_two_machines_are_one_study(slices, tmp_path, monkeypatch):
  study, first, second = slices
  brought_home(first, tmp_path)
  brought_home(second, tmp_path)
  monkeypatch.setattr(train, "train", lambda *_: pytest.fail("all is done"))
  assert ({job.status for job in study_lib.run(study, tmp_path, **QUIET)} == {"done"}
          and not study_lib.unfinished(study, tmp_path))
  found = archive.load([tmp_path])
  assert plan_file.deviations(found) == [] and not found.problems
  table = endpoints.rows(found)
  assert {(r.arm, r.seed) for r in table} == {(arm.arm, seed) for arm in study.arms for seed in (0, 1)}
  judged = [c for c in verdict.verdict(found, table).comparisons if c.endpoint.metric == "exact_match" and c.family]
  assert [(c.quantity, sorted(c.differences)) for c in judged] == [("R", [0, 1]), ("A", [0, 1]), ("Delta", [0, 1])]


def test_a_fork_whose_trunk_came_without_checkpoints_has_the_same_bits(slices, tmp_path, monkeypatch):
  study, first, _ = slices
  retrofit = "retrofit_msa_25-0.1M-s0"
  brought_home(first, tmp_path, retrofit)
  trained, real = [], train.train

  def counted(config, workdir, **until):
    trained.append(f"{workdir.parent.name}/{workdir.name}")
    return real(config, workdir, **until)

  monkeypatch.setattr(train, "train", counted)
  done = (tmp_path / "runs/dense-0.1M-s0/DONE").stat().st_mtime_ns
  jobs = study_lib.run(study, tmp_path, only=("*-s0",), **QUIET)
  assert {job.status for job in jobs} == {"done"} and trained == ["dense-0.1M-s0/run", f"runs/{retrofit}"]
  assert logged(tmp_path / "runs" / retrofit) == logged(first / "runs" / retrofit)
  of = lambda root: json.loads((root / "runs" / retrofit / "eval/20.json").read_text())["records"]
  assert of(tmp_path) == of(first)
  assert (tmp_path / "runs/dense-0.1M-s0/DONE").stat().st_mtime_ns == done
  again = tmp_path / "again/dense-0.1M-s0/run"
  assert logged(again)[-1]["step"] == 15 and not (again / "DONE").exists()  # as far as the fork needs it
  trunk = next(job for job in jobs if job.run == "runs/dense-0.1M-s0")
  for place in (again, tmp_path / trunk.run):  # it went past 10 when no fork needed it
    assert sorted(p.name for p in (place / "checkpoints").iterdir()) == ["15"]
  trunk.config.checkpoint.keep_at += (10,)
  monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "no links here")))
  study_lib.again.bring_back(trunk, 10, {}, epath.Path(tmp_path))
  assert trained.pop() == "dense-0.1M-s0/run" and logged(again)[-1]["step"] == 10
  files = lambda of: {p.relative_to(of): p.read_bytes() for p in of.rglob("*") if p.is_file()}
  assert files(tmp_path / trunk.run / "checkpoints/10") == files(again / "checkpoints/10")
  study_lib.again.bring_back(trunk, 20, {}, epath.Path(tmp_path))  # on from there, for a fork from its end
  assert trained.pop() == "dense-0.1M-s0/run" and not again.exists()
  assert (tmp_path / trunk.run / "checkpoints/20").exists()
  shutil.rmtree(tmp_path / "runs" / retrofit)  # another fork of it: its checkpoints are back
  study_lib.run(study, tmp_path, only=("*-s0",), **QUIET)
  assert trained[2:] == [f"runs/{retrofit}"]
  shutil.rmtree(tmp_path / "runs" / retrofit)
  shutil.move(tmp_path / "runs/dense-0.1M-s0/checkpoints", tmp_path / "elsewhere")

  @contextlib.contextmanager
  def waiting(_):  # for another process, which has brought them back meanwhile
    shutil.move(tmp_path / "elsewhere", tmp_path / "runs/dense-0.1M-s0/checkpoints")
    yield

  monkeypatch.setattr(lock, "waiting", waiting)
  study_lib.run(study, tmp_path, only=("*-s0",), **QUIET)
  assert trained[3:] == [f"runs/{retrofit}"]


def test_a_trunk_that_becomes_another_one_is_no_trunk(slices, tmp_path):
  study, first, _ = slices
  retrofit = "retrofit_msa_25-0.1M-s0"
  brought_home(first, tmp_path, retrofit)
  log = tmp_path / "runs/dense-0.1M-s0/metrics.jsonl"
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  lines[6]["loss"] += 1e-7
  lines[9]["bits_per_byte"] -= 0.25
  log.write_text("".join(json.dumps(line) + "\n" for line in lines))
  said = []
  jobs = study_lib.run(study, tmp_path, only=("*-s0",), on_job=said.append)
  assert [job.run for job in jobs if job.status != "done"] == [f"runs/{retrofit}"]
  assert any("left for later: the trunk" in line and "is another one from step 7 on: loss =" in line
             and f"has to lie in {tmp_path}/autotune" in line for line in said)
  assert not (tmp_path / "runs" / retrofit).exists() and not (tmp_path / "runs/dense-0.1M-s0/checkpoints").exists()
  study_lib.run(study, tmp_path, only=("*-s0",), other_bits=True, **QUIET)
  of_fork = json.loads((tmp_path / "runs" / retrofit / "versions.json").read_text())["trunk_again"]
  assert of_fork == {"from_step": 7, "last_step": 15, "largest_difference": 0.25, "difference_at_end": 0.0}
  line, = (line for line in plan_file.deviations(archive.load([tmp_path])) if "trained again" in line)
  assert line == ("retrofit_msa_25-0.1M: forked from a trunk that was trained again and logged other bits: seed 0 "
                  "(from step 7 on; training bits per byte differ by 0.25 at most, by 0 at the fork).")
  record = tmp_path / "runs" / retrofit / "versions.json"
  versions = json.loads(record.read_text())
  del versions["trunk_again"]
  for mark in ({"trunk_again": of_fork}, {}):  # cut, it goes on; the second had left before
    record.write_text(json.dumps({**versions, **mark}))
    (record.parent / "DONE").unlink()
    study_lib.run(study, tmp_path, only=("*-s0",), **QUIET)
    assert (record.parent / "DONE").exists() and json.loads(record.read_text()) == {**versions, **mark}
