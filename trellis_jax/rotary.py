"""Rotary positions (Su et al. 2021, "RoFormer"), pairing the two halves of a head."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from trellis_jax.typing import Array


def rotate(
  x: Float[Array, "B T H D"], positions: Int[Array, "B T"], base: float = 10000.0
) -> Float[Array, "B T H D"]:
  """Returns x with the pair (x_i, x_{i + D/2}) turned by positions * base^(-2 i / D), D even."""
  half = x.shape[-1] // 2
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  rate = base ** (-jnp.arange(half, dtype=wide.dtype) / half)
  angle = positions.astype(wide.dtype)[:, :, None, None] * rate[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = wide[..., :half], wide[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
