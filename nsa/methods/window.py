"""Sliding-window attention (arXiv 2004.05150, section 3.1): the last `window` tokens, and nothing else.

An arm of its own, the layers of a hybrid that stay local, and what a memory beside a window is to be compared with at
equal cost (`flops.equal_window`). A dense stage runs the same parameters dense.
"""
import dataclasses
from typing import ClassVar

from nsa.methods import blocks, interface
import pallas_kernels as pk


@dataclasses.dataclass
class Window(interface.Method):
  name: ClassVar[str] = "window"
  window: int = 512               # tokens a query sees, its own included

  def check(self, model, context):
    if not 1 <= self.window <= context:
      return [("window", self.window, f"between 1 and the context of {context} tokens")]
    return []

  def layer(self, init, model):
    return WindowLayer(self)

  def costs(self, model, context, mode):
    if mode != "sparse":
      return super().costs(model, context, mode)
    visible = blocks.mean_visible(self.window, context)
    return {"window": interface.Cost(4.0 * model.num_heads * model.head_dim * visible)}

  def reads(self, model, context):
    return {"window": self.tokens_visible(context)}

  def tokens_visible(self, context):
    return float(min(self.window, context))


class WindowLayer(interface.Layer):

  def __init__(self, options: Window):
    self.options = options

  def __call__(self, x, streams, call):
    if call.mode != "sparse":
      return super().__call__(x, streams, call)
    o, _ = pk.attention(x.q, streams["k"], streams["v"], window=self.options.window, **call.ops)
    return interface.Result(o, {})
