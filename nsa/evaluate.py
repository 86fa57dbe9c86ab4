"""Evaluation: held-out text and recall tasks, with the model run dense, sparse, and under controls.

Every record carries its seed, arm, size, step and run mode (records.py has the schema). Text windows and task examples are
the same for all arms and seeds, so that differences are paired.

A run mode is "dense", "sparse" (the method's own selector) or a training-free selector in its
place ("oracle", "random", "block_topk", "sink_window", "quest"), optionally with another geometry:
"sparse:num_blocks=8". Models that were trained with dense attention have no geometry of their
own: give it in `eval.blocks` or with the run mode (quest has the paper's).

Records of text are of one corpus each, which "corpus" names where the run has several (data.corpora). Those of tasks
score every answer: the means over an example's answers, over those of them that are far (their evidence lies outside of what any
arm sees without selecting, eval.near; in several places: each of them does), by distance, and in the last evaluation one by one.

Methods that choose once per prompt (methods/prompt/base.py: "vertical_slash", "flexprefill:alpha=0.8", "snapkv",
...) run on the model's dense attention, whatever it was trained with: its own selector or branches are left
out. They are scored behind the prompt alone: the first half of a text window is its prompt, and its record
has no bits_per_byte but that of the second half; a task's prompt ends where its first answer begins.

Records of a layer say how many tokens a query attended to and what that costs: tokens_visible, tokens_causal
(dense), and attention_flops per query, the selection's own included. They are means over all queries; of a
method that chooses once per prompt, over the prompt's (prefill methods) or over the others (snapkv, whose one
selection per prompt is not among them).
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import re

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from nsa import config as config_lib
from nsa import checkpoint, held_out, methods, metrics, model as model_lib, records as record_lib, sharding
from nsa import step as step_lib
from nsa.data import tokenizer
from nsa.methods import blocks

_MAX_HEAT = 64  # cells per side of a stored heat map


def open_run(workdir, step: int = -1):
  """(config, params, step) of a run directory's checkpoint; step -1 is the newest.

  Raises ConfigError if there is no such run or checkpoint.
  """
  workdir = epath.Path(workdir)
  if not (workdir / "config.json").exists():
    raise config_lib.ConfigError([("--workdir", str(workdir), "no run directory: config.json is missing")])
  config = config_lib.from_dict(metrics.read_json(workdir / "config.json"))
  steps = checkpoint.Checkpoints(workdir, read_only=True).steps()
  if not steps or (step >= 0 and step not in steps):
    raise config_lib.ConfigError([("--step", step, f"{workdir} has checkpoints at {steps}")])
  step = steps[-1] if step < 0 else step
  return config, checkpoint.load_params(workdir, step), step


def place_here(config, params):
  """(mesh, params on it) of the devices that are here, for params that lie in memory; run by every process.

  The axes of the model are the run's own, rows go over what is left (config.mesh, and config.eval.batch rounded
  up, are set so); one device alone needs no axes. Raises ConfigError if the axes do not fit.
  """
  if jax.device_count() == 1:
    config.mesh = config_lib.MeshConfig()
  config.mesh.data = -1
  parts = config.mesh.fsdp * config.mesh.context * config.mesh.tensor
  if jax.device_count() % parts:
    raise config_lib.ConfigError([("mesh", vars(config.mesh), f"the run's fsdp * context * tensor = {parts} must divide the "
                                   f"{jax.device_count()} devices that are here")])
  rows = jax.device_count() // parts * config.mesh.fsdp
  config.eval.batch = -(-config.eval.batch // rows) * rows
  mesh = sharding.make_mesh(config)
  abstract = step_lib.abstract_state(config, mesh).params
  return mesh, jax.tree.map(lambda leaf, x: sharding.place(leaf.sharding, x), abstract, params)


def write(config, params, workdir, step: int, mesh=None, during: bool = False, own: bool = False) -> tuple[list[dict], epath.Path]:
  """Evaluates and writes workdir/eval/<step>.json; returns the new records and the file.

  during: the short evaluation of `eval.during`, where it names run modes: seconds, while a run goes on.
  own: whether the run itself asks. Otherwise what differs in anything from the run's own evaluation at this step (other
    windows, items, run modes, split, context, options, corpus) goes to a file of its own, whose name says what: reports
    leave it out.
  With several processes each must call it; the first one writes.
  """
  asked = held_out.load(config, during)
  rows = records(config, params, step, mesh, during, asked)
  settings = asked.settings(config, during)
  directory = epath.Path(workdir) / "eval"
  path = directory / f"{step}.json"
  if not own:
    path = directory / f"{step}{_by_hand(config, workdir, step, settings)}.json"
  if not jax.process_index():
    directory.mkdir(parents=True, exist_ok=True)
    metrics.write_json(path, {"step": step, "arm": config.arm, "size": config.size, "settings": settings, "records": rows}, indent=None)
  return rows, path


def is_there(config, workdir, step: int, during: bool = False) -> bool:
  """Whether workdir/eval/<step>.json holds the run's own evaluation, asked as it would ask now."""
  path = epath.Path(workdir) / f"eval/{step}.json"
  return path.exists() and metrics.read_json(path).get("settings") == held_out.load(config, during).settings(config, during)


