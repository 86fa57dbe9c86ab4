"""Tests of nsa/data/files.py: every document that a folder or an archive holds is read, or its loss is an error with
a count."""
import io
import re
import tarfile

import pytest

from nsa import data


def add(tar, name, text=None, link=None, kind=tarfile.SYMTYPE):
  member = tarfile.TarInfo(name)
  if text is None:
    member.type, member.linkname = kind, link
  else:
    member.size = len(text)
  tar.addfile(member, io.BytesIO(text) if text is not None else None)


def archive(path, *members):
  with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as tar:
    for name, *rest in members:
      add(tar, name, **(dict(text=rest[0]) if len(rest) == 1 else dict(link=rest[0], kind=rest[1])))
  return path


def read(path):
  return {d.name: bytes(d.tokens.astype("uint8")) for d in data.load(f"files:{path}", "train")}


def refused(path, words):
  with pytest.raises(ValueError, match="data.source = .*" + words):
    read(path)


def test_links_in_an_archive_are_followed(tmp_path):
  hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
  path = archive(tmp_path / "a.tar.xz", ("c/shared/a", b"aaa"), ("c/train/b", b"bbb"),
                 ("c/train/hard", "c/train/b", hard),
                 ("c/train/soft", "../shared/a", soft), ("c/train/far", "soft", soft), ("c/val/x", b"x"))
  assert read(path) == {"b": b"bbb", "hard": b"bbb", "soft": b"aaa", "far": b"aaa"}
  refused(archive(tmp_path / "b.tar", ("train/a", b"a"), ("train/b", "gone", soft), ("train/c", "c", soft),
                  ("train/d", "../val", soft)),
          "3 documents of the split 'train' cannot be read, first b: a link to train/gone")


def test_two_documents_of_one_name_are_no_single_one(tmp_path):
  refused(archive(tmp_path / "a.tar", ("x/train/1", b"a"), ("x/train/2", b"b"), ("y/train/1", b"c")),
          "1 document of .* first 1: x/train/1 and y/train/1 would have one name")
  # as tar itself would
  assert read(archive(tmp_path / "b.tar", ("./train/1", b"old"), ("train/1", b"new"))) == {"1": b"new"}


@pytest.mark.parametrize("damage", ["cut at a header", "cut in a header", "cut in a file", "another header", "joined"])
def test_a_damaged_tar_is_never_a_shorter_one(tmp_path, damage):
  whole = archive(tmp_path / "whole.tar", *((f"train/{i}", b"x" * 700) for i in range(5))).read_bytes()
  assert len(read(tmp_path / "whole.tar")) == 5
  at = 3 * (512 + 1024)                       # where the fourth member begins
  (tmp_path / "bad.tar").write_bytes({
      "cut at a header": whole[:at], "cut in a header": whole[:at + 100], "cut in a file": whole[:at + 600],
      "another header": whole[:at + 10] + b"?" + whole[at + 11:], "joined": whole + whole}[damage])
  refused(tmp_path / "bad.tar", "the archive is damaged")


def test_links_in_a_folder_are_followed(tmp_path):
  for name, text in (("train/a", b"a"), ("train/in/b", b"b"), ("elsewhere/more/c", b"c"), ("elsewhere/.hidden", b"no")):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(text)
  (tmp_path / "train/far").symlink_to("../elsewhere")
  (tmp_path / "train/in/loop").symlink_to("..")     # nothing new, and no end
  (tmp_path / "train/d").symlink_to("../elsewhere/more/c")
  assert read(tmp_path) == {"a": b"a", "in/b": b"b", "far/more/c": b"c", "d": b"c"}
  (tmp_path / "train/gone").symlink_to("nowhere")
  data.sources._load.cache_clear()
  refused(tmp_path,
          re.escape("1 document of the split 'train' cannot be read, first gone: a link to nowhere, which is no file"))


def test_what_may_not_be_read_is_an_error(tmp_path, monkeypatch):
  (tmp_path / "train").mkdir()
  for name in "abc":
    (tmp_path / "train" / name).write_bytes(b"text")

  def closed(path):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(data.files.pathlib.Path, "read_bytes", closed)  # root may read everything
  refused(tmp_path, "3 documents of the split 'train' cannot be read, first .: Permission denied")


def test_an_archive_is_unpacked_once_for_all_its_splits(tmp_path, monkeypatch):
  unpacked = []
  whole = data.files._read_archive
  monkeypatch.setattr(data.files, "_read_archive", lambda path: unpacked.append(path.name) or whole(path))
  path = archive(tmp_path / "a.tar.xz", ("train/t", b"ttt"), ("val/v", b"vv"), ("val/w", "v", tarfile.SYMTYPE),
                 ("test/gone", "x", tarfile.SYMTYPE))
  (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
  data.read_ahead(["stdlib", f"files:{path}", f"files:{tmp_path / 'b.tar'}", f"files:{tmp_path / 'c.tar'}"])
  of = lambda split: {d.name: bytes(d.tokens.astype("uint8")) for d in data.load(f"files:{path}", split)}
  assert of("val") == {"v": b"vv", "w": b"vv"} and of("train") == {"t": b"ttt"}
  refused(tmp_path / "b.tar", "the archive is damaged")
  with pytest.raises(ValueError, match="1 document of the split 'test' cannot be read"):
    of("test")
  assert unpacked.count("a.tar.xz") == 1
  data.sources._load.cache_clear()
  # its text was not kept beside its documents
  assert of("val") == {"v": b"vv", "w": b"vv"} and unpacked.count("a.tar.xz") == 2
  archive(path, ("val/v", b"other"))
  data.sources._load.cache_clear()
  assert of("val") == {"v": b"other"}
