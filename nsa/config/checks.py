"""What a config has to satisfy before a device is touched.

Each check is told `need`: (whether it holds, field, value, fix).
"""
import dataclasses
import math
from typing import Any, Callable

from nsa import methods, origins, tasks
from nsa.architecture import ModelConfig
from nsa.config import kinds
from nsa.config.fields import Config, ConfigError, DataConfig, OptimizerConfig, ScheduleConfig, steps_of
from nsa.data import planting, tokenizer
from nsa.tasks import audit
from pallas_kernels import backends

MODES = ("dense", "sparse", "warmup", "mixed")
TRAINABLE = ("all", "selector", "memory")
GEOMETRY = tuple(f.name for f in dataclasses.fields(methods.blocks.BlockMethod))

Need = Callable[[Any, str, Any, str], None]


def validate(config: Config, num_devices: int | None = None) -> Config:
  """Imports `config.modules` and checks every arithmetic constraint; returns the config unchanged.

  Raises ConfigError listing all problems. `num_devices` adds the check of the
  mesh against the devices that are there.
  """
  problems = [*kinds.problems(Config, config)]
  for where, method in {"attention": config.attention, **config.others}.items() if not problems else ():
    named = where if where == "attention" else f"others.{where}"
    problems += kinds.problems(type(method) if isinstance(method, methods.Method) else methods.Method, method, named)
  if problems:
    raise ConfigError(problems)  # what follows compares and iterates
  for module in config.modules:
    origins.load(module)
  if config.attention.name not in methods.registry.METHODS:
    problems.append(("attention", config.attention, "no other process would find it: put @methods.register above it"))

  def need(ok, name, value, fix):
    if not ok:
      problems.append((name, value, fix))

  _check_model(config.model, need)
  if unknown := _check_layers(config):
    raise ConfigError(problems + unknown)  # what follows asks the methods
  _check_data(config.data, need)
  _check_tokenizer(config, need)
  _check_tasks(config, need)
  _check_stages(config, need)
  _check_learning_rates(config.schedule, need)
  _check_methods(config, need)
  _check_optimizer(config.optimizer, need)
  _check_evaluation(config, need)
  _check_run_modes(config, need)
  _check_run(config, need)
  _check_mesh(config, need)
  if num_devices is not None and min(config.mesh.fsdp, config.mesh.context, config.mesh.tensor) >= 1:
    _check_devices(config, num_devices, need)
  for name, value in _numbers(config):
    need(math.isfinite(value), name, value, "must be a finite number")
    need(isinstance(value, float) or value < 2 ** 32, name, value, "must be below 2**32")
  if problems:
    raise ConfigError({repr(one): one for one in problems}.values())
  return config


