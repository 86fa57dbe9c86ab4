"""Titans' neural long-term memory (arXiv 2501.00663, section 3): a small MLP whose weights are the state.

Per memory head, with unit-norm keys and queries, l(M; k, v) = |M(k) - v|^2 / 2 and u_i = grad_M l(M'; k_i, v_i):

  S_t = eta_t S_{t-1} - theta_t u_t          surprise, with momentum eta              (eqs. 9, 10, 13)
  M_t = (1 - alpha_t) M_{t-1} + S_t          memory, with forgetting alpha            (eq. 14)
  y_t = M_t(q_t)                             read after the token's own write         (eq. 15)

theta, eta and alpha come from the token. M' is the memory at the beginning of the token's chunk (section 3.2): all
gradients of a chunk are taken side by side. `gradient = "document"` takes them all at the memory that a document
begins with instead, which is what public code does unless told to renew its weights every so often; `read = "chunk"`
reads M', as public code does, instead of M_t. Chunks lie on the absolute grid [c * chunk, (c + 1) * chunk).

No weights per token are ever built. The gradient of one matrix for one token is an outer product a_i d_i^T (input
and error signal of that matrix), and the recurrences are linear, so within a chunk

  W_t = beta_t W' + gamma_t S' - sum_{i <= t} C[t, i] theta_i a_i d_i^T,    C = decay(1 - alpha) decay(eta),

with decay(x)[t, j] = x_{j+1} ... x_t. Reading a_t W_t is then a product with the carried matrices and one causal,
weighted attention over the chunk per matrix. The result equals the recurrence token by token (tests/memory_oracle.py).

How it is computed: chunks are written one after the other, and read side by side. Writing needs a chunk's memory, its
keys and values: the inner gradient, written out (`_gradients`) so that no product is made twice, and one product that
writes a matrix and its surprise, which are one array. Per chunk of b tokens and matrix that leaves three products that
follow one another, [b, I] x [I, O] twice (once for the first matrix) and [2 I, b] x [b, O], for all sequences and heads
at a time: a scan (`_write`), or the kernels of pallas_kernels/memory.py where they serve. Both leave what every chunk
begins with; decays, C and all reading (`_read_chunks`) are then products for all chunks at a time, or kernels as well.
A prompt that goes on from a state (`_one_by_one`) reads a chunk when it was written: it needs the last state alone.
`products` = "bfloat16" rounds their operands, and those of their gradients; sums, state, decays and all else stay
float32. What bounds it on a GPU: docs/kernels.md.

What keeps it finite, by construction and for any weights and any length:
* theta_t = max_step * sigmoid(.) * (1 - eta_t): S is a weighted mean of single steps, so
  |S| <= max_step * clip * sqrt(d);
* the gradient of one token over all matrices is rescaled to a norm of at most clip * sqrt(d), d the width (per token,
  hence causal; public code clips whole chunks, or nothing);
* norm = True: every matrix is followed by `bounded`, an RMS norm above one, and the MLP by a residual, M(x) = x +
  gain * bounded(...): outputs are bounded for any weights, and gradients fall as these grow. False: the paper's MLP;
* every matrix acts on its input divided by sqrt(fan in), so that all matrices get gradients of one size;
* log(1 - alpha) and log(eta) are log-sigmoids, and decays are exponentials of their sums: nothing is divided by;
* backprop = "full" differentiates everything when the model is trained, as the paper and public code do: a chain of
  chunks is then a chain of factors (I - theta * Hessian), bounded by small steps alone. "local" takes M' as a
  constant of the inner gradients; the past is reached through the linear recurrence alone, with factors of at most one.
All of it is float32, with full-precision products unless `products` says otherwise.

A memory of several matrices that forgetting has brought to zero can be written no more: hence gates begin with next to
no forgetting. In long chunks full backprop can multiply the gradient from chunk to chunk. docs/memory.md has what was
measured of both, and of the guards above.

Documents: a chunk belongs to the document of its first token. Where that changes, the memory begins anew, so packed
documents that begin at chunk boundaries (`data.align`, checked) equal documents on their own. A document, or padding,
that begins inside a chunk neither writes nor reads (y = 0) until the next boundary: nothing leaks.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from nsa import layers
from pallas_kernels import memory as kernel

_EPS = 1e-6


class Gates(NamedTuple):
  """Of every token and memory head, float32[B, T, R]."""
  log_keep: Array        # log(1 - alpha)
  log_momentum: Array    # log(eta)
  step: Array            # theta


class Memory(nnx.Module):
  """Parameters of R memories of one layer, read by G queries each."""

  def __init__(self, init: layers.Init, model, options, *, project: bool = True, inputs: int = 0):
    """`project`: with projections of its own. `inputs`: width of what they and the gates see, 0 = d_model."""
    heads, group, width = options.memory_shape(model)
    inputs = inputs or model.d_model
    self.options = options
    if project:
      def projection(name, heads):
        return layers.HeadProjection(init.child(name), inputs, heads, width, axis="heads", taps=model.short_conv)
      self.q, self.k, self.v = projection("q", heads * group), projection("k", heads), projection("v", heads)
    # Gates begin near their biases: forgetting 0.005 % per token, momentum 1/2, an eighth of the largest step.
    self.gates = init.normal("gates", (inputs, heads, 3), ("embed" if inputs == model.d_model else None, "heads", None),
                             fan_in=inputs, gain=0.1)
    self.gate_bias = init.param(jnp.broadcast_to(jnp.float32([-10.0, 0.0, -2.0]), (heads, 3)), ("heads", None))
    if options.norm:
      self.gain = init.constant((heads, width), ("heads", None), 1.0)
    sizes = options.memory_sizes(model)
    self.initial = nnx.Dict(
        {f"w{i}": init.normal(f"w{i}", (heads, fan_in, fan_out), ("heads", None, None), fan_in=1, decay=False)
         for i, (fan_in, fan_out) in enumerate(sizes)})

  def weights(self) -> list[Float[Array, "R I O"]]:
    """The memory that every document begins with."""
    return [self.initial[f"w{i}"][...] for i in range(self.options.depth)]

  def begin(self, batch: int) -> dict:
    """The state before the first token, float32: matrices at the chunk's start, now, and the surprise."""
    first = [jnp.broadcast_to(w, (batch,) + w.shape) for w in self.weights()]
    return {"start": first, "now": list(first), "surprise": [jnp.zeros_like(w) for w in first]}

  def gates_of(self, x: Float[Array, "B T D"]) -> Gates:
    logits = _dot("btd,drg->btrg", x.astype(jnp.float32), self.gates[...]) + self.gate_bias[...]
    alpha, eta, theta = jnp.moveaxis(logits, -1, 0)
    step = self.options.max_step * jax.nn.sigmoid(theta) * jax.nn.sigmoid(-eta)  # 1 - eta
    return Gates(jax.nn.log_sigmoid(-alpha), jax.nn.log_sigmoid(eta), step)

  def read(self, weights: list, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """M(q) of one memory [B, R, I, O] for all tokens, without writing."""
    B, T, N, H = q.shape
    heads = self.gate_bias.shape[0]
    q_BRGTd = jnp.moveaxis(unit(q).reshape(B, T, heads, N // heads, H), 1, 3)
    linear = lambda i, a: self._product("brgti,brio->brgto", a, weights[i])
    y = self._output(q_BRGTd, _network(linear, q_BRGTd, self.options.depth, self.options.norm))
    return jnp.moveaxis(y, 3, 1).reshape(q.shape)

  def __call__(self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], gates: Gates,
               state: dict | None, *, offset=0, segment_ids=None,
               implementation: str | None = None) -> tuple[Float[Array, "B T N H"], dict]:
    """Writes and reads these tokens. q, k, v as projected; returns float32 y and the new state.

    `offset` (int, or traced int32) is the position of the first token, `segment_ids` int32[B, S] over positions.
    `implementation`: None for the kernels of pallas_kernels/memory.py where they serve, "reference" for the scan.
    """
    size, (B, T) = self.options.chunk, q.shape[:2]
    if T == 1:       # decoding: a chunk of one slot, which may end a chunk of the grid
      width, phase, slots = 1, 0, 1
    else:            # shifted so that chunks of the call are chunks of the grid
      width, phase = size, offset % size
      slots = -(-(T + (phase if isinstance(phase, int) else size - 1)) // size) * size
    at_start = isinstance(phase, int) and not phase
    positions = offset - phase + jnp.arange(slots)
    valid = (jnp.arange(slots) >= phase) & (jnp.arange(slots) < phase + T)
    live, fresh = documents(segment_ids, positions, size, B)
    live, fresh = live & valid, fresh & valid

    def place(x):    # [B, T, ...] -> float32[B, slots, ...]
      x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, slots - T)) + ((0, 0),) * (x.ndim - 2))
      return x if at_start else jnp.roll(x, phase, axis=1)

    def split(x):    # [B, slots, R, ...] -> [B, R, chunks, width, ...]
      return jnp.moveaxis(x.reshape((B, slots // width, width) + x.shape[2:]), 3, 1)

    mask = live[..., None].astype(jnp.float32)
    whole = state is None and at_start and not T % size  # the memory as it is, is what every chunk begins with
    heads = self.gate_bias.shape[0]
    how = dict(begins_a_chunk=whole, chunks=slots // width, **self._shape())
    fused = kernel.reads(implementation, queries=q.shape[2] // heads, read=self.options.read, **how)
    x = {"live": split(mask), "keep": split(place(gates.log_keep) * mask),
         "momentum": split(place(gates.log_momentum) * mask), "k": split(place(unit(k))),
         "v": split(place(jax.nn.silu(v))), "step": split(place(gates.step) * mask), "anew": fresh[:, None, ::width]}
    reads_at_once = state is not None and slots > width
    state = self.begin(B) if state is None else state
    first, begin = self.begin(B)["now"], [_pair(now, s) for now, s in zip(state["now"], state["surprise"])]
    if fused:
      mixing = kernel.mix(x["keep"], x["momentum"], jnp.broadcast_to(x["live"], x["keep"].shape))
      written = self._kernel_write(x, mixing, first, begin)
      end, last = written.end, None
      y = kernel.read(q.reshape(B, T, heads, -1, q.shape[-1]), mask[..., 0], self.gain[...], mixing, x["k"], written)
      y = y.reshape(q.shape)
    else:
      queries = place(unit(q)).reshape(B, slots, heads, -1, q.shape[-1])
      x["q"] = jnp.moveaxis(split(queries), 4, 3)
      if not whole:
        complete = (positions[width - 1::width] % size == size - 1) & valid[width - 1::width]
        x["complete"] = jnp.broadcast_to(complete, (1, 1) + complete.shape)
      start = None if whole else list(state["start"])
      if reads_at_once:
        z, end, last = self._one_by_one(x, first, begin, start)
      else:
        z, end, last = self._side_by_side(x, first, begin, start, kernel.serves(implementation, **how))
      z = jnp.transpose(z, (0, 2, 4, 1, 3, 5)).reshape(queries.shape)
      y = (self._output(queries, z, behind=1) * mask[..., None, None]).reshape((B, slots) + q.shape[2:])
    if not at_start:
      y = jnp.roll(y, -phase, axis=1)
    now, surprise = zip(*(jnp.split(pair, 2, axis=2) for pair in end))
    return y[:, :T], {"start": last or list(now), "now": list(now), "surprise": list(surprise)}

  def _side_by_side(self, x, first, begin, start, kernels: bool):
    """Writes chunks one after the other and reads them side by side, x of [B, R, C, t, ...] each: what the last matrix
    gives [B, R, C, G, t, d], the pairs at the end, and the start that goes on (None where it is the memory)."""
    mixing = self._decays(x["live"], x["keep"], x["momentum"])
    if kernels:
      written, last = self._kernel_write(x, mixing, first, begin), None
      starts = [_upper(pair) for pair in written.pairs]
    else:
      tokens = {"k": x["k"], "v": x["v"], "step": x["step"], "leaving": mixing.leaving, "lasting": mixing.lasting}
      written, starts, last = self._write(tokens, mixing.decays, x["anew"][:, 0], first, begin,
                                          None if start is None else (start, x["complete"][0, 0]))
    read = jax.checkpoint(self._read_chunks) if self.options.recompute else self._read_chunks
    return read(x["q"], x["k"], mixing, written, starts), written.end, last

  def _one_by_one(self, x, first, begin, start):
    """As `_side_by_side`, each chunk read when it was written: a prompt keeps one chunk's weights, not those of all."""
    def one(carry, x):
      z, *carry = self._side_by_side(jax.tree.map(lambda a: a[:, :, None], x), first, *carry, False)
      return carry, z[:, :, 0]

    (end, last), z = jax.lax.scan(one, [begin, start], jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), x))
    return jnp.moveaxis(z, 0, 2), end, last

  def _kernel_write(self, x, mixing, first, begin):
    tokens = {"k": x["k"], "v": x["v"], "step": x["step"], "leaving": mixing.leaving, "lasting": mixing.lasting,
              "gain": self.gain[...]}
    return kernel.write(tokens, mixing.decays, x["anew"][:, 0], first, begin, clip=self.options.clip,
                        full=self.options.backprop == "full", dtype=self._operands)

  def _shape(self) -> dict:
    """What `kernel.refuses` asks."""
    o, (_, width, hidden) = self.options, self.initial["w0"].shape
    return dict(chunk=o.chunk, width=width, hidden=hidden, depth=o.depth, norm=o.norm, gradient=o.gradient,
                products=o.products)

  def _decays(self, live, keep, momentum) -> kernel.Mixing:
    """The slow twin of `kernel.mix`: how tokens mix (C of the module), and what is left of memory and surprise."""
    keep, momentum = jnp.cumsum(keep, -1), jnp.cumsum(momentum, -1)
    gained, lasting = _decays(keep) * live[..., None, :], _decays(momentum)  # a slot without a token adds no surprise
    beta, gamma = jnp.exp(keep), _dot("brctj,brcj->brct", gained, jnp.exp(momentum))
    mixing = _dot("brctj,brcji->brcti", gained, lasting)
    decays = jnp.stack([beta[..., -1], gamma[..., -1], jnp.exp(momentum[..., -1])], -1)
    return kernel.Mixing(mixing, beta, gamma, mixing[..., -1, :], lasting[..., -1, :], decays)

  def _write(self, tokens, decays, anew, first, begin, start):
    """The slow twin of `kernel.write`: (what it returns, the memory at every chunk's start, the start that goes on).

    start: None where a chunk's start is its memory, else the (matrices, whether each chunk of the grid ends).
    """
    first = [_pair(w, jnp.zeros_like(w)) for w in first]
    xs = {name: jnp.moveaxis(x, 2, 0) for name, x in {**tokens, "decays": decays}.items()}
    xs["ends"] = _ends(xs["k"], xs).astype(self._operands)
    xs["anew"] = anew.T
    carry = {"pairs": begin}
    if start is not None:
      carry["start"], xs["complete"] = start
    chunk = functools.partial(self._chunk, first)
    if self.options.recompute:
      chunk = jax.checkpoint(chunk, prevent_cse=False)  # between a scan's two loops there is nothing in common to find
    carry, (pairs, starts, inputs, errors) = jax.lax.scan(chunk, carry, xs)
    out = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), (pairs, starts, inputs, errors))
    starts = out[1] or [_upper(pair) for pair in out[0]]
    return kernel.Written(out[0], carry["pairs"], out[2], out[3]), starts, carry.get("start")

  def _chunk(self, first, carry, x):
    """One chunk, [B, R, ...] each: the carry after it, and what it begins with and leaves for `_read_chunks`.

    A pair is [B, R, 2 I, O]: a matrix of the memory, and its surprise below. One product writes both.
    """
    o, carry = self.options, _anew(x["anew"], first, carry)
    pairs, started = carry["pairs"], carry.get("start", [])
    base = started or [_upper(pair) for pair in pairs]
    if o.gradient == "document":
      base = [_upper(pair) for pair in first]
    elif o.backprop == "local":
      base = jax.lax.stop_gradient(base)
    inputs, errors = self._gradients(base, x["k"], x["v"])
    step = x["step"][..., None]                                                  # [B, R, t, 1]
    if o.clip:
      squared = sum(jnp.sum(a * a, -1, keepdims=True) * jnp.sum(d * d, -1, keepdims=True)
                    for a, d in zip(inputs, errors))
      limit = o.clip ** 2 * x["v"].shape[-1]
      step = step * jnp.sqrt(limit) * jax.lax.rsqrt(jnp.maximum(squared, limit))
    errors = [(d * step).astype(self._operands) for d in errors]
    beta, gamma, kept = (d[..., None, None] for d in jnp.moveaxis(x["decays"], -1, 0))
    new = []
    for i, pair in enumerate(pairs):
      now, surprise = jnp.split(pair, 2, axis=2)
      ends = _ends(inputs[i], x) if i else x["ends"]
      new.append(_pair(beta * now + gamma * surprise, kept * surprise)
                 - self._product("brji,brjo->brio", ends, errors[i]))
    out = {"pairs": new}
    if started:
      out["start"] = [jnp.where(x["complete"], _upper(n), s) for n, s in zip(new, started)]
    return out, (pairs, started if o.read == "chunk" else [], inputs[1:], errors)

  def _read_chunks(self, q, k, mixing, written, starts) -> Float[Array, "B R C G t d"]:
    """What the last matrix gives for the queries of all chunks side by side, [B, R, C, ...] each: with `_output`, the
    slow twin of `kernel.read`."""
    o, keys = self.options, (k, *written.inputs)

    def moved(i, a):
      shares = self._product("brcgta,brcja->brcgtj", a, keys[i]) * mixing.tokens[:, :, :, None]
      both = _carried(a, mixing)
      if not i:  # of queries and keys alone
        shares, both = shares.astype(self._operands), both.astype(self._operands)
      return (self._product("brcgti,brcio->brcgto", both, written.pairs[i])
              - self._product("brcgtj,brcjo->brcgto", shares, written.errors[i]))

    linear = moved if o.read == "token" else lambda i, a: self._product("brcgti,brcio->brcgto", a, starts[i])
    return _network(linear, q, o.depth, o.norm)

  def _gradients(self, weights, k, v):
    """Inputs a [B, R, t, I] and error signals d [B, R, t, O] of every matrix: its gradient for token i is a_i d_i^T.

    Back-propagation through the memory's MLP, written out: its products and no others are made.
    """
    o, a, inputs, raw = self.options, k, [], []
    for w in weights:
      inputs.append(a)
      raw.append(self._product("brti,brio->brto", a, w))
      z = bounded(raw[-1]) if o.norm else raw[-1]
      a = jax.nn.silu(z) / np.sqrt(z.shape[-1])
    g = self._output(k, z) - v                                                   # of |M(k) - v|^2 / 2
    if o.norm:
      g = g * self._gain(2)
    errors = []
    for i in reversed(range(o.depth)):
      z, scale = raw[i], 1.0
      if o.norm:  # of bounded: n = z scale, dn = scale dz - scale^3 z mean(z dz)
        scale = jax.lax.rsqrt(1 + jnp.mean(z * z, -1, keepdims=True))
        g = scale * g - scale ** 3 * z * jnp.mean(z * g, -1, keepdims=True)
      errors.insert(0, g)
      if i:
        z = raw[i - 1]
        n = bounded(z) if o.norm else z
        gate = jax.nn.sigmoid(n)
        g = self._product("brto,brio->brti", g, weights[i]) * gate * (1 + n * (1 - gate)) / np.sqrt(n.shape[-1])
    return inputs, errors

  def _output(self, x, z, behind: int = 0):
    """M(x) of the last matrix's output, [B, (T,) R, ..., d]; `behind`: whether time stands before R."""
    if not self.options.norm:
      return z
    return x + self._gain(x.ndim - 2 - behind) * z

  @property
  def _operands(self):
    return jnp.dtype(self.options.products)

  def _product(self, spec, x, y):
    return _dot(spec, x, y) if self._operands == jnp.float32 else _rounded(spec, x, y)

  def _gain(self, inner: int):
    """The gain, to go with [..., R, ..., d] of `inner` dimensions behind R."""
    gain = self.gain[...]
    return gain.reshape((gain.shape[0],) + (1,) * (inner - 1) + gain.shape[1:])


def unit(x):
  """SiLU, then unit norm (section 4.4), float32."""
  x = jax.nn.silu(x.astype(jnp.float32))
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _EPS)


