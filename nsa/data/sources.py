"""Where documents come from: Python's own library, folders and archives (files.py), TFDS.

`load` gives the documents of one split, sorted by name, each as token ids
without BOS or EOS. Loaded documents stay in memory and are read-only.
"""
from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
import sysconfig
import threading
import zlib

from absl import logging
import numpy as np

from nsa.data import files, tokenizer
from nsa.data.files import ARCHIVES, SPLITS

# Python's library: what is read and how much of it.
MIN_BYTES = 4096          # shorter files are no long documents
MAX_TRAIN_BYTES = 8_000_000
# Tests and their data, tables, bundled archives and what is no library code.
SKIPPED_FOLDERS = frozenset((
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings",
    "pydoc_data", "ensurepip", "turtledemo", "lib-dynload", "_bundled", "__phello__"))


@dataclasses.dataclass(frozen=True)
class Document:
  """One document: its name within the source and its tokens, read-only, no BOS or EOS: uint16[length] (bytes) or
  uint32.

  prefix: bytes of its first token that are no text of it, a space that the tokenizer put before it.
  """
  name: str
  tokens: np.ndarray
  prefix: int = 0


def load(source: str, split: str, *, data_dir: str = "", tokens: str = "bytes") -> list[Document]:
  """The documents of `split` (train, val, test or ood), sorted by name.

  Args:
    source: "stdlib", "files:PATH" (a folder or a tar archive with one
      sub-folder per split), "tfds:NAME", or "tasks" (no text: an empty list).
    split: one of `SPLITS`.
    data_dir: tfds only: where the builder's files lie; "" = TFDS's default.
    tokens: the tokenizer, as in data.tokenizer.

  Raises:
    FileNotFoundError: PATH, the split's folder or the dataset does not exist.
    ValueError: an unknown source or split, a damaged archive, an empty split.
    ModuleNotFoundError: tfds without its packages.
  """
  if split not in SPLITS:
    raise ValueError(f"split = {split!r}: unknown; the splits are {', '.join(SPLITS)}")
  return list(_load(source, split, data_dir, tokens))


def check(source: str, data_dir: str = "") -> None:
  """Raises what `load` raises for a folder, an archive or a dataset that is not there, without reading one."""
  kind, _, rest = source.partition(":")
  if kind == "files" and rest:
    files.check(source, pathlib.Path(rest).expanduser(), "train")
  elif kind == "tfds" and rest:
    _tfds_builder(source, rest, data_dir)


def read_ahead(listed: Iterable[str]) -> None:
  """Begins to read the archives among these sources, each in a thread of its own; `load` waits for them and says what
  is wrong."""
  for source in listed:
    kind, _, rest = source.partition(":")
    path = pathlib.Path(rest).expanduser()
    if kind == "files" and path.name.endswith(ARCHIVES) and path.is_file():
      threading.Thread(target=lambda path=path: files.unpacked(path).exception(), daemon=True).start()


@functools.lru_cache(maxsize=16)
def _load(source: str, split: str, data_dir: str, tokens: str) -> tuple[Document, ...]:
  if source == "tasks":
    return ()
  if tokens != "bytes" and split != "train":  # tasks hide their evidence in the bytes of the same documents
    texts = {d.name: d.tokens.astype(np.uint8).tobytes() for d in _load(source, split, data_dir, "bytes")}
  else:
    texts = _texts(source, split, data_dir)
  kind, names = tokenizer.get(tokens), sorted(texts)
  if tokens == "bytes":
    return tuple(_document(name, kind.encode(texts[name])) for name in names)
  documents, counted = [], {}
  for name, ids in zip(names, tokenizer.encode_kept(kind, [texts[name] for name in names])):
    made = int(kind.token_bytes[ids].sum())
    prefix = kind.prefix * (made == len(texts[name]) + kind.prefix)
    documents.append(_document(name, ids, prefix))
    counted[name] = made - prefix
  _compare_bytes(source, split, tokens, texts, counted)
  return tuple(documents)


def _texts(source, split, data_dir) -> dict[str, bytes]:
  """The documents with text in them, by name."""
  kind, _, rest = source.partition(":")
  if source == "stdlib":
    texts = _stdlib(split)
  elif kind == "files" and rest:
    texts = files.load(source, pathlib.Path(rest).expanduser(), split)
  elif kind == "tfds" and rest:
    texts = _tfds(source, rest, split, data_dir)
  else:
    raise ValueError(f'data.source = {source!r}: unknown; '
                     'take "stdlib", "files:PATH", "tfds:NAME" or "tasks"')
  texts = {name: text for name, text in texts.items() if text}
  if not texts:
    raise ValueError(f"data.source = {source!r}: the split {split!r} has no document with text in it; "
                     "add text files or take another split")
  return texts


def _compare_bytes(source, split, tokens, texts, counted):
  """Says so where a tokenizer makes other bytes of the text: what is no UTF-8, no NFC, or spells a special token."""
  other = [name for name, text in texts.items() if counted[name] != len(text)]
  if other:
    logging.warning(
        "data.source = %r, split %s: %s makes %d bytes of %d of its %d documents that have %d (first %s): bits per "
        "byte are per byte that it makes. Text that is no UTF-8 or not in the form NFC, or that spells a special "
        "token, is not what it gives back; convert such files to compare with other tokenizers", source, split, tokens,
        sum(counted[name] for name in other), len(other), len(texts), sum(len(texts[name]) for name in other), other[0])


