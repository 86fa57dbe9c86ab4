"""Tests of nsa/metrics.py and nsa/progress.py: records survive kills, the progress line tells the truth."""
import io
import json
import math
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nsa import metrics
from nsa.progress import Progress


def test_every_value_comes_back(tmp_path):
  path = tmp_path / "run" / "metrics.jsonl"
  record = {"step": np.int64(3), "arm": "nan", "loss": jnp.float32(0.1), "bf16": jnp.bfloat16(0.1),
            "double": 1 / 3, "np": np.float64(1e-300), "nan": math.nan, "inf": jnp.float32(-jnp.inf),
            "flag": np.bool_(True), "none": None, "model": ["-inf", "\\inf", "\\name"],
            "layers": np.float32([0.5, math.nan]),
            "nested": {"a": (1, 2)}, "mixed": [1.5, 2, True, -math.inf], "large": (10 ** 400, 0.5)}
  with metrics.JsonlWriter(path) as writer:
    writer.write(record)
  line = path.read_text()
  assert '"loss": 0.1,' in line and line.endswith("\n") and line.count("\n") == 1
  json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
  (back,) = metrics.read_jsonl(path)
  assert back["double"] == 1 / 3 and back["np"] == 1e-300
  assert np.float32(back["loss"]) == np.float32(0.1) and jnp.bfloat16(back["bf16"]) == jnp.bfloat16(0.1)
  assert back["mixed"] == [1.5, 2, True, -math.inf] and [type(x) for x in back["mixed"]] == [float, int, bool, float]
  assert back["large"] == [10 ** 400, 0.5]
  assert math.isnan(back["nan"]) and back["inf"] == -math.inf and math.isnan(back["layers"][1])
  assert back["layers"][0] == 0.5 and back["nested"] == {"a": [1, 2]} and back["none"] is None
  assert back["arm"] == "nan" and back["model"] == ["-inf", "\\inf", "\\name"]  # names, not numbers
  assert back["flag"] is True and back["step"] == 3 and type(back["step"]) is int


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_short_decimals_are_exact(tmp_path, dtype):
  values = np.random.default_rng(0).normal(size=500).astype(dtype)
  with metrics.JsonlWriter(tmp_path / "m.jsonl") as writer:
    writer.write({"x": values})
  (back,) = metrics.read_jsonl(tmp_path / "m.jsonl")
  np.testing.assert_array_equal(np.array(back["x"]).astype(dtype), values)


@pytest.mark.parametrize("value", [object(), 1j, np.complex64(1), {1: 2}])
def test_bad_values_name_the_key(tmp_path, value):
  with metrics.JsonlWriter(tmp_path / "m.jsonl") as writer:
    with pytest.raises(ValueError, match="loss"):
      writer.write({"loss": value})
    writer.write({"loss": 1})
  assert metrics.read_jsonl(tmp_path / "m.jsonl") == [{"loss": 1}]


def test_object_store(bucket):
  """A sync puts the whole object; what a killed process loses are the records since then."""
  path = "gs://bucket/run/m.jsonl"
  write = lambda writer, steps: [writer.write({"step": step}) for step in steps]
  killed = metrics.JsonlWriter(path, sync_seconds=1e9)
  write(killed, range(3))
  killed.sync()
  write(killed, range(3, 5))
  assert [r["step"] for r in metrics.read_jsonl(path)] == [0, 1, 2]
  with metrics.JsonlWriter(path) as writer:
    writer.truncate_after(1)
    write(writer, range(2, 4))
  assert [r["step"] for r in metrics.read_jsonl(path)] == [0, 1, 2, 3] and len(bucket.store) == 1
  bucket.store["/bucket/run/m.jsonl"].truncate(len(bucket.store["/bucket/run/m.jsonl"].getvalue()) - 3)
  with metrics.JsonlWriter(path, sync_seconds=0.0) as writer:
    write(writer, [7])
    assert [r["step"] for r in metrics.read_jsonl(path)] == [0, 1, 2, 7]
  with pytest.raises(ValueError, match="tensorboard.*gs://bucket"):
    metrics.JsonlWriter(path, tensorboard=True)


