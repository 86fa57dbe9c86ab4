"""What shapes and block indices come to, in NumPy: visible scores, tiles that hold some, unions of neighbours."""
from __future__ import annotations

import numpy as np


def runs(spec, operation):
  """Begin and end, int[T] each, of the keys (compressed blocks) that each query sees; and how many keys."""
  pos = np.arange(spec.T)
  if operation == "compressed":
    end = np.clip((pos - spec.block_len + 1) // spec.block_stride + 1, 0, spec.num_compressed)
    return np.zeros_like(pos), end, spec.num_compressed
  begin = np.maximum(pos - spec.window + 1, 0) if operation == "window" else np.zeros_like(pos)
  return begin, pos + 1, spec.T


def visited(begin, end, tile_queries, tile_keys):
  """Pairs of tiles that hold a visible score, of one head: how many, and per tile of queries int[tiles]."""
  pad = -len(begin) % tile_queries
  begin, end = (np.pad(x, (0, pad)).reshape(-1, tile_queries) for x in (begin, end))
  some = begin < end
  first = np.where(some, begin, 2 ** 30).min(axis=1) // tile_keys
  stop = -(-np.where(some, end, 0).max(axis=1) // tile_keys)
  per_tile = np.where(stop > 0, stop - first, 0)
  return int(per_tile.sum()), per_tile


def union_sizes(indices, tokens):
  """int[tiles of all sequences and KV heads]: different blocks that each tile of `tokens` queries chose."""
  tiles = np.sort(_tiles(indices, tokens), axis=1)
  new = np.concatenate([np.ones_like(tiles[:, :1], bool), tiles[:, 1:] != tiles[:, :-1]], axis=1)
  return (new & (tiles >= 0)).sum(axis=1)


def shared(indices, tokens, blocks, least):
  """Blocks that at least `least` tokens of a tile chose: int[tiles], and the choices that they cover: int[tiles]."""
  tiles = _tiles(indices, tokens)
  at = np.arange(len(tiles))[:, None] * blocks + tiles
  votes = np.bincount(at[tiles >= 0], minlength=len(tiles) * blocks).reshape(len(tiles), blocks)
  return (votes >= least).sum(axis=1), np.where(votes >= least, votes, 0).sum(axis=1)


def lists(indices, slice_queries, range_queries, blocks):
  """int[lists that are not empty]: choices per (sequence, KV head, range of queries, block)."""
  B, T, K, _ = indices.shape
  t = np.arange(T)
  ranges = -(-slice_queries // range_queries)
  at = t // slice_queries * ranges + t % slice_queries // range_queries
  owner = (np.arange(B)[:, None, None] * (at[-1] + 1) + at[:, None]) * K + np.arange(K)
  key = owner[..., None].astype(np.int64) * blocks + indices
  counts = np.bincount(key[indices >= 0])
  return counts[counts > 0]


def _tiles(indices, tokens):
  B, T, K, J = indices.shape
  x = np.pad(indices, ((0, 0), (0, -T % tokens), (0, 0), (0, 0)), constant_values=-1)
  return x.reshape(B, -1, tokens, K, J).transpose(0, 1, 3, 2, 4).reshape(-1, tokens * J)
