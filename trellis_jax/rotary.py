"""Rotary position embedding (Su et al., 2021, eq. 34), halves paired as in GPT-NeoX."""

import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.typing import Array, Tokens


def rotate(
  x: Float[Array, "B T H D"], positions: Tokens, base: float = 10000.0
) -> Float[Array, "B T H D"]:
  """Turns the pair (x_i, x_{i + D/2}) by the angle position * base^(-2i / D), i < D/2.

  The product of two turned vectors depends on their positions by the difference alone.

  Args:
    x: queries or keys.
    positions: of the tokens in their documents [B, T].
    base: the slowest pair turns by a radian in about `base` tokens.

  Returns:
    x turned, computed in at least fp32, in x's dtype.

  Raises:
    ValueError: D is odd.
  """
  dim = x.shape[-1]
  if dim % 2:
    raise ValueError(f"head_dim={dim} is odd; rotary positions take an even one")
  acc = jnp.promote_types(x.dtype, jnp.float32)
  frequency = base ** (-jnp.arange(dim // 2, dtype=acc) * (2 / dim))
  angle = positions.astype(acc)[:, :, None, None] * frequency[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(acc), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
