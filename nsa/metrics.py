"""Numbers of a run on disk: JSONL records, JSON files, MFU.

Needs neither JAX nor TensorFlow; anything that numpy can convert, jax.Array included, may be written.
"""
from __future__ import annotations

import json
import math
import os
import pathlib
import re
import time
from typing import Any

from etils import epath
import numpy as np

# JSON has no word for these; as strings they stay readable by every JSON parser.
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_NUMBERS = {int, float}
_SPELT = re.compile(r"\\*(nan|-?inf)")  # strings of these get a backslash, or one more


# --- records as lines of JSON -----------------------------------------------------


class JsonlWriter:
  """Appends records to a JSON Lines file, one line per record.

  Each record is handed to the operating system in one call before `write` returns: a killed process loses
  at most the line that is being written. The file is synced to the disk every `sync_seconds` when records
  come, and by `sync`: a machine that loses power may lose the records since then. Opening a file whose last
  line was cut drops that line.

  Object stores cannot append: on `gs://` and its like a sync replaces the whole object, and a killed process
  loses the records since the last one.

  Floats are written with the fewest digits that give back the same value in their own type; nan and
  infinities become the strings "nan", "inf" and "-inf", which `read_jsonl` turns back; strings that read so get a
  backslash.

  Args:
    path: the file.
    tensorboard: mirror the numbers into `tensorboard/` beside the file, which has to be on a file system;
      needs the package tensorboardX.
    sync_seconds: see above; None = 5, and 30 on an object store.
  """

  def __init__(self, path: str | os.PathLike, *, tensorboard: bool = False, sync_seconds: float | None = None):
    self.path = epath.Path(path)
    remote = "://" in os.fspath(path)
    if remote and tensorboard:
      raise ValueError(f"tensorboard = True: event files are appended, which {os.fspath(path)} cannot be; set it to "
                       "False")
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._sync_seconds = sync_seconds if sync_seconds is not None else 30.0 if remote else 5.0
    self._synced, self._tensorboard = time.monotonic(), None
    self._summary_writer = _summary_writer_class() if tensorboard else None
    self._file = _Object(self.path) if remote else _File(pathlib.Path(path))
    self._open_tensorboard(None)

  def write(self, record: dict[str, Any]) -> None:
    """Appends one record: str keys; numbers, strings, booleans, None, arrays, and dicts and lists of them.

    Raises ValueError for anything else, naming the key.
    """
    values = {key: _encode(value, key) for key, value in record.items()}
    self._file.append((json.dumps(values, allow_nan=False) + "\n").encode())
    if time.monotonic() - self._synced >= self._sync_seconds:
      self.sync()
    if self._tensorboard is not None:
      self._mirror(values)

  def truncate_after(self, step: int) -> None:
    """Drops the records whose "step" is larger than `step`, as a run resumed there writes them again.

    Records without a step stay. The file is replaced atomically, and its remaining lines keep every byte.
    """
    kept, dropped = [], False
    for number, line in _lines(self._file.read()):
      if _parse(line, number, self.path).get("step", step) > step:
        dropped = True
      else:
        kept.append(line + b"\n")
    if dropped:
      self._file.replace(b"".join(kept))
    self._open_tensorboard(step + 1)

  def sync(self) -> None:
    """Returns when everything written so far is on the disk, or in the object."""
    self._file.sync()
    self._synced = time.monotonic()
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def close(self) -> None:
    """Syncs and closes; closing twice is harmless."""
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
      self._tensorboard = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _open_tensorboard(self, purge_step):
    if self._summary_writer is None:
      return
    if self._tensorboard is not None:
      self._tensorboard.close()
    self._tensorboard = self._summary_writer(str(self.path.parent / "tensorboard"), purge_step=purge_step)

  def _mirror(self, values):
    step = values.get("step", 0)
    # Seeds share a run, so each gets a tag of its own.
    suffix = f"/s{values['seed']}" if "seed" in values else ""
    for name, value in _flatten(values):
      if name not in ("step", "seed"):
        value = _NONFINITE.get(value) if isinstance(value, str) else value
        if isinstance(value, (int, float)):
          self._tensorboard.add_scalar(name + suffix, value, step)


