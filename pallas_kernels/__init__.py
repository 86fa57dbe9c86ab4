"""Attention operations for block-sparse models: arrays in, arrays out.

Every operation takes `implementation=None` (the best one for the platform),
"fastest" (that may differ in last bits from run to run) or a name from
`available(operation)`; "reference" always works. See `api`.
"""
from pallas_kernels.api import (
  attention,
  available,
  block_mass,
  block_peak,
  block_top_k,
  compressed_attention,
  compressed_top_k,
  index_kl,
  index_top_k,
  lightning_kl,
  lightning_scores,
  paged_attention,
  selected_attention,
  token_attention,
  token_top_k,
)
from pallas_kernels.partition import partitioned

__all__ = (
    "attention",
    "available",
    "block_mass",
    "block_peak",
    "block_top_k",
    "compressed_attention",
    "compressed_top_k",
    "index_kl",
    "index_top_k",
    "lightning_kl",
    "lightning_scores",
    "paged_attention",
    "partitioned",
    "selected_attention",
    "token_attention",
    "token_top_k",
)
