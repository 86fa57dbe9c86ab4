"""How sparse hidden states are: measures of a vector and of a passage's vectors together, and what noise has of them.

That states are denser for what a model knows, and sparser for what is hard, is claimed by arXiv 2603.03415. A number of
this kind says nothing alone: a Gaussian vector has its value too (`gaussian`), and all measures of single vectors
depend on the basis, so each is taken again in a random one (`rotation`) and without the largest dimensions (`kept`).
"""
from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nsa import model as model_lib, sharding, step as step_lib
import pallas_kernels as pk

MEASURES = ("hoyer", "top_5", "top_10", "participation", "effective_rank")
VARIANTS = ("own", "rotated", "trimmed")  # the model's basis; a random one; its own without the largest dimensions
TRIMMED = 0.01  # share of the dimensions that count as largest
DRAWS = 8       # passages of noise that `gaussian` draws
_KEY = 20_26


def measures(x: Float[Array, "... D"]) -> Float[Array, "... M"]:
  """MEASURES of each vector, float32. With p = x^2 / sum x^2, the share of each dimension in the energy:

  hoyer           (sqrt D - |x|_1 / |x|_2) / (sqrt D - 1): 0 all dimensions alike, 1 one alone (Hoyer 2004, sec. 3.1)
  top_5, top_10   energy of the 5 and 10 % largest dimensions: .2791 and .44 of a Gaussian
  participation   1 / (D sum p^2): 1 all alike, 1 / D one alone; 1/3 of a Gaussian
  effective_rank  exp(entropy of p) / D, of the *squared* entries as in the code of arXiv 2603.03415; .482 of a Gaussian
  """
  x = x.astype(jnp.float32)
  D = x.shape[-1]
  energy = jnp.maximum(jnp.sum(x * x, -1), 1e-30)
  p = x * x / energy[..., None]
  five, ten = (max(1, round(share * D)) for share in (0.05, 0.1))
  largest = jax.lax.top_k(p, ten)[0]
  hoyer = (D ** 0.5 - jnp.sum(jnp.abs(x), -1) / jnp.sqrt(energy)) / (D ** 0.5 - 1)
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1)
  participation = 1 / (D * jnp.maximum(jnp.sum(p * p, -1), 1e-30))
  return jnp.stack([hoyer, largest[..., :five].sum(-1), largest.sum(-1), participation, jnp.exp(entropy) / D], -1)


def spectral_participation(x: Float[Array, "B T D"]) -> Float[Array, " B"]:
  """(tr C)^2 / (D tr C^2) of the vectors' covariance C: how many directions they fill, 1 = all alike.

  No basis changes it. The effective rank of order 2; that of order 1 would take all eigenvalues.
  """
  x = x.astype(jnp.float32)
  x = x - x.mean(1, keepdims=True)
  gram = jnp.einsum("btd,bte->bde", x, x, precision=jax.lax.Precision.HIGHEST)
  trace = jnp.trace(gram, axis1=1, axis2=2)
  return trace ** 2 / (x.shape[-1] * jnp.maximum(jnp.sum(gram * gram, (1, 2)), 1e-30))


@functools.lru_cache(maxsize=8)
def rotation(width: int) -> np.ndarray:
  """float32[D, D], orthogonal, one for all models of a width."""
  return np.asarray(jax.random.orthogonal(jax.random.key(_KEY), width))


@functools.lru_cache(maxsize=8)
def gaussian(tokens: int, width: int) -> dict[str, np.ndarray]:
  """What passages of [tokens, width] independent normal numbers give: "mean" and "sd" over DRAWS of them, float[M + 1].

  MEASURES are means over a passage, the last one is spectral_participation. Rotated noise is noise: this is the null of
  all VARIANTS of that width.
  """
  noise = jax.random.normal(jax.random.key(_KEY + 1), (DRAWS, tokens, width))
  found = jax.jit(lambda x: jnp.concatenate([measures(x).mean(1), spectral_participation(x)[:, None]], -1))(noise)
  return {"mean": np.mean(found, 0), "sd": np.std(found, 0, ddof=1)}


