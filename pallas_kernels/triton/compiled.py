"""A Triton kernel as a call in an XLA program: Triton compiles it when the program is lowered, jaxlib launches it.

The call is one that XLA records in its CUDA graphs, and what ptxas makes of a kernel is part of the compiled program,
so of JAX's compilation cache. Triton keeps what it made on disk (TRITON_CACHE_DIR): another process reads it.
"""
from __future__ import annotations

import functools
import tempfile
import zlib

import jax
import jax.extend as jex
from jax.interpreters import mlir, xla

from pallas_kernels import backends

_POINTERS = {"bool": "*i1", "bfloat16": "*bf16",
             **{f"{dtype}{bits}": f"*{short}{bits}" for dtype, short in (("float", "fp"), ("int", "i"), ("uint", "u"))
                for bits in (8, 16, 32, 64)}}

TARGET = "triton_kernel_call_ffi"  # jaxlib's, which XLA can record
_call = jex.core.Primitive("triton_kernel_call")
_call.multiple_results = True
_call.def_impl(functools.partial(xla.apply_primitive, _call))
_call.def_abstract_eval(lambda *_, outputs, **__: [jax.core.ShapedArray(x.shape, x.dtype) for x in outputs])


def target_is_there() -> bool:
  """Whether this jaxlib's CUDA plugin has the target of these calls."""
  from jaxlib import gpu_triton
  return TARGET in getattr(gpu_triton._cuda_triton, "registrations", dict)()


def call(kernel, inputs, outputs, *, grid, name, num_warps, num_stages, capability, constants):
  """Arrays as `outputs`, a list; capability: of the GPU, times ten; all else as in `call.kernel_call`."""
  return _call.bind(*inputs, kernel=kernel, outputs=tuple(outputs), grid=(*grid, 1, 1)[:3], name=name,
                    num_warps=num_warps, num_stages=num_stages, capability=capability,
                    constants=tuple((at, type(x).__name__, x) for at, x in sorted(constants.items())))


@functools.cache
def _own_cache():
  """Of this process, gone with it."""
  return tempfile.TemporaryDirectory(prefix="triton-")


@functools.cache
def compiled(kernel, pointers, constants, num_warps, num_stages, capability):
  """What Triton makes of a kernel: `pointers` are types of arrays that begin at multiples of 16 bytes, `constants`
  (name, name of its type, value) each, as Python takes 1, 1.0 and True for one key.

  Raises NotImplementedError for one that needs scratch memory: jaxlib passes null pointers for that.
  """
  import triton
  from triton.backends.compiler import GPUTarget
  signature = dict(zip(kernel.arg_names, pointers)) | {name: "constexpr" for name, *_ in constants}
  aligned = {(n,): [["tt.divisibility", 16]] for n in range(len(pointers))}
  values = {name: value for name, _, value in constants}
  make = lambda: triton.compile(triton.compiler.ASTSource(kernel, signature, values, aligned),
                                target=GPUTarget("cuda", capability, 32),
                                options=dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True))
  try:
    made = make()
  except OSError as error:
    triton.knobs.cache.dir = _own_cache().name
    backends.logger.warning("Triton's cache (TRITON_CACHE_DIR) cannot be used, %s takes its place: %s",
                            triton.knobs.cache.dir, error)
    made = make()
  scratch = made.metadata.global_scratch_size + made.metadata.profile_scratch_size
  if scratch:
    raise NotImplementedError(f"{made.name} needs {scratch} bytes of scratch memory, which kernels do not get here: "
                              "write it without tensor descriptors made on the device, without a profiler's marks")
  return made


def _lower(ctx, *operands, kernel, outputs, grid, name, num_warps, num_stages, capability, constants):
  from jaxlib import gpu_triton
  pointers = tuple(_POINTERS[x.dtype.name] for x in (*ctx.avals_in, *outputs))
  made = compiled(kernel, pointers, constants, num_warps, num_stages, capability)
  code = gpu_triton.TritonKernel(made.name, num_warps, 1, made.metadata.shared, made.asm["ptx"], "", capability)
  array = gpu_triton.create_array_parameter(0, 16)  # not zeroed before; begins at a multiple of 16 bytes
  launch = gpu_triton.TritonKernelCall(code, *grid, [array] * len(pointers)).to_proto(name, b"")
  return jax.ffi.ffi_lowering(TARGET)(ctx, *operands, opaque=zlib.compress(launch))


mlir.register_lowering(_call, _lower, platform="cuda")
