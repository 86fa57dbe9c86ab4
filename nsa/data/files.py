"""Text from a folder or a tar archive with one sub-folder per split: every document that is there, or an error."""
from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import io
import lzma
import os
import pathlib
import tarfile
import threading
import zlib

SPLITS = ("train", "val", "test", "ood")
ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar")


def load(source: str, path: pathlib.Path, split: str) -> dict[str, bytes]:
  """The documents of `split` in the folder or archive at `path`, by their paths below the split's folder.

  Raises FileNotFoundError or ValueError, as sources.load says, in the name of `data.source = source`.
  """
  check(source, path, split)
  return _folder(source, path, split) if path.is_dir() else _archive(source, path, split)


def check(source: str, path: pathlib.Path, split: str) -> None:
  """What `load` raises for a path that is no corpus, or a folder without the split: nothing is read."""
  if path.is_dir():
    if not (path / split).is_dir():
      raise missing_split(source, split, [p.name for p in path.iterdir() if p.is_dir()])
  elif not path.exists():
    raise FileNotFoundError(f"data.source = {source!r}: {path} does not exist; give a folder or an archive "
                            f"({', '.join(ARCHIVES)}) that holds one sub-folder per split")
  elif not path.name.endswith(ARCHIVES):
    raise ValueError(f"data.source = {source!r}: not a folder and not an archive; the name of an archive "
                     f"ends in {', '.join(ARCHIVES)}")


def missing_split(source: str, split: str, found) -> FileNotFoundError:
  """The error to raise where `found`, the folders that are there, lacks the split."""
  return FileNotFoundError(f"data.source = {source!r}: there is no {split}/ folder in it (found: "
                           f"{', '.join(sorted(found)) or 'nothing'}); add one or take another split")


def _lost(source, split, lost: dict[str, str]):
  """The error for documents that cannot be read: {name: why}."""
  name, why = next(iter(lost.items()))
  return ValueError(f"data.source = {source!r}: {len(lost)} document{'s' * (len(lost) > 1)} of the split {split!r} "
                    f"cannot be read, first {name}: {why}; mend or remove {'them' if len(lost) > 1 else 'it'}")


def _folder(source, path, split):
  """Reads path/split/**, links included; what lies behind two names is two documents."""
  root, texts, lost = path / split, {}, {}
  fail = lambda error: lost.update({os.path.relpath(error.filename, root): error.strerror})
  for folder, inside, names in os.walk(root, followlinks=True, onerror=fail):
    here = os.path.realpath(folder)
    # A link to a folder that it lies in holds nothing new, and has no end.
    inside[:] = [name for name in inside if not name.startswith(".")
                 and not f"{here}/".startswith(f"{os.path.realpath(os.path.join(folder, name))}/")]
    for name in names:
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
  """What an archive has of one split, by the document's name: its text, or why it is lost."""
  texts: dict[str, bytes] = dataclasses.field(default_factory=dict)
  lost: dict[str, str] = dataclasses.field(default_factory=dict)


_archives: dict[tuple, concurrent.futures.Future] = {}  # (path, time, size) -> {split: _Split}, of splits that nobody
                                                        # loaded yet
_archives_lock = threading.Lock()


def _archive(source, path, split):
  """Reads one split of a tar archive: `train/...`, `./train/...` or `<one folder>/train/...`."""
  try:
    contents = unpacked(path).result()
    if split in contents and contents[split] is None:  # loaded before, and dropped since
      contents = _read_archive(path)
  except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
    raise ValueError(f"data.source = {source!r}: the archive is damaged ({type(error).__name__}: {error}); "
                     "fetch or pack it again") from error
  found = contents.get(split)
  if found is None:
    raise missing_split(source, split, contents)
  if found.lost:
    raise _lost(source, split, found.lost)
  contents[split] = None  # the documents are kept, not the text beside them
  return found.texts


def unpacked(path) -> concurrent.futures.Future:
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
  splits: dict[str, _Split] = {}
  origin = {}                            # (split, document) -> the member that it came from
  members, links = {}, {}                # by path; (split, document) -> the path that it links to
  with _opened(path) as archive:
    read = lambda member: archive.extractfile(member).read()
    for member in archive:
      where = _plain(member.name)
      members[where] = member            # of two members of one path the later counts, as when it is unpacked
      parts = _inside(member.name)
      if not parts:
        continue
      split, name = splits.setdefault(parts[0], _Split()), "/".join(parts[1:])
      if any(part.startswith(".") for part in parts) or not (member.isfile() or _is_link(member)):
        continue
      if origin.setdefault((parts[0], name), where) != where:
        split.lost[name] = f"{origin[parts[0], name]} and {where} would have one name"
      links.pop((parts[0], name), None)
      split.texts.pop(name, None)
      if member.isfile():
        split.texts[name] = read(member)
      else:
        links[parts[0], name] = _target(member)
    while rest := archive.fileobj.read(1 << 16):
      if rest.strip(b"\0"):
        raise tarfile.ReadError("there is more behind its end, as where two archives were joined")
    for (split, name), target in links.items():
      seen = set()
      while target in members and _is_link(members[target]) and target not in seen:
        seen.add(target)
        target = _target(members[target])
      if target in members and members[target].isfile():
        splits[split].texts[name] = read(members[target])
      else:
        splits[split].lost[name] = f"a link to {target}, which is no file of the archive"
  return splits


def _opened(path) -> tarfile.TarFile:
  """The archive, in memory.

  Unpacked by one call: of one for each block each would wait for Python's lock, which a thread that traces and compiles
  a program holds most of the time.
  """
  unpack = {".xz": lzma.decompress, ".gz": gzip.decompress, ".tgz": gzip.decompress}.get(path.suffix, lambda raw: raw)
  return tarfile.open(fileobj=io.BytesIO(unpack(path.read_bytes())), mode="r:", tarinfo=_Member)


def _is_link(member) -> bool:
  return member.islnk() or member.issym()


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
