"""Triton kernels of sets of single tokens, of DSA: in the interpreter, and `gpu` tests.

Run as triton_test.py says, with whose inputs and tolerances.
"""
import contextlib
import functools

import jax
import jax.numpy as jnp
import kernels_cases as cases
from kernels_cases import on_cpu, on_host
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import masked, reference

pytest.importorskip("triton", reason="triton is not installed")
from triton_lightning_test import compare_lightning_kl, draw_lightning  # noqa: E402
from triton_selections_test import KL_ON_DEVICE, KL_SMALL  # noqa: E402
from triton_test import SHAPE, TINY, interprets, lowered, lowers, needs_gpu  # noqa: E402

from pallas_kernels.triton import call, lightning, tokens, tuning  # noqa: E402

WIDE = TINY._replace(block=32)  # a block of keys is some words of a set


# --- the choice -----------------------------------------------------------------

CHOICES = {  # B, T, S, sets, index heads, packed, offset, tokens of a set
    "from_the_start": (2, 300, 300, 1, 3, False, 0, 40),
    "packed": (2, 300, 400, 1, 4, True, [0, 90], 40),  # most see fewer
    "sets": (1, 120, 200, 2, 2, False, 80, 64),
    "one": (2, 50, 100, 1, 1, False, 50, 1),
    "as many as there are": (1, 70, 70, 1, 2, False, 0, 70),
    "one query of a cache": (2, 1, 1200, 1, 4, False, [3, 1199], 500),
    "past_the_keys": (1, 60, 90, 1, 2, True, 70, 9),
}


def draw_choice(name, dtype, dim, whole, seed=0):
  B, T, S, R, heads, packed, offset, count = CHOICES[name]
  rng = np.random.default_rng(seed)
  new = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape) if whole else rng.normal(size=shape), dtype)
  ids = jnp.asarray(np.sort(rng.integers(0, 4, (B, S)), axis=1), jnp.int32) if packed else None
  where = dict(segment_ids=ids, query_offset=offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32))
  return (new(B, T, R, heads, dim), new(B, T, R, heads), new(B, S, dim)), where, count


def check_choice(name, dtype, dim):
  """Sums of whole numbers are exact, and many tie, at 0 most of all: then bit for bit. Else a token that is in one set
  and not in the other has the score of the last one taken, to rounding."""
  for whole in (True, False):
    index, where, count = draw_choice(name, dtype, dim, whole)
    got = jax.jit(functools.partial(tokens.token_top_k, num_tokens=count, **where))(*index)
    with on_cpu():
      host, at = cases.up(on_host(index)), on_host(where)
      want = jax.jit(functools.partial(reference.token_top_k, num_tokens=count, **at))(*host)
      S = index[2].shape[1]
      got, want = (np.asarray(masked.unpacked(jnp.asarray(np.asarray(x)), S)) for x in (got, want))
      scores = np.asarray(masked.weighted_scores(*host)).swapaxes(1, 2)
    assert (got.sum(-1) == want.sum(-1)).all() and got.any()
    if whole:
      np.testing.assert_array_equal(got, want)
    last = np.where(want, scores, np.inf).min(-1, keepdims=True)
    off = np.abs(np.where(got != want, scores - np.where(np.isfinite(last), last, 0), 0))
    assert off.max() <= 1e-5 * np.abs(scores).max()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("keys", [tokens.REGISTER_KEYS, 1])
@pytest.mark.parametrize("name", CHOICES)
def test_choices_on_device(name, keys, monkeypatch):
  monkeypatch.setattr(tokens, "REGISTER_KEYS", keys)
  monkeypatch.setattr(tokens, "CHUNK", 128)
  monkeypatch.setattr(tokens, "SCORE_BYTES", 2 ** 17)
  check_choice(name, jnp.bfloat16, 64)


@interprets
@pytest.mark.parametrize("keys, score_bytes", [(tokens.REGISTER_KEYS, 2 ** 30), (1, 2 ** 16)])
@pytest.mark.parametrize("name", CHOICES)
def test_interpreted_choices(name, keys, score_bytes, monkeypatch):
  B, T, S, *rest = CHOICES[name]
  monkeypatch.setitem(CHOICES, name, (B, min(T, 40), S, *rest))
  monkeypatch.setattr(tokens, "REGISTER_KEYS", keys)
  monkeypatch.setattr(tokens, "CHUNK", 64)
  monkeypatch.setattr(tokens, "SCORE_BYTES", score_bytes)
  with tuning.override("lightning", WIDE):
    check_choice(name, jnp.float32, 16)


