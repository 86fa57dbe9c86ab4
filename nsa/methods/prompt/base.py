"""What the methods share that choose once per prompt: the split into prompt and answer, masked attention, accounting.

*Prefill* methods (minference.py, flexprefill.py, xattention.py) thin out the attention of a prompt and let the answer
attend to everything; a *decode* method (snapkv.py) reads the prompt densely, then evicts most of it, and the answer
attends to what is left and to itself.

Neither is causal within the prompt. A prefill method chooses with the prompt's last queries, or with the mean query
of a block: tokens decide what queries before them see, and through the next layer's keys what is predicted there.
In the papers' use that is harmless, because the prompt is given and nothing in it is predicted. Run over a sequence
that is scored at every position it would leak. So these methods

* take `Call.prompt`, the number of tokens of each prompt, and choose with queries and keys of the prompt alone: no
  answer token, the first one included, has a part in it;
* refuse to run without it (training, and any pass that is scored throughout), and are no methods to train with;
* are scored behind the prompt only: nsa/evaluate.py takes the first half of a text window as the prompt and gives
  bits per byte of the second half alone, and takes a task up to its first answer token.

What the answer sees of later layers' keys may depend on the whole prompt; that is past, not future.

Decoding with a cache is the same split: `prompt` with the prefill, nothing afterwards; the cache's state remembers it.

One set per (query, KV head), as everywhere here; the papers choose per query head. Scores are means over the heads of
the group. A prompt is one document: segments are masked in the attention but take no part in the choice.

The attention itself is dense and masked, by chunks of queries: exact, but at dense cost. FLOPs are therefore counted
for what a kernel would compute, never timed. Sets may differ in size from query to query: `Result.measured` says how
many tokens were really visible.
"""
import dataclasses
from typing import Callable, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa.methods import blocks, distillation, interface
from nsa.methods.interface import Cost
import pallas_kernels as pk
from pallas_kernels import masked

# Positions int32[t] -> bool[B, K, t, S]: the tokens that these queries attend to, causality aside.
Visible = Callable[[Int[Array, " t"]], Bool[Array, "B K t S"]]


