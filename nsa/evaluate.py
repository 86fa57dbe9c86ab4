"""Evaluation: held-out text and recall tasks, with the model run dense, sparse, and under controls.

Every record carries its seed, arm, size, step and run mode (records.py has the schema). Text windows and task examples
are the same for all arms and seeds, so that differences are paired.

A run mode is "dense", "sparse" (the method's own selector) or a training-free selector in its
place ("oracle", "random", "block_topk", "sink_window", "quest"), optionally with another geometry:
"sparse:num_blocks=8". Models that were trained with dense attention have no geometry of their
own: give it in `eval.blocks` or with the run mode (quest has the paper's).

Records of text are of one corpus each, which "corpus" names where the run has several (data.corpora). Those of tasks
score every answer: the means over an example's answers, over those of them that are far (their evidence lies outside of
what any arm sees without selecting, eval.near; in several places: each of them does), by distance, and in the last
evaluation one by one. There, too, where the config asks for them: the answers of some examples decoded greedily with
the KV cache in dense and sparse mode (eval.decoded; on one device, of models without a memory); the loss of what a
model can know from far back (eval.ar_hits), and of the last quarter of a window given less and less before it
(eval.context_gain).

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

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import re
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from nsa import (
  checkpoint,
  config as config_lib,
  decoding,
  held_out,
  methods,
  metrics,
  model as model_lib,
  programs,
  rundir,
  scores,
  sharding,
  stacking,
  step as step_lib,
)
from nsa.methods import blocks


def open_run(workdir, step: int = -1):
  """(config, params, step) of a run directory's checkpoint; step -1 is the newest.

  Raises ConfigError if there is no such run or checkpoint.
  """
  workdir = epath.Path(workdir)
  config = rundir.read_config(workdir)
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
    fix = f"the run's fsdp * context * tensor = {parts} must divide the {jax.device_count()} devices that are here"
    raise config_lib.ConfigError([("mesh", vars(config.mesh), fix)])
  rows = jax.device_count() // parts * config.mesh.fsdp
  config.eval.batch = -(-config.eval.batch // rows) * rows
  mesh = sharding.make_mesh(config)
  abstract = step_lib.abstract_state(config, mesh).params
  return mesh, jax.tree.map(lambda leaf, x: sharding.place(leaf.sharding, x), abstract, params)


def write(config, params, workdir, step: int, mesh=None, during: bool = False,
          own: bool = False, seconds: collections.Counter | None = None) -> tuple[list[dict], epath.Path]:
  """Evaluates and writes workdir/eval/<step>.json; returns the new records and the file.

  during: the short evaluation of `eval.during`, where it names run modes: seconds, while a run goes on.
  own: whether the run itself asks. Otherwise what differs in anything from the run's own evaluation at this step (other
    windows, items, run modes, split, context, options, corpus) goes to a file of its own, whose name says what: reports
    leave it out.
  seconds: gets those that the devices took, by run mode and split; those of greedy decoding are not among them.
  With several processes each must call it; the first one writes. The last evaluation that a run asks also writes
  eval.sealed. One process alone keeps what each run mode gives, until the file is whole: an evaluation of the run's
  own that is cut goes on behind the run modes that it has.
  """
  if own and not during and config.eval.sealed:  # first: where the other file is, this one is
    _write(held_out.unsealed(config), params, workdir, step, mesh, "-sealed", seconds=seconds)
  return _write(config, params, workdir, step, mesh, "" if own else None, during, seconds)


def _write(config, params, workdir, step, mesh, ending: str | None, during: bool = False, seconds=None):
  """`ending` of the file's name behind the step; None for an evaluation by hand."""
  asked = held_out.load(config, during)
  settings = asked.settings(config, during)
  directory = epath.Path(workdir) / "eval"
  path = directory / f"{step}{_by_hand(workdir, step, settings) if ending is None else ending}.json"
  parts = None
  if (ending is not None and len(settings["run_modes"]) > 1 and not during and jax.process_count() == 1
      and "://" not in str(directory)):
    parts = directory / f"{path.stem}-parts"
  keep = parts and functools.partial(_kept, parts, settings)
  rows = records(config, params, step, mesh, during, asked, keep, seconds)
  if not jax.process_index():
    directory.mkdir(parents=True, exist_ok=True)
    metrics.write_json(path, {"step": step, "arm": config.arm, "size": config.size, "settings": settings,
                              "records": rows}, indent=None)
  if parts and parts.exists():
    parts.rmtree()
  return rows, path


