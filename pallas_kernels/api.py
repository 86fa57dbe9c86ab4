"""The operations: what they mean, what they accept, and who computes them. Those of DSA are in indexer.py.

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
* Selections rank numbers. A score that is NaN, which finite inputs do not give, changes its own query's list alone:
  `block_top_k` ranks it with the largest (Triton's kernels, where its sign bit is set, with the least), and
  `index_top_k` passes over it where the block has a number. Of a block of nothing else, and in `compressed_top_k`,
  `token_top_k` and `lightning_scores`, implementations differ, up to an empty list.
* `token_sets` is int32[B, T, R, ceil(S / 32)], sets of single tokens: bit s % 32 of word s // 32 says whether token s
  is in it. R is K, a set for each KV head, or 1, one for all.
* `implementation` is None (the best one for the platform that serves the arguments, logged once on logger
  "pallas_kernels"; on GPUs no kernel whose gradients differ in their last bits between runs), "fastest" (such kernels
  too: cuDNN's backward pass, which sums in no fixed order) or a name from `available(operation)`.

All raise ValueError for arguments that make no sense and for unknown implementations, NotImplementedError for
a named implementation that cannot serve the arguments.
"""
from __future__ import annotations

from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import backends, reference, validate
from pallas_kernels.backends import available, register, target_platform
from pallas_kernels.dispatch import Offset, Scale, run, scale_of
from pallas_kernels.indexer import lightning_kl, lightning_scores, token_attention, token_top_k

__all__ = ("attention", "available", "block_mass", "block_peak", "block_top_k", "compressed_attention",
           "compressed_top_k", "index_kl", "index_top_k", "lightning_kl", "lightning_scores", "paged_attention",
           "register", "selected_attention", "target_platform", "token_attention", "token_top_k")

