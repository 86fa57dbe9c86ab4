"""Selected attention for Hopper GPUs: what any machine can check, and `gpu` tests for one that has one."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import kernels_cases as cases
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import backends, lists as entry_lists, mosaic_gpu, reference, spans
from pallas_kernels.mosaic_gpu import forward, selected, shared_attention, shared_blocks

ON_HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
INTERPRETS = jax.__version_info__ >= (0, 11)


def h100():
  try:
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="gpu")
  except TypeError:  # jax before 0.11 knows no platform of an abstract device
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132)
  return AbstractMesh((), (), abstract_device=device)


SHAPE = functools.partial(cases.shape, dtype="bfloat16")


# --- anywhere ------------------------------------------------------------------


LOWERED = {
    "g16": SHAPE(B=1, T=4096, N=64, K=4, H=128, J=16, block_size=64),
    "g1": SHAPE(B=1, T=4096, N=16, K=16, H=128, J=16, block_size=64),
    "g4_h64_b32_segments": SHAPE(T=4001, N=8, H=64, J=8, block_size=32, dtype="float16"),
    "g2_b128": SHAPE(T=300, N=8, K=4, H=64, J=2, block_size=128),
    "g8_h128_b128": SHAPE(B=1, T=300, N=8, K=1, H=128, J=2, block_size=128),
    "g3_b32": SHAPE(B=1, T=500, N=9, K=3, H=64, J=4, block_size=32),
    "g7": SHAPE(B=1, T=500, N=28, K=4, H=128, J=16, block_size=64),
    "g5_h96": SHAPE(B=1, T=500, N=10, K=2, H=96, J=4, block_size=64),
}


@pytest.mark.parametrize("name", cases.with_older_jax(LOWERED, ["g4_h64_b32_segments", "g7", "g5_h96"]))
def test_lowers_for_h100(name):
  situation = "segments" if "segments" in name else "from_the_start"
  inputs = jax.eval_shape(lambda: cases.draw("selected_attention", LOWERED[name], situation, always=False))
  program = cases.with_gradients(pallas_kernels.selected_attention, block_size=LOWERED[name].block_size,
                                 implementation="mosaic_gpu")
  with backends.target_platform("gpu"), jax.sharding.use_abstract_mesh(h100()):
    text = jax.jit(program.both).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
  for kernel in ("forward", "combine", "backward"):
    assert f"selected_attention_{kernel}" in text
  triton = selected.counting is not None and selected.call.unavailable() is None
  assert ("selected_attention_sum_units" in text) != triton
  assert ("selected_attention_common" in text) == (name in ("g16", "g8_h128_b128", "g7"))


@pytest.mark.parametrize("G,J,block_size,segments,offset",
                         [(4, 3, 8, False, 0), (16, 5, 4, True, 7), (64, 1, 16, True, 0), (7, 4, 8, False, 0)])
def test_entries_invert_the_selection(G, J, block_size, segments, offset):
  rng = np.random.default_rng(G)
  B, T, S, K = 2, 37, 50, 2
  plan = entry_lists.Plan(B, T, S, K, G, J, block_size, range_size=10, tiles_per_unit=2)
  blocks = rng.integers(-1, plan.blocks + 2, size=(B, T, K, J))  # some lie past the end
  blocks[:, :9, 0] = 1  # duplicates, and a hot block
  ids = np.sort(rng.integers(0, 3, size=(B, S)), axis=1) if segments else np.zeros((B, S), int)
  entries = jax.jit(lambda blocks, ids: entry_lists.invert(blocks, plan, ids if segments else None, offset))(
      jnp.asarray(blocks, jnp.int32), jnp.asarray(ids, jnp.int32))

  wanted = {}  # (b, t, r, block) -> keys that the query sees
  for b, t, r, j in np.ndindex(blocks.shape):
    block, position = blocks[b, t, r, j], t + offset
    if 0 <= block < plan.blocks:
      keys = [key for key in range(block * block_size, min((block + 1) * block_size, S))
              if key <= position and ids[b, key] == ids[b, min(position, S - 1)]]
      if keys:
        wanted[b, t, r, block] = keys
  position = np.asarray(entries.position)
  assert (position >= 0).sum() == len(wanted)
  seen, tiles = set(), set()
  for first, tokens, tile, b, r, block in np.asarray(entries.units):
    assert tokens <= plan.unit_tokens
    for i in range(tokens):
      row, span = int(entries.rows[first + i]), int(entries.spans[first + i])
      t = row // K - b * T
      entry = (b, t, r, block)
      assert row % K == r and entry not in seen
      seen.add(entry)
      assert [k - block * block_size for k in wanted[entry]] == list(range(span >> 16, span & 0xffff))
      nth, place = divmod(i, plan.tile_tokens)
      slot = list(blocks[b, t, r]).index(block)
      assert position[b, t, r, slot] == (tile + nth) * entry_lists.TILE_ROWS + place * G
      owner = (tile + nth, (b, r, t // plan.range_size, block))
      tiles.add(owner)
  assert seen == set(wanted)
  assert len(tiles) == len({tile for tile, _ in tiles}), "two lists share a tile"
  assert max(tile for tile, _ in tiles) < plan.max_tiles


CASES = {  # for the interpreter: seconds each
    "g16_b32_segments": (SHAPE(B=1, T=40, N=16, K=1, H=64, J=2, block_size=32), dict(documents=lambda S: 4)),
    "g16_h128_b128": (SHAPE(B=1, T=24, N=16, K=1, H=128, J=2, block_size=128, S=200), dict(offset=(1,))),
    "g3_h96_slices": (SHAPE(B=2, T=23, N=3, K=1, H=96, J=2, block_size=64, S=70), dict(offset=(0.43,))),
}


def with_an_empty_row(rng, shape, count):
  blocks = rng.integers(-1, count, size=shape)
  blocks[:, 3], blocks[:, 5:9] = -1, 0  # and duplicates
  return blocks


@pytest.fixture
def interpreter():
  """Mosaic GPU's own, which finds no race in what the test runs."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
  import jax.experimental.pallas.mosaic_gpu as plgpu
  if not INTERPRETS:
    pytest.skip("the interpreter of jax 0.10 lacks transposed operands of wgmma")
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_agree_and_do_not_race(name, monkeypatch, interpreter):
  s, situation = CASES[name]
  if "slices" in name:
    monkeypatch.setattr(selected, "PARTIAL_BYTES", 16 * s.J * s.N * s.H * 2)  # 8 queries at a time, of two sequences
  inputs = cases.draw("selected_attention", s, cases.Situation(**situation, blocks=with_an_empty_row), always=False)
  program = cases.with_gradients(mosaic_gpu.selected_attention, block_size=s.block_size, interpret=True)
  _, _, dq, _, _ = cases.check("selected_attention", program, inputs, options=dict(block_size=s.block_size),
                               exact=1e-6)
  assert not dq[:, 3].any()


