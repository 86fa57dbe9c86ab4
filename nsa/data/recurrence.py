"""Tokens that a model can know from far back: they complete an n-gram seen before in the window and rare in training.

"AR hits" of Arora et al. 2023, "Zoology" (arXiv:2312.04927), section 3.1, which takes bigrams of words. For bytes an
n-gram is 12 long and at most 4 times in training. Counted on val of longdoc-v1 and longcode-v1 (80 MB of training each,
windows of 4,096 bytes, the nearest copy at least 512 back): 2.7 of 1,000 bytes of novels are such hits and 54.7 of
code; with 8 bytes 3.6 and 36.9, with 16 bytes 1.1 and 57.9; with no limit of rarity 12 bytes give 6.3 and 94.9. Longer
ones are too few in novels; shorter ones, or common ones, a model knows from training. Tokens of other tokenizers are 4
to an n-gram.
"""
from __future__ import annotations

import numpy as np

from nsa.data import sources, windows
from nsa.data.sources import Document

RARE = 4       # times in training, at most
_FILTER = 24   # bits of a hash that are looked up before the whole of it


def ngram_of(tokens: str) -> int:
  """Tokens of an n-gram, by the name of the tokenizer."""
  return 12 if tokens == "bytes" else 4


def distances(targets: np.ndarray, inputs: np.ndarray, train: list[Document], *, ngram: int, rare: int = RARE,
              least: int = 1) -> np.ndarray:
  """How far back the n-gram that a target completes was completed last.

  Args:
    targets, inputs: int32[windows, T].
    train: the training documents, in the same tokens.
    ngram: its length, tokens.
    rare: n-grams that occur more often in training do not count.
    least: nor those whose last copy is nearer than this.

  Returns:
    int32[windows, T], tokens from the copy's last one to the target; 0 where the window has none, or none that
    counts.
  """
  whole = np.concatenate([inputs[:, :1], targets], axis=1)  # input 0 and every target
  found = np.zeros(targets.shape, np.int32)
  hashes = np.zeros((len(targets), max(0, whole.shape[1] - ngram + 1)), np.uint64)
  for row, tokens in enumerate(whole):
    mine = hashes[row] = _hashes(tokens, ngram)
    order = np.argsort(mine, kind="stable")
    again = np.flatnonzero(mine[order[1:]] == mine[order[:-1]])
    later, earlier = order[again + 1], order[again]
    # n-gram i ends at token i + n - 1 of `whole`, which is target i + n - 2
    found[row, later + ngram - 2] = later - earlier
  found[found < least] = 0
  row, at = np.nonzero(found)
  mine = hashes[row, at - ngram + 2]
  keys, where = np.unique(mine, return_inverse=True)
  common = _count(keys, train, ngram)[where] > rare
  found[row[common], at[common]] = 0
  return found


def _count(keys, train, ngram):
  """int64[keys]: how often each hash occurs in the documents."""
  counts = np.zeros(len(keys), np.int64)
  if not len(keys):
    return counts
  possible = np.zeros(1 << _FILTER, bool)  # most n-grams are sorted out by one look
  possible[(keys >> np.uint64(64 - _FILTER)).astype(np.int64)] = True
  for document in train:
    mine = _hashes(document.tokens, ngram)
    mine = mine[possible[(mine >> np.uint64(64 - _FILTER)).astype(np.int64)]]
    at = np.minimum(np.searchsorted(keys, mine), len(keys) - 1)
    counts += np.bincount(at[keys[at] == mine], minlength=len(keys))
  return counts


def _hashes(tokens: np.ndarray, ngram: int) -> np.ndarray:
  """A 64-bit hash of every n-gram: uint64[len - ngram + 1]. Different ones collide once in 2^64."""
  tokens = np.asarray(tokens).astype(np.uint64)
  if len(tokens) < ngram:
    return np.zeros(0, np.uint64)
  # Of doubled length by the hashes of both halves, and the rest of the length behind: log n steps.
  factor, h, size = 0x9E3779B97F4A7C15, (tokens + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9), 1
  base = h
  for bit in bin(ngram)[3:]:
    h = h[:len(h) - size] * np.uint64(pow(factor, size, 1 << 64)) + h[size:]
    size *= 2
    if bit == "1":
      h = h[:len(base) - size] * np.uint64(factor) + base[size:]
      size += 1
  h = h ^ (h >> np.uint64(31))
  h = h * np.uint64(0x94D049BB133111EB)
  return h ^ (h >> np.uint64(29))


def of_windows(source: str, split: str, count: int, context: int, tokens: str, data_dir: str, least: int) -> np.ndarray:
  """`distances` of the windows that are evaluated: int32[windows, T]."""
  from nsa.config import DataConfig  # here: it brings JAX along

  config = DataConfig(source=source, tokenizer=tokens, data_dir=data_dir)
  found = windows.eval_windows(config, split, count, context)
  train = sources.load(source, "train", data_dir=data_dir, tokens=tokens)
  inputs, targets = (np.stack([getattr(w, name) for w in found]) for name in ("inputs", "targets"))
  return distances(targets, inputs, train, ngram=ngram_of(tokens), least=least)
