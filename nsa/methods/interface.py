"""What a method is: a dataclass of options that builds a layer and says what the rest of the code has to know of it.

One file per method. The dataclass is the config's `attention` field; the layer holds only the parameters that the
method adds to a dense Transformer's. Nothing is decided by a name: what a method has, costs, keeps and trains it
declares with the classes below, and contract.py checks the declarations against the layer when it is registered.
docs/extend.md writes a method, a recall task and a control outside of this package.
"""
import dataclasses
import math
from typing import Any, Callable, ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as pk

# Parameter groups. A group learns, is clipped and may be frozen by itself; a fork may lack all but the first.
#   backbone   what a dense model has too; learns in every mode
#   selector   chooses; learns from its own losses, in warm-up and sparse steps
#   branch     acts and learns in sparse steps alone
#   memory     the same, and can be trained beside a frozen backbone
GROUPS = ("backbone", "selector", "branch", "memory")
MODES = ("dense", "warmup", "sparse")

# The checkpoint name of what a selection chose: a remat saves it, for to choose anew would be wasted, and ties could
# break otherwise. The operations of pallas_kernels name their lists themselves.
CHOSEN = "block_indices"


class Cost(NamedTuple):
  """What one part of a layer costs: forward FLOPs per token, a mean over the queries of a causal sequence."""
  flops: float
  gradient: bool = True    # whether the backward pass goes through it, at twice the FLOPs; not through what a top-k is
                           # taken of
  causal: bool = False     # whether it grows with the query's position, so that the last shard of a sequence has the
                           # most
  kind: str = ""           # "dense" | "selected": attention whose efficiency plans know; of "selected" evaluation
                           # measures the tokens
  trains: str = "backbone"  # "selector": a loss that still learns when the selector alone does


class Loss(NamedTuple):
  """An auxiliary loss of a layer."""
  trains: str = "backbone"  # the group that learns from it
  weight: float = 1.0       # where `Stage.loss_weights` says nothing


class Stream(NamedTuple):
  """What attention reads of every earlier token besides k and v, in warm-up and sparse mode: [heads, width] in the
  compute dtype."""
  heads: int
  width: int
  cached: bool = True      # False: copies that a training step makes (`Layer.streams` does not return them)


class Pool(NamedTuple):
  """Blocks of tokens of which a layer reads but one thing each: `length` tokens, beginning every `stride`. Nothing that
  a query gets depends on a block which ends after it."""
  length: int
  stride: int


