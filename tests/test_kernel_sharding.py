"""Kernels on four host devices: no compiler partitions them, so the op maps them over the mesh."""

import four_devices
import pytest

PROGRAM = """
import contextlib, re, sys
import jax, numpy as np
import op_cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import triton_gpu
from trellis_jax import trellis

kind = getattr(AxisType, sys.argv[1])
arrays, memory = op_cases.inputs(b=4, t=20, h=4, d=64, v=64, m=32, dtype=np.float32)

def whole(x):
  mesh = jax.typeof(x).sharding.mesh
  explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
  return jax.sharding.reshard(x, NamedSharding(mesh, P())) if explicit else x

@jax.value_and_grad
def run(args):
  arrays, memory = args
  out = trellis(*arrays, initial_memory=memory, implementation="triton_gpu")
  return op_cases.scalar(*jax.tree.map(whole, out))

def place(names):
  mesh = jax.make_mesh((2, 2), names, axis_types=(kind,) * 2)
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  rows, heads = names
  return mesh, (
    tuple(put(x, rows, None, heads, *(None,) * (x.ndim - 3)) for x in arrays),
    tuple(put(x, heads, None, None) for x in memory),
  )

with triton_gpu.interpreted():
  want = jax.device_get(jax.jit(run)((arrays, memory)))
  mesh, sharded = place(("fsdp", "model"))
  with jax.set_mesh(mesh):
    text = jax.jit(run).lower(sharded).as_text()
    got = jax.device_get(jax.jit(run)(sharded))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert op_cases.distance(x, y) <= 1e-6, op_cases.distance(x, y)
  # A device's part has two rows of two heads.
  assert re.search(r"sdy.manual_computation", text) and "tensor<2x20x2x64xf32>" in text
  if kind == AxisType.Auto:
    mesh, sharded = place(("rows", "model"))
    with jax.set_mesh(mesh), contextlib.suppress(ValueError):
      jax.jit(run).lower(sharded)
      raise AssertionError("axes that the op does not know are refused")
"""


@pytest.mark.parametrize("axes", ["Explicit", "Auto"])
def test_a_sharded_kernel_equals_an_unsharded_one(axes):
  four_devices.run(PROGRAM, axes)
