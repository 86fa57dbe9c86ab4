"""Times of device work: medians, by kind of kernel, what devices reach at best; and rows of them, written."""
from __future__ import annotations

import collections
import json
from pathlib import Path
import re
import statistics
import time

import jax

from nsa.look import profile

CEILINGS = {  # device -> bfloat16 FLOP/s of a large product and bytes/s of a large copy, both measured
    "NVIDIA H200": (790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": (778e12, 3.0e12),
}


def milliseconds(function, argument_sets, calls, repeats):
  """Median time of a call, in ms, over inputs that take turns; compilation excluded."""
  for arguments in argument_sets:
    jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    for i in range(calls):
      out = function(*argument_sets[i % len(argument_sets)])
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls * 1e3)
  return statistics.median(times)


def numbers(flag: str, text: str, form: str, example: str) -> tuple[int, ...]:
  """Those of "8x4096", whose form is "SEQUENCESxTOKENS". Raises ValueError for another one."""
  found = re.fullmatch(re.sub("[A-Z_]+", r"([1-9]\\d*)", form), text)
  if found is None:
    raise ValueError(f"{flag}: {text!r}; take {form}, as {example}")
  return tuple(map(int, found.groups()))


def counts(flag: str, texts: list[str]) -> list[int]:
  """What a list flag of whole numbers above 0 holds."""
  return [numbers(flag, text, "NUMBER", "8")[0] for text in texts]


def write(path: str | None, rows) -> None:
  """The rows so far as JSON, if there is a path; after each row, so that what was measured stays if a later one
  fails."""
  if path:
    Path(path).write_text(json.dumps(rows, indent=1))


def of_error(error: Exception) -> str:
  """What a row says that could not be measured: memory, a shape that an implementation refuses. Other rows go on."""
  return f"{type(error).__name__}: {str(error)[:300]}"


# Names of pallas_kernels' kernels: `kernel_name` and `name`, in traces also those of Triton's functions.
OWN = re.compile(r"(range_attention|selected_attention|paged_attention|token_attention|index_kl|lightning|block_mass|"
                 r"block_peak|sum_units|compressed_scores|index_scores|token_scores|choose_blocks|choose_tokens)\w*|"
                 r"^[a-z_]+_kernel(?=(_\d+)?$)")
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
  """Our kernels by their own names, others by what they do: XLA names a kernel after the operations that it fused. What
  one kernel fuses counts once, for the first pattern that fits."""
  own = OWN.search(kernel)
  if own:
    return own.group(0)
  return next((name for name, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)),
              "elementwise and the rest")


def by_kind(directory: str) -> dict[str, float]:
  """{kind: milliseconds} of the trace in `directory`, all steps added up, longest first. ValueError without a trace."""
  total = collections.Counter()
  for kernel, ms in profile.operations(directory, kernels=True).items():
    total[kind(kernel)] += ms
  return dict(total.most_common())
