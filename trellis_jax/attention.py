"""`TrellisAttention`: the Trellis mixer with the interface of `nnx.MultiHeadAttention`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, Shaped

from trellis_jax import attention_checks, inspect, masks, mixers, sharding
from trellis_jax.mixers.trellis import Mixer, State
from trellis_jax.typing import Array

_NONE: Mapping[str, Any] = MappingProxyType({})


class TrellisAttention(nnx.Module):
  """Causal self-attention over a memory of fixed size, in the place of `nnx.MultiHeadAttention`.

    layer = TrellisAttention(num_heads=8, in_features=512, rngs=nnx.Rngs(0))
    y = layer(x)                                  # [*batch, T, 512]
    y, state = layer(x, return_state=True)        # then layer(more, initial_state=state)
    layer.init_cache(x.shape)                     # or with the state in nnx.Cache:
    y = layer(x, decode=True)                     # any T >= 1, and again

  The state's size does not depend on T. Plain `jax.jit` drops what a call writes into nnx.Cache,
  `nnx.jit` keeps it; the functional form works under both.

  Args:
    num_heads: H.
    in_features: width of the inputs.
    qkv_features: H times the width of a head; None is in_features.
    out_features: width of the outputs; None is in_features.
    num_kv_heads, in_kv_features: num_heads and in_features, nothing else.
    dtype: of the computation outside of the memories, which are fp32; None is param_dtype.
    param_dtype: of the parameters.
    dropout_rate: of the outputs, as there are no attention weights to drop.
    broadcast_dropout: whether all rows of a batch drop the same.
    deterministic, keep_rngs: of the dropout, as in `nnx.Dropout`.
    precision: of all matrix products.
    kernel_init, bias_init, use_bias, kernel_metadata, bias_metadata, qkv_promote_dtype,
      qkv_dot_general: of the maps of q, k, v, the targets and the output gate, as in `nnx.Linear`
      but for use_bias=False, kernel_init=None, which is N(0, 1 / in_features), and
      dot_general=None, which is `products.dot_general`. Kernels are [in_features, H D].
    out_kernel_init, ..., out_dot_general: of the output map; None and {} are the above.
    decode: whether calls go on from the cache and write it; None is False.
    attention_fn, normalize_qk, ln_promote_dtype, ..._ln_scale_metadata, ..._dot_general_cls: what
      only softmax attention has; they are refused.
    rngs: of the initial values and the dropout.
    num_slots: M, slots of each memory.
    chunk_size: C, tokens whose inner gradients start from one memory; 1 is the exact recurrence.
    **knobs: any other field of `trellis_jax.mixers.trellis.Config`.

  Raises:
    ValueError: a size does not fit, a knob is unknown, or a keyword is refused.
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    in_kv_features: int | None = None,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    broadcast_dropout: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool | None = None,
    precision: jax.lax.PrecisionLike = None,
    kernel_init: nnx.Initializer | None = None,
    out_kernel_init: nnx.Initializer | None = None,
    bias_init: nnx.Initializer | None = None,
    out_bias_init: nnx.Initializer | None = None,
    use_bias: bool = False,
    attention_fn: None = None,
    decode: bool | None = None,
    normalize_qk: bool = False,
    qkv_promote_dtype: Callable | None = None,
    out_promote_dtype: Callable | None = None,
    ln_promote_dtype: None = None,
    qkv_dot_general: Callable | None = None,
    out_dot_general: Callable | None = None,
    qkv_dot_general_cls: None = None,
    out_dot_general_cls: None = None,
    rngs: nnx.Rngs,
    keep_rngs: bool = True,
    kernel_metadata: Mapping[str, Any] = _NONE,
    out_kernel_metadata: Mapping[str, Any] = _NONE,
    bias_metadata: Mapping[str, Any] = _NONE,
    out_bias_metadata: Mapping[str, Any] = _NONE,
    query_ln_scale_metadata: Mapping[str, Any] = _NONE,
    key_ln_scale_metadata: Mapping[str, Any] = _NONE,
    num_slots: int = 64,
    chunk_size: int = 64,
    **knobs: Any,
  ):
    given = locals()
    attention_checks.check_keywords(given)
    knobs |= {"num_slots": num_slots, "chunk_size": chunk_size}
    if qkv_features is not None:
      knobs["head_dim"] = qkv_features // num_heads
    self.num_heads, self.in_features = num_heads, in_features
    self.out_features = in_features if out_features is None else out_features
    self.dropout_rate, self.decode = dropout_rate, decode
    self.mixer = Mixer(
      in_features,
      num_heads,
      mixers.configure("trellis", knobs),
      out_features=self.out_features,
      dtype=param_dtype if dtype is None else dtype,
      param_dtype=param_dtype,
      precision=precision,
      projections=_linear_keywords(given, "qkv"),
      out_projection=_linear_keywords(given, "out"),
      rngs=rngs,
    )
    self.qkv_features, self.head_dim = num_heads * self.mixer.head_dim, self.mixer.head_dim
    self.dropout = nnx.Dropout(
      dropout_rate,
      broadcast_dims=(0,) if broadcast_dropout else (),
      deterministic=deterministic,
      rngs=rngs if keep_rngs and dropout_rate else None,
    )
    self.cache: State | None = nnx.data(None)

  def __call__(
    self,
    inputs_q: Float[Array, "*batch T in_features"],
    inputs_k: Array | None = None,
    inputs_v: Array | None = None,
    *,
    mask: Shaped[Array, "..."] | None = None,
    deterministic: bool | None = None,
    rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    sow_weights: bool = False,
    decode: bool | None = None,
    is_causal: bool = True,
    segment_ids: Int[Array, "*batch T"] | None = None,
    input_positions: Int[Array, "*batch T"] | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    implementation: str | None = None,
  ) -> Float[Array, "*batch T out_features"] | tuple[Array, State]:
    """Attends from every token to the tokens up to it.

    Args:
      inputs_q: [*batch, T, in_features], any number of batch axes.
      inputs_k, inputs_v: None, or the very array `inputs_q`.
      mask: padding as [*batch, T] or [*batch, 1, 1, T], or a mask [*batch, 1, T, T] whose values
        are causal & padding; see `masks.live_tokens`. A padded token's output is 0, and it is as
        if it were not there.
      deterministic: whether to leave out the dropout; goes before the constructor's.
      rngs: of the dropout; goes before the constructor's.
      sow_weights: whether to sow as `nnx.Intermediate`, in the place of attention weights, what
        `inspect.trace_mixer` returns: per token the gates, the inner losses before and after its
        write and the write's norm, [*batch, T, H], and the memories' norms and ranks at the end,
        [*batch, H].
      decode: whether to go on from the cache and write it; goes before the constructor's.
      is_causal: True.
      segment_ids: documents of packed rows; nothing crosses a change of id, 0 is padding.
      input_positions: not used, a recurrence has no positions to encode.
      initial_state: what an earlier call returned, to go on from.
      return_state: whether to return (outputs, state); the state's leading axis is the batch
        axes in one.
      implementation: of the op, see `trellis_jax.trellis`.

    Raises:
      ValueError: an argument cannot be served; the message says why, and what to pass.
    """
    decode = self.decode if decode is None else decode
    attention_checks.check_call(inputs_q, inputs_k, inputs_v, is_causal, self.in_features)
    shape = inputs_q.shape[:-1]
    x = inputs_q.reshape(-1, shape[-1], self.in_features)
    state = self._entry(x, decode, initial_state)
    ids = self._segments(shape, mask, segment_ids, state)
    if sow_weights:
      self._sow(x, state, ids, shape)
    y, state = self.mixer(x, state, segment_ids=ids, implementation=implementation)
    if ids is not None:
      y = jnp.where((ids != 0)[..., None], y, 0)
    if self.dropout_rate:
      y = self.dropout(y, deterministic=deterministic, rngs=rngs)
    if decode:
      jax.tree.map(nnx.Cache.set_value, self.cache, state, is_leaf=_is_variable)
    y = y.reshape(*shape, self.out_features)
    return (y, state) if return_state else y

  def init_state(self, input_shape: tuple[int, ...]) -> State:
    """Returns the state before the first token of inputs [*batch, T, in_features]."""
    if len(input_shape) < 2 or input_shape[-1] != self.in_features:
      raise ValueError(
        f"input_shape={input_shape} is not accepted; it is (*batch, T, {self.in_features})"
      )
    return self.mixer.init_state(math.prod(input_shape[:-2]))

  def init_cache(self, input_shape: tuple[int, ...], dtype: Any = jnp.float32) -> None:
    """Allocates the cache for inputs [*batch, T, in_features], or clears it; T does not matter.

    The memories are fp32; dtype is that of the short convolutions' last inputs.
    """
    state = self.init_state(input_shape)
    taps = {n: getattr(state, n) for n in ("taps", "v_taps", "alpha_taps")}
    state = dataclasses.replace(state, **jax.tree.map(lambda x: x.astype(dtype), taps))
    # Copies, as a fresh state holds one array twice, which cannot be donated.
    self.cache = nnx.data(jax.tree.map(lambda x: nnx.Cache(jnp.copy(x)), state))

  def set_view(
    self,
    decode: bool | None = None,
    batch_size: int | tuple[int, ...] | None = None,
    max_length: int | None = None,
  ) -> None:
    """Serves `nnx.view`: sets `decode`, and allocates a cache when given a batch_size."""
    if decode is not None:
      self.decode = decode
    if batch_size is not None:
      batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
      self.init_cache((*batch, 1, self.in_features))

  def _entry(self, x, decode, initial_state):
    """Returns the state that a call on rows x goes on from, None for a fresh one."""
    if decode and initial_state is not None:
      raise ValueError(
        "initial_state is given with decode=True, which goes on from the cache; pass decode=False"
      )
    state, name = initial_state, "initial_state"
    if decode:
      if self.cache is None:
        raise ValueError("decode=True has no cache yet; call init_cache(inputs.shape) first")
      state, name = jax.tree.map(lambda c: c[...], self.cache, is_leaf=_is_variable), "the cache"
    if state is None:
      return None
    if not isinstance(state, State):
      raise ValueError(
        f"initial_state is a {type(state).__name__}; accepted is what return_state=True returns"
      )
    fresh = jax.eval_shape(lambda: self.mixer.init_state(len(x)))
    for field in ("taps", "v_taps", "alpha_taps"):
      given, taken = (getattr(getattr(s, field), "shape", None) for s in (state, fresh))
      if given != taken:
        raise ValueError(
          f"{name} has {field} of shape {given}; for {len(x)} rows of inputs, batch axes in one, "
          f"this layer takes {taken}"
        )
    return sharding.like(self._renewed(state) if decode else state, x)

  def _renewed(self, state):
    """Returns the state with the initial memory of today in rows that have seen no token."""
    if self.mixer.config.initial_memory == "zeros":
      return state
    new = state.memory.segment == 0
    rows = lambda x: new.reshape(-1, *(1,) * (x.ndim - 1))
    fresh = sharding.like(self.mixer.init_state(len(new)), new)
    return jax.tree.map(lambda x, y: jnp.where(rows(x), y.astype(x.dtype), x), state, fresh)

  def _segments(self, shape, mask, segment_ids, state):
    """Returns ids [rows, T] that join the mask's padding with the segments, None for neither."""
    if segment_ids is not None and segment_ids.shape != shape:
      raise ValueError(f"segment_ids has shape {segment_ids.shape}; it must be {shape}")
    rows = (-1, shape[-1])
    ids = None if segment_ids is None else segment_ids.reshape(rows)
    if mask is None:
      return ids
    live = masks.live_tokens(mask, shape, self.num_heads).reshape(rows)
    if ids is None:
      ids = 1 if state is None else jnp.maximum(state.memory.segment, 1)[:, None]
    return jnp.where(live, ids, 0)

  def _sow(self, x, state, ids, shape):
    """Sows the gates and inner losses of each token, and the memories' norms after the last."""
    length = shape[-1]
    trace = inspect.trace_mixer(self.mixer, x, state=state, segment_ids=ids, every=length)
    for name, value in trace.items():
      if value.ndim == 3:  # no vectors, no memories
        lead = shape[:-1] if name.startswith(("norm_", "rank_")) else shape
        self.sow(nnx.Intermediate, name, value.reshape(*lead, self.num_heads))


def _is_variable(x):
  return isinstance(x, nnx.Variable)


def _linear_keywords(given, side):
  """Returns what nnx.Linear gets for the "qkv" maps or the "out" map; None keeps its default."""
  names = ("kernel_init", "bias_init", "kernel_metadata", "bias_metadata")
  of = {n: given[n] for n in ("precision", "use_bias", *names)}
  if side == "out":
    of |= {n: given[f"out_{n}"] or given[n] for n in names}
  of |= {n: given[f"{side}_{n}"] for n in ("promote_dtype", "dot_general")}
  return {n: value for n, value in of.items() if value is not None}