@dataclasses.dataclass
class PromptMethod(interface.Method):
  """Base of the methods that choose once per prompt. They have no parameters and cannot be trained with."""
  phase: ClassVar[str] = "prefill"  # "prefill": the prompt's queries are sparse; "decode": the answer's

  def layer(self, init, model):
    return PromptLayer(self, model.num_kv_heads)

  def choose(self, q, k, prompt: Int[Array, " B"], call: interface.Call) -> tuple[Visible, dict[str, Array]]:
    """What the queries of the phase see, and what decoding must remember of it.

    q [B, T, N, H] and k [B, T, K, H] begin at position 0; those from `prompt` on must have no influence.
    """
    raise NotImplementedError

  def state(self, batch: int, kv_heads: int) -> dict[str, Array]:
    """What decoding remembers besides the prompt's length, before there is a prompt."""
    return {}

  def recall(self, state: dict[str, Array], prompt: Int[Array, " B"], keys: int) -> Visible | None:
    """What the answer's queries see when the prompt is past; None: everything."""
    return None

  def selection_costs(self, model, context: int) -> dict[str, Cost]:
    """What choosing costs, per token of a prompt of `context` tokens and layer."""
    return {}

  def budget(self, context: int) -> int:
    """Tokens that a query attends to at most."""
    return context

  def costs(self, model, context, mode):
    """Of a prompt of `context` tokens. Where the sets adapt this is the most it can be: see `Result.measured`."""
    dense = super().costs(model, context, mode)
    if mode != "sparse":
      return dense
    visible = blocks.mean_visible(self.budget(context), context)
    attention = (dense if self.phase == "decode"
                 else {"selected": Cost(attention_flops(model, visible), kind="selected")})
    return {**attention, **self.selection_costs(model, context)}

  def measured_flops(self, model, context, visible):
    """The selection for a prompt of half the tokens, and not at all for answers that an eviction serves."""
    choosing = self.selection_costs(model, context // 2).values() if self.phase == "prefill" else ()
    return attention_flops(model, visible) + sum(cost.flops for cost in choosing)

  def tokens_visible(self, context):
    return float(min(self.budget(context), context))


class PromptLayer(interface.Layer):
  """Attention over the tokens that a `PromptMethod` chose; no parameters."""

  def __init__(self, options: PromptMethod, kv_heads: int):
    self.options, self.kv_heads = options, kv_heads

  def initial_state(self, batch, dtype):
    return {"prompt": jnp.zeros((batch,), jnp.int32), **self.options.state(batch, self.kv_heads)}

  def __call__(self, x, streams, call):
    if call.mode == "dense":
      return super().__call__(x, streams, call)
    q, k, v, options = x.q, streams["k"], streams["v"], self.options
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if call.prompt is None:
      if call.state is None:
        raise ValueError(f"attention method {options.name!r} chooses once per prompt, with tokens that lie behind "
                         "those it chooses for: a pass that is scored throughout would leak. Give the prompts' lengths "
                         "(model.forward(..., prompt=)), or evaluate a trained model with it as a run mode")
      visible = options.recall(call.state, call.state["prompt"], S)
      if visible is None:
        return super().__call__(x, streams, call)
      return interface.Result(attend(q, k, v, visible, call)[0], {})
    if not isinstance(call.offset, int) or call.offset:
      raise ValueError(f"prompt with offset = {call.offset}: a prompt begins at position 0; pass it with the first "
                       "tokens")
    prompt = jnp.broadcast_to(jnp.asarray(call.prompt, jnp.int32), (B,))
    chosen, memory = options.choose(jax.lax.stop_gradient(q), jax.lax.stop_gradient(k[:, :T]), prompt, call)
    mine = (lambda t: t < prompt[:, None]) if options.phase == "prefill" else (lambda t: t >= prompt[:, None])  # [B, t]

    def visible(t):
      # Masks end with the tokens of this call; a cache may have room for more, which causality hides.
      ours = jnp.pad(chosen(t), [(0, 0)] * 3 + [(0, S - T)])
      return ours | ~mine(t)[:, None, :, None]

    o, lse, count = attend(q, k, v, visible, call)
    measured = _measure(q, k, lse, count, mine(jnp.arange(T)), call)
    state = None if call.state is None else {"prompt": prompt, **memory}
    return interface.Result(o, {}, state=state, measured=measured)


def attention_flops(model, visible: float) -> float:
  """Q K^T and P V of one query over `visible` tokens: 4 * N * H * visible."""
  return 4.0 * model.num_heads * model.head_dim * visible


# --- masked attention ---------------------------------------------------------------


def attend(q, k, v, visible: Visible, call: interface.Call):
  """Softmax attention over any set of tokens per query and KV head.

  Returns o [B, T, N, H] in q.dtype, lse float32[B, T, N], and count float32[B, T, K], the tokens attended to.
  """
  B, T, N, H = q.shape
  S = k.shape[1]

  def part(position, segments, q):
    mask = masked.visible_tokens(position, segments, slice(0, S), call.segment_ids)[:, None]
    mask = mask & visible(jnp.maximum(position[0], 0))
    o, lse = masked.attend(q, k, v, mask, H ** -0.5)
    return o, lse, mask.sum(-1).swapaxes(1, 2).astype(jnp.float32)

  return distillation.over_queries(part, call, B * N * S, q)


def _measure(q, k, lse, count, mine, call):
  """Means over the queries of the phase, float32[B, K] each; unused they cost nothing: XLA drops them.

  tokens_visible  tokens attended to
  tokens_causal   tokens that dense attention would attend to
  captured_mass   share of the dense attention's mass on the visible tokens, exp(lse - dense lse), mean over the group
  """
  _, dense = pk.attention(q, k, k, **call.ops)
  B, T, N = lse.shape
  mass = jnp.exp(lse - dense).reshape(B, T, count.shape[2], -1).mean(-1)
  position = (call.offset + jnp.arange(T))[None]
  causal = position + 1  # without a mask of T times S: prompts are long
  if call.segment_ids is not None:
    causal = masked.visible_tokens(position, call.query_segments(T), slice(0, k.shape[1]), call.segment_ids).sum(-1)
  causal = jnp.broadcast_to(causal[..., None], count.shape).astype(jnp.float32)
  weight = mine / jnp.maximum(mine.sum(1, keepdims=True), 1)
  values = {"tokens_visible": count, "tokens_causal": causal, "captured_mass": mass}
  return {name: jnp.einsum("btk,bt->bk", x, weight) for name, x in values.items()}


# --- what selections are made of ----------------------------------------------------


def last_attention(q, k, prompt: Int[Array, " B"], count: int):
  """Attention of each prompt's last `count` queries over the prompt.

  Returns (probabilities float32[B, K, count, T], the mean over the group's heads, and positions int32[B, count]);
  rows that a shorter prompt does not have are 0, at negative positions.
  """
  T = q.shape[1]
  at = prompt[:, None] - count + jnp.arange(count)
  rows = jnp.take_along_axis(q, jnp.maximum(at, 0)[:, :, None, None], axis=1)
  mask = (jnp.arange(T) <= at[:, :, None])[:, None, None]  # a prompt's own queries: nothing behind it is seen
  return masked.softmax(masked.scores(rows, k, q.shape[-1] ** -0.5), mask).mean(2), at


def by_distance(p: Float[Array, "B K W T"], at: Int[Array, "B W"]) -> Float[Array, "B K T"]:
  """Sums over diagonals: of probabilities of queries at positions `at`, the mass at each distance 0 .. T - 1."""
  T = p.shape[-1]
  token = at[:, :, None] - jnp.arange(T)  # at distance 0, 1, ... from the query
  x = jnp.take_along_axis(p, jnp.maximum(token, 0)[:, None], axis=-1)
  return jnp.where((token >= 0)[:, None], x, 0.0).sum(2)


def best(scores: Float[Array, "... S"], count, forced=None) -> Bool[Array, "... S"]:
  """The `count` largest of each row (an int, or int[..., 1]), forced ones first; ties to the lower index."""
  scores = scores if forced is None else jnp.where(forced, jnp.inf, scores)
  return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1, stable=True) < count


