"""Looking inside one model: views against the model's own numbers, block lists on disk, tables of a trace."""
import json

import jax
import jax.numpy as jnp
import numpy as np
from one_layer import random_params
import pytest

from nsa import config as config_lib, evaluate, methods, model as model_lib, tasks
from nsa.look import pictures, profile, selections, views

T = 64


def make_config():
  return config_lib.Config(
      arm="tiny", attention=methods.MSA(index_dim=8, block_size=8, num_blocks=3),
      model=config_lib.ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32),
      data=config_lib.DataConfig(context=T), eval=config_lib.EvalConfig(sequences=2, batch=1))


@pytest.fixture(scope="module")
def run():
  config = make_config()
  params = jax.tree.map(jnp.asarray, random_params(model_lib.abstract_params(config)))
  example = tasks.batch("mqar:pairs=4", 0, 1, T, "test")
  return config, params, example["inputs"][0], example["targets"][0]


def test_view_agrees_with_the_model(run):
  config, params, tokens, targets = run
  seen = {mode: views.look(config, params, tokens, targets, mode) for mode in ("sparse", "dense")}
  for mode, view in seen.items():
    logits = jax.jit(lambda params, mode=mode: model_lib.forward(
        config, params, tokens[None], mode=mode, losses=False).logits[0])(params)
    nll = -jax.nn.log_softmax(logits)[jnp.arange(T), targets]
    np.testing.assert_allclose(view.nll, nll, rtol=1e-4, atol=1e-4)
    assert len(view.layers) == 2 and view.block_size == 8
  assert seen["dense"].layers[0].chosen is None
  part = seen["sparse"].layers[1]
  count = part.chosen.sum(-1)
  np.testing.assert_array_equal(count, np.minimum(np.arange(T) // 8 + 1, 3)[:, None].repeat(2, 1))
  for query in (0, 13, T - 1):  # two ways to the same mass
    weights = part.attention(query, 1)
    by_block = np.add.reduceat(weights, np.arange(0, query + 1, 8))
    np.testing.assert_allclose(part.mass[query, 1, :len(by_block)], by_block, atol=1e-5)


def test_view_needs_blocks(run):
  config, params, tokens, targets = run
  dense = make_config()
  dense.attention = methods.Dense()
  with pytest.raises(ValueError, match="run_mode = 'oracle'.*eval.blocks"):
    views.look(dense, params, tokens, targets, "oracle")


def test_pictures_draw(run, tmp_path):
  config, params, tokens, targets = run
  view = views.look(config, params, tokens, targets)
  figures = [pictures.one_query(view, 40, 1), pictures.maps(view),
             pictures.by_position({"sparse": view}, np.arange(T) > 50),
             pictures.bars({"a": 1.0, "b": 2.0}, "title", "ms", most=1)]
  assert [len(figure.axes) for figure in figures] == [1, 8, 1, 1]  # every map has a colour bar
  assert {text.get_text() for text in figures[3].axes[0].get_yticklabels()} == {"b", "1 others"}
  with pytest.raises(ValueError, match="no records"):
    pictures.learning(tmp_path)


def test_block_lists_survive_the_disk(run, tmp_path):
  config, params, _, _ = run
  found = selections.collect(config, params, step=7, layers=(1,), windows=2)
  selections.save(tmp_path / "lists.npz", found)
  with np.load(tmp_path / "lists.npz") as file:
    lists, meta = file["block_indices"], json.loads(str(file["meta"]))
  assert lists.shape == (1, 2, T, 2, 3) and lists.dtype == np.int16
  assert (meta["block_size"], meta["T"], meta["step"], len(meta["documents"])) == (8, T, 7, 2)
  own = np.arange(T) // 8
  assert (lists == own[:, None, None]).any(-1).all(), "a query always has its own block"
  assert (lists.max(-1) == own[:, None]).all() and (np.diff(np.where(lists < 0, 99, lists), axis=-1) >= 0).all()
  assert ((lists >= 0).sum(-1) == np.minimum(own + 1, 3)[:, None]).all()
  with pytest.raises(ValueError, match="layers = .*0 to 1"):
    selections.collect(config, params, step=7, layers=(2,), windows=1)
  with pytest.raises(ValueError, match="run_mode = 'dense'"):
    selections.collect(config, params, step=7, layers=(0,), windows=1, run_mode="dense")


def test_trace_becomes_a_table(tmp_path):
  @jax.jit
  def f(x):
    with jax.named_scope("first_part"):
      y = jax.lax.optimization_barrier(jnp.sin(x @ x))  # or both parts may become one operation
    with jax.named_scope("second_part"):
      return jnp.cos(y @ x).sum()

  x = jnp.ones((256, 256))
  program = f.lower(x).compile()
  program(x)
  with jax.profiler.trace(str(tmp_path)):
    jax.block_until_ready(program(x))
  times = profile.operations(tmp_path)
  assert times and all(ms >= 0 for ms in times.values())
  scopes = profile.by_scope(times, program.as_text(), ("part", "first_part", "second_part"))
  assert scopes["first_part"] > 0 and scopes["second_part"] > 0
  assert "part" not in scopes, "the longest name that fits"
  assert sum(scopes.values()) == pytest.approx(sum(times.values()))
  with pytest.raises(ValueError, match="holds no trace"):
    profile.operations(tmp_path / "nowhere")


def test_open_run_names_what_is_missing(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="config.json is missing"):
    evaluate.open_run(tmp_path)