def _kept(parts, settings: dict, run_mode: str, make) -> list[dict]:
  """make(), the records of a run mode, from `parts` where an evaluation that asked the same had them."""
  path = parts / f"{hashlib.sha256(run_mode.encode()).hexdigest()[:16]}.json"
  if path.exists() and (found := metrics.read_json(path))["settings"] == settings:
    return found["records"]
  parts.mkdir(parents=True, exist_ok=True)
  rows = make()
  metrics.write_json(path, {"settings": settings, "records": rows}, indent=None)
  return rows


def is_there(config, workdir, step: int, during: bool = False) -> bool:
  """Whether workdir/eval/<step>.json holds the run's own evaluation, asked as it would ask now."""
  path = epath.Path(workdir) / f"eval/{step}.json"
  return (path.exists()
          and _settings(path) == held_out.load(config, during).settings(config, during))


def _settings(path) -> dict | None:
  """What the evaluation in a file asked; None where it says nothing of it."""
  found = metrics.read_json(path)
  return found.get("settings") if isinstance(found, dict) else None


def _by_hand(workdir, step, settings) -> str:
  """The end of the file's name for an evaluation by hand: what differs from the run's own at this step, "" for
  nothing."""
  workdir = epath.Path(workdir)
  run = rundir.read_config(workdir)
  own = held_out.declared(run, during=step < run.schedule.steps)
  path, versions = workdir / f"eval/{step}.json", workdir / "versions.json"
  if path.exists():
    own |= _settings(path) or {"settings": "unknown"}  # written before there were any
  elif versions.exists():
    read = metrics.read_json(versions).get("held_out_sha256", {})
    own |= {"corpus_sha256": read.get(settings["split"], settings["corpus_sha256"])}
  differ = [name for name in {**settings, **own} if name in own and settings.get(name) != own[name]]
  # what was read follows from what was asked
  differ = [name for name in differ if not name.endswith("_sha256")] or differ
  parts = [(name, str(settings.get(name))) for name in differ]
  short = lambda text: text if re.fullmatch(r"\w{1,24}", text) else hashlib.sha256(text.encode()).hexdigest()[:8]
  return "".join(f"-{name}={short(text)}" for name, text in parts)


def records(config, params, step: int, mesh=None, during: bool = False,
            asked: held_out.HeldOut | None = None, keep=None,
            seconds: collections.Counter | None = None) -> list[dict]:
  """All records of one checkpoint; `during` as in `write`. `params` has a leading axis of seeds if the config has
  several.

  mesh: where the params lie and the rows of a batch go; None = the default device.
  asked: what held_out.load gives for this config, if it is read already.
  keep: called for every run mode with its name and what makes its records; returns these. None = what makes them is
    called. May be called in several threads.
  seconds: as in `write`.
  """
  e = config.eval
  short = during and bool(e.during)
  if short:  # one batch says how a selection comes along
    e = dataclasses.replace(e, diagnosed=min(e.diagnosed, e.batch))
  mesh = mesh if mesh is not None and mesh.size > 1 else None
  it = _Evaluation(config, params, step, mesh, e, asked or held_out.load(config, during), short)

  def of(run_mode):
    if (way := how(config, run_mode)) is None:
      return []
    make = functools.partial(_of_mode, it, run_mode, way)
    return keep(run_mode, make) if keep else make()

  out = _two_at_a_time(of, e.during if short else e.modes(config.seeds), mesh)
  if seconds is not None:
    seconds.update(it.turns.seconds)
  return out


def _two_at_a_time(of, items, mesh) -> list[dict]:
  """The records of all items, in their order: `of` reckons with one while the device works for the other. Several
  devices are asked in one order."""
  if mesh is not None:
    return [row for item in items for row in of(item)]
  with concurrent.futures.ThreadPoolExecutor(2, "evaluation") as pool:
    return [row for rows in pool.map(of, items) for row in rows]


