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

`far_share` is ours, not the paper's. A retrofit of a real model on plain text learnt the mass of attention and found no
needle (docs/results.md): KL is a mean over queries, and few of them look far. It gives that share of the warm-up's loss
to queries by how far dense attention looks from them: sum(w * KL) / sum(w), w the attention mass (mean over the group)
that one sink block and the last J - 1 blocks, which need no selector, do not hold. The one run that had it, at 0.5,
answers 5 % of far recall in place of 3.

Where the model convolves its q and k (`model.short_conv`; neither the paper's nor M3 does) the index projections
get taps of their own. Without them an index key knows its own token alone while the attention that it imitates
matches the token before it: associative recall then stops at 26 % instead of 100 (experiments/methods.py).
"""
import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nsa import layers
from nsa.methods import distillation, training_free
from nsa.methods.interface import Cost
import pallas_kernels as pk
from pallas_kernels import masked


@dataclasses.dataclass
class MSA(distillation.Indexed):
  """Defaults: the released M3 geometry (block 128, J 16, index width 128, own block forced)."""
  name: ClassVar[str] = "msa"
  block_size: int = 128           # tokens
  num_blocks: int = 16            # J, forced blocks included
  num_initial: int = 0            # forced first blocks
  num_local: int = 1              # forced last blocks, the query's own included
  index_dim: int = 128            # Hi, width of the index query and key
  far_share: float = 0.0          # of the warm-up's loss, 0 to 1, over queries by how far they look

  def check(self, model, context):
    problems = super().check(model, context)
    if not 0 <= self.far_share <= 1:
      problems = [*problems, ("far_share", self.far_share, "a share of the loss: 0 to 1")]
    return problems

  def loss_costs(self, model, context, mode):
    costs = super().loss_costs(model, context, mode)
    if mode == "warmup" and self.far_share:
      costs["far"] = Cost(2.0 * model.num_heads * model.head_dim * (context + 1) / 2, gradient=False, causal=True)
    return costs

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

  def both(self, h, call) -> tuple | None:
    """(queries, keys) of one pass; None where no kernel serves them."""
    together = layers.project_together((self.q, self.k), (), h, call)
    return together and (together[0], together[1][:, :, 0])


class MSALayer(distillation.IndexedLayer):

  def __init__(self, init, model, options: MSA):
    self.options = options
    self.selector = IndexBranch(init.child("selector", group="selector"), model, options)

  def streams(self, x, call):
    if (both := self.selector.both(jax.lax.stop_gradient(x.h), call)) is None:
      return super().streams(x, call)
    return {"q_idx": both[0], "k_idx": both[1]}

  def index(self, x, streams, call):
    return streams["q_idx"] if "q_idx" in streams else super().index(x, streams, call)

  def select(self, q_idx, x, streams, call):
    return pk.index_top_k(q_idx, streams["k_idx"], **self.options.geometry, **call.ops)

  def losses(self, q_idx, x, streams, lse, lists, call):
    kl = pk.index_kl(x.q, streams["k"], lse, q_idx, streams["k_idx"], lists, block_size=self.options.block_size,
                     **call.ops)
    loss = call.mean(kl)
    if lists is None and self.options.far_share:
      far = far_mass(x.q, streams["k"], lse, self.options, call)
      by_far = call.mean(far * kl) / jnp.maximum(call.mean(far), jnp.finfo(jnp.float32).tiny)
      loss = (1 - self.options.far_share) * loss + self.options.far_share * by_far
    return {"index_kl": loss}


def far_mass(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], lse: Float[Array, "B T N"], options: MSA,
             call) -> Float[Array, "B T K"]:
  """The mass of dense attention, a mean over the group's heads, outside of the first visible and the last J - 1 blocks.

  `lse`, float32, is that of dense attention. Holds float32[B, T, K, blocks]; no gradient.
  """
  mass, _ = pk.block_mass(q, k, lse, block_size=options.block_size, **call.ops)
  near = training_free.SinkWindow(**options.geometry).choose(q, k, call)
  return jnp.sum(jnp.where(masked.membership(near, mass.shape[-1]), 0.0, mass), -1)