def test_every_cut_of_the_last_line(tmp_path):
  """Whatever byte a kill cuts at, reading works and a reopened file continues without a scar."""
  path = tmp_path / "m.jsonl"
  whole = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "nan", "m": {"a": 1}}\n'
  first = whole.index(b"\n") + 1
  for cut in range(first, len(whole) + 1):
    path.write_bytes(whole[:cut])
    survives = cut >= len(whole) - 1  # only the line end is missing
    assert [r["step"] for r in metrics.read_jsonl(path)] == ([1, 2] if survives else [1])
    with metrics.JsonlWriter(path) as writer:
      writer.write({"step": 3})
    assert path.read_bytes() == whole[:len(whole) if survives else first] + b'{"step": 3}\n'


def test_corrupt_line_in_the_middle_is_an_error(tmp_path):
  path = tmp_path / "m.jsonl"
  for bad in ('{"step": 2', "[2]"):
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="m.jsonl, line 2"):
      metrics.read_jsonl(path)


def test_dedupe(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1, "seed": 0, "x": 1}\n{"step": 1, "seed": 1, "x": 2}\n{"note": "a"}\n'
                  '{"step": 2, "x": 3}\n{"note": "b"}\n{"step": 1, "seed": 0, "x": 4}\n')
  records = metrics.read_jsonl(path)
  assert [r.get("x", r.get("note")) for r in records] == [4, 2, "a", 3, "b"]
  assert len(metrics.read_jsonl(path, dedupe=())) == 6


def test_resumed_file_equals_undisturbed_file(tmp_path):
  def write(writer, steps):
    for step in steps:
      writer.write({"step": step, "loss": np.float32(1 / (step + 1))})
  with metrics.JsonlWriter(tmp_path / "a.jsonl") as writer:
    write(writer, range(1, 8))
  with metrics.JsonlWriter(tmp_path / "b.jsonl") as writer:
    write(writer, range(1, 6))
  with open(tmp_path / "b.jsonl", "ab") as f:
    f.write(b'{"step": 6, "lo')  # killed here; the last checkpoint is of step 3
  with metrics.JsonlWriter(tmp_path / "b.jsonl") as writer:
    writer.truncate_after(3)
    write(writer, range(4, 8))
  assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_full_disk_leaves_no_half_line(tmp_path):
  path = tmp_path / "m.jsonl"
  with metrics.JsonlWriter(path) as writer:
    writer.write({"step": 1})

    class HalfFull:
      """A file that takes 5 bytes and then is full."""
      def __init__(self, file):
        self.file, self.calls = file, 0
      def write(self, data):
        self.calls += 1
        if self.calls > 1:
          raise OSError(28, "No space left on device")
        return self.file.write(data[:5])
      def __getattr__(self, name):
        return getattr(self.file, name)

    real, writer._file._file = writer._file._file, HalfFull(writer._file._file)
    with pytest.raises(OSError, match="No space left"):
      writer.write({"step": 2})
    writer._file._file = real
    writer.write({"step": 3})
  assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_tensorboard_mirror(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto import event_pb2
  with metrics.JsonlWriter(tmp_path / "m.jsonl", tensorboard=True) as writer:
    writer.write({"step": 1, "seed": 0, "arm": "native", "loss": 2.5, "recall": [0.25, 0.5], "ok": True})
  (events,) = (tmp_path / "tensorboard").iterdir()
  data, at, scalars = events.read_bytes(), 0, {}
  while at < len(data):  # TFRecord: length, crc, message, crc
    size = int.from_bytes(data[at:at + 8], "little")
    event = event_pb2.Event.FromString(data[at + 12:at + 12 + size])
    scalars.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
    at += 16 + size
  assert scalars == {("loss/s0", 1): 2.5, ("recall/0/s0", 1): 0.25, ("recall/1/s0", 1): 0.5}


def test_missing_tensorboardx_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ImportError, match=r"pip install nsa\[tb\]"):
    metrics.JsonlWriter(tmp_path / "m.jsonl", tensorboard=True)


