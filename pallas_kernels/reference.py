"""The truth: every operation in plain jnp, with float32 scores, softmax and sums.

The functions here take the arguments of `pallas_kernels.api`, which documents
and validates them, and define the result that every kernel is compared with.
They are dense and masked: each works on [B, K, G, T, S] scores and hides what
was not selected (masked.py). Where positions are known ahead, queries go through
in a few parts that each leave out the keys that causality or the window hides from
all of the part. Once the scores of all parts would hold more than `MAX_SCORES`
numbers each goes through in chunks of queries.
"""
from __future__ import annotations

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import masked, spans

PART_QUERIES = 128  # least queries of a part, and the most parts: each is compiled on its own
MAX_PARTS = 4


# --- the operations -----------------------------------------------------------


def attention(q, k, v, *, causal=True, window=None, scale=None, segment_ids=None, query_offset=0):
  """Dense or sliding-window attention; see `api.attention`."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)

  def part(keys, q, pos, seg):
    mask = masked.visible_tokens(pos, seg, keys, segment_ids, causal=causal, window=window)
    return masked.attend(q, k[:, keys], v[:, keys], mask[:, None], scale)

  offset = query_offset if causal else None
  return _over_queries(part, k.shape[1], offset, window, q, pos, seg)


def compressed_attention(q, k_cmp, v_cmp, *, block_len, block_stride, scale=None, segment_ids=None,
                         query_offset=0):
  """Attention over compressed keys; see `api.compressed_attention`."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)

  def part(keys, q, pos, seg):
    mask = _visible_compressed(pos, seg, k_cmp.shape[1], segment_ids, block_len, block_stride)
    return masked.attend(q, k_cmp, v_cmp, mask[:, None], scale)

  return _over_queries(part, k_cmp.shape[1], None, None, q, pos, seg)


