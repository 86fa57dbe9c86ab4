"""The operations: what they mean, what they accept, and who computes them.

Letters: B batch, T query time, S key time, N query heads, K KV heads, G = N / K, H head dim, C compressed
blocks, J selected blocks. Query heads r * G .. (r + 1) * G - 1 share KV head r; G is any integer.

What holds for all of them:
* q, k, v are of any floating dtype; scores, softmax and sums are float32; o has q's dtype, lse is the float32
  natural log of the sum of exponentials. A row that sees nothing gives o = 0, lse = -inf and no gradient.
* `query_offset` (int, int32 scalar or int32[B]; may be traced) is the absolute position of the first query.
  Keys past a query's position are invisible, so k and v may be a preallocated cache; they have to be finite.
* `segment_ids` (int32[B, S], over key positions) packs documents: a query sees only its own id. Queries take
  the ids from `query_offset` on. Ids are expected to be contiguous runs.
* Blocks lie on the absolute grid [j * block_size, (j + 1) * block_size); the last one may be partial.
* `block_indices` is int32[B, T, K, J]; -1 pads, order is free, duplicates count once. Within a selected block
  tokens are still masked causally and by segment.
* `implementation` is None (the best one for the platform that serves the arguments, logged once on logger
  "pallas_kernels") or a name from `available(operation)`.

All raise ValueError for arguments that make no sense and for unknown implementations, NotImplementedError for
a named implementation that cannot serve the arguments.
"""
from __future__ import annotations

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends
from pallas_kernels import partition
from pallas_kernels import reference
from pallas_kernels.backends import available
from pallas_kernels.backends import register
from pallas_kernels.backends import target_platform

__all__ = ("attention", "available", "block_mass", "block_top_k", "compressed_attention", "compressed_top_k",
           "index_kl", "index_top_k", "register", "selected_attention", "target_platform")


def attention(q, k, v, *, causal=True, window=None, scale=None, segment_ids=None, query_offset=0,
              implementation=None):
  """Softmax attention, dense or over a sliding window.

  Args:
    q: [B, T, N, H].
    k, v: [B, S, K, H].
    causal: False shows every key (of the segment) to every query.
    window: tokens a query sees, its own included; None for all. Needs causal.
    scale: of the scores; None is H ** -0.5.
    segment_ids, query_offset, implementation: see the module.

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N], both differentiable.
  """
  _check_attention("attention", q, k, v)
  _check_common("attention", q, k.shape[1], segment_ids, query_offset)
  if window is not None:
    _check_int("attention", "window", window, 1, "tokens, the query's own included")
    if not causal:
      raise ValueError(f"attention: window = {window} needs causal = True")
  return _run("attention", implementation, q=q, k=k, v=v, causal=bool(causal), window=window,
              scale=_scale(scale, q), segment_ids=segment_ids, query_offset=query_offset)


def compressed_attention(q, k_cmp, v_cmp, *, block_len, block_stride, scale=None, segment_ids=None,
                         query_offset=0, implementation=None):
  """Attention over compressed blocks of keys (NSA, arXiv 2502.11089, eq. 7).

  Compressed block c stands for the tokens [c * block_stride, c * block_stride + block_len). Token t sees it
  once it is complete, t >= c * block_stride + block_len - 1, and with segments if all its tokens are of t's.

  Args:
    q: [B, T, N, H].
    k_cmp, v_cmp: [B, C, K, H].
    block_len, block_stride: tokens.
    scale: of the scores; None is H ** -0.5.
    segment_ids: int32[B, S] over tokens (not over compressed blocks).

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N], both differentiable.
  """
  name = "compressed_attention"
  _check_attention(name, q, k_cmp, v_cmp, k_name="k_cmp", v_name="v_cmp")
  _check_common(name, q, None, segment_ids, query_offset)
  _check_int(name, "block_len", block_len, 1, "tokens")
  _check_int(name, "block_stride", block_stride, 1, "tokens")
  return _run(name, implementation, q=q, k_cmp=k_cmp, v_cmp=v_cmp, block_len=block_len,
              block_stride=block_stride, scale=_scale(scale, q), segment_ids=segment_ids,
              query_offset=query_offset)


