"""SSA, Sparse Sparse Attention (arXiv 2511.20102): dense and sparse steps in turn, their outputs drawn together.

Every step is dense or sparse for the whole model, at random (schedule mode "mixed", half and half there; drawing
per layer ended in NaN there). Sparse attention is exact softmax over the J blocks with the best

  s[t, r, b] = <sum of the queries of group r, mean of the keys of block b>     keys after RoPE, one set per group

the query's own block included. Whatever the step, each layer computes the other attention too, on the same q, k and v,
without passing it on, and adds (section 3 there)

  alignment = SmoothL1(h_full, sg(h_sparse)) + SmoothL1(h_sparse, sg(h_full))

a mean over tokens, heads and channels, then over layers, of outputs after the output gate where the model has one
(`model.output_gate`; all of the paper's arms do). SmoothL1(a, b) = d^2 / 2 where d = |a - b| < 1, else d - 1/2; sg
stops gradients. It moves the backbone, for there is nothing else to move: it is no selector loss. Its weight is 10 as
in the paper unless `Stage.loss_weights["alignment"]` says otherwise. With one of the two terms alone the paper's runs
ended in NaN.

As a method: native is `schedule.mixed`, a retrofit `schedule.mixed_retrofit`; either ends as a model to be run dense
and sparse. Stages of mode "dense" compute no loss and are those of a dense trunk; stages of mode "sparse" compute it.
The other attention makes a step cost what dense and sparse attention cost together.

UNCERTAIN: how the group shares its set. The paper builds on a kernel that sums the softmax probabilities of the
group's heads over mean keys; here scores are summed, which may order blocks differently.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nsa.methods import blocks, interface, training_free
from nsa.methods.interface import Loss
import pallas_kernels as pk


@dataclasses.dataclass
class SSA(blocks.BlockMethod):
  """Defaults: the paper's training geometry, 16 blocks of 16 (it is also evaluated with 1,024 tokens: J 64)."""
  name: ClassVar[str] = "ssa"
  losses: ClassVar[dict[str, Loss]] = {"alignment": Loss(weight=10.0)}  # alpha
  block_size: int = 16            # tokens
  num_blocks: int = 16            # J, forced blocks included
  num_initial: int = 0            # forced first blocks
  num_local: int = 1              # forced last blocks, the query's own included

  def layer(self, init, model):
    return SSALayer(self)

  def selection_costs(self, model, context):
    return {"scores": training_free.mean_key_cost(model, context, self.block_size)}

  def loss_costs(self, model, context, mode):
    """The attention that the step does not pass on."""
    if mode == "sparse":
      return {"counterpart": interface.dense_costs(model, context)["dense"]}
    sparse = self.costs(model, context, "sparse")
    return {"counterpart": sparse["selected"], "scores": sparse["scores"]}

  def reads(self, model, context):
    return {**super().reads(model, context), "scores": context / self.block_size / 2}  # a mean key has no value


def smooth_l1(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
  """Huber loss with its bend at 1, float32."""
  d = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))
  return jnp.where(d < 1, 0.5 * d * d, d - 0.5)


class SSALayer(training_free.TrainingFreeLayer):

  @property
  def selection(self):
    return training_free.BlockTopK(**self.options.geometry)

  def __call__(self, x, streams, call):
    dense = call.mode != "sparse"
    full = sparse = lists = None
    if dense or call.losses:
      full, _ = pk.attention(x.q, streams["k"], streams["v"], **call.ops)
    if not dense or call.losses:
      lists, size = self.choose(None, x, streams, call)
      sparse, _ = self.attend(None, x, streams, lists, size, call)
    losses = {}
    if call.losses:
      gate = 1.0 if x.gate is None else x.gate[..., None]
      a, b = (y.astype(jnp.float32) * gate for y in (full, sparse))
      losses["alignment"] = call.mean(smooth_l1(a, jax.lax.stop_gradient(b)) + smooth_l1(b, jax.lax.stop_gradient(a)))
    return interface.Result(full, losses) if dense else interface.Result(sparse, losses, lists)
