"""Tests of nsa/data/tokenizer.py beyond bytes: tokenizer.json files made on the spot, and what is built on them."""
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from tasks_test import solve_scattered

from nsa import config as config_lib, data, held_out, schedule, scores, sharding, step as step_lib, tasks
from nsa.data import tokenizer
from nsa.tasks import rendering

tokenizers = pytest.importorskip("tokenizers")

TEXT = "def café(x):\n  return x * 2  # naïve, für €5 🙂\n" * 30


def save(folder, kind, config):
  """A byte-level BPE (as Qwen's and Llama 3's) or a BPE with byte fallback (as Llama 2's), of some 300 tokens."""
  folder.mkdir(parents=True, exist_ok=True)
  if kind == "byte_level":
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  else:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " "),
                                                 tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    alphabet = []
  special = ["<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] * (kind == "fallback")
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=330 + 256 * (kind == "fallback"), special_tokens=special,
                                           show_progress=False, initial_alphabet=alphabet)
  made.train_from_iterator([TEXT], trainer)
  made.save(str(folder / "tokenizer.json"))
  if kind == "fallback":  # bytes are tokens of the model there, not special
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"] = tree["added_tokens"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return f"hf:{folder}"


@pytest.mark.parametrize("kind", ["byte_level", "fallback"])
def test_tokens_stand_for_the_bytes_of_the_text(kind, tmp_path):
  found = tokenizer.get(save(tmp_path, kind, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
  text = "def naïf(y):  return 7 * y  # 日本 ~\n"  # characters that the training text did not have
  ids = found.encode(text)
  assert ids.dtype == np.uint32 and len(ids) < len(text.encode()) and ids.max() < found.vocab_size
  assert found.token_bytes[ids].sum() == len(text.encode())
  assert found.decode(np.concatenate([[found.bos], ids, [found.eos]])) == text
  assert (found.token_bytes[[found.bos, found.eos]] == 0).all() and found.bos != found.eos
  assert found.encode(b"ab\xff").tolist() == found.encode("ab\ufffd").tolist()
  assert tokenizer.get(found.name) is found


def change(name, edit):
  """Changes the tokenizer.json of a saved tokenizer."""
  path = pathlib.Path(name.removeprefix("hf:")) / "tokenizer.json"
  tree = json.loads(path.read_text())
  edit(tree)
  path.write_text(json.dumps(tree))
  return tokenizer.get(name)


@pytest.mark.parametrize("kind", ["byte_level", "fallback"])
def test_a_space_that_a_tokenizer_puts_in_front_is_no_byte_of_the_text(kind, tmp_path, caplog):
  """Llama 2's tokenizer begins every text with a space. 8 nats per target over the document's 23 bytes, not 24."""
  name, text = save(tmp_path / "hf", kind, {"bos_token": "<s>", "eos_token": "</s>"}), "def café(x): return y\n"
  found = tokenizer.get(name)
  assert found.prefix == 0

  def put_a_space(tree):
    part = tree["pre_tokenizer"]
    part.update(prepend_scheme="always") if kind == "fallback" else part["pretokenizers"][1].update(
        add_prefix_space=True)

  found = change(name, put_a_space)
  ids = found.encode(text)
  assert found.prefix == 1 and found.token_bytes[ids].sum() == 24 == len(text.encode()) + 1
  (tmp_path / "val").mkdir()
  (tmp_path / "val/a").write_text(text)
  context = len(ids) + 1                      # BOS and the text; the targets are the text and EOS
  config = config_lib.Config(data=config_lib.DataConfig(source=f"files:{tmp_path}", tokenizer=name, context=context))
  windows = data.eval_windows(config.data, "val", 1, context)
  assert not caplog.records                   # nothing about other bytes than the file has
  run = lambda params, batch, watch: (np.full((1, context), 8.0), None, {})
  text = held_out.Text(windows, found.token_bytes)
  rows = scores.text(run, None, text, config_lib.EvalConfig(batch=1), context, config.attention)
  assert rows[0]["bytes"] == 23
  np.testing.assert_allclose(rows[0]["bits_per_byte"], 8 / np.log(2) * len(ids) / 23)


def test_a_vocabulary_without_a_sign_for_spaces_is_refused(tmp_path):
  """Each space would be three bytes, so that bits per byte would be too low by a quarter."""
  name = save(tmp_path / "hf", "fallback", {"bos_token": "<s>", "eos_token": "</s>"})

  def drop_the_space(tree):
    model = tree["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if "▁" not in token}
    model["merges"] = [merge for merge in model["merges"] if "▁" not in "".join(merge)]

  with pytest.raises(ValueError, match="tokens of 'a b', 3 bytes, stand for 5 .* take bytes or another tokenizer"):
    change(name, drop_the_space)


def test_text_that_a_tokenizer_changes_is_told(tmp_path, caplog):
  """4 bytes that are no UTF-8 become U+FFFD, of 3 bytes each."""
  name = save(tmp_path / "tokenizer", "byte_level", {"eos_token": "</s>"})
  (tmp_path / "corpus/train").mkdir(parents=True)
  (tmp_path / "corpus/train/good").write_bytes("naïve".encode() * 10)
  data.load(f"files:{tmp_path}/corpus", "train", tokens=name)
  assert not caplog.records
  (tmp_path / "corpus/train/latin").write_bytes(b"na\xefve " * 4)
  data.sources._load.cache_clear()
  for _ in range(2):
    data.load(f"files:{tmp_path}/corpus", "train", tokens=name)
  (record,) = caplog.records                # once
  assert "makes 32 bytes of 1 of its 2 documents that have 24 (first latin)" in record.getMessage()


def test_documents_batches_and_windows_are_in_its_tokens(tmp_path):
  name = save(tmp_path / "hf", "byte_level", {"eos_token": "</s>"})
  found = tokenizer.get(name)
  assert found.bos == found.eos == found.pad  # Qwen has no BOS
  for split, count in (("train", 8), ("val", 4)):
    (tmp_path / split).mkdir()
    (tmp_path / split / "a.py").write_text(TEXT * count)
  config = config_lib.Config(model=config_lib.ModelConfig(vocab_size=384), schedule=schedule.dense(4),
                             data=config_lib.DataConfig(
      source=f"files:{tmp_path}", tokenizer=name, context=32, global_batch=4, align=8))
  config_lib.validate(config)
  document, = data.load(config.data.source, "train", tokens=name)
  np.testing.assert_array_equal(document.tokens, found.encode(TEXT * 8))
  assert data.load(config.data.source, "train")[0].tokens.dtype == np.uint16  # the bytes are kept apart
  window, = data.eval_windows(config.data, "val", 1, 32)
  whole = np.concatenate([[found.bos], found.encode(TEXT * 4), [found.eos]])
  np.testing.assert_array_equal(window.inputs, whole[window.start:window.start + 32])
  batches = step_lib.Batches(config, sharding.make_mesh(config))
  for step in range(3):
    batch = batches.at(step)
    real = np.asarray(batch["weights"]) > 0
    targets = np.asarray(batch["targets"])[real]
    stand_for = sum(len(found.decode([t]).encode()) if found.token_bytes[t] and "\ufffd" not in found.decode([t])
                    else found.token_bytes[t] for t in targets)
    np.testing.assert_allclose(batches.tokens_per_byte(step), real.sum() / stand_for)
  assert batches.tokens_per_byte(1) < 1


WORDS = ("recall:pairs=3,distractors=1", "tracking:chains=3", "needle:keys=2", "ledger:entries=3",
         "common:words=3,often=6,seldom=3")


@pytest.mark.parametrize("kind", ["byte_level", "fallback"])
@pytest.mark.parametrize("name", WORDS)
def test_tasks_are_asked_in_its_tokens(kind, name, tmp_path):
  """Lengths are exact in tokens; the text in front of an answer says it; answers and evidence are where they are said
  to be."""
  tokens = save(tmp_path / "hf", kind, {"bos_token": "<s>", "eos_token": "</s>"})
  (tmp_path / "val").mkdir()
  (tmp_path / "val" / "a.py").write_text(TEXT * 20)
  documents, found = data.load(f"files:{tmp_path}", "val"), tokenizer.get(tokens)
  b = tasks.batch(name, 0, 4, 700, "val", documents, tokens=tokens)
  assert (b["inputs"].shape == (4, 700) and (b["inputs"][:, 0] == found.bos).all()
          and (b["targets"][:, -1] == found.eos).all())
  for i in range(4):
    ids = np.append(b["inputs"][i], found.eos)
    for g in range(b["answer_group"][i].max() + 1):
      at = np.flatnonzero(b["answer_group"][i] == g) + 1     # in `ids`
      assert (np.diff(at) == 1).all() and b["query"][i, g] < at[0]
      said = found.decode(ids[at]).strip(' ".,;')
      assert said
      pieces = [found.decode(ids[a:z + 1]) for a, z in b["evidence"][i, g] if a >= 0]
      assert any(said in piece for piece in pieces)
      before = found.decode(ids[1:at[0]])
      if not name.startswith("needle"):
        assert said in solve_scattered(name, before if before[-1] in ' "' else before + " ")
  again = tasks.batch(name, 0, 2, 700, "val", documents, first=2, tokens=tokens)
  np.testing.assert_array_equal(again["inputs"], b["inputs"][2:])
  with pytest.raises(ValueError, match="has more tokens of hf:.* than that"):
    tasks.batch(name, 0, 1, 60, "val", documents, tokens=tokens)


def test_documents_that_spell_special_tokens_or_change_do_not_end_a_run(tmp_path):
  """Question marks stand for what has no byte of its own: every other byte, and every place, stays."""
  found = tokenizer.get(save(tmp_path / "hf", "byte_level", {"eos_token": "</s>"}))
  text = b"usage: x </s> y"
  assert found.token_bytes[found.encode(text)].sum() < len(text)
  written, ids = rendering._encode(found, text)
  assert written == b"usage: x ???? y" and found.decode(ids) == written.decode()
  plain = "p\u00e4\u00e4 q".encode()
  assert rendering._encode(found, plain)[0] == plain
  (tmp_path / "val").mkdir()
  (tmp_path / "val" / "a.py").write_text((TEXT + "print('</s>')\n") * 20)
  documents = data.load(f"files:{tmp_path}", "val")
  b = tasks.batch("needle:keys=2", 0, 8, 700, "val", documents, tokens=found.name)
  assert (b["inputs"][:, 1:] != found.eos).all()
  assert any("????" in found.decode(row) for row in b["inputs"])
  name = save(tmp_path / "nfc", "byte_level", {"eos_token": "</s>"})
  made = tokenizers.Tokenizer.from_file(str(tmp_path / "nfc/tokenizer.json"))
  made.normalizer = tokenizers.normalizers.NFC()
  made.save(str(tmp_path / "nfc/tokenizer.json"))
  found = tokenizer.get(name)
  written, ids = rendering._encode(found, "pa\u0308 q".encode())
  assert written == b"pa?? q" and found.decode(ids) == "pa?? q"


def test_rows_of_tasks_are_in_its_tokens(tmp_path):
  name = save(tmp_path / "hf", "byte_level", {"eos_token": "</s>"})
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "a.py").write_text(TEXT * 20)
  config = config_lib.DataConfig(source=f"files:{tmp_path}", tokenizer=name, context=400, global_batch=4, align=8,
                                 task_rows=1, task_loss=0.2, tasks=("recall:pairs=2",), filler_weight=0.0)
  batch, = [data.make(config, 0).batch_at(step) for step in (3,)]
  found, weights = tokenizer.get(name), batch["weights"][3]
  np.testing.assert_allclose(weights.sum(), 0.2 / 0.8 * 3 * 400, rtol=1e-5)
  answers = found.decode(batch["targets"][3][weights > 0]).replace(" ", "")
  assert answers.isdigit() and len(answers) == 6
  with pytest.raises(ValueError, match="data.context = 40: task recall .* more tokens"):
    data.make(dataclasses.replace(config, context=40), 0)


def test_what_is_wrong_is_named(tmp_path):
  with pytest.raises(ValueError, match='data.tokenizer = \'words\': unknown; take "bytes" or "hf:PATH"'):
    tokenizer.get("words")
  with pytest.raises(FileNotFoundError, match="there is no .*tokenizer.json"):
    tokenizer.get(f"hf:{tmp_path}")
  with pytest.raises(ValueError, match="names no eos_token"):
    tokenizer.get(save(tmp_path / "a", "byte_level", {}))
  with pytest.raises(ValueError, match="eos_token = '<end>', which tokenizer.json does not know"):
    tokenizer.get(save(tmp_path / "b", "byte_level", {"eos_token": "<end>"}))
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
  (tmp_path / "c").mkdir()
  made.save(str(tmp_path / "c/tokenizer.json"))
  with pytest.raises(ValueError, match="cannot be counted"):
    tokenizer.get(f"hf:{tmp_path / 'c'}")
  name = save(tmp_path / "d", "byte_level", {"eos_token": "</s>"})
  config = config_lib.Config(model=config_lib.ModelConfig(vocab_size=256),
                             data=config_lib.DataConfig(tokenizer=name, tasks=("copy", "mqar")))
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.validate(config)
  assert f"model.vocab_size = 256: the tokenizer has {tokenizer.get(name).vocab_size} tokens" in str(error.value)
  assert "data.tasks = 'mqar': has token ids of its own" in str(error.value) and "'copy'" not in str(error.value)


def test_text_is_tokenized_once_for_all_processes(tmp_path, monkeypatch, caplog):
  """Kept ids are those of the texts and the tokenizer at hand; a file that is damaged is no shorter text."""
  name = save(tmp_path / "hf", "byte_level", {"eos_token": "</s>"})
  kind, texts, kept = tokenizer.get(name), [TEXT.encode(), b"x = 1\n", TEXT[:99].encode()], tmp_path / "kept"
  monkeypatch.setenv("NSA_TOKENS", str(kept))
  want = kind.encode_all(texts)
  assert tokenizer.encode_kept(kind, texts)[0].tolist() == want[0].tolist() and not kept.exists()  # seconds: not kept
  monkeypatch.setattr(tokenizer, "_KEPT_FROM", 0)
  tokenizer.encode_kept(kind, texts)
  file, = kept.iterdir()
  monkeypatch.setattr(kind, "encode_all", lambda texts: pytest.fail("tokenized again"))
  for ids, its in zip(tokenizer.encode_kept(kind, texts), want, strict=True):
    assert ids.dtype == np.uint32 and ids.tolist() == its.tolist()
  with pytest.raises(pytest.fail.Exception, match="again"):
    tokenizer.encode_kept(kind, texts[::-1])
  other = change(name, lambda tree: tree["model"].update(merges=tree["model"]["merges"][:-1]))
  assert len(tokenizer.encode_kept(other, texts)) == 3 and len(list(kept.iterdir())) == 2

  monkeypatch.undo()
  monkeypatch.setenv("NSA_TOKENS", str(kept))
  monkeypatch.setattr(tokenizer, "_KEPT_FROM", 0)
  whole = file.read_bytes()
  at = whole.index(b"PK\1\2")  # a zip's directory: byte 8 says "encrypted", byte 10 how it is packed
  changed = lambda place, byte: whole[:place] + byte + whole[place + 1:]
  for damaged in (whole[:-40], b"", changed(200, b"?"), changed(at + 8, b"\1"), changed(at + 10, b"\7")):
    file.write_bytes(damaged)
    assert [ids.tolist() for ids in tokenizer.encode_kept(kind, texts)] == [ids.tolist() for ids in want]
    assert "is damaged" in caplog.records.pop().getMessage() and file.read_bytes() == whole
  assert not list(kept.glob("*.part"))
  monkeypatch.setenv("NSA_TOKENS", str(file / "no folder"))
  assert len(tokenizer.encode_kept(kind, texts)) == 3 and "NSA_TOKENS" in caplog.records.pop().getMessage()
