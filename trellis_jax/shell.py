"""The shell of the mixers: all that they share, which is everything but their recurrences.

    x -> maps (and short convolutions) -> the mixer's own recurrence -> norm, gate -> output map

A mixer file subclasses `Mixer`: `build` makes its maps, `mix` is its recurrence. The shell lays
live tokens side by side, so that padding does not exist, and carries what a split needs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from trellis_jax import nn, sharding
from trellis_jax.ops.grid import Grid, runs_of
from trellis_jax.typing import Array, Hidden, SegmentIds, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the shell; a mixer's own Config extends it and sets the published defaults.

  Attributes:
    head_dim: D, key width of a head; 0 is key_expand * width / num_heads.
    value_dim: V, value width of a head; 0 is value_expand * width / num_heads.
    key_expand, value_expand: widths of all keys, all values, in widths of the model.
    conv_taps: K of the short convolutions; 1 is none.
    conv_decay: in the convolution of keys, each tap's start over that of the token after it. At 0 a
      key starts without the token before it, and recall, which binds a value to that, waits.
    conv_spread: half-width of the uniform noise on every tap's start; torch's Conv1d, which the
      published layers have, starts at noise of 1 / sqrt(K) alone.
    gate: activation of the output gate: gelu, silu, sigmoid or none.
    post_norm: RMSNorm before the output map: "rms" over all heads, "head_rms" over each, "none".
    gate_first: whether the gate comes before the norm.
  """

  head_dim: int = 0
  value_dim: int = 0
  key_expand: float = 1.0
  value_expand: float = 1.0
  conv_taps: int = 1
  conv_decay: float = 0.0
  conv_spread: float = 0.0
  gate: str = "none"
  post_norm: str = "head_rms"
  gate_first: bool = False

  # Field -> accepted names; subclasses extend it.
  CHOICES = {  # noqa: RUF012 (a class attribute, not a field)
    "gate": ("gelu", "silu", "sigmoid", "none"),
    "post_norm": ("rms", "head_rms", "none"),
  }

  def __post_init__(self):
    for role, accepted in self.CHOICES.items():
      if getattr(self, role) not in accepted:
        raise ValueError(
          f"{role}={getattr(self, role)!r} is unknown; accepted are {', '.join(accepted)}"
        )
    self.at_least(1, "conv_taps")
    self.at_least(0, "head_dim", "value_dim", "conv_decay", "conv_spread")

  def at_least(self, least: int, *fields: str) -> None:
    """Raises ValueError for the first of the fields that is below `least`."""
    for field in fields:
      if getattr(self, field) < least:
        raise ValueError(f"{field}={getattr(self, field)} is not accepted; it must be >= {least}")

  def head_width(self, width: int, num_heads: int, given: str, expand: str) -> int:
    """Returns the field `given`, or for 0 the head's part of width times the field `expand`."""
    if getattr(self, given):
      return getattr(self, given)
    size = getattr(self, expand) * width
    if size < num_heads or size % num_heads:
      raise ValueError(
        f"width={width} does not divide into num_heads={num_heads} with {expand}="
        f"{getattr(self, expand)}; set {given}"
      )
    return int(size) // num_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What a mixer in the shell carries from call to call.

  Attributes:
    memory: the recurrence's own, a pytree with leading [B].
    taps: the short convolutions' last K - 1 inputs [B, K-1, W], one per convolution.
    segment: id of the last token's segment [B]; 0 before the first token.
    seen: tokens of that segment so far [B].
  """

  memory: Any
  taps: tuple[Array, ...]
  segment: Int[Array, " B"]
  seen: Int[Array, " B"]


class Stretch(NamedTuple):
  """How the tokens of a call stand to each other; live tokens first, then padding.

  Attributes:
    run: number of restarts up to each token [B, T], 0 for tokens of the state's segment; None when
      there are none. Tokens of different runs must not see each other.
    live: whether a token is one [B, T]; padding must neither write nor decay. None: all are.
    count: live tokens of each row [B]; None: all.
    positions: of the tokens in their segments [B, T].
  """

  run: Int[Array, "B T"] | None
  live: Bool[Array, "B T"] | None
  count: Int[Array, " B"] | None
  positions: Int[Array, "B T"]

  def mask(self, x: Array, fill: float = 0.0) -> Array:
    """Returns x [B, T, ...] with `fill` at padding."""
    if self.live is None:
      return x
    return jnp.where(self.live.reshape(*self.live.shape, *(1,) * (x.ndim - 2)), x, fill)


class Taps:
  """Runs the convolutions of one call, in their order, and gathers what the next call needs."""

  def __init__(self, before: tuple[Array, ...], stretch: Stretch):
    self.before, self.stretch, self.after = list(before), stretch, []

  def __call__(self, conv: nn.ShortConv | None, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
    """Returns conv(x), or x for None."""
    if conv is None:
      return x
    before = sharding.like(self.before.pop(0), x)
    self.after.append(nn.last_taps(x, before, self.stretch.run, self.stretch.count))
    return conv(x, before, self.stretch.run)


class Mixer(nnx.Module):
  """The shell; see the module. Subclasses give `build`, `mix`, `memory_of` and `mix_flops`."""

  def __init__(
    self,
    width: int,
    num_heads: int,
    config: Config,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    init_std: float | None = None,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    """Builds the parameters.

    Args:
      width: of input and output.
      num_heads: H.
      config: the mixer's knobs.
      dtype: of the computation outside of the recurrence, which is fp32.
      param_dtype: of the parameters.
      init_std: of the maps' initial values; None is inputs**-0.5.
      out_scale: factor on the output map's initial values.
      rngs: of the initial values.
    """
    c = self.config = config
    self.width, self.num_heads, self.dtype, self.param_dtype = width, num_heads, dtype, param_dtype
    self.head_dim = c.head_width(width, num_heads, "head_dim", "key_expand")
    self.value_dim = c.head_width(width, num_heads, "value_dim", "value_expand")
    self._init_std, self._out_scale = init_std, out_scale
    self._map_weights, self._conv_widths = 0, ()
    self.build(rngs)
    std = ((num_heads * self.value_dim) ** -0.5 if init_std is None else init_std) * out_scale
    self.output = nn.Output(
      width,
      num_heads,
      self.value_dim,
      gate=c.gate,
      post_norm=c.post_norm,
      gate_first=c.gate_first,
      maps=dict(init_std=init_std),
      out_map=dict(init_std=std),
      rngs=rngs,
      **self._kw,
    )

  def build(self, rngs: nnx.Rngs) -> None:
    """Makes the mixer's own parameters, with `project` and `conv`."""
    raise NotImplementedError

  def mix(
    self,
    x: Hidden,
    memory: Any,
    stretch: Stretch,
    taps: Taps,
    implementation: str | None = None,
  ) -> tuple[Float[Array, "B T H V"], Any]:
    """Returns (the recurrence's outputs before norm and gate, the memory after the last token)."""
    raise NotImplementedError

  def memory_of(self, batch: int) -> Any:
    """Returns the memory of `batch` rows before their first token."""
    raise NotImplementedError

  def mix_flops(self, num_tokens: int) -> int:
    """Returns the FLOPs of the recurrence alone over one row of T tokens."""
    raise NotImplementedError

  @property
  def _kw(self) -> dict[str, Any]:
    # No attribute: a module's static parts must be hashable.
    return dict(dtype=self.dtype, param_dtype=self.param_dtype)

  def project(self, outputs: int, rngs: nnx.Rngs, **kw) -> nnx.Linear:
    """Returns a map without bias from the input to `outputs` features; `kw` as of `nn.linear`."""
    self._map_weights += self.width * outputs
    return nn.linear(
      self.width, outputs, **(dict(init_std=self._init_std, rngs=rngs) | self._kw | kw)
    )

  def conv(
    self, width: int, rngs: nnx.Rngs, activation: str = "silu", keys: int = 0
  ) -> nn.ShortConv | None:
    """Returns the next short convolution in the order that `mix` calls them; None for K = 1.

    Its first `keys` features are those of keys, whose taps start at `conv_decay`.
    """
    taps, spread = self.config.conv_taps, self.config.conv_spread
    if taps == 1:
      return None
    self._map_weights += taps * width
    self._conv_widths += (width,)
    decay = jnp.where(jnp.arange(width) < keys, self.config.conv_decay, 0)
    kw = dict(activation=activation, decay=decay, spread=spread, rngs=rngs)
    return nn.ShortConv(width, taps, **kw, **self._kw)

  def heads(self, x: Float[Array, "B T W"]) -> Float[Array, "B T H D"]:
    """Splits the last axis into heads."""
    return x.reshape(*x.shape[:2], self.num_heads, -1)

  def __call__(
    self,
    x: Hidden,
    state: State | None = None,
    *,
    segment_ids: SegmentIds | None = None,
    positions: Tokens | None = None,
    implementation: str | None = None,
  ) -> tuple[Hidden, State]:
    """Mixes the tokens of x; see `mixers.base.MixerProtocol`."""
    batch, length = x.shape[:2]
    fresh = state is None
    state = sharding.like(self.init_state(batch) if fresh else state, x)
    grid, run, live, count = None, None, None, None
    segment = jnp.maximum(state.segment, 1)
    if segment_ids is not None:
      count = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
      # Padding does not exist: everything sees the live tokens side by side.
      grid = Grid.of(segment_ids != 0, jnp.zeros_like(count), length)
      x, ids = grid.spread(x), grid.spread(segment_ids)
      positions = None if positions is None else grid.spread(positions)
      run, live = runs_of(ids, state.segment), ids != 0
      last = jnp.maximum(count - 1, 0)[:, None]
      final = jnp.take_along_axis(ids, last, axis=1)[:, 0].astype(jnp.int32)
      segment = jnp.where(count > 0, final, state.segment)
    own, seen = _positions(run, count, state.seen, length)
    stretch = Stretch(run, live, count, own if positions is None else positions)
    taps = Taps(state.taps, stretch)
    o, memory = self.mix(x, None if fresh else state.memory, stretch, taps, implementation)
    y = self.output(o.astype(self.dtype), x)
    y = y if grid is None else grid.collect(y)
    return y, State(memory, tuple(taps.after), segment, seen)

  def init_state(self, batch: int) -> State:
    """Returns the state of `batch` rows before their first token."""
    shape = (batch, self.config.conv_taps - 1)
    taps = tuple(jnp.zeros((*shape, w), self.dtype) for w in self._conv_widths)
    none = jnp.zeros((batch,), jnp.int32)
    return State(self.memory_of(batch), taps, none, none)

  def flops(self, num_tokens: int) -> int:
    """Returns the FLOPs of a forward over one row of T tokens."""
    weights = self._map_weights + self.output.num_weights
    return 2 * num_tokens * weights + self.mix_flops(num_tokens)

  def state_size(self) -> int:
    """Returns the floats that one row carries from token to token."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: self.init_state(1)))
    return sum(math.prod(x.shape) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))


def _positions(run, count, seen, length: int):
  """Returns (positions of the tokens in their segments [B, T], tokens of the last segment [B])."""
  at = jnp.arange(length, dtype=jnp.int32)[None]
  if run is None:
    return seen[:, None] + at, seen + length
  before = jnp.pad(run[:, :-1], ((0, 0), (1, 0)))
  start = jax.lax.cummax(jnp.where(run != before, at, 0), axis=1)
  positions = at - start + jnp.where(run == 0, seen[:, None], 0)
  last = jnp.take_along_axis(positions, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
  return positions, jnp.where(count > 0, last + 1, seen)
