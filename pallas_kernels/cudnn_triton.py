"""cuDNN forward, Triton backward: `attention` and `compressed_attention` with gradients of fixed bits at any length.

cuDNN's forward pass is the fastest there is on Hopper and always gives the same bits. Its backward pass does so only
with a workspace that grows with the square of the length (cudnn.py); that of triton/ranged.py needs none, and the
output and lse that cuDNN leaves are all that it asks for.
"""
from __future__ import annotations

import functools

from pallas_kernels import backends, cudnn
from pallas_kernels.triton import ranged


def attention(q, k, v, **options):
  """See `pallas_kernels.api.attention`."""
  forward_pass = lambda q, k, v, low, high, sizes: cudnn.attention(q, k, v, **options)
  return ranged.attention(q, k, v, **options, forward_pass=forward_pass)


def compressed_attention(q, k_cmp, v_cmp, **options):
  """See `pallas_kernels.api.compressed_attention`."""
  forward_pass = lambda q, k, v, low, high, sizes: cudnn.compressed_attention(q, k, v, **options)
  return ranged.compressed_attention(q, k_cmp, v_cmp, **options, forward_pass=forward_pass)


def _avoid(*, window=None, **_):
  """On one H200, 64/4 heads of 128, forward ms with cuDNN and with Triton: dense, 16,384 tokens, 7.4 and 9.6;
  compressed with its top-k, 65,536 tokens, 15.1 and 16.5. Over a window of 512, 3.0 and 3.4, but with cuDNN's own
  gradient."""
  return None if window is None else f"window = {window}: not known to be faster"


for _name, _function, _of_cudnn, _of_triton in (
    ("attention", attention, cudnn.supports_attention, ranged.supports_attention),
    ("compressed_attention", compressed_attention, cudnn.supports_compressed_attention,
     ranged.supports_compressed_attention)):
  backends.register(_name, "cudnn_triton", _function, platforms=("gpu",), avoid=_avoid,
                    supports=functools.partial(lambda first, second, **a: first(**a) or second(**a), _of_cudnn,
                                               _of_triton))
