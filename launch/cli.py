"""What all entry points share: config flags, errors as exit codes, logging, the compilation cache.

| exit code | meaning | what a scheduler should do |
|---|---|---|
| 0 | done | nothing |
| 1 | an unexpected error, with its traceback | look |
| 2 | the configuration or the input is wrong; nothing was touched | do not restart |
| 3 | the run diverged (NaN or infinite loss) | do not restart |
| 4 | the disk is full, or a checkpoint could not be written or read | free the disk, restart |
| 5 | some runs of a study failed; the others and the report are done | look |
| 6 | a process is missing, stuck or not like the others; the message says which | restart, once all hosts are well |
| 75 | SIGTERM: everything is saved | restart: the same command goes on |
"""
from __future__ import annotations

import atexit
from collections.abc import Iterable
import dataclasses
import difflib
import errno
import logging as python_logging
import math
import os
import re
import signal
import sys
import threading
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from launch import overrides

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BAD_INPUT, DIVERGED, CHECKPOINT, RUNS_FAILED, PROCESSES, PREEMPTED = 2, 3, 4, 5, 6, 75


def run(main, arguments: bool = False) -> None:
  """`app.run` with the exit codes above. `main` takes nothing, or the list of arguments that are no flags,
  and returns an exit code or None."""
  try:
    app.run(lambda argv: _main(main, argv[1:], arguments), flags_parser=_parse)
  except BaseException as error:
    programs = sys.modules.get("nsa.programs")
    if programs is None or not programs.busy():
      raise
    # The interpreter would take its lock from the compiler's thread as it ends, and die of SIGABRT in place of our exit
    # code.
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def clean_up_when_stopped() -> None:
  """SIGTERM becomes an exception, so that what is half written is removed on the way out. For commands that cannot go
  on from there."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _parse(argv):
  taken = []
  try:
    if "config" in flags.FLAGS:
      _read_archives(argv)
      argv, taken = overrides.take_entries(argv)
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
      if not os.path.isfile(path):
        end(BAD_INPUT, f"--config={path}: {'a folder, and no' if os.path.isdir(path) else 'no such'} experiment file")
      overrides.apply_entries(flags.FLAGS["config"].value, taken)
    for name in flags.FLAGS:
      value = flags.FLAGS[name].value
      if isinstance(value, float) and not math.isfinite(value) and not name.startswith("config."):
        raise ValueError(f"--{name}={value}: takes a finite number")
    return rest
  except (KeyError, AttributeError) as error:  # a dotted override of a field that is not there
    end(BAD_INPUT, f"override: {_field_error(error)}")
  except IndexError as error:
    end(BAD_INPUT, _index_error(argv) or f"override: {error}")
  except SyntaxError as error:
    end(BAD_INPUT, f"{error.filename}, line {error.lineno}: {error.msg}: no Python that can be read")
  except (flags.Error, ValueError, TypeError, OSError) as error:
    missing = re.findall(r"^flag --(\w+)=None: Flag --\1 must have a value other than None\.$", str(error), re.M)
    if missing:
      end(BAD_INPUT, "\n".join(f"--{name}: missing; {flags.FLAGS[name].help}" for name in missing))
    whole = re.match(r"Type .* of field (config\.\S+) is not supported for overriding", str(error))
    if whole:
      end(BAD_INPUT, f"override: {whole[1]}: cannot be replaced as a whole: set its fields (--{whole[1]}.NAME=, of a "
                     f"list --{whole[1]}[0].NAME=), or choose by an argument of the experiment file")
    end(BAD_INPUT, _without_traceback(str(error)))


def _without_traceback(text: str) -> str:
  """ml_collections puts the traceback of what an experiment file raised into its error. A ValueError or ConfigError of
  the files in experiments/ or nsa/ is about an argument, and says all; of anything else the traceback is kept."""
  found = re.search(r"--config=(.*): Error whilst parsing config file:\n.*^  File \"([^\"]*)\"[^\n]*\n"
                    r"[^\n]*\n(?:[ ~^]*\n)?(?:ValueError|nsa\.config\.fields\.ConfigError): (.*)", text,
                    re.DOTALL | re.MULTILINE)
  rooms = tuple(os.path.join(ROOT, room, "") for room in ("experiments", "nsa"))
  if found is None or not os.path.abspath(found[2]).startswith(rooms):
    return text
  return f"--config={found[1]}: {found[3].strip()}"


def _read_archives(argv) -> None:
  """Begins to read the archives that the command line of a training process names, while it imports JAX."""
  if not any(one.lstrip("-").split("=")[0] in ("devices", "dry_run", "plan", "help") for one in argv):
    from nsa.data import sources
    ends = "|".join(map(re.escape, sources.ARCHIVES))
    sources.read_ahead(f"files:{path}" for one in argv for path in re.findall(rf"[^=,:\s]+?(?:{ends})(?![^,\s])", one))


def _index_error(argv) -> str:
  """Which override names an item that is not there: the config is loaded again, without any."""
  dotted = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
  sys.argv = [argument for argument in sys.argv if argument not in dotted]
  flags.FLAGS.unparse_flags()
  try:
    flags.FLAGS([argument for argument in argv if argument not in dotted])
    for argument in dotted:
      overrides.walk(flags.FLAGS["config"].value, argument.lstrip("-").removeprefix("config.").partition("=")[0])
  except ValueError as error:
    return str(error)
  return ""


def _field_error(error) -> str:
  text = str(error.args[0]) if error.args else str(error)
  found = re.search(r"[Ff]ield (\w+) not found on dataclass <class '(?:.*\.)?(\w+)'>", text)
  if not found:
    return text
  from nsa import config, study  # here: --help needs none of it
  from nsa.methods import registry
  name, cls = found.groups()
  known = {c.__name__: c for c in (*vars(config).values(), *registry.METHODS.values(), *vars(study).values())
           if hasattr(c, "__dataclass_fields__") and isinstance(c, type)}
  fields = [field.name for field in dataclasses.fields(known[cls])] if cls in known else []
  close = difflib.get_close_matches(name, fields, 1)
  hint = f"; did you mean {close[0]}?" if close else ""
  return f"{cls} has no field {name!r}{hint} Its fields: {', '.join(fields)}" if fields else text


def _main(main, rest, arguments) -> int:
  if rest and not arguments:
    end(BAD_INPUT, f"unexpected arguments {rest}: flags begin with --")
  _quiet_logs()
  try:
    if "coordinator" in flags.FLAGS:
      _connect()
    return main(*([rest] if arguments else [])) or 0
  except Exception as error:
    return _told(error)


def _told(error: Exception):
  """Ends the process with the exit code that says what `error` is; raises it again where none does."""
  from nsa import checkpoint, processes, train
  if isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError)):
    # Our own ValueErrors name the field, the value and the fix; one from elsewhere is a bug, with its traceback.
    if isinstance(error, ValueError) and not _ours(error):
      raise error
    end(BAD_INPUT, str(error))
  for kind, code in ((train.Diverged, DIVERGED), (checkpoint.CheckpointError, CHECKPOINT),
                     (processes.ProcessError, PROCESSES), (train.Preempted, PREEMPTED)):
    if isinstance(error, kind):
      end(code, str(error))
  if isinstance(error, OSError):
    if (error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
        and error.filename):
      end(BAD_INPUT, f"{os.fspath(error.filename)}: {error.strerror}: take another path, or mend this one")
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise error
    again = "goes on from the newest checkpoint" if "config" in flags.FLAGS else "writes it all anew"
    end(CHECKPOINT, f"the disk is full ({error}): free some space; the same command {again}")
  raise error


def _ours(error) -> bool:
  """Whether the error was raised by this project's code."""
  frame = error.__traceback__
  while frame.tb_next is not None:
    frame = frame.tb_next
  module = frame.tb_frame.f_globals.get("__name__", "")
  return (module == "__main__"
          or module.split(".")[0] in ("nsa", "pallas_kernels", "experiments", "launch", "benchmarks"))


