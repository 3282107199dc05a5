r"""A memory that is a small network, trained by the tokens: the chunked (dual) form.

The network has layers z_l = x_l W_l + b_l with x_1 = k, x_{l+1} = gelu(z_l) and output z_L. Each
token s has a loss on its key; inside a chunk all gradients are taken at the weights W_0 of the
chunk's start, where they are outer products, x_s g_s^T per layer. With coefficients that a rule
(`TTT`, `Titans`) makes of the tokens' gates, token t sees

  W_t = keep_t W_0 + carry_t N_0 - sum_{s <= t} write_ts x_s g_s^T              (b alike)

and so reads without any W_t, layer by layer with its own query:

  z_t = keep_t (x_t W_0 + b_0) + carry_t x_t N_0 - sum_{s <= t} write_ts (x_t . x_s + 1) g_s

N is the momentum, for rules that have one. The chunk ends in W_t of its last token. This is the
dual form of Sun et al., "Learning to (Learn at Test Time)", 2024, section 2.5; Behrouz et al.,
"Titans", 2024, section 3.2, is the same with decays. `fast_weights_reference` is the definition.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.ops import buffered, decay
from trellis_jax.typing import Array, Gates, Keys, Values

gelu = functools.partial(jax.nn.gelu, approximate=True)


class Layer(NamedTuple):
  """weight [..., I, O] and bias [..., O] or None, with leading [H] or [B, H]."""

  weight: Array
  bias: Array | None


Network = tuple[Layer, ...]


class Memory(NamedTuple):
  """The network's weights and their momentum; None for a rule without."""

  weights: Network
  momentum: Network | None


class Coefficients(NamedTuple):
  """How gradients and the chunk's start enter each token's weights; see the module.

  push [B, H, C] and roll [B, H] make the momentum at the end, roll N_0 - sum_s push_s x_s g_s^T.
  """

  keep: Float[Array, "B H C"] | None
  write: Float[Array, "B H C C"]
  carry: Float[Array, "B H C"] | None = None
  push: Float[Array, "B H C"] | None = None
  roll: Float[Array, "B H"] | None = None


@dataclasses.dataclass(frozen=True)
class TTT:
  """Plain descent, W_t = W_0 - scale_t sum_{s <= t} step_s grad_s (Sun et al. 2024).

  Gates: step [B, T, H]. scale [C] belongs to a token's place in the chunk, and scales all that the
  token sees, not its own gradient: 1 / i makes a mean of the i gradients up to it. The weights at
  the chunk's end have the scale of the last place.
  """

  scale: Float[Array, " C"]
  momentum = False

  def coefficients(self, gates, runs: decay.Runs | None) -> Coefficients:
    """Returns the coefficients of one chunk for gates (step [B, H, C],)."""
    (step,) = gates
    mask = _lower(step.shape[-1]) if runs is None else _lower(step.shape[-1]) & runs.same[:, None]
    write = self.scale[None, None, :, None] * step[:, :, None, :]
    return Coefficients(keep=None, write=jnp.where(mask, write, 0))


@dataclasses.dataclass(frozen=True)
class Titans:
  """Momentum and forgetting (Behrouz et al. 2024, eq. 13-14, signs as here).

  N_t = e_t N_{t-1} - step_t grad_t,   W_t = (1 - c_t) W_{t-1} + N_t

  Gates: step, log e and log(1 - c), each [B, T, H]. With the decays P of `ops.decay`, write is
  P(1 - c) P(e) diag(step). The momentum does not outlive a restart.
  """

  momentum = True

  def coefficients(self, gates, runs: decay.Runs | None) -> Coefficients:
    """Returns the coefficients of one chunk for gates (step, log e, log(1 - c)) [B, H, C]."""
    step, log_e, log_keep = gates
    keep, pair = decay.within(log_keep, runs)
    roll, pair_e = decay.within(log_e, runs)
    if runs is not None:
      roll = jnp.where(runs.entered[:, None], roll, 0)
    pushes = pair_e * step[:, :, None, :]
    carry = jnp.einsum("bhtr,bhr->bht", pair, roll)
    return Coefficients(keep, pair @ pushes, carry, pushes[:, :, -1], roll[:, :, -1])


def _lower(length: int) -> Array:
  return jnp.tril(jnp.ones((1, 1, length, length), bool))


Loss = Callable[[Array, Array, Array], Array]


def fast_weights(
  rule: TTT | Titans,
  loss: Loss,
  init: Network,
  q: Keys,
  k: Keys,
  v: Values,
  gates: tuple[Gates, ...],
  *,
  state: buffered.ChunkState | None = None,
  fresh: bool = False,
  run: Array | None = None,
  count: Array | None = None,
  chunk_size: int = 16,
) -> tuple[Float[Array, "B T H O"], buffered.ChunkState]:
  """Trains a network on keys and values and reads it with queries, token by token.

  Args:
    rule: how gradients become weights.
    loss: (output z_L [B, H, C, O], k, v [B, H, C, ...]) -> loss of each token [B, H, C].
    init: the network that sequences and restarts begin with, leaves with leading [H].
    q: queries [B, T, H, D].
    k: keys [B, T, H, D].
    v: values [B, T, H, V].
    gates: of the rule, zero at padding.
    state: what an earlier call returned, to go on from; None begins with `init`.
    fresh: whether all rows of the state begin a chunk, which saves a little.
    run, count: restarts and live tokens, as in `buffered.over_chunks`.
    chunk_size: C; 1 is the exact recurrence.

  Returns:
    (the network's outputs z_L for q after each token's own step, in fp32 or wider; the state).
  """
  acc = functools.reduce(jnp.promote_types, (x.dtype for x in (q, k, v)), jnp.dtype(jnp.float32))
  memory = start(rule, jax.tree.map(lambda s: s.astype(acc), init))
  fresh = fresh or state is None
  if state is None:
    state = initial_state(memory, q.shape[0], q.shape[-1], v.shape[-1], len(gates), chunk_size)
  return buffered.over_chunks(
    functools.partial(_chunk, rule, loss),
    memory,
    state,
    (k.astype(acc), v.astype(acc), tuple(g.astype(acc) for g in gates)),
    q.astype(acc),
    run=run,
    count=count,
    chunk_size=chunk_size,
    fresh=fresh,
  )


