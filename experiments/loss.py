"""Cross-entropy of a language-model head that never holds the logits of a whole batch.

The head of a small model is most of its memory: fp32 logits [B, T, vocab] are vocab / width times
larger than the hidden states they come from. Here the logits exist for one chunk of positions at a
time, and the gradients with respect to hidden states and kernel are taken while they do, so that
the backward pass computes no logits again:

    l = logsumexp(z) - z_target + zeta logsumexp(z)^2,   z = h W
    dl/dz = softmax(z) (1 + 2 zeta logsumexp(z)) - onehot(target)

with zeta the weight of the z-loss (de Brebisson and Vincent 2016; PaLM uses 1e-4), which keeps
logsumexp near zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Tokens whose logits one device holds at once: few enough for a CPU's cache, and enough that adding
# to the kernel's gradient once per chunk costs little beside a chunk's matrix products.
CHUNK_TOKENS = 1024


class LossSums(NamedTuple):
  """Sums over the tokens of a batch, fp32 scalars; divide by `count` for a mean per token.

  `objective` is the one with a gradient: nll plus the weighted z-loss.
  """

  objective: Float[Array, ""]
  nll: Float[Array, ""]  # nats
  correct: Float[Array, ""]  # targets that were the argmax, weighted
  count: Float[Array, ""]  # sum of the weights


def chunk_length(rows: int, seq_len: int) -> int:
  """Positions per chunk such that the `rows` of one device make about `CHUNK_TOKENS` tokens."""
  chunks = -(-seq_len // max(1, CHUNK_TOKENS // rows))
  return -(-seq_len // chunks)  # even chunks: the last one is hardly padded


def cross_entropy(
  hidden: Float[Array, "B T W"],
  kernel: Float[Array, "W vocab"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  z_loss: float = 0.0,
  chunk: int | None = None,
  batch_shards: int = 1,
) -> LossSums:
  """Weighted sums of the softmax cross-entropy of `hidden @ kernel` against `targets`.

  The product runs in hidden's dtype and accumulates in fp32; logsumexp is fp32. `chunk` is the
  number of positions whose logits exist at a time; None chooses it from the rows that one of
  `batch_shards` devices holds. Targets and weights are constants: no gradient reaches them.
  """
  batch, seq_len = targets.shape
  if chunk is None:
    chunk = chunk_length(-(-batch // batch_shards), seq_len)
  pad = -seq_len % chunk
  targets = jnp.pad(targets, ((0, 0), (0, pad)))
  weights = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, pad)))
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  objective, nll, correct = _sums(hidden, kernel, targets, weights, z_loss, chunk)
  return LossSums(objective, *jax.lax.stop_gradient((nll, correct)), jnp.sum(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(hidden, kernel, targets, weights, z_loss, chunk):
  """(objective, nll, correct) over chunks of a length that divides T."""

  def body(sums, xs):
    _, parts = _chunk_parts(*xs, kernel, z_loss)
    return jax.tree.map(jnp.add, sums, parts), None

  return jax.lax.scan(body, _zeros(3), _chunks((hidden, targets, weights), chunk))[0]


def _sums_fwd(hidden, kernel, targets, weights, z_loss, chunk):
  """The same sums, and the objective's gradients taken while each chunk's logits exist."""

  def body(carry, xs):
    sums, d_kernel = carry
    h = xs[0]
    d_logits, parts = _chunk_parts(*xs, kernel, z_loss)
    d_logits = d_logits.astype(h.dtype)
    d_hidden = jnp.einsum("btv,wv->btw", d_logits, kernel.astype(h.dtype))
    d_kernel += _einsum_fp32("btw,btv->wv", h, d_logits)
    return (jax.tree.map(jnp.add, sums, parts), d_kernel), d_hidden

  start = (_zeros(3), jnp.zeros(kernel.shape, jnp.float32))
  xs = _chunks((hidden, targets, weights), chunk)
  (sums, d_kernel), d_hidden = jax.lax.scan(body, start, xs)
  d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
  return sums, (d_hidden, d_kernel.astype(kernel.dtype))


def _sums_bwd(z_loss, chunk, gradients, cotangents):
  """The stored gradients, scaled by the objective's cotangent."""
  del z_loss, chunk
  d_hidden, d_kernel = gradients
  scale = cotangents[0]
  return (
    d_hidden * scale.astype(d_hidden.dtype),
    d_kernel * scale.astype(d_kernel.dtype),
    None,
    None,
  )


_sums.defvjp(_sums_fwd, _sums_bwd)


def _chunk_parts(h, targets, weights, kernel, z_loss):
  """One chunk's d objective / d logits [B, C, vocab] in fp32, and its (objective, nll, correct)."""
  logits = _einsum_fp32("btw,wv->btv", h, kernel.astype(h.dtype))
  lse = jax.nn.logsumexp(logits, axis=-1)
  is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None, :] == targets[..., None]
  at_target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  nll = lse - at_target
  # A tie counts as right: the same answer on every backend, whichever index its argmax returns.
  correct = at_target >= jnp.max(logits, axis=-1)
  probability = jnp.exp(logits - lse[..., None])
  slope = (1.0 + 2.0 * z_loss * lse)[..., None]
  d_logits = weights[..., None] * (probability * slope - is_target)
  weigh = lambda x: jnp.sum(weights * x)
  return d_logits, (weigh(nll + z_loss * lse**2), weigh(nll), weigh(correct))


def _einsum_fp32(spec, a, b):
  """Products of a's dtype, added up in fp32."""
  narrow = lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
  # XLA's CPU backend cannot run some bf16 products with fp32 results; widened they are the same.
  wide = lambda a, b: jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))
  return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def _chunks(arrays, chunk):
  """[B, T, ...] arrays as [T / chunk, B, chunk, ...]: the batch axis keeps its sharding."""
  split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
  return jax.tree.map(split, arrays)


def _zeros(n):
  return tuple(jnp.zeros((), jnp.float32) for _ in range(n))
