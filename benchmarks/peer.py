"""NSA kernels of other packages beside ours: what benchmarks.kernels shows as the implementations `fla`,
flash-linear-attention's, and `cudnn_nsa`, cudnn-frontend's.

  pip install fla-core einops                       # beside torch and Triton; not needed by anything else here
  pip install 'nvidia-cudnn-frontend>=1.31'         # beside torch for CUDA 13; the same. 107 MiB with what it needs
  python -m benchmarks.kernels --operation=selected_attention,pooled_and_top_k --shapes=headline_g16,length

torch and jax do not share a process: benchmarks.kernels runs this file as a program, which draws the same block lists
(patterns are functions of the seed) and prints a row per line as JSON. By hand:

  python -m benchmarks.peer '{"operations": ["selected_attention"], "shapes": ["headline_g16"], "peers": ["cudnn_nsa"],
                                "patterns": ["uniform"], "seed": 0, "calls": 4, "repeats": 5}'

* `selected_attention` is `parallel_nsa` with the lists given, the mean pooling that it then does for nothing included;
  or `NSA.selection_attention_wrapper`, forward alone, its lists put in order and counted before the clock runs. From
  1.31 on it can hide keys behind the query in the query's own block; it takes groups up to 16 and blocks of 16 to 128.
* `pooled_and_top_k` is `parallel_nsa_compression` and `parallel_nsa_topk` over keys that are pooled already. There the
  package has one compressed key per selection block and forces the first block and the last two; hence the operation.

Times are medians over groups of calls between CUDA events, on inputs that take turns, after a first call for each that
compiles and chooses block shapes. Every result is compared with float32 attention at some queries, outputs, their
gradients in q and choices alike; a row that differs is refused as wrong. Shapes that the package does not serve carry
its own words. jax in the other process keeps 75 % of the memory: XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 leaves more.
"""
from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys

import numpy as np

from benchmarks import cases
from launch import cli
from pallas_kernels import arg_specs

PEERS = {"fla": ("fla", "torch"), "cudnn_nsa": ("cudnn", "cutlass", "torch")}  # name -> what it imports
OPERATIONS = ("selected_attention", "pooled_and_top_k")
REQUEST = ("operations", "shapes", "peers", "patterns", "seed", "calls", "repeats")
CHECKED = 32  # queries of the first sequence, in its second half
LARGEST_ERROR = 2e-2  # of outputs and gradients in bfloat16, relative, over all checked queries
LARGEST_CHOICE_ERROR = 5e-2  # of the attention that chosen blocks hold: scores come from rounded queries


def missing(peer):
  """None, or what is not installed."""
  names = [name for name in PEERS[peer] if importlib.util.find_spec(name) is None]
  return f"is not timed: {' and '.join(names)} not installed" if names else None


def measure(operations, shapes, patterns, seed, calls, repeats):
  """Rows as they come from the other process; none where all packages or the operations are missing."""
  peers = [peer for peer in PEERS if not missing(peer)]
  if not peers or not operations:
    return
  request = dict(operations=operations, shapes=shapes, patterns=patterns, seed=seed, calls=calls, repeats=repeats,
                 peers=peers)
  environment = dict(os.environ, JAX_PLATFORMS="cpu")
  # jax-triton 0.3 sets it to "" on import, and Triton then refuses to compile
  if not environment.get("TRITON_CACHE_DIR"):
    environment.pop("TRITON_CACHE_DIR", None)
  process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.peer", json.dumps(request)], stdout=subprocess.PIPE, text=True,
      cwd=pathlib.Path(__file__).parent.parent, env=environment)
  for line in process.stdout:
    if line.startswith("{"):
      yield json.loads(line)
  if process.wait():
    print(f"{', '.join(peers)}: the process ended with {process.returncode}; rows may be missing", file=sys.stderr)


def request_of(arguments):
  """The request of a command line. Raises ValueError where it is none, or asks for what there is not."""
  what = (f"benchmarks.peer takes one argument, a JSON object with {', '.join(REQUEST)}, as benchmarks.kernels writes "
          "it, which shows ours beside")
  if len(arguments) != 1:
    raise ValueError(f"{what}: there are {len(arguments)}")
  try:
    request = json.loads(arguments[0])
  except json.JSONDecodeError as error:
    raise ValueError(f"{what}: {arguments[0]!r} is none: {error}") from None
  lacking = [name for name in REQUEST if name not in request] if isinstance(request, dict) else REQUEST
  if lacking:
    raise ValueError(f"{what}: it lacks {', '.join(lacking)}")
  for kind, known in (("operations", OPERATIONS), ("peers", PEERS), ("shapes", arg_specs.ALL)):
    if not (isinstance(request[kind], list) and request[kind]):
      raise ValueError(f"{kind} = {request[kind]!r}: a list of some of {', '.join(known)}")
    for name in request[kind]:
      if name not in known:
        raise ValueError(f"{kind}: {name!r} is unknown; take some of {', '.join(known)}")
  for peer in request["peers"]:
    if missing(peer):
      raise ValueError(f"{peer} {missing(peer)}")
  return request


