r"""One token, for decoding: both memories written and read in one launch.

One program per row and head. With S the running memory and A that of the chunk's start, both the
initial one behind a restart, and A = S where a chunk opens, first for keys, then for values:

  z = A w,   u = J_phi(z)^T (phi(z) - a) + h (S w - z),   S <- b S - g u w^T
  o = phi_out(S_v^T f(S_k q))

All in fp32 and without matrix products: a token reads and writes every memory once, which is what
its time is made of.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _triton_activations as activations
from pallas_kernels._one_token import CLOSES, LIVE, OPENS, RESTARTS
from pallas_kernels._triton_call import call, tile


def _write(plan, flags, decay, rate, a, w, refs):
  """Stores one memory and its chunk start after the token, and returns the memory [M W]."""
  s_ref, anchor_ref, init_ref, s_out, anchor_out = refs
  # Branches, not selects: most tokens need no initial memory, and registers are short.
  start = lambda ref: jax.lax.cond(flags[RESTARTS] > 0, lambda: init_ref[...], lambda: ref[...])
  s = start(s_ref)
  anchor = jax.lax.cond(flags[OPENS] > 0, lambda: s, lambda: start(anchor_ref))
  z = jnp.sum(anchor * w[None, :], axis=1)
  u = activations.inner_gradient(plan, plan.phi, z, a, plan.phi_eps)
  if plan.curvature:
    u = u + plan.curvature * jnp.sum((s - anchor) * w[None, :], axis=1)
  new = decay * s - (rate * u)[:, None] * w[None, :]

  @pl.when(flags[LIVE] > 0)
  def _():
    s_out[...] = new
    anchor_out[...] = jnp.where(flags[CLOSES] > 0, new, anchor)

  @pl.when(flags[LIVE] == 0)
  def _():
    s_out[...] = s_ref[...]
    anchor_out[...] = anchor_ref[...]

  return new


def step(plan, flags, gates, q, k, v, alpha, memories, anchors, init):
  """Returns (o [B H V], (S_k, S_v), (A_k, A_v)) after one token.

  Args:
    plan: the static choices.
    flags, gates, q, k, v, alpha, memories, anchors, init: as `_one_token.step` has them.
  """
  b, h, d = q.shape
  width, m = v.shape[-1], alpha.shape[-1]

  def trellis_step(flags, gates, q, k, v, a, *refs):
    (s_k, s_v, a_k, a_v, init_k, init_v, o), outs = refs[:7], refs[7:]
    decay, rate, a = gates[0], gates[1], a[...]
    keys, values = (s_k, a_k, init_k, *outs[::2]), (s_v, a_v, init_v, *outs[1::2])
    new = _write(plan, flags, decay, rate, a, k[...], keys)
    y = jnp.sum(new * q[...][None, :], axis=1)
    r = activations.apply(plan, plan.f, y, plan.eps)
    new = _write(plan, flags, decay, rate, a, v[...], values)
    p = jnp.sum(new * r[:, None], axis=0)
    p = activations.apply(plan, plan.phi_out, p, plan.eps)
    o[...] = jnp.where(flags[LIVE] > 0, p, 0)

  row = lambda *size: tile((None, None, *size), lambda h, b: (b, h, *(0,) * len(size)))
  head = lambda *size: tile((None, *size), lambda h, b: (h, 0, 0))
  both = [row(m, d), row(m, width)]
  o, *rest = call(
    plan,
    trellis_step,
    (h, b),
    [tile((None, 4), lambda h, b: (b, 0)), row(2), row(d), row(d), row(width), row(m)]
    + both * 2
    + [head(m, d), head(m, width)],
    [row(width), *both, *both],
    [(v.shape, jnp.float32), *[(x.shape, jnp.float32) for x in (*memories, *anchors)]],
    warps=8 if m * max(d, width) <= 64 * 128 else 16,
    stages=1,
  )(flags, gates, q, k, v, alpha, *memories, *anchors, *init)
  return o, tuple(rest[:2]), tuple(rest[2:])
