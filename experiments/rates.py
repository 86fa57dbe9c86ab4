"""Which peak learning rate for dense and for native, at each size?

    python -m launch.study --config=experiments/rates.py:novels=longdoc-v1.tar.xz,code=longcode-v1.tar.xz \\
        --workdir=runs/rates

Chosen on val, before the main study and at its full length. Dense and native arms of `experiments/main_study.py` as
they stand there, one seed, at `rate`, at half and at twice that.
Choose by text and recall of each arm's own run mode; a best value at the edge asks for another one beyond it.

Result (experiments/results/rates, NOTES.md, with 20 blocks, rates_24 with 24; 15 minutes of one H200, cut): 2e-3
at M and 3e-3 at S, for dense and for native; dense's novels alone are 0.003 better with half of it at S. L was not run.

Arguments: novels=, code=, sizes=M+S, rate_m=2e-3, rate_s=3e-3, rate_l=1.5e-3 (the middle one of each size),
factors=0.5+1+2, scale=1 (of all steps), blocks=24.
"""
import types

from experiments import arguments, main_study
from nsa.study import Study


def get_config(arg=None):
  a = arguments.parse(arg, novels="", code="", sizes="M+S", rate_m=2e-3, rate_s=3e-3, rate_l=1.5e-3, factors="0.5+1+2",
                      scale=1.0, blocks=24, above_0=("scale", "blocks"))
  sizes = a.sizes.split("+")
  if not set(sizes) <= {"S", "M", "L"}:
    raise ValueError(f"experiment argument sizes = {a.sizes!r}: S, M and L, joined by +")
  arms = []
  for size in sizes:
    for factor in arguments.numbers("factors", a.factors, float, least=1e-3):
      rate = factor * {"S": a.rate_s, "M": a.rate_m, "L": a.rate_l}[size]
      main = types.SimpleNamespace(novels=a.novels, code=a.code, blocks=a.blocks, scale=a.scale, rate_m=rate,
                                   rate_s=rate, rate_l=rate)
      make = main_study.Arms(main, size)
      for one in (make.dense(), make.native()):
        one.arm += "" if factor == 1 else f"_rate_x{factor:g}".replace(".", "_")
        own = "sparse" if one.attention.has_sparse else "dense"
        one.eval.run_modes, one.eval.more_modes, one.eval.during, one.eval.sealed = (own,), (), (own,), ""
        arms.append(one)
  return Study(name="rates", question=__doc__.splitlines()[0], arms=arms, seeds=(0,), vmap_seeds=False, dense="dense",
               reference="native", primary=main_study.PRIMARY if a.novels and a.code else Study.primary)
