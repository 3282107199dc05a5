r"""DeltaNet (Yang et al. 2024, "Parallelizing linear transformers with the delta rule"). Per head:

  q, k = unit(silu(conv(W_q x))) / sqrt(D), unit(silu(conv(W_k x)))
  v    = silu(conv(W_v x)),   b = sigmoid(w_b x)
  S   <- (I - b k k^T) S + b k v^T
  o    = S^T q
  y    = W_o norm(o)

The write is a step of gradient descent on |S^T k - v|^2 / 2 (Schlag et al. 2021, eq. 24).
"""

import dataclasses

import jax

from trellis_jax import affine_mixer, nn


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of DeltaNet."""

  conv_taps: int = 4


class Mixer(affine_mixer.Mixer):
  """DeltaNet; see the module's equations."""

  DELTA = True

  def build(self, rngs):
    """Makes the maps of q, k, v and b, and the convolutions."""
    self.maps(rngs, activation="silu")
    self.gates = self.narrow(self.num_heads, rngs)

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, S); see `shell.Mixer`."""
    q, k, v = self.qkv(x, taps)
    beta = jax.nn.sigmoid(self.gates(x))
    q = nn.unit(q) * self.head_dim**-0.5
    return self.recur(q, nn.unit(k), beta[..., None] * v, memory, stretch, beta=beta)