def _by_hand(config, workdir, step, settings) -> str:
  """The end of the file's name for an evaluation by hand: what differs from the run's own at this step, "" for nothing."""
  workdir = epath.Path(workdir)
  run = config_lib.from_dict(metrics.read_json(workdir / "config.json"))
  own = held_out.declared(run, during=step < run.schedule.steps)
  path, versions = workdir / f"eval/{step}.json", workdir / "versions.json"
  if path.exists():
    own |= metrics.read_json(path).get("settings") or {"settings": "unknown"}  # written before there were any
  elif versions.exists():
    own |= {"corpus_sha256": metrics.read_json(versions).get("held_out_sha256", {}).get(settings["split"], settings["corpus_sha256"])}
  differ = [name for name in {**settings, **own} if name in own and settings.get(name) != own[name]]
  differ = [name for name in differ if not name.endswith("_sha256")] or differ  # what was read follows from what was asked
  parts = [(name, str(settings.get(name))) for name in differ]
  short = lambda text: text if re.fullmatch(r"\w{1,24}", text) else hashlib.sha256(text.encode()).hexdigest()[:8]
  return "".join(f"-{name}={short(text)}" for name, text in parts)


def records(config, params, step: int, mesh=None, during: bool = False, asked: held_out.HeldOut | None = None) -> list[dict]:
  """All records of one checkpoint; `during` as in `write`. `params` has a leading axis of seeds if the config has several.

  mesh: where the params lie and the rows of a batch go; None = the default device.
  asked: what held_out.load gives for this config, if it is read already.
  """
  e = config.eval
  short = during and bool(e.during)
  mesh = mesh if mesh is not None and mesh.size > 1 else None
  asked = asked or held_out.load(config, during)
  context, windows, task_sets = asked.context, asked.windows, asked.tasks
  token_bytes = tokenizer.get(config.data.tokenizer).token_bytes
  out = []
  for run_mode in e.during if short else e.run_modes:
    found = how(config, run_mode)
    if found is None:
      continue
    run_config, mode, selector = found
    run = _runner(_program(run_config, mode, selector), mesh)
    for replica, seed in enumerate(config.seeds):
      one = params if len(config.seeds) == 1 else jax.tree.map(lambda x: x[replica], params)
      if isinstance(run_config.attention, methods.PromptMethod):
        one = model_lib.backbone(one)
      base = {"seed": seed, "arm": config.arm, "size": config.size, "step": step, "run_mode": run_mode}
      rows = []
      for corpus, of_corpus in windows.items():
        of_text = _text_records(run, one, of_corpus, e, context, run_config.attention, token_bytes)
        rows += [{**row, "corpus": corpus} if corpus else row for row in of_text]
      _count_flops(rows, run_config, selector, context)
      for name, examples in task_sets.items():
        rows += _task_records(run, one, name, examples, e, not short)
      rows = [row for row in rows if row["kind"] != "heat"] if short else rows
      out += [{**row, **base} for row in rows]
  return out


def geometry(config, run_mode: str):
  """The attention options that a run mode uses; None if the model has no such mode."""
  found = how(config, run_mode)
  return None if found is None else found[0].attention


