"""What an evaluation asks: windows of held-out text and task examples, the same for all arms and seeds.

`load` reads it, before a run begins as well as at every evaluation; `HeldOut.settings` says what two evaluations
have to share for their numbers to be compared, and which of a run's evaluations are its own.
"""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json

import numpy as np

from nsa import config as config_lib, data, origins, programs, tasks
from nsa.data import recurrence, tokenizer

TASK_SEED = 20_26  # all arms and seeds are tested on the same examples


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """The windows of one corpus, and stacked, a row each, what all run modes ask of them. token_bytes: int[V], of each
  token, 0 of a special one."""
  windows: list[data.EvalWindow]
  token_bytes: np.ndarray

  @functools.cached_property
  def inputs(self) -> np.ndarray:
    """int32[W, T]"""
    return np.stack([window.inputs for window in self.windows])

  @functools.cached_property
  def targets(self) -> np.ndarray:
    """int32[W, T]"""
    return np.stack([window.targets for window in self.windows])

  @functools.cached_property
  def scored(self) -> np.ndarray:
    """bool[W, T]: whether a target stands for bytes."""
    return (self.token_bytes > 0)[self.targets]

  @functools.cached_property
  def bytes(self) -> np.ndarray:
    """int32[W, T]: those of each target that are text of the document."""
    out = self.token_bytes.astype(np.int32)[self.targets]
    out[:, 0] -= [window.prefix for window in self.windows]
    return out

  def few(self, count: int) -> Text:
    """`count` of the windows, spread evenly; all where there are no more."""
    have = len(self.windows)
    return self if count >= have else Text([self.windows[i * have // count] for i in range(count)], self.token_bytes)


class Examples(dict):
  """Arrays of `tasks.batch` by name."""

  @functools.cached_property
  def sha256(self) -> str:
    digest = hashlib.sha256()
    _add(digest, *(self[key] for key in sorted(self)))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """context: T, tokens. windows: of text, by corpus. tasks: the examples by the task's name. fingerprint: SHA-256 of
  the split's documents, "" where none are read. back: corpus -> how far back each target can be known from
  (recurrence.distances), where eval.ar_hits asks for it; seconds over the whole of training, so it is counted when
  asked for first."""
  context: int
  windows: dict[str, Text]
  tasks: dict[str, Examples]
  fingerprint: str
  back: Callable[[str], np.ndarray | None] = lambda corpus: None

  def settings(self, config, during: bool = False) -> dict:
    """`declared`, with SHA-256 of what was read: JSON-ready. Equal settings mean the same questions, asked in the same
    way."""
    return {**declared(config, during), "corpus_sha256": self.fingerprint,
            "windows_sha256": _windows_sha256(tuple(self.windows.items())) if self.windows else "",
            "examples_sha256": {name: arrays.sha256 for name, arrays in self.tasks.items()}}


@functools.lru_cache(maxsize=8)
def _windows_sha256(windows: tuple[tuple[str, Text], ...]) -> str:
  digest = hashlib.sha256()
  for corpus, text in windows:
    for window in text.windows:
      digest.update(f"{corpus!r} {window.document!r} {window.start} ".encode())
      _add(digest, window.inputs, window.targets)
  return digest.hexdigest()


def declared(config, during: bool = False) -> dict:
  """What the config alone says of an evaluation, JSON-ready; `during` as in `evaluate.write`."""
  e, short = config.eval, during and bool(config.eval.during)
  items = e.during_examples if short else e.task_examples
  names = (e.tasks or config.data.tasks) if items else ()
  kind = config.data.tokenizer.partition(":")[0]  # a run may be moved: what it makes of the text is in windows_sha256
  return json.loads(json.dumps({
      "split": e.split, "context": e.context or config.data.context, "tokenizer": kind,
      "sequences": (short and e.during_sequences or e.sequences) if _texts(config) else 0,
      "tasks": names, "task_examples": items if names else 0, "near": e.near,
      "decoded": e.decoded if names and not short else 0,
      "ar_hits": e.ar_hits and not short, "context_gain": () if short else e.context_gain,
      "run_modes": e.during if short else e.modes(config.seeds), "blocks": e.blocks,
      "diagnostics": e.diagnostics and e.diagnosed,
      "implementation": config.implementation}))


def unsealed(config):
  """The config whose last evaluation is the one of eval.sealed: the arm's own run mode and its endpoints, no more."""
  own = "dense" if config.schedule.stages[-1].mode == "dense" else "sparse"
  e = dataclasses.replace(config.eval, split=config.eval.sealed, sealed="", run_modes=(own,), more_modes=(),
                          ar_hits=False, context_gain=(), diagnosed=0)
  return dataclasses.replace(config, eval=e)


def _texts(config) -> dict[str, str]:
  """The corpora that have text."""
  return {name: source for name, source in config.data.texts.items() if source != "tasks"}


def load(config, during: bool = False, examples: int | None = None) -> HeldOut:
  """Reads what an evaluation asks; `during` as in `evaluate.write`. examples: no more of each task than that.

  Raises ValueError or FileNotFoundError that name the field of the config, its value and the fix: no such split, no
  document that is long enough, no text in any window, a task that does not fit into the context.
  """
  try:
    asked = declared(config, during)
    if examples is not None:
      asked["task_examples"] = min(examples, asked["task_examples"])
    return _load(config, asked)
  except ValueError as error:  # its field is data.context for all who ask for windows and examples
    if not config.eval.context:
      raise
    raise ValueError(str(error).replace("data.context = ", "eval.context = ", 1)) from None


def _load(config, asked):
  e, context, windows = config.eval, asked["context"], {}
  read = lambda tokens: [document for source in config.data.texts.values()
                         for document in data.load(source, e.split, data_dir=config.data.data_dir, tokens=tokens)]
  for corpus in _texts(config) if asked["sequences"] else ():
    few = asked["sequences"] if asked["sequences"] != e.sequences else 0  # on the way, some of the same
    windows[corpus] = _windows(config.data.texts[corpus], e.split, e.sequences, few, context, config.data.data_dir,
                               config.data.tokenizer)
    found = windows[corpus].windows
    if not any(windows[corpus].token_bytes[window.targets].any() for window in found):
      raise ValueError(f"data.source = {config.data.texts[corpus]!r}: the {len(found)} windows of {context} tokens of "
                       f"the split {e.split!r} hold special tokens alone, no byte to score; take text that does not "
                       "spell them")
  haystack = read("bytes") if asked["tasks"] else []
  same = (e.split, tuple(config.data.texts.values()), config.data.data_dir, config.data.tokenizer,
          origins.registered())
  examples = {name: _examples(name, asked["task_examples"], context, *same) for name in asked["tasks"]}

  def back(corpus):
    return _back(config, config.data.texts[corpus]) if asked["ar_hits"] else None

  documents = read(config.data.tokenizer) if windows else haystack
  return HeldOut(context, windows, examples, data.fingerprint(documents) if documents else "", back)


@functools.lru_cache(maxsize=8)
def _windows(source, split, count, few, context, data_dir, tokens) -> Text:
  """`count` windows of a source, or where `few` is above 0 that many of the same: made once for all evaluations of a
  process."""
  if few > 0:
    return _windows(source, split, count, 0, context, data_dir, tokens).few(few)
  config = config_lib.DataConfig(source=source, data_dir=data_dir, tokenizer=tokens)
  return Text(data.eval_windows(config, split, count, context), tokenizer.get(tokens).token_bytes)


def _back(config, source: str) -> np.ndarray:
  """Counted once per process, by whoever asks first."""
  e, context = config.eval, config.eval.context or config.data.context
  asked = (source, e.split, e.sequences, context, config.data.tokenizer, config.data.data_dir,
           e.near[1] if e.near else context // 8)
  return programs.get(("ar_hits", *asked), functools.partial(recurrence.of_windows, *asked))


def counted_ahead(config):
  """What the last evaluation of a run counts over its training text, seconds of the host's: for `programs.ahead`."""
  for source in _texts(config).values() if config.eval.ar_hits else ():
    yield functools.partial(_back, config, source)


@functools.lru_cache(maxsize=64)
def _examples(name, count, context, split, texts, data_dir, tokens, registered) -> Examples:
  """The examples of a task, made once for all evaluations of a process, or since another task was registered."""
  haystack = [document for source in texts for document in data.load(source, split, data_dir=data_dir)]
  return Examples(tasks.batch(name, TASK_SEED, count, context, split, haystack, tokens=tokens))


def check(config, examples: int | None = None) -> dict[str, str]:
  """Reads all that the evaluations of a run will ask, and raises what `load` raises. Returns {split: SHA-256 of its
  documents}. examples: as in `load`."""
  occasions = (True, False) if config.eval.every and config.eval.during else (False,)
  found = [(config.eval.split, load(config, during, examples)) for during in occasions]
  if config.eval.sealed:
    found.append((config.eval.sealed, load(unsealed(config), examples=examples)))
  return {split: asked.fingerprint for split, asked in found if asked.fingerprint}


def made(config) -> tuple:
  """What `programs` calls the examples of a run's evaluations, which `made_ahead` makes."""
  return "examples", repr((config.eval, config.data))


def made_ahead(config):
  """Makes all that a run's evaluations will ask, a second of the host's, for `programs.ahead`: `check` with an example
  of each task is enough to begin with."""
  yield functools.partial(programs.get, made(config), functools.partial(check, config))


def _add(digest, *arrays) -> None:
  for array in arrays:
    digest.update(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array))
