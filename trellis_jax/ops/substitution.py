r"""The exact recurrence (C = 1) in blocks of L tokens, by forward substitution.

Between two tokens the memory is linear in the writes so far, so what a token's inner gradient sees
needs no memory per token. With S at the block's start, W the writes [L, W], and the decays
`before` of `decay.before` (from the start, or from just after s, to just before t):

  Z_0  = before_t (W S^T),   A_ts = before_ts (w_t . w_s)  for s < t
  z_t  = z_0t - sum_{s < t} A_ts g_s u_s,   u_t = J_phi(z_t)^T (phi(z_t) - a_t)

The sums are a triangular system with the gradient in it: what is left of the loop over tokens
takes L M multiplications a token where a memory takes 2 M W, and the products with S are those of
a block. Both passes are solved at once. The cotangents run the same system backwards:

  gu_bar_t = ct_t - sum_{s > t} A_st z_bar_s,   z_bar_t = rho vjp of u_t at g_t gu_bar_t
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.ops import activations, decay
from trellis_jax.ops.spec import Spec
from trellis_jax.typing import Array


def evolve(spec: Spec, start, init, writes, targets, steps, log_beta, runs: decay.Runs | None):
  """Runs n blocks of L tokens, each token's inner gradient at the memory before it.

  Args:
    spec: phi, phi_eps, outer_gradient and precision are used.
    start: memories (S_k, S_v) [B H M D | V] before the first block.
    init: memories [H M D | V] after a restart; unused without `runs`.
    writes: (keys, values) [n B H L D | V].
    targets: [n B H L M].
    steps, log_beta: [n B H L].
    runs: restarts, with leading [n B], or None.

  Returns:
    (g U per memory [n B H L M], memories at the blocks' starts [n B H M D | V], at the end).
  """
  dot = functools.partial(jnp.einsum, precision=spec.precision)
  carry, alike = decay.alike(writes, log_beta, runs, spec.precision)
  alike = jnp.stack(alike, axis=1)
  end, total = decay.to_end(log_beta, runs)
  survives = entered = None
  if runs is not None:
    entered = runs.entered[:, :, None, :, None]
    survives = entered[:, :, :, -1:]

  def body(memories, block):
    writes, targets, steps, carry, end, total, alike, entered, survives = block
    z = []
    for s, s0, w in zip(memories, init, writes):
      seen = dot("...cw,...mw->...cm", w, s)
      if entered is not None:
        seen = jnp.where(entered, seen, dot("...cw,...mw->...cm", w, s0[None]))
      z.append(carry[..., None] * seen)
    gu = solve(spec, jnp.stack(z), alike, targets, steps)
    after = []
    for s, s0, w, x in zip(memories, init, writes, gu):
      s = s if survives is None else jnp.where(survives, s, s0[None])
      write = dot("...cm,...cw->...mw", end[..., None] * x, w)
      after.append(total[..., None, None] * s - write)
    return tuple(after), (tuple(gu), memories)

  blocks = (writes, targets, steps, carry, end, total, alike, entered, survives)
  last, (gu, starts) = jax.lax.scan(body, start, blocks)
  return gu, starts, last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(
  spec: Spec,
  z: Float[Array, "2 B H L M"],
  alike: Float[Array, "2 B H L L"],
  targets: Float[Array, "B H L M"],
  steps: Float[Array, "B H L"],
) -> Float[Array, "2 B H L M"]:
  """Returns g U of both passes, for Z_0 = z and A = alike of the module's equations."""
  return _solve(spec, z, alike, targets, steps)[0]


def _at(x, t, axis):
  return jax.lax.dynamic_index_in_dim(x, t, axis, keepdims=False)


def _put(x, row, t):
  return jax.lax.dynamic_update_index_in_dim(x, row, t, 3)


def _solve(spec, z, alike, targets, steps):
  def token(t, carry):
    # z holds the rows before t as they were solved, those from t on less all writes so far.
    z, gu = carry
    now = activations.inner_gradient(spec.phi, _at(z, t, 3), _at(targets, t, 2)[None], spec.phi_eps)
    now = now * _at(steps, t, 2)[None, ..., None]
    z = z - _at(alike, t, 4)[..., None] * now[..., None, :]
    return z, _put(gu, now, t)

  z, gu = jax.lax.fori_loop(0, z.shape[3], token, (z, jnp.zeros_like(z)))
  return gu, (z, alike, targets, steps, gu)


def _solve_backward(spec, saved, ct):
  z, alike, targets, steps, gu = saved
  length = z.shape[3]

  def token(i, carry):
    ct, z_bar, targets_bar = carry
    t = length - 1 - i
    u_bar = _at(ct, t, 3) * _at(steps, t, 2)[None, ..., None]
    now, a_bar = activations.inner_gradient_vjp(
      spec.phi, _at(z, t, 3), _at(targets, t, 2)[None], u_bar, spec.phi_eps
    )
    now = spec.outer_gradient * now
    ct = ct - _at(alike, t, 3)[..., None] * now[..., None, :]
    return ct, _put(z_bar, now, t), _put(targets_bar, a_bar, t)

  carry = (ct, jnp.zeros_like(z), jnp.zeros_like(z))
  ct, z_bar, targets_bar = jax.lax.fori_loop(0, length, token, carry)
  u = activations.inner_gradient(spec.phi, z, targets[None], spec.phi_eps)
  alike_bar = -jnp.einsum("...tm,...sm->...ts", z_bar, gu, precision=spec.precision)
  return z_bar, alike_bar, jnp.sum(targets_bar, axis=0), jnp.sum(u * ct, axis=(0, -1))


solve.defvjp(_solve, _solve_backward)
