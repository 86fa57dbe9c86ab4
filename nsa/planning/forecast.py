"""Memory, time and cost of a step on a mesh that is not here: arithmetic, with every assumption in this file.

Where a compiler is at hand (topology.py) its memory and collectives stand beside these numbers.
"""
from __future__ import annotations

import copy
import dataclasses
import math

import jax

from nsa import chips, flops, schedule, sharding, stacking, step as step_lib

# Share of a chip's peak that each part of the work reaches. Projections and unembedding: what large training runs
# report. Dense: cuDNN on one H200, forward and backward at 32K tokens. Selected: this project's kernel on one H200
# (64/4 heads of 128, block 64, J 16, 32K: 242 of 989 TFLOP/s; experiments/results/kernels). The rest is assumed.
EFFICIENCY = {"projections": 0.6, "dense": 0.55, "selected": 0.24, "": 0.4}  # by `Cost.kind`
ATTENTIONS = ("dense", "selected", "compressed", "window")  # parts of costs whose o and lse a remat saves


@dataclasses.dataclass
class Forecast:
  """One step on one device, the busiest. Bytes, seconds and FLOPs."""
  memory: dict[str, float]       # parameters, optimizer, gradients, activations, temporaries, experts
  flops: dict[str, float]        # by part, recomputation included
  useful_flops: float            # the same without recomputation: what MFU counts
  compute: dict[str, float]      # seconds by part
  hbm_seconds: float
  collectives: dict[str, float]  # bytes that leave and enter, by what they are for
  network: dict[str, float]      # seconds by the same

  @property
  def bytes(self) -> float:
    return sum(self.memory.values())

  @property
  def bounds(self) -> dict[str, float]:
    return {"compute": sum(self.compute.values()), "memory": self.hbm_seconds, "network": sum(self.network.values())}

  @property
  def seconds(self) -> float:
    """If the three overlap wholly. Their sum is the time if they do not at all."""
    return max(self.bounds.values())

  @property
  def bound(self) -> str:
    return max(self.bounds, key=self.bounds.get)


