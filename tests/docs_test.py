"""Tests of the pages: their links lead somewhere, their commands name what is there, nothing is left out."""
import ast
import collections
import csv
import functools
import importlib.util
import pathlib
import re
import runpy
import shlex

import numpy as np
import pytest
from scipy import stats

from launch import overrides
from nsa.report import archive

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments/README.md"])
ROWS = ROOT / "experiments/results/kernels"


def anchors(page):
  """What a link may name behind its #: each heading, as GitHub spells it."""
  headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_lead_somewhere(page):
  text = page.read_text()
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    path, _, anchor = target.partition("#")
    if not target.startswith("http"):
      found = page.parent / path if path else page
      assert found.exists(), target
      assert not anchor or found.suffix != ".md" or anchor in anchors(found), target


def written_commands():
  """(file, module, words) of every command that a page or a docstring has, that of another command among them."""
  code = [path for room in ("launch", "benchmarks", "experiments") for path in sorted(ROOT.glob(f"{room}/**/*.py"))]
  for path in [*PAGES, *code]:
    text = path.read_text() if path.suffix == ".md" else ast.get_docstring(ast.parse(path.read_text())) or ""
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
      for found in re.findall(r"python -m ((?:launch|benchmarks|experiments)\.\w+[^`]*)", line):
        if found.count("'") % 2 == 0:
          for command in " ".join(shlex.split(found, comments=True)).split(" -- "):
            yield path, *command.partition(" ")[::2]


def flags_of(module):
  """Names of the flags that a module defines, or one that it takes them from."""
  text = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
  names = re.findall(r"""(?:DEFINE_\w+\(\s*|add_argument\(|[{ ](?="\w+": \("))"(?:--)?(\w+)\"""", text)
  taken = re.findall(r"\w+", " ".join(re.findall(r"^from launch import (.+)", text, re.M)))
  return {*names}.union(*(flags_of(f"launch.{name}") for name in taken if name in ("cli", "submit")))


def test_written_commands_name_what_there_is():
  """The module, its flags, the experiment, its arguments and fields of its config, a published report that has records.
  What is left open (..., $X) may be anything."""
  get_config = functools.cache(lambda path: runpy.run_path(path)["get_config"])
  commands, told = [*written_commands()], 0
  assert len(commands) > 150
  for path, module, words in commands:
    assert importlib.util.find_spec(module), (path, module)
    if module == "launch.report":
      assert all(archive.archives(ROOT / word) for word in words.split() if (ROOT / word).is_dir()), (path, words)
    known, config = flags_of(module), None
    for flag, value in re.findall(r"(?<!\S)--(\w\S*?)(?:=(\S*)|(?!\S))", words):
      assert flag in known or flag.startswith("config."), (path, module, flag)
      name, _, arguments = value.partition(":")
      if flag == "config" and (ROOT / name).parent == ROOT / "experiments":
        arguments = ",".join(one for one in arguments.split(",") if "..." not in one and "$" not in one)
        try:
          config = get_config(name)(arguments)
        except ValueError as error:  # what is on no disk but the user's may be missing, or not go together
          assert "no run directory" in str(error) or "argument" not in str(error), (path, words, error)
      elif flag.startswith("config.") and config:
        told += overrides.walk(config, flag.removeprefix("config.")) is not None
  assert told >= 3


def test_the_readme_is_short_and_the_index_whole():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 120
  index = (ROOT / "experiments/README.md").read_text()
  files = {path.name for path in ROOT.glob("experiments/*.py")} - {"__init__.py", "arguments.py"}
  assert {name for name in files if f"]({name})" not in index} == set()


def test_rows_of_kernels_and_what_names_them():
  """Each file of rows is named by a page or by code, and the page of kernels names no file that is not there."""
  files = {path.stem for path in ROWS.iterdir()}
  code = [path for room in ("pallas_kernels", "benchmarks", "experiments") for path in (ROOT / room).rglob("*.py")]
  named = {word for path in [*PAGES, *code] for word in re.findall(r"\w+", path.read_text())}
  assert files - named == set()
  assert set(re.findall(r"`(\w+_h[12]00\w*)`", (ROOT / "docs/kernels.md").read_text())) <= files


def test_smollm2s_budgets_are_those_of_its_records():
  """Each triple of novels, code and far recall of docs/results.md is the mean over the runs of an arm in a run mode."""
  runs = collections.defaultdict(list)
  with (ROOT / "experiments/results/smollm2/results.csv").open() as file:
    for row in csv.DictReader(file):
      bits = [row[f"second_half_bits_per_byte:{corpus}"] for corpus in ("novels", "code")]
      runs[row["arm"], row["run_mode"]].append([*map(float, bits), 100 * float(row["far_exact_match"])])
  means = {"{:.4f}, {:.4f}, {:.1f}".format(*np.mean(of, axis=0)) for of in runs.values()}
  text = (ROOT / "docs/results.md").read_text().replace("*", "")
  told = re.findall(r"\d\.\d{4}, \d\.\d{4}, \d+\.\d", text)
  assert len(told) > 30 and set(told) <= means


