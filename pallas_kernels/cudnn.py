"""cuDNN's fused attention behind two operations: dense and sliding-window `attention`, and `compressed_attention`.

cuDNN knows causal masks, not the staircase of compressed attention. But with C = T / stride rows of compressed
keys, the tokens t and t + stride see the same stairs, one further down: token t sees the compressed blocks up to
(t - (block_len - 1)) // stride. So, from token block_len - 1 on, token i * stride + p becomes head p of row i:
causal attention of C rows with stride * G query heads per KV head, for the price of two transpositions.

Four limits. lse comes out in float32 through JAX's private `fused_attention_stablehlo` only: the public function
rounds it to bfloat16. cuDNN has no derivative of lse: where somebody asks for one, a second pass makes it. And it
adds up dQ in no fixed order, unless XLA_FLAGS has --xla_gpu_exclude_nondeterministic_ops=true (5 % slower on one
H200): without that flag equal inputs give almost equal gradients, and a call gets these kernels only by name. With it
the backward pass takes a workspace of one dQ for every 128 keys (`workspace_bytes`), so it grows with the square of the
length: past `WORKSPACE_LIMIT`, too, a call gets these kernels only by name, or by "fastest". Other calls get the
forward pass alone, with other gradients (cudnn_triton.py).

Packed documents stay with Triton. cuDNN has sequence offsets, but on one H200, 8 rows of 4,096 tokens and 8/2 heads of
64, it took 0.44 ms forward and 1.60 with the gradient where there is room for 16 segments, 0.68 and 2.47 for 64, Triton
0.32 and 1.43 (whole rows: cuDNN 0.37 and 1.41, Triton 0.34 and 1.55); and called through JAX as documented it gave
wrong numbers.
"""
from __future__ import annotations

import functools
import os
import re

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends

# Of one call, which other kernels serve without any: 4 GiB is a twentieth of a card of 80 GB, beside a model that fills
# the rest. At 64 heads of 128 that is one sequence of 5,792 tokens, or of 23,170 where 16 tokens make one key.
WORKSPACE_LIMIT = 4 * 2 ** 30

@functools.cache
def unavailable():
  """None, or why cuDNN's attention cannot run here: for `supports`."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return "the machine has no GPU, and cuDNN kernels are chosen when they are lowered"
  major = str(getattr(device, "compute_capability", "0")).split(".")[0]
  if not major.isdigit() or int(major) < 8:
    return f"q is on {device.device_kind}: cuDNN's attention needs compute capability 8.0 or more"
  try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
    fused.check_cudnn_version()
  except Exception as error:  # jax moved it, or cuDNN is not installed
    return f"cuDNN's attention is not to be had ({type(error).__name__}: {error})"
  return None


def deterministic():
  """Whether XLA_FLAGS lets XLA take only operations whose sums have an order."""
  flag = r"--xla_gpu_(exclude_nondeterministic|deterministic)_ops(=true|=1|\s|$)"
  return re.search(flag, os.environ.get("XLA_FLAGS", "")) is not None


def workspace_bytes(q, k):
  """What the backward pass allocates beside its arrays if it is `deterministic`: a dQ of q's dtype per 128 keys.

  Read off what XLA asked for at 65,536 tokens and 64 heads of 128: 514 GiB, of which this is 512, and 518 for an NSA
  layer, whose window thus saves nothing. For compressed attention, whose rows hold as many numbers as q, it is a guess.
  """
  return q.size * q.dtype.itemsize * -(-k.shape[1] // 128)


def avoid(*, q, k=None, k_cmp=None, **_):
  """Why not to choose cuDNN without being asked, or None: see the module. Nobody knows yet if a gradient is taken."""
  if not deterministic():
    return ("XLA_FLAGS lacks --xla_gpu_exclude_nondeterministic_ops=true: cuDNN's gradients would differ in their last "
            "bits from run to run")
  k = k if k_cmp is None else k_cmp
  needed = workspace_bytes(q, k)
  if needed > WORKSPACE_LIMIT:
    return (f"q {q.shape} and {k.shape[1]} keys: cuDNN's deterministic gradient would allocate {needed / 2 ** 30:.1f} "
            f"GiB, more than {WORKSPACE_LIMIT / 2 ** 30:.0f}")
  return None


def _reason(q, k, v, scale, segment_ids, query_offset, k_name):
  if unavailable():
    return unavailable()
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q.dtype = {q.dtype}: cuDNN takes bfloat16 and float16"
  if k.dtype != q.dtype or v.dtype != q.dtype:
    return f"{k_name}.dtype = {k.dtype}: cuDNN needs that of q, {q.dtype}"
  if q.shape[3] % 8 or q.shape[3] > 128:
    return f"q has head dim {q.shape[3]}: cuDNN takes multiples of 8 up to 128"
  if segment_ids is not None:
    return "segment_ids: cuDNN takes none"
  if not isinstance(query_offset, (int, np.integer)) or query_offset != 0:
    return f"query_offset = {query_offset}: cuDNN takes whole sequences only, query_offset = 0"
  if not isinstance(scale, (int, float, np.floating, np.integer)):
    return "scale is traced: cuDNN needs a number"
  return None


def supports_attention(*, q, k, v, scale, segment_ids, query_offset, causal, **_):
  reason = _reason(q, k, v, scale, segment_ids, query_offset, "k")
  if reason is None and q.shape[1] != k.shape[1]:
    return f"k has {k.shape[1]} tokens: cuDNN's causal mask needs the {q.shape[1]} of q"
  if reason is None and not causal and q.shape[1] % 2:
    return f"q has {q.shape[1]} tokens: without a causal mask cuDNN needs an even number"
  if reason is None and q.shape[1] < 128:
    return f"q has {q.shape[1]} tokens: other kernels are faster below 128"
  return reason


def supports_compressed_attention(*, q, k_cmp, v_cmp, scale, segment_ids, query_offset, block_len, block_stride, **_):
  reason = _reason(q, k_cmp, v_cmp, scale, segment_ids, query_offset, "k_cmp")
  C = (q.shape[1] - block_len) // block_stride + 1
  if reason is None and k_cmp.shape[1] != C:
    return f"k_cmp has {k_cmp.shape[1]} blocks: {q.shape[1]} tokens make {C}, and a causal mask needs those"
  if reason is None and C < 128:
    return f"k_cmp has {C} blocks: other kernels are faster below 128"
  return reason


def attention(q, k, v, *, causal, window, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.attention`."""
  T = q.shape[1]
  q, k, v = (_to_length(x, T + T % 2) for x in (q, k, v))
  o, lse = _attend(q, k, v, causal, window, float(scale))
  return o[:, :T], lse[:, :T]


