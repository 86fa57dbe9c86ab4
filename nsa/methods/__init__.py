"""Attention methods, one file each, and their registry.

| method | what it adds to dense | how gradient reaches the selector | file |
|---|---|---|---|
| dense | nothing | - | dense.py |
| msa | index query per KV head, one index key | KL to the main attention's own distribution | msa.py |
| nsa | K, V per branch, compression MLP, gates | through the compressed branch's output | nsa.py |
| block_topk | nothing (mean-pooled keys) | none: keys and queries learn through the blocks that were chosen | training_free.py |
| sink_window, random, oracle | nothing | none | training_free.py |
"""
from __future__ import annotations

import dataclasses

from nsa.methods import blocks
from nsa.methods.dense import Dense
from nsa.methods.interface import Call, Inputs, Layer, Method, Result
from nsa.methods.msa import MSA
from nsa.methods.nsa import NSA
from nsa.methods.training_free import SELECTORS, BlockTopK, Oracle, RandomBlocks, SinkWindow

_METHODS = {cls.name: cls for cls in (Dense, MSA, NSA, BlockTopK, SinkWindow, RandomBlocks, Oracle)}

# Ways to run a trained model: dense, with its own selector, or with a training-free one in its place.
RUN_MODES = ("dense", "sparse") + tuple(SELECTORS)


def get(name: str) -> type[Method]:
  """The options dataclass of a method. Raises ValueError for an unknown name."""
  if name not in _METHODS:
    raise ValueError(f"attention method = {name!r}: no such method; known are {', '.join(sorted(_METHODS))}")
  return _METHODS[name]


def parse_run_mode(text: str) -> tuple[str, dict[str, int]]:
  """"sparse:num_blocks=8" -> ("sparse", {"num_blocks": 8}). Raises ValueError naming what is wrong."""
  name, _, rest = text.partition(":")
  if name not in RUN_MODES:
    raise ValueError(f"one of {', '.join(RUN_MODES)}, not {name!r}")
  fields = {f.name for f in dataclasses.fields(blocks.BlockMethod)}
  options = {}
  for part in filter(None, rest.split(",")):
    key, _, value = part.partition("=")
    if key not in fields or not value.isdecimal():
      raise ValueError(f"{part!r} is no option; write name=number with {', '.join(sorted(fields))}")
    options[key] = int(value)
  if name == "dense" and options:
    raise ValueError("a dense run has no geometry")
  return name, options
