"""A GGUF file: its metadata and its tensors.

The header is read here and not by the package `gguf`, whose reader loops over whatever count a damaged header claims
and names no field; the package unpacks the tensors' blocks (`gguf.quants`). Format, versions 2 and 3, little-endian:

  "GGUF", uint32 version, uint64 tensors, uint64 pairs,
  pairs:   string key, uint32 type, value (an array: uint32 type, uint64 count, values; a string: uint64 length, bytes)
  tensors: string name, uint32 dimensions, uint64 sizes (innermost first), uint32 type, uint64 offset
  padding to general.alignment (32), then the tensors' bytes at their offsets
"""
from __future__ import annotations

import mmap
from pathlib import Path
import struct
from typing import Any, NamedTuple

import numpy as np

from nsa.config import ConfigError
from nsa.huggingface import safetensors_files

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
  shape: tuple[int, ...]  # outermost first, as NumPy has it
  kind: Any               # gguf.GGMLQuantizationType
  begin: int              # bytes from the file's beginning
  size: int               # bytes


def library():
  """The package gguf. Raises ModuleNotFoundError that says how to get it."""
  try:
    import gguf
    import gguf.quants
    return gguf
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: GGUF files need it: pip install gguf") from None


class GGUF:
  """metadata: key -> int, float, bool, str or list of them. tensors: name -> Tensor.

  Raises ConfigError that names the file and the field for what is cut, inconsistent or unknown. The values of tensors
  are read when asked for.
  """

  def __init__(self, path: Path):
    self.path = Path(path)
    self._gguf = library()
    try:
      with open(path, "rb") as f:
        self._data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
      raise ConfigError([("source", str(path), f"cannot be read ({error})")]) from None
    if self._data[:4] != MAGIC:
      raise ConfigError([("source", str(path), f"{safetensors_files.pointer(self.path) or 'no GGUF file'}: "
                          "it does not begin with GGUF, fetch it again")])
    self._at = 4
    version = self._scalar("I", "version")
    if version not in VERSIONS:
      raise ConfigError([(f"{path}: version", version, "versions 2 and 3, little-endian, are known: convert it anew")])
    tensors, pairs = self._scalar("Q", "the number of tensors"), self._scalar("Q", "the number of keys")
    self.metadata = {}
    for i in range(self._count(pairs, 12, "the number of keys")):
      key = self._string(f"key {i}")
      if key in self.metadata:
        raise self._damaged(key, "is there twice")
      self.metadata[key] = self._value(self._scalar("I", key), key)
    entries = [self._entry(i) for i in range(self._count(tensors, 24, "the number of tensors"))]
    alignment = self.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & alignment - 1:
      raise ConfigError([(f"{path}: general.alignment", alignment, "a power of two is needed: fetch it again")])
    start = -(-self._at // alignment) * alignment
    self.tensors = {}
    for name, shape, kind, offset in entries:
      if name in self.tensors:
        raise self._damaged(name, "is there twice")
      self.tensors[name] = self._placed(name, shape, kind, start + offset)

  # --- the header ---------------------------------------------------------------

  def _damaged(self, field, what):
    return ConfigError([(f"{self.path}: {field}", f"{what}",
                         f"the file of {len(self._data):,} bytes is cut or damaged: fetch it again")])

  def _take(self, size: int, field: str) -> bytes:
    if size > len(self._data) - self._at:
      raise self._damaged(field, f"{size:,} bytes at {self._at:,}")
    self._at += size
    return self._data[self._at - size:self._at]

  def _count(self, count: int, least: int, field: str) -> int:
    """`count`, if the rest of the file has room for so many things of `least` bytes."""
    if count * least > len(self._data) - self._at:
      raise self._damaged(field, f"{count:,}")
    return count

  def _scalar(self, code: str, field: str):
    return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), field))[0]

  def _string(self, field: str) -> str:
    raw = self._take(self._scalar("Q", field), field)
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise self._damaged(field, f"no UTF-8 ({error})") from None

  def _value(self, kind: int, field: str):
    if kind == _STRING:
      return self._string(field)
    if kind == _ARRAY:
      kind, count = self._scalar("I", field), self._scalar("Q", field)
      if kind in _SCALARS:
        code = _SCALARS[kind]
        width = struct.calcsize("<" + code)
        return list(struct.unpack(f"<{self._count(count, width, field)}{code}", self._take(count * width, field)))
      if kind == _STRING:
        return [self._string(f"{field}[{i}]") for i in range(self._count(count, 8, field))]
      raise self._damaged(field, f"an array of the type {kind}, which is unknown here")
    if kind not in _SCALARS:
      raise self._damaged(field, f"of the type {kind}, which is unknown")
    return self._scalar(_SCALARS[kind], field)

  def _entry(self, number):
    name = self._string(f"the name of tensor {number}")
    dimensions = self._scalar("I", f"{name}'s dimensions")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
      raise self._damaged(f"{name}'s dimensions", f"{dimensions:,}")
    sizes = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions, f"{name}'s shape"))
    return name, sizes[::-1], self._scalar("I", f"{name}'s type"), self._scalar("Q", f"{name}'s offset")

  def _placed(self, name, shape, kind, begin):
    try:
      kind = self._gguf.GGMLQuantizationType(kind)
    except ValueError:
      fix = "not known to the package gguf: update it, or take another file of the model"
      raise ConfigError([(f"{self.path}: {name}'s type", kind, fix)]) from None
    block, width = self._gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
      raise self._damaged(f"{name}'s shape", f"{shape}, rows that are no multiple of {kind.name}'s blocks of {block}")
    size = width
    for n in (*shape[:-1], shape[-1] // block):
      size *= n  # Python's integers do not overflow
    if begin + size > len(self._data):
      raise self._damaged(name, f"{size:,} bytes at {begin:,}")
    return Tensor(shape, kind, begin, size)

  # --- tensors --------------------------------------------------------------------

  def read(self, name: str) -> np.ndarray:
    """The tensor's values as float32, of the shape in `tensors`."""
    shape, kind, begin, size = self.tensors[name]
    block, width = self._gguf.GGML_QUANT_SIZES[kind]
    rows = np.frombuffer(self._data, np.uint8, size, begin).reshape(*shape[:-1], shape[-1] // block * width)
    try:
      values = self._gguf.quants.dequantize(rows, kind)
    except NotImplementedError:
      fix = "the package gguf cannot unpack it: take another file of the model, of F32, F16, BF16, Q8_0 or a K-quant"
      raise ConfigError([(f"{self.path}: {name}'s type", kind.name, fix)]) from None
    return np.asarray(values, np.float32).reshape(shape)
