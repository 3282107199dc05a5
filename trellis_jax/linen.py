"""`TrellisAttention` for Linen, in the place of `nn.MultiHeadDotProductAttention`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import Float, Int, Shaped

from trellis_jax import attention
from trellis_jax.mixers.trellis import State
from trellis_jax.ops.state import TrellisState
from trellis_jax.typing import Array


class TrellisAttention(nn.Module):
  """`trellis_jax.TrellisAttention` through `nnx.bridge`; the features are those of the inputs.

    layer = TrellisAttention(num_heads=8, num_slots=64)
    variables = layer.init(rng, x)                           # x [*batch, T, features]
    y = layer.apply(variables, x)
    y, kept = layer.clone(decode=True).apply(variables, x, mutable=["cache"])

  Under `nn.scan` and `nn.remat` it is a Linen module like any other. With decode=True the state
  is the collection "cache", of a size that does not depend on T: `init` makes it, a call with
  mutable "cache" starts a fresh one where there is none, goes on from it and returns the next.

  Attributes: as of `trellis_jax.TrellisAttention`, where they are explained.
    knobs: any other keyword of it, e.g. {"phi": "silu"}.
  """

  num_heads: int
  dtype: Any = None
  param_dtype: Any = jnp.float32
  qkv_features: int | None = None
  out_features: int | None = None
  broadcast_dropout: bool = True
  dropout_rate: float = 0.0
  deterministic: bool | None = None
  precision: jax.lax.PrecisionLike = None
  kernel_init: Callable | None = None
  out_kernel_init: Callable | None = None
  bias_init: Callable | None = None
  out_bias_init: Callable | None = None
  use_bias: bool = False
  decode: bool = False
  num_slots: int = 64
  chunk_size: int = 16
  knobs: Mapping[str, Any] = FrozenDict()

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, "*batch T features"],
    inputs_k: Array | None = None,
    inputs_v: Array | None = None,
    *,
    mask: Shaped[Array, "..."] | None = None,
    deterministic: bool | None = None,
    dropout_rng: Array | None = None,
    sow_weights: bool = False,
    is_causal: bool = True,
    segment_ids: Int[Array, "*batch T"] | None = None,
    input_positions: Int[Array, "*batch T"] | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
  ) -> Float[Array, "*batch T out_features"] | tuple[Array, State]:
    """Attends from every token to the tokens up to it; see the nnx layer for arguments and errors.

    Args of its own:
      dropout_rng: key of the dropout; None takes the stream "dropout".
      sow_weights: sows into the collection "intermediates".
    """
    own = ("parent", "name", "num_heads", "decode", "knobs")
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
    layer = nnx.bridge.to_linen(
      attention.TrellisAttention,
      self.num_heads,
      inputs_q.shape[-1],
      name="layer",
      **fields | dict(self.knobs),
    )
    nn.share_scope(self, layer)  # so that the variables' paths are those of the nnx layer
    cached = self.variables.get("cache") if self.decode else None
    if cached and initial_state is not None:
      raise ValueError(
        "initial_state is given with decode=True, which goes on from the cache; pass decode=False"
      )
    y, fresh, state = layer(
      inputs_q,
      inputs_k,
      inputs_v,
      mask=mask,
      deterministic=deterministic,
      rngs=dropout_rng,
      sow_weights=sow_weights,
      is_causal=is_causal,
      segment_ids=segment_ids,
      input_positions=input_positions,
      initial_state=_to_state(cached) if cached else initial_state,
      nnx_method=_call,
    )
    if self.decode:
      for name, x in _to_cache(fresh if self.is_initializing() else state).items():
        self.put_variable("cache", name, x)
    return (y, state) if return_state else y


def _call(layer, inputs_q, *args, **kw):
  """Returns (outputs, the state before any token, the state after the last one)."""
  y, state = layer(inputs_q, *args, return_state=True, **kw)
  return y, layer.init_state(inputs_q.shape), state


def _to_cache(state: State) -> dict[str, Array]:
  arrays = vars(state.memory) | {"taps": state.taps}
  return {name: x for name, x in arrays.items() if x is not None}


def _to_state(cache: Mapping[str, Array]) -> State:
  memory = {f.name: cache.get(f.name) for f in dataclasses.fields(TrellisState)}
  return State(TrellisState(**memory), cache["taps"])