def _check_model(m: ModelConfig, need: Need) -> None:
  for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
    need(getattr(m, name) > 0, f"model.{name}", getattr(m, name), "must be at least 1")
  if m.num_kv_heads > 0:
    need(m.num_heads % m.num_kv_heads == 0, "model.num_heads", m.num_heads,
         f"must be a multiple of model.num_kv_heads = {m.num_kv_heads}")
  need(m.rope_theta > 0, "model.rope_theta", m.rope_theta, "base of the rotary wavelengths, above 0")
  scaling = m.rope_scaling
  need(scaling.kind in ("", "linear", "dynamic", "llama3", "yarn", "longrope"), "model.rope_scaling.kind", scaling.kind,
       'take "" (none), linear, dynamic, llama3, yarn or longrope')
  need(scaling.factor > 0, "model.rope_scaling.factor", scaling.factor, "frequencies are divided by it: above 0")
  need(scaling.context > 0, "model.rope_scaling.context", scaling.context, "tokens, at least 1")
  need(scaling.low_frequency > 0, "model.rope_scaling.low_frequency", scaling.low_frequency, "turns, above 0")
  need(scaling.high_frequency > scaling.low_frequency, "model.rope_scaling.high_frequency", scaling.high_frequency,
       f"above model.rope_scaling.low_frequency = {scaling.low_frequency}")
  need(scaling.attention_factor >= 0, "model.rope_scaling.attention_factor", scaling.attention_factor,
       "above 0, or 0 for 0.1 ln(factor) + 1")
  for name in ("short_factors", "long_factors"):
    found = getattr(scaling, name)
    need(len(found) == m.head_dim // 2 * (scaling.kind == "longrope") and all(x > 0 for x in found),
         f"model.rope_scaling.{name}", found, f"longrope has {m.head_dim // 2} numbers above 0, half of "
         "model.head_dim; others have none")
  need(all(0 <= n < m.num_layers for n in m.no_rope_layers) and len(set(m.no_rope_layers)) == len(m.no_rope_layers),
       "model.no_rope_layers", m.no_rope_layers, f"different layers of 0 to {m.num_layers - 1}")
  need(m.norm_eps > 0, "model.norm_eps", m.norm_eps, "above 0")
  need(m.embedding_multiplier >= 0, "model.embedding_multiplier", m.embedding_multiplier,
       "above 0, or 0 for sqrt(d_model)")
  need(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "RoPE rotates pairs: take an even number")
  need(m.remat in ("none", "layer"), "model.remat", m.remat, 'take "none" or "layer"')
  need(m.dtype in ("float32", "bfloat16", "float16"), "model.dtype", m.dtype, "take float32, bfloat16 or float16")
  need(m.short_conv >= 0, "model.short_conv", m.short_conv, "taps of the convolution, 0 for none")


def _check_data(d: DataConfig, need: Need) -> None:
  need(d.context > 0, "data.context", d.context, "must be at least 1 token")
  need(d.global_batch > 0, "data.global_batch", d.global_batch, "must be at least 1 sequence")
  need(0 <= d.task_share <= 1, "data.task_share", d.task_share, "a share between 0 and 1")
  for length in d.task_lengths:
    need(0 < length <= d.context, "data.task_lengths", d.task_lengths,
         f"lengths of 1 to data.context = {d.context} tokens")
  for name in ("answer_weight", "filler_weight"):
    need(getattr(d, name) >= 0, f"data.{name}", getattr(d, name), "a loss weight, 0 or more")
  need(not d.has_tasks or d.answer_weight or d.filler_weight, "data.answer_weight", d.answer_weight,
       "above 0, or data.filler_weight: tasks would teach nothing")
  need(d.task_share == 0 or d.tasks, "data.tasks", d.tasks, "data.task_share is above 0: name at least one task")
  need(not d.task_rows or d.tasks, "data.tasks", d.tasks, "data.task_rows is above 0: name at least one task")
  need(0 <= d.task_rows < d.global_batch, "data.task_rows", d.task_rows,
       f"0 to data.global_batch - 1 = {d.global_batch - 1}; for tasks alone set data.task_share = 1")
  need(not d.task_rows or d.task_share == 0, "data.task_share", d.task_share,
       f"data.task_rows = {d.task_rows} fixes the number of rows: set the share to 0")
  need(0 <= d.planted < 1, "data.planted", d.planted, "a share from 0 to below 1")
  need(not d.planted or d.task_share == 0, "data.task_share", d.task_share,
       "tasks drawn row by row would take the place of planted passages: use data.task_rows")
  need(0 <= d.task_loss < 1, "data.task_loss", d.task_loss, "a share from 0 to below 1")
  need(not d.task_loss or d.task_rows, "data.task_loss", d.task_loss,
       "is the share of a fixed number of rows: set data.task_rows")
  need(d.source != "tasks" or d.corpora or d.task_share == 1, "data.task_share", d.task_share,
       'data.source = "tasks" has no text: set data.task_share = 1')
  corpora = {f"data.corpora[{name}]": source for name, source in d.corpora.items()}
  for where, source in (corpora or {"data.source": d.source}).items():
    need(source == "stdlib" or source == "tasks" and not d.corpora
         or source.split(":", 1)[0] in ("files", "tfds") and ":" in source,
         where, source, 'take "stdlib", "files:PATH", "tfds:NAME"' + (' or "tasks"' if not d.corpora else ""))
  need("" not in d.corpora, "data.corpora", d.corpora, "give every corpus a name")
  for name, weight in d.weights.items():
    need(name in d.corpora, f"data.weights[{name}]", weight, f"data.corpora has {', '.join(d.corpora) or 'none'}")
    need(weight > 0, f"data.weights[{name}]", weight, "above 0; leave the corpus out instead")


