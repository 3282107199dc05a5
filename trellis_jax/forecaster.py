r"""A forecaster of many channels over any mixer.

For a window x [L, N] of a series whose first row is at place p of its cycle of W rows, per channel:

  m, d     = mean, deviation of x                  per window (RevIN, Kim et al. 2022)
  z        = (x - m) / d - c[p .. p+L)             c [W, N] learned (CycleNet, Lin et al. 2024)
  tokens   = W_e z + channel's vector              patches of z (PatchTST, Nie et al. 2023), or all
                                                   of z, channels side by side (iTransformer, Liu
                                                   et al. 2024)
  h        = blocks(tokens)                        x + mixer(norm x), then x + mlp(norm x); over
                                                   channels every other block reads them backwards
  y        = A z + W_o norm(h)                     A [L, horizon] one map for all channels (NLinear,
                                                   Zeng et al. 2023)
  forecast = m + d (y + c[p+L .. p+L+horizon))

W_o starts at 0, so an untrained forecaster is its linear map A, whose start is the caller's:
zeros repeat the window's mean. With `num_layers=0` it stays a linear map of z.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from trellis_jax import nn
from trellis_jax.model import Block, LMConfig
from trellis_jax.typing import Array

TOKENS = ("patches", "channels")


@dataclasses.dataclass(frozen=True)
class ForecasterConfig:
  """A forecaster.

  Attributes:
    channels: N.
    horizon: rows to forecast.
    lookback: L, rows of a window.
    period: W, rows of the learned cycle; 1 is none.
    tokens: "patches" (a sequence in time per channel) or "channels" (one over the channels).
    patch, stride: rows of a patch, and between the starts of patches; the last one ends the window.
    width, num_layers, num_heads, mlp_width: of the blocks.
    mixer: a name of `trellis_jax.mixers`, or a pattern of names that the layers repeat.
    mixers: knobs by mixer name.
    dropout: rate before W_o.
    eps: added to the variance of a window.
  """

  channels: int
  horizon: int
  lookback: int = 96
  period: int = 1
  tokens: str = "channels"
  patch: int = 16
  stride: int = 8
  width: int = 64
  num_layers: int = 2
  num_heads: int = 2
  mlp_width: int = 128
  mixer: str | tuple[str, ...] = "trellis"
  mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  dropout: float = 0.0
  eps: float = 1e-5

  def __post_init__(self):
    for field in ("channels", "horizon", "lookback", "period", "patch", "stride"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} is not accepted; it must be an integer >= 1")
    if self.num_layers < 0:
      raise ValueError(f"num_layers={self.num_layers} is not accepted; it must be >= 0")
    if self.tokens not in TOKENS:
      raise ValueError(f"tokens={self.tokens!r} is unknown; accepted are {', '.join(TOKENS)}")
    if self.tokens == "patches" and self.patch > self.lookback:
      raise ValueError(
        f"patch={self.patch} is not accepted; it must be <= lookback={self.lookback}"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} is not accepted; it lies in [0, 1)")
    object.__setattr__(self, "mixers", self.blocks().mixers)

  def blocks(self) -> LMConfig:
    """The config of the blocks, which are a language model's."""
    return LMConfig(
      vocab_size=1,
      width=self.width,
      num_layers=max(1, self.num_layers),
      num_heads=self.num_heads,
      mlp_width=self.mlp_width,
      mixer=self.mixer,
      mixers=self.mixers,
    )


class Forecaster(nnx.Module):
  """See the module's equations."""

  def __init__(self, cfg: ForecasterConfig, *, rngs: nnx.Rngs):
    """Builds the parameters; raises ValueError when a mixer refuses the sizes."""
    self.cfg = cfg
    self.linear = nnx.Param(jnp.zeros((cfg.lookback, cfg.horizon)))
    if cfg.period > 1:
      self.cycle = nnx.Param(jnp.zeros((cfg.period, cfg.channels)))
    if not cfg.num_layers:
      return
    blocks = cfg.blocks()
    inputs, tokens = cfg.lookback, 1
    if cfg.tokens == "patches":
      inputs, tokens = cfg.patch, (cfg.lookback - cfg.patch) // cfg.stride + 1
    self.embed = nn.linear(inputs, cfg.width, rngs=rngs)
    self.channel = nnx.Param(0.02 * rngs.params.normal((cfg.channels, cfg.width)))
    names = [blocks.pattern[i % len(blocks.pattern)] for i in range(cfg.num_layers)]
    self.blocks = nnx.List([Block(blocks, name, rngs=rngs) for name in names])
    self.norm = nnx.RMSNorm(cfg.width, epsilon=blocks.norm_eps, rngs=rngs)
    self.dropout = nnx.Dropout(cfg.dropout)
    self.out = nn.linear(tokens * cfg.width, cfg.horizon, init_std=0.0, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B L N"],
    phase: Int[Array, " B"] | None = None,
    *,
    rngs: nnx.Rngs | None = None,
  ) -> Float[Array, "B horizon N"]:
    """Returns the forecast of the rows after x.

    Args:
      x: windows.
      phase: place of each window's first row in the cycle; None is 0.
      rngs: of dropout; None is none.
    """
    cfg = self.cfg
    if x.shape[1:] != (cfg.lookback, cfg.channels):
      raise ValueError(
        f"x has the shape {x.shape}; accepted is [B, lookback={cfg.lookback}, "
        f"channels={cfg.channels}]"
      )
    cycle = self.cycle_of(x.shape[0], phase)
    mean = jnp.mean(x, axis=1, keepdims=True)
    deviation = jnp.sqrt(jnp.var(x, axis=1, keepdims=True) + cfg.eps)
    z = (x - mean) / deviation - cycle[:, : cfg.lookback]
    y = jnp.einsum("bln,lh->bhn", z, self.linear[...]) + cycle[:, cfg.lookback :]
    if cfg.num_layers:
      y = y + self.mixed(jnp.swapaxes(z, 1, 2), rngs)
    return y * deviation + mean

  def cycle_of(self, batch: int, phase=None) -> Float[Array, "B L+horizon N"]:
    """Returns the cycle at the rows of the windows and of their forecasts."""
    cfg = self.cfg
    length = cfg.lookback + cfg.horizon
    if cfg.period == 1:
      return jnp.zeros((1, length, cfg.channels))
    start = jnp.zeros((batch,), jnp.int32) if phase is None else phase
    rows = (start[:, None] + jnp.arange(length)[None]) % cfg.period
    return jnp.take(self.cycle[...], rows, axis=0)

  def mixed(self, z: Float[Array, "B N L"], rngs=None) -> Float[Array, "B horizon N"]:
    """Returns what the blocks add to the linear map."""
    cfg = self.cfg
    batch = z.shape[0]
    channel = self.channel[...][None]
    if cfg.tokens == "channels":
      h = self.embed(z) + channel
    else:
      first = (cfg.lookback - cfg.patch) % cfg.stride
      starts = jnp.arange(first, cfg.lookback - cfg.patch + 1, cfg.stride)
      patches = z[:, :, starts[:, None] + jnp.arange(cfg.patch)[None]]
      h = self.embed(patches) + channel[:, :, None]
      h = h.reshape(batch * cfg.channels, len(starts), cfg.width)
    for i, block in enumerate(self.blocks):
      flip = cfg.tokens == "channels" and i % 2
      h = block(h[:, ::-1] if flip else h)[0]
      h = h[:, ::-1] if flip else h
    h = self.norm(h).reshape(batch, cfg.channels, -1)
    h = self.dropout(h, rngs=rngs, deterministic=rngs is None)
    return jnp.swapaxes(self.out(h), 1, 2)
