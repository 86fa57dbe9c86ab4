"""Block shapes of the Triton kernels: measured ones per device kind, heuristics where there are none.

`pallas_kernels/tuned/<device kind>.json` maps "kernel/head dim" to the fields of `Tuned`;
`python -m benchmarks.tune` writes it. Another shape changes the order of sums and with it the last bits of results,
so nothing is timed at run time. The shapes of `compressed_scores` and `index_scores` at head dim 128, here and in the
file of the H200, are from one H100 (experiments/results/kernels/top_k_h100.json).
"""
from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call

FOLDER = pathlib.Path(__file__).parent.parent / "tuned"


class Tuned(NamedTuple):
  rows: int    # query rows of a tile, tokens times padded heads
  block: int   # keys of a block
  warps: int
  stages: int  # of the compiler's software pipeline


# Where no entry exists. They fit the 163 KiB of shared memory of an A100.
DEFAULTS = {
    "range_forward": Tuned(128, 64, 8, 3),
    "range_decode": Tuned(16, 64, 4, 3),
    "range_dq": Tuned(128, 64, 8, 2),
    "range_dkv": Tuned(64, 128, 8, 2),
    "compressed_scores": Tuned(128, 64, 4, 2),
    "index_scores": Tuned(64, 128, 4, 3),
    "selected_forward": Tuned(16, 64, 4, 2),
    "selected_decode": Tuned(16, 64, 4, 2),      # one token
    "selected_dkv": Tuned(64, 64, 4, 2),
    "index_kl": Tuned(64, 64, 4, 2),             # over all tokens
    "index_kl_forward": Tuned(64, 64, 4, 2),     # over selected blocks, whose size takes the place of `block`
    "index_kl_backward": Tuned(64, 64, 4, 2),
    "block_mass": Tuned(128, 64, 4, 2),
    "lightning": Tuned(64, 64, 4, 3),
}

_overrides: dict[str, Tuned] = {}


@contextlib.contextmanager
def override(kernel, tuned):
  """`get` gives `tuned` for a kernel inside the block: for measuring. Compiled functions keep what they have."""
  _overrides[kernel] = tuned
  try:
    yield
  finally:
    del _overrides[kernel]


def device_file(kind):
  return FOLDER / (kind.lower().replace(" ", "_") + ".json")


@functools.cache
def _entries(kind):
  path = device_file(kind)
  return json.loads(path.read_text()) if path.exists() else {}


def get(kernel, *, head_dim, dtype, length=None):
  """The shape for a kernel on the default device; `length` caps the block of keys."""
  if kernel in _overrides:
    return _overrides[kernel]
  device = jax.devices()[0]
  kind = device.device_kind if device.platform == "gpu" else "NVIDIA H100 80GB HBM3"
  entry = _entries(kind).get(f"{kernel}/{head_dim}")
  tuned = Tuned(*entry) if entry else DEFAULTS[kernel]
  if dtype == jnp.float32 or head_dim > 128:  # twice the bytes per tile
    tuned = tuned._replace(rows=min(tuned.rows, 64), block=min(tuned.block, 32), stages=min(tuned.stages, 2))
  if call.small_memory():
    tuned = tuned._replace(stages=min(tuned.stages, 2))
  if length is not None:
    tuned = tuned._replace(block=max(16, min(tuned.block, 1 << max(length - 1, 1).bit_length())))
  return tuned
