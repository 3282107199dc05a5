r"""RetNet's multi-scale retention (Sun et al. 2023, "Retentive network", eq. 5-8). Per head h:

  q, k = rotary(W_q x), rotary(W_k x) / sqrt(D),   v = W_v x
  S   <- c_h S + k v^T,   c_h = 1 - 2^(-5 - h)
  o    = S^T q
  y    = W_o (norm(o) * silu(W_g x))

Values are twice as wide as keys, as published. The norm per head is an RMSNorm (the paper's is a
group norm over the same numbers).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from trellis_jax import affine_mixer
from trellis_jax.rotary import rotate


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of RetNet.

  Attributes:
    rotary_base: of the positions' frequencies.
  """

  value_expand: float = 2.0
  gate: str = "silu"
  rotary_base: float = 10000.0


class Mixer(affine_mixer.Mixer):
  """Multi-scale retention; see the module's equations."""

  def build(self, rngs):
    """Makes the maps of q, k and v."""
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is not accepted; rotary positions need it even")
    self.maps(rngs)

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, S); see `shell.Mixer`."""
    q, k, v = self.qkv(x, taps)
    q, k = (rotate(y, stretch.positions, self.config.rotary_base) for y in (q, k))
    log = np.log1p(-np.exp2(-5.0 - np.arange(self.num_heads)))
    shape = (*x.shape[:2], self.num_heads)
    log_decay = jnp.broadcast_to(jnp.asarray(log, self.wide)[None, None], shape)
    k = k * self.head_dim**-0.5
    return self.recur(q, k, v, memory, stretch, log_decay=log_decay)
