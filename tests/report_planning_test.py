"""What a report says for the study that comes next, and what of it goes into a repository."""
import csv
import errno
import lzma
import math
import os

import numpy as np
import pytest

from benchmarks import planted
from benchmarks.planted import write_study
from nsa import config as config_lib, flops, report
from nsa.report import archive, endpoints, layer_plots, planning, style


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  return write_study(tmp_path_factory.mktemp("study"))


def test_the_spread_of_paired_differences_and_what_it_lets_a_main_study_see(study):
  loaded = archive.load([study])
  table = endpoints.rows(loaded)
  found = {s.arm: s for s in planning.spreads(loaded, table, "tiny", loaded.primary, 0.001)}
  a, b = (endpoints.series(table, arm, "tiny", "sparse", loaded.primary) for arm in ("retrofit_msa_5", "native_msa"))
  one = found["retrofit_msa_5"]
  assert one.sd == pytest.approx(np.std(list(a.values()), ddof=1))
  assert one.sd_difference == pytest.approx(np.std([a[s] - b[s] for s in a], ddof=1)) and one.sd_difference < one.sd
  # 2 degrees of freedom: 95 % of chi-square lie between 0.0506 and 7.378; noncentral t: 3 pairs see 3.26 SD, 5 see
  # 1.68.
  middle, low, high = one.detectable(3)
  assert [low / middle, high / middle] == pytest.approx([math.sqrt(2 / 7.378), math.sqrt(2 / 0.05064)], rel=1e-3)
  assert middle == pytest.approx(3.26 * one.sd_difference, rel=0.01)
  assert one.detectable(5)[0] == pytest.approx(1.68 * one.sd_difference, rel=0.01)
  assert (one.seeds_for_margin
          and one.detectable(one.seeds_for_margin)[0] <= 0.001 < one.detectable(one.seeds_for_margin - 1)[0])
  pooled = found[""]
  variances = [s.sd_difference ** 2 for s in found.values() if s.arm.startswith("retrofit")]
  assert pooled.df == 6 and pooled.sd_difference == pytest.approx(math.sqrt(np.mean(variances)))


def test_held_out_loss_over_training_ends_where_the_endpoints_are(study):
  loaded = archive.load([study])
  table = endpoints.rows(loaded)
  for arm, mode in (("dense", "dense"), ("native_msa", "sparse")):
    last = {seed: v for (seed, step), v in endpoints.over_training(loaded, arm, "tiny").items() if step == 1000}
    assert last == pytest.approx(endpoints.series(table, arm, "tiny", mode, planted.TEXT))
  assert {step for _, step in endpoints.over_training(loaded, "retrofit_msa_5", "tiny")} == {975, 1000}


def test_flops_per_second_are_those_of_the_speeds_logged(study):
  loaded = archive.load([study])
  found = planning.rates(loaded)
  assert list(found) == loaded.arms and len({run.arm for run in loaded.runs}) == len(loaded.runs)
  for run in loaded.runs:  # all three seeds of an arm ran together
    speed = 3 * np.mean([endpoints.speed(curve, "tokens_per_second") for curve in run.curves.values()])
    config = endpoints.parsed(run.config)
    begin, end = config_lib.steps_of(config.schedule)[-1]
    tokens = (end - begin) * config.data.global_batch * config.data.context
    work = flops.cumulative(config, end) - flops.cumulative(config, begin)
    assert found[run.arm] == pytest.approx(speed * work / tokens, rel=1e-6)
  assert 0 < found["native_msa"] < found["dense"]  # as fast, with fewer FLOPs a token


def test_a_published_picture_is_one_small_file(study, tmp_path):
  from PIL import Image

  loaded = archive.load([study])
  look = style.Look(loaded)
  style.save(layer_plots.masses_over_training(loaded, look, "tiny"), tmp_path, "learning", ("png",))
  (file,) = tmp_path.iterdir()
  assert file.suffix == ".png" and 3_000 < file.stat().st_size < 100_000
  colors = np.array([c for _, c in Image.open(file).convert("RGB").getcolors(2 ** 24)])
  for arm in loaded.arms:  # a palette must not turn one arm's colour into another's
    wanted = [int(look(arm)[0][i:i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(colors - wanted).max(1).min() <= 4, arm


def test_a_figure_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  for endings in (("png",), ("svg", "png")):
    with pytest.raises(OSError, match="No space"):
      style.save(style.figure(2, 2)[0], tmp_path, "loss", endings)
  assert not list(tmp_path.iterdir())


def test_a_published_report_knows_no_paths_and_keeps_notes(study, tmp_path):
  (tmp_path / "NOTES.md").write_text("# Surprises\n\n- one **bold**\n  claim\n- two\n\nA paragraph.\n\n"
                                     "| a | b |\n|--|--|\n| c | 1 |\n")
  paths = report.write([study], tmp_path, publish=True)
  files = [p for p in tmp_path.rglob("*") if p.is_file()]
  assert {p.suffix for p in files} == {".md", ".csv", ".png", ".xz"} and paths.html is None
  read = lambda p: lzma.decompress(p.read_bytes()) if p.suffix == ".xz" else p.read_bytes()
  assert not any(str(study).encode() in read(p) for p in files)
  text = paths.markdown.read_text()
  assert ("## Notes\n\n### Surprises\n\n- one **bold**\n  claim\n- two\n\nA paragraph.\n\n"
          "| a | b |\n|--|--|\n| c | 1 |\n") in text
  layers = list(csv.DictReader(open(tmp_path / "layers.csv")))
  assert {r["step"] for r in layers if r["arm"] == "retrofit_msa_5"} == {"975", "1000"}
  assert "| 3.00 to 9.00 |" in text  # planted: 3, 5, 7 and 9 times the blocks of one query


def test_a_figure_holds_its_legend():
  fig, (ax,) = style.figure(6, 3)
  for i in range(30):
    ax.plot([0, 1], [i, i], label=f"arm {i}")
  style.key(fig, ax)
  fig.canvas.draw()
  (legend,) = fig.legends
  box, whole = legend.get_window_extent(), fig.bbox
  assert whole.y0 <= box.y0 and box.y1 <= whole.y1 and box.x1 <= whole.x1
  low, (one,) = style.figure(6, 3)
  one.plot([0, 1], label="arm")
  style.key(low, one)
  assert low.get_figheight() == 3
