"""Sets of single tokens by the reference: their bits, the choice, attention to them; what arguments are refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import masked

B, T, S, N, K, H, HEADS = 2, 13, 70, 4, 2, 8, 3


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 96])
def test_bits_of_a_set(keys):
  mask = np.random.default_rng(keys).random((2, 3, keys)) < 0.5
  mask[0, 0] = True  # bit 31 is the sign
  words = masked.packed(jnp.asarray(mask))
  assert words.shape == (2, 3, -(-keys // 32)) and words.dtype == jnp.int32
  want = [sum(int(mask[0, 1, s]) << s % 32 for s in range(j, min(j + 32, keys))) for j in range(0, keys, 32)]
  assert [int(word) % 2 ** 32 for word in words[0, 1]] == want
  np.testing.assert_array_equal(masked.unpacked(words, keys), mask)


@pytest.mark.parametrize("packed, offset", [(False, 57), (True, 40), (True, [0, 57])])
@pytest.mark.parametrize("R, count", [(1, 9), (2, 9), (1, 100)])
def test_the_best_tokens_are_chosen(R, count, packed, offset):
  """Of whole numbers, most of which tie: the first ones of those that see a query's last score."""
  rng = np.random.default_rng(0)
  q_idx, w, k_idx = (rng.integers(-2, 3, shape).astype(np.float32) for shape in (
      (B, T, R, HEADS, H), (B, T, R, HEADS), (B, S, H)))
  ids = np.sort(rng.integers(0, 3, (B, S)), axis=1).astype(np.int32) if packed else None
  where = dict(query_offset=offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32), segment_ids=ids)
  choose = jax.jit(lambda *index: masked.unpacked(pk.token_top_k(*index, num_tokens=count, **where), S))
  got = np.asarray(choose(q_idx, w, k_idx))
  some_left_out = False
  for b, t, r in np.ndindex(B, T, R):
    at = np.broadcast_to(offset, (B,))[b] + t
    seen = [s for s in range(at + 1) if not packed or ids[b, s] == ids[b, at]]
    score = lambda s: np.maximum(q_idx[b, t, r] @ k_idx[b, s], 0) @ w[b, t, r]
    want = sorted(seen, key=lambda s: (-score(s), s))[:count]
    assert np.flatnonzero(got[b, t, r]).tolist() == sorted(want), (b, t, r)
    some_left_out |= len(want) < len(seen)
  assert some_left_out == (count < S)


@pytest.mark.parametrize("R", [1, K])
def test_sets_of_all_visible_tokens_are_dense_attention(R):
  q, k, v = normal(0, B, S, N, H), normal(1, B, S, K, H), normal(2, B, S, K, H)
  index = normal(3, B, S, R, HEADS, H), normal(4, B, S, R, HEADS), normal(5, B, S, H)

  def run(attend, qkv, index, **which):
    o, lse = attend(*qkv)
    loss, pull = jax.vjp(lambda *index: pk.lightning_kl(*qkv[:2], lse, *index, None, **which), *index)
    return (o, lse, loss, *pull(jnp.cos(loss)))

  @jax.jit
  def both(qkv, index):
    sets = pk.token_top_k(*index, num_tokens=S)
    return (run(lambda *qkv: pk.token_attention(*qkv, sets), qkv, index, token_sets=sets),
            run(pk.attention, qkv, index))

  for x, y in zip(*both((q, k, v), index)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert np.abs(y).max() > 0.01


BAD = {
    "num_tokens = 0": lambda q, k, index, sets: pk.token_top_k(*index, num_tokens=0),
    "index_weights has the shape": lambda q, k, index, sets: pk.token_top_k(index[0], q, index[2], num_tokens=3),
    "token_sets has the shape .* or with R = 1": lambda q, k, index, sets: pk.token_attention(q, k, k, sets[..., :2]),
    "token_sets has the dtype": lambda q, k, index, sets: pk.token_attention(q, k, k, sets.astype(jnp.float32)),
    "token_sets with block_indices": lambda q, k, index, sets: pk.lightning_kl(
        q, k, q[..., 0], *index, sets[..., :1], token_sets=sets),
    r"\(2, 13, 1, 3\)": lambda q, k, index, sets: pk.lightning_kl(
        q, k, q[..., 0], *index, None, token_sets=jnp.repeat(sets, K, axis=2)),  # of one index set
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
  q, k = normal(0, B, T, N, H), normal(1, B, S, K, H)
  index = normal(3, B, T, 1, HEADS, H), normal(4, B, T, 1, HEADS), normal(5, B, S, H)
  with pytest.raises(ValueError, match=message):
    BAD[message](q, k, index, jnp.zeros((B, T, 1, 3), jnp.int32))


def test_a_remat_that_saves_the_choice_does_not_choose_again():
  index = normal(3, 1, S, 1, HEADS, H), normal(4, 1, S, 1, HEADS), normal(5, 1, S, H)
  q, k = normal(0, 1, S, N, H), normal(1, 1, S, K, H)
  f = lambda q: pk.token_attention(q, k, k, pk.token_top_k(*index, num_tokens=9))[0].sum()
  counts = []
  for names in (("block_indices",), ()):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy)))(q))
    counts.append(text.count("top_k["))
  assert counts[0] == 1 and counts[1] > 1
