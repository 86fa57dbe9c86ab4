"""Where documents come from: Python's own library, folders and archives, TFDS.

`load` gives the documents of one split, sorted by name, each as token ids
without BOS or EOS. Loaded documents stay in memory and are read-only.
"""
from __future__ import annotations

from collections.abc import Iterable
import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import lzma
import os
import pathlib
import sysconfig
import tarfile
import threading
import zlib

from absl import logging
import numpy as np

from nsa.data import tokenizer

SPLITS = ("train", "val", "test", "ood")

# Python's library: what is read and how much of it.
MIN_BYTES = 4096          # shorter files are no long documents
MAX_TRAIN_BYTES = 8_000_000
# Tests and their data, tables, bundled archives and what is no library code.
SKIPPED_FOLDERS = frozenset((
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings",
    "pydoc_data", "ensurepip", "turtledemo", "lib-dynload", "_bundled", "__phello__"))
ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar")


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


def read_ahead(listed: Iterable[str]) -> None:
  """Begins to read the archives among these sources, each in a thread of its own; `load` waits for them and says what
  is wrong."""
  for source in listed:
    kind, _, rest = source.partition(":")
    path = pathlib.Path(rest).expanduser()
    if kind == "files" and path.name.endswith(ARCHIVES) and path.is_file():
      threading.Thread(target=lambda path=path: _contents(path).exception(), daemon=True).start()


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
    texts = _files(source, pathlib.Path(rest).expanduser(), split)
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
  for folder, inside, files in os.walk(root):
    inside[:] = [name for name in inside if name not in SKIPPED_FOLDERS]  # not walked at all
    for name in files:
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


# --- folders and archives -----------------------------------------------------


def _files(source, path, split):
  if path.is_dir():
    return _folder(source, path, split)
  if not path.exists():
    raise FileNotFoundError(f"data.source = {source!r}: {path} does not exist; give a folder or an archive "
                            f"({', '.join(ARCHIVES)}) that holds one sub-folder per split")
  if not path.name.endswith(ARCHIVES):
    raise ValueError(f"data.source = {source!r}: not a folder and not an archive; the name of an archive "
                     f"ends in {', '.join(ARCHIVES)}")
  return _archive(source, path, split)


def _missing_split(source, split, found):
  return FileNotFoundError(f"data.source = {source!r}: there is no {split}/ folder in it (found: "
                           f"{', '.join(sorted(found)) or 'nothing'}); add one or take another split")


def _hidden(parts):
  return any(part.startswith(".") for part in parts)


def _lost(source, split, lost: dict[str, str]):
  """The error for documents that cannot be read: {name: why}."""
  name, why = next(iter(lost.items()))
  return ValueError(f"data.source = {source!r}: {len(lost)} document{'s' * (len(lost) > 1)} of the split {split!r} "
                    f"cannot be read, first {name}: {why}; mend or remove {'them' if len(lost) > 1 else 'it'}")


def _folder(source, path, split):
  """Reads path/split/**, links included; what lies behind two names is two documents."""
  if not (path / split).is_dir():
    raise _missing_split(source, split, [p.name for p in path.iterdir() if p.is_dir()])
  root, texts, lost = path / split, {}, {}
  fail = lambda error: lost.update({os.path.relpath(error.filename, root): error.strerror})
  for folder, inside, files in os.walk(root, followlinks=True, onerror=fail):
    here = os.path.realpath(folder)
    # A link to a folder that it lies in holds nothing new, and has no end.
    inside[:] = [name for name in inside if not name.startswith(".")
                 and not f"{here}/".startswith(f"{os.path.realpath(os.path.join(folder, name))}/")]
    for name in files:
      file = pathlib.Path(folder, name)
      if name.startswith("."):
        continue
      try:
        if file.is_file():
          texts[file.relative_to(root).as_posix()] = file.read_bytes()
        elif file.is_symlink():
          lost[file.relative_to(root).as_posix()] = f"a link to {os.readlink(file)}, which is no file"
      except OSError as error:
        lost[file.relative_to(root).as_posix()] = error.strerror
  if lost:
    raise _lost(source, split, lost)
  return texts


class _Member(tarfile.TarInfo):
  """A member whose header was lost is an error: tarfile takes it for the end of the archive."""

  @classmethod
  def fromtarfile(cls, archive):
    try:
      return super().fromtarfile(archive)
    except tarfile.EOFHeaderError:
      raise
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(f"{error} at byte {archive.offset}: it was cut, or bytes of it were changed") from None


@dataclasses.dataclass
class _Split:
  """What an archive has of one split, by the document's name: its text, or the path that it links to, or why it is
  lost."""
  texts: dict[str, bytes] = dataclasses.field(default_factory=dict)
  links: dict[str, str] = dataclasses.field(default_factory=dict)
  twice: dict[str, str] = dataclasses.field(default_factory=dict)


_archives: dict[tuple, concurrent.futures.Future] = {}  # (path, time, size) -> {split: _Split}, of splits that nobody
                                                        # loaded yet
_archives_lock = threading.Lock()


