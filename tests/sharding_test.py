"""Tests of nsa/sharding.py and pallas_kernels/partition.py: a step on any mesh of eight devices is the step on one.

A model with one layer of every method that trains, but for memories and some training-free selectors, runs on a mesh
that uses fsdp, context and tensor; seeds, evaluation, chunks of logits and the data axis are covered by MSA. Every
method by itself on every mesh, half an hour:

    PYTHONPATH=. python tests/sharding_test.py
"""
import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest

from nsa import methods
from pallas_kernels import api, backends, partition

ROOT = pathlib.Path(__file__).parents[1]
MESHES = {"data=8": dict(data=8), "fsdp=4,tensor=2": dict(fsdp=4, tensor=2),
          "data=2,fsdp=2,tensor=2": dict(fsdp=2, tensor=2),
          "context=4,tensor=2": dict(context=4, tensor=2), "context=8": dict(context=8),
          "fsdp=2,context=2,tensor=2": dict(fsdp=2, context=2, tensor=2)}
METHODS = sorted(name for name, method in methods.registry.METHODS.items()
                 if not issubclass(method, methods.PromptMethod))
PAIRS = [("all", "fsdp=2,context=2,tensor=2"), ("msa", "data=2,fsdp=2,tensor=2")]
# For sums in another order: of the largest parameter, of the largest gradient (Adam's first moment after a step),
# and of a metric plus 0.1 (a KL near 0 is the difference of larger numbers).
TOLERANCE = 1e-5

# One process with eight devices: for each method the step on one device and on each mesh, as JSON.
SCRIPT = """
import dataclasses, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from nsa import config as C, evaluate, methods, schedule, sharding, step as S
from nsa.planning import topology
tiny = dict(block_size=4, num_blocks=4, num_local=1, compress_len=4, compress_stride=2, window=8, index_dim=4,
            gate_dim=4, pool_len=4, pool_stride=2, segment=8, chunk=4)
# Training-free selectors differ in their scores alone; memories take as long to compile as all the others.
ALONE = ("random", "sink_window", "quest", "window")
TRAINED = sorted(name for name, method in methods.registry.METHODS.items()
                 if not (issubclass(method, methods.PromptMethod) or "memory" in method.groups or name in ALONE))
rng = np.random.default_rng(0)
tokens = rng.integers(0, 256, (8, 25)).astype(np.int32)
batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((8, 24), np.float32),
             segment_ids=(np.arange(24) >= 4 * np.arange(8)[:, None]).astype(np.int32))

def options(name):
  method = methods.get(name)
  return method(**{f.name: tiny[f.name] for f in dataclasses.fields(method) if f.name in tiny})

def make_config(name, mesh, seeds=(0,)):
  layers = tuple(TRAINED) if name == "all" else ("attention",)
  config = C.Config(attention=options("msa" if name == "all" else name), seeds=seeds, layers=layers,
                    others={layer: options(layer) for layer in layers if layer != "attention"},
                    schedule=schedule.dense(1) if name == "dense" else schedule.native(1, 0))
  config.model = C.ModelConfig(vocab_size=264, num_layers=len(layers), d_model=16, num_heads=4, num_kv_heads=2,
                               head_dim=4, mlp_dim=16, short_conv=2)
  config.data.context, config.data.global_batch, config.mesh = 24, 8, C.MeshConfig(**mesh)
  config.optimizer.eps = 1e-3  # near 0 Adam's step is a sign: rounding would show at full size
  return config

def start(config, mesh):
  abstract = S.abstract_state(config, mesh)
  values = np.random.default_rng(1)  # compiling the initial state takes longer than the step
  fill = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
  draw = lambda x: jax.device_put((0.2 * values.standard_normal(x.shape)).astype(x.dtype), x.sharding)
  return jax.tree.map(fill, abstract)._replace(params=jax.tree.map(draw, abstract.params))

def run(config, devices):
  C.validate(config, len(devices))
  mesh = sharding.make_mesh(config, devices)
  rows = batch if len(config.seeds) == 1 else {name: np.stack([x, x[::-1]]) for name, x in batch.items()}
  placed = sharding.of_batch(config, mesh)
  step = S.compile_step(config, schedule.at(config, 0), mesh)
  rows = {name: sharding.place(placed, x) for name, x in rows.items()}
  new, values = step(start(config, mesh), rows, np.full(2, 1e-2, np.float32), S.seeds_of(config))
  part = lambda x: x.addressable_shards[0].data.size / x.size
  weight = new.params["stacks"]["stack0"]["mlp"]["down"]
  moments = [x for x in jax.tree.leaves(new.optimizer["backbone"]) if x.shape == weight.shape]
  return jax.device_get((new.params, new.optimizer, values)), part(weight), {part(m) for m in moments}, step

def compare(config, mesh, one):
  config.mesh = C.MeshConfig(**mesh)
  S.MAX_LOGITS = 2 ** 10 if config.layers == ("attention",) else 2 ** 28  # chunks of logits as well
  (params, optimizer, values), share, moments, step = run(config, jax.devices())
  floats = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == np.float32]
  size = lambda tree: max(float(np.abs(x).max()) for x in floats(tree))
  worst = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(floats(a), floats(b))) / size(a)
  return dict(params=worst(one[0], params), gradients=worst(one[1], optimizer), metrics=max(
                  float((np.abs(one[2][k] - values[k]) / (np.abs(values[k]) + 0.1)).max()) for k in values),
              share=share, moments=sorted(moments), loss=float(one[2]["loss"].mean()),
              received=sum(topology.collectives(step.as_text()).values()),
              head=params["head" if "head" in params else "embed"].nbytes)

jobs, out = json.loads(sys.argv[1]), {}
for name in dict.fromkeys(name for name, _, _ in jobs):
  one, _, _, _ = run(make_config(name, {}), jax.devices()[:1])
  for _, label, mesh in (job for job in jobs if job[0] == name):
    out[name + " " + label] = compare(make_config(name, mesh), mesh, one)
if len(sys.argv) > 2:
  config = make_config("msa", {}, seeds=(3, 4))
  one, _, _, _ = run(config, jax.devices()[:1])
  out["seeds"] = compare(config, dict(context=2, tensor=2), one)
  config = make_config("dense", dict(fsdp=2, context=2, tensor=2))
  config.model = dataclasses.replace(config.model, remat="layer", d_model=32, num_heads=2, head_dim=16, mlp_dim=1024)
  config.data.context, config.data.global_batch = 256, 64
  text = S.compile_step(config, schedule.at(config, 0), sharding.make_mesh(config)).as_text()
  found = re.findall("f32[[]([0-9,]+)[]][^ ]* all-gather", text)
  out["gathered"] = [shape for shape in ([int(n) for n in sizes.split(",")] for sizes in found) if 256 in shape]
  config = make_config("msa", dict(fsdp=2, context=2, tensor=2))
  config.eval = C.EvalConfig(sequences=2, batch=2, run_modes=("sparse",))
  mesh = sharding.make_mesh(config)
  params = start(config, mesh).params
  out["evaluation"] = [evaluate.records(config, p, 0, m) for p, m in ((params, mesh), (jax.device_get(params), None))]
print(json.dumps(out))
"""


