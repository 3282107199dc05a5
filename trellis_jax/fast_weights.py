"""The shell of mixers whose memory is a small network per head, trained by the tokens."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import sharding, shell
from trellis_jax.ops import buffered
from trellis_jax.ops import fast_weights as op
from trellis_jax.typing import Array


class Mixer(shell.Mixer):
  """Holds the network that sequences start from; subclasses give `RULE`, `GATES` and the maps."""

  RULE: type
  GATES: int  # gates of a token and head

  def network(
    self, widths: tuple[int, ...], stds: tuple[float, ...], bias: bool, rngs: nnx.Rngs
  ) -> None:
    """Makes the initial network of layers widths[l] -> widths[l + 1], N(0, stds[l]) and zeros."""
    h = self.num_heads
    self._layers = tuple(itertools.pairwise(widths))
    draw = lambda size, std: std * rngs.params.normal((h, *size), self.param_dtype)
    self.memory_weights = nnx.List([nnx.Param(draw(*x)) for x in zip(self._layers, stds)])
    self._bias = bias
    if bias:
      zeros = lambda n: nnx.Param(jnp.zeros((h, n), self.param_dtype))
      self.memory_biases = nnx.List([zeros(n) for _, n in self._layers])

  def initial(self) -> op.Network:
    """Returns the network that sequences start from, in fp32 or wider."""
    acc = jnp.promote_types(self.dtype, jnp.float32)
    biases = [b[...].astype(acc) for b in self.memory_biases] if self._bias else None
    return tuple(
      op.Layer(w[...].astype(acc), biases[i] if self._bias else None)
      for i, w in enumerate(self.memory_weights)
    )

  def memory_of(self, batch: int) -> buffered.ChunkState:
    """Returns the memory of `batch` rows before their first token."""
    return op.initial_state(
      op.start(self.RULE, self.initial()),
      batch,
      self.head_dim,
      self.value_dim,
      self.GATES,
      self.config.chunk_size,
    )

  def learn(
    self, rule, loss: op.Loss, q, k, v, gates: tuple[Array, ...], memory, stretch: shell.Stretch
  ) -> tuple[Array, buffered.ChunkState]:
    """Returns (the trained network's outputs for q [B, T, H, V] in fp32, the memory after)."""
    fresh = memory is None
    return op.fast_weights(
      rule,
      loss,
      self.initial(),
      q,
      k,
      v,
      gates,
      state=sharding.like(self.memory_of(q.shape[0]), q) if fresh else memory,
      fresh=fresh,
      run=stretch.run,
      count=stretch.count,
      chunk_size=self.config.chunk_size,
    )

  def mix_flops(self, num_tokens: int) -> int:
    """Returns the FLOPs of the recurrence alone over one row of T tokens.

    A token goes forward and back at the chunk's start, is added to the weights, reads them and the
    momentum, and meets the tokens of its chunk.
    """
    products = 0
    for i, (inputs, outputs) in enumerate(self._layers):
      passes = 3 + (i > 0) + 2 * self.RULE.momentum
      products += passes * inputs * outputs + self.config.chunk_size * (inputs + outputs)
    return 2 * num_tokens * self.num_heads * products

  def state_size(self) -> int:
    """Returns the floats that one row carries from token to token."""
    h, c = self.num_heads, self.config
    # From the sizes: on stacked layers the parameters have an axis more.
    layers = sum(i * o + self._bias * o for i, o in self._layers)
    memory = h * layers * (2 if self.RULE.momentum else 1)
    token = op.token_shapes(h, self.head_dim, self.value_dim, self.GATES)
    taps = (c.conv_taps - 1) * sum(self._conv_widths)
    return buffered.size((memory,), token, c.chunk_size) + taps


def logit(p: float) -> float:
  """Returns the x with sigmoid(x) = p."""
  return math.log(p / (1 - p))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
  """Returns weight LN(x) + bias over the last axis, for broadcastable weight and bias."""
  return jax.nn.standardize(x, axis=-1, epsilon=eps) * weight + bias