def _document(name, tokens, prefix=0):
  tokens.setflags(write=False)  # documents are shared between callers
  return Document(name, tokens, prefix)


def fingerprint(documents: list[Document]) -> str:
  """SHA-256 over names, lengths and tokens (hex): which corpus a run has seen."""
  digest = hashlib.sha256()
  for document in documents:
    name = document.name.encode("utf-8", "surrogateescape")
    digest.update(f"{len(name)} {len(document.tokens)} ".encode() + name)
    digest.update(np.ascontiguousarray(document.tokens, document.tokens.dtype.newbyteorder("<")))
  return digest.hexdigest()


# --- the standard library -----------------------------------------------------


def stdlib_split(module: str) -> str:
  """The split of a library file, by a hash of its path ("json/decoder.py"): 90 % train, 5 % val, 5 % test."""
  return {0: "val", 1: "test"}.get(zlib.crc32(module.encode()) % 20, "train")


def _stdlib(split):
  """Name -> bytes. The files, and so the corpus, differ between Python versions; `fingerprint` tells."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  if split == "ood":
    return _stdlib_prose(root)
  sizes = {}
  for folder, inside, names in os.walk(root):
    inside[:] = [name for name in inside if name not in SKIPPED_FOLDERS]  # not walked at all
    for name in names:
      path = pathlib.Path(folder, name)
      # `_sysconfigdata*` is one large table of compiler flags.
      if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
        module = path.relative_to(root).as_posix()
        if stdlib_split(module) == split and path.stat().st_size >= MIN_BYTES:
          sizes[module] = path.stat().st_size
  if not sizes:
    raise FileNotFoundError(f'data.source = "stdlib": no .py files under {root}; this Python ships without '
                            "its sources, use data.source = files:PATH")
  # The limit takes files in hash order, so that no part of the alphabet goes missing.
  texts, total = {}, 0
  for module in sorted(sizes, key=lambda m: (zlib.crc32(m.encode()[::-1]), m)):
    if split == "train" and total + sizes[module] > MAX_TRAIN_BYTES:
      continue
    total += sizes[module]
    texts[module] = (root / module).read_bytes()
  return texts


def _stdlib_prose(root):
  """English prose that ships with Python: the language reference's topics and the licence."""
  texts = {}
  licence = root / "LICENSE.txt"
  if licence.is_file():
    texts["LICENSE.txt"] = licence.read_bytes()
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
    texts["pydoc_data/topics"] = "\n\n".join(topics[name] for name in sorted(topics)).encode()
  except ModuleNotFoundError:
    pass
  if not texts:
    raise FileNotFoundError('data.source = "stdlib": this Python ships no text for the split "ood" (neither '
                            "LICENSE.txt nor pydoc_data); use data.source = files:PATH with an ood folder")
  return texts


# --- TFDS ---------------------------------------------------------------------


def _tfds_builder(source, name, data_dir):
  """Of a dataset in array_record format; TensorFlow is not needed."""
  try:
    import tensorflow_datasets as tfds  # slow, and an optional extra
    return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
  except ImportError as error:  # TFDS imports much of itself late, importlib_resources for one
    raise ModuleNotFoundError(f"data.source = {source!r}: {error}; "
                              "pip install tensorflow-datasets array_record importlib_resources") from error
  except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
    raise FileNotFoundError(
        f"data.source = {source!r}: no such dataset in data.data_dir = {data_dir!r} ({error}); build one "
        "with nsa.data.tfds_builder.build(folder, data_dir)") from error


def _tfds(source, name, split, data_dir):
  builder = _tfds_builder(source, name, data_dir)
  known = builder.info.splits or {}
  wanted = {"val": ("val", "validation")}.get(split, (split,))
  present = [s for s in wanted if s in known]
  if not present:
    if not known:
      raise FileNotFoundError(
          f"data.source = {source!r}: the dataset is not prepared in data.data_dir = {data_dir!r}; run "
          "download_and_prepare with file_format='array_record', or nsa.data.tfds_builder.build")
    raise files.missing_split(source, split, known)
  try:
    examples = builder.as_data_source(split=present[0])
  except (AssertionError, NotImplementedError, ModuleNotFoundError, ValueError) as error:
    raise ValueError(f"data.source = {source!r}: cannot be read as a data source ({error}); prepare it with "
                     "file_format='array_record' and pip install array_record") from error
  texts = {}
  for i in range(len(examples)):
    example = examples[i]
    if "text" not in example:
      raise ValueError(f"data.source = {source!r}: has the features {', '.join(example)} but not 'text'; "
                       "take a dataset whose examples have a 'text' feature")
    key = example.get("name", b"") or f"{i:08d}"
    key = key.decode() if isinstance(key, bytes) else str(key)
    text = example["text"]
    texts[key if key not in texts else f"{key}#{i}"] = text.encode() if isinstance(text, str) else bytes(text)
  return texts
