"""The op on four host devices: sharded over batch and heads it is what it is on one."""

import four_devices
import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import op_cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trellis_jax import trellis

jax.config.update("jax_numpy_rank_promotion", "raise")
kind = getattr(AxisType, sys.argv[1])
arrays, memory = op_cases.inputs(b=4, t=21, h=4, dtype=np.float32)
ids = jnp.asarray([[1] * 9 + [2] * 12] * 4, jnp.int32)

def whole(x):
  mesh = jax.typeof(x).sharding.mesh
  explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
  return jax.sharding.reshard(x, NamedSharding(mesh, P())) if explicit else x

@jax.value_and_grad
def run(args, ids):
  arrays, memory = args
  part = lambda at: (jax.tree.map(lambda x: x[:, at], arrays), dict(segment_ids=ids[:, at]))
  (first, ids_1), (rest, ids_2) = part(slice(0, 8)), part(slice(8, 21))
  options = dict(initial_memory=memory, chunk_size=5)
  _, state = trellis(*first, **ids_1, **options)
  out = trellis(*rest, **ids_2, initial_state=state, **options)
  return op_cases.scalar(*jax.tree.map(whole, out))

want = jax.device_get(jax.jit(run)((arrays, memory), ids))
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
with jax.set_mesh(mesh):
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  sharded = tuple(place(x, "data", None, "model", *(None,) * (x.ndim - 3)) for x in arrays)
  shared = tuple(place(x, "model", None, None) for x in memory)
  ids = place(ids, "data", None)
  got = jax.device_get(jax.jit(run)((sharded, shared), ids))
for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
  assert op_cases.distance(x, y) <= 1e-5, op_cases.distance(x, y)
"""


@pytest.mark.parametrize("axes", ["Explicit", "Auto"])
def test_sharded_equals_unsharded(axes):
  four_devices.run(PROGRAM, axes)