def _check_tokenizer(config: Config, need: Need) -> None:
  m, d = config.model, config.data
  if d.tokenizer == "bytes":
    need(m.vocab_size >= 259, "model.vocab_size", m.vocab_size,
         "bytes and 3 special tokens need 259 or more (320 is a multiple of 64)")
  else:
    try:
      size = tokenizer.get(d.tokenizer).vocab_size
      need(m.vocab_size >= size, "model.vocab_size", m.vocab_size, f"the tokenizer has {size} tokens")
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
      need(False, "data.tokenizer", d.tokenizer, str(error).removeprefix(f"data.tokenizer = {d.tokenizer!r}: "))


def _check_tasks(config: Config, need: Need) -> None:
  m, d, e = config.model, config.data, config.eval
  shortest = min((stage.context or d.context for stage in config.schedule.stages), default=d.context)
  for where, names in (("data.tasks", d.tasks), ("eval.tasks", e.tasks)):
    for name in names:
      try:
        task = tasks.get(name)
        length = shortest if d.has_tasks else e.context or d.context
        if where == "eval.tasks":
          length = tasks.length_of(name, e.context or d.context)
        else:
          need("@" not in name, where, name,
               "data.task_lengths says how long the examples of training are: name it without @")
        need(task.trainable or where != "data.tasks", where, name,
             "is held out of training: name it in eval.tasks alone")
        if d.tokenizer == "bytes":
          task.check_length(length + 1)
        need(task.in_words or d.tokenizer == "bytes", where, name,
             f"has token ids of its own, data.tokenizer is {d.tokenizer}: take a task in words, such as recall")
        need(d.tokenizer != "bytes" or m.vocab_size >= task.vocab_size, "model.vocab_size", m.vocab_size,
             f"task {name} needs {task.vocab_size}")
      except ValueError as error:
        need(False, where, name, str(error))


