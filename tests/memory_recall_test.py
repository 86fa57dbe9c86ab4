"""What a memory gives back of the study's rows of recall (experiments/titans.py) where keys, values and queries are as
good as they can be: what it can hold, and how much of that its gates let through before they have learnt. No training.

    PYTHONPATH=. python tests/memory_recall_test.py        # the table in docs/memory.md
"""
import jax
import jax.numpy as jnp
import numpy as np

from nsa import config as config_lib, layers, methods, tasks
from nsa.methods.titans import memory

NO_KEY = 320  # stands before the first token


def share_given_back(task, length, *, width=64, chunk=128, bindings_alone=False, step=None, examples=12, far=256,
                     shifted=True, products="float32"):
  """Of answers whose evidence lies more than `far` tokens back: (how many, share given back, by how many SDs of 128
  values the right one stands above their mean).

  Each token is written as the value of the token before it, by random vectors, as a short convolution allows. A read is
  what it differs by from that of a memory without writes and from the row's mean; given back is the value whose vector
  is nearest in direction, of 128 (chance: 0.8 %). `bindings_alone`: nothing else is written. Gates are as they begin,
  but for `step`. `shifted` = False: each token under its own key, as without the convolution.
  """
  model = config_lib.ModelConfig(d_model=width, num_heads=1, num_kv_heads=1, head_dim=width)
  method = methods.MAG(chunk=chunk, backprop="local", products=products)
  mem = memory.Memory(layers.Init(jax.random.key(0)), model, method, project=False)
  rng = np.random.default_rng(1)
  of_key, of_value = rng.standard_normal((NO_KEY + 1, width)), rng.standard_normal((NO_KEY, width))
  rows = [tasks.get(task).example(0, i, length) for i in range(examples)]
  tokens = np.stack([row.tokens for row in rows])
  before = np.concatenate([np.full((examples, 1), NO_KEY), tokens[:, :-1]], axis=1)
  q, k, v = (jnp.float32(x)[:, :, None] for x in
             (of_key[tokens], of_key[before if shifted else tokens], of_value[tokens]))
  gates = mem.gates_of(jnp.zeros((*tokens.shape, width)))
  theta = jnp.full_like(gates.step, step) if step else gates.step
  if bindings_alone:
    theta = theta * ((before > 0) & (before < 128))[..., None]
  read = lambda theta: np.asarray(mem(q, k, v, gates._replace(step=theta), None)[0])[:, :, 0]
  written = read(theta) - read(jnp.zeros_like(theta))
  written -= written.mean(1, keepdims=True)
  values = np.asarray(jax.nn.silu(jnp.float32(of_value)))[128:256]
  scores = written @ (values - values.mean(0)).T
  hits, above = [], []
  for row, score in zip(rows, scores):
    for at in np.nonzero(row.answer_group >= 0)[0] - 1:
      if at - np.nonzero(row.tokens[:at] == row.tokens[at])[0][-1] > far:
        right = row.tokens[at + 1] - 128
        hits.append(score[at].argmax() == right)
        above.append((score[at, right] - score[at].mean()) / score[at].std())
  return len(hits), float(np.mean(hits)), float(np.mean(above))


def test_a_memory_holds_the_bindings_of_a_row_at_any_distance():
  """Also in chunks of 128 with bfloat16 products: keys of one token, bound to the token behind."""
  answers, share, above = share_given_back("mqar:pairs=16", 1024, bindings_alone=True, products="bfloat16")
  assert answers > 80 and share > 0.6 and above > 3


def test_gates_as_they_begin_bury_bindings_under_filler():
  answers, share, above = share_given_back("mqar:pairs=16", 1024)
  assert answers > 80 and share < 0.2 and above < 1.2


def test_a_key_finds_its_value_because_keys_see_the_token_before():
  assert share_given_back("mqar:pairs=16", 1024, bindings_alone=True, shifted=False)[1] < 0.05


if __name__ == "__main__":
  toy = dict(width=32, chunk=8, far=16)
  for task, length, examples, how in (
      ("mqar:pairs=8", 64, 64, toy), ("mqar:pairs=8", 256, 64, toy), ("mqar:pairs=16", 1024, 32, {}),
      ("mqar:pairs=16", 4096, 16, {}), ("mqar:pairs=64", 4096, 3, {}), ("mqar:pairs=16", 4096, 8, dict(chunk=16)),
      ("mqar:pairs=16", 4096, 8, dict(products="bfloat16"))):
    for name, gates in {"all tokens": {}, "bindings alone": dict(bindings_alone=True),
                        "bindings alone, largest step": dict(bindings_alone=True, step=0.5)}.items():
      answers, share, above = share_given_back(task, length, examples=examples, **how, **gates)
      print(f"{task}@{length} {how}, written: {name}: {answers} answers, {100 * share:.1f} % given back, right value "
            f"{above:.2f} SD above the mean", flush=True)
