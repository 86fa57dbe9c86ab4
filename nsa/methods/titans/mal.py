"""MAL, memory as a layer (Titans, arXiv 2501.00663, section 4.3): attention over what the memory returned.

  x' = x + M(x) W,   o = Attn(q(x'), k(x'), v(x'))

x' is what the layer's projections see. `skip` = False leaves out the first term, which is the paper's equation read
literally ("y = M(x), o = SW-Attn(y)"); whether its blocks have a residual there is not stated. As in MAG `window` = 0
is dense attention.
"""
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from nsa.methods import interface
from nsa.methods.titans import base


@dataclasses.dataclass
class MAL(base.Titans):
  name: ClassVar[str] = "mal"
  heads: int = 0                  # memories; 0 = one per KV head, 1 = the paper's single one over the whole width
  window: int = 512               # tokens of the sliding window, the query's own included; 0 = dense attention
  persistent: int = 4             # learned tokens that every query sees
  skip: bool = True               # attention sees x + M(x) W; False: M(x) W

  def layer(self, init, model):
    return MALLayer(init, model, self)


class MALLayer(base.MemoryLayer):

  def __init__(self, init, model, options: MAL):
    super().__init__(init, model, options)
    init = init.child("memory", group="memory")
    self.memory.out = init.normal("out", (model.num_heads, model.head_dim, model.d_model), ("heads", None, "embed"),
                                  fan_in=model.num_heads * model.head_dim, matrix=(0, 1))
    self.reach = max(model.short_conv - 1, 0), model.d_model

  def initial_state(self, batch, dtype):
    state = super().initial_state(batch, dtype)
    # The layer's tail holds x'; the memory's own convolutions need the x before it.
    return {**state, "tail": jnp.zeros((batch,) + self.reach, dtype)} if self.reach[0] else state

  def before(self, h, call):
    if call.mode != "sparse":
      return h, call
    mem, state = self.memory, dict(call.state or {})
    tail = state.pop("tail", None)
    segments = call.query_segments(h.shape[1])
    q, k, v = (project(h, segments, tail) for project in (mem.q, mem.k, mem.v))
    m, state = mem(q, k, v, mem.gates_of(h), state or None, offset=call.offset, segment_ids=call.segment_ids,
                   implementation=call.implementation)
    out = mem.out[...]
    y = jnp.einsum("btnh,nhd->btd", m.reshape(m.shape[:2] + out.shape[:2]).astype(h.dtype), out.astype(h.dtype))
    if tail is not None:
      state["tail"] = jnp.concatenate([tail.astype(h.dtype), h], axis=1)[:, -tail.shape[1]:]
    return (h + y if self.options.skip else y), dataclasses.replace(call, state=state)

  def __call__(self, x, streams, call):
    if call.mode != "sparse":
      return super().__call__(x, streams, call)
    return interface.Result(base.attend(self, x, streams, call), {}, state=call.state)
