"""Devices that runs are planned for and measured against, by their published peaks. One row per JAX device.

Sources: NVIDIA's data sheets of A100, H100 and H200 (their figures "with sparsity", halved; NVLink per direction);
for TPUs the pages of each version on cloud.google.com/tpu/docs. A TPU's `link` is one torus axis in both directions,
the ring that one mesh axis gets; a mesh axis that lies over several torus axes gets more. `network` is a network card
of 400 Gbit/s (A100: 200) per GPU, as in NVIDIA's DGX reference design; within a TPU slice all traffic is interconnect.
TPU7x shows a chip as two devices: halved.
"""
from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
  kind: str                      # beginning of jax.Device.device_kind
  tflops: float | None           # dense bf16 TFLOP/s
  hbm_speed: float = 0.0         # GB/s (1e9 bytes)
  hbm: float = 0.0               # GB
  link: float = 0.0              # GB/s that a collective over neighbours gets
  network: float = 0.0           # GB/s beyond the island
  island: int = 0                # devices that `link` joins; 0 = all of a slice


DEVICES = (                      # the first row whose kind fits counts
    Device("NVIDIA H100 PCIe", 756.0, 2000, 80, 64, 50, 1),
    Device("NVIDIA H100 NVL", 835.0, 3900, 94, 300, 50, 2),
    Device("NVIDIA H100", 989.4, 3350, 80, 450, 50, 8),         # SXM5
    Device("NVIDIA H200 NVL", 835.0, 4800, 141, 450, 50, 4),
    Device("NVIDIA H200", 989.4, 4800, 141, 450, 50, 8),        # SXM5
    Device("NVIDIA A100", 312.0, 2039, 80, 300, 25, 8),
    Device("TPU v4 lite", None),                                # v4i, for inference
    Device("TPU v4", 275.0, 1228, 32, 100),
    Device("TPU v5 lite", 197.0, 819, 16, 100),
    Device("TPU v5e", 197.0, 819, 16, 100),
    Device("TPU v5", 459.0, 2765, 95, 200),                     # by either name
    Device("TPU v6 lite", 918.0, 1638, 32, 224),
    Device("TPU v6e", 918.0, 1638, 32, 224),
    Device("TPU7x", 1153.5, 3690, 96, 200),
)

# Name in --topology -> (device kind, JAX devices per chip).
NAMES = {"h100": ("NVIDIA H100", 1), "h200": ("NVIDIA H200", 1), "a100": ("NVIDIA A100", 1), "v4": ("TPU v4", 1),
         "v5e": ("TPU v5e", 1), "v5p": ("TPU v5", 1), "v6e": ("TPU v6e", 1), "tpu7x": ("TPU7x", 2)}


def find(device_kind: str) -> Device | None:
  """The row of a device by `jax.Device.device_kind`; None if unknown (a CPU, say)."""
  return next((device for device in DEVICES if device_kind.lower().startswith(device.kind.lower())), None)