@interprets
@pytest.mark.parametrize("keys", [tokens.REGISTER_KEYS, 1])
def test_interpreted_choice_of_extreme_scores(keys, monkeypatch):
  """Of all signs and magnitudes, and both zeros; float32's order, bit for bit."""
  monkeypatch.setattr(tokens, "REGISTER_KEYS", keys)
  monkeypatch.setattr(tokens, "CHUNK", 32)
  values = np.float32([3e38, -3e38, 1e-37, -1e-37, 0.0, -0.0, 1.0, -1.0, 1 + 2 ** -23, 1e-30])
  scores = np.random.default_rng(0).choice(values, (1, 40, 1, 40))
  kernel_call = call.kernel_call

  def given(kernel, inputs, outputs, **how):
    if how["name"] == "token_scores":
      return jnp.asarray(scores)
    return kernel_call(kernel, inputs, outputs, **how)

  monkeypatch.setattr(call, "kernel_call", given)
  q_idx, w, k_idx = (jnp.zeros(shape) for shape in ((1, 40, 1, 1, 16), (1, 40, 1, 1), (1, 40, 16)))
  got = tokens.token_top_k(q_idx, w, k_idx, num_tokens=7, segment_ids=None, query_offset=0)
  order = np.argsort(-np.where(np.tri(40) > 0, scores[0, :, 0], -np.inf), axis=-1, kind="stable")[:, :7]
  want = np.zeros((40, 40), bool)
  np.put_along_axis(want, order, True, axis=-1)
  np.testing.assert_array_equal(masked.unpacked(got, 40)[0, :, 0], want & (np.tri(40) > 0))


# --- attention ------------------------------------------------------------------

LATE = cases.Situation(offset=(1,))
ATTENTION = {  # shape, situation
    "one_set_g16": (SHAPE(B=1, T=300, N=32, H=128, J=90, sets=1), "from_the_start"),
    "sets_g3": (SHAPE(T=400, N=6, H=64, J=60), "segments"),
    "g1": (SHAPE(T=200, N=2, H=64, J=500, sets=1), "from_the_start"),
    "sets_h128": (SHAPE(T=300, N=8, H=128, J=500, S=700), LATE),
    "h256": (SHAPE(B=1, T=150, N=4, H=256, J=40, sets=1), "from_the_start"),
    "one_query_of_a_cache": (SHAPE(B=3, T=1, N=16, H=128, S=3000, J=900, sets=1), LATE),
    **{f"inherited, {situation}": (SHAPE(T=250, N=6, H=64, S=300, J=30, sets=sets), situation)
       for sets, situation in zip((1, 0) * 9, cases.situations("token_attention"))},
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_on_device(name):
  f = functools.partial(pk.token_attention, implementation="triton")
  cases.check_on_device("token_attention", f, *ATTENTION[name])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["one_set_g16", "sets_g3", "one_query_of_a_cache"])
def test_attention_same_bits_over_20_runs(name):
  f = functools.partial(pk.token_attention, implementation="triton")
  cases.same_bits(cases.with_gradients(f), cases.draw("token_attention", *ATTENTION[name]))


SMALL = {
    "one_set_g3": (cases.shape(T=29, N=6, H=16, S=70, J=9, sets=1), "segments"),
    "one_query": (cases.shape(T=1, H=16, S=300, J=90, sets=1), LATE),
    "parts": (cases.shape(B=1, T=3, H=16, S=300, J=60), LATE),
    "several_words": (cases.shape(B=1, T=20, N=2, H=16, S=150, J=30), LATE),
    **{f"inherited, {situation}": (cases.shape(T=20, H=16, S=70, J=6, sets=sets), situation)
       for sets, situation in zip((1, 0) * 9, cases.situations("token_attention"))},
}


@contextlib.contextmanager
def tiles(tuned):
  with contextlib.ExitStack() as stack:
    for kernel in ("range_forward", "range_dq", "range_dkv", "range_decode"):
      stack.enter_context(tuning.override(kernel, tuned))
    yield


@interprets
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_attention(name):
  shape, situation = SMALL[name]
  options = dict(scale=0.25)
  with tiles(WIDE._replace(block=64) if name == "several_words" else WIDE):
    cases.check("token_attention", cases.with_gradients(tokens.token_attention, **options),
                cases.draw("token_attention", shape, situation), options=options,
                exact=2.0 ** -16 if situation == "huge_logits" else 2e-6)


@interprets
def test_interpreted_tiles_without_a_token_are_left_out(monkeypatch):
  """Keys that no query of a tile chose are not read: they are NaN here, of which masking would make no number."""
  inputs = cases.draw("token_attention", cases.shape(B=1, T=20, H=16, S=130, J=5, sets=1), "sink")
  q, k, v = inputs.arrays
  lost = jnp.arange(130)[None, :, None, None] >= 32
  with tiles(WIDE):
    f = cases.with_gradients(tokens.token_attention, scale=0.25)
    want = f(inputs)
    got = f(inputs._replace(arrays=(q, jnp.where(lost, jnp.nan, k), jnp.where(lost, jnp.nan, v))))
  for x, y in zip(got[:3], want[:3]):
    np.testing.assert_array_equal(x, y)
  for x, y in zip(got[3:], want[3:]):
    np.testing.assert_array_equal(x[:, :32], y[:, :32])
    assert not np.any(x[:, 32:])


