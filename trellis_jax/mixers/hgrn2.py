r"""HGRN2 (Qin et al. 2024, "Gated linear RNNs with state expansion", eq. 4-6). Per head:

  q  = silu(W_q x),   i = W_i x
  f  = lb + (1 - lb) sigmoid(W_f x)        one per key channel
  S <- diag(f) S + (1 - f) i^T
  o  = S^T q

The published lower bounds lb are learned, 0 in the first layer and growing with depth, even steps
at the start. Here a layer does not know its depth: lb is a knob, by default their mean.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from trellis_jax import affine_mixer


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of HGRN2.

  Attributes:
    lower_bound: lb in [0, 1), the least that the forget gate keeps.
  """

  post_norm: str = "rms"
  lower_bound: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.lower_bound < 1:
      raise ValueError(f"lower_bound={self.lower_bound} is not accepted; it lies in [0, 1)")


class Mixer(affine_mixer.Mixer):
  """HGRN2; see the module's equations."""

  def build(self, rngs):
    """Makes the maps of q, i and f."""
    keys = self.num_heads * self.head_dim
    self.q = self.project(keys, rngs)
    self.v = self.project(self.num_heads * self.value_dim, rngs)
    self.forget = self.project(keys, rngs, dtype=self.wide)
    self.conv_q, self.conv_f = self.conv(keys, rngs, "none"), self.conv(keys, rngs, "none")
    self.conv_v = self.conv(self.num_heads * self.value_dim, rngs, "none")

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, S); see `shell.Mixer`."""
    q = jax.nn.silu(self.heads(taps(self.conv_q, self.q(x))))
    log_f, k = self.forgets(x, taps)
    i = self.heads(taps(self.conv_v, self.v(x)))
    return self.recur(q, k, i, memory, stretch, log_decay=log_f)

  def forgets(self, x, taps=lambda conv, y: y):
    """Returns (log f, 1 - f) [B, T, H, D] in fp32, neither as a difference."""
    lb, z = self.config.lower_bound, self.heads(taps(self.conv_f, self.forget(x)))
    z = z.astype(self.wide)
    log_f = jax.nn.log_sigmoid(z)
    if lb:
      log_f = jnp.logaddexp(math.log(lb), math.log1p(-lb) + log_f)
    return log_f, (1 - lb) * jax.nn.sigmoid(-z)
