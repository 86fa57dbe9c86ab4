"""What the Titans methods share (arXiv 2501.00663, section 4): the memory's options and cost, persistent
tokens, the gate.

| method | section | output |
|---|---|---|
| mag | 4.2 memory as a gate | attention (window or dense) and memory side by side, joined by a gate |
| mal | 4.3 memory as a layer | attention over what the memory returned |
| mac | 4.1 memory as context | attention in segments, over what the memory recalls too; its output is written |
| lmm | 4.4 memory alone | the memory on the attention's own q, k and v |

A dense or warm-up stage runs dense attention and leaves the memory alone, so that a trunk, a native and a retrofitted
arm share one parameter tree, whose group "memory" holds all that is not the dense model's.

The state at decode is of constant size: per layer and memory the matrices at the chunk's start, the present ones and
the surprise, float32 (MAC also keeps one segment of recalled keys and values). The model's KV cache holds the keys and
values of all tokens beside it; a window reads its last ones, LMM none.
"""
import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from nsa import layers
from nsa.methods import blocks, interface
from nsa.methods.interface import Cost
from nsa.methods.titans import memory
import pallas_kernels as pk


@dataclasses.dataclass
class Titans(interface.Method):
  """Options of the memory (memory.py says what they do)."""
  groups: ClassVar[tuple[str, ...]] = ("memory",)
  grid: ClassVar[str] = "chunk"
  heads: ClassVar[int] = 0        # memories; 0 = one per KV head, read by the queries of its group
  chunk: int = 16                 # tokens that share a memory to take gradients at
  depth: int = 2                  # L_M, matrices of the memory's MLP
  expansion: int = 2              # its hidden width over its width
  max_step: float = 1.0           # the largest theta, before the share of momentum
  clip: float = 1.0               # norm of one token's inner gradient, in sqrt(width); 0 = not clipped
  norm: bool = True               # residual and norms in the MLP; False = the paper's plain MLP
  gradient: str = "chunk"         # taken at the memory of the chunk's start (paper) | of the document's start
  backprop: str = "full"          # through the inner gradients' M' too (paper) | local: M' is a constant there
  read: str = "token"             # of the memory after the token's own write (paper) | at the chunk's start
  products: str = "float32"       # operands of the products within chunks: float32 | bfloat16. State and sums: float32
  recompute: bool = True          # chunks' interiors are made again in the backward pass: less memory

  def memory_shape(self, model) -> tuple[int, int, int]:
    """Memories R, queries per memory G, width d; R * G * d = N * H."""
    if self.heads:
      return self.heads, 1, model.num_heads * model.head_dim // self.heads
    return model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim

  def memory_sizes(self, model) -> list[tuple[int, int]]:
    """(rows, columns) of every matrix of one memory."""
    width = self.memory_shape(model)[2]
    edges = [width] + [self.expansion * width] * (self.depth - 1) + [width]
    return list(zip(edges[:-1], edges[1:]))

  def check(self, model, context):
    problems = self.too_small(chunk=1, depth=1, expansion=1)
    if self.max_step <= 0:
      problems.append(("max_step", self.max_step, "above 0, or the memory learns nothing"))
    if self.clip < 0:
      problems.append(("clip", self.clip, "cannot be negative; 0 for no clipping"))
    for name, known in (("gradient", ("chunk", "document")), ("backprop", ("local", "full")),
                        ("read", ("token", "chunk")), ("join", ("add", "product")),
                        ("products", ("float32", "bfloat16"))):
      if getattr(self, name, known[0]) not in known:
        problems.append((name, getattr(self, name), " or ".join(known)))
    if self.heads < 0 or self.heads and model.num_heads * model.head_dim % self.heads:
      problems.append(("heads", self.heads, f"0 for one per KV head, or a divisor of num_heads * head_dim = "
                       f"{model.num_heads * model.head_dim}"))
    problems += self.too_small(**{name: 0 for name in ("window", "persistent") if hasattr(self, name)})
    if getattr(self, "window", 0) > context:
      problems.append(("window", self.window, f"longer than the context of {context} tokens; 0 is dense attention"))
    return problems

  def memory_costs(self, model) -> dict[str, Cost]:
    """Per token and layer: reading, and writing with the inner forward and backward pass.

    The inner gradients are differentiated once more in training, which three times the forward cost covers.
    """
    heads, group, _ = self.memory_shape(model)
    sizes = self.memory_sizes(model)
    weights, edges = sum(a * b for a, b in sizes), sum(a + b for a, b in sizes)
    inner = 2 * weights + 2 * (weights - sizes[0][0] * sizes[0][1])  # the first matrix passes no error on
    kept = 2 * 2 * weights + 3 * 2 * weights / self.chunk            # outer products into M and S; their decay
    read = 2 * 2 * weights + (self.chunk + 1) * edges if self.read == "token" else 2 * weights
    mixing = 2 * self.chunk ** 2                                     # decay(1 - alpha) decay(eta), per token
    return {"memory_write": Cost(heads * float(inner + kept + mixing)),
            "memory_read": Cost(heads * group * float(read))}

  def attention_costs(self, model, context: int) -> dict[str, Cost]:
    """Of the window, or dense, branch and its persistent tokens."""
    per_key = 4.0 * model.num_heads * model.head_dim
    out = interface.dense_costs(model, context)
    if self.window:
      out = {"window": Cost(per_key * blocks.mean_visible(self.window, context))}
    return {**out, "persistent": Cost(per_key * self.persistent)} if self.persistent else out

  def costs(self, model, context, mode):
    if mode != "sparse":
      return super().costs(model, context, mode)
    return {**self.attention_costs(model, context), **self.memory_costs(model)}

  def memory_reads(self, model) -> float:
    """The state's bytes over those of one position's key and value, per KV head."""
    weights = self.memory_shape(model)[0] * sum(a * b for a, b in self.memory_sizes(model))
    return 3 * 4 * weights / (2 * model.head_dim * model.num_kv_heads * jnp.dtype(model.dtype).itemsize)

  def reads(self, model, context):
    out = {"window": self.tokens_visible(context), "memory": self.memory_reads(model)}
    return {**out, "persistent": float(self.persistent)} if self.persistent else out

  def tokens_visible(self, context):
    return float(min(self.window or context, context))


