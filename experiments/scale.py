"""What would native and retrofitted sparse attention cost at 1B, 8B and 109B parameters, at 128K and 1M tokens?

    python -m launch.compile --config=experiments/scale.py:size=8b,context=131072,method=msa --topology=v5p:8x8x8
    python -m launch.compile --config=experiments/scale.py:size=8b,context=131072,method=msa --topology=h100x512

Nothing is trained: the plans are in experiments/results/plans/ (README.md there), with what is compiled, what is
arithmetic and what is assumed. The arms of a size differ in attention alone: 4 KV heads of 128, and for MSA and NSA
their published geometry. The schedule is a retrofit at `budget` of the tokens (13 %, as the one
published pair had it) after a dense trunk; plans price the dense, native and retrofit runs from its stages.

"109b" has the shape of the published MSA model (arXiv 2606.13392: 41 layers, D 3072, 64/4 heads of 128, 200K
tokens in the vocabulary, 128 + 1 experts of which 4 + 1 are visited). This codebase has no experts: F is that of
the five visited ones (five times 2,304, our estimate; the width is not published), which makes the FLOPs those of
the active parameters. `launch.compile --inactive_parameters` adds the memory and traffic of the other 124.

Arguments: size=8b (1b, 8b, 109b), context=131072, method=msa (dense, msa, nsa), devices=512, tokens=0 (of the whole
run; 0: 20 per parameter, and 3e12 for 109b, as published), budget=0.13.
"""
from experiments import arguments
from nsa import methods, schedule
from nsa.config import Config, DataConfig, EvalConfig, MeshConfig, ModelConfig

TOKENS_PER_STEP = 2 ** 23
MODELS = {
    "1b": dict(num_layers=24, d_model=2048, num_heads=32, num_kv_heads=4, mlp_dim=5632),
    "8b": dict(num_layers=36, d_model=4096, num_heads=64, num_kv_heads=4, mlp_dim=12288),
    "109b": dict(num_layers=41, d_model=3072, num_heads=64, num_kv_heads=4, mlp_dim=11520),
}
TOKENS = {"1b": 20e9, "8b": 160e9, "109b": 3e12}
INACTIVE = {"109b": 38 * 124 * 3 * 3072 * 2304}  # parameters of experts that a token does not visit
METHODS = {"dense": methods.Dense, "msa": methods.MSA, "nsa": methods.NSA}


def mesh_of(context: int, devices: int, tensor: int) -> MeshConfig:
  """As many rows at a time as a step has, each cut over what is left."""
  rows = TOKENS_PER_STEP // context
  fsdp = max(1, min(rows, devices // tensor))
  return MeshConfig(data=1, fsdp=fsdp, context=devices // (tensor * fsdp), tensor=tensor)


def get_config(arg=None):
  a = arguments.parse(arg, size="8b", context=131072, method="msa", devices=512, tokens=0.0, budget=0.13, tensor=0,
                      above_0=("context", "devices"))
  shape, method = arguments.choice(a, "size", MODELS), arguments.choice(a, "method", METHODS)
  steps = max(100, round((a.tokens or TOKENS[a.size]) / TOKENS_PER_STEP))
  if a.method == "dense":
    plan = schedule.dense(steps)
  else:
    plan = schedule.retrofit(steps, a.budget, selector_warmup=0.1 if a.method == "msa" else 0.0)
  return Config(
      arm=a.method, size=a.size, attention=method(), schedule=plan,
      model=ModelConfig(vocab_size=200_064, head_dim=128, rope_theta=5e6, dtype="bfloat16", remat="layer",
                        tie_embeddings=False, **shape),
      data=DataConfig(context=a.context, global_batch=TOKENS_PER_STEP // a.context, align=128),
      mesh=mesh_of(a.context, a.devices, a.tensor or (1 if a.size == "1b" else 4)),
      eval=EvalConfig(sequences=0, run_modes=(), batch=TOKENS_PER_STEP // a.context))
