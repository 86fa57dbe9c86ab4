"""What the kernels of this package share: how a tile lies in shared memory, how it is loaded, what of it is seen."""
from __future__ import annotations

import inspect
import math

import jax
from jax import lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

LOG2E = math.log2(math.e)


def tile_transforms(minor, dtype):
  """Tiling and swizzle of a shared tile: the widest that divides rows of `minor` elements."""
  swizzle = math.gcd(128, minor * jnp.dtype(dtype).itemsize)
  return (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))


def of_another_gpu(name):
  """None, or why not if the default device is a GPU that has no wgmma; without a GPU None, for lowering."""
  device = jax.devices()[0]
  if device.platform != "gpu" or str(getattr(device, "compute_capability", "9.0")) == "9.0":
    return None
  return f"{name} is on {device.device_kind}: the kernels need compute capability 9.0 (H100, H200)"


def compiler_params(interpret=False):
  """Lane semantics in both supported versions of jax.

  The barriers that Pallas would put around every access to shared memory are left out: the
  kernels have their own where a buffer changes hands (`commit_smem`, `wait_smem_to_gmem`, the
  first line of `gather_tile`).
  """
  return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane,
                              unsafe_no_auto_barriers=not interpret)


def load(ref, layout):
  """`plgpu.load` of a whole reference, which wants an index in jax 0.10 and warns of one in 0.11."""
  if _LOAD_NEEDS_INDEX:
    return plgpu.load(ref, (), layout=layout)
  return plgpu.load(ref, layout=layout)


_LOAD_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_NEEDS_INDEX = _LOAD_INDEX is not None and _LOAD_INDEX.default is inspect.Parameter.empty


def visible(span, shape, segmented, first_key=0):
  """bool[rows, keys] from the span of each row; `first_key` is the offset of column 0 in the block."""
  key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
  end = (span & 0xffff) - first_key
  inside = key < lax.broadcast_in_dim(end, shape, [0])
  if segmented:
    inside &= key >= lax.broadcast_in_dim((span >> 16) - first_key, shape, [0])
  return inside
