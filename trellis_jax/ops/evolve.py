r"""The sequential half of the chunked form: both memories evolve from chunk to chunk.

For a chunk of C tokens that starts from S, with write vectors W (keys or values) [C, W], targets
A [C, M], steps g [C] and the decays `end` [C] and `total` of `decay.to_end` (paper, eq. 9-12):

  Z = W S^T,   U = J_phi(Z)^T (phi(Z) - A),   S <- total S - (end g U)^T W

Only this is a loop over chunks; what reads the memories is parallel and lives in `readout`. The
backward runs the chunks in reverse and keeps in the loop what depends on the cotangent of S:

  U_bar = g (GU_bar - end (W S'_bar^T)),   (Z_bar, A_bar) = vjp of U,
  S_bar = total S'_bar + S_bar(read) + rho Z_bar^T W;

the gradients of W, A, g and the decays follow for all chunks at once.

Where a restart lies inside the chunk, tokens after it see `init` in place of S, and S survives to
the chunk's end only if none does.

A linearised chunk (curvature h > 0) adds h times how far each token's memory has come from the
chunk's start. The memory between two tokens is linear in the writes, so this is one triangular
system for all slots of a pass, with `before` and A_ts = before_ts (w_t . w_s) of `decay.before`:

  U = T (J_phi(Z)^T (phi(Z) - A) + h (before - 1) Z),   T = (I + h A diag(g))^-1

All T are made before the loop. Backward, with rho of the outer gradient:

  U_bar = T_rho^T g (GU_bar - end (W S'_bar^T)),   T_rho = (I + rho h A diag(g))^-1
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from trellis_jax.ops import activations, triangular
from trellis_jax.ops.spec import Spec
from trellis_jax.typing import Array

Memories = tuple[Float[Array, "B H M W"], ...]


class Ahead(NamedTuple):
  """What linearised chunks need of the decays and writes: `before` and A of each pass."""

  before: Float[Array, "n B H C"]
  alike: tuple[Float[Array, "n B H C C"], ...]


class Chunks(NamedTuple):
  """The inputs of n chunks; `writes` holds the keys and the values, whose widths W may differ."""

  writes: tuple[Float[Array, "n B H C W"], ...]
  targets: Float[Array, "n B H C M"]
  steps: Float[Array, "n B H C"]
  end: Float[Array, "n B H C"]
  total: Float[Array, "n B H"]
  ahead: Ahead | None = None  # None for stale chunks


class Restarts(NamedTuple):
  """Masks of the chunks with a restart: see `decay.Runs`; `survives` is entered at the end."""

  entered: Bool[Array, "n B 1 C 1"]
  survives: Bool[Array, "n B 1 1 1"]


def _select(mask, x, other):
  return x if mask is None else jnp.where(mask, x, other)


def _codes(spec, w, s):
  return jnp.einsum("...cw,...mw->...cm", w, s, precision=spec.precision)


def _mix(spec, tokens, x):
  return jnp.einsum("...ts,...sm->...tm", tokens, x, precision=spec.precision)


def _gather_writes(spec, x, w):
  return jnp.einsum("...cm,...cw->...mw", x, w, precision=spec.precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def evolve(
  spec: Spec,
  start: Memories,
  anchor: Memories | None,
  init: Memories,
  chunks: Chunks,
  restarts: Restarts | None,
) -> tuple[tuple[Array, ...], Memories, Memories]:
  """Runs n chunks.

  Args:
    spec: phi, phi_eps, outer_gradient and precision are used.
    start: memories before the first chunk.
    anchor: memories at which the inner gradients are taken, for one chunk (n = 1) that is entered
      midway; None: each chunk's own start.
    init: memories [H, M, W] after a restart; unused without `restarts`.
    chunks: the inputs.
    restarts: masks, or None when no chunk has a restart.

  Returns:
    (g U per memory [n B H C M], memories at each chunk's start [n B H M W], memories at the end).
  """
  out, _ = _forward(spec, start, anchor, init, chunks, restarts)
  return out


def _solvers(curvature: float, chunks: Chunks):
  """Returns T of each pass, None for stale chunks."""
  if chunks.ahead is None:
    return None
  scaled = curvature * chunks.steps[..., None, :]
  return tuple(triangular.inverse(scaled * alike) for alike in chunks.ahead.alike)


def _forward(spec, start, anchor, init, chunks, restarts):
  solvers = _solvers(spec.curvature, chunks)

  def body(memories, xs):
    chunk, masks, solvers = xs
    entered, survives = masks if masks is not None else (None, None)
    ends, codes, held, writes = [], [], [], []
    for i, (s, w) in enumerate(zip(memories, chunk.writes)):
      seen = lambda s: _select(entered, _codes(spec, w, s), restarted)
      restarted = None if masks is None else _codes(spec, w, init[i][None])
      z = seen(s if anchor is None else anchor[i])
      u = activations.inner_gradient(spec.phi, z, chunk.targets, spec.phi_eps)
      if solvers is not None:
        z_s = z if anchor is None else seen(s)
        u = u + spec.curvature * (chunk.ahead.before[..., None] * z_s - z)
        u = _mix(spec, solvers[i], u)
        held.append(z_s)
      kept = chunk.total[..., None, None] * _select(survives, s, init[i][None])
      ended = (chunk.end * chunk.steps)[..., None] * u
      ends.append(kept - _gather_writes(spec, ended, w))
      codes.append(z)
      writes.append(u)
    return tuple(ends), (tuple(codes), tuple(held), tuple(writes), memories)

  end, (z, z_s, u, starts) = jax.lax.scan(body, start, (chunks, restarts, solvers))
  gu = tuple(chunks.steps[..., None] * x for x in u)
  return (gu, starts, end), (anchor, init, chunks, restarts, solvers, z, z_s, u, starts)


def _backward(spec, saved, cts):
  anchor, init, chunks, restarts, solvers, z, z_s, u, starts = saved
  gu_bar, starts_bar, end_bar = cts
  rho = spec.outer_gradient
  if rho != 1:
    solvers = _solvers(rho * spec.curvature, chunks)

  def body(s_bars, xs):
    chunk, masks, solvers, z, gu_bar, starts_bar = xs
    entered, survives = masks if masks is not None else (None, None)
    before, saved, targets_bar = [], [], 0
    for i, s_bar in enumerate(s_bars):
      w = chunk.writes[i]
      pull = _codes(spec, w, s_bar)
      u_bar = chunk.steps[..., None] * (gu_bar[i] - chunk.end[..., None] * pull)
      if solvers is not None:
        u_bar = _mix(spec, jnp.swapaxes(solvers[i], -1, -2), u_bar)
      z_bar, a_bar = activations.inner_gradient_vjp(
        spec.phi, z[i], chunk.targets, u_bar, spec.phi_eps
      )
      z_bar, z_s_bar = rho * z_bar, None
      if solvers is not None:
        follows = rho * spec.curvature * u_bar
        z_bar, z_s_bar = z_bar - follows, chunk.ahead.before[..., None] * follows
      if anchor is None:
        z_bar, z_s_bar = None, z_bar if z_s_bar is None else z_bar + z_s_bar
      kept = chunk.total[..., None, None] * s_bar
      s_new = _select(survives, kept, 0) + starts_bar[i]
      if z_s_bar is not None:
        s_new = s_new + _gather_writes(spec, _select(entered, z_s_bar, 0), w)
      before.append(s_new)
      saved.append((z_bar, z_s_bar, u_bar, pull, s_bar))
      targets_bar = targets_bar + a_bar
    return tuple(before), (targets_bar, tuple(saved))

  xs = (chunks, restarts, solvers, z, gu_bar, starts_bar)
  start_bar, (targets_bar, saved) = jax.lax.scan(body, end_bar, xs, reverse=True)
  of = lambda x, i: x[i] if x else None
  grads = [
    _parallel(
      spec, i, saved[i], of(z_s, i), u[i], chunks, init, starts, anchor, gu_bar[i], restarts
    )
    for i in range(len(init))
  ]
  w_bar, steps_bar, end_decay_bar, total_bar, anchor_bar, init_bar, before_bar, alike_bar = zip(
    *grads
  )
  chunks_bar = Chunks(
    writes=w_bar,
    targets=targets_bar,
    steps=sum(steps_bar),
    end=sum(end_decay_bar),
    total=sum(total_bar),
    ahead=None if chunks.ahead is None else Ahead(sum(before_bar), alike_bar),
  )
  return start_bar, None if anchor is None else anchor_bar, init_bar, chunks_bar, None


def _parallel(spec, i, saved, z_s, u, chunks, init, starts, anchor, gu_bar, restarts):
  """Returns a pass's gradients without a loop: w, steps, end, total, anchor, init, ahead's two."""
  z_bar, z_s_bar, u_bar, pull, s_bar = saved
  w, gu = chunks.writes[i], chunks.steps[..., None] * u
  back = lambda x, s: jnp.einsum("...cm,...mw->...cw", x, s, precision=spec.precision)
  w_bar, kept, init_bar = (
    back(-chunks.end[..., None] * gu, s_bar),
    starts[i],
    jnp.zeros_like(init[i]),
  )
  if restarts is not None:
    lost = jnp.where(restarts.survives, 0, chunks.total[..., None, None] * s_bar)
    init_bar = jnp.sum(lost, axis=(0, 1))
    kept = jnp.where(restarts.survives, kept, init[i][None, None])
  codes = [] if z_s_bar is None else [(z_s_bar, starts[i])]
  if anchor is not None:
    codes.append((z_bar, anchor[i][None]))
  for code_bar, s in codes:
    if restarts is not None:
      restarted = jnp.where(restarts.entered, 0, code_bar)
      code_bar = jnp.where(restarts.entered, code_bar, 0)
      w_bar = w_bar + back(restarted, init[i][None, None])
      init_bar = init_bar + jnp.sum(_gather_writes(spec, restarted, w), axis=(0, 1))
    w_bar = w_bar + back(code_bar, s)
  # The anchor's codes are the last.
  anchor_bar = None if anchor is None else jnp.sum(_gather_writes(spec, code_bar, w), axis=0)
  before_bar = alike_bar = None
  gu_bar = gu_bar - chunks.end[..., None] * pull
  if chunks.ahead is not None:
    scale = spec.outer_gradient * spec.curvature
    alike_bar = -scale * jnp.einsum("...tm,...sm->...ts", u_bar, gu, precision=spec.precision)
    before_bar = scale * jnp.sum(z_s * u_bar, axis=-1)
    mixed = jnp.einsum("...ts,...tm->...sm", chunks.ahead.alike[i], u_bar, precision=spec.precision)
    gu_bar = gu_bar - scale * mixed
  steps_bar = jnp.sum(u * gu_bar, axis=-1)
  end_bar = -jnp.sum(gu * pull, axis=-1)
  total_bar = jnp.sum(kept * s_bar, axis=(-2, -1))
  return w_bar, steps_bar, end_bar, total_bar, anchor_bar, init_bar, before_bar, alike_bar


evolve.defvjp(_forward, _backward)