def steps(pairs, *more):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
  jobs = [(method, mesh, MESHES[mesh]) for method, mesh in pairs]
  done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(jobs), *more], capture_output=True, text=True,
                        env=env, timeout=3600)
  assert not done.returncode, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
  return steps(PAIRS, "all")


def check(got, mesh):
  assert 4 < got["loss"] < 9, got
  assert max(got[name] for name in ("params", "gradients", "metrics")) < TOLERANCE, got
  # Parameters and moments are spread over fsdp, context and tensor, not copied.
  share = 1
  for axis in ("fsdp", "context", "tensor"):
    share /= mesh.get(axis, 1)
  assert got["share"] == share and got["moments"] == [share]


@pytest.mark.parametrize("method,mesh", PAIRS)
def test_a_step_on_a_mesh_is_the_step_on_one_device(results, method, mesh):
  check(results[f"{method} {mesh}"], MESHES[mesh])


def test_chunks_of_logits_gather_the_output_matrix_once(results):
  # 12 chunks, which share one copy of the matrix and one sum of its gradient
  got = results["msa data=2,fsdp=2,tensor=2"]
  assert got["head"] < got["received"] < 12 * got["head"], got


def test_seeds_trained_together_on_a_mesh(results):
  check(results["seeds"], dict(context=2, tensor=2))


def test_of_all_positions_a_device_gathers_keys_and_values_alone(results):
  # The partitioner would gather hidden states, [32, 256, 32]: at 8B and 128K that took six times the memory.
  assert results["gathered"] and all(shape == [32, 256, 1, 16] for shape in results["gathered"]), results["gathered"]


def test_evaluation_on_a_mesh_is_that_on_one_device(results):
  got, want = results["evaluation"]
  assert len(got) == len(want) and {row["kind"] for row in got} >= {"language", "layer"}
  for a, b in zip(got, want):
    assert a.keys() == b.keys()
    for name, value in b.items():
      same = a[name] == pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else a[name] == value
      assert same or name == "heat", (name, a, b)


def test_every_operation_says_which_dimensions_are_cut():
  for operation in backends.OPERATIONS:
    assert operation in partition._RESULTS, f"{operation}: add its results to pallas_kernels/partition.py"
    required = [name for name, p in inspect.signature(getattr(api, operation)).parameters.items()
                if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = set(required) - set(partition._ARGUMENTS)
    assert not missing, f"{operation}: add {missing} to pallas_kernels/partition.py"


if __name__ == "__main__":
  product = [(method, mesh) for method in METHODS for mesh in MESHES]
  for (method, mesh), got in zip(product, steps(product).values()):
    print(f"{method:12s} {mesh:28s} " + ", ".join(f"{k} {got[k]:.1e}" for k in ("params", "gradients", "metrics")),
          flush=True)
    check(got, MESHES[mesh])
