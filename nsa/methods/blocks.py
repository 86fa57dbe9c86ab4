"""What all block methods share: geometry and its constraints, the layer, and diagnostics.

Semantics (the same in every kernel): the block grid is anchored at absolute position 0; a
query sees the blocks up to its own; forced blocks take slots of J; -1 pads; one set per
(query, KV head).
"""
import dataclasses
from typing import Any, ClassVar

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nsa.methods import interface, registry
from nsa.methods.interface import Cost
import pallas_kernels as pk
from pallas_kernels import masked


@dataclasses.dataclass
class BlockMethod(interface.Method):
  """Options of every method that attends to J blocks per query and KV head."""
  grid: ClassVar[str] = "block_size"
  block_size: int = 64            # tokens
  num_blocks: int = 16            # J, forced blocks included
  num_initial: int = 0            # forced first blocks (attention sink)
  num_local: int = 1              # forced last blocks, the query's own included

  @property
  def geometry(self) -> dict:
    """The arguments of the top-k operations."""
    return dict(block_size=self.block_size, num_blocks=self.num_blocks, num_initial=self.num_initial,
                num_local=self.num_local)

  def check(self, model, context):
    problems = self.too_small(block_size=1, num_blocks=1, num_initial=0)
    if self.block_size > context:
      problems.append(("block_size", self.block_size, f"longer than the context of {context} tokens"))
    if self.num_local < 1:
      problems.append(("num_local", self.num_local, "at least 1: a query must see its own block"))
    if self.num_initial + self.num_local > self.num_blocks:
      problems.append(("num_blocks", self.num_blocks,
                       f"forced blocks take slots of J: at least num_initial + num_local = "
                       f"{self.num_initial + self.num_local}"))
    return problems

  def chosen(self, model, context):
    return model.num_kv_heads * self.num_blocks

  def costs(self, model, context, mode):
    if mode != "sparse":
      return super().costs(model, context, mode)
    return {"selected": Cost(selected_flops(self, model, context), kind="selected"),
            **self.selection_costs(model, context)}

  def selection_costs(self, model, context: int) -> dict[str, Cost]:
    """Of choosing the blocks, in sparse mode; a warm-up's scores belong to its loss."""
    return {}

  def choose(self, q, k, call: interface.Call) -> Int[Array, "B T K J"]:
    """The blocks that a control takes in a selector's place (training_free.py); a learned selector cannot be one."""
    raise ValueError(f"selector = {self.name!r}: it has parameters of its own; known controls are those of "
                     "methods/training_free.py and registered ones like them")

  def reads(self, model, context):
    return {"selected": self.tokens_visible(context)}

  def tokens_visible(self, context):
    return float(min(self.num_blocks * self.block_size, context))


class BlockLayer(interface.Layer):
  """Attention to chosen blocks: dense, warm-up, by the layer's own choice or a control's, all in one place.

  What a method adds: `select`, and where it has them `index`, `losses` and another `attend`.
  """

  def __init__(self, options: BlockMethod):
    self.options = options

  @property
  def unit(self) -> int:
    """Tokens that an entry of the layer's own lists stands for; 0: `select` gives no lists but sets of tokens."""
    return self.options.block_size

  def index(self, x, streams, call) -> Any:
    """What both the choice and the losses are computed of."""
    return None

  def select(self, index, x, streams, call) -> Int[Array, "B T R J"] | None:
    """The layer's own choice, -1 padded, no gradient: R sets per query, 1, K or N."""
    return None

  def losses(self, index, x, streams, lse, lists, call) -> dict[str, Float[Array, ""]]:
    """Auxiliary losses; `lists` None in warm-up, whose `lse` is that of dense attention."""
    return {}

  def choose(self, index, x, streams, call) -> tuple[Int[Array, "B T R J"], int]:
    """The chosen lists and the tokens of an entry: the layer's own, or those of the control that `call.selector`
    names."""
    if call.selector == "own":
      lists = self.select(index, x, streams, call)
      if lists is None:
        raise NotImplementedError(f"{type(self).__name__}.select: has to return the chosen blocks, int32[B, T, R, J]")
      return checkpoint_name(lists, interface.CHOSEN), self.unit
    control = registry.get(call.selector)
    if not issubclass(control, BlockMethod):
      raise ValueError(f"selector = {call.selector!r}: it chooses no blocks")
    call = dataclasses.replace(call, pooled=None)  # those of the layer's own choice
    return control(**self.options.geometry).choose(x.q, streams["k"], call), self.options.block_size

  def attend(self, index, x, streams, lists, size, call):
    """(o, lse) over the chosen lists. Where each query head has a set of its own, keys and values are repeated; for one
    token of a cache the first heads of all groups attend, then the second ones, and so on."""
    q, k, v = x.q, streams["k"], streams["v"]
    group = lists.shape[2] // k.shape[2]
    if group > 1 and q.shape[1] == 1:
      parts = [pk.selected_attention(q[:, :, g::group], k, v, lists[:, :, g::group], block_size=size, **call.ops)
               for g in range(group)]
      return tuple(jnp.stack(part, 3).reshape(q.shape[:3] + part[0].shape[3:]) for part in zip(*parts))
    if group > 1:
      k, v = (jnp.repeat(y, group, axis=2) for y in (k, v))
    return pk.selected_attention(q, k, v, per_head(lists, k), block_size=size, **call.ops)

  def __call__(self, x, streams, call):
    if call.mode == "dense":
      return super().__call__(x, streams, call)
    index = self.index(x, streams, call)
    if call.mode == "warmup":
      lists, size = None, 0
      o, lse = pk.attention(x.q, streams["k"], streams["v"], **call.ops)
    else:
      lists, size = self.choose(index, x, streams, call)
      o, lse = self.attend(index, x, streams, lists, size, call)
    losses = self.losses(index, x, streams, lse, lists, call) if call.losses else {}
    if lists is None or size != self.options.block_size:  # lists of tokens would be misread as lists of blocks
      return interface.Result(o, losses)
    return interface.Result(o, losses, per_head(lists, streams["k"]))


