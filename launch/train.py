"""Trains one run, or goes on with it.

    python -m launch.train --config=experiments/native.py --workdir=runs/native
    python -m launch.train --config=experiments/native.py:method=nsa --workdir=... --config.schedule.steps=2000
    python -m launch.train --config=experiments/native.py --dry_run
"""
from absl import flags
from ml_collections import config_flags

from launch import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. experiments/native.py:method=nsa",
                                          lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, made if it is not there.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False,
                             "Print the config, parameters, FLOPs and memory per stage; compile; train nothing.")
flags.mark_flag_as_required("config")
cli.define_common()


def main():
  from nsa import config as config_lib
  config = _CONFIG.value
  if not isinstance(config, config_lib.Config):
    raise config_lib.ConfigError(
        [("config", type(config).__name__, "launch.train takes a Config; a Study goes to launch.study")])
  config_lib.validate(config)
  if not _DRY_RUN.value and not _WORKDIR.value:
    raise config_lib.ConfigError([("--workdir", "", "name the run directory, or take --dry_run")])
  cli.compilation_cache(flags.FLAGS.compilation_cache, programs=flags.FLAGS.keep_programs,
                        workdir=None if _DRY_RUN.value else _WORKDIR.value)
  if _DRY_RUN.value:
    from nsa.planning import plan
    for line in plan.describe(config):
      print(line, flush=True)
    return
  cli.begin_early(config.data.texts.values())
  from nsa import processes, start, train
  start.of_process()
  step = train.train(config, _WORKDIR.value, hang_seconds=flags.FLAGS.hang_timeout)
  if processes.first():
    print(f"{_WORKDIR.value}: {step} steps done")


if __name__ == "__main__":
  cli.run(main)
