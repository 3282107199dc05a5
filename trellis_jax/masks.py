"""Attention masks to padding: all that a causal memory of fixed size can take of a mask."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from trellis_jax.typing import Array

_FIX = "pass the padding alone as [*batch, 1, 1, T], and documents as segment_ids"


def live_tokens(
  mask: Shaped[Array, "..."], shape: tuple[int, ...], num_heads: int
) -> Bool[Array, "*batch T"]:
  """Returns which tokens a mask of `nnx.MultiHeadAttention` keeps; True or 1 keeps.

  Args:
    mask: a padding mask of shape [*batch, T], or what broadcasts from the right to
      [*batch, H, T, T] and hides the same keys from all heads: a padding mask [..., 1, 1, T], or
      values [..., 1 or H, T, T] that are causal & padding. The latter are looked at, which a
      traced mask does not allow.
    shape: (*batch, T).
    num_heads: H.

  Raises:
    ValueError: the mask is of another shape, or is not a padding mask.
  """
  *batch, length = shape
  scores = (*batch, num_heads, length, length)
  traced = isinstance(mask, jax.core.Tracer)
  if not traced:
    mask = np.asarray(mask)
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
      bad = mask[~np.isin(mask, (0, 1))].flat[0]
      raise ValueError(f"mask has the value {bad}; accepted are True or 1 to keep, False or 0 not")
  is_scores = _broadcasts(mask.shape, scores)
  if mask.shape == shape:
    if is_scores and math.prod(batch) > 1:
      raise ValueError(
        f"mask has shape {mask.shape}, which reads as [*batch, T] and as attention scores; "
        "pass a padding mask as mask[..., None, None, :]"
      )
    return jnp.asarray(mask, bool)
  if not is_scores:
    raise ValueError(
      f"mask has shape {mask.shape}; accepted are {shape} and {(*batch, 1, 1, length)}"
    )
  mask = mask.reshape((1,) * (len(scores) - mask.ndim) + mask.shape)
  if not traced:
    mask = _of_one_head(mask)
  if mask.shape[-3:-1] == (1, 1):
    return jnp.broadcast_to(jnp.asarray(mask[..., 0, 0, :], bool), shape)
  if traced:
    raise ValueError(
      f"mask has shape {mask.shape} and is traced, so that nothing can tell whether it is a "
      f"padding mask; {_FIX}"
    )
  return jnp.asarray(_padding_of(np.broadcast_to(mask[..., 0, :, :] != 0, (*shape, length))))


def _broadcasts(shape, target):
  """Whether `shape` broadcasts to `target`."""
  pairs = zip(shape[::-1], target[::-1])
  return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)


def _of_one_head(mask):
  """Returns the mask of one head [..., 1, Q, K] of a mask that is the same for all."""
  if (mask != mask[..., :1, :, :]).any():
    raise ValueError(f"mask differs between heads; accepted is one for all of them, so {_FIX}")
  return mask[..., :1, :, :]


def _padding_of(mask):
  """Returns p [*batch, T] of a mask [*batch, T, T] that is causal & p."""
  causal = np.tri(mask.shape[-1], dtype=bool)
  if (later := np.argwhere(mask & ~causal)).size:
    query, key = later[0, -2:]
    raise ValueError(
      f"mask lets token {query} see the later token {key}; the layer is causal, so {_FIX}"
    )
  live = np.diagonal(mask, axis1=-2, axis2=-1)
  # A padded query may see the live tokens before it or nothing: it is not read.
  wrong = (mask != (causal & live[..., None, :])) & (live[..., None] | mask.any(-1, keepdims=True))
  if wrong.any():
    at = np.argwhere(wrong)[0]
    query, key = at[-2:]
    does, does_not = ("shows", "to"), ("hides", "from")
    if not mask[tuple(at)]:
      does, does_not = does_not, does
    raise ValueError(
      f"mask {does[0]} token {key} {does[1]} token {query} and {does_not[0]} it {does_not[1]} "
      f"itself; a memory forgets by its gates, not by masks, so {_FIX}"
    )
  return live
