r"""One chunk of several packs, in the kernels: what is written and what is read.

In the columns form of `_tpu_tiles` (slots on sublanes, tokens on lanes), with S_k, S_v the
memories at the chunk's start and the gates of `_tpu_layout.Gate`:

  Z = S W^T,  U = J_phi(Z)^T (phi(Z) - A),  G = g U                      of keys and of values
  Y = carry (S_k Q^T) - G_k P_k^T,  P_k[t,s] = (q_t . k_s) decay[t,s],   R = f(Y)
  O = carry (R^T S_v) - P_v V,      P_v[t,s] = (r_t . g_s) decay[t,s],   o = phi_out(O)
  S <- keep S - (end G) W

Linearised chunks (curvature h) have, with before the decay to just before t,

  A[t,s] = (w_t . w_s) before[t,s],  T = (I + h A diag(g))^-1,  U = (U_0 + h (before - 1) Z) T^T

for U_0 as above. A token after a restart has `fresh` in place of `carry` and `init` in place of S;
what is left of `init` at the end is `renew`.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import _tpu_activations as activations
from pallas_kernels._tpu_layout import Gate
from pallas_kernels._tpu_tiles import NT, Tiles, each


class Write(NamedTuple):
  """A pass of a chunk, per pack.

  w: rows [L, P W] of W, each with the lanes of its head; memory: as it came; low, init: memories
  as operands; u: U; pull: the pullback of U_0; step: G, and as an operand; ahead: of linearised
  chunks, else None.
  """

  w: list
  memory: list
  low: list
  init: list | None
  u: list
  pull: list
  step: list
  low_step: list
  ahead: "Ahead | None"


class Ahead(NamedTuple):
  """What linearises a pass of a chunk, per pack.

  z: Z; before, scaled: pairs, the latter h A diag(g); alike, solver: A and T - I as operands [L, L]
  with zeros where heads differ; change: h A G, [M, L].
  """

  z: list
  before: list
  scaled: list
  alike: list
  solver: list
  change: list


def row(gates, which: int):
  """Returns one gate of all packs, [1, L] each."""
  return [g[which : which + 1] for g in gates]


def write(t: Tiles, spec, natural, targets, gates, memory, init) -> Write:
  """Takes the inner gradients of keys or values at the memory of the chunk's start."""
  w = each(lambda x: t.own(x), natural)
  low = each(t.low, memory)
  z = each(lambda s, w: t.dot(s, w, NT), low, w)
  if init is not None:
    init = each(t.low, init)
    z_init = each(lambda s, w: t.dot(s, w, NT), init, w)
    z = each(lambda e, z, z0: jnp.where(e > 0, z, z0), row(gates, Gate.ENTERED), z, z_init)
  over = t.over_slots()
  out = each(lambda z, a: activations.inner(spec.phi, z, a, spec.phi_eps, over), z, targets)
  u, ahead = [x for x, _ in out], None
  if spec.curvature:
    u, ahead = _linearise(t, spec.curvature, natural, w, gates, z, u)
  step = each(lambda u, g: u * g, u, row(gates, Gate.STEP))
  return Write(w, memory, low, init, u, [pull for _, pull in out], step, each(t.low, step), ahead)


def _linearise(t: Tiles, h, natural, w, gates, z, u):
  """Returns (U, Ahead) for U_0."""
  before = each(lambda g: t.decays(g, before=True), gates)
  pairs = each(lambda x, w, d: t.cross(x, w) * d, natural, w, before)
  scaled = each(lambda p, g: p * (h * g), pairs, row(gates, Gate.STEP))
  solver = each(t.own, t.inverses(scaled))
  right = each(lambda u, z, b: u + (h * b) * z, u, z, row(gates, Gate.BEHIND))
  change = each(lambda x, solver: -t.dot(x, solver, NT), right, solver)
  u = each(jnp.subtract, right, change)
  return u, Ahead(z, before, scaled, each(t.own, pairs), solver, change)


def ended(t: Tiles, gates, memory, init, decays, pass_: Write):
  """Returns the memories at the chunk's end; decays are (keep, renew), per pack [1, P W]."""
  keep, renew = decays
  update = each(lambda g, e, w: t.dot(g * e, w), pass_.step, row(gates, Gate.END), pass_.w)
  out = each(lambda d, s, u: d * s - u, keep, memory, update)
  return out if init is None else each(lambda d, s, x: x + d * s, renew, init, out)


class Read(NamedTuple):
  """A chunk's reads, per pack.

  decay, pairs_v: pairs, the latter times the decay; pairs_k: those of the keys, [L, L] with zeros
  where heads differ; through, fresh and within: the terms of Y; pull_r, pull_o: the pullbacks.
  """

  decay: list
  q: list
  pairs_k: list
  through: list
  fresh: list | None
  within: list
  r: list
  pull_r: list
  pairs_v: list
  o: list
  pull_o: list


def read(t: Tiles, spec, q, gates, keys: Write, values: Write) -> Read:
  """Reads the keys' memory, then the values', for every token of the chunk."""
  decay = each(t.decays, gates)
  q_rows = each(lambda x: t.own(x), q)
  pairs_k = each(lambda q, k, d: t.own(t.cross(q, k) * d), q, keys.w, decay)
  through = each(lambda s, q: t.dot(s, q, NT), keys.low, q_rows)
  within = each(lambda g, p: t.dot(g, p, NT), keys.low_step, pairs_k)
  y = each(lambda x, c, w: x * c - w, through, row(gates, Gate.CARRY), within)
  fresh = None
  if keys.init is not None:
    fresh = each(lambda s, q: t.dot(s, q, NT), keys.init, q_rows)
    y = each(lambda y, x, c: y + x * c, y, fresh, row(gates, Gate.FRESH))
  out = each(lambda y: activations.apply(spec.f, y, spec.eps, t.over_slots()), y)
  r = [x for x, _ in out]
  pairs_v = each(lambda r, g, d: t.low(t.pairs(t.tokens(r), g) * d), r, values.step, decay)
  carried = each(lambda r, c: t.tokens(r * c), r, row(gates, Gate.CARRY))
  o = each(
    lambda r, s, p, v: t.through(r, s) - t.mix(p, v), carried, values.memory, pairs_v, values.w
  )
  if values.init is not None:
    renewed = each(lambda r, c: t.tokens(r * c), r, row(gates, Gate.FRESH))
    o = each(lambda o, r, s: o + t.through(r, s), o, renewed, values.init)
  last = each(lambda o: activations.apply(spec.phi_out, o, spec.eps, t.over_lanes()), o)
  return Read(
    decay,
    q_rows,
    pairs_k,
    through,
    fresh,
    within,
    r,
    [pull for _, pull in out],
    pairs_v,
    [x for x, _ in last],
    [pull for _, pull in last],
  )
