"""What a model looks at in one sequence: dense attention, chosen blocks, loss; for a person to look at.

For short sequences: it holds attention by block, [T, K, blocks], of all layers. What studies measure are the
means of nsa.methods.blocks.diagnostics, which never hold that for more than one layer.
"""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nsa import evaluate, model as model_lib
from nsa.methods import blocks
import pallas_kernels as pk
from pallas_kernels import masked


@dataclasses.dataclass(frozen=True)
class LayerView:
  """One layer and one sequence.

  Attributes:
    q: float32[T, N, H], after norm and RoPE.
    k: float32[T, K, H].
    mass: float32[T, K, blocks], where dense attention on these q and k would put its mass, heads averaged.
    chosen: bool[T, K, blocks], the visible blocks that were attended to; None in a dense run.
  """
  q: np.ndarray
  k: np.ndarray
  mass: np.ndarray
  chosen: np.ndarray | None

  def attention(self, query: int, kv_head: int) -> np.ndarray:
    """float32[query + 1]: dense attention of a query over the tokens, a mean over the group's heads."""
    T, N, H = self.q.shape
    group = N // self.k.shape[1]
    q = self.q[query, kv_head * group:(kv_head + 1) * group]
    scores = q @ self.k[:query + 1, kv_head].T * H ** -0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class View:
  """One sequence in one run mode.

  Attributes:
    tokens: int32[T].
    targets: int32[T], what each position should predict.
    nll: float32[T], nats.
    correct: bool[T], whether the best guess was right.
    block_size: tokens.
    layers: one LayerView per layer.
  """
  tokens: np.ndarray
  targets: np.ndarray
  nll: np.ndarray
  correct: np.ndarray
  block_size: int
  layers: list[LayerView]


def look(config, params, tokens, targets, run_mode: str = "sparse") -> View:
  """Runs one sequence and keeps what its attention did.

  Args:
    config: of the run.
    params: of one seed (no leading axis of seeds).
    tokens, targets: int[T].
    run_mode: as in `EvalConfig.run_modes`. A dense run needs a method with blocks too, for the size of a block.

  Raises ValueError if the model has no such run mode, or no blocks.
  """
  way = evaluate.how(config, run_mode)
  if way is None:
    raise ValueError(f"run_mode = {run_mode!r}: {config.arm} has no such mode; a dense model needs eval.blocks")
  method = way.config.attention
  if not isinstance(method, blocks.BlockMethod):
    raise ValueError(f"run_mode = {run_mode!r}: {method.name} has no blocks to look at")
  size = method.block_size
  run = _runner(model_lib.Static((model_lib.architecture(way.config), way.mode, way.selector, size)))
  tokens, targets = np.asarray(tokens, np.int32), np.asarray(targets, np.int32)
  nll, correct, layers = jax.device_get(run(params, tokens[None], targets[None]))
  views = [LayerView(x["q"][0], x["k"][0], x["mass"][0], x["chosen"][0] if "chosen" in x else None) for x in layers]
  return View(tokens, targets, nll[0], correct[0], size, views)


@functools.lru_cache(maxsize=16)
def _runner(static):
  config, mode, selector, size = static.value

  def observe(method, q, k, block_indices, call):
    _, lse = pk.attention(q, k, k, **call.ops)
    mass, _ = pk.block_mass(q, k, lse, block_size=size, **call.ops)
    seen = {"q": q.astype(jnp.float32), "k": k.astype(jnp.float32), "mass": mass}
    if block_indices is not None:
      visible = blocks.visible_blocks(call, q.shape[0], q.shape[1], k.shape[1], size)
      seen["chosen"] = masked.membership(block_indices, mass.shape[-1]) & visible[:, :, None]
    return seen

  @jax.jit
  def run(params, tokens, targets):
    out = model_lib.forward(config, params, tokens, mode=mode, selector=selector, key=jax.random.key(0), losses=False,
                            observe=observe)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(out.logits), targets[..., None], axis=-1)[..., 0]
    layers = [{name: x[i] for name, x in stack.items()} for stack in out.layers for i in range(len(stack["q"]))]
    return nll, jnp.argmax(out.logits, axis=-1) == targets, layers

  return run