@dataclasses.dataclass(frozen=True)
class Call:
  """How one forward pass is run; the same object for all layers but for `key`."""
  mode: str = "sparse"                # of MODES: dense | warmup (dense output + selector loss) | sparse
  offset: Any = 0                     # absolute position of the first query: int, or traced int32
  segment_ids: Any = None             # int32[B, S] or None
  selector: str = "own"               # or the name of a control that replaces it: see training_free.py
  key: Any = None                     # random bits for the random selector, one key per layer
  losses: bool = True                 # whether auxiliary losses are computed
  implementation: str | None = None   # of the attention operations
  rope: Callable[..., Array] = lambda x, offset=0, stride=1: x  # (x[B,T,heads,H], offset=0, stride=1) -> x rotated
  fused: Callable[[int], Any] | None = None  # head dim -> cos and sin of these tokens, float32[T, H / 2]:
                                             # pallas_kernels/fused.py serves
  constrain: Callable[..., Array] = lambda x, axes: x  # (x, logical axes) -> x with a sharding constraint
  prompt: Any = None                  # int32[B] or int: tokens of each prompt, for methods of prompt/
  tail: Any = None                    # decoding: hidden states that the short convolution still reaches
  state: Any = None                   # what `Layer.initial_state` names, after the tokens before these; None = a new
                                      # document
  pooled: dict | None = None          # decoding: of each of `Layer.pools` what the cache has
  layer: Any = 0                      # number of the layer, from 0: int or traced int32
  handed: Any = None                  # what the layer below of the same method chose, for methods with `handed_up`
  counted: Any = None                 # bool[B, T]: the tokens that auxiliary losses are means over, no padding;
                                      # None = all

  @property
  def ops(self) -> dict:
    """Keyword arguments that every attention operation takes."""
    return dict(segment_ids=self.segment_ids, query_offset=self.offset, implementation=self.implementation)

  def mean(self, x: Float[Array, "B T ..."]) -> Float[Array, ""]:
    """The mean over the tokens that count; 0 without any. Padding would dilute a loss and teach a selector to find
    padding."""
    if self.counted is None:
      return jnp.mean(x)
    rows = self.counted.reshape(self.counted.shape + (1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(rows, x, 0)) / jnp.maximum(jnp.sum(self.counted) * math.prod(x.shape[2:]), 1)

  def query_segments(self, length: int) -> Int[Array, "B T"] | None:
    """The segment ids of the `length` queries."""
    if self.segment_ids is None:
      return None
    return jax.lax.dynamic_slice_in_dim(self.segment_ids, self.offset, length, axis=1)


class Inputs(NamedTuple):
  """The tokens of this call, as the attention layer has projected them."""
  h: Float[Array, "B T D"]            # normed hidden state
  q: Float[Array, "B T N H"]          # after norm, convolution and RoPE
  q_raw: Float[Array, "B T N H"]      # before RoPE
  k_raw: Float[Array, "B T K H"]      # before RoPE
  gate: Float[Array, "B T N"] | None = None  # the output gate, float32, that multiplies the method's output;
                                             # None = none


class Result(NamedTuple):
  """What the method's part of one attention layer returns."""
  o: Float[Array, "B T N H"]
  losses: dict                        # name -> float32 scalar, a mean over queries (`Call.mean`) and KV heads
  block_indices: Int[Array, "B T K J"] | None = None
  state: dict | None = None           # the new state, like `Layer.initial_state`; needed only with a cache
  measured: dict | None = None        # name -> float32[B, K], what the layer measured of itself: means over its sparse
                                      # queries


class Layer(nnx.Module):
  """The method's part of one attention layer. This base class is dense attention: it adds nothing."""

  def streams(self, x: Inputs, call: Call) -> dict[str, Array]:
    """What later queries need of these tokens besides k and v, as `Method.streams` declares it: [B, T, heads, width]
    or, of one head, [B, T, width], kept in the KV cache. A "k" or "v" among them takes the place of the model's own."""
    return {}

  def beside(self, call: Call) -> tuple[dict, dict]:
    """The projections that make `streams` of the hidden state, if nothing else does: of as many heads as the model's k,
    those that are normed and rotated as it is, and those that are neither, as its v. One product and one pass may then
    make them and q, k and v."""
    return {}, {}

  def initial_state(self, batch: int, dtype) -> dict:
    """What a recurrent method carries from token to token before the first token: a tree of arrays [batch, ...]
    of constant size. It is kept in the cache beside the streams; `Call.state` brings it, `Result.state` returns it."""
    return {}

  def pools(self) -> dict[str, Pool]:
    """Blocks of earlier tokens that the layer reads by `pooled`."""
    return {}

  def pool(self, name: str, streams: dict[str, Array], call: Call, first: Any = 0):
    """Of the blocks of `name` in `streams`, an array [B, blocks, ...] or a tree of such; a last one that is cut short
    counts where stride = length. `streams` and `call.segment_ids` begin with block `first`, int or traced int32."""
    raise NotImplementedError(f"{type(self).__name__}.pools names {name!r}, which its pool() does not know")

  def pooled(self, name: str, streams: dict[str, Array], call: Call):
    """`pool` of all blocks: from the cache where there is one."""
    return self.pool(name, streams, call) if call.pooled is None else call.pooled[name]

  def pool_cache(self, cache: dict, streams: dict[str, Array], call: Call, tokens: int) -> dict:
    """The cache's `pool` of each name with the `tokens` new tokens at `call.offset` in it.

    Of one token only the last block that ends with it or before it is made, which costs the same at any length."""
    if tokens > 1:
      return {name: self.pool(name, streams, call) for name in cache}
    return {name: self._with_last(name, blocks, streams, call) for name, blocks in cache.items()}

  def _with_last(self, name, blocks, streams, call):
    if not jax.tree.leaves(blocks)[0].size:  # the cache is shorter than one block
      return blocks
    length, stride = self.pools()[name]
    first = jnp.maximum((call.offset + 1 - length) // stride, 0)

    def cut(x):
      return jax.lax.dynamic_slice_in_dim(x, first * stride, min(length, x.shape[1]), axis=1)

    if call.segment_ids is not None:
      call = dataclasses.replace(call, segment_ids=cut(call.segment_ids))
    last = self.pool(name, {stream: cut(x) for stream, x in streams.items()}, call, first)
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), first, axis=1),
                        blocks, last)

  def before(self, h: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Call]:
    """What the layer's projections see in place of h, and the call with the new state if this changed it."""
    return h, call

  def __call__(self, x: Inputs, streams: dict[str, Array], call: Call) -> Result:
    """Attention of these tokens over the streams ("k" and "v" after RoPE, and the method's own)."""
    o, _ = pk.attention(x.q, streams["k"], streams["v"], **call.ops)
    return Result(o, {})


