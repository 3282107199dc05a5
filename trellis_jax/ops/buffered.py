r"""Chunks that are whole: a recurrence whose state is its memory at the start of the open chunk.

A recurrence that takes its directions at the chunk's start (a fast network's gradients, a slot's
tangent space) is a function of whole chunks:

  (memory at the end, outputs) = step(memory at the start, tokens of the chunk)

Any split of a sequence is exact when the state holds the memory at the start of the chunk that is
still open, and what has been written in it so far: up to C - 1 tokens. The next call lays them in
front of its own tokens and computes the open chunk again.

Restarts. Tokens see only tokens of their own run. A run that begins inside a chunk starts from
`init` there, as if that were the memory at the chunk's start, and only the chunk's last run lives
on. So a document that starts on a chunk boundary is what it is alone; one that starts inside a
chunk is short of the chunk's earlier places, nothing else.

A token of zeros must be neutral to `step`: it neither writes nor decays. Such tokens stand for
those of earlier runs of the open chunk, which nothing sees any more.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from trellis_jax import sharding
from trellis_jax.ops.decay import Runs
from trellis_jax.ops.grid import Grid
from trellis_jax.typing import Array

# (memory [B ...], init [1 ...], written [B C ...], read [B C ...], runs) -> (memory, out [B C ...])
Step = Callable[[Any, Any, Any, Any, Runs | None], tuple[Any, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkState:
  """What `over_chunks` carries from call to call.

  Attributes:
    memory: at the start of the open chunk, leaves [B, H, ...].
    written: the last run's tokens in the open chunk, leaves [B, C-1, H, ...], the rest zeros.
    offset: tokens of the open chunk, 0 .. C - 1.
  """

  memory: Any
  written: Any
  offset: Int[Array, " B"]

  @classmethod
  def fresh(cls, init: Any, token: Any, batch: int, chunk_size: int) -> "ChunkState":
    """Returns the state of `batch` rows before their first token.

    Args:
      init: the memory that sequences start from, leaves [H, ...].
      token: shape of each array of a written token.
      batch: B.
      chunk_size: C.
    """
    dtype = jax.tree.leaves(init)[0].dtype
    memory = jax.tree.map(lambda s: jnp.broadcast_to(s[None], (batch, *s.shape)), init)
    zeros = lambda shape: jnp.zeros((batch, chunk_size - 1, *shape), dtype)
    written = jax.tree.map(zeros, token, is_leaf=_is_shape)
    return cls(memory, written, jnp.zeros((batch,), jnp.int32))


def _is_shape(x) -> bool:
  return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def size(memory: Any, token: Any, chunk_size: int) -> int:
  """Returns the floats of one row's state, for the shapes of the memory's and a token's arrays."""
  floats = lambda shapes: sum(map(math.prod, jax.tree.leaves(shapes, is_leaf=_is_shape)))
  return floats(memory) + (chunk_size - 1) * floats(token)


