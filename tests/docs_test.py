"""Tests of the pages: their links lead somewhere, their commands name what is there, nothing is left out."""
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments/README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_lead_somewhere(page):
  text = page.read_text()
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if not target.startswith(("http", "#")):
      assert (page.parent / target.split("#")[0]).exists(), target
  for module in re.findall(r"python -m ((?:launch|benchmarks|experiments)\.\w+)", text):
    assert importlib.util.find_spec(module), module
  for path in re.findall(r"--config=(experiments/\w+\.py)", text):
    assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_the_index_whole():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 130
  index = (ROOT / "experiments/README.md").read_text()
  files = {path.name for path in ROOT.glob("experiments/*.py")} - {"__init__.py", "arguments.py"}
  assert {name for name in files if f"]({name})" not in index} == set()


def test_every_registered_method_is_in_the_readme():
  from nsa import methods
  text = (ROOT / "README.md").read_text()
  missing = {name for name, cls in methods.registry.METHODS.items()
             if cls.__module__.startswith("nsa.") and f"`{name}`" not in text}
  assert missing == {"dense"}
