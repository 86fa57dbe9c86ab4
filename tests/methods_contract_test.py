"""The contract of a method: every method here holds it, and what breaks it is named with the method and the field."""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import one_layer
import pytest

from nsa import config as config_lib, flops, methods, metrics, model as model_lib, optim, origins, schedule, train
from nsa.methods import blocks, contract, interface, registry
from nsa.planning import forecast
import pallas_kernels as pk
from pallas_kernels import backends

MODEL = config_lib.ModelConfig(num_layers=2, d_model=32, num_heads=8, num_kv_heads=2, head_dim=16, mlp_dim=32,
                               short_conv=2)


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_method_holds_the_contract(name):
  contract.check(registry.METHODS[name])
  contract.probe(registry.METHODS[name])


class Leaking(interface.Layer):
  """A layer whose parameter names no group, or one that its method does not declare."""

  def __init__(self, init, group):
    self.selectr = init.child("selectr", group=group).normal("w", (4, 4), (None, None), fan_in=4)


@dataclasses.dataclass
class Base(interface.Method):
  name: ClassVar[str] = "broken"

  def layer(self, init, model):
    return interface.Layer()

  def costs(self, model, context, mode):
    return {"scores": interface.Cost(1.0)}


def broken(**members):
  annotations = {name: ClassVar[type(x)] for name, x in members.items() if not callable(x)}
  annotations.update(members.pop("options", {}))
  return dataclasses.dataclass(type("Broken", (Base,), {**members, "__annotations__": annotations}))


@pytest.mark.parametrize("cls,field,message", [
    (broken(name="a name"), "name", "letters"),
    (broken(name="sparse"), "name", "means something else"),
    (broken(groups=("selectr",)), "groups", "selector, branch, memory"),
    (broken(losses={"kl": 1.0}), "losses['kl']", "interface.Loss"),
    (broken(losses={"kl": interface.Loss("selector")}), "losses['kl'].trains", "groups"),
    (broken(enters=("copy",)), "enters", "define enter"),
    (broken(grid="blocks"), "grid", "names one of its options"),
    (broken(options={"width": int}), "width", "default"),
    (broken(options={"width": tuple}, width=()), "width", "int, float, bool or str"),
    (broken(layer=interface.Method.layer), "layer", "the base's is dense attention"),
    (broken(layer=lambda self, init, model: LaterLayer(self)), "layer", "not defined yet"),  # noqa: F821
    (broken(layer=lambda self, init, model: Leaking(init, None)), "groups", "selectr.*group ''"),
    (broken(layer=lambda self, init, model: Leaking(init, "selectr")), "groups", "selectr.*group 'selectr'"),
    (broken(layer=lambda self, init, model: Leaking(init, "selector")), "groups", "declare the group"),
    (broken(costs=lambda self, model, context, mode: {"scores": 1.0}), "costs(mode='dense')['scores']",
     "interface.Cost"),
    (broken(costs=lambda self, model, context, mode: {"x": interface.Cost(1.0, kind="index")}),
     "costs(mode='dense')['x']", "kind"),
    (broken(streams=lambda self, model: {"k_idx": interface.Stream(1, 8)}), "streams", "the layer's streams have"),
    (broken(reads=lambda self, model, context: {"selected": -1.0}), "reads", "0 or more")])
def test_what_breaks_the_contract_is_named(cls, field, message):
  with pytest.raises(methods.ContractError) as error:
    methods.register(cls)
  text = str(error.value)
  assert text.startswith(f"method Broken: {field} = "), text
  with pytest.raises(methods.ContractError, match=message):
    methods.register(cls)
  assert "broken" not in registry.METHODS


def test_a_name_that_is_taken_is_refused():
  with pytest.raises(methods.ContractError, match="method Broken: name = 'msa': taken by nsa.methods.msa.MSA"):
    methods.register(broken(name="msa"))


def test_an_option_cannot_smuggle_in_a_group():
  """What default options do not have is checked when a model is built of others."""
  @dataclasses.dataclass
  class Late(methods.MoBA):
    groups: ClassVar[tuple[str, ...]] = ()
  contract.probe(Late)
  with pytest.raises(methods.ContractError,
                     match=r"method Late: groups = \(\): parameter branch.taps is of the group 'branch'"):
    model_lib.abstract_params(config_lib.Config(model=MODEL, attention=Late(key_conv=3)))


