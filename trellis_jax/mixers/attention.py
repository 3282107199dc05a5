r"""Softmax attention, the mixer of Transformer++ (LLaMA: Touvron et al., 2023).

For an input x [B, T, width], per head, with one key-value head for several of them if so asked
(grouped queries: Ainslie et al., 2023):

  q, k = rotary(W_q x), rotary(W_k x)      (Su et al., 2021)
  v    = W_v x
  o_t  = sum_s p_ts v_s,   p_t = softmax_s(q_t . k_s / sqrt D),   s <= t, t - s < window
  y    = W_o o

The state holds the keys and values of the last `cache_length` tokens, so it does not grow. A call
sees all of its own tokens and those that the state holds: as long as no segment is longer than
cache_length, or the window no longer than cache_length + 1, any split equals one call.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from trellis_jax import rotary, sharding, shell
from trellis_jax.ops import attention
from trellis_jax.typing import Array


def implementations() -> tuple[str, ...]:
  """Returns the names that `implementation=` takes, those of `jax.nn.dot_product_attention`."""
  return attention.IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Config(shell.Config):
  """The knobs of attention, on top of the shell's; keys and values are of one width.

  Attributes:
    num_kv_heads: heads of keys and values, which num_heads is a multiple of; 0 is num_heads.
    rope_base: base of the rotary positions; 0 is none.
    window: tokens that a token sees, itself included; 0 is all.
    cache_length: tokens whose keys and values the state holds, fewer where the window needs fewer.
  """

  post_norm: str = "none"
  num_kv_heads: int = 0
  rope_base: float = 10000.0
  window: int = 0
  cache_length: int = 2048

  def __post_init__(self):
    super().__post_init__()
    self.at_least(0, "num_kv_heads", "rope_base", "window", "cache_length")

  @property
  def held(self) -> int:
    """L, tokens that the state holds."""
    return min(self.cache_length, self.window - 1) if self.window else self.cache_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a row has seen last, the newest at the end.

  Attributes:
    k, v: turned keys, values [B, L, G, D].
    filled: how many of them are of the current segment [B]; the others must not be seen.
  """

  k: Float[Array, "B L G D"]
  v: Float[Array, "B L G D"]
  filled: Int[Array, " B"]


class Mixer(shell.Mixer):
  """Causal softmax attention; see the module's equations."""

  def build(self, rngs: nnx.Rngs) -> None:
    """Makes the maps of queries, keys and values; ValueError when the heads do not fit."""
    c, heads, dim = self.config, self.num_heads, self.head_dim
    groups = self.num_kv_heads = c.num_kv_heads or heads
    if heads % groups:
      raise ValueError(f"num_kv_heads={groups} is not accepted; it must divide num_heads={heads}")
    if self.value_dim != dim:
      raise ValueError(f"value_dim={self.value_dim} is not accepted; it must be head_dim={dim}")
    if c.rope_base and dim % 2:
      raise ValueError(f"head_dim={dim} is not accepted; rotary positions take an even one")
    self.q = self.project(heads * dim, rngs)
    self.k, self.v = self.project(groups * dim, rngs), self.project(groups * dim, rngs)
    self.conv_q = self.conv(heads * dim, rngs, "none")
    self.conv_k = self.conv(groups * dim, rngs, "none", keys=groups * dim)
    self.conv_v = self.conv(groups * dim, rngs, "none")

  def mix(self, x, memory, stretch, taps, implementation=None):
    """Attends inside the call, and to what the cache holds when there is one."""
    c = self.config
    split = lambda y, heads: _rows(y, x).reshape(*y.shape[:2], heads, self.head_dim)
    q = split(taps(self.conv_q, self.q(x)), self.num_heads)
    k = split(taps(self.conv_k, self.k(x)), self.num_kv_heads)
    v = split(taps(self.conv_v, self.v(x)), self.num_kv_heads)
    if c.rope_base:
      q, k = (rotary.rotate(a, stretch.positions, c.rope_base) for a in (q, k))
    fresh = memory is None
    cache = sharding.like(self.memory_of(x.shape[0]), x) if fresh else memory
    keys = jnp.concatenate([cache.k, k.astype(self.dtype)], axis=1)
    values = jnp.concatenate([cache.v, v.astype(self.dtype)], axis=1)
    kw = dict(window=c.window, implementation=implementation)
    if fresh:
      runs = None if stretch.run is None else (stretch.run, stretch.run)
      o = attention.attend(q, k, v, runs=runs, **kw)
    else:
      # The state's segment is run 0.
      held = jnp.arange(c.held)[None] >= c.held - cache.filled[:, None]
      run = stretch.run
      if run is None:
        run = sharding.like(jnp.zeros(x.shape[:2], jnp.int32), x)
      run_k = jnp.concatenate([jnp.where(held, 0, -1), run], axis=1)
      o = attention.attend(q, keys, values, runs=(run, run_k), **kw)
    return o, self._after(keys, values, cache.filled, stretch)

  def _after(self, keys, values, filled, stretch) -> Cache:
    """Returns the cache of the last live tokens of the old cache and the call."""
    held = self.config.held
    length = keys.shape[1] - held
    if stretch.run is None:
      return Cache(keys[:, length:], values[:, length:], jnp.minimum(filled + length, held))
    at = (stretch.count[:, None] + jnp.arange(held)[None])[..., None, None]
    last = lambda x: jnp.take_along_axis(x, at, axis=1)
    # Padding, at the end, carries the last live token's run.
    run = stretch.run[:, -1:]
    new = jnp.sum((stretch.run == run) & stretch.live, axis=1, dtype=jnp.int32)
    filled = new + jnp.where(run[:, 0] == 0, filled, 0)
    return Cache(last(keys), last(values), jnp.minimum(filled, held))

  def memory_of(self, batch: int) -> Cache:
    """Returns an empty cache."""
    none = jnp.zeros((batch, self.config.held, self.num_kv_heads, self.head_dim), self.dtype)
    return Cache(none, none, jnp.zeros((batch,), jnp.int32))

  def mix_flops(self, num_tokens: int) -> int:
    """Counts the scores and the weighted sums of the pairs that see each other."""
    near = min(self.config.window or num_tokens, num_tokens)
    pairs = near * (near + 1) // 2 + (num_tokens - near) * near
    return 4 * pairs * self.num_heads * self.head_dim


def _rows(y: Array, x: Array) -> Array:
  """Returns y, split by rows alone where axes are Explicit: heads may not divide among devices."""
  return y if sharding.explicit(x) is None else jax.sharding.reshard(y, sharding.explicit(x))
