"""The affine recurrences on four host devices are what they are on one."""

import four_devices
import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp
import op_cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trellis_jax.ops.affine import affine

jax.config.update("jax_numpy_rank_promotion", "raise")
kind = getattr(AxisType, sys.argv[1])
B, T, H, K, V = 4, 21, 4, 3, 5
normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
x = dict(q=normal(0, B, T, H, K), k=normal(1, B, T, H, K) / 2, w=normal(2, B, T, H, V))
x["initial"] = normal(3, B, H, K, V)
run = jnp.asarray([[0] * 9 + [1] * 12] * B, jnp.int32)
delta = dict(log_decay=-jnp.abs(normal(4, B, T, H)), beta=jax.nn.sigmoid(normal(5, B, T, H)))
vector = dict(log_decay=-jnp.abs(normal(4, B, T, H, V)))
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)

def whole(x):
  mesh = jax.typeof(x).sharding.mesh
  explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
  return jax.sharding.reshard(x, NamedSharding(mesh, P())) if explicit else x

for gates in (delta, vector):
  @jax.jit
  @jax.value_and_grad
  def call(x, run):
    out = affine(**x, run=run, decay_axis="value", chunk_size=8)
    return op_cases.scalar(*jax.tree.map(whole, out))

  want = jax.device_get(call(x | gates, run))
  with jax.set_mesh(mesh):
    spec = lambda name: P("data", "model") if name == "initial" else P("data", None, "model")
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    sharded = {name: place(a, spec(name)) for name, a in (x | gates).items()}
    got = jax.device_get(call(sharded, place(run, P("data"))))
  assert op_cases.distance(got, want) <= 1e-5, op_cases.distance(got, want)
"""


@pytest.mark.parametrize("axes", ["Explicit", "Auto"])
def test_sharded_equals_unsharded(axes):
  four_devices.run(PROGRAM, axes)
