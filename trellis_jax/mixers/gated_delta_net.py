r"""Gated DeltaNet (Yang et al. 2025, "Gated delta networks", eq. 10 and section 3.4). Per head:

  q, k  = unit(silu(conv(W_q x))) / sqrt(D), unit(silu(conv(W_k x)))
  v     = silu(conv(W_v x)),   b = sigmoid(w_b x)
  log c = -A softplus(w_c x + bias)
  S    <- c (I - b k k^T) S + b k v^T
  o     = S^T q
  y     = W_o (norm(o) * silu(W_g x))

Keys are 3/4, values 3/2 as wide as the model, A ~ U(0, 16) and softplus(bias) log-uniform in
[1e-3, 0.1] at the start, as in the published layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import affine_mixer, nn


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of Gated DeltaNet.

  Attributes:
    dt_min, dt_max: softplus(bias) at the start.
    rate_max: A is uniform between (almost) 0 and it at the start.
  """

  key_expand: float = 0.75
  value_expand: float = 1.5
  conv_taps: int = 4
  gate: str = "silu"
  dt_min: float = 1e-3
  dt_max: float = 0.1
  rate_max: float = 16.0


class Mixer(affine_mixer.Mixer):
  """Gated DeltaNet; see the module's equations."""

  DELTA = True

  def build(self, rngs):
    """Makes the maps of q, k, v and the two gates, and the convolutions."""
    c, heads = self.config, self.num_heads
    self.maps(rngs, activation="silu")
    self.gates = self.narrow(2 * heads, rngs)
    self.dt_bias = nnx.Param(
      affine_mixer.step_bias(heads, rngs, self.param_dtype, c.dt_min, c.dt_max)
    )
    # Not from 0: its log is a parameter.
    least = 1e-3 * c.rate_max
    self.log_rate = nnx.Param(
      affine_mixer.log_rate(heads, rngs, self.param_dtype, least, c.rate_max)
    )

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, S); see `shell.Mixer`."""
    q, k, v = self.qkv(x, taps)
    log_decay, beta = self.decay_and_step(x)
    q = nn.unit(q) * self.head_dim**-0.5
    w = beta[..., None] * v
    return self.recur(q, nn.unit(k), w, memory, stretch, log_decay=log_decay, beta=beta)

  def decay_and_step(self, x):
    """Returns (log c, b) [B, T, H] in fp32."""
    decay, step = jnp.split(self.gates(x), 2, axis=-1)
    _, log_decay = affine_mixer.step_and_decay(decay, self.dt_bias[...], self.log_rate[...])
    return log_decay, jax.nn.sigmoid(step)
