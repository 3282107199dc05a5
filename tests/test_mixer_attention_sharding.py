"""The attention mixer on four host devices: data and tensor parallel it is what it is on one."""

import four_devices

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trellis_jax import mixers
from trellis_jax.ops import attention
from trellis_jax.sharding import param_specs

jax.config.update("jax_numpy_rank_promotion", "raise")
attention.BLOCK = 4
module = mixers.get("attention")
knobs = module.Config(window=5, num_kv_heads=1, conv_taps=3)
graph, params = nnx.split(module.Mixer(16, 4, knobs, rngs=nnx.Rngs(0)))
x = jax.random.normal(jax.random.key(0), (4, 10, 16))
ids = jnp.asarray([[1] * 10, [0] * 2 + [1] * 8, [1] * 4 + [2] * 5 + [0], [3] * 6 + [0] * 4])

def run(params, x, ids):
  mixer = nnx.merge(graph, params)
  y, state = mixer(x, segment_ids=ids)
  z, state = mixer(x, state)
  return y, z, mixer(x[:, :1], state, segment_ids=ids[:, :1])[0]

loss = lambda *args: sum(jnp.sum(y**2) for y in run(*args))
both = lambda *args: (jax.jit(run)(*args), jax.jit(jax.grad(loss))(*args))
want = jax.device_get(both(params, x, ids))
for kind in (AxisType.Explicit, AxisType.Auto):
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    spread = jax.tree.map(place, params, param_specs(params, mesh))
    got = jax.device_get(both(spread, place(x, P("data")), place(ids, P("data"))))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
"""


def test_sharded_equals_unsharded():
  four_devices.run(PROGRAM)
