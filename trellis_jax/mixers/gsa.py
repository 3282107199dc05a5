r"""GSA (Zhang et al. 2024, "Gated slot attention", eq. 9-11 and section 4.2). Per head:

  q, k, v = silu(W_q x), silu(W_k x), silu(W_v x)
  c       = sigmoid(W_c x)^(1/8)                     what each of the M slots keeps
  S_k    <- diag(c) S_k + (1 - c) k^T,   S_v <- diag(c) S_v + (1 - c) v^T
  o       = silu(S_v^T softmax(S_k q))
  y       = W_o norm(o)                              one RMSNorm over all heads

ABC with slots that forget as much as they take up; Trellis goes on from here. The table of the
family is in `ops/two_pass.py`. As published there is no output gate, and SiLU comes before the
norm.
"""

import dataclasses

import jax
import jax.numpy as jnp

from trellis_jax.mixers import abc


@dataclasses.dataclass(frozen=True)
class Config(abc.Config):
  """The knobs of GSA.

  Attributes:
    gate_power: 1 / exponent of the sigmoid: larger gates forget more slowly.
  """

  gate: str = "none"
  post_norm: str = "rms"
  gate_power: float = 8.0


class Mixer(abc.Mixer):
  """GSA; see the module's equations."""

  def tokens(self, x, taps):
    """Returns q, k [B, T, H, D] and v [B, T, H, V]."""
    return tuple(map(jax.nn.silu, self.qkv(x, taps)))

  def slots(self, x):
    """Returns (1 - c, log c) [B, T, H, M] in fp32."""
    log_c = jax.nn.log_sigmoid(self.heads(self.alpha(x))) / self.config.gate_power
    return -jnp.expm1(log_c), log_c

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, (S_k, S_v)); see `shell.Mixer`."""
    o, memory = super().mix(x, memory, stretch, taps, implementation)
    return jax.nn.silu(o), memory
