"""The triangular solve against NumPy's: values, gradients, keys that are alike."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax.ops import triangular

jax.config.update("jax_numpy_rank_promotion", "raise")


def _dense(a, right):
  return jnp.linalg.solve(jnp.tril(a, -1) + jnp.eye(a.shape[-1])[None, None], right)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 64])
def test_solution_and_gradients_equal_the_dense_solver(length):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    a = jnp.asarray(0.3 * rng.normal(size=(2, 3, length, length)))
    right = jnp.asarray(rng.normal(size=(2, 3, length, 5)))
    value = lambda f: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(*x))))((a, right))
    assert op_cases.distance(value(triangular.solve), value(_dense)) <= 1e-12


def test_keys_that_are_alike_do_not_cancel():
  rng = np.random.default_rng(1)
  a = np.ones((1, 1, 64, 64), np.float32)
  right = rng.normal(size=(1, 1, 64, 5)).astype(np.float32)
  want = np.linalg.solve(np.tril(a.astype(np.float64), -1) + np.eye(64), right)
  assert op_cases.distance(triangular.solve(jnp.asarray(a), jnp.asarray(right)), want) <= 1e-6
