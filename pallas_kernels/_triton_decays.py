r"""Decays from log_beta as a few numbers per token, from which the kernels make what they need.

Inside a stretch of L tokens the decay from just after token s through token t is

  pair_ts = exp(l_{s+1} + ... + l_t)  if first_t <= s <= t else 0,

where first_t is the first token that t still sees: the last restart or erasing token (l = -inf) up
to t, or 0. Differences of a running sum c cancel, so c is kept as hi + lo, with lo what rounding
took from the terms: hi_t - hi_s is then as exact as a sum of the terms between them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A smaller log_beta erases: its exp is no normal fp32 number.
ERASES = -87.0


class Decays(NamedTuple):
  """Of stretches of L tokens, [B H n L] (runs: [B 1 n L]).

  hi, lo: the running sum; first: see above; carry: decay from the stretch's start, or from the last
  restart in it, through the token; entered: no restart so far in the stretch, or None.
  """

  hi: jax.Array
  lo: jax.Array
  first: jax.Array
  carry: jax.Array
  entered: jax.Array | None

  def end(self):
    """Returns pair_{L-1, s}, [B H n L]."""
    exponent = (self.hi[..., -1:] - self.hi) + (self.lo[..., -1:] - self.lo)
    sees = jnp.arange(self.hi.shape[-1])[None, None, None] >= self.first[..., -1:]
    return jnp.where(sees, jnp.exp(jnp.where(sees, exponent, 0)), 0)


def of(log_beta, run, length: int) -> Decays:
  """Returns the decays of [B H N] gates in stretches of `length`; run [B N] or None."""
  cut = lambda x: x.reshape(*x.shape[:2], -1, length)
  before = lambda x: jnp.pad(x[..., :-1], [(0, 0)] * 3 + [(1, 0)])
  latest = lambda mask, none: jax.lax.cummax(jnp.where(mask, index, none), axis=3)
  terms = cut(log_beta.astype(jnp.float32))
  index = jnp.arange(length, dtype=jnp.int32)[None, None, None]
  erases = terms < ERASES
  terms = jnp.where(erases, 0, terms)
  hi = jnp.cumsum(terms, axis=-1)
  lo = jnp.cumsum(terms - (hi - before(hi)), axis=-1)
  erased = latest(erases, -1)
  if run is None:
    carry = jnp.where(erased < 0, jnp.exp(hi + lo), 0)
    return Decays(hi, lo, jnp.maximum(erased, 0), carry, None)
  ahead = jnp.pad(run[:, :-1], [(0, 0), (1, 0)])
  run, ahead = cut(run[:, None]), cut(ahead[:, None])
  start = latest(run != ahead, 0)
  base = lambda x: jnp.take_along_axis(before(x), jnp.broadcast_to(start, x.shape), axis=3)
  carry = jnp.where(erased < start, jnp.exp((hi - base(hi)) + (lo - base(lo))), 0)
  return Decays(hi, lo, jnp.maximum(erased, start), carry, run == ahead[..., :1])


def stale(decays: Decays, chunk: int, entered):
  """Returns the decays as a token's chunk start sees them: `Decays` at the token before the chunk.

  `entered`: no restart so far in the chunk, [B 1 n L] or None. A token behind a restart in its
  chunk reads the initial memory as it is: it sees no token, its carry is 1.
  """
  length = decays.hi.shape[-1]

  def at(x, first):
    x = x[..., chunk - 1 : length - 1 : chunk]
    x = jnp.concatenate([jnp.full((*x.shape[:3], 1), first, x.dtype), x], axis=-1)
    return jnp.repeat(x, chunk, axis=-1)

  hi, lo, first, carry = (at(x, v) for x, v in zip(decays[:4], (0, 0, 0, 1)))
  if entered is None:
    return Decays(hi, lo, first, carry, None)
  first, carry = jnp.where(entered, first, length), jnp.where(entered, carry, 1)
  return Decays(hi, lo, first, carry, at(decays.entered, True) & entered)


def before(decays: Decays, run):
  """Returns the decays as a token's memory before it sees them; `stale` of chunks of one token.

  `decays` are of stretches of any length, run [B N] or None.
  """
  if run is None:
    return stale(decays, 1, None)
  same = run == jnp.pad(run[:, :-1], [(0, 0), (1, 0)])
  return stale(decays, 1, same.reshape(run.shape[0], 1, -1, decays.hi.shape[-1]))


def total(parts, first):
  """Returns the gradient of log_beta, [B H n L], from what `parts` [B H n L] hold by token.

  A read at token t depends on all l_r with first_t <= r <= t; parts_t is the sum of what it yields.
  """
  length = parts.shape[-1]
  r, t = jnp.arange(length)[:, None], jnp.arange(length)[None]
  since = (r <= t)[None, None, None] & (r[None, None, None] >= first[..., None, :])
  return jnp.sum(jnp.where(since, parts[..., None, :], 0), axis=-1)
