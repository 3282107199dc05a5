r"""What linearised chunks are solved with, all blocks at once.

With the writes W of a block, g, and the decays `before` from after s to just before t
(`_triton_decays.stale` of chunks of one token), for s < t of one chunk

  A_ts = before_ts (w_t . w_s),   X = (I + h A diag(g))^-1 - I,

and for the way back X = (I + rho h diag(g) A)^-1 - I. The inverse of a block of tokens is made from
those of its halves: with I + X inverse up to blocks of n tokens, and B what is below them in blocks
of 2 n, X <- X - (I + X) B (I + X).
"""

import jax.numpy as jnp

from pallas_kernels import _triton_decays as decays
from pallas_kernels import _triton_readout as readout
from pallas_kernels._triton_call import BLOCK, NT, call, dot, tile

# Rows of the numbers per token.
HI, LO, BEFORE_HI, BEFORE_LO, BEFORE_FIRST, STEP = range(6)


def scalars(plan, log_beta, gamma, run):
  """Returns [B H 6 N] of the gates [B H N]; see the rows above."""
  d = decays.of(log_beta, run, BLOCK)
  before = decays.before(d, run)
  rows = [d.hi, d.lo, before.hi, before.lo, before.first, plan.step(gamma).reshape(d.hi.shape)]
  flat = lambda x: jnp.broadcast_to(x, d.hi.shape).astype(jnp.float32).reshape(log_beta.shape)
  return jnp.stack([flat(x) for x in rows], 2)


def _inverse(plan, a):
  """(I + A)^-1 - I for strictly lower A in blocks of a chunk."""
  t, s = (jnp.arange(BLOCK, dtype=jnp.int32)[at] for at in ((slice(None), None), (None,)))
  below = lambda n: jnp.where((t // n == s // n + 1) & (t // n % 2 == 1), a, 0)
  x, n = -below(1), 2
  while n < plan.chunk:
    b = below(n)
    b = b + dot(plan, x, b)
    x, n = x - b - dot(plan, b, x), 2 * n
  return x


def make(plan, k, v, rows, back: bool):
  """Returns X [2 B H N BLOCK] of both passes, a block's tokens in its columns.

  Args:
    plan: the static choices.
    k, v: [B N H D | V], N a multiple of BLOCK.
    rows: from `scalars`.
    back: whether for the way back.
  """
  b, num_slots, h, d = k.shape
  width = v.shape[-1]
  scale = plan.curvature * (plan.rho if back else 1)

  def trellis_solvers(rows, k, v, x_k, x_v):
    t = jnp.arange(BLOCK, dtype=jnp.int32)
    pair = readout.pair(
      rows[BEFORE_HI, :], rows[BEFORE_LO, :], rows[BEFORE_FIRST, :], rows[HI, :], rows[LO, :], t
    )
    together = t[:, None] // plan.chunk == t[None] // plan.chunk
    step = rows[STEP, :]
    weight = jnp.where(together, scale * pair * (step[:, None] if back else step[None]), 0)
    for w, x in ((k, x_k), (v, x_v)):
      x[...] = _inverse(plan, weight * dot(plan, w[...], w[...], NT)).astype(x.dtype)

  tokens = lambda w: tile((None, BLOCK, None, w), lambda h, r, b: (b, r, h, 0))
  by_row = tile((None, None, rows.shape[2], BLOCK), lambda h, r, b: (b, h, 0, r))
  own = tile((None, None, BLOCK, BLOCK), lambda h, r, b: (b, h, r, 0))
  out = call(
    plan,
    trellis_solvers,
    (h, num_slots // BLOCK, b),
    [by_row, tokens(d), tokens(width)],
    [own, own],
    [((b, h, num_slots, BLOCK), plan.operand)] * 2,
    warps=4,
    stages=1,
    name="trellis_solvers" + "_backward" * back,
  )(rows, k, v)
  return tuple(out)
