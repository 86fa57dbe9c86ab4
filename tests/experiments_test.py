"""Every experiment file resolves to something that can run, and says what it is."""
import ast
from pathlib import Path

import pytest

from experiments import arguments
from nsa import config as config_lib, evaluate, schedule, sharding, step as step_lib, study as study_lib

FILES = [path for path in sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))
         if "def get_config" in path.read_text()]


def load(path, arg=None):
  scope = {"__name__": f"experiments.{path.stem}", "__doc__": ast.get_docstring(ast.parse(path.read_text()))}
  exec(compile(path.read_text(), str(path), "exec"), scope)
  return scope["get_config"](arg)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_resolves(path):
  config = load(path)
  if isinstance(config, study_lib.Study):
    jobs = study_lib.jobs(config, "study")
    assert jobs and all(job.trunk == "" or any(job.trunk == other.run for other in jobs) for job in jobs)
    configs = [job.config for job in jobs]
    assert config.reference in {c.arm for c in configs} and config.dense in {c.arm for c in configs}
    assert set(config.budgets) <= {c.arm for c in configs}
    study_lib.check_tasks(config)  # its recall needs selection, or it says that it does not
  else:
    configs = [config_lib.validate(config)]
  for one in configs:
    assert config_lib.from_dict(config_lib.to_dict(one)) == one


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstring_states_question_and_command(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert text.splitlines()[0].endswith("?"), "the first line is the question"
  assert f"--config=experiments/{path.name}" in text and "Arguments:" in text


@pytest.mark.parametrize("stem, arg",
                         [("native", "method=nsa"), ("native", "method=dense"), ("retrofit", "budget=0.05"),
                          ("retrofit", "method=nsa,trunk=runs/dense"), ("mqar", "arm=msa"), ("mqar", "arm=nsa"),
                          *((stem, f"method={method}") for stem in ("native", "retrofit")
                            for method in ("dsa", "seer", "moba", "infllm_v2", "ssa")),
                          *(("methods", f"arm={arm}")
                            for arm in ("msa", "nsa", "moba", "dsa", "infllm_v2", "ssa", "block_topk", "seer",
                                        "msa_retrofit"))])
def test_arguments_resolve(stem, arg):
  config_lib.validate(load(next(path for path in FILES if path.stem == stem), arg))


def test_the_runs_of_the_pilot_share_their_programs():
  """27 runs, and what is compiled does not grow with seeds and budgets: minutes on a GPU that each run would cost."""
  jobs = study_lib.jobs(load(next(path for path in FILES if path.stem == "pilot")), "study")
  mesh = sharding.make_mesh(jobs[0].config)
  steps = {(step_lib._key(job.config, mesh), step.program) for job in jobs
           for step in schedule.programs(job.config, max(0, job.config.fork.step))}
  modes = {evaluate._program(way) for job in jobs for mode in job.config.eval.run_modes + job.config.eval.during
           if (way := evaluate.how(job.config, mode))}
  # Steps: dense; MSA warming up, sparse, mixed dense, mixed sparse = sparse, the selector alone; NSA sparse; window.
  # Evaluations: five modes of the dense model, six each of MSA and NSA, two of the window.
  assert (len(jobs), len(steps), len(modes)) == (39, 7, 19)


def test_arguments_are_typed_and_named():
  parsed = arguments.parse("steps=20,name=x,fast=true", steps=1, name="", fast=False, rate=0.5)
  assert (parsed.steps, parsed.name, parsed.fast, parsed.rate) == (20, "x", True, 0.5)
  with pytest.raises(ValueError, match="'step=2'.*steps=1"):
    arguments.parse("step=2", steps=1)
  assert arguments.parse("fast=No", fast=True).fast is False
  with pytest.raises(ValueError, match="fast = 'ture': takes true or false"):
    arguments.parse("fast=ture", fast=False)
  with pytest.raises(ValueError, match="steps = 'two': takes a whole number"):
    arguments.parse("steps=two", steps=1)
  for text, said in (("steps=0", "steps = 0: above 0"), ("rate=inf", "rate = 'inf': takes a finite number")):
    with pytest.raises(ValueError, match=said):
      arguments.parse(text, steps=1, rate=0.5, above_0=("steps",))
