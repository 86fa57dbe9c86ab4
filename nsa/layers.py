"""The parts that the model and the methods share: parameter creation, norm, RoPE, convolution.

Modules are thin holders of parameters; their `__call__` is pure mathematics.
"""
from __future__ import annotations

import functools
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from pallas_kernels import fused, spans

# Above this many positions a RoPE table would bloat the program as a constant.
_MAX_CONSTANT_POSITIONS = 32_768
_ONE_HOT_ROWS = 1024  # vocabularies up to this size sum the gradient of their embeddings by a product


class Init:
  """Creates parameters whose random key depends on their own path alone.

  Adding a selector or a branch to a model therefore leaves the initial value of
  every other parameter as it was: all arms of one seed start from the same weights.

  What the optimizer and the FLOPs have to know of a parameter it is told here, and keeps as metadata:
    group   the parameter group (methods/interface.py, GROUPS); an Init hands its own to all below it
    axes    logical names of its dimensions, for sharding
    decay   whether weight decay acts on it
    matrix  of a weight that is a matrix: the dimensions that it sums over, counted from the end; those behind them
            are what it makes of them, those before them count separate matrices. (): norms, biases, tables
    tokens  whether the matrix multiplies every token, so that it costs 2 FLOPs per weight and token
  """

  def __init__(self, key: Array, group: str = "backbone"):
    self.key, self.group = key, group

  def child(self, name: str | int, group: str | None = None) -> "Init":
    tag = name if isinstance(name, int) else zlib.crc32(name.encode())
    return Init(jax.random.fold_in(self.key, tag), self.group if group is None else group)

  def param(self, value: Array, axes: tuple[str | None, ...], *, decay: bool = False,
            matrix: tuple[int, ...] = (), tokens: bool = True) -> nnx.Param:
    """A parameter that begins with `value`; `matrix` counts its dimensions from the first."""
    matrix = tuple(i - value.ndim for i in matrix)
    return nnx.Param(value, axes=axes, decay=decay, group=self.group, matrix=matrix, tokens=tokens and bool(matrix))

  def normal(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *, fan_in: int,
             gain: float = 1.0, decay: bool = True, matrix: tuple[int, ...] = (0,), tokens: bool = True) -> nnx.Param:
    """Gaussian with standard deviation gain / sqrt(fan_in). What is not decayed is no matrix."""
    value = jax.random.normal(self.child(name).key, shape, jnp.float32) * (gain * fan_in ** -0.5)
    return self.param(value, axes, decay=decay, matrix=matrix if decay else (), tokens=tokens)

  def constant(self, shape: tuple[int, ...], axes: tuple[str | None, ...], value: float) -> nnx.Param:
    """A constant; norms, gates' biases and convolutions are not decayed."""
    return self.param(jnp.full(shape, value, jnp.float32), axes)


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, " D"], eps: float = 1e-6) -> Float[Array, "... D"]:
  """x / rms(x) * gain, computed in float32, returned in x.dtype (arXiv 1910.07467, eq. 4)."""
  return _rms_norm(x, gain, eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # else x is kept in float32 for the gradient
def _rms_norm(x, gain, eps):
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * scale * gain).astype(x.dtype)


def add_and_norm(x, more, gain, eps):
  """(x + more, RMSNorm of it), `more` None for nothing."""
  x = x if more is None else x + more
  return x, rms_norm(x, gain, eps)


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
  """table[tokens]; the gradient is summed in float32.

  Over a small vocabulary that sum is a product with one-hot rows. As a scatter all the tokens of a batch fight for a
  few rows: 65,536 bytes of text took 63 to 178 ms of a training step on one H100, the product takes less than one.
  """
  return table[tokens]


def _look_up_backward(saved, cotangent):
  table, tokens = saved
  if table.shape[0] <= _ONE_HOT_ROWS:
    # Else XLA writes the 4-byte numbers out that it compares the tokens with, and reads them in the product.
    rows = jax.lax.optimization_barrier(jax.nn.one_hot(tokens, table.shape[0], dtype=cotangent.dtype))
    total = jnp.einsum("btv,btd->vd", rows, cotangent, preferred_element_type=jnp.float32)
  else:
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(cotangent.astype(jnp.float32))
  return total.astype(table.dtype), None


look_up.defvjp(lambda table, tokens: (table[tokens], (table, tokens)), _look_up_backward)


