"""Operation, shape and chip to a prediction."""
from __future__ import annotations

from pallas_kernels.cost import hopper, tpu
from pallas_kernels.cost.chips import Prediction

_RUNS = {"attention": "dense", "window_attention": "window", "compressed_attention": "compressed"}
OPERATIONS = (*_RUNS, "compressed_top_k", "index_top_k", "selected_attention")
FORWARD_ONLY = ("compressed_top_k", "index_top_k")


def predict(operation, spec, chip, *, indices=None, backward=False, **options):
  """What an operation takes at the least.

  Args:
    operation: one of `OPERATIONS`; "window_attention" is `attention` with the spec's window.
    spec: `arg_specs.AttentionSpec`.
    chip: Chip.
    indices: int[B, T, K, J], for selected_attention; see the patterns of `arg_specs`.
    backward: the backward pass alone instead of the forward pass.
    options: of `hopper.selected_attention`.

  Raises:
    ValueError: for an unknown operation, selections without a backward pass, or indices that are missing.
  """
  if operation not in OPERATIONS:
    raise ValueError(f"operation = {operation!r}: take one of {', '.join(OPERATIONS)}")
  if backward and operation in FORWARD_ONLY:
    raise ValueError(f"operation = {operation!r} has no backward pass: selections are not differentiated")
  module = tpu if chip.platform == "tpu" else hopper
  if operation in _RUNS:
    kernels = module.run_attention(spec, chip, _RUNS[operation], backward)
  elif operation == "selected_attention":
    if indices is None:
      raise ValueError("selected_attention: indices = None; pass a pattern of block indices of the spec")
    kernels = module.selected_attention(spec, chip, indices, backward, **options)
  else:
    kernels = getattr(module, operation)(spec, chip)
  return Prediction(tuple(kernels), chip)
