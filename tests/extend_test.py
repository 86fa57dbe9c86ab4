"""docs/extend.md, done: its files written, its commands run each in a new process, nothing edited in the package."""
import hashlib
import json
from pathlib import Path
import re
import shlex
import time

import commands
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extend.md").read_text()


def written_commands():
  return [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def test_the_page_does_what_it_says(tmp_path):
  for name, text in re.findall(r"`(\w+\.py)`:\n```python\n(.*?)```", PAGE, re.S):
    (tmp_path / name).write_text(text)
  assert {path.name for path in tmp_path.iterdir()} == {"strided.py", "farthest.py", "shelves.py"}

  def start(command):
    python, m, *words = shlex.split(command)
    assert (python, m) == ("python", "-m")
    return commands.Command(*words, directory=tmp_path)

  def run(command, code=0):
    return "".join(start(command).end(code))

  train, *rest = written_commands()
  assert len(rest) == 6
  # cut once, so that the next process has to find the method
  run_dir, process = tmp_path / "runs/strided", start(train)
  while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
    assert process.running(), process.end()
    time.sleep(0.1)
  process.terminate()
  _, err = process.end(75)
  assert "of 100" in err, err
  assert "100 steps done" in run(train)
  config = json.loads((run_dir / "config.json").read_text())
  assert config["modules"] == ["strided.py"] and config["attention"] == {
      "method": "strided", "block_size": 8, "num_blocks": 4, "num_initial": 0, "num_local": 1, "stride": 3}
  versions = json.loads((run_dir / "versions.json").read_text())
  assert versions["modules"] == {"strided.py": hashlib.sha256((tmp_path / "strided.py").read_bytes()).hexdigest()}
  for command in rest:
    run(command)
  typo = run(f"{train} --config.attention.strid=2", code=2)
  assert "Strided has no field 'strid'; did you mean stride? Its fields: block_size" in typo

  # [layers, windows, T, K, J]: what the method says it takes
  lists = np.load(tmp_path / "strided.npz")["block_indices"]
  for t in (0, 40, 127):
    own = t // 8
    want = set(range(own, -1, -3)[:4])
    for row in lists[:, :, t].reshape(-1, 4).tolist():
      assert want <= set(row) and len(set(row) - {-1}) == min(4, own + 1), (t, want, row)
  assert (run_dir / "report/report.html").exists()
  rows = [row for path in run_dir.glob("eval/100*.json") for row in json.loads(path.read_text())["records"]]
  visible = {row["run_mode"]: row["tokens_visible"] for row in rows
             if row["kind"] == "layer" and "tokens_visible" in row}
  assert visible["farthest"] == visible["sparse"] > visible["sparse:num_blocks=2"]
  tasks = json.loads((tmp_path / "runs/shelves/eval/20.json").read_text())["records"]
  assert {row["task"] for row in tasks if row["kind"] == "task"} == {"shelves:notes=2"}
  assert json.loads((tmp_path / "runs/shelves/config.json").read_text())["modules"] == ["shelves.py", "strided.py"]

  (tmp_path / "strided.py").rename(tmp_path / "elsewhere.py")
  gone = run(rest[0], code=2)
  assert "modules = 'strided.py': no such file" in gone and "Traceback" not in gone
