"""The static choices of one call of the op, checked once."""

import math
from typing import NamedTuple

import jax

from trellis_jax.ops import activations


class Spec(NamedTuple):
  """What `trellis` was asked for, apart from its arrays (design: the op's keyword arguments)."""

  phi: str = "ln_silu"
  f: str = "ln_silu"
  phi_out: str = "ln_silu"
  phi_eps: float = 1.0
  eps: float = 1e-5
  chunk_size: int = 16
  outer_gradient: float = 1.0
  curvature: float = 0.0
  precision: jax.lax.Precision | None = None

  def check(self) -> "Spec":
    """Returns itself with plain Python values, or raises ValueError naming the bad field."""
    for role in ("phi", "f", "phi_out"):
      activations.check(getattr(self, role), role)
    for role in ("phi_eps", "eps"):
      value = float(getattr(self, role))
      if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{role}={value} is not accepted; it must be finite and > 0")
    if isinstance(self.chunk_size, bool) or int(self.chunk_size) != self.chunk_size:
      raise ValueError(f"chunk_size={self.chunk_size!r} is not accepted; it must be an integer")
    if self.chunk_size < 1:
      raise ValueError(f"chunk_size={self.chunk_size} is not accepted; it must be >= 1")
    if not 0 <= self.outer_gradient <= 1:
      raise ValueError(f"outer_gradient={self.outer_gradient} is not accepted; it lies in [0, 1]")
    if not (math.isfinite(self.curvature) and self.curvature >= 0):
      raise ValueError(f"curvature={self.curvature} is not accepted; it must be finite and >= 0")
    return self._replace(
      phi_eps=float(self.phi_eps),
      eps=float(self.eps),
      chunk_size=int(self.chunk_size),
      outer_gradient=float(self.outer_gradient),
      curvature=float(self.curvature),
      precision=None if self.precision is None else jax.lax.Precision(self.precision),
    )
