"""nsa.report from what was published before: the same report again, and its runs beside a study that goes on."""
import io
import json
import lzma
from pathlib import Path
import re
import shutil
import tarfile

import numpy as np
import pytest

from nsa import report
from nsa.report import endpoints, loading, publish, verdict
from report_planted import ARMS, write_study

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
FILES = ("report.md", "results.csv", "layers.csv", "study.json", publish.RECORDS)
FEW = {arm: ARMS[arm] for arm in ("dense", "native_msa", "retrofit_msa_5")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Figures are made and not rendered: these tests read the text."""
  from nsa.report import style
  monkeypatch.setattr(style, "save", lambda fig, folder, name, endings: None)


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


def as_before_archives(folder):
  """What the directories of the first pilots hold: no records, and less in study.json."""
  (folder / publish.RECORDS).unlink()
  plan = json.loads((folder / "study.json").read_text())
  del plan["order"], plan["declared"], plan["files"]
  (folder / "study.json").write_text(json.dumps(plan))
  return folder


def primaries(*paths):
  study = loading.load(list(paths))
  return [c for c in verdict.comparisons(study, endpoints.rows(study)) if c.role == "primary"]


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
    file.write(json.dumps({"step": 1010, "seed": 1, "loss": "nan", "tokens": 1, "tokens_per_second": "nan"}) + "\n")
  first = contents(published([root], tmp_path / "first"))
  with tarfile.open(fileobj=io.BytesIO(first[publish.RECORDS])) as tar:
    names = {member.name for member in tar}
  assert {name.rpartition("/")[2] for name in names if "dense" in name} == {
      "config.json", "versions.json", "metrics.jsonl", "1000.json", "500.json", "DONE"}
  assert not any("checkpoint" in name or name.startswith("/") for name in names)
  text = lzma.decompress(first[publish.RECORDS])
  assert b'"/' not in text and str(tmp_path).encode() not in text + first["study.json"] + first["report.md"]
  assert len(first[publish.RECORDS]) < 0.15 * sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
  assert contents(published([tmp_path / "first"], tmp_path / "again")) == first
  assert contents(published([tmp_path / "again"], tmp_path / "again")) == first


def test_thinned_metrics_keep_what_endpoints_are_read_from():
  rng = np.random.default_rng(0)
  for n, last in ((3701, 0), (2500, 1)):
    step = np.arange(1, n + 1.0)
    curve = {"step": step, "stage": (step > 800) * 1.0, "tokens": 8192 * step, "flops": 1e9 * step, "loss": rng.normal(3, 1, n),
             "tokens_per_second": rng.normal(2e4, 300, n), "mfu": rng.random(n), "bits_per_byte": step, "seconds": step}
    curve["loss"][-1] = np.nan if last else 1.0
    kept = list(publish._lines(0, curve))
    read = lambda lines: {name: np.array([line.get(name, np.nan) for line in lines], float) for name in curve}
    again = read(kept)
    assert publish.LINES <= len(kept) < 2 * publish.LINES + 20 and list(publish._lines(0, again)) == kept
    for name in ("tokens_per_second", "mfu"):
      assert endpoints.speed(again, name) == endpoints.speed(curve, name)
    assert np.nanmax(again["flops"]) == 1e9 * n and again["tokens"][-1] == 8192 * n
    assert np.isfinite(again["loss"][-1]) != bool(last) and {800, 801} <= set(again["step"])


def test_what_is_not_finished_comes_from_what_was_published_and_the_rest_does_not(whole, live, tmp_path):
  before = published([whole], tmp_path / "before")
  native = live / "runs/native_msa-tiny-0/eval/1000.json"
  tree = json.loads(native.read_text())
  for record in tree["records"]:
    if record["kind"] == "language":
      record["second_half_bits_per_byte"] += 1.0
  native.write_text(json.dumps(tree))  # the live study was evaluated again
  (full,), (merged,) = primaries(whole), primaries(live, before)
  assert merged.differences == {0: pytest.approx(full.differences[0] - 1), 1: full.differences[1], 2: full.differences[2]}
  assert merged.documents.n == 3
  text = (published([before, live], tmp_path / "report") / "report.md").read_text()  # in any order
  assert "9 runs: 9 done." in text and "umbers alone" not in text and "Not drawn" not in text
  lines = {line for line in (before / "results.csv").read_text().splitlines() if not line.startswith("native_msa-tiny-0,")}
  assert lines <= set((tmp_path / "report/results.csv").read_text().splitlines())


def test_numbers_alone_count_in_the_verdict_and_the_report_says_where_they_do_not(whole, live, tmp_path):
  old = as_before_archives(published([whole], tmp_path / "old"))
  rows = (old / "results.csv").read_bytes(), (old / "layers.csv").read_bytes()
  (full,), (merged,) = primaries(whole), primaries(live, old)
  assert merged.differences == full.differences and merged.judgement == full.judgement
  assert (full.documents.n, merged.documents.n) == (3, 1)
  first = contents(published([live, old], old))  # into the directory that it reads
  text = first["report.md"].decode()
  assert (first["results.csv"], first["layers.csv"]) == rows
  assert "**Numbers alone were published of 6 of the 9 finished runs**" in text and "dense (1, 2), native_msa (1, 2)" in text
  assert "(1 of 3 seeds)" in text and "**The bootstrap covers fewer seeds than the t interval where it says so**" in text
  assert text.count("Left out: 6 of 9 finished runs, of which numbers alone were published.") == 5 and "Not drawn" not in text
  assert "The finished runs that have records took" in text
  again = contents(published([old], tmp_path / "again"))
  assert again == first and contents(published([live, tmp_path / "again"], tmp_path / "again")) == first


def test_seeds_that_were_trained_together_and_finished_apart(whole, tmp_path):
  """Published: three seeds in one run. Live: one of them, and all three begun anew under other names."""
  together = write_study(tmp_path / "together", FEW)
  old = as_before_archives(published([together], tmp_path / "old"))
  live = shutil.copytree(whole, tmp_path / "live")
  for run in (live / "runs").iterdir():
    if not run.name.endswith("-0"):
      (run / "DONE").unlink()
  first = contents(published([live, old], tmp_path / "out"))
  study = loading.load([tmp_path / "out"])
  assert sorted((r.name, r.seeds, r.rows is None) for r in study.runs if r.arm == "dense") == [
      ("dense-tiny-0", (0,), True), ("dense-tiny-0_1_2", (1, 2), False)]
  assert all(r.config["seeds"] == [0, 1, 2] for r in study.by_numbers())  # a speed is of all three
  assert contents(published([tmp_path / "out"], tmp_path / "out")) == first


@pytest.mark.parametrize("field, message", [
    ("config", "arms.native_msa.attention.num_blocks = 8, and 9 in 'native against retrofit': not the same experiment"),
    ("margin", "primary.margin = 0.01, and 0.02 in"),
    ("corpus", r"versions.corpus_sha256[0] = 'abc', and 'def' in")])
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
  change(live, "study.json", '"margin": 0.01', '"margin": 0.02' if field == "margin" else '"margin": 0.01')
  with pytest.raises(ValueError, match=re.escape(f"{before}: {message}")):
    report.write([live, before], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_nothing_is_lost_in_the_directory_written_to(whole, live, tmp_path):
  before = published([whole], tmp_path / "before")
  kept = contents(before)
  for paths, out, publishing, message in (
      ([live], live, True, "a study runs there"), ([live], before, True, "6 finished seeds that were published there, the first "
       "of them dense tiny 1, are not in this report; name the directory among the paths too"),
      ([live, before], before, False, "its results.csv would no longer belong to its study.json")):
    with pytest.raises(ValueError, match=re.escape(message)):
      report.write(paths, out, publish=publishing)
  assert contents(before) == kept and "jobs" in json.loads((live / "study.json").read_text())
  link = tmp_path / "link"
  link.symlink_to(before)
  assert contents(published([before], link)) == kept


@pytest.mark.parametrize("name", [publish.RECORDS, "results.csv", "layers.csv"])
def test_damaged_files_are_named(name, whole, tmp_path):
  """By their hash; where study.json has none, as far as they say it themselves."""
  before = published([whole], tmp_path / "before")
  data = (before / name).read_bytes()
  flipped = bytearray(data)
  flipped[len(data) // 2] ^= 4
  pointer = b"version https://git-lfs.github.com/spec/v1\nsize 12\n"
  plan = json.loads((before / "study.json").read_text())
  for damaged in (bytes(flipped), data[:len(data) // 2], pointer, None):
    (before / name).unlink() if damaged is None else (before / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name}: SHA-256"):
      report.verdict_table(before)
  del plan["files"]
  (before / "study.json").write_text(json.dumps(plan))
  damages = [data[:-8], *(data[:i] + bytes([data[i] ^ 4]) + data[i + 1:] for i in range(20, len(data) - 20, 997))]
  for damaged in [pointer] + (damages if name == publish.RECORDS else [data.replace(b",tiny,1,", b",tiny,x,")]):
    (before / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name}.*take it from the repository again"):
      report.verdict_table(before)


@pytest.mark.parametrize("change, message", [
    (dict(arms=None), "arms = None"), (dict(arms={"dense": 3}), "arms = "), (dict(runs=None), "runs = None"),
    (dict(runs=["dense"]), "runs = ['dense']"), (dict(versions={"a": 1}), "versions = "), (dict(order="dense"), "order = 'dense'"),
    (dict(primary="loss"), "primary = 'loss'"), (dict(budgets=[1]), "budgets = [1]"), (dict(run="../x"), "runs[0].run = '../x'"),
    (dict(run="/x"), "runs[0].run = '/x'"), (dict(arm=None), "runs[0].arm = None"), (dict(seeds=["0"]), "runs[0].seeds = ['0']"),
    (dict(seeds=[]), "runs[0].seeds = []"), (dict(status="finished"), "runs[0].status = 'finished'"),
    (dict(versions=7, run="dense-tiny-0"), "runs[0].versions = 7"), (dict(trained_with=5), "runs[0].trained_with = 5")])
def test_a_study_json_that_cannot_be_read_is_refused_by_its_field(change, message, whole, tmp_path):
  before = published([whole], tmp_path / "before")
  plan = json.loads((before / "study.json").read_text())
  of_run = set(change) & {"run", "arm", "seeds", "status", "trained_with"}
  (plan["runs"][0] if of_run else plan).update(change)
  (before / "study.json").write_text(json.dumps(plan))
  with pytest.raises(ValueError, match=re.escape(f"study.json: {message}")):
    loading.load([before])


def test_single_runs_beside_what_was_published_are_of_its_experiment_and_not_in_it(whole, tmp_path):
  before = published([whole], tmp_path / "before")
  with pytest.raises(ValueError, match="the study has a run of that name"):
    loading.load([before, whole / "runs/dense-tiny-0"])
  other = shutil.copytree(whole / "runs/native_msa-tiny-0", tmp_path / "native_msa-tiny-7")
  config = (other / "config.json").read_text()
  (other / "config.json").write_text(config.replace('"num_blocks": 8', '"num_blocks": 9'))
  with pytest.raises(ValueError, match=re.escape("arms.native_msa.attention.num_blocks = 9, and 8")):
    loading.load([before, other])
  (other / "config.json").write_text(config)
  assert len(loading.load([before, other]).runs) == 10
  known = shutil.copytree(whole, tmp_path / "known")
  for file in [*known.glob("runs/*/versions.json"), other / "versions.json"]:
    file.write_text(file.read_text().replace('"jax"', f'"corpus_sha256": "{"abc" if known in file.parents else "def"}", "jax"'))
  with pytest.raises(ValueError, match=re.escape("versions.corpus_sha256[0] = 'def', and 'abc'")):
    loading.load([published([known], tmp_path / "of_known"), other])


def test_what_could_not_be_read_and_paths_in_errors_are_said_the_same_way_again(whole, tmp_path):
  root = shutil.copytree(whole, tmp_path / "study")
  (root / "runs/dense-tiny-0/eval/1000.json").write_text("{")
  (root / "runs/dense-tiny-1/DONE").unlink()
  (root / "runs/dense-tiny-1/FAILED").write_text(json.dumps({"error": "OSError: /home/user/secret/corpus.tar.xz: not there"}))
  shutil.rmtree(root / "runs/dense-tiny-2")
  (root / "runs/dense-tiny-2").mkdir()
  first = contents(published([root], tmp_path / "first"))
  text = first["report.md"].decode()
  assert "1000.json" in text and "OSError: corpus.tar.xz: not there" in text and "secret" not in text
  assert contents(published([tmp_path / "first"], tmp_path / "again")) == first


def test_records_replace_numbers_whichever_directory_comes_first(whole, tmp_path):
  new = published([whole], tmp_path / "new")
  old = as_before_archives(published([whole], tmp_path / "old"))
  for paths in ([old, new], [new, old]):
    assert loading.load(paths).by_numbers() == []


@pytest.mark.parametrize("name, deltas", [("pilot_98M", (0.0259, 0.0189, 0.0158, 0.0153)),
                                          ("pilot", (0.0412, 0.0222, 0.0195, 0.0189))])
def test_the_pilots_say_what_they_said(name, deltas, tmp_path):
  study = loading.load([RESULTS / name])
  table = endpoints.rows(study)
  found = [c for c in verdict.comparisons(study, table) if c.role == "primary"]
  assert tuple(round(c.judgement.interval.mean, 4) for c in found) == deltas
  endpoints.write_csv(table, tmp_path / "results.csv")
  endpoints.write_layers(study, tmp_path / "layers.csv")
  for file in ("results.csv", "layers.csv"):
    assert (tmp_path / file).read_bytes() == (RESULTS / name / file).read_bytes()