def test_common_blocks_get_their_own_pass_where_it_pays_or_is_asked_for():
  """The rule, what benchmarks.kernels's mosaic_gpu:union and :gather make of it, and that queries must fill a tile."""
  plan = lambda T, G: entry_lists.Plan(1, T, T, 2, G, 8, 32, range_size=T, tiles_per_unit=2)
  assert [shared_blocks.pays(plan(256, G), H) for G, H in ((16, 128), (2, 128), (16, 64))] == [True, False, False]
  with shared_blocks.override(True):
    assert shared_blocks.pays(plan(256, 2), 64) and not shared_blocks.pays(plan(4, 16), 128)
  with shared_blocks.override(False):
    assert not shared_blocks.pays(plan(256, 16), 128)
  assert shared_blocks.pays(plan(256, 16), 128)


@pytest.mark.parametrize("G,J", [(16, 5), (4, 4), (3, 3), (1, 3)])
def test_common_blocks_and_the_rest_are_the_selection(G, J):
  rng = np.random.default_rng(G)
  B, T, K, S = 2, 150, 2, 80
  plan = entry_lists.Plan(B, T, S, K, G, J, 8, range_size=10, tiles_per_unit=2)
  blocks = rng.integers(-1, 12, size=(B, T, K, J))  # some lie past the end
  blocks[..., 0] = 3
  tiles, rest = jax.jit(lambda blocks: shared_blocks.split(blocks, plan, None, 30))(jnp.asarray(blocks, jnp.int32))
  tokens, count = shared_blocks.tokens_of(plan), np.asarray(tiles.count).reshape(B, K, -1)
  listed = np.asarray(tiles.blocks).reshape(B, K, -1, shared_blocks.SLOTS)
  words = np.asarray(tiles.words).view(np.uint32)[shared_blocks.first_rows(plan)].transpose(0, 2, 1)
  for b, t, r in np.ndindex(B, T, K):
    tile = t // tokens
    blocks_of = {int(x) % shared_blocks.SLOTS: int(x) // shared_blocks.SLOTS
                 for x in listed[b, r, tile, :count[b, r, tile]]}
    taken = [blocks_of[i] for i in range(shared_blocks.SLOTS) if words[b, r, t] >> i & 1]
    left = [int(x) for x in np.asarray(rest)[b, t, r] if x >= 0]
    assert sorted(taken + left) == sorted({int(x) for x in blocks[b, t, r] if 0 <= x < plan.blocks})
    assert 3 in blocks_of.values() or (tile + 1) * tokens > T