def bounded(z):
  """z / sqrt(1 + mean(z^2)): an RMS norm that leaves small vectors small, lest it blows up what is left of a memory
  that was forgotten. Its RMS stays below 1 and no difference grows."""
  return z * jax.lax.rsqrt(1 + jnp.mean(z * z, -1, keepdims=True))


def _network(linear, x, depth, norm):
  """What the last matrix of the memory's MLP gives; `linear(i, a)` is the product with its i-th matrix."""
  a = x
  for i in range(depth):
    z = linear(i, a)
    if norm:
      z = bounded(z)
    a = jax.nn.silu(z) / np.sqrt(z.shape[-1])
  return z


def _pair(upper, lower):
  return jnp.concatenate([upper, lower], axis=2)


def _upper(pair):
  return pair[..., :pair.shape[-2] // 2, :]


def _carried(a: Float[Array, "... R G t I"], mixing: kernel.Mixing) -> Float[Array, "... R G t J"]:
  """What reads a pair: [beta a, gamma a], J = 2 I."""
  return jnp.concatenate([decay[..., None, :, None] * a for decay in (mixing.beta, mixing.gamma)], axis=-1)


def _ends(a: Float[Array, "... t I"], x) -> Float[Array, "... t J"]:
  """What writes a pair: a by how much of each token is left in memory and surprise at the chunk's end, J = 2 I."""
  return jnp.concatenate([x[name][..., None] * a for name in ("leaving", "lasting")], axis=-1)


def _anew(fresh: Bool[Array, " B"], first: list, carry: dict) -> dict:
  """The carry, begun anew where another document begins."""
  reset = lambda w, old: jnp.where(fresh[:, None, None, None], w, old)
  out = {"pairs": [reset(w, pair) for w, pair in zip(first, carry["pairs"])]}
  if "start" in carry:
    out["start"] = [reset(_upper(w), old) for w, old in zip(first, carry["start"])]
  return out


def _decays(cumulated: Float[Array, "... t"]) -> Float[Array, "... t t"]:
  """[t, j] -> exp of the sum over j+1 .. t, 0 for j > t."""
  size = cumulated.shape[-1]
  lower = jnp.tril(jnp.ones((size, size), bool))
  return jnp.where(lower, jnp.exp(jnp.where(lower, cumulated[..., :, None] - cumulated[..., None, :], 0.0)), 0.0)


def documents(segment_ids, positions, size, batch) -> tuple[Bool[Array, "B slots"], Bool[Array, "B slots"]]:
  """Of the tokens at `positions`, with chunks of `size`: whether a token belongs to its chunk's document, and whether
  it is the first of a chunk that has another document than the chunk before."""
  if segment_ids is None:
    return jnp.ones((batch, len(positions)), bool), jnp.zeros((batch, len(positions)), bool)
  at = lambda p: jnp.take(segment_ids, jnp.clip(p, 0, segment_ids.shape[1] - 1), axis=1)
  lead = at(positions // size * size)
  before = at((positions // size - 1) * size)
  return at(positions) == lead, (lead != before) & (positions % size == 0) & (positions > 0)


def _dot(spec, x, y):
  return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(spec, x, y):
  """The product of bfloat16 operands, summed in float32; so are the products of its gradients."""
  return jnp.einsum(spec, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _rounded_forward(spec, x, y):
  return _rounded(spec, x, y), (x, y)


def _rounded_backward(spec, kept, g):
  x, y = kept
  inputs, out = spec.split("->")
  left, right = inputs.split(",")
  return (_rounded(f"{out},{right}->{left}", g, y).astype(x.dtype),
          _rounded(f"{left},{out}->{right}", x, g).astype(y.dtype))


_rounded.defvjp(_rounded_forward, _rounded_backward)
