"""Titans' memory token by token in float64 NumPy, written from the paper's recurrence (arXiv 2501.00663, eqs. 9 to 15).

Shares no code with `nsa`: gradients of the inner loss are back-propagated by hand, weights exist for every token, and
documents are run one after the other. All arrays lead with [B, R]: batch and memory heads.
"""
import numpy as np

EPS = 1e-6


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def unit(x):
  x = silu(x)
  return x / np.sqrt((x * x).sum(-1, keepdims=True) + EPS)


def forward(weights, x, gain):
  """M(x) for x [B, R, d], and what the backward pass needs: inputs, pre-norm and post-norm outputs of every matrix."""
  a, inputs, raw, normed = x, [], [], []
  for w in weights:
    inputs.append(a)
    z = np.einsum("bri,brio->bro", a, w)
    raw.append(z)
    if gain is not None:
      z = z / np.sqrt(1 + (z * z).mean(-1, keepdims=True))
    normed.append(z)
    a = silu(z) / np.sqrt(z.shape[-1])
  return (z if gain is None else x + gain * z), inputs, raw, normed


def gradients(weights, k, v, gain):
  """d/dW of |M(k) - v|^2 / 2, every matrix."""
  y, inputs, raw, normed = forward(weights, k, gain)
  g, out = (y - v) * (1.0 if gain is None else gain), [None] * len(weights)  # with respect to the last normed output
  for i in reversed(range(len(weights))):
    if gain is not None:
      n = raw[i].shape[-1]
      scale = np.sqrt(1 + (raw[i] ** 2).mean(-1, keepdims=True))
      g = g / scale - raw[i] * (g * raw[i]).sum(-1, keepdims=True) / (n * scale ** 3)
    out[i] = np.einsum("bri,bro->brio", inputs[i], g)
    if i:
      z = normed[i - 1]
      slope = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
      g = np.einsum("bro,brio->bri", g, weights[i]) * slope / np.sqrt(z.shape[-1])
  return out


def run(p, q, k, v, alpha, eta, theta, options, segments=None, record=None, fixed=None):
  """y [B, T, R, G, d] for q [B, T, R, G, d], k and v [B, T, R, d] as projected, gates [B, T, R].

  `record`: a list that takes the weights that every token's gradient was taken at; `fixed`: such a list, to take them
  at.
  p: {"initial": [w [R, I, O], ...], "gain": [R, d] or None}. theta is the step itself, its bound included.
  """
  B, T = k.shape[:2]
  first = [np.broadcast_to(w, (B,) + w.shape).copy() for w in p["initial"]]
  gain, limit = p["gain"], options.clip * np.sqrt(k.shape[-1])
  now, start, surprise = first, first, [np.zeros_like(w) for w in first]
  q, k, v, y = unit(q), unit(k), silu(v), np.zeros(q.shape)
  segments = np.zeros((B, T), int) if segments is None else segments
  assert (segments == segments[:1]).all()  # one layout for the whole batch
  owner = None
  for t in range(T):
    if t % options.chunk == 0:
      if owner is not None and segments[0, t] != owner:
        now, surprise = first, [np.zeros_like(w) for w in first]
      owner, start = segments[0, t], now
    if segments[0, t] != owner:  # began inside a chunk: not remembered until the next one
      continue
    base = start if options.gradient == "chunk" else first
    if record is not None:
      record.append(base)
    if fixed is not None:
      base, *fixed = fixed
    g = gradients(base, k[:, t], v[:, t], gain)
    if options.clip:
      norm = np.sqrt(sum((x ** 2).sum((-1, -2), keepdims=True) for x in g))
      g = [x * np.minimum(1.0, limit / np.maximum(norm, 1e-300)) for x in g]
    at = lambda gate: gate[:, t, :, None, None]
    surprise = [at(eta) * s - at(theta) * x for s, x in zip(surprise, g)]
    now = [(1 - at(alpha)) * m + s for m, s in zip(now, surprise)]
    for j in range(q.shape[3]):
      y[:, t, :, j] = forward(now if options.read == "token" else start, q[:, t, :, j], gain)[0]
  return y
