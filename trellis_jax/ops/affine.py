r"""Affine recurrences over a matrix per head: what most linear-time mixers are.

  S_t = (I - b_t k_t k_t^T) diag(d_t) S_{t-1} + k_t w_t^T,   o_t = S_t^T q_t,   S [K, V]

The decay d comes first and is one number per head, or a vector over the key axis (GLA, HGRN2), or
over the value axis, S diag(d) (the first pass of GSA); the delta rule b goes with one number or
none (Gated DeltaNet, Yang et al. 2025, eq. 10). `affine_reference` is the definition and
`affine_chunks` computes it. A restart is a decay of zero, which is exact: runs need no masks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from trellis_jax.ops import affine_chunks, affine_reference
from trellis_jax.typing import Array

AXES = ("key", "value")


def affine(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  w: Float[Array, "B T H V"],
  *,
  log_decay: Float[Array, "B T H ..."] | None = None,
  decay_axis: str = "key",
  beta: Float[Array, "B T H"] | None = None,
  initial: Float[Array, "B H K V"] | None = None,
  run: Int[Array, "B T"] | None = None,
  chunk_size: int = 64,
  precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Runs the recurrence over the tokens, chunk by chunk; any split of the tokens is exact.

  Args:
    q: what reads.
    k: what addresses the write.
    w: what is written; for the delta rule b times the value.
    log_decay: log d <= 0, -inf erases: [B, T, H], or a vector [B, T, H, K | V]; None keeps all.
    decay_axis: "key" or "value", the axis of S that a vector belongs to.
    beta: b of the delta rule, not with a vector of decays; None is 0.
    initial: the state before the first token; None is zeros.
    run: number of restarts up to each token, 0 for tokens that go on from `initial`; tokens see
      their own run alone. None: no restarts.
    chunk_size: tokens that are computed in parallel, a power of two; results do not depend on it.
    precision: of the matrix products.

  Returns:
    (o in w's dtype, the state after the last token in at least fp32).

  Raises:
    ValueError: a shape or choice is not accepted.
  """
  _check(q, k, w, log_decay, decay_axis, beta, initial, run, chunk_size)
  call = functools.partial(_call, decay_axis, chunk_size, precision)
  return _over_mesh(call, w, (q, k, w, log_decay, beta, initial, run))


def flops(
  num_tokens: int, num_heads: int, keys: int, values: int, *, chunk_size: int, delta: bool = False
) -> int:
  """Returns the FLOPs of `affine` over one row: products with the state, then within chunks.

  A token writes to and reads from S [K, V], and meets half of its chunk with q and w. The delta
  rule adds the chunk's k k^T, the solve, its transition [K, K] and the correction of the writes.
  """
  length = min(chunk_size, affine_chunks.power_of_two(num_tokens))
  each = 2 * keys * values + length * (keys + values) // 2
  if delta:
    each += keys * values + keys * keys + keys * keys * values // length
    each += length * (2 * keys + values) // 2
  return 2 * num_tokens * num_heads * each


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(axis, chunk_size, precision, q, k, w, log_decay, beta, initial, run):
  """The recurrence on one device's rows and heads."""
  b, t, h, width = w.shape
  acc = functools.reduce(jnp.promote_types, (x.dtype for x in (q, k, w)), jnp.dtype(jnp.float32))
  if run is not None:
    restart = run != jnp.pad(run[:, :-1], ((0, 0), (1, 0)))
    if log_decay is None:
      log_decay = jnp.zeros((b, t, h), acc)
    log_decay = jnp.where(restart.reshape(b, t, *(1,) * (log_decay.ndim - 2)), -jnp.inf, log_decay)
  start = jnp.zeros((b, h, q.shape[-1], width), acc) if initial is None else initial.astype(acc)
  tokens = [None if x is None else x.astype(acc) for x in (q, k, w, log_decay, beta)]
  if t == 1:
    now = [None if x is None else x[:, 0] for x in tokens]
    end, o = affine_reference.step(start, *now, axis=axis, precision=precision)
    o = o[:, None]
  else:
    length = min(chunk_size, affine_chunks.power_of_two(t))
    o, end = affine_chunks.forward(*tokens, start, axis=axis, length=length, precision=precision)
  return o.astype(w.dtype), end


def _check(q, k, w, log_decay, axis, beta, initial, run, chunk_size):
  if q.ndim != 4 or w.ndim != 4:
    raise ValueError(f"q and w have shapes {q.shape}, {w.shape}; accepted is [B, T, H, K | V]")
  b, t, h, keys = q.shape
  values = w.shape[-1]
  if axis not in AXES:
    raise ValueError(f"decay_axis={axis!r} is unknown; accepted are {', '.join(AXES)}")
  if chunk_size < 1 or chunk_size & (chunk_size - 1):
    raise ValueError(f"chunk_size={chunk_size} is not accepted; it must be a power of two")
  vector = log_decay is not None and log_decay.ndim == 4
  if vector and beta is not None:
    raise ValueError("beta goes with one decay per head or none, not with a vector of decays")
  decays = (b, t, h, keys if axis == "key" else values) if vector else (b, t, h)
  wanted = (
    ("k", k, (b, t, h, keys)),
    ("w", w, (b, t, h, values)),
    ("log_decay", log_decay, decays),
    ("beta", beta, (b, t, h)),
    ("initial", initial, (b, h, keys, values)),
    ("run", run, (b, t)),
  )
  for name, x, shape in wanted:
    if x is not None and x.shape != shape:
      raise ValueError(f"{name} has shape {x.shape}; with q {q.shape} it must be {shape}")
  if math.prod(w.shape) * keys == 0:
    raise ValueError(f"B, T, H, K, V are {(b, t, h, keys, values)}; each must be >= 1")


def _over_mesh(call, w, args):
  """Returns `call(*args)`, mapped over the axes that shard w where they are Explicit."""
  sharding = jax.typeof(w).sharding
  mesh = sharding.mesh
  if mesh.empty or AxisType.Explicit not in mesh.axis_types:
    return call(*args)
  batch, _, heads, _ = (*sharding.spec, *(None,) * (4 - len(sharding.spec)))
  tokens, rows = P(batch, None, heads), P(batch, heads)
  specs = (tokens,) * 5 + (rows, P(batch))
  specs = tuple(None if x is None else s for x, s in zip(args, specs))
  place = lambda x, s: None if x is None else jax.sharding.reshard(x, NamedSharding(mesh, s))
  args = tuple(place(x, s) for x, s in zip(args, specs))
  mapped = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=(tokens, rows), check_vma=False)
  return mapped(*args)
