"""Compiles programs for TPUs that are not here: libtpu alone, on any CPU host, is the whole compiler.

`compile_for("v6e", function, *shapes)` traces with the dispatch of `pallas_kernels` set to "tpu" and returns what
jax's `lower(...).compile()` returns: Mosaic reports what it refuses and XLA what does not fit, as on the chip.
`facts` reads the sizes.
"""
from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re

import jax
from jax.experimental import topologies
import numpy as np

from pallas_kernels import backends

TOPOLOGIES = {"v5e": "v5e:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2x1", "tpu7x": "tpu7x:2x2x1"}


def missing() -> str | None:
  """Why nothing can be compiled here, or None."""
  if importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed (pip install 'jax[tpu]')"
  return None


def version() -> str:
  """Of libtpu."""
  return importlib.metadata.version("libtpu")


@functools.cache
def mesh_of(chip: str) -> jax.sharding.Mesh:
  """A mesh of one device of the chip. Raises ValueError for a chip that is not listed."""
  if chip not in TOPOLOGIES:
    raise ValueError(f"chip = {chip!r}: take one of {', '.join(TOPOLOGIES)}")
  # libtpu locks "its" TPU and asks a metadata server which one that is: there is none, and processes are many.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
  return jax.sharding.Mesh(np.array(topology.devices[:1]), ("chip",))


def compile_for(chip: str, function, *args, **jit_options) -> jax.stages.Compiled:
  """Compiles `jax.jit(function, **jit_options)` for one device of a chip.

  Args:
    chip: one of `TOPOLOGIES`.
    function: calls operations of `pallas_kernels`; may be differentiated inside.
    args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes count.
  """
  mesh = mesh_of(chip)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
  # Without the abstract mesh the kernels' lowering asks jax for the chip and finds a CPU.
  with backends.target_platform("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function, **jit_options).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def kernels_of(compiled) -> dict[str, int]:
  """Kernel name -> most bytes of VMEM that any call of it takes, scratch and pipeline buffers included."""
  found: dict[str, int] = {}
  for line in compiled.as_text().splitlines():
    if "tpu_custom_call" not in line:
      continue
    # The name stands in jvp(...) and transpose(...) where it was differentiated.
    name = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call"', line)
    name = name.group(1) if name else "?"
    used = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', line)
    sizes = [int(entry["size"]) for entry in json.loads(used.group(1))] if used else []
    found[name] = max(found.get(name, 0), *sizes, 0)
  return found


def facts(compiled) -> dict[str, int]:
  """Sizes of a compiled program in bytes: arguments, outputs, temporaries in HBM, the most VMEM of a kernel."""
  memory = compiled.memory_analysis()
  return {"argument_bytes": memory.argument_size_in_bytes, "output_bytes": memory.output_size_in_bytes,
          "temporary_bytes": memory.temp_size_in_bytes, "code_bytes": memory.generated_code_size_in_bytes,
          "vmem_bytes": max(kernels_of(compiled).values(), default=0)}
