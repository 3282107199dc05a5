r"""Implementation "xla": `jax.lax.scan` over chunks, on every platform JAX runs on.

Tokens are taken in blocks of a few chunks. In a block the memories evolve chunk by chunk
(`evolve`; for C = 1 token by token, but without a memory per token: `substitution`), then all
reads of the block are done at once (`readout`). The backward stores the memories at the block
starts and the inputs, and recomputes the rest block by block, so the temporary memory of a
training step grows by M (D + V) / L floats per token and head, L the tokens of a block.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trellis_jax.ops import decay, evolve, readout, substitution
from trellis_jax.ops.blocking import block_tokens
from trellis_jax.ops.spec import Spec

# Chunks under SHORT tokens keep a memory per chunk, so blocks have fewer tokens.
SHORT_BLOCK, SHORT = 64, 16


class Inputs(NamedTuple):
  """The op's arrays on the grid: q, k [B N H D], v [B N H V], alpha [B N H M], gates [B N H]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  alpha: jax.Array
  log_beta: jax.Array
  gamma: jax.Array


class Rows(NamedTuple):
  """Where rows restart and end.

  run: number of restarts up to each slot [B N], or None when there are none.
  last: the chunk [B] that holds the row's last token, whose start becomes the state's anchor.
  """

  run: jax.Array | None
  last: jax.Array


class _Plan(NamedTuple):
  """chunk: tokens of a chunk; read: tokens of a read block; block: tokens of a block."""

  chunk: int
  read: int
  block: int
  blocks: int

  @classmethod
  def of(cls, slots: int, chunk: int) -> "_Plan":
    per_read = math.ceil(SHORT / chunk)
    most = max(1, (block_tokens() if chunk >= SHORT else SHORT_BLOCK) // chunk)
    chunks = slots // chunk
    blocks = max(1, math.ceil(chunks / most))
    each = math.ceil(math.ceil(chunks / blocks) / per_read) * per_read
    return cls(chunk, per_read * chunk, each * chunk, math.ceil(chunks / each))


def supports(spec: Spec, shapes) -> str | None:
  """Returns None: every shape and activation runs."""
  return None


def forward(spec: Spec, inputs: Inputs, start, init, rows: Rows, save: bool):
  """Returns (o [B N H V], end, kept, saved); memories are pairs (S_k, S_v).

  Args:
    spec: the static choices.
    inputs: on the grid, N a multiple of the chunk length; slots that hold no token are zero.
    start: memories [B H M D | V] before slot 0, fp32 or wider.
    init: memories [H M D | V] after a restart.
    rows: restarts and ends.
    save: whether `backward` will be called; saved may be None if not.

  Returns:
    o; end, the memories after slot N; kept, those at the start of the chunk `rows.last` (or zeros
    where a row has none); saved, what `backward` wants to see again: here the block starts.
  """
  plan = _Plan.of(inputs.q.shape[1], spec.chunk_size)
  padded, padded_rows, slots = _pad(plan, inputs, rows)

  def body(carry, i):
    memories, kept, o = carry
    block = _slice(plan, padded, padded_rows, i)
    end, kept, o_block = _block(spec, plan, memories, None, init, kept, *block)
    o = jax.lax.dynamic_update_slice_in_dim(o, o_block, i * plan.block, 1)
    return (end, kept, o), memories if save else None

  carry = (start, jax.tree.map(jnp.zeros_like, start), jnp.zeros_like(padded.v))
  (end, kept, o), starts = jax.lax.scan(body, carry, jnp.arange(plan.blocks))
  return o[:, :slots], end, kept, starts


def backward(spec: Spec, inputs: Inputs, start, init, rows: Rows, saved, cts):
  """Returns the cotangents of (inputs, start, init) for those of (o, end, kept)."""
  o_bar, memories_bar, kept_bar = cts
  plan = _Plan.of(inputs.q.shape[1], spec.chunk_size)
  padded, padded_rows, slots = _pad(plan, inputs, rows)
  o_bar = jnp.pad(o_bar, [(0, 0), (0, padded.q.shape[1] - slots), (0, 0), (0, 0)])
  no_kept = jax.tree.map(jnp.zeros_like, start)

  def body(carry, xs):
    memories_bar, kept_bar, init_bar, grads = carry
    i, memories = xs
    x, *masks = _slice(plan, padded, padded_rows, i)
    run = lambda s, s0, kept, x: _block(spec, plan, s, None, s0, kept, x, *masks)
    _, pull = jax.vjp(run, memories, init, no_kept, x)
    o_bar_block = jax.lax.dynamic_slice_in_dim(o_bar, i * plan.block, plan.block, 1)
    memories_bar, more, kept_bar, x_bar = pull((memories_bar, kept_bar, o_bar_block))
    init_bar = jax.tree.map(jnp.add, init_bar, more)
    put = lambda g, x: jax.lax.dynamic_update_slice_in_dim(g, x, i * plan.block, 1)
    return (memories_bar, kept_bar, init_bar, jax.tree.map(put, grads, x_bar)), None

  zeros = jax.tree.map(jnp.zeros_like, (init, padded))
  (start_bar, _, init_bar, grads), _ = jax.lax.scan(
    body, (memories_bar, kept_bar, *zeros), (jnp.arange(plan.blocks), saved), reverse=True
  )
  return jax.tree.map(lambda g: g[:, :slots], grads), start_bar, init_bar


def entered_chunk(spec: Spec, inputs: Inputs, start, anchor, init, rows: Rows):
  """Returns (o [B C H V], end, kept) of a first chunk whose gradients are taken at `anchor`.

  It goes on with a chunk that an earlier call left unfinished: it starts from `start`, but its
  inner gradients belong to the memory at that chunk's own start.
  """
  plan = _Plan(spec.chunk_size, spec.chunk_size, spec.chunk_size, 1)
  kept = jax.tree.map(jnp.zeros_like, start)
  end, kept, o = _block(spec, plan, start, anchor, init, kept, *_slice(plan, inputs, rows, 0))
  return o, end, kept


def _pad(plan: _Plan, inputs: Inputs, rows: Rows):
  """Returns the inputs and rows with empty slots up to whole blocks, and the slots before that."""
  slots = inputs.q.shape[1]
  more = plan.blocks * plan.block - slots
  if more:
    pad = lambda x, **kw: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), **kw)
    inputs = jax.tree.map(pad, inputs)
    if rows.run is not None:
      rows = rows._replace(run=pad(rows.run, mode="edge"))
  return inputs, rows, slots


