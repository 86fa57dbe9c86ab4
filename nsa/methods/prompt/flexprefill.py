"""FlexPrefill (arXiv 2502.20766): for prefill, sets as small as a share of the attention mass allows.

As in vertical-slash (minference.py) the prompt's last queries give every token and every distance its mass. Instead
of fixed numbers the smallest sets are kept that hold `alpha` of the mass, at least `min_budget` of each (section 3.3
there). The first `sinks` tokens and the `local` shortest distances are forced and take slots.

With `tau` above 0 heads differ (section 3.2): the block distribution that the mean of those queries gives on mean
keys is compared with their true one, and where the root of the Jensen-Shannon divergence is below `tau` the head is
"query-aware": it takes the smallest set of (block of queries, block of keys) pairs that holds `alpha` of the pooled
attention, and the sinks and local distances. The default is off, as in the authors' code; the paper has 0.1.

Choices are per KV head on means over its group, the authors' per query head. The set sizes vary from prompt to prompt
and head to head: `Result.measured` has what was really visible.
"""
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from nsa.methods.interface import Cost
from nsa.methods.prompt import base, minference
from pallas_kernels import masked


@dataclasses.dataclass
class FlexPrefill(base.PromptMethod):
  """Vertical-slash with sets that hold a share of the mass, and optionally query-aware heads."""
  name: ClassVar[str] = "flexprefill"
  alpha: float = 0.9              # share of the attention mass, above 0, at most 1
  min_budget: int = 512           # tokens, and distances, at least
  window: int = 512               # last queries of the prompt, which choose
  sinks: int = 4                  # forced first tokens
  local: int = 64                 # forced shortest distances, 0 (the query itself) included
  tau: float = 0.0                # root of the divergence below which a head is query-aware; 0 = none is
  block_size: int = 128           # tokens, of query-aware heads' blocks

  def check(self, model, context):
    problems = self.too_small(min_budget=1, window=1, sinks=0, local=1, block_size=1, tau=0)
    if not 0 < self.alpha <= 1:
      problems.append(("alpha", self.alpha, "a share of the attention mass, above 0, at most 1"))
    return problems

  def choose(self, q, k, prompt_length, call):
    T = q.shape[1]
    p, at = base.last_attention(q, k, prompt_length, self.window)
    index = jnp.arange(T)
    sinks, local = index < self.sinks, index < self.local
    mass = p.sum(2), base.by_distance(p, at)
    tokens, distances = (base.best(x, jnp.maximum(base.cover(x, self.alpha), self.min_budget), forced)
                         for x, forced in zip(mass, (sinks, local)))
    lines = minference.vertical_slash(tokens, distances)
    if not self.tau:
      return lines, {}
    aware, chosen = self._query_aware(q, k, p, prompt_length)
    pairs = base.of_blocks(chosen, self.block_size, T)
    always = minference.vertical_slash(jnp.broadcast_to(sinks, tokens.shape), jnp.broadcast_to(local, tokens.shape))
    aware = aware[:, :, None, None]
    return lambda t: jnp.where(aware, pairs(t) | always(t), lines(t)), {}

  def _query_aware(self, q, k, p, prompt_length):
    """bool[B, K], which KV heads are query-aware, and their pairs of blocks bool[B, K, rows, blocks]."""
    B, T, N, H = q.shape
    K, size = k.shape[2], self.block_size
    rows = -(-T // size)
    keys = base.block_means(k, prompt_length, size)
    real = (jnp.arange(rows) * size < prompt_length[:, None])[:, None]  # [B, 1, blocks]
    count = jnp.minimum(prompt_length, self.window)[:, None, None]
    index = jnp.arange(T)
    last = (index < prompt_length[:, None]) & (index >= prompt_length[:, None] - self.window)
    mean = jnp.where(last[:, :, None, None], q.astype(jnp.float32), 0.0).sum(1)
    mean = mean.reshape(B, K, N // K, H) / count[..., None]
    estimate = masked.softmax(masked.einsum("bkgh,bckh->bkgc", mean * H ** -0.5, keys), real[:, :, None]).mean(2)
    true = jnp.pad(p.sum(2), ((0, 0), (0, 0), (0, rows * size - T))).reshape(B, K, rows, size).sum(-1) / count
    aware = _root_divergence(estimate, true) < self.tau

    queries = base.block_means(q, prompt_length, size).reshape(B, rows, K, N // K, H)
    s = masked.einsum("brkgh,bckh->bkgrc", queries * H ** -0.5, keys)
    pooled = masked.softmax(s, base.causal_blocks(prompt_length, rows, size)[:, :, None]).mean(2)
    flat = pooled.reshape(B, K, rows * rows)
    return aware, base.best(flat, base.cover(flat, self.alpha)).reshape(pooled.shape)

  def selection_costs(self, model, context):
    out = {"scores": minference.last_queries_cost(model, context, self.window)}
    if self.tau:
      pooled = context / self.block_size
      scores = 2.0 * model.num_heads * model.head_dim * (pooled * (pooled + 1) / 2 + pooled) / context
      out["pooled_scores"] = Cost(scores, gradient=False)
    return out


def _root_divergence(a, b):
  """Square root of the Jensen-Shannon divergence (natural log) over the last axis."""
  middle = (a + b) / 2

  def against(x):
    return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1.0) / jnp.where(middle > 0, middle, 1.0)), 0.0).sum(-1)

  return jnp.sqrt(jnp.maximum((against(a) + against(b)) / 2, 0.0))
