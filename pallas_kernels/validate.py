"""What the operations of `pallas_kernels.api` accept: a check raises ValueError that names argument, value and fix.
And what several backends refuse."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.spans import FAR


def array(operation, name, x, ndim, letters, kind=jnp.floating):
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise ValueError(f"{operation}: {name} is a {type(x).__name__}; pass an array {letters}")
  if len(x.shape) != ndim:
    raise ValueError(f"{operation}: {name} has the shape {x.shape}; it must be {letters}")
  if not jnp.issubdtype(x.dtype, kind):
    raise ValueError(f"{operation}: {name} has the dtype {x.dtype}; it must be {kind.__name__}")


def attention(operation, q, k, *values, k_name="k", v_name="v"):
  S = "C" if k_name == "k_cmp" else "S"
  array(operation, "q", q, 4, "[B, T, N, H]")
  array(operation, k_name, k, 4, f"[B, {S}, K, H]")
  for v in values:
    array(operation, v_name, v, 4, f"[B, {S}, K, H]")
    if v.shape != k.shape:
      raise ValueError(f"{operation}: {v_name} has the shape {v.shape}; it must be that of {k_name}, "
                       f"{k.shape}")
  if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
    raise ValueError(f"{operation}: {k_name} has the shape {k.shape}; B and H must be those of q, {q.shape}")
  if q.shape[3] == 0:
    raise ValueError(f"{operation}: q has the shape {q.shape}; H must be at least 1")
  if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
    raise ValueError(f"{operation}: q has N = {q.shape[2]} heads; it must be a multiple of the "
                     f"K = {k.shape[2]} heads of {k_name}")


def pages(operation, q, k_pages, v_pages, page_table):
  array(operation, "q", q, 4, "[B, T, N, H]")
  array(operation, "k_pages", k_pages, 4, "[pages, page_size, K, H]")
  array(operation, "v_pages", v_pages, 4, "[pages, page_size, K, H]")
  array(operation, "page_table", page_table, 2, "[B, table]", jnp.signedinteger)
  if v_pages.shape != k_pages.shape:
    raise ValueError(f"{operation}: v_pages has the shape {v_pages.shape}; it must be that of k_pages, {k_pages.shape}")
  if min(k_pages.shape[:2]) == 0 or page_table.shape[1] == 0:
    raise ValueError(f"{operation}: k_pages {k_pages.shape} or page_table {page_table.shape} is empty; "
                     "a cache has pages")
  if k_pages.shape[3] != q.shape[3]:
    raise ValueError(f"{operation}: k_pages has the shape {k_pages.shape}; H must be that of q, {q.shape}")
  if page_table.shape[0] != q.shape[0]:
    raise ValueError(f"{operation}: page_table has the shape {page_table.shape}; B must be that of q, {q.shape}")
  if k_pages.shape[2] == 0 or q.shape[2] % k_pages.shape[2]:
    raise ValueError(f"{operation}: q has N = {q.shape[2]} heads; it must be a multiple of the "
                     f"K = {k_pages.shape[2]} heads of k_pages")


def index(operation, q_idx, k_idx):
  array(operation, "q_idx", q_idx, 4, "[B, T, K, Hi]")
  array(operation, "k_idx", k_idx, 3, "[B, S, Hi]")
  if (k_idx.shape[0], k_idx.shape[2]) != (q_idx.shape[0], q_idx.shape[3]):
    raise ValueError(f"{operation}: k_idx has the shape {k_idx.shape}; B and Hi must be those of q_idx, "
                     f"{q_idx.shape}")


def lightning(operation, q_idx, index_weights, k_idx):
  array(operation, "q_idx", q_idx, 5, "[B, T, R, HI, dI]")
  array(operation, "index_weights", index_weights, 4, "[B, T, R, HI]")
  array(operation, "k_idx", k_idx, 3, "[B, S, dI]")
  if index_weights.shape != q_idx.shape[:4]:
    raise ValueError(f"{operation}: index_weights has the shape {index_weights.shape}; it must be [B, T, R, HI] = "
                     f"{q_idx.shape[:4]}")
  if (k_idx.shape[0], k_idx.shape[2]) != (q_idx.shape[0], q_idx.shape[4]):
    raise ValueError(f"{operation}: k_idx has the shape {k_idx.shape}; B and dI must be those of q_idx, {q_idx.shape}")


def lse(operation, lse, q):
  array(operation, "lse", lse, 3, "[B, T, N]")
  if lse.shape != q.shape[:3]:
    raise ValueError(f"{operation}: lse has the shape {lse.shape}; it must be [B, T, N] = {q.shape[:3]}")


def unserved_selection(q, k, block_indices, block_size, scale, *, dtypes, head_dims, block_sizes, group, slots):
  """None, or why kernels of selected attention with these limits need another implementation."""
  named = lambda values, last=", ": last.join(map(str, values))
  B, T, N, H = q.shape
  S, K, J = *k.shape[1:3], block_indices.shape[3]
  if q.dtype not in dtypes:
    return f"q.dtype = {q.dtype}: the kernels take {named((jnp.dtype(x) for x in dtypes), ' and ')}"
  if k.dtype != q.dtype:
    return f"k.dtype = {k.dtype}: the kernels need that of q, {q.dtype}"
  if H not in head_dims:
    return f"q has head dim {H}: the kernels take {named(head_dims)}"
  if block_size not in block_sizes:
    return f"block_size = {block_size}: the kernels take {named(block_sizes)}"
  if N // K > group:
    return f"q has {N // K} heads per KV head: the kernels take up to {group}"
  if J > slots:
    return f"block_indices has {J} slots: the kernels take up to {slots}"
  if scale is not None and not isinstance(scale, (int, float, np.floating)):
    return "scale is traced: the kernels need a number"
  if min(B, T, S, J) == 0:
    return f"block_indices {block_indices.shape}, q {q.shape} or k {k.shape} is empty"
  return None


def indices(operation, block_indices, q, K):
  array(operation, "block_indices", block_indices, 4, "[B, T, K, J]", jnp.signedinteger)
  if block_indices.shape[:3] != q.shape[:2] + (K,) or block_indices.shape[3] < 1:
    raise ValueError(f"{operation}: block_indices has the shape {block_indices.shape}; it must be "
                     f"[B, T, K, J] = {q.shape[:2] + (K,)} + (J,) with J >= 1")


def token_sets(operation, sets, q, S, counts):
  array(operation, "token_sets", sets, 4, "[B, T, R, words]", jnp.int32)
  B, T, R, words = sets.shape
  if (B, T) != q.shape[:2] or R not in counts or words != -(-S // 32):
    raise ValueError(f"{operation}: token_sets has the shape {sets.shape}; for q {q.shape} and {S} keys it must be "
                     f"[B, T, R, ceil(S / 32)] = {q.shape[:2] + (counts[-1], -(-S // 32))}"
                     + (" or with R = 1" if len(set(counts)) > 1 else ""))


def common(operation, q, S, segment_ids, query_offset):
  """Segments and offset. S = None takes S from the segment ids."""
  B, T = q.shape[:2]
  if segment_ids is not None:
    array(operation, "segment_ids", segment_ids, 2, "[B, S]", jnp.signedinteger)
    want = (B, segment_ids.shape[1] if S is None else S)
    if segment_ids.shape != want:
      raise ValueError(f"{operation}: segment_ids has the shape {segment_ids.shape}; it must be "
                       f"[B, S] = {want}")
    S = segment_ids.shape[1]
  if isinstance(query_offset, (int, np.integer)) and not isinstance(query_offset, bool):
    if not 0 <= query_offset <= FAR - T:
      raise ValueError(f"{operation}: query_offset = {query_offset}; positions begin at 0 and end at {FAR}")
    if segment_ids is not None and int(query_offset) + T > S:
      raise ValueError(f"{operation}: query_offset = {query_offset} puts the last of {T} queries past the "
                       f"{S} segment_ids; they cover all key positions")
    return
  _offset(operation, query_offset, B)


def _offset(operation, query_offset, B):
  if not hasattr(query_offset, "shape") or query_offset.shape not in ((), (B,)):
    shape = getattr(query_offset, "shape", type(query_offset).__name__)
    raise ValueError(f"{operation}: query_offset is of shape {shape}; pass an int, an int32 scalar "
                     f"or int32[{B}]")
  if not jnp.issubdtype(query_offset.dtype, jnp.integer):
    raise ValueError(f"{operation}: query_offset has the dtype {query_offset.dtype}; it must be int32")


def integer(operation, name, value, least, unit):
  """Numbers of tokens and blocks: sums of two of them are int32 in every implementation."""
  if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value <= FAR:
    raise ValueError(f"{operation}: {name} = {value!r}; it must be an int from {least} to {FAR} ({unit})")


def compressed(operation, k_cmp, block_len, block_stride):
  integer(operation, "block_len", block_len, 1, "tokens")
  integer(operation, "block_stride", block_stride, 1, "tokens")
  end = (k_cmp.shape[1] - 1) * int(block_stride) + int(block_len)
  if end > FAR:
    raise ValueError(f"{operation}: block_stride = {block_stride}, block_len = {block_len}: the last of "
                     f"{k_cmp.shape[1]} compressed blocks ends at {end}; positions end at {FAR}")


def selection(operation, block_size, num_blocks, num_initial, num_local):
  integer(operation, "block_size", block_size, 1, "tokens")
  integer(operation, "num_blocks", num_blocks, 1, "blocks per query, the forced ones included")
  integer(operation, "num_initial", num_initial, 0, "forced blocks")
  integer(operation, "num_local", num_local, 0, "forced blocks")
  if num_initial + num_local > num_blocks:
    raise ValueError(f"{operation}: num_initial + num_local = {num_initial} + {num_local}; forced blocks "
                     f"take slots of num_blocks = {num_blocks}, raise it or force fewer")
