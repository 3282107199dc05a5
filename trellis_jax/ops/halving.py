r"""Decays between the tokens of a chunk, by halving: all exponents are sums of log decays, so <= 0.

A block of 2m tokens is two halves that meet at r. For s in the first half and t in the second,

  prod_{s < i <= t} d_i = right_t left_s
  right_t = prod_{r < i <= t} d_i,   left_s = prod_{s < i <= r} d_i

so the decay of every pair factors at the one level m at which the two part, and pairs of a vector
of decays are products of matrices at every level: L / 2m of [m, K] [K, m], over all levels as many
multiplications as without decays. No quotient and no difference is ever taken: decays of 1e-6 and
of 0 (l = -inf) are as exact as any, forward and backward.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.typing import Array


def halves(x: Float[Array, "... L W"], m: int) -> Float[Array, "... n 2 m W"]:
  """Returns x cut into n = L / 2m blocks of two halves of m tokens."""
  *lead, length, width = x.shape
  return x.reshape(*lead, length // (2 * m), 2, m, width)


def levels(
  log_decay: Float[Array, "... L W"],
) -> tuple[list[tuple[int, Array, Array]], Array, Array]:
  """Returns ([(m, log left, log right) for m = 1, 2, 4, ..., L / 2], log carry, log end).

  log left, log right [..., n, m, W] are of the first and of the second halves; carry [..., L, W]
  is from the chunk's start through each token, end [..., L, W] from after it to the chunk's end.
  """
  *lead, length, width = log_decay.shape
  through, after = log_decay, jnp.zeros_like(log_decay)
  found = []
  for m in _sizes(length):
    t, a = halves(through, m), halves(after, m)
    first, second = t[..., 0, :, :], t[..., 1, :, :]
    found.append((m, a[..., 0, :, :], second))
    through = jnp.stack([first, second + first[..., -1:, :]], axis=-3)
    after = jnp.stack([a[..., 0, :, :] + second[..., -1:, :], a[..., 1, :, :]], axis=-3)
    through, after = (x.reshape(*lead, length, width) for x in (through, after))
    # A compiler that fused the levels would compute level m anew for each of its 2^m uses.
    through, after = jax.lax.optimization_barrier((through, after))
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


def unit_lower_inverse(a: Float[Array, "... L L"]) -> Float[Array, "... L L"]:
  """Returns (I + A)^-1, A the part of `a` below its diagonal, which alone is read.

  With blocks A_1, A_2 on the diagonal and B below: [[T_1, 0], [-T_2 B T_1, T_2]]. Powers of A, as
  in a Neumann series, cancel when keys are alike; here none is formed. It is not
  `jax.lax.linalg.triangular_solve`: programs with several of those hung on CPU, all threads asleep
  (jaxlib 0.10.2, two cores).
  """
  length = a.shape[-1]
  if length == 1:
    return jnp.ones_like(a)
  half = length // 2
  inner = jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)
  inner = unit_lower_inverse(inner)
  first, second = inner[..., 0, :, :], inner[..., 1, :, :]
  dot = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
  below = -dot(dot(second, a[..., half:, :half]), first)
  top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _sizes(length: int) -> Iterator[int]:
  m = 1
  while m < length:
    yield m
    m *= 2