class _File:
  """A file on a file system, appended to without a buffer of our own."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._open()

  def _open(self):
    self._file = open(self._path, "ab", buffering=0)
    self._size = self._file.seek(0, os.SEEK_END)
    whole = _repaired(data := self.read())
    if len(whole) > len(data):
      self.append(whole[len(data):])
    elif len(whole) < len(data):
      self._size = len(whole)
      os.ftruncate(self._file.fileno(), self._size)

  def read(self) -> bytes:
    return self._path.read_bytes()

  def append(self, data: bytes) -> None:
    try:
      written = 0
      while written < len(data):
        written += self._file.write(data[written:])
    except OSError:
      os.ftruncate(self._file.fileno(), self._size)  # a full disk must not leave half a line between two
      raise
    self._size += len(data)

  def replace(self, data: bytes) -> None:
    self._file.close()
    write_bytes(self._path, data)
    self._open()

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      self.sync()
      self._file.close()


class _Object:
  """An object of a store, kept in memory and put whole."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._data = _repaired(path.read_bytes()) if path.exists() else b""
    self._put = self._data if path.exists() else None

  def read(self) -> bytes:
    return self._data

  def append(self, data: bytes) -> None:
    self._data += data

  def replace(self, data: bytes) -> None:
    self._data = data
    self.sync()

  def sync(self) -> None:
    if self._put != self._data:
      self._path.write_bytes(self._data)
      self._put = self._data

  close = sync


def _repaired(data: bytes) -> bytes:
  """`data` without a cut last line; a whole one gets the line end that is missing."""
  tail = data[data.rfind(b"\n") + 1:]
  if tail and _is_record(tail):
    return data + b"\n"
  return data[:len(data) - len(tail)]


def read_jsonl(path: str | os.PathLike, *,
               dedupe: tuple[str, ...] = ("step", "seed")) -> list[dict[str, Any]]:
  """Reads the records of a JSON Lines file.

  Args:
    path: the file. A last line that was cut is ignored.
    dedupe: of records that agree in these keys the last one stays, in the place of the first (name
      every key that tells records apart, e.g. "kind" as well). Records with none of the keys all stay; ()
      keeps all.

  Raises:
    ValueError: a line that is not a JSON object, with its number.
    FileNotFoundError: there is no such file.
  """
  records = {}
  for number, line in _lines(epath.Path(path).read_bytes()):
    record = _decode(_parse(line, number, path))
    key = json.dumps([record.get(k) for k in dedupe])
    records[key if any(k in record for k in dedupe) else number] = record
  return list(records.values())


def _lines(data):
  """(number from 1, bytes) of every line, without a cut last one."""
  for number, line in enumerate(_repaired(data).split(b"\n"), 1):
    if line.strip():
      yield number, line


def _is_record(line):
  """A JSON object is never the beginning of another, so this also tells a whole line from a cut one."""
  try:
    return isinstance(json.loads(line), dict)
  except ValueError:
    return False


def _parse(line, number, path):
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{os.fspath(path)}, line {number}: not JSON ({error}); repair or remove it") from error
  if not isinstance(record, dict):
    raise ValueError(f"{os.fspath(path)}, line {number}: a record is a JSON object, not {record!r}")
  return record