def test_streams_are_those_of_the_cache_and_plans_count_them():
  """By hand, numbers per token and layer besides k and v: what was counted as nothing."""
  K, N, H = MODEL.num_kv_heads, MODEL.num_heads, MODEL.head_dim
  want = {"dense": 0, "msa": 128, "nsa": 4 * K * H, "dsa": 64, "seer": K * H, "moba": 2 * (N - K) * H, "ssa": 0}
  for name, extra in want.items():
    method = methods.get(name)()
    streams = method.streams(MODEL)
    assert sum(s.heads * s.width for s in streams.values()) == extra, name
    config = config_lib.Config(model=MODEL, attention=method)
    cache = jax.eval_shape(lambda params: model_lib.init_cache(config, params, 1, 4),
                           model_lib.abstract_params(config))[0]
    kept = sum(x.size for name_, x in cache.items() if name_ not in ("tail", "state", "pooled"))
    assert kept == 4 * (2 * K * H + sum(s.heads * s.width for s in streams.values() if s.cached)), name
    arrays = [forecast._streams(config, mode, copies) for mode in ("dense", "sparse") for copies in (False, True)]
    copies = extra if name == "moba" else 0
    assert arrays == [2, 0, 2 + (extra - copies) / (K * H), copies / (K * H)], name


def test_lists_that_a_remat_saves_are_as_long_as_declared():
  """By the residuals of a layer whose scores are recomputed and whose choice is not."""
  geometry = dict(block_size=4, num_blocks=3)
  for method in (methods.MSA(index_dim=4, **geometry), methods.DSA(index_heads=2, index_dim=4, **geometry),
                 methods.DSA(index_heads=2, index_dim=4, per_group=True, level="block", **geometry),
                 methods.MoBA(**geometry)):
    config = config_lib.Config(model=MODEL, attention=method)
    params, T = model_lib.abstract_params(config), 24
    policy = jax.checkpoint_policies.save_only_these_names(methods.CHOSEN)
    run = lambda p: model_lib.forward(config, p, jnp.zeros((1, T), jnp.int32)).logits.sum()
    _, back = jax.eval_shape(lambda p: jax.vjp(jax.checkpoint(run, policy=policy), p), params)
    lists = [x for x in jax.tree.leaves(back) if x.dtype == jnp.int32 and x.size >= MODEL.num_layers * T]
    shapes = [x.shape for x in lists]
    assert sum(x.size for x in lists) == MODEL.num_layers * T * method.chosen(MODEL, T), (method, shapes)


def test_a_remat_saves_what_attention_left():
  """o and lse of each attention of each layer, as the forecast counts them."""
  geometry, T = dict(block_size=32, num_blocks=3), 128
  for method in (methods.Dense(), methods.MSA(index_dim=16, **geometry),
                 methods.NSA(block_size=32, num_blocks=4, compress_len=16, compress_stride=8, window=32)):
    config = config_lib.Config(model=dataclasses.replace(MODEL, short_conv=0), attention=method)
    policy = jax.checkpoint_policies.save_only_these_names(backends.ATTENDED)
    run = lambda p: model_lib.forward(config, p, jnp.zeros((1, T), jnp.int32)).logits.sum()
    with backends.target_platform("tpu"):
      _, back = jax.eval_shape(lambda p: jax.vjp(jax.checkpoint(run, policy=policy), p),
                               model_lib.abstract_params(config))
    attentions = sum(part in forecast.ATTENTIONS for part in method.costs(MODEL, T, "sparse"))
    shapes = [x.shape for x in jax.tree.leaves(back)]
    rows = (MODEL.num_layers, 1, T, MODEL.num_heads)
    assert shapes.count(rows) == attentions, (method, shapes)  # lse
    assert sum(x[:-1] == rows for x in shapes) == attentions, (method, shapes)  # o, padded for some


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_operations_know_that_their_layer_is_recomputed(monkeypatch, remat):
  seen, real = [], pk.index_kl
  monkeypatch.setattr(pk, "index_kl", lambda *a, **k: (seen.append(backends.is_recomputed()), real(*a, **k))[1])
  config = config_lib.Config(model=dataclasses.replace(MODEL, remat=remat),
                             attention=methods.MSA(block_size=4, num_blocks=2, index_dim=4))
  jax.eval_shape(lambda p: model_lib.forward(config, p, jnp.zeros((1, 8), jnp.int32)).losses,
                 model_lib.abstract_params(config))
  assert seen and set(seen) == {remat == "layer"} and not backends.is_recomputed()