def _slice(plan: _Plan, inputs: Inputs, rows: Rows, i):
  """Returns block i: (inputs [B L H ...], run [B L], run before it [B], last chunk in it [B])."""
  at = i * plan.block
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, plan.block, 1)
  last = rows.last - at // plan.chunk
  if rows.run is None:
    return jax.tree.map(cut, inputs), None, None, last
  before = jax.lax.dynamic_slice_in_dim(rows.run, jnp.maximum(at - 1, 0), 1, 1)[:, 0]
  return jax.tree.map(cut, inputs), cut(rows.run), jnp.where(at > 0, before, 0), last


def _block(spec: Spec, plan: _Plan, start, anchor, init, kept, x: Inputs, run, entry, last):
  """Returns (memories at the end, anchors kept, o [B L H V]) of one block of tokens."""
  x_dtype, x = x.v.dtype, jax.tree.map(lambda x: x.astype(start[0].dtype), x)
  runs = _runs(run, entry, plan.read)
  if spec.chunk_size == 1:
    reads = jax.tree.map(lambda x: _cut(x, plan.read), x)
    writes = (reads.k, reads.v)
    gu, read_starts, end = substitution.evolve(
      spec, start, init, writes, reads.alpha, reads.gamma, reads.log_beta, runs
    )
  else:
    chunks = jax.tree.map(lambda x: _cut(x, plan.chunk), x)
    gu, starts, end, kept = _stale(spec, plan, start, anchor, init, kept, chunks, run, entry, last)
    per_read = plan.read // plan.chunk
    reads, gu = jax.tree.map(lambda x: _join(x, per_read), (chunks, gu))
    read_starts = tuple(s[::per_read] for s in starts)
  q, k, v, _, log_beta, _ = reads
  o = readout.readout(spec, q, k, v, *gu, log_beta, read_starts, init, runs)
  n, b, h, r, width = o.shape
  o = o.transpose(1, 0, 3, 2, 4).reshape(b, n * r, h, width)
  return end, kept, o.astype(x_dtype)


def _stale(spec, plan, start, anchor, init, kept, chunks: Inputs, run, entry, last):
  """Returns (g U, chunk starts, end, kept) of chunks whose gradients are taken at their starts."""
  runs = _runs(run, entry, plan.chunk)
  end_decay, total = decay.to_end(chunks.log_beta, runs)
  restarts = None
  if run is not None:
    entered = runs.entered[:, :, None, :, None]
    restarts = evolve.Restarts(entered, entered[:, :, :, -1:])
  writes, ahead = (chunks.k, chunks.v), None
  if spec.curvature:
    ahead = evolve.Ahead(*decay.alike(writes, chunks.log_beta, runs, spec.precision))
  given = evolve.Chunks(writes, chunks.alpha, chunks.gamma, end_decay, total, ahead)
  gu, starts, end = evolve.evolve(spec, start, anchor, init, given, restarts)
  anchors = starts if anchor is None else tuple(a[None] for a in anchor)
  kept = tuple(_keep(k, a, s0, last, restarts) for k, a, s0 in zip(kept, anchors, init))
  return gu, starts, end, kept


def _cut(x, length):
  """[B L H ...] -> [n B H length ...]."""
  x = x.reshape(x.shape[0], -1, length, *x.shape[2:])
  return jnp.moveaxis(x, (1, 3), (0, 2))


def _join(x, count):
  """[n B H C ...] -> [n / count, B H count C ...]."""
  if count == 1:
    return x
  x = x.reshape(-1, count, *x.shape[1:])
  x = jnp.moveaxis(x, 1, 3)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _runs(run, entry, length):
  """Returns the `decay.Runs` of the sub-blocks of `length` tokens, with leading [n B]."""
  if run is None:
    return None
  before = jnp.concatenate([entry[:, None], run[:, :-1]], axis=1)
  cut = run.reshape(run.shape[0], -1, length)
  return decay.Runs.of(jnp.swapaxes(cut, 0, 1), before[:, ::length].T)


def _keep(kept, starts, init, last, restarts):
  """Returns `kept` with the rows whose last token lies in this block set to its chunk's anchor."""
  n = starts.shape[0]
  at = jnp.clip(last, 0, n - 1)[None, :, None, None, None]
  anchor = jnp.take_along_axis(starts, at, axis=0)[0]
  if restarts is not None:
    survives = jnp.take_along_axis(restarts.survives, at, axis=0)[0]
    anchor = jnp.where(survives, anchor, init[None])
  here = (last >= 0) & (last < n)
  return jnp.where(here[:, None, None, None], anchor, kept)