def main(request, device="cuda"):
  for peer in request["peers"]:
    packages = ("fla", "torch", "triton") if peer == "fla" else ("cudnn", "cutlass", "torch")
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    for name in request["shapes"]:
      for operation in request["operations"]:
        if (peer, operation) not in FUNCTIONS:
          continue
        for pattern in request["patterns"] if operation == "selected_attention" else ("",):
          row = dict(implementation=peer, operation=operation, shape=name, pattern=pattern, forward_ms=None,
                     both_ms=None, keys=None, refused=None, **versions)
          try:
            run(row, arg_specs.get(name), request, device)
          except Exception as error:  # an assertion of the package, memory, a kernel: the other rows go on
            row["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
          print(json.dumps(row), flush=True)


def run(row, spec, request, device):
  """Fills a row in, as far as it goes before an error."""
  import torch
  spec, patterned = cases.at(row["operation"], spec), row["operation"] == "selected_attention"
  prepare, function, differentiable = FUNCTIONS[row["implementation"], row["operation"]]
  sets, keys, given = [], [], None
  for i in range(2):
    lists = None
    if patterned:
      drawn = cases.draw_pattern(row["pattern"], spec, request["seed"] + i)
      keys.append(cases.visible_keys(drawn, spec))
      lists = torch.from_numpy(drawn).to(device)
    given = lists if i == 0 else given
    sets.append((*tensors(spec, request["seed"] + i, patterned, device), prepare(lists)))
  row["keys"] = float(np.mean(keys)) if keys else None

  def forward(q, k, v, do, lists):
    with torch.no_grad():
      return function(q, k, v, lists, spec)

  def both(q, k, v, do, lists):
    o, _ = function(q, k, v, lists, spec)
    return torch.autograd.grad(o, (q, k, v), do)

  clock = milliseconds if device == "cuda" else lambda *a: 0.0
  o, lists = forward(*sets[0])
  check(row, spec, (*sets[0][:4], given), patterned, lists, o)
  row["forward_ms"] = clock(forward, sets, request["calls"], request["repeats"])
  if differentiable:
    check(row, spec, (*sets[0][:4], given), patterned, None, o, both(*sets[0])[0])
    row["both_ms"] = clock(both, sets, request["calls"], request["repeats"])


def tensors(spec, seed, patterned, device):
  """q, k, v, do, standard normal; k and v of a query's tokens, or one per compressed block."""
  import torch
  generator = torch.Generator(device).manual_seed(seed)
  draw = lambda T, heads: torch.randn(spec.B, T, heads, spec.H, generator=generator, device=device,
                                      dtype=getattr(torch, spec.dtype))
  S = spec.T if patterned else -(-spec.T // spec.block_size)
  q, k, v = (draw(T, heads).requires_grad_() for T, heads in ((spec.T, spec.N), (S, spec.K), (S, spec.K)))
  return q, k, v, draw(spec.T, spec.N)


def selected(q, k, v, lists, spec):
  from fla.ops.nsa import parallel_nsa
  return parallel_nsa(q, k, v, block_indices=lists, block_counts=spec.J, block_size=spec.block_size), lists


def pooled(q, k, v, lists, spec):
  from fla.ops.nsa.compression import parallel_nsa_compression
  from fla.ops.nsa.parallel import parallel_nsa_topk
  del lists
  scale = spec.H ** -0.5
  o, lse = parallel_nsa_compression(q, k, v, spec.T, spec.block_size, scale)
  return o, parallel_nsa_topk(q.detach(), k.detach(), spec.T, lse.detach(), spec.J, spec.block_size, scale)


def in_order(lists):
  """(lists with the blocks in front, how many they are): int32[B, T, K, J] and [B, T, K]."""
  import torch
  last = torch.iinfo(lists.dtype).max
  found = torch.where(lists < 0, last, lists).sort(dim=-1).values
  return torch.where(found == last, 0, found).int().contiguous(), (lists >= 0).sum(dim=-1).int()


def selected_by_cudnn(q, k, v, lists, spec):
  """All sequences as one, packed, [tokens, heads, H]."""
  from cudnn import NSA
  import torch
  ends = torch.arange(spec.B + 1, dtype=torch.int32, device=q.device) * spec.T
  q, k, v, blocks, counts = (x.detach().flatten(0, 1) for x in (q, k, v, *lists))
  found = NSA.selection_attention_wrapper(
      q, k, v, blocks, counts, ends, ends, block_size=spec.block_size, scale_softmax=spec.H ** -0.5, max_s_q=spec.T,
      max_s_k=spec.T, is_causal=True)
  return found["o_tensor"].unflatten(0, (spec.B, spec.T)), lists


# (peer, operation) -> what is done to the lists before the clock runs, the function, whether it has a gradient.
FUNCTIONS = {("fla", "selected_attention"): (lambda lists: lists, selected, True),
             ("fla", "pooled_and_top_k"): (lambda lists: lists, pooled, True),
             ("cudnn_nsa", "selected_attention"): (in_order, selected_by_cudnn, False)}


def milliseconds(function, sets, calls, repeats):
  """Median time of a call between CUDA events, compilation and tuning excluded; benchmarks.timing's for torch."""
  import torch
  for arguments in sets:
    function(*arguments)
  times = []
  for _ in range(repeats):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(calls):
      function(*sets[i % len(sets)])
    stop.record()
    stop.synchronize()
    times.append(start.elapsed_time(stop) / calls)
  return statistics.median(times)


def check(row, spec, arguments, patterned, lists, o, dq=None):
  """Compares some queries with float32 attention. Raises ArithmeticError where the difference is more than rounding."""
  import torch
  q, k, v, do, given = arguments
  at = torch.linspace(spec.T // 2, spec.T - 1, CHECKED, device=q.device).long()
  if patterned:  # tokens of the listed blocks
    blocks = given[0, at].long()  # n, K, J
    tokens = blocks[..., None] * spec.block_size + torch.arange(spec.block_size, device=q.device)
    seen = ((blocks >= 0)[..., None] & (tokens <= at[:, None, None, None])).flatten(2)
    tokens = tokens.flatten(2).clamp(0, spec.T - 1)
  else:  # complete compressed blocks
    tokens = torch.arange(k.shape[1], device=q.device).expand(CHECKED, spec.K, -1)
    seen = (tokens + 1) * spec.block_size - 1 <= at[:, None, None]
  heads = torch.arange(spec.K, device=q.device)[:, None]
  keys, values = (x[0].detach()[tokens, heads].float() for x in (k, v))  # n, K, tokens, H
  queries = q[0].detach()[at].float().unflatten(1, (spec.K, -1)).requires_grad_()
  s = torch.einsum("nkgh,nkch->nkgc", queries, keys) * spec.H ** -0.5
  p = s.masked_fill(~seen[:, :, None], float("-inf")).softmax(dim=-1)
  want = torch.einsum("nkgc,nkch->nkgh", p, values)
  _compare(row, "o", o[0].detach()[at], want.detach())
  if dq is not None:
    cotangents = do[0, at].float().view_as(want)
    _compare(row, "dq", dq[0, at], torch.autograd.grad(want, queries, cotangents)[0])
  elif not patterned:
    _check_choice(row, spec, at, lists[0, at].long(), p.detach().sum(dim=2))


def _compare(row, what, got, want):
  error = float((got.float().flatten() - want.flatten()).norm() / want.norm())
  row[f"{what}_error"] = error
  if not error <= LARGEST_ERROR:
    raise ArithmeticError(f"wrong: {what} differs from float32 attention by {error:.3g} of its norm")


def _check_choice(row, spec, at, chosen, scores):
  """The forced blocks are chosen, and the free slots hold the mass of the best blocks, ties and rounding aside."""
  import torch
  own = (at // spec.block_size)[:, None, None]
  column = torch.arange(scores.shape[2], device=at.device)
  forced = ((column == 0) | (column == own) | (column == own - 1)).expand_as(scores)
  taken = torch.zeros_like(scores).scatter(2, chosen.clamp(0), 1.0)
  free = scores.masked_fill(forced | (column > own), 0.0)
  want = free.topk(min(spec.J - 3, free.shape[2])).values.sum(dim=-1)
  error = float((1 - (free * taken).sum(dim=-1) / want).max())
  row["choice_error"] = error
  if not (error <= LARGEST_CHOICE_ERROR and bool(taken[forced].all())):
    raise ArithmeticError(f"wrong: the chosen blocks hold {error:.3g} less than the best ones, or lack a forced one")


if __name__ == "__main__":
  cli.run(lambda arguments: main(request_of(arguments)), arguments=True)
