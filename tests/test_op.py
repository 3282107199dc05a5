"""The op's chunked scan against its definition: outputs, final state, all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax import trellis

jax.config.update("jax_numpy_rank_promotion", "raise")

FORWARD, GRADIENT = 1e-5, 1e-4
ACTIVATIONS = ("identity", "silu", "ln_silu", "l2_silu", "softmax")


def _both(knobs, with_state, segment_ids):
  """Returns (fp32 "xla", fp64 "reference"), each (outputs and state, gradients)."""
  knobs = tuple(sorted(knobs.items()))
  with jax.enable_x64(True):
    results = []
    for implementation, dtype in (("xla", np.float32), ("reference", np.float64)):
      arrays, memory = op_cases.inputs(dtype=dtype)
      state = op_cases.state(arrays, dict(knobs)["chunk_size"]) if with_state else None
      results.append(
        jax.device_get(
          op_cases.value_and_grads(arrays, memory, state, segment_ids, implementation, knobs)
        )
      )
  return results


def _check(got, want):
  assert op_cases.distance(got[0], want[0]) <= FORWARD
  for x, y in zip(got[1], want[1], strict=True):
    assert op_cases.distance(x, y) <= GRADIENT


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
@pytest.mark.parametrize("phi", ACTIVATIONS)
def test_outputs_state_and_all_gradients_equal_the_definition(phi, chunk_size, rho):
  # f and phi_out take the other activations in turn; phi's own eps as the layer sets it.
  at = ACTIVATIONS.index(phi)
  knobs = dict(
    phi=phi,
    f=ACTIVATIONS[(at + 1) % 5],
    phi_out=ACTIVATIONS[(at + 2) % 5],
    eps=1e-3,
    chunk_size=chunk_size,
    outer_gradient=rho,
  )
  _check(*_both(knobs, with_state=True, segment_ids=op_cases.packed()))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("phi", ACTIVATIONS)
def test_linearised_chunks_equal_the_definition(phi, rho):
  knobs = dict(phi=phi, eps=1e-3, chunk_size=5, outer_gradient=rho, curvature=0.7)
  _check(*_both(knobs, with_state=True, segment_ids=op_cases.packed()))


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_linearised_chunks_from_a_fresh_memory(chunk_size):
  knobs = dict(chunk_size=chunk_size, curvature=1.0)
  _check(*_both(knobs, with_state=False, segment_ids=None))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_linearised_chunks_of_linear_phi_are_the_exact_recurrence(implementation):
  arrays, memory = op_cases.inputs(dtype=np.float32)

  @functools.partial(jax.jit, static_argnames=("chunk_size", "curvature"))
  def run(chunk_size, curvature):
    def loss(arrays, memory):
      o, state = trellis(
        *arrays,
        initial_memory=memory,
        phi="identity",
        chunk_size=chunk_size,
        curvature=curvature,
        implementation=implementation,
      )
      out = (o, state.memory_k, state.memory_v)
      return op_cases.scalar(*out), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays, memory)

  exact, stale = run(1, 0.0), run(16, 0.0)
  for chunk_size in (5, 16):
    assert op_cases.distance(run(chunk_size, 1.0), exact) <= 1e-5
  assert op_cases.distance(stale, exact) > 1e-2


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
def test_one_document_from_a_fresh_memory(chunk_size):
  _check(*_both(dict(chunk_size=chunk_size), with_state=False, segment_ids=None))


def test_the_regimes_of_the_outer_gradient_differ_and_their_forwards_are_bit_equal():
  arrays, memory = op_cases.inputs(dtype=np.float32)
  run = lambda rho: op_cases.value_and_grads(
    arrays, memory, None, None, "xla", (("chunk_size", 16), ("outer_gradient", rho))
  )
  (full, full_grads), (half, half_grads), (first, first_grads) = map(run, (1.0, 0.5, 0.0))
  for x, y, z in zip(*map(jax.tree.leaves, (full, half, first)), strict=True):
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(x, z)
  # Keys reach the loss through z too, so every regime has its own gradient.
  assert op_cases.distance(full_grads[1], half_grads[1]) > 1e-2
  assert op_cases.distance(half_grads[1], first_grads[1]) > 1e-2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_erasing_gates_and_tiny_decays_are_finite_and_equal(implementation):
  knobs = (("chunk_size", 16),)
  arrays, memory = op_cases.inputs(dtype=np.float32)
  gates = np.array(arrays[4])
  gates[:, ::7], gates[:, 3::5] = -np.inf, np.log(1e-6)
  arrays = (*arrays[:4], jnp.asarray(gates), arrays[5])
  got = op_cases.value_and_grads(arrays, memory, None, None, implementation, knobs)
  want = op_cases.value_and_grads(arrays, memory, None, None, "reference", knobs)
  _check(jax.device_get(got), jax.device_get(want))


def test_an_empty_memory_with_a_tiny_phi_eps_has_finite_gradients():
  arrays, _ = op_cases.inputs(dtype=np.float32)
  knobs = (("chunk_size", 16), ("phi_eps", 1e-5))
  result, grads = op_cases.value_and_grads(arrays, None, None, None, "xla", knobs)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((result, grads)))


def test_bf16_inputs_stay_close_and_the_state_is_fp32():
  arrays, memory = op_cases.inputs(t=64, d=16, v=16, m=16, dtype=np.float32)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays[:4])
  want, _ = trellis(*arrays, initial_memory=memory, implementation="xla")
  got, state = trellis(*low, *arrays[4:], initial_memory=memory, implementation="xla")
  assert got.dtype == jnp.bfloat16 and state.memory_k.dtype == jnp.float32
  assert op_cases.distance(got, want) <= 2e-2


def test_causality_by_gradients():
  arrays, memory = op_cases.inputs(t=40, dtype=np.float32)

  def early(arrays):
    return jnp.sum(trellis(*arrays, initial_memory=memory, implementation="xla")[0][:, :21] ** 2)

  for grad in jax.grad(early)(arrays):
    assert np.all(np.asarray(grad[:, 21:]) == 0)
    assert np.any(np.asarray(grad[:, :21]) != 0)
