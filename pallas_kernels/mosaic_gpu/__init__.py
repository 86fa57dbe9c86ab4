"""Kernels for Hopper GPUs (H100, H200) in Pallas Mosaic GPU: wgmma, the tensor copy engine, cp.async.

Importing registers them; it works without a GPU.
"""
from __future__ import annotations

from pallas_kernels import backends
from pallas_kernels.mosaic_gpu.selected import selected_attention, supports

__all__ = ("selected_attention", "supports")

FEW_QUERIES = 8  # of a sequence, up to which the kernels of triton/ are faster: they sort nothing


def _few(*, q, **_):
  T = q.shape[1]
  return f"q has {T} tokens: too few to sort by block" if T <= FEW_QUERIES else None


try:
  from pallas_kernels.mosaic_gpu import index_top_k
except Exception:  # triton, whose kernel chooses, is not installed, or broken
  pass
else:
  backends.register("index_top_k", "mosaic_gpu", index_top_k.index_top_k, platforms=("gpu",),
                    supports=index_top_k.supports, avoid=index_top_k.avoid)
backends.register("selected_attention", "mosaic_gpu", selected_attention, platforms=("gpu",),
                  supports=supports, avoid=_few)
