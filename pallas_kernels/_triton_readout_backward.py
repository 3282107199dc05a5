r"""The backward of the reads, all blocks at once: one launch for the values', one for the keys'.

With R = f(Y) again from the saved Y, E = (R (G U_v)^T) * pair, P again from R, P_bar the vjp of
phi_out at O_bar and Y_bar that of f at R_bar:

  R_bar = carry P_bar S_v^T - F G U_v,   F = (P_bar V^T) * pair
  GU_v_bar = -F^T R,   V_bar = -E^T P_bar,   S_v_bar = (carry R)^T P_bar

  Q_bar = carry Y_bar S_k - H K,         H = (Y_bar (G U_k)^T) * pair
  GU_k_bar = -((Q K^T) * pair)^T Y_bar,   K_bar = -H^T Q,   S_k_bar = (carry Y_bar)^T Q

A read at t depends on the decays since the first token it sees, but for what came in at s on those
after s alone; so log_beta's gradient is a sum, from a token on, of

  R_t . R_bar_t - GU_v_t . GU_v_bar_t + Q_t . Q_bar_t - K_t . K_bar_t,

in which what lies behind the token cancels: both sides sum the same products of rounded operands.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _triton_activations as activations
from pallas_kernels import _triton_readout as readout
from pallas_kernels._triton_call import NN, NT, TN, call, dot, in_parts, short, through, wait
from pallas_kernels._triton_readout import CARRY, block_pair, entered_of, read


def row_dot(x, y):
  """Returns the products of rows, [t], in fp32."""
  return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def outer(plan, ref, of_row, x, y):
  """Stores (of_row x)^T y of what two references hold, by halves where registers are short."""
  slots = ref.shape[0]
  part = min(slots, 64) if short(plan, *ref.shape) else slots

  def store(mine):
    ref[mine] = dot(plan, of_row * x[:, mine].astype(jnp.float32), y[...], TN).astype(ref.dtype)

  if part == slots:
    store(slice(None))
  else:
    jax.lax.fori_loop(0, slots // part, lambda j, _: store(pl.ds(j * part, part)), None)


def _to_memory(plan, rows, x, y, s_bar, init_bars):
  """Stores (carry x)^T y of what two references hold, by whether the token read S or `init`."""
  carry, entered = rows[CARRY, :][:, None], entered_of(plan, rows)
  if plan.runs:
    init_bar = init_bars[0]

    @pl.when(jnp.min(entered) > 0)
    def _():
      init_bar[...] = jnp.zeros_like(init_bar)

    @pl.when(jnp.min(entered) == 0)
    def _():
      outer(plan, init_bar, carry * (1 - entered)[:, None], x, y)

    carry = carry * entered[:, None]
  outer(plan, s_bar, carry, x, y)


def _values(plan, rows, y, v, gu, s, init, o_bar, v_bar, gu_bar, s_bar, y_bar, parts, *init_bar):
  # The numbers per token are read again wherever they are used: registers are short.
  decay, entered = block_pair(rows), lambda: entered_of(plan, rows)
  r_tile = activations.apply(plan, plan.f, y[...].astype(jnp.float32), plan.eps)
  # Two outputs hold something else first, see `through`.
  r = y_bar
  through(plan, r, r_tile)
  weights = (in_parts(plan, r, gu, NT) * decay).astype(plan.operand)
  p = read(rows, entered(), lambda s: in_parts(plan, r, s, NN), s, init)
  p = p - dot(plan, weights, v[...])
  p_bar = activations.vjp(plan, plan.phi_out, p, o_bar[...].astype(jnp.float32), plan.eps)
  through(plan, v_bar, p_bar)
  _to_memory(plan, rows, r, v_bar, s_bar, init_bar)
  r_bar = read(rows, entered(), lambda s: in_parts(plan, v_bar, s, NT), s, init)
  of_values = (in_parts(plan, v_bar, v, NT) * decay).astype(plan.operand)
  p_bar = v_bar[...]
  wait(plan)
  v_bar[...] = -dot(plan, weights, p_bar, TN).astype(v_bar.dtype)

  from_gu = -dot(plan, of_values, r[...], TN)
  gu_bar[...] = from_gu.astype(gu_bar.dtype)
  part = row_dot(from_gu, gu[...])
  r_bar = r_bar - dot(plan, of_values, gu[...])
  parts[...] = row_dot(r[...], r_bar) - part
  y_bar_tile = activations.vjp(plan, plan.f, y[...].astype(jnp.float32), r_bar, plan.eps)
  wait(plan)
  y_bar[...] = y_bar_tile.astype(y_bar.dtype)


def _keys(plan, rows, q, k, gu, s, init, y_bar, q_bar, k_bar, gu_bar, s_bar, parts, *init_bar):
  decay, entered = block_pair(rows), lambda: entered_of(plan, rows)
  query, key, ct = q[...], k[...], y_bar[...]
  weights = dot(plan, query, key, NT) * decay
  gu_bar[...] = -dot(plan, weights, ct, TN).astype(gu_bar.dtype)
  weights = (dot(plan, ct, gu[...], NT) * decay).astype(plan.operand)
  from_query = -dot(plan, weights, query, TN)
  k_bar[...] = from_query.astype(k_bar.dtype)
  part = row_dot(from_query, key)
  from_ct = read(rows, entered(), lambda s: in_parts(plan, y_bar, s, NN), s, init)
  from_ct = from_ct - dot(plan, weights, key)
  q_bar[...] = from_ct.astype(q_bar.dtype)
  parts[...] = row_dot(from_ct, query) - part
  _to_memory(plan, rows, y_bar, q, s_bar, init_bar)


def values(plan, y, v, gu, rows, states, init, o_bar):
  """Returns (v_bar, gu_bar, states_bar, y_bar, parts, init_bar by block or None) of the value read.

  Args:
    plan, v, gu, rows: as in `readout.forward`.
    y: [B H N M], what that saved.
    states, init: S_v [B H blocks M V] and [H M V], in the operands' dtype.
    o_bar: [B N H V].

  Returns:
    gradients as v, y and states; gu_bar [B H N M]; parts [B H N], of which log_beta's gradient is
    the sum that `decays.total` takes; init_bar [B H blocks M V] in fp32.
  """

  def trellis_read_values_backward(*refs):
    _values(plan, *refs)

  at, store = readout.Specs(plan, rows, gu, v), plan.operand
  width = v.shape[-1]
  outs = call(
    plan,
    trellis_read_values_backward,
    at.grid,
    [at.rows, at.own_codes, at.tokens(width), at.codes(1), at.memory(width), at.init(width)]
    + [at.tokens(width)],
    [at.tokens(width), at.own_codes, at.memory(width), at.own_codes, at.own_row]
    + [at.memory(width)] * plan.runs,
    [(v.shape, store), (y.shape, store), (states.shape, store), (y.shape, store)]
    + [(y.shape[:3], jnp.float32)]
    + [(states.shape, jnp.float32)] * plan.runs,
    warps=8,
    stages=1,
  )(rows, y, v, gu, states, init, o_bar)
  return (*outs[:5], outs[5] if plan.runs else None)


def keys(plan, q, k, gu, rows, states, init, y_bar):
  """Returns (q_bar, k_bar, gu_bar, states_bar, parts, init_bar by block or None) of the key read.

  The arguments are as in `values`, with S_k [B H blocks M D] and y_bar [B H N M].
  """

  def trellis_read_keys_backward(*refs):
    _keys(plan, *refs)

  at, store = readout.Specs(plan, rows, gu, k), plan.operand
  width = k.shape[-1]
  outs = call(
    plan,
    trellis_read_keys_backward,
    at.grid,
    [at.rows, at.tokens(width), at.tokens(width), at.codes(0), at.memory(width), at.init(width)]
    + [at.own_codes],
    [at.tokens(width), at.tokens(width), at.own_codes, at.memory(width), at.own_row]
    + [at.memory(width)] * plan.runs,
    [(q.shape, store), (k.shape, store), (y_bar.shape, store), (states.shape, store)]
    + [(y_bar.shape[:3], jnp.float32)]
    + [(states.shape, jnp.float32)] * plan.runs,
    warps=4 if store == jnp.bfloat16 and max(width, gu.shape[-1]) <= 64 else 8,
    stages=1,
  )(rows, q, k, gu, states, init, y_bar)
  return (*outs[:5], outs[5] if plan.runs else None)
