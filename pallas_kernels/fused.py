"""What stands between a projection and attention in one pass over memory, where a kernel serves it.

XLA's own passes are the slow twin, in whoever calls `heads`; results differ from theirs in rounding alone, as numbers
between the steps stay float32. The model asks for it with implementation="fastest" alone (nsa/model.py). On several
devices XLA's passes serve: its partitioner cannot cut a kernel.

On one H200, 10M parameters in 6 layers, 8 x 4,096 tokens of bfloat16, all layers unrolled: the dense step 17.2 ms
instead of 17.7, on the device 16.3 instead of 16.8; MSA 19.2 instead of 20.6, NSA 23.4 where the device alone was busy
for 25.4. The queries' pass takes 29 us forward, twice what its bytes need, and 200 us backward, nine times that.
"""
from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import backends, partition


def serves(x) -> bool:
  """Whether `heads` takes arrays of x's dtype here."""
  if partition.active() or backends.current_platform() != "gpu" or x.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  from pallas_kernels.triton import call
  return call.unavailable() is None


def takes_width(head_dim: int) -> bool:
  """Whether `heads` takes heads of so many numbers."""
  return 16 <= head_dim <= 128 and head_dim & (head_dim - 1) == 0


def heads(y, taps, gain, table, first, eps):
  """Short convolution, RMSNorm per head and rotary embedding: `triton.heads.heads`; `table` is (cos, sin) or None."""
  from pallas_kernels.triton import heads as kernels
  cos, sin = table or (None, None)
  return kernels.heads(y, taps, gain, cos, sin, first, float(eps))
