"""Any split of a sequence is one pass; documents and padding do not leak."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax import trellis

jax.config.update("jax_numpy_rank_promotion", "raise")

T = 21


@functools.partial(jax.jit, static_argnames=("chunk_size", "curvature"))
def _run(arrays, memory, state, segment_ids, chunk_size, curvature=0.0):
  return trellis(
    *arrays,
    initial_memory=memory,
    initial_state=state,
    segment_ids=segment_ids,
    chunk_size=chunk_size,
    curvature=curvature,
    implementation="xla",
  )


def _cut(tree, at):
  return jax.tree.map(lambda x: x[:, at], tree)


def _ids():
  """Padding on both sides of the splits below, a restart, and two rows out of step."""
  rows = ([0] * 2 + [1] * 6 + [0] * 3 + [2] * 7 + [0] * 3, [4] * 9 + [5] * 12)
  return jnp.asarray(rows, jnp.int32)


def _in_pieces(arrays, memory, ids, chunk_size, splits, curvature=0.0):
  outs, state = [], None
  for start, stop in zip((0, *splits), (*splits, T)):
    at = slice(start, stop)
    piece = None if ids is None else ids[:, at]
    o, state = _run(_cut(arrays, at), memory, state, piece, chunk_size, curvature)
    outs.append(o)
  return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size, curvature", [(1, 0.0), (5, 0.0), (5, 1.0), (16, 0.0)])
@pytest.mark.parametrize("splits", [(1,), (7,), (16,), tuple(range(1, T))])
def test_any_split_is_exact(splits, chunk_size, curvature, packed):
  arrays, memory = op_cases.inputs(t=T, dtype=np.float32)
  ids = _ids() if packed else None
  whole = _run(arrays, memory, None, ids, chunk_size, curvature)
  pieces = _in_pieces(arrays, memory, ids, chunk_size, splits, curvature)
  assert op_cases.distance(pieces, whole) <= 1e-5


@pytest.mark.parametrize("chunk_size, curvature", [(1, 0.0), (16, 0.0), (16, 1.0)])
@pytest.mark.parametrize("splits", [(9,), (1, 2)])
def test_any_split_has_the_gradients_of_one_pass(splits, chunk_size, curvature):
  arrays, memory = op_cases.inputs(t=T, dtype=np.float32)

  @functools.partial(jax.jit, static_argnums=2)
  def grads(arrays, memory, splits):
    loss = lambda a, m: op_cases.scalar(*_in_pieces(a, m, _ids(), chunk_size, splits, curvature))
    return jax.grad(loss, argnums=(0, 1))(arrays, memory)

  got, want = grads(arrays, memory, splits), grads(arrays, memory, ())
  assert op_cases.distance(got, want) <= 1e-4


def test_documents_on_chunk_boundaries_are_what_they_are_alone():
  arrays, memory = op_cases.inputs(t=48, dtype=np.float32)
  ids = jnp.asarray([[1] * 16 + [2] * 32, [3] * 32 + [4] * 16], jnp.int32)
  o, _ = _run(arrays, memory, None, ids, 16)
  for row, start, stop in ((0, 0, 16), (0, 16, 48), (1, 0, 32), (1, 32, 48)):
    one = jax.tree.map(lambda x: x[row : row + 1, start:stop], arrays)
    alone, _ = _run(one, memory, None, None, 16)
    assert op_cases.distance(o[row : row + 1, start:stop], alone) <= 1e-6


@pytest.mark.parametrize("chunk_size", [1, 5, 16])
def test_padding_anywhere_is_as_if_it_were_not_there(chunk_size):
  arrays, memory = op_cases.inputs(b=1, t=T, dtype=np.float32)
  ids = _ids()[:1]
  live = np.flatnonzero(ids[0])
  o, state = _run(arrays, memory, None, ids, chunk_size)
  want, want_state = _run(_cut(arrays, live), memory, None, ids[:, live], chunk_size)
  assert np.all(np.asarray(_cut(o, np.flatnonzero(ids[0] == 0))) == 0)
  assert op_cases.distance(_cut(o, live), want) <= 1e-6
  assert op_cases.distance(state, want_state) <= 1e-6


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_padding_alone_leaves_the_state_as_it_was(chunk_size):
  arrays, memory = op_cases.inputs(t=7, dtype=np.float32)
  _, state = _run(arrays, memory, None, None, chunk_size)
  _, after = _run(arrays, memory, state, jnp.zeros((2, 7), jnp.int32), chunk_size)
  for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(x, y)


def test_no_gradient_crosses_a_document_boundary():
  arrays, memory = op_cases.inputs(t=T, dtype=np.float32)
  ids = jnp.asarray([[1] * 9 + [2] * 12] * 2, jnp.int32)
  second = lambda a: jnp.sum(_run(a, memory, None, ids, 5)[0][:, 9:] ** 2)
  for grad in jax.grad(second)(arrays):
    assert np.all(np.asarray(grad[:, :9]) == 0)
    assert np.any(np.asarray(grad[:, 9:]) != 0)