def how(config, run_mode: str):
  """(config to run with, mode, selector), or None where the run mode has no meaning."""
  name, options = methods.parse_run_mode(run_mode)
  if name == "dense":
    return config, "dense", "own"
  run = copy.copy(config)
  known = methods.run_mode_fields(name)
  options = {n: v for n, v in {**config.eval.blocks, **options}.items() if n in known}
  own = config.attention
  if name != "sparse" and issubclass(methods.get(name), methods.PromptMethod):
    if any(method.acts_when_dense for method in config.methods):
      logging.info("%s has no run mode %s: it is not the same model without its method's parameters", config.arm, run_mode)
      return None
    run.attention, run.layers, run.others = methods.get(name)(**options), (), {}
    return run, "sparse", "own"
  if isinstance(own, blocks.BlockMethod):
    attention, selector = dataclasses.replace(own, **options), "own" if name == "sparse" else name
  elif name == "sparse" and any(method.has_sparse for method in config.methods):
    return config, "sparse", "own"                 # a window, a memory, or a hybrid of dense and other layers
  elif name != "sparse" and (options or methods.get(name).has_geometry):
    attention, selector = methods.get(name)(**options), "own"
  else:
    logging.info("%s has no run mode %s: %s", config.arm, run_mode,
                 "it has no selector" if name == "sparse" else "eval.blocks gives no geometry")
    return None
  run.attention = attention
  return run, "sparse", selector


def _program(config, mode: str, selector: str) -> model_lib.Static:
  """What a run mode compiles: once for all arms of an architecture, whatever their seeds, data and schedules."""
  return model_lib.Static((model_lib.architecture(config), mode, selector, config.eval.diagnostics and _observed(config, mode)))


def _observed(config, mode: str):
  """The options that diagnostics of a run need for the size and number of blocks; None where it can have none."""
  if isinstance(config.attention, (blocks.BlockMethod, methods.PromptMethod)):
    return config.attention
  return blocks.BlockMethod(**config.eval.blocks) if mode == "dense" and config.eval.blocks else None


@functools.lru_cache(maxsize=64)
def _runner(static, mesh):
  """(params, batch, watch) -> per token nll and correctness, and diagnostics per layer; whole on every process.

  watch: bool; without it the diagnostics, which take longer than the model, are zeros. One program serves both.
  """
  config, mode, selector, own = static.value
  constrain = (lambda x, axes: x) if mesh is None else sharding.constrain(mesh)
  operations = contextlib.nullcontext if mesh is None else functools.partial(sharding.operations, mesh)

  def run(params, batch, watch):
    def observe(method, q, k, block_indices, call):
      if isinstance(own, methods.PromptMethod):
        return {}  # it measures itself
      options = method if isinstance(method, blocks.BlockMethod) else own  # a dense layer beside sparse ones
      measure = lambda: blocks.diagnostics(q, k, block_indices, call, options, rows=batch["rows"])
      return jax.lax.cond(watch, measure, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure)))

    with operations():
      out = model_lib.forward(config, params, batch["inputs"], batch["segment_ids"], mode=mode, selector=selector,
                              key=jax.random.key(0), losses=False, prompt=batch["prompt"], constrain=constrain,
                              observe=observe if own else None)
    nll = step_lib.target_nll(out.logits, batch["targets"])
    correct = jnp.argmax(out.logits, axis=-1) == batch["targets"]
    # One dict per layer: those of a dense prefix have fewer diagnostics.
    seen = [{name: x[i] for name, x in stack.items()} for stack in out.layers
            for i in range(len(next(iter(stack.values()), ())))]
    if isinstance(own, methods.PromptMethod):  # [B, K] each
      weight = batch["rows"] / batch["rows"].sum()
      seen = [{name: jnp.einsum("bk,b->k", x, weight) for name, x in layer.items()} for layer in seen]
    return nll, correct, seen

  if mesh is None:
    return jax.jit(run)
  compiled = jax.jit(run, out_shardings=NamedSharding(mesh, P()))
  return lambda params, batch, watch: compiled(params, sharding.place_rows(mesh, batch), watch)


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