def compressed_top_k(q, k_cmp, lse, *, block_len, block_stride, block_size, num_blocks, num_initial=1,
                     num_local=2, scale=None, segment_ids=None, query_offset=0, implementation=None):
  """Selects blocks by the attention their tokens get from compressed attention (NSA, eq. 8 to 12).

  p_cmp = exp(scale * q.k_cmp - lse). The score of selection block j is the sum of p_cmp over the compressed
  blocks that share tokens with it, each weighted with the shared length in strides, then summed over the
  heads of the group: for lengths 32, 16 and 64 the compressed blocks 4j - 1 .. 4j + 3 with weights 1, 2, 2,
  2, 1. That is the paper's eq. 9 with p_cmp[(l'/d) * j + m - n]; its printed "- m - n", read with j from 0,
  would collect blocks that lie before block j.

  The first `num_initial` visible blocks (of the query's segment) and the last `num_local` up to and including
  the query's own take slots of `num_blocks`; the rest goes by score, ties to the lower index. A block is
  visible with at least one visible token; invisible blocks are never chosen. No gradient flows out.

  Args:
    q: [B, T, N, H].
    k_cmp: [B, C, K, H].
    lse: float32[B, T, N] of `compressed_attention`.
    block_len, block_stride, block_size: tokens.
    num_blocks: J, forced blocks included.
    scale: the one `compressed_attention` had.
    segment_ids: int32[B, S] over tokens.

  Returns:
    block_indices int32[B, T, K, J], -1 where fewer blocks are visible.
  """
  name = "compressed_top_k"
  _check_attention(name, q, k_cmp, None, k_name="k_cmp")
  _check_lse(name, lse, q)
  _check_common(name, q, None, segment_ids, query_offset)
  _check_int(name, "block_len", block_len, 1, "tokens")
  _check_int(name, "block_stride", block_stride, 1, "tokens")
  _check_selection(name, block_size, num_blocks, num_initial, num_local)
  indices = _run(name, implementation, q=lax.stop_gradient(q), k_cmp=lax.stop_gradient(k_cmp),
                 lse=lax.stop_gradient(lse), block_len=block_len, block_stride=block_stride,
                 block_size=block_size, num_blocks=num_blocks, num_initial=num_initial, num_local=num_local,
                 scale=_scale(scale, q), segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(indices, "block_indices")  # a remat that saves it cannot select anew


def index_top_k(q_idx, k_idx, *, block_size, num_blocks, num_initial=0, num_local=1, scale=None,
                segment_ids=None, query_offset=0, implementation=None):
  """Selects blocks by the best index score among their visible tokens (MSA, arXiv 2606.13392).

  Scores are scale * <q_idx, k_idx>, masked, then max-pooled over each block. Forced blocks, visibility and
  ties as in `compressed_top_k`. No gradient flows out: `index_kl` trains the index.

  Args:
    q_idx: [B, T, K, Hi], one index query per KV head.
    k_idx: [B, S, Hi], one index key for all.
    block_size: tokens.
    num_blocks: J, forced blocks included.
    scale: None is 1; a positive scale changes no choice.

  Returns:
    block_indices int32[B, T, K, J], -1 where fewer blocks are visible.
  """
  name = "index_top_k"
  _check_index(name, q_idx, k_idx)
  _check_common(name, q_idx, k_idx.shape[1], segment_ids, query_offset)
  _check_selection(name, block_size, num_blocks, num_initial, num_local)
  indices = _run(name, implementation, q_idx=lax.stop_gradient(q_idx), k_idx=lax.stop_gradient(k_idx),
                 block_size=block_size, num_blocks=num_blocks, num_initial=num_initial, num_local=num_local,
                 scale=1.0 if scale is None else scale, segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(indices, "block_indices")


def selected_attention(q, k, v, block_indices, *, block_size, scale=None, segment_ids=None, query_offset=0,
                       implementation=None):
  """Softmax attention over the visible tokens of each query's selected blocks (NSA, eq. 11 and 12).

  Args:
    q: [B, T, N, H].
    k, v: [B, S, K, H].
    block_indices: int32[B, T, K, J]; see the module.
    block_size: tokens.
    scale: of the scores; None is H ** -0.5.

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N], both differentiable (q, k, v).
  """
  name = "selected_attention"
  _check_attention(name, q, k, v)
  _check_indices(name, block_indices, q, k.shape[2])
  _check_common(name, q, k.shape[1], segment_ids, query_offset)
  _check_int(name, "block_size", block_size, 1, "tokens")
  return _run(name, implementation, q=q, k=k, v=v, block_indices=block_indices, block_size=block_size,
              scale=_scale(scale, q), segment_ids=segment_ids, query_offset=query_offset)


def index_kl(q, k, lse, q_idx, k_idx, block_indices, *, block_size, scale=None, index_scale=None,
             segment_ids=None, query_offset=0, implementation=None):
  """KL(P || P_idx) per query and KV head: what trains an index branch (MSA, arXiv 2606.13392).

  Over the selected, visible tokens, P is the mean over the group's heads of exp(scale * q.k - lse), held
  constant, and P_idx = softmax(index_scale * <q_idx, k_idx>). Gradient reaches q_idx and k_idx alone, and
  with respect to the index scores it is P_idx - P.

  Args:
    q, k: [B, T, N, H] and [B, S, K, H] of the main attention.
    lse: float32[B, T, N] of the main attention over the same tokens; then P sums to 1. (The reference
      renormalises P, kernels need not.)
    q_idx, k_idx: [B, T, K, Hi] and [B, S, Hi].
    block_indices: int32[B, T, K, J], or None for all visible tokens (warm-up).
    block_size: tokens.
    scale, index_scale: None is H ** -0.5 and Hi ** -0.5.

  Returns:
    loss float32[B, T, K] in nats, 0 for rows that see nothing.
  """
  name = "index_kl"
  _check_attention(name, q, k, None)
  _check_lse(name, lse, q)
  _check_index(name, q_idx, k_idx)
  if q_idx.shape[:3] != q.shape[:2] + (k.shape[2],) or k_idx.shape[:2] != k.shape[:2]:
    raise ValueError(f"{name}: q_idx {q_idx.shape} and k_idx {k_idx.shape} must be [B, T, K, Hi] and "
                     f"[B, S, Hi] for q {q.shape} and k {k.shape}")
  if block_indices is not None:
    _check_indices(name, block_indices, q, k.shape[2])
  _check_common(name, q, k.shape[1], segment_ids, query_offset)
  _check_int(name, "block_size", block_size, 1, "tokens")
  return _run(name, implementation, q=lax.stop_gradient(q), k=lax.stop_gradient(k),
              lse=lax.stop_gradient(lse), q_idx=q_idx, k_idx=k_idx, block_indices=block_indices,
              block_size=block_size, scale=_scale(scale, q), index_scale=_scale(index_scale, q_idx),
              segment_ids=segment_ids, query_offset=query_offset)


def block_top_k(scores, *, block_size, num_blocks, num_initial=0, num_local=1, keys=None, segment_ids=None,
                query_offset=0, implementation=None):
  """The best J visible blocks by given scores: what every training-free selection ends in. No gradient.

  Args:
    scores: [B, T, K, blocks]; of invisible blocks they do not matter. Ties go to the lower block.
    block_size: tokens.
    num_blocks: J, forced blocks included.
    num_initial, num_local: forced first blocks (of the query's segment) and last blocks (its own included).
    keys: S, needed with segment_ids when the last block is partial; None is blocks * block_size.

  Returns:
    block_indices int32[B, T, K, J], -1 where fewer blocks are visible.
  """
  name = "block_top_k"
  _check_array(name, "scores", scores, 4, "[B, T, K, blocks]")
  _check_selection(name, block_size, num_blocks, num_initial, num_local)
  if keys is None:
    keys = scores.shape[3] * block_size if segment_ids is None else segment_ids.shape[1]
  if -(-keys // block_size) != scores.shape[3]:
    raise ValueError(f"{name}: scores has {scores.shape[3]} blocks; {keys} keys in blocks of {block_size} "
                     f"make {-(-keys // block_size)}")
  _check_common(name, scores, keys, segment_ids, query_offset)
  indices = _run(name, implementation, scores=lax.stop_gradient(scores), block_size=block_size,
                 num_blocks=num_blocks, num_initial=num_initial, num_local=num_local, keys=keys,
                 segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(indices, "block_indices")


def block_mass(q, k, lse, *, block_size, scale=None, segment_ids=None, query_offset=0, implementation=None):
  """Where dense attention puts its mass, by block: the oracle's scores and the ceiling of any selector.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    lse: float32[B, T, N] of dense attention over all visible tokens.
    block_size: tokens.
    scale: of the scores; None is H ** -0.5.

  Returns:
    mass float32[B, T, K, blocks], the softmax mass in each block, a mean over the group's heads that sums to
    1, and entropy float32[B, T, K] in nats, the mean over the heads of the token distribution's. No gradient.
  """
  name = "block_mass"
  _check_attention(name, q, k, None)
  _check_lse(name, lse, q)
  _check_common(name, q, k.shape[1], segment_ids, query_offset)
  _check_int(name, "block_size", block_size, 1, "tokens")
  return _run(name, implementation, q=lax.stop_gradient(q), k=lax.stop_gradient(k),
              lse=lax.stop_gradient(lse), block_size=block_size, scale=_scale(scale, q),
              segment_ids=segment_ids, query_offset=query_offset)


# --- dispatch -----------------------------------------------------------------


def _run(operation, implementation, **arguments):
  def call(**arguments):
    chosen = backends.choose(operation, implementation, arguments)
    with jax.named_scope(f"{operation}_{chosen.name}"):
      return chosen.function(**arguments)

  return partition.apply(operation, call, arguments)


for _operation in backends.OPERATIONS:
  register(_operation, "reference", getattr(reference, _operation), platforms=None,
           supports=lambda arguments: None)


# --- validation ---------------------------------------------------------------


def _check_array(operation, name, x, ndim, letters, kind=jnp.floating):
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise ValueError(f"{operation}: {name} is a {type(x).__name__}; pass an array {letters}")
  if len(x.shape) != ndim:
    raise ValueError(f"{operation}: {name} has the shape {x.shape}; it must be {letters}")
  if not jnp.issubdtype(x.dtype, kind):
    raise ValueError(f"{operation}: {name} has the dtype {x.dtype}; it must be {kind.__name__}")


def _check_attention(operation, q, k, v, k_name="k", v_name="v"):
  S = "C" if k_name == "k_cmp" else "S"
  _check_array(operation, "q", q, 4, "[B, T, N, H]")
  _check_array(operation, k_name, k, 4, f"[B, {S}, K, H]")
  if v is not None:
    _check_array(operation, v_name, v, 4, f"[B, {S}, K, H]")
    if v.shape != k.shape:
      raise ValueError(f"{operation}: {v_name} has the shape {v.shape}; it must be that of {k_name}, "
                       f"{k.shape}")
  if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
    raise ValueError(f"{operation}: {k_name} has the shape {k.shape}; B and H must be those of q, {q.shape}")
  if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
    raise ValueError(f"{operation}: q has N = {q.shape[2]} heads; it must be a multiple of the "
                     f"K = {k.shape[2]} heads of {k_name}")


def _check_index(operation, q_idx, k_idx):
  _check_array(operation, "q_idx", q_idx, 4, "[B, T, K, Hi]")
  _check_array(operation, "k_idx", k_idx, 3, "[B, S, Hi]")
  if (k_idx.shape[0], k_idx.shape[2]) != (q_idx.shape[0], q_idx.shape[3]):
    raise ValueError(f"{operation}: k_idx has the shape {k_idx.shape}; B and Hi must be those of q_idx, "
                     f"{q_idx.shape}")


def _check_lse(operation, lse, q):
  _check_array(operation, "lse", lse, 3, "[B, T, N]")
  if lse.shape != q.shape[:3]:
    raise ValueError(f"{operation}: lse has the shape {lse.shape}; it must be [B, T, N] = {q.shape[:3]}")


def _check_indices(operation, block_indices, q, K):
  _check_array(operation, "block_indices", block_indices, 4, "[B, T, K, J]", jnp.signedinteger)
  if block_indices.shape[:3] != q.shape[:2] + (K,) or block_indices.shape[3] < 1:
    raise ValueError(f"{operation}: block_indices has the shape {block_indices.shape}; it must be "
                     f"[B, T, K, J] = {q.shape[:2] + (K,)} + (J,) with J >= 1")


def _check_common(operation, q, S, segment_ids, query_offset):
  """Segments and offset. S = None takes S from the segment ids."""
  B, T = q.shape[:2]
  if segment_ids is not None:
    _check_array(operation, "segment_ids", segment_ids, 2, "[B, S]", jnp.signedinteger)
    want = (B, segment_ids.shape[1] if S is None else S)
    if segment_ids.shape != want:
      raise ValueError(f"{operation}: segment_ids has the shape {segment_ids.shape}; it must be "
                       f"[B, S] = {want}")
    S = segment_ids.shape[1]
  if isinstance(query_offset, (int, np.integer)) and not isinstance(query_offset, bool):
    if query_offset < 0:
      raise ValueError(f"{operation}: query_offset = {query_offset}; positions begin at 0")
    if segment_ids is not None and query_offset + T > S:
      raise ValueError(f"{operation}: query_offset = {query_offset} puts the last of {T} queries past the "
                       f"{S} segment_ids; they cover all key positions")
    return
  _check_offset_array(operation, query_offset, B)


def _check_offset_array(operation, query_offset, B):
  if not hasattr(query_offset, "shape") or query_offset.shape not in ((), (B,)):
    shape = getattr(query_offset, "shape", type(query_offset).__name__)
    raise ValueError(f"{operation}: query_offset is of shape {shape}; pass an int, an int32 scalar "
                     f"or int32[{B}]")
  if not jnp.issubdtype(query_offset.dtype, jnp.integer):
    raise ValueError(f"{operation}: query_offset has the dtype {query_offset.dtype}; it must be int32")


def _check_int(operation, name, value, least, unit):
  if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
    raise ValueError(f"{operation}: {name} = {value!r}; it must be an int of at least {least} ({unit})")


def _check_selection(operation, block_size, num_blocks, num_initial, num_local):
  _check_int(operation, "block_size", block_size, 1, "tokens")
  _check_int(operation, "num_blocks", num_blocks, 1, "blocks per query, the forced ones included")
  _check_int(operation, "num_initial", num_initial, 0, "forced blocks")
  _check_int(operation, "num_local", num_local, 0, "forced blocks")
  if num_initial + num_local > num_blocks:
    raise ValueError(f"{operation}: num_initial + num_local = {num_initial} + {num_local}; forced blocks "
                     f"take slots of num_blocks = {num_blocks}, raise it or force fewer")


def _scale(scale, q):
  return q.shape[-1] ** -0.5 if scale is None else scale
