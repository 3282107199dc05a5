r"""The memory at the start of the row's last chunk, and what its cotangent gives, in plain JAX.

The forward stores that memory as it passes by. Its cotangent goes into one block of BLOCK tokens,
in which the memory is linear: with S at the block's start and the decays to the token before the
chunk,

  kept = carry S - sum_{s before the chunk} pair_s (g U)_s w_s^T.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._triton_call import BLOCK


def _block(x, block, axis: int):
  """Returns, of every row, the slots of block [B] along `axis`, cut to BLOCK tokens."""
  x = x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])
  return jax.vmap(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, axis - 1, keepdims=False))(
    x, block
  )


def _add(x, part, block, axis: int):
  """Returns x with `part` added where `_block` took it."""
  whole = x.shape
  x = x.reshape(*whole[:axis], -1, BLOCK, *whole[axis + 1 :])
  put = lambda x, part, i: jnp.moveaxis(jnp.moveaxis(x, axis - 1, 0).at[i].add(part), 0, axis - 1)
  return jax.vmap(put)(x, part.astype(x.dtype), block).reshape(whole)


def _kept(before, run, state, init, w, gu, log_beta):
  """Returns the memory [B H M W] after `before` [B] tokens of a block, all arguments its own."""
  slots = jnp.arange(BLOCK, dtype=jnp.int32)[None]
  seen = slots < before[:, None]
  entered = jnp.ones_like(before, dtype=bool)
  if run is not None:
    entry, run = run
    at = jnp.take_along_axis(run, jnp.maximum(before - 1, 0)[:, None], axis=1)
    entered = (before == 0) | (at[:, 0] == entry)
    seen = seen & (run == at)
  terms = jnp.where(seen[:, None], log_beta, 0)
  after = jnp.flip(jnp.cumsum(jnp.flip(terms[..., 1:], -1), axis=-1), -1)
  after = jnp.pad(after, [(0, 0), (0, 0), (0, 1)])
  pair = jnp.where(seen[:, None], jnp.exp(after), 0)
  carry = jnp.exp(jnp.sum(terms, axis=-1))[..., None, None]
  base = jnp.where(entered[:, None, None, None], state, init[None])
  return carry * base - jnp.einsum("bhs,bhsm,bshw->bhmw", pair, gu, w)


def backward(plan, last, kept_bar, run, states, init, w, gu, log_beta):
  """Returns functions that add what `kept_bar` of one pass gives, and what is new.

  Args:
    plan: the static choices.
    last: the chunk [B] at whose start the memory was kept, within the row.
    kept_bar: [B H M W].
    run: [B N] or None.
    states: [B H blocks M W] at the block starts.
    init: [H M W].
    w: keys or values [B N H W].
    gu: g U [B H N M].
    log_beta: [B H N].

  Returns:
    (init_bar [H M W], function of (states_bar, w_bar, gu_bar, log_beta_bar) that adds to each).
  """
  block, before = last * plan.chunk // BLOCK, last * plan.chunk % BLOCK
  state = jnp.take_along_axis(states, block[:, None, None, None, None], axis=2)[:, :, 0]
  if run is not None:
    entry = jnp.take_along_axis(run, jnp.maximum(block * BLOCK - 1, 0)[:, None], axis=1)[:, 0]
    run = jnp.where(block > 0, entry, 0), _block(run, block, 1)
  fp32 = lambda x: x.astype(jnp.float32)
  args = state, init, _block(w, block, 1), _block(gu, block, 2), _block(log_beta, block, 2)
  _, pull = jax.vjp(lambda *args: _kept(before, run, *args), *map(fp32, args))
  state_bar, init_bar, *rest = pull(kept_bar)

  def add(states_bar, w_bar, gu_bar, log_beta_bar):
    at = jax.vmap(lambda x, part, i: x.at[:, i].add(part))
    states_bar = at(states_bar, state_bar.astype(states_bar.dtype), block)
    if plan.chunk == BLOCK:
      return states_bar, w_bar, gu_bar, log_beta_bar
    adds = zip((w_bar, gu_bar, log_beta_bar), rest, (1, 2, 2))
    return states_bar, *(_add(x, part, block, axis) for x, part, axis in adds)

  return init_bar, add
