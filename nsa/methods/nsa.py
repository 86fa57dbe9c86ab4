"""NSA, Native Sparse Attention (arXiv 2502.11089): compressed, selected and window branches.

Three branches with K and V projections of their own, each with its own softmax,
summed with sigmoid gates per head (eq. 5):

  o = g_cmp * Attn(q, K_cmp, V_cmp) + g_slc * Attn(q, K_slc, V_slc) + g_win * Attn(q, K_win, V_win)

* Compressed: blocks of `compress_len` tokens every `compress_stride`, each reduced to one key
  and one value by an MLP with intra-block position embeddings (eq. 7). Keys are compressed
  before RoPE and rotated at the block's first position, as in the open Triton implementation;
  the paper does not say.
* Selected: block scores are the compressed attention's probabilities, summed over the group
  (eqs. 9-10); the first block and the last two are forced and take slots of J (section 3.3.2).
* Window: the last `window` tokens, the query's own included.

The selected branch's K and V are the dense model's own (`k`, `v` of the attention layer), so
that a dense stage and a sparse stage share one parameter tree. A retrofit from dense may copy
them into the other two branches on entry (`Stage.enter = "copy_kv"`), as InfLLM-V2's NSA
baseline did (arXiv 2509.24663). The gates make the switch a jump: NSA does not preserve the
dense model's function.

Selection has no loss of its own: scores learn through the compressed branch's output.
"""
import dataclasses
import math
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from nsa import layers
from nsa.methods import blocks
from nsa.methods.interface import Cost, Pool, Stream
import pallas_kernels as pk


