"""Small calls of the GPU kernels, forward and backward, for NVIDIA's compute-sanitizer; no result is compared.

  compute-sanitizer --tool memcheck --padding 4096 --report-api-errors no --error-exitcode 9 python tests/memcheck.py
  compute-sanitizer --tool racecheck --error-exitcode 9 python tests/memcheck.py paged_dense_g16 triton_window_g3_packed
  python tests/memcheck.py --list

Exit code 0 and "ERROR SUMMARY: 0 errors" mean that no kernel touched memory outside an allocation; 9 that one did.
Names choose among the calls. `planted` is not among those that run by default: it writes 1 GiB past its result, so with
that name the first command has to end with 9, and otherwise proves nothing. `planted1` writes one number past it. On
one H200 (jax 0.11.2) the tool caught the first and missed that, 800 kB and 4 MB: jax's memory is mapped in large
pieces, and what stays inside one is not seen. So this finds wild addresses; ends of tiles are for the interpreters to
check.

Every array is an allocation of its own here (jax's pool would hide all that stays inside the pool), and lengths are
ragged, so that tiles reach past the ends. Sums between kernels are XLA's.
"""
import functools
import os
import pathlib
import sys
import time

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # read when jax starts
FLAGS = " --xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="  # kernels launched one by one, none to choose
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mosaic_gpu_test  # noqa: E402
import numpy as np  # noqa: E402
import paged_test  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_selections_test  # noqa: E402
import triton_test  # noqa: E402

import pallas_kernels as pk  # noqa: E402
from pallas_kernels.triton import call  # noqa: E402

TRITON = ("window_g3_packed", "compressed_packed", "selected_g3_packed", "beyond_a_cache")
MOSAIC = ("g4_h64_b32", "g3")
PAGED = ("dense_g16", "selected_g16")


def attention(name):
  program, inputs = triton_test.on_device(triton_test.CASES[name], implementation="triton")
  return program, (inputs,)


def selected(name):
  program, inputs = mosaic_gpu_test.on_device(name)
  return program, (inputs,)


def paged(name):
  arguments, options, _ = paged_test.make(**paged_test.ON_DEVICE[name], dtype=jnp.bfloat16)
  return functools.partial(pk.paged_attention, implementation="triton", **options), arguments


def selections():
  rng, (B, T, K, H, size) = np.random.default_rng(0), (2, 333, 2, 64, 32)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  how = dict(segment_ids=triton_selections_test.drawn_segments(rng, B, T), implementation="triton")
  choice = dict(block_size=size, num_blocks=5, **how)
  strides = dict(block_len=16, block_stride=8)

  def f(q, k_cmp, q_idx, k_idx, scores):
    lse = jnp.zeros(q.shape[:3], jnp.float32)
    by_index = pk.index_top_k(q_idx, k_idx, **choice)
    loss = pk.index_kl(q, jnp.repeat(k_idx[:, :, None], K, axis=2), lse, q_idx, k_idx, by_index, block_size=size, **how)
    by_compression = pk.compressed_top_k(q, k_cmp, lse, **strides, **choice)
    return loss.sum(), (by_compression, pk.block_top_k(scores, keys=T, **choice))

  arguments = (draw(B, T, 3 * K, H), draw(B, (T - 16) // 8 + 1, K, H), draw(B, T, K, H), draw(B, T, H),
               draw(B, T, K, -(-T // size)))
  return jax.grad(f, (2, 3), has_aux=True), arguments


@triton.jit
def past_the_end(x, o, DISTANCE: tl.constexpr):
  i = tl.arange(0, 128)
  tl.store(o + i + DISTANCE, tl.load(x + i))


def planted(distance):
  one = jax.ShapeDtypeStruct((128,), jnp.float32)
  f = lambda x: call.kernel_call(past_the_end, (x,), one, grid=(1,), name="past_the_end", DISTANCE=distance)
  return f, (jnp.ones(128),)


CALLS = {**{f"triton_{name}": functools.partial(attention, name) for name in TRITON},
         **{f"mosaic_gpu_{name}": functools.partial(selected, name) for name in MOSAIC},
         **{f"paged_{name}": functools.partial(paged, name) for name in PAGED},
         "selections": selections}


def main(names):
  if names == ["--list"]:
    return print(*CALLS, "planted", sep="\n")
  for name in names or CALLS:
    start = time.time()
    bad = name.startswith("planted")
    function, arguments = planted(int(name.removeprefix("planted") or 2 ** 28)) if bad else CALLS[name]()
    jax.block_until_ready(jax.jit(function)(*arguments))
    print(f"{name}: {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
