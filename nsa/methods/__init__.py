"""Attention methods, one file each, and their registry.

| method | learns besides q, k, v | gradient to the selector | selector's FLOPs | a retrofit adds | source |
|---|---|---|---|---|---|
| dense | nothing | - | - | - | 1706.03762 |
| msa | index query per KV head, index key | KL to attention of the group | 2 K Hi t | selector | 2606.13392 |
| nsa | K, V per branch, compression, gates | LM loss by compressed branch | 6 N H t / d + MLP | branch | 2502.11089 |
| dsa | ReLU-weighted index heads, index key | KL to attention of all heads | 2 HI (dI + 1) t | selector | 2512.02556 |
| seer | gate per KV head on q, pooled k | KL to a block's largest attention | 2 K d t / block | selector | 2506.08889 |
| moba | nothing (option: taps on keys) | none; q, k learn in chosen blocks | 2 N H t / block | nothing | 2502.13189 |
| infllm_v2 | nothing (overlapping mean keys) | none; q, k learn in chosen blocks | 4 N H t / s | nothing | 2509.24663 |
| ssa | nothing (mean keys) | none; a loss draws dense and sparse together | 2 K H t / block | nothing | 2511.20102 |
| block_topk | nothing (mean keys) | none; q, k learn in chosen blocks | 2 K H t / block | nothing | 2502.13189 |
| sink_window, random, oracle | nothing | none | 0, 0, 2 N H t | nothing | training_free.py |
| quest | nothing (smallest and largest keys of pages) | as block_topk | 4 K H t / block | nothing | 2406.10774 |
| minference_blocks | nothing; once per prompt | no training | 2 K H t / block^2 | nothing | 2407.02490 |
| vertical_slash | nothing; once per prompt | no training | 2 N H W | nothing | 2407.02490 |
| flexprefill | nothing; once per prompt, adaptive | no training | 2 N H W | nothing | 2502.20766 |
| xattention | nothing; once per prompt, adaptive | no training | 2 N H t / stride | nothing | 2503.16428 |
| snapkv | nothing; evicts at the prompt's end | no training | 2 N H W | nothing | 2404.14469 |
| window | nothing (the last tokens) | - | - | nothing | 2004.05150 |
| mag, mal | an MLP's initial weights, their gates, q, k, v of its own | LM loss through its updates | - | memory | 2501.00663 |
| mac | the same, and keys and values of what it recalls | LM loss through its updates | - | memory | 2501.00663 |
| lmm | an MLP's initial weights, gates; no attention | LM loss through its updates | - | memory | 2501.00663 |

Letters as in pallas_kernels; Hi, HI, dI, d are the methods' own widths and strides. FLOPs are per query and layer,
forward, t being the tokens that the query may see; the attention over what was selected costs 4 N H J block besides,
dense attention 4 N H t. "A retrofit adds" names the parameter group that a dense trunk lacks (nsa/optim.py): it keeps
its initial values until the fork. Sources are arXiv numbers. What chooses once per prompt (with its last W queries)
runs trained models and does not train: prompt/base.py says why.
"""
from __future__ import annotations

import dataclasses

from nsa.methods import blocks
from nsa.methods.dense import Dense
from nsa.methods.dsa import DSA
from nsa.methods.infllm_v2 import InfLLMV2
from nsa.methods.interface import Call, Inputs, Layer, Method, Result
from nsa.methods.moba import MoBA
from nsa.methods.msa import MSA
from nsa.methods.nsa import NSA
from nsa.methods.prompt.base import PromptMethod
from nsa.methods.prompt.flexprefill import FlexPrefill
from nsa.methods.prompt.minference import MInferenceBlocks, VerticalSlash
from nsa.methods.prompt.snapkv import SnapKV
from nsa.methods.prompt.xattention import XAttention
from nsa.methods.seer import Seer
from nsa.methods.ssa import SSA
from nsa.methods.titans.lmm import LMM
from nsa.methods.titans.mac import MAC
from nsa.methods.titans.mag import MAG
from nsa.methods.titans.mal import MAL
from nsa.methods.training_free import SELECTORS, BlockTopK, Oracle, Quest, RandomBlocks, SinkWindow
from nsa.methods.window import Window

_METHODS = {cls.name: cls for cls in (Dense, MSA, NSA, DSA, Seer, MoBA, InfLLMV2, SSA, BlockTopK, SinkWindow,
                                       RandomBlocks, Oracle, Quest, MInferenceBlocks, VerticalSlash, FlexPrefill,
                                       XAttention, SnapKV, Window, MAG, MAL, MAC, LMM)}

# Ways to run a trained model: dense, with its own selector, with a training-free one in its place, or with dense
# attention thinned out by a method that chooses once per prompt.
RUN_MODES = ("dense", "sparse") + tuple(SELECTORS) + tuple(n for n, cls in _METHODS.items() if issubclass(cls, PromptMethod))


def register(cls: type[Method]) -> type[Method]:
  """Makes a method known by its name, so that configs, checkpoints and reports find it; usable as a decorator.

  Raises ValueError if it has no name of its own.
  """
  if not cls.name or _METHODS.get(cls.name, cls).__qualname__ != cls.__qualname__:
    raise ValueError(f"{cls.__name__}.name = {cls.name!r}: empty or taken; give the method a name of its own")
  _METHODS[cls.name] = cls
  return cls


def get(name: str) -> type[Method]:
  """The options dataclass of a method. Raises ValueError for an unknown name."""
  if name not in _METHODS:
    raise ValueError(f"attention method = {name!r}: no such method; known are {', '.join(sorted(_METHODS))}")
  return _METHODS[name]


def run_mode_fields(name: str) -> dict[str, type]:
  """The options that a run mode takes, and their types: a prompt method's own, or the geometry of blocks."""
  cls = _METHODS.get(name)
  cls = cls if cls is not None and issubclass(cls, PromptMethod) else blocks.BlockMethod
  return {f.name: f.type for f in dataclasses.fields(cls)}


def parse_run_mode(text: str) -> tuple[str, dict[str, int | float]]:
  """"sparse:num_blocks=8" -> ("sparse", {"num_blocks": 8}). Raises ValueError naming what is wrong."""
  name, _, rest = text.partition(":")
  if name not in RUN_MODES:
    raise ValueError(f"one of {', '.join(RUN_MODES)}, not {name!r}")
  fields = run_mode_fields(name)
  options = {}
  for part in filter(None, rest.split(",")):
    key, _, value = part.partition("=")
    try:
      if key not in fields or value[:1] == "-":
        raise ValueError
      options[key] = fields[key](value)
    except ValueError:
      raise ValueError(f"{part!r} is no option; write name=number with {', '.join(sorted(fields))}") from None
  if name == "dense" and options:
    raise ValueError("a dense run has no geometry")
  return name, options
