"""Runs of a study side by side, with processes that do nothing but leave what a run leaves."""
import sys
import time
from types import SimpleNamespace

from launch import side_by_side
from nsa import lock

# Takes names and answers; each run takes half a second, notes its device, its share of memory and its process, and is
# done, is left, or ends its process without a word.
PROCESS = """
import os, pathlib, sys, time
from launch import side_by_side
root = pathlib.Path(sys.argv[1])
print("an import says this")
def run(name):
  (root / "runs" / name).mkdir(parents=True, exist_ok=True)
  note = lambda what: open(root / "notes", "a").write(
      f"{time.time()} {what} {name} {os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']} "
      f"{os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION']}\\n")
  note("began")
  print("about", name)
  time.sleep(0.5)
  note("ended")
  if name.startswith("breaks"):
    sys.exit("out of memory")
  if not name.startswith("left"):
    (root / "runs" / name / "DONE").write_text("")
side_by_side.serve(run, root / "logs")
"""


def jobs(**trunk_of):
  """`trunk_of`: names, with "@STEP" behind it a fork from that step."""
  out = []
  for name, trunk in trunk_of.items():
    trunk, _, step = trunk.partition("@")
    config = SimpleNamespace(fork=SimpleNamespace(step=int(step or -1)))
    out.append(SimpleNamespace(run=f"runs/{name}", trunk=trunk and f"runs/{trunk}", config=config))
  return out


def run(todo, root, devices):
  lines = []
  command = lambda: [sys.executable, "-c", PROCESS, str(root)]
  assert not side_by_side.run(todo, root, devices, lines.append, command)
  return lines, [line.split() for line in (root / "notes").read_text().splitlines()]


def test_runs_share_the_devices_and_forks_wait_for_their_trunks(tmp_path):
  todo = jobs(dense="", native="", cold="", fork="dense", later="dense", orphan="elsewhere")
  began = time.monotonic()
  lines, notes = run(todo, tmp_path, ["0", "0", "1"])
  assert time.monotonic() - began < 5 * 0.5 + 3
  at = {(what, name): float(t) for t, what, name, *_ in notes}
  assert at["began", "fork"] > at["ended", "dense"] and at["began", "cold"] < at["ended", "dense"], "three at a time"
  assert {(device, share) for *_, device, share in notes} == {("0", "0.450"), ("1", "0.900")}
  assert len({process for *_, process, _, _ in notes}) == 3, "a process stays for the next run"
  assert (tmp_path / "logs/native.log").read_text() == "about native\n"
  assert at["began", "later"] > at["ended", "fork"], "the trunk has no checkpoints: one fork trains it again"
  assert lines[-1] == "left for later, their trunks are not done: runs/orphan"
  lines, again = run(todo[:5], tmp_path, ["0"])
  assert lines == [] and again == notes, "done before"


def test_forks_wait_for_the_one_that_trains_their_trunk_again(tmp_path):
  (tmp_path / "runs/dense/checkpoints/5").mkdir(parents=True)
  (tmp_path / "runs/dense/DONE").write_text("")
  far, farther, near = jobs(far="dense@9", farther="dense@12", near="dense@5")
  ready = lambda *waiting, at_work: side_by_side.ready(list(waiting), at_work, tmp_path)
  assert ready(far, farther, near, at_work=[]) is far
  assert ready(farther, near, at_work=[far]) is near, "its checkpoint is there; the other's trunk is being trained"
  (tmp_path / "runs/dense/checkpoints/9").mkdir()
  assert ready(farther, at_work=[far, near]) is farther, "nobody trains the trunk any more"


def test_a_run_that_ends_without_a_word_fails_and_takes_its_forks_along(tmp_path):
  lines, notes = run(jobs(breaks="", fork="breaks", other="", left="", last=""), tmp_path, ["0"])
  assert "its process ended with 1: about breaks\\nout of memory" in (tmp_path / "runs/breaks/FAILED").read_text()
  assert "its trunk runs/breaks failed" in (tmp_path / "runs/fork/FAILED").read_text()
  began = {name: process for _, what, name, process, *_ in notes if what == "began"}
  assert list(began) == ["breaks", "other", "left", "last"]
  assert began["breaks"] != began["other"] == began["left"] != began["last"], "a failure may be the process's own"
  assert any(line.startswith("runs/other: done in") and line.endswith("1 of 5 done") for line in lines)
  assert "it was left: about left" in (tmp_path / "runs/left/FAILED").read_text()


def test_a_run_that_another_process_trains_is_no_failure(tmp_path):
  (tmp_path / "runs/left").mkdir(parents=True)
  with lock.Lock(tmp_path / "runs/left"):
    lines, _ = run(jobs(left="", fork="left"), tmp_path, ["0"])
  assert "runs/left: left for later (" in lines[1] and "trains there" in lines[1] and lines[1].endswith("0 of 2 done")
  assert lines[-1] == "left for later, their trunks are not done: runs/fork"
  assert not list(tmp_path.glob("runs/*/FAILED"))


def test_a_run_that_another_process_ends_meanwhile_is_done(tmp_path, monkeypatch):
  def ends(workdir):
    (workdir / "DONE").write_text("")
    return ""
  monkeypatch.setattr(side_by_side, "_elsewhere", ends)
  lines, _ = run(jobs(left="", fork="left"), tmp_path, ["0"])
  assert lines[1].startswith("runs/left: done in") and lines[-1].endswith("2 of 2 done")
  assert not list(tmp_path.glob("runs/*/FAILED"))


def test_a_process_that_cannot_begin_says_why(tmp_path):
  command = lambda: [sys.executable, "-c", "import nothing_there"]
  assert not side_by_side.run(jobs(one=""), tmp_path, ["0"], print, command)
  assert "nothing_there" in (tmp_path / "runs/one/FAILED").read_text()


def test_the_command_is_this_one_as_a_worker(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["study", "--config=x.py:a=1", "--devices", "0,1", "--only=*-s0", "--workdir=w",
                                    "--devices=2"])
  assert side_by_side.command()[1:] == ["-m", "launch.study", "--config=x.py:a=1", "--workdir=w", "--worker"]
