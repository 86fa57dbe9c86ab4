"""The fields of a model's shape: a part of a config, and all of one that layers and methods read.

Annotations are real types, as in config/fields.py.
"""
from dataclasses import dataclass, field


@dataclass
class RopeScaling:
  """How rotary frequencies are lowered for contexts beyond the one trained with (nsa/layers.py)."""
  kind: str = ""                  # "" none | linear | dynamic | llama3 | yarn | longrope
  factor: float = 1.0             # linear, llama3, yarn: frequencies are divided by it; dynamic: how fast the base
                                  # grows; longrope: by which the context has grown
  context: int = 8192             # all but linear: tokens of the original context
  low_frequency: float = 1.0      # llama3, yarn: waves with at most so many turns in that context are divided
  high_frequency: float = 4.0     # llama3, yarn: those with at least so many stay (yarn's own number is 32)
  attention_factor: float = 0.0   # yarn, longrope: on cos and sin; 0 = 0.1 ln(factor) + 1, or longrope's own
  short_factors: tuple[float, ...] = ()  # longrope: each wave's divisor in rows of up to `context` tokens
  long_factors: tuple[float, ...] = ()   # longrope: the same in longer ones


@dataclass
class ModelConfig:
  """A decoder-only Transformer: GQA, RoPE, RMSNorm, SwiGLU."""
  vocab_size: int = 320           # token ids, padded to a multiple of 64 (bytes + 3 specials = 259)
  num_layers: int = 4             # L
  d_model: int = 256              # D, width of the residual stream
  num_heads: int = 8              # N, query heads
  num_kv_heads: int = 2           # K, key/value heads; G = N / K
  head_dim: int = 32              # H
  mlp_dim: int = 704              # F, hidden width of SwiGLU
  rope_theta: float = 10_000.0    # base of the rotary wavelengths
  rope_scaling: RopeScaling = field(default_factory=RopeScaling)
  norm_eps: float = 1e-6          # added to the mean square in the RMSNorms of blocks, of q and k, and at the end
  embedding_multiplier: float = 0.0  # on the embeddings; 0 = sqrt(d_model)
  no_rope_layers: tuple[int, ...] = ()  # numbers of the layers without rotary embedding (NoPE), from 0
  qkv_bias: bool = False          # a bias on queries, keys and values, behind the convolution, before the norm
  qk_norm: bool = True            # RMSNorm on every query and key head before RoPE
  short_conv: int = 0             # taps of the causal depthwise convolution on q, k and v; 0 = none
  output_gate: bool = False       # sigmoid gate per head on the attention output (all arms or none)
  tie_embeddings: bool = True     # the output projection is the embedding, transposed
  remat: str = "none"             # "none", or "layer": recompute each layer in the backward pass, but for its choice of
                                  # blocks and what its attention leaves
  dtype: str = "float32"          # of activations and matmul inputs; parameters stay float32
