"""How the kernels of this backend are called, under vmap too.

compiled.py makes calls that XLA records in its CUDA graphs. Where jaxlib lacks their target, and by
NSA_TRITON_CALL=jax_triton, jax-triton launches the same code outside of them; 0.3 (jax 0.10, Python 3.11) names the
results `out_shape`, 0.4 names them `out_type`, and `kernel_call` is the only place that knows. A differentiable
operation is a `jax.custom_vjp` whose forward and backward rules call functions wrapped by `batched`; vmap of a
custom_vjp maps the rules, and `batched` folds the mapped axis into the batch axis of the arrays.

With TRITON_INTERPRET=1 in the environment before triton is imported, kernels run in its interpreter on the
host, on torch tensors: how their arithmetic is tested without a GPU.
"""
from __future__ import annotations

import functools
import inspect
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends
from pallas_kernels.triton import compiled

ASSUMED_CAPABILITY = 90  # of the GPU when lowering for one on a machine that has none
processors = backends.processors
LOG2E = 1.4426950408889634
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
WAY = os.environ.get("NSA_TRITON_CALL", "recorded")


class Tiles(NamedTuple):
  """What a program does where it walks tiles: `count` of them of `rows` rows, with `warps` warps."""
  rows: int
  count: int
  warps: int


@functools.cache
def recorded():
  """Whether XLA records the calls of Triton kernels, or jax-triton launches them; the log says which."""
  reason = "" if WAY == "recorded" else f"NSA_TRITON_CALL={WAY}"
  if not reason and not compiled.target_is_there():
    reason = f"jaxlib {jax.lib.__version__} has no {compiled.TARGET}"
  backends.logger.info("Triton kernels: %s", f"launched by jax-triton, because {reason}" if reason
                       else "recorded in XLA's CUDA graphs")
  return not reason


@functools.cache
def unavailable():
  """None, or why no kernel of this backend can run here: for `supports`."""
  if INTERPRET:
    return None
  if WAY not in ("recorded", "jax_triton"):
    return f"NSA_TRITON_CALL={WAY} is neither recorded nor jax_triton"
  from jaxlib import gpu_triton
  if not hasattr(gpu_triton, "TritonKernel"):
    return "jaxlib has no CUDA plugin, which runs Triton kernels: pip install 'jax[cuda13]'"
  if not recorded():
    try:
      import jax_triton
    except Exception as error:
      return f"jax-triton does not import ({type(error).__name__}: {error})"
    if not hasattr(jax_triton, "triton_call"):
      return "jax-triton has no triton_call"
  device = jax.devices()[0]
  if device.platform == "gpu" and capability() < 80:
    return f"q is on {device.device_kind}: the kernels need compute capability 8.0 or more"
  return None


def capability():
  """Compute capability of the default GPU times ten, e.g. 90; ASSUMED_CAPABILITY without a GPU."""
  text = str(getattr(jax.devices()[0], "compute_capability", ""))
  major, _, minor = text.partition(".")
  return 10 * int(major) + int(minor or 0) if major.isdigit() else ASSUMED_CAPABILITY


def small_memory():
  """Whether a thread block has 99 KiB of shared memory (GeForce, RTX and L chips), not 163 or more."""
  return capability() in (86, 89, 120)


def kernel_call(kernel, inputs, outputs, *, grid, name, num_warps=4, num_stages=2, **constants):
  """Runs a Triton kernel.

  Args:
    kernel: a triton.jit function of the pointers of `inputs`, the pointers of `outputs`, then constexprs.
      Numbers are constexprs as well: jax-triton 0.3 would pass a float as float64.
    inputs: arrays, C-contiguous inside the kernel. None is not allowed: pass any array and a constant that
      says that it is not read.
    outputs: jax.ShapeDtypeStruct or a list or tuple of them. Memory comes uninitialised.
    grid: up to three ints; the first may be as large as 2^31 - 1, the others 65,535.
    name: in profiles and in lowered text.
    num_warps, num_stages: of the Triton compiler.
    **constants: the kernel's constexprs.

  Returns:
    Arrays as `outputs`.
  """
  if INTERPRET:
    return _interpret(kernel, inputs, outputs, grid, constants)
  if recorded():
    single = hasattr(outputs, "shape")
    results = compiled.call(kernel, inputs, [outputs] if single else outputs, grid=grid, name=name, num_warps=num_warps,
                            num_stages=num_stages, capability=capability(), constants=constants)
    return results[0] if single else type(outputs)(results)
  import jax_triton
  results = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
  return jax_triton.triton_call(
      *inputs, kernel=kernel, grid=tuple(grid), name=name, num_warps=num_warps, num_stages=num_stages,
      compute_capability=capability(), **{results: outputs}, **constants)


