"""Kernels for Hopper GPUs (H100, H200) in Pallas Mosaic GPU: wgmma, the tensor copy engine, cp.async.

Importing registers them; it works without a GPU.
"""
from __future__ import annotations

from pallas_kernels import backends
from pallas_kernels.mosaic_gpu.selected import selected_attention
from pallas_kernels.mosaic_gpu.selected import supports

__all__ = ("selected_attention", "supports")

backends.register("selected_attention", "mosaic_gpu", selected_attention, platforms=("gpu",),
                  supports=lambda arguments: supports(**arguments))
