"""Steps compiled, or lowered, for machines that are not here.

TPU: libtpu on any host is the whole compiler; what it says of memory and collectives is what the slice would do.
GPU: JAX's CUDA plugin (0.11 on) compiles for a GPU that it is told of, and needs none. Nothing is timed then.
Without it the step is partitioned and lowered for abstract devices, kernels included, which proves that it traces and
fits its mesh, and says nothing of memory.
"""
from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from typing import NamedTuple

from absl import logging
import jax
from jax.experimental import topologies

from nsa import chips, config as config_lib, schedule, sharding, step as step_lib
from pallas_kernels import backends


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine by name: "v5p:4x4x4" (a TPU slice, chips per torus axis) or "h100x64" (GPUs)."""
  name: str
  chip: chips.Device
  devices: int                   # JAX devices
  chips: int
  platform: str                  # "tpu" or "gpu"


def parse(name: str) -> Topology:
  """Raises ConfigError for a name that is none."""
  tpu = re.fullmatch(r"(v\d\w*|tpu7x):([1-9]\d*(?:x[1-9]\d*)*)", name)
  gpu = re.fullmatch(r"([ah]\d00)x([1-9]\d*)", name)
  found = tpu or gpu
  if not found or found[1] not in chips.NAMES:
    raise config_lib.ConfigError([("--topology", name, 'a TPU slice such as "v5p:4x4x4", or GPUs such as "h100x64"; '
                                   f"chips are {', '.join(chips.NAMES)}")])
  kind, per_chip = chips.NAMES[found[1]]
  count = math.prod(int(n) for n in found[2].split("x"))
  return Topology(name, chips.find(kind), count * per_chip, count, "tpu" if tpu else "gpu")


@dataclasses.dataclass
class Compiled:
  """What a compiler says of one step on one device, in bytes."""
  arguments: int                 # state and batch
  temporaries: int
  total: int                     # arguments, temporaries and what the output does not share with the arguments
  collectives: dict[str, float]  # kind -> bytes received per step, scanned layers counted each


class DoesNotFit(Exception):
  """The program needs `bytes` of a device's memory, or more: a compiler may stop at its temporaries."""

  def __init__(self, size: float):
    super().__init__(f"{size / 1e9:.1f} GB")
    self.bytes = size


def compile_step(config, step: schedule.Step, topology: Topology) -> Compiled | None:
  """Compiles one step for a TPU slice or GPUs; lowers it and returns None for GPUs without a compiler for them.

  Raises DoesNotFit.
  """
  with backends.target_platform(topology.platform):
    if topology.platform == "tpu":
      devices = _tpus(topology.name)
    elif (devices := _gpus(topology)) is None:
      lower(config, step, sharding.abstract_mesh(config, topology.devices, _abstract_gpu(topology.chip)), "cuda")
      return None
    lowered = lower(config, step, sharding.make_mesh(config, devices), "cuda" if topology.platform == "gpu" else "tpu")
    try:
      program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if (needed := _needed(str(error))) is None:
        raise
      raise DoesNotFit(needed) from None
  memory = program.memory_analysis()
  total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
           - memory.alias_size_in_bytes)
  return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, total, collectives(program.as_text()))


def _tpus(name: str):
  # libtpu locks "its" TPU and asks a metadata server which one that is: there is none, and processes are many.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  version, shape = name.split(":")
  shape += "x1" * (2 - shape.count("x"))
  return topologies.get_topology_desc(platform="tpu", topology_name=f"{version}:{shape}").devices


def _needed(message: str) -> float | None:
  """Bytes of device memory that a compiler's refusal speaks of."""
  found = re.search(r"(?:Used |for HLO temporaries \()([\d.]+)([KMGT]?)(?: of|\) exceeds)", message)
  return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ") if found else None


class _Gpu(NamedTuple):
  """What XLA asks of a GPU and chips.py does not say, from NVIDIA's white papers on A100 and H100."""
  kind: str           # as the device calls itself
  major: int          # of the compute capability
  cores: int          # streaming multiprocessors
  units: int          # of each: float32 units
  shared: int         # of each: bytes of shared memory
  l2: int             # bytes
  clock: float        # GHz


