r"""Implementation "triton_gpu": Pallas-Triton kernels for NVIDIA GPUs, Hopper first.

The forward is two launches: the sequential evolution of both memories (`_triton_evolve`), then all
reads in parallel (`_triton_readout`). The backward is four: the reads' of values and of keys in
parallel (`_triton_readout_backward`), the reverse evolution, the gradients of what was written in
parallel (`_triton_writes_backward`). Linearised chunks have one launch more each way
(`_triton_solvers`) and, backward, a second one of what was written. What is small per token, the
decays, is left to XLA. A single token is one launch (`_triton_step`).

Operands of the products and what goes through memory have v's dtype; memories, decays, normalisers
and sums are fp32. With fp32 operands the products are TF32 by default, as JAX's own are on these
GPUs, and three TF32 products with precision "high" or "highest".
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _one_token, _support
from pallas_kernels import _triton_call as launch
from pallas_kernels import _triton_decays as decays
from pallas_kernels import _triton_evolve as evolve
from pallas_kernels import _triton_kept as kept_memory
from pallas_kernels import _triton_readout as readout
from pallas_kernels import _triton_readout_backward as readout_backward
from pallas_kernels import _triton_solvers as solvers
from pallas_kernels import _triton_step as one_token
from pallas_kernels import _triton_writes_backward as writes_backward
from pallas_kernels._triton_call import BLOCK, Plan, interpreted

__all__ = ["backward", "forward", "interpreted", "step", "supports", "widths"]

widths = _support.widths


def supports(spec, shapes) -> str | None:
  """Returns None, or every reason why the kernels cannot run this call here."""
  platforms = None if launch.interpreting() else ("gpu", "cuda")
  return _support.reasons(spec, shapes, platforms)


def _prepare(spec, inputs, rows):
  """Returns (plan, inputs padded to whole blocks, gates [B H N] in fp32, run or None)."""
  plan = Plan.of(spec, inputs.v.dtype, rows.run is not None)
  slots = inputs.q.shape[1]
  more = -slots % BLOCK
  pad = lambda x, **kw: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), **kw)
  run = rows.run
  if more:
    inputs = jax.tree.map(pad, inputs)
    run = None if run is None else pad(run, mode="edge")
  gates = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (inputs.log_beta, inputs.gamma))
  return plan, inputs, *gates, run


def _solvers(plan, x, log_beta, gamma, run, back: bool):
  """Returns what both passes of linearised chunks are solved with, () for stale ones."""
  if not plan.curvature:
    return ()
  return solvers.make(plan, x.k, x.v, solvers.scalars(plan, log_beta, gamma, run), back)


def _survives(plan, chunks, last):
  """Returns whether the chunk `last` [B] has no restart, [B 1 1 1]; True without any."""
  if not plan.runs:
    return True
  by_chunk = chunks[:, 0, evolve.SURVIVES] > 0
  at = jnp.clip(last, 0, by_chunk.shape[1] - 1)[:, None]
  return jnp.take_along_axis(by_chunk, at, axis=1)[:, :, None, None]


def forward(spec, inputs, start, init, rows, save: bool):
  """Returns (o [B N H V], end, kept, saved), as `trellis_jax/ops/chunked.py` says.

  `saved` is (g U, Z, Y, memories at the block starts).
  """
  plan, x, log_beta, gamma, run = _prepare(spec, inputs, rows)
  tokens, chunks = evolve.scalars(plan, log_beta, gamma, run)
  solver, last = _solvers(plan, x, log_beta, gamma, run, False), rows.last.astype(jnp.int32)
  gu, z, states, end, kept = evolve.forward(
    plan, x.k, x.v, x.alpha, tokens, chunks, last, start, init, solver, save
  )
  by_token = readout.scalars(plan, log_beta, run)
  operands = tuple(s.astype(plan.operand) for s in init)
  o, y = readout.forward(plan, x.q, x.k, x.v, gu, by_token, states, operands, save)
  if plan.runs:
    survives = _survives(plan, chunks, rows.last)
    kept = tuple(jnp.where(survives, s, s0[None]) for s, s0 in zip(kept, init))
  return o[:, : inputs.q.shape[1]], end, kept, (gu, z, y, states) if save else None


def backward(spec, inputs, start, init, rows, saved, cts):
  """Returns the cotangents of (inputs, start, init) for those of (o, end, kept)."""
  o_bar, end_bar, kept_bar = cts
  gu, z, y, states = saved
  plan, x, log_beta, gamma, run = _prepare(spec, inputs, rows)
  slots = inputs.q.shape[1]
  o_bar = jnp.pad(o_bar, [(0, 0), (0, x.q.shape[1] - slots), (0, 0), (0, 0)])
  by_token = readout.scalars(plan, log_beta, run)
  operands = tuple(s.astype(plan.operand) for s in init)
  v_bar, gu_v_bar, s_v_bar, y_bar, parts, init_v_bars = readout_backward.values(
    plan, y, x.v, gu, by_token, states[1], operands[1], o_bar
  )
  q_bar, k_bar, gu_k_bar, s_k_bar, more, init_k_bars = readout_backward.keys(
    plan, x.q, x.k, gu, by_token, states[0], operands[0], y_bar
  )
  parts = parts + more
  tokens, chunks = evolve.scalars(plan, log_beta, gamma, run)
  init_bar = [jnp.zeros_like(s) for s in init]
  if plan.runs:
    init_bar = [jnp.sum(s, axis=(0, 2)) for s in (init_k_bars, init_v_bars)]

  survives = _survives(plan, chunks, rows.last)
  chunk_count = slots // plan.chunk
  here = ((rows.last >= 0) & (rows.last < chunk_count))[:, None, None, None]
  last = jnp.clip(rows.last, 0, chunk_count - 1)
  w_bar, log_beta_bar = [k_bar, v_bar], jnp.zeros_like(log_beta)
  gu_bar, states_bar = [gu_k_bar, gu_v_bar], [s_k_bar, s_v_bar]
  for i, w in enumerate((x.k, x.v)):
    mine = jnp.where(here & survives, kept_bar[i], 0)
    more, add = kept_memory.backward(plan, last, mine, run, states[i], init[i], w, gu[i], log_beta)
    init_bar[i] += more + jnp.sum(jnp.where(here & ~jnp.asarray(survives), kept_bar[i], 0), axis=0)
    states_bar[i], w_bar[i], gu_bar[i], log_beta_bar = add(
      states_bar[i], w_bar[i], gu_bar[i], log_beta_bar
    )

  cotangents, ends_bar, start_bar = evolve.reverse(
    plan,
    x.k,
    x.v,
    x.alpha,
    tokens,
    chunks,
    z,
    gu_bar,
    states_bar,
    end_bar,
    _solvers(plan, x, log_beta, gamma, run, True),
  )

  def written(plan, ends_bar, w_bar, follow):
    by_token = writes_backward.scalars(plan, log_beta, gamma, run)
    saved = by_token, gu, z, cotangents, states, ends_bar, operands
    return writes_backward.backward(plan, x.k, x.v, x.alpha, *saved, *w_bar, follow)

  k_bar, v_bar, alpha_bar, gamma_bar, at, before, init_bars = written(plan, ends_bar, w_bar, False)
  log_beta_bar += _gates_bar(plan, log_beta, run, parts + at, before)
  more_init = [init_bars]
  if plan.curvature and plan.rho:
    one, none = plan._replace(chunk=1), jax.tree.map(jnp.zeros_like, ends_bar)
    k_bar, v_bar, _, _, at, before, init_bars = written(one, none, (k_bar, v_bar), True)
    log_beta_bar += _gates_bar(one, log_beta, run, at, before)
    more_init.append(init_bars)
  if plan.runs:
    for init_bars in more_init:
      init_bar = [s + jnp.sum(more, axis=(0, 2)) for s, more in zip(init_bar, init_bars)]
  back = lambda g, like: jnp.swapaxes(g, 1, 2).astype(like.dtype)
  grads = x._replace(
    q=q_bar.astype(x.q.dtype),
    k=k_bar.astype(x.k.dtype),
    v=v_bar,
    alpha=alpha_bar,
    log_beta=back(log_beta_bar, x.log_beta),
    gamma=back(gamma_bar, x.gamma),
  )
  return jax.tree.map(lambda g: g[:, :slots], grads), start_bar, tuple(init_bar)


def step(spec, memory, state, token):
  """Returns (state after one token, o [B H V] in fp32), as `trellis_jax/ops/reference.py` says."""
  launch = functools.partial(one_token.step, Plan.of(spec, jnp.float32, runs=False))
  return _one_token.step(launch, spec, memory, state, token)


def _gates_bar(plan, log_beta, run, parts, before):
  """Returns log_beta's gradient from its parts at a token and at the token before its chunk."""
  by_block = decays.of(log_beta, run, BLOCK)
  parts = parts.reshape(by_block.hi.shape)
  b, h, n, _ = parts.shape
  by_chunk = jnp.sum(before.reshape(b, h, n, -1, plan.chunk), axis=-1)
  ahead = jnp.pad(by_chunk[..., 1:], [(0, 0)] * 3 + [(0, 1)])
  last = jnp.zeros((b, h, n, BLOCK // plan.chunk, plan.chunk)).at[..., -1].set(ahead)
  parts = parts + last.reshape(parts.shape)
  return decays.total(parts, by_block.first).reshape(log_beta.shape)
