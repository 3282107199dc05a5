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
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from trellis_jax.ops import activations
from trellis_jax.ops.spec import Spec
from trellis_jax.typing import Array

Memories = tuple[Float[Array, "B H M W"], ...]


class Chunks(NamedTuple):
  """The inputs of n chunks; `writes` holds the keys and the values, whose widths W may differ."""

  writes: tuple[Float[Array, "n B H C W"], ...]
  targets: Float[Array, "n B H C M"]
  steps: Float[Array, "n B H C"]
  end: Float[Array, "n B H C"]
  total: Float[Array, "n B H"]


class Restarts(NamedTuple):
  """Masks of the chunks with a restart: see `decay.Runs`; `survives` is entered at the end."""

  entered: Bool[Array, "n B 1 C 1"]
  survives: Bool[Array, "n B 1 1 1"]


def _select(mask, x, other):
  return x if mask is None else jnp.where(mask, x, other)


def _codes(spec, w, s):
  return jnp.einsum("...cw,...mw->...cm", w, s, precision=spec.precision)


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


def _forward(spec, start, anchor, init, chunks, restarts):
  def body(memories, xs):
    chunk, masks = xs
    entered, survives = masks if masks is not None else (None, None)
    ends, codes, writes = [], [], []
    for i, (s, w) in enumerate(zip(memories, chunk.writes)):
      z = _codes(spec, w, s if anchor is None else anchor[i])
      if masks is not None:
        z = jnp.where(entered, z, _codes(spec, w, init[i][None]))
      u = activations.inner_gradient(spec.phi, z, chunk.targets, spec.phi_eps)
      gu = chunk.steps[..., None] * u
      kept = chunk.total[..., None, None] * _select(survives, s, init[i][None])
      ends.append(kept - _gather_writes(spec, chunk.end[..., None] * gu, w))
      codes.append(z)
      writes.append(gu)
    return tuple(ends), (tuple(codes), tuple(writes), memories)

  end, (z, gu, starts) = jax.lax.scan(body, start, (chunks, restarts))
  return (gu, starts, end), (anchor, init, chunks, restarts, z, gu, starts)


def _backward(spec, saved, cts):
  anchor, init, chunks, restarts, z, gu, starts = saved
  gu_bar, starts_bar, end_bar = cts
  passes = range(len(init))

  def body(s_bars, xs):
    chunk, masks, z, gu_bar, starts_bar = xs
    entered, survives = masks if masks is not None else (None, None)
    before, saved, targets_bar = [], [], 0
    for i, s_bar in enumerate(s_bars):
      w = chunk.writes[i]
      pull = _codes(spec, w, s_bar)
      u_bar = chunk.steps[..., None] * (gu_bar[i] - chunk.end[..., None] * pull)
      z_bar, a_bar = activations.inner_gradient_vjp(
        spec.phi, z[i], chunk.targets, u_bar, spec.phi_eps
      )
      z_bar = spec.outer_gradient * z_bar
      kept = chunk.total[..., None, None] * s_bar
      s_new = _select(survives, kept, 0) + starts_bar[i]
      if anchor is None:
        s_new = s_new + _gather_writes(spec, _select(entered, z_bar, 0), w)
      before.append(s_new)
      saved.append((z_bar, pull, s_bar))
      targets_bar = targets_bar + a_bar
    return tuple(before), (targets_bar, tuple(saved))

  xs = (chunks, restarts, z, gu_bar, starts_bar)
  start_bar, (targets_bar, saved) = jax.lax.scan(body, end_bar, xs, reverse=True)
  grads = [
    _parallel(spec, i, saved[i], z[i], chunks, init, starts, anchor, gu, gu_bar, restarts)
    for i in passes
  ]
  w_bar, steps_bar, end_decay_bar, total_bar, anchor_bar, init_bar = zip(*grads)
  chunks_bar = Chunks(
    writes=w_bar,
    targets=targets_bar,
    steps=sum(steps_bar),
    end=sum(end_decay_bar),
    total=sum(total_bar),
  )
  return start_bar, None if anchor is None else anchor_bar, init_bar, chunks_bar, None


def _parallel(spec, i, saved, z, chunks, init, starts, anchor, gu, gu_bar, restarts):
  """Returns the gradients of one pass that need no loop: (w, steps, end, total, anchor, init)."""
  z_bar, pull, s_bar = saved
  w, gu = chunks.writes[i], gu[i]
  back = lambda x, s: jnp.einsum("...cm,...mw->...cw", x, s, precision=spec.precision)
  ended = -chunks.end[..., None] * gu
  z_bar_s, kept, init_bar = z_bar, starts[i], jnp.zeros_like(init[i])
  w_bar = back(ended, s_bar)
  if restarts is not None:
    z_bar_s = jnp.where(restarts.entered, z_bar, 0)
    restarted = jnp.where(restarts.entered, 0, z_bar)
    kept = jnp.where(restarts.survives, starts[i], init[i][None, None])
    w_bar = w_bar + back(restarted, init[i][None, None])
    lost = jnp.where(restarts.survives, 0, chunks.total[..., None, None] * s_bar)
    init_bar = jnp.sum(_gather_writes(spec, restarted, w) + lost, axis=(0, 1))
  w_bar = w_bar + back(z_bar_s, starts[i] if anchor is None else anchor[i][None])
  anchor_bar = None
  if anchor is not None:
    anchor_bar = jnp.sum(_gather_writes(spec, z_bar_s, w), axis=0)
  u = activations.inner_gradient(spec.phi, z, chunks.targets, spec.phi_eps)
  steps_bar = jnp.sum(u * (gu_bar[i] - chunks.end[..., None] * pull), axis=-1)
  end_bar = -jnp.sum(gu * pull, axis=-1)
  total_bar = jnp.sum(kept * s_bar, axis=(-2, -1))
  return w_bar, steps_bar, end_bar, total_bar, anchor_bar, init_bar


evolve.defvjp(_forward, _backward)
