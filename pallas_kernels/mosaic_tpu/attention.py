"""Dense and sliding-window attention on TPUs."""
from __future__ import annotations

from pallas_kernels import spans
from pallas_kernels.mosaic_tpu import flash


def supports(q, k, v, *, window=None, scale=None, **_):
  """None, or why these arguments need another implementation; begins with the argument's name."""
  return flash.refuses(q, k, v, scale) or flash.refuses_tables(q, k, window)


def attention(q, k, v, *, causal=True, window=None, scale=None, segment_ids=None, query_offset=0, tiles=None,
              interpret=False):
  """Softmax attention, dense or over a sliding window; see `pallas_kernels.api.attention`.

  Args:
    tiles, interpret: as in `flash.attend`.
  """
  pos = spans.positions(q.shape[1], query_offset, q.shape[0])
  begin, end = spans.of_tokens(pos, k.shape[1], segment_ids, causal=causal, window=window)
  return flash.attend(q, k, v, begin, end, scale=q.shape[3] ** -0.5 if scale is None else scale, window=window,
                      tiles=tiles, interpret=interpret)
