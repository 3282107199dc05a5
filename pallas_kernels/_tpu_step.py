r"""One token, for decoding: both memories written and read in one kernel.

A program takes G heads of a row. With S the running memory and A that of the chunk's start, both
the initial one behind a restart, and A = S where a chunk opens, first for keys, then for values:

  z = A w,   u = J_phi(z)^T (phi(z) - a) + h (S w - z),   S <- b S - g u w^T
  o = phi_out(S_v^T f(S_k q))

All in fp32 and without matrix products but one, which turns the targets: a token reads and writes
every memory once, which is what its time is made of. What has M numbers a head stands as columns
[M, G], slots on sublanes and a head a lane, so that G heads cost the activations what one would.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_activations as activations
from pallas_kernels import _tpu_plan as plans
from pallas_kernels._one_token import CLOSES, LIVE, OPENS, RESTARTS
from pallas_kernels._tpu_activations import Over

NAME = "trellis_step"
PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=64 << 20
)


def _over(axis: int, size: int) -> Over:
  return Over(lambda x: jnp.sum(x, axis=axis, keepdims=True) * (1 / size), size, fast=False)


def _columns(numbers):
  """Columns [M, 1] of all heads as [M, G]."""
  out = jnp.broadcast_to(numbers[0], (numbers[0].shape[0], len(numbers)))
  lane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
  for h, x in enumerate(numbers[1:], start=1):
    out = jnp.where(lane == h, x, out)
  return out


def _kernel(flags, gates, q, k, v, a, s_k, s_v, a_k, a_v, init_k, init_v, o, *outs, spec):
  heads, m = a.shape[1:]
  first = (pl.program_id(1) * pl.num_programs(0) + pl.program_id(0)) * heads
  flag = lambda which: flags[4 * pl.program_id(1) + which] > 0
  live, restarts, opens, closes = map(flag, (LIVE, RESTARTS, OPENS, CLOSES))
  row = lambda ref, h: ref[0, h : h + 1]
  slots = lambda h: slice(h * m, (h + 1) * m)
  mine = lambda ref, h: ref[0, slots(h)]
  eye = jax.lax.broadcasted_iota(jnp.int32, (m, m), 0)
  eye = jnp.where(eye == jax.lax.broadcasted_iota(jnp.int32, (m, m), 1), 1.0, 0.0)
  exact = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  targets = jax.lax.dot_general(eye, a[0], (((1,), (1,)), ((), ())), **exact)

  def write(w, s_ref, anchor_ref, init_ref, s_out, anchor_out):
    """Stores the memory after the token and its chunk's start; a dead token's stay as they were."""
    start = lambda ref, h: jnp.where(restarts, mine(init_ref, h), mine(ref, h))
    anchor = lambda h: jnp.where(opens, start(s_ref, h), start(anchor_ref, h))
    z = [jnp.sum(anchor(h) * row(w, h), axis=1, keepdims=True) for h in range(heads)]
    u, _ = activations.inner(spec.phi, _columns(z), targets, spec.phi_eps, _over(0, m))
    if spec.curvature:
      come = lambda h: (start(s_ref, h) - anchor(h)) * row(w, h)
      come = [jnp.sum(come(h), axis=1, keepdims=True) for h in range(heads)]
      u = u + spec.curvature * _columns(come)
    for h in range(heads):
      at = 2 * (first + h)
      decay, rate = gates[at], gates[at + 1]
      new = decay * start(s_ref, h) - u[:, h : h + 1] * (rate * row(w, h))
      after = jnp.where(closes, new, anchor(h))
      s_out[0, slots(h)] = jnp.where(live, new, mine(s_ref, h))
      anchor_out[0, slots(h)] = jnp.where(live, after, mine(anchor_ref, h))

  write(k, s_k, a_k, init_k, *outs[::2])
  y = [jnp.sum(mine(outs[0], h) * row(q, h), axis=1, keepdims=True) for h in range(heads)]
  r, _ = activations.apply(spec.f, _columns(y), spec.eps, _over(0, m))
  write(v, s_v, a_v, init_v, *outs[1::2])
  for h in range(heads):
    p = jnp.sum(mine(outs[1], h) * r[:, h : h + 1], axis=0, keepdims=True)
    p, _ = activations.apply(spec.phi_out, p, spec.eps, _over(1, p.shape[1]))
    o[0, h : h + 1] = jnp.where(live, p, 0.0)


def call(spec, flags, gates, q, k, v, alpha, memories, anchors, init):
  """Runs the kernel; arguments and results are those of the launch of `_one_token.step`."""
  b, h, d = q.shape
  width, m = v.shape[-1], alpha.shape[-1]
  # Heads of a block of tokens are whole tiles, or all.
  g = next(g for g in (16, 8, h) if h % g == 0)
  row = lambda rows, width: pl.BlockSpec((1, rows, width), lambda n, b, *_: (b, n, 0))
  one = lambda rows, width: pl.BlockSpec((1, rows, width), lambda n, b, *_: (0, n, 0))
  flat = lambda s: s.reshape(-1, h * m, s.shape[-1])
  state = [flat(s) for s in (*memories, *anchors)]
  both = [row(g * m, d), row(g * m, width)]
  o, *rest = pl.pallas_call(
    functools.partial(_kernel, spec=spec),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      # Rows last: the initial memories stay where they are.
      grid=(h // g, b),
      in_specs=[row(g, d), row(g, d), row(g, width), row(g, m), *both * 2]
      + [one(g * m, d), one(g * m, width)],
      out_specs=[row(g, width), *both * 2],
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v, *state)],
    compiler_params=PARAMS,
    interpret=plans.interpret(),
    name=NAME,
  )(flags.reshape(-1), gates.reshape(-1), q, k, v, alpha, *state, *map(flat, init))
  back = [s.reshape(b, h, m, -1) for s in rest]
  return o, tuple(back[:2]), tuple(back[2:])
