"""Kernels for TPUs (v5e, v5p, v6e, tpu7x) in Pallas Mosaic: VMEM tiles, copies by hand, the matrix unit.

Importing registers them; it works without a TPU. No TPU was at hand when they were written: numbers are
checked in the interpreter on a CPU, and libtpu compiles every kernel for each chip (`aot`). Left to the reference:
`block_top_k` and `block_mass`, which evaluation alone calls, `index_kl` over all tokens (warm-up), and what Seer's and
DSA's losses, DSA's choice and its sets of tokens call (`block_peak`, `lightning_kl`, `lightning_scores`, `token_top_k`,
`token_attention`).
"""
from __future__ import annotations

from pallas_kernels import backends, head_dims
from pallas_kernels.mosaic_tpu import attention, compressed_attention, compressed_top_k, index_top_k, kl, selected

KERNELS = {  # operation -> its module, which has a function of that name and `supports` of the same arguments
    "attention": attention,
    "compressed_attention": compressed_attention,
    "compressed_top_k": compressed_top_k,
    "index_top_k": index_top_k,
    "selected_attention": selected,
    "index_kl": kl,
}

for _operation, _module in KERNELS.items():
  _function, _supports = getattr(_module, _operation), _module.supports
  if _module in (selected, kl):  # the walks over selected blocks
    _how = dict(padded=selected.padded_head_dim, names=("q", "k", "v"))
    _function = head_dims.pad(_function, gives_rows=_module is selected, **_how)
    _supports = head_dims.supports(_supports, **_how)
  backends.register(_operation, "mosaic_tpu", _function, platforms=("tpu",), supports=_supports)
