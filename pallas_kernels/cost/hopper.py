"""The work of the kernels that Hopper GPUs run: pallas_kernels.mosaic_gpu, .triton, and cuDNN's attention.

HBM traffic counts what does not fit the L2 cache (50 MB): partial results are written and read again, K and V of
one KV head and the queries of one range are read once.
"""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cost import counts
from pallas_kernels.cost.chips import Kernel

# Query rows of a tile, keys of a block, stages: the defaults of pallas_kernels.triton.tuning, which needs Triton.
TRITON = {"range_forward": (128, 64, 3), "range_dq": (128, 64, 2), "compressed_scores": (128, 64, 2),
          "index_scores": (64, 128, 3)}
SORT_BYTES = 80  # per choice: passes of a radix sort over key and payload, and the lists made of it


def _size(spec):
  return jnp.dtype(spec.dtype).itemsize


def _scores(spec, operation, tile_queries, tile_keys):
  """Scores of the tiles that hold a visible one, all heads."""
  begin, end, keys = counts.runs(spec, operation)
  pairs, _ = counts.visited(begin, end, tile_queries, tile_keys)
  return float(pairs) * tile_queries * tile_keys * spec.B * spec.N, keys


def run_attention(spec, chip, operation, backward):
  """Dense attention is cuDNN's, counted at its best (tiles of 128 x 128, five products backward); the window and
  compressed attention are Triton's, whose backward pass computes the scores twice."""
  del chip
  dense = operation == "dense"
  rows, block, stages = TRITON["range_dq" if backward else "range_forward"]
  tile = (128, 128) if dense else (max(1, rows // spec.G), block)
  scores, keys = _scores(spec, operation, *tile)
  size = _size(spec)
  q, k = size * spec.B * spec.T * spec.N * spec.H, size * spec.B * keys * spec.K * spec.H
  name = ("cudnn_" if dense else "range_attention_") + ("backward" if backward else "forward")
  per_row = size * spec.H  # on chip: a tile of queries, and K and V as deep as the pipeline (cuDNN does not say)
  how = dict(on_chip=0 if dense else per_row * (rows * (2 if backward else 1) + 2 * stages * block))
  if backward:
    return [Kernel(name, flops=(10 if dense else 14) * scores * spec.H, bytes=(4 if dense else 7) * q + 4 * k,
                   vector=(1 if dense else 2) * scores, **how)]
  return [Kernel(name, flops=4 * scores * spec.H, bytes=2 * q + 2 * k, vector=scores, **how)]


def compressed_top_k(spec, chip):
  del chip
  rows, block, stages = TRITON["compressed_scores"]
  scores, keys = _scores(spec, "compressed", max(1, rows // spec.G), block)
  size = _size(spec)
  return [Kernel("compressed_top_k", flops=2 * scores * spec.H, vector=scores,
                 on_chip=size * spec.H * (rows + stages * block),
                 bytes=size * spec.B * spec.H * (spec.T * spec.N + keys * spec.K)
                 + 4 * spec.B * spec.T * spec.K * spec.J)]


def index_top_k(spec, chip):
  del chip
  rows, block, stages = TRITON["index_scores"]
  scores = _scores(spec, "dense", max(1, rows // spec.K), block)[0] / spec.G
  size = _size(spec)
  return [Kernel("index_top_k", flops=2 * scores * spec.index_dim,
                 on_chip=size * spec.index_dim * (rows + stages * block),
                 bytes=size * spec.B * spec.T * spec.index_dim * (spec.K + 1) + 4 * spec.B * spec.T * spec.K * spec.J)]


def selected_attention(spec, chip, indices, backward, common=None):
  """`common`: whether blocks that neighbours share are attended tile by tile; None is what the kernels do."""
  del chip
  from pallas_kernels.lists import BACKWARD_TILES, FORWARD_TILES, TILE_ROWS
  from pallas_kernels.mosaic_gpu import backward as backward_kernels, selected, shared_blocks
  B, T, K, J = indices.shape
  G, H, block, size = spec.G, spec.H, spec.block_size, _size(spec)
  plan, _ = selected._slices(B, T, T, K, G, J, H, block,
                             BACKWARD_TILES if backward else FORWARD_TILES)
  per_list = counts.lists(indices, plan.queries, plan.range_size, plan.blocks)
  q = size * B * T * spec.N * H
  row = size * H + 4  # a partial result and its log-sum-exp
  ranges = -(-T // plan.queries) * plan.ranges
  keys = 2 * size * B * T * K * H * (1 + ranges) / 2  # each range reads what its queries see
  sort = Kernel("entries", bytes=SORT_BYTES * indices.size)

  def tiles_of(per_list):
    return float((-(-per_list // plan.tile_tokens)).sum()) * TILE_ROWS

  def copies(per_list):  # K and V per unit, the group of each token, and what a tile writes
    units, tiles = (-(-per_list // n) for n in (plan.unit_tokens, plan.tile_tokens))
    return float(2 * units.sum() + per_list.sum() + 2 * tiles.sum())

  tile = size * TILE_ROWS * H
  resident = 8 * plan.unit_tokens + 2 * size * block * H

  kernels = []
  if not backward:
    if common is None:
      common = shared_blocks.pays(plan, H)
    choices = float(per_list.sum())
    share = 1.0
    if common:
      tokens = shared_blocks.tokens_of(plan)
      blocks, covered = counts.shared(indices, tokens, plan.blocks, shared_blocks.votes_needed(plan))
      share = 1.0 - covered.sum() / choices
      rows = float(len(blocks)) * shared_blocks.ROWS
      kernels.append(Kernel(
          "selected_attention_common", flops=4 * float(blocks.sum()) * shared_blocks.ROWS * block * H,
          bytes=q + rows * row + 12 * rows + keys / (1 + ranges) * 2,
          vector=float(blocks.sum()) * shared_blocks.ROWS * block, copies=2 * float(blocks.sum()),
          on_chip=4 * tile + 2 * size * block * H * (4 if H * block <= 4096 else 3 if H * block <= 8192 else 2)))
    # What is left of each list; a list that loses its whole choice keeps no tile.
    rest = np.round(per_list * share).astype(int)
    rows = tiles_of(rest[rest > 0])
    partial = choices * share * G
    kernels += [sort, Kernel("selected_attention_forward", flops=4 * rows * block * H, vector=rows * block,
                             bytes=q + keys + rows * row, copies=copies(rest[rest > 0]),
                             on_chip=resident + selected.forward_slots(plan, H) * tile),
                Kernel("selected_attention_combine",
                       bytes=(partial + (B * T * spec.N if common else 0)) * row + q + 4 * indices.size)]
    return kernels
  rows, together = tiles_of(per_list), backward_kernels.shared_by_two(plan, H)
  parts = 1 if together else block // backward_kernels.part_keys(plan)
  units = float((-(-per_list // plan.unit_tokens)).sum())
  sums = units * 2 * 4 * H * block
  gradients = size * rows * H * parts
  return [Kernel("delta", bytes=2 * q), sort,
          Kernel("selected_attention_backward", flops=10 * rows * block * H, vector=rows * block,
                 bytes=2 * q + keys + gradients + sums, copies=parts * copies(per_list),
                 on_chip=resident * (1.5 if together else 1 / parts) + (5 if together else 4) * tile +
                 size * TILE_ROWS * block),
          Kernel("selected_attention_combine", bytes=size * per_list.sum() * G * H * parts + q + 4 * indices.size),
          Kernel("selected_attention_sum_units", bytes=sums + 3 * 2 * 4 * B * T * K * H)]
