"""Writes a run's model as a folder of the Hugging Face format (config.json and safetensors).

    python -m launch.export_hf --workdir=runs/qwen3-msa --out=/models/Qwen3-0.6B-msa

What is written is the backbone, to be run dense, and beside it method.json and method.safetensors: what the attention
method added, which launch.import_hf reads again. Of an imported model, or one that was forked from it, config.json and
tokenizer are the original's. The folder is written whole or not at all. Needs the extra `hf`.
"""
from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
_OUT = flags.DEFINE_string("out", None, "Folder to make; one that is there has to be empty.")
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint; -1 for the newest.", lower_bound=-1)
_SEED = flags.DEFINE_integer("seed", -1, "Of a run with several; -1 for its first.", lower_bound=-1)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16", "float16"],
                           "Of the weights; empty: the imported model's, or float32.")
_SHARD = flags.DEFINE_float("shard_gb", 5.0, "GB (10^9 bytes) of a file at most.", lower_bound=1e-6)
flags.mark_flags_as_required(["workdir", "out"])


def main():
  from nsa import huggingface
  cli.clean_up_when_stopped()
  added = huggingface.export_model(_WORKDIR.value, _OUT.value, step=_STEP.value, seed=_SEED.value, dtype=_DTYPE.value,
                                   shard_bytes=int(_SHARD.value * 10 ** 9))
  beside = (f"; what {' and '.join(added)} added is in method.safetensors, the rest runs dense without it" if added
            else "")
  print(f"{_OUT.value} written{beside}")


if __name__ == "__main__":
  cli.run(main)
