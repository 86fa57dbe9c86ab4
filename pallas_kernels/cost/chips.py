"""Chips by their published peaks, and what one kernel asks of them."""
from __future__ import annotations

import dataclasses

MIB = 2 ** 20


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device."""
  name: str
  platform: str      # of the kernels: "tpu" or "gpu"
  flops: float       # bfloat16 products, dense, FLOP/s
  bandwidth: float   # of HBM, bytes/s
  on_chip: int       # bytes of VMEM per core, of shared memory per thread block
  smem: int          # bytes of scalar memory per core; 0 on a GPU
  matrix: int        # depth of the matrix unit: shorter contractions are padded to it
  vector: float      # element operations per second of the vector units (TPU), exponentials per second (GPU)
  step: float        # seconds that a grid step takes at the least


def _tpu(name, flops, bandwidth, vmem, matrix, clock, cores):
  # Four slots of 8 x 128 lanes per core and cycle. A grid step: some 230 bundles around the loops of `attention`,
  # as libtpu schedules it.
  return Chip(name, "tpu", flops, bandwidth, vmem * MIB, MIB, matrix, 4 * 1024 * clock * cores, 230 / clock)


# FLOP/s and bandwidth: the pages "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x (Ironwood)" of cloud.google.com/tpu/docs.
# VMEM, SMEM and matrix units: jax._src.tpu_info of jax 0.11. Clocks are not published: v5e's and v5p's follow from
# peak = 2 * 4 units * 128^2 * cores * clock, the others are taken to be v5p's.
# Two cores of a v5p are one device; a TPU7x chip is two devices, each with half of its 2307 TFLOP/s and 7380 GB/s.
CHIPS = {chip.name: chip for chip in (
    _tpu("v5e", 197e12, 819e9, 128, 128, 1.5e9, 1),
    _tpu("v5p", 459e12, 2765e9, 64, 128, 1.75e9, 2),
    _tpu("v6e", 918e12, 1638e9, 128, 256, 1.75e9, 1),
    _tpu("tpu7x", 2307e12 / 2, 7380e9 / 2, 64, 256, 1.75e9, 1),
    # Data sheets "H100 Tensor Core GPU" (SXM5) and "H200 Tensor Core GPU": 989 TFLOP/s bfloat16 without sparsity.
    # 16 exponentials per cycle and multiprocessor (CUDA C++ Programming Guide, arithmetic instructions), 132 of
    # them at 1.755 GHz.
    Chip("h100", "gpu", 989.4e12, 3350e9, 227 * 1024, 0, 16, 16 * 132 * 1.755e9, 0.0),
    Chip("h200", "gpu", 989.4e12, 4800e9, 227 * 1024, 0, 16, 16 * 132 * 1.755e9, 0.0),
)}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What one kernel of an operation does."""
  name: str
  flops: float = 0.0    # of the matrix unit: tiles and padding included
  bytes: float = 0.0    # read from and written to HBM, padding of lanes included
  copies: float = 0.0   # between HBM and the chip
  steps: float = 0.0    # of the grid
  vector: float = 0.0   # element operations (TPU), exponentials (GPU)
  on_chip: float = 0.0  # bytes: buffers, twice where copies overlap work, and scratch
  smem: float = 0.0     # bytes of scalar memory

  def seconds(self, chip: Chip) -> tuple[float, str]:
    """The least time, and what it is the time of: "matrix", "memory", "vector" or "steps"."""
    parts = {"matrix": self.flops / chip.flops, "memory": self.bytes / chip.bandwidth,
             "vector": self.vector / chip.vector}
    steps = self.steps * chip.step
    bound = max(parts, key=parts.get)
    return parts[bound] + steps, "steps" if steps > parts[bound] else bound


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The kernels of one direction of an operation on a chip, one after the other."""
  kernels: tuple[Kernel, ...]
  chip: Chip

  @property
  def seconds(self) -> float:
    return sum(kernel.seconds(self.chip)[0] for kernel in self.kernels)

  @property
  def bound(self) -> str:
    """What takes most of the time, and its share of it."""
    parts: dict[str, float] = {}
    for kernel in self.kernels:
      seconds, bound = kernel.seconds(self.chip)
      parts[bound] = parts.get(bound, 0.0) + seconds
    bound = max(parts, key=parts.get)
    return f"{bound} {100 * parts[bound] / self.seconds:.0f}%"

  def total(self, field: str) -> float:
    """Sum of a field over the kernels."""
    return sum(getattr(kernel, field) for kernel in self.kernels)

  def most(self, field: str) -> float:
    """Largest value of a field."""
    return max(getattr(kernel, field) for kernel in self.kernels)