def _interpret(kernel, inputs, outputs, grid, constants):
  import torch
  listed = [outputs] if hasattr(outputs, "shape") else list(outputs)

  def tensor(x):
    if x.dtype == jnp.bfloat16:
      return torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))

  def run(*arrays):
    # Poisoned: what a kernel forgets to write shows.
    results = [tensor(np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -7, x.dtype))
               for x in listed]
    kernel[tuple(grid)](*map(tensor, arrays), *results, **constants)
    back = lambda t, x: t.view(torch.int16).numpy().view(x.dtype) if x.dtype == jnp.bfloat16 else t.numpy()
    return tuple(back(t, x) for t, x in zip(results, listed))

  out = jax.pure_callback(run, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in listed), *inputs)
  return out[0] if hasattr(outputs, "shape") else list(out)


def batched(function, laid_out=()):
  """`function` with a batching rule: a mapped axis is folded into the first axis of every array.

  Args:
    function: of arrays (pytrees, None allowed) that all have a first axis of the same length B, to arrays
      that have it too, where results of one batch entry depend on that entry alone.
    laid_out: arguments, by number, single arrays whose order inside depends on the whole batch: they have a first
      axis of length B that may be folded, but repeating them would be wrong. `function` gets None instead.

  Returns:
    The same function; arrays that vmap does not map are repeated.
  """
  @jax.custom_batching.custom_vmap
  def call(*args):
    return function(*args)

  @call.def_vmap
  def rule(axis_size, in_batched, *args):
    def fold(x, mapped):
      x = x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(axis_size * x.shape[1], *x.shape[2:])

    args, in_batched = list(args), list(in_batched)
    for n in laid_out:
      if not in_batched[n]:
        args[n] = in_batched[n] = None
    results = call(*jax.tree.map(fold, args, in_batched))
    results = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
    return results, jax.tree.map(lambda _: True, results)

  return call


def differentiable(forward, backward):
  """`attend(q, k, v, rest, how)` -> (o, lse), of forward(q, k, v, rest, how) and of backward(q, k, v, rest, o, lse, do,
  dlse, how) -> (dq, dk, dv), both `batched`; `rest` is a tree without gradient, `how` is hashable."""
  @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
  def attend(q, k, v, rest, how):
    return batched(lambda *arrays: forward(*arrays, how))(q, k, v, rest)

  def forward_rule(q, k, v, rest, how):
    o, lse = backends.attended(attend(q, k, v, rest, how))
    return (o, lse), (q, k, v, rest, o, lse)

  def backward_rule(how, residuals, cotangents):
    gradients = batched(lambda *arrays: backward(*arrays, how))(*residuals, *cotangents)
    return *gradients, backends.no_gradient(residuals[3])

  attend.defvjp(forward_rule, backward_rule)
  return attend


def one_by_one(function):
  """`function` of arrays with a batching rule: mapped calls are made one after the other."""
  @jax.custom_batching.custom_vmap
  def call(*args):
    return function(*args)

  @call.def_vmap
  def rule(axis_size, in_batched, *args):
    fold = lambda x, mapped: x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
    out = jax.lax.map(lambda xs: call(*xs), tuple(map(fold, args, in_batched)))
    return out, jax.tree.map(lambda _: True, out)

  return call


def padded_head_dim(H):
  """What kernels get for a head dim: `tl.arange` counts to powers of two alone, a product needs 16."""
  return max(next_power_of_2(H), 16) if H <= 256 else H


def next_power_of_2(n):
  return 1 << (n - 1).bit_length()
