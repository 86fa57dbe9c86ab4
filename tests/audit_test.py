"""What tasks could be answered from without selecting anything (nsa/tasks/audit.py)."""
import dataclasses

import numpy as np
import pytest

from experiments import pilot
from nsa import config as config_lib, methods, study as study_lib, tasks
from nsa.config import DataConfig, EvalConfig
from nsa.planning import plan
from nsa.tasks import audit, frame


def test_bindings_at_the_beginning_are_the_sink():
  """The paper's 16 bindings are tokens 0 to 31: one block of 32. A block of 16 holds half of them."""
  whole, half = (audit.row("mqar:pairs=16,layout=paper", 512, audit.Geometry(size, 4, 1)) for size in (32, 16))
  assert (whole.first, whole.forced, whole.window) == (1, 1, 1) and whole.answers == 64 * 16
  assert half.first == 0.5
  assert audit.row("mqar:pairs=16,layout=paper", 512, audit.Geometry(32, 4, 0)).first == 0


def test_scattered_evidence_is_in_a_window_by_chance_alone():
  """p(d) = 2 (1 - d): 15.5 blocks of 128 hold 1 - (1 - 15.5 / 128)^2 = 22.8 %, the first block a little more."""
  row = audit.row("mqar:pairs=16", 4096, audit.Geometry(32, 16))
  assert abs(row.window - 0.235) < 0.04 and row.first == 0 and row.local < 0.02 and row.forced == row.local


class Planted(frame.Task):
  """Three answers from evidence at 5, at 20..23, and at 1 and 40, asked at 41, 50 and 60."""
  family, sizes, min_length = "planted", (), 0

  def example(self, seed, index, length, split="train", haystack=None):
    group = np.full(length, -1, np.int32)
    group[[42, 51, 61]] = 0, 1, 2
    evidence = np.array([[[5, 5], [-1, -1]], [[20, 23], [-1, -1]], [[1, 1], [40, 40]]])
    return frame.Example(np.zeros(length, np.int32), group, np.array([41, 50, 60]), evidence)


def test_every_piece_has_to_be_in_sight(monkeypatch):
  monkeypatch.setattr(audit.tasks, "get", lambda name: Planted())
  count = lambda **g: audit.row.__wrapped__("planted", 64, audit.Geometry(**g))
  # Blocks of 8; the tokens that predict are 41, 50 and 60: blocks 5, 6 and 7.
  a = count(block_size=8, num_blocks=5, num_initial=1, num_local=3)
  assert (a.first, a.local, a.forced) == (1 / 3, 0, 2 / 3)  # 5; none; 5, and 1 with 40 (block 5 of 5 to 7)
  assert a.window == 2 / 3  # the first block and the latest 4; 20..23 is block 2, and the second query has 3 to 6
  assert count(block_size=8, num_blocks=6).window == 1
  assert count(block_size=22, num_blocks=1).forced == 0  # block 0 ends at 21: half of a piece is not enough


@pytest.mark.parametrize("name", ["mqar:pairs=12,updates=6", "recall:pairs=4", "tracking:chains=4,hops=2"])
def test_all_answers_at_once_are_the_answers_one_by_one(name):
  task, size = tasks.get(name), 48
  examples, _ = audit._examples(task, 1024, "val")
  visible = np.random.default_rng(0).random((sum(len(e.query) for e in examples), 1024 // size + 1)) < 0.8
  once = audit._read_from_all_evidence(task, examples, visible, size)
  assert once.tolist() == audit._read_one_by_one(task, examples, visible, size) and 0 < once.mean() < 1


def test_a_study_that_needs_no_selection_is_refused():
  study = pilot.get_config()
  assert study.shortcuts and audit.problems(study) == []
  study.shortcuts = False
  study.arms = [dataclasses.replace(
      arm, eval=dataclasses.replace(arm.eval, tasks=("mqar:pairs=16,layout=paper", "mqar:pairs=16")))
                for arm in study.arms]
  for run in (lambda: plan.describe_study(study, "x"), lambda: study_lib.run(study, "/nowhere")):
    with pytest.raises(config_lib.ConfigError) as error:
      run()
    assert {(name, value) for name, value, _ in error.value.problems} == {("eval.tasks", "mqar:pairs=16,layout=paper")}
    assert "100 % of its answers at 4096 tokens" in str(error.value) and "shortcuts = True" in str(error.value)


def test_geometries_are_those_of_the_run_modes():
  run = lambda attention, modes, blocks={}: config_lib.Config(
      attention=attention, data=DataConfig(context=256),
      eval=EvalConfig(run_modes=modes, blocks=blocks, tasks=("mqar:pairs=4",)))
  msa = methods.MSA(block_size=8, num_blocks=4, num_initial=1, num_local=2)
  assert audit.geometries(run(msa, ("sparse", "dense", "random:num_blocks=6"))) == [
      audit.Geometry(8, 4, 1, 2), audit.Geometry(8, 6, 1, 2)]
  assert audit.geometries(run(methods.Dense(), ("dense", "quest", "quest:num_blocks=8"),
                              dict(block_size=16, num_blocks=4))) == [
      audit.Geometry(16, 4), audit.Geometry(16, 8)]
  assert audit.geometries(run(methods.Dense(), ("dense",))) == []
  lines = audit.text(audit.of_config(run(msa, ("sparse",)))).split("\n")
  assert len(lines) == 3 and lines[2].startswith("mqar:pairs=4") and "4 x 8" in lines[2]
