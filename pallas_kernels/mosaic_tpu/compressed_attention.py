"""Attention over compressed blocks of keys on TPUs; nothing of the size queries x blocks reaches HBM."""
from __future__ import annotations

from pallas_kernels import spans
from pallas_kernels.mosaic_tpu import flash


def supports(q, k_cmp, v_cmp, *, scale=None, **_):
  """None, or why these arguments need another implementation; begins with the argument's name."""
  return flash.refuses(q, k_cmp, v_cmp, scale, k_name="k_cmp") or flash.refuses_tables(q, k_cmp)


def compressed_attention(q, k_cmp, v_cmp, *, block_len, block_stride, scale=None, segment_ids=None,
                         query_offset=0, tiles=None, interpret=False):
  """Attention over compressed blocks; see `pallas_kernels.api.compressed_attention`.

  Args:
    tiles, interpret: as in `flash.attend`.
  """
  pos = spans.positions(q.shape[1], query_offset, q.shape[0])
  begin, end = spans.of_compressed(pos, k_cmp.shape[1], segment_ids, block_len=block_len,
                                       block_stride=block_stride)
  return flash.attend(q, k_cmp, v_cmp, begin, end, scale=q.shape[3] ** -0.5 if scale is None else scale,
                      tiles=tiles, interpret=interpret)