@dataclasses.dataclass
class Method:
  """Base of all methods' options; contract.py checks what they declare.

  Options are int, float, bool or str and have defaults: they are written to config.json, and to command lines.
  """
  name: ClassVar[str] = ""                   # in configs, records and reports; unique
  groups: ClassVar[tuple[str, ...]] = ()     # of the parameters that its layers may have; each names its own:
                                             # layers.Init
  losses: ClassVar[dict[str, Loss]] = {}     # auxiliary losses that its layers return
  enters: ClassVar[tuple[str, ...]] = ()     # weight surgery that a stage may ask for on entry: see `enter`
  grid: ClassVar[str] = ""                   # its option that packed documents have to begin at multiples of
  has_geometry: ClassVar[bool] = False       # as a run mode: its defaults are a paper's, a dense model has to give none
  has_sparse: ClassVar[bool] = True          # whether mode "sparse" is another computation than mode "dense"

  @property
  def selector_losses(self) -> tuple[str, ...]:
    """The losses that train the group "selector"."""
    return tuple(name for name, loss in self.losses.items() if loss.trains == "selector")

  @property
  def acts_when_dense(self) -> bool:
    """Whether its parameters act in mode "dense" too: without them it is not the same model."""
    return False

  def check(self, model, context: int) -> list[tuple[str, Any, str]]:
    """Problems as (option, value, fix), for sequences of `context` tokens."""
    return []

  def too_small(self, **least: int) -> list[tuple[str, Any, str]]:
    """The problems of options that are below the least they may be, for `check`."""
    return [(name, getattr(self, name), f"at least {n}" if n else "cannot be negative") for name, n in least.items()
            if getattr(self, name) < n]

  def layer(self, init, model) -> Layer:
    """The layer, its parameters created with `init.child(name, group=...)` (nsa.layers.Init)."""
    return Layer()

  def streams(self, model) -> dict[str, Stream]:
    """What attention reads of earlier tokens besides k and v."""
    return {}

  def chosen(self, model, context: int) -> int:
    """What a selection over `context` tokens leaves of one token, all heads: int32 numbers, and a remat saves them."""
    return 0

  def handed_up(self, model, batch: int, queries: int) -> Int[Array, "B T K J"] | None:
    """What the lowest of consecutive layers of this method gets as `Call.handed`, where layers hand their chosen blocks
    to the next; None where they do not."""
    return None

  def costs(self, model, context: int, mode: str) -> dict[str, Cost]:
    """Each part of a layer at `context` tokens; projections are counted with the parameters (nsa/flops.py)."""
    return dense_costs(model, context)

  def loss_costs(self, model, context: int, mode: str) -> dict[str, Cost]:
    """The same for auxiliary losses, which training alone pays; stages of mode "dense" have none."""
    return {}

  def flops(self, model, context: int, mode: str) -> dict[str, float]:
    """`costs` as forward FLOPs alone."""
    return {part: cost.flops for part, cost in self.costs(model, context, mode).items()}

  def measured_flops(self, model, context: int, visible: float) -> float:
    """FLOPs of a sparse query that was measured to attend to `visible` tokens, all parts."""
    parts = self.costs(model, context, "sparse").values()
    rest = sum(cost.flops for cost in parts if cost.kind != "selected")
    return 4.0 * model.num_heads * model.head_dim * visible + rest

  def reads(self, model, context: int) -> dict[str, float]:
    """Vectors of one KV head that the token at position `context` reads at decode, per branch.

    Keys and values of one position count as one; an index key, which has no value and another
    width, counts with its share of a full position's bytes."""
    return {"dense": float(context)}

  def tokens_visible(self, context: int) -> float:
    """Tokens that the last query of the sequence attends to exactly."""
    return float(context)

  def enter(self, surgery: str, attention: dict) -> dict:
    """The parameters of attention layers (stacked) after one of `enters`, at the first step of a stage."""
    raise NotImplementedError(f"{type(self).__name__}.enters names {surgery!r}, which its enter() does not know")


def dense_flops(model, context: int) -> float:
  """Q K^T and P V over the causal half: 2 * 2 * N * H * (context + 1) / 2."""
  return 2.0 * model.num_heads * model.head_dim * (context + 1)


def dense_costs(model, context: int) -> dict[str, Cost]:
  """Forward FLOPs of causal dense attention at that context, as `Method.costs` gives them."""
  return {"dense": Cost(dense_flops(model, context), causal=True, kind="dense")}
