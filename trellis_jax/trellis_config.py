"""The knobs of the Trellis mixer, and the values that each accepts."""

import dataclasses
import math

from trellis_jax.ops import activations

_CHOICES = {
  "target": ("phi", "linear", "layer_norm"),
  "qk_norm": ("l2", "none"),
  "v_norm": ("l2", "none"),
  "conv_activation": ("silu", "gelu", "none"),
  "v_activation": ("silu", "gelu", "none"),
  "forget_form": ("sigmoid", "rate"),
  "step_form": ("sigmoid", "softplus", "constant"),
  "initial_memory": ("zeros", "learned"),
  "gate": ("gelu", "silu", "none"),
  "post_norm": ("rms", "head_rms", "none"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The knobs of the Trellis mixer.

  Attributes:
    num_slots: M, slots of each memory.
    chunk_size: C, tokens whose inner gradients start from one memory; 1 is the exact recurrence.
    head_dim: D, key width of a head; 0 is width / num_heads.
    value_dim: V, value width of a head; 0 is head_dim.
    phi: activation of the compression loss; phi_eps: eps of its normaliser.
    f: activation between the passes; phi_out: of the read; eps: eps of both.
    target: "phi" puts alpha = phi(W_a x) in phi's range, "linear" is W_a x, "layer_norm" LN(W_a x).
    share_qk: one linear map for q and k (Fig. 1), or one each.
    conv_taps: K of the short convolutions on q and k; 1 is none.
    conv_decay: in the convolution of keys, each tap's start over that of the token after it. At 0 a
      key starts without the token before it, and recall, which binds a value to that, waits.
    conv_spread: half-width of the uniform noise on every tap's start, of all convolutions.
    v_conv, alpha_conv: whether v, and W_a x, have short convolutions too, of as many taps, which
      start at their own token.
    conv_activation, v_activation: after the convolutions of q and k, on v.
    qk_norm, v_norm: "l2" makes keys and queries, values, of length 1.
    v_eps: of v_norm, v / sqrt(|v|^2 + eps): with 1, little is written of a token whose v is short.
    forget: whether there is a forget gate.
    forget_form: "sigmoid" of a projection, which starts at `forget_init` in every head, or "rate",
      exp(-A softplus(projection)) of a learned A per head, whose heads start at memories of one
      token to thousands, as Mamba2's and Gated DeltaNet's do.
    step_form: "sigmoid" and "softplus" of a projection, or a learned "constant" per head.
    step_init: inner step on the built model; 0 is 1 / C for stale chunks of C tokens and 1/2 where
      nothing overshoots (linearised chunks, C = 1). step_scale: factor of the sigmoid.
    initial_memory: what a sequence starts from; memory_std: of a learned one at the start.
    outer_gradient: rho of the op; curvature: h of the op, 0 for stale chunks.
    gate: activation of the output gate; post_norm: over all heads, each head, or none.
  """

  num_slots: int = 64
  chunk_size: int = 64
  head_dim: int = 0
  value_dim: int = 0
  phi: str = "ln_silu"
  phi_eps: float = 1.0
  f: str = "ln_silu"
  phi_out: str = "identity"
  eps: float = 1e-5
  target: str = "phi"
  share_qk: bool = True
  conv_taps: int = 4
  conv_decay: float = 0.5
  conv_spread: float = 0.0
  v_conv: bool = True
  alpha_conv: bool = True
  conv_activation: str = "silu"
  v_activation: str = "none"
  qk_norm: str = "l2"
  v_norm: str = "l2"
  v_eps: float = 1.0
  forget: bool = True
  forget_form: str = "sigmoid"
  forget_init: float = 0.95
  step_form: str = "sigmoid"
  step_init: float = 0.0
  step_scale: float = 1.0
  initial_memory: str = "zeros"
  memory_std: float = 0.02
  outer_gradient: float = 1.0
  curvature: float = 1.0
  gate: str = "gelu"
  post_norm: str = "rms"

  def __post_init__(self):
    for role in ("phi", "f", "phi_out"):
      activations.check(getattr(self, role), role)
    for role, accepted in _CHOICES.items():
      if getattr(self, role) not in accepted:
        raise ValueError(
          f"{role}={getattr(self, role)!r} is unknown; accepted are {', '.join(accepted)}"
        )
    for role in ("num_slots", "chunk_size", "conv_taps"):
      if getattr(self, role) < 1:
        raise ValueError(f"{role}={getattr(self, role)} is not accepted; it must be >= 1")
    if not (math.isfinite(self.v_eps) and self.v_eps > 0):
      raise ValueError(f"v_eps={self.v_eps} is not accepted; it must be finite and > 0")
    for role in ("conv_decay", "conv_spread"):
      given = getattr(self, role)
      if not (math.isfinite(given) and given >= 0):
        raise ValueError(f"{role}={given} is not accepted; it must be finite and >= 0")
    if not 0 < self.forget_init < 1:
      raise ValueError(f"forget_init={self.forget_init} is not accepted; it lies in (0, 1)")
    if not 0 <= self.outer_gradient <= 1:
      raise ValueError(f"outer_gradient={self.outer_gradient} is not accepted; it lies in [0, 1]")
    if not (math.isfinite(self.curvature) and self.curvature >= 0):
      raise ValueError(f"curvature={self.curvature} is not accepted; it must be finite and >= 0")
    if self.step_init < 0 or (self.step_form == "sigmoid" and self.start_step >= self.step_scale):
      raise ValueError(
        f"step_init={self.start_step} is not accepted; it lies in (0, step_scale={self.step_scale})"
      )

  @property
  def start_step(self) -> float:
    """The inner step on the built model."""
    if self.step_init:
      return self.step_init
    return 0.5 if self.chunk_size == 1 or self.curvature else 1 / self.chunk_size

  @classmethod
  def literal(cls, **knobs) -> "Config":
    """The most literal reading: raw targets, writes as they come, eps 1e-5 in phi, stale chunks.

    Values and codes are linear in a token, but for SiLU on values.
    """
    plain = dict(phi_eps=1e-5, target="linear", v_activation="silu", qk_norm="none", v_norm="none")
    plain |= dict(phi_out="ln_silu", chunk_size=16, curvature=0.0, v_conv=False, alpha_conv=False)
    return cls(**(plain | knobs))
