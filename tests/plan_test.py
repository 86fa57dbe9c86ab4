"""Tests of planning for machines that are not here: nsa/planning and nsa/chips.py."""
import dataclasses

import jax
import numpy as np
import pytest

from nsa import chips, config as config_lib, flops, methods, schedule, sharding, step as step_lib
from nsa.planning import forecast, plan, topology
from pallas_kernels.mosaic_tpu import aot

HLO = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,16]) -> bf16[8,64] {
  ROOT %ag.1 = bf16[8,64]{1,0} all-gather(%p), channel_id=1, replica_groups=[4,4]<=[16], dimensions={1}
}

%body (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %g = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%fused
  %rs = f32[4,10]{1,0} reduce-scatter(%y), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
}

%cond (t: (s32[], bf16[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(3), backend_config={"flag_configs":[]}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: f32[10]) -> f32[10] {
  %w = (s32[], bf16[8,16]) while(%t), condition=%cond, body=%body
  %ar = (f32[10]{0}, f32[10]{0}) all-reduce-start(%p0), replica_groups=[2,8]<=[16], to_apply=%add
  %am = f32[100]{0} all-reduce(%p0), replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=5] {'data','tensor'}, to_apply=%add
  %af = f32[100]{0} all-gather(%p1), replica_groups=mesh['data'=8,'fsdp'=2] {'data':(2)4}, dimensions={0}
  %cp = f32[6]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_count_loops_groups_and_both_halves_of_an_all_reduce():
  got = topology.collectives(HLO)
  assert got == {"all-gather": 3 * 8 * 64 * 2 * 3 / 4 + 400 * 3 / 4, "reduce-scatter": 3 * 2 * 40 * 4 / 2,
                 "all-reduce": 2 * 40 * 7 / 8 + 2 * 400 * 9 / 10, "collective-permute": 24}


def make_config(method="msa", **mesh):
  attention = dataclasses.replace(methods.get(method)(),
                                  **(dict(block_size=64, num_blocks=4) if method != "dense" else {}))
  plan_ = schedule.dense(10) if method == "dense" else schedule.retrofit(100, 0.2, selector_warmup=0.25)
  return config_lib.Config(
      attention=attention, schedule=plan_, mesh=config_lib.MeshConfig(**mesh),
      model=config_lib.ModelConfig(num_layers=2, d_model=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=512,
                                   dtype="bfloat16", remat="layer"),
      data=config_lib.DataConfig(context=512, global_batch=8, align=128),
      eval=config_lib.EvalConfig(sequences=0, run_modes=()))


def test_a_forecast_counts_what_the_shardings_and_the_flops_say():
  config, chip = make_config(fsdp=2, context=2, tensor=2), chips.find("TPU v5p")
  sparse = schedule.programs(config)[-1]
  got = forecast.of_step(config, sparse, chip, 8)
  state = step_lib.abstract_state(config, sharding.abstract_mesh(config, 8))
  whole = sum(x.size for x in jax.tree.leaves(state.params))
  assert 4 * whole / 8 <= got.memory["parameters"] < 1.1 * 4 * whole / 8  # norms stay whole
  assert got.memory["optimizer"] == pytest.approx(2 * got.memory["parameters"], rel=1e-3)
  wide = dataclasses.replace(config, mesh=config_lib.MeshConfig(fsdp=8))
  even = forecast.of_step(wide, sparse, chip, 8)
  assert even.useful_flops * 8 == pytest.approx(flops.per_step(config, sparse))  # rows and heads share evenly
  assert got.useful_flops > even.useful_flops  # the last shard of T scores more keys than the mean
  assert even.bytes < got.bytes * 2 and even.collectives.keys() != got.collectives.keys()
  assert got.seconds == got.bounds[got.bound] <= sum(got.bounds.values())
  extra = forecast.of_step(config, sparse, chip, 8, inactive=8e9)
  assert extra.bytes - got.bytes == pytest.approx(16e9) and "tokens to experts" in extra.collectives


def test_topologies_and_what_does_not_fit():
  slice_ = topology.parse("v5p:4x4x8")
  assert (slice_.chips, slice_.devices, slice_.platform) == (128, 128, "tpu")
  assert topology.parse("tpu7x:2x2x1").devices == 8 and topology.parse("h100x64").platform == "gpu"
  for wrong in ("v5p", "h100", "b200x8", "v5p:4xx4", "v9:2x2"):
    with pytest.raises(config_lib.ConfigError, match="--topology"):
      topology.parse(wrong)
  with pytest.raises(config_lib.ConfigError, match="must divide the 4 devices"):
    plan.ahead(make_config(fsdp=8), topology.parse("h100x4"), compile_steps=False)
  refused = ("Ran out of memory on HBM, the total memory required for HLO temporaries (28.28G) exceeds available HBM "
             "(15.75G).")
  assert topology._needed(refused) == 28.28 * 2 ** 30
  assert topology._needed("Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm.") == 2 ** 29
  assert topology._needed("INTERNAL: something else") is None
  config = make_config("dense")
  config.eval.batch = 64
  config.model.num_layers, config.model.d_model, config.model.remat = 40, 8192, "none"
  config.model.mlp_dim, config.data.context, config.data.global_batch = 32768, 32768, 64
  changes = []
  for _ in range(8):  # following the advice ends where it fits
    made = plan.ahead(config, topology.parse("h100x64"), compile_steps=False)
    row = made["steps"][0]
    if row["fits"]:
      break
    with pytest.raises(config_lib.ConfigError, match="does not fit: the next thing to change is"):
      plan.check_fits(made)
    changes.append(row["change"])
    path, value = row["change"].split(" in place")[0].split(",")[0].split("=")
    part, name = path.split(".")
    if value == '"layer"':
      config.model.remat = "layer"
    else:
      setattr(config.mesh, name, int(value))
  assert changes and row["fits"], changes
  plan.check_fits(made)


def test_a_plan_for_gpus_lowers_every_step_and_prices_both_regimes(monkeypatch):
  monkeypatch.setattr(topology, "_gpus", lambda machine: None)  # as without the CUDA plugin
  config = make_config(fsdp=4, tensor=2)
  made = plan.ahead(config, topology.parse("h100x8"))
  assert [row["mode"] for row in made["steps"]] == ["dense", "warmup", "sparse"]
  assert all("seconds_to_compile" in row and "compiled" not in row for row in made["steps"])
  hours, second = made["chip_hours"], {row["mode"]: row["seconds"] for row in made["steps"]}
  assert (hours["retrofit"]
          == pytest.approx((80 * second["dense"] + 5 * second["warmup"] + 15 * second["sparse"]) * 8 / 3600))
  assert hours["native"] == pytest.approx((98.5 * second["sparse"] + 1.5 * second["warmup"]) * 8 / 3600)
  text = plan.report(made)
  for words in ("mesh {'data': 1, 'fsdp': 4", "bound by", "chip hours", "warmup: 8 x 512 tokens", "selected"):
    assert words in text


def test_a_mesh_may_split_an_axis_of_a_slice():
  """docs/clusters.md plans for 8 x 8 x 8 chips with tensor = 4."""
  if aot.missing():
    pytest.skip(str(aot.missing()))
  mesh = sharding.make_mesh(make_config(fsdp=64, context=2, tensor=4), topology._tpus("v5p:8x8x8"))
  coords = np.array([[device.coords for device in row] for row in mesh.devices.reshape(-1, 4)])
  assert mesh.devices.shape == (1, 64, 2, 4) and len({tuple(c) for row in coords for c in row}) == 512
  assert (np.abs(np.diff(coords, axis=1)).sum(-1) == 1).all(), "tensor is for neighbours"


@pytest.mark.parametrize("name", ["v5e:2x2", "h200x4"])
def test_a_plan_is_what_the_compiler_says(name):
  machine = topology.parse(name)
  if machine.platform == "gpu" and topology._gpus(machine) is None:
    pytest.skip("no CUDA plugin that compiles without a GPU (JAX 0.11 on; JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 without "
                "cuDNN)")
  if machine.platform == "tpu" and aot.missing():
    pytest.skip(str(aot.missing()))
  config = make_config("dense", fsdp=2, tensor=2)
  config.model.remat, config.data.context = "none", 256  # half as long to compile
  row = plan.ahead(config, machine)["steps"][0]
  compiled = row["compiled"]
  want = row["memory_bytes"]["parameters"] + row["memory_bytes"]["optimizer"]
  assert want <= compiled["arguments_bytes"] < 1.2 * want  # the batch, and padding
  # The libtpu of the oldest supported jax does not report temporaries.
  assert compiled["temporaries_bytes"] > 0 or (machine.platform == "tpu" and aot.version().startswith("0.0.42."))
  weights = row["collectives_bytes"]["weights (fsdp, context)"] + row["collectives_bytes"]["gradients (fsdp, context)"]
  seen = sum(compiled["collectives_bytes"].values())
  assert 0.3 * weights < seen < 10 * sum(row["collectives_bytes"].values()), "the arithmetic is of the compiler's order"
