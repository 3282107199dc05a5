r"""The definition of recurrences that go by chunks: one row, one head, one token at a time.

A `Recurrence` says what a token does; `token_loop` says, once for all of them, how chunks close
and runs restart. A token's update may look at the memory of the chunk's start; what the token
reads is the memory after its own update.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from trellis_jax.typing import Array


class Recurrence(NamedTuple):
  """One head's recurrence over a chunk, for a memory and token without leading axes.

  open: memory at a chunk's start -> what runs inside the chunk.
  update: (memory at the start, what runs, token, place in the chunk from 0) -> what runs.
  seen: (memory at the start, what runs, place) -> memory that the token reads.
  read: (memory, query) -> output.
  """

  open: Callable[[Any], Any]
  update: Callable[[Any, Any, Any, Any], Any]
  seen: Callable[[Any, Any, Any], Any]
  read: Callable[[Any, Any], Any]


def token_loop(
  recurrence: Callable[[Any], Recurrence],
  params: Any,
  start: Any,
  init: Any,
  written: Any,
  read: Any,
  run: Int[Array, "B T"],
  live: Bool[Array, "B T"],
  chunk_size: int,
) -> tuple[Any, Any]:
  """Returns (outputs [B, T, H, ...], the memory at the start of each row's open chunk).

  Args:
    recurrence: one head's parameters -> its recurrence.
    params: of the heads, leaves [H, ...].
    start, init: memory before the tokens [B, H, ...], after a restart [H, ...].
    written, read: the tokens' arrays [B, T, H, ...].
    run, live: restarts and live tokens [B, T].
    chunk_size: C.
  """

  def step(r, init, carry, token):
    start, running, place, before = carry
    written, read, run, live = token
    restart = live & (run != before)
    start = _where(restart, init, start)
    running = _where(restart, r.open(init), running)
    running_after = r.update(start, running, written, place)
    seen = r.seen(start, running_after, place)
    out = r.read(seen, read)
    closes = place + 1 == chunk_size
    after = (
      _where(closes, seen, start),
      _where(closes, r.open(seen), running_after),
      jnp.where(closes, 0, place + 1),
      run,
    )
    return _where(live, after, carry), jnp.where(live, out, 0)

  @jax.vmap
  def rows(start, written, read, run, live):
    @jax.vmap
    def heads(params, start, init, written, read):
      r, zero = recurrence(params), jnp.zeros((), jnp.int32)
      carry, out = jax.lax.scan(
        functools.partial(step, r, init),
        (start, r.open(start), zero, zero),
        (written, read, run, live),
      )
      return out, carry[0]

    per_head = lambda tree: jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
    out, end = heads(params, start, init, per_head(written), per_head(read))
    return per_head(out), end

  return rows(start, written, read, run, live)


def _where(condition, x, other):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, other)
