"""Documents, packing and batches: nothing is lost, nothing is random but by (seed, step)."""
import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from nsa import data
from nsa.config import DataConfig
from nsa.data import counter, packing, sources, tokenizer

HERE = pathlib.Path(__file__).parent
SIZES = (1, 30, 63, 64, 65, 200, 511, 1000, 1777)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A folder of documents over all byte values; returns its path."""
  root = tmp_path_factory.mktemp("corpus")
  for split, sizes in (("train", SIZES), ("val", (400, 900, 90)), ("test", (300,))):
    for i, size in enumerate(sizes):
      path = root / split / ("deep" if i % 2 else "") / f"doc{i}.txt"
      path.parent.mkdir(parents=True, exist_ok=True)
      noise = counter.integers(counter.key("doc", split, i), np.arange(size), 256)
      path.write_bytes(noise.astype(np.uint8).tobytes())
  (root / "train" / "empty.txt").write_bytes(b"")
  (root / "train" / ".hidden").write_bytes(b"secret")
  return root


def config_of(corpus, **kwargs):
  return DataConfig(**{"source": f"files:{corpus}", "context": 64, "global_batch": 8, "align": 16, **kwargs})


def digest(batch):
  h = hashlib.sha256()
  for name in sorted(batch):
    h.update(name.encode() + batch[name].tobytes())
  return h.hexdigest()


# --- tokenizer and counter ---


@given(st.binary(max_size=50))
def test_tokenizer_is_lossless(raw):
  t = tokenizer.get("bytes")
  tokens = t.encode(raw)
  assert tokens.dtype == np.uint16 and len(tokens) == len(raw)
  assert t.decode_bytes(np.r_[t.bos, tokens, t.eos, t.pad].astype(np.int32)) == raw


def test_the_tokenizer_of_bytes_takes_text():
  t = tokenizer.get("bytes")
  assert t.decode(t.encode("naïve ✓")) == "naïve ✓" and t.vocab_size == 259


def test_counter_is_the_published_splitmix64_and_stays_so():
  # First outputs of SplitMix64 seeded with 1234567 (Vigna's splitmix64.c).
  expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
  assert counter.bits(1234567, np.arange(4)).tolist() == expected
  u = counter.uniform(counter.key("u", 3), np.arange(20_000))
  assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(np.var(u) - 1 / 12) < 0.003
  assert sorted(counter.permutation(7, 100).tolist()) == list(range(100))
  assert counter.key(1, 2) != counter.key(2, 1) and counter.key("1") != counter.key(1)


# --- packing ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(2, 70),
       st.sampled_from([1, 4, 16, 100]), st.integers(0, 3), st.integers(0, 2))
def test_every_token_once_per_epoch_and_pieces_aligned(lengths, context, align, seed, epoch):
  lengths = np.array(lengths)
  index = packing.epoch_index(lengths, context, align, seed, epoch)
  assert index.num_rows == packing.count_rows(lengths, context, align, seed, epoch)
  seen = [np.zeros(n + 2, int) for n in lengths]  # how often position p of a document is an input
  for row in range(index.num_rows):
    free_from = 0
    assert index.first[row] < index.first[row + 1], "a row without a piece"
    for p in range(index.first[row], index.first[row + 1]):
      begin, length = index.offset[p], index.length[p]
      assert length >= 1 and begin % align == 0 and begin >= free_from and begin + length <= context
      free_from = begin + length
      start = index.start[p]
      assert start + length <= lengths[index.document[p]] + 1  # the last target is EOS
      seen[index.document[p]][start:start + length] += 1
  for counts in seen:
    assert counts[-1] == 0 and np.all(counts[:-1] == 1)


def test_cuts_and_order_differ_between_epochs_and_seeds():
  lengths = np.array([5000, 3000])
  a, b, c = (packing.epoch_index(lengths, 64, 16, s, e) for s, e in ((0, 0), (0, 1), (1, 0)))
  assert set(a.start.tolist()) != set(b.start.tolist()) != set(c.start.tolist())
  order = list(zip(a.document.tolist(), a.start.tolist()))
  assert order != sorted(order)


# --- batches ---


def test_rows_hold_the_documents_text(corpus):
  """Rebuilds every document from one epoch of batches."""
  config = config_of(corpus)
  pipeline = data.make(config, seed=3)
  rows = packing.count_rows(np.array([len(d.tokens) for d in pipeline.documents]), 64, 16, 3, 0)
  batch = pipeline.batch_at(0, batch=rows)
  texts = {d.name: np.full(len(d.tokens) + 2, -1) for d in pipeline.documents}
  index = packing.epoch_index(np.array([len(d.tokens) for d in pipeline.documents]), 64, 16, 3, 0)
  for r in range(rows):
    for segment, p in enumerate(range(index.first[r], index.first[r + 1]), start=1):
      at = np.flatnonzero(batch["segment_ids"][r] == segment)
      assert at[0] % 16 == 0
      text = texts[pipeline.documents[index.document[p]].name]
      text[index.start[p]:index.start[p] + len(at)] = batch["inputs"][r, at]
      text[index.start[p] + 1:index.start[p] + len(at) + 1] = batch["targets"][r, at]
  for document in pipeline.documents:
    np.testing.assert_array_equal(texts[document.name], np.r_[tokenizer.BOS, document.tokens, tokenizer.EOS])


def test_weights_targets_and_padding(corpus):
  pipeline = data.make(config_of(corpus), seed=0)
  segments = set()
  for step in range(12):
    b = pipeline.batch_at(step)
    assert {k: (v.dtype.name, v.shape) for k, v in b.items()} == dict(
        inputs=("int32", (8, 64)), targets=("int32", (8, 64)), weights=("float32", (8, 64)),
        segment_ids=("int32", (8, 64)), index=("int64", (8,)))
    pad = b["segment_ids"] == 0
    assert np.all(b["inputs"][pad] == tokenizer.PAD) and np.all(b["targets"][pad] == tokenizer.PAD)
    np.testing.assert_array_equal(b["weights"], np.where(pad, 0, 1))
    assert not np.any(b["targets"][~pad] == tokenizer.PAD) and not np.any(b["targets"] == tokenizer.BOS)
    inside = (b["segment_ids"][:, 1:] == b["segment_ids"][:, :-1]) & ~pad[:, 1:]
    np.testing.assert_array_equal(b["targets"][:, :-1][inside], b["inputs"][:, 1:][inside])
    blocks = b["segment_ids"].reshape(8, 4, 16)
    assert np.all((blocks == blocks.max(-1, keepdims=True)) | (blocks == 0)), "two documents in one block"
    segments |= set(b["segment_ids"].ravel().tolist())
  assert {0, 1, 2} <= segments  # the corpus does lead to packed rows and padding


MIXED = dict(task_share=0.5, tasks=("mqar:pairs=4", "copy:length=6"))


def test_batches_are_pure_in_seed_and_step(corpus):
  config = config_of(corpus, **MIXED)
  forward = data.make(config, seed=5)
  digests = [digest(forward.batch_at(step)) for step in range(20)]
  assert len(set(digests)) == 20
  backward = data.make(config, seed=5)
  assert [digest(backward.batch_at(step)) for step in reversed(range(20))] == digests[::-1]
  assert digest(data.make(config, seed=6).batch_at(0)) != digests[0]
  code = (f"import data_test as t; config = t.config_of({str(corpus)!r}, **t.MIXED); "
          "print(t.digest(t.data.make(config, seed=5).batch_at(17)))")
  fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
      **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, sys.path)]),
      "PYTHONHASHSEED": "77"})
  assert fresh.stdout.strip() == digests[17]


def test_some_rows_equal_the_same_rows_of_the_whole(corpus):
  pipeline = data.make(config_of(corpus, **MIXED), seed=1)
  whole = pipeline.batch_at(9)
  for rows in (slice(0, 4), slice(4, 8), slice(3, 4), slice(1, 8, 2)):
    part = data.make(config_of(corpus, **MIXED), seed=1).batch_at(9, rows=rows)
    for name, value in whole.items():
      np.testing.assert_array_equal(part[name], value[rows])


def test_another_context_keeps_tokens_per_step(corpus):
  pipeline = data.make(config_of(corpus), seed=1)
  assert pipeline.batch_at(2, context=128)["inputs"].shape == (4, 128)
  assert pipeline.batch_at(2, context=32, batch=3)["inputs"].shape == (3, 32)
  with pytest.raises(ValueError, match=r"context = 96: must divide .* = 512"):
    pipeline.batch_at(0, context=96)
  with pytest.raises(ValueError, match="data.context = 32: task copy"):
    config = config_of(corpus, task_share=0.5, tasks=("copy:length=20",), context=128)
    data.make(config, seed=1).check_context(32)
  with pytest.raises(ValueError, match="step = -1"):
    pipeline.batch_at(-1)


def test_task_rows(corpus):
  pipeline = data.make(config_of(corpus, context=128, answer_weight=7.0, filler_weight=0.25, **MIXED), seed=0)
  kinds = []
  for step in range(60):
    b = pipeline.batch_at(step)
    words = pipeline.describe(b).split("\n")
    assert len(words) == 8
    for row, text in enumerate(words):
      kinds.append(text.split("task ")[1].split(",")[0] if "task " in text else "text")
      weights = set(b["weights"][row].tolist())
      if kinds[-1] == "text":
        assert weights <= {0.0, 1.0} and "doc" in text and "epoch" in text
      else:
        assert weights == {7.0, 0.25} and np.all(b["segment_ids"][row] == 1)
        assert (b["weights"][row] == 7).sum() == {"mqar:pairs=4": 4, "copy:length=6": 6}[kinds[-1]]
  share = 1 - kinds.count("text") / len(kinds)
  assert abs(share - 0.5) < 0.08  # 480 draws: 3.5 standard deviations
  assert abs(kinds.count("mqar:pairs=4") / len(kinds) - 0.25) < 0.08


def test_short_tasks_are_packed(corpus):
  """Rows of a length hold different examples of it, each whole and in a segment of its own; rows of text stay as they
  were."""
  config = config_of(corpus, context=128, filler_weight=0.25, **MIXED)
  whole, short = (data.make(dataclasses.replace(config, task_lengths=lengths), seed=0) for lengths in ((), (40, 128)))
  counts = []
  for step in range(20):
    b, plain = short.batch_at(step), whole.batch_at(step)
    for row, words in enumerate(short.describe(b).split("\n")):
      if "task" not in words or "tokens" not in words:  # text, or one example as long as the row
        for name in b:
          np.testing.assert_array_equal(b[name][row], plain[name][row])
        continue
      counts.append(4 if "mqar" in words else 6)
      segments = b["segment_ids"][row]
      # data.align = 16: no block of 16 tokens holds two examples.
      assert segments.tolist() == [1] * 40 + [0] * 8 + [2] * 40 + [0] * 40 and "2 of 40 tokens" in words
      answers = [tuple(b["targets"][row][(segments == s) & (b["weights"][row] == 5)]) for s in (1, 2)]
      assert len(set(answers)) == 2 and {len(a) for a in answers} == {counts[-1]}
      assert np.all(b["weights"][row][segments == 0] == 0)
  assert set(counts) == {4, 6} and 20 < len(counts) < 60  # a quarter of 160 rows
  with pytest.raises(ValueError, match="data.context = 16: task copy"):
    data.make(dataclasses.replace(config, task_lengths=(8, 16)), seed=0)
  # A task takes the lengths that it fits into: 16 tokens hold 4 pairs, but no string of 6 letters and its copy.
  some = data.make(dataclasses.replace(config, task_lengths=(16, 128)), seed=0)
  lines = [line for step in range(20) for line in some.describe(some.batch_at(step)).split("\n") if "task" in line]
  assert {("mqar" in line, "8 of 16" in line) for line in lines} == {(True, True), (True, False), (False, False)}


# --- a fixed number of task rows, mixed corpora ---


def test_every_batch_has_its_rows_of_tasks(corpus):
  """One row of 8 at 64 tokens, the same share at other lengths; the text around it has no gap; the loss weight is
  constant."""
  config = config_of(corpus, task_rows=2, task_loss=0.25, tasks=("mqar:pairs=4", "copy:length=6"), filler_weight=0.0)
  pipeline, plain = data.make(config, seed=4), data.make(config_of(corpus), seed=4)
  text = []
  for step in range(12):
    b = pipeline.batch_at(step)
    is_task = ["task" in line for line in pipeline.describe(b).split("\n")]
    assert is_task == [False, False, False, True] * 2
    np.testing.assert_allclose(b["weights"][is_task].sum(axis=1), 0.25 / 0.75 * 6 * 64 / 2, rtol=1e-5)
    assert b["weights"][is_task].sum() / (b["weights"][is_task].sum() + 6 * 64) == pytest.approx(0.25)
    text += [b["inputs"][row] for row in np.flatnonzero(~np.array(is_task))]
    half = data.make(config, seed=4).batch_at(step, rows=slice(4, 8))
    for name in b:
      np.testing.assert_array_equal(half[name], b[name][4:])
  np.testing.assert_array_equal(text, np.concatenate([plain.batch_at(step)["inputs"] for step in range(9)]))
  assert sum("task" in line for line in pipeline.describe(pipeline.batch_at(1, context=32)).split("\n")) == 4
  with pytest.raises(ValueError,
                     match="context = 512: data.task_rows = 2 of 8 rows are no whole number of a batch of 1"):
    pipeline.check_context(512)


def test_corpora_are_mixed_by_weight(corpus, tmp_path):
  for split in ("train", "val"):
    (tmp_path / split).mkdir()
    (tmp_path / split / "z.txt").write_bytes(b"z" * 3000)
  config = config_of(corpus, corpora={"noise": f"files:{corpus}", "zeds": f"files:{tmp_path}"}, weights={"noise": 3.0},
                     task_rows=1, tasks=("mqar:pairs=4",))
  pipeline, alone = data.make(config, seed=2), data.make(config_of(corpus), seed=2)
  rows = {"noise": [], "zeds": []}
  for step in range(16):
    b = pipeline.batch_at(step)
    for row, line in enumerate(pipeline.describe(b).split("\n")):
      if "task" not in line:
        rows["zeds" if "z.txt" in line else "noise"].append(b["inputs"][row])
    share = len(rows["noise"]) / sum(map(len, rows.values()))
    assert abs(share - 0.75) * 7 * (step + 1) <= 1  # never more than a row from the stated share
  # Each corpus is read as it would be alone.
  first = np.concatenate([alone.batch_at(step)["inputs"] for step in range(len(rows["noise"]) // 8)])
  np.testing.assert_array_equal(rows["noise"][:len(first)], first)
  assert (pipeline.fingerprint != alone.fingerprint
          != data.make(config_of(corpus, corpora={"zeds": f"files:{tmp_path}"}), 0).fingerprint)
  assert data.make(dataclasses.replace(config, weights={}), 2).fingerprint == pipeline.fingerprint
  assert {w.document for w in data.eval_windows(config, "val", -1, 100, "zeds")} == {"z.txt"}
  assert len(data.eval_windows(config, "val", -1, 100, "zeds")) == 30  # 3002 positions
  with pytest.raises(ValueError, match=r"data.weights\['zeds'\] = 1e-09: above 0, and at least 1/1000"):
    data.make(dataclasses.replace(config, weights={"zeds": 1e-9}), seed=0)


def test_describe_names_the_document(corpus):
  pipeline = data.make(config_of(corpus), seed=0)
  b = pipeline.batch_at(3, rows=slice(2, 3))
  line = pipeline.describe(b)
  name, span = line.split(": ")[2].split(";")[0].split(" tokens ")
  start, end = map(int, span.split(".."))
  document = next(d for d in pipeline.documents if d.name == name)
  full = np.r_[tokenizer.BOS, document.tokens, tokenizer.EOS]
  np.testing.assert_array_equal(b["inputs"][0, :end - start], full[start:end])
  assert f"row {3 * 8 + 2}:" in line


@pytest.mark.parametrize("change, message", [
    (dict(task_share=0.5, tasks=("copy:length=60",)), "data.context = 64: task copy with length=60"),
    (dict(tokenizer="bpe"), "data.tokenizer = 'bpe'"),
    (dict(source="web"), "data.source = 'web': unknown"),
])
def test_wrong_fields_are_named(corpus, change, message):
  with pytest.raises(ValueError, match=message):
    data.make(dataclasses.replace(config_of(corpus), **change), seed=0)


def test_tasks_without_text():
  config = DataConfig(source="tasks", task_share=1.0, tasks=("needle", "mqar"), context=400)
  pipeline = data.make(config, seed=0)
  assert pipeline.batch_at(0)["inputs"].shape == (8, 400)


# --- sources ---


def test_archive_and_folder_give_the_same_documents(corpus, tmp_path):
  folder = sources.load(f"files:{corpus}", "train")
  assert [d.name for d in folder] == sorted(d.name for d in folder) and len(folder) == len(SIZES)
  assert not folder[0].tokens.flags.writeable
  for name, mode, inside in (("a.tar.xz", "w:xz", "."), ("b.tar.gz", "w:gz", "corpus"), ("c.tar", "w", "")):
    with tarfile.open(tmp_path / name, mode) as archive:
      for path in sorted(corpus.rglob("*")):
        archive.add(path, f"{inside}/{path.relative_to(corpus)}".lstrip("/"), recursive=False)
    for split in ("train", "val", "test"):
      packed = sources.load(f"files:{tmp_path / name}", split)
      plain = sources.load(f"files:{corpus}", split)
      assert [d.name for d in packed] == [d.name for d in plain]
      assert sources.fingerprint(packed) == sources.fingerprint(plain)
    with pytest.raises(FileNotFoundError, match=r"no ood/ folder in it \(found: test, train, val\)"):
      sources.load(f"files:{tmp_path / name}", "ood")
  changed = [*folder[:-1], sources.Document(folder[-1].name, folder[-1].tokens[:-1])]
  assert sources.fingerprint(changed) != sources.fingerprint(folder)


def test_file_errors_name_the_source_and_the_fix(corpus, tmp_path):
  with pytest.raises(FileNotFoundError, match="data.source = 'files:/no/such': .*give a folder"):
    sources.load("files:/no/such", "train")
  with pytest.raises(FileNotFoundError, match="no ood/ folder"):
    sources.load(f"files:{corpus}", "ood")
  plain = tmp_path / "book.txt"
  plain.write_text("text")
  with pytest.raises(ValueError, match="data.source = .*not a folder and not an archive"):
    sources.load(f"files:{plain}", "train")
  with tarfile.open(tmp_path / "whole.tar.xz", "w:xz") as archive:
    archive.add(corpus, ".")
  raw = (tmp_path / "whole.tar.xz").read_bytes()
  for name, content in (("cut.tar.xz", raw[:len(raw) // 2]), ("noise.tar.xz", b"no archive" * 100),
                        ("flip.tar.xz", raw[:200] + bytes(64) + raw[264:]), ("empty.tar.gz", b"")):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data.source = .*{name}': the archive is damaged .*fetch"):
      sources.load(f"files:{tmp_path / name}", "train")
  (tmp_path / "blank" / "train").mkdir(parents=True)
  with pytest.raises(ValueError, match="has no document"):
    sources.load(f"files:{tmp_path / 'blank'}", "train")
  with pytest.raises(ValueError, match="split = 'dev': unknown"):
    sources.load("stdlib", "dev")


def test_stdlib_is_split_by_module():
  splits = {s: sources.load("stdlib", s) for s in ("train", "val", "test", "ood")}
  names = {s: {d.name for d in ds} for s, ds in splits.items()}
  assert sum(map(len, names.values())) == len(set().union(*names.values()))
  sizes = {s: sum(len(d.tokens) for d in ds) for s, ds in splits.items()}
  assert 4e6 < sizes["train"] <= sources.MAX_TRAIN_BYTES and sizes["val"] > 1e5 and sizes["test"] > 1e5
  assert sizes["ood"] > 1e5 or "LICENSE.txt" in names["ood"]
  assert all(len(d.tokens) >= sources.MIN_BYTES for s in ("train", "val", "test") for d in splits[s])
  assert not any("test" in n.split("/")[:-1] or "site-packages" in n for s in splits for n in names[s])
  assert sources.stdlib_split("argparse.py") == sources.stdlib_split("argparse.py")


def test_tfds_round_trip(corpus, tmp_path):
  pytest.importorskip("tensorflow_datasets")
  from nsa.data import tfds_builder

  builder = tfds_builder.build(str(corpus), str(tmp_path), name="round_trip")
  assert builder.info.file_format.value == "array_record" and "tensorflow" not in sys.modules
  for split in ("train", "val", "test"):
    back = sources.load("tfds:round_trip", split, data_dir=str(tmp_path))
    assert sources.fingerprint(back) == sources.fingerprint(sources.load(f"files:{corpus}", split))
  again = tfds_builder.build(str(corpus), str(tmp_path), name="round_trip")
  assert again.info.splits["train"].num_examples == len(SIZES)
  batch = data.make(config_of(corpus, source="tfds:round_trip", data_dir=str(tmp_path)), seed=3).batch_at(4)
  assert digest(batch) == digest(data.make(config_of(corpus), seed=3).batch_at(4))
  with pytest.raises(FileNotFoundError, match="data.source = 'tfds:round_trip': there is no ood/"):
    sources.load("tfds:round_trip", "ood", data_dir=str(tmp_path))
  with pytest.raises(FileNotFoundError, match="data.source = 'tfds:no_such_set'.*data.data_dir"):
    sources.load("tfds:no_such_set", "train", data_dir=str(tmp_path))
  with pytest.raises(ValueError, match="lower_snake_case"):
    tfds_builder.build(str(corpus), str(tmp_path), name="Bad-Name")


def test_tfds_missing_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(ModuleNotFoundError, match="data.source = 'tfds:x'.*pip install tensorflow-datasets"):
    sources.load("tfds:x", "train")


# --- evaluation windows ---


def test_eval_windows_cover_documents_evenly(corpus):
  config = config_of(corpus)
  documents = {d.name: np.r_[tokenizer.BOS, d.tokens, tokenizer.EOS] for d in sources.load(config.source, "val")}
  windows = data.eval_windows(config, "val", 10, 100)  # doc2 (90 bytes) is too short
  assert len(windows) == 10 and {w.document for w in windows} == {"doc0.txt", "deep/doc1.txt"}
  taken = {}
  for w in windows:
    text = documents[w.document]
    np.testing.assert_array_equal(w.inputs, text[w.start:w.start + 100])
    np.testing.assert_array_equal(w.targets, text[w.start + 1:w.start + 101])
    assert w.weights.sum() == 100 and np.all(w.segment_ids == 1) and w.inputs.dtype == np.int32
    taken.setdefault(w.document, []).append(w.start)
  # 400 bytes hold 4 windows and 900 bytes hold 9: 4 + 6, none overlapping.
  assert {k: len(v) for k, v in taken.items()} == {"doc0.txt": 4, "deep/doc1.txt": 6}
  assert all(b - a >= 100 for starts in taken.values() for a, b in zip(starts, starts[1:]))
  again = data.eval_windows(config, "val", 10, 100)
  assert [(w.document, w.start) for w in again] == [(w.document, w.start) for w in windows]
  assert len(data.eval_windows(config, "val", 30, 100)) == 30  # more than fit: they overlap
  with pytest.raises(ValueError, match="data.context = 2000: no document .* longest, deep/doc1.txt, has 902"):
    data.eval_windows(config, "val", 1, 2000)
  with pytest.raises(ValueError, match="no text to evaluate"):
    data.eval_windows(DataConfig(source="tasks"), "val", 1, 10)
