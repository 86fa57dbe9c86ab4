"""Attention operations for block-sparse models: arrays in, arrays out.

Every operation takes `implementation=None` (the best one for the platform),
"fastest" (that may differ in last bits from run to run) or a name from
`available(operation)`; "reference" always works. See `api`.
"""
from pallas_kernels.api import attention
from pallas_kernels.api import available
from pallas_kernels.api import block_mass
from pallas_kernels.api import block_top_k
from pallas_kernels.api import compressed_attention
from pallas_kernels.api import compressed_top_k
from pallas_kernels.api import index_kl
from pallas_kernels.api import index_top_k
from pallas_kernels.api import paged_attention
from pallas_kernels.api import selected_attention
from pallas_kernels.partition import partitioned

__all__ = (
    "attention",
    "available",
    "block_mass",
    "block_top_k",
    "compressed_attention",
    "compressed_top_k",
    "index_kl",
    "index_top_k",
    "paged_attention",
    "partitioned",
    "selected_attention",
)
