"""A training step of a Trellis mixer over a mesh (data 4, model 2), to lower or compile."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trellis_jax import mixers, sharding


def step_and_arguments(mesh, tokens: int):
  """Returns (step, abstract parameters, abstract inputs [8, tokens, 256]), placed on the mesh."""
  config = mixers.configure("trellis", dict(num_slots=64, chunk_size=64))
  make = lambda: mixers.get("trellis").Mixer(256, 4, config, rngs=nnx.Rngs(0))
  graph, params = nnx.split(nnx.eval_shape(make))

  def step(params, x):
    loss = lambda params: jnp.sum(nnx.merge(graph, params)(x)[0] ** 2)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
  params = jax.tree.map(place, params, sharding.param_specs(params, mesh))
  return step, params, place(jax.ShapeDtypeStruct((8, tokens, 256), jnp.float32), P("data"))
