"""MSA, MiniMax Sparse Attention (arXiv 2606.13392): an index branch picks blocks, KL trains it.

Index branch, per layer, on the detached hidden state (stop-gradient x):

  q_idx = rope(norm(x Wq))  [T, K, Hi]     one index query per GQA group
  k_idx = rope(norm(x Wk))  [S, Hi]        one index key for all groups
  block score = max over the block's visible tokens of <q_idx, k_idx>;  top J, the query's own block forced

The main branch is exact softmax over the tokens of the chosen blocks, with the
dense model's own K and V: with J at least the number of blocks it *is* dense attention.

The LM loss gives the index branch nothing (top-k is a hard choice). It learns from
KL(stop-gradient mean over the group of main attention probabilities || softmax of
index scores), over the chosen tokens in sparse mode and over all previous tokens in
warm-up (eqs. 7-9 there). The paper does not give the weight of the loss; here it is
`Stage.loss_weights["index_kl"]`, default 1, and because the index parameters have an
optimizer and a clipping norm of their own it only rescales their learning rate.
Whether the paper's runs put norm and RoPE on the index branch is not stated; the
released M3 model does, and so does this file.

Where the model convolves its q and k (`model.short_conv`; neither the paper's nor M3 does) the index projections
get taps of their own. Without them an index key knows its own token alone while the attention that it imitates
matches the token before it: associative recall then stops at 26 % instead of 100 (experiments/methods.py).
"""
import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float

from nsa import layers
from nsa.methods import distillation
import pallas_kernels as pk


@dataclasses.dataclass
class MSA(distillation.Indexed):
  """Defaults: the released M3 geometry (block 128, J 16, index width 128, own block forced)."""
  name: ClassVar[str] = "msa"
  block_size: int = 128           # tokens
  num_blocks: int = 16            # J, forced blocks included
  num_initial: int = 0            # forced first blocks
  num_local: int = 1              # forced last blocks, the query's own included
  index_dim: int = 128            # Hi, width of the index query and key

  def layer(self, init, model):
    return MSALayer(init, model, self)

  def index_flops(self, model, keys):
    return 2.0 * model.num_kv_heads * self.index_dim * keys  # Q K^T alone


class IndexBranch(nnx.Module):
  """The two index projections."""

  def __init__(self, init, model, options):
    projection = functools.partial(layers.HeadProjection, taps=model.short_conv, norm=True)
    self.q = projection(init.child("q"), model.d_model, model.num_kv_heads, options.index_dim, axis="kv_heads")
    self.k = projection(init.child("k"), model.d_model, 1, options.index_dim, axis=None)

  def keys(self, h, call) -> Float[Array, "B T Hi"]:
    return layers.project(self.k, h, call, rotated=True)[:, :, 0]

  def queries(self, h, call) -> Float[Array, "B T K Hi"]:
    return layers.project(self.q, h, call, rotated=True)


class MSALayer(distillation.IndexedLayer):

  def __init__(self, init, model, options: MSA):
    self.options = options
    self.selector = IndexBranch(init.child("selector", group="selector"), model, options)

  def select(self, q_idx, x, streams, call):
    return pk.index_top_k(q_idx, streams["k_idx"], **self.options.geometry, **call.ops)

  def losses(self, q_idx, x, streams, lse, lists, call):
    kl = pk.index_kl(x.q, streams["k"], lse, q_idx, streams["k_idx"], lists, block_size=self.options.block_size,
                     **call.ops)
    return {"index_kl": call.mean(kl)}
