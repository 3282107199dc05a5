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
  """A map N over the last axis: its value, its Jacobian, and the gradient of p . J(s) (N(s) - a).

  apply(s, eps) -> (y, i), i the inverse scale or None; jacobian(x, y, i) -> J x;
  second(p, a, y, i) -> grad_s [p . J(s) (N(s) - a)].
  """

  apply: Callable
  jacobian: Callable
  second: Callable


def _none_second(p, a, y, i):
  return p


def _standardise(s, eps):
  centred = s - jnp.mean(s, -1, keepdims=True)
  i = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
  return centred * i, i


def _standardise_jacobian(x, y, i):
  return i * (x - jnp.mean(x, -1, keepdims=True) - y * jnp.mean(y * x, -1, keepdims=True))


def _standardise_second(p, a, y, i):
  error = y - a
  c = jnp.mean(y * error, -1, keepdims=True)
  py = jnp.mean(p * y, -1, keepdims=True)
  ph = jnp.mean(p * (error - jnp.mean(error, -1, keepdims=True) - c * y), -1, keepdims=True)
  return i * _standardise_jacobian((1 - c) * p - py * (2 * y - a), y, i) - i * i * ph * y


def _unit(s, eps):
  i = jax.lax.rsqrt(jnp.sum(s * s, -1, keepdims=True) + eps)
  return s * i, i


def _unit_jacobian(x, y, i):
  return i * (x - y * jnp.sum(y * x, -1, keepdims=True))


def _unit_second(p, a, y, i):
  error = y - a
  c = jnp.sum(y * error, -1, keepdims=True)
  py = jnp.sum(p * y, -1, keepdims=True)
  ph = jnp.sum(p * (error - c * y), -1, keepdims=True)
  return i * _unit_jacobian((1 - c) * p - py * (2 * y - a), y, i) - i * i * ph * y


def _softmax(s, eps):
  return jax.nn.softmax(s, -1), None


def _softmax_jacobian(x, y, i):
  return y * (x - jnp.sum(y * x, -1, keepdims=True))


def _softmax_second(p, a, y, i):
  error = y - a
  ye = jnp.sum(y * error, -1, keepdims=True)
  py = jnp.sum(p * y, -1, keepdims=True)
  return _softmax_jacobian(p * (error + y - ye) - py * (error + y), y, i)


_NONE = Normaliser(lambda s, eps: (s, None), lambda x, y, i: x, _none_second)
_LN = Normaliser(_standardise, _standardise_jacobian, _standardise_second)
_L2 = Normaliser(_unit, _unit_jacobian, _unit_second)
_SOFTMAX = Normaliser(_softmax, _softmax_jacobian, _softmax_second)

# name -> (whether the elementwise part is SiLU, the normaliser)
ACTIVATIONS: dict[str, tuple[bool, Normaliser]] = {
  "identity": (False, _NONE),
  "silu": (True, _NONE),
  "ln_silu": (True, _LN),
  "l2_silu": (True, _L2),
  "softmax": (False, _SOFTMAX),
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
  return _times(norm.jacobian(y - a, y, i), e1)


def inner_gradient_vjp(
  name: str, z: Vector, a: Vector, ct: Vector, eps: float
) -> tuple[Vector, Vector]:
  """Returns the cotangents (z_bar, a_bar) of `inner_gradient` for the cotangent ct of u."""
  is_silu, norm = ACTIVATIONS[name]
  s, e1, e2 = _elementwise(is_silu, z)
  y, i = norm.apply(s, eps)
  p = _times(ct, e1)
  z_bar = _times(norm.second(p, a, y, i), e1)
  if e2 is not None:
    z_bar = z_bar + e2 * ct * norm.jacobian(y - a, y, i)
  return z_bar, -norm.jacobian(p, y, i)


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