def test_json_files(tmp_path, monkeypatch):
  path = tmp_path / "eval" / "100.json"
  metrics.write_json(path, {"loss": jnp.float32(math.inf), "steps": (1, 2)})
  assert metrics.read_json(path) == {"loss": math.inf, "steps": [1, 2]}
  with pytest.raises(ValueError, match="value.a"):
    metrics.write_json(path, {"a": object()})
  monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("cut here")))
  with pytest.raises(OSError, match="cut here"):
    metrics.write_json(path, {"loss": 0})
  assert metrics.read_json(path)["loss"] == math.inf  # the old file is whole
  assert [p.name for p in path.parent.iterdir()] == ["100.json"]
  path.write_text("{")
  with pytest.raises(ValueError, match="100.json is not JSON"):
    metrics.read_json(path)


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_line_and_pauses():
  clock, out = Clock(), io.StringIO()
  progress = Progress("native_msa s0", 400, every=10, stream=out, clock=clock)
  with progress.pause("compile"):
    clock.now += 1000
  for step in range(1, 121):
    clock.now += 0.15
    progress.update(step, tokens=step * 5280, loss=2.134, bpb=3.08, mode="sparse")
    if step % 50 == 0:
      with progress.pause("evaluate"):
        clock.now += 500
        with progress.pause("compile"):
          clock.now += 50
  assert progress.eta == pytest.approx(280 * 0.15)
  assert progress.tokens_per_second == pytest.approx(5280 / 0.15)
  assert progress.paused == {"compile": 1000, "evaluate": 1100}
  progress._shown_at = None
  progress.update(120, tokens=120 * 5280, loss=2.134, bpb=3.08, mode="sparse")
  lines = out.getvalue().splitlines()
  assert lines[0].endswith("1/400 loss 2.134 (3.08 bpb) 35.2k tok/s ETA 1:00")
  assert lines[-1] == "native_msa s0 [sparse] 120/400 loss 2.134 (3.08 bpb) 35.2k tok/s ETA 0:42"
  assert "\r" not in out.getvalue()


def test_progress_plain_lines_come_every_n_seconds_and_at_the_end():
  clock, out = Clock(), io.StringIO()
  progress = Progress("run", 100, start_step=40, every=10, stream=out, clock=clock)
  for step in range(41, 101):
    clock.now += 1
    progress.update(step, tokens=(step - 40) * 1_000_000)
  progress.close()
  steps = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
  assert steps == [41, 51, 61, 71, 81, 91, 100]
  assert "51/100 1.0M tok/s ETA 0:49" in out.getvalue() and out.getvalue().endswith("ETA 0:00\n")


def test_progress_window_follows_a_slower_stage():
  clock = Clock()
  progress = Progress("run", 1000, window=20, stream=io.StringIO(), clock=clock)
  for step in range(1, 201):
    clock.now += 1 if step <= 100 else 4
    progress.update(step, tokens=step)
  assert progress.eta == pytest.approx(800 * 4)
  progress.steps = 10_000
  assert progress.eta > 3600 * 10


def test_progress_on_a_terminal(monkeypatch):
  monkeypatch.setenv("COLUMNS", "30")
  clock, out = Clock(), Terminal()
  progress = Progress("a_long_name_of_a_run", 10, stream=out, clock=clock)
  for step in range(1, 11):
    clock.now += 0.02
    progress.update(step, tokens=step, loss=1.0)
  progress.close()
  shown = out.getvalue().split("\r")[1:]
  assert len(shown) == 3  # steps 1, 6 and the last: ten times a second at most
  assert all(len(line.removesuffix("\n").removesuffix("\x1b[K")) <= 29 for line in shown)
  assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")


def test_peak_and_mfu():
  assert metrics.peak_tflops("NVIDIA H200") == metrics.peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
  assert metrics.peak_tflops("NVIDIA H100 PCIe") == 756.0
  assert metrics.peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
  tpus = {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5p": 459, "TPU v6 lite": 918}
  assert {kind: metrics.peak_tflops(kind) for kind in tpus} == tpus
  assert metrics.peak_tflops("TPU7x") == 1153.5
  assert metrics.peak_tflops("cpu") is None and metrics.peak_tflops("TPU v4 lite") is None
  assert metrics.mfu(4 * 494.7e12, 989.4, 4) == pytest.approx(0.5)
  with pytest.raises(ValueError, match="peak_tflops = 0"):
    metrics.mfu(1e12, 0, 1)
  with pytest.raises(ValueError, match="devices = 0"):
    metrics.mfu(1e12, 100, 0)
