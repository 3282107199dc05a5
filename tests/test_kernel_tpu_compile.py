"""The op on TPUs inside a sharded training step, compiled for chips that are not there."""

import json
import subprocess
import sys

import pytest

from benchmarks import libtpu
from experiments import provenance

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from trellis_jax import trellis

topology, chunk_size, T = sys.argv[1], *map(int, sys.argv[2:4])
knobs = dict(chunk_size=chunk_size, curvature=float(sys.argv[4]))
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
axes = dict(axis_names=("data", "model"), axis_types=(AxisType.Explicit,) * 2)
mesh = Mesh(np.array(devices[:4]).reshape(2, 2), **axes)
B, H, D, M, F = 8, 8, 64, 64, 256

def loss(weights, x, ids):
  into = lambda w: jnp.einsum("btf,fhd->bthd", x, w, out_sharding=P("data", None, "model", None))
  q, k, v, alpha, gates = (into(w) for w in weights[:5])
  log_beta, gamma = -jax.nn.softplus(gates[..., 0]), jax.nn.sigmoid(gates[..., 1])
  o, _ = trellis(q, k, v, alpha, log_beta, gamma, segment_ids=ids, **knobs)
  y = jnp.einsum("bthd,hdf->btf", o, weights[5], out_sharding=P("data", None, None))
  return jnp.mean(jnp.square(y - x).astype(jnp.float32))

def step(weights, x, ids):
  return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x, ids))

place = lambda spec, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
  shape, dtype, sharding=NamedSharding(mesh, spec)
)
head = lambda width: place(P(None, "model", None), F, H, width)
weights = (head(D), head(D), head(D), head(M), head(2), place(P("model", None, None), H, D, F))
x, ids = place(P("data", None, None), B, T, F), place(P("data", None), B, T, dtype=jnp.int32)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
  compiled = jax.jit(step).lower(weights, x, ids).compile()
text = compiled.as_text()
count = lambda name: sum(name in line and "custom-call(" in line for line in text.splitlines())
print(json.dumps([count("trellis_" + name) for name in ("forward", "backward", "step")]))
"""


@pytest.mark.skipif(not libtpu.library(), reason="libtpu is not installed")
@pytest.mark.parametrize(
  "topology,chunk_size,tokens,curvature,launches",
  [
    ("v5e:2x2", 64, 200, 0, [1, 1, 0]),
    ("v5e:2x2", 64, 200, 1, [1, 1, 0]),
    pytest.param("v5p:2x2x1", 32, 200, 0, [1, 1, 0], marks=pytest.mark.slow),
    pytest.param("v6e:2x2", 16, 200, 0, [1, 1, 0], marks=pytest.mark.slow),
    pytest.param("v6e:2x2", 16, 200, 1, [1, 1, 0], marks=pytest.mark.slow),
    ("v5e:2x2", 16, 1, 1, [0, 0, 1]),  # a derivative of one token is the definition's
  ],
)
def test_a_sharded_training_step_compiles_to_the_kernels(
  topology, chunk_size, tokens, curvature, launches
):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, topology, str(chunk_size), str(tokens), str(curvature)],
    env=dict(libtpu.environment(), PYTHONPATH=str(provenance.ROOT)),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert json.loads(done.stdout) == launches


def test_flags_of_the_cpu_compiler_do_not_reach_libtpu(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_cpu_use_fusion_emitters=false")
  assert libtpu.environment()["XLA_FLAGS"] == "--xla_dump_to=x"
