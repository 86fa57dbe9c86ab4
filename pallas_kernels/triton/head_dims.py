"""Head dims that are no power of two, 80 or 96 for instance: padded with zeros, whose products change nothing.

`tl.arange` counts to powers of two alone. The padding is a copy of the arguments by XLA; scores keep their scale, which
is an argument of its own, and gradients of the padding are cut off.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call

LEAST, MOST = 16, 256
NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "k_pages", "v_pages", "q_idx", "k_idx")


def padded(head_dim):
  """The head dim that the kernels get for this one."""
  return max(call.next_power_of_2(head_dim), LEAST) if head_dim <= MOST else head_dim


def supports(function):
  """`function` of a call's arguments, told of shapes that are padded."""
  @functools.wraps(function)
  def wrapped(**arguments):
    shape = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], padded(x.shape[-1])), x.dtype)
    return function(**{name: shape(x) if name in NAMES and x is not None else x for name, x in arguments.items()})
  return wrapped


def any_head_dim(function, gives_rows):
  """`function` of a call's arguments with padded ones; if it `gives_rows`, (o, lse), o gets back its head dim."""
  @functools.wraps(function)
  def wrapped(**arguments):
    own = {name: x.shape[-1] for name, x in arguments.items() if name in NAMES and x is not None}
    if all(size == padded(size) for size in own.values()):
      return function(**arguments)
    for name, size in own.items():
      x = arguments[name]
      arguments[name] = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded(size) - size)])
    out = function(**arguments)
    return (out[0][..., :own["q"]], out[1]) if gives_rows else out
  return wrapped
