"""Tokenizers: text to token ids and back. "bytes", and "hf:PATH", that of an imported model."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile

from absl import logging
from etils import epath
import numpy as np

BOS = 256  # begins every document
EOS = 257  # ends every document
PAD = 258  # fills what a row has left; never predicted
_AT_A_TIME = 32  # texts
_KEPT_FROM = 1 << 22  # bytes of text; less takes no longer than a second or two


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Ids 0..255 are the bytes themselves, then BOS, EOS and PAD: lossless for any input."""
  name: str = "bytes"
  vocab_size: int = 259  # ids in use; a model may pad its table beyond that
  bos: int = BOS
  eos: int = EOS
  pad: int = PAD
  prefix: int = 0  # bytes that a text gets in front, as by HuggingFace

  @property
  def token_bytes(self) -> np.ndarray:
    """int32[vocabulary]: bytes that each token stands for, 0 for special ones."""
    return (np.arange(self.vocab_size) < 256).astype(np.int32)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Text (UTF-8) or raw bytes to uint16[length] ids, without BOS or EOS."""
    if isinstance(text, str):
      text = text.encode("utf-8")
    return np.frombuffer(text, np.uint8).astype(np.uint16)

  def decode(self, tokens) -> str:
    """Ids to text. Special ids vanish; bytes that are no UTF-8 become U+FFFD."""
    return self.decode_bytes(tokens).decode("utf-8", errors="replace")

  def decode_bytes(self, tokens) -> bytes:
    """Ids to the exact bytes; special ids vanish."""
    tokens = np.asarray(tokens)
    return tokens[(tokens >= 0) & (tokens < 256)].astype(np.uint8).tobytes()


class HuggingFace:
  """A tokenizer.json, read by the package `tokenizers` (extra `hf`); `path` is the file or its folder. `files` holds
  the bytes of what was read, by name.

  BOS and EOS are those of the tokenizer_config.json beside it. A document begins with EOS where there is no BOS
  (Qwen), as such models were trained. `prefix` is 1 where a space is put before a text (Llama 2), which is no
  byte of it. Text that is no UTF-8 is not lossless; text that spells a special token becomes that token (`special`:
  how they are spelled).
  """

  def __init__(self, path: str):
    self.name = f"hf:{path}"
    file = _file(path)
    try:
      import tokenizers  # an optional extra
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(f"data.tokenizer = {self.name!r}: {error}; pip install tokenizers") from None
    beside = file.parent / "tokenizer_config.json"
    self.files = {"tokenizer.json": file.read_bytes()}
    if beside.exists():
      self.files["tokenizer_config.json"] = beside.read_bytes()
    tree, names = self._object(file, "tokenizer.json"), self._object(beside, "tokenizer_config.json")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode("utf-8"))
    except Exception as error:  # the package has no class of its own
      raise ValueError(f"data.tokenizer = {self.name!r}: {file} is no tokenizer of the package tokenizers ({error}); "
                       "fetch it again") from None
    special = [token for token in tree.get("added_tokens") or () if token.get("special")]
    self._special = {token["id"] for token in special}
    self.special = [token["content"].encode() for token in special]
    self.token_bytes = self._count_bytes(tree)
    self.vocab_size = len(self.token_bytes)
    self.prefix = self._spaces()
    self.eos = self._id(names, "eos_token", beside)
    if self.eos is None:
      raise ValueError(f"data.tokenizer = {self.name!r}: {beside} names no eos_token; documents end with it, add it "
                       "there")
    self.bos = self._id(names, "bos_token", beside)
    self.bos = self.eos if self.bos is None else self.bos
    self.pad = self.eos

  def _object(self, file, name) -> dict:
    """What the JSON file holds, {} without one."""
    try:
      tree = json.loads(self.files.get(name, b"{}").decode("utf-8"))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"data.tokenizer = {self.name!r}: {file} is no JSON ({error}); fetch it again") from None
    if not isinstance(tree, dict):
      raise ValueError(f"data.tokenizer = {self.name!r}: {file} holds a {type(tree).__name__}, no object; fetch it "
                       "again")
    return tree

  def _id(self, names, key, file):
    token = names.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
      return None
    found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
      raise ValueError(f"data.tokenizer = {self.name!r}: {file} has {key} = {token!r}, which tokenizer.json does not "
                       "know")
    return found

  def _count_bytes(self, tree) -> np.ndarray:
    """int32[vocabulary]: UTF-8 bytes that each token stands for, 0 for special ones."""
    kinds = {part["type"] for part in _parts(tree.get("pre_tokenizer")) + _parts(tree.get("decoder"))}
    byte_level = "ByteLevel" in kinds
    if not byte_level and not (tree.get("model") or {}).get("byte_fallback"):
      raise ValueError(f"data.tokenizer = {self.name!r}: neither byte-level nor with byte fallback, so that the bytes "
                       "of its tokens cannot be counted; take bytes or another tokenizer")
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    added = {token["id"] for token in tree.get("added_tokens") or ()}
    out = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for text, number in vocabulary.items():
      if number in self._special:
        continue
      if number in added:
        out[number] = len(text.encode())
      elif byte_level:
        out[number] = len(text)  # every character stands for one byte
      elif len(text) == 6 and text.startswith("<0x"):
        out[number] = 1
      else:
        out[number] = len(text.replace("\u2581", " ").encode())
    return out

  def _spaces(self) -> int:
    """Bytes put before a text. Raises ValueError where letters and spaces do not stand for a byte each: a vocabulary
    without its own sign for a space spells it in three bytes, and bits per byte would be too low by all the spaces."""
    one, two = (int(self.token_bytes[self.encode(text)].sum()) - len(text) for text in ("a", "a b"))
    if one not in (0, 1) or two != one:
      raise ValueError(f"data.tokenizer = {self.name!r}: its tokens of 'a b', 3 bytes, stand for {two + 3} (of 'a' for "
                       f"{one + 1}), so that bits per byte cannot be counted: a space or a letter is no token of it; "
                       "take bytes or another tokenizer")
    return one

  def encode(self, text: str | bytes) -> np.ndarray:
    """Text, or bytes read as UTF-8 with U+FFFD for what is none, to uint32[length] ids, without BOS or EOS."""
    if isinstance(text, bytes):
      text = text.decode("utf-8", errors="replace")
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

  def encode_all(self, texts: list[bytes]) -> list[np.ndarray]:
    """`encode` of each text, on all cores."""
    out = []
    for first in range(0, len(texts), _AT_A_TIME):  # what the package keeps of a text is many times its size
      decoded = [text.decode("utf-8", errors="replace") for text in texts[first:first + _AT_A_TIME]]
      found = self._tokenizer.encode_batch(decoded, add_special_tokens=False)
      out += [np.array(one.ids, np.uint32) for one in found]
    return out

  def decode(self, tokens) -> str:
    """Ids to text. Special ids vanish."""
    return self._tokenizer.decode([int(i) for i in np.asarray(tokens).ravel()], skip_special_tokens=True)


def encode_kept(kind: HuggingFace, texts: list[bytes]) -> list[np.ndarray]:
  """`kind.encode_all`, from the disk if the same texts were tokenized before: 100 s of CPU for 160 MB, which the runs
  of a study, each in a process of its own, would all take.

  The files, of 2 or 4 bytes a token, lie in $NSA_TOKENS (~/.cache/nsa/tokens; empty: nothing is kept), named by a hash
  of tokenizer and texts. One that is damaged is written again.
  """
  where = os.environ.get("NSA_TOKENS", "~/.cache/nsa/tokens")
  if not where or sum(map(len, texts)) < _KEPT_FROM:
    return kind.encode_all(texts)
  import tokenizers
  digest = hashlib.sha256(f"{tokenizers.__version__} {list(map(len, texts))} ".encode())
  for part in (kind.files["tokenizer.json"], *texts):
    digest.update(part)
  file = pathlib.Path(where).expanduser() / f"{digest.hexdigest()[:40]}.npz"
  if file.is_file():
    try:
      with np.load(file) as kept:  # the container has a checksum of each array
        ids, ends = kept["ids"].astype(np.uint32), kept["ends"]
      return np.split(ids, ends[:-1])
    except Exception as error:  # a byte that is wrong makes zipfile and NumPy raise many kinds
      logging.warning("%s is damaged (%s) and is written again", file, error)
  found = kind.encode_all(texts)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: threads, processes and hosts may write the same tokens at a time; each file appears whole.
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as out:
      try:
        np.savez(out, ids=np.concatenate(found).astype(np.min_scalar_type(kind.vocab_size - 1)),
                 ends=np.cumsum([len(ids) for ids in found]))
        out.close()
        os.replace(out.name, file)
      except BaseException:
        os.unlink(out.name)
        raise
  except OSError as error:  # no such home, a full disk: it is only slower
    logging.warning("tokens are not kept in %s: %s; set NSA_TOKENS to a folder that can be written", where, error)
  return found


def _parts(tree) -> list[dict]:
  """A pre-tokenizer or decoder of tokenizer.json and all that it consists of."""
  if not isinstance(tree, dict):
    return []
  nested = [part for key in ("pretokenizers", "decoders") for part in tree.get(key) or ()]
  return [tree] + [found for part in nested for found in _parts(part)]


def get(name: str) -> Bytes | HuggingFace:
  """The tokenizer called `name`. Raises ValueError for a name that is unknown, FileNotFoundError for a file that is
  not there, ModuleNotFoundError without the package."""
  if name == "bytes":
    return Bytes()
  kind, _, path = name.partition(":")
  if kind == "hf" and path:
    return _hugging_face(path, _state(_file(path)))
  raise ValueError(f'data.tokenizer = {name!r}: unknown; take "bytes" or "hf:PATH", a tokenizer.json or its folder')


@functools.lru_cache(maxsize=4)
def _hugging_face(path, state):
  del state
  return HuggingFace(path)


def _state(file) -> tuple:
  """What tells a file from another that has taken its place."""
  if "://" in os.fspath(file):
    return file.stat().mtime, file.stat().length
  stat = os.stat(file)
  return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _file(path) -> epath.Path:
  """The tokenizer.json at `path`, or in it. Raises FileNotFoundError."""
  folder = epath.Path(path).expanduser()
  file = folder / "tokenizer.json" if folder.is_dir() else folder
  if not file.exists() or file.is_dir():
    raise FileNotFoundError(f"data.tokenizer = {f'hf:{path}'!r}: there is no {file}; give a tokenizer.json or its "
                            "folder")
  return file
