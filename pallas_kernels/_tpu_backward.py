r"""The backward kernel: a row's chunks in reverse, each computed again from its saved start.

With the names of `_tpu_chunk`, X the cotangent of O, a bar for every other cotangent, S' the
memory after the chunk, and P_bar the product that a pair's cotangent is, times its decay:

  values read   R_bar = carry (S_v X^T) + G_v P_bar_v^T,       P_bar_v[t,s] = -(x_t . v_s) decay
                G_v_bar = R P_bar_v,  V_bar = -P_v^T X,        S_v_bar = (carry R) X
  keys read     Y_bar = J_f R_bar,                             P_bar_k = -(Y_bar^T G_k) decay
                G_k_bar = -Y_bar P_k,  Q_bar = P_bar_k K + (carry Y_bar)^T S_k,
                K_bar = P_bar_k^T Q,   S_k_bar = (carry Y_bar) Q
  written       G_bar -= end (S'_bar W^T),  (Z_bar, A_bar) = pullback of U at g G_bar,
                W_bar += Z_bar^T S - (end G)^T S'_bar,  S_bar += keep S'_bar + rho Z_bar W

Linearised chunks (rho h in place of h in T_rho) have U_0_bar = (g G_bar) T_rho, of which Z_bar and
the targets' A_bar are made, and besides, A being the pairs of `_tpu_chunk`,

  written       G_bar -= rho h U_0_bar A,  Z_bar += rho h (before - 1) U_0_bar,
                P_bar[t,s] = -rho h (u_0_bar_t . g_s) before,  W_bar += (P_bar + P_bar^T) W

The log decay's cotangent is, at t, sum_s of a pair's times its decay and, at s, less sum_t of it.
Both are sums over slots of products that are there already, with the operands as the products took
them: so what t = s adds to one is what it takes from the other.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_blocks as blocks
from pallas_kernels import _tpu_chunk as chunk
from pallas_kernels import _tpu_plan as plans
from pallas_kernels._tpu_blocks import SUBLANES
from pallas_kernels._tpu_chunk import row
from pallas_kernels._tpu_layout import Gate
from pallas_kernels._tpu_plan import Plan
from pallas_kernels._tpu_tiles import F32, NT, Tiles, each

NAME = "trellis_backward"
# (packs, chunks) of a program for each chunk length.
SIZE = {16: (4, 1), 32: (8, 1), 64: (16, 1)}


def _over_slots(x):
  return jnp.sum(x, axis=0, keepdims=True)


def _read_back(t: Tiles, x, values, read, gates):
  """Cotangents of the values' read: (X's rows, R_bar, G_v_bar, V_bar, gates' cotangents)."""
  low_r = each(t.low, read.r)
  x_rows = each(t.own, x)
  through = each(lambda s, x: t.dot(s, x, NT), values.low, x_rows)
  pairs = each(lambda x, v, d: t.own(t.cross(x, v) * -d), x, values.w, read.decay)
  step_bar = each(t.dot, low_r, pairs)
  within = each(lambda g, p: t.dot(g, p, NT), values.low_step, pairs)
  r_bar = each(lambda y, c, w: y * c + w, through, row(gates, Gate.CARRY), within)
  v_bar = each(lambda p, x: -t.mix(t.natural(p), x), read.pairs_v, x_rows)
  decay = each(
    lambda r, w, g, b: _over_slots(r.astype(F32) * w - g.astype(F32) * b),
    low_r,
    within,
    values.low_step,
    step_bar,
  )
  carry = each(lambda r, y: _over_slots(r * y), read.r, through)
  fresh = None
  if values.init is not None:
    renewed = each(lambda s, x: t.dot(s, x, NT), values.init, x_rows)
    fresh = each(lambda r, y: _over_slots(r * y), read.r, renewed)
    r_bar = each(lambda r, y, c: r + y * c, r_bar, renewed, row(gates, Gate.FRESH))
  return x_rows, r_bar, step_bar, v_bar, (decay, carry, fresh)


