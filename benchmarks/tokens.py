"""Times DSA at level "token": its choice, attention to the chosen tokens, the layer with its KL; and dense attention.

  python -m benchmarks.tokens --out=tokens.json                    # 8,192 and 32,768 tokens, two shapes of heads
  python -m benchmarks.tokens --tokens=256 --heads=4/2x16 --keys=64 --implementation=reference      # on a CPU

One sequence, R = 1: one set of `--keys` tokens per query for all heads, 4 index heads of 64 (16 with heads under 64),
bfloat16. Rows: `top_k`, the choice alone, forward; `attention` to sets of random index scores, which leave no tile
empty, and to the latest tokens, which leave most of them; `layer`, choice, attention and KL; `dense`, by cuDNN where it
serves. ms: the median of `--repeats` groups of `--calls`.
"""
from __future__ import annotations

import functools

from absl import flags
import jax
import jax.numpy as jnp

from benchmarks import timing
from launch import cli
import pallas_kernels as pk
from pallas_kernels import masked

_TOKENS = flags.DEFINE_list("tokens", ["8192", "32768"], "Lengths.")
_HEADS = flags.DEFINE_list("heads", ["16/4x64", "64/4x128"], "QUERY_HEADS/KV_HEADSxHEAD_DIM.")
_KEYS = flags.DEFINE_integer("keys", 2048, "Tokens of a set.", lower_bound=1)
_IMPLEMENTATION = flags.DEFINE_string("implementation", "triton", "Of what is timed beside dense attention.")
_CALLS = flags.DEFINE_integer("calls", 5, "Calls of a group.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Groups; the median counts.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")
cli.define_common()

INDEX_HEADS = 4


def draw(T: int, N: int, K: int, H: int) -> dict:
  """Standard normal arrays; index weights are small, as the layer scales them."""
  dim = min(64, H)
  shapes = dict(q=(N, H), k=(K, H), v=(K, H), do=(N, H), q_idx=(1, INDEX_HEADS, dim), w=(1, INDEX_HEADS), k_idx=(dim,))
  of = lambda i, shape: jax.random.normal(jax.random.key(i), (1, T, *shape), jnp.bfloat16)
  out = {name: of(i, shape) for i, (name, shape) in enumerate(shapes.items())}
  return dict(out, w=out["w"] * (INDEX_HEADS * dim) ** -0.5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def latest(T: int, keys: int):
  """Sets of the latest `keys` tokens, int32[1, T, 1, words]."""
  at = jnp.arange(T)
  row = lambda t: masked.packed((at <= t) & (at > t - keys))
  return jax.lax.map(row, at, batch_size=min(T, 1024))[None, :, None]


def layer(x, *, keys, implementation):
  """o and the mean KL."""
  by = dict(implementation=implementation)
  index = x["q_idx"], x["w"], x["k_idx"]
  sets = pk.token_top_k(*index, num_tokens=keys, **by)
  o, lse = pk.token_attention(x["q"], x["k"], x["v"], sets, **by)
  return o, pk.lightning_kl(x["q"], x["k"], lse, *index, None, token_sets=sets, **by).mean()


def rows_of(keys: int, implementation: str, dense: str) -> list:
  """[(name, part, function of the arrays and of sets by name)]."""
  attend = lambda which: lambda x, sets: pk.token_attention(x["q"], x["k"], x["v"], sets[which],
                                                            implementation=implementation)[0]
  functions = {
      "attention, random": attend("random"), "attention, latest": attend("latest"),
      "layer": lambda x, sets: layer(x, keys=keys, implementation=implementation),
      "dense": lambda x, sets: pk.attention(x["q"], x["k"], x["v"], implementation=dense)[0]}

  def with_gradients(f, names):
    def run(x, sets):
      out, pull = jax.vjp(lambda *of: f({**x, **dict(zip(names, of))}, sets), *(x[name] for name in names))
      return pull((x["do"], jnp.float32(1)) if isinstance(out, tuple) else x["do"])
    return run

  out = [("top_k", "forward", lambda x, sets: pk.token_top_k(x["q_idx"], x["w"], x["k_idx"], num_tokens=keys,
                                                             implementation=implementation))]
  for name, f in functions.items():
    names = ("q", "k", "v") + (("q_idx", "w", "k_idx") if name == "layer" else ())
    out += [(name, "forward", f), (name, "forward + backward", with_gradients(f, names))]
  return out


def measured(T: int, heads: tuple, keys: int, implementation: str, dense: str):
  """Rows one by one; all are compiled before the first is timed."""
  N, K, H = heads
  x = draw(T, N, K, H)
  programs = [(name, part, jax.jit(f)) for name, part, f in rows_of(keys, implementation, dense)]
  choose = jax.jit(lambda x: pk.token_top_k(x["q_idx"], x["w"], x["k_idx"], num_tokens=keys,
                                            implementation=implementation))
  sets = dict(random=choose(x), latest=latest(T, keys))
  ready = []
  for name, part, f in programs:
    try:
      ready.append((name, part, f.lower(x, sets).compile()))
    except Exception as error:  # a shape that an implementation refuses
      ready.append((name, part, timing.of_error(error)))
  for name, part, f in ready:
    row = dict(row=name, part=part, T=T, N=N, K=K, H=H, keys=keys, device=jax.devices()[0].device_kind,
               implementation=dense if name == "dense" else implementation, jax=jax.__version__)
    try:
      if isinstance(f, str):
        raise RuntimeError(f)
      row["ms"] = timing.milliseconds(f, [(x, sets)], _CALLS.value, _REPEATS.value)
    except Exception as error:  # memory; other rows go on
      row["error"] = timing.of_error(error)
    yield row


def main():
  cli.compilation_cache(flags.FLAGS.compilation_cache)
  dense = "cudnn" if jax.default_backend() == "gpu" else "reference"
  rows = []
  for text in _HEADS.value:
    heads = timing.numbers("--heads", text, "QUERY_HEADS/KV_HEADSxHEAD_DIM", "16/4x64")
    for T in timing.counts("--tokens", _TOKENS.value):
      for row in measured(T, heads, _KEYS.value, _IMPLEMENTATION.value, dense):
        rows.append(row)
        print(f"{T:>7} {text:<9} {row['row']:<18} {row['part']:<19} {row.get('ms', row.get('error'))}", flush=True)
        timing.write(_OUT.value, rows)


if __name__ == "__main__":
  cli.run(main)
