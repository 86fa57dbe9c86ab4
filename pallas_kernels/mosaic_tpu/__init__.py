"""Kernels for TPUs (v5e, v5p, v6e, tpu7x) in Pallas Mosaic: VMEM tiles, copies by hand, the matrix unit.

Importing registers them; it works without a TPU. No TPU was at hand when they were written: numbers are
checked in the interpreter on a CPU, and libtpu compiles every kernel for each chip (`aot`). Left to the reference:
`block_top_k` and `block_mass`, which evaluation alone calls, and `index_kl` over all tokens (warm-up).
"""
from __future__ import annotations

from pallas_kernels import backends
from pallas_kernels.mosaic_tpu import attention
from pallas_kernels.mosaic_tpu import compressed_attention
from pallas_kernels.mosaic_tpu import compressed_top_k
from pallas_kernels.mosaic_tpu import index_top_k
from pallas_kernels.mosaic_tpu import kl
from pallas_kernels.mosaic_tpu import selected

KERNELS = {  # operation -> its module, which has a function of that name and `supports` of the same arguments
    "attention": attention,
    "compressed_attention": compressed_attention,
    "compressed_top_k": compressed_top_k,
    "index_top_k": index_top_k,
    "selected_attention": selected,
    "index_kl": kl,
}

for _operation, _module in KERNELS.items():
  backends.register(_operation, "mosaic_tpu", getattr(_module, _operation), platforms=("tpu",),
                    supports=_module.supports)