def test_a_warm_up_is_dense_whatever_the_layers():
  """Layers without a selector's loss, in a hybrid that warms one up, give dense output at dense cost."""
  config = config_lib.Config(model=MODEL, attention=methods.MSA(block_size=4, num_blocks=2, index_dim=4),
                             layers=("attention", "block_topk"))
  config.others = {"block_topk": methods.BlockTopK(block_size=4, num_blocks=2)}
  params, tokens = one_layer.random_params(model_lib.abstract_params(config)), jnp.arange(24)[None] % 7
  run = lambda mode: jax.jit(lambda params: model_lib.forward(config, params, tokens, mode=mode, losses=False).logits)(
      params)
  assert (run("warmup") == run("dense")).all() and (run("sparse") != run("dense")).any()
  assert flops.forward(config, 24, "warmup")["dense"] == flops.forward(config, 24, "dense")["dense"]


def test_a_typo_in_an_attribute_does_not_move_a_parameter():
  """The group is what the parameter says, whatever its module is called."""
  @dataclasses.dataclass
  class Renamed(blocks.BlockMethod):
    name: ClassVar[str] = "renamed"
    groups: ClassVar[tuple[str, ...]] = ("selector",)

    def layer(self, init, model):
      return Leaking(init, "selector")

  config = config_lib.Config(model=MODEL, attention=Renamed(), schedule=schedule.dense(1))
  groups = optim.groups_of(config)
  assert [path for path, group in groups.items() if group == "selector"] == ["stacks.stack0.attention.method.selectr"]
  assert set(optim.make(config).transforms) == {"backbone", "selector"}


def test_a_method_that_is_registered_again_is_compiled_again(tmp_path, monkeypatch):
  """As a notebook's cell that was changed and run again: same name, same options, other code."""
  monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
  monkeypatch.setattr(origins, "_ORIGINS", dict(origins._ORIGINS))

  def first_loss(sign):
    class Layer(blocks.BlockLayer):
      def select(self, index, x, streams, call):
        (B, T), (S, K), count = x.q.shape[:2], streams["k"].shape[1:3], -(-streams["k"].shape[1] // 8)
        scores = jnp.broadcast_to(sign * jnp.arange(count, dtype=jnp.float32), (B, T, K, count))
        return pk.block_top_k(scores, **self.options.geometry, keys=S, **call.ops)

    @methods.register
    @dataclasses.dataclass
    class Again(blocks.BlockMethod):
      name: ClassVar[str] = "again"

      def layer(self, init, model):
        return Layer(self)

    config = config_lib.Config(
        model=dataclasses.replace(MODEL, num_layers=1), attention=Again(block_size=8, num_blocks=2),
        schedule=schedule.native(1, selector_warmup=0), log_every=1,
        data=config_lib.DataConfig("tasks", task_share=1.0, tasks=("copy:length=4",), context=64, global_batch=2),
        eval=config_lib.EvalConfig(sequences=0, run_modes=()))
    workdir = tmp_path / str(origins.registered())
    train.train(config, workdir)
    return metrics.read_jsonl(workdir / "metrics.jsonl")[0]["loss"]

  late, early = first_loss(1), first_loss(-1)
  assert late != early and first_loss(1) == late


def test_a_choice_that_is_missing_and_a_method_that_nobody_finds_are_named():
  class Forgetful(blocks.BlockLayer):
    def select(self, index, x, streams, call):
      """Nothing: the return is forgotten."""

  @dataclasses.dataclass
  class Unknown(blocks.BlockMethod):
    name: ClassVar[str] = "unknown"

    def layer(self, init, model):
      return Forgetful(self)

  config = config_lib.Config(model=MODEL, attention=Unknown(block_size=8, num_blocks=2))
  with pytest.raises(config_lib.ConfigError, match=r"attention = .*Unknown\(.*: .*put @methods.register above it"):
    config_lib.validate(config)
  with pytest.raises(NotImplementedError, match=r"Forgetful.select: .* the chosen blocks, int32\[B, T, R, J\]"):
    jax.eval_shape(lambda params, tokens: model_lib.forward(config, params, tokens, mode="sparse"),
                   model_lib.abstract_params(config), jax.ShapeDtypeStruct((1, 32), jnp.int32))
