"""What benchmarks.kernels times: every operation, whole NSA and MSA layers without projections, and decoding; block
lists.

A case is a function of (arrays, block indices) with the FLOPs that its result needs and the bytes that it cannot
avoid. Useful FLOPs count visible (query, key) pairs alone: 2 H for a score, 2 H for P V, and for gradients the five
products of dense attention, recomputation not counted.
"""
from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import arg_specs

PATTERNS = {
    "uniform": arg_specs.uniform,
    "neighbours80": functools.partial(arg_specs.neighbours, share=0.8),
    "stripes": arg_specs.stripes,
}


def draw_pattern(name, spec, seed):
  """int32[B, T, K, J] of a pattern by name; windows of a file take turns in the batch.

  Raises ValueError for a file without that layer, or of another shape.
  """
  if not name.startswith("file:"):
    return PATTERNS[name](spec, seed=seed)
  path, _, layer = name[len("file:"):].partition("@")
  with np.load(path) as file:
    lists, layers, meta = file["block_indices"], file["layers"].tolist(), json.loads(str(file["meta"]))
  if layer and layer not in map(str, layers):
    raise ValueError(f"--patterns: {name}: the file has the layers {layers}")
  lists = lists[layers.index(int(layer)) if layer else 0]
  found, needed = (*lists.shape[1:], meta["block_size"]), (spec.T, spec.K, spec.J, spec.block_size)
  if found != needed:
    raise ValueError(f"--patterns: {name} has T, K, J and block size {found}; {spec.name} needs {needed}")
  return lists[np.arange(spec.B) % len(lists)].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
  """`function` of (arrays, blocks); gradients go to the arrays in `wrt`, from the cotangent `do` of o."""
  function: Callable
  uses: tuple[str, ...]              # arrays read
  wrt: tuple[str, ...]               # arrays that get gradients; () times the forward pass alone
  flops: tuple[float, float | None]  # forward, forward and backward
  patterned: bool = False            # whether block indices come from outside
  bytes: float | None = None         # that cannot be avoided, if not all of `uses` is read


def causal_pairs(T, window=None):
  """Visible (query, key) pairs of one head of one sequence."""
  visible = np.arange(1, T + 1, dtype=np.float64)
  return float((visible if window is None else np.minimum(visible, window)).sum())