def per_head(lists: Int[Array, "B T R J"], k) -> Int[Array, "B T K J"]:
  """One set for all KV heads as one set for each; others as they are."""
  return jnp.broadcast_to(lists, lists.shape[:2] + (max(lists.shape[2], k.shape[2]),) + lists.shape[3:])


def mean_visible(limit: int, context: int) -> float:
  """Mean over the queries 0 .. context - 1 of min(tokens up to the query, limit)."""
  ramp = min(limit, context)
  return (ramp * (ramp + 1) / 2 + (context - ramp) * limit) / context


def selected_flops(options: BlockMethod, model, context: int) -> float:
  """Q K^T and P V over the chosen tokens: 4 * N * H * J * block, with the ramp of the first queries."""
  return 4.0 * model.num_heads * model.head_dim * mean_visible(options.num_blocks * options.block_size, context)


def visible_blocks(call: interface.Call, batch: int, queries: int, keys: int, block_size: int):
  """bool[B or 1, T, blocks]: does the block hold a token that the query may attend to?"""
  return visible_tokens(call, batch, queries, keys, block_size) > 0


def visible_tokens(call: interface.Call, batch: int, queries: int, keys: int, block_size: int):
  """int32[B or 1, T, blocks]: how many tokens of the block the query may attend to."""
  blocks = -(-keys // block_size)
  position = call.offset + jnp.arange(queries)
  if call.segment_ids is None:
    return jnp.clip(position[None, :, None] + 1 - jnp.arange(blocks) * block_size, 0, block_size)
  padded = jnp.pad(call.segment_ids, ((0, 0), (0, blocks * block_size - keys)), constant_values=-1)
  mine = call.query_segments(queries)[:, :, None]
  grid = padded.reshape(batch, 1, blocks, block_size)
  token = (jnp.arange(blocks * block_size).reshape(blocks, block_size)[None, None] <= position[None, :, None, None])
  return jnp.sum((grid == mine[..., None]) & token, axis=-1)


def mean_keys(k: Float[Array, "B S K H"], block_size: int, segment_ids=None) -> Float[Array, "B blocks K H"]:
  """float32 mean key of each block.

  With segments over the tokens of the segment that the block's last token is in: a query that sees the block and
  comes after it is of that segment. A last block that the sequence does not fill is padded with zeros; those that
  see it lie in it.
  """
  B, S, K, H = k.shape
  count = -(-S // block_size)
  extra = count * block_size - S
  k = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, extra), (0, 0), (0, 0))).reshape(B, count, block_size, K, H)
  if segment_ids is None:
    return k.mean(2)
  ids = jnp.pad(segment_ids, ((0, 0), (0, extra)), mode="edge").reshape(B, count, block_size, 1, 1)
  mine = ids == ids[:, :, -1:]
  return jnp.sum(jnp.where(mine, k, 0.0), 2) / mine.sum(2)