def of_step(config, step: schedule.Step, chip: chips.Device, devices: int, inactive: float = 0.0) -> Forecast:
  """The forecast of one step.

  Args:
    config: its mesh is the one that is planned.
    devices: JAX devices.
    inactive: parameters of experts that a token does not visit, over the model. The model here is dense: its F
      stands for the experts that a token does visit. The others take memory and optimizer traffic, spread over
      all devices (expert parallelism); the exchange of tokens between experts is counted once each way, forward,
      backward and recomputed.
  """
  m, mesh = config.model, sharding.mesh_shape(config, devices)
  rows = step.batch / (mesh["data"] * mesh["fsdp"])
  tokens = rows * step.context / mesh["context"]            # of one device
  width = jax.numpy.dtype(m.dtype).itemsize
  abstract = sharding.abstract_mesh(config, devices)
  state = step_lib.abstract_state(config, abstract)
  local = lambda tree: float(
      sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
  parameters = local(state.params)
  remat = m.remat == "layer"
  K, N, F = m.num_kv_heads / mesh["tensor"], m.num_heads / mesh["tensor"], m.mlp_dim / mesh["tensor"]

  # One layer's activations of one token, and the keys and values of all positions that its queries may select.
  saved = width * m.d_model + 4 * max(method.chosen(m, step.context) for method in config.methods) / mesh["tensor"]
  inner = width * (4 * m.d_model + 3 * F + 3 * N * m.head_dim) + 4 * N
  sent = rows * step.context * K * m.head_dim * width * _streams(config, step.mode) * (2 if mesh["context"] > 1 else 1)
  gathered = sent + rows * step.context * K * m.head_dim * width * _streams(config, step.mode, copies=True)
  layers = m.num_layers
  if remat:  # o and lse of each attention as well
    attentions = max(sum(part in ATTENTIONS for part in method.costs(m, step.context, step.mode))
                     for method in config.methods)
    saved += attentions * N * (width * m.head_dim + 4)
  activations = tokens * (layers * saved if remat else layers * (saved + inner)) + (0 if remat else layers * gathered)
  total = sum(x.size for x in jax.tree.leaves(state.params))
  head = m.vocab_size * m.d_model
  ends = head * (1 if m.tie_embeddings else 2)
  layer = (total - ends) / layers
  temporaries = (2 * inner * tokens if remat else inner * tokens) + 2 * gathered
  temporaries += 3 * 4 * min(tokens * m.vocab_size, step_lib.MAX_LOGITS)  # logits, their softmax and gradient, float32
  temporaries += width * (2 * layer / mesh["tensor"] + ends)  # gathered weights of two layers, of both ends
  memory = {"parameters": parameters, "optimizer": local(state.optimizer), "gradients": parameters,
            "activations": activations, "temporaries": temporaries}
  if inactive:
    memory["experts"] = 16 * inactive / devices              # weight, gradient and two moments, float32

  # Compute.
  uneven = 2 - 1 / mesh["context"]
  work, compute, useful = {}, {}, 0.0
  todo = [(name, cost, True) for name, cost in flops.training_costs(config, step)]
  if remat:  # recomputed: all layers, but no choice and no attention, which are saved, and no output matrix
    projections, _, *branches = flops.costs(config, step.context, step.mode)
    todo += [(name, cost, False) for name, cost in (projections, *branches)
             if cost.gradient and name not in ATTENTIONS]
  for name, cost, first in todo:
    count = cost.flops * tokens / mesh["tensor"] * (uneven if cost.causal else 1.0)
    work[name] = work.get(name, 0.0) + count
    compute[name] = compute.get(name, 0.0) + count / (chip.tflops * 1e12 * EFFICIENCY[cost.kind])
    useful += count if first else 0.0

  # Memory traffic: weights as each pass reads them, the optimizer's update, activations in and out of each pass.
  passes = 3 + remat
  traffic = passes * width * (layer * layers / mesh["tensor"] + ends) + 7 * parameters
  traffic += passes * layers * tokens * (inner + saved) * 2 + passes * layers * gathered + 6 * 4 * tokens * m.vocab_size
  traffic += 7 * 4 * inactive / devices

  # What a device receives. Weights in the compute dtype, their gradients in float32.
  shards = mesh["fsdp"] * mesh["context"]
  part = lambda n: (n - 1) / n
  # forward, backward (and what is recomputed is gathered then)
  gathers = (2 if remat else 1) + 1
  weights = layer * layers / mesh["tensor"] + ends
  collectives = {
      "weights (fsdp, context)": gathers * width * weights * part(shards),
      "gradients (fsdp, context)": 4 * weights * part(shards),
      "gradients (data)": 2 * 4 * weights / shards * part(mesh["data"]),
      "keys and values (context)": (passes * sent / 2 * part(mesh["context"])) * layers,
      "activations (tensor)": 2 * (passes - 1) * 2 * width * m.d_model * tokens * part(mesh["tensor"]) * layers}
  if inactive:
    collectives["tokens to experts"] = 2 * passes * width * m.d_model * tokens * layers
  span = {"tensor": mesh["tensor"], "context": mesh["tensor"] * mesh["context"],
          "fsdp": shards * mesh["tensor"], "data": devices, "experts": devices}
  network = {}
  for name, size in collectives.items():
    reach = max((n for axis, n in span.items() if axis in name), default=1)
    fast = not chip.island or reach <= chip.island
    network[name] = size / (1e9 * (chip.link if fast else chip.network))
  return Forecast(memory, work, useful, compute,
                  traffic / (chip.hbm_speed * 1e9), {k: v for k, v in collectives.items() if v}, network)


def _streams(config, mode: str, copies: bool = False) -> float:
  """Arrays of [S, K, H] that attention reads per layer: k, v and the method's `streams`; or what it makes `copies`
  of."""
  extra = 0.0
  for method, count in stacking.layout(config) if mode != "dense" else ():
    extra += count * sum(s.heads * s.width for s in method.streams(config.model).values() if s.cached != copies)
  return ((0.0 if copies else 2.0)
          + extra / (config.model.num_layers * config.model.num_kv_heads * config.model.head_dim))


def what_to_change(config, step: schedule.Step, chip: chips.Device, devices: int, used: float,
                   inactive: float = 0.0) -> str:
  """The smallest change that, by the forecast, brings `used` bytes under the chip's memory."""
  ratio = used / of_step(config, step, chip, devices, inactive).bytes  # what a compiler finds beyond the arithmetic
  tries = []

  def attempt(text, **fields):
    other = copy.deepcopy(config)
    for path, value in fields.items():
      where, name = path.split("__")
      setattr(getattr(other, where), name, value)
    size = sharding.mesh_shape(other, devices)
    if size["data"] < 1 or math.prod(size.values()) != devices or step.batch % (size["data"] * size["fsdp"]):
      return
    tries.append((of_step(other, step, chip, devices, inactive).bytes * ratio, text))

  m, mesh = config.model, config.mesh
  if m.remat == "none":
    attempt('model.remat="layer"', model__remat="layer")
  data = sharding.mesh_shape(config, devices)["data"]
  for factor in (2, 4, 8, 16):
    if data % factor == 0:
      attempt(f"mesh.fsdp={mesh.fsdp * factor} in place of {mesh.fsdp}", mesh__fsdp=mesh.fsdp * factor)
    if step.context % (mesh.context * factor) == 0:
      for axis in ("data", "fsdp"):
        have = data if axis == "data" else mesh.fsdp
        if have % factor == 0:
          fields = {"mesh__context": mesh.context * factor}
          fields |= {"mesh__fsdp": mesh.fsdp // factor} if axis == "fsdp" else {}
          attempt(f"mesh.context={mesh.context * factor} in place of {mesh.context}, taken from {axis}", **fields)
    if m.num_kv_heads % (mesh.tensor * factor) == 0 and mesh.fsdp % factor == 0:
      attempt(f"mesh.tensor={mesh.tensor * factor} in place of {mesh.tensor}, taken from fsdp",
              mesh__tensor=mesh.tensor * factor, mesh__fsdp=mesh.fsdp // factor)
  limit = chip.hbm * 1e9
  fits = [text for size, text in tries if size <= limit]
  if fits:
    return fits[0]
  better = [(size, text) for size, text in tries if size < 0.8 * used]
  return (f"{min(better)[1]}, and more devices or a smaller data.global_batch" if better
          else "more devices, or a smaller data.global_batch, context or model")
