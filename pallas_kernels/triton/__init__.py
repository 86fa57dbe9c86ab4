"""Kernels for Ampere and Hopper GPUs in Triton.

Importing registers them; it needs triton, but neither a GPU nor jaxlib's CUDA plugin, without which `supports` refuses.
"""
from __future__ import annotations

from pallas_kernels import backends, head_dims
from pallas_kernels.triton import call, kl, lightning, mass, paged, ranged, selected, tokens, top_k

for _operation, _function, _supports in (
    ("attention", ranged.attention, ranged.supports_attention),
    ("compressed_attention", ranged.compressed_attention, ranged.supports_compressed_attention),
    ("compressed_top_k", top_k.compressed_top_k, top_k.supports_compressed_top_k),
    ("index_top_k", top_k.index_top_k, top_k.supports_index_top_k),
    ("lightning_kl", lightning.lightning_kl, lightning.supports_lightning_kl),
    ("lightning_scores", lightning.lightning_scores, lightning.supports_lightning_scores),
    ("token_attention", tokens.token_attention, tokens.supports_token_attention),
    ("token_top_k", tokens.token_top_k, tokens.supports_token_top_k),
    ("block_top_k", top_k.block_top_k, top_k.supports_block_top_k),
    ("selected_attention", selected.selected_attention, selected.supports_selected_attention),
    ("paged_attention", paged.paged_attention, paged.supports_paged_attention),
    ("index_kl", kl.index_kl, kl.supports_index_kl),
    ("block_mass", mass.block_mass, mass.supports_block_mass),
    ("block_peak", mass.block_peak, mass.supports_block_mass),
):
  backends.register(
      _operation, "triton", head_dims.pad(_function, call.padded_head_dim, gives_rows=_operation.endswith("attention")),
      platforms=("gpu",), supports=head_dims.supports(_supports, call.padded_head_dim))