_GPUS = {
    "NVIDIA A100": _Gpu("NVIDIA A100", 8, 108, 64, 167_936, 40 * 2 ** 20, 1.41),
    "NVIDIA H100": _Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233_472, 50 * 2 ** 20, 1.98),
    "NVIDIA H200": _Gpu("NVIDIA H200", 9, 132, 128, 233_472, 50 * 2 ** 20, 1.98),
}


def _gpus(topology: Topology):
  """Devices to compile for; None where no CUDA plugin that does so is installed."""
  chip, gpu = topology.chip, _GPUS[topology.chip.kind]
  target = f"""
    platform_name: "CUDA"
    device_description_str: "{gpu.kind}"
    dnn_version_info {{ major: 9 minor: 10 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {gpu.major} }}
      core_count: {gpu.cores} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.l2}
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared - 1024}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {chip.hbm_speed * 1e9:.0f} device_memory_size: {chip.hbm * 1e9:.0f}
    }}"""
  hosts = 1 if topology.devices % chip.island else topology.devices // chip.island
  shape = f"1x{hosts}x{topology.devices // hosts}"
  try:
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices
  except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
    logging.info("nothing here compiles for GPUs, steps are lowered: %s", error)
    return None


def _abstract_gpu(chip):
  gpu = _GPUS[chip.kind]
  try:
    return jax.sharding.AbstractDevice(gpu.kind, gpu.cores, platform="gpu")
  except TypeError:  # jax before 0.11 knows no platform of an abstract device
    return jax.sharding.AbstractDevice(gpu.kind, gpu.cores)


def lower(config, step: schedule.Step, mesh, platform: str):
  """The program of a step, lowered for a platform that need not be here."""
  with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
    function, arguments, options = step_lib.program(config, step, mesh)
    return jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=(platform,))


# --- compiled text ------------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
          "s64": 8, "u64": 8}


def collectives(text: str) -> dict[str, float]:
  """Bytes that one device receives per run of a compiled program, by kind of collective.

  Of n devices' ring: all-gather and reduce-scatter (n - 1) / n of the whole array, all-reduce twice that, others
  the array. A loop's body counts as often as the loop runs, if the text says how often, else once.
  """
  bodies: dict[str, list[str]] = {}
  name, entry = None, None
  for line in text.splitlines():
    start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
    if start and not line.startswith(" "):
      name = start[2]
      bodies[name] = []
      entry = name if start[1] else entry
    elif name and line.startswith("}"):
      name = None
    elif name:
      bodies[name].append(line)
  out: dict[str, float] = collections.defaultdict(float)

  def visit(computation, times):
    for line in bodies.get(computation, ()):
      for kind in _KINDS:
        if re.search(rf"\s{kind}(-start)?\(", line):
          out[kind] += times * _received(kind, line)
      trips = re.search(r'known_trip_count[^\d]*(\d+)', line)
      condition = re.search(r"condition=%?([\w.\-]+)", line)
      if condition and not trips:  # TPU text has the bound in the condition alone
        trips = re.search(r"s32\[\][^ ]* constant\((\d+)\)", "\n".join(bodies.get(condition[1], ())))
      for called in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)", line):
        if "to_apply=" in line and any(f"{kind}" in line for kind in _KINDS):
          continue
        for one in called.split(", "):
          visit(one.lstrip("%"), times * (int(trips[1]) if trips and "while(" in line else 1))

  visit(entry, 1)
  return dict(out)


def _received(kind, line) -> float:
  result = line.split(" = ", 1)[1].split(f" {kind}", 1)[0]
  sizes = [_BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
           for dtype, shape in re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", result)]
  # An asynchronous start names its operands and its results; of several arrays in one all-reduce all count.
  whole = ((sum(sizes) / 2 if kind == "all-reduce" else max(sizes)) if "-start(" in line and len(sizes) > 1
           else sum(sizes))
  groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
  explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
  if named:  # over axes of a mesh, or over factors of them: 'axis':(before)size
    sizes_of = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    n = math.prod(int(size or sizes_of[axis]) for axis, size in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))
  else:
    n = int(groups[2]) if groups else len(explicit[1].split(",")) if explicit else 2
  if kind == "reduce-scatter":
    whole *= n
  return whole * {"all-gather": (n - 1) / n, "reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}.get(
      kind, 1.0)
