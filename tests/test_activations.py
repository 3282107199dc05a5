"""Closed-form derivatives of the activations against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trellis_jax.ops import activations

jax.config.update("jax_numpy_rank_promotion", "raise")

EPS = (1.0, 1e-5)
NAMES = tuple(activations.ACTIVATIONS)


def _draw():
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=(4, 7))) for _ in range(3))


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_autodiff(name, eps):
  with jax.enable_x64(True):
    z, a, ct = _draw()
    phi = lambda z: activations.apply(name, z, eps)
    slow = lambda z, a: jax.vjp(phi, z)[1](phi(z) - a)[0]
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)
    close(activations.vjp(name, z, ct, eps), jax.vjp(phi, z)[1](ct)[0])
    close(activations.inner_gradient(name, z, a, eps), slow(z, a))
    want = jax.vjp(slow, z, a)[1](ct)
    for got, expected in zip(activations.inner_gradient_vjp(name, z, a, ct, eps), want):
      close(got, expected)
    activate = lambda z: activations.activate(name, eps, z)
    close(jax.vjp(activate, z)[1](ct)[0], jax.vjp(phi, z)[1](ct)[0])


@pytest.mark.parametrize("name", NAMES)
def test_empty_memory_has_finite_second_derivatives(name):
  zero, target = jnp.zeros((2, 8)), jnp.ones((2, 8))
  u = activations.inner_gradient(name, zero, target, 1e-5)
  z_bar, a_bar = activations.inner_gradient_vjp(name, zero, target, target, 1e-5)
  assert all(np.all(np.isfinite(x)) for x in (u, z_bar, a_bar))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_tempering_scales_the_path_through_z_alone(rho):
  z, a, ct = (x.astype(jnp.float32) for x in _draw())
  run = lambda r: jax.vjp(
    lambda z, a: activations.tempered_inner_gradient("ln_silu", z, a, 1.0, r), z, a
  )
  u, pull = run(rho)
  full, full_pull = run(1.0)
  np.testing.assert_array_equal(u, full)
  np.testing.assert_allclose(pull(ct)[0], rho * full_pull(ct)[0], atol=1e-6)
  np.testing.assert_allclose(pull(ct)[1], full_pull(ct)[1], atol=1e-6)


def test_unknown_name_lists_the_accepted():
  with pytest.raises(ValueError, match=r"phi='relu' is unknown; accepted are identity, silu"):
    activations.check("relu", "phi")
