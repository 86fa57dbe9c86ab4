"""Dense models of others in, and out again: folders of the Hugging Face format, and GGUF files.

    import_model("Qwen3-0.6B", "runs/qwen3")     a folder with config.json and safetensors -> a run directory
    import_model("SmolLM2.Q4_1.gguf", "runs/s")  a GGUF file -> a run directory
    export_model("runs/retrofit", "exported")    a run directory -> such a folder

| file | what it does |
|---|---|
| safetensors_files | reads the tensors of a folder |
| gguf_file | reads a GGUF file: metadata and tensors |
| architectures | config.json <-> ModelConfig: what of which model family is computed here |
| gguf_model | the same for a GGUF file's metadata, names and layouts |
| weights | tensors <-> parameters |
| tokenizer | the tokenizer's files, or one made of a GGUF file's metadata |
| runs | import and export of run directories |

Nothing of a model's forward pass is ignored: a key of config.json or of the metadata that this code does not know, or a
value that the model here cannot compute, is an error that names the key, the value and what to do; so is a tensor that
is left over. Weights become float32 and keep their values; matrices are transposed (theirs are [out, in]) and heads
split, and that is all. Export writes the dtype that the model had, so that an import and an export change no bit.

Needs the extra `hf`, GGUF files the extra `gguf`.
"""
from nsa.huggingface.architectures import read_config, write_config
from nsa.huggingface.runs import export_model, import_model
from nsa.huggingface.safetensors_files import INDEX
from nsa.huggingface.weights import load_params, save_params

__all__ = ("INDEX", "export_model", "import_model", "load_params", "read_config", "save_params", "write_config")
