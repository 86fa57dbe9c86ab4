"""The notebooks run from top to bottom, at toy size; they come pinned, and with the pictures of a real run."""
import os
from pathlib import Path

from nbclient import NotebookClient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
# What makes them toys, in a cell behind their parameters. The study's smallest stage still has to last one step.
TOY = {"look_inside.ipynb": """
from experiments import mqar as made
STEPS, whole = 8, made.get_config

def get_config(arg):
  config = whole(arg)
  config.data.context, config.model.d_model, config.model.mlp_dim = 64, 16, 32
  config.eval.during_examples = 4
  return config
""", "native_vs_retrofit.ipynb": """
from experiments import quickstart as made
STEPS, SEEDS, whole = 48, 1, made.get_config

def get_config(arg):
  study = whole(arg)
  for arm in study.arms:
    arm.model.d_model, arm.model.mlp_dim, arm.data.global_batch = 16, 32, 4
    arm.eval.during_examples = 4  # and as many as before in the end: arms must differ in something
  return study
"""}


def read(name):
  return nbformat.read(ROOT / "experiments" / name, as_version=4)


def test_every_notebook_is_tested():
  assert {path.name for path in (ROOT / "experiments").glob("*.ipynb")} == set(TOY)


@pytest.mark.parametrize("name", TOY)
def test_runs(name, tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = read(name)
  at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
  work = f"made.get_config, WORKDIR = get_config, {os.fspath(tmp_path / 'work')!r}"
  notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(TOY[name] + work))
  NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
  pictures, texts = _outputs(notebook)
  assert pictures == _outputs(read(name))[0] > 0, "as many pictures as the committed run has"
  if name == "native_vs_retrofit.ipynb":
    assert any("native_strided" in text and "native_msa" in text and "exact_match" in text for text in texts)


@pytest.mark.parametrize("name", TOY)
def test_committed_with_outputs_of_one_run(name):
  cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run all cells once, in order"
  assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
  assert (ROOT / "experiments" / name).stat().st_size < 1_000_000


def _outputs(notebook):
  """How many pictures there are, and what was printed."""
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  pictures = sum("image/png" in output.get("data", {}) for output in outputs)
  return pictures, [output.text for output in outputs if output.output_type == "stream"]