def rope_table(positions: int, head_dim: int, theta: float, stride: int = 1, scaling=None, length: int = 0):
  """cos and sin, float32[positions, head_dim / 2], of position p * stride; `scaling` is a config.RopeScaling.

  With yarn (arXiv 2309.00071, section 3.4) and longrope (its released code) both are multiplied by an attention factor.
  length: tokens of the row or the cache, which dynamic and longrope ask for; 0 = positions * stride.
  """
  lib = np if positions <= _MAX_CONSTANT_POSITIONS else jnp
  frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  size = 1.0
  if scaling is not None and scaling.kind:
    frequency = scale_frequencies(frequency, scaling, theta, length or positions * stride)
    grown = np.log(max(scaling.factor, 1.0))
    if scaling.kind == "yarn":
      size = scaling.attention_factor or 0.1 * grown + 1.0
    elif scaling.kind == "longrope":
      size = scaling.attention_factor or np.sqrt(1 + grown / np.log(scaling.context))
  angle = lib.arange(positions)[:, None] * stride * lib.asarray(frequency, lib.float32)[None]
  if lib is np:
    angle = np.arange(positions, dtype=np.float64)[:, None] * stride * frequency[None]
    return (np.cos(angle) * size).astype(np.float32), (np.sin(angle) * size).astype(np.float32)
  return jnp.cos(angle) * np.float32(size), jnp.sin(angle) * np.float32(size)


