r"""The gradients of what is written, all blocks at once.

The reverse evolution has left X, the cotangent of g U, and S'_bar, that of the memory at each
block's end. U and Z_bar come again from Z, A and X; then both the memory at a chunk's start and its
cotangent at a chunk's end are linear inside the block. With S at the block's start, the decays
`carry*`, `pair*` that a token's chunk start sees (`_triton_decays.stale`) and `end` to the block's
end,

  G = (Z_bar (g U)^T) * pair*
  W_bar = carry* Z_bar S - (G + G^T) W - end (g U) S'_bar
  A_bar = vjp of U at g X,   g_bar = U . X

and log_beta's gradient sums over what decayed, as in `_triton_readout_backward`: the parts by token
are (G^T W) . W + end ((g U) S'_bar) . W at the token, with S'_bar . S_end at the block's last, and
(carry* Z_bar S - G W) . W at the token before its chunk, unless that is in an earlier block.
"""

import jax.numpy as jnp

from pallas_kernels import _triton_activations as activations
from pallas_kernels import _triton_decays as decays
from pallas_kernels import _triton_readout as readout
from pallas_kernels._triton_call import BLOCK, NT, TN, call, dot, tile
from pallas_kernels._triton_readout_backward import _row_dot

# Rows of the numbers per token; the last three with restarts alone.
HI, LO, STALE_HI, STALE_LO, STALE_FIRST, STALE_CARRY, END, STEP, TOTAL = range(9)
CHUNK_ENTERED, STALE_ENTERED, SURVIVES = range(9, 12)


def scalars(plan, log_beta, gamma, run):
  """Returns [B H 9|12 N] of the gates [B H N]; see the rows above (TOTAL, SURVIVES by block)."""
  d = decays.of(log_beta, run, BLOCK)
  entered = None
  if plan.runs:
    by_chunk = decays.of(log_beta, run, plan.chunk).entered
    entered = by_chunk.reshape(d.entered.shape)
  s = decays.stale(d, plan.chunk, entered)
  rows = [d.hi, d.lo, s.hi, s.lo, s.first, s.carry, d.end()]
  rows += [gamma.reshape(d.hi.shape), d.carry[..., -1:]]
  if plan.runs:
    rows += [entered, s.entered, d.entered[..., -1:]]
  flat = lambda x: jnp.broadcast_to(x, d.hi.shape).astype(jnp.float32).reshape(log_beta.shape)
  return jnp.stack([flat(x) for x in rows], 2)


def _one_pass(plan, rows, a, z, x, w, s_ref, end_bar_ref, init_ref, from_reads, init_bar_ref):
  """Returns (w_bar, a_bar, g_bar [t], parts at the token [t], parts before its chunk [t])."""
  column = lambda row: rows[row, :][:, None]
  z, x = z.astype(jnp.float32), x.astype(jnp.float32)
  gated = column(STEP) * x
  u, z_bar, a_bar = activations.inner_gradient_vjp(plan, plan.phi, z, a, gated, plan.phi_eps)
  z_bar = (plan.rho * z_bar).astype(plan.operand)
  gu = (column(STEP) * u).astype(plan.operand)
  t = jnp.arange(BLOCK, dtype=jnp.int32)
  chunk_start = t & -plan.chunk
  s, end_bar = s_ref[...], end_bar_ref[...]

  from_s = dot(plan, z_bar, s)
  if plan.runs:
    from_init = dot(plan, z_bar, init_ref[...])
    from_s = jnp.where(column(STALE_ENTERED) > 0, from_s, from_init)
    carried = column(STALE_CARRY) * z_bar.astype(jnp.float32)
    restarted = jnp.where(column(STALE_ENTERED) > 0, 0, carried)
    survives = jnp.max(rows[SURVIVES, :]) > 0
    s = jnp.where(survives, s.astype(jnp.float32), init_ref[...])
    lost = jnp.max(rows[TOTAL, :]) * end_bar.astype(jnp.float32)
    init_bar_ref[...] = dot(plan, restarted, w, TN) + jnp.where(survives, 0, lost)
  stale = column(STALE_CARRY) * from_s
  ended = column(END) * dot(plan, gu, end_bar)
  at_token = _row_dot(ended, w)
  total = jnp.max(rows[TOTAL, :]) * jnp.sum(s.astype(jnp.float32) * end_bar.astype(jnp.float32))
  at_end = total - jnp.sum(at_token)
  if plan.chunk < BLOCK:
    pair = readout.pair(
      rows[STALE_HI, :],
      rows[STALE_LO, :],
      rows[STALE_FIRST, :],
      rows[HI, :],
      rows[LO, :],
      chunk_start,
    )
    weights = (dot(plan, z_bar, gu, NT) * pair).astype(plan.operand)
    stale = stale - dot(plan, weights, w)
    back = dot(plan, weights, w, TN)
    at_token = at_token + _row_dot(back, w)
    ended = ended + back
  w_bar = from_reads.astype(jnp.float32) + stale - ended
  inside = chunk_start > 0
  if plan.runs:
    inside = inside & (rows[CHUNK_ENTERED, :] > 0)
  before = jnp.where(inside, _row_dot(stale, w), 0)
  at_token = at_token + jnp.where(t == BLOCK - 1, at_end, 0)
  return w_bar, a_bar, jnp.sum(u * x, axis=-1), at_token, before


