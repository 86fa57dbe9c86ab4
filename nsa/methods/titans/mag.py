"""MAG, memory as a gate (Titans, arXiv 2501.00663, section 4.2): attention and memory side by side.

  o = join(Attn(q, k, v), M(x))                                        join: base.Join

The paper's attention is a sliding window, after persistent tokens. With `window` = 0 it is the model's own dense
attention, with `window` = w a window: "inserted into dense" and "beside a window" differ by this number alone, and
`flops.equal_window` gives the window that costs as much without a memory.

As a retrofit: the joining vector begins at zero, so a dense model's function stays as it was the moment the memory is
put beside its dense attention (`window` = 0, `persistent` = 0, `join` = "add"). Then `Stage.train` = "memory" learns
with a frozen backbone, "all" with a free one. The native arm has the same options and the same zero: the two differ
in when the memory joins, not in what it is. Persistent tokens enter the softmax, hence the default of none.
"""
import dataclasses
from typing import ClassVar

from nsa.methods import interface
from nsa.methods.titans import base


@dataclasses.dataclass
class MAG(base.Titans):
  name: ClassVar[str] = "mag"
  heads: int = 0                  # memories; 0 = one per KV head, 1 = the paper's single one over the whole width
  window: int = 0                 # tokens of the sliding window, the query's own included; 0 = dense attention
  persistent: int = 0             # learned tokens that every query sees
  join: str = "add"               # add (zero at the beginning) | product (the paper's gate)

  def layer(self, init, model):
    return MAGLayer(init, model, self)


class MAGLayer(base.MemoryLayer):

  def __call__(self, x, streams, call):
    if call.mode != "sparse":
      return super().__call__(x, streams, call)
    y, mem, segments = base.attend(self, x, streams, call), self.memory, call.query_segments(x.h.shape[1])
    q, k, v = (project(x.h, segments, call.tail) for project in (mem.q, mem.k, mem.v))
    m, state = mem(q, k, v, mem.gates_of(x.h), call.state, offset=call.offset, segment_ids=call.segment_ids,
                   implementation=call.implementation)
    return interface.Result(mem.join(x.h, y, m), {}, state=state)
