"""Tests of nsa/programs.py, whose programs are what `build` returns here, and of the cache between processes."""
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

import jax
from jax.experimental.compilation_cache import compilation_cache as cache
import jax.numpy as jnp
import pytest

from launch import cli
from nsa import kept, model as model_lib, origins, programs, start
from nsa.config import Config


@pytest.fixture(autouse=True)
def none_yet(monkeypatch):
  monkeypatch.setattr(programs, "_programs", {})


def test_a_program_is_built_once_and_others_wait_for_it():
  built, begun, go = [], threading.Event(), threading.Event()

  def build():
    built.append(threading.current_thread().name)
    begun.set()
    assert go.wait(10)
    return "program"

  with programs.ahead([lambda: programs.get("a", build), lambda: programs.get("b", build)]):
    assert begun.wait(10)  # the thread is building
    threading.Timer(0.05, go.set).start()
    assert programs.get("a", build) == "program"
  assert built[0] == "compile ahead" and len(built) == len(set(programs._programs)) <= 2


def test_a_failure_ahead_is_told_and_fails_again_for_who_needs_it():
  def build():
    raise ValueError("no such kernel")

  done = threading.Event()
  with programs.ahead([lambda: programs.get("bad", build), done.set]):
    assert done.wait(10)
    programs.check(["good", "unknown"])
    with pytest.raises(ValueError, match="no such kernel"):
      programs.check(["good", "bad"])
  with pytest.raises(ValueError, match="no such kernel"):
    programs.get("bad", build)
  assert programs.get("bad", lambda: "mended") == "mended"
  programs.check(["bad"])


class Lowered:
  """Stands for what jax.jit(...).lower(...) gives."""

  def __init__(self, name, compiled_by, wait=None):
    self.name, self.compiled_by, self.wait = name, compiled_by, wait

  def compile(self):
    assert self.wait is None or self.wait.wait(10)
    self.compiled_by[self.name] = threading.current_thread().name
    return f"compiled {self.name}"


def test_the_next_program_is_traced_while_one_compiles():
  by, go, traced = {}, threading.Event(), threading.Event()

  def lower(name, wait=None):
    traced_by = threading.current_thread().name
    assert traced_by == ("MainThread" if name == "c" else "compile ahead")
    if name == "b":
      traced.set()
    return Lowered(name, by, wait)

  with programs.ahead([lambda: programs.compiled("a", lambda: lower("a", go)),
                       lambda: programs.compiled("b", lambda: lower("b"))]):
    assert traced.wait(10) and "a" not in by  # b is traced, a not compiled yet
    go.set()
    assert [programs.compiled(name, None) for name in ("a", "b")] == ["compiled a", "compiled b"]
    assert programs.compiled("c", lambda: lower("c")) == "compiled c"
  assert by["a"].startswith("compile ahead, ") and by["b"].startswith("compile ahead, ") and by["c"] == "MainThread"


def test_what_is_traced_and_not_compiled_when_a_block_ends_is_forgotten(monkeypatch):
  monkeypatch.setattr(programs, "_MAX_COMPILERS", 1)
  by, go, traced = {}, threading.Event(), threading.Event()

  def last():
    programs.compiled("b", lambda: Lowered("b", by))
    traced.set()

  with programs.ahead([lambda: programs.compiled("a", lambda: Lowered("a", by, go)), last]):
    assert traced.wait(10)
    threading.Timer(0.2, go.set).start()  # behind the block's end
  assert list(by) == ["a"] and list(programs._programs) == ["a"]
  programs.check(["a", "b"])
  assert programs.compiled("b", lambda: Lowered("b", by)) == "compiled b"


def test_an_inner_block_leaves_it_to_the_outer_one_and_its_end_stops_the_thread():
  called, first = [], threading.Event()

  def one():
    called.append("outer")
    first.set()

  def coming():
    yield one
    while True:
      yield lambda: called.append("more")

  with programs.ahead(coming()):
    assert first.wait(10)
    with programs.ahead([lambda: called.append("inner")]):
      pass
  count = len(called)
  assert "inner" not in called
  assert programs._ahead is None and len(called) == count


