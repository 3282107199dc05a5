r"""Mamba2 (Dao and Gu 2024, "Transformers are SSMs", sections 6 and 8). Per head:

  x, (B, C) = silu(conv(W_x h)), silu(conv(W_bc h))      B, C [N] shared by all heads
  dt = softplus(w_dt h + bias)
  S <- exp(-A dt) S + B (dt x)^T,   S [N, V]
  y  = S^T C + d x
  out = W_o norm(y * silu(W_z h))                        one RMSNorm over all heads, gate first

N = 128, heads together twice as wide as the model, A ~ U(1, 16), dt log-uniform in [1e-3, 0.1] at
the start, d = 1, as published; heads are num_heads (published: as many as have V = 64). The
published convolution has a bias; the shell's has none.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import affine_mixer


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of Mamba2.

  Attributes:
    state_dim: N, what takes the keys' place; head_dim and key_expand have no meaning here.
    dt_min, dt_max: steps at the start.
    rate_min, rate_max: A at the start.
  """

  value_expand: float = 2.0
  conv_taps: int = 4
  gate: str = "silu"
  post_norm: str = "rms"
  gate_first: bool = True
  state_dim: int = 128
  dt_min: float = 1e-3
  dt_max: float = 0.1
  rate_min: float = 1.0
  rate_max: float = 16.0

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "state_dim")
    if self.head_dim:
      raise ValueError(f"head_dim={self.head_dim} is not accepted; set state_dim or value_dim")

  def head_width(self, width, num_heads, given, expand):
    """Returns state_dim for the keys' width."""
    if given == "head_dim":
      return self.state_dim
    return super().head_width(width, num_heads, given, expand)


class Mixer(affine_mixer.Mixer):
  """Mamba2; see the module's equations."""

  def build(self, rngs):
    """Makes the maps of x, B, C and dt, their convolutions, A and d."""
    c, heads = self.config, self.num_heads
    self.x = self.project(heads * self.value_dim, rngs)
    self.bc = self.project(2 * c.state_dim, rngs)
    self.conv_x = self.conv(heads * self.value_dim, rngs)
    self.conv_bc = self.conv(2 * c.state_dim, rngs, keys=c.state_dim)
    self.gates = self.narrow(heads, rngs)
    self.dt_bias = nnx.Param(
      affine_mixer.step_bias(heads, rngs, self.param_dtype, c.dt_min, c.dt_max)
    )
    self.log_rate = nnx.Param(
      affine_mixer.log_rate(heads, rngs, self.param_dtype, c.rate_min, c.rate_max)
    )
    self.skip = nnx.Param(jnp.ones((heads,), self.param_dtype))

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (y, S); see `shell.Mixer`."""
    act = jax.nn.silu if self.config.conv_taps == 1 else lambda y: y
    v, bc = act(taps(self.conv_x, self.x(x))), act(taps(self.conv_bc, self.bc(x)))
    v = self.heads(v).astype(self.wide)
    shape = (*x.shape[:2], self.num_heads, self.config.state_dim)
    b, c = (jnp.broadcast_to(y[:, :, None], shape) for y in jnp.split(bc, 2, axis=-1))
    dt, log_decay = self.steps(x)
    o, memory = self.recur(c, b, dt[..., None] * v, memory, stretch, log_decay=log_decay)
    return o + self.skip[...].astype(self.wide)[None, None, :, None] * v, memory

  def steps(self, x):
    """Returns (dt, -A dt) [B, T, H] in fp32."""
    return affine_mixer.step_and_decay(self.gates(x), self.dt_bias[...], self.log_rate[...])
