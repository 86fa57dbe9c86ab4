"""What all entry points share: config flags, errors as exit codes, logging, the compilation cache.

| exit code | meaning | what a scheduler should do |
|---|---|---|
| 0 | done | nothing |
| 1 | an unexpected error, with its traceback | look |
| 2 | the configuration or the input is wrong; nothing was touched | do not restart |
| 3 | the run diverged (NaN or infinite loss) | do not restart |
| 4 | the disk is full, or a checkpoint could not be written or read | free the disk, restart |
| 5 | some runs of a study failed; the others and the report are done | look |
| 75 | SIGTERM: everything is saved | restart: the same command goes on |
"""
from __future__ import annotations

import difflib
import errno
import logging as python_logging
import os
import re
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

BAD_INPUT, DIVERGED, CHECKPOINT, RUNS_FAILED, PREEMPTED = 2, 3, 4, 5, 75


def run(main, arguments: bool = False) -> None:
  """`app.run` with the exit codes above. `main` takes nothing, or the list of arguments that are no flags,
  and returns an exit code or None."""
  app.run(lambda argv: _main(main, argv[1:], arguments), flags_parser=_parse)


def _parse(argv):
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
      if not os.path.exists(path):
        _exit(BAD_INPUT, f"--config={path}: no such experiment file")
    return rest
  except (KeyError, AttributeError) as error:  # a dotted override of a field that is not there
    _exit(BAD_INPUT, f"override: {_field_error(error)}")
  except (flags.Error, ValueError, TypeError, OSError, IndexError) as error:
    _exit(BAD_INPUT, str(error))


def _field_error(error) -> str:
  text = str(error.args[0]) if error.args else str(error)
  found = re.search(r"[Ff]ield (\w+) not found on dataclass <class '(?:.*\.)?(\w+)'>", text)
  if not found:
    return text
  from nsa import config, methods, study  # here: --help needs none of it
  name, cls = found.groups()
  known = {c.__name__: c for c in (*vars(config).values(), *vars(methods).values(), *vars(study).values())
           if hasattr(c, "__dataclass_fields__") and isinstance(c, type)}
  fields = list(known[cls].__dataclass_fields__) if cls in known else []
  close = difflib.get_close_matches(name, fields, 1)
  hint = f"; did you mean {close[0]}?" if close else ""
  return f"{cls} has no field {name!r}{hint} Its fields: {', '.join(fields)}" if fields else text


def _main(main, rest, arguments) -> int:
  if rest and not arguments:
    _exit(BAD_INPUT, f"unexpected arguments {rest}: flags begin with --")
  _quiet_logs()
  from nsa import checkpoint, train
  try:
    return main(*([rest] if arguments else [])) or 0
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    # Our own ValueErrors name the field, the value and the fix; one from elsewhere is a bug, with its traceback.
    if isinstance(error, ValueError) and not _ours(error):
      raise
    _exit(BAD_INPUT, str(error))
  except train.Diverged as error:
    _exit(DIVERGED, str(error))
  except checkpoint.CheckpointError as error:
    _exit(CHECKPOINT, str(error))
  except train.Preempted as error:
    _exit(PREEMPTED, str(error))
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    _exit(CHECKPOINT, f"the disk is full ({error}): free some space; the same command goes on from the newest checkpoint")


def _ours(error) -> bool:
  """Whether the error was raised by this project's code."""
  frame = error.__traceback__
  while frame.tb_next is not None:
    frame = frame.tb_next
  module = frame.tb_frame.f_globals.get("__name__", "")
  return module == "__main__" or module.split(".")[0] in ("nsa", "pallas_kernels", "experiments", "launch")


def _quiet_logs() -> None:
  logging.set_verbosity(logging.WARNING)
  handler = python_logging.StreamHandler(sys.stderr)
  handler.setFormatter(python_logging.Formatter("%(message)s"))
  kernels = python_logging.getLogger("pallas_kernels")
  kernels.addHandler(handler)
  kernels.setLevel(python_logging.INFO)
  kernels.propagate = False


def _exit(code: int, message: str):
  print(f"error: {message}" if code != PREEMPTED else message, file=sys.stderr, flush=True)
  sys.exit(code)


def compilation_cache(directory: str | None) -> None:
  """Keeps compiled programs between processes. Before the first computation."""
  import jax
  if directory:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def define_common() -> None:
  """Flags that every entry point which computes has."""
  flags.DEFINE_string("compilation_cache", os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/nsa/compiled"),
                      "Directory of compiled programs, kept between processes; empty for none.")
