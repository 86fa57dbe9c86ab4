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

  W_t = beta_t W' + gamma_t S' - sum_{i <= t} C[t, i] a_i d_i^T,    C = decay(1 - alpha) decay(eta) diag(theta),

with decay(x)[t, j] = x_{j+1} ... x_t. Reading a_t W_t is then two products with the carried matrices and one causal,
weighted attention over the chunk per matrix. The result equals the recurrence token by token (tests/memory_oracle.py).

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
  chunks is then a chain of factors (I - theta * Hessian), bounded by nothing. "local" takes M' as a constant of the
  inner gradients; the past is reached through the linear recurrence alone, whose factors are at most one.
All of it is float32, with full-precision products.

Measured, depth 4. (a) Forward alone: 512 tokens of 20 repeated keys, width 16, theta about 1/4: the plain MLP without
clipping is NaN between tokens 128 and 256; with clipping it stays finite, but there a plain RMS norm in place of
`bounded` let a difference of 1e-4 grow to order one. (b) 10,000 AdamW steps at 3e-3 on recall of 8 pairs in 64 tokens
(the set-up of tests/memory_test.py's program, one seed, CPU): as it is finite, loss 0.121 nats, largest gradient norm
of the memory 7.7; local finite, 0.166, 7.5; plain without clipping finite as well, 0.121, 24.
So at that length the guards cost nothing and are not yet needed; public code is known to fail at 8,000 steps and
longer sequences. Local backprop learns later (1.24 against 0.64 at step 2,000): it is no default.

Documents: a chunk belongs to the document of its first token. Where that changes, the memory begins anew, so packed
documents that begin at chunk boundaries (`data.align`, checked) equal documents on their own. A document, or padding,
that begins inside a chunk neither writes nor reads (y = 0) until the next boundary: nothing leaks.
"""
from __future__ import annotations

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from nsa import layers

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
    # Gates begin near their biases: forgetting 0.7 % per token, momentum 1/2, an eighth of the largest step.
    self.gates = init.normal("gates", (inputs, heads, 3), ("embed" if inputs == model.d_model else None, "heads", None),
                             fan_in=inputs, gain=0.1)
    self.gate_bias = init.param(jnp.broadcast_to(jnp.float32([-5.0, 0.0, -2.0]), (heads, 3)), ("heads", None))
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
    q_BRGTd = self._heads_first(unit(q))
    y = _network(lambda i, a: _dot("brgti,brio->brgto", a, weights[i]), q_BRGTd, self.options.depth, self._gain(3))
    return self._heads_last(y, q)

  def __call__(self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], gates: Gates,
               state: dict | None, *, offset=0, segment_ids=None) -> tuple[Float[Array, "B T N H"], dict]:
    """Writes and reads these tokens. q, k, v as projected; returns float32 y and the new state.

    `offset` (int, or traced int32) is the position of the first token, `segment_ids` int32[B, S] over positions.
    """
    size, (B, T) = self.options.chunk, q.shape[:2]
    if T == 1:       # decoding: a chunk of one slot, which may end a chunk of the grid
      width, phase, slots = 1, 0, 1
    else:            # shifted so that chunks of the call are chunks of the grid
      width, phase = size, offset % size
      slots = -(-(T + (phase if isinstance(phase, int) else size - 1)) // size) * size
    positions = offset - phase + jnp.arange(slots)
    valid = (jnp.arange(slots) >= phase) & (jnp.arange(slots) < phase + T)
    live, fresh = documents(segment_ids, positions, size, B)
    live, fresh = live & valid, fresh & valid

    def place(x):    # [B, T, ...] -> [B, slots, ...]
      x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, slots - T)) + ((0, 0),) * (x.ndim - 2))
      return x if isinstance(phase, int) and not phase else jnp.roll(x, phase, axis=1)

    def split(x):    # [B, slots, ...] -> [chunks, B, width, ...]
      return jnp.moveaxis(x.reshape((B, slots // width, width) + x.shape[2:]), 1, 0)

    mask = live[..., None].astype(jnp.float32)
    xs = {"q": place(unit(q)), "k": place(unit(k)), "v": place(jax.nn.silu(v)), "live": mask[..., 0],
          "keep": place(gates.log_keep) * mask, "momentum": place(gates.log_momentum) * mask,
          "step": place(gates.step) * mask}
    xs = {**jax.tree.map(split, xs), "fresh": fresh[:, ::width].T,
          "complete": (positions[width - 1::width] % size == size - 1) & valid[width - 1::width]}
    state = self.begin(B) if state is None else state
    state, y = jax.lax.scan(jax.checkpoint(self._chunk), state, xs)
    y = jnp.moveaxis(y, 0, 1).reshape((B, slots) + y.shape[3:])
    if not isinstance(phase, int) or phase:
      y = jnp.roll(y, -phase, axis=1)
    return y[:, :T].reshape(q.shape), state

  def _chunk(self, state, x):
    """One chunk: [B, width, ...] each. Returns the state after it and y [B, width, N, H]."""
    o = self.options
    first = self.weights()
    anew = lambda new, old: jnp.where(x["fresh"][:, None, None, None], new, old)
    start, now = ([anew(w, old) for w, old in zip(first, state[name])] for name in ("start", "now"))
    surprise = [anew(0.0, s) for s in state["surprise"]]

    k, v = (jnp.moveaxis(x[name], 2, 1) for name in "kv")                        # [B, R, t, d]
    if o.gradient == "document":
      base = [jnp.broadcast_to(w, s.shape) for w, s in zip(first, start)]
    else:
      base = jax.lax.stop_gradient(start) if o.backprop == "local" else start
    inputs, errors = self._gradients(base, k, v)
    squared = sum(jnp.sum(a * a, -1) * jnp.sum(d * d, -1) for a, d in zip(inputs, errors))
    step = jnp.moveaxis(x["step"], 2, 1)                                         # [B, R, t]
    if o.clip:
      limit = o.clip ** 2 * v.shape[-1]
      step = step * jnp.sqrt(limit) * jax.lax.rsqrt(jnp.maximum(squared, limit))

    keep, momentum = (jnp.cumsum(jnp.moveaxis(x[name], 2, 1), -1) for name in ("keep", "momentum"))
    # a slot without a token adds no surprise
    gained = _decays(keep) * x["live"][:, None, None, :]
    writes = _decays(momentum) * step[:, :, None, :]                             # [B, R, t, i], of S
    mixing = _dot("brtj,brji->brti", gained, writes)                             # C
    beta, gamma = jnp.exp(keep), _dot("brtj,brj->brt", gained, jnp.exp(momentum))

    q = self._heads_first(x["q"])                                                # [B, R, G, t, d]
    def moved(i, a):
      carried = beta[:, :, None, :, None] * _dot("brgti,brio->brgto", a, now[i]) \
          + gamma[:, :, None, :, None] * _dot("brgti,brio->brgto", a, surprise[i])
      shares = _dot("brgta,brja->brgtj", a, inputs[i]) * mixing[:, :, None]
      return carried - _dot("brgtj,brjo->brgto", shares, errors[i])
    linear = moved if o.read == "token" else lambda i, a: _dot("brgti,brio->brgto", a, start[i])
    y = self._heads_last(_network(linear, q, o.depth, self._gain(3)), x["q"]) * x["live"][:, :, None, None]

    def outer(i, shares):  # the last row of a mixing matrix is what stays
      return _dot("brja,brjo->brao", inputs[i] * shares[:, :, -1, :, None], errors[i])
    last = lambda c: c[:, :, -1, None, None]
    new = [last(beta) * now[i] + last(gamma) * surprise[i] - outer(i, mixing) for i in range(o.depth)]
    surprise = [last(jnp.exp(momentum)) * surprise[i] - outer(i, writes) for i in range(o.depth)]
    start = [jnp.where(x["complete"], n, s) for n, s in zip(new, start)]
    return {"start": start, "now": new, "surprise": surprise}, y

  def _gradients(self, weights, k, v):
    """Inputs a [B, R, t, I] and error signals d [B, R, t, O] of every matrix: its gradient for token i is a_i d_i^T."""
    def loss(bumps):
      inputs = []
      def linear(i, a):
        inputs.append(a)
        return _dot("brti,brio->brto", a, weights[i]) + bumps[i]
      y = _network(linear, k, self.options.depth, self._gain(2))
      return 0.5 * jnp.sum((y - v) ** 2), inputs

    errors, inputs = jax.grad(loss, has_aux=True)([jnp.zeros(k.shape[:3] + w.shape[-1:]) for w in weights])
    return inputs, errors

  def _gain(self, inner: int):
    """The gain, to go with [B, R, ..., d] of that many dimensions behind R; None without norm."""
    if not self.options.norm:
      return None
    gain = self.gain[...]
    return gain.reshape((gain.shape[0],) + (1,) * (inner - 1) + gain.shape[1:])

  def _heads_first(self, q_BTNH):
    B, T, N, H = q_BTNH.shape
    heads = self.gate_bias.shape[0]
    return jnp.moveaxis(q_BTNH.reshape(B, T, heads, N // heads, H), 1, 3)

  def _heads_last(self, y_BRGTd, like):
    return jnp.moveaxis(y_BRGTd, 3, 1).reshape(like.shape)


def unit(x):
  """SiLU, then unit norm (section 4.4), float32."""
  x = jax.nn.silu(x.astype(jnp.float32))
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _EPS)


def bounded(z):
  """z / sqrt(1 + mean(z^2)): an RMS norm that leaves small vectors small, lest it blows up what is left of a memory
  that was forgotten. Its RMS stays below 1 and no difference grows."""
  return z * jax.lax.rsqrt(1 + jnp.mean(z * z, -1, keepdims=True))


def _network(linear, x, depth, gain):
  """The memory's MLP; `linear(i, a)` is the product with its i-th matrix."""
  a = x
  for i in range(depth):
    z = linear(i, a)
    if gain is not None:
      z = bounded(z)
    a = jax.nn.silu(z) / np.sqrt(z.shape[-1])
  return z if gain is None else x + gain * z


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
