"""Which implementation serves what: the table of docs/kernels.md, asked of every `supports`.

  python -m benchmarks.support            # prints it
  python -m benchmarks.support --write    # puts it into docs/kernels.md

Needs Triton installed, no device: GPU kernels are asked as if on an H100. Nothing is computed.
"""
from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from unittest import mock

from absl import flags
import jax
import jax.numpy as jnp

from launch import cli
from pallas_kernels import backends

_WRITE = flags.DEFINE_boolean("write", False, "Writes the table into docs/kernels.md.")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- support: python -m benchmarks.support --write -->\n", "<!-- end of support -->"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
GROUPS = tuple(range(1, 17)) + (32, 64)
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
BLOCK_SIZES = (8, 16, 32, 48, 64, 128, 256)
WITHOUT_BLOCKS = ("attention", "compressed_attention", "token_top_k", "token_attention")
T, K, J, PAGES = 4096, 2, 16, 64  # queries and keys, KV heads, slots, of the call that is asked about


@contextlib.contextmanager
def as_on_an_h100():
  """Kernels answer as if they could be compiled and run for one."""
  from pallas_kernels import cudnn
  try:
    from pallas_kernels.triton import call
  except ImportError as error:
    raise ModuleNotFoundError(f"{error}: its kernels are asked too, which takes no GPU: pip install triton") from None
  with mock.patch.object(call, "unavailable", lambda: None), mock.patch.object(call, "INTERPRET", False), \
       mock.patch.object(call, "capability", lambda: 90), mock.patch.object(cudnn, "unavailable", lambda: None):
    yield


