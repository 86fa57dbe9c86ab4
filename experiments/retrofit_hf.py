"""What does sparse attention cost a dense model that is already trained, and how much training brings it back?

    pip install -e ".[hf]"
    python -m launch.import_hf --source=/models/Qwen3-0.6B --workdir=runs/qwen3
    python -m launch.train --config=experiments/retrofit_hf.py:trunk=runs/qwen3 --workdir=runs/qwen3-msa \
        --config.data.source=files:/path/to/longdoc-v1.tar.xz
    python -m launch.evaluate --workdir=runs/qwen3-msa --run_modes="dense sparse oracle quest snapkv"
    python -m launch.export_hf --workdir=runs/qwen3-msa --out=/models/Qwen3-0.6B-msa

MSA onto a checkpoint from this disk (docs/huggingface.md): a tenth of the steps the output stays dense and the index
branch learns, then all parameters learn with sparse attention, at a learning rate for models that are trained already.
The first `dense_layers` layers stay dense (the released M3 model has three). The text is tokenized by the model's own
tokenizer; figures are bits per byte of text, so that models with different tokenizers can be compared.

Without `trunk=` the model has the shape of Qwen3-0.6B and bytes for tokens: `--dry_run` shows its cost before anything
is fetched. Tried end to end at toy size (tests/huggingface_test.py); of a real model experiments/smollm2.py has
results.

`method=dense` is the control: the same tokens at the same rates, dense to the end.

Arguments: trunk=, method=msa (msa, block_topk, quest or dense), steps=1000, context=8192, batch=8, block_size=64,
num_blocks=16, dense_layers=0, peak=2e-5.
"""
import dataclasses

from experiments import arguments
from nsa import methods, rundir, schedule
from nsa.config import CheckpointConfig, Config, DataConfig, EvalConfig, ForkConfig, ModelConfig

SHAPE = ModelConfig(vocab_size=151_936, num_layers=28, d_model=1024, num_heads=16, num_kv_heads=8, head_dim=128,
                    mlp_dim=3072, rope_theta=1e6, embedding_multiplier=1.0, dtype="bfloat16")


def get_config(arg=None):
  a = arguments.parse(arg, trunk="", method="msa", steps=1000, context=8192, batch=8, block_size=64, num_blocks=16,
                      dense_layers=0, peak=2e-5)
  geometry = dict(block_size=a.block_size, num_blocks=a.num_blocks)
  attention = arguments.choice(a, "method", {
      "msa": methods.MSA(**geometry), "block_topk": methods.BlockTopK(**geometry), "quest": methods.Quest(**geometry),
      "dense": methods.Dense()})
  model, tokenizer, size = SHAPE, "bytes", "0.6B"
  if a.trunk:
    trunk = rundir.read_config(a.trunk, field="experiment argument trunk")
    model, tokenizer, size = trunk.model, trunk.data.tokenizer, trunk.size
  if not 0 <= a.dense_layers < model.num_layers:
    raise ValueError(f"experiment argument dense_layers = {a.dense_layers}: 0 to {model.num_layers - 1}")
  layers = ("dense",) * a.dense_layers + ("attention",) * (model.num_layers - a.dense_layers)
  rates, dense = dict(peak=a.peak, warmup=0.02, decay=0.2), a.method == "dense"
  plan = (schedule.dense(a.steps, **rates) if dense else
          schedule.native(a.steps, selector_warmup=0.1 if a.method == "msa" else 0.0, **rates))
  return Config(
      arm="dense_continued" if dense else f"retrofit_{a.method}", size=size,
      model=dataclasses.replace(model, remat="layer"), attention=attention,
      layers=layers if a.dense_layers else (), schedule=plan,
      data=DataConfig(tokenizer=tokenizer, context=a.context, global_batch=a.batch, align=a.block_size),
      eval=EvalConfig(run_modes=("dense",) if dense else ("dense", "sparse"), batch=1),
      checkpoint=CheckpointConfig(every=max(1, a.steps // 4)), fork=ForkConfig(a.trunk, reset=bool(a.trunk)))
