"""What the mixers whose recurrence is `ops.affine` share: one memory S [K, V] per head.

Their files say what q, k, w and the gates are; this one masks padding, passes restarts on, and
counts. Gates and decays are computed in fp32 whatever the compute dtype.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from trellis_jax import nn, shell
from trellis_jax.ops import affine
from trellis_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Config(shell.Config):
  """The knobs of a mixer over `ops.affine`, on top of the shell's.

  Attributes:
    chunk_size: tokens computed in parallel, a power of two; results do not depend on it.
  """

  chunk_size: int = 64

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "chunk_size")
    if self.chunk_size & (self.chunk_size - 1):
      raise ValueError(f"chunk_size={self.chunk_size} is not accepted; it must be a power of two")


class Mixer(shell.Mixer):
  """See the module. Subclasses give `build` and `mix`, with `maps` and `recur`."""

  # Whether the recurrence has the delta rule, for the count of FLOPs.
  DELTA = False

  @property
  def wide(self):
    """The dtype of gates and memories: at least fp32."""
    return jnp.promote_types(self.dtype, jnp.float32)

  def maps(self, rngs: nnx.Rngs, activation: str = "none") -> None:
    """Makes the maps q, k, v and, for conv_taps > 1, a short convolution on each."""
    keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
    self.q, self.k = self.project(keys, rngs), self.project(keys, rngs)
    self.v = self.project(values, rngs)
    self.activation = activation
    self.conv_q = self.conv(keys, rngs, "none")
    self.conv_k = self.conv(keys, rngs, "none", keys=keys)
    self.conv_v = self.conv(values, rngs, "none")

  def qkv(self, x, taps: shell.Taps):
    """Returns q, k, v [B, T, H, D | V] = act(conv(W x))."""
    pairs = ((self.q, self.conv_q), (self.k, self.conv_k), (self.v, self.conv_v))
    act = getattr(jax.nn, self.activation) if self.activation != "none" else lambda y: y
    return tuple(self.heads(act(taps(conv, w(x)))) for w, conv in pairs)

  def narrow(self, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a map to a few gates per head in fp32, near zero: gates start at their biases."""
    return self.project(outputs, rngs, init_std=0.2 * self.width**-0.5, dtype=self.wide)

  def recur(self, q, k, w, memory, stretch: shell.Stretch, *, log_decay=None, beta=None):
    """Returns (o, S) of `affine`; padding neither writes nor decays."""
    mask = lambda x: None if x is None else stretch.mask(x)
    return affine.affine(
      q,
      k,
      mask(w),
      log_decay=mask(log_decay),
      beta=mask(beta),
      initial=memory,
      run=stretch.run,
      chunk_size=self.config.chunk_size,
    )

  def memory_of(self, batch: int) -> Float[Array, "B H D V"]:
    """Returns zeros: S before the first token."""
    return jnp.zeros((batch, self.num_heads, self.head_dim, self.value_dim), self.wide)

  def mix_flops(self, num_tokens: int) -> int:
    """Returns the FLOPs of `affine` over one row."""
    return affine.flops(
      num_tokens,
      self.num_heads,
      self.head_dim,
      self.value_dim,
      chunk_size=self.config.chunk_size,
      delta=self.DELTA,
    )


def low_rank(
  mixer: Mixer, rank: int, outputs: int, rngs: nnx.Rngs
) -> tuple[nnx.Linear, nnx.Linear]:
  """Returns the maps width -> rank -> outputs of a mixer's gate in fp32, the second with a bias."""
  mixer._map_weights += rank * outputs
  kw = dict(dtype=mixer.wide, param_dtype=mixer.param_dtype, rngs=rngs)
  return mixer.project(rank, rngs, dtype=mixer.wide), nn.linear(rank, outputs, use_bias=True, **kw)


def step_bias(num_heads: int, rngs: nnx.Rngs, dtype, low: float = 1e-3, high: float = 0.1) -> Array:
  """Returns biases [H] whose softplus is log-uniform in [low, high] (Mamba; Gu and Dao 2023)."""
  log = rngs.params.uniform((num_heads,), jnp.float32, math.log(low), math.log(high))
  dt = jnp.exp(log)
  return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def log_rate(num_heads: int, rngs: nnx.Rngs, dtype, low: float, high: float) -> Array:
  """Returns log A [H] for A uniform in [low, high]."""
  return jnp.log(rngs.params.uniform((num_heads,), jnp.float32, low, high)).astype(dtype)


def step_and_decay(raw: Array, bias: Array, log_rate: Array) -> tuple[Array, Array]:
  """Returns (dt, log d = -A dt), dt = softplus(raw + bias), [B, T, H] in the dtype of `raw`."""
  dt = jax.nn.softplus(raw + bias.astype(raw.dtype)[None, None])
  return dt, -jnp.exp(log_rate.astype(raw.dtype))[None, None] * dt
