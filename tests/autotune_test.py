"""What XLA's autotuner chose stays with a workdir, and a cache of programs with other choices does not serve it.

On a CPU nothing is chosen: files as XLA leaves them stand for choices.
"""
import fcntl
import threading

import jax
from jax._src import compilation_cache as cache, compiler
import jax.numpy as jnp
import pytest

from launch import cli
from nsa import autotune, programs

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
            "jax_persistent_cache_enable_xla_caches")


@pytest.fixture
def settings(monkeypatch):
  old = {name: getattr(jax.config, name) for name in SETTINGS}
  monkeypatch.setattr(autotune, "_pair", None)
  yield
  if autotune._pair:
    jax.monitoring.unregister_event_duration_listener(autotune._listen)
  for name, value in old.items():
    jax.config.update(name, value)
  cache.reset_cache()


def choose(folder, **choices):
  """As XLA does: a file of its own for each, what is half written beside them."""
  (folder / "tmp").mkdir(parents=True, exist_ok=True)
  (folder / "tmp/half.textproto").write_text("gemm {")
  for name, text in choices.items():
    (folder / f"{name}.textproto").write_text(text)


def chosen(folder):
  return {path.stem: path.read_text() for path in folder.glob("*.textproto")}


def compile_something():
  jax.clear_caches()
  jax.jit(lambda x: x * 3.5).lower(jnp.zeros(3)).compile()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX keeps no choices beside programs that may be moved")
def test_a_workdir_has_the_choices_of_its_programs_and_takes_them_along(settings, monkeypatch, tmp_path):
  here, there, first = tmp_path / "cache", tmp_path / "elsewhere", tmp_path / "first"
  choose(here / autotune.CHOICES, product="gemm { algorithm: 1 }")
  cli.compilation_cache(str(here), workdir=str(first))
  assert not first.exists(), "a wrong configuration leaves nothing"
  options = compiler.get_compile_options(1, 1)  # which owns its parts
  place = options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
  assert place == str(here / autotune.CHOICES), "where XLA reads and writes"
  compile_something()
  assert not first.exists(), "a CPU's run has no choices, whatever else the cache served"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  compile_something()
  assert chosen(first / "autotune") == {"product": "gemm { algorithm: 1 }"}
  kept, = (first / "autotune").glob("*.textproto")
  assert kept.stat().st_mode & 0o777 == (here / autotune.CHOICES / kept.name).stat().st_mode & 0o777, "for all to read"
  choose(here / autotune.CHOICES, product="another process was later", sum="triton { }")
  compile_something()
  mine = {"product": "gemm { algorithm: 1 }", "sum": "triton { }"}
  assert chosen(first / "autotune") == mine, "what is new, and the first choice stays"
  assert autotune.read(first) == {f"{name}.textproto": text.encode() for name, text in mine.items()}
  # on another machine, or out of an archive: its cache gets them, with what it has chosen for other programs
  choose(there / autotune.CHOICES, other="gemm { algorithm: 7 }")
  assert autotune.keep(first, there) == str(there)
  assert chosen(there / autotune.CHOICES) == {**mine, "other": "gemm { algorithm: 7 }"}
  # where programs were compiled by other choices, they are others' programs
  assert autotune.keep(first, here) == str(here / "autotune-1")
  assert chosen(here / "autotune-1" / autotune.CHOICES) == mine
  assert chosen(here / autotune.CHOICES)["product"] == "another process was later"
  choose(first / "autotune", product="trained by somebody else")
  assert [autotune.keep(first, here) for _ in range(2)] == [str(here / "autotune-2")] * 2


def test_a_cache_that_cannot_take_the_choices_ends_no_run(settings, tmp_path):
  choose(tmp_path / "run/autotune", product="gemm { algorithm: 1 }")
  (tmp_path / "cache").mkdir()
  (tmp_path / "cache" / autotune.CHOICES).touch()
  assert autotune.keep(tmp_path / "run", tmp_path / "cache") == str(tmp_path / "cache")


def test_object_stores_and_runs_without_choices_are_left_alone(settings, tmp_path):
  assert autotune.keep("gs://bucket/run", "cache") == "cache" and autotune._pair is None
  assert autotune.keep(tmp_path / "run", "gs://bucket/cache") == "gs://bucket/cache"
  cli.compilation_cache(str(tmp_path / "cache"), workdir=str(tmp_path / "run"))
  compile_something()
  assert not (tmp_path / "run").exists()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")


def test_one_compiles_at_a_time(settings, monkeypatch, tmp_path):
  """Of threads and of processes, which the second opening of the file stands for."""
  monkeypatch.setattr(programs, "_programs", {})
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
  lock, free, inside, most = tmp_path / "cache/COMPILING", [], [], []

  class Lowered:
    def compile(self):
      inside.append(1)
      most.append(len(inside))
      with open(lock, "w") as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          free.append(False)
      inside.pop()
      return "compiled"

  lock.parent.mkdir()
  programs.compiled("on a CPU", Lowered)
  assert not free, "nothing is chosen on a CPU"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  threads = [threading.Thread(target=programs.compiled, args=(key, Lowered)) for key in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert free == [False] * 4 and max(most) == 1
  with open(lock, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again
    waiting = threading.Thread(target=programs.compiled, args=("another process compiles", Lowered))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and len(free) == 4
  waiting.join(10)
  assert free == [False] * 5