def _check_stages(config: Config, need: Need) -> None:
  d, s = config.data, config.schedule
  losses = {loss for method in config.methods for loss in method.losses}
  selector_losses = {loss for method in config.methods for loss in method.selector_losses}
  enters = {name for method in config.methods for name in method.enters}
  need(s.steps > 0, "schedule.steps", s.steps, "must be at least 1")
  need(bool(s.stages), "schedule.stages", s.stages, "at least one stage")
  total = sum(stage.fraction for stage in s.stages)
  need(abs(total - 1) < 1e-6, "schedule.stages[*].fraction", total, "the fractions must add up to 1")
  for i, stage in enumerate(s.stages):
    at = f"schedule.stages[{i}]"
    need(stage.mode in MODES, f"{at}.mode", stage.mode, f"one of {', '.join(MODES)}")
    need(stage.train in TRAINABLE, f"{at}.train", stage.train, f"one of {', '.join(TRAINABLE)}")
    need(stage.fraction >= 0, f"{at}.fraction", stage.fraction, "cannot be negative")
    need(0 <= stage.dense_share <= 1, f"{at}.dense_share", stage.dense_share, "a share between 0 and 1")
    need(stage.learning_rate >= 0, f"{at}.learning_rate", stage.learning_rate, "cannot be negative")
    need(stage.enter in {""} | enters, f"{at}.enter", stage.enter,
         f"{config.attention.name} knows {', '.join(sorted(enters)) or 'none'}")
    for loss in stage.loss_weights:
      need(loss in losses, f"{at}.loss_weights", loss,
           f"{config.attention.name} has the losses {', '.join(sorted(losses)) or 'none'}")
    if stage.mode == "warmup":
      need(bool(selector_losses), f"{at}.mode", stage.mode,
           f"{config.attention.name} has no selector loss to warm up: use dense or sparse")
    if stage.train == "selector":
      need(bool(selector_losses), f"{at}.train", stage.train,
           f"{config.attention.name} has no selector parameters with a loss")
    if stage.mode in ("sparse", "mixed"):
      once = [method.name for method in config.methods if isinstance(method, methods.PromptMethod)]
      need(not once, f"{at}.mode", stage.mode, f"{', '.join(once)} chooses once per prompt and would leak in training: "
           "train dense and name it in eval.run_modes")
    if stage.train == "memory":
      need(any("memory" in method.groups for method in config.methods), f"{at}.train", stage.train,
           f"{config.attention.name} has no memory")
    need(stage.context >= 0, f"{at}.context", stage.context, "tokens, 0 for data.context")
    if stage.context > 0:
      need(d.context * d.global_batch % stage.context == 0, f"{at}.context", stage.context,
           f"must divide data.context * data.global_batch = {d.context * d.global_batch} so that tokens per step stay "
           "the same")
  if s.steps > 0 and s.stages and abs(total - 1) < 1e-6:
    for i, (first, end) in enumerate(steps_of(s)):
      need(end > first or s.stages[i].fraction == 0, f"schedule.stages[{i}].fraction", s.stages[i].fraction,
           f"rounds to no step of schedule.steps = {s.steps}: take more steps, a larger share, or leave the stage out")


def _check_learning_rates(s: ScheduleConfig, need: Need) -> None:
  lr = s.learning_rate
  need(lr.plan in ("wsd", "cosine", "constant"), "schedule.learning_rate.plan", lr.plan, "wsd, cosine or constant")
  need(lr.peak > 0, "schedule.learning_rate.peak", lr.peak, "must be above 0")
  need(0 <= lr.warmup < 1, "schedule.learning_rate.warmup", lr.warmup, "a share of the steps, 0 to below 1")
  need(0 <= lr.decay <= 1 - lr.warmup, "schedule.learning_rate.decay", lr.decay,
       "warm-up and decay together take at most 1")
  again = s.restart
  need(0 <= again.step < s.steps, "schedule.restart.step", again.step,
       f"from 0 (no second plan) to below schedule.steps = {s.steps}")
  need(0 < again.peak <= 1, "schedule.restart.peak", again.peak, "a share of schedule.learning_rate.peak, above 0 to 1")
  need(0 <= again.warmup < 1, "schedule.restart.warmup", again.warmup,
       "a share of the steps after the restart, 0 to below 1")
  need(0 <= again.decay <= 1 - again.warmup, "schedule.restart.decay", again.decay,
       "warm-up and decay together take at most 1")
  need(0 <= lr.final <= 1, "schedule.learning_rate.final", lr.final, "last learning rate / peak, 0 to 1")


def _check_methods(config: Config, need: Need) -> None:
  """The methods' own constraints, at every context that they will run at."""
  m, d, e = config.model, config.data, config.eval
  contexts = {d.context, e.context or d.context, *(stage.context or d.context for stage in config.schedule.stages)}
  if e.hidden_states:
    contexts.add(min(planting.SIZE, d.context))
  for name in dict.fromkeys(("attention", *config.layers)):
    method, where = config.method_of(name), name if name == "attention" else f"others.{name}"
    for context in sorted(contexts):
      for option, value, fix in method.check(m, context):
        need(False, f"{where}.{option}", value, fix)
    grid = getattr(method, method.grid, 1)
    need(d.align >= 1 and (grid < 1 or d.align % grid == 0), "data.align", d.align,
         f"must be a multiple of {where}.{method.grid} = {grid}; set it alike in all arms, or their batches differ")


