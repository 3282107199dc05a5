r"""The activations inside the kernels, each with one round of reductions over the slots.

`s = e(z)` elementwise, then a normaliser `y = N(s)` over the last axis, as the op documents them:

  name       e         N
  identity   z         none
  silu       z sig(z)  none
  ln_silu    silu      i (s - mean s),  i = 1 / sqrt(var s + eps),      E = mean
  l2_silu    silu      i s,             i = 1 / sqrt(sum s^2 + eps),    E = sum

A reduction costs a program a barrier, so every E of a normalised vector is had from those of s:

  E y x = i (E s x - mean s mean x),   E y y = i^2 (E s^2 - (mean s)^2),

and all reductions of a call are independent of each other. With the residual h = J (y - a) the
inner gradient is u = e' h; for a cotangent ct of u and p = e' ct,

  a_bar = -J p,   z_bar = e'' ct h + e' grad_s [p . J(s) (N(s) - a)].
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

# name -> (whether the elementwise part is SiLU, the normaliser)
ACTIVATIONS = {
  "identity": (False, None),
  "silu": (True, None),
  "ln_silu": (True, "ln"),
  "l2_silu": (True, "l2"),
}


def sigmoid(plan, z):
  """Returns sigmoid(z); the fast form is one instruction, with an error of 2^-11 of tanh."""
  if not plan.fast:
    return 1 / (1 + jnp.exp(-z))
  # The instruction exists on the GPU alone.
  tanh = jnp.tanh if plan.interpret else pltriton.approx_tanh
  return 0.5 * tanh(0.5 * z) + 0.5


def _elementwise(plan, name, z):
  """Returns e(z), e'(z), e''(z); the derivatives are None for the identity (1 and 0)."""
  if not ACTIVATIONS[name][0]:
    return z, None, None
  sig = sigmoid(plan, z)
  slope = sig * (1 - sig)
  return z * sig, sig + z * slope, slope * (2 + z * (1 - 2 * sig))


def _times(x, factor):
  return x if factor is None else x * factor


class _Scaled:
  """The normalisers ln and l2 at s: their reductions, and J x, as linear forms of tiles.

  Written so that a row's few numbers multiply whole tiles once: y itself is never formed.
  """

  def __init__(self, kind, s, eps):
    self.centred = kind == "ln"
    self.scale = 1 / s.shape[-1] if self.centred else 1.0
    self.s = s
    self.mu = self.over(s) if self.centred else 0.0
    square = self.over(s * s)
    if self.centred:
      square = jnp.maximum(square - self.mu * self.mu, 0)
    self.i = jax.lax.rsqrt(square + eps)
    self.y_y = square * self.i * self.i

  def over(self, x):
    """E x, [rows, 1], or a scalar of a vector."""
    total = jnp.sum(x, axis=-1) * self.scale
    return total if x.ndim == 1 else total[:, None]

  def mean(self, x):
    """E x where y is centred, else 0."""
    return self.over(x) if self.centred else 0.0

  def along(self, x, mean_x):
    """E y x."""
    return self.i * (self.over(self.s * x) - self.mu * mean_x)

  def jacobian(self, x, mean_x, y_x):
    """J x = i (x - mean x - y E y x)."""
    of_s = self.i * self.i * y_x
    return self.i * x - of_s * self.s - (self.i * mean_x - of_s * self.mu)

  def residual(self, a, mean_a, rest):
    """J (y - a) = i (rest y - a + mean a), rest = 1 - E y (y - a)."""
    of_s = self.i * self.i * rest
    return of_s * self.s - self.i * a + (self.i * mean_a - of_s * self.mu)


def apply(plan, name: str, z, eps: float):
  """Returns phi(z) over the last axis."""
  s, _, _ = _elementwise(plan, name, z)
  kind = ACTIVATIONS[name][1]
  if kind is None:
    return s
  n = _Scaled(kind, s, eps)
  return n.i * s - n.i * n.mu


def vjp(plan, name: str, z, ct, eps: float):
  """Returns J_phi(z)^T ct."""
  s, e1, _ = _elementwise(plan, name, z)
  kind = ACTIVATIONS[name][1]
  if kind is None:
    return _times(ct, e1)
  n = _Scaled(kind, s, eps)
  mean_ct = n.mean(ct)
  return _times(n.jacobian(ct, mean_ct, n.along(ct, mean_ct)), e1)


def inner_gradient(plan, name: str, z, a, eps: float):
  """Returns u = J_phi(z)^T (phi(z) - a)."""
  s, e1, _ = _elementwise(plan, name, z)
  kind = ACTIVATIONS[name][1]
  if kind is None:
    return _times(s - a, e1)
  n = _Scaled(kind, s, eps)
  mean_a = n.mean(a)
  return _times(n.residual(a, mean_a, 1 - n.y_y + n.along(a, mean_a)), e1)


def inner_gradient_vjp(plan, name: str, z, a, ct, eps: float):
  """Returns (u, z_bar, a_bar) for the cotangent ct of u."""
  s, e1, e2 = _elementwise(plan, name, z)
  kind = ACTIVATIONS[name][1]
  p = _times(ct, e1)
  if kind is None:
    h, s_bar, j_p = s - a, p, p
  else:
    n = _Scaled(kind, s, eps)
    mean_a, mean_p = n.mean(a), n.mean(p)
    y_a, p_y, p_a = n.along(a, mean_a), n.along(p, mean_p), n.over(p * a)
    rest = 1 - n.y_y + y_a
    y_x = rest * p_y - p_y * (2 * n.y_y - y_a)
    p_h = rest * p_y - p_a + mean_a * mean_p
    mean_x = rest * mean_p + p_y * mean_a
    square = n.i * n.i
    of_s = square * n.i * (2 * p_y + y_x + p_h)
    s_bar = square * rest * p + square * p_y * a - of_s * s - (square * mean_x - of_s * n.mu)
    j_p = n.jacobian(p, mean_p, p_y)
    h = n.residual(a, mean_a, rest)
  z_bar = _times(s_bar, e1)
  if e2 is not None:
    z_bar = z_bar + e2 * ct * h
  return _times(h, e1), z_bar, -j_p
