r"""Slots on the unit sphere, each taking only what is orthogonal to it: the chunked form.

M slots s_i of unit norm decode a code k in R^M to the value sum_j k_j s_j. One gradient step per
token on |sum_j k_j s_j/|s_j| - v|^2 / 2 moves each slot in its tangent space, and the slot goes
back to the sphere (Karami et al., "Lattice", 2025, the orthogonal state recurrence):

  e = sum_j k_j s_j - v,   s_i <- norm(s_i - g k_i (I - s_i s_i^T) e),   o = sum_i q_i s_i

Inside a chunk the slots S of its start stand in e and in the projection, and a slot that has been
written moves in its tangent plane; what a token reads is taken back to the sphere. With writes
w_si = g_s k_si and p_si = s_i . e_s, for tokens s <= t of one run:

  slot i seen by t = (s_i + a_ti) / n_ti,   a_ti = -sum_s w_si (e_s - s_i p_si)
  n_ti^2 = 1 + |sum_s w_si e_s|^2 - (sum_s w_si p_si)^2
  o_t = sum_i (q_ti / n_ti) (1 + sum_s w_si p_si) s_i - sum_s (sum_i q_ti w_si / n_ti) e_s

so neither the slots nor the norms of a token are formed beyond [C, M]. The chunk ends in the slots
that its last token sees. C = 1 is the published recurrence.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.ops import buffered, decay
from trellis_jax.ops.token_loop import Recurrence
from trellis_jax.typing import Array, Gates, Values


def lattice(
  init: Float[Array, "H M V"],
  q: Float[Array, "B T H M"],
  k: Float[Array, "B T H M"],
  v: Values,
  step: Gates,
  *,
  state: buffered.ChunkState | None = None,
  fresh: bool = False,
  run: Array | None = None,
  count: Array | None = None,
  chunk_size: int = 16,
) -> tuple[Float[Array, "B T H V"], buffered.ChunkState]:
  """Writes values under codes into unit slots and reads them, token by token.

  Args:
    init: slots that sequences and restarts begin with; taken to unit norm here.
    q, k: codes of reads and writes.
    v: values.
    step: g.
    state: what an earlier call returned, to go on from; None begins with `init`.
    fresh: whether all rows of the state begin a chunk, which saves a little.
    run, count: restarts and live tokens, as in `buffered.over_chunks`.
    chunk_size: C; 1 is the exact recurrence.

  Returns:
    (o, in fp32 or wider; the state).
  """
  acc = functools.reduce(jnp.promote_types, (x.dtype for x in (q, k, v)), jnp.dtype(jnp.float32))
  slots = unit(init.astype(acc))
  fresh = fresh or state is None
  if state is None:
    state = initial_state(slots, q.shape[0], chunk_size)
  return buffered.over_chunks(
    _chunk,
    slots,
    state,
    tuple(x.astype(acc) for x in (k, v, step)),
    q.astype(acc),
    run=run,
    count=count,
    chunk_size=chunk_size,
    fresh=fresh,
  )


def unit(x: Float[Array, "... V"]) -> Float[Array, "... V"]:
  """Returns x / |x|, the same direction whatever its length."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True))


def token_shapes(num_heads: int, num_slots: int, value_dim: int):
  """Returns the shapes of what a token writes, as `ChunkState.written` holds it."""
  return (num_heads, num_slots), (num_heads, value_dim), (num_heads,)


def initial_state(slots: Float[Array, "H M V"], batch: int, chunk_size: int):
  """Returns the state of `batch` rows before their first token, for unit slots."""
  return buffered.ChunkState.fresh(slots, token_shapes(*slots.shape), batch, chunk_size)


def _chunk(slots, init, written, q, runs: decay.Runs | None):
  """One chunk: (slots at the end, outputs [B C H V]); see `buffered.over_chunks`."""
  k, v, step = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), written)
  q = jnp.swapaxes(q, 1, 2)
  length = q.shape[-2]
  seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
  entered = None
  if runs is not None:
    entered, seen = runs.entered[:, None, :, None], seen & runs.same[:, None]
  sums = seen.astype(q.dtype)

  def at_start(x, contract):
    """`contract` with the slots that each token's run has at the chunk's start."""
    y = contract(x, slots)
    return y if entered is None else jnp.where(entered, y, contract(x, init))

  decode, encode = lambda x, s: x @ s, lambda x, s: x @ jnp.swapaxes(s, -1, -2)
  e = at_start(k, decode) - v
  w, p = step[..., None] * k, at_start(e, encode)
  along = sums @ (w * p)
  # |sum_s w_si e_s|^2 grows by each token's own square and its products with those before it.
  gram = encode(e, e)
  own = jnp.sum(e * e, -1, keepdims=True)
  earlier = jnp.where(jnp.eye(length, dtype=bool)[None, None], 0, sums * gram) @ w
  square = sums @ (w * (2 * earlier + w * own))
  scale = jax.lax.rsqrt(1 + square - along * along)
  read = q * scale
  o = at_start(read * (1 + along), decode) - (sums * encode(read, w)) @ e

  start = slots if entered is None else jnp.where(entered[:, :, -1:], slots, init)
  last = lambda x: jnp.swapaxes(x[:, :, -1:], -1, -2)
  added = jnp.swapaxes(w * jnp.swapaxes(sums[:, :, -1:], -1, -2), -1, -2) @ e
  # Unit up to rounding already; again, so that rounding does not add up over chunks.
  end = unit(last(scale) * (start * last(1 + along) - added))
  return end, jnp.swapaxes(o, 1, 2)


def definition(_=None) -> Recurrence:
  """Returns the recurrence of one head token by token, for `token_loop`; a token is (k, v, g)."""

  def update(start, slots, token, place):
    k, v, step = token
    error = jnp.sum(k[:, None] * start, 0) - v
    for_slot = lambda s, k: step * k * (error - s * jnp.dot(s, error))
    return slots - jax.vmap(for_slot)(start, k)

  read = lambda slots, q: jnp.sum(q[:, None] * slots, 0)
  return Recurrence(lambda slots: slots, update, lambda start, slots, place: unit(slots), read)
