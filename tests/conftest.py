"""What the test modules share, and how programs are compiled for them."""
import atexit
import gc
import os
import shutil
import sys
import tempfile

import pytest

# Compiling takes most of these tests' time. On a CPU it takes a seventh without most of XLA's optimizations, with the
# older of its two emitters of loops and with one module for LLVM. Programs are kept for all processes of a session.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as users do.
if os.environ.get("JAX_PLATFORMS") == "cpu" and os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
  assert "jax" not in sys.modules, "jax has read its environment"
  flags = os.environ.get("XLA_FLAGS", "").split()
  if not any("xla_backend_extra_options" in flag for flag in flags):  # a worker inherits what is set here
    flags += ["--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
              "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
# In Mosaic GPU's interpreter one thread of XLA waits for others: with two, as on two cores, now and then for ever.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nsa-compiled-")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
# Tracing makes objects by the million and few cycles: to look for them as often as by default takes a twentieth.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def bucket(monkeypatch):
  """gs://... in memory, by the same calls of etils.epath and fsspec that reach a real bucket."""
  from etils.epath import backend
  import fsspec  # noqa: F401, loads its registry
  from fsspec.implementations import memory

  class Bucket(memory.MemoryFileSystem):
    protocol, cachable = ("gs", "gcs"), False
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(path.removeprefix("gs://"))

  monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)  # fsspec.registry is a mapping
  backend.fsspec_backend._get_filesystem.cache_clear()
  yield Bucket
  backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def quick(monkeypatch):
  """Figures are made and not rendered, for tests that read the text."""
  from nsa.report import style
  def save(fig, folder, name, endings):
    for ending in endings:
      (folder / f"{name}.{ending}").write_text("<?xml")
  monkeypatch.setattr(style, "save", save)