@interprets
def test_interpreted_under_vmap():
  inputs = cases.draw("token_attention", cases.shape(T=20, H=16, S=40, J=6, sets=1), "from_the_start")
  q, k, v = inputs.arrays
  sets = inputs.rest["token_sets"]
  index, where, count = draw_choice("sets", jnp.float32, 16, True)
  with tiles(WIDE), tuning.override("lightning", WIDE):
    both = jax.vmap(lambda q: tokens.token_attention(q, k, v, sets, scale=0.3)[0])(jnp.stack([q, 2 * q]))
    chosen = jax.vmap(lambda k: tokens.token_top_k(*index[:2], k, num_tokens=count, **where))(
        jnp.stack([index[2], -index[2]]))
  for n, sign in enumerate((1, -1)):
    want, _ = reference.token_attention(q * (n + 1), k, v, sets, scale=0.3)
    np.testing.assert_allclose(both[n], want, rtol=2e-5, atol=2e-5)
    want = reference.token_top_k(*index[:2], sign * index[2], num_tokens=count, **where)
    np.testing.assert_array_equal(chosen[n], want)


# --- the KL ---------------------------------------------------------------------


def check_kl(s, situation, per_group, *, exact, rounded):
  """Over a part of the tokens of chosen blocks, against the reference in float32."""
  index, rest, dloss = draw_lightning(s, situation, per_group, False)
  mask = np.array(cases._sets_of_tokens(rest.pop("block_indices"), s.block_size, s.keys, rest))
  mask &= np.random.default_rng(3).random(mask.shape) < 0.5
  rest.update(block_indices=None, token_sets=masked.packed(jnp.asarray(mask)))
  with on_cpu():
    _, lse = reference.token_attention(*cases.up(on_host((rest["q"], rest["k"], rest["k"]))),
                                       on_host(rest["token_sets"]))
  rest["lse"] = jnp.asarray(np.asarray(lse))
  compare_lightning_kl(s, index, rest, dloss, block_size=16, empty=situation == "all_empty",
                       small=situation in ("all_empty", "crumbs", "sink"), exact=exact, rounded=rounded)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ds_bytes", [2 ** 30, 2 ** 17])
@pytest.mark.parametrize("situation, per_group", [
    *((situation, False) for situation in cases.situations("index_kl")), ("segments", True)])
def test_kl_on_device(situation, per_group, ds_bytes, monkeypatch):
  monkeypatch.setattr(lightning, "DS_BYTES", ds_bytes)
  check_kl(KL_ON_DEVICE(), situation, per_group, exact=1e-5, rounded=5e-3)


@interprets
@pytest.mark.parametrize("situation, per_group, ds_bytes, block", [
    *((situation, False, 2 ** 30, 32) for situation in cases.situations("index_kl")),
    ("segments", True, 2 ** 13, 32), ("past_the_keys", False, 2 ** 13, 64), ("crumbs", False, 2 ** 13, 64)])
def test_interpreted_kl(situation, per_group, ds_bytes, block, monkeypatch):
  monkeypatch.setattr(lightning, "DS_BYTES", ds_bytes)
  with tuning.override("lightning", WIDE._replace(block=block)):
    check_kl(KL_SMALL(S=60), situation, per_group, rounded=0,
             exact=2.0 ** -16 if situation == "huge_logits" else 5e-6)


# --- lowering -------------------------------------------------------------------


@lowers
@pytest.mark.parametrize("T, heads, head_dim", [(1024, (8, 2), 64), (512, (32, 2), 128), (40000, (4, 1), 64)])
def test_lowers_for_h100(T, heads, head_dim, monkeypatch):
  names, real = [], call.kernel_call
  monkeypatch.setattr(call, "kernel_call", lambda *a, name, **kw: names.append(name) or real(*a, name=name, **kw))
  (N, K), of = heads, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def everything(q, k, q_idx, w, k_idx):
    sets = pk.token_top_k(q_idx, w, k_idx, num_tokens=256, implementation="triton")
    o, lse = pk.token_attention(q, k, k, sets, implementation="triton")
    loss = pk.lightning_kl(q, k, lse, q_idx, w, k_idx, None, token_sets=sets, implementation="triton")
    return o.astype(jnp.float32).sum() + loss.sum()

  lowered(jax.grad(everything, (0, 1, 2, 3, 4)), of(1, T, N, head_dim), of(1, T, K, head_dim), of(1, T, 1, 4, 64),
          of(1, T, 1, 4), of(1, T, 64))
  for kernel in ("token_scores", "choose_tokens", "token_attention_forward", "token_attention_dq",
                 "token_attention_dkv", "lightning_kl_forward", "lightning_kl_ds", "lightning_kl_dk"):
    assert kernel in names, kernel
