"""The product of a linear map, with a gradient of its weights that a CPU computes as it stands.

JAX takes the gradient of w in y = x w as (g^T x)^T. On a CPU, XLA folds the outer transpose into
the product and has g turned over by the elementwise function that computes it, which then writes
thousands of rows column by column and takes longer than the product itself. Written as x^T g there
is nothing to turn over (benchmarks/cpu_step.py). The compiler of TPUs makes one program of both.
"""

import functools
from typing import Any

import jax
from jaxtyping import Float

from trellis_jax import sharding
from trellis_jax.typing import Array


def dot_general(
  x: Float[Array, "... N"],
  w: Float[Array, "N M"],
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
  *,
  out_sharding: Any = None,
) -> Float[Array, "... M"]:
  """Returns x w, for `nnx.Linear(dot_general=...)`; what else it is asked for is `jax.lax`'s.

  It has a gradient in reverse mode alone, as the memories have.
  """
  options = (precision, preferred_element_type)
  if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or w.ndim != 2:
    return jax.lax.dot_general(x, w, dimension_numbers, *options, out_sharding=out_sharding)
  return _product(x, w, options, out_sharding)


def _forward(x, w, options, out_sharding):
  """X w, of precision and result type `options`, and what its gradients need.

  A product of jax.lax as it stands, which the policies of `jax.checkpoint` can tell to be kept.
  """
  numbers = (((x.ndim - 1,), (0,)), ((), ()))
  return jax.lax.dot_general(x, w, numbers, *options, out_sharding=out_sharding), (x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, w, options, out_sharding):
  return _forward(x, w, options, out_sharding)[0]


def _backward(options, out_sharding, kept, g):
  """(g w^T, x^T g), placed as x and w are."""
  del out_sharding
  x, w = kept
  last, leading = g.ndim - 1, tuple(range(g.ndim - 1))

  def product(a, b, contracted, like):
    where = sharding.explicit(like)
    y = jax.lax.dot_general(a, b, (contracted, ((), ())), *options, out_sharding=where)
    return y.astype(like.dtype)

  return product(g, w, ((last,), (1,)), x), product(x, g, (leading, leading), w)


_product.defvjp(_forward, _backward)
