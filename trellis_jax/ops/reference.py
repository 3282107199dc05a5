r"""The definition: one token at a time, in at least fp32, differentiated by JAX.

For each token, with S_k and S_v after the token before it, and A_k, A_v the memories at the start
of its chunk (for chunk_size 1 they are S_k and S_v themselves):

  z_k = A_k k,   u_k = J_phi(z_k)^T (phi(z_k) - a),   S_k <- b S_k - g u_k k^T    (paper, eq. 5-8)
  r   = f(S_k q)                                                                  (eq. 13)
  z_v = A_v v,   u_v = J_phi(z_v)^T (phi(z_v) - a),   S_v <- b S_v - g u_v v^T
  o   = phi_out(S_v^T r)                                                          (eq. 14)

With a curvature h > 0 a chunk is linearised: the gradient follows the memory from the chunk's start
on by the curvature of the loss, u = J_phi(z)^T (phi(z) - a) + h (S w - z) for w = k and v. For
linear phi and h = 1 that is the exact recurrence; 0 are the stale chunks of section 3.2.

Tokens of segment 0 do not exist: they change nothing and read zero.
"""

import jax
import jax.numpy as jnp

from trellis_jax.ops import activations
from trellis_jax.ops.spec import Spec
from trellis_jax.ops.state import TrellisState
from trellis_jax.typing import Memory


def step(spec: Spec, memory: Memory, state: TrellisState, token):
  """Advances every row by one token.

  Args:
    spec: the activations, chunk length and outer gradient.
    memory: (S_k, S_v) that a new segment starts from.
    state: before the token.
    token: q, k [B,H,D], v [B,H,V], alpha [B,H,M], log_beta, gamma [B,H], segment [B], all but the
      last in the state's dtype.

  Returns:
    (state after the token, o [B,H,V]).
  """
  q, k, v, alpha, log_beta, gamma, segment = token
  live = segment != 0
  restart = live & (state.segment != 0) & (segment != state.segment)
  rows = lambda mask: mask[:, None, None, None]
  decay, rate = jnp.exp(log_beta)[..., None, None], gamma[..., None, None]

  def write(s_init, running, anchor, w):
    running = jnp.where(rows(restart), s_init[None], running)
    if anchor is None:
      anchor = running
    else:
      anchor = jnp.where(rows(restart), s_init[None], anchor)
      anchor = jnp.where(rows(state.offset == 0), running, anchor)
    z = jnp.einsum("bhmd,bhd->bhm", anchor, w, precision=spec.precision)
    u = activations.tempered_inner_gradient(spec.phi, z, alpha, spec.phi_eps, spec.outer_gradient)
    if spec.curvature and spec.chunk_size > 1:
      ahead = jnp.einsum("bhmd,bhd->bhm", running - anchor, w, precision=spec.precision)
      u = u + spec.curvature * activations.tempered(ahead, spec.outer_gradient)
    return decay * running - rate * u[..., None] * w[..., None, :], anchor

  s_k, a_k = write(memory[0], state.memory_k, state.anchor_k, k)
  s_v, a_v = write(memory[1], state.memory_v, state.anchor_v, v)
  y = jnp.einsum("bhmd,bhd->bhm", s_k, q, precision=spec.precision)
  r = activations.apply(spec.f, y, spec.eps)
  o = jnp.einsum("bhmv,bhm->bhv", s_v, r, precision=spec.precision)
  o = activations.apply(spec.phi_out, o, spec.eps)

  offset = jnp.where(live, (state.offset + 1) % spec.chunk_size, state.offset)
  keep = lambda new, old: jnp.where(rows(live), new, old)
  closed = lambda new, anchor: jnp.where(rows(offset == 0), new, anchor)
  after = TrellisState(
    memory_k=keep(s_k, state.memory_k),
    memory_v=keep(s_v, state.memory_v),
    anchor_k=None if state.anchor_k is None else keep(closed(s_k, a_k), state.anchor_k),
    anchor_v=None if state.anchor_v is None else keep(closed(s_v, a_v), state.anchor_v),
    offset=offset,
    segment=jnp.where(live, segment, state.segment),
  )
  return after, jnp.where(live[:, None, None], o, 0)


def forward(spec: Spec, memory: Memory, state: TrellisState, tokens):
  """Runs `step` over the tokens; as `step` with a T axis after B in every array of `tokens`."""
  time_major = tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
  state, o = jax.lax.scan(lambda s, token: step(spec, memory, s, token), state, time_major)
  return jnp.moveaxis(o, 0, 1), state
