"""The cases that every implementation of the operations inherits: situations, inputs, the truth, and how near to be.

A case is an operation, a shape (what a backend serves) and a situation (what happens in the arrays). The reference
meets all of them against float64 oracles (kernels_reference_test.py), kernels against the reference: in the
interpreters of Triton, Mosaic GPU and Mosaic TPU, and on devices Triton, Mosaic GPU and cuDNN. Choices of blocks have
no gradients; they are compared with the oracles' scores everywhere.
"""
import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest

from pallas_kernels import arg_specs, masked, reference

on_cpu = functools.partial(jax.default_device, jax.devices("cpu")[0])
RESULTS = {operation: ("o", "lse", "dq", "dk", "dv")
           for operation in ("attention", "compressed_attention", "selected_attention", "token_attention")}
RESULTS["index_kl"] = ("loss", "dq_idx", "dk_idx")
DIFFERENTIABLE = tuple(RESULTS)
RESULTS["paged_attention"] = ("o", "lse")  # whose cases are those of paged_test.py
SELECTIONS = ("index_top_k", "compressed_top_k", "block_top_k")


def with_older_jax(cases, few):
  """Cases whose programs take seconds each to compile: all of them for the newest jax, which CI asks too, the named few
  before it."""
  return list(cases) if jax.__version_info__ >= (0, 11) else [case for case in cases if case in few]


def kernels_run() -> bool:
  """Whether Triton's kernels run in its interpreter; skips where they do not run at all."""
  pytest.importorskip("triton", reason="triton is not installed")
  from pallas_kernels.triton import call
  if call.INTERPRET:
    pytest.importorskip("torch", reason="the interpreter needs torch")
  elif jax.default_backend() != "gpu":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
  return call.INTERPRET


# --- what happens in the arrays ---------------------------------------------------


def anything(rng, shape, count):
  """Future blocks, duplicates, -1 in any place."""
  return rng.integers(-1, count, size=shape)


def everybody(block):
  return lambda rng, shape, count: np.full(shape, min(block, count - 1))


def half_empty(rng, shape, count):
  return np.where(rng.random(shape[:3] + (1,)) < 0.5, -1, rng.integers(0, count, size=shape))


def with_duplicates_and_strangers(rng, shape, count):
  blocks = rng.integers(-1, count + 3, size=shape)  # some lie past the end
  blocks[..., -1] = blocks[..., 0]
  return blocks


@dataclasses.dataclass(frozen=True)
class Situation:
  documents: Callable[[int], int] | None = None  # keys -> how many are packed
  # where each sequence's queries begin, in parts of the keys beyond T; > 1: of all keys
  offset: tuple[float, ...] = (0.0,)
  blocks: Callable[..., Any] | None = None  # of the selection; None is `anything`
  magnitude: float = 1.0  # of q and k


