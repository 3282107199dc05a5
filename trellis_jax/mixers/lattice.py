r"""Lattice: unit slots that take only what is orthogonal to them.

Karami et al., "Lattice: Learning to Efficiently Compress the Memory", 2025. For an input x
[B, T, width], per head with M slots s_i in R^V:

  q, k = code(conv_q W_q x), code(conv_k W_k x)      codes in R^M
  v    = unit(W_v x)
  e    = sum_j k_j s_j - v
  s_i <- norm(s_i - g k_i (I - s_i s_i^T) e),        g = step_scale sigmoid(w x + b)
  o    = sum_i q_i s_i,   y = W_o (norm(o) gelu(W_gate x))

with the slots of a chunk's start in e and in the projection (`ops.lattice`); the slots at a
sequence's start are learned. Normalising is the only forgetting.

Our readings of what is open: a token reads its own write, with normalised slots; one read by codes,
o = S^T q, the form in which the slots decode a value; codes are unit(silu(.)), or a softmax; values
are unit, since unit slots under a unit code decode about that; g starts at 1 / C, so that C alike
tokens do not overshoot.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import fast_weights, nn, sharding, shell
from trellis_jax.ops import buffered
from trellis_jax.ops import lattice as op
from trellis_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Config(shell.Config):
  """The knobs of Lattice; head_dim is not used, codes have the width M.

  Attributes:
    num_slots: M.
    chunk_size: C, tokens whose errors and projections share one set of slots; 1 is exact.
    code: "l2" is unit(silu(.)), "softmax" is over the slots.
    v_norm: "l2" or "none".
    step_init: g on the built model; 0 is 1 / C, or 0.5 for C = 1.
    step_scale: the largest g.
  """

  num_slots: int = 64
  chunk_size: int = 16
  code: str = "l2"
  v_norm: str = "l2"
  step_init: float = 0.0
  step_scale: float = 1.0
  conv_taps: int = 4
  gate: str = "gelu"
  post_norm: str = "rms"

  CHOICES = shell.Config.CHOICES | {"code": ("l2", "softmax"), "v_norm": ("l2", "none")}

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "num_slots", "chunk_size")
    if not 0 < self.start_step < self.step_scale:
      raise ValueError(
        f"step_init={self.start_step} is not accepted; it lies in (0, step_scale={self.step_scale})"
      )

  @property
  def start_step(self) -> float:
    """g on the built model."""
    return self.step_init or (1 / self.chunk_size if self.chunk_size > 1 else 0.5)


class Mixer(shell.Mixer):
  """The Lattice mixer; see the module's equations."""

  def build(self, rngs: nnx.Rngs) -> None:
    """Makes the mixer's own parameters."""
    c, h, v = self.config, self.num_heads, self.value_dim
    self.q, self.k = self.project(h * c.num_slots, rngs), self.project(h * c.num_slots, rngs)
    self.v = self.project(h * v, rngs)
    activation = "silu" if c.code == "l2" else "none"
    slots = h * c.num_slots
    self.conv_q = self.conv(slots, rngs, activation)
    self.conv_k = self.conv(slots, rngs, activation, keys=slots)
    # Narrow and near zero, so that the step starts at its bias.
    self.gates = self.project(h, rngs, init_std=0.2 * self.width**-0.5)
    start = fast_weights.logit(c.start_step / c.step_scale)
    self.step_bias = nnx.Param(jnp.full((h,), start, self.param_dtype))
    self.memory_slots = nnx.Param(rngs.params.normal((h, c.num_slots, v), self.param_dtype))

  def mix(self, x, memory, stretch: shell.Stretch, taps: shell.Taps, implementation=None):
    """Returns (o [B, T, H, V], the memory after the last token)."""
    c = self.config
    code = nn.unit if c.code == "l2" else lambda y: jax.nn.softmax(y, axis=-1)
    q = code(self.heads(taps(self.conv_q, self.q(x))))
    k = code(self.heads(taps(self.conv_k, self.k(x))))
    v = self.heads(self.v(x))
    v = nn.unit(v) if c.v_norm == "l2" else v
    raw = self.gates(x).astype(jnp.float32) + self.step_bias[...].astype(jnp.float32)[None, None]
    fresh = memory is None
    return op.lattice(
      self._slots(),
      q,
      k,
      v,
      c.step_scale * jax.nn.sigmoid(raw),
      state=sharding.like(self.memory_of(x.shape[0]), q) if fresh else memory,
      fresh=fresh,
      run=stretch.run,
      count=stretch.count,
      chunk_size=c.chunk_size,
    )

  def _slots(self) -> Array:
    acc = jnp.promote_types(self.dtype, jnp.float32)
    return op.unit(self.memory_slots[...].astype(acc))

  def memory_of(self, batch: int) -> buffered.ChunkState:
    """Returns the memory of `batch` rows before their first token."""
    return op.initial_state(self._slots(), batch, self.config.chunk_size)

  def mix_flops(self, num_tokens: int) -> int:
    """Returns the FLOPs of the recurrence alone over one row of T tokens."""
    m, v, chunk = self.config.num_slots, self.value_dim, self.config.chunk_size
    # Decode, project, read and add; sums, squares and affinities over the chunk.
    products = 4 * m * v + chunk * (4 * m + 2 * v)
    return 2 * num_tokens * self.num_heads * products

  def state_size(self) -> int:
    """Returns the floats that one row carries from token to token."""
    h, m, v = self.num_heads, self.config.num_slots, self.value_dim
    # From the sizes: on stacked layers the parameters have an axis more.
    memory = buffered.size((h, m, v), op.token_shapes(h, m, v), self.config.chunk_size)
    return memory + (self.config.conv_taps - 1) * sum(self._conv_widths)
