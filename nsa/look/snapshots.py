"""Hidden states at chosen steps of a run: which text they are taken of, when, and where they are written.

A run whose config has eval.hidden_states writes workdir/hidden/<step>.json at these steps, while its weights are at
hand (records.HIDDEN_STATES has the schema). Every item stands alone in a row from its first place on, so that position
and preceding text are the same for all: passages that training has planted 0 to 64 times, by then (data/planting.py),
held-out text, other kinds of text, held-out text shuffled, and, where a run learns mqar, recall of one of 2 to 32 pairs
by the last token.

Cost: a forward pass over (planted + 12 x 4 per corpus + 80) items of 2,048 tokens; of the main study's 10M model, two
corpora and 60 passages, 236 items or 0.48M tokens, as many as 15 training steps read.
"""
from __future__ import annotations

import dataclasses
import functools
import math

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from nsa import (
  data,
  evaluate,
  metrics,
  model as model_lib,
  processes,
  programs,
  records,
  schedule,
  sharding,
  step as step_lib,
  tasks,
)
from nsa.data import counter, planting, tokenizer
from nsa.look import hidden_states

PASSAGES = 12                # of each corpus and kind of text, but planted ones
PAIRS = (2, 4, 8, 16, 32)    # of recall
EXAMPLES = 16                # of each number of pairs
_SEED = 20_26                # all arms and seeds see the same


@dataclasses.dataclass(frozen=True)
class Item:
  """What stands in one row. tokens: [T + 1], with the last one's target. last: whether its last state alone counts."""
  tokens: np.ndarray
  kind: str
  corpus: str
  document: str
  start: int
  times: int | None = None
  planted: int | None = 0
  pairs: int | None = None
  distance: int | None = None

  @property
  def last(self) -> bool:
    return self.pairs is not None


def size(config) -> int:
  """Tokens of an item: those of a passage, or of a shorter context."""
  return min(planting.SIZE, config.data.context)


def items(config, step: int, source: data.Data | None = None, passages: int = 0, tokens: int = 0) -> list[Item]:
  """All items of a run's snapshot at a step, planted ones first.

  They are the same at every step, but for how often each was planted by then.
  source: the training data of the run's seed, for planted passages; None = without these.
  passages: of each corpus and each other kind of text; 0 = PASSAGES. tokens: of an item; 0 = `size`.
  """
  T, out, passages = tokens or size(config), [], passages or PASSAGES
  key = lambda p: (p.corpus, p.document, p.start)
  by_then = {key(p): p.planted for p in source.planted(step)} if source else {}
  for p in source.planted(config.schedule.steps) if source else ():
    out.append(Item(source.planting.tokens(p)[:T + 1], "planted", *key(p), p.times, by_then.get(key(p), 0)))
  for corpus, text in config.data.texts.items():
    if text == "tasks":
      continue
    held_out = _passages(config, corpus, text, "val", "held_out", passages, T)
    out += held_out + _passages(config, corpus, text, "ood", "ood", passages, T)
    order = lambda i: counter.permutation(counter.key("shuffled", i), T + 1)
    out += [dataclasses.replace(p, kind="shuffled", tokens=p.tokens[order(i)]) for i, p in enumerate(held_out)]
  if any(name.partition(":")[0] == "mqar" for name in config.data.tasks):
    out += [one for pairs in PAIRS for one in _recall(pairs, T)]
  return out


