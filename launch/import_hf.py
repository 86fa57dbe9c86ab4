"""Makes a run directory of a Hugging Face model on this disk (Llama or Qwen3, safetensors).

    python -m launch.import_hf --source=/models/Qwen3-0.6B --workdir=runs/qwen3
    python -m launch.evaluate --workdir=runs/qwen3 --run_modes="dense quest:num_blocks=32 snapkv"
    python -m launch.train --config=experiments/retrofit_hf.py:trunk=runs/qwen3 --workdir=runs/qwen3-msa
    python -m launch.export_hf --workdir=runs/qwen3-msa --out=/models/Qwen3-0.6B-msa

Nothing is downloaded. Needs the extra `hf`. Weights are held in memory twice as float32: 8 bytes per parameter.
"""
from absl import flags

from launch import cli

_SOURCE = flags.DEFINE_string("source", None, "Folder with config.json and safetensors.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory to make.")
_CONTEXT = flags.DEFINE_integer("context", 4096, "Tokens of the windows that launch.evaluate takes by default.",
                                lower_bound=2)
flags.mark_flags_as_required(["source", "workdir"])


def main():
  from nsa import flops, huggingface
  config = huggingface.import_model(_SOURCE.value, _WORKDIR.value, context=_CONTEXT.value)
  print(f"{_WORKDIR.value}: {flops.parameters(config)['total']:,} parameters, {config.model.num_layers} layers, "
        f"tokenizer {config.data.tokenizer}")


if __name__ == "__main__":
  cli.run(main)
