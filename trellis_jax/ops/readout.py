r"""The parallel half of the chunked form: every token's read, block by block (paper, eq. 13-14).

Given g U of the tokens, the memory is linear between two block starts, so the blocks need not be
the chunks at whose starts the inner gradients were taken. For a block of R tokens that starts
from S_k and S_v, with `carry` and `pair` of `decay.within`:

  Y = carry Q S_k^T - ((Q K^T) * pair) G U_k,   R = f(Y)
  O = phi_out(carry R S_v - ((R (G U_v)^T) * pair) V)
"""

import jax.numpy as jnp

from trellis_jax.ops import activations, decay
from trellis_jax.ops.spec import Spec


def readout(spec: Spec, q, k, v, gu_k, gu_v, log_beta, starts, init, runs: decay.Runs | None):
  """Returns o [n B H R V].

  Args:
    spec: f, phi_out, eps and precision are used.
    q, k, v: [n B H R D | V].
    gu_k, gu_v: step times inner gradient, [n B H R M].
    log_beta: [n B H R].
    starts: (S_k, S_v) at the block starts, [n B H M D | V].
    init: (S_k, S_v) [H M D | V] that tokens after a restart read in place of the starts.
    runs: the restarts, with leading [n B], or None.
  """
  carry, pair = decay.within(log_beta, runs)
  dot = lambda eq, x, y: jnp.einsum(eq, x, y, precision=spec.precision)

  def through(eq, x, s, s_init):
    y = dot(eq, x, s)
    if runs is not None:
      y = jnp.where(runs.entered[..., None, :, None], y, dot(eq, x, s_init[None, None]))
    return carry[..., None] * y

  y = through("...td,...md->...tm", q, starts[0], init[0])
  y = y - dot("...ts,...sm->...tm", dot("...td,...sd->...ts", q, k) * pair, gu_k)
  r = activations.activate(spec.f, spec.eps, y)
  o = through("...tm,...mv->...tv", r, starts[1], init[1])
  o = o - dot("...ts,...sv->...tv", dot("...tm,...sm->...ts", r, gu_v) * pair, v)
  return activations.activate(spec.phi_out, spec.eps, o)