def _passages(config, corpus, text, split, kind, count, T) -> list[Item]:
  """`count` passages of a split, spread over its documents and over each; none where the source has no such split."""
  try:
    documents = data.load(text, split, data_dir=config.data.data_dir, tokens=config.data.tokenizer)
  except (FileNotFoundError, ValueError):
    return []
  documents = [d for d in documents if len(d.tokens) > T]
  out = []
  for i in range(count if documents else 0):
    d = documents[i * len(documents) // count if len(documents) > count else i % len(documents)]
    start = (len(d.tokens) - T) * (2 * i + 1) // (2 * count)
    out.append(Item(d.tokens[start:start + T + 1], kind, corpus, d.name, start))
  return out


def _recall(pairs, T) -> list[Item]:
  """Examples of mqar whose last query ends the row; the filler behind it goes to the front."""
  task = tasks.get(f"mqar:pairs={pairs}")
  out = []
  for index in range(EXAMPLES if task.min_length <= T + 1 else 0):
    example = task.example(_SEED, index, T + 1, "val")
    last = int(example.query.argmax())
    query = int(example.query[last])
    out.append(Item(np.roll(example.tokens, T - 1 - query), "recall", "", f"mqar:pairs={pairs}", index, planted=None,
                    pairs=pairs, distance=int(example.distances[last])))
  return out


def mode_of(config, step: int) -> str:
  """The run mode that the step before a snapshot trained; "sparse" of mixed ones."""
  stage = config.schedule.stages[schedule.at(config, max(step - 1, 0)).stage]
  return "dense" if stage.mode in ("dense", "warmup") else "sparse"


def take(config, params, seed: int, step: int, source: data.Data | None = None, mesh=None, run_mode: str = "",
         **which: int) -> dict:
  """One snapshot, as records.HIDDEN_STATES says.

  params: of one seed (no leading axis of seeds).
  source: the training data of that seed; None = read now, where data.planted needs it.
  run_mode: as in eval.run_modes; "" = `mode_of`.
  which: passages and tokens of `items`.

  Raises ValueError if there is nothing to measure, or the model has no such run mode.
  """
  source = source or (data.make(config.data, seed) if config.data.planted else None)
  run_mode = run_mode or mode_of(config, step)
  found = items(config, step, source, **which)
  if not found:
    raise ValueError(f"eval.hidden_states = {config.eval.hidden_states}: neither text nor mqar in data.tasks, nothing "
                     "to measure")
  T, D, points = len(found[0].tokens) - 1, config.model.d_model, config.model.num_layers + 1
  run = _runner(config, run_mode, T, mesh)
  turn = hidden_states.rotation(D)
  anything = np.tile(np.arange(D - hidden_states.trim(D), dtype=np.int32), (points, 1))
  # First what the largest dimensions of held-out text are; without any, of what there is.
  reference = [i for i in found if i.kind == "held_out"] or found
  square = _measured(run, params, reference, config.eval.batch, T, turn, anything)["square"].mean(1)  # [points, D]
  keep = hidden_states.kept(square)
  seen = _measured(run, params, found, config.eval.batch, T, turn, keep)
  gone = np.stack([np.setdiff1d(np.arange(D), one) for one in keep])
  text = np.array([not i.last for i in found])
  spectral = np.where(text[None, :, None], seen["spectral"], np.nan)
  kept = text[None, :] | (np.arange(points)[:, None] >= points - 2)  # of recall the last layer and the final norm
  measured = np.where(kept[..., None, None], seen["measures"], np.nan)
  names = (*hidden_states.MEASURES, "spectral_participation")
  values = {variant: {m: measured[:, :, v, i].T for i, m in enumerate(hidden_states.MEASURES)}
            for v, variant in enumerate(hidden_states.VARIANTS)}
  for i, variant in enumerate(("own", "trimmed")):  # a rotation leaves it as it is
    values[variant]["spectral_participation"] = spectral[..., i].T
  null = {variant: hidden_states.gaussian(T, width) for variant, width in (("own", D), ("trimmed", keep.shape[1]))}
  token_bytes = tokenizer.get(config.data.tokenizer).token_bytes
  return records.snapshot(
      seed=int(seed), arm=config.arm, size=config.size, step=int(step), run_mode=run_mode, tokens=T, width=D,
      points=[*range(points - 1), "norm"], trimmed=gone.tolist(),
      trimmed_energy=_rounded([square[p, gone[p]].sum() / square[p].sum() for p in range(points)]),
      null={variant: {m: _rounded([x["mean"][i], x["sd"][i]]) for i, m in enumerate(names)}
            for variant, x in null.items()},
      **{name: [getattr(i, name) for i in found]
         for name in ("kind", "corpus", "document", "start", "times", "planted", "pairs", "distance")},
      bits_per_byte=_rounded([nll / step_lib.LN2 / (1 if i.last else token_bytes[i.tokens[1:]].sum() / T)
                              for i, nll in zip(found, seen["nll"])]),
      correct=_rounded(seen["correct"]), entropy=_rounded(seen["entropy"].T),
      captured_mass=_rounded(seen["captured_mass"].T),
      values={variant: {m: _rounded(x) for m, x in of.items()} for variant, of in values.items()})


def _rounded(x):
  """Lists of Python numbers of 5 significant digits, None for NaN."""
  if np.ndim(x):
    return [_rounded(y) for y in x]
  return None if math.isnan(x) else float(f"{x:.5g}")


def _measured(run, params, found, batch, T, turn, keep) -> dict[str, np.ndarray]:
  """What `hidden_states.make` returns, of all items: [points or layers, items, ...].

  "nll", nats, and "correct" are float64[items].
  """
  parts, done = [], []
  for first in range(0, len(found), batch):
    mine = found[first:first + batch]
    full = mine + mine[-1:] * (batch - len(mine))
    tokens = np.stack([i.tokens for i in full]).astype(np.int32)
    weights = np.stack([np.eye(1, T, T - 1)[0] if i.last else np.full(T, 1 / T) for i in full])
    rows = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=weights.astype(np.float32))
    done.append((run(params, rows, turn, keep), weights, len(mine)))  # read below: the device does not wait
  for out, weights, count in done:
    out = jax.device_get(out)
    one = {name: np.sum(np.asarray(out[name], np.float64) * weights, 1)[:count] for name in ("nll", "correct")}
    rest = {"entropy": out["entropy"], "captured_mass": out["captured_mass"], **out["points"]}
    parts.append({**one, **{name: np.asarray(x, np.float64)[:, :count] for name, x in rest.items()}})
  return {name: np.concatenate([p[name] for p in parts], axis=min(1, x.ndim - 1)) for name, x in parts[0].items()}