@pytest.mark.parametrize("segments", [False, True])
def test_interpreted_tiles_agree_and_do_not_race(segments, interpreter):
  B, T, N, K, J, size, S, offset = 1, 40, 16, 1, 5, 32, 160, 120
  situation = cases.Situation(documents=(lambda S: 4) if segments else None, offset=(1,))
  shape = SHAPE(B=B, T=T, N=N, K=K, H=64, J=J, block_size=size, S=S)
  inputs = cases.draw("selected_attention", shape, situation, 7, always=False)  # some blocks are shared, some are not
  (q, k, v), blocks, ids = inputs.arrays, inputs.rest["block_indices"], inputs.rest["segment_ids"]
  blocks = blocks.at[:, 8:16].set(-1).at[:, 16:24, :, 1:].set(-1).at[:, 16:24, :, 0].set(4)
  plan, _ = selected._plan_of(q, k, blocks, size)
  tiles, rest = shared_blocks.split(blocks, plan, ids, offset)
  assert {0, 1, 4, 5} <= set(tiles.count.tolist())  # none, less than a step, even, and one more
  o, lse = jax.block_until_ready(shared_attention.attend(q.reshape(-1, 64), k, v, tiles, plan, scale=0.125,
                                                      segmented=segments, interpret=True, programs=2))
  word = tiles.words.reshape(B, T, K, N)[..., :1]
  listed = jnp.repeat(tiles.blocks.reshape(B, -1, K, shared_blocks.SLOTS), shared_blocks.tokens_of(plan), axis=1)
  used = jnp.arange(shared_blocks.SLOTS) < jnp.repeat(tiles.count.reshape(B, -1, K, 1), shared_blocks.tokens_of(plan),
                                                      axis=1)
  taken = jnp.where(used & ((word >> listed % shared_blocks.SLOTS) & 1 != 0), listed // shared_blocks.SLOTS, -1)
  assert (taken >= 0).any() and (rest >= 0).any()
  want, want_lse = reference.selected_attention(
      *cases.up((q, k, v)), taken, block_size=size, scale=0.125, segment_ids=ids, query_offset=offset)
  none = jnp.full((B, T, K, J), -1)
  merged, merged_lse = forward.merge(jnp.zeros((1, N, 64), o.dtype), jnp.full((N,), -jnp.inf), none, plan, (o, lse))
  np.testing.assert_allclose(merged_lse.reshape(want_lse.shape), want_lse, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.asarray(merged, np.float32).reshape(want.shape), want, rtol=0.03, atol=0.03)


def test_interpreted_index_scores_agree_and_do_not_race(interpreter):
  index_top_k = pytest.importorskip("pallas_kernels.mosaic_gpu.index_top_k", reason="triton is not installed")
  rng = np.random.default_rng(0)
  B, T, K, H, size = 1, 256, 2, 64, 64
  q, k = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((B, T, K, H), (B, T, H)))
  ids = jnp.asarray(np.sort(rng.integers(0, 3, size=(B, T)), axis=1), jnp.int32)
  first, end = spans.visible_keys(B, T, T, ids, 0)
  got = jax.block_until_ready(index_top_k.scores(q, k, first, end, block_size=size, scale=0.5, splits=2,
                                                 width=T // size, interpret=True))
  s = jnp.einsum("btkh,bsh->btks", q.astype(jnp.float32), k.astype(jnp.float32)) * 0.5
  seen = (jnp.arange(T) >= first[..., None]) & (jnp.arange(T) < end[..., None])
  want = np.asarray(jnp.where(seen[:, :, None], s, -jnp.inf).reshape(T, K, T // size, size).max(axis=-1))
  visible = np.isfinite(want)
  np.testing.assert_allclose(np.asarray(got).reshape(want.shape)[visible], want[visible], rtol=1e-5)


def test_supports_says_why_not():
  ok = dict(q=(1, 64, 8, 64), k=(1, 64, 2, 64), blocks=(1, 64, 2, 4), dtype=jnp.bfloat16, block_size=32)

  def reason(**changes):
    s = {**ok, **changes}
    sds = jax.ShapeDtypeStruct
    return mosaic_gpu.supports(
        sds(s["q"], s["dtype"]), sds(s["k"], s["dtype"]), sds(s.get("v", s["k"]), s["dtype"]),
        sds(s["blocks"], jnp.int32), block_size=s["block_size"])

  assert reason() is None
  assert reason(dtype=jnp.float32).startswith("q.dtype")
  assert reason(block_size=16).startswith("block_size")
  assert reason(q=(1, 64, 6, 64)) is None and reason(q=(1, 64, 8, 96), k=(1, 64, 2, 96), block_size=64) is None
  assert reason(q=(1, 64, 8, 96), k=(1, 64, 2, 96)).startswith("q has head dim 96: with block_size = 32")
  assert reason(q=(1, 64, 34, 64)).startswith("q has 17 heads")
  assert reason(q=(1, 64, 8, 32), k=(1, 64, 2, 32)).startswith("q has head dim")
  assert reason(v=(1, 64, 2, 128)).startswith("v has head dim")


def test_index_scores_are_made_here_where_that_is_faster():
  index_top_k = pytest.importorskip("pallas_kernels.mosaic_gpu.index_top_k", reason="triton is not installed")
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def call(K=4, H=128, size=64, T=8192):
    return dict(q_idx=of(1, T, K, H), k_idx=of(1, T, H), block_size=size, num_blocks=16, scale=1.0)

  assert index_top_k.supports(**call(K=3)).startswith("q_idx has 3 heads")
  assert index_top_k.supports(**call(T=32)).startswith("q_idx (1, 32, 4, 128) fills no tile")
  assert index_top_k.supports(**call(size=256)).startswith("block_size = 256")
  assert index_top_k.avoid(**call()) is None
  for slower in (call(H=64), call(size=32)):
    assert "triton is faster" in index_top_k.avoid(**slower)


def test_few_queries_get_it_by_name_or_where_nothing_else_serves(monkeypatch):
  sds = jax.ShapeDtypeStruct
  call = lambda T: dict(q=sds((1, T, 8, 64), jnp.bfloat16), k=sds((1, 512, 2, 64), jnp.bfloat16),
                        v=sds((1, 512, 2, 64), jnp.bfloat16), block_indices=sds((1, T, 2, 4), jnp.int32),
                        block_size=32, scale=0.125, segment_ids=None, query_offset=0)
  pallas_kernels.available("selected_attention")
  for serves in (True, False):
    other = backends.Implementation("triton", None, ("gpu",), lambda **_: None if serves else "q: no")
    monkeypatch.setitem(backends._registered["selected_attention"], "triton", other)
    with backends.target_platform("gpu"):
      assert backends.choose("selected_attention", None, call(512)).name == "mosaic_gpu"
      for best in (None, backends.FASTEST):  # a reason of speed
        assert backends.choose("selected_attention", best, call(1)).name == ("triton" if serves else "mosaic_gpu")
      assert backends.choose("selected_attention", "mosaic_gpu", call(1)).name == "mosaic_gpu"


def test_slices_of_queries_are_joined_in_place():
  """Seven queries in three slices: padded, joined without the padding; what is kept is cut as it was joined."""
  x, n = jnp.arange(14.0).reshape(1, 7, 2), jnp.arange(7).reshape(1, 7)
  f = lambda x, n, first: ((x + first, n), jnp.full((1, 2), first), (x.sum(), n.sum()))
  (y, m), kept, sums = jax.jit(lambda x, n: entry_lists.in_slices(f, 3, (x, n)))(x, n)
  np.testing.assert_array_equal(y, x + jnp.asarray([0, 0, 0, 3, 3, 3, 6])[:, None])
  np.testing.assert_array_equal(m, n)
  np.testing.assert_array_equal(kept, [[0, 0, 3, 3, 6, 6]])
  assert sums == (91.0, 21 - 2)  # two queries of padding, -1 each
  again = lambda n, none, kept, first: (n + kept[:, :1] - first, none, None)
  (got, _, _) = entry_lists.in_slices(again, 3, (n, None, kept))
  np.testing.assert_array_equal(got, n)
  by_sine = jax.jit(lambda x: entry_lists.in_slices(lambda x, first: (jnp.sin(x), None, None), 16, (x,))[0])
  memory = by_sine.lower(jax.ShapeDtypeStruct((1, 2 ** 16, 4, 8), jnp.float32)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4, "no copy of all slices"


def test_plan_bounds_hold_for_long_contexts():
  plan, slices = selected._slices(1, 1 << 20, 1 << 20, 4, 16, 16, 128, 64)
  assert plan.queries * slices >= 1 << 20
  assert plan.max_tiles * entry_lists.TILE_ROWS * 128 * 2 < 2 * selected.PARTIAL_BYTES
  small = dataclasses.replace(plan, queries=1)
  assert small.max_tiles <= 2 * small.entries  # decoding: not one tile per list


# --- on a Hopper GPU --------------------------------------------------------------


SHAPES = {
    "g16": SHAPE(B=1, T=512, N=32, K=2, H=128, J=4, block_size=64),
    "g1": SHAPE(B=1, T=640, N=4, K=4, H=128, J=4, block_size=64),
    "g4_h64_b32": SHAPE(B=2, T=500, N=8, K=2, H=64, J=8, block_size=32, S=700),
    "g2_b128": SHAPE(B=1, T=600, N=4, K=2, H=128, J=3, block_size=128),
    "g8_h64_b128": SHAPE(B=1, T=600, N=16, K=2, H=64, J=3, block_size=128),
    "g8_b32": SHAPE(B=1, T=300, N=8, K=1, H=128, J=5, block_size=32),
    "g1_h64_b64": SHAPE(B=1, T=333, N=2, K=2, H=64, J=4, block_size=64),
    "g3": SHAPE(B=1, T=600, N=9, K=3, H=64, J=6, block_size=64),
    "g5_b32": SHAPE(B=2, T=500, N=5, K=1, H=64, J=8, block_size=32),
    "g6_b128": SHAPE(B=1, T=600, N=12, K=2, H=128, J=3, block_size=128),
    "g7": SHAPE(B=1, T=700, N=28, K=4, H=128, J=5, block_size=64),
    "g13_h96": SHAPE(B=1, T=400, N=13, K=1, H=96, J=5, block_size=64),
    "g3_h96": SHAPE(B=1, T=400, N=6, K=2, H=96, J=5, block_size=64),
    "h96_b128": SHAPE(B=1, T=400, N=8, K=2, H=96, J=3, block_size=128),
    "float16": SHAPE(B=1, T=512, N=8, K=2, H=128, J=4, block_size=64, dtype="float16"),
    "h128": SHAPE(B=2, T=777, N=8, K=2, H=128, J=8, block_size=64, S=900),
    "cache": SHAPE(B=2, T=101, N=8, K=2, H=128, J=6, block_size=64, S=500),
    "one_query": SHAPE(B=4, T=1, N=16, K=2, H=128, J=8, block_size=64, S=700),
    "more_slots_than_blocks": SHAPE(B=1, T=130, N=4, K=1, H=64, J=12, block_size=64),
    "long": SHAPE(B=1, T=2048, N=16, K=1, H=128, J=2, block_size=64),
    "no_group": SHAPE(B=1, T=1024, N=4, K=4, H=64, J=2, block_size=32),
}
OF = {"g5_b32": "segments", "cache": "random", "one_query": "random", "long": "sink", "no_group": "late_block"}
ON_DEVICE = [*((name, OF.get(name, "from_the_start")) for name in SHAPES),
             *((name, situation) for name in ("g4_h64_b32", "h128")
               for situation in cases.situations("selected_attention"))]


def on_device(name, seed=0):
  """A program with gradients and its inputs."""
  program = cases.with_gradients(mosaic_gpu.selected_attention, block_size=SHAPES[name].block_size)
  return program, cases.draw("selected_attention", SHAPES[name], OF.get(name, "half_empty"), seed, always=False)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name,situation", ON_DEVICE)
def test_error_on_device_is_that_of_the_dtype(name, situation):
  cases.check_on_device("selected_attention", mosaic_gpu.selected_attention, SHAPES[name], situation, seed=len(name))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("K,H,block_size,packed", [(4, 128, 64, False), (2, 128, 128, True), (1, 64, 32, True)])
def test_index_top_k_on_device(K, H, block_size, packed):
  """Small integers: exact scores, so ties and all must be the reference's; few queries, so keys are split."""
  rng = np.random.default_rng(K)
  B, T = 2, 3001
  q, k = (jnp.asarray(rng.integers(-1, 2, size=shape), jnp.bfloat16) for shape in ((B, T, K, H), (B, T, H)))
  ids = jnp.asarray(np.sort(rng.integers(0, 4, size=(B, T)), axis=1), jnp.int32) if packed else None
  how = dict(block_size=block_size, num_blocks=8, num_initial=1, segment_ids=ids)
  got, want = (np.sort(jax.jit(functools.partial(pallas_kernels.index_top_k, implementation=name, **how))(q, k))
               for name in ("mosaic_gpu", "reference"))
  np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", ["g16", "g5_b32", "long", "g3", "g13_h96", "g6_b128"])
def test_same_bits_over_20_runs(name):
  cases.same_bits(*on_device(name, seed=1))


@pytest.mark.gpu
@needs_hopper
def test_slices_agree_with_the_whole(monkeypatch):
  program, inputs = on_device("g4_h64_b32", seed=2)
  whole = program(inputs)
  monkeypatch.setattr(selected, "PARTIAL_BYTES", 2 ** 20)
  cut = on_device("g4_h64_b32", seed=2)[0](inputs)  # traced anew
  for x, y in zip(whole[:3], cut[:3]):  # o, lse, dq: each query alone
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
  for x, y in zip(whole[3:], cut[3:]):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    assert np.linalg.norm(x - y) < 4e-3 * np.linalg.norm(x)