def _check_optimizer(o: OptimizerConfig, need: Need) -> None:
  need(o.name in ("adamw", "muon"), "optimizer.name", o.name, "adamw or muon")
  need(o.eps > 0, "optimizer.eps", o.eps, "above 0: a second moment of 0 would divide by it")
  for name in ("b1", "b2"):
    need(0 <= getattr(o, name) < 1, f"optimizer.{name}", getattr(o, name), "from 0 to below 1")
  for name in ("clip", "selector_clip", "weight_decay", "selector_learning_rate"):
    need(getattr(o, name) >= 0, f"optimizer.{name}", getattr(o, name), "cannot be negative")


def _check_evaluation(config: Config, need: Need) -> None:
  d, e, s = config.data, config.eval, config.schedule
  need(e.split in ("val", "test", "ood"), "eval.split", e.split, "val, test or ood")
  need(e.sealed in {"", "val", "test", "ood"} - {e.split}, "eval.sealed", e.sealed,
       "val, test or ood, but not eval.split; or none")
  need(e.context >= 0, "eval.context", e.context, "tokens, 0 for data.context")
  need(e.batch >= 1, "eval.batch", e.batch, "at least 1 sequence")
  need(e.sequences >= -1, "eval.sequences", e.sequences, "0 for none, -1 for all of the split")
  need(e.during_examples >= 0, "eval.during_examples", e.during_examples, "0 for none")
  need(all(0 <= step <= s.steps for step in e.hidden_states), "eval.hidden_states", e.hidden_states,
       f"steps from 0 to schedule.steps = {s.steps}")
  need(e.during_sequences >= 0, "eval.during_sequences", e.during_sequences, "windows, 0 for as many as at the end")
  need(e.diagnosed >= 0, "eval.diagnosed", e.diagnosed, "windows, 0 or more")
  for tokens in e.context_gain:
    need(0 < tokens and tokens % d.align == 0, "eval.context_gain", e.context_gain,
         f"multiples of data.align = {d.align}, where documents may begin")
  need(len(e.near) in (0, 2) and all(0 <= n <= (e.context or d.context) for n in e.near), "eval.near", e.near,
       "(tokens at the beginning, tokens before a query), or () for (context / 32, context / 8)")
  need(e.task_examples >= 1, "eval.task_examples", e.task_examples, "at least 1; eval.tasks names the tasks")
  need(e.decoded >= 0, "eval.decoded", e.decoded, "examples, 0 for none")
  remembers = [method.name for method in config.methods if "memory" in method.groups]
  need(not (e.decoded and remembers), "eval.decoded", e.decoded,
       f"{', '.join(remembers)} cannot go back to an answer in the middle of a text: 0 is needed")
  need(e.every >= 0, "eval.every", e.every, "steps, 0 for the end only")


def _check_run_modes(config: Config, need: Need) -> None:
  """The modes of evaluations, with their options and those of eval.blocks."""
  m, d, e = config.model, config.data, config.eval
  for name in e.blocks:
    need(name in GEOMETRY, "eval.blocks", name, f"its keys are {', '.join(GEOMETRY)}")
  for where, mode in [(f"eval.{field}", mode) for field, modes in e.named.items() for mode in modes]:
    try:
      name, options = methods.parse_run_mode(mode)
    except ValueError as error:
      need(False, where, mode, str(error))
      continue
    known = methods.run_mode_fields(name)
    options = {n: v for n, v in {**e.blocks, **options}.items() if n in known}
    once = name not in ("dense", "sparse") and issubclass(methods.get(name), methods.PromptMethod)
    if name != "dense" and (options or once or name != "sparse" and methods.get(name).has_geometry):
      own = isinstance(config.attention, methods.blocks.BlockMethod) and not once
      if own or name != "sparse":
        run = dataclasses.replace(config.attention, **options) if own else methods.get(name)(**options)
        for n, v, f in run.check(m, e.context or d.context):
          need(False, where, mode, f"attention.{n} = {v!r} there: {f}")