def _quiet_logs() -> None:
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().setFormatter(python_logging.Formatter("%(levelname)s: %(message)s"))
  handler = python_logging.StreamHandler(sys.stderr)
  handler.setFormatter(python_logging.Formatter("%(message)s"))
  kernels = python_logging.getLogger("pallas_kernels")
  kernels.addHandler(handler)
  kernels.setLevel(python_logging.INFO)
  kernels.propagate = False


def end(code: int, message: str):
  """Ends the process, with a word on stderr."""
  print(f"error: {message}" if code != PREEMPTED else message, file=sys.stderr, flush=True)
  sys.exit(code)


def begin_early(sources: Iterable[str] = ()) -> None:
  """Begins what takes seconds and no Python, while the caller goes on to import: opening the devices, and reading the
  archives among `sources` (`nsa.data.read_ahead`). Whoever needs them waits for them. Devices that do not open end the
  process, exit code 1; what is wrong with an archive, its reader says."""
  import jax

  from nsa import data

  def open_devices():
    try:
      jax.devices()
    except Exception as error:  # whoever asks JAX again gets the CPU, which it opens first, without a word
      print(f"error: {error}", file=sys.stderr, flush=True)
      os._exit(1)

  data.read_ahead(sources)
  threading.Thread(target=open_devices, name="open devices", daemon=True).start()


