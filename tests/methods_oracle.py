"""Slow references of the attention layers of nsa/methods, written from the papers' formulas.

They share no code with `nsa` or `pallas_kernels`: selections are chosen one query at a time in float64 NumPy,
attention is dense and masked. `layer` takes the array module, so that the same formulas give values in NumPy
and gradients in JAX. Masks are bool[B, T, K, S].
"""
import jax
import jax.numpy as jnp
import numpy as np


def as_float64(tree):
  return {k: as_float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


# --- the parts of a layer -------------------------------------------------------


def rms_norm(xp, x, gain):
  return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def rope(xp, x, positions, theta=10_000.0):
  """Rotates the pairs (x[i], x[i + H/2]) by position * theta ** (-2 i / H)."""
  half = x.shape[-1] // 2
  angle = np.asarray(positions)[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
  a, b = x[..., :half], x[..., half:]
  return xp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def project(xp, p, h):
  """[B, T, D] -> [B, T, heads, H]: matrix, causal depthwise convolution, norm."""
  y = xp.einsum("btd,dnh->btnh", h, p["weight"])
  if "taps" in p:
    past = [xp.concatenate([xp.zeros_like(y[:, :w]), y[:, :y.shape[1] - w]], 1) for w in range(len(p["taps"]))]
    y = sum(tap * x for tap, x in zip(p["taps"], past))
  return rms_norm(xp, y, p["norm"]) if "norm" in p else y


def attend(xp, q, k, v, mask, bias=0.0):
  """Masked softmax attention, `bias` [B, T, K, 1, S] added to its logits: o [B, T, N, H] and probabilities
  [B, T, K, G, S]; 0 where nothing is seen."""
  B, T, N, H = q.shape
  K = k.shape[2]
  s = xp.einsum("btkgh,bskh->btkgs", q.reshape(B, T, K, N // K, H), k) / np.sqrt(H) + bias
  mask = mask[:, :, :, None]
  s = xp.where(mask, s, -1e30)
  e = xp.where(mask, xp.exp(s - s.max(-1, keepdims=True)), 0.0)
  p = e / xp.where(mask.any(-1, keepdims=True), e.sum(-1, keepdims=True), 1.0)
  return xp.einsum("btkgs,bskh->btkgh", p, v).reshape(B, T, N, H), p


def compress(xp, p, x, length, stride):
  """NSA eq. 7: tokens [c * stride, c * stride + length) of each head -> one vector, c = 0, 1, ..."""
  out = []
  for first in range(0, x.shape[1] - length + 1, stride):
    tokens = x[:, first:first + length] + p["position"][None, :, None]
    flat = tokens.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
    inner = xp.einsum("bki,kih->bkh", flat, p["inner"])
    inner = inner / (1 + xp.exp(-inner))
    out.append(xp.einsum("bkh,kho->bko", inner, p["outer"]))
  return xp.stack(out, 1)


# --- masks and selections ---------------------------------------------------------


def assert_gradients(got, want):
  """Those of a layer are the reference's, to float32 and to the largest of each parameter."""
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1.0, np.abs(b).max()))
  jax.tree.map(close, got, want)


def causal_mask(B, T, K, segments=None):
  """Every earlier token, of the query's own document alone where `segments` int[B, T] tells them apart."""
  same = True if segments is None else (segments[:, :, None] == segments[:, None])[:, :, None]
  return np.broadcast_to(np.tril(np.ones((T, T), bool))[None, :, None] & same, (B, T, K, T))


def window_mask(B, T, K, window):
  t, s = np.arange(T)[:, None], np.arange(T)[None]
  return np.broadcast_to(((s <= t) & (t - s < window))[None, :, None], (B, T, K, T))


def compressed_mask(B, T, K, C, length, stride):
  last = np.arange(C) * stride + length - 1
  return np.broadcast_to((last[None] <= np.arange(T)[:, None])[None, :, None], (B, T, K, C))


def token_mask(block_indices, block_size, segments=None):
  """Of causal_mask the tokens of the listed blocks."""
  B, T, K, _ = block_indices.shape
  out = np.zeros((B, T, K, T), bool)
  for b, t, r in np.ndindex(B, T, K):
    for j in block_indices[b, t, r]:
      if j >= 0:
        out[b, t, r, j * block_size:(j + 1) * block_size] = True
  return out & causal_mask(B, T, K, segments)


def assert_chosen(listed, visible, forced, value, budget, tie=1e-5):
  """That a list (-1 pads) has the forced blocks and the visible ones of the largest `value`, `budget` in all; what ties
  to rounding may be swapped. Gives the list's set."""
  listed = [j for j in listed if j >= 0]
  rest = sorted(set(visible) - forced, key=lambda j: (-value[j], j))
  got, want = set(listed), forced | set(rest[:budget - len(forced)])
  assert len(got) == len(listed) == len(want) and forced <= got <= set(visible)
  assert got == want or np.ptp([value[j] for j in got ^ want]) < tie, (got, want)
  return got


def block_scores(name, p, h, options):
  """float64[B, T, K, blocks], what each method ranks blocks by; None for the random method."""
  p, h = as_float64(p), np.asarray(h, np.float64)
  B, T, _ = h.shape
  q, k = (rope(np, project(np, p[x], h), np.arange(T)) for x in "qk")
  K, size = k.shape[2], options.block_size
  G, blocks = q.shape[2] // K, -(-T // size)
  out = np.full((B, T, K, blocks), -np.inf)
  if name in ("msa", "gated"):
    index = p["method"]["selector"]
    q_idx, k_idx = (rope(np, project(np, index[x], h), np.arange(T)) for x in "qk")
  if name == "oracle":
    mass = attend(np, q, k, k, causal_mask(B, T, K))[1].mean(3)
  if name == "nsa":
    p_cmp = _nsa_compressed(np, p["method"]["branch"], h, q, options)[1].sum(3)  # over the group
    # Eq. 9: each compressed block gives its score once per stride that it shares with the selection block.
    strides = lambda first, length: set(range(first // options.compress_stride,
                                              (first + length) // options.compress_stride))
    share = np.array([[len(strides(c * options.compress_stride, options.compress_len) & strides(j * size, size))
                       for j in range(blocks)] for c in range(p_cmp.shape[-1])])
  for b, t, r in np.ndindex(B, T, K):
    for j in range(t // size + 1):
      tokens = range(j * size, min((j + 1) * size, t + 1))
      if name in ("msa", "gated"):
        out[b, t, r, j] = max(q_idx[b, t, r] @ k_idx[b, s, 0] for s in tokens)
      elif name == "block_topk":
        mean = k[b, j * size:(j + 1) * size, r].mean(0)
        out[b, t, r, j] = sum(q[b, t, r * G + g] @ mean for g in range(G))
      elif name == "quest":  # the bound of every query of the group, coordinate by coordinate
        page = k[b, j * size:(j + 1) * size, r]
        out[b, t, r, j] = sum(max(x * low, x * high) for g in range(G)
                              for x, low, high in zip(q[b, t, r * G + g], page.min(0), page.max(0)))
      elif name == "oracle":
        out[b, t, r, j] = mass[b, t, r, list(tokens)].sum()
      elif name == "nsa":
        out[b, t, r, j] = p_cmp[b, t, r] @ share[:, j]
      elif name == "sink_window":
        out[b, t, r, j] = j
  return None if name == "random" else out


# --- whole layers -----------------------------------------------------------------


def _nsa_compressed(xp, branch, h, q, options):
  length, stride = options.compress_len, options.compress_stride
  k, v = (compress(xp, branch[f"compress_{x}"], project(xp, branch[f"{x}_cmp"], h), length, stride) for x in "kv")
  k = rms_norm(xp, k, branch["k_cmp_norm"])
  k = rope(xp, k, np.arange(k.shape[1]) * stride)
  B, T = h.shape[:2]
  return attend(xp, q, k, v, compressed_mask(B, T, k.shape[2], k.shape[1], length, stride))


def layer(xp, name, p, h, options, mask, stop=lambda x: x):
  """(output [B, T, D], index KL or 0). `mask` is of the selected tokens; `stop` stops gradients."""
  B, T, _ = h.shape
  positions = np.arange(T)
  q, k = (rope(xp, project(xp, p[x], h), positions) for x in "qk")
  kl, bias = 0.0, 0.0
  if name in ("msa", "gated"):
    index = p["method"]["selector"]
    q_idx, k_idx = (rope(xp, project(xp, index[x], stop(h)), positions) for x in "qk")
    s = xp.einsum("btkh,bsh->btks", q_idx, k_idx[:, :, 0]) / np.sqrt(q_idx.shape[-1])
  if name == "gated":
    bias = (s * p["method"]["gain"][None, None, :, None])[:, :, :, None]
  o, prob = attend(xp, q, k, project(xp, p["v"], h), mask, bias)
  if name == "msa":
    s = xp.where(mask, s, -1e30)
    top = s.max(-1, keepdims=True)
    log_student = s - top - xp.log(xp.where(mask, xp.exp(s - top), 0.0).sum(-1, keepdims=True))
    teacher = stop(prob.mean(3))  # probabilities, not logits, averaged over the group
    log_teacher = xp.log(xp.where(teacher > 0, teacher, 1.0))
    kl = xp.where(mask, teacher * (log_teacher - log_student), 0.0).sum(-1).mean()
  if name == "nsa":
    branch = p["method"]["branch"]
    o_cmp, _ = _nsa_compressed(xp, branch, h, q, options)
    k_win = rope(xp, project(xp, branch["k_win"], h), positions)
    o_win, _ = attend(xp, q, k_win, project(xp, branch["v_win"], h), window_mask(B, T, k.shape[2], options.window))
    gate = 1 / (1 + xp.exp(-(xp.einsum("btd,dng->btng", h, branch["gate"]) + branch["gate_bias"])))
    o = gate[..., 0:1] * o_cmp + gate[..., 1:2] * o + gate[..., 2:3] * o_win
  return xp.einsum("btnh,nhd->btd", o, p["out"]), kl


def gradients(name, options=None):
  """jit: (params, h, mask, weights) -> gradients of <output, weights> + index KL, by the parameters and by h."""
  def objective(params, h, mask, weights):
    out, kl = layer(jnp, name, params, h, options, mask, jax.lax.stop_gradient)
    return jnp.sum(out * weights) + kl

  return jax.jit(jax.grad(objective, argnums=(0, 1)))
