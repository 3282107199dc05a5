r"""The definition of `fast_weights`, token by token, its inner gradients by JAX."""

import jax
import jax.numpy as jnp

from trellis_jax.ops.fast_weights import TTT, Layer, Loss, Memory, Titans, gelu
from trellis_jax.ops.token_loop import Recurrence


def fast_weights(rule: TTT | Titans, loss: Loss) -> Recurrence:
  """Returns the recurrence of a network trained by the tokens; a token is (k, v, gates).

  Args:
    rule: how gradients become weights.
    loss: (output, k, v) -> the token's loss, a scalar.
  """

  def gradient(network, k, v):
    return jax.grad(lambda n: loss(_apply(n, k), k, v))(network)

  def ttt_update(start, total, token, place):
    k, v, (step,) = token
    grads = gradient(start.weights, k, v)
    return jax.tree.map(lambda n, g: n + step * g, total, grads)

  def ttt_seen(start, total, place):
    scale = rule.scale[place]
    return Memory(jax.tree.map(lambda w, n: w - scale * n, start.weights, total), None)

  def titans_update(start, memory, token, place):
    k, v, (step, log_e, log_keep) = token
    grads = gradient(start.weights, k, v)
    momentum = jax.tree.map(lambda n, g: jnp.exp(log_e) * n - step * g, memory.momentum, grads)
    weights = jax.tree.map(lambda w, n: jnp.exp(log_keep) * w + n, memory.weights, momentum)
    return Memory(weights, momentum)

  read = lambda memory, q: _apply(memory.weights, q)
  if isinstance(rule, TTT):
    zeros = lambda memory: jax.tree.map(jnp.zeros_like, memory.weights)
    return Recurrence(zeros, ttt_update, ttt_seen, read)
  return Recurrence(lambda memory: memory, titans_update, lambda start, memory, place: memory, read)


def _apply(network: tuple[Layer, ...], x):
  for i, layer in enumerate(network):
    x = (gelu(x) if i else x) @ layer.weight
    x = x if layer.bias is None else x + layer.bias
  return x