def arguments(operation, dtype="bfloat16", group=4, head_dim=64, block_size=64, packed=False, queries=T,
              offset=0) -> dict:
  """The arguments of a call, arrays as shapes and dtypes; the index branch has the head dim of the model."""
  of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  N, H, stride = K * group, head_dim, max(1, block_size // 4)
  q, k = of(1, queries, N, H), of(1, T, K, H)
  k_cmp = of(1, (T - 2 * stride) // stride + 1, K, H)
  lse, blocks = of(1, queries, N, dtype="float32"), of(1, queries, K, J, dtype="int32")
  q_idx, k_idx = of(1, queries, K, H), of(1, T, H)
  heads = dict(q_idx=of(1, queries, K, 4, H), index_weights=of(1, queries, K, 4))
  strides = dict(block_len=2 * stride, block_stride=stride)
  choice = dict(block_size=block_size, num_blocks=J, num_initial=1, num_local=2)
  where = dict(scale=H ** -0.5, segment_ids=of(1, T, dtype="int32") if packed else None, query_offset=offset)
  if operation == "paged_attention":
    pages = of(PAGES, block_size, K, H)
    return dict(q=q, k_pages=pages, v_pages=pages, page_table=of(1, T // block_size, dtype="int32"), block_indices=None,
                window=None, scale=H ** -0.5, query_offset=offset)
  return {
      "attention": lambda: dict(q=q, k=k, v=k, causal=True, window=None, **where),
      "compressed_attention": lambda: dict(q=q, k_cmp=k_cmp, v_cmp=k_cmp, **strides, **where),
      "compressed_top_k": lambda: dict(q=q, k_cmp=k_cmp, lse=lse, **strides, **choice, **where),
      "index_top_k": lambda: dict(q_idx=q_idx, k_idx=k_idx, **choice, **where),
      "selected_attention": lambda: dict(q=q, k=k, v=k, block_indices=blocks, block_size=block_size, **where),
      "index_kl": lambda: dict(q=q, k=k, lse=lse, q_idx=q_idx, k_idx=k_idx, block_indices=blocks, block_size=block_size,
                               index_scale=H ** -0.5, **where),
      "lightning_scores": lambda: dict(heads, k_idx=k_idx, block_size=block_size, segment_ids=where["segment_ids"],
                                       query_offset=offset),
      "lightning_kl": lambda: dict(heads, q=q, k=k, lse=lse, k_idx=k_idx, block_indices=blocks, block_size=block_size,
                                   token_sets=None, **where),
      "token_top_k": lambda: dict(heads, k_idx=k_idx, num_tokens=2048, segment_ids=where["segment_ids"],
                                  query_offset=offset),
      "token_attention": lambda: dict(q=q, k=k, v=k, token_sets=of(1, queries, 1, T // 32, dtype="int32"),
                                      scale=H ** -0.5),
      "block_top_k": lambda: dict(scores=of(1, queries, K, -(-T // block_size), dtype="float32"), keys=T, **choice,
                                  segment_ids=where["segment_ids"], query_offset=offset),
      "block_mass": lambda: dict(q=q, k=k, lse=lse, block_size=block_size, **where),
      "block_peak": lambda: dict(q=q, k=k, lse=lse, block_indices=blocks, block_size=block_size, **where),
  }[operation]()


def _listed(values, of) -> str:
  """Numbers as text, neighbours in `of` joined: 1-16."""
  if not values:
    return "none"
  parts, order = [], list(of)
  for value in values:
    if parts and order.index(value) == order.index(parts[-1][-1]) + 1:
      parts[-1].append(value)
    else:
      parts.append([value])
  return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}, {p[1]}" if len(p) == 2 else f"{p[0]}-{p[-1]}" for p in parts)


def _products(cells) -> list[tuple[tuple, tuple, tuple]]:
  """The served (dtype, group, head dim) as few products of three sets: by dtype, then by equal sets of groups."""
  by_dtype = {}
  for dtype in DTYPES:
    groups_of = {}
    for head_dim in HEAD_DIMS:
      groups = tuple(g for g in GROUPS if (dtype, g, head_dim) in cells)
      if groups:
        groups_of.setdefault(groups, []).append(head_dim)
    if groups_of:
      by_dtype.setdefault(tuple((g, tuple(h)) for g, h in groups_of.items()), []).append(dtype)
  return [(tuple(dtypes), groups, head_dims) for parts, dtypes in by_dtype.items() for groups, head_dims in parts]


def rows() -> list[str]:
  """Lines of Markdown: operations, implementation, platform, and what it takes; "any" is all that was asked."""
  lines = ["| operation | implementation | on | dtype | G | head dim | block size | packed | one query from a cache |",
           "|---|---|---|---|---|---|---|---|---|"]
  operations_of = {}  # what is taken -> the operations that take just that
  any_of = lambda values, of: "any" if tuple(values) == tuple(of) else _listed(values, of)
  with as_on_an_h100():
    for operation in backends.OPERATIONS:
      for name in backends.available(operation):
        if name == "reference":
          continue
        found = backends._registered[operation][name]
        serves = lambda **how: found.supports(**arguments(operation, **how)) is None
        served = {cell for cell in itertools.product(DTYPES, GROUPS, HEAD_DIMS)
                  if serves(dtype=cell[0], group=cell[1], head_dim=cell[2])}
        sizes = [size for size in BLOCK_SIZES if serves(block_size=size)]
        blocks = "-" if operation in WITHOUT_BLOCKS else any_of(sizes, BLOCK_SIZES)
        packed = "-" if operation == "paged_attention" else "yes" if serves(packed=True) else "no"
        cache = "yes" if serves(queries=1, offset=jax.ShapeDtypeStruct((1,), jnp.int32)) else "no"
        for dtypes, groups, head_dims in _products(served):
          if operation == "block_top_k":  # scores are float32, whatever they were made of
            dtypes, groups, head_dims = ("any",), GROUPS, HEAD_DIMS
          kinds = ", ".join(DTYPES.get(dtype, dtype) for dtype in dtypes)
          cells = (name, ", ".join(found.platforms).upper(), kinds, any_of(groups, GROUPS),
                   any_of(head_dims, HEAD_DIMS), blocks, packed, cache)
          operations_of.setdefault(cells, []).append(operation)
  return lines + [f"| {' | '.join((', '.join(operations), *cells))} |" for cells, operations in operations_of.items()]


def page(text: str) -> str:
  """The page with the table of today."""
  before, rest = text.split(BEGIN)
  return before + BEGIN + "\n".join(rows()) + "\n" + END + rest.split(END)[1]


def main():
  if _WRITE.value:
    PAGE.write_text(page(PAGE.read_text()))
  else:
    print("\n".join(rows()))


if __name__ == "__main__":
  cli.run(main)
