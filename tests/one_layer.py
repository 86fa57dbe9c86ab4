"""One small attention layer and its parameters: what the tests of single methods begin with."""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from nsa import config as config_lib, layers, methods, model as model_lib
from pallas_kernels import masked

D, K, H = 12, 2, 4  # width of the model, KV heads, head dim


def make_config(attention, heads, *, vocab_size=32, context=0, plan=None, **model):
  shape = dict(vocab_size=vocab_size, num_layers=2, d_model=D, num_heads=heads, num_kv_heads=K, head_dim=H, mlp_dim=16)
  config = config_lib.Config(model=config_lib.ModelConfig(**{**shape, **model}), attention=attention)
  config.data.context, config.schedule = context or config.data.context, plan or config.schedule
  return config


def random_params(tree, size=0.3, seed=1):
  """Values for a tree of shapes; unlike those of an initial model no norm, tap or bias is trivial."""
  rng = np.random.default_rng(seed)
  draw = lambda path, x: (size * rng.standard_normal(x.shape) + ("norm" in str(path[-1]))).astype(np.float32)
  return jax.tree_util.tree_map_with_path(draw, tree)


def split(config, size=0.3):
  """The layer's graph, to be merged with parameters, and random ones."""
  graph, state = nnx.split(nnx.eval_shape(
      lambda: model_lib.Attention(layers.Init(jax.random.key(3)), config.model, config.attention, 1.0)))
  return graph, random_params(nnx.to_pure_dict(state), size)


def call(tokens, segments, mode="sparse", key=None):
  table = lambda x, stride: layers.rope_table(tokens, x.shape[-1], 10_000.0, stride)
  rotate = lambda x, offset=0, stride=1: layers.rope(x, table(x, stride), offset)
  return methods.Call(mode=mode, key=key, rope=rotate, segment_ids=segments)


def in_chunks(monkeypatch, scores, function, *arguments):
  """function(*arguments), compiled where `scores` of all are there at a time: queries in a loop, the last turn
  padded."""
  monkeypatch.setattr(masked, "MAX_SCORES", scores)
  run = jax.jit(function)
  assert "scan" in str(run.trace(*arguments).jaxpr)
  return run(*arguments)


def decoded(config, params, tokens, chunk, **how):
  """Logits of int[B, T] with a cache: two chunks of so many tokens, then token by token in a loop, as `decoding.steps`
  does; and the text of that loop's program."""
  forward = lambda params, tokens, cache, offset: model_lib.forward(
      config, params, tokens, losses=False, cache=cache, offset=offset, **how)
  by_chunk, cache, logits = jax.jit(forward), model_lib.init_cache(config, params, *tokens.shape), []
  for at in (0, chunk):
    out = by_chunk(params, tokens[:, at:at + chunk], cache, jnp.int32(at))
    cache = out.cache
    logits.append(out.logits)

  @jax.jit
  def by_token(params, tokens, cache):
    params = model_lib.by_layer(config, params)

    def step(carry, token):
      out = forward(params, token[:, None], *carry)
      return (out.cache, carry[1] + 1), out.logits[:, 0]

    return jax.lax.scan(step, (cache, jnp.int32(2 * chunk)), tokens.T)[1].swapaxes(0, 1)

  program = by_token.lower(params, tokens[:, 2 * chunk:], cache).compile()
  return np.concatenate([*logits, program(params, tokens[:, 2 * chunk:], cache)], 1), program.as_text()


def kit(objective, variants, packed, heads, size=0.3, **model):
  """What tests of a method's variants share, each made once: (config of a method, segments, graph and parameters by
  name, gradients by name and mode, and (h, weights, what those gradients are for random hidden states)).

  objective: (name[, mode], params, h, weights, segments) -> (sum, all else). packed: int[B, T], documents in one row.
  """
  config = functools.partial(make_config, heads=heads, **model)
  segments_of = lambda is_packed: np.asarray(packed if is_packed else 0 * packed, np.int32)
  attention_of = functools.lru_cache(None)(lambda name: split(config(variants[name]), size))
  gradient_of = functools.lru_cache(None)(lambda *which: jax.jit(jax.grad(
      functools.partial(objective, *which), argnums=(0, 1), has_aux=True)))

  @functools.lru_cache(None)
  def run_layer(*which):
    *which, is_packed = which
    h, weights = np.random.default_rng(5).standard_normal((2, *packed.shape, D)).astype(np.float32)
    return h, weights, jax.device_get(gradient_of(*which)(attention_of(which[0])[1], h, weights,
                                                          segments_of(is_packed)))

  return config, segments_of, attention_of, gradient_of, run_layer
