r"""`affine` as a `jax.lax.scan` over blocks of a few chunks of L tokens.

In a block a scan carries S from chunk to chunk and all else is batched. The backward stores S at
the block starts and recomputes the rest block by block.

With G_t the decay from the chunk's start through t, E_s from after s to its end, D_ts between them
(all by `halving`), and S the state at the chunk's start:

  o_t = (G_t q_t)^T S + sum_{s <= t} (q_t^T D_ts k_s) u_s,    S' = G_L S + sum_s (E_s k_s) u_s^T

Without the delta rule u = w. With it (WY / UT form; Yang et al. 2024, "Parallelizing linear
transformers with the delta rule", section 3) the rows of U solve a triangular system,

  (I + A) U = W - diag(b G) K S,   A = strictly lower part of diag(b) (D * K K^T)
  U = U_0 - Y S,                   (I + A) [U_0, Y] = [W, diag(b G) K]

so that the scan's step is S' = (G_L - (E K)^T Y) S + (E K)^T U_0.
"""

import functools
import math

import jax
import jax.numpy as jnp

from trellis_jax.ops import halving, triangular
from trellis_jax.ops.blocking import block_tokens


def power_of_two(n: int) -> int:
  """Returns the smallest power of two >= n."""
  return 1 << (n - 1).bit_length()


def forward(q, k, w, log_decay, beta, start, *, axis, length, precision):
  """Returns (o [B T H V], S [B H K V]); all arrays in one dtype, `length` a power of two."""
  tokens = q.shape[1]
  chunks = math.ceil(tokens / length)
  blocks = math.ceil(chunks * length / max(length, block_tokens()))
  per_block = math.ceil(chunks / blocks) * length
  local = functools.partial(_block, axis=axis, length=length, precision=precision)
  xs = [None if x is None else _cut(x, per_block) for x in (q, k, w, log_decay, beta)]
  end, o = jax.lax.scan(jax.checkpoint(local, prevent_cse=False), start, xs)
  return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :tokens], end


def _block(start, xs, *, axis, length, precision):
  """Returns (S after a block, o [B T H V]); xs are its (q, k, w, log_decay, beta) [B T H ...]."""
  heads_first = lambda x: jnp.swapaxes(_cut(x, length), 2, 3)
  q, k, w, log_decay, beta = (None if x is None else heads_first(x) for x in xs)
  if log_decay is not None and log_decay.ndim == w.ndim:
    o, s = _vector(q, k, w, log_decay, start, axis, precision)
  elif beta is not None:
    o, s = _delta(q, k, w, log_decay, beta, start, precision)
  else:
    o, s = _scalar(q, k, w, log_decay, start, precision)
  n, b, h, _, width = o.shape
  return s, o.transpose(1, 0, 3, 2, 4).reshape(b, n * length, h, width)


def _cut(x, size):
  """[B T ...] -> [n B size ...], zeros after the tokens: they neither write nor decay."""
  b, t, *rest = x.shape
  n = math.ceil(t / size)
  x = jnp.pad(x, [(0, 0), (0, n * size - t)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(x.reshape(b, n, size, *rest), 1, 0)


def _scan(start, decay, write, transition=None, precision=None):
  """Returns (S at the chunks' starts [n B H K V], S at the end); decay broadcasts to S."""

  def body(s, x):
    decay, write, transition = x
    after = write if decay is None else decay * s + write
    if decay is None:
      after = after + s
    if transition is not None:
      after = after - _dot("...kj,...jv->...kv", transition, s, precision)
    return after, s

  end, starts = jax.lax.scan(body, start, (decay, write, transition))
  return starts, end


def _dot(equation, x, y, precision):
  return jnp.einsum(equation, x, y, precision=precision)


def _decays(log_decay, length, ndim):
  """Returns (D [... L L], G, E [... L 1], G_L [... 1 1]) of decays [n B H L], None for none."""
  if log_decay is None:
    lower = jnp.tril(jnp.ones((length, length), bool)).reshape((1,) * (ndim - 2) + (length,) * 2)
    return lower, 1, 1, None
  found, through, after = halving.levels(log_decay[..., None])
  carry = jnp.exp(through)
  return halving.pairs(found, length), carry, jnp.exp(after), carry[..., -1:, :]


def _scalar(q, k, w, log_decay, start, precision):
  dot = functools.partial(_dot, precision=precision)
  pair, carry, end, total = _decays(log_decay, q.shape[-2], q.ndim)
  starts, last = _scan(start, total, dot("...sk,...sv->...kv", end * k, w))
  o = dot("...ts,...sv->...tv", dot("...tk,...sk->...ts", q, k) * pair, w)
  return o + dot("...tk,...kv->...tv", carry * q, starts), last


def _delta(q, k, w, log_decay, beta, start, precision):
  dot = functools.partial(_dot, precision=precision)
  pair, carry, end, total = _decays(log_decay, q.shape[-2], q.ndim)
  beta = beta[..., None]
  # Only what lies below the diagonal is read.
  alike = beta * pair * dot("...tk,...sk->...ts", k, k)
  right = jnp.concatenate([w, beta * carry * k], axis=-1)
  solved = triangular.solve(alike, right)
  u, y = jnp.split(solved, [w.shape[-1]], axis=-1)
  to_end = end * k
  starts, last = _scan(
    start,
    total,
    dot("...sk,...sv->...kv", to_end, u),
    dot("...sk,...sj->...kj", to_end, y),
    precision,
  )
  u = u - dot("...sk,...kv->...sv", y, starts)
  o = dot("...ts,...sv->...tv", dot("...tk,...sk->...ts", q, k) * pair, u)
  return o + dot("...tk,...kv->...tv", carry * q, starts), last


def _vector(q, k, w, log_decay, start, axis, precision):
  """Decays over the key axis scale q and k, decays over the value axis o and w."""
  dot = functools.partial(_dot, precision=precision)
  found, through, after = halving.levels(log_decay)
  by_key = axis == "key"
  o = jnp.sum(q * k, axis=-1, keepdims=True) * w
  for m, left, right in found:
    left, right = jnp.exp(left), jnp.exp(right)
    q2, k1, w1 = halving.half(q, m, 1), halving.half(k, m, 0), halving.half(w, m, 0)
    q2, k1, w1 = (q2 * right, k1 * left, w1) if by_key else (q2, k1, w1 * left)
    later = dot("...ts,...sv->...tv", dot("...tk,...sk->...ts", q2, k1), w1)
    o = o + halving.whole(later if by_key else later * right, m, 1)
  carry, end = jnp.exp(through), jnp.exp(after)
  k, w = (end * k, w) if by_key else (k, end * w)
  total = carry[..., -1, :]
  starts, last = _scan(
    start, jnp.expand_dims(total, -1 if by_key else -2), dot("...sk,...sv->...kv", k, w)
  )
  if by_key:
    return o + dot("...tk,...kv->...tv", carry * q, starts), last
  return o + carry * dot("...tk,...kv->...tv", q, starts), last
