r"""phi, f and phi_out inside the TPU kernels, each with its pullback.

`y = N(e(z))` with e the identity or SiLU, and N nothing, LayerNorm (ln) or the l2 norm. Means run
over the slots, which lie on sublanes, or over a head's lanes; `Over` says how. The inner
gradient asks for all of its means at once, so that it waits for one round of sums alone:

  ln   y = i (s - E s),  i = (E s^2 - (E s)^2 + eps)^-1/2,   J x = i (x - E x - y E(y x))
  l2   y = i s,          i = (sum s^2 + eps)^-1/2,           J x = i (x - y sum(y x))

The inner gradient u = e' J (y - a) and its own pullback are the closed forms for these two J: with
p = e' ct, c = E y (y - a), x = (1 - c) p - E(p y) (2 y - a),

  a_bar = -J p,   z_bar = e'' ct J(y - a) + e' i^2 (x - E x - y (E(y x) + E(p h))),

h = y - a - E(y - a) - c y the error without its parts along 1 and y; for l2, E is the sum and
what is subtracted as a mean is zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Over(NamedTuple):
  """mean(x) -> E x, kept so that it broadcasts against x, of `size` terms.

  fast: whether the sigmoid may be the hardware's tanh, as precise as bfloat16 operands deserve.
  """

  mean: Callable
  size: int
  fast: bool


def _parts(name: str, over: Over):
  """Returns (whether e is SiLU, E of N or None for no normaliser, mean or zero)."""
  if name in ("ln_silu", "l2_silu"):
    total = lambda x: over.mean(x) * over.size
    return (True, over.mean, over.mean) if name == "ln_silu" else (True, total, lambda x: 0.0)
  return name == "silu", None, None


def _elementwise(silu: bool, fast: bool, z):
  """Returns e(z) and a function to (e', e'')."""
  if not silu:
    return z, lambda: (None, None)
  sig = 0.5 + 0.5 * jnp.tanh(0.5 * z) if fast else jax.nn.sigmoid(z)
  s = z * sig

  def slopes():
    e1 = sig + s * (1 - sig)
    return e1, sig * (1 - sig) * (2 + z * (1 - 2 * sig))

  return s, slopes


def _times(x, factor):
  return x if factor is None else x * factor


def _inverse_root(x, over: Over):
  """x^-1/2; by exp2 and log2 where every lane holds its own mean and fast will do."""
  if over.fast and x.shape[0] > 1:
    return jnp.exp2(-0.5 * jnp.log2(x))
  return jax.lax.rsqrt(x)


def apply(name: str, z, eps: float, over: Over):
  """Returns (phi(z), pullback ct -> J_phi(z)^T ct)."""
  silu, e, centre = _parts(name, over)
  s, slopes = _elementwise(silu, over.fast, z)
  if e is None:
    return s, lambda ct: _times(ct, slopes()[0])
  s = s - centre(s)
  i = _inverse_root(e(s * s) + eps, over)
  y = s * i

  def pull(ct):
    return slopes()[0] * (i * (ct - centre(ct) - y * e(y * ct)))

  return y, pull


def inner(name: str, z, a, eps: float, over: Over):
  """Returns (u = J_phi(z)^T (phi(z) - a), pullback ct -> (z_bar, a_bar))."""
  silu, e, centre = _parts(name, over)
  s, slopes = _elementwise(silu, over.fast, z)
  if e is None:
    error = s - a

    def pull_plain(ct):
      e1, e2 = slopes()
      p = _times(ct, e1)
      return _times(p, e1) + (0.0 if e2 is None else e2 * ct * error), -p

    return _times(error, slopes()[0]), pull_plain

  mean_s, square, s_a, mean_a = centre(s), e(s * s), e(s * a), centre(a)
  var = jnp.maximum(square - mean_s * mean_s, 0)
  i = jax.lax.rsqrt(var + eps)
  y_y, y_a = var * i * i, i * (s_a - mean_s * mean_a)
  c = y_y - y_a
  # i ((1 - c) y - a + E a) with y = i (s - E s), as a sum of three terms.
  by_s = i * i * (1 - c)
  j_error = by_s * s - i * a + (i * mean_a - by_s * mean_s)

  def pull(ct):
    e1, e2 = slopes()
    y = (s - mean_s) * i
    p = e1 * ct
    p_y, p_a, mean_p = e(p * y), e(p * a), centre(p)
    x = (1 - c) * p - p_y * (2 * y - a)
    y_x = (1 - c) * p_y - p_y * (2 * y_y - y_a)
    p_h = (1 - c) * p_y - p_a + mean_a * mean_p
    mean_x = (1 - c) * mean_p + p_y * mean_a
    s_bar = i * i * (x - mean_x - y * (y_x + p_h))
    return e2 * ct * j_error + e1 * s_bar, -(i * (p - mean_p - y * p_y))

  return slopes()[0] * j_error, pull
