"""Every mixer on four host devices: data and tensor parallel it is what it is on one."""

import four_devices
import pytest

from trellis_jax import mixers

PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trellis_jax import mixers
from trellis_jax.sharding import param_specs

jax.config.update("jax_numpy_rank_promotion", "raise")
name, small = sys.argv[1], dict(num_slots=6, chunk_size=4, state_dim=8, cache_length=16)
fields = [f.name for f in dataclasses.fields(mixers.get(name).Config)]
config = mixers.configure(name, {k: v for k, v in small.items() if k in fields})
graph, params = nnx.split(mixers.get(name).Mixer(8, 2, config, rngs=nnx.Rngs(0)))
x = jax.random.normal(jax.random.key(0), (4, 10, 8))
ids = jnp.asarray([[0] + [1] * 3 + [2] * 6, [1] * 10, [3] * 8 + [4] * 2, [5] * 9 + [0]])

def loss(params, x, ids):
  mixer = nnx.merge(graph, params)
  y, state = mixer(x, segment_ids=ids)
  return jnp.sum(y**2), (y, state)

run = lambda *args: jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(*args))
FORWARD, GRADIENT = 1e-5, 1e-4
want = run(params, x, ids)
for kind in (AxisType.Explicit, AxisType.Auto):
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    spread = jax.tree.map(place, params, param_specs(params, mesh))
    assert any("model" in p.sharding.spec for p in jax.tree.leaves(spread))
    got = run(spread, place(x, P("data")), place(ids, P("data")))
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    error, scale = np.linalg.norm(a - b), np.linalg.norm(b)
    tolerance = GRADIENT if path[0].idx else FORWARD
    assert error <= tolerance * scale, (kind, jax.tree_util.keystr(path), error, scale)
"""


@pytest.mark.parametrize("name", mixers.names())
def test_sharded_equals_unsharded(name):
  four_devices.run(PROGRAM, name)
