"""MInference (arXiv 2407.02490): two of its static patterns for prefill, each filled in anew for every prompt.

*Block-sparse* (`minference_blocks`): the mean query of a block against the mean key of each block, J best blocks per
block of queries. The first block and the latest are forced and take slots of J; the paper's code needs the first one.

*Vertical-slash* (`vertical_slash`): the last `window` queries' attention, summed over these queries for every token
(vertical) and for every distance (slash), keeps the best tokens for all queries and the best distances. A query sees
the kept tokens before it and the tokens at the kept distances. The first `sinks` tokens and the last `local`
distances are forced and take slots. The paper's kernel widens each slash to blocks of 64; here sets are exact.

Which pattern a head has is found offline in the paper; here every head runs the one that the run mode names.
Both choose with queries that lie behind those they choose for: see base.py for what that means for scores.
"""
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from nsa.methods import blocks
from nsa.methods.interface import Cost
from nsa.methods.prompt import base
import pallas_kernels as pk
from pallas_kernels import masked


@dataclasses.dataclass
class MInferenceBlocks(base.PromptMethod):
  """Mean-pooled queries against mean-pooled keys; the set of a block of queries holds for each of them."""
  name: ClassVar[str] = "minference_blocks"
  block_size: int = 64            # tokens, of queries and of keys
  num_blocks: int = 64            # J, forced blocks included
  num_initial: int = 1            # forced first blocks
  num_local: int = 1              # forced last blocks, the queries' own included

  def check(self, model, context):
    return blocks.BlockMethod.check(self, model, context)

  def choose(self, q, k, prompt_length, call):
    B, T, N, H = q.shape
    K = k.shape[2]
    rows = -(-T // self.block_size)
    queries = base.block_means(q, prompt_length, self.block_size).reshape(B, rows, K, N // K, H).sum(3)
    keys = base.block_means(k, prompt_length, self.block_size)
    scores = masked.einsum("brkh,bckh->brkc", queries, keys)
    # A block of queries is a query of this operation, a block of keys one token.
    indices = pk.block_top_k(scores, block_size=1, num_blocks=self.num_blocks, num_initial=self.num_initial,
                             num_local=self.num_local, implementation=call.implementation)
    chosen = masked.membership(indices, rows).transpose(0, 2, 1, 3)
    return base.of_blocks(chosen, self.block_size, T), {}

  def selection_costs(self, model, context):
    pooled = context / self.block_size
    return {"scores": Cost(model.num_kv_heads * model.head_dim * (pooled + 1) / self.block_size, gradient=False)}

  def budget(self, context):
    return self.num_blocks * self.block_size


@dataclasses.dataclass
class VerticalSlash(base.PromptMethod):
  """The best tokens and the best distances, by the attention of the prompt's last queries."""
  name: ClassVar[str] = "vertical_slash"
  verticals: int = 512            # tokens that all queries see, the sinks included
  slashes: int = 512              # distances that all queries look back, the local ones included
  window: int = 64                # last queries of the prompt, which choose
  sinks: int = 4                  # forced first tokens
  local: int = 64                 # forced shortest distances, 0 (the query itself) included

  def check(self, model, context):
    problems = self.too_small(verticals=0, slashes=1, window=1, sinks=0, local=1)
    if self.sinks > self.verticals:
      problems.append(("verticals", self.verticals, f"forced ones take slots: at least sinks = {self.sinks}"))
    if self.local > self.slashes:
      problems.append(("slashes", self.slashes, f"forced ones take slots: at least local = {self.local}"))
    return problems

  def choose(self, q, k, prompt_length, call):
    p, at = base.last_attention(q, k, prompt_length, self.window)
    index = jnp.arange(q.shape[1])
    tokens = base.best(p.sum(2), self.verticals, index < self.sinks)
    distances = base.best(base.by_distance(p, at), self.slashes, index < self.local)
    return vertical_slash(tokens, distances), {}

  def selection_costs(self, model, context):
    return {"scores": last_queries_cost(model, context, self.window)}

  def budget(self, context):
    return self.verticals + self.slashes


def vertical_slash(tokens, distances) -> base.Visible:
  """bool[B, K, T] each, of tokens and of distances, as a mask."""
  T = tokens.shape[-1]

  def visible(t):
    back = t[:, None] - jnp.arange(T)
    slash = distances[:, :, jnp.clip(back, 0, T - 1)] & (back >= 0)
    return tokens[:, :, None] | slash

  return visible


def last_queries_cost(model, context: int, window: int) -> Cost:
  """Q K^T of the last `window` queries of a prompt, per token of the prompt."""
  rows = min(window, context)
  return Cost(2.0 * model.num_heads * model.head_dim * rows * (context - (rows - 1) / 2) / context, gradient=False)