def _connect() -> None:
  """Connects the processes of a run that was started as several: by flag, or by what the cluster has set.

  The cluster speaks through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (any launcher, a JobSet),
  srun's SLURM_*, or TPU_WORKER_HOSTNAMES (GKE, Cloud TPU). A TPU host of several that is not told so would wait
  for its neighbours without a word.
  """
  f, env = flags.FLAGS, os.environ
  address = f.coordinator or env.get("JAX_COORDINATOR_ADDRESS")
  count = f.num_processes or int(env.get("JAX_NUM_PROCESSES", 0))
  index = f.process_id if f.process_id >= 0 else int(env.get("JAX_PROCESS_ID", -1))
  given = {"--coordinator": bool(address), "--num_processes": count > 0, "--process_id": index >= 0}
  if count == 1:
    return
  several = int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
  if address != "auto" and not several and not any(given.values()):
    return
  from nsa import processes
  if address == "auto":
    return processes.initialize(timeout=f.initialization_timeout, heartbeat=f.heartbeat_timeout)
  if all(given.values()):
    if index >= count:
      raise ValueError(f"--process_id={index}: there are --num_processes={count}, counted from 0")
    processes.initialize(address, count, index, timeout=f.initialization_timeout, heartbeat=f.heartbeat_timeout)
  elif several:
    processes.initialize(address, timeout=f.initialization_timeout, heartbeat=f.heartbeat_timeout)
  else:
    missing = ", ".join(name for name, there in given.items() if not there)
    raise ValueError(f"{missing}: missing; a run of several processes needs all of {', '.join(given)} (or "
                     "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), one process needs none")


def compilation_cache(directory: str | None, programs: bool = False, workdir: str | None = None) -> None:
  """Keeps compiled programs between processes. Before the first computation.

  workdir: of a run or a study, which keeps what XLA's autotuner chose for them (nsa/autotune.py).

  A program is found by its text, the kind of device and the versions of jax and XLA: the directory may be carried to
  another machine, under another name. programs: a GPU finds those of `nsa.programs` before they are traced, too
  (nsa/kept.py). Steps were compared there, and evaluations' programs loaded but not run: nobody gets it without asking.
  """
  import jax
  if directory:
    directory = os.path.expanduser(directory)
    if jax.__version_info__ < (0, 11):  # it would make the directory's name a part of what a program is found by
      jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    elif workdir:
      from nsa import autotune
      directory = autotune.keep(workdir, directory)
      jax.config.update("jax_persistent_cache_enable_xla_caches", autotune.CHOICES)
    jax.config.update("jax_compilation_cache_dir", directory)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if programs and jax.config.jax_enable_compilation_cache:
      from nsa import programs as nsa_programs  # --help needs none of it
      nsa_programs.keep(os.path.join(directory, "programs"))


def define_common() -> None:
  """Flags that every entry point which computes has."""
  flags.DEFINE_string("compilation_cache", os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/nsa/compiled"),
                      "Directory of compiled programs, kept between processes; empty for none. It may be "
                      "copied to other machines of the same devices and versions.")
  flags.DEFINE_boolean("keep_programs", False, "With a compilation cache, on one GPU: launch.train, study and evaluate "
                       "find their programs before they trace them, and start sooner (experimental).")
  flags.DEFINE_string("coordinator", "", "host:port of process 0 of a run of several processes; empty: from "
                      "JAX_COORDINATOR_ADDRESS, Slurm or the TPU environment, or a single process; auto: jax asks the "
                      "cluster (Cloud TPU VMs, Open MPI).")
  flags.DEFINE_integer("num_processes", 0, "How many processes the run has; 0: from JAX_NUM_PROCESSES or the cluster.",
                       lower_bound=0)
  flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0; -1: from JAX_PROCESS_ID or the cluster.",
                       lower_bound=-1)
  flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for the other processes at the start.",
                       lower_bound=1)
  flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead and all end.",
                       lower_bound=1)
  flags.DEFINE_integer("hang_timeout", 1800, "Seconds that a step, save or evaluation may take in a run of several "
                       "processes before it counts as hung; 0: for ever.", lower_bound=0)
