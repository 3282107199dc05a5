"""`TrellisAttention` on four host devices: data and tensor parallel it is what it is on one."""

import four_devices

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trellis_jax import TrellisAttention
from trellis_jax.sharding import param_specs

jax.config.update("jax_numpy_rank_promotion", "raise")
x = jax.random.normal(jax.random.key(0), (4, 6, 8))
mask = jnp.arange(6)[None] < jnp.array([[4], [6], [6], [1]])
knobs = dict(num_slots=4, chunk_size=4, initial_memory="learned", use_bias=True)
layer = TrellisAttention(2, 8, **knobs, rngs=nnx.Rngs(0))
graph, params = nnx.split(layer)

def run(params, x, mask):
  layer = nnx.merge(graph, params)
  y, state = layer(x, mask=mask, return_state=True)
  return y, layer(x[None], initial_state=state)[0]

def loss(params, x, mask):
  return sum(jnp.sum(y**2) for y in run(params, x, mask))

def decode(layer, x):
  layer.init_cache(x.shape)
  step = nnx.jit(lambda layer, x: layer(x, decode=True))
  return [step(layer, part) for part in (x[:, :1], x[:, 1:])]

def all_of(layer, params, x, mask):
  return jax.jit(run)(params, x, mask), jax.jit(jax.grad(loss))(params, x, mask), decode(layer, x)

want = jax.device_get(all_of(layer, params, x, mask))
for kind in (AxisType.Explicit, AxisType.Auto):
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    spread = jax.tree.map(place, params, param_specs(params, mesh))
    assert spread["mixer"]["qk"]["kernel"].get_value().sharding.spec[1] == "model"
    rows = place(x, P("data")), place(mask, P("data"))
    got = jax.device_get(all_of(nnx.merge(graph, spread), spread, *rows))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
"""


def test_sharded_equals_unsharded():
  four_devices.run(PROGRAM)
