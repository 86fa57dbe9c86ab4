"""What XLA's autotuner chose on GPUs, kept with a run or a study: compiled anew without it, a program has other bits.

While XLA compiles, it times what a product or a fusion may be computed by (cuBLASLt's and cuDNN's algorithms, Triton's
tiles) and takes the fastest. Beside other work on the device another one is, and its sums are rounded otherwise. Of
each choice it keeps a small file, beside JAX's cache of compiled programs (JAX 0.11 on). Programs and choices belong
together: who finds a program there chooses nothing. So a workdir gets a copy of the choices, a cache of programs
serves it only if none of its choices is another one, and one compiles at a time: two that compile side by side would
choose each for itself, and leave one choice.
"""
from __future__ import annotations

from collections.abc import Iterator
import contextlib
import itertools
import os
from pathlib import Path
import threading

from absl import logging

from nsa import metrics

FOLDER = "autotune"  # of a workdir
CHOICES = "xla_gpu_per_fusion_autotune_cache_dir"  # of a cache of programs: JAX's name
_PARTIAL = "tmp"     # below the choices of a cache: what XLA is writing

_lock, _compiling = threading.Lock(), threading.Lock()
_pair: tuple[Path, Path] | None = None  # (choices of the cache in use, those of the workdir)


def keep(workdir: str | os.PathLike, cache: str | os.PathLike) -> str:
  """The directory to take as JAX's cache of programs: `cache`, or where its choices are not the workdir's, the first of
  cache/autotune-1, cache/autotune-2, ... that agrees. It gets the workdir's choices. The workdir gets what was chosen
  there, and what is chosen from now on before the program of it runs; it is not touched before something is compiled.

  Both have to be local directories; object stores are left alone. Call it before the first program is compiled.
  """
  global _pair
  if "://" in os.fspath(workdir) or "://" in os.fspath(cache):
    return os.fspath(cache)
  import jax  # here: reports read choices and do without
  mine, place = Path(workdir).absolute() / FOLDER, Path(cache).absolute()
  try:
    have = read(workdir)
    for number in itertools.count():
      place = Path(cache).absolute() / (f"autotune-{number}" if number else "")
      theirs = place / CHOICES
      if all((theirs / name).read_bytes() == body for name, body in have.items() if (theirs / name).is_file()):
        break
    if number:
      logging.info("%s has other choices than %s: programs are kept in %s", cache, mine, place)
    _copy(mine, theirs)
  except OSError as error:  # a cache of somebody else's, a full disk: programs are compiled all the same
    logging.warning("%s cannot have what is in %s, XLA's autotuner may choose otherwise: %s", place, mine, error)
  if _pair is None:
    jax.monitoring.register_event_duration_secs_listener(_listen)
  _pair = place / CHOICES, mine
  return str(place)


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """Inside the block no other thread, and no other process with the same cache of programs, compiles for a GPU. Who
  waits for long says for whom.

  The processes of one run (jax.process_count() > 1) share out what there is to choose, and have to compile together.
  """
  import jax  # here: see keep

  from nsa import lock  # it needs jax, too
  cache = jax.config.jax_compilation_cache_dir
  if not cache or "://" in cache or jax.process_count() > 1 or jax.default_backend() != "gpu":
    yield
    return
  with _compiling, contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # a file system without locks, or one that is full
      os.makedirs(cache, exist_ok=True)
      stack.enter_context(lock.held(os.path.join(cache, "COMPILING"), "which compiles for a GPU"))
    yield


def read(workdir: str | os.PathLike) -> dict[str, bytes]:
  """The choices that a workdir has, by file name below workdir/autotune."""
  mine = Path(workdir) / FOLDER
  return {name: (mine / name).read_bytes() for name in sorted(_names(mine))}


def _names(folder: Path) -> set[str]:
  out = set()
  for path, _, files in os.walk(folder):
    below = Path(path).relative_to(folder)
    if _PARTIAL not in below.parts:
      out |= {(below / name).as_posix() for name in files if not name.startswith(".")}
  return out


def _copy(source: Path, target: Path) -> None:
  """Copies what is not there yet."""
  for name in _names(source) - _names(target):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    metrics.write_bytes(target / name, (source / name).read_bytes())


def _listen(event: str, _: float, **__) -> None:
  import jax
  if event == "/jax/core/compile/backend_compile_duration" and jax.default_backend() == "gpu":
    try:
      with _lock:
        _copy(*_pair)
    except OSError as error:  # a full disk: the run says so itself, where it cannot save
      logging.warning("what XLA's autotuner chose is not kept in %s: %s", _pair[1], error)