def _archive(source, path, split):
  """Reads one split of a tar archive: `train/...`, `./train/...` or `<one folder>/train/...`."""
  try:
    contents = _contents(path).result()
    if split in contents and contents[split] is None:  # loaded before, and dropped since
      contents = _read_archive(path)
    found = contents.get(split)
    lost = {} if found is None else {**found.twice, **_resolve(path, found.links, found.texts)}
  except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
    raise ValueError(f"data.source = {source!r}: the archive is damaged ({type(error).__name__}: {error}); "
                     "fetch or pack it again") from error
  if found is None:
    raise _missing_split(source, split, contents)
  if lost:
    raise _lost(source, split, lost)
  contents[split] = None  # the documents are kept, not the text beside them
  return found.texts


def _contents(path) -> concurrent.futures.Future:
  """{split: _Split} of an archive, read once: unpacking it for one split unpacks it for all."""
  about = path.stat()
  key = os.path.realpath(path), about.st_mtime_ns, about.st_size
  with _archives_lock:
    mine = key not in _archives
    future = _archives.setdefault(key, concurrent.futures.Future())
  if mine:
    try:
      future.set_result(_read_archive(path))
    except BaseException as error:
      with _archives_lock:
        del _archives[key]  # it may be mended
      future.set_exception(error)
  return future


def _read_archive(path) -> dict[str, _Split]:
  splits = {}
  origin = {}                            # (split, document) -> the member that it came from
  for member, read in _members(path):
    parts = _inside(member.name)
    if not parts:
      continue
    split = splits.setdefault(parts[0], _Split())
    name = "/".join(parts[1:])
    if _hidden(parts) or member.isdir():
      continue
    if member.isfile() or member.islnk() or member.issym():
      where = _plain(member.name)
      if origin.setdefault((parts[0], name), where) != where:
        split.twice[name] = f"{origin[parts[0], name]} and {where} would have one name"
      split.links.pop(name, None)        # of two members of one path the later counts, as when it is unpacked
      split.texts.pop(name, None)
      if member.isfile():
        split.texts[name] = read()
      else:
        split.links[name] = _target(member)
  return splits


def _members(path):
  """(member, a function that reads it) of a whole archive, in order, in memory.

  Unpacked by one call: of one for each block each would wait for Python's lock, which a thread that traces and compiles
  a program holds most of the time.
  """
  unpack = {".xz": lzma.decompress, ".gz": gzip.decompress, ".tgz": gzip.decompress}.get(path.suffix, lambda raw: raw)
  with tarfile.open(fileobj=io.BytesIO(unpack(path.read_bytes())), mode="r:", tarinfo=_Member) as archive:
    for member in archive:
      yield member, lambda: archive.extractfile(member).read()
    while rest := archive.fileobj.read(1 << 16):
      if rest.strip(b"\0"):
        raise tarfile.ReadError("there is more behind its end, as where two archives were joined")


def _plain(name):
  return os.path.normpath(name).lstrip("/")


def _target(link):
  return _plain(link.linkname if link.islnk() else f"{os.path.dirname(_plain(link.name))}/{link.linkname}")


def _inside(name) -> tuple[str, ...]:
  """The parts of a member's path from the split on; () for what is in none."""
  parts = pathlib.PurePosixPath(name).parts
  if len(parts) > 1 and parts[0] not in SPLITS and parts[1] in SPLITS:
    parts = parts[1:]
  return parts if parts and parts[0] in SPLITS else ()


def _resolve(path, links, texts) -> dict[str, str]:
  """Reads what `links`, {document: path inside the archive}, point to into `texts`; {document: why not} of the
  others."""
  if not links:
    return {}
  files, chain = set(), {}
  for member, _ in _members(path):
    where = _plain(member.name)
    if member.isfile():
      files.add(where)
    elif member.islnk() or member.issym():
      chain[where] = _target(member)
  ends, lost = {}, {}
  for name, target in links.items():
    seen = set()
    while target in chain and target not in seen:
      seen.add(target)
      target = chain[target]
    if target in files:
      ends.setdefault(target, []).append(name)
    else:
      lost[name] = f"a link to {target}, which is no file of the archive"
  for member, read in _members(path):
    if member.isfile() and _plain(member.name) in ends:
      texts.update(dict.fromkeys(ends[_plain(member.name)], read()))
  return lost


# --- TFDS ---------------------------------------------------------------------


def _tfds(source, name, split, data_dir):
  """Reads a TFDS dataset in array_record format; TensorFlow is not needed."""
  try:
    import tensorflow_datasets as tfds  # slow, and an optional extra
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
  except ImportError as error:  # TFDS imports much of itself late, importlib_resources for one
    raise ModuleNotFoundError(f"data.source = {source!r}: {error}; "
                              "pip install tensorflow-datasets array_record importlib_resources") from error
  except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
    raise FileNotFoundError(
        f"data.source = {source!r}: no such dataset in data.data_dir = {data_dir!r} ({error}); build one "
        "with nsa.data.tfds_builder.build(folder, data_dir)") from error
  known = builder.info.splits or {}
  wanted = {"val": ("val", "validation")}.get(split, (split,))
  present = [s for s in wanted if s in known]
  if not present:
    if not known:
      raise FileNotFoundError(
          f"data.source = {source!r}: the dataset is not prepared in data.data_dir = {data_dir!r}; run "
          "download_and_prepare with file_format='array_record', or nsa.data.tfds_builder.build")
    raise _missing_split(source, split, known)
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
