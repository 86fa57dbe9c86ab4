"""Tests of nsa/fingerprint.py: one sum per leaf, wherever it is taken."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa import fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "int32"])
def test_fingerprint_of_numpy_equals_of_jax(dtype):
  rng = np.random.default_rng(0)
  for shape in ((), (1,), (3, 5, 7), (2, 70_000)):
    x = np.asarray(jnp.asarray(rng.integers(-100, 100, size=shape)).astype(dtype))
    ours = fingerprint.of_numpy(x)
    np.testing.assert_array_equal(ours, fingerprint.of_jax(x))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    for alone in ({"x": placed}, {"x": placed, "y": jnp.asarray(x)}):  # as one program, and one by one
      assert {name: sums.tolist() for name, sums in fingerprint.of_all(alone).items()} == dict.fromkeys(
          alone, ours.tolist())
    if x.size > 1 and dtype != "bool":
      swapped = x.copy().reshape(-1)
      i = int(np.argmax(swapped != swapped[0]))
      swapped[[0, i]] = swapped[[i, 0]]
      assert fingerprint.of_numpy(swapped.reshape(shape)).tolist() != ours.tolist()