@dataclasses.dataclass
class NSA(blocks.BlockMethod):
  """Defaults: the paper's geometry (compress 32 every 16, blocks of 64, 16 of them, window 512)."""
  name: ClassVar[str] = "nsa"
  groups: ClassVar[tuple[str, ...]] = ("branch",)
  enters: ClassVar[tuple[str, ...]] = ("copy_kv",)
  block_size: int = 64            # l', tokens of a selection block
  num_blocks: int = 16            # J, forced blocks included
  num_initial: int = 1            # forced first blocks
  num_local: int = 2              # forced last blocks, the query's own included
  compress_len: int = 32          # l, tokens of a compressed block
  compress_stride: int = 16       # d, tokens between the beginnings of compressed blocks
  window: int = 512               # tokens of the sliding window, the query's own included

  def check(self, model, context):
    problems = super().check(model, context) + self.too_small(compress_len=1)
    if self.compress_stride < 1 or self.compress_len % self.compress_stride:
      problems.append(("compress_len", self.compress_len,
                       f"must be a multiple of compress_stride = {self.compress_stride}"))
    elif self.block_size % self.compress_stride:
      problems.append(("block_size", self.block_size,
                       f"must be a multiple of compress_stride = {self.compress_stride}"))
    if self.compress_len > context:
      problems.append(("compress_len", self.compress_len, f"longer than the context of {context} tokens"))
    if not 1 <= self.window <= context:
      problems.append(("window", self.window, f"between 1 and the context of {context} tokens"))
    return problems

  def layer(self, init, model):
    return NSALayer(init, model, self)

  def compressed_blocks(self, context: int) -> int:
    """Blocks that lie wholly in the first `context` tokens."""
    return max(0, (context - self.compress_len) // self.compress_stride + 1)

  def enter(self, surgery, attention):
    """copy_kv: the trained K and V of the layers into all branches."""
    branch = dict(attention["method"]["branch"])
    for source, targets in (("k", ("k_cmp", "k_win")), ("v", ("v_cmp", "v_win"))):
      for target in targets:
        # a step donates each leaf
        branch[target] = {name: jnp.copy(attention[source][name]) for name in branch[target]}
    if "k_cmp_norm" in branch:
      branch["k_cmp_norm"] = jnp.copy(attention["k"]["norm"])
    return {**attention, "method": {**attention["method"], "branch": branch}}

  def streams(self, model):
    return {name: Stream(model.num_kv_heads, model.head_dim) for name in ("k_cmp", "v_cmp", "k_win", "v_win")}

  def costs(self, model, context, mode):
    if mode != "sparse":
      return super().costs(model, context, mode)
    width = model.num_heads * model.head_dim
    # Visible compressed blocks, averaged over the queries 0 .. context - 1.
    count = self.compressed_blocks(context)
    visible = sum(context - (c * self.compress_stride + self.compress_len - 1) for c in range(count)) / context
    per_token = model.num_kv_heads * model.head_dim * self.compress_len / self.compress_stride
    hidden = 2 * model.head_dim
    mlp = 2 * 2 * per_token * hidden + 2 * 2 * model.num_kv_heads * hidden * model.head_dim / self.compress_stride
    window = blocks.mean_visible(self.window, context)
    return {"compressed": Cost(4 * width * visible, causal=True), "compression_mlp": Cost(mlp),
            "scores": Cost(2 * width * visible, gradient=False, causal=True),
            **super().costs(model, context, mode), "window": Cost(4 * width * window)}

  def reads(self, model, context):
    return {"compressed": context / self.compress_stride, "selected": super().tokens_visible(context),
            "window": float(min(self.window, context))}


class Compression(nnx.Module):
  """phi of eq. 7: [l, H] tokens of one KV head -> one vector, by an MLP per head."""

  def __init__(self, init, model, options):
    K, H, length = model.num_kv_heads, model.head_dim, options.compress_len
    hidden = 2 * H
    self.position = init.normal("position", (length, H), (None, None), fan_in=H, decay=False)
    # once per compressed block: NSA.costs has them
    each = dict(axes=("kv_heads", None, None), matrix=(1,), tokens=False)
    self.inner = init.normal("inner", (K, length * H, hidden), fan_in=length * H, **each)
    self.outer = init.normal("outer", (K, hidden, H), fan_in=hidden, **each)

  def __call__(self, x_BSKH, length: int, stride: int):
    B, S, K, H = x_BSKH.shape
    count = max(0, (S - length) // stride + 1)
    if not count:  # a cache shorter than one compressed block
      return jnp.zeros((B, 0, K, H), x_BSKH.dtype)
    # Every block is length / stride strips. What a strip gives to each of the blocks that it lies in is one product: no
    # strip is there twice. Rows that begin no whole block are cut off last: products like their number.
    parts = length // stride
    strips = x_BSKH[:, :(count - 1) * stride + length].reshape(B, -1, stride, K, H)
    # Without the barrier XLA copies the strips twice, for this product and for the weights' gradient.
    strips = jax.lax.optimization_barrier(strips.transpose(3, 0, 1, 2, 4).reshape(K, B, -1, stride * H))
    matrix = self.inner[...].reshape(K, parts, stride * H, -1).swapaxes(1, 2).reshape(K, stride * H, -1)
    shares = layers.product("kbni,kij->kbnj", strips, matrix).astype(jnp.float32)
    inner = jnp.einsum("i,kih->kh", self.position[...].reshape(-1), self.inner[...])
    # In two steps, so that the gradient is summed in two: XLA has too few programs for all of it at once.
    chunk = math.gcd(strips.shape[2], 32)
    inner = jax.lax.optimization_barrier(jnp.broadcast_to(inner[:, None, None], shares.shape[:2] + (
        shares.shape[2] // chunk, inner.shape[1])))
    inner = jnp.repeat(inner, chunk, axis=2)
    for i, share in enumerate(jnp.split(shares, parts, axis=-1)):
      inner = inner + jnp.pad(share[:, :, i:], ((0, 0), (0, 0), (0, i), (0, 0)))
    outer = layers.product("kbnh,kho->kbno", jax.nn.silu(inner.astype(x_BSKH.dtype)), self.outer[...])
    return outer[:, :, :count].transpose(1, 2, 0, 3)


class Branches(nnx.Module):
  """All that NSA adds to dense."""

  def __init__(self, init, model, options):
    K, H = model.num_kv_heads, model.head_dim

    def projection(name, norm=False):
      return layers.HeadProjection(init.child(name), model.d_model, K, H, axis="kv_heads",
                                   taps=model.short_conv, bias=model.qkv_bias, norm=norm,
                                   eps=model.norm_eps)

    self.k_cmp, self.v_cmp = projection("k_cmp"), projection("v_cmp")
    self.k_win, self.v_win = projection("k_win", norm=model.qk_norm), projection("v_win")
    self.compress_k = Compression(init.child("compress_k"), model, options)
    self.compress_v = Compression(init.child("compress_v"), model, options)
    if model.qk_norm:
      self.k_cmp_norm = init.constant((H,), (None,), 1.0)
    self.gate = init.normal("gate", (model.d_model, model.num_heads, 3), ("embed", "heads", None),
                            fan_in=model.d_model)
    self.gate_bias = init.constant((model.num_heads, 3), ("heads", None), 0.0)


class NSALayer(blocks.BlockLayer):

  def __init__(self, init, model, options: NSA):
    self.options = options
    self.branch = Branches(init.child("branch", group="branch"), model, options)
    self.strides = dict(block_len=options.compress_len, block_stride=options.compress_stride)

  def beside(self, call):
    b = self.branch
    return ({}, {}) if call.mode == "dense" else ({"k_win": b.k_win}, {"k_cmp": b.k_cmp, "v_cmp": b.v_cmp,
                                                                       "v_win": b.v_win})

  def streams(self, x, call):
    return {name: layers.project(getattr(self.branch, name), x.h, call, rotated=name == "k_win")
            for name in ("k_cmp", "v_cmp", "k_win", "v_win")}

  def pools(self):
    return {"compressed": Pool(self.options.compress_len, self.options.compress_stride)}

  def pool(self, name, streams, call, first=0):
    """Compressed keys and values."""
    o, b = self.options, self.branch
    k_cmp = b.compress_k(streams["k_cmp"], o.compress_len, o.compress_stride)
    v_cmp = b.compress_v(streams["v_cmp"], o.compress_len, o.compress_stride)
    if hasattr(b, "k_cmp_norm"):
      k_cmp = layers.rms_norm(k_cmp, b.k_cmp_norm[...], b.k_win.eps)
    return call.rope(k_cmp, offset=first, stride=o.compress_stride), v_cmp

  def index(self, x, streams, call):
    """The compressed branch: its keys, its output and its log normaliser."""
    k_cmp, v_cmp = self.pooled("compressed", streams, call)
    return k_cmp, *pk.compressed_attention(x.q, k_cmp, v_cmp, **self.strides, **call.ops)

  def select(self, compressed, x, streams, call):
    k_cmp, _, lse = compressed
    return pk.compressed_top_k(x.q, k_cmp, lse, **self.strides, **self.options.geometry, **call.ops)

  def attend(self, compressed, x, streams, lists, size, call):
    """The three branches under their gates."""
    h, b, (_, o_cmp, _) = x.h, self.branch, compressed
    o_slc, lse = super().attend(compressed, x, streams, lists, size, call)
    o_win, _ = pk.attention(x.q, streams["k_win"], streams["v_win"], window=self.options.window, **call.ops)
    gate = layers.product("btd,dng->btng", h, b.gate[...]) + b.gate_bias[...].astype(h.dtype)
    gate = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(h.dtype)
    return gate[..., 0:1] * o_cmp + gate[..., 1:2] * o_slc + gate[..., 2:3] * o_win, lse
