r"""Every token's read, block by block, all blocks at once: key read, f, value read, phi_out.

Given g U of the tokens the memory is linear between two block starts. For a block of BLOCK tokens
that starts from S_k and S_v, with the decays `carry` and `pair` (`_triton_decays`):

  Y = carry Q S_k^T - ((Q K^T) * pair) G U_k,   R = f(Y)
  P = carry R S_v - ((R (G U_v)^T) * pair) V,   O = phi_out(P)

Tokens after a restart in the block read `init` in place of S.
"""

import jax.numpy as jnp

from pallas_kernels import _triton_activations as activations
from pallas_kernels import _triton_decays as decays
from pallas_kernels._triton_call import (
  BLOCK,
  NN,
  NT,
  call,
  dot,
  in_parts,
  seen,
  short,
  through,
  tile,
  wait,
)

# Rows of the numbers per token.
HI, LO, FIRST, CARRY, ENTERED = range(5)


def scalars(plan, log_beta, run):
  """Returns [B H 4|5 N] of the gates [B H N]; see the rows above."""
  d = decays.of(log_beta, run, BLOCK)
  rows = [d.hi, d.lo, d.first, d.carry] + ([d.entered] if plan.runs else [])
  flat = lambda x: jnp.broadcast_to(x, d.hi.shape).astype(jnp.float32).reshape(log_beta.shape)
  return jnp.stack([flat(x) for x in rows], 2)


def pair(hi, lo, first, hi_s, lo_s, before):
  """Returns [t, s] decays from after s through t for the running sums at t and s.

  `first` [t] and `before` [t] bound s: first <= s < before; the decay is 0 elsewhere.
  """
  s = jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
  sees = (s >= first.astype(jnp.int32)[:, None]) & (s < before[:, None])
  exponent = (hi[:, None] - hi_s[None, :]) + (lo[:, None] - lo_s[None, :])
  return jnp.where(sees, jnp.exp(jnp.where(sees, exponent, 0)), 0)


def read(rows, entered, product, s, init):
  """Returns the carried part of a read: `product` of S or, behind a restart, of `init`."""
  return rows[CARRY, :][:, None] * seen(product, entered, s, init)


def entered_of(plan, rows):
  """Returns whether the tokens read S, [t] in fp32, or None without restarts."""
  return rows[ENTERED, :] if plan.runs else None


def block_pair(rows):
  """Returns `pair` of a block's reads: every token sees itself and those before it."""
  hi, lo = rows[HI, :], rows[LO, :]
  return pair(hi, lo, rows[FIRST, :], hi, lo, jnp.arange(BLOCK, dtype=jnp.int32) + 1)


class Specs:
  """The launch over all blocks: its grid, and the specs of what a program sees.

  rows: the numbers per token; tokens(W): [B N H W]; codes(pass): [2 B H N M]; own_codes: [B H N M];
  own_row: [B H N]; memory(W): [B H blocks M W]; init(W): [H M W].
  """

  def __init__(self, plan, rows, gu, like):
    num_slots, h = like.shape[1:3]
    m = gu.shape[-1]
    self.grid = (h, num_slots // BLOCK, like.shape[0])
    self.rows = tile((None, None, rows.shape[2], BLOCK), lambda h, r, b: (b, h, 0, r))
    self.tokens = lambda w: tile((None, BLOCK, None, w), lambda h, r, b: (b, r, h, 0))
    self.codes = lambda i: tile((None, None, None, BLOCK, m), lambda h, r, b: (i, b, h, r, 0))
    self.own_codes = tile((None, None, BLOCK, m), lambda h, r, b: (b, h, r, 0))
    self.own_row = tile((None, None, BLOCK), lambda h, r, b: (b, h, r))
    self.memory = lambda w: tile((None, None, None, m, w), lambda h, r, b: (b, h, r, 0, 0))
    self.init = lambda w: tile((None, m, w), lambda h, r, b: (h, 0, 0))


def forward(plan, q, k, v, gu, rows, states, init, save: bool):
  """Returns (o [B N H V] in v's dtype, Y [B H N M] or None).

  Args:
    plan: the static choices.
    q, k, v: [B N H D | V], N a multiple of BLOCK.
    gu: [2 B H N M], g U of both passes.
    rows: from `scalars`.
    states: (S_k, S_v) [B H blocks M D | V] at the block starts.
    init: (S_k, S_v) [H M D | V] in the operands' dtype.
    save: whether Y is wanted.
  """
  d, width = q.shape[-1], v.shape[-1]

  def trellis_read(rows, q, k, v, gu_k, gu_v, s_k, s_v, init_k, init_v, o, *save_y):
    decay, entered = block_pair(rows), entered_of(plan, rows)
    query = q[...]
    y = read(rows, entered, lambda s: in_parts(plan, q, s, NT), s_k, init_k)
    y = y - dot(plan, dot(plan, query, k[...], NT) * decay, gu_k[...])
    for ref in save_y:
      ref[...] = y.astype(ref.dtype)
    r = activations.apply(plan, plan.f, y, plan.eps)
    if short(plan, width) and o.shape == r.shape:
      through(plan, o, r)  # which holds R until the reads are done
      p = read(rows, entered, lambda s: in_parts(plan, o, s, NN), s_v, init_v)
      p = p - dot(plan, in_parts(plan, o, gu_v, NT) * decay, v[...])
      wait(plan)
    else:
      p = read(rows, entered, lambda s: dot(plan, r, s[...]), s_v, init_v)
      p = p - dot(plan, dot(plan, r, gu_v[...], NT) * decay, v[...])
    o[...] = activations.apply(plan, plan.phi_out, p, plan.eps).astype(o.dtype)

  at = Specs(plan, rows, gu, v)
  out = call(
    plan,
    trellis_read,
    at.grid,
    [at.rows, at.tokens(d), at.tokens(d), at.tokens(width), at.codes(0), at.codes(1)]
    + [at.memory(d), at.memory(width), at.init(d), at.init(width)],
    [at.tokens(width)] + [at.own_codes] * save,
    [(v.shape, v.dtype)] + [(gu.shape[1:], plan.operand)] * save,
    warps=4 if max(d, width, gu.shape[-1]) <= 64 else 8,
    stages=2,
  )(rows, q, k, v, gu, gu, *states, *init)
  return out[0], out[1] if save else None