def _encode(value, where):
  """`value` in JSON's types. A float32 gets float32's shortest decimal, not the double's 17 digits.

  where: its name for errors, or (that of what holds it, its key or place).
  """
  kind = type(value)  # first what records are made of, a million of them in an evaluation's file
  if kind is float:
    return value if math.isfinite(value) else repr(value)
  if isinstance(value, (list, tuple)):
    if _NUMBERS.issuperset(map(type, value)) and _finite(value):
      return list(value)
    return [_encode(v, (where, i)) for i, v in enumerate(value)]
  if value is None or isinstance(value, (bool, int)):
    return value
  if isinstance(value, str):
    return "\\" + value if _SPELT.fullmatch(value) else value  # an arm called "nan" stays one
  if isinstance(value, float):  # np.float64 too
    return _encode(float(value), where)
  if isinstance(value, dict):
    for key in value:
      if not isinstance(key, str):
        raise ValueError(f"{_name(where)}: key {key!r} is not a string")
    return {key: _encode(v, (where, key)) for key, v in value.items()}
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if not hasattr(value, "__array__"):
    raise ValueError(f"{_name(where)} is a {kind.__name__}; write numbers, strings, arrays, dicts or lists")
  array = np.asarray(value)
  if array.ndim:
    return [_encode(v, (where, i)) for i, v in enumerate(array)]
  if array.dtype.kind in "bui":
    return array.item()
  try:
    return _encode(float(str(array[()])), where)  # also the float types of ml_dtypes
  except ValueError as error:
    raise ValueError(f"{_name(where)} has dtype {array.dtype}, which is no real number") from error


def _finite(numbers) -> bool:
  try:
    return all(map(math.isfinite, numbers))
  except OverflowError:  # an int that no float can hold
    return False


def _name(where) -> str:
  if isinstance(where, str):
    return where
  outer, key = where
  return f"{_name(outer)}.{key}" if isinstance(key, str) else f"{_name(outer)}[{key}]"


def _decode(value):
  if isinstance(value, str):
    return _NONFINITE.get(value, value[1:] if value.startswith("\\") and _SPELT.fullmatch(value) else value)
  if isinstance(value, dict):
    return {k: _decode(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_decode(v) for v in value]
  return value


def _flatten(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{key}/")
    elif isinstance(value, list):
      yield from _flatten({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}/")
    elif not isinstance(value, bool):
      yield prefix + key, value


def _summary_writer_class():
  try:
    from tensorboardX import SummaryWriter  # lazily: an optional package
  except ImportError as error:
    raise ImportError("tensorboard = True needs the package tensorboardX: pip install nsa[tb]") from error
  return SummaryWriter


# --- whole files of JSON ------------------------------------------------------------


def write_json(path: str | os.PathLike, obj: Any, indent: int | None = 2) -> None:
  """Writes `obj` as JSON; a reader sees the old file or the whole new one, also after a crash.

  Values are converted as `JsonlWriter` does. Raises ValueError for what JSON cannot hold. indent: None = all on one
  line.
  """
  data = (json.dumps(_encode(obj, "value"), indent=indent, allow_nan=False) + "\n").encode()
  if "://" in os.fspath(path):
    epath.Path(path).write_bytes(data)  # object stores put an object whole or not at all
  else:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


def read_json(path: str | os.PathLike) -> Any:
  """The inverse of `write_json` (tuples come back as lists, "nan" as nan).

  Raises ValueError that names the path if it is not JSON, FileNotFoundError if it is not there.
  """
  try:
    return _decode(json.loads(epath.Path(path).read_text()))
  except ValueError as error:
    raise ValueError(f"{os.fspath(path)} is not JSON: {error}; restore it, or move it away") from error


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Atomic for readers, and durable: the content is on the disk before the name points to it. Of a local file."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


# --- model FLOP/s utilization -------------------------------------------------------

def peak_tflops(device_kind: str) -> float | None:
  """Peak dense bf16 TFLOP/s of one device by `jax.Device.device_kind`; None if unknown (a CPU, say)."""
  from nsa import chips  # here: it brings JAX along
  device = chips.find(device_kind)
  return device and device.tflops


def mfu(flops_per_second: float, peak_tflops: float, devices: int) -> float:
  """Model FLOP/s utilization, a fraction of 1.

  Args:
    flops_per_second: FLOP/s over all devices; the caller says which FLOPs it counts.
    peak_tflops: peak TFLOP/s of one device.
    devices: number of devices.

  Raises ValueError unless the peak and the number of devices are above 0.
  """
  if not peak_tflops > 0:
    raise ValueError(f"peak_tflops = {peak_tflops}: TFLOP/s of one device, above 0")
  if devices < 1:
    raise ValueError(f"devices = {devices}: at least 1")
  return flops_per_second / (peak_tflops * 1e12 * devices)