def over_chunks(
  step: Step,
  init: Any,
  state: ChunkState,
  written: Any,
  read: Any,
  *,
  run: Int[Array, "B T"] | None,
  count: Int[Array, " B"] | None,
  chunk_size: int,
  fresh: bool = False,
) -> tuple[Array, ChunkState]:
  """Runs a recurrence over the tokens of a call.

  Args:
    step: one chunk of the recurrence.
    init: the memory after a restart, leaves [H, ...].
    state: before the tokens.
    written, read: the tokens' arrays [B, T, H, ...] that later tokens depend on, and the others.
    run: number of restarts up to each token, 0 for tokens of the state's run; None: none.
    count: live tokens of each row, which stand in front of the padding; None: all.
    chunk_size: C.
    fresh: whether all rows are known to begin a chunk, which saves the room in front.

  Returns:
    (the outputs [B, T, ...], 0 at padding; the state after the last live token).
  """
  tokens = jax.tree.leaves(written)[0]
  batch, length = tokens.shape[:2]
  init = sharding.along(init, tokens, (2,))
  written, read = (sharding.along(x, tokens, (0, None, 2)) for x in (written, read))
  state = ChunkState(
    sharding.along(state.memory, tokens, (0, 2)),
    sharding.along(state.written, tokens, (0, None, 2)),
    sharding.along(state.offset, tokens, (0,)),
  )
  groups, per_group = _grouped(length + (0 if fresh else chunk_size - 1), chunk_size)
  slots = groups * per_group * chunk_size
  live = jnp.ones((batch, length), bool)
  if count is not None:
    live = jnp.arange(length)[None] < count[:, None]
  grid = Grid.of(sharding.along(live, tokens, (0,)), state.offset, slots)
  open_chunk = lambda x: jnp.pad(x, [(0, 0), (0, slots - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  # Each slot has a token of the call, or an earlier one, or none: the others are zeros.
  lay = lambda x, before: grid.spread(x.astype(before.dtype)) + open_chunk(before)
  if fresh:
    lay = lambda x, before: grid.spread(x.astype(before.dtype))
  written = jax.tree.map(lay, written, state.written)
  end = state.offset + (length if count is None else count)
  done = end // chunk_size
  run = None if run is None else _fill(grid.spread(run), state.offset, end)

  first = jax.tree.map(lambda s: s[None], init)
  cut = lambda x: jnp.swapaxes(x.reshape(batch, -1, chunk_size, *x.shape[2:]), 0, 1)
  xs = jax.tree.map(cut, (written, jax.tree.map(grid.spread, read), run))
  xs = (jnp.arange(groups * per_group), *xs, _entries(run, chunk_size))
  xs = jax.tree.map(lambda x: x.reshape(groups, per_group, *x.shape[1:]), xs)

  def body(memory, x):
    i, written, read, run, entry = x
    runs = None if run is None else Runs.of(run, entry)
    after, out = step(memory, first, written, read, runs)
    # Rows end at different chunks; what the empty slots behind an end make is dropped.
    whole = i < done
    return _select(whole, after, memory), out

  # The backward keeps the memories at the groups' starts, and one group's steps at a time.
  group = jax.checkpoint(lambda memory, xs: jax.lax.scan(body, memory, xs), prevent_cse=False)
  memory, out = jax.lax.scan(group, state.memory, xs)
  out = jnp.moveaxis(out, 2, 0)
  out = grid.collect(out.reshape(batch, slots, *out.shape[4:]))

  at = done[:, None] * chunk_size + jnp.arange(chunk_size - 1, dtype=jnp.int32)[None]
  keep, at = at < end[:, None], jnp.minimum(at, slots - 1)
  if run is not None:
    final, entry = _at(run, end - 1), _at(run, done * chunk_size - 1)
    memory = _select(final == entry, memory, first)
    keep = keep & (jnp.take_along_axis(run, at, axis=1) == final[:, None])
  written = jax.tree.map(lambda x: _take(x, at, keep), written)
  return out, ChunkState(memory, written, end % chunk_size)


def _grouped(num_tokens: int, chunk_size: int) -> tuple[int, int]:
  """Returns (groups, chunks of a group), about as many of the one as of the other."""
  chunks = math.ceil(num_tokens / chunk_size)
  groups = math.isqrt(chunks)
  return groups, math.ceil(chunks / groups)


def _fill(run, offset, end):
  """Returns run numbers on the grid, 0 ahead of the call's tokens and the last one's after them."""
  slot = jnp.arange(run.shape[1])[None]
  run = jnp.where((slot >= offset[:, None]) & (slot < end[:, None]), run, 0)
  return jax.lax.cummax(run, axis=1)


def _entries(run, chunk_size: int):
  """Returns the run that enters each chunk [n B], 0 for the first; None without runs."""
  if run is None:
    return None
  return jnp.pad(run[:, chunk_size - 1 : -1 : chunk_size], [(0, 0), (1, 0)]).T


def _at(run, slot):
  """Returns run [B N] at slot [B], 0 for a slot ahead of the first."""
  found = jnp.take_along_axis(run, jnp.maximum(slot, 0)[:, None], axis=1)[:, 0]
  return jnp.where(slot >= 0, found, 0)


def _take(x, at, keep):
  """Returns x [B N ...] at the slots `at` [B L], 0 where not `keep`."""
  wide = lambda m: m.reshape(*m.shape, *(1,) * (x.ndim - 2))
  return jnp.where(wide(keep), jnp.take_along_axis(x, wide(at), axis=1), 0)


def _select(rows, x, other):
  """Returns the pytree x in the rows [B] and `other` elsewhere."""
  wide = lambda a: rows.reshape(-1, *(1,) * (a.ndim - 1))
  return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), x, other)