def _keys_read_back(t: Tiles, r_bar, keys, read, gates):
  """Cotangents of the keys' read: (Y_bar, G_k_bar, Q_bar, K_bar, gates' cotangents)."""
  y_bar = each(lambda pull, ct: pull(ct), read.pull_r, r_bar)
  low_y = each(t.low, y_bar)
  step_bar = each(lambda y, p: -t.dot(y, p), low_y, read.pairs_k)
  pairs = each(lambda y, g, d: t.pairs(t.tokens(y), g) * -d, y_bar, keys.step, read.decay)
  carried = each(lambda y, c: t.tokens(y * c), y_bar, row(gates, Gate.CARRY))
  q_bar = each(
    lambda p, k, y, s: t.mix(t.low(p), k) + t.through(y, s), pairs, keys.w, carried, keys.memory
  )
  k_bar = each(lambda p, q: t.mix(t.natural(p), q), pairs, read.q)
  decay = each(
    lambda y, w, g, b: -_over_slots(y.astype(F32) * w + g.astype(F32) * b),
    low_y,
    read.within,
    keys.low_step,
    step_bar,
  )
  carry = each(lambda y, x: _over_slots(y * x), y_bar, read.through)
  fresh = None
  if keys.init is not None:
    renewed = each(lambda y, c: t.tokens(y * c), y_bar, row(gates, Gate.FRESH))
    q_bar = each(lambda q, y, s: q + t.through(y, s), q_bar, renewed, keys.init)
    fresh = each(lambda y, x: _over_slots(y * x), y_bar, read.fresh)
  return y_bar, step_bar, q_bar, k_bar, (decay, carry, fresh)


class GateBars(NamedTuple):
  """Cotangents of the gates by which a pass is linearised, rows [1, L] per pack."""

  behind: list
  before: list
  low: list


def _follow_back(t: Tiles, spec, pass_, gates, u_bar):
  """Returns (U_0_bar, what G_bar, Z_bar and natural W_bar get besides, GateBars)."""
  ahead, rho = pass_.ahead, spec.outer_gradient
  if rho == 1:
    u_bar = each(lambda u, solver: u + t.dot(u, solver), u_bar, ahead.solver)
  elif rho:
    solver = t.inverses([rho * a for a in ahead.scaled])
    u_bar = each(lambda u, x: u + t.dot(u, t.own(x)), u_bar, solver)
  h = rho * spec.curvature
  back = each(lambda u, a: -h * t.dot(u, a), u_bar, ahead.alike)
  z_bar = each(lambda u, b: (h * b) * u, u_bar, row(gates, Gate.BEHIND))
  pairs = each(lambda u, g, d: t.pairs(t.tokens(u), g) * (-h * d), u_bar, pass_.step, ahead.before)
  w_bar = each(lambda p, w: t.mix(t.low(p), w) + t.mix(t.natural(p), w), pairs, pass_.w)
  bars = GateBars(
    behind=each(lambda u, z: h * _over_slots(u * z), u_bar, ahead.z),
    before=each(lambda u, x: -rho * _over_slots(u * x), u_bar, ahead.change),
    low=each(lambda g, x: -_over_slots(g * x), pass_.step, back),
  )
  return u_bar, back, z_bar, w_bar, bars


