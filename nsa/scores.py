"""From what a model says about held-out text and tasks to records: `run` gives (nll, correct, diagnostics) of a
batch."""
from __future__ import annotations

import collections
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from nsa import held_out, methods, records as record_lib, step as step_lib

_MAX_HEAT = 64  # cells per side of a stored heat map


def _batches(arrays: dict[str, np.ndarray], size: int):
  """Batches of exactly `size` rows, the last one padded with copies; yields (batch, rows that count).

  batch["rows"], float32[size], is 0 at the copies.
  """
  count = len(arrays["inputs"])
  for first in range(0, count, size):
    rows = np.minimum(np.arange(first, first + size), count - 1)
    batch = {name: arrays[name][rows] for name in ("inputs", "targets", "segment_ids", "prompt")}
    batch["rows"] = (np.arange(first, first + size) < count).astype(np.float32)
    yield batch, slice(first, min(first + size, count))


class Turns:
  """One asks the device while another reckons with what it said: the device waits for neither.

  seconds: that the device took, by the name under which it was asked.
  """

  def __init__(self):
    self._turn, self._told, self._idle_since = threading.Lock(), threading.Lock(), 0.0
    self.seconds: collections.Counter[str] = collections.Counter()

  def ask(self, name, run, params, arrays, size, watched=()) -> list[tuple]:
    """[(rows that count, nll, correct, diagnostics)] of all batches of `size` rows, in order. Diagnostics of batches
    that are not in `watched` are (): maps of zeros, many of them."""
    said = []
    with self._turn:
      began = time.monotonic()
      for number, (batch, rows) in enumerate(_batches(arrays, size)):
        nll, correct, layers = run(params, batch, number in watched)
        said.append((rows, nll, correct, layers if number in watched else ()))
    jax.block_until_ready([one[1] for one in said])
    with self._told:  # two parts of a run mode have one name
      ended = time.monotonic()
      # What was asked before was answered before.
      self.seconds[name] += max(0.0, ended - max(began, self._idle_since))
      self._idle_since = ended
    return said


def ask_alone(*asked) -> list[tuple]:
  """`Turns.ask` for who is the only one."""
  return Turns().ask("", *asked)


