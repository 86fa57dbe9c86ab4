"""Slow float64 NumPy oracles of every operation, one query at a time, from the definitions.

They share no code with `pallas_kernels`. Every kernel backend may be compared with them.
"""
import numpy as np

NEG = -np.inf


def positions(T, query_offset, b):
  offset = int(query_offset[b] if np.ndim(query_offset) else query_offset)
  return [offset + t for t in range(T)]


def token_sees(b, pos, s, segment_ids, causal=True, window=None):
  """Whether the query at `pos` of sequence b may see token s."""
  if causal and s > pos:
    return False
  if window is not None and pos - s >= window:
    return False
  return segment_ids is None or segment_ids[b][pos] == segment_ids[b][s]


def dense_sets(B, T, K, S, segment_ids=None, query_offset=0, causal=True, window=None):
  """sets[b][t][r]: the visible tokens."""
  out = [[None] * T for _ in range(B)]
  for b in range(B):
    for t, pos in enumerate(positions(T, query_offset, b)):
      out[b][t] = [[s for s in range(S) if token_sees(b, pos, s, segment_ids, causal, window)]] * K
  return out


def selected_sets(block_indices, block_size, S, segment_ids=None, query_offset=0):
  """sets[b][t][r]: the visible tokens of the selected blocks."""
  B, T, K, _ = block_indices.shape
  out = [[None] * T for _ in range(B)]
  for b in range(B):
    for t, pos in enumerate(positions(T, query_offset, b)):
      out[b][t] = []
      for r in range(K):
        blocks = sorted({int(j) for j in block_indices[b, t, r] if j >= 0})
        tokens = [s for j in blocks for s in range(j * block_size, min((j + 1) * block_size, S))]
        out[b][t].append([s for s in tokens if token_sees(b, pos, s, segment_ids)])
  return out


