"""Backend "mosaic_tpu": both passes in one Pallas kernel for TPUs (v5e, v5p, v6e and newer).

The forward goes through a row's chunks with both memories in VMEM; the backward goes through them
in reverse, from the chunk starts that the forward saved, and computes the rest again. Products take
bfloat16 operands where q, k, v and alpha all are bfloat16 (or the call's precision is DEFAULT) and
are of full fp32 precision otherwise; sums, memories, gates and activations are fp32 always. The
saved starts are kept as the products take them. A single token is a kernel of its own, in fp32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import (
  _one_token,
  _support,
  _tpu_backward,
  _tpu_forward,
  _tpu_layout,
  _tpu_step,
)
from pallas_kernels import _tpu_plan as plans

widths = _support.widths


def supports(spec, shapes) -> str | None:
  """Returns None, or every reason why the kernels cannot run this call here."""
  return _support.reasons(spec, shapes, None if plans.interpret() else ("tpu",))


def kernel_arrays(plan, inputs, gates, start, init):
  """Returns the kernels' arrays: (tokens and gates, keep, renew, start, init)."""
  tokens = tuple(_tpu_layout.tokens(plan, x) for x in inputs[:4])
  lanes = lambda x: tuple(_tpu_layout.on_lanes(x, w) for w in (plan.D, plan.V))
  memory = lambda s: tuple(_tpu_layout.memory(plan, x) for x in s)
  if gates.renew is None:
    return (*tokens, gates.rows), lanes(gates.keep), (), memory(start), ()
  return (*tokens, gates.rows), lanes(gates.keep), lanes(gates.renew), memory(start), memory(init)


def kernel_gates(plan, log_beta, gamma, run):
  pad = lambda x, **kw: _tpu_layout.pad_slots(plan, x, **kw)
  run = None if run is None else pad(run, mode="edge")
  return _tpu_layout.gates(plan, pad(log_beta), pad(gamma), run)


def _survives(run, last, chunk: int):
  """Whether no restart lies in each row's last chunk: [B 1 1 1]."""
  before = jnp.pad(run, ((0, 0), (1, 0)))[:, : run.shape[1] : chunk]
  end = run[:, chunk - 1 :: chunk]
  at = jnp.take_along_axis(end == before, last[:, None], axis=1)
  return at[:, :, None, None]


def forward(spec, inputs, start, init, rows, save: bool):
  """Returns (o [B N H V], end, kept, saved); see `trellis_jax.ops.backends` for the contract."""
  plan = plans.make(spec, inputs, *_tpu_forward.SIZE[spec.chunk_size])
  gates = kernel_gates(plan, inputs.log_beta, inputs.gamma, rows.run)
  arrays = kernel_arrays(plan, inputs, gates, start, init)
  o, end, kept, saved = _tpu_forward.call(plan, spec, arrays, rows.last, save)
  back = lambda pair: tuple(
    _tpu_layout.from_memory(plan, s, like.dtype) for s, like in zip(pair, start)
  )
  end, kept = back(end), back(kept)
  if rows.run is not None:
    survives = _survives(rows.run, rows.last, spec.chunk_size)
    kept = tuple(jnp.where(survives, s, s0[None].astype(s.dtype)) for s, s0 in zip(kept, init))
  return _tpu_layout.from_tokens(plan, o, inputs.q.shape[1]), end, kept, saved


def backward(spec, inputs, start, init, rows, saved, cts):
  """Returns the cotangents of (inputs, start, init) for those of (o, end, kept)."""
  plan = plans.make(spec, inputs, *_tpu_backward.SIZE[spec.chunk_size])
  o_bar, end_bar, kept_bar = cts
  slots = inputs.q.shape[1]
  gates, pull = jax.vjp(
    lambda log_beta, gamma: kernel_gates(plan, log_beta, gamma, rows.run),
    inputs.log_beta,
    inputs.gamma,
  )
  init_bar = tuple(jnp.zeros_like(s) for s in init)
  if rows.run is not None:
    survives = _survives(rows.run, rows.last, spec.chunk_size)
    init_bar = tuple(jnp.sum(jnp.where(survives, 0, s), axis=0) for s in kept_bar)
    kept_bar = tuple(jnp.where(survives, s, 0) for s in kept_bar)
  arrays = kernel_arrays(plan, inputs, gates, start, init)
  memory = lambda pair: tuple(_tpu_layout.memory(plan, s) for s in pair)
  cts = _tpu_layout.tokens(plan, o_bar), memory(end_bar), memory(kept_bar)
  saved = tuple(
    _tpu_layout.fit_lanes(s, plan.heads[1] * w) for s, w in zip(saved, (plan.D, plan.V))
  )
  out = _tpu_backward.call(plan, spec, arrays, rows.last, saved, cts)
  (*tokens, gates_bar), keep_bar, renew_bar, start_bar, more = out
  per_head = lambda pair: sum(
    jnp.sum(x.reshape(*x.shape[:2], plan.heads[1], -1), axis=-1) for x in pair
  )
  gates_bar = _tpu_layout.Gates(
    gates_bar, per_head(keep_bar), per_head(renew_bar) if renew_bar else None
  )
  log_beta_bar, gamma_bar = pull(gates_bar)
  back = lambda s, like: _tpu_layout.from_memory(plan, s, like.dtype)
  start_bar = tuple(back(s, like) for s, like in zip(start_bar, start))
  if more:
    init_bar = tuple(s + jnp.sum(back(x, s), axis=0) for s, x in zip(init_bar, more))
  tokens = (_tpu_layout.from_tokens(plan, x, slots) for x in tokens)
  return type(inputs)(*tokens, log_beta_bar, gamma_bar), start_bar, init_bar


def step(spec, memory, state, token):
  """Returns (state after one token, o [B H V] in fp32), as `trellis_jax/ops/reference.py` says."""
  return _one_token.step(functools.partial(_tpu_step.call, spec), spec, memory, state, token)
