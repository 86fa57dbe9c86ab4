"""What a method is: a dataclass of options that builds a layer and counts its cost.

One file per method. The dataclass is the config's `attention` field; the layer
holds only the parameters that the method adds to a dense Transformer's.
"""
import dataclasses
from typing import Any, Callable, ClassVar, NamedTuple

from flax import nnx
import jax
from jaxtyping import Array, Float, Int

import pallas_kernels as pk


@dataclasses.dataclass(frozen=True)
class Call:
  """How one forward pass is run; the same object for all layers but for `key`."""
  mode: str = "sparse"                # dense | warmup (dense output + selector loss) | sparse
  offset: Any = 0                     # absolute position of the first query: int, or traced int32
  segment_ids: Any = None             # int32[B, S] or None
  selector: str = "own"               # or a training-free one that replaces it: see training_free.SELECTORS
  key: Any = None                     # random bits for the random selector, one key per layer
  losses: bool = True                 # whether auxiliary losses are computed
  implementation: str | None = None   # of the attention operations
  rope: Callable = None               # (x[B,T,heads,H], offset=0, stride=1) -> x rotated
  prompt: Any = None                  # int32[B] or int: tokens of each prompt, for methods that choose once per prompt (prompt/base.py)
  tail: Any = None                    # decoding: hidden states that the short convolution still reaches
  state: Any = None                   # what `Layer.initial_state` names, after the tokens before these; None = a new document

  @property
  def ops(self) -> dict:
    """Keyword arguments that every attention operation takes."""
    return dict(segment_ids=self.segment_ids, query_offset=self.offset, implementation=self.implementation)

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
  gate: Float[Array, "B T N"] | None = None  # the output gate, float32, that multiplies the method's output; None = none


class Result(NamedTuple):
  o: Float[Array, "B T N H"]
  losses: dict                        # name -> float32 scalar, a mean over queries and KV heads
  block_indices: Int[Array, "B T K J"] | None = None
  state: dict | None = None           # the new state, like `Layer.initial_state`; needed only with a cache
  measured: dict | None = None        # name -> float32[B, K], what the layer measured of itself: means over its sparse queries


class Layer(nnx.Module):
  """The method's part of one attention layer. This base class is dense attention: it adds nothing."""

  def streams(self, x: Inputs, call: Call) -> dict[str, Array]:
    """What later queries need of these tokens besides k and v; [B, T, ...] each, kept in the KV cache."""
    return {}

  def initial_state(self, batch: int, dtype) -> dict:
    """What a recurrent method carries from token to token before the first token: a tree of arrays [batch, ...]
    of constant size. It is kept in the cache beside the streams; `Call.state` brings it, `Result.state` returns it."""
    return {}

  def before(self, h: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Call]:
    """What the layer's projections see in place of h, and the call with the new state if this changed it."""
    return h, call

  def __call__(self, x: Inputs, streams: dict[str, Array], call: Call) -> Result:
    """Attention of these tokens over the streams ("k" and "v" after RoPE, and the method's own)."""
    o, _ = pk.attention(x.q, streams["k"], streams["v"], **call.ops)
    return Result(o, {})


@dataclasses.dataclass
class Method:
  """Base of all methods' options. Class attributes say what its schedules may ask for."""
  name: ClassVar[str] = ""
  losses: ClassVar[tuple[str, ...]] = ()   # auxiliary losses that its layers return
  selector_losses: ClassVar[tuple[str, ...]] = ()  # those of them that train the group "selector"
  loss_weights: ClassVar[dict[str, float]] = {}  # their weights where `Stage.loss_weights` says nothing; absent = 1
  memory: ClassVar[bool] = False           # whether it has parameters of the group "memory"
  grid: ClassVar[str] = ""                 # its option that packed documents have to begin at multiples of
  enters: ClassVar[tuple[str, ...]] = ()   # weight surgery that a stage may ask for on entry

  @property
  def acts_when_dense(self) -> bool:
    """Whether its parameters act in mode "dense" too: without them it is not the same model."""
    return self.memory

  def check(self, model, context: int) -> list[tuple[str, Any, str]]:
    """Problems as (field, value, fix), for sequences of `context` tokens."""
    return []

  def layer(self, init, model) -> Layer:
    """The layer's own parameters, created with `init` (nsa.layers.Init)."""
    return Layer()

  def flops(self, model, context: int, mode: str) -> dict[str, float]:
    """Forward FLOPs per token and layer of each branch, averaged over a causal sequence of
    `context` tokens; projections are counted with the parameters (nsa/flops.py)."""
    return {"dense": dense_flops(model, context)}

  def loss_flops(self, model, context: int, mode: str) -> dict[str, float]:
    """The same for auxiliary losses, which training alone pays; stages of mode "dense" have none."""
    return {}

  def reads(self, model, context: int) -> dict[str, float]:
    """Vectors of one KV head that the token at position `context` reads at decode, per branch.

    Keys and values of one position count as one; an index key, which has no value and another
    width, counts with its share of a full position's bytes."""
    return {"dense": float(context)}

  def tokens_visible(self, context: int) -> float:
    """Tokens that the last query of the sequence attends to exactly."""
    return float(context)


def dense_flops(model, context: int) -> float:
  """Q K^T and P V over the causal half: 2 * 2 * N * H * (context + 1) / 2."""
  return 2.0 * model.num_heads * model.head_dim * (context + 1)
