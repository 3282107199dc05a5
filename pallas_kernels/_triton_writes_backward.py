r"""The gradients of what is written, all blocks at once.

The reverse evolution has left X, the cotangent of g U, and S'_bar, that of the memory at each
block's end. U and Z_bar come again from Z, A and X, and Z_bar goes through memory, see
`_triton_call.through`. Then both the memory at a chunk's start and its
cotangent at a chunk's end are linear inside the block. With S at the block's start, the decays
`carry*`, `pair*` that a token's chunk start sees (`_triton_decays.stale`) and `end` to the block's
end,

  G = (Z_bar (g U)^T) * pair*
  W_bar = carry* Z_bar S - (G + G^T) W - end (g U) S'_bar
  A_bar = vjp of U at g X,   g_bar = U . X

and log_beta's gradient sums over what decayed, as in `_triton_readout_backward`: the parts by token
are (G^T W) . W + end ((g U) S'_bar) . W at the token, with S'_bar . S_end at the block's last, and
(carry* Z_bar S - G W) . W at the token before its chunk, unless that is in an earlier block.

Linearised chunks have rho h g X taken off Z_bar. It goes to the memory before each token instead,
in a launch of its own (`follow`): as here, for chunks of one token, with rho h g X for Z_bar.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _triton_activations as activations
from pallas_kernels import _triton_decays as decays
from pallas_kernels import _triton_readout as readout
from pallas_kernels._triton_call import (
  BLOCK,
  NN,
  NT,
  TN,
  call,
  columns_at_a_time,
  dot,
  in_parts,
  seen,
  short,
  wait,
)
from pallas_kernels._triton_readout_backward import outer, row_dot

# Rows of the numbers per token; the last three with restarts alone.
HI, LO, STALE_HI, STALE_LO, STALE_FIRST, STALE_CARRY, END, STEP, TOTAL = range(9)
CHUNK_ENTERED, STALE_ENTERED, SURVIVES = range(9, 12)
SLOTS = 32  # of a memory that are taken at a time where its products are summed


def scalars(plan, log_beta, gamma, run):
  """Returns [B H 9|12 N] of the gates [B H N]; see the rows above (TOTAL, SURVIVES by block)."""
  d = decays.of(log_beta, run, BLOCK)
  entered = None
  if plan.runs:
    by_chunk = decays.of(log_beta, run, plan.chunk).entered
    entered = by_chunk.reshape(d.entered.shape)
  s = decays.stale(d, plan.chunk, entered)
  rows = [d.hi, d.lo, s.hi, s.lo, s.first, s.carry, d.end()]
  rows += [plan.step(gamma).reshape(d.hi.shape), d.carry[..., -1:]]
  if plan.runs:
    rows += [entered, s.entered, d.entered[..., -1:]]
  flat = lambda x: jnp.broadcast_to(x, d.hi.shape).astype(jnp.float32).reshape(log_beta.shape)
  return jnp.stack([flat(x) for x in rows], 2)


def _codes(plan, rows, a_ref, passes, a_bar_ref, g_bar_ref):
  """Stores A_bar and g_bar, summed over the passes (Z, X, g U, where Z_bar goes)."""
  part = BLOCK * columns_at_a_time(plan) // max(64, a_ref.shape[1])

  def some(j, carry):
    tokens = pl.ds(j * part, part)
    a, step = a_ref[tokens].astype(jnp.float32), rows[STEP, tokens][:, None]
    a_bar, g_bar = 0, 0
    for z, x, gu, z_bar_ref in passes:
      z, x = z[tokens].astype(jnp.float32), x[tokens].astype(jnp.float32)
      u, z_bar, more = activations.inner_gradient_vjp(plan, plan.phi, z, a, step * x, plan.phi_eps)
      if plan.curvature:
        u, z_bar = gu[tokens].astype(jnp.float32) / step, z_bar - plan.curvature * step * x
      z_bar_ref[tokens] = (plan.rho * z_bar).astype(z_bar_ref.dtype)
      a_bar, g_bar = a_bar + more, g_bar + jnp.sum(u * x, axis=-1)
    a_bar_ref[tokens] = a_bar.astype(a_bar_ref.dtype)
    g_bar_ref[tokens] = g_bar
    return carry

  jax.lax.fori_loop(0, BLOCK // part, some, None)


def _follow(plan, rows, passes, a_bar_ref, g_bar_ref):
  """Stores rho h g X of the passes (X, where it goes); targets and steps have no part in it."""
  part = BLOCK * columns_at_a_time(plan) // max(64, a_bar_ref.shape[1])

  def some(j, carry):
    tokens = pl.ds(j * part, part)
    scale = (plan.rho * plan.curvature * rows[STEP, tokens])[:, None]
    for x, ref in passes:
      ref[tokens] = (scale * x[tokens].astype(jnp.float32)).astype(ref.dtype)
    a_bar_ref[tokens] = jnp.zeros((part, a_bar_ref.shape[1]), a_bar_ref.dtype)
    g_bar_ref[tokens] = jnp.zeros((part,), g_bar_ref.dtype)
    return carry

  jax.lax.fori_loop(0, BLOCK // part, some, None)


def _one_pass(plan, rows, z_bar, gu, w, s, end_bar, init, w_bar, init_bar):
  """Stores what one pass gives and returns the parts (at the token [t], before its chunk [t])."""
  column = lambda row: rows[row, :][:, None]
  t = jnp.arange(BLOCK, dtype=jnp.int32)
  chunk_start = t & -plan.chunk

  entered = rows[STALE_ENTERED, :] if plan.runs else None
  if plan.runs:

    @pl.when(jnp.min(entered) > 0)
    def _():
      init_bar[0][...] = jnp.zeros_like(init_bar[0])

    @pl.when(jnp.min(entered) == 0)
    def _():
      outer(plan, init_bar[0], (1 - entered)[:, None] * column(STALE_CARRY), z_bar, w)

  inside = plan.chunk < BLOCK
  if inside:
    own = rows[HI, :], rows[LO, :], chunk_start
    pair = readout.pair(rows[STALE_HI, :], rows[STALE_LO, :], rows[STALE_FIRST, :], *own)
    weights = (in_parts(plan, z_bar, gu, NT) * pair).astype(plan.operand)

  def product(x, y, mine):
    by_parts = short(plan, *y.shape)
    return in_parts(plan, x, y, NN, mine) if by_parts else dot(plan, x[...], y[:, mine])

  def columns(i, numbers):
    at_token, of_end, before = numbers
    mine = pl.ds(i * part, part)
    at = slice(None), mine
    own = w[at]
    stale = column(STALE_CARRY) * seen(lambda s: product(z_bar, s, mine), entered, s, init)
    if inside:
      stale = stale - dot(plan, weights, own)
    before = before + row_dot(stale, own)
    own_bar = w_bar[at].astype(jnp.float32) + stale
    if inside:
      back = dot(plan, weights, own, TN)
      at_token = at_token + row_dot(back, own)
      own_bar = own_bar - back
    ended = column(END) * product(gu, end_bar, mine)
    of_end = of_end + row_dot(ended, own)
    w_bar[at] = (own_bar - ended).astype(w_bar.dtype)
    return at_token, of_end, before

  part = columns_at_a_time(plan)
  if z_bar.shape[1] > 64 and (plan.runs or plan.operand == jnp.float32):
    part = max(16, part // 2)
  zero = jnp.zeros((BLOCK,), jnp.float32)
  numbers = jax.lax.fori_loop(0, w.shape[1] // part, columns, (zero, zero, zero))
  at_token, of_end, before = numbers
  total = _at_end(plan, rows, s, init, end_bar, init_bar)
  at_token = at_token + of_end + jnp.where(t == BLOCK - 1, total - jnp.sum(of_end), 0)
  counts = chunk_start > 0
  if plan.runs:
    counts = counts & (rows[CHUNK_ENTERED, :] > 0)
  return at_token, jnp.where(counts, before, 0)


def _at_end(plan, rows, s, init, end_bar, init_bar):
  """Returns total (S . S'_bar), with the initial memory in place of S behind a restart.

  Adds what S'_bar gives of that memory to `init_bar`. A few slots at a time, for the registers.
  """
  total = jnp.max(rows[TOTAL, :])
  if plan.runs:
    survives = jnp.max(rows[SURVIVES, :]) > 0
    wait(plan)

  def add(i, summed):
    slots = pl.ds(i * SLOTS, SLOTS)
    s_part, ct = s[slots].astype(jnp.float32), total * end_bar[slots].astype(jnp.float32)
    if plan.runs:
      s_part = jnp.where(survives, s_part, init[slots].astype(jnp.float32))
      init_bar[0][slots] = init_bar[0][slots] + jnp.where(survives, 0, ct)
    # One axis at a time: jax 0.12 lowers no sum over two under a mesh of Explicit axes.
    return summed + jnp.sum(jnp.sum(s_part * ct, axis=-1))

  return jax.lax.fori_loop(0, s.shape[0] // SLOTS, add, jnp.float32(0))


def backward(plan, k, v, alpha, rows, gu, z, x, states, end_bar, init, k_bar, v_bar, follow: bool):
  """Returns (k_bar, v_bar, alpha_bar, gamma_bar, at, before, init_bar by block or None).

  Args:
    plan, k, v, alpha: as in `evolve.forward`.
    rows: from `scalars`.
    gu, z, x: [2 B H N M], from `evolve.forward` and `evolve.reverse`.
    states: (S_k, S_v) [B H blocks M D | V] at the block starts.
    end_bar: their cotangents at the block ends.
    init: (S_k, S_v) [H M D | V] in the operands' dtype.
    k_bar, v_bar: [B N H D | V], what the reads gave; these very arrays become the results.
    follow: whether for what linearised chunks add, with a plan of chunks of one token.

  Returns:
    gradients as the inputs, gamma_bar and the parts of log_beta's gradient at and before the
    token's chunk [B H N], init_bar a pair [B H blocks M D | V].
  """
  d, width, m = k.shape[-1], v.shape[-1], alpha.shape[-1]

  def trellis_writes_backward(rows, a, *refs):
    (gu_k, gu_v, z_k, z_v, x_k, x_v, k, v), refs = refs[:8], refs[8:]
    (s_k, s_v, s_k_bar, s_v_bar, init_k, init_v), refs = refs[:6], refs[6:]
    k_bar, v_bar, a_bar, g_bar, at, before, z_k_bar, z_v_bar, *init_bar = refs[2:]
    if follow:
      _follow(plan, rows, ((x_k, z_k_bar), (x_v, z_v_bar)), a_bar, g_bar)
    else:
      passes = (z_k, x_k, gu_k, z_k_bar), (z_v, x_v, gu_v, z_v_bar)
      _codes(plan, rows, a, passes, a_bar, g_bar)
    wait(plan)
    numbers = _one_pass(plan, rows, z_k_bar, gu_k, k, s_k, s_k_bar, init_k, k_bar, init_bar[:1])
    more = _one_pass(plan, rows, z_v_bar, gu_v, v, s_v, s_v_bar, init_v, v_bar, init_bar[1:])
    at[...], before[...] = (x + y for x, y in zip(numbers, more))

  own = readout.Specs(plan, rows, z, k)
  tokens, memories = own.tokens, [own.memory(d), own.memory(width)]
  by_token, fp32 = z.shape[1:4], jnp.float32
  in_specs = [own.rows, tokens(m), *[own.codes(0), own.codes(1)] * 3, tokens(d), tokens(width)]
  in_specs += [*memories * 2, own.init(d), own.init(width), tokens(d), tokens(width)]
  out_shape = [(k_bar.shape, k_bar.dtype), (v_bar.shape, v_bar.dtype), (alpha.shape, alpha.dtype)]
  out_shape += [(by_token, fp32)] * 3 + [(z.shape[1:], plan.operand)] * 2
  outs = call(
    plan,
    trellis_writes_backward,
    own.grid,
    in_specs,
    [tokens(d), tokens(width), tokens(m), *[own.own_row] * 3, *[own.own_codes] * 2]
    + memories * plan.runs,
    out_shape + [(s.shape, fp32) for s in states] * plan.runs,
    warps=8,
    stages=1,
    aliases={len(in_specs) - 2: 0, len(in_specs) - 1: 1},
    name="trellis_follow_backward" if follow else "",
  )(rows, alpha, gu, gu, z, z, x, x, k, v, *states, *end_bar, *init, k_bar, v_bar)
  return (*outs[:6], tuple(outs[8:]) if plan.runs else None)
