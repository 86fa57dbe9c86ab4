"""A decoder-only Transformer whose attention is any method of `nsa.methods`.

The module holds parameters; `forward` is a pure function of (config, params, tokens).
Layers of one method are stacked and scanned. Every mode of every stage runs on one and
the same parameter tree. One token behind a cache goes through the layers one by one: a
scan would cut each layer's part out of the cache and write it whole into a new one.
"""
from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, Callable, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from nsa import layers, methods, origins, stacking
from pallas_kernels import backends, fused


class Attention(nnx.Module):
  """Projections and convolution shared by all methods, around the method's own layer."""

  def __init__(self, init: layers.Init, model, method: methods.Method, out_gain: float):
    def projection(name, heads, axis, norm=False):
      return layers.HeadProjection(init.child(name), model.d_model, heads, model.head_dim, axis=axis,
                                   taps=model.short_conv, bias=model.qkv_bias, norm=norm,
                                   eps=model.norm_eps)

    self.q = projection("q", model.num_heads, "heads", norm=model.qk_norm)
    self.k = projection("k", model.num_kv_heads, "kv_heads", norm=model.qk_norm)
    self.v = projection("v", model.num_kv_heads, "kv_heads")
    self.out = init.normal("out", (model.num_heads, model.head_dim, model.d_model), ("heads", None, "embed"),
                           fan_in=model.num_heads * model.head_dim, gain=out_gain, matrix=(0, 1))
    if model.output_gate:
      self.gate = init.normal("gate", (model.d_model, model.num_heads), ("embed", "heads"), fan_in=model.d_model)
    # which declares the group of each parameter
    self.method = methods.build(method, init.child("method", group=""), model)

  def project(self, h: Float[Array, "B T D"], call: methods.Call) -> tuple[methods.Inputs, dict[str, Array]]:
    """These tokens as the method sees them, and their streams."""
    q_raw, k_raw, v = (layers.project(part, h, call, rotated=False) for part in (self.q, self.k, self.v))
    turned, plain = self.method.beside(call)
    together = layers.project_together((self.q, self.k, *turned.values()), (self.v, *plain.values()), h, call)
    beside = None
    if together is not None:  # what is not rotated is gone unless the method asks for it
      q, k, *rest = together
      v = rest.pop(len(turned))
      beside = dict(zip((*turned, *plain), rest)) or None
    elif call.fused is None:
      q, k = call.rope(q_raw, offset=call.offset), call.rope(k_raw, offset=call.offset)
    else:
      q, k = (layers.project(part, h, call, rotated=True) for part in (self.q, self.k))
    # Left to itself the partitioner gathers hidden states of all positions, and each device makes all K and V of them.
    q, k, v = (call.constrain(y, ("batch", "time", axis, None)) for y, axis in
               ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
    gate = None
    if hasattr(self, "gate"):
      gate = jax.nn.sigmoid(layers.product("btd,dn->btn", h, self.gate[...]).astype(jnp.float32))
    x = methods.Inputs(h, q, q_raw, k_raw, gate)
    return x, {"k": k, "v": v, **(self.method.streams(x, call) if beside is None else beside)}

  def __call__(self, h: Float[Array, "B T D"], call: methods.Call, cache: dict | None, observe: Callable | None):
    x, streams = self.project(h, call)
    if cache is not None:
      put = jax.lax.dynamic_update_slice_in_dim
      streams = {name: put(cache[name], new.astype(cache[name].dtype), call.offset, axis=1)
                 for name, new in streams.items()}
      if "pooled" in cache:
        call = dataclasses.replace(
            call, pooled=self.method.pool_cache(cache["pooled"], streams, call, h.shape[1]))
    result = self.method(x, streams, call)
    if call.pooled is not None:
      streams["pooled"] = call.pooled
    if cache is not None and "state" in cache:
      state = call.state if result.state is None else result.state
      streams["state"] = jax.tree.map(lambda new, old: new.astype(old.dtype), state, cache["state"])
    o = result.o
    if x.gate is not None:
      o = o * x.gate.astype(o.dtype)[..., None]
    seen = ({} if observe is None
            else {**observe(x.q, streams["k"], result.block_indices, call), **(result.measured or {})})
    handed = call.handed if result.block_indices is None else result.block_indices
    o = call.constrain(o, ("batch", "time", "heads", None))
    return layers.product("btnh,nhd->btd", o, self.out[...]), result.losses, seen, streams, handed


class Block(nnx.Module):
  """Pre-norm residual block: x + Attention(norm(x)), then x + SwiGLU(norm(x))."""

  def __init__(self, init: layers.Init, model, method: methods.Method):
    out_gain = (2 * model.num_layers) ** -0.5
    self.eps = model.norm_eps
    self.attention_norm = init.constant((model.d_model,), (None,), 1.0)
    self.attention = Attention(init.child("attention"), model, method, out_gain)
    self.mlp_norm = init.constant((model.d_model,), (None,), 1.0)
    self.mlp = layers.SwiGLU(init.child("mlp"), model.d_model, model.mlp_dim, out_gain)

  def __call__(self, x, call, cache, observe):
    one_pass = call.fused is not None and fused.takes_rows(x)
    norm = functools.partial(fused.norm if one_pass else layers.add_and_norm, eps=self.eps)
    # Said of every product's operands and results: left to itself the partitioner cuts products along D as their
    # weights are cut, for which it gathers activations of other devices' rows and positions.
    activations = "batch", "time", None
    x, h = norm(x, None, self.attention_norm[...])
    h = call.constrain(h, activations)
    tail = None
    if cache is not None:
      call = dataclasses.replace(call, tail=cache.get("tail"), state=cache.get("state"))
    h, call = self.attention.method.before(h, call)
    if call.tail is not None:
      reach = cache["tail"].shape[1]
      tail = jnp.concatenate([cache["tail"].astype(h.dtype), h], axis=1)[:, -reach:]
    y, losses, seen, streams, handed = self.attention(h, call, cache, observe)
    x, h = norm(x, call.constrain(y, activations), self.mlp_norm[...])
    x = x + call.constrain(self.mlp(call.constrain(h, activations), call), activations)
    if tail is not None:
      streams = {**streams, "tail": tail}
    return x, handed, (losses, seen, streams)


class Transformer(nnx.Module):
  """All parameters. `stacks["stack<i>"]` holds consecutive layers of one method, stacked on axis 0."""

  def __init__(self, init: layers.Init, config):
    model = config.model
    # Embeddings are looked up, and their output matrix is counted apart and learns by Adam: neither is a `matrix` here.
    self.embed = init.normal("embed", (model.vocab_size, model.d_model), ("vocab", "embed"), fan_in=model.d_model,
                             matrix=())
    stacks, first = [], 0  # all layers draw their keys by their own number, whatever the layout
    for method, count in stacking.layout(config):
      keys = jax.vmap(lambda i: jax.random.fold_in(init.child("layers").key, i))(jnp.arange(first, first + count))
      build = functools.partial(Block, model=model, method=method)
      stacks.append(nnx.vmap(lambda key: build(layers.Init(key)))(keys))
      first += count
    self.stacks = nnx.Dict({f"stack{i}": stack for i, stack in enumerate(stacks)})
    self.norm = init.constant((model.d_model,), (None,), 1.0)
    if not model.tie_embeddings:
      self.head = init.normal("head", (model.d_model, model.vocab_size), ("embed", "vocab"), fan_in=model.d_model,
                              matrix=())


def architecture(config):
  """The part of the config that says which parameters there are and what a forward pass computes."""
  return type(config)(model=config.model, attention=config.attention, layers=config.layers, others=config.others,
                      implementation=config.implementation, one_pass=config.one_pass)


class Output(NamedTuple):
  """What `forward` returns."""
  logits: Float[Array, "B T V"]       # float32
  losses: dict[str, Float[Array, ""]]  # auxiliary losses, mean over the layers that have them
  layers: list[dict]                  # per stack: what `observe` returned, stacked [layers, ...]
  cache: list[dict] | None            # per layer: the KV cache with these tokens in it
  hidden: Float[Array, "B T D"]       # what `unembed` makes the logits of


class Static:
  """A config as a static argument: compared and hashed by its printed form and by what was registered until then."""

  def __init__(self, value):
    self.value = value
    self._key = f"{origins.registered()}: {value!r}"

  def __repr__(self):
    return f"Static({self._key})"

  def __hash__(self):
    return hash(self._key)

  def __eq__(self, other):
    return isinstance(other, Static) and self._key == other._key


@functools.lru_cache(maxsize=32)
def _graph(static):
  config = copy.deepcopy(static.value)  # the caller may still change its own
  return nnx.split(nnx.eval_shape(lambda: Transformer(layers.Init(jax.random.key(0)), config)))


@functools.lru_cache(maxsize=32)
def _blocks(static):
  return [nnx.split(stack)[0] for stack in stacking.in_order(nnx.merge(*_graph(static)).stacks)]


def graph(config):
  """(graph definition, abstract nnx state with metadata) of the config's model."""
  return _graph(Static(architecture(config)))


def abstract_params(config) -> dict:
  """Nested dict of jax.ShapeDtypeStruct, float32."""
  return nnx.to_pure_dict(graph(config)[1])


def param_metadata(config, name: str) -> dict:
  """Nested dict like the parameters with one metadata entry of each, as `layers.Init` says.

  "axes" has one logical name or None per dimension, the stacking axis of layers included.
  """
  _, state = graph(config)
  is_leaf = lambda x: isinstance(x, nnx.Variable)

  def read(v):
    value = getattr(v, name)
    if name == "axes":
      value = (None,) * (v.ndim - len(value)) + tuple(value)
    return Axes(value) if isinstance(value, tuple) else value

  return nnx.to_pure_dict(jax.tree.map(lambda v: v.replace(read(v)), state, is_leaf=is_leaf))


class Axes(tuple):
  """Axes of one parameter, by logical name or number; a leaf, not a subtree."""


def init_params(config, seed: int | Array) -> dict:
  """Random parameters, float32 nested dict. Pure in (config, seed); jit it with the wanted shardings."""
  init = layers.Init(jax.random.key(seed))
  return nnx.to_pure_dict(nnx.split(Transformer(init, config))[1])


def forward(config, params: dict, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None, *,
            mode: str = "sparse", selector: str = "own", key: Any = None, losses: bool = True,
            counted: Bool[Array, "B T"] | None = None,
            cache: list[dict] | None = None, offset: int | Int[Array, ""] = 0,
            prompt: Int[Array, " B"] | int | None = None,
            observe: Callable | None = None, states: Callable | None = None,
            constrain: Callable = lambda x, axes: x, unroll: int = 1) -> Output:
  """Logits for the next token at every position.

  Args:
    tokens: int32[B, T].
    segment_ids: int32[B, T]; tokens attend within their segment only. None: one segment.
    mode: "dense", "sparse" or "warmup" (dense output and the selector's loss).
    selector: "own", or the name of a control in its place (methods.TrainingFree).
    key: random key; only the "random" selector needs one.
    losses: whether to compute the auxiliary losses.
    counted: the tokens that these losses are means over, those that are no padding; None = all.
    cache: from `init_cache`, with `offset` the number of tokens already in it (decoding). A loop over tokens gives
      `by_layer` of the parameters.
    prompt: how many of these tokens are each sequence's prompt, for methods that choose once per prompt
      (methods/prompt/base.py); given with the first tokens, offset 0.
    observe: (method, q, k, block_indices, call) -> dict of arrays, gathered per layer; `method` is the layer's.
    states: (x [B, T, D], layer) -> dict of arrays of what a layer leaves in the residual stream, gathered with those.
    constrain: (x, logical axes) -> x, sharding constraints on activations.
    unroll: layers that one turn of the loop over the layers of a stack holds. More cost compilation; in training they
      save stacking what the backward pass needs of each layer.
  """
  model = config.model
  if cache is not None and segment_ids is not None and model.short_conv > 1:
    raise ValueError(f"segment_ids with a cache and model.short_conv = {model.short_conv}: the convolution's tail "
                     "knows no segments; decode each document by itself")
  dtype = jnp.dtype(model.dtype)
  capacity = tokens.shape[1] if cache is None else cache[0]["k"].shape[1]
  if isinstance(offset, int) and offset + tokens.shape[1] > capacity:  # a traced offset that is too large is clamped
    raise ValueError(f"offset = {offset}: a cache of {capacity} positions has no room for {tokens.shape[1]} tokens "
                     "there")

  def rotate(x, offset=0, stride=1):
    positions = capacity if stride == 1 else -(-capacity // stride)
    return layers.rope(x, layers.rope_table(positions, x.shape[-1], model.rope_theta, stride, model.rope_scaling,
                                            capacity), offset)

  def rope_of(index):
    """That of layer `index`: none in some layers of some models."""
    if not model.no_rope_layers:
      return rotate
    rotates = jnp.asarray(~np.isin(np.arange(model.num_layers), model.no_rope_layers))[index]
    return lambda x, **where: jnp.where(rotates, rotate(x, **where), x)

  def table_of(index):
    """Head dim -> what `rope_of(index)` turns these tokens by, for one-pass kernels; None where there are none."""
    if not one_pass:
      return None

    def table(head_dim):
      cos, sin = layers.rope_table(capacity, head_dim, model.rope_theta, 1, model.rope_scaling)
      if not model.no_rope_layers:
        return cos, sin
      rotates = jnp.asarray(~np.isin(np.arange(model.num_layers), model.no_rope_layers))[index]
      return jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)

    return table

  call = methods.Call(mode=mode, offset=offset, segment_ids=segment_ids, selector=selector, losses=losses,
                      prompt=prompt, counted=counted, implementation=config.implementation or None, rope=rotate,
                      constrain=constrain)
  # The table whole: rows looked up in a table cut by columns would all have to change places.
  table = constrain(params["embed"].astype(dtype), ("vocab", None))
  x = constrain(layers.look_up(table, tokens) * (model.embedding_multiplier or model.d_model ** 0.5),
                ("batch", "time", None))
  one_pass = cache is None and config.one_pass and fused.serves(x)
  all_losses, seen, new_cache, first = [], [], [], 0
  one_by_one = cache is not None and tokens.shape[1] == 1
  blocks = _blocks(Static(architecture(config)))
  for stack, stack_def, (method, count) in zip(stacking.in_order(params["stacks"]), blocks, stacking.layout(config)):
    watch = None if observe is None else functools.partial(observe, method)
    hands = method.handed_up(model, *tokens.shape)

    def body(carry, layer, stack_def=stack_def, watch=watch, hands=hands):
      (x, handed), (state, layer_cache, index) = carry, layer
      layer_key = None if key is None else jax.random.fold_in(key, index)
      own = dataclasses.replace(call, key=layer_key, rope=rope_of(index), fused=table_of(index), layer=index,
                                handed=handed)
      with backends.recomputed(model.remat == "layer"):
        x, handed, out = nnx.merge(stack_def, state)(x, own, layer_cache, watch)
      loss, observed, streams = out
      if states is not None:
        observed = {**observed, **states(x, index)}
      return ((constrain(x, ("batch", "time", None)), None if hands is None else handed),
              (loss, observed, None if layer_cache is None else streams))

    mine = None if cache is None else cache[first:first + count]
    if one_by_one:
      carry, rows, body = (x, hands), [], jax.jit(body)  # traced and lowered once; XLA inlines it
      for n, layer in enumerate(_unstack(stack, count)):
        carry, row = body(carry, (layer, mine[n], jnp.int32(first + n)))
        rows.append(row)
      (x, _), streams = carry, [streams for _, _, streams in rows]
      loss, observed = _stack([row[:2] for row in rows])
    else:
      if model.remat == "layer":  # but never the top-k: wasted work, and ties could break otherwise; nor attention
        # Between the loops forward and backward XLA finds no common subexpressions; where no loop is left it would.
        body = jax.checkpoint(body, prevent_cse=unroll >= count,
                              policy=jax.checkpoint_policies.save_only_these_names(methods.CHOSEN, backends.ATTENDED))
      whole = _stack(stack) if isinstance(stack, list) else stack
      layer_inputs = whole, None if cache is None else _stack(mine), jnp.arange(first, first + count)
      (x, _), (loss, observed, streams) = jax.lax.scan(body, (x, hands), layer_inputs, unroll=min(unroll, count))
      streams = [] if cache is None else _unstack(streams, count)
    first += count
    all_losses.append(loss)
    seen.append(observed)
    new_cache += streams
  x = layers.rms_norm(x, params["norm"], model.norm_eps)
  logits = unembed(config, params, x)
  names = {name for loss in all_losses for name in loss}
  mean_losses = {name: jnp.mean(jnp.concatenate([loss[name] for loss in all_losses if name in loss]))
                 for name in sorted(names)}
  return Output(logits, mean_losses, seen, None if cache is None else new_cache, x)


def _stack(trees: list):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _unstack(tree, count: int) -> list:
  return tree if isinstance(tree, list) else [jax.tree.map(lambda x: x[n], tree) for n in range(count)]


def by_layer(config, params: dict) -> dict:
  """The parameters as `forward` would have made them again for every token behind a cache: those of each layer by
  themselves, the backbone's matrices and the embeddings, which are read in no other dtype, in the compute dtype."""
  dtype = jnp.dtype(config.model.dtype)
  cast = lambda x, group, matrix: x.astype(dtype) if group == "backbone" and matrix else x
  params = jax.tree.map(cast, params, param_metadata(config, "group"), param_metadata(config, "matrix"))
  tables = {name: params[name].astype(dtype) for name in ("embed", "head") if name in params}
  stacks = {f"stack{i}": _unstack(stack, count)
            for i, (stack, (_, count)) in enumerate(zip(stacking.in_order(params["stacks"]), stacking.layout(config)))}
  return {**params, **tables, "stacks": stacks}


def unembed(config, params: dict, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
  """Logits of `Output.hidden`, float32."""
  head = params["embed"].T if config.model.tie_embeddings else params["head"]
  return jnp.einsum("...d,dv->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def init_cache(config, params: dict, batch: int, capacity: int) -> list[dict]:
  """An empty KV cache for `batch` sequences of up to `capacity` tokens: per layer a dict of [batch, capacity, ...]
  arrays in the compute dtype, the convolution's "tail", of methods that read blocks of tokens as one what they read as
  "pooled" (`methods.Layer.pools`) and of recurrent methods the "state" of constant size."""
  model = config.model
  graphdef, _ = graph(config)
  dtype = jnp.dtype(model.dtype)

  def layers_of(params):
    """Of every stack the first layer's attention, and how its state begins in each of its layers."""
    for stack in stacking.in_order(nnx.merge(graphdef, params).stacks):
      stack_def, state = nnx.split(stack)
      first = nnx.merge(stack_def, jax.tree.map(lambda x: x[0], state)).attention
      begin = lambda layer: nnx.merge(stack_def, layer).attention.method.initial_state(batch, dtype)
      yield first, jax.vmap(begin)(state)

  def shapes(params):
    call = methods.Call(losses=False, rope=lambda x, offset=0, stride=1: x)
    for first, _ in layers_of(params):
      _, streams = first.project(jnp.zeros((batch, capacity, model.d_model), dtype), call)
      pools = {name: first.method.pool(name, streams, call) for name in first.method.pools()}
      yield {**streams, "pooled": pools} if pools else streams

  cache = []
  states = [state for _, state in layers_of(params)]
  stacks = jax.eval_shape(lambda params: list(shapes(params)), params)
  for (_, count), arrays, state in zip(stacking.layout(config), stacks, states):
    for n in range(count):
      entry = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arrays)
      if state:
        entry["state"] = jax.tree.map(lambda x: x[n], state)  # noqa: B023
      if model.short_conv > 1:
        entry["tail"] = jnp.zeros((batch, model.short_conv - 1, model.d_model), dtype)
      cache.append(entry)
  return cache