def trim(width: int) -> int:
  """How many dimensions are left out as the largest."""
  return max(1, math.ceil(TRIMMED * width))


def kept(square: np.ndarray) -> np.ndarray:
  """int32[points, D - trim(D)]: all dimensions but the largest, by their mean squares [points, D]."""
  return np.sort(np.argsort(-square, axis=-1, kind="stable")[:, trim(square.shape[-1]):], axis=-1).astype(np.int32)


def summary(x: Float[Array, "B T D"], weights: Float[Array, "B T"], turn: Float[Array, "D D"], keep: Int[Array, " R"]):
  """Of each sequence: weighted means over its vectors, "measures" [B, V, M] and "square" [B, D]; "spectral" [B, 2].

  The latter is spectral_participation of all its vectors, and with the largest dimensions left out.
  """
  x = x.astype(jnp.float32)
  left = jnp.take(x, keep, axis=-1)
  turned = jnp.einsum("btd,de->bte", x, turn, precision=jax.lax.Precision.HIGHEST)
  mean = lambda y: jnp.einsum("bt,btm->bm", weights, y, precision=jax.lax.Precision.HIGHEST)
  return {"measures": jnp.stack([mean(measures(y)) for y in (x, turned, left)], 1), "square": mean(x * x),
          "spectral": jnp.stack([spectral_participation(y) for y in (x, left)], -1)}


def make(config, mode: str, selector: str, mesh=None):
  """(params, batch, turn, keep) -> what `summary` says of every layer and of the final norm, and the loss; see below.

  batch: "inputs", "targets" int32[B, T]; "weights" float32[B, T], of a sequence's vectors, sum 1. turn: `rotation`.
  keep: int32[L + 1, D - trim(D)], of each point. To be jitted. Returns a dict of "points", as `summary` with a leading
  axis: behind each layer, and behind the final norm; "nll" and "correct" [B, T]; "entropy", "captured_mass"
  float32[L, B]: of dense attention over the tokens, nats, and its mass on the chosen blocks, NaN of a layer without;
  means over heads, and over queries by `weights`.
  """
  constrain = sharding.constrain(mesh) if mesh is not None else lambda x, axes: x

  def run(params, batch, turn, keep):
    weights = batch["weights"]

    def observe(method, q, k, block_indices, call):
      size = getattr(method, "block_size", 64)  # entropy does not depend on it
      if block_indices is not None:
        k = jnp.repeat(k, block_indices.shape[2] // k.shape[2], axis=2)
      _, lse = pk.attention(q, k, k, **call.ops)
      mass, entropy = pk.block_mass(q, k, lse, block_size=size, **call.ops)
      mean = lambda y: jnp.einsum("bt,btk->b", weights, y) / y.shape[-1]
      chosen = jnp.full(len(q), jnp.nan)
      if block_indices is not None:
        ids = jnp.where(block_indices < 0, mass.shape[-1], block_indices)  # -1 belongs to no block
        chosen = mean(jnp.take_along_axis(jnp.pad(mass, ((0, 0),) * 3 + ((0, 1),)), ids, axis=-1).sum(-1))
      return {"entropy": mean(entropy), "captured_mass": chosen}

    def states(x, layer):
      return {"point": summary(x, weights, turn, keep[layer])}

    out = model_lib.forward(config, params, batch["inputs"], mode=mode, selector=selector, key=jax.random.key(0),
                            losses=False, observe=observe, states=states, constrain=constrain)
    stacks = ({name: stack[name] for name in ("point", "entropy", "captured_mass")} for stack in out.layers)
    layers = jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)
    last = summary(out.hidden, weights, turn, keep[-1])
    points = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), layers.pop("point"), last)
    return {"points": points, "nll": step_lib.target_nll(out.logits, batch["targets"]),
            "correct": jnp.argmax(out.logits, axis=-1) == batch["targets"], **layers}

  return run
