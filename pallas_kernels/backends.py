"""Which implementations an operation has, and which one a call gets.

A backend is a module that calls `register` for each operation it serves when
it is imported. Modules are imported at the first call that could use them, and
one that is missing or broken costs its speed, never the package: the reason
is logged and the reference serves the call.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import contextvars
import dataclasses
import importlib
import logging
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

logger = logging.getLogger("pallas_kernels")

# as an implementation: what None gives but for reasons to avoid it that are of fixed bits
FASTEST = "fastest"

# The checkpoint name of o and lse, all that a gradient of attention needs of the forward pass, and of the few numbers
# per query that one of `index_kl` does: a remat that saves them runs neither twice.
ATTENDED = "attended"

OPERATIONS = ("attention", "compressed_attention", "compressed_top_k", "index_top_k", "selected_attention",
              "paged_attention", "index_kl", "lightning_scores", "lightning_kl", "token_top_k", "token_attention",
              "block_top_k", "block_mass", "block_peak")

# Platform -> (implementation, module) in order of preference; the module registers under that name.
BACKENDS = {
    "gpu": [("mosaic_gpu", "pallas_kernels.mosaic_gpu"), ("cudnn", "pallas_kernels.cudnn"),
            ("cudnn_triton", "pallas_kernels.cudnn_triton"), ("triton", "pallas_kernels.triton")],
    "tpu": [("mosaic_tpu", "pallas_kernels.mosaic_tpu")],
    "cpu": [],
}


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute one operation. `platforms` = None means any."""
  name: str
  function: Callable[..., Any]
  platforms: tuple[str, ...] | None
  supports: Callable[..., str | None]
  avoid: Callable[..., str | None] = lambda **_: None
  avoided_for_bits: bool = False


_registered: dict[str, dict[str, Implementation]] = {operation: {} for operation in OPERATIONS}
_import_errors: dict[str, str | None] = {}  # module -> why it did not import, None if it did
_logged: set[tuple] = set()
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_recomputed: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputed", default=False)


def attended(results):
  """Arrays under the name `ATTENDED`, as forward rules have to keep and to return them."""
  return checkpoint_name(results, ATTENDED)


def no_gradient(tree):
  """What backward rules give for arrays that get no gradient; None stays."""
  zeros = lambda x: np.zeros(x.shape, jax.dtypes.float0) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.zeros_like(x)
  return jax.tree.map(zeros, tree)


@contextlib.contextmanager
def recomputed(active: bool = True):
  """Inside the block operations are called under a remat that saves `ATTENDED`: what else a forward pass leaves for the
  backward pass would be made twice."""
  token = _recomputed.set(active)
  try:
    yield
  finally:
    _recomputed.reset(token)


def is_recomputed() -> bool:
  return _recomputed.get()


def register(operation: str, name: str, function: Callable[..., Any], *,
             platforms: tuple[str, ...] | None, supports: Callable[..., str | None],
             avoid: Callable[..., str | None] = lambda **_: None, avoided_for_bits: bool = False):
  """Makes `implementation=name` serve `operation`; a second call with the same names replaces the first.

  Args:
    operation: one of `OPERATIONS`.
    name: the implementation's name, e.g. "mosaic_gpu".
    function: takes the operation's arguments by keyword (all but `implementation`, defaults filled in:
      `scale` and `index_scale` are floats), already validated; differentiable where the operation is.
    platforms: of "cpu", "gpu", "tpu"; None for all.
    supports: takes the same keywords, arrays or tracers of which it reads shape and dtype only, and plain values
      (name those that matter, `**_` the rest); returns None, or the reason why not, beginning with the argument's name.
    avoid: like `supports`, but a reason only says that others are better here: a call that names this
      implementation gets it, one that names none gets it before the reference alone.
    avoided_for_bits: whether what `avoid` says is that gradients have no fixed bits, or what fixing them costs: FASTEST
      does not ask it then.
  """
  if operation not in _registered:
    raise ValueError(f"operation = {operation!r}: take one of {', '.join(OPERATIONS)}")
  _registered[operation][name] = Implementation(name, function, platforms, supports, avoid, avoided_for_bits)


def available(operation: str) -> tuple[str, ...]:
  """Names of the implementations of an operation that can be imported here, best first.

  Not each of them runs on each platform or serves each argument.
  """
  if operation not in _registered:
    raise ValueError(f"operation = {operation!r}: take one of {', '.join(OPERATIONS)}")
  for platform in BACKENDS:
    _load(platform)
  return tuple(i.name for i in _in_order(operation))


@contextlib.contextmanager
def target_platform(platform: str):
  """Dispatch for "cpu", "gpu" or "tpu" inside the block: for lowering to a platform that is not here."""
  token = _platform.set(_known_platform(platform))
  try:
    yield
  finally:
    _platform.reset(token)


