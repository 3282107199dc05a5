"""`TrellisAttention` for Linen, in the place of `nn.MultiHeadDotProductAttention`."""

import dataclasses
import functools
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
  chunk_size: int = 64
  knobs: Mapping[str, Any] = FrozenDict()

  def __post_init__(self):
    # Modules are static arguments of jit, so that what they hold must hash.
    object.__setattr__(self, "knobs", FrozenDict(self.knobs))
    super().__post_init__()

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
    implementation: str | None = None,
  ) -> Float[Array, "*batch T out_features"] | tuple[Array, State]:
    """Attends from every token to the tokens up to it; see the nnx layer for arguments and errors.

    Args of its own:
      dropout_rng: key of the dropout; None takes the stream "dropout".
      sow_weights: sows into the collection "intermediates".
    """
    if self.decode and not self.is_mutable_collection("cache"):
      raise ValueError("decode=True writes the collection 'cache'; apply with mutable=['cache']")
    has_cache = self.decode or self.has_variable("cache", "cache")
    layer = nnx.bridge.ToLinen(
      functools.partial(_make, inputs_q.shape if has_cache else None),
      args=(self.num_heads, inputs_q.shape[-1]),
      kwargs=FrozenDict(_keywords(self)),
    )
    nn.share_scope(self, layer)  # The variables' paths are those of the nnx layer.
    return layer(
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
      initial_state=initial_state,
      return_state=return_state,
      implementation=implementation,
    )


def _keywords(module: TrellisAttention) -> dict[str, Any]:
  own = ("parent", "name", "num_heads", "knobs")
  fields = [f.name for f in dataclasses.fields(module) if f.name not in own]
  return {name: getattr(module, name) for name in fields} | dict(module.knobs)


def _make(cache_for, *args, **kw):
  """Returns the nnx layer, with a cache for inputs of shape `cache_for` unless that is None."""
  layer = attention.TrellisAttention(*args, **kw)
  if cache_for is not None:
    layer.init_cache(cache_for)
  return layer
