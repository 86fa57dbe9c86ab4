"""Softmax-gated selection: the LM loss reaches the selector, because its scores are part of the attention logits.

MSA's index branch chooses the blocks (msa.py); over the chosen tokens the main branch is

  softmax_s( <q, k_s> / sqrt(H) + log g_s ),    log g_s = gain <q_idx, k_idx_s> / sqrt(Hi)

after SAS (arXiv 2609.13141), whose gate is one number per block, normalised over blocks. A normaliser is the same for
all tokens of a query and cancels in the softmax, so g may stay unnormalised. Here the gate is one number per token: an
unfinished block then needs no score that knows its later tokens, and the sum is a product of longer vectors,
<[q, gain q_idx], [k, k_idx]>, which every attention kernel computes as it is.

`gain` is one number per KV head that begins at 0: a retrofit enters as MSA, with the dense model's own attention over
the chosen tokens. The top-k itself passes no gradient. The backbone does not learn through the gate (the index sees a
detached hidden state), and the index learns from KL in a warm-up alone (eqs. 7-9 of MSA), from the LM loss after it.
"""
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from nsa.methods import blocks, msa
from nsa.methods.interface import Cost
import pallas_kernels as pk


@dataclasses.dataclass
class Gated(msa.MSA):
  """Options as of MSA; index_dim widens the vectors of the main branch."""
  name: ClassVar[str] = "gated"

  def layer(self, init, model):
    return GatedLayer(init, model, self)

  def costs(self, model, context, mode):
    costs = super().costs(model, context, mode)
    if mode == "sparse":  # the gate's scores; the chosen tokens' own are counted
      gate = blocks.selected_flops(self, model, context) * self.index_dim / (2 * model.head_dim)
      costs["gate"] = Cost(gate)
    return costs

  def loss_costs(self, model, context, mode):
    return super().loss_costs(model, context, mode) if mode == "warmup" else {}


class GatedLayer(msa.MSALayer):

  def __init__(self, init, model, options: Gated):
    super().__init__(init, model, options)
    self.gain = init.child("gain", group="selector").constant((model.num_kv_heads,), ("kv_heads",), 0.0)

  def attend(self, index, x, streams, lists, size, call):
    q, k, v = x.q, streams["k"], streams["v"]
    (N, H), K, width = q.shape[2:], k.shape[2], index.shape[-1]
    gate = index.astype(jnp.float32) * self.gain[...][:, None] * (H / width) ** 0.5
    q = jnp.concatenate([q, jnp.repeat(gate, N // K, axis=2).astype(q.dtype)], -1)
    k = jnp.concatenate([k, jnp.broadcast_to(streams["k_idx"][:, :, None], k.shape[:3] + (width,)).astype(k.dtype)], -1)
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, width)])
    o, lse = pk.selected_attention(q, k, v, blocks.per_head(lists, k), block_size=size, scale=H ** -0.5, **call.ops)
    return o[..., :H], lse

  def losses(self, q_idx, x, streams, lse, lists, call):
    return super().losses(q_idx, x, streams, lse, lists, call) if call.mode == "warmup" else {}