def _text_records(run, params, windows, e, context, method, token_bytes):
  if not windows:
    return []
  half = context // 2
  scored = half if isinstance(method, methods.PromptMethod) else 0  # from which position on
  arrays = {name: np.stack([getattr(w, name) for w in windows]) for name in ("inputs", "targets", "segment_ids")}
  arrays["prompt"] = np.full(len(windows), half, np.int32)
  nll = np.zeros((len(windows), context))
  seen, weights, done = [], [], []
  watched = _spread(-(-len(windows) // e.batch), -(-e.diagnosed // e.batch))
  for number, (batch, rows) in enumerate(_batches(arrays, e.batch)):
    watch = number in watched or bool(scored)  # methods that choose once per prompt measure themselves, always
    values, _, layers = run(params, batch, watch)
    done.append((rows, values))                # read below: the device does not wait for the host
    if watch:
      seen.append(layers)
      weights.append(rows.stop - rows.start)
  for rows, values in done:
    nll[rows] = np.asarray(values)[:rows.stop - rows.start]
  seen = jax.device_get(seen)
  real = token_bytes[arrays["targets"]]  # bytes of each target, 0 for special tokens
  bits = nll / step_lib.LN2 * (real > 0)
  rows = [record_lib.make("language", split=e.split, document=w.document, start=int(w.start),
                          **({} if scored else _per_byte("bits_per_byte", bits[i], real[i])),
                          bytes=int(real[i, scored:].sum()),
                          **_per_byte("second_half_bits_per_byte", bits[i, half:], real[i, half:]),
                          second_half_bytes=int(real[i, half:].sum())) for i, w in enumerate(windows)]
  edges = [0] + [context >> shift for shift in range(6, -1, -1) if context >> shift]
  for first, end in zip(edges[:-1], edges[1:]):
    if first < scored:
      continue
    rows.append(record_lib.make("position", start=first, end=end, bytes=int(real[:, first:end].sum()),
                                **_per_byte("bits_per_byte", bits[:, first:end], real[:, first:end])))
  return rows + (_layer_records(seen, weights, windows[0].document) if seen else [])


def _spread(count, wanted):
  """`wanted` of the numbers 0 .. count - 1, the first and others evenly behind it; all where there are no more."""
  return {i * count // wanted for i in range(wanted)} if wanted < count else set(range(count))


def _per_byte(name, bits, real) -> dict[str, float]:
  """{name: bits per byte}; {} where all targets are special tokens, which stand for no byte."""
  return {name: float(bits.sum() / real.sum())} if real.sum() else {}


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


def _count_flops(rows, config, selector, context):
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


def _task_records(run, params, name, examples, e, listed: bool):
  """One record per example and one per range of distances; `listed`: the examples' answers one by one."""
  count, length = examples["inputs"].shape
  nll, correct = np.zeros((count, length)), np.zeros((count, length), bool)
  # The input at the first answer's target is the prompt's last token.
  examples = {**examples, "prompt": (np.argmax(examples["answer_group"] >= 0, axis=1) + 1).astype(np.int32)}
  done = [(rows, *run(params, batch, False)[:2]) for batch, rows in _batches(examples, e.batch)]
  for rows, values, right in done:
    keep = rows.stop - rows.start
    nll[rows], correct[rows] = np.asarray(values)[:keep], np.asarray(right)[:keep]
  first, last = e.near or (length // 32, length // 8)
  out, answers = [], []
  for i in range(count):
    group = examples["answer_group"][i]
    query, evidence = examples["query"][i], examples["evidence"][i, :, :, 1]
    missing = evidence < 0  # an answer with fewer pieces than others
    far = (missing | (evidence >= first) & (query[:, None] - evidence > last)).all(axis=1)
    mine = [(int(query[g]), int(evidence[g].max()), bool(far[g]), int(correct[i, group == g].all()), float(nll[i, group == g].mean()))
            for g in range(group.max() + 1)]
    answers += mine
    right, loss, far = (np.array([a[at] for a in mine]) for at in (3, 4, 2))
    of_far = dict(far_exact_match=float(right[far].mean()), far_answer_nll=float(loss[far].mean())) if far.any() else {}
    one_by_one = dict(answers=[[query, evidence, right, round(loss, 4)] for query, evidence, _, right, loss in mine]) if listed else {}
    out.append(record_lib.make("task", task=name, index=i, exact_match=float(right.mean()), answer_nll=float(nll[i, group >= 0].mean()),
                               far_answers=int(far.sum()), **of_far, depth=float(examples["depth"][i]),
                               evidence_distance=int(examples["evidence_distance"][i]), **one_by_one))
  return out + _answer_records(name, answers, length)


def _answer_records(name, answers, length):
  """Answers by distance to their evidence, in powers of 2 of the context, apart for those that lie near."""
  out, end = [], length >> max(0, length.bit_length() - 6)
  start = 0
  while start < length:
    for far in (True, False):
      mine = [a for a in answers if start <= a[0] - a[1] < end and a[2] == far]
      if mine:
        out.append(record_lib.make("answer", task=name, start=start, end=end, forced=not far, answers=len(mine),
                                   exact_match=float(np.mean([a[3] for a in mine])), answer_nll=float(np.mean([a[4] for a in mine]))))
    start, end = end, 2 * end
  return out
