r"""ABC (Peng et al. 2022, "ABC: attention with bounded-memory control", section 3). Per head:

  q, k, v = W_q x / sqrt(D), W_k x, W_v x
  a       = softmax(W_a x)                  which of the M slots the token goes to
  S_k    <- S_k + a k^T,   S_v <- S_v + a v^T
  o       = S_v^T softmax(S_k q)
  y       = W_o (norm(o) * silu(W_g x))

The eldest of a family: GSA lets slots forget, Trellis lets what is written depend on what they
hold; `ops/two_pass.py` has all three in one table. The norm and the swish gate are those of the
public implementation, whose rotary positions and halved keys are not of the paper and not here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from trellis_jax import affine_mixer
from trellis_jax.ops.two_pass import two_pass, two_pass_flops


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of ABC.

  Attributes:
    num_slots: M, slots of each memory.
  """

  gate: str = "silu"
  num_slots: int = 64

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "num_slots")


class Mixer(affine_mixer.Mixer):
  """ABC; see the module's equations."""

  def build(self, rngs):
    """Makes the maps of q, k, v and the slots."""
    self.maps(rngs)
    self.alpha = self.project(self.num_heads * self.config.num_slots, rngs, dtype=self.wide)

  def tokens(self, x, taps):
    """Returns q, k [B, T, H, D] and v [B, T, H, V]."""
    q, k, v = self.qkv(x, taps)
    return q * self.head_dim**-0.5, k, v

  def slots(self, x):
    """Returns (a, log of what slots keep or None) [B, T, H, M] in fp32."""
    return jax.nn.softmax(self.heads(self.alpha(x)), axis=-1), None

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, (S_k, S_v)); see `shell.Mixer`."""
    a, log_decay = self.slots(x)
    return two_pass(
      *self.tokens(x, taps),
      stretch.mask(a),
      log_decay=None if log_decay is None else stretch.mask(log_decay),
      initial=memory,
      run=stretch.run,
      chunk_size=self.config.chunk_size,
    )

  def memory_of(self, batch):
    """Returns zeros: S_k [B, H, M, D] and S_v [B, H, M, V]."""
    shape = (batch, self.num_heads, self.config.num_slots)
    return tuple(jnp.zeros((*shape, n), self.wide) for n in (self.head_dim, self.value_dim))

  def mix_flops(self, num_tokens):
    """Returns the FLOPs of the two passes over one row."""
    c = self.config
    widths = (self.head_dim, self.value_dim, c.num_slots)
    return two_pass_flops(num_tokens, self.num_heads, *widths, c.chunk_size)
