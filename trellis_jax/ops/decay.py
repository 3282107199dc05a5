r"""Decays inside a block of L tokens, from log_beta, never as a quotient of products.

With l_t = log b_t and tokens s <= t of one run (a run is a stretch without a restart):

  carry_t = exp(sum_{r <= t} l_r)         from the block's start, or the run's, through token t
  pair_ts = exp(sum_{s < r <= t} l_r)     from just after token s through token t; 1 for s = t
  end_s   = pair_{L-1, s},   total = carry_{L-1}
  before  = carry_{t-1} and pair_{t-1, s} of the run of t; 1 and 0 where t begins it

Every sum is of the terms themselves, so l = -inf (erase) is exact forward and backward.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from trellis_jax.typing import Array


class Runs(NamedTuple):
  """Which tokens of a block belong to the run that was going on when the block began.

  same[b, t, s]: s and t are of one run; entered[b, t]: t is of the run that entered the block.
  """

  same: Bool[Array, "... L L"]
  entered: Bool[Array, "... L"]

  @classmethod
  def of(cls, run: Int[Array, "... L"], entry: Int[Array, "..."]) -> "Runs":
    """Returns the masks for run numbers `run` and the run `entry` of the token before."""
    return cls(run[..., :, None] == run[..., None, :], run == entry[..., None])


def _lower(length: int, ndim: int, strict: bool) -> Bool[Array, "... L L"]:
  i = jnp.arange(length)
  mask = i[:, None] > i[None, :] if strict else i[:, None] >= i[None, :]
  return mask.reshape((1,) * (ndim - 2) + (length, length))


def within(
  log_beta: Float[Array, "... H L"], runs: Runs | None
) -> tuple[Float[Array, "... H L"], Float[Array, "... H L L"]]:
  """Returns (carry, pair) of the module's equations; pair is 0 above the diagonal."""
  length = log_beta.shape[-1]
  ndim = log_beta.ndim + 1
  lower = _lower(length, ndim, strict=False)
  later = jnp.where(_lower(length, ndim, strict=True), log_beta[..., :, None], 0)
  pair = jnp.exp(jnp.cumsum(later, axis=-2))
  if runs is None:
    return jnp.exp(jnp.cumsum(log_beta, axis=-1)), jnp.where(lower, pair, 0)
  mask = runs.same[..., None, :, :] & lower
  carry = jnp.sum(jnp.where(mask, log_beta[..., None, :], 0), axis=-1)
  return jnp.exp(carry), jnp.where(mask, pair, 0)


def before(
  log_beta: Float[Array, "... H L"], runs: Runs | None
) -> tuple[Float[Array, "... H L"], Float[Array, "... H L L"]]:
  """Returns the carry and the pairs to just before each token; pairs are 0 from the diagonal on."""
  carry, pair = within(log_beta, runs)
  lead = [(0, 0)] * (log_beta.ndim - 1)
  carry = jnp.pad(carry[..., :-1], [*lead, (1, 0)], constant_values=1)
  pair = jnp.pad(pair[..., :-1, :], [*lead, (1, 0), (0, 0)])
  if runs is None:
    return carry, pair
  same = runs.same[..., None, :, :]
  goes_on = jnp.pad(jnp.diagonal(same, -1, -2, -1), [(0, 0)] * (same.ndim - 2) + [(1, 0)])
  first = jnp.arange(log_beta.shape[-1]) == 0
  goes_on = goes_on | first.reshape((1,) * (goes_on.ndim - 1) + (-1,))
  return jnp.where(goes_on, carry, 1), jnp.where(same, pair, 0)


def alike(
  writes: tuple[Float[Array, "... H L W"], ...],
  log_beta: Float[Array, "... H L"],
  runs: Runs | None,
  precision,
) -> tuple[Float[Array, "... H L"], tuple[Float[Array, "... H L L"], ...]]:
  """Returns `before`'s carry, and of each pass its pairs times (w_t . w_s)."""
  carry, pair = before(log_beta, runs)
  dot = functools.partial(jnp.einsum, "...tw,...sw->...ts", precision=precision)
  return carry, tuple(pair * dot(w, w) for w in writes)


def to_end(
  log_beta: Float[Array, "... H L"], runs: Runs | None
) -> tuple[Float[Array, "... H L"], Float[Array, "... H"]]:
  """Returns (end, total) of the module's equations; end is 0 outside the last token's run."""
  after = jnp.flip(jnp.cumsum(jnp.flip(log_beta[..., 1:], -1), axis=-1), -1)
  end = jnp.exp(jnp.pad(after, [(0, 0)] * (log_beta.ndim - 1) + [(0, 1)]))
  if runs is None:
    return end, jnp.exp(jnp.sum(log_beta, axis=-1))
  last = runs.same[..., None, -1, :]
  return jnp.where(last, end, 0), jnp.exp(jnp.sum(jnp.where(last, log_beta, 0), axis=-1))
