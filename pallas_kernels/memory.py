"""Titans' memories (arXiv 2501.00663, section 3) by kernels, where they serve: chunks written one after the other, read
side by side.

The slow twins are the scan and the products of nsa/methods/titans/memory.py, which says what the symbols mean.
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backends, partition

WEIGHTS = 8192      # numbers of one matrix: a program of tokens has both, and what is made of them, in registers
CHUNKS = 256        # of a call: each is two calls in a program forward and two backward
READ = 128         # tokens of a chunk that is read: a program has the weights of all of them for some
QUERIES = 16       # of a memory
IMPLEMENTATIONS = (None, backends.FASTEST, "triton")


class Mixing(NamedTuple):
  """What is left of a chunk's memory, of its surprise and of its tokens' own steps, float32."""
  tokens: jax.Array    # [B, R, C, T, T], C of the module: of token i's step in the memory after token t
  beta: jax.Array      # [B, R, C, T], of the memory that the chunk began with after token t
  gamma: jax.Array     # the same of the surprise, in that memory
  leaving: jax.Array   # the same of a token's own step in the memory at the chunk's end
  lasting: jax.Array   # and in the surprise there
  decays: jax.Array    # [B, R, C, 3], (beta, gamma, what is left of the surprise) at the chunk's end


class Written(NamedTuple):
  """What chunks leave for whoever reads them."""
  pairs: tuple   # of each matrix float32[B, R, C, 2 I, O]: itself and its surprise at every chunk's beginning
  end: tuple     # the same after the last chunk, float32[B, R, 2 I, O]
  inputs: tuple  # of each matrix but the first, float32[B, R, C, T, I]: what the tokens' keys give it
  errors: tuple  # of each matrix [B, R, C, T, O] in the dtype of the products: error signals times steps
  low: tuple = ()  # `pairs` in that dtype, for `read`: they carry no gradient


def refuses(*, chunk: int, chunks: int, width: int, hidden: int, depth: int, norm: bool, gradient: str, products: str,
            begins_a_chunk: bool) -> str | None:
  """Why the kernels cannot write a call's chunks here, or None; a reason begins with the name of what it is about."""
  power = lambda n: n & (n - 1) == 0
  if depth != 2:
    return f"depth = {depth}: the kernels have two matrices"
  if not norm:
    return "norm = False: the kernels' matrices are followed by norms"
  if gradient != "chunk":
    return f"gradient = {gradient!r}: the kernels take gradients at the memory of the chunk's beginning"
  if products != "bfloat16":
    return f"products = {products!r}: the kernels multiply bfloat16"
  if not (power(width) and power(hidden) and min(width, hidden) >= 16 and width * hidden <= WEIGHTS):
    return (f"width, hidden width = {width}, {hidden}: the kernels take powers of two from 16 on whose product is at "
            f"most {WEIGHTS}")
  if chunk < 16 or not power(chunk):
    return f"chunk = {chunk}: the kernels take powers of two from 16 on"
  if chunks > CHUNKS:
    return f"chunks = {chunks}: the kernels take at most {CHUNKS}, lest a program becomes too long to compile"
  if not begins_a_chunk:
    return "offset, state: the kernels take whole chunks of a new sequence"
  if partition.active():
    return "mesh: the kernels are not cut over several devices"
  if backends.current_platform() != "gpu":
    return f"platform: the kernels run on gpu, not on {backends.current_platform()}"
  from pallas_kernels.triton import call
  if call.small_memory() and max(width, hidden) > 256:  # 512 by 16 take 128 KiB
    return f"width, hidden width = {width}, {hidden}: beyond 256 the kernels need more shared memory than there is"
  return call.unavailable()


def refuses_reading(*, read: str, queries: int, chunk: int, width: int, hidden: int, **how) -> str | None:
  """Why the kernels cannot read what they can write, or None; `how`: of `refuses` as well."""
  if reason := refuses(chunk=chunk, width=width, hidden=hidden, **how):
    return reason
  if read != "token":
    return f"read = {read!r}: the kernels read a memory after each token's own write"
  if chunk > READ:
    return f"chunk = {chunk}: the kernels read chunks of at most {READ}"
  if queries > QUERIES:
    return f"queries = {queries}: the kernels read a memory for at most {QUERIES} queries of a token"
  from pallas_kernels.triton import call
  if call.small_memory():
    return "platform: the kernels that read need more shared memory than this GPU has"
  return None


