"""Selected blocks of one token in one kernel or two (`triton/one_token.py`), each way that they can go.

`TRITON_INTERPRET=1 pytest tests/triton_one_token_test.py` runs the kernels' arithmetic where torch is installed.
"""
import functools

import jax
import jax.numpy as jnp
import kernels_cases as cases
import numpy as np
import paged_test
import pytest

import pallas_kernels as pk

pytest.importorskip("triton", reason="triton is not installed")
from jaxlib import gpu_triton  # noqa: E402
from triton_test import interprets, lowered, lowers, needs_gpu  # noqa: E402

from pallas_kernels.triton import one_token, paged, selected  # noqa: E402
from pallas_kernels.triton.one_token import Way  # noqa: E402

WAYS = {  # J = 5 leaves a part without slots, a tile with one and a slot that no part has
    "cluster": Way(4, 1, 2, 4, 1, True),
    "cluster, tiles": Way(2, 1, 1, 4, 2, True),
    "two kernels": Way(4, 1, 2, 4, 1, False),
    "columns": Way(1, 2, 2, 4, 2, False),
    "columns and parts": Way(2, 2, 4, 4, 1, False),
    "whole": Way(1, 1, 8, 4, 1, False),
}


@interprets
@pytest.mark.parametrize("situation", ["duplicates_and_strangers", "segments", "all_empty", "half_empty",
                                       "past_the_keys"])
@pytest.mark.parametrize("way", WAYS)
def test_interpreted_kernels_agree(way, situation):
  shape = cases.shape(T=1, N=6, H=32, block_size=16, S=70, J=5)
  options = dict(block_size=16, scale=0.25)
  with one_token.override(WAYS[way]):
    cases.check("selected_attention", cases.with_gradients(functools.partial(selected.selected_attention, **options)),
                cases.draw("selected_attention", shape, situation, always=False), options=options, exact=2e-6)


@interprets
@pytest.mark.parametrize("name", ["selected", "selected_g1", "past_the_table_selected"])
@pytest.mark.parametrize("way", WAYS)
def test_interpreted_kernels_agree_on_pages(way, name):
  arguments, options, sets = paged_test.make(**dict(paged_test.CASES[name], H=32))
  free = sorted(set(range(len(arguments[1]))) - set(np.asarray(arguments[3]).ravel().tolist()))
  poisoned = [x.at[jnp.asarray(free)].set(jnp.nan) for x in arguments[1:3]]  # what no table names is not read
  with one_token.override(WAYS[way]):
    got = jax.jit(functools.partial(paged.paged_attention, **options, scale=32 ** -0.5))(
        arguments[0], *poisoned, arguments[3])
  paged_test.check(got, (arguments[0], *poisoned, arguments[3]), sets, rtol=2e-5, atol=2e-5)


@lowers
@pytest.mark.parametrize("way, calls", [("cluster", 1), ("two kernels", 2), ("columns", 1)])
def test_a_cluster_is_one_kernel(way, calls, monkeypatch):
  """Whose programs are launched together, and whose results are not the parts."""
  seen, real = [], gpu_triton.TritonKernel
  monkeypatch.setattr(gpu_triton, "TritonKernel", lambda *a: seen.append(a) or real(*a))
  q, k = (jnp.zeros(shape, jnp.bfloat16) for shape in ((2, 1, 16, 128), (2, 700, 1, 128)))
  f = lambda q, k, blocks: pk.selected_attention(q, k, k, blocks, block_size=64, query_offset=699,
                                                 implementation="triton")
  with one_token.override(WAYS[way]):
    text = lowered(f, q, k, jnp.zeros((2, 1, 1, 5), jnp.int32))
  assert text.count("@triton_kernel_call") == calls
  assert [ctas for _, _, ctas, *_ in seen] == {"cluster": [4], "two kernels": [1, 1], "columns": [1]}[way]
  assert ("barrier.cluster.arrive.release.aligned" in seen[0][4]) == (way == "cluster")


def test_what_a_way_does_not_serve_goes_as_without():
  assert one_token.way_of(16, 64, 128) is None
  with one_token.override(Way(8, 1, 2, 8, 1, True)):
    assert one_token.way_of(16, 64, 128) is not None
    assert one_token.way_of(4, 64, 128) is None    # fewer slots than parts
    assert one_token.way_of(16, 128, 256) is None  # more than a tile


ON_DEVICE = {
    "cluster of 8": Way(8, 1, 2, 8, 1, True),
    "cluster of 4, tiles": Way(4, 1, 2, 8, 3, True),
    "two kernels": Way(8, 1, 1, 4, 1, False),
    "columns": Way(1, 2, 2, 4, 3, False),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", ON_DEVICE)
def test_same_bits_over_200_runs_and_the_results_of_the_kernels_without(way):
  arguments, options, _ = paged_test.make(**paged_test.ON_DEVICE["selected_g16"], dtype=jnp.bfloat16)
  options["block_indices"] = jnp.tile(options["block_indices"], 2)[..., :16]
  f = functools.partial(pk.paged_attention, implementation="triton", **options)
  want = jax.jit(f)(*arguments)
  with one_token.override(ON_DEVICE[way]):
    run = jax.jit(lambda *a: f(*a))
    first = run(*arguments)
  for got, exact in zip(first, want):
    np.testing.assert_allclose(got.astype(jnp.float32), exact.astype(jnp.float32), rtol=2e-2, atol=2e-2)
  for _ in range(200):
    assert all((a == b).all() for a, b in zip(run(*arguments), first))