def cover(scores: Float[Array, "... S"], share: float) -> Int[Array, "... 1"]:
  """How many of the largest entries of a row it takes to reach `share` of its sum."""
  x = -jnp.sort(-scores, axis=-1)
  before = jnp.cumsum(x, axis=-1) - x
  return (before < share * scores.sum(-1, keepdims=True)).sum(-1, keepdims=True)


def block_means(x: Float[Array, "B T heads H"], prompt: Int[Array, " B"],
                size: int) -> Float[Array, "B blocks heads H"]:
  """Mean over the tokens of each block that belong to the prompt; 0 where there are none."""
  B, T = x.shape[:2]
  blocks = -(-T // size)
  inside = jnp.arange(T) < prompt[:, None]
  x = jnp.where(inside[:, :, None, None], x.astype(jnp.float32), 0.0)
  x = jnp.pad(x, ((0, 0), (0, blocks * size - T), (0, 0), (0, 0))).reshape((B, blocks, size) + x.shape[2:]).sum(2)
  tokens = jnp.clip(prompt[:, None] - jnp.arange(blocks) * size, 1, size)
  return x / tokens[:, :, None, None]


def of_blocks(chosen: Bool[Array, "B K rows blocks"], size: int, tokens: int) -> Visible:
  """A map of blocks of queries and keys as a mask of tokens."""
  def visible(t):
    row = jnp.minimum(t // size, chosen.shape[2] - 1)
    return jnp.repeat(chosen[:, :, row], size, axis=-1)[..., :tokens]
  return visible


def causal_blocks(prompt: Int[Array, " B"], rows: int, size: int) -> Bool[Array, "B 1 rows rows"]:
  """Which blocks of keys each block of queries may choose: those up to its own, within the prompt."""
  block = jnp.arange(rows)
  real = block * size < prompt[:, None]
  return ((block <= block[:, None]) & real[:, :, None])[:, None]
