r"""Decays between the tokens of a chunk, by halving: all exponents are sums of log decays, so <= 0.

A block of 2m tokens is two halves that meet at r. For s in the first half and t in the second,

  prod_{s < i <= t} d_i = right_t left_s
  right_t = prod_{r < i <= t} d_i,   left_s = prod_{s < i <= r} d_i

so the decay of every pair factors at the one level m at which the two part, and pairs of a vector
of decays are products of matrices at every level: L / 2m of [m, K] [K, m], over all levels as many
multiplications as without decays. No quotient and no difference is ever taken: decays of 1e-6 and
of 0 (l = -inf) are as exact as any, forward and backward.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.typing import Array


def halves(x: Float[Array, "... L W"], m: int) -> Float[Array, "... n 2 m W"]:
  """Returns x cut into n = L / 2m blocks of two halves of m tokens."""
  *lead, length, width = x.shape
  return x.reshape(*lead, length // (2 * m), 2, m, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def half(x: Float[Array, "... L W"], m: int, which: int) -> Float[Array, "... n m W"]:
  """Returns the first (0) or the second (1) half of every block of 2m tokens.

  The derivative is `whole`, a selection, where that of a slice is a pad. Sums of pads of several
  levels are one loop to XLA's CPU compiler, which then takes minutes to compile it.
  """
  return halves(x, m)[..., which, :, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole(x: Float[Array, "... n m W"], m: int, which: int) -> Float[Array, "... L W"]:
  """Returns blocks of 2m tokens with x in one half and zeros in the other: `half` transposed."""
  *lead, n, m, width = x.shape
  here = jnp.arange(2).reshape((1,) * (len(lead) + 1) + (2, 1, 1)) == which
  x = jnp.where(here, x[..., None, :, :], 0)
  return x.reshape(*lead, 2 * n * m, width)


half.defvjp(lambda x, m, which: (half(x, m, which), None), lambda m, i, _, ct: (whole(ct, m, i),))
whole.defvjp(lambda x, m, which: (whole(x, m, which), None), lambda m, i, _, ct: (half(ct, m, i),))


def levels(
  log_decay: Float[Array, "... L W"],
) -> tuple[list[tuple[int, Array, Array]], Array, Array]:
  """Returns ([(m, log left, log right) for m = 1, 2, 4, ..., L / 2], log carry, log end).

  log left, log right [..., n, m, W] are of the first and of the second halves; carry [..., L, W]
  is from the chunk's start through each token, end [..., L, W] from after it to the chunk's end.
  """
  through, after = log_decay, jnp.zeros_like(log_decay)
  found = []
  for m in _sizes(log_decay.shape[-2]):
    found.append((m, half(after, m, 0), half(through, m, 1)))
    # From the terms, not from the last of `through`: a level that reads another place of the level
    # before is computed anew for each of its 2^m uses where the compiler fuses them.
    first, second = (jnp.sum(half(log_decay, m, i), axis=-2, keepdims=True) for i in (0, 1))
    wide = lambda x: jnp.broadcast_to(x, (*x.shape[:-2], m, x.shape[-1]))
    through = through + whole(wide(first), m, 1)
    after = after + whole(wide(second), m, 0)
  return found, through, after


def pairs(found: list[tuple[int, Array, Array]], length: int) -> Float[Array, "... L L"]:
  """Returns prod_{s < i <= t} d_i at [t, s], 1 for s = t and 0 for s > t, for levels of W = 1."""
  at = jnp.arange(length)
  t, s = at[:, None], at[None, :]
  lead = found[0][1].ndim - 3 if found else 0
  wide = lambda x: x.reshape((1,) * lead + x.shape)
  log = wide(jnp.where(t == s, 0.0, -jnp.inf))
  for m, left, right in found:
    here = (t // (2 * m) == s // (2 * m)) & (t % (2 * m) >= m) & (s % (2 * m) < m)
    # The half that a side does not belong to is filled with its sibling: it is not selected.
    both = lambda x: jnp.stack([x, x], axis=-3).reshape(*x.shape[:lead], length)
    log = jnp.where(wide(here), both(right)[..., :, None] + both(left)[..., None, :], log)
  return jnp.exp(log)


def _sizes(length: int) -> Iterator[int]:
  m = 1
  while m < length:
    yield m
    m *= 2
