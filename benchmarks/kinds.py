"""A trace of a step as milliseconds by kind of kernel: which of our kernels, products, reductions, copies, the rest.

The kind is told by the kernel's name, which XLA makes of the operations that it fused. What one kernel fuses counts
once, for the first pattern that fits.
"""
from __future__ import annotations

import collections
import re

from nsa.look import profile

# Names of pallas_kernels' kernels: `kernel_name` and `name`, in traces also those of Triton's functions.
OWN = re.compile(r"(range_attention|selected_attention|paged_attention|index_kl|sum_units|compressed_scores|"
                 r"index_scores|choose_blocks)\w*|^[a-z_]+_kernel(?=(_\d+)?$)")
KINDS = (
    ("attention of cuDNN", r"cudnn|fmha|flash_(fprop|bprop)|sdpa"),
    ("sorts", r"sort|radix|onesweep"),
    ("products", r"gemm|cublas|cutlass|nvjet|xmma|convolution|^dot|_dot"),
    ("stacking and slicing", r"dynamic[_-](update[_-])?slice"),
    ("scatters and gathers", r"scatter|gather"),
    ("reductions", r"reduce|norm|softmax|logsumexp"),
    ("copies and transposes", r"memcpy|memset|copy|transpose|concatenate|pad|broadcast"),
    ("collectives", r"nccl|all[_-](reduce|gather)|collective"),
)


def kind(kernel: str) -> str:
  """Our kernels by their own names, others by what they do."""
  own = OWN.search(kernel)
  if own:
    return own.group(0)
  return next((name for name, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)),
              "elementwise and the rest")


def milliseconds(directory: str) -> dict[str, float]:
  """{kind: milliseconds} of the trace in `directory`, all steps added up, longest first. ValueError without a trace."""
  total = collections.Counter()
  for kernel, ms in profile.operations(directory, kernels=True).items():
    total[kind(kernel)] += ms
  return dict(total.most_common())
