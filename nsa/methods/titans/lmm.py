"""LMM, the long-term memory alone (Titans, arXiv 2501.00663, section 4.4): no attention.

The memory takes the place of the softmax on the layer's own queries, keys and values (before RoPE): one memory per KV
head, read by the queries of its group. So it has the parameters of the dense model but for gates and initial memory.
"""
import dataclasses
from typing import ClassVar

import jax

from nsa.methods import interface
from nsa.methods.titans import base


@dataclasses.dataclass
class LMM(base.Titans):
  name: ClassVar[str] = "lmm"

  def layer(self, init, model):
    return LMMLayer(init, model, self)

  def attention_costs(self, model, context):
    return {}

  def reads(self, model, context):
    return {"memory": self.memory_reads(model)}

  def tokens_visible(self, context):
    return 0.0


class LMMLayer(base.MemoryLayer):

  def __init__(self, init, model, options: LMM):
    super().__init__(init, model, options, project=False)

  def __call__(self, x, streams, call):
    if call.mode != "sparse":
      return super().__call__(x, streams, call)
    v = jax.lax.dynamic_slice_in_dim(streams["v"], call.offset, x.h.shape[1], axis=1)  # the cache holds older ones too
    y, state = self.memory(x.q_raw, x.k_raw, v, self.memory.gates_of(x.h), call.state, offset=call.offset,
                           segment_ids=call.segment_ids, implementation=call.implementation)
    return interface.Result(y.astype(x.q.dtype), {}, state=state)
