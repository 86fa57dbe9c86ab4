"""Makes a run directory of a model on this disk: a folder of the Hugging Face format, or a GGUF file.

    python -m launch.import_hf --source=/models/Qwen3-0.6B --workdir=runs/qwen3
    python -m launch.import_hf --source=/models/SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2 --context=8192 \\
        --data_source=files:longdoc-v1.tar.xz
    python -m launch.evaluate --workdir=runs/qwen3 --run_modes="dense quest:num_blocks=32 snapkv"
    python -m launch.train --config=experiments/retrofit_hf.py:trunk=runs/qwen3 --workdir=runs/qwen3-msa
    python -m launch.export_hf --workdir=runs/qwen3-msa --out=/models/Qwen3-0.6B-msa

Llama 3, Mistral without window, Qwen2, Qwen3, SmolLM2 and 3; a model that cannot be computed is refused by the key that
says so. Nothing is downloaded. Needs the extra `hf`, GGUF files the extra `gguf`. Weights are held in memory twice as
float32: 8 bytes per parameter. docs/huggingface.md goes the whole way with one model.
"""
from absl import flags

from launch import cli

_SOURCE = flags.DEFINE_string("source", None, "Folder with config.json and safetensors, or a GGUF file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory to make.")
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens of the windows that launch.evaluate takes by default; 0: 4,096, "
                                "or what the model was made for where that is less.", lower_bound=0)
_DATA = flags.DEFINE_string("data_source", "stdlib",
                            "Text that launch.evaluate reads by default: stdlib, files:PATH or tfds:NAME.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "",
                                 "hf:PATH of a tokenizer.json or its folder, or bytes; empty: the model's own.")
flags.mark_flags_as_required(["source", "workdir"])


def main():
  from nsa import flops, huggingface
  cli.clean_up_when_stopped()
  config = huggingface.import_model(_SOURCE.value, _WORKDIR.value, context=_CONTEXT.value, tokenizer=_TOKENIZER.value,
                                    data_source=_DATA.value)
  print(f"{_WORKDIR.value}: {flops.parameters(config)['total']:,} parameters, {config.model.num_layers} layers, "
        f"tokenizer {config.data.tokenizer}")


if __name__ == "__main__":
  cli.run(main)
