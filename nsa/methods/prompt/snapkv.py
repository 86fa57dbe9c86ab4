"""SnapKV (arXiv 2404.14469): at the end of the prompt most of its keys and values are evicted, once and for all.

The attention of the prompt's last `window` queries, summed over them and averaged over the group's heads, is smoothed
along the tokens (mean over `kernel` neighbours, zeros outside the prompt). Each KV head keeps `capacity` tokens: the
first `prefix`, the last `local`, and the best of the rest. The prompt itself is read densely, and so is the first
answer token predicted; every later one sees the kept tokens and all tokens since the prompt's end.

The paper has a window of 16 to 64, maximum pooling over 5 to 13, and its window for local tokens; the numbers and the
mean here are those of the Sparse Frontier study (arXiv 2504.17768).
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from nsa.methods.prompt import base, minference


@dataclasses.dataclass
class SnapKV(base.PromptMethod):
  """Eviction by the attention of the prompt's last queries; `reads` says what it saves, FLOPs of the prompt do not."""
  name: ClassVar[str] = "snapkv"
  phase: ClassVar[str] = "decode"
  capacity: int = 1024            # tokens of the prompt that a KV head keeps, prefix and local ones included
  window: int = 256               # last queries of the prompt, which choose
  kernel: int = 21                # tokens over which scores are averaged, an odd number
  local: int = 128                # last tokens of the prompt, kept in any case
  prefix: int = 4                 # first tokens, kept in any case

  def check(self, model, context):
    problems = self.too_small(capacity=1, window=1, kernel=1, local=0, prefix=0)
    if self.kernel % 2 == 0:
      problems.append(("kernel", self.kernel, "an odd number: it lies around its token"))
    if self.local + self.prefix > self.capacity:
      problems.append(("capacity", self.capacity, f"at least local + prefix = {self.local + self.prefix}"))
    return problems

  def choose(self, q, k, prompt_length, call):
    p, _ = base.last_attention(q, k, prompt_length, self.window)
    T = q.shape[1]
    half = self.kernel // 2
    smooth = jax.lax.reduce_window(p.sum(2), 0.0, jax.lax.add, (1, 1, self.kernel), (1, 1, 1),
                                   [(0, 0), (0, 0), (half, half)])
    index, end = jnp.arange(T), prompt_length[:, None, None]
    inside = index < end
    forced = inside & ((index < self.prefix) | (index >= end - self.local))
    keep = base.best(jnp.where(inside, smooth, -jnp.inf), self.capacity, forced) & inside
    ranked = jnp.argsort(~keep, axis=-1, stable=True)[..., :self.capacity].astype(jnp.int32)  # the kept ones, in order
    kept = jnp.where(jnp.take_along_axis(keep, ranked, axis=-1), ranked, -1)
    kept = jnp.pad(kept, ((0, 0), (0, 0), (0, self.capacity - kept.shape[-1])), constant_values=-1)
    return self.recall({"kept": kept}, prompt_length, T), {"kept": kept}

  def state(self, batch, kv_heads):
    return {"kept": jnp.full((batch, kv_heads, self.capacity), -1, jnp.int32)}

  def recall(self, state, prompt_length, keys):
    kept = jnp.where(state["kept"] < 0, keys, state["kept"])  # out of bounds: dropped
    B, K, _ = kept.shape
    sequence, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    keep = jnp.zeros((B, K, keys), bool).at[sequence, head, kept].set(True, mode="drop")
    mask = (keep | (jnp.arange(keys) >= prompt_length[:, None, None]))[:, :, None]
    return lambda t: jnp.broadcast_to(mask, (B, K, t.shape[0], keys))

  def selection_costs(self, model, context):
    return {"scores": minference.last_queries_cost(model, context, self.window)}

  def budget(self, context):
    return self.capacity

  def reads(self, model, context):
    return {"kept": self.tokens_visible(context)}