def diagnostics(q, k, block_indices, call: interface.Call, options: BlockMethod, rows=None,
                tile_rows: int = 128) -> dict[str, Array]:
  """Per KV head float32[K], means over the queries that had more blocks than they could take; NaN without such.

  Where each query head has a set of its own (`block_indices` [B, T, N, J]), per query head float32[N].
  `rows`, float32[B] or None: 0 leaves a sequence out (copies that fill up a batch), 1 takes it.

  captured_mass   dense attention mass on the chosen blocks (AttnSparsity, SSA Def. 1)
  oracle_mass     mass on the best J blocks: the ceiling of any selector
  block_recall    |best J and chosen| / |best J| (MSA section 5.2)
  score_recall    mass on the blocks both best and chosen (MSA section 5.2)
  entropy         of the dense attention over tokens, nats
  overlap         share of a query's blocks that the next query also chose
  tile_union      different blocks of a tile over the blocks of one of its queries: 1 = all the same; the work of
                  attending to the union of a tile. A tile is `tile_rows` query rows of one KV head: of all heads that
                  share a list, tile_rows / group neighbouring queries (what the kernels take)
  tile_common     share of the choices that fall on blocks which a third of the tile's queries, and two, chose
  tokens_visible  tokens attended to (over all queries)
  tokens_causal   tokens that dense attention would attend to (over all queries)
  queries_limited share of queries with more visible blocks than J (over all queries)
  heat            float32[K, query blocks, key blocks]: of the first sequence, how many of a
                  query block's queries chose the key block, as a share

  Without chosen blocks (a dense run) only oracle_mass, entropy and queries_limited are there.
  """
  size, J = options.block_size, options.num_blocks
  if block_indices is not None:
    k = jnp.repeat(k, block_indices.shape[2] // k.shape[2], axis=2)
  _, lse = pk.attention(q, k, k, **call.ops)
  mass, entropy = pk.block_mass(q, k, lse, block_size=size, **call.ops)
  B, T, K, blocks = mass.shape
  tokens = jnp.broadcast_to(visible_tokens(call, B, T, k.shape[1], size), (B, T, blocks))
  visible = tokens > 0
  rows = jnp.ones(B) if rows is None else rows
  limited = (visible.sum(-1) > J).astype(jnp.float32)[..., None] * rows[:, None, None]
  weight = limited / limited.sum()  # 0 / 0: where every query takes all its blocks there is nothing to say

  def mean(x):
    return jnp.sum(x * weight, axis=(0, 1))

  top = jax.lax.top_k(mass, min(J, blocks))[1]
  best = masked.membership(top, blocks) & visible[:, :, None]
  out = {"oracle_mass": mean(jnp.sum(mass * best, -1)), "entropy": mean(entropy),
         "queries_limited": jnp.broadcast_to(limited.sum() / jnp.maximum(rows.sum() * T, 1.0), (K,))}
  if block_indices is None:
    return out
  chosen = masked.membership(block_indices, blocks) & visible[:, :, None]
  both = best & chosen
  out["captured_mass"] = mean(jnp.sum(mass * chosen, -1))
  out["score_recall"] = mean(jnp.sum(mass * both, -1))
  out["block_recall"] = mean(both.sum(-1) / jnp.maximum(best.sum(-1), 1))
  shared = (chosen[:, :-1] & chosen[:, 1:]).sum(-1) / jnp.maximum(chosen[:, :-1].sum(-1), 1)
  out["overlap"] = mean(jnp.pad(shared, ((0, 0), (0, 1), (0, 0)), mode="edge"))
  tile = max(1, tile_rows // (q.shape[2] // K))

  def tiles(x):  # sums over the queries of each tile: [B, T, ...] -> [B, tiles, ...]
    return jnp.pad(x, ((0, 0), (0, -T % tile)) + ((0, 0),) * (x.ndim - 2)).reshape(B, -1, tile, *x.shape[2:]).sum(2)

  votes, count = tiles(chosen.astype(jnp.int32)), tiles(jnp.ones((1, T, 1)).repeat(B, 0))  # [B, tiles, K, blocks]
  picks, tile_weight = jnp.maximum(votes.sum(-1), 1), tiles(weight)
  out["tile_union"] = jnp.sum((votes > 0).sum(-1) * count / picks * tile_weight, axis=(0, 1))
  common = votes >= max(2, round(tile / 3))
  out["tile_common"] = jnp.sum((votes * common).sum(-1) / picks * tile_weight, axis=(0, 1))
  every = rows[:, None, None] / jnp.maximum(rows.sum() * T, 1.0)
  out["tokens_visible"] = jnp.sum((tokens[:, :, None] * chosen).sum(-1) * every, axis=(0, 1))
  out["tokens_causal"] = jnp.broadcast_to(jnp.sum(tokens.sum(-1, keepdims=True) * every), (K,))
  grid = jnp.pad(chosen[0].astype(jnp.float32), ((0, -T % size), (0, 0), (0, 0)))
  filled = jnp.clip(T - jnp.arange(grid.shape[0] // size) * size, 1, size)
  heat = grid.reshape(-1, size, K, blocks).sum(1) / filled[:, None, None]
  out["heat"] = heat.transpose(1, 0, 2)
  return out
