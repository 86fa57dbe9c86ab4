"""Small words for kernels that are written in instructions, inside `plgpu.inline_mgpu`."""
from __future__ import annotations

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu as gpu_dialect, llvm, memref

THREADS = 128  # of a warpgroup


def i32():
  return ir.IntegerType.get_signless(32)


def i64():
  return ir.IntegerType.get_signless(64)


def f32():
  return ir.F32Type.get()


def constant(value, ty=None):
  """A constant of type ty, int32 if none is given, float32 for a float."""
  if isinstance(value, float):
    return arith.constant(f32(), ir.FloatAttr.get(f32(), value))
  ty = i32() if ty is None else ty
  return arith.constant(ty, ir.IntegerAttr.get(ty, value))


def _like(x, y):
  return constant(y, x.type) if isinstance(y, int) else y


def add(x, *others):
  """x + ..., of integers; Python numbers take x's type, here and below."""
  for y in others:
    x = arith.addi(x, _like(x, y))
  return x


def mul(x, y):
  return arith.muli(x, _like(x, y))


def div(x, y):
  """x / y, both taken as unsigned."""
  return arith.divui(x, _like(x, y))


def rem(x, y):
  return arith.remui(x, _like(x, y))


def less(x, y):
  return arith.cmpi(arith.CmpIPredicate.slt, x, _like(x, y))


def choose(condition, x, y):
  """x where the condition holds, else y."""
  return arith.select(condition, x, _like(x, y))


def wide(x):
  """int32 to int64, with its sign."""
  return arith.extsi(i64(), x)


def effect(text, constraints="", *operands):
  """An instruction without a result that must stay where it stands."""
  llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def value(text, constraints, *operands, result):
  """An instruction without side effects; `result` is a type, or a tuple of types for a list of values."""
  if isinstance(result, tuple):
    struct = llvm.StructType.get_literal(list(result))
    values = llvm.inline_asm(struct, list(operands), text, constraints, has_side_effects=False)
    return [llvm.extractvalue(ty, values, [i]) for i, ty in enumerate(result)]
  return llvm.inline_asm(result, list(operands), text, constraints, has_side_effects=False)


def thread():
  """int32: the thread's number in its warpgroup."""
  return rem(arith.index_cast(i32(), gpu_dialect.thread_id(gpu_dialect.Dimension.x)), THREADS)


def global_address(ref):
  return llvm.ptrtoint(i64(), mgpu_utils.memref_ptr(ref))


def shared_address(ref):
  return llvm.ptrtoint(i32(), mgpu_utils.memref_ptr(ref))


def byte(address, element, size):
  """The int64 address of an element of `size` bytes."""
  return add(address, mul(element, size))


def warpgroup_barrier():
  mgpu_utils.warpgroup_barrier()


def load(ref, index):
  """ref[index] of a reference with one dimension."""
  return memref.load(ref, [arith.index_cast(ir.IndexType.get(), index)])


def store(value_, ref, index):
  """ref[index] = value_."""
  memref.store(value_, ref, [arith.index_cast(ir.IndexType.get(), index)])