def token_sets(words, K, S):
  """sets[b][t][r]: the tokens whose bits are set in int32[B, T, 1 or K, words]."""
  tokens = lambda row: [s for s in range(S) if int(row[s // 32]) >> s % 32 & 1]
  return [[[tokens(row[r % len(row)]) for r in range(K)] for row in rows] for rows in words]


def compressed_sets(B, T, K, C, block_len, block_stride, segment_ids=None, query_offset=0):
  """sets[b][t][r]: the visible compressed blocks."""
  out = [[None] * T for _ in range(B)]
  for b in range(B):
    for t, pos in enumerate(positions(T, query_offset, b)):
      tokens = lambda c: range(c * block_stride, c * block_stride + block_len)
      seen = [c for c in range(C) if all(token_sees(b, pos, s, segment_ids) for s in tokens(c))]
      out[b][t] = [seen] * K
  return out


def attend(q, k, v, sets, scale, do=None, dlse=None):
  """o, lse and, with cotangents, dq, dk, dv by the formulas of the softmax."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (B, T, N, H), K = q.shape, k.shape[2]
  o, lse = np.zeros((B, T, N, H)), np.full((B, T, N), NEG)
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b in range(B):
    for t in range(T):
      for n in range(N):
        r = n // (N // K)
        tokens = sets[b][t][r]
        if not tokens:
          continue
        s = scale * k[b, tokens, r] @ q[b, t, n]
        lse[b, t, n] = s.max() + np.log(np.exp(s - s.max()).sum())
        p = np.exp(s - lse[b, t, n])
        o[b, t, n] = p @ v[b, tokens, r]
        if do is None:
          continue
        dp = v[b, tokens, r] @ do[b, t, n]
        ds = p * (dp - do[b, t, n] @ o[b, t, n] + (0 if dlse is None else dlse[b, t, n]))
        dq[b, t, n] = scale * ds @ k[b, tokens, r]
        dk[b, tokens, r] += scale * np.outer(ds, q[b, t, n])
        dv[b, tokens, r] += np.outer(p, do[b, t, n])
  return (o, lse) if do is None else (o, lse, dq, dk, dv)


def index_kl(q, k, q_idx, k_idx, sets, scale, index_scale, dloss):
  """loss, dq_idx, dk_idx; the target is made from the scores, not from an lse."""
  q, k, q_idx, k_idx = (np.asarray(x, np.float64) for x in (q, k, q_idx, k_idx))
  (B, T, N, _), K = q.shape, k.shape[2]
  loss, dq, dk = np.zeros((B, T, K)), np.zeros_like(q_idx), np.zeros_like(k_idx)
  for b in range(B):
    for t in range(T):
      for r in range(K):
        tokens = sets[b][t][r]
        if not tokens:
          continue
        target = np.mean([softmax(scale * k[b, tokens, r] @ q[b, t, n])
                          for n in range(r * (N // K), (r + 1) * (N // K))], axis=0)
        p = softmax(index_scale * k_idx[b, tokens] @ q_idx[b, t, r])
        loss[b, t, r] = sum(x * np.log(x / y) for x, y in zip(target, p) if x > 0)
        ds = index_scale * (p - target) * dloss[b, t, r]
        dq[b, t, r] = ds @ k_idx[b, tokens]
        dk[b, tokens] += np.outer(ds, q_idx[b, t, r])
  return loss, dq, dk


def softmax(s):
  e = np.exp(s - s.max())
  return e / e.sum()


def visible_blocks(b, pos, blocks, block_size, S, segment_ids):
  return [j for j in range(blocks) if any(token_sees(b, pos, s, segment_ids)
                                          for s in range(j * block_size, min((j + 1) * block_size, S)))]


def index_block_scores(q_idx, k_idx, block_size, segment_ids=None, query_offset=0):
  """float64[B, T, K, blocks]: the best visible score of each block, -inf for blocks with none."""
  q_idx, k_idx = np.asarray(q_idx, np.float64), np.asarray(k_idx, np.float64)
  (B, T, K, _), S = q_idx.shape, k_idx.shape[1]
  out = np.full((B, T, K, -(-S // block_size)), NEG)
  for b in range(B):
    for t, pos in enumerate(positions(T, query_offset, b)):
      for r in range(K):
        for s in range(S):
          if token_sees(b, pos, s, segment_ids):
            j = s // block_size
            out[b, t, r, j] = max(out[b, t, r, j], q_idx[b, t, r] @ k_idx[b, s])
  return out


def compressed_block_scores(q, k_cmp, block_len, block_stride, block_size, S, scale, segment_ids=None,
                            query_offset=0):
  """float64[B, T, K, blocks]: p_cmp by shared tokens in strides, summed over heads; -inf if invisible."""
  q, k = np.asarray(q, np.float64), np.asarray(k_cmp, np.float64)
  (B, T, N, _), (C, K) = q.shape, k.shape[1:3]
  blocks = -(-S // block_size)
  sets = compressed_sets(B, T, K, C, block_len, block_stride, segment_ids, query_offset)
  out = np.full((B, T, K, blocks), NEG)
  for b in range(B):
    for t, pos in enumerate(positions(T, query_offset, b)):
      seen = visible_blocks(b, pos, blocks, block_size, S, segment_ids)
      for r in range(K):
        out[b, t, r, seen] = 0.0
        for n in range(r * (N // K), (r + 1) * (N // K)):
          cs = sets[b][t][r]
          if not cs:
            continue
          for c, p in zip(cs, softmax(scale * k[b, cs, r] @ q[b, t, n])):
            for s in range(c * block_stride, c * block_stride + block_len):  # token by token
              if s // block_size < blocks:
                out[b, t, r, s // block_size] += p / block_stride
  return out


def check_selection(indices, scores, num_blocks, num_initial, num_local, block_size, query_offset=0,
                    atol=1e-5, exact=False):
  """Asserts a valid top-k: forced blocks, no duplicate, nothing invisible, full rows, and scores of the best.

  By score, not by index: where two blocks score the same within `atol` either will do, unless the scores are `exact`:
  then the lower one.
  """
  B, T, K, blocks = scores.shape
  assert indices.shape == (B, T, K, num_blocks) and indices.dtype == np.int32
  for b in range(B):
    for t, pos in enumerate(positions(T, query_offset, b)):
      for r in range(K):
        row = scores[b, t, r]
        visible = [j for j in range(blocks) if row[j] > NEG]
        own = pos // block_size
        forced = set(visible[:num_initial]) | {j for j in visible if own - num_local < j <= own}
        chosen = [int(j) for j in indices[b, t, r] if j != -1]
        assert len(set(chosen)) == len(chosen), (chosen, "duplicates")
        assert set(chosen) <= set(visible), (chosen, visible)
        assert forced <= set(chosen), (chosen, forced)
        assert len(chosen) == min(num_blocks, len(visible)), (chosen, visible)
        if exact:
          best = sorted(set(visible) - forced, key=lambda j: (-row[j], j))[:len(chosen) - len(forced)]
          assert set(chosen) == forced | set(best), (chosen, forced, best)
        free = sorted((row[j] for j in set(chosen) - forced), reverse=True)
        best = sorted((row[j] for j in set(visible) - forced), reverse=True)[:len(free)]
        np.testing.assert_allclose(free, best, atol=atol, rtol=atol)