@dataclasses.dataclass(frozen=True)
class _Evaluation:
  """What is asked of one checkpoint, in whatever run mode."""
  config: config_lib.Config
  params: Any
  step: int
  mesh: Mesh | None                # None: one device
  eval: config_lib.EvalConfig      # of the config, less where `short`
  asked: held_out.HeldOut
  short: bool                      # on the way of a run (eval.during)
  turns: scores.Turns = dataclasses.field(default_factory=scores.Turns)


def _of_mode(it: _Evaluation, run_mode: str, way: Way) -> list[dict]:
  """The records of one run mode."""
  out, config, asked, e = [], it.config, it.asked, it.eval
  program = _program(way)
  if it.mesh is None:  # before the first turn: who waits for a compiler keeps no device from another, and takes none
    _compiled(program, e.batch, asked.context)
  run = _runner(program, it.mesh)
  ask = functools.partial(it.turns.ask, f"{run_mode}, {config.eval.split}")
  method = way.config.attention
  once = isinstance(method, methods.PromptMethod)
  own = run_mode in ("dense", "sparse")
  for replica, seed in enumerate(config.seeds):
    if not it.short and run_mode not in e.modes((seed,)):
      continue
    params = it.params if len(config.seeds) == 1 else jax.tree.map(lambda x: x[replica], it.params)
    if once:
      params = stacking.backbone(params)
    decode = functools.partial(_decoder(way), params) if own and not it.short and it.mesh is None else None

    def of_text(corpus):
      rows = scores.text(run, params, asked.windows[corpus], e, asked.context, method, asked.back(corpus),
                         e.context_gain if own and not it.short else (), ask)
      return [{**row, "corpus": corpus} if corpus else row for row in rows]

    def of_task(name):
      listed = not it.short and (own or run_mode == "oracle")
      return scores.task(run, params, name, asked.tasks[name], e, listed, decode, once, ask)

    parts = [*(functools.partial(of_text, corpus) for corpus in asked.windows),
             *(functools.partial(of_task, name) for name in asked.tasks)]
    rows = _two_at_a_time(lambda part: part(), parts, it.mesh)
    scores.count_flops(rows, way.config, way.selector, asked.context)
    base = {"seed": seed, "arm": config.arm, "size": config.size, "step": it.step, "run_mode": run_mode}
    out += [{**row, **base} for row in rows if not (it.short and row["kind"] == "heat")]
  return out


class Way(NamedTuple):
  """How a run mode runs a model."""
  config: config_lib.Config        # to run with: its attention is the run mode's
  mode: str                        # the model's: "dense" | "sparse"
  selector: str                    # "own", or the control that takes its place


def how(config, run_mode: str) -> Way | None:
  """None where the run mode has no meaning."""
  found = _how(config, run_mode)
  if isinstance(found, str):
    logging.info("%s has no run mode %s: %s", config.arm, run_mode, found)
    return None
  return found


def refuse_absent(config, run_modes, field: str) -> None:
  """Raises ConfigError for run modes without a meaning. Who asks for one by hand is to hear of it; arms of a study, all
  asked the same, leave them out."""
  absent = [(field, run_mode, found) for run_mode in run_modes if isinstance(found := _how(config, run_mode), str)]
  if absent:
    raise config_lib.ConfigError(absent)


def _how(config, run_mode: str) -> Way | str:
  """What `how` gives, or the reason why the run mode has no meaning."""
  name, options = methods.parse_run_mode(run_mode)
  if name == "dense":
    return Way(config, "dense", "own")
  run = copy.copy(config)
  known = methods.run_mode_fields(name)
  options = {n: v for n, v in {**config.eval.blocks, **options}.items() if n in known}
  own = config.attention
  if name != "sparse" and issubclass(methods.get(name), methods.PromptMethod):
    if any(method.acts_when_dense for method in config.methods):
      return "it is not the same model without its method's parameters"
    run.attention, run.layers, run.others = methods.get(name)(**options), (), {}
    return Way(run, "sparse", "own")
  if isinstance(own, blocks.BlockMethod):
    attention, selector = dataclasses.replace(own, **options), "own" if name == "sparse" else name
  elif name == "sparse" and any(method.has_sparse for method in config.methods):
    return Way(config, "sparse", "own")            # a window, a memory, or a hybrid of dense and other layers
  elif name == "sparse":
    return "its attention is dense, it has no selector"
  elif options or methods.get(name).has_geometry:
    attention, selector = methods.get(name)(**options), "own"
  else:
    return f"the run has no blocks of its own: say how many of how many tokens, {name}:num_blocks=16,block_size=64"
  run.attention = attention
  return Way(run, "sparse", selector)


