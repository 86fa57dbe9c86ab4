"""Attention methods, one file each, and their registry.

| method | learns besides q, k, v | gradient to the selector | selector's FLOPs | a retrofit adds | source |
|---|---|---|---|---|---|
| dense | nothing | - | - | - | 1706.03762 |
| msa | index query per KV head, index key | KL to attention of the group | 2 K Hi t | selector | 2606.13392 |
| gated | the same, a gain per KV head | LM loss by the logits of what was chosen | 2 K Hi t | selector | 2609.13141 |
| msa_shared | the same as msa in every p-th layer | KL of that layer | 2 K Hi t / p | selector | 2608.01662 |
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
| mag, mal | an MLP's first weights, gates, q, k, v of its own | LM loss through its updates | - | memory | 2501.00663 |
| mac | the same, and keys and values of what it recalls | LM loss through its updates | - | memory | 2501.00663 |
| lmm | an MLP's initial weights, gates; no attention | LM loss through its updates | - | memory | 2501.00663 |

Letters as in pallas_kernels; Hi, HI, dI, d are the methods' own widths and strides. FLOPs are per query and layer,
forward, t being the tokens that the query may see; the attention over what was selected costs 4 N H J block besides,
dense attention 4 N H t. "A retrofit adds" names the parameter group that a dense trunk lacks (interface.GROUPS): it
keeps its initial values until the fork. Sources are arXiv numbers. What chooses once per prompt (with its last W
queries) runs trained models and does not train: prompt/base.py says why.
"""
from __future__ import annotations

# ruff: noqa: F401  (what the package offers as its own)
from nsa.methods import blocks, interface, registry
from nsa.methods.contract import ContractError, build
from nsa.methods.dense import Dense
from nsa.methods.dsa import DSA
from nsa.methods.gated import Gated
from nsa.methods.infllm_v2 import InfLLMV2
from nsa.methods.interface import CHOSEN, GROUPS, MODES, Call, Cost, Inputs, Layer, Loss, Method, Result, Stream
from nsa.methods.moba import MoBA
from nsa.methods.msa import MSA
from nsa.methods.msa_shared import SharedMSA
from nsa.methods.nsa import NSA
from nsa.methods.prompt.base import PromptMethod
from nsa.methods.prompt.flexprefill import FlexPrefill
from nsa.methods.prompt.minference import MInferenceBlocks, VerticalSlash
from nsa.methods.prompt.snapkv import SnapKV
from nsa.methods.prompt.xattention import XAttention
from nsa.methods.registry import get, register
from nsa.methods.run_modes import parse_run_mode, run_mode_fields
from nsa.methods.seer import Seer
from nsa.methods.ssa import SSA
from nsa.methods.titans.lmm import LMM
from nsa.methods.titans.mac import MAC
from nsa.methods.titans.mag import MAG
from nsa.methods.titans.mal import MAL
from nsa.methods.training_free import BlockTopK, Oracle, Quest, RandomBlocks, SinkWindow, TrainingFree
from nsa.methods.window import Window

for _method in (Dense, MSA, Gated, SharedMSA, NSA, DSA, Seer, MoBA, InfLLMV2, SSA, BlockTopK, SinkWindow, RandomBlocks,
                Oracle, Quest, MInferenceBlocks, VerticalSlash, FlexPrefill, XAttention, SnapKV, Window, MAG, MAL, MAC,
                LMM):
  registry.add(_method)
