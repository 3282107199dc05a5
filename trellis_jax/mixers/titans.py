r"""Titans' long-term memory: an MLP that each token trains, with momentum and forgetting.

Behrouz et al., "Titans: Learning to Memorize at Test Time", 2024, sections 3.1-3.2. For an input x
[B, T, width], per head:

  q, k = unit(silu(conv_q W_q x)), unit(silu(conv_k W_k x)),   v = silu(conv_v W_v x)
  L_t  = |M(k_t) - v_t|^2 / 2                 the paper's loss without 1/2: its factor 2 is in g
  N_t  = e_t N_{t-1} - g_t grad L_t           surprise with momentum               (eq. 9-10)
  M_t  = (1 - c_t) M_{t-1} + N_t              with forgetting                      (eq. 13)
  o    = M_t(q_t),   y = W_o (norm(o) silu(W_g x))
  e, 1 - c = sigmoid(w x + b),   g = step_scale sigmoid(w x + b)

M is `depth` matrices with GELU between, no biases; M_0 is learned, N_0 is 0. Inside a chunk of C
all gradients are taken at the chunk's first M. C tokens of one key then move M by up to
C g / (1 - e) gradients, so g starts at (1 - e) / C; the memory starts with an output and slopes of
about 1, N(0, inputs^-0.5) per layer.

The paper leaves open: activation, width and biases of M, heads, chunk length and the gates' starts.
This is its memory alone, as a layer of the shell (LMM): no persistent tokens, no attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trellis_jax import fast_weights, nn, shell
from trellis_jax.ops import fast_weights as op


@dataclasses.dataclass(frozen=True)
class Config(shell.Config):
  """The knobs of Titans' memory.

  Attributes:
    chunk_size: C, tokens whose gradients are taken at one network; 1 is the exact recurrence.
    depth: layers of the network.
    expansion: its hidden units, in head_dim.
    forget_init, momentum_init: c and e on the built model.
    step_init: g on the built model; 0 is (1 - momentum_init) / C.
    step_scale: the largest g.
    memory_std: of M_0; 0 is inputs^-0.5 of each layer.
  """

  chunk_size: int = 16
  depth: int = 2
  expansion: int = 4
  forget_init: float = 0.02
  momentum_init: float = 0.9
  step_init: float = 0.0
  step_scale: float = 1.0
  memory_std: float = 0.0
  conv_taps: int = 4
  gate: str = "silu"
  post_norm: str = "rms"

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "chunk_size", "depth", "expansion")
    for field in ("forget_init", "momentum_init"):
      if not 0 < getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)} is not accepted; it lies in (0, 1)")
    if not 0 < self.start_step < self.step_scale:
      raise ValueError(
        f"step_init={self.start_step} is not accepted; it lies in (0, step_scale={self.step_scale})"
      )

  @property
  def start_step(self) -> float:
    """g on the built model."""
    return self.step_init or (1 - self.momentum_init) / self.chunk_size


class Mixer(fast_weights.Mixer):
  """Titans' memory as a mixer; see the module's equations."""

  RULE, GATES = op.Titans, 3

  def build(self, rngs: nnx.Rngs) -> None:
    """Makes the mixer's own parameters."""
    c, h, d, v = self.config, self.num_heads, self.head_dim, self.value_dim
    self.q, self.k, self.v = (self.project(h * n, rngs) for n in (d, d, v))
    self.conv_q, self.conv_k = self.conv(h * d, rngs), self.conv(h * d, rngs, keys=h * d)
    self.conv_v = self.conv(h * v, rngs)
    # Narrow and near zero, so that the gates start at their biases.
    self.gates = self.project(3 * h, rngs, init_std=0.2 * self.width**-0.5)
    starts = (c.start_step / c.step_scale, c.momentum_init, 1 - c.forget_init)
    starts = jnp.asarray([fast_weights.logit(s) for s in starts], self.param_dtype)
    self.gate_bias = nnx.Param(jnp.tile(starts[:, None], (1, h)))
    widths = (d, *(c.expansion * d,) * (c.depth - 1), v)
    stds = tuple(c.memory_std or n**-0.5 for n in widths[:-1])
    self.network(widths, stds, False, rngs)

  def mix(self, x, memory, stretch: shell.Stretch, taps: shell.Taps, implementation=None):
    """Returns (o [B, T, H, V], the memory after the last token)."""
    q, k, v = (
      self.heads(taps(conv, project(x)))
      for conv, project in zip((self.conv_q, self.conv_k, self.conv_v), (self.q, self.k, self.v))
    )
    gates = self.gates(x).astype(jnp.float32).reshape(*x.shape[:2], 3, self.num_heads)
    gates = gates + self.gate_bias[...].astype(jnp.float32)[None, None]
    step = self.config.step_scale * jax.nn.sigmoid(gates[:, :, 0])
    log_momentum, log_keep = (jax.nn.log_sigmoid(gates[:, :, i]) for i in (1, 2))
    gates = (step, log_momentum, log_keep)
    return self.learn(op.Titans(), _loss, nn.unit(q), nn.unit(k), v, gates, memory, stretch)


def _loss(z, k, v):
  """|z - v|^2 / 2 of each token."""
  return 0.5 * jnp.sum((z - v) ** 2, axis=-1)
