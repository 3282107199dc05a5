"""What every sequence mixer does."""

from typing import Any, Protocol

from trellis_jax.typing import Hidden, SegmentIds, Tokens


class MixerProtocol(Protocol):
  """A causal map over tokens with a state; `Mixer(width, num_heads, config, *, ..., rngs)`.

  The state is a pytree; running the first s tokens and then the rest from the returned state
  equals one run, for every s.
  """

  def __call__(
    self,
    x: Hidden,
    state: Any = None,
    *,
    segment_ids: SegmentIds | None = None,
    positions: Tokens | None = None,
    implementation: str | None = None,
  ) -> tuple[Hidden, Any]:
    """Returns (y of x's shape, the state after the last token).

    Args:
      x: inputs [B, T, width].
      state: where to go on from; None for fresh rows.
      segment_ids: documents of a packed row; nothing crosses a change of id, 0 is padding.
      positions: of the tokens in their documents, for mixers that encode them; None counts them.
      implementation: of the recurrence, for mixers that have several.
    """
    ...

  def init_state(self, batch: int) -> Any:
    """Returns the state of `batch` rows before their first token."""
    ...

  def flops(self, num_tokens: int) -> int:
    """Returns the FLOPs of a forward over one row of T tokens, 2 for a multiply-add."""
    ...

  def state_size(self) -> int:
    """Returns the numbers that one row carries from token to token."""
    ...
