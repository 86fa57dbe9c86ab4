"""Tests of nsa/sharding.py: a train step on any mesh of eight devices is the step on one."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MESHES = {"data=8": dict(data=8), "fsdp=4,tensor=2": dict(data=1, fsdp=4, tensor=2),
          "data=2,fsdp=2,tensor=2": dict(data=2, fsdp=2, tensor=2)}

# One process with eight devices: for each method the step on one device and on each mesh, as JSON.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from nsa import config as C, methods, schedule, sharding, step as S
tiny = dict(block_size=4, num_blocks=3)
METHODS = {"dense": methods.Dense(), "msa": methods.MSA(index_dim=4, **tiny),
           "nsa": methods.NSA(block_size=4, num_blocks=4, compress_len=4, compress_stride=2, window=8)}
rng = np.random.default_rng(0)
tokens = rng.integers(0, 256, (8, 25)).astype(np.int32)
batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((8, 24), np.float32),
             segment_ids=(np.arange(24) >= 4 * np.arange(8)[:, None]).astype(np.int32))

def run(attention, devices, mesh):
  plan = schedule.dense(1) if attention.name == "dense" else schedule.native(1, 0)
  config = C.Config(attention=attention, schedule=plan)
  config.model = C.ModelConfig(vocab_size=264, num_layers=1, d_model=16, num_heads=4, num_kv_heads=2,
                               head_dim=4, mlp_dim=16)
  config.data.context, config.data.global_batch, config.mesh = 24, 8, C.MeshConfig(**mesh)
  config.optimizer.eps = 1e-3  # near 0 Adam's step is a sign: rounding would show at full size
  C.validate(config, len(devices))
  mesh = sharding.make_mesh(config, devices)
  abstract = S.abstract_state(config, mesh)
  values = np.random.default_rng(1)  # compiling the initial state takes longer than the step
  fill = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
  draw = lambda x: jax.device_put((0.2 * values.standard_normal(x.shape)).astype(x.dtype), x.sharding)
  params = jax.tree.map(draw, abstract.params)
  state = jax.tree.map(fill, abstract)._replace(params=params)
  new, values = S.compile_step(config, schedule.at(config, 0), mesh)(
      state, jax.device_put(batch, sharding.of_batch(config, mesh)), jnp.float32(1e-2), S.seeds_of(config))
  part = lambda x: x.addressable_shards[0].data.size / x.size
  down = ["stacks", "stack0", "mlp", "down"]
  weight = new.params
  for name in down:
    weight = weight[name]
  moments = [x for x in jax.tree.leaves(new.optimizer["backbone"]) if x.shape == weight.shape and x.ndim == 3]
  return jax.device_get((new.params, values)), part(weight), {part(m) for m in moments}

out = {}
for name, attention in METHODS.items():
  (want, values), _, _ = run(attention, jax.devices()[:1], {})
  for label, mesh in json.loads(sys.argv[1]).items():
    (got, sharded), share, moments = run(attention, jax.devices(), mesh)
    off = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)))
    metrics_off = max(float(abs(values[k] - sharded[k]) / abs(values[k])) for k in values)
    out[name + " " + label] = dict(params=off, metrics=metrics_off, share=share,
                                   moments=sorted(moments), loss=float(values["loss"]))
try:
  run(METHODS["dense"], jax.devices(), dict(data=3))
except C.ConfigError as error:
  out["error"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def results():
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
         "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(MESHES)], capture_output=True, text=True,
                        env=env, timeout=900)
  assert not done.returncode, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", ["dense", "msa", "nsa"])
def test_a_step_on_a_mesh_is_the_step_on_one_device(results, method, mesh):
  got = results[f"{method} {mesh}"]
  assert 4 < got["loss"] < 8 and got["params"] < 1e-5 and got["metrics"] < 1e-5, got
  # Parameters and moments are spread over fsdp and tensor, not copied.
  share = 1 / (MESHES[mesh].get("fsdp", 1) * MESHES[mesh].get("tensor", 1))
  assert got["share"] == share and got["moments"] == [share]


def test_a_mesh_that_does_not_fit_is_named(results):
  assert "mesh = (3, 1, 1)" in results["error"] and "8 devices" in results["error"]