def compressed_top_k(q, k_cmp, lse, *, block_len, block_stride, block_size, num_blocks, num_initial=1,
                     num_local=2, scale=None, segment_ids=None, query_offset=0):
  """Block selection from compressed attention; see `api.compressed_top_k`."""
  q, k_cmp, lse = map(lax.stop_gradient, (q, k_cmp, lse))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  T, C = q.shape[1], k_cmp.shape[1]
  pos, seg = _query_positions(T, query_offset, segment_ids)
  S = spans.compressed_tokens(T, C, segment_ids, query_offset, block_len=block_len, block_stride=block_stride)
  if isinstance(query_offset, int):
    S = min(S, T + query_offset + min(block_stride, block_size))  # what lies past the queries is invisible
  weights = overlap_weights(C, -(-S // block_size), block_len, block_stride, block_size)

  def part(keys, q, lse, pos, seg):
    mask = _visible_compressed(pos, seg, C, segment_ids, block_len, block_stride)
    p = masked.probabilities(q, k_cmp, lse, mask[:, None], scale).sum(axis=2)  # over the heads of the group
    scores = masked.einsum("bktc,cj->btkj", p, weights)
    visible = _visible_blocks(pos, seg, S, segment_ids, block_size)
    return _choose(scores, visible, pos, block_size, num_blocks, num_initial, num_local)

  return _over_queries(part, max(C, 0 if segment_ids is None else S), None, None, q, lse, pos, seg)


def index_top_k(q_idx, k_idx, *, block_size, num_blocks, num_initial=0, num_local=1, scale=None,
                segment_ids=None, query_offset=0):
  """Block selection from an index branch; see `api.index_top_k`."""
  q_idx, k_idx = lax.stop_gradient(q_idx), lax.stop_gradient(k_idx)
  scale = 1.0 if scale is None else scale
  pos, seg = _query_positions(q_idx.shape[1], query_offset, segment_ids)

  def part(keys, q_idx, pos, seg):
    mask = masked.visible_tokens(pos, seg, keys, segment_ids)
    s = _index_scores(q_idx, k_idx[:, keys], scale)  # [B, K, T, S]
    s = jnp.where(mask[:, None] & ~jnp.isnan(s), s, -jnp.inf)
    scores = masked.by_block(s, block_size, -jnp.inf).max(axis=-1).transpose(0, 2, 1, 3)
    visible = masked.by_block(mask, block_size, False).any(axis=-1)
    return _choose(scores, visible, pos, block_size, num_blocks, num_initial, num_local)

  return _over_queries(part, k_idx.shape[1], query_offset, None, q_idx, pos, seg)


def selected_attention(q, k, v, block_indices, *, block_size, scale=None, segment_ids=None, query_offset=0):
  """Attention over the tokens of selected blocks; see `api.selected_attention`."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)

  def part(keys, q, block_indices, pos, seg):
    mask = _selected_tokens(block_indices, pos, seg, keys, segment_ids, block_size)
    return masked.attend(q, k[:, keys], v[:, keys], mask, scale)

  return _over_queries(part, k.shape[1], query_offset, None, q, block_indices, pos, seg)


def paged_attention(q, k_pages, v_pages, page_table, *, block_indices=None, window=None, scale=None, query_offset=0):
  """Attention over a cache of pages; see `api.paged_attention`."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  (B, blocks), (pages, size) = page_table.shape, k_pages.shape[:2]
  there = (page_table >= 0) & (page_table < pages)
  k, v = (x[jnp.where(there, page_table, 0)].reshape(B, blocks * size, *x.shape[2:]) for x in (k_pages, v_pages))
  there = jnp.repeat(there, size, axis=1)[:, None, None]  # [B, 1, 1, S]
  pos, _ = _query_positions(q.shape[1], query_offset, None)

  def part(keys, q, block_indices, pos):
    if block_indices is None:
      mask = masked.visible_tokens(pos, None, keys, None, window=window)[:, None]
    else:
      mask = _selected_tokens(block_indices, pos, None, keys, None, size)
    return masked.attend(q, k[:, keys], v[:, keys], mask & there[..., keys], scale)

  return _over_queries(part, blocks * size, query_offset, window, q, block_indices, pos)


def index_kl(q, k, lse, q_idx, k_idx, block_indices, *, block_size, scale=None, index_scale=None,
             segment_ids=None, query_offset=0):
  """KL from the main attention to the index branch; see `api.index_kl`."""
  q, k, lse = map(lax.stop_gradient, (q, k, lse))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  index_scale = q_idx.shape[-1] ** -0.5 if index_scale is None else index_scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)

  def part(keys, q, lse, q_idx, block_indices, pos, seg):
    mask = _selected_tokens(block_indices, pos, seg, keys, segment_ids, block_size)  # [B, K, T, S]
    target = masked.probabilities(q, k[:, keys], lse, mask, scale).mean(axis=2)  # [B, K, T, S], a mean over heads
    loss = masked.kl(target, _index_scores(q_idx, k_idx[:, keys], index_scale), mask)
    return loss.transpose(0, 2, 1)

  return _over_queries(part, k.shape[1], query_offset, None, q, lse, q_idx, block_indices, pos, seg)


def lightning_scores(q_idx, index_weights, k_idx, *, block_size, segment_ids=None, query_offset=0):
  """The best score of each block by several index heads; see `api.lightning_scores`."""
  q_idx, index_weights, k_idx = map(lax.stop_gradient, (q_idx, index_weights, k_idx))
  pos, seg = _query_positions(q_idx.shape[1], query_offset, segment_ids)

  def part(keys, q_idx, weights, pos, seg):
    mask = masked.visible_tokens(pos, seg, keys, segment_ids)[:, None]
    s = jnp.where(mask, masked.weighted_scores(q_idx, weights, k_idx), -jnp.inf)
    return masked.by_block(s, block_size, -jnp.inf).max(axis=-1).transpose(0, 2, 1, 3)

  heads = q_idx.shape[2] * q_idx.shape[3]
  return _over_queries(part, k_idx.shape[1], None, None, q_idx, index_weights, pos, seg, heads=heads)


def token_top_k(q_idx, index_weights, k_idx, *, num_tokens, segment_ids=None, query_offset=0):
  """Selection of single tokens by several index heads; see `api.token_top_k`."""
  q_idx, index_weights, k_idx = map(lax.stop_gradient, (q_idx, index_weights, k_idx))
  pos, seg = _query_positions(q_idx.shape[1], query_offset, segment_ids)
  S = k_idx.shape[1]

  def part(keys, q_idx, weights, pos, seg):
    scores = masked.weighted_scores(q_idx, weights, k_idx).transpose(0, 2, 1, 3)
    visible = masked.visible_tokens(pos, seg, keys, segment_ids)
    tokens = _choose(scores, visible, pos, 1, min(num_tokens, S), 0, 0)
    return masked.packed(masked.selected_tokens(tokens, 1, S)).swapaxes(1, 2)

  return _over_queries(part, S, None, None, q_idx, index_weights, pos, seg, heads=q_idx.shape[2] * q_idx.shape[3])


def token_attention(q, k, v, token_sets, *, scale=None):
  """Attention over sets of tokens; see `api.token_attention`."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale

  def part(keys, q, sets):
    return masked.attend(q, k, v, masked.unpacked(sets, k.shape[1]).swapaxes(1, 2), scale)

  return _over_queries(part, k.shape[1], None, None, q, token_sets)


def lightning_kl(q, k, lse, q_idx, index_weights, k_idx, block_indices, *, token_sets=None, block_size=1, scale=None,
                 segment_ids=None, query_offset=0):
  """KL from the main attention to several index heads; see `api.lightning_kl`."""
  q, k, lse = map(lax.stop_gradient, (q, k, lse))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)
  R = q_idx.shape[2]

  def part(keys, q, lse, q_idx, weights, block_indices, sets, pos, seg):
    mask = _selected_tokens(block_indices, pos, seg, keys, segment_ids, block_size)
    if sets is not None:
      mask &= masked.unpacked(sets, keys.stop).swapaxes(1, 2)  # such slices begin at 0
    target = masked.probabilities(q, k[:, keys], lse, mask, scale).sum(axis=2)  # [B, K, T, S]
    if R == 1:
      target, mask = target.sum(axis=1, keepdims=True), mask.any(axis=1, keepdims=True)
    return masked.kl(target, masked.weighted_scores(q_idx, weights, k_idx[:, keys]), mask).transpose(0, 2, 1)

  heads = max(q.shape[2], R * q_idx.shape[3])
  return _over_queries(part, k.shape[1], query_offset, None, q, lse, q_idx, index_weights, block_indices, token_sets,
                       pos, seg, heads=heads)


def block_top_k(scores, *, block_size, num_blocks, num_initial=0, num_local=1, keys=None, segment_ids=None,
                query_offset=0):
  """Block selection from given scores; see `api.block_top_k`."""
  pos, seg = _query_positions(scores.shape[1], query_offset, segment_ids)
  S = scores.shape[3] * block_size if keys is None else keys

  def part(keys, scores, pos, seg):
    visible = _visible_blocks(pos, seg, keys.stop, segment_ids, block_size)
    return _choose(scores.astype(jnp.float32), visible, pos, block_size, num_blocks, num_initial, num_local)

  return _over_queries(part, S, None, None, lax.stop_gradient(scores), pos, seg)


def block_mass(q, k, lse, *, block_size, scale=None, segment_ids=None, query_offset=0):
  """Where dense attention puts its mass, by block; see `api.block_mass`."""
  q, k, lse = map(lax.stop_gradient, (q, k, lse))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)

  def part(keys, q, lse, pos, seg):
    mask = masked.visible_tokens(pos, seg, keys, segment_ids)[:, None]
    p = masked.probabilities(q, k, lse, mask, scale)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1).mean(axis=2)
    mass = masked.by_block(p.mean(axis=2), block_size, 0.0).sum(axis=-1)
    return mass.transpose(0, 2, 1, 3), entropy.transpose(0, 2, 1)

  return _over_queries(part, k.shape[1], None, None, q, lse, pos, seg)  # all blocks in each row: one part


def block_peak(q, k, lse, block_indices=None, *, block_size, scale=None, segment_ids=None, query_offset=0):
  """The largest probability in each block; see `api.block_peak`."""
  q, k, lse = map(lax.stop_gradient, (q, k, lse))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  pos, seg = _query_positions(q.shape[1], query_offset, segment_ids)

  def part(keys, q, lse, block_indices, pos, seg):
    mask = _selected_tokens(block_indices, pos, seg, keys, segment_ids, block_size)
    p = masked.probabilities(q, k, lse, mask, scale).max(axis=2)
    return masked.by_block(p, block_size, 0.0).max(axis=-1).transpose(0, 2, 1, 3)

  return _over_queries(part, k.shape[1], None, None, q, lse, block_indices, pos, seg)


# --- what they share ----------------------------------------------------------


def overlap_weights(num_compressed, num_blocks, block_len, block_stride, block_size):
  """float32[C, blocks]: tokens that compressed and selection blocks share, in strides.

  For lengths 32, 16, 64 selection block j collects the compressed blocks
  4j - 1 .. 4j + 3 with weights 1, 2, 2, 2, 1.
  """
  start = np.arange(num_compressed)[:, None] * block_stride
  first = np.arange(num_blocks)[None, :] * block_size
  shared = np.minimum(start + block_len, first + block_size) - np.maximum(start, first)
  return (np.maximum(shared, 0) / block_stride).astype(np.float32)


def _index_scores(q_idx_BTKH, k_idx_BSH, scale):
  """Scaled index scores, float32[B, K, T, S]."""
  return masked.einsum("bkth,bsh->bkts", q_idx_BTKH.astype(jnp.float32).transpose(0, 2, 1, 3) * scale, k_idx_BSH)


def _query_positions(T, query_offset, segment_ids):
  """Absolute positions int32[1 or B, T] and segments int32[B, T] (None without segments) of the queries."""
  offset = jnp.asarray(query_offset, jnp.int32).reshape(-1, 1)
  pos = offset + jnp.arange(T, dtype=jnp.int32)
  if segment_ids is None:
    return pos, None
  at = jnp.broadcast_to(pos, (segment_ids.shape[0], T))
  return pos, jnp.take_along_axis(segment_ids, at, axis=1, mode="clip")


def _visible_compressed(pos, seg, C, segment_ids, block_len, block_stride):
  """bool[1 or B, T, C]: compressed blocks that are complete and, with segments, of one segment."""
  start = jnp.arange(C, dtype=jnp.int32) * block_stride
  mask = start + (block_len - 1) <= pos[:, :, None]
  if segment_ids is not None:
    tokens = start[:, None] + jnp.arange(min(block_len, segment_ids.shape[1]), dtype=jnp.int32)
    ids = jnp.take(segment_ids, tokens, axis=1, mode="clip")  # [B, C, block_len]
    alike = (ids == ids[..., :1]).all(axis=-1)
    mask &= (seg[:, :, None] == ids[:, None, :, 0]) & alike[:, None]
  return mask


def _visible_blocks(pos, seg, S, segment_ids, block_size):
  """bool[1 or B, T, blocks]: blocks with at least one token the query may see."""
  if segment_ids is None:
    return jnp.arange(-(-S // block_size), dtype=jnp.int32) * block_size <= pos[:, :, None]
  return masked.by_block(masked.visible_tokens(pos, seg, slice(0, S), segment_ids), block_size, False).any(axis=-1)


def _choose(scores_BTKj, visible_BTj, pos, block_size, num_blocks, num_initial, num_local):
  """int32[B, T, K, J]: forced blocks, then the best of the rest; -1 where fewer are visible."""
  blocks = jnp.arange(visible_BTj.shape[-1], dtype=jnp.int32)
  own = pos[:, :, None] // block_size
  forced = visible_BTj & (blocks > own - num_local)
  if num_initial:
    forced |= visible_BTj & (jnp.cumsum(visible_BTj, axis=-1, dtype=jnp.int32) <= num_initial)
  big = jnp.finfo(jnp.float32).max
  # Clipped, so that no score passes for forced or invisible. -0 becomes 0: top_k orders them, a tie does not.
  scores = jnp.clip(jnp.where(scores_BTKj == 0, 0.0, scores_BTKj), -big, big)
  scores = jnp.where(jnp.isnan(scores), big, scores)
  scores = jnp.where(forced[:, :, None], jnp.inf, jnp.where(visible_BTj[:, :, None], scores, -jnp.inf))
  best, indices = lax.top_k(scores, min(num_blocks, scores.shape[-1]))
  indices = jnp.where(best > -jnp.inf, indices, -1).astype(jnp.int32)
  missing = num_blocks - indices.shape[-1]
  return jnp.pad(indices, [(0, 0)] * 3 + [(0, missing)], constant_values=-1) if missing else indices


def _selected_tokens(block_indices, pos, seg, keys, segment_ids, block_size):
  """bool[B, K or 1, T, S]: visible tokens of the selected blocks (of all blocks without indices)."""
  visible = masked.visible_tokens(pos, seg, keys, segment_ids)[:, None]
  if block_indices is None:
    return visible
  return masked.selected_tokens(block_indices, block_size, keys.stop) & visible  # such slices begin at 0


def _over_queries(part, S, offset, window, *xs, heads=None):
  """part(keys, *xs) over all queries, where axis 1 of each x is the query and `keys` the slice of S it needs.

  With a static `offset` (the position of the first query; keys are causal) the queries are cut so that each
  part leaves out the keys none of its queries sees; else one part takes all keys. `heads`: scores per pair of tokens,
  those of the first x if not told.
  """
  (B, T), heads = xs[0].shape[:2], heads or xs[0].shape[2]
  static = isinstance(offset, (int, np.integer))
  parts = min(MAX_PARTS, max(1, T // PART_QUERIES)) if static else 1
  edges = [T * i // parts for i in range(parts + 1)]
  slices = []
  for first, last in zip(edges[:-1], edges[1:]):
    start = int(offset) + first - window + 1 if static and window is not None else 0
    stop = int(offset) + last if static else S
    slices.append((slice(first, last), slice(min(max(start, 0), S), min(stop, S))))
  row = lambda keys: max(1, B * heads * (keys.stop - keys.start))  # scores of one query position
  total = sum((queries.stop - queries.start) * row(keys) for queries, keys in slices)
  results = []
  for queries, keys in slices:
    f = functools.partial(part, keys)
    ys = jax.tree.map(lambda x: x[:, queries], xs)
    results.append(f(*ys) if total <= masked.MAX_SCORES
                   else masked.in_chunks(f, max(1, masked.MAX_SCORES // row(keys)), *ys))
  return results[0] if parts == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys, axis=1), *results)
