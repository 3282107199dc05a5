r"""The activations phi, f and phi_out with their derivatives in closed form.

Each is an elementwise part `s = e(z)` followed by a normaliser `y = N(s)` over the last axis:

  name       e         N
  identity   z         none
  silu       z sig(z)  none
  ln_silu    silu      (s - mean s) / sqrt(var s + eps)
  l2_silu    silu      s / sqrt(sum s^2 + eps)
  softmax    z         exp(s) / sum exp(s)

The Jacobian J of every N is symmetric and acts in O(M), so nothing here forms a matrix:

  none  J x = x
  ln    J x = i (x - mean x - y mean(y x)),   i = 1 / sqrt(var s + eps)
  l2    J x = i (x - y sum(y x)),             i = 1 / sqrt(sum s^2 + eps)
  soft  J x = y (x - sum(y x))

The inner gradient of the compression loss (paper, eq. 4-5) is `u(z, a) = e'(z) * J (N(e(z)) - a)`.
Differentiating through it (the outer gradient) needs its own vjp: with `p = e' * ct`,

  a_bar = -J p
  z_bar = e'' * ct * J(y - a) + e' * grad_s [p . J(s) (N(s) - a)],

whose last factor each normaliser gives in closed form. All derivatives are finite for eps > 0,
at zero variance too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from trellis_jax.typing import Array

Vector = Float[Array, "... M"]


class Normaliser(NamedTuple):
  """A map N over the last axis, with its derivatives at `y, i = apply(s, eps)`.

  apply(s, eps) -> (y, i), i the inverse scale or None; jacobian(x, y, i) -> J x;
  residual(a, y, i) -> J (y - a);
  second(p, a, y, i) -> (grad_s [p . J(s) (N(s) - a)], J p, J (y - a)).
  """

  apply: Callable
  jacobian: Callable
  residual: Callable
  second: Callable


def _none() -> Normaliser:
  return Normaliser(
    apply=lambda s, eps: (s, None),
    jacobian=lambda x, y, i: x,
    residual=lambda a, y, i: y - a,
    second=lambda p, a, y, i: (p, p, y - a),
  )


def _scaled(mean: bool) -> Normaliser:
  """LayerNorm (mean) or the l2 norm: both y = i s with a linear J, over means E or over sums E."""
  over = functools.partial(jnp.mean if mean else jnp.sum, axis=-1, keepdims=True)
  centre = over if mean else lambda x: 0.0

  def apply(s, eps):
    s = s - centre(s)
    i = jax.lax.rsqrt(over(s * s) + eps)
    return s * i, i

  def jacobian(x, y, i):
    return i * (x - centre(x) - y * over(y * x))

  def residual(a, y, i):
    # E y = 0, so the error's mean is that of -a.
    return i * (y - a + centre(a) - y * over(y * (y - a)))

  def second(p, a, y, i):
    # One round of reductions; c = E y (y - a), and d i = -i^2 E (y ds).
    y_y, y_a, p_y, p_a = over(y * y), over(y * a), over(p * y), over(p * a)
    mean_a, mean_p = centre(a), centre(p)
    c = y_y - y_a
    x = (1 - c) * p - p_y * (2 * y - a)
    y_x = (1 - c) * p_y - p_y * (2 * y_y - y_a)
    p_h = (1 - c) * p_y - p_a + mean_a * mean_p
    mean_x = (1 - c) * mean_p + p_y * mean_a
    grad = i * i * (x - mean_x - y * (y_x + p_h))
    return grad, i * (p - mean_p - y * p_y), i * ((1 - c) * y - a + mean_a)

  return Normaliser(apply, jacobian, residual, second)


def _softmax() -> Normaliser:
  total = functools.partial(jnp.sum, axis=-1, keepdims=True)

  def jacobian(x, y, i):
    return y * (x - total(y * x))

  def second(p, a, y, i):
    error = y - a
    p_y = total(p * y)
    grad = jacobian(p * (error + y - total(y * error)) - p_y * (error + y), y, i)
    return grad, y * (p - p_y), jacobian(error, y, i)

  return Normaliser(
    apply=lambda s, eps: (jax.nn.softmax(s, -1), None),
    jacobian=jacobian,
    residual=lambda a, y, i: jacobian(y - a, y, i),
    second=second,
  )


# name -> (whether the elementwise part is SiLU, the normaliser)
ACTIVATIONS: dict[str, tuple[bool, Normaliser]] = {
  "identity": (False, _none()),
  "silu": (True, _none()),
  "ln_silu": (True, _scaled(mean=True)),
  "l2_silu": (True, _scaled(mean=False)),
  "softmax": (False, _softmax()),
}


def check(name: str, role: str) -> None:
  """Raises ValueError unless `name` is one of ACTIVATIONS."""
  if name not in ACTIVATIONS:
    raise ValueError(f"{role}={name!r} is unknown; accepted are {', '.join(ACTIVATIONS)}")


def _elementwise(is_silu, z):
  """Returns e(z), e'(z), e''(z); the derivatives are None for the identity (1 and 0)."""
  if not is_silu:
    return z, None, None
  sig = jax.nn.sigmoid(z)
  slope = sig * (1 - sig)
  return z * sig, sig + z * slope, slope * (2 + z * (1 - 2 * sig))


