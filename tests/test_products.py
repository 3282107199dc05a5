"""Linear maps: products and gradients are those of JAX, and no gradient is turned over."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import libtpu
from experiments import provenance
from trellis_jax import model, nn, products

OUTER = ((), ())


def case(dtype, leading=(3, 5), inputs=7, outputs=4):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((*leading, inputs), (inputs, outputs), (*leading, outputs))
  return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


def pulled_back(product, x, w, g):
  """The product and the gradients of x and w for a cotangent g."""
  numbers = (((x.ndim - 1,), (0,)), OUTER)
  y, back = jax.vjp(lambda x, w: product(x, w, numbers), x, w)
  return y, *back(g)


@pytest.mark.parametrize("leading", [(), (5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_numbers_and_gradients_are_those_of_jax(dtype, leading):
  x, w, g = case(dtype, leading)
  ours, theirs = (pulled_back(p, x, w, g) for p in (products.dot_general, jax.lax.dot_general))
  tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype == dtype
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=tolerance, atol=tolerance
    )


def test_gradients_of_a_wider_result_have_the_type_of_what_they_are_of():
  x, w, g = case(jnp.bfloat16)
  wide = functools.partial(products.dot_general, preferred_element_type=jnp.float32)
  y, d_x, d_w = pulled_back(wide, x, w, g.astype(jnp.float32))
  assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


def test_other_products_are_those_of_jax():
  x, w, _ = case(jnp.float32)
  numbers = (((2,), (1,)), OUTER)
  np.testing.assert_array_equal(
    products.dot_general(x, w.T, numbers), jax.lax.dot_general(x, w.T, numbers)
  )


def test_a_batch_of_maps():
  x, w, g = case(jnp.float32)
  maps = jnp.stack([w, 2 * w, -w])
  together = jax.vmap(lambda w: pulled_back(products.dot_general, x, w, g)[2])(maps)
  for i, each in enumerate(maps):
    alone = pulled_back(products.dot_general, x, each, g)[2]
    np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5)


def primitives(jaxpr):
  """The names of all primitives of a jaxpr and of those within."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for value in eqn.params.values():
      for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(inner, "eqns"):
          yield from primitives(inner)
        elif hasattr(inner, "jaxpr"):
          yield from primitives(inner.jaxpr)


def test_a_gradient_of_weights_turns_nothing_over():
  """As `nn.linear` has it; a plain nnx.Linear, for which XLA turns the gradients over, has one."""
  x = jnp.ones((2, 8, 4))

  def transposes(layer):
    graph, params = nnx.split(layer)
    grad = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(x) ** 2))
    return list(primitives(jax.make_jaxpr(grad)(params).jaxpr)).count("transpose")

  assert transposes(nnx.Linear(4, 6, rngs=nnx.Rngs(0))) == 1
  assert transposes(nn.linear(4, 6, rngs=nnx.Rngs(0))) == 0


def test_what_a_checkpoint_keeps_is_what_it_keeps_of_jax():
  """A policy that keeps products has to see ours: REMAT's "dots" would compute them again."""
  x, weights = jnp.ones((8, 4)), (jnp.ones((4, 4)), jnp.ones((4, 4)))

  def products_of(product, policy):
    apply = lambda x, w: product(x, w, (((1,), (0,)), OUTER))
    loss = lambda weights, x: jnp.sum(jnp.sin(apply(jnp.sin(apply(x, weights[0])), weights[1])))
    grad = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))
    return list(primitives(jax.make_jaxpr(grad)(weights, x).jaxpr)).count("dot_general")

  kept, again = model.REMAT["dots"], model.REMAT["full"]
  assert products_of(products.dot_general, kept) == products_of(jax.lax.dot_general, kept)
  assert products_of(products.dot_general, kept) < products_of(products.dot_general, again)


ON_TPU = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from trellis_jax import products

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
shape = lambda *s: jax.ShapeDtypeStruct(
  s, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
)

def cost(product):
  apply = lambda x, w: product(x, w, (((2,), (0,)), ((), ())))

  def loss(weights, x):
    gate, up, down = weights
    y = x + apply(jax.nn.silu(apply(x, gate)) * apply(x, up), down)
    return jnp.mean(jnp.square(jnp.tanh(y)).astype(jnp.float32))

  weights = (shape(256, 512), shape(256, 512), shape(512, 256))
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights, shape(4, 512, 256)).compile()
  found = compiled.cost_analysis()
  return found["flops"], found["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes

print(json.dumps([cost(products.dot_general), cost(jax.lax.dot_general)]))
"""


@pytest.mark.skipif(libtpu.library() is None, reason="no libtpu; `make kernel-report` installs it")
def test_the_compiler_of_tpus_makes_the_same_of_both():
  process = subprocess.run(
    [sys.executable, "-c", ON_TPU],
    env=libtpu.environment(),
    cwd=provenance.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  ours, theirs = json.loads(process.stdout.splitlines()[-1])
  assert ours[0] > 0
  assert ours == theirs