class Persistent(nnx.Module):
  """Learned tokens before every sequence (section 3.3), as the keys and values that they would be projected to.

  They have no position: queries meet them before RoPE.
  """

  def __init__(self, init: layers.Init, model, count: int):
    shape = (count, model.num_kv_heads, model.head_dim)
    self.k = init.normal("k", shape, (None, "kv_heads", None), fan_in=1, decay=False)
    self.v = init.normal("v", shape, (None, "kv_heads", None), fan_in=1, decay=False)

  def __call__(self, q_raw, call: interface.Call):
    k, v = (jnp.broadcast_to(x[...].astype(q_raw.dtype), (q_raw.shape[0],) + x.shape) for x in (self.k, self.v))
    return pk.attention(q_raw, k, v, causal=False, implementation=call.implementation)


class Join(nnx.Module):
  """How attention output y and memory output m become one, [B, T, N, H] each.

  "add"      y + mix * sigmoid(x W) * bounded(m), mix[N, H] begins at zero: put onto a trained model it changes nothing
  "product"  y * w_y / rms(y) * sigmoid(bounded(m) * w_m): the paper's gate (section 4.2; it leaves the norm and the
             non-linearity open: both are ours)
  """

  def __init__(self, init: layers.Init, model, kind: str):
    shape, axes = (model.num_heads, model.head_dim), ("heads", None)
    if kind == "add":
      self.mix = init.constant(shape, axes, 0.0)
      self.open = init.normal("open", (model.d_model, model.num_heads), ("embed", "heads"), fan_in=model.d_model)
    else:
      self.w_y, self.w_m = init.constant(shape, axes, 1.0), init.constant(shape, axes, 1.0)

  def __call__(self, h, y, m):
    m = memory.bounded(m.reshape(y.shape).astype(jnp.float32))
    if hasattr(self, "mix"):
      opening = jax.nn.sigmoid(jnp.einsum("btd,dn->btn", h.astype(jnp.float32), self.open[...]))
      return (y.astype(jnp.float32) + self.mix[...] * opening[..., None] * m).astype(y.dtype)
    return (layers.rms_norm(y.astype(jnp.float32), self.w_y[...]) * jax.nn.sigmoid(m * self.w_m[...])).astype(y.dtype)


class MemoryLayer(interface.Layer):
  """A layer with a memory, its join and persistent tokens where the method has them, all of the group "memory"."""

  def __init__(self, init, model, options: Titans, **memory_options):
    self.options, init = options, init.child("memory", group="memory")
    self.memory = memory.Memory(init, model, options, **memory_options)
    if getattr(options, "persistent", 0):
      self.memory.persistent = Persistent(init.child("persistent"), model, options.persistent)
    if hasattr(options, "join"):
      self.memory.join = Join(init.child("join"), model, options.join)

  def initial_state(self, batch, dtype):
    return self.memory.begin(batch)


def merge(parts: list):
  """One softmax over several sets of keys, from the (o, lse) of each."""
  if len(parts) == 1:
    return parts[0][0]
  top = jax.lax.stop_gradient(jnp.max(jnp.stack([lse for _, lse in parts]), axis=0))
  weights = [jnp.exp(lse - top)[..., None] for _, lse in parts]
  o = sum(w * o.astype(jnp.float32) for w, (o, _) in zip(weights, parts)) / sum(weights)
  return o.astype(parts[0][0].dtype)


def attend(method, x: interface.Inputs, streams, call: interface.Call):
  """Dense or window attention of `method.options`, with the persistent tokens if there are any."""
  window = method.options.window or None
  parts = [pk.attention(x.q, streams["k"], streams["v"], window=window, **call.ops)]
  if hasattr(method.memory, "persistent"):
    parts.append(method.memory.persistent(x.q_raw, call))
  return merge(parts)
