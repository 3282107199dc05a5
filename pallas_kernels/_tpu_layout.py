r"""Around the TPU kernels: arrays to and from the kernels' layout, in plain JAX.

Tokens keep the order of memory, [B, N, H, W] -> [B, N, H W], with heads of zeros to fill the last
pack and empty chunks to fill the last step; neither writes. Memories become [B, M, H W]. The gates,
a few numbers a token, become rows on the lanes of a pack (`Gate`), [B, gates chunks, H C]; their
gradients come back through JAX's own derivative of `gates`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._tpu_plan import Plan

# exp(-100) is zero in fp32: what erases can be a finite number.
ERASE = -100.0
# Log decays are kept in base 2, as a multiple of 1 / FINE and a rest; a restart takes off 256.
FINE, RESTART = 16.0, 256.0


class Gate:
  """Rows of a token's gates.

  HIGH + LOW: log2 of the decay from the chunk's start through t, where a restart counts 2^-256;
  STEP: the inner step g; END: the decay from after t to the chunk's end; CARRY and FRESH: the
  decay from the chunk's start, or from the restart before t, the other one being 0; ENTERED:
  whether the chunk has no restart before t. Linearised chunks have more: BEFORE_HIGH + BEFORE_LOW,
  as the first two, to just before t; BEHIND: that decay, of t's run, less 1.
  """

  HIGH, LOW, STEP, END, CARRY, FRESH, ENTERED = range(7)
  BEFORE_HIGH, BEFORE_LOW, BEHIND = range(8, 11)


class Gates(NamedTuple):
  """rows [B, gates chunks, H C]; keep, renew [B, chunks, H]: the end's parts of S and of `init`."""

  rows: jax.Array
  keep: jax.Array
  renew: jax.Array | None


def gates(plan: Plan, log_beta, gamma, run) -> Gates:
  """Returns the gates of log_beta and gamma [B, N, H], N = C chunks; run [B, N] or None."""
  b, slots, h = log_beta.shape
  cut = lambda x: x.reshape(b, slots // plan.C, plan.C, *x.shape[2:])
  log2 = cut(jnp.maximum(log_beta.astype(jnp.float32), ERASE)) * np.float32(1 / np.log(2))
  high = jnp.round(jax.lax.stop_gradient(log2) * FINE) / FINE
  low = log2 - high
  lower = np.tril(np.ones((plan.C, plan.C), np.float32))
  later = np.triu(np.ones((plan.C, plan.C), np.float32), 1)

  def through(mask, x):
    eq = "ts,bnsh->bnth" if mask.ndim == 2 else "bnts,bnsh->bnth"
    return jnp.einsum(eq, mask, x, precision=jax.lax.Precision.HIGHEST)

  decay = lambda mask: jnp.exp2(through(mask, high) + through(mask, low))
  rows = [through(lower, high), through(lower, low), cut(gamma.astype(jnp.float32))]
  if run is None:
    carry, end = decay(lower), decay(later)
    keep, renew = carry[:, :, -1], None
    rows += [end, carry]
  else:
    before = jnp.pad(run, ((0, 0), (1, 0)))[:, : slots : plan.C, None]
    run = cut(run)
    same = (run[..., :, None] == run[..., None, :]).astype(jnp.float32)
    entered = (run == before).astype(jnp.float32)[..., None]
    restarts = RESTART * (run - before).astype(jnp.float32)[..., None]
    rows[0] = rows[0] - restarts
    carry = decay(same * lower[None, None])
    keep, renew = carry[:, :, -1] * entered[:, :, -1], carry[:, :, -1] * (1 - entered[:, :, -1])
    rows += [same[:, :, -1, :, None] * decay(later), carry * entered, carry * (1 - entered)]
    rows += [jnp.broadcast_to(entered, carry.shape)]
  none = jnp.zeros_like(carry)
  if plan.gates > 8:
    before = np.tril(lower, -1)
    rows += [none] * (8 - len(rows)) + [through(before, high), through(before, low)]
    if run is None:
      rows += [decay(before) - 1]
    else:
      rows[Gate.BEFORE_HIGH] = rows[Gate.BEFORE_HIGH] - restarts
      rows += [decay(same * before[None, None]) - 1]
  rows += [none] * (plan.gates - len(rows))
  more = ((0, 0), (0, 0), (0, plan.heads[1] - h))
  rows = jnp.pad(jnp.stack(rows, 2), ((0, 0), (0, 0), *more))
  rows = jnp.swapaxes(rows, 3, 4).reshape(b, -1, plan.heads[1] * plan.C)
  fill = lambda x: None if x is None else jnp.pad(x, more)
  return Gates(rows, fill(keep), fill(renew))


def on_lanes(x, width: int):
  """[B, chunks, H] to [B, chunks, H width], each head's number on all its lanes."""
  return jnp.repeat(x, width, axis=-1)


def pad_slots(plan: Plan, x, mode="constant"):
  """[B, N, ...] to [B, C chunks, ...]: empty slots after the last chunk."""
  more = plan.chunks * plan.C - x.shape[1]
  return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), mode=mode) if more else x


def tokens(plan: Plan, x):
  """[B, N, H, W] to [B, C chunks, H W]."""
  more = plan.heads[1] - plan.heads[0]
  x = pad_slots(plan, x)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x
  return x.reshape(*x.shape[:2], -1)


def from_tokens(plan: Plan, x, slots: int):
  """The inverse of `tokens`, for N slots."""
  return x.reshape(*x.shape[:2], plan.heads[1], -1)[:, :slots, : plan.heads[0]]


def memory(plan: Plan, s):
  """[B, H, M, W] or [H, M, W] to fp32 [B, M, H W], with B = 1 for the latter."""
  s = s.astype(jnp.float32).reshape(-1, *s.shape[-3:])
  more = plan.heads[1] - plan.heads[0]
  s = jnp.pad(s, ((0, 0), (0, more), (0, 0), (0, 0))) if more else s
  return jnp.swapaxes(s, 1, 2).reshape(s.shape[0], s.shape[2], -1)


def from_memory(plan: Plan, s, dtype):
  """The inverse of `memory`: [B, M, H W] to [B, H, M, W]."""
  s = s.reshape(*s.shape[:2], plan.heads[1], -1)
  return jnp.swapaxes(s, 1, 2)[:, : plan.heads[0]].astype(dtype)


def fit_lanes(x, lanes: int):
  """Heads of zeros added or left out, where two kernels fill their last packs differently."""
  more = lanes - x.shape[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, more))) if more > 0 else x[..., :lanes]
