"""What the op carries from one call to the next, so that any split of a sequence is exact."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from trellis_jax.typing import Array, Memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrellisState:
  """The two memories of a batch and where each row stands in its chunk; size constant in T.

  Attributes:
    memory_k: S_k after the last token, at least fp32.
    memory_v: S_v after the last token.
    anchor_k: S_k at the start of the row's current chunk, where its inner gradients are taken
      (equal to memory_k where offset is 0); None for chunk_size 1, which needs none.
    anchor_v: the same of S_v.
    offset: tokens of the current chunk already seen, 0 .. C - 1.
    segment: id of the last token's segment; 0 before the first token.
  """

  memory_k: Float[Array, "B H M D"]
  memory_v: Float[Array, "B H M V"]
  anchor_k: Float[Array, "B H M D"] | None
  anchor_v: Float[Array, "B H M V"] | None
  offset: Int[Array, " B"]
  segment: Int[Array, " B"]

  @classmethod
  def fresh(cls, memory: Memory, batch: int, chunk_size: int) -> "TrellisState":
    """Returns the state of `batch` rows before their first token."""
    s_k, s_v = (jnp.broadcast_to(s[None], (batch, *s.shape)) for s in memory)
    anchors = (None, None) if chunk_size == 1 else (s_k, s_v)
    none = jnp.zeros((batch,), jnp.int32)
    return cls(s_k, s_v, *anchors, offset=none, segment=none)
