"""Is a retrofit behind dense because its selector warms up for too short a time, or at the wrong rates?

    python -m launch.study --config=experiments/recipe.py:novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz \\
        --workdir=runs/recipe

In the first seeds of `experiments/main_study.py` retrofits of 25 % end behind dense, also when they are run dense: the
backbone moved while the selector was still learning. Here the same retrofits, on seed 0, which is in no arm of that
study, with other recipes: 240 and 600 steps of warm-up in place of 60, a selector that learns at twice the rate, a
backbone at half of it, and after the fact a second plan that goes up to a quarter of the peak and not to a half.

Two more questions of the same kind ride along. Does native learn recall earlier with a selector at twice the rate? And
with how many blocks do the oracle's blocks pass the gate for text on code, which 24 miss?

Result (experiments/results/recipe, NOTES.md; 20 minutes of one H200, one seed, so no finding): within 25 % is 0.0071
bits per byte behind on novels with 60 steps of warm-up, 0.0040 with 240, 0.0039 with 600, 0.0035 with half the
backbone's rate, 0.0071 with twice the selector's; after 25 % it is 0.0050, 0.0048 and 0.0035, and 0.0052 with the lower
peak. Native learns recall no earlier with a faster selector, as far as evaluations 763 steps apart can tell. 32 blocks
pass the gate on code, 28 miss it by 0.0001.

Arguments: novels=, code=, size=M, scale=1 (of all steps), blocks=24.
"""
import copy
import types

from experiments import arguments, main_study
from nsa.config import Restart
from nsa.study import Study

BUDGET = 0.25


def get_config(arg=None):
  a = arguments.parse(arg, novels="", code="", size="M", scale=1.0, blocks=24,
                      above_0=("scale", "blocks"))
  arguments.choice(a, "size", main_study.SIZES)
  main = types.SimpleNamespace(**vars(a), rate_m=2e-3, rate_s=3e-3, rate_l=1.5e-3, selector_steps=60)
  make = main_study.Arms(main, a.size)
  arms = [make.dense(), make.continued(BUDGET), make.within(BUDGET), make.after(BUDGET)]
  for steps in (240, 600):
    main.selector_steps = steps
    for one in (make.within(BUDGET), make.after(BUDGET)):
      one.arm += f"_warm{steps}"
      arms.append(one)
  main.selector_steps = 60
  faster = make.native()
  faster.arm = "native_selector_x2"
  faster.optimizer.selector_learning_rate *= 2
  arms += [make.native(), faster]
  for name, selector, backbone in (("selector_x2", 2.0, 1.0), ("backbone_x0_5", 2.0, 0.5)):
    one = make.within(BUDGET)
    one.arm += f"_{name}"
    one.optimizer.selector_learning_rate *= selector
    for stage in one.schedule.stages[1:]:
      stage.learning_rate = backbone
    arms.append(one)
  gentle = Restart(peak=0.25)
  for name, one in (("dense_after_25_gentle", make.continued(BUDGET)), ("after_25_gentle", make.after(BUDGET))):
    one = copy.deepcopy(one)
    one.arm, one.schedule.restart = name, Restart(**{**vars(gentle), "step": make.steps})
    arms.append(one)
  for one in arms:
    dense = not one.attention.has_sparse
    one.eval.run_modes, one.eval.more_modes = ("dense", "oracle") if dense else ("sparse", "dense", "oracle"), ()
    if one.arm == "dense":
      one.eval.more_modes = tuple(f"{mode}:num_blocks={n}" for n in (28, 32, 36) for mode in ("oracle", "sink_window"))
      one.eval.more_seeds = (0,)
    one.eval.sealed, one.eval.hidden_states = "", ()
  retrofits = [one.arm for one in arms if one.fork.workdir and one.attention.has_sparse]
  return Study(name="recipe", question=__doc__.splitlines()[0], arms=arms, seeds=(0,), vmap_seeds=False, dense="dense",
               reference="dense", primary=main_study.PRIMARY if a.novels and a.code else Study.primary,
               quantities=("R",), budgets={arm: BUDGET for arm in retrofits},
               controls={arm: "dense_after_25_gentle" if arm.endswith("gentle") else "dense_after_25"
                         for arm in retrofits if arm.startswith("after")})