def scale_frequencies(frequency, scaling, theta, length: int):
  """Lower frequencies for longer contexts. linear: all alike (arXiv 2306.15595). dynamic: by a base that grows once
  `length` is above the original context (arXiv 2309.00071, sections 3.1 and 3.3). llama3: waves that turn at least
  `high_frequency` times in the original context stay, those that turn at most `low_frequency` times are divided by
  the factor, in between a mean weighted by the turns (Llama 3.1's released configuration). yarn: the same two ends, in
  between a mean weighted by the wave's number, the ends rounded outwards to whole waves (arXiv 2309.00071, section 3.2,
  and its code). longrope: each by its own divisor, of two sets by `length` (arXiv 2402.13753)."""
  if scaling.kind == "linear":
    return frequency / scaling.factor
  count = len(frequency)
  if scaling.kind == "dynamic":
    times = scaling.factor * max(length, scaling.context) / scaling.context - (scaling.factor - 1)
    return frequency * times ** -(np.arange(count) / (count - 1))
  if scaling.kind == "longrope":
    return frequency / np.array(scaling.long_factors if length > scaling.context else scaling.short_factors)
  if scaling.kind == "yarn":
    wave = lambda turns: count * np.log(scaling.context / (turns * 2 * np.pi)) / np.log(theta)
    first = max(np.floor(wave(scaling.high_frequency)), 0)
    last = min(np.ceil(wave(scaling.low_frequency)), 2 * count - 1)
    keep = 1 - np.clip((np.arange(count) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor
  turns = scaling.context * frequency / (2 * np.pi)
  keep = np.clip((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency), 0.0, 1.0)
  return keep * frequency + (1 - keep) * frequency / scaling.factor


def rope(x: Float[Array, "B T heads H"], table, offset: int | Int[Array, ""] = 0) -> Float[Array, "B T heads H"]:
  """Rotary position embedding, halves not interleaved (arXiv 2104.09864, eq. 34; Llama's layout).

  `table` comes from `rope_table`; row 0 of `x` sits at table row `offset`. Rows of `x` past the table's end, which can
  only be padding where `offset` is traced, take its last row. Raises ValueError for a known `offset` past the end.
  """
  cos, sin = table
  length = x.shape[1]
  if isinstance(offset, int):
    if offset + length > len(cos):
      raise ValueError(f"rope: positions {offset} to {offset + length - 1} of a table of {len(cos)} positions")
    cos, sin = cos[offset:offset + length], sin[offset:offset + length]
  else:  # row by row: a slice that is clamped as a whole would turn every row by another position's angle
    rows = offset + jnp.arange(length)
    cos, sin = (jnp.take(jnp.asarray(part), rows, axis=0, mode="clip") for part in table)
  cos, sin = cos[None, :, None], sin[None, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def short_conv(x: Float[Array, "B T heads H"], taps: Float[Array, "W heads H"],
               segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B T heads H"]:
  """Causal depthwise convolution; taps[0] is the present token. Never reaches into another segment."""
  y = x * taps[0].astype(x.dtype)
  for back in range(1, taps.shape[0]):
    past = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :x.shape[1]]
    if segment_ids is not None:
      before = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, :x.shape[1]]
      past = jnp.where((before == segment_ids)[:, :, None, None], past, 0)
    y = y + past * taps[back].astype(x.dtype)
  return y


def product(equation: str, x: Float[Array, "B T ..."], weight: Float[Array, "..."]) -> Float[Array, "B T ..."]:
  """einsum of activations and a weight, in x.dtype.

  A single token gets a row of zeros beside it: of one row XLA makes elementwise products for a GPU, rounded and written
  to memory, and then their sums, of two a matrix product.
  """
  weight = weight.astype(x.dtype)
  if x.shape[0] * x.shape[1] > 1:
    return jnp.einsum(equation, x, weight)
  return jnp.einsum(equation, jnp.concatenate([x, jnp.zeros_like(x)], axis=1), weight)[:, :1]


class HeadProjection(nnx.Module):
  """Hidden state -> heads, with the optional short convolution, bias and per-head RMSNorm, in this order."""

  def __init__(self, init: Init, d_model: int, heads: int, head_dim: int, *, axis: str, taps: int = 0,
               bias: bool = False, norm: bool = False, eps: float = 1e-6):
    self.eps = eps  # of the norm
    self.weight = init.normal("weight", (d_model, heads, head_dim), ("embed", axis, None), fan_in=d_model)
    if bias:
      self.bias = init.constant((heads, head_dim), (axis, None), 0.0)
    if taps:
      # Starts as the identity: tap 0 is one, the past is nought.
      self.taps = init.param(jnp.zeros((taps, heads, head_dim)).at[0].set(1.0), (None, axis, None))
    if norm:
      self.norm = init.constant((head_dim,), (None,), 1.0)

  def __call__(self, h: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None,
               tail: Float[Array, "B W-1 D"] | None = None) -> Float[Array, "B T heads H"]:
    """`tail` holds the hidden states before `h` that the convolution still reaches (decoding)."""
    conv = hasattr(self, "taps")
    if conv and tail is not None:
      h = jnp.concatenate([tail.astype(h.dtype), h], axis=1)
    y = product("btd,dnh->btnh", h, self.weight[...])
    if conv:
      y = short_conv(y, self.taps[...], segment_ids)
      y = y if tail is None else y[:, tail.shape[1]:]
    if hasattr(self, "bias"):  # after the convolution, which else would see biases where there is no token yet
      y = y + self.bias[...].astype(h.dtype)
    if hasattr(self, "norm"):
      y = rms_norm(y, self.norm[...], self.eps)
    return y


def project(part: HeadProjection, h: Float[Array, "B T D"], call, *, rotated: bool) -> Float[Array, "B T heads H"]:
  """The heads of one projection, rotated or not; `call`, a methods.Call, says where the tokens are and how heads are
  rotated."""
  segments, width = call.query_segments(h.shape[1]), part.weight.shape[2]
  taps, gain = (getattr(part, name)[...] if hasattr(part, name) else None for name in ("taps", "norm"))
  # A rotation alone XLA puts into a pass of its own; whether the kernel's is faster was not measured.
  if call.fused is None or hasattr(part, "bias") or not fused.takes_width(width) or (taps is None and gain is None):
    y = part(h, segments, call.tail)
    return call.rope(y, offset=call.offset) if rotated else y
  y = _product(h, part.weight[...])
  first, _ = spans.of_segments(segments, spans.positions(h.shape[1], 0, h.shape[0]))
  table = tuple(map(jnp.asarray, call.fused(width))) if rotated else None
  return fused.heads(y, taps, gain, table, first, part.eps)


def _product(h, weight):
  """XLA would make one product of all of these that have the same h, and copy each part's heads out of its result.

  Behind a barrier of h alone it still does: barriers of equal operands become one. The weight tells them apart.
  """
  return jnp.einsum("btd,dnh->btnh", *jax.lax.optimization_barrier((h, weight.astype(h.dtype))))


def project_together(turned, plain, h: Float[Array, "B T D"], call) -> tuple | None:
  """The heads of several projections of one product and one pass, `turned` normed and rotated, `plain` neither; None
  where no kernel serves them. All but the first have equally many heads."""
  parts, first = (*turned, *plain), turned[0]
  width = first.weight.shape[2]
  if call.fused is None or hasattr(first, "bias") or not fused.takes_width(width):
    return None
  joined = lambda name: jnp.concatenate([getattr(part, name)[...] for part in parts], axis=1)
  y = _product(h, joined("weight"))
  taps = joined("taps") if hasattr(first, "taps") else None
  gains = jnp.stack([part.norm[...] for part in turned]) if hasattr(first, "norm") else None
  start, _ = spans.of_segments(call.query_segments(h.shape[1]), spans.positions(h.shape[1], 0, h.shape[0]))
  table = tuple(map(jnp.asarray, call.fused(width)))
  return fused.groups(y, taps, gains, table, start, first.eps, parts[1].weight.shape[1], len(turned) - 1, len(plain))


class SwiGLU(nnx.Module):
  """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202, eq. 6)."""

  def __init__(self, init: Init, d_model: int, mlp_dim: int, out_gain: float):
    self.gate = init.normal("gate", (d_model, mlp_dim), ("embed", "mlp"), fan_in=d_model)
    self.up = init.normal("up", (d_model, mlp_dim), ("embed", "mlp"), fan_in=d_model)
    self.down = init.normal("down", (mlp_dim, d_model), ("mlp", "embed"), fan_in=mlp_dim, gain=out_gain)

  def __call__(self, x: Float[Array, "B T D"], call) -> Float[Array, "B T D"]:
    """`call`, a methods.Call, says whether pallas_kernels/fused.py serves the gate and how arrays lie on a mesh."""
    if call.fused is not None:
      both = jnp.concatenate([self.gate[...], self.up[...]], axis=1).astype(x.dtype)
      return fused.gate(x @ both) @ self.down[...].astype(x.dtype)
    gate, up = (call.constrain(product("btd,df->btf", x, w[...]), ("batch", "time", "mlp"))
                for w in (self.gate, self.up))
    return product("btf,fd->btd", jax.nn.silu(gate) * up, self.down[...])
