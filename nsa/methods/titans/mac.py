"""MAC, memory as context (Titans, arXiv 2501.00663, section 4.1): attention in segments, over recalled tokens too.

Per segment S of `segment` tokens, with M the memory at its beginning:

  r_i = M(q(x_i))                                                      what the memory recalls
  y_i = Attn over persistent tokens, k(r_j), v(r_j) and k(x_j), v(x_j) for j <= i in S, in one softmax
  M   is updated with y (keys, values and gates from y), in chunks, and o_i = join(y_i, M_i(q(y_i)))

The paper recalls for the whole segment and then lets token i see all of it, r_j with j > i included, and reads the
memory after the whole segment's update: both would let a token see the future in language modelling. Here token i sees
r_j up to its own, and reads the memory after its own write. r_j takes the position of its token in RoPE.

Segments follow one another in a scan. A call with a cache goes token by token, prompts too: right, and slow for long
ones.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from nsa import layers
from nsa.methods import interface
from nsa.methods.interface import Cost
from nsa.methods.titans import base, memory
import pallas_kernels as pk


@dataclasses.dataclass
class MAC(base.Titans):
  name: ClassVar[str] = "mac"
  grid: ClassVar[str] = "segment"
  heads: int = 0                  # memories; 0 = one per KV head, 1 = the paper's single one over the whole width
  segment: int = 64               # tokens that attend to one another
  persistent: int = 4             # learned tokens that every query sees
  join: str = "add"               # add (zero at the beginning) | product (the paper's gate)

  def check(self, model, context):
    problems = super().check(model, context)
    if self.segment < 1 or self.chunk >= 1 and self.segment % self.chunk:
      problems.append(("segment", self.segment, f"a multiple of chunk = {self.chunk}"))
    return problems

  def layer(self, init, model):
    return MACLayer(init, model, self)

  def attention_costs(self, model, context):
    per_key = 4.0 * model.num_heads * model.head_dim
    whole, rest = divmod(context, self.segment)
    seen = (whole * self.segment * (self.segment + 1) + rest * (rest + 1)) / 2 / context
    weights, (heads, group, _) = sum(a * b for a, b in self.memory_sizes(model)), self.memory_shape(model)
    return {"segment": Cost(per_key * seen), "recalled": Cost(per_key * seen),
            "persistent": Cost(per_key * self.persistent), "recall": Cost(2.0 * heads * group * weights)}

  def reads(self, model, context):
    seen = self.tokens_visible(context)
    # Four copies: the memory at the segment's beginning is a state as well.
    return {"segment": seen, "recalled": seen, "memory": self.memory_reads(model) * 4 / 3,
            "persistent": float(self.persistent)}

  def tokens_visible(self, context):
    return float((context - 1) % self.segment + 1)


class MACLayer(base.MemoryLayer):

  def __init__(self, init, model, options: MAC):
    width = model.num_heads * model.head_dim
    super().__init__(init, model, options, inputs=width)  # of y: keys, values, queries of the last read
    init, mem = init.child("memory", group="memory"), self.memory
    heads, group, head_width = options.memory_shape(model)
    mem.ask = layers.HeadProjection(init.child("ask"), model.d_model, heads * group, head_width, axis="heads",
                                    taps=model.short_conv)
    mem.k_recalled = layers.HeadProjection(init.child("k_recalled"), width, model.num_kv_heads, model.head_dim,
                                           axis="kv_heads", norm=model.qk_norm)
    mem.v_recalled = layers.HeadProjection(init.child("v_recalled"), width, model.num_kv_heads, model.head_dim,
                                           axis="kv_heads")
    self.kv, self.tail = (model.num_kv_heads, model.head_dim), (max(model.short_conv - 1, 0), width)

  def initial_state(self, batch, dtype):
    """The memory, what it was when the segment began, the segment's recalled keys and values, the convolution's
    tail."""
    state = self.memory.begin(batch)
    recalled = jnp.zeros((batch, self.options.segment) + self.kv, dtype)
    return {"memory": state, "recall": list(state["now"]), "k": recalled, "v": jnp.copy(recalled),
            "tail": jnp.zeros((batch,) + self.tail, dtype)}

  def __call__(self, x, streams, call):
    if call.mode != "sparse":
      return super().__call__(x, streams, call)
    T = x.h.shape[1]
    ask = self.memory.ask(x.h, call.query_segments(T), call.tail)
    if call.state is None:
      return interface.Result(self._by_segment(x, streams, ask, call), {})

    def token(state, i):
      at = lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1, axis=1)
      one = dataclasses.replace(call, offset=call.offset + i)
      o, state = self._token(jax.tree.map(at, x), streams, at(ask), one, state)
      return state, o[:, 0]

    state, o = jax.lax.scan(token, call.state, jnp.arange(T))
    return interface.Result(jnp.moveaxis(o, 0, 1), {}, state=state)

  def _by_segment(self, x, streams, ask, call):
    """All tokens of sequences that begin here."""
    (B, T), C = x.h.shape[:2], self.options.segment
    count = -(-T // C)
    split = lambda a: jnp.moveaxis(jnp.pad(a, ((0, 0), (0, count * C - T)) + ((0, 0),) * (a.ndim - 2)).reshape(
        (B, count, C) + a.shape[2:]), 1, 0)
    ids = jnp.zeros((B, T), jnp.int32) if call.segment_ids is None else call.segment_ids
    live, fresh = memory.documents(ids, jnp.arange(count * C), C, B)
    reach = self.tail[0]
    earlier = jnp.pad(ids, ((0, 0), (reach, count * C - T)), constant_values=-1)  # the convolution's view of the tail
    earlier = jnp.stack([earlier[:, i * C:i * C + reach] for i in range(count)])
    xs = (jax.tree.map(split, x), split(streams["k"]), split(streams["v"]), split(ask), split(ids), earlier,
          split(live[:, :T]), fresh[:, ::C].T, jnp.arange(count) * C)

    def segment(state, inputs):
      x, k, v, ask, ids, earlier, live, fresh, offset = inputs
      mem, tail = self._anew(fresh, state)
      k_new, v_new = self._recall(mem["now"], ask, live, call, offset)
      local = dict(segment_ids=ids, implementation=call.implementation)
      parts = [pk.attention(x.q, k, v, **local), pk.attention(x.q, k_new, v_new, **local)]
      mem, tail, o = self._write(parts, x, mem, tail, 0, ids, call, jnp.concatenate([earlier, ids], axis=1))
      return (mem, tail), o

    begin = self.memory.begin(B), jnp.zeros((B,) + self.tail, x.q.dtype)
    _, o = jax.lax.scan(jax.checkpoint(segment), begin, xs)
    return jnp.moveaxis(o, 0, 1).reshape((B, count * C) + o.shape[3:])[:, :T]

  def _token(self, x, streams, ask, call, state):
    """One token after those of the cache; [B, 1, ...] each."""
    C, place = self.options.segment, call.offset % self.options.segment
    B, S = streams["k"].shape[:2]
    ids = jnp.zeros((B, S), jnp.int32) if call.segment_ids is None else call.segment_ids
    live, fresh = memory.documents(ids, call.offset[None], C, B)
    mem, tail = self._anew(fresh[:, 0], (state["memory"], state["tail"]))
    begins = place == 0
    recall = [jnp.where(begins, now, old) for now, old in zip(mem["now"], state["recall"])]
    new = self._recall(recall, ask, live, call, call.offset)
    k_new, v_new = (jax.lax.dynamic_update_slice_in_dim(state[name], a.astype(state[name].dtype), place, axis=1)
                    for name, a in zip("kv", new))
    # The same document and the same segment.
    both = ids * (S // C + 1) + jnp.arange(S) // C
    mine = jax.lax.dynamic_slice_in_dim(jnp.pad(ids, ((0, 0), (0, C))), call.offset - place, C, axis=1)
    parts = [pk.attention(x.q, streams["k"], streams["v"], segment_ids=both, query_offset=call.offset,
                          implementation=call.implementation),
             pk.attention(x.q, k_new, v_new, segment_ids=mine, query_offset=place, implementation=call.implementation)]
    mem, tail, o = self._write(parts, x, mem, tail, call.offset, ids, call, None)
    return o, {"memory": mem, "recall": recall, "k": k_new, "v": v_new, "tail": tail}

  def _anew(self, fresh, state):
    """Memory and tail, begun anew where another document begins."""
    mem, tail = state
    reset = lambda new, old: jnp.where(fresh.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    begin = self.memory.begin(tail.shape[0])
    return jax.tree.map(reset, begin, mem), reset(jnp.zeros_like(tail), tail)

  def _recall(self, weights, ask, live, call, offset):
    """Keys and values [B, T, K, H] of what the memory answers; nothing to tokens of a document that is not its own."""
    r = memory.bounded(self.memory.read(weights, ask)) * live[..., None, None]
    r = r.reshape(r.shape[:2] + (-1,)).astype(ask.dtype)
    return call.rope(self.memory.k_recalled(r), offset=offset), self.memory.v_recalled(r)

  def _write(self, parts, x, state, tail, offset, ids, call, all_ids):
    """Writes the attention output into the memory and reads it. `ids` are over positions, the first token's being
    `offset`; `all_ids` are those of tail and tokens, None where there is one document."""
    mem = self.memory
    if hasattr(mem, "persistent"):
      parts = parts + [mem.persistent(x.q_raw, call)]
    y = base.merge(parts)
    flat = y.reshape(y.shape[:2] + (-1,))
    reach = tail.shape[1]
    both = jnp.concatenate([tail.astype(flat.dtype), flat], axis=1)
    q, k, v = (project(both, all_ids)[:, reach:] for project in (mem.q, mem.k, mem.v))
    m, state = mem(q, k, v, mem.gates_of(flat), state, offset=offset, segment_ids=ids)
    return state, both[:, both.shape[1] - reach:], mem.join(x.h, y, m)
