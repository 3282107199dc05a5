r"""The public op: attention over a memory of fixed size that learns at test time.

Each token takes one step of gradient descent on `|phi(S w) - a|^2 / 2` with a forget gate, first
on S_k with its key, then on S_v with its value, and reads what it has just written (paper, eq. 4-8
and 13-14; `ops/reference.py` is the definition):

  S_k <- b S_k - g u_k k^T,   r = f(S_k q)
  S_v <- b S_v - g u_v v^T,   o = phi_out(S_v^T r)

This file holds the call's checks, the choice of implementation, the layout of rows on the chunk
grid, the one custom_vjp that all implementations share, and the shard_map.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.ops import backends, checks, chunked, filled, reference, sharded
from trellis_jax.ops.chunked import Inputs
from trellis_jax.ops.grid import Grid, pad_tail, rows_of
from trellis_jax.ops.spec import Spec
from trellis_jax.ops.state import TrellisState
from trellis_jax.typing import Array, Gates, Keys, Memory, SegmentIds, Targets, Values


def trellis(
  q: Keys,
  k: Keys,
  v: Values,
  alpha: Targets,
  log_beta: Gates,
  gamma: Gates,
  *,
  initial_memory: Memory | None = None,
  initial_state: TrellisState | None = None,
  segment_ids: SegmentIds | None = None,
  phi: str = "ln_silu",
  f: str = "ln_silu",
  phi_out: str = "ln_silu",
  phi_eps: float = 1.0,
  eps: float = 1e-5,
  chunk_size: int = 16,
  outer_gradient: float = 1.0,
  curvature: float = 0.0,
  precision: jax.lax.PrecisionLike = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], TrellisState]:
  """Compresses keys and values into two memories and reads them, token by token.

  Args:
    q: queries [B, T, H, D].
    k: keys [B, T, H, D], what is written into S_k.
    v: values [B, T, H, V], what is written into S_v.
    alpha: target codes [B, T, H, M] of both passes (paper, eq. 4).
    log_beta: log of the forget gate [B, T, H], <= 0; 0 keeps, -inf erases.
    gamma: inner step [B, T, H]; the loss has the factor 1/2.
    initial_memory: (S_k [H, M, D], S_v [H, M, V]) that a fresh row and every new segment start
      from; learnable; None is zeros.
    initial_state: goes on from what an earlier call returned, in place of `initial_memory`.
    segment_ids: [B, T] integers. Where the id changes the memory restarts from `initial_memory`.
      0 is padding: it neither writes, decays nor reads, its output is 0, and it does not count
      towards the chunk, wherever it stands.
    phi: activation of the compression loss; one of `activations.ACTIVATIONS`.
    f: activation between the passes.
    phi_out: activation of the read, over V.
    phi_eps: eps of phi's normaliser. It is the memory's unit: at S = 0 an ln_silu write has the
      size gamma alpha / (2 sqrt(phi_eps)).
    eps: eps of the normalisers of f and phi_out.
    chunk_size: C. Inner gradients are taken at the memory of the chunk's start (paper, section
      3.2); 1 is the exact recurrence. Any T, also not a multiple.
    outer_gradient: rho in [0, 1], how much of the derivative through the inner gradient's z is
      kept; the outputs do not depend on it, the path through alpha is whole for all.
    curvature: h >= 0. 0 are the stale chunks of section 3.2; above, a chunk is linearised: its
      inner gradients follow the memory from the chunk's start on with this curvature,
      u + h (S w - z). It bounds what a chunk can overshoot by where h is at least half of phi's
      largest squared slope (1.21 / phi_eps for ln_silu, 1 for the identity, for which h = 1 is
      exact). Nothing to C = 1.
    precision: of the matrix products.
    implementation: "reference", "xla" or a file of `pallas_kernels`, which never falls back; None
      picks the best that supports the call on this platform.

  Returns:
    (o [B, T, H, V] in v's dtype, the state after the last token). The first s tokens and then the
    rest from the returned state give the outputs, state and gradients of one call, for every s.

  Raises:
    ValueError: a shape, dtype, name or concrete gate is not accepted.
  """
  spec = Spec(
    phi, f, phi_out, phi_eps, eps, chunk_size, outer_gradient, curvature, precision
  ).check()
  arrays = (q, k, v, alpha, log_beta, gamma)
  checks.check(spec, *arrays, initial_memory, initial_state, segment_ids)
  implementation = backends.choose(implementation, spec, _shapes(Inputs(*arrays)))
  call = functools.partial(_call, implementation, spec)
  kernel = implementation in backends.kernels()
  return sharded.over_mesh(
    call, kernel, Inputs(*arrays), initial_memory, initial_state, segment_ids
  )


def _shapes(x: Inputs) -> backends.Shapes:
  """What a backend decides on."""
  return backends.Shapes(*x.q.shape, x.v.shape[-1], x.alpha.shape[-1], str(x.v.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(implementation, spec, x: Inputs, initial_memory, initial_state, segment_ids):
  """The op on one device's rows and heads."""
  acc = functools.reduce(jnp.promote_types, (a.dtype for a in x), jnp.dtype(jnp.float32))
  (b, t, h, d), m, width = x.q.shape, x.alpha.shape[-1], x.v.shape[-1]
  memory = initial_memory or (jnp.zeros((h, m, d), acc), jnp.zeros((h, m, width), acc))
  memory = tuple(s.astype(acc) for s in memory)
  state = initial_state
  if state is None:
    state = TrellisState.fresh(memory, b, spec.chunk_size)
  else:
    to_acc = lambda s: s.astype(acc) if jnp.issubdtype(s.dtype, jnp.floating) else s
    state = jax.tree.map(to_acc, state)
  x = x._replace(log_beta=x.log_beta.astype(acc), gamma=x.gamma.astype(acc))
  if implementation == "reference" or t == 1:
    return _token_loop(implementation, spec, memory, state, x, segment_ids)

  slots = lambda tokens: math.ceil(tokens / spec.chunk_size) * spec.chunk_size
  grid, anchor = None, None
  if segment_ids is None and (initial_state is None or spec.chunk_size == 1):
    on_grid = jax.tree.map(lambda a: pad_tail(a, slots(t)), x)
  else:
    entered = 0 if initial_state is None else spec.chunk_size - 1
    live = jnp.ones((b, t), bool) if segment_ids is None else segment_ids != 0
    grid = Grid.of(live, state.offset, slots(t + entered))
    on_grid = jax.tree.map(grid.spread, x)
  start = (state.memory_k, state.memory_v)
  if initial_state is not None and spec.chunk_size > 1:
    fresh_chunk = (state.offset == 0)[:, None, None, None]
    anchor = tuple(
      jnp.where(fresh_chunk, s, a) for s, a in zip(start, (state.anchor_k, state.anchor_v))
    )
  rows, offset, segment = rows_of(grid, segment_ids, state, t, spec.chunk_size)
  o, end, kept = _on_grid(implementation, spec, on_grid, start, anchor, memory, rows)
  o = o[:, :t] if grid is None else grid.collect(o)
  anchors = (None, None)
  if spec.chunk_size > 1:
    closed = (offset == 0)[:, None, None, None]
    anchors = tuple(jnp.where(closed, s, a) for s, a in zip(end, kept))
  return o, TrellisState(*end, *anchors, offset=offset, segment=segment)


def _token_loop(implementation, spec, memory, state, x: Inputs, segment_ids):
  """The definition, token by token, and a single token of any implementation."""
  b, t = x.q.shape[:2]
  acc = state.memory_k.dtype
  if segment_ids is None:
    segment_ids = jnp.broadcast_to(jnp.maximum(state.segment, 1)[:, None], (b, t))
  tokens = (*(a.astype(acc) for a in x), segment_ids)
  if t == 1:
    step = reference.step
    if acc == jnp.float32 and backends.steps(implementation, spec, _shapes(x)):
      step = functools.partial(_step, implementation)
    state, o = step(spec, memory, state, tuple(a[:, 0] for a in tokens))
    o = o[:, None]
  else:
    o, state = reference.forward(spec, memory, state, tokens)
  return o.astype(x.v.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _step(implementation, spec, memory, state, token):
  """One token as a backend takes it; the derivative is the definition's."""
  return backends.load(implementation).step(spec, memory, state, token)


_step.defvjp(
  lambda implementation, spec, *args: (_step(implementation, spec, *args), args),
  lambda _, spec, args, cts: jax.vjp(functools.partial(reference.step, spec), *args)[1](cts),
)


def _on_grid(implementation, spec, inputs, start, anchor, init, rows):
  """Runs the chunks: one entered midway as a scan's body, the others as the backend does."""
  widths = backends.widths(implementation, spec, _shapes(inputs))
  run = functools.partial(filled.over, functools.partial(_run, implementation, spec), widths)
  if anchor is None:
    return run(inputs, start, init, rows)
  c = spec.chunk_size
  first, rest = (jax.tree.map(lambda x: x[:, at], inputs) for at in (slice(c), slice(c, None)))
  entered = jax.checkpoint(chunked.entered_chunk, static_argnums=0)
  o, end, kept = entered(spec, first, start, anchor, init, rows)
  if not rest.q.shape[1]:
    return o, end, kept
  restarts = None if rows.run is None else rows.run[:, c:] - rows.run[:, c - 1 : c]
  later = rows.last > 0
  o_rest, end, kept_rest = run(rest, end, init, chunked.Rows(restarts, rows.last - 1))
  pick = lambda a, b: jnp.where(later[:, None, None, None], a, b)
  return jnp.concatenate([o, o_rest], axis=1), end, jax.tree.map(pick, kept_rest, kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(implementation, spec, inputs, start, init, rows):
  """Runs a backend on the grid; its own `backward` is the derivative, for all of them."""
  return backends.load(implementation).forward(spec, inputs, start, init, rows, False)[:3]


def _run_forward(implementation, spec, inputs, start, init, rows):
  *out, saved = backends.load(implementation).forward(spec, inputs, start, init, rows, True)
  return tuple(out), (inputs, start, init, rows, saved)


def _run_backward(implementation, spec, saved, cts):
  return (*backends.load(implementation).backward(spec, *saved, cts), None)


_run.defvjp(_run_forward, _run_backward)
