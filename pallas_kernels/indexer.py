"""The operations of DSA's lightning indexer: scores, single tokens, attention to those, what trains it.

DeepSeek Sparse Attention, arXiv 2512.02556. What holds for all operations, and the letters: `pallas_kernels.api`, which
has these too.
"""
from __future__ import annotations

from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import validate
from pallas_kernels.dispatch import Offset, Scale, run, scale_of


def lightning_scores(q_idx: Float[Array, "B T R HI dI"], index_weights: Float[Array, "B T R HI"],
                     k_idx: Float[Array, "B S dI"], *, block_size: int, segment_ids: Int[Array, "B S"] | None = None,
                     query_offset: Offset = 0, implementation: str | None = None) -> Float[Array, "B T R blocks"]:
  """The best index score among the visible tokens of each block, by several index heads (DSA, arXiv 2512.02556, eq. 1).

  The score of token s is the sum over heads j of index_weights[j] * relu(<q_idx[j], k_idx[s]>).

  Args:
    q_idx: [B, T, R, HI, dI], HI index queries for each of R sets of tokens; any scale is in the weights.
    index_weights: [B, T, R, HI].
    k_idx: [B, S, dI], one index key for all.
    block_size: tokens.

  Returns:
    float32[B, T, R, blocks], -inf for blocks without a visible token. No gradient: `lightning_kl` trains the index.
  """
  name = "lightning_scores"
  validate.lightning(name, q_idx, index_weights, k_idx)
  validate.common(name, q_idx, k_idx.shape[1], segment_ids, query_offset)
  validate.integer(name, "block_size", block_size, 1, "tokens")
  return run(name, implementation, q_idx=lax.stop_gradient(q_idx), index_weights=lax.stop_gradient(index_weights),
             k_idx=lax.stop_gradient(k_idx), block_size=block_size, segment_ids=segment_ids, query_offset=query_offset)


def token_top_k(q_idx: Float[Array, "B T R HI dI"], index_weights: Float[Array, "B T R HI"],
                k_idx: Float[Array, "B S dI"], *, num_tokens: int, segment_ids: Int[Array, "B S"] | None = None,
                query_offset: Offset = 0, implementation: str | None = None) -> Int[Array, "B T R words"]:
  """Selects the visible tokens with the best index scores (DSA, arXiv 2512.02556, eq. 2).

  Scores are those of `lightning_scores`; nothing is forced, and ties go to the lower token. No gradient flows out.

  Args:
    q_idx, index_weights, k_idx: see `lightning_scores`.
    num_tokens: of a set; where fewer are visible, all of them are taken.

  Returns:
    token_sets int32[B, T, R, ceil(S / 32)], of visible tokens alone.
  """
  name = "token_top_k"
  validate.lightning(name, q_idx, index_weights, k_idx)
  validate.common(name, q_idx, k_idx.shape[1], segment_ids, query_offset)
  validate.integer(name, "num_tokens", num_tokens, 1, "tokens per set")
  sets = run(name, implementation, q_idx=lax.stop_gradient(q_idx), index_weights=lax.stop_gradient(index_weights),
             k_idx=lax.stop_gradient(k_idx), num_tokens=num_tokens, segment_ids=segment_ids, query_offset=query_offset)
  return checkpoint_name(sets, "block_indices")  # a remat that saves it cannot select anew


def token_attention(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
                    token_sets: Int[Array, "B T R words"], *, scale: Scale | None = None,
                    implementation: str | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Softmax attention over each query's set of tokens (DSA, arXiv 2512.02556, eq. 2).

  Positions and segments have no part in it: a token that is in the set is seen.

  Args:
    q: [B, T, N, H].
    k, v: [B, S, K, H].
    token_sets: int32[B, T, R, ceil(S / 32)] as `token_top_k` gives them; R is 1 or K. Bits past the last key are 0.
    scale: of the scores; None is H ** -0.5.

  Returns:
    o [B, T, N, H] in q.dtype and lse float32[B, T, N], both differentiable (q, k, v).
  """
  name = "token_attention"
  validate.attention(name, q, k, v)
  validate.token_sets(name, token_sets, q, k.shape[1], (1, k.shape[2]))
  return run(name, implementation, q=q, k=k, v=v, token_sets=token_sets, scale=scale_of(scale, q))


def lightning_kl(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"],
                 q_idx: Float[Array, "B T R HI dI"], index_weights: Float[Array, "B T R HI"],
                 k_idx: Float[Array, "B S dI"], block_indices: Int[Array, "B T R J"] | None, *,
                 token_sets: Int[Array, "B T R words"] | None = None, block_size: int = 1, scale: Scale | None = None,
                 segment_ids: Int[Array, "B S"] | None = None, query_offset: Offset = 0,
                 implementation: str | None = None) -> Float[Array, "B T R"]:
  """KL(P || P_idx) per query and set of tokens: what trains DSA's indexer (arXiv 2512.02556, eqs. 3 and 4).

  Over the selected, visible tokens, P is the sum over the N / R heads of a set of exp(scale * q.k - lse), L1-normalised
  and held constant, and P_idx the softmax of the scores of `lightning_scores`. Gradient reaches q_idx, index_weights
  and k_idx alone.

  Args:
    q, k: [B, T, N, H] and [B, S, K, H] of the main attention.
    lse: float32[B, T, N] of it over the same tokens.
    q_idx, index_weights, k_idx: see `lightning_scores`; R is 1 or K.
    block_indices: int32[B, T, R, J], or None for all visible tokens (warm-up). With R = 1 also [B, T, K, J]: each KV
      head has its own tokens then, and P_idx ranges over those that any has.
    token_sets: int32[B, T, R, ceil(S / 32)], the visible tokens of these sets in the place of blocks.
    block_size: tokens of a block.
    scale: None is H ** -0.5.

  Returns:
    loss float32[B, T, R] in nats, 0 for rows that see nothing.
  """
  name = "lightning_kl"
  validate.attention(name, q, k)
  validate.lse(name, lse, q)
  validate.lightning(name, q_idx, index_weights, k_idx)
  R, K = q_idx.shape[2], k.shape[2]
  if q_idx.shape[:2] != q.shape[:2] or k_idx.shape[:2] != k.shape[:2] or R not in (1, K):
    raise ValueError(f"{name}: q_idx {q_idx.shape} and k_idx {k_idx.shape} must be [B, T, R, HI, dI] and [B, S, dI] "
                     f"for q {q.shape} and k {k.shape}, with R = 1 or {K}")
  if block_indices is not None:
    validate.indices(name, block_indices, q, K if getattr(block_indices, "shape", ())[2:3] == (K,) else R)
  if token_sets is not None:
    if block_indices is not None:
      raise ValueError(f"{name}: token_sets with block_indices; pass one of them")
    validate.token_sets(name, token_sets, q, k.shape[1], (R,))
  validate.common(name, q, k.shape[1], segment_ids, query_offset)
  validate.integer(name, "block_size", block_size, 1, "tokens")
  return run(name, implementation, q=lax.stop_gradient(q), k=lax.stop_gradient(k), lse=lax.stop_gradient(lse),
             q_idx=q_idx, index_weights=index_weights, k_idx=k_idx, block_indices=block_indices,
             token_sets=token_sets, block_size=block_size, scale=scale_of(scale, q), segment_ids=segment_ids,
             query_offset=query_offset)
