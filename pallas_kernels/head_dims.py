"""Head dims that kernels do not have, 80 or 96 for instance: padded with zeros, whose products change nothing.

The padding is a copy of the arguments by XLA. Scores keep their scale, which is an argument of its own; gradients of
the padding are cut off.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "k_pages", "v_pages", "q_idx", "k_idx")


def supports(function, padded, names=NAMES):
  """`function` of a call's arguments, told of shapes that are padded.

  Args:
    function: of keywords.
    padded: head dim to what the kernels get for it.
    names: of the arguments to pad.
  """
  @functools.wraps(function)
  def wrapped(**arguments):
    shape = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], padded(x.shape[-1])), x.dtype)
    return function(**{name: shape(x) if name in names and x is not None else x for name, x in arguments.items()})
  return wrapped


def pad(function, padded, gives_rows, names=NAMES):
  """`function` of keyword arguments with padded ones; if it `gives_rows`, (o, lse), o gets back its head dim."""
  @functools.wraps(function)
  def wrapped(**arguments):
    own = {name: x.shape[-1] for name, x in arguments.items() if name in names and x is not None}
    if all(size == padded(size) for size in own.values()):
      return function(**arguments)
    for name, size in own.items():
      x = arguments[name]
      arguments[name] = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded(size) - size)])
    out = function(**arguments)
    return (out[0][..., :own["q"]], out[1]) if gives_rows else out
  return wrapped