def current_platform() -> str:
  """`target_platform` if set, else the platform of jax's default device or backend."""
  target = _platform.get()
  if target is not None:
    return target
  device = jax.config.jax_default_device
  if device is not None:
    return _known_platform(device if isinstance(device, str) else device.platform)
  return _known_platform(jax.default_backend())


def choose(operation: str, implementation: str | None, arguments: Mapping[str, Any]) -> Implementation:
  """The implementation that serves this call.

  `implementation`: a name; None for the best one; FASTEST for the best one if gradients need no fixed bits.

  Raises:
    ValueError: `implementation` is no known name.
    NotImplementedError: it is one, but cannot serve these arguments or this platform.
  """
  platform = current_platform()
  if implementation not in (None, FASTEST):
    chosen = _named(operation, implementation, platform, arguments)
    _log(logging.INFO, operation, f"{chosen.name} ({platform}), as named")
    return chosen
  _load(platform)
  reasons = [f"{name}: {_import_errors[module] or 'it has no ' + operation}"
             for name, module in BACKENDS[platform]
             if _import_errors[module] or name not in _registered[operation]]
  order = _in_order(operation)
  avoided = {i.name: None if implementation == FASTEST and i.avoided_for_bits else i.avoid(**arguments) for i in order}
  candidates = sorted(order, key=lambda i: 2 if i.name == "reference" else avoided[i.name] is not None)
  for candidate in candidates:
    if candidate.platforms is not None and platform not in candidate.platforms:
      continue
    reason = candidate.supports(**arguments)
    if reason is None:
      if candidate.name == "reference" and reasons:
        _log(logging.WARNING, operation, f"reference ({platform}), because " + "; ".join(reasons))
      else:
        left = [f"{i.name}: {avoided[i.name]}" for i in order[:order.index(candidate)]
                if avoided[i.name] and (not i.platforms or platform in i.platforms) and i.supports(**arguments) is None]
        _log(logging.INFO, operation, f"{candidate.name} ({platform})" + (f", not {'; '.join(left)}" if left else ""))
      return candidate
    reasons.append(f"{candidate.name}: {reason}")
  raise NotImplementedError(f"{operation}: no implementation for {platform}: " + "; ".join(reasons))


def _named(operation, implementation, platform, arguments):
  modules = {name: module for listed in BACKENDS.values() for name, module in listed}
  if implementation in modules:
    _import(modules[implementation])
  if implementation not in _registered[operation]:
    known = [i.name for i in _in_order(operation)]
    if implementation not in modules:
      known += [name for name in modules if name not in known]
      raise ValueError(f"implementation = {implementation!r} of {operation}: take None, {FASTEST} or one of "
                       f"{', '.join(known)}")
    why = _import_errors[modules[implementation]] or f"it has no {operation}"
    raise NotImplementedError(
        f"implementation = {implementation!r} of {operation}: {why}; take None or one of {', '.join(known)}")
  chosen = _registered[operation][implementation]
  if chosen.platforms is not None and platform not in chosen.platforms:
    raise NotImplementedError(f"implementation = {implementation!r} of {operation} runs on "
                              f"{', '.join(chosen.platforms)}, not on {platform}; take None for the best "
                              "one here")
  reason = chosen.supports(**arguments)
  if reason is not None:
    raise NotImplementedError(f"implementation = {implementation!r} of {operation} cannot serve these "
                              f"arguments: {reason}; take None for the best one that can")
  return chosen


def _in_order(operation):
  preferred = [name for listed in BACKENDS.values() for name, _ in listed]
  rank = lambda name: preferred.index(name) if name in preferred else len(preferred) + (name == "reference")
  return sorted(_registered[operation].values(), key=lambda i: rank(i.name))


def _load(platform):
  for _, module in BACKENDS[platform]:
    _import(module)


def _import(module):
  if module in _import_errors:
    return
  try:
    importlib.import_module(module)
    _import_errors[module] = None
  except Exception as error:  # a broken backend may raise anything; the reference still serves
    _import_errors[module] = f"{module} does not import ({type(error).__name__}: {error})"


def _known_platform(platform: str) -> str:
  platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
  if platform not in BACKENDS:
    logger.debug("platform %s has no backends", platform)
    BACKENDS[platform] = []
  return platform


def log_choice(operation: str, text: str):
  """Says once what serves an operation, and why."""
  _log(logging.INFO, operation, text)


def _log(level, operation, text):
  if (operation, text) not in _logged:
    _logged.add((operation, text))
    logger.log(level, "%s: %s", operation, text)


def processors():
  """Multiprocessors of the default GPU; those of an H100 without one."""
  return int(getattr(jax.devices()[0], "core_count", 0) or 132) if jax.devices()[0].platform == "gpu" else 132