def text(run, params, windows: held_out.Text, e, context, method, back=None, gain=(), ask=ask_alone) -> list[dict]:
  """Records of the windows of one corpus: each window, by position, by layer, and what far context is worth.

  back: int32[windows, T], how far back the n-gram was seen that a target completes (data/recurrence.py); None = not
  asked.
  gain: tokens of context before the last quarter of a window that its loss is measured with, beside all there are.
  ask: `Turns.ask` under a name.
  """
  count, half = len(windows.windows), context // 2
  scored = half if isinstance(method, methods.PromptMethod) else 0  # from which position on
  arrays = {"inputs": windows.inputs, "targets": windows.targets, "segment_ids": np.ones_like(windows.inputs),
            "prompt": np.full(count, half, np.int32)}
  # Methods that choose once per prompt measure themselves, always.
  watched = _spread(-(-count // e.batch), -(-count if scored else -e.diagnosed // e.batch))
  nll, seen, weights = _nll(ask(run, params, arrays, e.batch, watched))
  bits, real = nll / step_lib.LN2, windows.bytes
  bits *= windows.scored
  of = lambda x: zip(*(part.sum(axis=1).tolist() for part in (x, x[:, half:], x[:, scored:])))
  rows = [record_lib.make("language", split=e.split, document=w.document, start=int(w.start),
                          **({} if scored else _per_byte("bits_per_byte", loss, size)), bytes=behind,
                          **_per_byte("second_half_bits_per_byte", late, late_size), second_half_bytes=late_size)
          for w, (loss, late, _), (size, late_size, behind) in zip(windows.windows, of(bits), of(real))]
  edges = [0] + [context >> shift for shift in range(6, -1, -1) if context >> shift]
  for first, end in zip(edges[:-1], edges[1:]):
    if first < scored:
      continue
    size = int(real[:, first:end].sum())
    rows.append(record_lib.make("position", start=first, end=end, bytes=size,
                                **_per_byte("bits_per_byte", bits[:, first:end].sum(), size)))
  if back is not None:
    rows += _hits(nll[:, scored:], back[:, scored:] * windows.scored[:, scored:], context)
  if gain and not scored:
    rows += _context_gain(lambda some: _nll(ask(run, params, some, e.batch))[0], arrays, bits, real, gain)
  return rows + (_layer_records(seen, weights, windows.windows[0].document) if seen else [])


def _nll(said):
  """(nll float64[rows, T], diagnostics of the watched batches, rows that count in each of these)."""
  nll = np.concatenate([np.asarray(values)[:rows.stop - rows.start] for rows, values, *_ in said]).astype(np.float64)
  watched = [(layers, rows.stop - rows.start) for rows, *_, layers in said if layers]
  return nll, jax.device_get([layers for layers, _ in watched]), [weight for _, weight in watched]


def _hits(nll, back, context):
  """Loss of the targets that complete a rare n-gram seen before, by distance, in powers of 2 of the context."""
  at = back > 0  # few of all
  nll, back = nll[at], back[at]
  out, start = [], max(1, context >> 7)
  while start < context:
    mine = nll[(back >= start) & (back < 2 * start)]
    if len(mine):
      out.append(record_lib.make("ar_hit", start=start, end=2 * start, nll=float(mine.mean()), hits=len(mine)))
    start *= 2
  return out


MAX_GAIN = 256  # windows that are run again with less context


def _context_gain(nll_of, arrays, bits, real, gain):
  """Loss of the last quarter of a window, given less and less before it.

  What comes earlier is cut off as another document, so the same program runs; places in the window stay.
  """
  rows = sorted(_spread(len(bits), MAX_GAIN))
  T = bits.shape[1]
  last = T - T // 4
  size = int(real[rows, last:].sum())
  out = []
  for before in sorted(set(gain) | {last}):
    cut = last - before
    if cut < 0:
      continue
    mine = bits[rows]
    if cut:
      some = {name: x[rows] for name, x in arrays.items()}
      some["segment_ids"] = np.where(np.arange(T) < cut, 1, 2).astype(np.int32) * np.ones((len(rows), 1), np.int32)
      mine = nll_of(some) / step_lib.LN2 * (real[rows] > 0)
    out.append(record_lib.make("context_gain", context=before, bytes=size,
                               **_per_byte("bits_per_byte", mine[:, last:].sum(), size)))
  return out


def _spread(count, wanted):
  """`wanted` of the numbers 0 .. count - 1, the first and others evenly behind it; all where there are no more."""
  return {i * count // wanted for i in range(wanted)} if wanted < count else set(range(count))


def _per_byte(name, bits, size) -> dict[str, float]:
  """{name: bits per byte}; {} where all targets are special tokens, which stand for no byte."""
  return {name: float(bits / size)} if size else {}


def _layer_records(seen, weights, document):
  """Diagnostics of each layer; `weights` are the sequences that count in each batch of `seen`."""
  rows = []
  for layer, first in enumerate(seen[0]):
    means = {name: float(np.average([batch[layer][name].mean() for batch in seen], weights=weights))
             for name in first if name != "heat"}
    rows.append(record_lib.make("layer", layer=layer, **{n: x for n, x in means.items() if np.isfinite(x)}))
    if "heat" in first:
      rows.append(record_lib.make("heat", layer=layer, kv_head=0, document=document,
                                  heat=np.round(_shrink(first["heat"][0]), 3).tolist()))
  return rows


def count_flops(rows, config, selector, context):
  """Adds what the measured number of visible tokens costs to the records of layers."""
  method = config.attention
  if selector != "own":
    method = methods.get(selector)(**method.geometry)
  for row in rows:
    if row["kind"] == "layer" and "tokens_visible" in row:
      row["attention_flops"] = method.measured_flops(config.model, context, row["tokens_visible"])


def _shrink(heat):
  """Averages cells until no side is longer than _MAX_HEAT."""
  factor = -(-max(heat.shape) // _MAX_HEAT)
  pad = [(0, -size % factor) for size in heat.shape]
  grid = np.pad(heat, pad)
  rows, columns = grid.shape
  return grid.reshape(rows // factor, factor, columns // factor, factor).mean(axis=(1, 3))


class _Answers(NamedTuple):
  """Of one example, or of all: a place for each answer."""
  query: np.ndarray     # int, its first token
  evidence: np.ndarray  # int, the last token of it
  far: np.ndarray       # bool
  right: np.ndarray     # int, 1 if all its tokens are
  nll: np.ndarray       # nats per token

  def where(self, which) -> _Answers:
    return _Answers(*(x[which] for x in self))

  def means(self) -> tuple[float, float]:
    return float(self.right.mean()), float(self.nll.mean())


def task(run, params, name, examples, e, listed: bool, decode=None, once: bool = False, ask=ask_alone):
  """One record per example and one per range of distances; `listed`: the examples' answers one by one; `once`: whether
  the method chooses once per prompt, and measures itself: what it saw stands in the records, a mean over each batch.

  decode: (tokens int32[T], first positions int32[Q], tokens per answer) -> int32[Q, tokens], of the first `e.decoded`
    examples.
  ask: `Turns.ask` under a name.
  """
  count, length = examples["inputs"].shape
  nll, correct = np.zeros((count, length)), np.zeros((count, length), bool)
  # The input at the first answer's target is the prompt's last token.
  examples = {**examples, "prompt": (np.argmax(examples["answer_group"] >= 0, axis=1) + 1).astype(np.int32)}
  seen = [{}] * count
  said = ask(run, params, examples, e.batch, range(count) if once else ())
  for rows, values, right, layers in said:
    keep = rows.stop - rows.start
    nll[rows], correct[rows] = np.asarray(values)[:keep], np.asarray(right)[:keep]
    if layers:
      seen[rows] = [{name: float(np.mean([layer[name] for layer in layers]))
                     for name in ("tokens_visible", "tokens_causal")}] * keep
  first, last = e.near or (length // 32, length // 8)
  longest = max(int(np.bincount(group[group >= 0]).max()) for group in examples["answer_group"])
  out, answers = [], []
  for i in range(count):
    group = examples["answer_group"][i]
    query, evidence = examples["query"][i], examples["evidence"][i, :, :, 1]
    missing = evidence < 0  # an answer with fewer pieces than others
    far = (missing | (evidence >= first) & (query[:, None] - evidence > last)).all(axis=1)
    at = np.flatnonzero(group >= 0)
    size = np.bincount(group[at])
    right = np.bincount(group[at], correct[i, at]) == size
    loss = np.bincount(group[at], nll[i, at]) / size
    n = len(size)  # fewer than others have where `query` is filled up
    mine = _Answers(query[:n], evidence.max(axis=1)[:n], far[:n], right.astype(int), loss)
    answers.append(mine)
    more: dict[str, Any] = {}
    if mine.far.any():
      more["far_exact_match"], more["far_answer_nll"] = mine.where(mine.far).means()
    if decode is not None and i < e.decoded:
      begins = np.array([np.argmax(group == query) for query in range(len(size))], np.int32)
      written = np.asarray(decode(examples["inputs"][i], begins, longest))
      want = [examples["targets"][i, begin:begin + n] for begin, n in zip(begins, size)]
      more["greedy_exact_match"] = float(np.mean([(got[:len(its)] == its).all() for got, its in zip(written, want)]))
    if listed:
      more["answers"] = [[*one, round(loss, 4)] for *one, loss in zip(
          *(x.tolist() for x in (mine.query, mine.evidence, mine.right, mine.nll)))]
    out.append(record_lib.make("task", task=name, index=i, exact_match=mine.means()[0],
                               answer_nll=float(nll[i, at].mean()), far_answers=int(mine.far.sum()),
                               depth=float(examples["depth"][i]),
                               evidence_distance=int(examples["evidence_distance"][i]), **more, **seen[i]))
  return out + _answer_records(name, _Answers(*map(np.concatenate, zip(*answers))), length)


def _answer_records(name, answers: _Answers, length):
  """Answers by distance to their evidence, in powers of 2 of the context, apart for those that lie near."""
  out, end = [], length >> max(0, length.bit_length() - 6)
  start, distance = 0, answers.query - answers.evidence
  while start < length:
    for far in (True, False):
      mine = answers.where((start <= distance) & (distance < end) & (answers.far == far))
      if len(mine.nll):
        exact_match, nll = mine.means()
        out.append(record_lib.make("answer", task=name, start=start, end=end, forced=not far, answers=len(mine.nll),
                                   exact_match=exact_match, answer_nll=nll))
    start, end = end, 2 * end
  return out
