"""Mixers that tokens train, on four host devices: data and tensor parallel they are as on one."""

import os
import subprocess
import sys

# Devices are counted when JAX starts, so the meshes are made in a process of their own.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trellis_jax import mixers
from trellis_jax.sharding import param_specs

jax.config.update("jax_numpy_rank_promotion", "raise")
x = jax.random.normal(jax.random.key(0), (4, 10, 8))
ids = jnp.asarray([[0] + [1] * 3 + [2] * 6, [1] * 10, [3] * 8 + [4] * 2, [5] * 9 + [0]])
for name in ("ttt_linear", "titans", "lattice"):
  config = mixers.configure(name, dict(chunk_size=4))
  graph, params = nnx.split(mixers.get(name).Mixer(8, 2, config, rngs=nnx.Rngs(0)))

  def loss(params, x, ids):
    layer = nnx.merge(graph, params)
    y, state = layer(x, segment_ids=ids)
    return jnp.sum(y**2) + jnp.sum(layer(x, state)[0] ** 2)

  run = lambda *args: jax.device_get(jax.jit(jax.value_and_grad(loss))(*args))
  want = run(params, x, ids)
  for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
      place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
      spread = jax.tree.map(place, params, param_specs(params, mesh))
      got = run(spread, place(x, P("data")), place(ids, P("data")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name
print("equal on", len(jax.devices()))
"""


def test_sharded_equals_unsharded():
  root = os.path.dirname(os.path.dirname(__file__))
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env=dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=root),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.startswith("equal on 4")