def _write_back(t: Tiles, spec, pass_, gates, s_bar, step_bar, columns, rows, decays):
  """Cotangents of a pass's write.

  Args:
    t, spec: tiles; outer gradient and curvature.
    pass_: the write.
    gates: of the packs.
    s_bar: of the memory after the chunk.
    step_bar: of G, from the read.
    columns, rows: what the read made of the memory, columns and rows [L, P W] of a product.
    decays: keep and renew, per pack.

  Returns:
    (S_bar, init_bar or None, W_bar natural, A_bar, step_bar [1, L], end_bar [1, L],
    GateBars or None for stale chunks).
  """
  low = each(t.low, s_bar)
  pull = each(lambda s, w: t.dot(s, w, NT), low, pass_.w)
  step_bar = each(lambda b, p, e: b - p * e, step_bar, pull, row(gates, Gate.END))
  end = each(lambda g, p: -_over_slots(g * p), pass_.step, pull)
  u_bar = each(jnp.multiply, step_bar, row(gates, Gate.STEP))
  more_z = more_w = behind = None
  if pass_.ahead is not None:
    u_bar, back, more_z, more_w, behind = _follow_back(t, spec, pass_, gates, u_bar)
    step_bar = each(jnp.add, step_bar, back)
  step = each(lambda u, b: _over_slots(u * b), pass_.u, step_bar)
  bars = each(lambda f, u: f(u), pass_.pull, u_bar)
  z_bar = [spec.outer_gradient * z for z, _ in bars]
  if more_z is not None:
    z_bar = each(jnp.add, z_bar, more_z)
  gone = each(lambda g, e: -g * e, pass_.step, row(gates, Gate.END))
  keep, renew = decays
  entered = row(gates, Gate.ENTERED)
  mine = z_bar if pass_.init is None else each(lambda z, e: z * e, z_bar, entered)
  carried = each(lambda x, c: x * c, columns, row(gates, Gate.CARRY))
  product = lambda x, y, z, w: t.dot(
    jnp.concatenate([t.low(x), t.low(z)], 1), jnp.concatenate([y, w], 0)
  )
  s_new = each(product, carried, rows, mine, pass_.w)
  s_new = each(lambda d, s, x: d * s + x, keep, s_bar, s_new)
  w_bar = each(
    lambda x, b, z, s: t.through(t.tokens(x), b) + t.through(t.tokens(z), s),
    gone,
    s_bar,
    mine,
    pass_.memory,
  )
  init_bar = None
  if pass_.init is not None:
    fresh = each(lambda x, c: x * c, columns, row(gates, Gate.FRESH))
    others = each(lambda z, e: z * (1 - e), z_bar, entered)
    init_bar = each(product, fresh, rows, others, pass_.w)
    init_bar = each(lambda d, s, x: d * s + x, renew, s_bar, init_bar)
    w_bar = each(lambda w, z, s: w + t.through(t.tokens(z), s), w_bar, others, pass_.init)
  if more_w is not None:
    w_bar = each(jnp.add, w_bar, more_w)
  return s_new, init_bar, w_bar, [a for _, a in bars], step, end, behind


def _kernel(last_ref, *refs, plan: Plan, spec, restarts: bool):
  names = iter(refs)
  take = lambda n: [next(names) for _ in range(n)]
  q_ref, k_ref, v_ref, a_ref, gates_ref = take(5)
  keep_refs, renew_refs = take(2), take(2) if restarts else None
  init_refs = take(2) if restarts else None
  start_refs, (o_bar_ref,), end_bar_refs, kept_bar_refs = take(2), take(1), take(2), take(2)
  q_bar_ref, k_bar_ref, v_bar_ref, a_bar_ref, gates_bar_ref = take(5)
  keep_bar_refs, renew_bar_refs = take(2), take(2) if restarts else None
  s_bar_refs, init_bar_refs = take(2), take(2) if restarts else None
  step, t = pl.program_id(2), Tiles(plan)
  at_chunk = plan.chunks - 1 - step
  load, store = (functools.partial(f, plan) for f in (blocks.load, blocks.store))

  @pl.when(step == 0)
  def _():
    for s_bar, end_bar in zip(s_bar_refs, end_bar_refs):
      s_bar[...] = end_bar[...]
    for init_bar in init_bar_refs or ():
      init_bar[...] = jnp.zeros_like(init_bar)

  q, k, v, a, o_bar, gates = map(load, (q_ref, k_ref, v_ref, a_ref, o_bar_ref, gates_ref))
  this = at_chunk % SUBLANES
  decay = lambda refs, j: None if refs is None else load(refs[j], pl.ds(this, 1))
  starts, s_bars = ([load(ref) for ref in refs] for refs in (start_refs, s_bar_refs))
  inits = [load(ref) for ref in init_refs] if restarts else (None, None)
  targets = each(t.columns, a)
  keys, values = (
    chunk.write(t, spec, w, targets, gates, s, s0) for w, s, s0 in zip((k, v), starts, inits)
  )
  read = chunk.read(t, spec, q, gates, keys, values)

  x = each(lambda pull, ct: t.low(pull(ct.astype(F32))), read.pull_o, o_bar)
  x_rows, r_bar, step_v, v_bar, gates_v = _read_back(t, x, values, read, gates)
  decays = [(decay(keep_refs, j), decay(renew_refs, j)) for j in range(2)]
  back_v = _write_back(t, spec, values, gates, s_bars[1], step_v, read.r, x_rows, decays[1])
  y_bar, step_k, q_bar, k_bar, gates_k = _keys_read_back(t, r_bar, keys, read, gates)
  back_k = _write_back(t, spec, keys, gates, s_bars[0], step_k, y_bar, read.q, decays[0])

  add = lambda x, y: None if x is None else each(jnp.add, x, y)
  store(q_bar_ref, q_bar)
  store(k_bar_ref, add(k_bar, back_k[2]))
  store(v_bar_ref, add(v_bar, back_v[2]))
  store(a_bar_ref, each(t.natural, add(back_k[3], back_v[3])))
  rows = {
    Gate.LOW: [math.log(2) * x for x in add(gates_k[0], gates_v[0])],
    Gate.STEP: add(back_k[4], back_v[4]),
    Gate.END: add(back_k[5], back_v[5]),
    Gate.CARRY: add(gates_k[1], gates_v[1]),
    Gate.FRESH: add(gates_k[2], gates_v[2]),
  }
  if spec.curvature:
    bars = GateBars(*map(add, back_k[6], back_v[6]))
    rows[Gate.LOW] = [x + math.log(2) * y for x, y in zip(rows[Gate.LOW], bars.low)]
    rows[Gate.BEFORE_LOW] = [math.log(2) * x for x in bars.before]
    rows[Gate.BEHIND] = bars.behind
  none = [jnp.zeros((1, plan.L), F32)] * len(q)
  tiles = zip(*(rows.get(r) or none for r in range(plan.gates)))
  store(gates_bar_ref, [jnp.concatenate(tile, 0) for tile in tiles])
  product = lambda s, b: _over_slots(s.astype(F32) * b)
  for j, s_bar in enumerate(s_bars):
    blocks.store_row(plan, keep_bar_refs[j], each(product, starts[j], s_bar), this)
    if restarts:
      blocks.store_row(plan, renew_bar_refs[j], each(product, inits[j], s_bar), this)
  for j, (s_new, init_bar, *_) in enumerate((back_k, back_v)):
    store(s_bar_refs[j], s_new)
    if restarts:
      store(init_bar_refs[j], add(load(init_bar_refs[j]), init_bar))
  for r in range(plan.R):

    @pl.when(last_ref[pl.program_id(0) * plan.R + r] == at_chunk)
    def _(r=r):
      for s_bar, kept_bar in zip(s_bar_refs, kept_bar_refs):
        s_bar[r] += kept_bar[r]