def test_a_cache_of_programs_may_be_carried_elsewhere(tmp_path):
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
           "jax_persistent_cache_enable_xla_caches", "jax_persistent_cache_min_entry_size_bytes")
  old, hits = {name: getattr(jax.config, name) for name in names}, []
  listen = lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
  jax.monitoring.register_event_listener(listen)

  def compile_in(directory):
    cli.compilation_cache(str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    cache.reset_cache()
    jax.jit(lambda x: jnp.tanh(x) * 7.25).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()

  try:
    compile_in(tmp_path / "here")
    assert not hits
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    compile_in(tmp_path / "elsewhere")
    assert len(hits) == 1
  finally:
    jax.monitoring.unregister_event_listener(listen)
    for name, value in old.items():
      jax.config.update(name, value)
    cache.reset_cache()


def test_a_kept_program_is_found_by_its_key_before_it_is_traced(tmp_path, monkeypatch):
  """As a later process finds it; `lower` is called where nothing is found that may be taken."""
  monkeypatch.setattr(programs, "_kept", kept.Kept(tmp_path / "programs", platform="cpu"))
  tmp_path = tmp_path / "programs"
  monkeypatch.setattr(origins, "_ORIGINS", {})
  traced, salt = [], time.time_ns() % 1_000_000  # programs that JAX's cache does not have yet

  def program(*key, factor):
    monkeypatch.setattr(programs, "_programs", {})

    def lower():
      traced.append(factor)
      return jax.jit(lambda tree: jax.tree.map(lambda x: (factor + salt) * x, tree)).lower({"x": jnp.zeros(3)})

    one = programs.compiled(key, lower)({"x": jnp.arange(3.0)})["x"].tolist()
    return [x - salt * i for i, x in enumerate(one)]

  config = model_lib.Static(Config(arm="a"))
  assert program("step", config, 8, factor=2) == [0, 2, 4] and traced == [2]
  assert program("step", model_lib.Static(Config(arm="a")), 8, factor=3) == [0, 2, 4] and traced == [2]
  assert program("step", model_lib.Static(Config(arm="b")), 8, factor=4) == [0, 4, 8]
  assert program("step", config, 16, factor=5) == [0, 5, 10]
  assert program("step", object(), factor=6) == [0, 6, 12]  # a key that means nothing elsewhere
  assert len(list(tmp_path.iterdir())) == 3 and traced == [2, 4, 5, 6]

  with monkeypatch.context() as patch:  # the source of the project, a version, a flag of XLA, ... is another one
    patch.setattr(kept, "_surroundings", lambda: "other")
    assert program("step", config, 8, factor=7) == [0, 7, 14]
  with monkeypatch.context() as patch:
    patch.setattr(origins, "_ORIGINS", {Config: ("my_method", "/my_method.py")})
    assert program("step", config, 8, factor=9) == [0, 9, 18]
  assert program("step", config, 8, factor=10) == [0, 2, 4]
  for path in tmp_path.iterdir():
    path.write_bytes(path.read_bytes()[:1000])  # a copy that was cut
  assert program("step", config, 8, factor=11) == [0, 11, 22]
  assert program("step", config, 8, factor=12) == [0, 11, 22]

  for path in tmp_path.iterdir():
    path.unlink()
  assert program("step", config, 8, factor=11) == [0, 11, 22]  # from JAX's cache: kept here no second time
  assert not list(tmp_path.iterdir())


def test_what_the_first_step_waited_for_adds_up(tmp_path, monkeypatch):
  """Parts of the clock are all of the time; a program's stages say whether it was compiled, or found before that."""
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  monkeypatch.setattr(start, "_age", lambda: 2.5)
  monkeypatch.setattr(start, "_process", None)
  monkeypatch.setattr(programs, "_took", {})
  monkeypatch.setattr(programs, "_kept", kept.Kept(tmp_path, platform="cpu"))
  start.of_process()
  clock = start.take()
  assert clock.seconds == {"imports": 2.5} and not start.take().seconds  # the second run of a process

  class Slow:
    def compile(self):
      now[0] += 4
      return jax.jit(lambda x: x + 1).lower(jnp.zeros(())).compile()

  def lower():
    now[0] += 3
    return Slow()

  programs.compiled(("step",), lower)
  clock.lap("program")
  now[0] += 0.25
  clock.lap("first step")
  took = programs.took(("step",))
  assert took in ({"traced": 3, "compiled": 4}, {"traced": 3, "cached": 4})  # by earlier tests' cache
  assert clock.line(took) == ("first step after 9.8 s: imports 2.5, program 7.0, first step 0.2; its program: traced "
                              f"3.0, {'compiled' if 'compiled' in took else 'cached'} 4.0")
  assert clock.line(programs.took("unknown")).endswith("first step 0.2")
  if "compiled" in took:
    monkeypatch.setattr(programs, "_programs", {})
    programs.compiled(("step",), lower)
    assert programs.took(("step",)) == {"kept": 0}


def test_what_a_kept_program_depends_on_beside_its_key(monkeypatch):
  monkeypatch.setattr(kept, "_surroundings", kept._surroundings.__wrapped__)
  first = kept._surroundings()
  assert jax.__version__ in first and kept._surroundings() == first
  for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES"):
    monkeypatch.setenv(name, "0.4")
  assert kept._surroundings() == first
  monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=true")
  assert kept._surroundings() != first


def test_an_exit_in_the_midst_of_a_compilation_keeps_its_code():
  """A preemption waits a while for the thread that compiles ahead; an interpreter that ends under it aborted, with code
  -6."""
  script = """
import jax, jax.numpy as jnp
from launch import cli
from nsa import programs, train
programs._GRACE_SECONDS = 0.1

def long(x):
  for i in range(1500):
    x = jnp.sin(x @ x) + i
  return x

lowered = jax.jit(long).lower(jax.ShapeDtypeStruct((32, 32), jnp.float32))

def main():
  with programs.ahead([lowered.compile]):
    raise train.Preempted("saved")

cli.run(main)
"""
  done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, text=True,
                        capture_output=True,
                        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"})
  assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (75, "saved"), done.stderr
