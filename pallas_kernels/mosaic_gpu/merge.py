"""Combines the partial results of a query: a gather of J rows per query, bound by memory bandwidth.

XLA reads the same bytes at half the speed, so this is written in instructions: each
thread owns 8 numbers (16 bytes) of a result, reads the same 8 of every slot and adds
them up in the order of the slots.

That is a thread's work for J slots however few are in use, and where blocks are shared few are: hot columns leave 1
of 16 (64/4 heads of 128, 32,768 tokens, one H200: 1.24 ms, whose bytes take 0.4). There `_by_lanes` shares the slots
out and walks those in use: 0.59 ms; neighbours that share 80 % 1.33 and 0.74, uniform choices, 11 in use, 2.08 and
1.75. Two of them at a time took 0.54, 0.76 and 1.80, eight 0.86, 0.95 and 1.82.
"""
from __future__ import annotations

import jax
from jax import lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.mosaic_gpu import ptx, shared_blocks

LN2 = 0.6931471805599453
VECTOR = 8  # numbers per thread
ROW_LANES, AT_ONCE = 16, 4  # threads per row that `_by_lanes` is made for; slots that it loads together
NAMES = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float16): "f16"}


def combine(rows, lse, position, plan, *, scale=1.0, shared=None):
  """Sums the rows of each query over its slots and parts.

  Args:
    rows: [parts, tiles * 64, H], bfloat16 or float16.
    lse: float32[tiles * 64], base-2 log-sum-exp of the rows (then the sum is weighted
      with their softmax over the slots, and parts is 1), or None.
    position: Entries.position, int32[B, T, K, J].
    plan: Plan.
    scale: factor of the result.
    shared: rows [tiles * 128, H] and lse of `shared_attention.attend`, one more slot of every query, or None; needs
      lse.

  Returns:
    [B, T, K, G, H] of the dtype of rows; with lse also float32[B, T, K, G], the natural
    log-sum-exp.
  """
  parts, padded_rows, H = rows.shape
  G = plan.group
  B, T, K, J = position.shape
  queries = B * T * K
  per_query = G * H // VECTOR
  threads = queries * per_query
  dtype = NAMES[jnp.dtype(rows.dtype)]
  outputs = [jax.ShapeDtypeStruct((queries * G, H), rows.dtype)]
  inputs = [rows.reshape(parts * padded_rows, H), position.reshape(-1)]
  if lse is not None:
    outputs.append(jax.ShapeDtypeStruct((queries * G,), jnp.float32))
    inputs.append(lse)
  if shared is not None:
    inputs += shared

  lanes = shared is not None and H == ROW_LANES * VECTOR

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()), [plgpu.RefType()] * len(refs)))
    def do(ctx, block, refs):
      del ctx
      addresses = list(map(ptx.global_address, refs))
      if lanes:
        _by_lanes(ptx.wide(block.registers.item()), addresses, plan, H, dtype)
        return
      rows, position, out = addresses[0], addresses[1], addresses[len(inputs)]
      sources = [rows] * J
      block = ptx.wide(block.registers.item())
      thread = ptx.add(ptx.mul(block, ptx.THREADS), arith.extui(ptx.i64(), ptx.thread()))
      # Threads past the end do the last one's work again.
      thread = ptx.choose(ptx.less(thread, threads), thread, threads - 1)
      query, piece = ptx.div(thread, per_query), ptx.rem(thread, per_query)
      member = ptx.div(piece, H // VECTOR)
      first = ptx.byte(position, ptx.mul(query, J), 4)
      places = [_load_i32(ptx.add(first, 4 * j)) for j in range(J)]
      firsts = [ptx.wide(place) for place in places]
      weights, factor = [None] * J, ptx.constant(float(scale))
      if lse is not None:
        sums, none = [], ptx.constant(-float("inf"))
        for place, begin in zip(places, firsts):
          valid = arith.cmpi(arith.CmpIPredicate.sge, place, ptx.constant(0))
          at = ptx.add(ptx.choose(valid, begin, 0), member)
          sums.append(arith.select(valid, _load_f32(ptx.byte(addresses[2], at, 4)), none))
        if shared is not None:
          row = _shared_row(plan, query)
          sums.append(_load_f32(ptx.byte(addresses[4], ptx.add(row, member), 4)))
          empty = arith.cmpf(arith.CmpFPredicate.OEQ, sums[-1], none)
          sources.append(addresses[3])
          firsts.append(row)
          places.append(ptx.choose(empty, ptx.constant(-1), 0))
        weights, total, log_sum = _softmax(sums)
        # Every thread of a row writes the same number.
        at = ptx.byte(addresses[-1], ptx.add(ptx.mul(query, G), member), 4)
        ptx.effect("st.global.f32 [$0], $1;", "l,f", at, log_sum)
        factor = arith.divf(factor, total)
      result = [ptx.constant(0.0)] * VECTOR
      for j, source in enumerate(sources):
        for part in range(parts):
          at = ptx.add(ptx.mul(firsts[j], H), ptx.mul(piece, VECTOR), part * padded_rows * H)
          for n, x in enumerate(_load_vector(ptx.byte(source, at, 2), places[j], dtype)):
            result[n] = arith.addf(result[n], x) if lse is None else _fma(x, weights[j], result[n])
      result = [arith.mulf(x, factor) for x in result]
      ptx.effect("st.global.v4.u32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r",
                 ptx.byte(out, ptx.mul(thread, VECTOR), 2), *_pack(result, dtype))

    do(lax.axis_index("block"), list(refs))

  outs = plgpu.kernel(
      body, out_type=tuple(outputs), grid=(-(-threads // ptx.THREADS),), grid_names=("block",),
      compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
      kernel_name="selected_attention_combine",
  )(*inputs)
  o = outs[0].reshape(B, T, K, G, H)
  return o if lse is None else (o, outs[1].reshape(B, T, K, G))


def _by_lanes(block, addresses, plan, H, dtype):
  """One thread's part where few slots are in use, since most blocks were shared: each of the 16 threads of a row looks
  after every 16th slot, and all walk those that are in use, in their order, `AT_ONCE` at a time."""
  G, J, count = plan.group, plan.slots, plan.batch * plan.queries * plan.kv_heads * plan.group
  rows, position, lse, shared_rows, shared_lse, out, out_lse = addresses
  none, zero, rounds = ptx.constant(-float("inf")), ptx.constant(0.0), -(-J // ROW_LANES)
  thread = ptx.thread()
  lane, half = ptx.rem(thread, ROW_LANES), ptx.mul(ptx.rem(ptx.div(thread, ROW_LANES), 2), ROW_LANES)
  row = ptx.add(ptx.mul(block, ptx.THREADS // ROW_LANES), arith.extui(ptx.i64(), ptx.div(thread, ROW_LANES)))
  row = ptx.choose(ptx.less(row, count), row, count - 1)  # past the end the last one again
  query, member = ptx.div(row, G), ptx.rem(row, G)
  places, sums = [], []
  for n in range(rounds):
    slot = ptx.add(lane, n * ROW_LANES)
    inside = ptx.less(slot, J)
    at = ptx.add(ptx.mul(query, J), arith.extui(ptx.i64(), ptx.choose(inside, slot, 0)))
    places.append(ptx.choose(inside, _load_i32(ptx.byte(position, at, 4)), -1))
    valid = arith.cmpi(arith.CmpIPredicate.sge, places[-1], ptx.constant(0))
    at = ptx.add(ptx.wide(ptx.choose(valid, places[-1], 0)), member)
    sums.append(arith.select(valid, _load_f32(ptx.byte(lse, at, 4)), none))
  common = _shared_row(plan, query)
  common_lse = _load_f32(ptx.byte(shared_lse, ptx.add(common, member), 4))
  here = ptx.choose(arith.cmpf(arith.CmpFPredicate.OEQ, common_lse, none), ptx.constant(-1), 0)
  within = ptx.add(ptx.mul(member, H), ptx.mul(arith.extui(ptx.i64(), lane), VECTOR))
  vector = lambda source, place, valid: _load_vector(
      ptx.byte(source, ptx.add(ptx.mul(place, H), within), 2), valid, dtype)
  common_vector = vector(shared_rows, common, here)

  top = sums[0]
  for x in sums[1:]:
    top = arith.maximumf(top, x)
  for offset in (8, 4, 2, 1):
    top = arith.maximumf(top, _from_lane("bfly", top, ptx.constant(offset)))
  top = arith.maximumf(top, common_lse)
  top = arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, top, none), zero, top)
  weights = [_exp2(arith.subf(x, top)) for x in sums]
  total = weights[0]
  for x in weights[1:]:
    total = arith.addf(total, x)
  for offset in (8, 4, 2, 1):
    total = arith.addf(total, _from_lane("bfly", total, ptx.constant(offset)))
  common_weight = _exp2(arith.subf(common_lse, top))
  total = arith.addf(total, common_weight)
  some = arith.cmpf(arith.CmpFPredicate.OGT, total, zero)
  total = arith.select(some, total, ptx.constant(1.0))
  log_sum = arith.addf(top, ptx.value("lg2.approx.f32 $0, $1;", "=f,f", total, result=ptx.f32()))
  ptx.effect("st.global.f32 [$0], $1;", "l,f", ptx.byte(out_lse, row, 4),
             arith.select(some, arith.mulf(log_sum, ptx.constant(LN2)), none))

  result = [zero] * VECTOR
  for place, weight in zip(places, weights):
    used = _there("{ .reg .pred p; setp.ge.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r", place)
    bits = lambda x: ptx.value("popc.b32 $0, $1;", "=r,r", x, result=ptx.i32())
    low, high = ptx.rem(used, 2 ** ROW_LANES), ptx.div(used, 2 ** ROW_LANES)
    longest = arith.maxsi(bits(low), bits(high))
    steps = arith.index_cast(ir.IndexType.get(), ptx.div(ptx.add(longest, AT_ONCE - 1), AT_ONCE))
    mine = arith.select(arith.cmpi(arith.CmpIPredicate.eq, half, ptx.constant(0)), low, high)
    number = lambda n: arith.constant(ir.IndexType.get(), n)
    loop = scf.ForOp(number(0), steps, number(1), [mine, *result])
    with ir.InsertionPoint(loop.body):
      left, *result = loop.inner_iter_args
      found = []
      for _ in range(AT_ONCE):
        lowest = ptx.value("{ .reg .b32 t; brev.b32 t, $1; clz.b32 $0, t; }", "=r,r", left, result=ptx.i32())
        there = arith.cmpi(arith.CmpIPredicate.ne, left, ptx.constant(0))
        source = ptx.add(half, ptx.choose(there, lowest, 0))
        its_place, its_weight = _from_lane("idx", place, source), _from_lane("idx", weight, source)
        valid = ptx.choose(there, its_place, -1)
        found.append((its_weight, vector(rows, ptx.wide(its_place), valid)))
        left = arith.andi(left, ptx.add(left, -1))
      for its_weight, numbers in found:
        result = [_fma(x, its_weight, y) for x, y in zip(numbers, result)]
      scf.YieldOp([left, *result])
    result = list(loop.results)[1:]
  result = [_fma(x, common_weight, y) for x, y in zip(common_vector, result)]
  result = [arith.mulf(x, arith.divf(ptx.constant(1.0), total)) for x in result]
  ptx.effect("st.global.v4.u32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r",
             ptx.byte(out, ptx.add(ptx.mul(query, G * H), within), 2), *_pack(result, dtype))


def _shared_row(plan, query):
  """The first of a query's rows among those of the shared blocks' tiles; `shared_blocks.first_rows` of one query."""
  T, K, tokens = plan.queries, plan.kv_heads, shared_blocks.tokens_of(plan)
  head, token = ptx.rem(query, K), ptx.div(query, K)
  batch, token = ptx.div(token, T), ptx.rem(token, T)
  tile = ptx.add(ptx.mul(ptx.add(ptx.mul(batch, K), head), shared_blocks.tiles_of(plan)), ptx.div(token, tokens))
  return ptx.add(ptx.mul(tile, shared_blocks.ROWS), ptx.mul(ptx.rem(token, tokens), plan.group))


def _there(text, constraints, *operands, result=None):
  """An instruction of all threads of a warp, which stays where it stands."""
  return llvm.inline_asm(ptx.i32() if result is None else result, list(operands), text, constraints,
                         has_side_effects=True)


def _from_lane(how, x, lane):
  """x of another thread of the warp."""
  kind = "f" if x.type == ptx.f32() else "r"
  return _there(f"shfl.sync.{how}.b32 $0, $1, $2, 0x1f, 0xffffffff;", f"={kind},{kind},r", x, lane, result=x.type)


def _exp2(x):
  return ptx.value("ex2.approx.ftz.f32 $0, $1;", "=f,f", x, result=ptx.f32())


def _softmax(sums):
  """Weights without their common denominator, that denominator (1 for 0), and the natural log of the sum."""
  none, zero = ptx.constant(-float("inf")), ptx.constant(0.0)
  top = sums[0]
  for x in sums[1:]:
    top = arith.maximumf(top, x)
  top = arith.select(arith.cmpf(arith.CmpFPredicate.OEQ, top, none), zero, top)
  weights = [_exp2(arith.subf(x, top)) for x in sums]
  total = weights[0]
  for weight in weights[1:]:
    total = arith.addf(total, weight)
  some = arith.cmpf(arith.CmpFPredicate.OGT, total, zero)
  total = arith.select(some, total, ptx.constant(1.0))
  log_sum = arith.addf(top, ptx.value("lg2.approx.f32 $0, $1;", "=f,f", total, result=ptx.f32()))
  return weights, total, arith.select(some, arith.mulf(log_sum, ptx.constant(LN2)), none)


def _load_i32(address):
  return ptx.value("ld.global.nc.s32 $0, [$1];", "=r,l", address, result=ptx.i32())


def _load_f32(address):
  return ptx.value("ld.global.nc.f32 $0, [$1];", "=f,l", address, result=ptx.f32())


def _load_vector(address, place, dtype):
  """8 numbers as float32; zeros, unread, where place < 0."""
  words = ptx.value(
      "{ .reg .pred p; setp.ge.s32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
      "@p ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4]; }",
      "=&r,=&r,=&r,=&r,l,r", address, place, result=(ptx.i32(),) * 4)
  convert = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.%s $0, l; cvt.f32.%s $1, h; }" % (dtype, dtype)
  return [x for word in words for x in ptx.value(convert, "=f,=f,r", word, result=(ptx.f32(),) * 2)]


def _pack(numbers, dtype):
  """float32 numbers to words of two each, rounded to nearest."""
  convert = f"cvt.rn.{dtype}x2.f32 $0, $1, $2;"
  pairs = zip(numbers[::2], numbers[1::2])
  return [ptx.value(convert, "=r,f,f", high, low, result=ptx.i32()) for low, high in pairs]


def _fma(x, y, z):
  return ptx.value("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", x, y, z, result=ptx.f32())
