"""The tensors of a folder of safetensors, one file or several with their index, and the JSON files beside them."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nsa.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NO_WEIGHT = "rotary_emb.inv_freq"  # how a tensor ends that older files hold and that follows from the config


def library():
  """The package safetensors. Raises ModuleNotFoundError that says how to get it."""
  try:
    import ml_dtypes  # noqa: F401  with it NumPy knows bfloat16
    import safetensors.numpy
    return safetensors
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: models of the Hugging Face format need it: pip install safetensors") from None


def save(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
  """Writes a file that whoever may read its folder may read: the library's own are for their owner alone."""
  library().numpy.save_file(tensors, path, metadata=metadata)
  path.chmod(path.parent.stat().st_mode & 0o666)


def read_object(path: Path) -> dict:
  """The object in a JSON file. Raises ConfigError that names the file if there is none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError([("source", str(path), f"{pointer(path) or f'no JSON ({error})'}: fetch it again")]) from None
  if not isinstance(found, dict):
    raise ConfigError([("source", str(path), f"holds a {type(found).__name__}, not an object: fetch it again")])
  return found


def pointer(path: Path) -> str:
  """What to say of a file that only stands for a large one; "" of any other."""
  try:
    with open(path, "rb") as f:
      return "a Git LFS pointer, not the file itself" if f.read(40).startswith(b"version https://git-lfs") else ""
  except OSError:
    return ""


class Tensors:
  """The tensors of a folder: names and shapes at once, values when asked for.

  Raises ConfigError for a file that is missing, cut or no safetensors; it names the file.
  """

  def __init__(self, folder: Path):
    self.folder = Path(folder)
    index = self.folder / INDEX
    if index.is_file():
      where = self._read_index(index)
      if (self.folder / SINGLE).is_file() and SINGLE not in where.values():
        raise ConfigError([("source", str(self.folder), f"holds {SINGLE} and {INDEX}, which does not name it: leave "
                            "one of the two models there")])
    elif (self.folder / SINGLE).is_file():
      where = None
    else:
      raise ConfigError([("source", str(folder), f"neither {SINGLE} nor {INDEX}: save the model as safetensors")])
    self._files = {name: self._open(name) for name in (sorted(set(where.values())) if where else [SINGLE])}
    held = {file: set(opened.keys()) for file, opened in self._files.items()}
    if where is None:
      where = dict.fromkeys(held[SINGLE], SINGLE)
    astray = sorted(name for name, file in where.items() if name not in held[file])
    if astray:
      raise ConfigError([("source", str(index), f"{astray[0]} is not in {where[astray[0]]}, where the index has it "
                          f"({len(astray)} such tensors): fetch both again")])
    unnamed = sorted(name for file in held for name in held[file] if name not in where)
    if unnamed:
      raise ConfigError([("source", str(index), f"does not name {unnamed[0]} ({len(unnamed)} such tensors), which the "
                          "files hold: fetch it again")])
    twice = sorted((name, file) for file in held for name in held[file] if where[name] != file)
    if twice:
      name, file = twice[0]
      raise ConfigError([("source", str(self.folder / file), f"holds {name}, which {INDEX} has in {where[name]} "
                          f"({len(twice)} such tensors): fetch both again")])
    self._where = where
    self.shapes = {name: tuple(self._slice(name).get_shape()) for name in where}

  def _read_index(self, index):
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
      raise ConfigError([("source", str(index), "has no weight_map from tensors to files: fetch it again")])
    foreign = sorted(file for file in set(where.values()) if Path(file).name != file)
    if foreign:
      raise ConfigError([("source", str(index), f"weight_map names {foreign[0]!r}, which is no file of this folder")])
    missing = sorted({file for file in where.values() if not (self.folder / file).is_file()})
    if missing:
      raise ConfigError([("source", str(self.folder),
                          f"{INDEX} names {', '.join(missing)}, which are not there: fetch them again")])
    return where

  def _open(self, name):
    path = self.folder / name
    try:
      return library().safe_open(path, framework="np")
    except ModuleNotFoundError:
      raise
    except Exception as error:  # the library's own class, and OSError
      raise ConfigError([("source", str(path), f"{pointer(path) or f'no whole safetensors file ({error})'}: "
                          "fetch it again")]) from None

  def _slice(self, name):
    return self._files[self._where[name]].get_slice(name)

  @property
  def dtype(self) -> str:
    """What holds every weight bit for bit: the dtype that they have, float32 where they have several."""
    kinds = {self._slice(name).get_dtype() for name in self.shapes if not name.endswith(NO_WEIGHT)}
    return DTYPES.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"

  def place(self, name: str) -> str:
    """Where the tensor is, for messages."""
    return f"{self.folder / self._where.get(name, '')}: {name}"

  def read(self, name: str) -> np.ndarray:
    """The tensor as float32."""
    dtype = self._slice(name).get_dtype()
    if dtype not in DTYPES:
      raise ConfigError([(self.place(name), dtype,
                          f"weights are one of {', '.join(DTYPES.values())}: save the model unquantized")])
    try:
      return self._files[self._where[name]].get_tensor(name).astype(np.float32)
    except Exception as error:  # a file that was cut after it was opened
      raise ConfigError([(self.place(name), str(error), "cannot be read: fetch the file again")]) from None