def compressed_pairs(spec):
  position = np.arange(spec.T)
  seen = np.where(position >= spec.block_len - 1, (position - spec.block_len + 1) // spec.block_stride + 1, 0)
  return float(np.minimum(seen, spec.num_compressed).sum(dtype=np.float64))


def visible_keys(indices, spec):
  """Keys that the queries of all KV heads see in their selected blocks."""
  position = np.arange(spec.T)[None, :, None, None]
  keys = np.clip(np.minimum(position + 1, spec.T) - indices * spec.block_size, 0, spec.block_size)
  return float(np.where(indices >= 0, keys, 0).sum(dtype=np.float64))


def at(operation, spec):
  """The spec of an operation: `pooled_and_top_k` compresses each selection block to one key, what others publish."""
  one = dict(block_len=spec.block_size, block_stride=spec.block_size) if operation == "pooled_and_top_k" else {}
  return dataclasses.replace(spec, **one)


def make(operation, spec, implementation=None, keys=None):
  """The case of an operation at a shape; `keys` are the `visible_keys` of its pattern."""
  s = at(operation, spec)
  heads = s.B * s.N
  if keys is None:  # J blocks are always visible but at the beginning
    keys = s.B * s.K * causal_pairs(s.T, s.J * s.block_size)
  how = dict(implementation=implementation)
  strides = dict(block_len=s.block_len, block_stride=s.block_stride)
  choice = dict(block_size=s.block_size, num_blocks=s.J, num_initial=s.num_initial, num_local=s.num_local)
  # A name goes to the operation that the case is named after; the others are the best there are, or the fastest.
  others = how if implementation == "fastest" else {}
  size = dict(block_size=s.block_size, **(how if operation in ("selected_attention", "index_kl") else others))
  attention = lambda pairs: (4 * s.H * pairs, 14 * s.H * pairs)
  sparse, window, compressed = keys * s.G, heads * causal_pairs(s.T, s.window), heads * compressed_pairs(s)
  index = 2 * s.index_dim * s.B * s.K * causal_pairs(s.T)
  kl = keys * (2 * s.H * s.G + 2 * s.index_dim)
  both_kl = kl + keys * 4 * s.index_dim

  def select(x):
    named = how if operation.startswith(("compressed", "pooled")) else others
    o, lse = pk.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **strides, **named)
    return o, pk.compressed_top_k(x["q"], x["k_cmp"], lse, **strides, **choice, **others)

  def nsa(x, blocks):
    o_cmp, blocks = select(x)
    o_slc, _ = pk.selected_attention(x["q"], x["k"], x["v"], blocks, **size)
    o_win, _ = pk.attention(x["q"], x["k"], x["v"], window=s.window, **others)
    return o_cmp + o_slc + o_win

  def msa(x, blocks):
    blocks = pk.index_top_k(x["q_idx"], x["k_idx"], **choice, **others)
    o, lse = pk.selected_attention(x["q"], x["k"], x["v"], blocks, **size)
    return o, pk.index_kl(x["q"], x["k"], lse, x["q_idx"], x["k_idx"], blocks, **size).mean()

  def msa_attention(x, blocks):
    blocks = pk.index_top_k(x["q_idx"], x["k_idx"], **choice, **others)
    return pk.selected_attention(x["q"], x["k"], x["v"], blocks, **size)[0]

  qkv, cmp, idx = ("q", "k", "v"), ("q", "k_cmp", "v_cmp"), ("q_idx", "k_idx")
  add = lambda *pairs: tuple(map(sum, zip(*pairs)))
  cases = {
      "attention": lambda: Case(lambda x, blocks: pk.attention(x["q"], x["k"], x["v"], **how)[0], qkv, qkv,
                                attention(heads * causal_pairs(s.T))),
      "window": lambda: Case(lambda x, blocks: pk.attention(x["q"], x["k"], x["v"], window=s.window, **how)[0], qkv,
                             qkv, attention(window)),
      "compressed_attention": lambda: Case(
          lambda x, blocks: pk.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **strides, **how)[0], cmp, cmp,
          attention(compressed)),
      "compressed_and_top_k": lambda: Case(lambda x, blocks: select(x), cmp, cmp,
                                           add(attention(compressed), (2 * s.H * compressed,) * 2)),
      "index_top_k": lambda: Case(lambda x, blocks: pk.index_top_k(x["q_idx"], x["k_idx"], **choice, **how), idx, (),
                                  (index, None)),
      "selected_attention": lambda: Case(
          lambda x, blocks: pk.selected_attention(x["q"], x["k"], x["v"], blocks, **size)[0], qkv, qkv,
          attention(sparse), patterned=True),
      "index_kl": lambda: Case(
          lambda x, blocks: pk.index_kl(x["q"], x["k"], x["lse"], x["q_idx"], x["k_idx"], blocks, **size).mean(),
          ("q", "k", "lse", *idx), idx, (kl, both_kl), patterned=True),
      "nsa_layer": lambda: Case(nsa, ("q", "k", "v", "k_cmp", "v_cmp"), ("q", "k", "v", "k_cmp", "v_cmp"),
                                add(attention(sparse + window + compressed), (2 * s.H * compressed,) * 2)),
      "msa_attention": lambda: Case(msa_attention, (*qkv, *idx), (), (index + attention(sparse)[0], None)),
      "msa_layer": lambda: Case(msa, (*qkv, *idx), (*qkv, *idx),
                                add(attention(sparse), (index + kl, index + both_kl))),
  }
  cases["pooled_and_top_k"] = cases["compressed_and_top_k"]
  return cases[operation]()


OPERATIONS = ("attention", "window", "compressed_attention", "compressed_and_top_k", "pooled_and_top_k", "index_top_k",
              "selected_attention", "index_kl", "nsa_layer", "msa_attention", "msa_layer")
DECODE_STEPS = 8  # of a timed program
CHAINS = ("fed", "added")  # how each needs the one before: see `decode`


def arrays(spec, seed):
  x = arg_specs.arrays(spec, seed)
  return dict(x, lse=jnp.full(x["q"].shape[:3], float(np.log(spec.J * spec.block_size)), jnp.float32))


def functions(case):
  """Jitted (arrays, blocks) -> result, and -> result and gradients (None without)."""
  def both(x, blocks):
    def f(*wrt):
      return case.function({**x, **dict(zip(case.wrt, wrt))}, blocks)
    out, pull = jax.vjp(f, *(x[name] for name in case.wrt))
    return out, pull(jax.tree.map(lambda o: _cotangent(o, x["do"]), out))
  return jax.jit(case.function), jax.jit(both) if case.wrt else None


def _cotangent(out, do):
  if not jnp.issubdtype(out.dtype, jnp.floating):
    return np.zeros(out.shape, jax.dtypes.float0)
  return do if out.shape == do.shape else jnp.ones(out.shape, out.dtype)


def least_bytes(case, x, out):
  """Each array read once and each result written once, forward, and with gradients."""
  if case.bytes is not None:
    return case.bytes, case.bytes
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  inputs = {name: x[name] for name in case.uses}
  forward = size(inputs) + size(out)
  return forward, forward + size(x["do"]) + size([x[name] for name in case.wrt])


# --- decoding ---------------------------------------------------------------------


DECODE_KINDS = {  # operation of benchmarks.kernels -> what is timed
    "decode": lambda spec: ("decode_dense", "decode_msa" if spec.num_initial == 0 else "decode_nsa"),
    "decode_paged": lambda spec: ("decode_paged_dense", "decode_selected", "decode_paged_selected"),
}


