"""The entry points as a user meets them: commands, messages, exit codes; nothing lost on the way."""
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import commands
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--config.model.num_layers=1", "--config.model.d_model=16", "--config.model.mlp_dim=32",
        "--config.data.context=64", "--config.data.global_batch=2", "--config.eval.task_examples=2",
        "--config.eval.batch=2", "--config.eval.every=0", "--config.log_every=1",
        "--config.data.tasks=('mqar:pairs=4',)"]


def start(module, *args):
  """In an interpreter of its own."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
  return subprocess.Popen([sys.executable, "-m", f"launch.{module}", *map(str, args)], cwd=ROOT, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(module, *args, code=0):
  return commands.run(f"launch.{module}", *args, code=code)


def mqar(*args, steps=4, arm="msa"):
  return [f"--config=experiments/mqar.py:arm={arm},steps={steps}", *TINY, *args]


def test_devices_that_do_not_open_end_the_process():
  """JAX opens the CPU first and gives it to whoever asks again: a run would go on there in silence."""
  code = """
from jax._src import xla_bridge
def fail(*_):
  raise RuntimeError("planted: out of memory")
xla_bridge.register_backend_factory("planted", fail, priority=300, fail_quietly=False)
from launch import cli
import jax, time
cli.begin_early()
time.sleep(60)
print(jax.devices())
"""
  env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**env, "CUDA_VISIBLE_DEVICES": ""}, text=True,
                        capture_output=True, timeout=120)
  assert done.returncode == 1 and "planted: out of memory" in done.stderr and not done.stdout


def test_train_evaluate_report(tmp_path):
  work = tmp_path / "run"
  relative = os.path.relpath(work, ROOT)  # as a user types it
  process = start("train", *mqar("--workdir", relative))
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0 and "4 steps done" in out, err
  assert "selected_attention: reference (cpu)" in err, "which implementation ran is said once"
  assert {"config.json", "versions.json", "metrics.jsonl", "checkpoints", "eval", "DONE"} <= {
      p.name for p in work.iterdir()}
  lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  again, _ = run("train", *mqar("--workdir", work))
  assert "4 steps done" in again
  _, err = run("train", *mqar("--workdir", work, "--config.optimizer.b2=0.9"), code=2)
  assert "optimizer" in err and "another --workdir" in err

  before = (work / "eval/4.json").read_text()
  out, _ = run("evaluate", "--workdir", work, "--run_modes=sparse sparse:num_blocks=2")
  assert re.search(r"sparse:num_blocks=2\s+seed 0\s+\d", out)
  (by_hand,) = (work / "eval").glob("4-run_modes=*.json")
  assert str(by_hand) in out and (work / "eval/4.json").read_text() == before, "the run's own evaluation stays"
  same = lambda text: sorted((r["index"], r["answer_nll"]) for r in json.loads(text)["records"]
                             if r["run_mode"] == "sparse" and r["kind"] == "task")
  assert same(before) == same(by_hand.read_text()), "a checkpoint evaluates to the same numbers"

  out, _ = run("evaluate", "--workdir", work, "--run_modes=dense", "--tasks=copy:length=6 mqar:pairs=2", "--decoded=1",
               "--task_examples=2")
  for task in ("copy:length=6", "mqar:pairs=2"):
    assert re.search(rf"{task} +[\d.]+ % exact match \(2 examples\).*% decoded \(1 examples\)", out), out
  _, err = run("evaluate", "--workdir", work, "--tasks=copy:lenght=6", code=2)
  assert "lenght" in err and "Traceback" not in err

  out, _ = run("report", work)
  assert (work / "report/report.html").exists()
  (work / "full").mkdir()
  (work / "full/results.csv").symlink_to("/dev/full")
  _, err = run("report", work, "--out", work / "full", code=4)
  assert "disk is full" in err and "the same command writes it all anew" in err and "checkpoint" not in err


def test_dry_run_prints_and_touches_nothing(tmp_path):
  out, _ = run("train", *mqar("--dry_run", "--workdir", tmp_path / "none"))
  assert '"arm": "msa"' in out and "parameters: backbone" in out
  assert "warmup" in out and "index_kl" in out and "temporaries" in out
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("args, said", [
    (["--config.model.num_layer=3"], ["num_layer", "did you mean num_layers"]),
    (["--config.model.d_model=wide"], ["config.model.d_model", "wide"]),
    (["--config.model.num_heads=3", "--config.model.num_kv_heads=2", "--config.mesh.fsdp=5"],
     ["model.num_heads = 3", "multiple of model.num_kv_heads = 2"]),
    (["--config.mesh.fsdp=5"], ["mesh", "fsdp * context * tensor = 5 must divide"]),
    (["--config.attention.block_size=128"], ["attention.block_size = 128", "longer than the context of 64"]),
    (["--config.data.source=files:/no/such/corpus.tar.xz", "--config.data.task_share=0.5"], ["/no/such/corpus.tar.xz"]),
    (["--config.data.tokenizer=hf:/no.json"], ["  data.tokenizer = 'hf:/no.json': there is no /no.json"]),
    (["--config.fork.workdir=/no/such/trunk"], ["fork.workdir", "/no/such/trunk"]),
    (["stray"], ["unexpected arguments ['stray']"]),
    (["--config.attention=nsa"], ["config.attention: cannot be replaced as a whole", "--config.attention.NAME="]),
    (["--config.data.tasks=('mqar:pairs=60',)"], ["data.tasks = 'mqar:pairs=60'", "needs at least 239 tokens"]),
    (["--config.eval.tasks=('mqar:pairs=8@20',)"], ["eval.tasks = 'mqar:pairs=8@20'", "needs at least 31 tokens"]),
    (["--hang_timeout=-1"], ["--hang_timeout=-1"]),
])
def test_wrong_input_exits_with_2_and_says_what_to_do(tmp_path, args, said):
  _, err = run("train", *mqar("--workdir", tmp_path / "run", *args), code=2)
  for text in said:
    assert text in err, err
  assert "Traceback" not in err
  assert not (tmp_path / "run/config.json").exists()  # a corrected config may begin there


def test_wrong_experiment_argument(tmp_path):
  _, err = run("train", "--config=experiments/mqar.py:arms=msa", "--dry_run", code=2)
  assert "arms=msa" in err and "arm=dense" in err and "Traceback" not in err
  _, err = run("train", "--config=experiments/nothing.py", "--dry_run", code=2)
  assert "experiments/nothing.py" in err
  _, err = run("train", "--config=experiments/retrofit_hf.py:trunk=/no/such/run", "--dry_run", code=2)
  assert "experiment argument trunk = '/no/such/run': no run directory" in err and "Traceback" not in err
  for argument, said in (("mqar.py:steps=0", "steps = 0: above 0"), ("gates.py:lengths=x", "lengths = 'x': whole"),
                         ("rates.py:scale=nan", "scale = 'nan': takes a finite number")):
    _, err = run("train", f"--config=experiments/{argument}", "--dry_run", code=2)
    assert f"experiment argument {said}" in err and "Traceback" not in err
  _, err = run("compile", code=2)
  assert "--config: missing; " in err and "--topology: missing; " in err
  _, err = run("export_hf", "--workdir=x", "--out=y", "--shard_gb=nan", code=2)
  assert "--shard_gb=nan: takes a finite number" in err
  other = tmp_path / "nsa/other.py"  # somebody else's: where it went wrong is told
  other.parent.mkdir()
  other.write_text("def get_config(arg=None):\n  raise ValueError('an error of theirs')")
  _, err = run("train", f"--config={other}", "--dry_run", code=2)
  assert "an error of theirs" in err and "nsa/other.py\", line 2" in err and "Traceback" in err
  _, err = run("train", "--config=README.md", "--dry_run", code=2)
  assert "error: README.md, line " in err and "no Python that can be read" in err and "Traceback" not in err
  _, err = run("train", "--config=experiments/quickstart.py", "--dry_run", code=2)
  assert "launch.study" in err


@pytest.mark.parametrize("experiment, args, said", [
    ("gates.py:novels=no/novels.tar.xz,code=no/code.tar.xz", [], [
        "arms[*].data.corpora[novels] = 'files:no/novels.tar.xz': no/novels.tar.xz does not exist; give a folder or",
        "arms[*].data.corpora[code] = 'files:no/code.tar.xz'"]),
    ("gates.py:novels=docs,code=README.md", ["--devices=0"], [
        "arms[*].data.corpora[novels] = 'files:docs': there is no train/ folder in it",
        "arms[*].data.corpora[code] = 'files:README.md': not a folder and not an archive"]),
    ("titans.py:tiny=true,plan=no/plan", [], ["plan = 'no/plan': no such directory: write the plan first (--plan)"]),
    ("quickstart.py", ["--devices=x"], ["--devices = 'x': numbers or UUIDs of GPUs"]),
    ("quickstart.py", ["--config.margin=nan", "--config.reference=nativ"], [
        "margin = nan: a number above 0", "reference = 'nativ': no arm has that name; there are dense, native_msa, "]),
    ("smollm2.py:model=no/model", [], ["experiment argument model = 'no/model': no run directory"]),
    ("quickstart.py", ["--config.arms[0].fork.workdir=no/trunk"], ["arms[*].fork.workdir = 'no/trunk': no run"]),
])
def test_a_study_of_what_is_not_there_is_one_error(tmp_path, experiment, args, said):
  out, err = run("study", f"--config=experiments/{experiment}", "--workdir", tmp_path / "study", *args, code=2)
  for text in said:
    assert err.count(text) == 1, err
  assert "Traceback" not in err and not out and not (tmp_path / "study").exists()


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(tmp_path):
  work = tmp_path / "run"
  args = mqar("--workdir", work, "--config.checkpoint.every=2", "--config.checkpoint.keep=2", arm="dense")
  run("train", *args)

  def damage(step):
    data = max((p for p in (work / f"checkpoints/{step}").rglob("*") if p.is_file() and "/d/" in p.as_posix()),
               key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:data.stat().st_size // 2])

  first = (work / "eval/4.json").read_text()
  damage(4)
  (work / "DONE").unlink()
  (work / "eval/4.json").unlink()
  _, err = run("train", *args)
  assert "skipped damaged checkpoints [4] and restored step 2" in err
  assert sorted(p.name for p in (work / "checkpoints").iterdir()) == ["2", "4", "4.damaged"]
  assert (work / "eval/4.json").read_text() == first
  damage(2)
  damage(4)
  (work / "DONE").unlink()
  _, err = run("train", *args, code=4)  # starting anew would throw a run away: that is for somebody to decide
  assert "No earlier checkpoint is good" in err and "checkpoints/4" in err
  assert (work / "checkpoints/4").exists() and (work / "checkpoints/2").exists()


def test_divergence_stops_with_step_rows_and_last_good_checkpoint(tmp_path):
  _, err = run("train", *mqar("--workdir", tmp_path / "run", "--config.checkpoint.every=1",
                              "--config.schedule.learning_rate.peak=1e30", arm="dense"), code=3)
  assert re.search(r"not finite at step \d", err) and "row " in err and "last good checkpoint is step" in err


def test_a_study_survives_a_failed_arm_and_is_reused(tmp_path):
  experiment = tmp_path / "tiny.py"
  experiment.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import copy
from experiments import quickstart

def get_config(arg=None):
  study = quickstart.get_config("steps=20,seeds=2")
  study.arms = [arm for arm in study.arms if arm.arm == "dense"]
  for arm in study.arms:
    arm.model.num_layers, arm.model.d_model, arm.model.mlp_dim = 1, 16, 32
    arm.data.context, arm.data.global_batch = 128, 2
    arm.eval.sequences, arm.eval.batch, arm.eval.task_examples = 4, 4, 2
    arm.eval.run_modes = arm.eval.run_modes[:1]
    arm.schedule.learning_rate.peak = 1e-3
  bad = copy.deepcopy(study.arms[0])
  bad.arm = "diverges"
  bad.schedule.learning_rate.peak = 1e30
  study.arms.append(bad)
  study.reference, study.budgets = "dense", {{}}
  return study
""")
  work = tmp_path / "study"
  out, _ = run("study", f"--config={experiment}", "--workdir", work, code=5)
  assert "diverges" in out and "FAILED" in out and "1 of 4 runs done" in out  # both seeds are tried alone
  status = {job["run"]: job["status"] for job in json.loads((work / "study.json").read_text())["jobs"]}
  assert sorted(status.values()) == ["done"] + ["failed"] * 3
  text = (work / "report/report.md").read_text()
  assert "diverges" in text and "dense" in text
  first = (work / "runs/dense-0.1M-s0_1/metrics.jsonl").read_text()
  out, _ = run("study", f"--config={experiment}", "--workdir", work, code=5)
  assert out.count("done before") == 1
  assert (work / "runs/dense-0.1M-s0_1/metrics.jsonl").read_text() == first
