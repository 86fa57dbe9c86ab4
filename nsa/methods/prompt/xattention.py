"""XAttention (arXiv 2503.16428): for prefill, blocks by the sums of their antidiagonals.

Queries and keys are cut into groups of `stride` tokens. The score of a pair of groups is the sum of its antidiagonal,
sum_j <q[stride - 1 - j], k[j]> / (sqrt(H) * stride): every row and every column of a block is touched, at 1 / stride of
its cost. Scores are masked (groups of keys up to the group of queries) and softmaxed over all groups of keys, and the
probabilities summed over each block of queries and keys. A block of queries takes the first block, its own, and then
the best ones until they hold `threshold` of its mass (section 2.2 there).

Heads share by KV head, on the mean of the group's probabilities; the authors' heads choose alone. Sets vary in size:
`Result.measured` has what was really visible. A block of queries chooses with all its queries: see base.py.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from nsa.methods import interface
from nsa.methods.prompt import base
from pallas_kernels import masked


@dataclasses.dataclass
class XAttention(base.PromptMethod):
  """Blocks that hold a share of the mass by strided antidiagonal sums."""
  name: ClassVar[str] = "xattention"
  threshold: float = 0.9          # share of a block of queries' mass, above 0, at most 1
  stride: int = 8                 # tokens of a group; divides block_size
  block_size: int = 128           # tokens, of queries and of keys

  def check(self, model, context):
    problems = self.too_small(stride=1, block_size=1)
    if not 0 < self.threshold <= 1:
      problems.append(("threshold", self.threshold, "a share of the attention mass, above 0, at most 1"))
    if not problems and self.block_size % self.stride:
      problems.append(("stride", self.stride, f"must divide block_size = {self.block_size}"))
    return problems

  def choose(self, q, k, prompt_length, call):
    B, T, N, H = q.shape
    K, size, stride = k.shape[2], self.block_size, self.stride
    rows = -(-T // size)
    groups, each = rows * size // stride, size // stride

    def grouped(x):  # [B, T, heads, H] -> [B, groups, stride, heads, H], 0 behind the prompt
      x = jnp.where((jnp.arange(T) < prompt_length[:, None])[:, :, None, None], x.astype(jnp.float32), 0.0)
      return jnp.pad(x, ((0, 0), (0, rows * size - T), (0, 0), (0, 0))).reshape((B, groups, stride) + x.shape[2:])

    queries = grouped(q)[:, :, ::-1].reshape(B, groups, stride, K, N // K, H) * (H ** -0.5 / stride)
    mask = base.causal_blocks(prompt_length, groups, stride)

    def head(x):  # one KV head at a time: (T / stride) ** 2 scores of each of its queries
      queries, keys = x
      p = masked.softmax(masked.einsum("bipgh,bjph->bgij", queries, keys), mask).mean(1)
      return p.reshape(B, rows, each, rows, each).sum((2, 4))

    mass = jax.lax.map(head, (jnp.moveaxis(queries, 3, 0), jnp.moveaxis(grouped(k), 3, 0)))
    mass = jnp.moveaxis(mass, 0, 1)  # [B, K, rows, blocks]
    block = jnp.arange(rows)
    forced = (block == 0) | (block == block[:, None])
    # Forced ones come first in the sum, whatever their mass.
    order = jnp.argsort(-jnp.where(forced, jnp.inf, mass), axis=-1, stable=True)
    x = jnp.take_along_axis(mass, order, axis=-1)
    wanted = jnp.cumsum(x, axis=-1) - x < self.threshold * mass.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(wanted, jnp.argsort(order, axis=-1, stable=True), axis=-1) | forced
    return base.of_blocks(chosen, size, T), {}

  def selection_costs(self, model, context):
    return {"scores": interface.Cost(interface.dense_flops(model, context) / 2 / self.stride, gradient=False)}
