r"""The backward of the reads, all blocks at once; Y, R and P are had again from what was read.

With D = (Q K^T) * pair, E = (R (G U_v)^T) * pair, P_bar the vjp of phi_out at O_bar and Y_bar that
of f at R_bar:

  R_bar = carry P_bar S_v^T - F G U_v,     F = (P_bar V^T) * pair
  Q_bar = carry Y_bar S_k - H K,           H = (Y_bar (G U_k)^T) * pair
  GU_v_bar = -F^T R,   V_bar = -E^T P_bar,   S_v_bar = (carry R)^T P_bar
  GU_k_bar = -D^T Y_bar,   K_bar = -H^T Q,   S_k_bar = (carry Y_bar)^T Q

A read at t depends on the decays since the first token it sees, but for what came in at s on those
after s alone; so log_beta's gradient is a sum, from a token on, of

  Y_bar_t . Y_t + P_bar_t . P_t - (GU_k_bar_t . GU_k_t + V_bar_t . V_t),

in which what lies behind the token cancels: both sides sum the same products of rounded operands.
"""

import jax.numpy as jnp

from pallas_kernels import _triton_activations as activations
from pallas_kernels import _triton_readout as readout
from pallas_kernels._triton_call import BLOCK, NN, NT, TN, call, dot, tile
from pallas_kernels._triton_readout import block_pair, read


def _row_dot(x, y):
  return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def _to_memory(plan, x, carry, entered, y, s_bar_ref, init_bar_ref):
  """Stores (carry x)^T y, split by whether the token read S or the initial memory."""
  x = carry * x
  if entered is None:
    s_bar_ref[...] = dot(plan, x, y, TN).astype(s_bar_ref.dtype)
    return
  s_bar_ref[...] = dot(plan, jnp.where(entered, x, 0), y, TN).astype(s_bar_ref.dtype)
  init_bar_ref[...] = dot(plan, jnp.where(entered, 0, x), y, TN)


def _from_memory(plan, x, carry, entered, s_ref, init_ref, dims):
  """Returns carry x S^T, with the initial memory where the token read that."""
  back = dot(plan, x, s_ref[...], dims)
  if entered is not None:
    back = jnp.where(entered, back, dot(plan, x, init_ref[...], dims))
  return carry * back


def backward(plan, q, k, v, gu, rows, states, init, o_bar):
  """Returns (q_bar, k_bar, v_bar, gu_bar, states_bar, init_bar by block or None, parts).

  Args:
    plan, q, k, v, gu, rows, states, init: as in `readout.forward`.
    o_bar: [B N H V].

  Returns:
    q_bar, k_bar, v_bar as q, k, v in the operands' dtype; gu_bar a pair [B H N M]; states_bar as
    states; init_bar a pair [B H blocks M D | V] or None without restarts; parts [B H N], of which
    log_beta's gradient is the sum that `decays.total` takes.
  """
  b, num_slots, h, d = q.shape
  width, m, blocks = v.shape[-1], gu.shape[-1], num_slots // BLOCK

  def trellis_read_backward(rows, q, k, v, gu_k, gu_v, s_k, s_v, init_k, init_v, o_bar, *outs):
    q_bar, k_bar, v_bar, gu_k_bar, gu_v_bar, parts, s_k_bar, s_v_bar, *init_bar = outs
    init_k_bar, init_v_bar = init_bar or (None, None)
    rounded = lambda x: x.astype(plan.operand)
    decay = block_pair(rows)

    keys = rounded(dot(plan, q[...], k[...], NT) * decay)
    y, carry, entered = read(plan, rows, q[...], s_k[...], init_k, NT)
    y = y - dot(plan, keys, gu_k[...])
    r = rounded(activations.apply(plan, plan.f, y, plan.eps))
    values = rounded(dot(plan, r, gu_v[...], NT) * decay)
    p, _, _ = read(plan, rows, r, s_v[...], init_v, NN)
    p = p - dot(plan, values, v[...])

    p_bar = o_bar[...].astype(jnp.float32)
    _, p_bar = activations.vjp(plan, plan.phi_out, p, p_bar, plan.eps)
    p_bar = rounded(p_bar)
    from_values = -dot(plan, values, p_bar, TN)
    v_bar[...] = from_values.astype(v_bar.dtype)
    part = _row_dot(p_bar, p) - _row_dot(from_values, v[...])
    _to_memory(plan, r.astype(jnp.float32), carry, entered, p_bar, s_v_bar, init_v_bar)

    weights = rounded(dot(plan, p_bar, v[...], NT) * decay)
    gu_v_bar[...] = -dot(plan, weights, r, TN).astype(gu_v_bar.dtype)
    r_bar = _from_memory(plan, p_bar, carry, entered, s_v, init_v, NT)
    r_bar = r_bar - dot(plan, weights, gu_v[...])
    _, y_bar = activations.vjp(plan, plan.f, y, r_bar, plan.eps)
    y_bar = rounded(y_bar)
    from_keys = -dot(plan, keys, y_bar, TN)
    gu_k_bar[...] = from_keys.astype(gu_k_bar.dtype)
    parts[...] = part + _row_dot(y_bar, y) - _row_dot(from_keys, gu_k[...])
    _to_memory(plan, y_bar.astype(jnp.float32), carry, entered, q[...], s_k_bar, init_k_bar)

    weights = rounded(dot(plan, y_bar, gu_k[...], NT) * decay)
    k_bar[...] = -dot(plan, weights, q[...], TN).astype(k_bar.dtype)
    from_s = _from_memory(plan, y_bar, carry, entered, s_k, init_k, NN)
    q_bar[...] = (from_s - dot(plan, weights, k[...])).astype(q_bar.dtype)

  of_rows, tokens, codes, memory, initial = readout.specs(plan, rows.shape[2], d, width, m)
  own_codes = tile((None, None, BLOCK, m), lambda h, r, b: (b, h, r, 0))
  own_row = tile((None, None, BLOCK), lambda h, r, b: (b, h, r))
  store, fp32 = plan.operand, jnp.float32
  memories = [(b, h, blocks, m, w) for w in (d, width)]
  out_specs = [tokens(d), tokens(d), tokens(width), own_codes, own_codes, own_row]
  out_specs += [memory(d), memory(width)] * (1 + plan.runs)
  out_shape = [(x.shape, store) for x in (q, k, v)] + [((b, h, num_slots, m), store)] * 2
  out_shape += [((b, h, num_slots), fp32)] + [(s, store) for s in memories]
  out_shape += [(s, fp32) for s in memories] * plan.runs
  q_bar, k_bar, v_bar, gu_k_bar, gu_v_bar, parts, *rest = call(
    plan,
    trellis_read_backward,
    (h, blocks, b),
    [of_rows, tokens(d), tokens(d), tokens(width), codes(0), codes(1)]
    + [memory(d), memory(width), initial(d), initial(width), tokens(width)],
    out_specs,
    out_shape,
    warps=4 if max(d, width, m) <= 64 else 8,
    stages=1,
  )(rows, q, k, v, gu, gu, *states, *init, o_bar)
  init_bar = tuple(rest[2:]) if plan.runs else None
  return q_bar, k_bar, v_bar, (gu_k_bar, gu_v_bar), tuple(rest[:2]), init_bar, parts