def start(rule: TTT | Titans | type, network: Network) -> Memory:
  """Returns the memory with these weights and, for a rule with momentum, none of it yet."""
  return Memory(network, jax.tree.map(jnp.zeros_like, network) if rule.momentum else None)


def token_shapes(num_heads: int, head_dim: int, value_dim: int, num_gates: int):
  """Returns the shapes of what a token writes, as `ChunkState.written` holds it."""
  return (num_heads, head_dim), (num_heads, value_dim), ((num_heads,),) * num_gates


def initial_state(
  memory: Memory, batch: int, head_dim: int, value_dim: int, num_gates: int, chunk_size: int
) -> buffered.ChunkState:
  """Returns the state of `batch` rows before their first token, for a memory [H, ...]."""
  num_heads = memory.weights[0].weight.shape[0]
  token = token_shapes(num_heads, head_dim, value_dim, num_gates)
  return buffered.ChunkState.fresh(memory, token, batch, chunk_size)


def _chunk(rule, loss, memory: Memory, init: Memory, written, q, runs):
  """One chunk: (memory at the end, outputs [B C H O]); see `buffered.over_chunks`."""
  heads = lambda x: jnp.swapaxes(x, 1, 2)
  k, v, gates = jax.tree.map(heads, written)
  entered = None if runs is None else runs.entered[:, None, :, None]
  c = rule.coefficients(gates, runs)
  xs, gs = gradients(loss, memory.weights, init.weights, entered, k, v)
  x = heads(q)
  after = []
  for i, (x_s, g_s) in enumerate(zip(xs, gs)):
    x = gelu(x) if i else x
    z = _at_start(x, memory.weights[i], init.weights[i], entered)
    z = z if c.keep is None else c.keep[..., None] * z
    if c.carry is not None:
      z = z + c.carry[..., None] * _affine(x, memory.momentum[i])
    affinity = x @ jnp.swapaxes(x_s, -1, -2)
    if memory.weights[i].bias is not None:
      affinity = affinity + 1
    x = z - (affinity * c.write) @ g_s
    after.append(_end(c, memory, init, i, x_s, g_s, entered))
  weights, momentum = zip(*after)
  return Memory(weights, momentum if rule.momentum else None), heads(x)


def gradients(loss: Loss, weights: Network, init: Network, entered, k, v):
  """Returns every layer's inputs x_s and gradients g_s of the loss, at the chunk's start."""

  def run(shifts):
    x, xs = k, []
    for i, shift in enumerate(shifts):
      x = gelu(x) if i else x
      xs.append(x)
      x = _at_start(x, weights[i], init[i], entered) + shift
    return jnp.sum(loss(x, k, v)), xs

  # The gradient with respect to a shift of z_l is g_l: no weight gradient is ever formed.
  zero = jnp.zeros_like(k[..., :1])
  shifts = [jnp.repeat(zero, w.weight.shape[-1], axis=-1) for w in weights]
  gs, xs = jax.grad(run, has_aux=True)(shifts)
  return xs, gs


def _affine(x, layer: Layer):
  z = x @ layer.weight
  return z if layer.bias is None else z + layer.bias[..., None, :]


def _at_start(x, layer: Layer, init: Layer, entered):
  """Returns x [B H C I] through the weights that its run has at the chunk's start."""
  z = _affine(x, layer)
  return z if entered is None else jnp.where(entered, z, _affine(x, init))


def _end(c: Coefficients, memory: Memory, init: Memory, i: int, x_s, g_s, entered):
  """Returns (layer i, its momentum or None) after the chunk's last token."""
  layer = memory.weights[i]
  if entered is not None:
    survives = entered[:, :, -1:]
    layer = jax.tree.map(
      lambda a, b: jnp.where(survives.reshape(-1, *(1,) * (a.ndim - 1)), a, b),
      layer,
      init.weights[i],
    )
  layer = layer if c.keep is None else _times(c.keep[..., -1], layer)
  layer = _minus(layer, x_s, c.write[:, :, -1], g_s)
  if c.carry is None:
    return layer, None
  before = memory.momentum[i]
  layer = jax.tree.map(jnp.add, layer, _times(c.carry[..., -1], before))
  return layer, _minus(_times(c.roll, before), x_s, c.push, g_s)


def _times(factor, layer: Layer) -> Layer:
  """Returns the layer times factor [B H]."""
  wide = lambda a: factor.reshape(*factor.shape, *(1,) * (a.ndim - 2))
  return jax.tree.map(lambda a: wide(a) * a, layer)


def _minus(layer: Layer, x_s, by, g_s) -> Layer:
  """Returns the layer minus sum_s by_s x_s g_s^T, the bias minus sum_s by_s g_s; by [B H C]."""
  g_s = by[..., None] * g_s
  bias = None if layer.bias is None else layer.bias - jnp.sum(g_s, axis=-2)
  return Layer(layer.weight - jnp.swapaxes(x_s, -1, -2) @ g_s, bias)