def _to_length(x, length):
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))) if x.shape[1] < length else x


def compressed_attention(q, k_cmp, v_cmp, *, block_len, block_stride, scale, segment_ids, query_offset):
  """See `pallas_kernels.api.compressed_attention`."""
  (B, T, N, H), (C, K) = q.shape, k_cmp.shape[1:3]
  first, stride = block_len - 1, block_stride  # no token before `first` sees a block
  C += C % 2  # see `_dense`; the one more key is seen by the padding alone
  rows = _to_length(q[:, first:], C * stride)
  rows = rows.reshape(B, C, stride, K, N // K, H).transpose(0, 1, 3, 2, 4, 5).reshape(B, C, stride * N, H)
  o, lse = _attend(rows, _to_length(k_cmp, C), _to_length(v_cmp, C), True, None, float(scale))
  o = o.reshape(B, C, K, stride, N // K, H).transpose(0, 1, 3, 2, 4, 5).reshape(B, C * stride, N, H)
  lse = lse.reshape(B, C, K, stride, N // K).transpose(0, 1, 3, 2, 4).reshape(B, C * stride, N)
  o = jnp.pad(o[:, :T - first], ((0, 0), (first, 0), (0, 0), (0, 0)))
  return o, jnp.pad(lse[:, :T - first], ((0, 0), (first, 0), (0, 0)), constant_values=-jnp.inf)


def _dense(q, k, v, causal, window, scale):
  """o [B, T, N, H] and lse float32[B, T, N] of whole sequences; JAX refuses the gradient of odd T."""
  from jax._src.cudnn import fused_attention_stablehlo as fused
  o, lse = fused.dot_product_attention(
      q, k, v, scale=scale, mask_type=fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK,
      sliding_window_length=window, return_residual=True)
  return o, lse.transpose(0, 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(q, k, v, causal, window, scale):
  return _dense(q, k, v, causal, window, scale)


def _forward(q, k, v, causal, window, scale):
  q, k, v = q.value, k.value, v.value
  (o, lse), pull = jax.vjp(lambda *qkv: _dense(*qkv, causal, window, scale), q, k, v)
  return (o, lse), (pull, q, k, lse)


def _backward(causal, window, scale, residuals, cotangents):
  pull, q, k, lse = residuals
  do, dlse = cotangents
  do = jnp.zeros(q.shape, q.dtype) if isinstance(do, SymbolicZero) else do.astype(q.dtype)
  dq, dk, dv = pull((do, jnp.zeros_like(lse)))  # cuDNN's rule ignores the second
  if isinstance(dlse, SymbolicZero):
    return dq, dk, dv
  # d lse / d score = p: dq += scale * dlse * (p k), the output for the values k, and dk += p^T (scale * dlse * q),
  # the gradient of the values for the cotangents scale * dlse * q.
  weight = (scale * dlse)[..., None]
  (mean, _), pull = jax.vjp(lambda *qkv: _dense(*qkv, causal, window, scale), q, k, k)
  more = pull(((weight * q).astype(q.dtype), jnp.zeros_like(lse)))[2]
  return (dq + weight * mean).astype(q.dtype), (dk + more).astype(k.dtype), dv


_attend.defvjp(_forward, _backward, symbolic_zeros=True)

backends.register("attention", "cudnn", attention, platforms=("gpu",), supports=supports_attention,
                  avoid=avoid, avoided_for_bits=True)
backends.register("compressed_attention", "cudnn", compressed_attention, platforms=("gpu",),
                  supports=supports_compressed_attention, avoid=avoid, avoided_for_bits=True)
