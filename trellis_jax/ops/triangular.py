r"""Solves (I + A) X = R for strictly lower triangular A, by halving.

The inverse of a block is made from those of its halves,

  (I + [[A_1, 0], [B, A_2]])^-1 = [[P, 0], [-Q B P, Q]],   P = (I + A_1)^-1, Q = (I + A_2)^-1

from blocks of one token up: products of matrices alone, log2 L of them in a row. Nothing is
expanded in powers of A, which cancel when keys are alike. `jax.lax.linalg.triangular_solve` is not
used: on CPUs (jaxlib 0.10.2, two cores) programs with several of them hung, all threads asleep.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.typing import Array

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def solve(a: Float[Array, "... L L"], right: Float[Array, "... L W"]) -> Float[Array, "... L W"]:
  """Returns X; what A holds on and above its diagonal is not read."""
  return _dot("...ts,...sw->...tw", inverse(a), right)


def _forward(a, right):
  inv = inverse(a)
  x = _dot("...ts,...sw->...tw", inv, right)
  return x, (inv, x)


def _backward(saved, x_bar):
  inv, x = saved
  right_bar = _dot("...ts,...tw->...sw", inv, x_bar)
  return jnp.tril(-_dot("...tw,...sw->...ts", right_bar, x), -1), right_bar


solve.defvjp(_forward, _backward)


def inverse(a: Float[Array, "... L L"]) -> Float[Array, "... L L"]:
  """Returns (I + A)^-1; see `solve`."""
  length = a.shape[-1]
  more = (1 << (length - 1).bit_length()) - length
  if more:
    whole = inverse(jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more)] * 2))
    return whole[..., :length, :length]
  if length == 1:
    return jnp.ones_like(a)
  half = length // 2
  halves = inverse(jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3))
  p, q = halves[..., 0, :, :], halves[..., 1, :, :]
  below = -_dot("...ij,...jk->...ik", _dot("...ij,...jk->...ik", q, a[..., half:, :half]), p)
  top = jnp.concatenate([p, jnp.zeros_like(p)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([below, q], axis=-1)], axis=-2)