def test_the_main_studys_tables_are_those_of_its_records():
  """Rows of docs/results.md by arm: seeds, novels behind the dense control with its interval, far recall by seed; and
  what each split has in "On test"."""
  splits = collections.defaultdict(lambda: collections.defaultdict(dict))
  with (ROOT / "experiments/results/main/results.csv").open() as file:
    for row in csv.DictReader(file):
      if row["headline"] == "True":
        splits[row["split"]][row["arm"], row["size"]][int(row["seed"])] = (
            float(row["second_half_bits_per_byte:novels"]), 100 * float(row["far_exact_match"]))
  values = splits["val"]

  def differences(values, arm, size):
    mine, control = values[arm, size], values["dense_" + arm if arm.startswith("after") else "dense", size]
    d = np.array([[x - y for x, y in zip(mine[s], control[s])] for s in sorted(mine)])
    return d, stats.t.ppf(0.975, len(d) - 1) * d[:, 0].std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else 0

  size, told = "", 0
  for line in (ROOT / "docs/results.md").read_text().splitlines():
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    size = cells[0] if cells and cells[0] in ("M", "S") else size if cells else ""
    arm = re.sub(r"^within budget, (\d+) %$", r"within_\1", cells[0]) if size else ""
    arm = re.sub(r"^after the fact, (\d+) %$", r"after_\1", arm)
    arm = re.sub(r"^selector only, (\d+) % on top$", r"selector_only_\1", arm.replace(" without warm-up", "_cold"))
    if not (arm and (arm, size) in values):
      continue
    mine, (d, half) = values[arm, size], differences(values, arm, size)
    assert cells[1] == str(len(d))
    mean = d[:, 0].mean()
    assert cells[2] == f"{mean:+.4f}" + (f" ({mean - half:+.4f} to {mean + half:+.4f})" if len(d) > 1 else ""), line
    assert f"{-d[:, 1].mean():.1f} points" in line, line
    assert ", ".join(f"{mine[s][1]:.1f}" for s in sorted(mine)) + " %" in line, line
    told += 1
  assert told == 22
  section = (ROOT / "docs/results.md").read_text().partition("### On test\n")[2].partition("\n### ")[0]
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()
          if line.startswith(("| S:", "| M:"))]
  budgets = {"after": (1, 5, 13, 25), "within": (25, 50, 75)}
  arms = ["native"] + [f"{kind}_{b}" for kind, all_of in budgets.items() for b in all_of]
  for split, novels, recall in (("val", 1, 3), ("test", 2, 4)):
    for size in "SM":
      known = [differences(splits[split], arm, size) for arm in arms]
      bits = {f"{x:+.4f}" for d, half in known for x in (d[:, 0].mean(), d[:, 0].mean() - half, d[:, 0].mean() + half)}
      points = {f"{-d[:, 1].mean():.1f}" for d, _ in known}
      told = [row for row in rows if row[0].startswith(size)]
      assert len(told) == 4
      for row in told:
        assert set(re.findall(r"[+-]\d\.\d{4}", row[novels])) <= bits, row
        assert set(re.findall(r"\d+\.\d\b(?!\d)", re.sub(r"p = [\d.]+", "", row[recall]))) <= points, row


def test_what_the_words_at_s_hang_on_follows_from_its_records():
  """p of *worse* on novels in docs/results.md, in the variants that results.csv can tell."""
  runs = collections.defaultdict(dict)
  with (ROOT / "experiments/results/main/results.csv").open() as file:
    for row in csv.DictReader(file):
      mode = "own" if row["headline"] == "True" else row["run_mode"]
      for corpus in ("novels", "code"):
        runs[row["split"], corpus, row["size"], row["arm"], mode][int(row["seed"])] = float(
            row[f"second_half_bits_per_byte:{corpus}"])
  arms = ["native", "within_25", "within_50", "within_75", "after_1", "after_5", "after_13", "after_25"]

  def behind(arm, corpus, split="val", size="S", trunk=False, without=0):
    """By seed; `trunk`: within against the trunk it left, as a selector alone has it, by the oracle's blocks."""
    get = lambda arm, mode="own": runs[split, corpus, size, arm, mode]
    mine, control = get(arm), get("dense_" + arm if arm.startswith("after") else "dense")
    luck = {s: get("selector_only_25", "oracle")[s] - get("dense", "oracle")[s] if trunk and arm.startswith("within")
            else 0 for s in mine}
    return np.array([mine[s] - control[s] - luck[s] for s in sorted(mine) if s != without])

  def holm(corpora=("novels", "code"), failed=0, **how):
    p = np.array([stats.ttest_1samp(behind(arm, c, **how), 0).pvalue for c in corpora for arm in arms] + [1] * failed)
    order = np.argsort(p)
    steps = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return dict(zip(arms, steps[np.argsort(order)]))

  margin = {arm: stats.ttest_1samp(behind(arm, "novels"), 0.005, alternative="greater").pvalue for arm in arms}
  kept = collections.Counter(arm for seed in range(1, 13) for arm, p in holm(without=seed).items()
                             if p <= 0.025 and (seed <= 6 or arm == "native"))
  rows = {"by the plan": holm(), "the same by": holm(split="test"), "had code not": holm(("novels",)),
          "code's eight": holm(("novels",), failed=8), "more than the margin": margin,
          "within against the end": holm(trunk=True), "without one seed": kept}
  text = (ROOT / "docs/results.md").read_text().replace("*", "")
  for name, of in rows.items():
    line, = (line for line in text.splitlines() if line.startswith(f"| {name}"))
    told = [float(x) for cell in line.split("|")[2:5] for x in cell.split(",")]
    assert told == [round(float(of[arm]), 3) for arm in arms], name
  x = behind("within_75", "novels", size="M", trunk=True)
  half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
  assert f"by {x.mean():.4f} ({x.mean() - half:.4f} to {x.mean() + half:.4f})" in text


def test_every_registered_method_is_in_the_readme():
  from nsa import methods
  text = (ROOT / "README.md").read_text()
  missing = {name for name, cls in methods.registry.METHODS.items()
             if cls.__module__.startswith("nsa.") and f"`{name}`" not in text}
  assert missing == {"dense"}
