"""What a run would take on machines that are not here: memory, collectives, FLOPs, time and chip hours.

    python -m launch.compile --config=experiments/scale.py:size=8b,method=msa --topology=v5p:8x8x8
    python -m launch.compile --config=experiments/scale.py:size=8b,method=msa --topology=h100x512 --out=plan.json

Every stage's step is compiled: for TPUs by libtpu, for GPUs by JAX's CUDA plugin (0.11 on; neither needs its device).
For GPUs without the plugin steps are lowered, and memory is arithmetic. A step that does not fit is an error (exit code
2) that names the next thing to change.
"""
from absl import flags
from ml_collections import config_flags

from launch import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file of a run, e.g. experiments/scale.py:size=8b",
                                          lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, 'Where: "v5p:8x8x8" (a TPU slice) or "h100x64" (GPUs).')
_COMPILE = flags.DEFINE_bool("compile", True, "False: arithmetic alone.")
_INACTIVE = flags.DEFINE_float("inactive_parameters",
                               0.0, "Parameters of experts that a token does not visit: memory and "
                               "traffic alone (nsa/planning/forecast.py).", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file for the plan.")
flags.mark_flags_as_required(["config", "topology"])


def main():
  import jax
  jax.config.update("jax_platforms", "cpu")  # whatever is here is not what the plan is for
  from nsa import config as config_lib, metrics
  from nsa.planning import plan, topology
  config = _CONFIG.value
  if not isinstance(config, config_lib.Config):
    raise config_lib.ConfigError(
        [("config", type(config).__name__, "launch.compile takes a Config, the run that is planned")])
  made = plan.ahead(config, topology.parse(_TOPOLOGY.value), compile_steps=_COMPILE.value, inactive=_INACTIVE.value)
  print(plan.report(made))
  if _OUT.value:
    metrics.write_json(_OUT.value, made)
  plan.check_fits(made)


if __name__ == "__main__":
  cli.run(main)
