"""Compiled programs on disk, between processes: who finds one there neither traces nor compiles it.

JAX's own cache finds a program by its text, and making that text takes seconds of Python per program. This one finds
it by what the text is made from: the key that `programs` gives it (architecture, mode, shapes, mesh, ...), the source
of this project, versions, devices, JAX's settings and the environment that it and XLA read. What is found is what was
compiled then, bit for bit. Where methods of a user's own are registered nothing is kept or found: their source may be
anywhere.

For programs of one GPU, where it was measured (docs/running.md). On a CPU XLA cannot write every program (not one that
sorts), and what came from JAX's cache does not run when it is written a second time; on a GPU it does. TPUs and meshes
have not been asked, so commands take it with --keep_programs alone.
"""
from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path
import pickle
import platform
import threading
import time
from typing import Any

from absl import logging
import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from nsa import metrics, origins

DAYS = 14  # a program that nobody has asked for so long is dropped
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "flax", "optax", "numpy", "libtpu",
             *(name.format(cuda) for cuda in (12, 13) for name in ("jax-cuda{}-plugin", "jax-cuda{}-pjrt",
                                                                  "nvidia-cudnn-cu{}", "nvidia-cublas-cu{}")),
             "nvidia-cublas")
_PREFIXES = ("JAX_", "XLA_", "TRITON_", "LIBTPU_", "CUDA_", "NVIDIA_", "NSA_")
# Where things lie and who shares the device: of no account for a program.
_NO_MATTER = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE", "JAX_LOG", "JAX_COORDINATOR", "JAX_PROCESS_ID",
              "JAX_NUM_PROCESSES", "XLA_PYTHON_CLIENT_", "TRITON_CACHE_DIR", "TRITON_HOME", "CUDA_VISIBLE_DEVICES",
              "NVIDIA_VISIBLE_DEVICES", "NSA_TOKENS")
# Libraries that programs are linked with when they are loaded: importing Mosaic GPU, which takes a second, names them.
_LIBRARIES = ("MOSAIC_GPU_RUNTIME_LIB_PATH", "MOSAIC_GPU_NVSHMEM_SO_PATH")
_NO_MATTER_SETTINGS = ("jax_compilation_cache", "jax_persistent_cache", "jax_logging", "jax_log_", "jax_pprint",
                       "jax_platforms", "jax_cuda_visible_devices")


_thread = threading.local()  # .read: whether JAX's cache had what this thread last compiled


def _listen(event: str, **_) -> None:
  if event == "/jax/compilation_cache/cache_hits":
    _thread.read = True


jax.monitoring.register_event_listener(_listen)


def compile_here(compile_: Callable[[], Any]) -> tuple[Any, bool]:
  """(what `compile_` gives, whether it was compiled here and now)."""
  _thread.read = False
  return compile_(), not _thread.read


class Kept:
  """The programs of a directory, made when the first one is kept."""

  def __init__(self, directory: str | os.PathLike, platform: str = "gpu"):
    self.directory, self.platform = Path(directory), platform

  def load(self, key) -> Any:
    """The compiled program of a key, or None: none is there, or it cannot be loaded here."""
    path = self._path(key)
    if path is None or not path.exists():
      return None
    try:
      made, environment = pickle.loads(path.read_bytes())
      for name, there in environment.items():
        if not os.path.exists(there):
          raise FileNotFoundError(f"{name}={there}")
        os.environ.setdefault(name, there)
      found = serialize_executable.deserialize_and_load(*made, execution_devices=_devices(key))
      os.utime(path)
      return found
    except Exception as error:  # another version's, cut, of a device that is gone: it is compiled
      logging.warning("%s cannot be loaded: %s: %s", path, type(error).__name__, error)
      return None

  def save(self, key, compiled) -> None:
    """Keeps a program, if it can be kept: a full disk or a program with a callback costs nothing but this."""
    path = self._path(key)
    if path is None:
      return
    try:
      environment = {name: there for name, there in os.environ.items() if name in _LIBRARIES}
      made = pickle.dumps((serialize_executable.serialize(compiled), environment))
      self.directory.mkdir(parents=True, exist_ok=True)
      metrics.write_bytes(path, made)
      old = time.time() - DAYS * 86400
      for other in self.directory.iterdir():
        if other.stat().st_mtime < old:
          other.unlink(missing_ok=True)
    except Exception as error:
      logging.warning("%s is not kept: %s: %s", path, type(error).__name__, error)

  def _path(self, key) -> Path | None:
    if (origins.any_registered() or jax.process_count() > 1 or jax.default_backend() != self.platform
        or len(_devices(key)) > 1):
      return None
    text = _text(key)
    return self.directory / hashlib.sha256(f"{_surroundings()}\n{text}".encode()).hexdigest() if text else None


def _devices(key) -> list[jax.Device]:
  """Those of the key's mesh; the default one of a program without a mesh."""
  return next((list(part.devices.flat) for part in key if isinstance(part, Mesh)), jax.devices()[:1])


def _text(key) -> str:
  """A key in words that mean the same in every process; "" for one that has none."""
  if isinstance(key, tuple):
    parts = [_text(part) for part in key]
    return f"({', '.join(parts)})" if all(parts) else ""
  if isinstance(key, Mesh):
    return f"{key!r} {[device.id for device in key.devices.flat]}"
  text = repr(key)
  return "" if " at 0x" in text else f"{type(key).__name__} {text}"


@functools.cache
def _surroundings() -> str:
  """What all programs of this process depend on beside their keys."""
  digest = hashlib.sha256()
  root = Path(__file__).resolve().parents[1]
  for path in sorted(path for room in ("nsa", "pallas_kernels") for kind in ("*.py", "*.json")
                     for path in (root / room).rglob(kind)):
    digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  environment = {name: value for name, value in os.environ.items()
                 if name.startswith(_PREFIXES) and not name.startswith(_NO_MATTER)}
  settings = {name: str(value) for name, value in jax.config.values.items()
              if not name.startswith(_NO_MATTER_SETTINGS)}
  devices = jax.devices()
  told = [(d.device_kind, d.platform, str(getattr(d, "compute_capability", "")), getattr(d, "core_count", 0))
          for d in devices]
  return repr((digest.hexdigest(), sorted(versions.items()), platform.python_version(), sorted(environment.items()),
               sorted(settings.items()), told, devices[0].client.platform_version))
