"""What a report puts into a repository: an archive that unpacks to a study, from which the same report comes out
again."""
import csv
import json
import lzma
from pathlib import Path
import re
import shutil

import numpy as np
import pytest
from report_cases import seal

from benchmarks import planted
from benchmarks.planted import ARMS, write_study
from nsa import autotune, report
from nsa.report import archive, endpoints, reading, runs, verdict

pytestmark = pytest.mark.usefixtures("quick")
RESULTS = Path(__file__).parents[1] / "experiments" / "results"
FILES = ("report.md", "results.csv", "layers.csv", archive.NAME)
FEW = {arm: ARMS[arm] for arm in ("dense", "native_msa", "retrofit_msa_5")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A study of one run per arm and seed, all finished."""
  return write_study(tmp_path_factory.mktemp("whole"), FEW, together=False)


@pytest.fixture
def live(whole, tmp_path):
  """The same study on its way: seed 0 finished, seed 1 begun, seed 2 not. It lies elsewhere, and so does its corpus."""
  root = shutil.copytree(whole, tmp_path / "live")
  for run in (root / "runs").iterdir():
    if run.name.endswith("-1"):
      (run / "DONE").unlink()
    elif run.name.endswith("-2"):
      shutil.rmtree(run)
  for file in root.glob("runs/*/config.json"):
    file.write_text(file.read_text().replace(str(whole), "/mnt/elsewhere"))
  return root


def published(paths, out):
  report.write(paths, out, publish=True)
  return out


def deltas(*paths):
  study = archive.load(list(paths))
  return verdict.verdict(study, endpoints.rows(study)).of("Delta", planted.TEXT, "tiny")


def contents(folder):
  return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def test_a_published_report_is_written_again_to_the_byte(tmp_path):
  """From its own directory and into it; with a run that failed, one that stopped, a seed that diverged, a cut line."""
  root = write_study(tmp_path / "study", ARMS)
  run = lambda arm: root / "runs" / f"{arm}-tiny-0_1_2"
  (run("retrofit_msa_1") / "DONE").unlink()
  (run("retrofit_msa_1") / "FAILED").write_text(json.dumps({"error": f"no space left in {root}/runs/x: disk full"}))
  (run("retrofit_msa_25") / "DONE").unlink()
  with open(run("retrofit_msa_5") / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 1010, "seed": 1, "loss": "nan", "tokens": 1, "tokens_per_second": "nan"}) + "\n{")
  snapshots = {"step": 500, "snapshots": [{"seed": 0, "step": 500, "values": {"own": {"hoyer": [[0.12345, None]]}}}]}
  (run("dense") / "hidden").mkdir()
  (run("dense") / "hidden/500.json").write_text(json.dumps(snapshots))
  before = report.write([root], tmp_path / "live").markdown.read_text()
  first = contents(published([root], tmp_path / "first"))
  with archive.unpacked(tmp_path / "first" / archive.NAME) as folder:
    names = {p.name for p in folder.rglob("dense*/**/*") if p.is_file()}
    assert names == {"config.json", "versions.json", "metrics.jsonl", "1000.json", "500.json", "DONE"}
    assert json.loads(next(folder.rglob("hidden/500.json")).read_text()) == snapshots
    assert (folder / "study.json").is_file() and json.loads(
        (folder / "runs/retrofit_msa_5-tiny-0_1_2/config.json").read_text())[
        "fork"]["workdir"] == "@dense"
  text = lzma.decompress(first[archive.NAME])
  assert b'"/' not in text and str(tmp_path).encode() not in text + first["report.md"]
  assert len(first[archive.NAME]) < 0.15 * sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
  assert contents(published([tmp_path / "first"], tmp_path / "again")) == first
  assert contents(published([tmp_path / "again"], tmp_path / "again")) == first
  # What was read live reads the same: the verdict, every number, the warnings.
  tables = lambda text: [line for line in text.splitlines() if line.startswith(("|", ">", "- "))]
  assert tables(before.replace(str(root) + "/runs/", "")) == tables(first["report.md"].decode())
  numbers = lambda text: np.array(
      [float(cell or "nan") for row in csv.reader(text.splitlines()[1:]) for cell in row[9:]])
  np.testing.assert_allclose(numbers((tmp_path / "live/results.csv").read_text()),
                             numbers(first["results.csv"].decode()), rtol=1e-4)


def test_a_study_in_slices_gets_an_archive_for_what_each_slice_adds(whole, live, tmp_path):
  out = published([live], tmp_path / "out")
  first = (out / archive.NAME).read_bytes()
  published([live], out)
  assert [p.name for p in archive.archives(out)] == [archive.NAME], "nothing new"
  published([whole, out], out)
  assert [p.name for p in archive.archives(out)] == [archive.NAME, "study-2.tar.xz"]
  assert (out / archive.NAME).read_bytes() == first
  with archive.unpacked(out / "study-2.tar.xz") as folder:
    added = {p.name for p in (folder / "runs").iterdir()}
  assert added == {f"{arm}-tiny-{seed}" for arm in FEW for seed in (1, 2)}
  at_once = published([whole], tmp_path / "once")
  assert [(out / name).read_text() for name in FILES[:3]] == [(at_once / name).read_text() for name in FILES[:3]]
  assert contents(published([out], tmp_path / "again")) == contents(at_once)
  run = whole / "runs/dense-tiny-2/metrics.jsonl"  # trained again, to other numbers: both stay, the newest counts
  kept = run.read_text()
  try:
    lines = run.read_text().splitlines()
    run.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "loss": 7.5})]) + "\n")
    published([whole, out], out)
  finally:
    run.write_text(kept)
  with archive.unpacked(out / "study-3.tar.xz") as folder:
    assert [p.name for p in (folder / "runs").iterdir()] == ["dense-tiny-2"]
  (found,) = [r for r in archive.load([out]).runs if r.name == "dense-tiny-2"]
  assert found.curves[2]["loss"][-1] == 7.5


def test_sizes_stand_in_their_order_whatever_ran_last(tmp_path):
  root = planted.write_study(tmp_path, seeds=(0,), sizes=("M", "S", "M8K"), rich=False)
  wide = {"S": {}, "M": {"d_model": 999}, "M8K": {"d_model": 999}}
  for file in root.glob("runs/*/config.json"):
    config = json.loads(file.read_text())
    config["model"] |= wide[config["size"]]
    config["data"]["context"] *= 1 + (config["size"] == "M8K")
    file.write_text(json.dumps(config))
  assert archive.load([root]).sizes == ["S", "M", "M8K"]


def test_the_autotuners_choices_go_along_and_come_back(whole, live, tmp_path):
  """Of all slices, in the order in which they unpack; XLA's files may be binary and lie in folders."""
  choices = {"a=.textproto": b"gemm {\n  algorithm: 5\n}\n", "H200/b.pb": b"\x0a\xff"}
  root = shutil.copytree(whole, tmp_path / "whole")
  for study, names in ((live, ["a=.textproto"]), (root, [*choices])):
    for name in names:
      path = study / "autotune" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(choices[name])
  out = published([live], tmp_path / "out")
  published([root, out], out)
  again = tmp_path / "again"
  for path in archive.archives(out):
    with archive.unpacked(path) as folder:
      assert len(autotune.read(folder)) == 1, "what one archive has, the next has not again"
      shutil.copytree(folder, again, dirs_exist_ok=True)
  assert autotune.read(again) == archive.load([out]).autotune == choices
  plain = published([whole], tmp_path / "plain")
  assert [(out / name).read_text() for name in FILES[:3]] == [(plain / name).read_text() for name in FILES[:3]]


def test_what_is_sealed_is_not_reported_before_it_is_opened_and_stays_open(whole, tmp_path):
  root = shutil.copytree(whole, tmp_path / "study")
  plain = contents(published([root], tmp_path / "plain"))
  seal(root, 0.1, but=("native_msa-tiny-2",))  # on test the retrofit is behind by 0.1 more
  shut = contents(published([root], tmp_path / "shut"))
  assert {name: shut[name] for name in FILES[:3]} == {name: plain[name] for name in FILES[:3]}
  open_it = lambda path, **options: report.write([path], tmp_path / "open", opened=True, **options)
  with pytest.raises(ValueError, match="--open: give --publish, too"):
    open_it(tmp_path / "shut")
  with pytest.raises(ValueError, match="--open: no finished run has a sealed evaluation"):
    open_it(whole, publish=True)
  (root / "runs/dense-tiny-1/DONE").unlink()
  with pytest.raises(ValueError, match="--open: the study waits for 1 runs, the first of them dense-tiny seed 1"):
    open_it(root, publish=True)
  open_it(tmp_path / "shut", publish=True)  # from what was published
  opened = contents(tmp_path / "open")
  with pytest.raises(ValueError, match="--open: it was opened before, once and for all"):
    open_it(tmp_path / "open", publish=True)
  assert contents(published([tmp_path / "open"], tmp_path / "again")) == opened
  text = opened["report.md"].decode()
  assert text.startswith(shut["report.md"].decode().partition("### Which endpoints count")[0])
  assert "### On test, which nothing was chosen by" in text
  assert "8 of 9 finished runs have a sealed evaluation that was opened, each" in text
  begin = "| Delta(5 %) | retrofit_msa_5 - native_msa | bits per byte, second half"
  (line,) = [x for x in text.splitlines() if x.startswith(begin)]
  cells = [cell.strip() for cell in line.split("|")]
  assert float(cells[7]) == pytest.approx(float(cells[4]) + 0.1, abs=0.003) and cells[6] == "2"  # seeds
  rows = list(csv.DictReader(opened["results.csv"].decode().splitlines()))
  assert {r["split"] for r in rows} == {"val", "test"} and sum(r["split"] == "test" for r in rows) == 8


def test_what_is_not_finished_comes_from_what_was_published_and_the_rest_does_not(whole, live, tmp_path):
  before = published([whole], tmp_path / "before")
  native = live / "runs/native_msa-tiny-0/eval/1000.json"
  tree = json.loads(native.read_text())
  for record in tree["records"]:
    if record["kind"] == "language":
      record["second_half_bits_per_byte"] += 1.0
  native.write_text(json.dumps(tree))  # the live study was evaluated again
  (full,), (merged,) = deltas(whole), deltas(live, before)
  assert merged.differences == {0: pytest.approx(full.differences[0] - 1), 1: full.differences[1],
                                2: full.differences[2]}
  assert merged.documents.n == 3
  text = (published([before, live], tmp_path / "report") / "report.md").read_text()  # in any order
  assert "9 runs: 9 done." in text and "Not drawn" not in text
  lines = {line for line in (before / "results.csv").read_text().splitlines()
           if not line.startswith("native_msa-tiny-0,")}
  assert lines <= set((tmp_path / "report/results.csv").read_text().splitlines())


def test_long_metrics_are_thinned_once_where_they_are_read(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / "a").mkdir()
  lines = [{"step": i, "seed": 0, "stage": int(i > 800), "loss": float(rng.normal(3, 1)), "tokens": 8192 * i,
            "tokens_per_second": 2e4,
            "flops": 1e9 * i} for i in range(1, 3702)]
  (tmp_path / "a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  curve = reading.load_run(tmp_path / "a").curves[0]
  assert reading.LINES <= len(curve["step"]) < 2 * reading.LINES and {800, 801, 3701} <= set(curve["step"])
  study = runs.Study("x", [reading.load_run(tmp_path / "a")])
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / archive.NAME).write_bytes(archive.pack(study))
  again = archive.load([tmp_path / "out"]).runs[0].curves[0]
  assert all(np.array_equal(curve[name], again[name], equal_nan=True) for name in curve)


@pytest.mark.parametrize("field, message", [
    ("config", "arms.native_msa.attention.num_blocks = 8, and 9 in 'native against retrofit': not the same experiment"),
    ("margin", "endpoints[0].margin = 0.005, and 0.02 in"),
    ("corpus", "versions.corpus_sha256[0] = 'abc', and 'def' in")])
def test_another_experiment_is_refused_by_its_field(field, message, whole, live, tmp_path):
  def change(root, name, old, new):
    for file in root.rglob(name):
      file.write_text(file.read_text().replace(old, new))
  copy = shutil.copytree(whole, tmp_path / "copy")
  if field == "corpus":
    change(copy, "versions.json", '"jax"', '"corpus_sha256": "abc", "jax"')
    change(live, "versions.json", '"jax"', '"corpus_sha256": "def", "jax"')
  before = published([copy], tmp_path / "before")
  change(live, "config.json", '"num_blocks": 8', '"num_blocks": 9' if field == "config" else '"num_blocks": 8')
  change(live, "study.json", '"margin": 0.005', '"margin": 0.02' if field == "margin" else '"margin": 0.005')
  with pytest.raises(ValueError, match=re.escape(f"{before}: {message}")):
    report.write([live, before], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_nothing_is_lost_in_the_directory_written_to(whole, live, tmp_path):
  before = published([whole], tmp_path / "before")
  kept = contents(before)
  for paths, out, publishing, message in (
      ([live], live, True, "a study, or a report without records, lies there"),
      ([live], before, True, "6 finished seeds that were published there, the first "
       "of them dense tiny 1, are not in this report; name the directory among the paths too"),
      ([live, before], before, False, f"would no longer belong to its {archive.NAME}"),
      ([live], RESULTS / "pilot", True, "a report without records, lies there")):
    with pytest.raises(ValueError, match=re.escape(message)):
      report.write(paths, out, publish=publishing)
  assert contents(before) == kept and "jobs" in json.loads((live / "study.json").read_text())
  link = tmp_path / "link"
  link.symlink_to(before)
  assert contents(published([before], link)) == kept


def test_a_damaged_archive_is_named(whole, tmp_path):
  before = published([whole], tmp_path / "before")
  data = (before / archive.NAME).read_bytes()
  pointer = b"version https://git-lfs.github.com/spec/v1\nsize 12\n"
  damages = [pointer, data[:-8],
             *(data[:i] + bytes([data[i] ^ 4]) + data[i + 1:] for i in range(20, len(data) - 20, 997))]
  for damaged in damages:
    (before / archive.NAME).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{archive.NAME}.*take it from the repository again"):
      report.verdict_table(before)


def test_single_runs_beside_what_was_published_are_of_its_experiment_and_not_in_it(whole, tmp_path):
  before = published([whole], tmp_path / "before")
  with pytest.raises(ValueError, match="run 'dense-tiny-0' is in 'native against retrofit' already"):
    archive.load([before, whole / "runs/dense-tiny-0"])
  other = shutil.copytree(whole / "runs/native_msa-tiny-0", tmp_path / "native_msa-tiny-7")
  config = (other / "config.json").read_text()
  (other / "config.json").write_text(config.replace('"num_blocks": 8', '"num_blocks": 9'))
  with pytest.raises(ValueError, match=re.escape("arms.native_msa.attention.num_blocks = 9, and 8")):
    archive.load([before, other])
  (other / "config.json").write_text(config)
  assert len(archive.load([before, other]).runs) == 10


def test_what_could_not_be_read_and_paths_in_errors_are_said_the_same_way_again(whole, tmp_path):
  root = shutil.copytree(whole, tmp_path / "study")
  (root / "runs/dense-tiny-0/eval/1000.json").write_text("{")
  (root / "runs/dense-tiny-1/DONE").unlink()
  (root / "runs/dense-tiny-1/FAILED").write_text(
      json.dumps({"error": "OSError: /home/user/secret/corpus.tar.xz: not there"}))
  shutil.rmtree(root / "runs/dense-tiny-2")
  (root / "runs/dense-tiny-2").mkdir()
  first = contents(published([root], tmp_path / "first"))
  text = first["report.md"].decode()
  assert "1000.json" in text and "OSError: corpus.tar.xz: not there" in text and "secret" not in text
  assert contents(published([tmp_path / "first"], tmp_path / "again")) == first


@pytest.mark.parametrize("name", ["pilot", "pilot_98M"])
def test_the_pilots_are_reports_to_be_read_as_they_are(name):
  with pytest.raises(ValueError, match="a report without records, to be read as it is"):
    archive.load([RESULTS / name])
  assert "## Erratum" in (RESULTS / name / "report.md").read_text()[:3000]
