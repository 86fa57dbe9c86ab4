"""MSA with an index that several layers share: every `period`-th layer chooses, those above it take its blocks.

After LongCat LSA (arXiv 2608.01662), which shares DeepSeek's token index between neighbouring layers; here it is MSA's
block index (msa.py). Layers are counted from 0: the layers 0, period, 2 period, ... have an index, the others its
choice:

  I_l = TopK(index scores of layer period * floor(l / period))

An index learns from the KL of its own layer (eqs. 7-9 of MSA); what the layers above would have chosen is not asked.
All layers have index parameters, so that their parameters can be stacked, and all cache index keys; those of the layers
that take another's choice do nothing and stay as they are but for weight decay. FLOPs count what is computed.
"""
import dataclasses
from typing import ClassVar

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from nsa.methods import interface, msa


@dataclasses.dataclass
class SharedMSA(msa.MSA):
  """Options as of MSA."""
  name: ClassVar[str] = "msa_shared"
  period: int = 2                 # layers that share one choice, the one that makes it included

  def check(self, model, context):
    return super().check(model, context) + self.too_small(period=1)

  def layer(self, init, model):
    return SharedMSALayer(init, model, self)

  def handed_up(self, model, batch, queries):
    return jnp.full((batch, queries, model.num_kv_heads, self.num_blocks), -1, jnp.int32)

  def selection_costs(self, model, context):
    return self._shared(super().selection_costs(model, context))

  def loss_costs(self, model, context, mode):
    return self._shared(super().loss_costs(model, context, mode))

  def _shared(self, costs):
    return {part: cost._replace(flops=cost.flops / self.period) for part, cost in costs.items()}


class SharedMSALayer(msa.MSALayer):

  def choose(self, index, x, streams, call):
    if call.selector != "own":
      return super().choose(index, x, streams, call)
    lists = jax.lax.cond(call.layer % self.options.period == 0, lambda: self.select(index, x, streams, call),
                         lambda: call.handed)
    return checkpoint_name(lists, interface.CHOSEN), self.unit

  def losses(self, q_idx, x, streams, lse, lists, call):
    learn = super().losses
    # Times `period`: the mean over layers is then the mean over those that choose.
    kl = jax.lax.cond(call.layer % self.options.period == 0,
                      lambda: self.options.period * learn(q_idx, x, streams, lse, lists, call)["index_kl"],
                      lambda: jnp.zeros((), jnp.float32))
    return {"index_kl": kl}