def _check_run(config: Config, need: Need) -> None:
  """Seeds, checkpoints and what else is of the run as a whole."""
  s = config.schedule
  for name in ("arm", "size"):
    value = getattr(config, name)
    need(value and "/" not in value, name, value, "names run directories: a word without /")
  e = config.eval
  named = {"seeds": config.seeds, "eval.more_seeds": e.more_seeds, "eval.hidden_seeds": e.hidden_seeds}
  for name, seeds in named.items():
    need(all(0 <= seed < 2 ** 32 for seed in seeds), name, seeds, "between 0 and 2**32 - 1")
  need(len(set(config.seeds)) == len(config.seeds) and config.seeds, "seeds", config.seeds,
       "one or more different seeds")
  need(not config.profile or len(config.profile) == 2 and 0 <= config.profile[0] <= config.profile[1], "profile",
       config.profile, "(first step, last step)")
  names = {"", "reference", backends.FASTEST} | {name for listed in backends.BACKENDS.values() for name, _ in listed}
  need(config.implementation in names, "implementation", config.implementation,
       f'"" for the best one here, or one of {", ".join(sorted(names - {""}))}')
  need(config.unroll >= 0, "unroll", config.unroll,
       "layers per turn of the loop over layers, 0 for the measured default")
  need(config.peak_tflops >= 0, "peak_tflops", config.peak_tflops, "TFLOP/s of one device, or 0 to look it up")
  need(config.fork.step >= -1, "fork.step", config.fork.step, "a step of the trunk, -1 for its newest checkpoint")
  need(not config.fork.step >= s.steps or config.fork.reset, "fork.step", config.fork.step,
       f"must lie before schedule.steps = {s.steps}")
  need(config.checkpoint.every >= 0, "checkpoint.every", config.checkpoint.every, "steps, 0 for the last only")
  for step in config.checkpoint.keep_at:
    need(0 <= step <= s.steps, "checkpoint.keep_at", step, f"between 0 and schedule.steps = {s.steps}")
  every, period = config.checkpoint.every, config.checkpoint.keep_period
  need(period == 0 or period > 0 and every > 0 and period % every == 0, "checkpoint.keep_period", period,
       f"0, or a multiple of checkpoint.every = {every}: only what is saved can stay")
  need(config.checkpoint.keep >= 1, "checkpoint.keep", config.checkpoint.keep, "at least 1")
  need(config.log_every >= 1, "log_every", config.log_every, "at least 1 step")


def _check_mesh(config: Config, need: Need) -> None:
  m, mesh = config.model, config.mesh
  for name in ("fsdp", "context", "tensor"):
    need(getattr(mesh, name) >= 1, f"mesh.{name}", getattr(mesh, name), "at least 1")
  need(mesh.data == -1 or mesh.data >= 1, "mesh.data", mesh.data, "at least 1, or -1 for what is left")
  if mesh.tensor >= 1 and m.num_kv_heads > 0:
    need(m.num_kv_heads % mesh.tensor == 0, "mesh.tensor", mesh.tensor,
         f"must divide model.num_kv_heads = {m.num_kv_heads}")
    need(m.mlp_dim % mesh.tensor == 0, "mesh.tensor", mesh.tensor, f"must divide model.mlp_dim = {m.mlp_dim}")
  if mesh.context >= 1:
    named_contexts = [("data.context", config.data.context), ("eval.context", config.eval.context)]
    named_contexts += [(f"schedule.stages[{i}].context", stage.context)
                       for i, stage in enumerate(config.schedule.stages)]
    for name, context in named_contexts:
      need(context % mesh.context == 0, name, context, f"must be a multiple of mesh.context = {mesh.context}")


