"""Measures block shapes of the Triton kernels on the GPU it runs on and writes the best ones for its kind.

  python -m benchmarks.tune                                  # all kernels, some ten minutes, most of it compilation
  python -m benchmarks.tune --kernels=index_kl,range_dq      # these; other entries of the file stay

Results go to pallas_kernels/tuned/<device kind>.json (or --out), which `pallas_kernels.triton.tuning` reads. Shapes
that do not compile, or need more shared memory than there is, are skipped.
"""
from __future__ import annotations

import functools
import itertools
import json
import pathlib

from absl import flags
import jax
import jax.numpy as jnp

from benchmarks import cases, timing
from launch import cli
from pallas_kernels import arg_specs, spans

try:
  from pallas_kernels.triton import kl, lightning, ranged, selected, top_k, tuning
  from pallas_kernels.triton.tuning import Tuned
except ImportError as error:
  cli.end(cli.BAD_INPUT, f"{error}: block shapes are those of Triton's kernels: pip install -e '.[gpu]'")

_KERNELS = flags.DEFINE_list("kernels", None, "Names, or None for all.")
_OUT = flags.DEFINE_string("out", None, "JSON file; None is the one that is read.")

LONG = arg_specs.get("length_64k")     # head dim 128
STUDY = arg_specs.get("study_4k_j16")  # head dim 64
NOWHERE = dict(segment_ids=None, query_offset=0)


def _compressed(spec):
  x = arg_specs.arrays(spec)
  scale = spec.H ** -0.5
  strides = dict(block_len=spec.block_len, block_stride=spec.block_stride, scale=scale, **NOWHERE)
  return x, strides


def _range_arguments(spec):
  """q, k, v, low, high, o, lse, do, dlse of attention over compressed keys (long) or dense (study)."""
  x, _ = _compressed(spec)
  position = spans.positions(spec.T, 0, spec.B)
  if spec is LONG:
    k, v = x["k_cmp"], x["v_cmp"]
    low, high = spans.of_compressed(position, k.shape[1], None, block_len=spec.block_len,
                                    block_stride=spec.block_stride)
  else:
    k, v = x["k"], x["v"]
    low, high = spans.of_tokens(position, k.shape[1], None)
  o, lse = jax.jit(lambda *a: ranged.attend(*a, spec.H ** -0.5))(x["q"], k, v, low, high)
  return x["q"], k, v, low, high, o, lse, x["do"], jnp.zeros_like(lse)


def _sizes(q, k):
  return ranged.Sizes(q.shape[1], k.shape[1], k.shape[2], q.shape[2] // k.shape[2], q.shape[3], q.shape[3] ** -0.5,
                      "tf32")


def range_forward(spec):
  q, k, v, low, high, *_ = _range_arguments(spec)
  return functools.partial(ranged.forward, sizes=_sizes(q, k)), (q, k, v, low, high)


def range_backward(spec):
  a = _range_arguments(spec)
  return functools.partial(ranged.backward, sizes=_sizes(*a[:2])), a


def range_decode(spec):
  key = jax.random.key(0)
  q = jax.random.normal(key, (8, 1, spec.N, spec.H), jnp.bfloat16)
  k = jax.random.normal(key, (8, spec.T, spec.K, spec.H), jnp.bfloat16)
  f = lambda q, k: ranged.attention(q, k, k, causal=True, window=None, scale=0.1, segment_ids=None,
                                    query_offset=spec.T - 1)
  return f, (q, k)


def selected_decode(spec):
  """Tokens of a batch of 8, as a generation loop launches them."""
  case, x = cases.decode("decode_selected", spec, 8, "triton")
  return case.function, (x, None)


def compressed_scores(spec):
  x, strides = _compressed(spec)
  _, lse = jax.jit(functools.partial(ranged.compressed_attention, **strides))(x["q"], x["k_cmp"], x["v_cmp"])
  f = functools.partial(top_k.compressed_top_k, block_size=spec.block_size, num_blocks=spec.J, num_initial=1,
                        num_local=2, **strides)
  return f, (x["q"], x["k_cmp"], lse)


def index_scores(spec):
  x = arg_specs.arrays(spec)
  f = functools.partial(top_k.index_top_k, block_size=128 if spec is LONG else spec.block_size, num_blocks=spec.J,
                        num_initial=0, num_local=1, scale=1.0, **NOWHERE)
  return f, (x["q_idx"], x["k_idx"])


def _selection(spec):
  return jnp.asarray(arg_specs.stripes(spec), jnp.int32)


def index_kl(spec, everything=False):
  """Over selected blocks, or over everything, as in a warm-up."""
  x, blocks = arg_specs.arrays(spec), None if everything else _selection(spec)
  lse = jnp.full((spec.B, spec.T, spec.N), 8.0)

  def f(q, k, lse, q_idx, k_idx, blocks):
    g = lambda a, b: kl.index_kl(q, k, lse, a, b, blocks, block_size=spec.block_size, scale=spec.H ** -0.5,
                                 index_scale=0.1, **NOWHERE).sum()
    return jax.value_and_grad(g, (0, 1))(q_idx, k_idx)
  return f, (x["q"], x["k"], lse, x["q_idx"], x["k_idx"], blocks)


