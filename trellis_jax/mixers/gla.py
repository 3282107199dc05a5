r"""Gated linear attention (Yang et al. 2024, "GLA", eq. 3-4 and section 4.4). Per head:

  q, k, v = W_q x / sqrt(D), W_k x, W_v x
  log a   = log_sigmoid(W_2 W_1 x + b) / 16          one per key channel, W_1 to 16 features
  S      <- diag(a) S + k v^T
  o       = S^T q
  y       = W_o (norm(o) * silu(W_g x))

Keys are half as wide as the model, as published.
"""

import dataclasses

import jax

from trellis_jax import affine_mixer


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of gated linear attention.

  Attributes:
    gate_rank: features between the two maps of the forget gate.
    gate_power: 1 / exponent of the sigmoid: larger gates forget more slowly.
  """

  key_expand: float = 0.5
  gate: str = "silu"
  gate_rank: int = 16
  gate_power: float = 16.0

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "gate_rank")


class Mixer(affine_mixer.Mixer):
  """Gated linear attention; see the module's equations."""

  def build(self, rngs):
    """Makes the maps of q, k, v and the forget gate."""
    self.maps(rngs)
    keys = self.num_heads * self.head_dim
    self.low, self.high = affine_mixer.low_rank(self, self.config.gate_rank, keys, rngs)

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, S); see `shell.Mixer`."""
    q, k, v = self.qkv(x, taps)
    q = q * self.head_dim**-0.5
    return self.recur(q, k, v, memory, stretch, log_decay=self.log_decay(x))

  def log_decay(self, x):
    """Returns log a [B, T, H, D] in fp32."""
    return self.heads(jax.nn.log_sigmoid(self.high(self.low(x)))) / self.config.gate_power