def _decoder(way: Way):
  """(params, tokens, first positions, tokens per answer) -> the answers, decoded greedily: `decoding.answers`."""
  architecture, mode = model_lib.architecture(way.config), way.mode
  return lambda params, tokens, begins, count: decoding.answers(architecture, params, tokens, begins, count, mode=mode)


def _program(way: Way) -> model_lib.Static:
  """What a run mode compiles: once for all arms of an architecture, whatever their seeds, data and schedules."""
  observed = way.config.eval.diagnostics and _observed(way)
  return model_lib.Static((model_lib.architecture(way.config), way.mode, way.selector, observed))


def _observed(way: Way):
  """The options that diagnostics of a run need for the size and number of blocks; None where it can have none."""
  if isinstance(way.config.attention, (blocks.BlockMethod, methods.PromptMethod)):
    return way.config.attention
  geometry_ = way.config.eval.blocks
  return blocks.BlockMethod(**geometry_) if way.mode == "dense" and geometry_ else None


def compilations(config, mesh=None):
  """What the evaluations of a run compile: calls that take no arguments, for `programs.ahead`. On a mesh there are
  none."""
  if mesh is not None and mesh.size > 1:
    return
  for run_mode in dict.fromkeys((*(config.eval.during if config.eval.every else ()), *config.eval.modes(config.seeds))):
    if (way := how(config, run_mode)) is not None:
      yield functools.partial(_compiled, _program(way), config.eval.batch, config.eval.context or config.data.context)


def _runner(static, mesh):
  """(params, batch, watch) -> per token nll and correctness, and diagnostics per layer; whole on every process.

  watch: bool; without it the diagnostics, which take longer than the model, are zeros. One program serves both.
  """
  if mesh is None:
    return lambda params, batch, watch: _compiled(static, *batch["inputs"].shape)(params, batch, np.bool_(watch))
  compiled = _on_mesh(static, mesh)
  return lambda params, batch, watch: compiled(params, sharding.place_rows(mesh, batch), watch)


@functools.lru_cache(maxsize=64)
def _on_mesh(static, mesh):
  return jax.jit(_evaluation(static, mesh), out_shardings=NamedSharding(mesh, P()))


def _compiled(static, batch: int, context: int):
  """The program of a run mode on one device, for batches of [batch, context]."""
  def lower():
    tokens = {name: jax.ShapeDtypeStruct((batch, context), jnp.int32) for name in ("inputs", "targets", "segment_ids")}
    rows = {"prompt": jax.ShapeDtypeStruct((batch,), jnp.int32), "rows": jax.ShapeDtypeStruct((batch,), jnp.float32)}
    params = model_lib.abstract_params(static.value[0])
    return jax.jit(_evaluation(static, None)).lower(params, {**tokens, **rows}, jax.ShapeDtypeStruct((), bool))

  return programs.compiled(("evaluation", static, batch, context), lower)


def _evaluation(static, mesh):
  """What `_runner` compiles."""
  config, mode, selector, own = static.value
  constrain = (lambda x, axes: x) if mesh is None else sharding.constrain(mesh)
  operations = contextlib.nullcontext if mesh is None else functools.partial(sharding.operations, mesh)

  def run(params, batch, watch):
    def observe(method, q, k, block_indices, call):
      if isinstance(own, methods.PromptMethod):
        return {}  # it measures itself
      options = method if isinstance(method, blocks.BlockMethod) else own  # a dense layer beside sparse ones
      measure = lambda: blocks.diagnostics(q, k, block_indices, call, options, rows=batch["rows"])
      return jax.lax.cond(watch, measure,
                          lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure)))

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

  return run
