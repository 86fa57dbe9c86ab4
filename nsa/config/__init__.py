"""The configuration of one run: plain dataclasses, one comment and one unit per field.

An experiment file's `get_config(arg)` returns a `Config`; the launchers apply
`--config.a.b=value` overrides to it and call `validate`, which raises one
`ConfigError` that names every wrong field, its value and the fix. Nothing here
touches a device.
"""
from nsa.architecture import ModelConfig, RopeScaling
from nsa.config.checks import remarks, validate
from nsa.config.fields import (
  CheckpointConfig,
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  ForkConfig,
  LearningRate,
  MeshConfig,
  OptimizerConfig,
  Restart,
  ScheduleConfig,
  Stage,
  steps_of,
)
from nsa.config.serial import from_dict, to_dict

__all__ = ("CheckpointConfig", "Config", "ConfigError", "DataConfig", "EvalConfig", "ForkConfig", "LearningRate",
           "MeshConfig", "ModelConfig", "OptimizerConfig", "Restart", "RopeScaling", "ScheduleConfig", "Stage",
           "from_dict", "remarks", "steps_of", "to_dict", "validate")