def decode(operation, spec, batch, implementation=None, chain="fed"):
  """(case, arrays): one new token per sequence against a cache of spec.T tokens, the position traced.

  Each token needs the one before. chain "fed": its result is the next q, means of values, so finite; "added": what
  rows before had, q + 0 * o, a kernel of its own.

  Pages are the blocks of the contiguous cache, under names in random order. `decode_selected` and
  `decode_paged_selected` attend to blocks that are drawn, without choosing them.
  """
  s = spec
  key = jax.random.key(0)

  def draw(n, batch, *shape):  # one sequence's numbers for all: random bits of long caches take more memory than they
    one = jax.random.normal(jax.random.fold_in(key, n), (1, *shape), jnp.dtype(s.dtype))
    return jnp.tile(one, (batch,) + (1,) * len(shape))

  x: dict[str, Any] = dict(position=jnp.int32(s.T - 1), q=draw(0, batch, 1, s.N, s.H), k=draw(1, batch, s.T, s.K, s.H),
                           v=draw(2, batch, s.T, s.K, s.H))
  where = lambda x: dict(query_offset=x["position"], implementation=implementation)
  choice = dict(block_size=s.block_size, num_blocks=s.J, num_initial=s.num_initial, num_local=s.num_local)
  token = 2 * s.K * s.H * x["k"].dtype.itemsize  # bytes of K and V of one token
  selected = s.J * s.block_size * token
  pages = s.num_blocks
  if operation in DECODE_KINDS["decode_paged"](s):
    assert s.T % s.block_size == 0, s
    rng = np.random.default_rng(0)
    x["table"] = jnp.asarray(rng.permutation(batch * pages).reshape(batch, pages), jnp.int32)
    blocks = np.argsort(rng.random((batch, 1, s.K, pages - 1), np.float32))[..., :s.J - 1]
    x["blocks"] = jnp.asarray(np.concatenate([blocks, np.full_like(blocks[..., :1], pages - 1)], axis=-1), jnp.int32)
  paged = lambda x, **more: pk.paged_attention(
      x["q"], *(x[name].reshape(-1, s.block_size, s.K, s.H) for name in ("k", "v")), x["table"], **more, **where(x))[0]
  if operation == "decode_paged_dense":
    f, least = lambda x, blocks: paged(x), s.T * token
  elif operation == "decode_paged_selected":
    f, least = lambda x, blocks: paged(x, block_indices=x["blocks"]), selected
  elif operation == "decode_selected":
    f = lambda x, blocks: pk.selected_attention(x["q"], x["k"], x["v"], x["blocks"], block_size=s.block_size,
                                                **where(x))[0]
    least = selected
  elif operation == "decode_dense":
    f = lambda x, blocks: pk.attention(x["q"], x["k"], x["v"], **where(x))[0]
    least = s.T * token
  elif operation == "decode_nsa":
    x.update(k_cmp=draw(3, batch, s.num_compressed, s.K, s.H), v_cmp=draw(4, batch, s.num_compressed, s.K, s.H))
    strides = dict(block_len=s.block_len, block_stride=s.block_stride)

    def f(x, blocks):
      o_cmp, lse = pk.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **strides, **where(x))
      blocks = pk.compressed_top_k(x["q"], x["k_cmp"], lse, **strides, **choice, **where(x))
      o_slc, _ = pk.selected_attention(x["q"], x["k"], x["v"], blocks, block_size=s.block_size, **where(x))
      o_win, _ = pk.attention(x["q"], x["k"], x["v"], window=s.window, **where(x))
      return o_cmp + o_slc + o_win
    least = s.num_compressed * token + selected + s.window * token
  else:
    x.update(q_idx=draw(3, batch, 1, s.K, s.index_dim), k_idx=draw(4, batch, s.T, s.index_dim))

    def f(x, blocks):
      q_idx = x["q_idx"] + 0 * x["q"][:, :, :s.K, :1]  # or it is the same in all steps, and XLA chooses once for all
      blocks = pk.index_top_k(q_idx, x["k_idx"], **choice, **where(x))
      return pk.selected_attention(x["q"], x["k"], x["v"], blocks, block_size=s.block_size, **where(x))[0]
    least = s.T * s.index_dim * x["k"].dtype.itemsize + selected

  def steps(x, blocks):  # several in one program, as a generation loop would launch them; each needs the one before
    for _ in range(DECODE_STEPS):
      x = dict(x, q=_next(x["q"], f(x, blocks), chain))
    return x["q"]

  return Case(steps, (), (), (0.0, None), bytes=float(batch * least)), x


def _next(q, o, chain):
  return {"fed": lambda: o, "added": lambda: q + 0 * o}[chain]()


def dense_decode(x, blocks, chain="fed"):
  """cuDNN's attention of one token per sequence over the whole cache."""
  lengths = jnp.full((x["q"].shape[0],), x["position"] + 1, jnp.int32)
  q = x["q"]
  for _ in range(DECODE_STEPS):
    o = jax.nn.dot_product_attention(q, x["k"], x["v"], key_value_seq_lengths=lengths, implementation="cudnn")
    q = _next(q, o, chain)
  return q