def call(plan: Plan, spec, arrays, last, starts, cts):
  """Runs the kernel.

  Args:
    plan: sizes.
    spec: activations, their eps and the outer gradient.
    arrays: as the forward's.
    last: [B] the chunk of each row's last token.
    starts: the memories at the chunks' starts, as the forward saved them.
    cts: cotangents (o, (end_k, end_v), (kept_k, kept_v)) in the kernel's layout.

  Returns:
    Cotangents ((q, k, v, alpha, gates), keep, renew or (), start, init [B ...] or ()).
  """
  inputs, keep, renew, _, init = arrays
  b, _ = inputs[0].shape[:2]
  heads, widths = plan.heads[1], (plan.D, plan.V)
  of = blocks.Blocks(plan, lambda c: plan.chunks - 1 - c)
  shape = jax.ShapeDtypeStruct
  like = lambda x: shape(x.shape, x.dtype)
  memory = [shape((b, plan.M, heads * w), F32) for w in widths]
  tokens = [of.tokens(w) for w in (plan.D, plan.D, plan.V, plan.M)] + [of.gates()]
  decays = [of.decays(w) for w in widths] * (2 if renew else 1)
  memories = [of.memory(w) for w in widths]
  in_specs = [*tokens, *decays, *([of.init(w) for w in widths] if init else [])]
  in_specs += [of.starts(w) for w in widths] + [of.tokens(plan.V)] + memories * 2
  out_shape = [like(x) for x in (*inputs, *keep, *renew)] + memory + (memory if init else [])
  out_specs = [*tokens, *decays] + memories * (2 if init else 1)
  o_bar, end_bar, kept_bar = cts
  out = pl.pallas_call(
    functools.partial(_kernel, plan=plan, spec=spec, restarts=bool(init)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(b // plan.R, plan.programs, plan.chunks),
      in_specs=in_specs,
      out_specs=out_specs,
    ),
    out_shape=out_shape,
    compiler_params=blocks.PARAMS,
    interpret=plans.interpret(),
    name=NAME,
  )(last.astype(jnp.int32), *inputs, *keep, *renew, *init, *starts, o_bar, *end_bar, *kept_bar)
  out = iter(out)
  take = lambda n: tuple(next(out) for _ in range(n))
  return take(5), take(2), take(len(renew)), take(2), take(len(init))