SITUATIONS = {
    "random": Situation(offset=(0, 0.95)),
    "from_the_start": Situation(),  # most choices lie in the future
    "segments": Situation(documents=lambda S: 4, offset=(0.6, 1)),
    "crumbs": Situation(documents=lambda S: S // 3, offset=(0.3, 1)),
    "past_the_keys": Situation(documents=lambda S: 4, offset=(0.9, 1.02)),
    "half_empty": Situation(blocks=half_empty, offset=(0.4, 1)),
    "all_empty": Situation(blocks=everybody(-1)),
    "sink": Situation(blocks=everybody(0), offset=(0, 1)),
    "late_block": Situation(blocks=everybody(3), offset=(0.8, 1)),
    "duplicates_and_strangers": Situation(blocks=with_duplicates_and_strangers, offset=(0.05, 1)),
    "huge_logits": Situation(magnitude=8.0, offset=(0.4, 1)),
}


def situations(operation: str) -> list[str]:
  """Names of those that mean something for an operation."""
  selects = operation in ("selected_attention", "token_attention", "index_kl")
  return [name for name, s in SITUATIONS.items() if selects or s.blocks is None]


@dataclasses.dataclass(frozen=True)
class Shape(arg_specs.AttentionSpec):
  """A shape whose keys may be more, or fewer, than its queries."""
  S: int = 0  # keys; 0: T
  sets: int = 0  # of tokens per query; 0: K

  @property
  def keys(self) -> int:
    return self.S or self.T


def shape(**fields) -> Shape:
  small = dict(name="", B=2, T=29, N=4, K=2, H=8, block_size=8, J=4, dtype="float32", block_len=8, block_stride=4,
               index_dim=4)
  return Shape(**{**small, **fields})


# --- inputs -------------------------------------------------------------------


class Inputs(NamedTuple):
  arrays: tuple      # what gets gradients, or chooses
  cotangents: Any    # of the results, None of a choice
  rest: dict         # other arrays, by keyword; segment_ids and query_offset among them


def draw(operation: str, s: Shape, situation: str | Situation = "random", seed: int = 0, *, always: bool = True,
         whole: bool = False):
  """Inputs of a call.

  Args:
    always: without it segment ids are None if nothing is packed, and an offset that all have an int.
    whole: q, k, v and scores are small whole numbers: sums of their products are exact, and tie.
  """
  what = SITUATIONS[situation] if isinstance(situation, str) else situation
  rng, dtype = np.random.default_rng(seed), jnp.dtype(s.dtype)
  new = lambda shape: rng.integers(-2, 3, shape) if whole else rng.normal(size=shape)
  array = lambda *shape, size=1.0: jnp.asarray(new(shape) * size, dtype)
  number = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  B, T, S, N, K, H = s.B, s.T, s.keys, s.N, s.K, s.H
  C = max(0, (S - s.block_len) // s.block_stride + 1)
  offset = np.resize([round(part * max(S - T, 0)) if part <= 1 else round(part * S) for part in what.offset], B)
  packed = what.documents is not None
  ids = np.sort(rng.integers(0, what.documents(S), size=(B, S)), axis=1) if packed else np.zeros((B, S))
  rest = dict(segment_ids=jnp.asarray(ids, jnp.int32), query_offset=jnp.asarray(offset, jnp.int32))
  if not always:
    rest["segment_ids"] = rest["segment_ids"] if packed else None
    rest["query_offset"] = int(offset[0]) if (offset == offset[0]).all() else rest["query_offset"]
  if operation == "block_top_k":
    return Inputs((array(B, T, K, -(-S // s.block_size)),), None, rest)
  if operation == "index_top_k":
    return Inputs((array(B, T, K, s.index_dim, size=what.magnitude), array(B, S, s.index_dim)), None, rest)
  keys = C if operation in ("compressed_attention", "compressed_top_k") else S
  q, k, v = array(B, T, N, H, size=what.magnitude), array(B, keys, K, H, size=what.magnitude), array(B, keys, K, H)
  if operation in ("selected_attention", "index_kl"):
    blocks = (what.blocks or anything)(rng, (B, T, K, s.J), -(-S // s.block_size))
    rest["block_indices"] = jnp.asarray(blocks, jnp.int32)
  if operation == "token_attention":  # J tokens as blocks of 1, those that a query sees: it takes no positions
    mask = _sets_of_tokens((what.blocks or anything)(rng, (B, T, s.sets or K, s.J), S), 1, S, rest)
    return Inputs((q, k, v), (array(B, T, N, H), number(B, T, N)), dict(token_sets=masked.packed(mask)))
  if operation not in ("index_kl", "compressed_top_k"):
    return Inputs((q, k, v), (array(B, T, N, H), number(B, T, N)), rest)
  main = "selected_attention" if operation == "index_kl" else "compressed_attention"
  with on_cpu():
    lse = _reference(main, **options_of(main, s))(on_host(up((q, k, v))), on_host(rest))[1]
  rest["lse"] = jnp.asarray(np.asarray(lse))
  if operation == "compressed_top_k":
    return Inputs((q, k), None, rest)
  index = array(B, T, K, s.index_dim, size=what.magnitude), array(B, S, s.index_dim)
  return Inputs(index, number(B, T, K), dict(rest, q=q, k=k))


def _sets_of_tokens(blocks, size, keys, where):
  """bool[B, T, R, S]: the visible tokens of blocks."""
  blocks = jnp.asarray(np.asarray(blocks), jnp.int32)
  pos, seg = reference._query_positions(blocks.shape[1], where["query_offset"], where["segment_ids"])
  return reference._selected_tokens(blocks, pos, seg, slice(0, keys), where["segment_ids"], size).swapaxes(1, 2)


@functools.cache
def _reference(operation, **options):
  return jax.jit(lambda arrays, rest: getattr(reference, operation)(*arrays, **rest, **options))


def up(tree):
  """Floating arrays in float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)


def on_host(tree):
  """Arrays of a tree on the default device; other leaves stay."""
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)) if isinstance(x, jax.Array) else x, tree)


def options_of(operation: str, s: Shape) -> dict:
  """The plain arguments that the operation needs at a shape."""
  lengths, size = dict(block_len=s.block_len, block_stride=s.block_stride), dict(block_size=s.block_size)
  choice = dict(size, num_blocks=s.J, num_initial=s.num_initial, num_local=s.num_local)
  return {"attention": {}, "token_attention": {}, "compressed_attention": lengths, "selected_attention": size,
          "index_kl": size,
          "index_top_k": choice, "compressed_top_k": {**lengths, **choice},
          "block_top_k": dict(choice, keys=s.keys)}[operation]


def sets_of(operation: str, inputs: Inputs, options: dict):
  """bool[B, 1 or K, T, S]: what each query attends to."""
  q, k = inputs.arrays[:2]
  if operation == "token_attention":
    mask = masked.unpacked(inputs.rest["token_sets"], k.shape[1]).swapaxes(1, 2)
    return jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
  ids, offset = inputs.rest["segment_ids"], inputs.rest["query_offset"]
  pos, seg = reference._query_positions(q.shape[1], offset, ids)
  if operation == "compressed_attention":
    lengths = options["block_len"], options["block_stride"]
    mask = reference._visible_compressed(pos, seg, k.shape[1], ids, *lengths)[:, None]
  elif operation == "selected_attention":
    blocks, keys = inputs.rest["block_indices"], slice(0, k.shape[1])
    mask = reference._selected_tokens(blocks, pos, seg, keys, ids, options["block_size"])
  else:
    how = {name: options[name] for name in ("causal", "window") if name in options}
    mask = masked.visible_tokens(pos, seg, slice(0, k.shape[1]), ids, **how)[:, None]
  return jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))


def positions_of(s: Shape, inputs: Inputs) -> dict:
  """segment_ids and query_offset as the oracles take them: a query past the keys is of the last key's segment."""
  where = {name: inputs.rest[name] for name in ("segment_ids", "query_offset")}
  if where["segment_ids"] is not None:
    ids, past = np.asarray(where["segment_ids"]), np.max(where["query_offset"]) + s.T - s.keys
    where["segment_ids"] = np.pad(ids, ((0, 0), (0, max(past, 0))), mode="edge")
  return {**where, "query_offset": np.asarray(where["query_offset"])}


# --- results and their errors -----------------------------------------------------


def with_gradients(f, **options):
  """f(*arrays, **rest, **options) to a jitted `Inputs` -> results and gradients, in the order of RESULTS."""
  def both(inputs):
    out, vjp = jax.vjp(lambda *arrays: f(*arrays, **inputs.rest, **options), *inputs.arrays)
    finite = lambda x, c: jnp.where(jnp.isfinite(x), c, 0).astype(x.dtype)
    return (*jax.tree.leaves(out), *vjp(jax.tree.map(finite, out, inputs.cotangents)))
  return _with_static_offset(both)


def _with_static_offset(both):
  """Jitted, with a query_offset that is an int and ids that are None left as they are."""
  @functools.partial(jax.jit, static_argnums=0)
  def run(static, inputs):
    return both(inputs._replace(rest={**inputs.rest, **dict(static)}))

  def call(inputs):
    static = tuple((n, x) for n, x in inputs.rest.items() if x is None or isinstance(x, int))
    return run(static, inputs._replace(rest={n: x for n, x in inputs.rest.items() if n not in dict(static)}))
  call.both = both  # not jitted, for jit around it
  return call


@functools.cache
def truth(operation: str, **options):
  """The reference, as `with_gradients` makes it."""
  f = getattr(reference, operation)
  if operation == "index_kl":
    f = of_index(f)
  return with_gradients(f, **options)


def of_index(f):
  """index_kl as a function of what gets gradients, the rest by keyword."""
  return lambda q_idx, k_idx, *, q, k, lse, block_indices, **rest: f(q, k, lse, q_idx, k_idx, block_indices, **rest)


def attend_in_dtype(mask, scale):
  """(q, k, v) -> (o, lse): what XLA makes of masked attention in the dtype of q, products added up in float32."""
  def attend(q, k, v):
    (B, T, N, H), K = q.shape, k.shape[2]
    s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
    s = jnp.where(mask[:, :, None], s * scale, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.exp(s - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
    o = jnp.einsum("bkgts,bskh->btkgh", p.astype(q.dtype), v, preferred_element_type=jnp.float32)
    return o.astype(q.dtype).reshape(q.shape), lse.transpose(0, 3, 1, 2).reshape(B, T, N)
  return attend


def in_dtype(inputs: Inputs, mask, scale):
  """The yardstick for the error of a kernel on a device: `attend_in_dtype` with its gradients."""
  return with_gradients(attend_in_dtype(mask, scale))(Inputs(inputs.arrays, inputs.cotangents, {}))


def compare(operation, got, want, dtype, *, exact=2e-6, rounded=4e-3, theirs=None):
  """Asserts that results are those of the truth, infinities included, by the norm of the error over that of the truth.

  Args:
    dtype: of the inputs: lse and losses, and all of float32, are `exact`; a bfloat16 rounds by 2e-3 on average.
    theirs: `in_dtype`; then the error is at most 2 times its error, and 3 times for gradients.
  """
  for n, (what, x, z) in enumerate(zip(RESULTS[operation], got, want, strict=True)):
    assert x.dtype == (jnp.float32 if what in ("lse", "loss") else dtype), what
    x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(z), err_msg=what)
    finite = np.isfinite(z)
    x, z = x[finite], z[finite]
    error, size = np.linalg.norm(x - z), np.linalg.norm(z)
    if theirs is not None:
      y = np.asarray(theirs[n], np.float64)[finite]
      bar = (3 if what.startswith("d") else 2) * np.linalg.norm(y - z) + 1e-6 * max(size, 1e-3)
    else:
      bar = (exact if what in ("lse", "loss") or dtype == jnp.float32 else rounded) * size
      bar = max(bar, 1e-5 * size) if what == "loss" else bar  # the difference of two larger numbers
    assert error <= bar, (what, error, bar, size)


def check(operation, program, inputs: Inputs, *, options=None, **tolerance):
  """Compares a `with_gradients` program with the truth on inputs; gives its results as float32 arrays."""
  got = jax.block_until_ready(program(inputs))
  compare(operation, got, truth(operation, **options or {})(up(inputs)), inputs.arrays[0].dtype, **tolerance)
  return [np.asarray(x, np.float32) for x in got]


def check_by_oracle(operation, got, s: Shape, inputs: Inputs, options, **tolerance):
  """Compares results and gradients with those of float64, one query at a time."""
  (q, k), rest = inputs.arrays[:2], inputs.rest
  where = {} if operation == "token_attention" else positions_of(s, inputs)
  if operation == "token_attention":
    sets = oracle.token_sets(np.asarray(rest["token_sets"]), s.K, s.keys)
  elif operation == "attention":
    how = {name: options[name] for name in ("causal", "window") if name in options}
    sets = oracle.dense_sets(s.B, s.T, s.K, s.keys, **where, **how)
  elif operation == "compressed_attention":
    sets = oracle.compressed_sets(s.B, s.T, s.K, k.shape[1], s.block_len, s.block_stride, **where)
  else:
    sets = oracle.selected_sets(np.asarray(rest["block_indices"]), s.block_size, s.keys, **where)
  scale, cotangents = options.get("scale", s.H ** -0.5), jax.tree.map(np.asarray, inputs.cotangents)
  if operation == "index_kl":
    want = oracle.index_kl(rest["q"], rest["k"], q, k, sets, scale, s.index_dim ** -0.5, cotangents)
  else:
    want = oracle.attend(*inputs.arrays, sets, scale, *cotangents)
  compare(operation, got, want, q.dtype, **tolerance)


def check_selection(operation, choose, s: Shape, inputs: Inputs, *, whole=False, atol=1e-5):
  """Checks choose(*arrays, **rest) -> lists against the scores of the oracle; of whole numbers, whose scores are exact,
  the lower block wins a tie."""
  got, where = np.asarray(choose(*inputs.arrays, **inputs.rest)), positions_of(s, inputs)
  if operation == "index_top_k":
    scores = oracle.index_block_scores(*inputs.arrays, s.block_size, **where)
  elif operation == "compressed_top_k":
    lengths = s.block_len, s.block_stride, s.block_size
    scores = oracle.compressed_block_scores(*inputs.arrays, *lengths, s.keys, s.H ** -0.5, **where)
  else:
    nothing = np.zeros((s.B, s.T, s.K, 1)), np.zeros((s.B, s.keys, 1))
    visible = np.isfinite(oracle.index_block_scores(*nothing, s.block_size, **where))
    scores = np.where(visible, np.asarray(inputs.arrays[0], np.float64), -np.inf)
  oracle.check_selection(got, scores, s.J, s.num_initial, s.num_local, s.block_size, where["query_offset"], atol=atol,
                         exact=whole and operation != "compressed_top_k")  # whose scores are probabilities


def check_nan_scores(block_top_k=None, index_top_k=None):
  """What api.py says of NaN, of choices among 10 blocks of 4 tokens that force the own block: others' lists stay."""
  rng, T, how = np.random.default_rng(0), 40, dict(block_size=4, num_blocks=4, num_initial=0, num_local=1)
  lists = lambda f, *arrays: np.sort(jax.jit(functools.partial(f, **how, segment_ids=None, query_offset=0))(*arrays))
  others = np.arange(T) != 30
  if block_top_k:
    scores = rng.normal(size=(1, T, 1, 10)).astype(np.float32)
    scores[0, 30, 0, :3] = (-5, np.nan, -6)
    plain, got = (lists(functools.partial(block_top_k, keys=T), x) for x in (np.nan_to_num(scores, nan=-7.0), scores))
    best = 3 + np.argsort(scores[0, 30, 0, 3:7])[-2:]
    assert got[0, 30, 0].tolist() == [1, *sorted(best), 7]
    np.testing.assert_array_equal(got[:, others], plain[:, others])
  if index_top_k:
    q, k = (rng.normal(size=shape).astype(np.float32) for shape in ((1, T, 1, 8), (1, T, 8)))
    bad_query, bad_key = q.copy(), k.copy()
    bad_query[0, 30], bad_key[0, 9] = np.nan, np.nan
    best = k.copy()
    best[0, 9] = best[0, 8]  # one of the block's own that is a number
    got, got_key, want, want_key = (lists(functools.partial(index_top_k, scale=1.0), *arrays) for arrays in (
        (bad_query, k), (q, bad_key), (q, k), (q, best)))
    assert got[0, 30, 0].tolist() == [0, 1, 2, 7]  # all are alike: the lower ones, and the own one
    np.testing.assert_array_equal(got[:, others], want[:, others])
    np.testing.assert_array_equal(got_key, want_key)


def check_on_device(operation, f, s: Shape, situation, *, seed=0, **options):
  """A kernel on the default device, against float32 on the host and the error of XLA in the kernel's dtype there."""
  inputs = draw(operation, s, situation, seed, always=False)
  options = {**options_of(operation, s), **options}
  got = with_gradients(f, **options)(inputs)
  with on_cpu():
    host = on_host(inputs)
    theirs = in_dtype(host, sets_of(operation, host, options), s.H ** -0.5)
    compare(operation, got, truth(operation, **options)(up(host)), jnp.dtype(s.dtype), theirs=theirs)


def same_bits(program, inputs: Inputs, runs: int = 20):
  """Asserts equal bits of all results over so many runs."""
  first = [np.asarray(x).view(np.uint8) for x in program(inputs)]
  for _ in range(runs - 1):
    for x, y in zip(first, program(inputs)):
      np.testing.assert_array_equal(x, np.asarray(y).view(np.uint8))
