"""What the test modules share."""
import sys

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiles():
  """Compiling takes most of these tests' time: without most of XLA's optimizations it takes half."""
  old = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", old)


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
  """A directory of compiled programs, for this process and for others that are told of it."""
  from jax.experimental.compilation_cache import compilation_cache as cache
  path = str(tmp_path_factory.mktemp("compiled"))
  settings = {"jax_compilation_cache_dir": path, "jax_persistent_cache_min_compile_time_secs": 0.0,
              "jax_persistent_cache_min_entry_size_bytes": -1}
  old = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  cache.reset_cache()
  yield path
  for name, value in old.items():
    jax.config.update(name, value)
  cache.reset_cache()


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
