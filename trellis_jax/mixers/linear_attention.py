r"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs", eq. 16-20). Per head:

  q, k = elu(W_q x) + 1, elu(W_k x) + 1,   v = W_v x
  S   <- S + k v^T,   z <- z + k
  o    = S^T q, and with `normalize` S^T q / z^T q

As published the read is normalised and nothing follows it. Here the shell's norm per head
follows, which takes the scale out as well: `Config(normalize=True, post_norm="none")` is the
published form.
"""

import dataclasses

import jax
import jax.numpy as jnp

from trellis_jax import affine_mixer


@dataclasses.dataclass(frozen=True)
class Config(affine_mixer.Config):
  """The knobs of linear attention.

  Attributes:
    normalize: whether reads are divided by the running sum z^T q.
    eps: of the division.
  """

  normalize: bool = False
  eps: float = 1e-6


class Mixer(affine_mixer.Mixer):
  """Linear attention; see the module's equations."""

  def build(self, rngs):
    """Makes the maps of q, k and v."""
    self.maps(rngs)

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Returns (o, S), with z as S's last column when normalising; see `shell.Mixer`."""
    q, k, v = self.qkv(x, taps)
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    if not self.config.normalize:
      return self.recur(q, k, v, memory, stretch)
    # In fp32, so that the sum is as exact as what it divides.
    v = v.astype(self.wide)
    w = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    o, memory = self.recur(q, k, w, memory, stretch)
    return o[..., :-1] / (o[..., -1:] + self.config.eps), memory

  def memory_of(self, batch):
    """Returns zeros: S, and z as its last column."""
    values = self.value_dim + self.config.normalize
    return jnp.zeros((batch, self.num_heads, self.head_dim, values), self.wide)