def _runner(config, run_mode, T, mesh=None):
  """The compiled `hidden_states.make` for batches of eval.batch items of T tokens."""
  static = _static(config, run_mode)
  if mesh is None or mesh.size == 1:
    return _compiled(static, config.eval.batch, T)
  compiled = _on_mesh(static, mesh)
  return lambda params, batch, *rest: compiled(params, sharding.place_rows(mesh, batch), *rest)


def _static(config, run_mode):
  way = evaluate.how(config, run_mode)
  if way is None:
    raise ValueError(f"run_mode = {run_mode!r}: {config.arm} has no such mode")
  return model_lib.Static((model_lib.architecture(way.config), way.mode, way.selector))


@functools.lru_cache(maxsize=8)
def _on_mesh(static, mesh):
  run = hidden_states.make(*static.value, mesh)

  def partitioned(*arguments):
    with sharding.operations(mesh):
      return run(*arguments)

  return jax.jit(partitioned, out_shardings=NamedSharding(mesh, P()))


def _compiled(static, batch, T):
  def lower():
    config = static.value[0]
    D, points = config.model.d_model, config.model.num_layers + 1
    tokens, number = (jax.ShapeDtypeStruct((batch, T), dtype) for dtype in (jnp.int32, jnp.float32))
    rows = dict(inputs=tokens, targets=tokens, weights=number)
    keep = jax.ShapeDtypeStruct((points, D - hidden_states.trim(D)), jnp.int32)
    return jax.jit(hidden_states.make(*static.value)).lower(
        model_lib.abstract_params(config), rows, jax.ShapeDtypeStruct((D, D), jnp.float32), keep)

  return programs.compiled(("hidden states", static, batch, T), lower)


# --- in a run -------------------------------------------------------------------------


def _seeds(config) -> list[int]:
  """Those of the run's seeds that are looked at."""
  return [seed for seed in config.seeds if seed in (config.eval.hidden_seeds or config.seeds)]


def path_of(workdir, step: int) -> epath.Path:
  """The file with the snapshots of a step."""
  return epath.Path(workdir) / f"hidden/{step}.json"


def due(config, workdir, step: int) -> bool:
  """Whether a run takes a snapshot when `step` steps are done: asked for, and not there yet. Processes agree on it."""
  wanted = step in config.eval.hidden_states and bool(_seeds(config))
  there = wanted and path_of(workdir, step).exists()
  processes.agree(hidden_states=f"{step} {there}") if wanted else None
  return wanted and not there


def compilations(config, first: int, mesh=None):
  """What the snapshots after step `first` compile, for `programs.ahead`."""
  if mesh is not None and mesh.size > 1 or not _seeds(config):
    return
  for run_mode in dict.fromkeys(mode_of(config, step) for step in sorted(config.eval.hidden_states) if step >= first):
    yield functools.partial(_runner, config, run_mode, size(config))


def write(config, params, workdir, step: int, sources: list[data.Data] | None = None, mesh=None, **which: int) -> None:
  """Takes a snapshot of every seed that is looked at and writes them; each process calls it, the first one writes.

  params: with a leading axis of seeds if the config has several. sources: the training data of each seed, as in `take`.
  """
  found = []
  for replica, seed in enumerate(config.seeds):
    if seed in _seeds(config):
      one = params if len(config.seeds) == 1 else jax.tree.map(lambda x, r=replica: x[r], params)
      found.append(take(config, one, seed, step, sources[replica] if sources else None, mesh, **which))
  if processes.first():
    metrics.write_json(path_of(workdir, step), {"step": step, "snapshots": found}, indent=None)