def attention(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *,
              causal: bool = True, window: int | None = None, scale: Scale | None = None,
              segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
              implementation: str | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
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
  validate.attention("attention", q, k, v)
  validate.common("attention", q, k.shape[1], segment_ids, query_offset)
  if window is not None:
    validate.integer("attention", "window", window, 1, "tokens, the query's own included")
    if not causal:
      raise ValueError(f"attention: window = {window} needs causal = True")
  return run("attention", implementation, q=q, k=k, v=v, causal=bool(causal), window=window,
             scale=scale_of(scale, q), segment_ids=segment_ids, query_offset=query_offset)


def compressed_attention(q: Float[Array, "B T N H"], k_cmp: Float[Array, "B C K H"], v_cmp: Float[Array, "B C K H"], *,
                         block_len: int, block_stride: int, scale: Scale | None = None,
                         segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
                         implementation: str | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
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
  validate.attention(name, q, k_cmp, v_cmp, k_name="k_cmp", v_name="v_cmp")
  validate.common(name, q, None, segment_ids, query_offset)
  validate.compressed(name, k_cmp, block_len, block_stride)
  return run(name, implementation, q=q, k_cmp=k_cmp, v_cmp=v_cmp, block_len=block_len,
             block_stride=block_stride, scale=scale_of(scale, q), segment_ids=segment_ids,
             query_offset=query_offset)


def compressed_top_k(q: Float[Array, "B T N H"], k_cmp: Float[Array, "B C K H"], lse: Float[Array, "B T N"], *,
                     block_len: int, block_stride: int, block_size: int, num_blocks: int, num_initial: int = 1,
                     num_local: int = 2, scale: Scale | None = None,
                     segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
                     implementation: str | None = None) -> Int[Array, "B T K J"]:
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
  validate.attention(name, q, k_cmp, k_name="k_cmp")
  validate.lse(name, lse, q)
  validate.common(name, q, None, segment_ids, query_offset)
  validate.compressed(name, k_cmp, block_len, block_stride)
  validate.selection(name, block_size, num_blocks, num_initial, num_local)
  indices = run(name, implementation, q=lax.stop_gradient(q), k_cmp=lax.stop_gradient(k_cmp),
                lse=lax.stop_gradient(lse), block_len=block_len, block_stride=block_stride,
                block_size=block_size, num_blocks=num_blocks, num_initial=num_initial, num_local=num_local,
                scale=scale_of(scale, q), segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(indices, "block_indices")  # a remat that saves it cannot select anew


def index_top_k(q_idx: Float[Array, "B T K Hi"], k_idx: Float[Array, "B S Hi"], *, block_size: int, num_blocks: int,
                num_initial: int = 0, num_local: int = 1, scale: Scale | None = None,
                segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
                implementation: str | None = None) -> Int[Array, "B T K J"]:
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
  validate.index(name, q_idx, k_idx)
  validate.common(name, q_idx, k_idx.shape[1], segment_ids, query_offset)
  validate.selection(name, block_size, num_blocks, num_initial, num_local)
  indices = run(name, implementation, q_idx=lax.stop_gradient(q_idx), k_idx=lax.stop_gradient(k_idx),
                block_size=block_size, num_blocks=num_blocks, num_initial=num_initial, num_local=num_local,
                scale=1.0 if scale is None else scale, segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(indices, "block_indices")


def selected_attention(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
                       block_indices: Int[Array, "B T K J"], *, block_size: int, scale: Scale | None = None,
                       segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
                       implementation: str | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
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
  validate.attention(name, q, k, v)
  validate.indices(name, block_indices, q, k.shape[2])
  validate.common(name, q, k.shape[1], segment_ids, query_offset)
  validate.integer(name, "block_size", block_size, 1, "tokens")
  return run(name, implementation, q=q, k=k, v=v, block_indices=block_indices, block_size=block_size,
             scale=scale_of(scale, q), segment_ids=segment_ids, query_offset=query_offset)


def paged_attention(q: Float[Array, "B T N H"], k_pages: Float[Array, "pages page_size K H"],
                    v_pages: Float[Array, "pages page_size K H"], page_table: Int[Array, "B table"], *,
                    block_indices: Int[Array, "B T K J"] | None = None, window: int | None = None,
                    scale: Scale | None = None, query_offset: Offset = 0,
                    implementation: str | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """`attention` or, with block indices, `selected_attention` over a cache of pages: decoding.

  A page holds the keys of one block, so that a selected block is one page. Page page_table[b, j] holds the tokens
  [j * page_size, (j + 1) * page_size) of sequence b; sequences may share pages. What a page holds past the last
  query's position is not read, so that pages are filled token by token. Kernels have no gradient; the reference has.

  Args:
    q: [B, T, N, H], the newest T tokens of each sequence.
    k_pages, v_pages: [pages, page_size, K, H], of all sequences; they hold these T tokens already, and have to be
      finite where the table names them.
    page_table: int32[B, table]. Entries outside 0 .. pages - 1, as -1, name no page: their tokens are invisible.
    block_indices: int32[B, T, K, J], see the module; block_size is page_size. None attends to all visible tokens.
    window: tokens a query sees, its own included; None for all. Not with block_indices.
    scale: of the scores; None is H ** -0.5.
    query_offset: position of the first query; int32[B] where lengths differ.

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N].
  """
  name = "paged_attention"
  validate.pages(name, q, k_pages, v_pages, page_table)
  validate.common(name, q, None, None, query_offset)
  if block_indices is not None:
    validate.indices(name, block_indices, q, k_pages.shape[2])
  if window is not None:
    validate.integer(name, "window", window, 1, "tokens, the query's own included")
    if block_indices is not None:
      raise ValueError(f"{name}: window = {window} with block_indices; pass one of them and call twice for both")
  return run(name, implementation, q=q, k_pages=k_pages, v_pages=v_pages, page_table=page_table,
             block_indices=block_indices, window=window, scale=scale_of(scale, q), query_offset=query_offset)


def index_kl(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"],
             q_idx: Float[Array, "B T K Hi"], k_idx: Float[Array, "B S Hi"],
             block_indices: Int[Array, "B T K J"] | None, *, block_size: int, scale: Scale | None = None,
             index_scale: Scale | None = None, segment_ids: Int[Array, "B S"] | None = None,
             query_offset: Offset = 0, implementation: str | None = None) -> Float[Array, "B T K"]:
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
  validate.attention(name, q, k)
  validate.lse(name, lse, q)
  validate.index(name, q_idx, k_idx)
  if q_idx.shape[:3] != q.shape[:2] + (k.shape[2],) or k_idx.shape[:2] != k.shape[:2]:
    raise ValueError(f"{name}: q_idx {q_idx.shape} and k_idx {k_idx.shape} must be [B, T, K, Hi] and "
                     f"[B, S, Hi] for q {q.shape} and k {k.shape}")
  if block_indices is not None:
    validate.indices(name, block_indices, q, k.shape[2])
  validate.common(name, q, k.shape[1], segment_ids, query_offset)
  validate.integer(name, "block_size", block_size, 1, "tokens")
  return run(name, implementation, q=lax.stop_gradient(q), k=lax.stop_gradient(k),
             lse=lax.stop_gradient(lse), q_idx=q_idx, k_idx=k_idx, block_indices=block_indices,
             block_size=block_size, scale=scale_of(scale, q), index_scale=scale_of(index_scale, q_idx),
             segment_ids=segment_ids, query_offset=query_offset)


def block_top_k(scores: Float[Array, "B T K blocks"], *, block_size: int, num_blocks: int, num_initial: int = 0,
                num_local: int = 1, keys: int | None = None, segment_ids: Int[Array, "B S"] | None = None,
                query_offset: Offset = 0, implementation: str | None = None) -> Int[Array, "B T K J"]:
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
  validate.array(name, "scores", scores, 4, "[B, T, K, blocks]")
  validate.selection(name, block_size, num_blocks, num_initial, num_local)
  if keys is None:
    keys = scores.shape[3] * int(block_size) if segment_ids is None else segment_ids.shape[1]
  validate.integer(name, "keys", keys, 0, "tokens; None is blocks * block_size")
  if -(-int(keys) // int(block_size)) != scores.shape[3]:
    raise ValueError(f"{name}: scores has {scores.shape[3]} blocks; {keys} keys in blocks of {block_size} "
                     f"make {-(-keys // block_size)}")
  validate.common(name, scores, keys, segment_ids, query_offset)
  indices = run(name, implementation, scores=lax.stop_gradient(scores), block_size=block_size,
                num_blocks=num_blocks, num_initial=num_initial, num_local=num_local, keys=keys,
                segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(indices, "block_indices")


def block_mass(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"], *, block_size: int,
               scale: Scale | None = None, segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
               implementation: str | None = None) -> tuple[Float[Array, "B T K blocks"], Float[Array, "B T K"]]:
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
  validate.attention(name, q, k)
  validate.lse(name, lse, q)
  validate.common(name, q, k.shape[1], segment_ids, query_offset)
  validate.integer(name, "block_size", block_size, 1, "tokens")
  return run(name, implementation, q=lax.stop_gradient(q), k=lax.stop_gradient(k),
             lse=lax.stop_gradient(lse), block_size=block_size, scale=scale_of(scale, q),
             segment_ids=segment_ids, query_offset=query_offset)


def block_peak(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"],
               block_indices: Int[Array, "B T K J"] | None = None, *, block_size: int, scale: Scale | None = None,
               segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
               implementation: str | None = None) -> Float[Array, "B T K blocks"]:
  """The largest attention probability in each block: what a gate of blocks is distilled from (arXiv 2506.08889).

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    lse: float32[B, T, N] of attention over the same tokens.
    block_indices: int32[B, T, K, J], the blocks that attention saw; None for all.
    block_size: tokens.
    scale: of the scores; None is H ** -0.5.

  Returns:
    float32[B, T, K, blocks], the largest of exp(scale * q.k - lse) over the block's visible tokens and the group's
    heads; 0 where there is none, and in blocks that are not selected. No gradient.
  """
  name = "block_peak"
  validate.attention(name, q, k)
  validate.lse(name, lse, q)
  if block_indices is not None:
    validate.indices(name, block_indices, q, k.shape[2])
  validate.common(name, q, k.shape[1], segment_ids, query_offset)
  validate.integer(name, "block_size", block_size, 1, "tokens")
  return run(name, implementation, q=lax.stop_gradient(q), k=lax.stop_gradient(k),
             lse=lax.stop_gradient(lse), block_indices=block_indices, block_size=block_size,
             scale=scale_of(scale, q), segment_ids=segment_ids, query_offset=query_offset)


for _operation in backends.OPERATIONS:
  register(_operation, "reference", getattr(reference, _operation), platforms=None,
           supports=lambda **_: None)
