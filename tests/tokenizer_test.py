"""Tests of nsa/data/tokenizer.py beyond bytes: tokenizer.json files made on the spot, and what is built on them."""
import json

import numpy as np
import pytest

from nsa import config as config_lib, data, schedule, sharding
from nsa import step as step_lib
from nsa.data import tokenizer

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
                             data=config_lib.DataConfig(tokenizer=name, tasks=("copy",)))
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.validate(config)
  assert f"model.vocab_size = 256: the tokenizer has {tokenizer.get(name).vocab_size} tokens" in str(error.value)
  assert "tasks are written in bytes" in str(error.value)