def backward(plan, k, v, alpha, rows, z, x, states, end_bar, init, k_bar, v_bar):
  """Returns (k_bar, v_bar, alpha_bar, gamma_bar, at, before, init_bar by block or None).

  Args:
    plan, k, v, alpha: as in `evolve.forward`.
    rows: from `scalars`.
    z, x: [2 B H N M], from `evolve.forward` and `evolve.reverse`.
    states: (S_k, S_v) [B H blocks M D | V] at the block starts.
    end_bar: their cotangents at the block ends.
    init: (S_k, S_v) [H M D | V].
    k_bar, v_bar: [B N H D | V], what the reads gave.

  Returns:
    gradients as the inputs, gamma_bar and the parts of log_beta's gradient at and before the
    token's chunk [B H N], init_bar a pair [B H blocks M D | V].
  """
  b, num_slots, h, d = k.shape
  width, m, blocks = v.shape[-1], alpha.shape[-1], num_slots // BLOCK

  def trellis_writes_backward(rows, a, z_k, z_v, x_k, x_v, k, v, *refs):
    (s_k, s_v, s_k_bar, s_v_bar, init_k, init_v, from_k, from_v), outs = refs[:8], refs[8:]
    k_bar, v_bar, a_bar, g_bar, at, before, *init_bar = outs
    init_k_bar, init_v_bar = init_bar or (None, None)
    one_pass = lambda *args: _one_pass(plan, rows, a[...].astype(jnp.float32), *args)
    w_bar, a_bar_k, *numbers = one_pass(
      z_k[...], x_k[...], k[...], s_k, s_k_bar, init_k, from_k[...], init_k_bar
    )
    k_bar[...] = w_bar.astype(k_bar.dtype)
    w_bar, a_bar_v, *more = one_pass(
      z_v[...], x_v[...], v[...], s_v, s_v_bar, init_v, from_v[...], init_v_bar
    )
    v_bar[...] = w_bar.astype(v_bar.dtype)
    a_bar[...] = (a_bar_k + a_bar_v).astype(a_bar.dtype)
    for ref, x, y in zip((g_bar, at, before), numbers, more):
      ref[...] = x + y

  of_rows, tokens, codes, memory, initial = readout.specs(plan, rows.shape[2], d, width, m)
  own_row = tile((None, None, BLOCK), lambda h, r, b: (b, h, r))
  fp32 = jnp.float32
  out_specs = [tokens(d), tokens(width), tokens(m)] + [own_row] * 3
  out_shape = [(y.shape, y.dtype) for y in (k, v, alpha)] + [((b, h, num_slots), fp32)] * 3
  if plan.runs:
    out_specs += [memory(d), memory(width)]
    out_shape += [((b, h, blocks, m, w), fp32) for w in (d, width)]
  outs = call(
    plan,
    trellis_writes_backward,
    (h, blocks, b),
    [of_rows, tokens(m), codes(0), codes(1), codes(0), codes(1), tokens(d), tokens(width)]
    + [memory(d), memory(width)] * 2
    + [initial(d), initial(width), tokens(d), tokens(width)],
    out_specs,
    out_shape,
    warps=4 if max(d, width, m) <= 64 else 8,
    stages=1,
  )(rows, alpha, z, z, x, x, k, v, *states, *end_bar, *init, k_bar, v_bar)
  return (*outs[:6], tuple(outs[6:]) if plan.runs else None)
