"""Causal softmax attention whose memory grows with T, not with T^2.

    o_t = sum_s p_ts v_s,   p_t = softmax_s(q_t . k_s / sqrt D)     over s <= t, t - s < window

Vaswani et al., 2017, eq. 1. The products are `jax.nn.dot_product_attention`'s. Where that holds
all scores at once, long sequences go through it in blocks of queries, which the backward pass
computes again.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from trellis_jax.typing import Array

IMPLEMENTATIONS = ("xla", "cudnn")
BLOCK = 256  # queries
# Keys are cut off behind a group of blocks: of G groups, 1 / G of the scores are masked in vain.
GROUPS = 8


def attend(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S G D"],
  v: Float[Array, "B S G D"],
  *,
  runs: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  window: int = 0,
  implementation: str | None = None,
) -> Float[Array, "B T H D"]:
  """Reads the values of the keys up to each query; the last T keys are the queries' own tokens.

  Args:
    q: queries.
    k: keys, S >= T; a key serves H / G queries' heads.
    v: values.
    runs: (of the queries, of the keys): a query sees the keys of its own run alone; None: all.
    window: keys that a query sees, its own included; 0 is all.
    implementation: of `jax.nn.dot_product_attention`, "xla" or "cudnn"; None is "xla".

  Returns:
    o in q's dtype; scores and softmax are fp32.

  Raises:
    ValueError: the implementation is unknown.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation={implementation!r} is unknown to attention; accepted are "
      f"{', '.join(IMPLEMENTATIONS)}"
    )
  length, ahead = q.shape[1], k.shape[1] - q.shape[1]
  plain = runs is None and not ahead
  if plain and (implementation == "cudnn" or length <= BLOCK):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      is_causal=True,
      local_window_size=(window - 1, 0) if window else None,
      implementation=implementation,
    )

  def some(at, q, run, first, k, v, run_k):
    """A block of queries from `at` on, over keys from `first` on."""
    at = ahead + at + jnp.arange(q.shape[1])[:, None]
    behind = at - (first + jnp.arange(k.shape[1])[None])
    mask = (behind >= 0) & (behind < window) if window else behind >= 0
    mask = mask[None, None]
    if run is not None:
      mask = mask & (run[:, None, :, None] == run_k[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

  run, run_k = runs if runs is not None else (None, None)
  if length <= BLOCK:
    return some(0, q, run, 0, k, v, run_k)
  return _over_blocks(some, (q, run), (k, v, run_k), window)


def _over_blocks(some, queries, keys, window: int):
  """Maps `some` over blocks of queries; each block gets the keys that it may see."""
  (batch, length, *_), size = queries[0].shape, keys[0].shape[1]
  num = math.ceil(length / BLOCK)
  ahead = size - length
  pad = lambda x: jnp.pad(x, [(0, 0), (0, num * BLOCK - length)] + [(0, 0)] * (x.ndim - 2))
  split = lambda x: jnp.moveaxis(pad(x).reshape(batch, num, BLOCK, *x.shape[2:]), 1, 0)
  queries = jax.tree.map(split, queries)
  outs = []
  # A window's keys are few for every block, which one loop serves.
  per_group = num if window else math.ceil(num / GROUPS)
  for start in range(0, num, per_group):
    stop = min(start + per_group, num)
    end = min(ahead + stop * BLOCK, size)
    span = min(end, BLOCK + window - 1) if window else end

    @jax.checkpoint
    def block(xs, end=end, span=span):
      i, (q, run) = xs
      first = jnp.clip(ahead + i * BLOCK - (window - 1), 0, end - span) if window else 0
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, span, axis=1)
      return some(i * BLOCK, q, run, first, *jax.tree.map(cut, keys))

    outs.append(
      jax.lax.map(block, (jnp.arange(start, stop), jax.tree.map(lambda x: x[start:stop], queries)))
    )
  o = jnp.moveaxis(jnp.concatenate(outs), 0, 1)
  return o.reshape(batch, num * BLOCK, *o.shape[3:])[:, :length]