def reads(implementation: str | None, **how) -> bool:
  """Whether `mix` and `read` take the call; `how`: of `refuses_reading`."""
  return _chosen("memory read", implementation, refuses_reading, how)


def serves(implementation: str | None, **how) -> bool:
  """Whether `write` takes the call; logs why not, once, where a GPU could have. `how`: of `refuses`."""
  return _chosen("memory write", implementation, refuses, how)


def _chosen(operation, implementation, refuses, how):
  if implementation not in IMPLEMENTATIONS or backends.current_platform() != "gpu":
    return False
  try:
    reason = refuses(**how)
  except ImportError as error:  # a broken Triton costs its speed
    reason = f"pallas_kernels.triton does not import ({type(error).__name__}: {error})"
  backends.log_choice(operation, "triton" if reason is None else f"reference, because triton: {reason}")
  return reason is None


def write(tokens: dict, decays, anew, first, begin, *, clip: float, full: bool, dtype=jnp.bfloat16) -> Written:
  """Writes C chunks of T tokens each into R memories of two matrices, of shapes [I, H] and [H, I].

  Args:
    tokens: "k" and "v" float32[B, R, C, T, I], unit keys and values; "step" float32[B, R, C, T], theta; "leaving" and
      "lasting" float32[B, R, C, T], what of a token's own step is left in memory and surprise at its chunk's end;
      "gain" float32[R, I], of the memory's output.
    decays: float32[B, R, C, 3]: (beta, gamma, kept) from chunk to chunk, M <- beta M + gamma S, S <- kept S.
    anew: bool[B, C]: chunks that begin with `first` and no surprise.
    first: of each matrix float32[B, R, I, O].
    begin: of each matrix its pair, float32[B, R, 2 I, O].
    clip: of the norm of one token's gradient, in sqrt(I); 0 = not clipped.
    full: whether the gradient goes through the memory that errors are taken at.
    dtype: of the operands of products; sums are float32.

  Returns:
    `Written`, differentiable in all but `anew`. Equal inputs give equal bits.
  """
  from pallas_kernels.triton import memory as kernels
  tokens = {**tokens, "gain": jnp.broadcast_to(tokens["gain"], tokens["k"].shape[:2] + tokens["gain"].shape[1:])}
  pairs, end, hidden, errors, low = kernels.write(
      tokens, decays, jnp.asarray(anew, jnp.int32), tuple(first), tuple(begin), float(clip), bool(full),
      jax.dtypes.canonicalize_dtype(dtype))
  return Written(pairs, end, (hidden,), errors, low)


def mix(log_keep, log_momentum, live) -> Mixing:
  """Decays within chunks of T tokens, from float32[B, R, C, T] each.

  Args:
    log_keep, log_momentum: log(1 - alpha) and log(eta), 0 for tokens that are none.
    live: 1 for tokens, 0 for what is none and adds nothing to the memory.

  Returns:
    `Mixing`, differentiable in all but `live`. Equal inputs give equal bits.
  """
  from pallas_kernels.triton import memory_read as kernels
  return Mixing(*kernels.mix(log_keep, log_momentum, live))


def read(q, live, gain, mixing: Mixing, k, written: Written):
  """What R memories of two matrices answer after each token's own write, for all chunks side by side.

  Args:
    q: [B, C T, R, G, I], queries as projected: SiLU and unit norm are taken here.
    live: float32[B, C T], 1 for tokens; others get 0.
    gain: float32[R, I].
    mixing: of `mix`.
    k: float32[B, R, C, T, I], the unit keys that were written.
    written: of `write`. Its errors' dtype is that of the operands of products; sums are float32.

  Returns:
    float32[B, C T, R, G, I], differentiable in all but `live`. Equal inputs give equal bits.
  """
  from pallas_kernels.triton import memory_read as kernels
  gain = jnp.broadcast_to(gain, q.shape[:1] + gain.shape)
  return kernels.read(q, live, gain, tuple(mixing[:3]), k, written.inputs[0], tuple(written.errors), written.pairs,
                      written.low)
