"""What stands between products and attention in one pass over memory, where a kernel serves it.

XLA's own passes are the slow twin, in whoever calls these functions; results differ from theirs in rounding alone, as
numbers between the steps stay float32; the gradient is as near to float32's (docs/kernels.md). The model asks for them
where `Config.one_pass` is True, as it is unless a run says otherwise. On several devices XLA's passes serve: its
partitioner cannot cut a kernel.

By the shapes in the compiled dense step of 10M parameters in 6 layers, 8 x 4,096 tokens of bfloat16, all unrolled, 20.7
GB pass through memory in 359 kernels, instead of 26.4 in 536. docs/kernels.md has what that is worth on one H200.
"""
from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import backends, partition

ROWS = 32  # tokens of a sequence that `norm` takes at a time: it has no remainder


def serves(x) -> bool:
  """Whether these functions take arrays of x's dtype here."""
  if partition.active() or backends.current_platform() != "gpu" or x.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  from pallas_kernels.triton import call
  return call.unavailable() is None


def takes_width(head_dim: int) -> bool:
  """Whether `heads` and `groups` take heads of so many numbers."""
  return 16 <= head_dim <= 128 and head_dim & (head_dim - 1) == 0


def takes_rows(x) -> bool:
  """Whether `norm` takes x [B, T, D]."""
  return x.shape[1] % ROWS == 0 and x.shape[2] <= 8192


def heads(y, taps, gain, table, first, eps):
  """Short convolution, RMSNorm per head and rotary embedding: `triton.heads.heads`; `table` is (cos, sin) or None."""
  from pallas_kernels.triton import heads as kernels
  cos, sin = table or (None, None)
  return kernels.heads(y, taps, gain, cos, sin, first, float(eps))


def groups(y, taps, gains, table, first, eps, kv_heads, turned, plain):
  """(q, k, ..., v, ...) of one projection for all heads: `triton.heads.groups`. `table` as above."""
  from pallas_kernels.triton import heads as kernels
  return kernels.groups(y, taps, gains, *(table or (None, None)), first, float(eps), kv_heads, turned, plain)


def norm(x, more, gain, eps):
  """(x + more, RMSNorm of it), `more` None for nothing: the gradient of the residual stream is summed in the norm's
  pass. `triton.pointwise.norm`."""
  from pallas_kernels.triton import pointwise
  return pointwise.norm(x, more, gain, float(eps))


def gate(y):
  """silu(y[..., :F]) * y[..., F:]: `triton.pointwise.gate`."""
  from pallas_kernels.triton import pointwise
  return pointwise.gate(y)


def nll(logits, targets, shares, dtype):
  """(nll of the targets, the gradient of sum(shares * nll) as `dtype`): `triton.pointwise.nll`. Not differentiable."""
  from pallas_kernels.triton import pointwise
  return pointwise.nll(logits, targets, shares, dtype)