def lightning_kl(spec):
  """Over all tokens: DSA's warm-up, four index heads."""
  x = arg_specs.arrays(spec)
  lse, heads = jnp.full((spec.B, spec.T, spec.N), 8.0), jnp.repeat(x["q_idx"][:, :, :1, None], 4, axis=3)

  def f(q, k, lse, heads, k_idx):
    g = lambda a, b: lightning.lightning_kl(q, k, lse, a, a[..., 0], b, None, block_size=spec.block_size,
                                            scale=spec.H ** -0.5, **NOWHERE).sum()
    return jax.value_and_grad(g, (0, 1))(heads, k_idx)
  return f, (x["q"], x["k"], lse, heads, x["k_idx"])


def selected_both(spec):
  x, blocks = arg_specs.arrays(spec), _selection(spec)

  def f(q, k, v, do, blocks):
    g = lambda *a: selected.selected_attention(*a, blocks, block_size=spec.block_size, scale=0.1, **NOWHERE)[0]
    o, pull = jax.vjp(g, q, k, v)
    return o, pull(do)
  return f, (x["q"], x["k"], x["v"], x["do"], blocks)


def _grid(rows, blocks, warps, stages):
  return [Tuned(*t) for t in itertools.product(rows, blocks, warps, stages)]


KERNELS = {  # kernel -> (what is timed, candidates)
    "compressed_scores": (compressed_scores, _grid((64,), (64, 128), (4,), (2,)) + _grid((128,), (64,), (4,), (2, 3))
                          + _grid((128,), (128,), (8,), (2,)) + _grid((256,), (64,), (8,), (2,))),
    "index_scores": (index_scores, _grid((64,), (64, 128), (4,), (2, 3)) + _grid((128,), (64, 128), (4,), (2, 3))
                     + _grid((128,), (64, 128), (8,), (2, 3))),
    "index_kl": (functools.partial(index_kl, everything=True), _grid((64,), (64,), (4, 8), (2, 3, 4))),
    "index_kl_forward": (index_kl, _grid((64, 128), (64,), (4, 8), (2, 3))),
    "index_kl_backward": (index_kl, _grid((64, 128), (64,), (4, 8), (2, 3, 4))),
    "lightning": (lightning_kl, _grid((64,), (64, 128), (4, 8), (2, 3)) + _grid((128,), (64,), (4, 8), (2, 3))),
    "range_dkv": (range_backward, _grid((64, 128), (128,), (8,), (2, 3)) + _grid((64,), (64,), (4,), (2, 3))),
    "range_dq": (range_backward, _grid((128,), (64, 128), (8,), (2, 3)) + _grid((64,), (64,), (4,), (2, 3))),
    "range_forward": (range_forward, _grid((128,), (64, 128), (8,), (2, 3)) + _grid((64,), (64, 128), (4,), (3,))),
    "range_decode": (range_decode, _grid((16,), (32, 64, 128), (4,), (3, 4))),
    "selected_forward": (selected_both, _grid((16,), (64,), (1, 2, 4), (2, 3))),
    "selected_decode": (selected_decode, _grid((16,), (64,), (1, 2, 4), (2, 3))),
    "selected_dkv": (selected_both, _grid((64,), (64,), (4, 8), (1, 2))),
}


def measure(kernel, spec, calls=3, repeats=3):
  """[(ms, Tuned)] of the candidates that run, the best first."""
  timed, candidates = KERNELS[kernel]
  function, arguments = timed(spec)
  results = []
  for tuned in candidates:
    with tuning.override(kernel, tuned):
      try:
        ms = timing.milliseconds(jax.jit(lambda *a: function(*a)), [arguments], calls, repeats)
      except Exception as error:  # too much shared memory, most of the time
        print(f"  {kernel}/{spec.H} {tuple(tuned)}: {type(error).__name__} {str(error)[:80]}", flush=True)
        continue
    results.append((ms, tuned))
    print(f"  {kernel}/{spec.H} {tuple(tuned)}: {ms:.3f} ms", flush=True)
  return sorted(results)


def main():
  unknown = [name for name in _KERNELS.value or () if name not in KERNELS]
  if unknown:
    raise ValueError(f"--kernels: {unknown[0]!r} is unknown; take some of {', '.join(KERNELS)}")
  if jax.default_backend() != "gpu":
    raise ValueError(f"JAX runs on {jax.default_backend()} here: block shapes are measured on the GPU they are for")
  path = pathlib.Path(_OUT.value) if _OUT.value else tuning.device_file(jax.devices()[0].device_kind)
  path.parent.mkdir(parents=True, exist_ok=True)
  entries = json.loads(path.read_text()) if path.exists() else {}
  for kernel in _KERNELS.value or KERNELS:
    for spec in (LONG, STUDY):
      results = measure(kernel, spec)
      if results:
        entries[f"{kernel}/{spec.H}"] = list(results[0][1])
        lines = (f'  "{name}": {json.dumps(entry)}' for name, entry in sorted(entries.items()))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # after each: a cut run keeps what it measured
        print(f"{kernel}/{spec.H}: {tuple(results[0][1])} {results[0][0]:.3f} ms", flush=True)


if __name__ == "__main__":
  cli.run(main)
