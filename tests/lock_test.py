"""Tests of nsa/lock.py: one process per run directory, and a dead owner is in nobody's way."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from nsa import lock

OWNER = """
import sys, time
from nsa import lock
with lock.Lock(sys.argv[1]):
  print('has it', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
  """Another process that has the directory."""
  process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "has it\n"
  yield process
  process.kill()
  process.wait()


@pytest.fixture
def without_flock(monkeypatch):
  """A file system that has no locks."""
  def none(*_):
    raise OSError(38, "Function not implemented")
  monkeypatch.setattr(lock.fcntl, "flock", none)


def take(path):
  with lock.Lock(path) as held:
    held.check()
    return json.loads((path / "LOCK").read_text())["process"]


def is_refused(path, process):
  with pytest.raises(lock.Busy, match=rf"process {process.pid} on {lock.platform.node()} \(for \d+ s\) trains there"):
    take(path)


@pytest.mark.parametrize("locks", [True, False])
def test_a_living_owner_is_named_and_a_killed_one_is_in_nobodys_way(tmp_path, owner, locks, request):
  if not locks:
    request.getfixturevalue("without_flock")
  is_refused(tmp_path, owner)
  is_refused(tmp_path, owner)             # and asking took nothing from it
  owner.send_signal(signal.SIGKILL)
  while open(f"/proc/{owner.pid}/stat").read().split()[2] != "Z":  # nobody has waited for it: it is there, and dead
    time.sleep(0.01)
  assert take(tmp_path) == os.getpid()
  assert not (tmp_path / "LOCK").exists()
  assert take(tmp_path) == os.getpid()


@pytest.mark.parametrize("place", ["a folder", "gs://bucket/run"])
def test_an_owner_on_another_host_is_dead_once_it_is_silent(tmp_path, place, monkeypatch, request):
  bucket = place.startswith("gs://")
  if bucket:
    request.getfixturevalue("bucket")
  path = lock.epath.Path(place) if bucket else lock.epath.Path(tmp_path)
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "SILENCE", 0.6)
  elsewhere = lock.Lock(path)
  elsewhere._me |= {"place": "another", "host": "node7"}
  with elsewhere:
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)  # does not reach that host
    with pytest.raises(lock.Busy, match=r"process \d+ on node7 \(for 0 s\)"):
      take(path)
    elsewhere._over.set()                 # it dies, and nothing is unlinked
    elsewhere._thread.join()
    began = time.monotonic()
    with lock.Lock(path) as mine:
      assert time.monotonic() - began > 0.5
      mine.check()
      mine._over.set()
      mine._thread.join()
      elsewhere._over.clear()
      elsewhere._beat()                   # it was asleep only: it finds out, and ends
      with pytest.raises(lock.Busy, match="was taken over by process"):
        elsewhere.check()
    assert not (path / "LOCK").exists()


def test_who_waits_has_the_directory_when_it_is_free(tmp_path, owner):
  timer = threading.Timer(0.5, owner.kill)
  timer.start()
  began = time.monotonic()
  with lock.waiting(tmp_path, every=0.05):
    assert time.monotonic() - began > 0.4
    with pytest.raises(lock.Busy):
      with lock.Lock(tmp_path):
        pass


def test_who_waits_for_a_stopped_process_says_for_which_one(tmp_path, caplog):
  script = """
import sys, time
from nsa import lock
with lock.held(sys.argv[1], "which compiles"):
  print("has it", flush=True)
  time.sleep(600)
"""
  path, got = tmp_path / "COMPILING", threading.Event()

  def wait():
    with lock.held(path, "which compiles", patience=0.2):
      got.set()

  waiting = threading.Thread(target=wait)
  with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout.readline() == "has it\n"
      process.send_signal(signal.SIGSTOP)
      waiting.start()
      end = time.monotonic() + 20
      while not caplog.records and time.monotonic() < end:
        time.sleep(0.05)
      assert not got.is_set(), "a stopped process keeps its lock"
    finally:
      process.kill()
  waiting.join(20)
  assert got.is_set() and json.loads(path.read_text())["process"] == os.getpid()
  assert re.fullmatch(rf"waiting for process {process.pid} on {lock.platform.node()} \(for \d+ s\), which compiles: it "
                      rf"holds {path}", caplog.messages[0])
