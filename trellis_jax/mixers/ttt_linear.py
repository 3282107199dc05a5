r"""TTT-Linear: the state is a linear model that each token trains.

Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024, sections
2.3-2.7, and the layer's code. For an input x [B, T, width], per head:

  h    = W_qk x,   q, k = conv_q h, conv_k h,   v = W_v x
  f(k) = W k + b,                  W_0, b_0 learned
  L_s  = |LN(f(k_s)) - (v_s - k_s)|^2 / 2,      LN's weight and bias learned, one each per head
  W_t  = W_0 - a_i sum_{s <= t} g_s grad L_s,   gradients at the mini-batch's first weights W_0
  g_s  = base_lr sigmoid(w x_s + c) / D,        a_i = max(0, 1 / i + learned_i)
  o    = q + LN(f_t(q)),   y = W_o (norm(o) gelu(W_g x))

i is the token's place in its mini-batch of C, from 1. a_i scales the whole sum that token t sees,
and the weights at the mini-batch's end have a_C: so W_t is not W_{t-1} plus a step, and what a
split needs is the mini-batch's own tokens, which `ops.buffered` keeps. A document that starts
inside a mini-batch starts from W_0 there, at the place it has: its first token sees a_i of that
place, not a_1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import fast_weights, rotary, shell
from trellis_jax.ops import fast_weights as op
from trellis_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Config(shell.Config):
  """The knobs of TTT; defaults are the published ones, but for `rope`.

  Attributes:
    chunk_size: C, the mini-batch.
    base_lr: of the inner step.
    memory_std: of W_0.
    learned_scale: whether a_i is learned, or 1 / i.
    rope: whether q and k are turned by their places in the mini-batch; needs an even head_dim.
      The layer's code does so, the short convolutions do without.
  """

  chunk_size: int = 16
  base_lr: float = 1.0
  memory_std: float = 0.02
  learned_scale: bool = True
  rope: bool = False
  conv_taps: int = 4
  gate: str = "gelu"
  post_norm: str = "rms"

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "chunk_size")


class Mixer(fast_weights.Mixer):
  """The TTT mixer with a linear model; see the module's equations."""

  RULE, GATES = op.TTT, 1

  def build(self, rngs: nnx.Rngs) -> None:
    """Makes the mixer's own parameters."""
    c, h, d = self.config, self.num_heads, self.head_dim
    if self.value_dim != d:
      raise ValueError(f"value width {self.value_dim} is not accepted; TTT needs head_dim={d}")
    if c.rope and d % 2:
      raise ValueError(f"head_dim={d} is not accepted; rope needs an even one")
    self.qk, self.v = self.project(h * d, rngs), self.project(h * d, rngs)
    self.conv_q = self.conv(h * d, rngs, "none")
    self.conv_k = self.conv(h * d, rngs, "none", keys=h * d)
    self.gates = self.project(h, rngs, init_std=0.02, use_bias=True)
    if c.learned_scale:
      self.scale = nnx.Param(jnp.zeros((c.chunk_size,), self.param_dtype))
    self.norm_weight = nnx.Param(jnp.ones((h, d), self.param_dtype))
    self.norm_bias = nnx.Param(jnp.zeros((h, d), self.param_dtype))
    self.build_network(rngs)

  def build_network(self, rngs: nnx.Rngs) -> None:
    """Makes the initial model."""
    self.network((self.head_dim, self.head_dim), (self.config.memory_std,), True, rngs)

  def mix(self, x, memory, stretch: shell.Stretch, taps: shell.Taps, implementation=None):
    """Returns (o [B, T, H, V], the memory after the last token)."""
    c = self.config
    h = self.qk(x)
    q, k = self.heads(taps(self.conv_q, h)), self.heads(taps(self.conv_k, h))
    v = self.heads(self.v(x))
    if c.rope:
      offset = jnp.zeros((x.shape[0],), jnp.int32) if memory is None else memory.offset
      places = (offset[:, None] + jnp.arange(x.shape[1])[None]) % c.chunk_size
      q, k = rotary.rotate(q, places), rotary.rotate(k, places)
    step = c.base_lr / self.head_dim * jax.nn.sigmoid(self.gates(x).astype(jnp.float32))
    affine = tuple(p[...].astype(jnp.float32) for p in (self.norm_weight, self.norm_bias))
    loss = _Loss(*(p[None, :, None] for p in affine))
    z, memory = self.learn(op.TTT(self.scales()), loss, q, k, v, (step,), memory, stretch)
    o = q.astype(z.dtype) + fast_weights.layer_norm(z, *(p[None, None] for p in affine))
    return o, memory

  def scales(self) -> Array:
    """Returns a_i for the places of a mini-batch [C]."""
    scales = 1 / jnp.arange(1, self.config.chunk_size + 1, dtype=jnp.float32)
    if self.config.learned_scale:
      scales = scales + self.scale[...].astype(jnp.float32)
    return jnp.maximum(scales, 0)


class _Loss:
  """|LN(z) - (v - k)|^2 / 2 of each token, for LN's affine [1, H, 1, D]."""

  def __init__(self, weight: Array, bias: Array):
    self.affine = weight, bias

  def __call__(self, z, k, v):
    error = fast_weights.layer_norm(z, *self.affine) - (v - k)
    return 0.5 * jnp.sum(error * error, axis=-1)
