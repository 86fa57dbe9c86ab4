"""The files of a model's tokenizer: those of its folder, or made of a GGUF file's metadata.

A GGUF file names how text is cut before its byte-pair encoding, `tokenizer.ggml.pre`. The cuts here are those of the
models' own tokenizer.json; a name that is not among them is refused, for other cuts are other tokens.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath

from nsa.config import ConfigError
from nsa.data import tokenizer
from nsa.huggingface import architectures

TOKENIZER = "tokenizer.json"
FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What tokenizers of other kinds leave behind: a model with one of them has a tokenizer that is not read here.
_OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json",
           "tokenizer.tiktoken")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_NORMAL, _CONTROL, _USER = 1, 3, 4  # tokenizer.ggml.token_type
_PREFIX = "tokenizer.ggml."
_KNOWN = {"model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token",
          "add_space_prefix", "add_sep_token"}


def copy(source: Path, target: epath.Path) -> bool:
  """Copies the tokenizer's files; whether there is one. Raises ConfigError for a tokenizer that is not read here."""
  if not (source / TOKENIZER).is_file():
    others = [name for name in _OTHERS if (source / name).is_file()]
    if others:
      raise ConfigError([("source", str(source), f"its tokenizer is in {', '.join(others)}, and there is no "
                          f"{TOKENIZER}: save it with transformers (AutoTokenizer, save_pretrained), or give "
                          "--tokenizer")])
  else:
    try:  # what is wrong is wrong in these files, not in the copies
      tokenizer.get(f"hf:{source}")
    except ValueError as error:
      raise ConfigError([("source", str(source), str(error).partition("': ")[2])]) from None
  for name in FILES:
    if (source / name).is_file():
      (target / name).write_bytes((source / name).read_bytes())
  return (source / TOKENIZER).is_file()


def from_gguf(metadata: dict[str, Any], path: Path) -> dict[str, str]:
  """File name -> content of the tokenizer in a GGUF file's metadata.

  Raises ConfigError, naming the key, for a tokenizer that cannot be made here; ModuleNotFoundError without tokenizers.
  """
  need = architectures.Needs(path, or_else="; or give a tokenizer.json by --tokenizer=hf:PATH")
  get = lambda key: metadata.get(_PREFIX + key)
  need(get("model") == "gpt2", _PREFIX + "model", get("model"), "byte-level byte-pair encoding, gpt2, is known")
  need(get("pre") in _CUTS, _PREFIX + "pre", get("pre"), f"known are {', '.join(_CUTS)}")
  need(not get("add_space_prefix"), _PREFIX + "add_space_prefix", True, "false is known")
  for key in metadata:
    name = key.removeprefix(_PREFIX)
    need(name == key or name in _KNOWN or name.endswith("_token_id"), key, metadata[key], "not known here")
  tokens, merges, kinds = get("tokens"), get("merges"), get("token_type")
  texts = lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x)
  if need(texts(tokens) and tokens, _PREFIX + "tokens", _shown(tokens), "a list of texts is needed"):
    need(len(set(tokens)) == len(tokens), _PREFIX + "tokens", _shown(tokens), "every token has to be another one")
    kinds = [_NORMAL] * len(tokens) if kinds is None else kinds
    need(isinstance(kinds, list) and len(kinds) == len(tokens), _PREFIX + "token_type", _shown(kinds),
         f"one for each of {len(tokens)} tokens")
    for name in ("bos", "eos"):
      number = get(f"{name}_token_id")
      need(number is None and name == "bos" or isinstance(number, int) and 0 <= number < len(tokens),
           f"{_PREFIX}{name}_token_id", number, f"one of {len(tokens)} tokens is needed")
  if need(texts(merges), _PREFIX + "merges", _shown(merges), "a list of texts is needed"):
    odd = [merge for merge in merges if merge.count(" ") != 1]
    need(not odd, _PREFIX + "merges", _shown(odd), "two tokens with a space between them")
    if texts(tokens) and not odd:
      known = set(tokens)
      lost = [merge for merge in merges
              if merge.replace(" ", "") not in known or not known.issuperset(merge.split(" "))]
      need(not lost, _PREFIX + "merges", _shown(lost), f"merges of what is not in {_PREFIX}tokens")
  need.end()
  at = lambda name: None if get(f"{name}_token_id") is None else tokens[get(f"{name}_token_id")]
  beside = {"bos_token": at("bos"), "eos_token": at("eos"), "add_bos_token": bool(get("add_bos_token"))}
  if isinstance(metadata.get("tokenizer.chat_template"), str):
    beside["chat_template"] = metadata["tokenizer.chat_template"]
  return {TOKENIZER: _byte_level(tokens, merges, kinds, get("pre")),
          "tokenizer_config.json": json.dumps(beside, indent=2) + "\n"}


def _shown(x) -> str:
  return repr(x) if not isinstance(x, list) else f"{len(x)} of them, {x[:3]!r}"


def _byte_level(tokens, merges, kinds, pre) -> str:
  """tokenizer.json."""
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: the tokenizer of a GGUF file needs it: pip install tokenizers") from None
  pairs = [tuple(merge.split(" ")) for merge in merges]
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs,
                                                    ignore_merges=pre == "llama-bpe"))
  normalizer, parts = _CUTS[pre](tokenizers)
  if normalizer is not None:
    made.normalizer = normalizer
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
  made.decoder = tokenizers.decoders.ByteLevel()
  for kind, special in ((_CONTROL, True), (_USER, False)):
    made.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)
                     for token, its in zip(tokens, kinds) if its == kind])
  return made.to_str()


def _cut(digits: str):
  """By the expression that GPT-4's followers share: numbers of up to so many digits, then bytes."""
  def make(t):
    split = t.pre_tokenizers.Split(t.Regex(_WORDS % digits), behavior="isolated")
    return [split, t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  return make


_CUTS = {
    # By GPT-2's expression.
    "gpt-2": lambda t: (None, [t.pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    # Every digit by itself, then as GPT-2.
    "smollm": lambda t: (None, [t.pre_tokenizers.Digits(individual_digits=True),
                                t.pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": lambda t: (None, _cut("{1,3}")(t)),
    "qwen2": lambda t: (t.normalizers.NFC(), _cut("")(t)),
}