def _check_devices(config: Config, num_devices: int, need: Need) -> None:
  """The mesh and the batches against the devices that are there."""
  m, d, e, mesh = config.model, config.data, config.eval, config.mesh
  fixed, sizes = mesh.fsdp * mesh.context * mesh.tensor, (mesh.data, mesh.fsdp, mesh.context, mesh.tensor)
  if mesh.data == -1:
    need(num_devices % fixed == 0, "mesh", sizes,
         f"fsdp * context * tensor = {fixed} must divide the {num_devices} devices that are there")
  else:
    need(mesh.data * fixed == num_devices, "mesh", sizes,
         f"data * fsdp * context * tensor = {mesh.data * fixed}, but there are {num_devices} devices")
  data = num_devices // fixed if mesh.data == -1 else mesh.data
  shards = max(data, 1) * mesh.fsdp
  for context in sorted({st.context or d.context for st in config.schedule.stages}):
    batch = d.global_batch * d.context // max(context, 1)
    need(batch % shards == 0, "data.global_batch", batch,
         f"{batch} sequences of {context} tokens do not divide over data * fsdp = {shards}; take a multiple")
  need(e.batch % shards == 0, "eval.batch", e.batch, f"must be a multiple of data * fsdp = {shards}")
  need(m.d_model % (mesh.fsdp * mesh.context) == 0, "model.d_model", m.d_model,
       f"must be a multiple of mesh.fsdp * mesh.context = {mesh.fsdp * mesh.context}")


def remarks(config: Config) -> list[str]:
  """What runs, and may not be meant: a selection of more blocks than the longest context of a sparse stage has; answers
  called far that a window of as many tokens as a selection has would see."""
  contexts = [stage.context or config.data.context for stage in config.schedule.stages if stage.mode != "dense"]
  out = []
  for name in dict.fromkeys(config.layers or ("attention",)):
    method, where = config.method_of(name), name if name == "attention" else f"others.{name}"
    size, number = getattr(method, "block_size", 0), getattr(method, "num_blocks", 0)
    if contexts and size and number >= -(-max(contexts) // size):
      out.append(f"{where}.num_blocks = {number}: the longest context, {max(contexts)} tokens, has "
                 f"{-(-max(contexts) // size)} blocks of {where}.block_size = {size}: nothing is left out, which is "
                 "dense attention")
  e, near = config.eval, (config.eval.context or config.data.context) // 8
  windows = [getattr(method, "window", 0) for method in config.methods if not isinstance(method, methods.PromptMethod)]
  widest = max([g.num_blocks * g.block_size for g in audit.geometries(config)] + windows, default=0)
  if not e.near and near < widest and e.task_examples and (e.tasks or config.data.tasks):
    out.append(f"eval.near = (): answers count as far whose evidence is {near} tokens back (context / 8) or more, and "
               f"a window of as many tokens as are visible here, {widest}, reaches further: set eval.near = "
               f"(block_size, {widest}) to count what lies behind it")
  return out


def _check_layers(config: Config) -> list[tuple[str, Any, str]]:
  """Problems of `layers` and `others`."""
  problems, count = [], config.model.num_layers
  if len(config.layers) not in (0, count):
    problems.append(("layers", config.layers,
                     f"one name for each of the model.num_layers = {count} layers, or () for attention in all"))
  for name, options in config.others.items():
    if not isinstance(options, methods.Method) or options.name != name:
      problems.append((f"others.{name}", options, f"must be the options of the method {name}"))
  for name in dict.fromkeys(config.layers):
    try:
      config.method_of(name)
    except ValueError as error:
      problems.append(("layers", name, f'{error}; or "attention", the config\'s own'))
  return problems


def _numbers(tree, name=""):
  """(field, value) of every number of a config, however deep."""
  if isinstance(tree, (int, float)):
    yield name, tree
  elif dataclasses.is_dataclass(tree):
    for field in dataclasses.fields(tree):
      yield from _numbers(getattr(tree, field.name), f"{name}.{field.name}".lstrip("."))
  elif isinstance(tree, dict):
    for key, value in tree.items():
      yield from _numbers(value, f"{name}[{key!r}]")
  elif isinstance(tree, (list, tuple)):
    for i, value in enumerate(tree):
      yield from _numbers(value, f"{name}[{i}]")
