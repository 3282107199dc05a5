"""Rows of tokens to rows of slots, so that every row's chunks begin at multiples of C.

A row that goes on from a state enters in the middle of a chunk, and padding tokens do not exist:
both shift the tokens of that row. Without either the grid is the sequence itself.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trellis_jax.ops.chunked import Rows
from trellis_jax.ops.state import TrellisState


class Grid(NamedTuple):
  """slot: each token's slot [B T], -1 for padding; token: each slot's token [B N], -1 for none."""

  slot: jax.Array
  token: jax.Array

  @classmethod
  def of(cls, live, offset, num_slots: int) -> "Grid":
    """Lays the live tokens [B T] of each row side by side, from its offset [B] on."""
    slot = jnp.where(live, offset[:, None] + jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1, -1)
    time = jnp.arange(live.shape[1], dtype=jnp.int32)

    # Row by row: a scatter over rows that are sharded has no sharding rule.
    @jax.vmap
    def tokens(live, slot):
      empty = jnp.full((num_slots,), -1, jnp.int32)
      # Padding writes outside of the row, which drops it.
      return empty.at[jnp.where(live, slot, num_slots)].set(time, mode="drop")

    return cls(slot, tokens(live, slot))

  def spread(self, x):
    """[B T ...] -> [B N ...], zero where a slot has no token."""
    return _take(x, self.token, self.slot)

  def collect(self, x):
    """[B N ...] -> [B T ...], zero where a token is padding."""
    return _take(x, self.slot, self.token)


@jax.custom_vjp
def _take(x, index, inverse):
  """Rows of x [B S ...] at index [B S'], 0 at -1; `inverse` [B S] is the way back, for the vjp."""
  shape = (*index.shape, *(1,) * (x.ndim - 2))
  taken = jnp.take_along_axis(x, jnp.maximum(index, 0).reshape(shape), axis=1)
  return jnp.where((index >= 0).reshape(shape), taken, 0)


_take.defvjp(
  lambda x, index, inverse: (_take(x, index, inverse), (index, inverse)),
  lambda saved, ct: (_take(ct, saved[1], saved[0]), None, None),
)


def runs_of(segment, before):
  """Returns the number of restarts up to each token [B T]; `before` [B] is the id ahead of them.

  Padding (id 0) may stand at the end only, as `Grid.spread` leaves it.
  """
  before = jnp.concatenate([before[:, None], segment[:, :-1]], axis=1)
  restart = (segment != 0) & (before != 0) & (segment != before)
  return jnp.cumsum(restart, axis=1, dtype=jnp.int32)


def rows_of(grid: Grid | None, segment, state: TrellisState, num_tokens: int, chunk: int):
  """Returns (`Rows` on the grid, final offset [B], final segment [B]).

  Args:
    grid: the layout, or None when every token is its own slot.
    segment: [B T] ids, or None when all tokens continue the state's segment.
    state: before the tokens.
    num_tokens: T.
    chunk: C.
  """
  offset = state.offset
  if segment is None:
    end = offset + num_tokens
    run, last_segment = None, jnp.maximum(state.segment, 1)
  else:
    slots = grid.spread(segment)
    # Slots before the offset belong to what the state has seen.
    seen = jnp.arange(slots.shape[1])[None] < offset[:, None]
    slots = jnp.where(seen, state.segment[:, None], slots)
    run = runs_of(slots, state.segment)
    count = jnp.sum(segment != 0, axis=1, dtype=jnp.int32)
    end = offset + count
    final = jnp.take_along_axis(slots, jnp.maximum(end - 1, 0)[:, None], axis=1)[:, 0]
    last_segment = jnp.where(count > 0, final, state.segment)
  last = jnp.maximum(end - 1, 0) // chunk
  return Rows(run, last), end % chunk, last_segment.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(1,), inline=True)
def pad_tail(x, num_slots: int):
  """[B T ...] -> [B N ...] with zeros after the tokens."""
  return jnp.pad(x, [(0, 0), (0, num_slots - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