def _times(x, factor):
  return x if factor is None else x * factor


def apply(name: str, z: Vector, eps: float) -> Vector:
  """Returns phi(z) over the last axis."""
  is_silu, norm = ACTIVATIONS[name]
  return norm.apply(jax.nn.silu(z) if is_silu else z, eps)[0]


def vjp(name: str, z: Vector, ct: Vector, eps: float) -> Vector:
  """Returns J_phi(z)^T ct."""
  is_silu, norm = ACTIVATIONS[name]
  s, e1, _ = _elementwise(is_silu, z)
  y, i = norm.apply(s, eps)
  return _times(norm.jacobian(ct, y, i), e1)


def inner_gradient(name: str, z: Vector, a: Vector, eps: float) -> Vector:
  """Returns u = J_phi(z)^T (phi(z) - a), the gradient of |phi(z) - a|^2 / 2 (paper, eq. 5)."""
  is_silu, norm = ACTIVATIONS[name]
  s, e1, _ = _elementwise(is_silu, z)
  y, i = norm.apply(s, eps)
  return _times(norm.residual(a, y, i), e1)


def inner_gradient_vjp(
  name: str, z: Vector, a: Vector, ct: Vector, eps: float
) -> tuple[Vector, Vector]:
  """Returns the cotangents (z_bar, a_bar) of `inner_gradient` for the cotangent ct of u."""
  is_silu, norm = ACTIVATIONS[name]
  s, e1, e2 = _elementwise(is_silu, z)
  y, i = norm.apply(s, eps)
  s_bar, j_p, j_error = norm.second(_times(ct, e1), a, y, i)
  z_bar = _times(s_bar, e1)
  if e2 is not None:
    z_bar = z_bar + e2 * ct * j_error
  return z_bar, -j_p


def tempered(x: Array, rho: float) -> Array:
  """Returns x, whose derivative is scaled by rho."""
  frozen = jax.lax.stop_gradient(x)
  return frozen + rho * (x - frozen)


def tempered_inner_gradient(name: str, z: Vector, a: Vector, eps: float, rho: float) -> Vector:
  """Returns u whose value is `inner_gradient` and whose derivative in z is scaled by rho.

  u = u(stop_gradient(z)) + rho (u(z) - u(stop_gradient(z))); the bracket is exactly zero, so the
  value does not depend on rho. The path through the target a stays whole for every rho.
  """
  frozen = inner_gradient(name, jax.lax.stop_gradient(z), a, eps)
  return frozen + rho * (inner_gradient(name, z, a, eps) - frozen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def activate(name: str, eps: float, z: Vector) -> Vector:
  """Returns `apply` with the closed-form `vjp` as its derivative, which stores z alone."""
  return apply(name, z, eps)


activate.defvjp(
  lambda name, eps, z: (apply(name, z, eps), z),
  lambda name, eps, z, ct: (vjp(name, z, ct, eps),),
)
