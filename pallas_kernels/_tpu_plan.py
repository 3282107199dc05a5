"""What a call of the TPU kernels is built for: sizes, types, packing of heads."""

import contextlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128

# How Pallas runs the kernels: False compiles them; tests set an interpreter for other platforms.
_interpret = False


@contextlib.contextmanager
def interpreted(how):
  """Runs the kernels traced in this context in an interpreter, on any platform (for tests)."""
  global _interpret
  before, _interpret = _interpret, how
  try:
    yield
  finally:
    _interpret = before


def interpret():
  """Returns what `pallas_call(interpret=)` takes."""
  return _interpret


class Plan(NamedTuple):
  """The sizes of one call.

  Attributes:
    C, D, V, M: tokens of a chunk, widths and slots.
    heads: H, and with those of zeros that fill the last pack.
    P: heads of a pack, whose P C tokens fill the 128 lanes.
    G: packs of a program, side by side on lanes; independent work that hides latency.
    R: rows of the batch of a program, for the same where one row has few packs.
    K: chunks of a program's step.
    chunks: of a row, a multiple of K.
    gates: rows of a chunk's gates, see `_tpu_layout.Gate`.
    bf16: whether matrix products take bfloat16 operands; sums and states are fp32 always.
  """

  C: int
  D: int
  V: int
  M: int
  heads: tuple[int, int]
  P: int
  G: int
  R: int
  K: int
  chunks: int
  gates: int
  bf16: bool

  @property
  def L(self) -> int:
    """Lanes of a pack: tokens of its heads."""
    return self.P * self.C

  @property
  def operand(self):
    """The dtype of matrix operands and of saved memories."""
    return jnp.bfloat16 if self.bf16 else jnp.float32

  @property
  def programs(self) -> int:
    """Programs that share out the heads."""
    return self.heads[1] // (self.P * self.G)

  def lanes(self, width: int) -> int:
    """Lanes of a program's block of [B, T, H width]."""
    return self.G * self.P * width


def make(spec, inputs, packs: int, chunks: int) -> Plan:
  """Returns a call's plan: at most `packs` packs, of bfloat16 and width 64, `chunks` a step."""
  b, slots, heads, d = inputs.q.shape
  v, m, c = inputs.v.shape[-1], inputs.alpha.shape[-1], spec.chunk_size
  arrays = (inputs.q, inputs.k, inputs.v, inputs.alpha)
  low = all(a.dtype == jnp.bfloat16 for a in arrays)
  low = low or spec.precision == jax.lax.Precision.DEFAULT
  # Wide and fp32 packs are fewer, for the same space.
  packs = max(1, packs * 64 // max(d, v, m, 64) // (1 if low else 2))
  p = LANES // c
  least = math.ceil(heads / p)
  programs = math.ceil(least / packs)
  g = math.ceil(least / programs)
  if programs > 1 and g * p * m % LANES:
    g += 1
  # Two programs at least, for chips of two cores.
  rows = [r for r in range(1, b // 2 + 1) if b % r == 0 and r * g <= packs and programs == 1]
  n = slots // c
  k = min(chunks, n)
  padded = math.ceil(least / g) * g * p
  r, chunks, gates = max(rows, default=1), math.ceil(n / k) * k, 16 if spec.curvature else 8
  return Plan(c, d, v, m, (heads, padded), p, g, r, k, chunks, gates, low)
