"""Unit slots: chunks equal the token loop, splits equal one pass, slots stay on the sphere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from trellis_jax.ops import lattice as op
from trellis_jax.ops.token_loop import token_loop

jax.config.update("jax_numpy_rank_promotion", "raise")

B, T, H, M, V = 2, 21, 2, 4, 3
# Row 0 restarts inside chunks and ends early, row 1 restarts at 16 and is full.
RUN = np.asarray([[0] * 5 + [1] * 2 + [2] * 14, [0] * 16 + [1] * 5], np.int32)
COUNT = np.asarray([18, 21], np.int32)


def _inputs(dtype=np.float64, t=T):
  """Returns (slots, q, k, v, step)."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  tokens = [unit(normal(B, t, H, n)) for n in (M, M, V)]
  return normal(H, M, V), *tokens, 0.3 * jax.nn.sigmoid(normal(B, t, H))


def _chunked(x, chunk_size, run=None, count=None, state=None, at=slice(None)):
  tokens = (a[:, at] for a in x[1:])
  run = None if run is None else run[:, at]
  return op.lattice(x[0], *tokens, state=state, run=run, count=count, chunk_size=chunk_size)


def _loop(x, chunk_size, run=None, count=None):
  slots, q, *written = x
  slots, (b, t) = op.unit(slots), q.shape[:2]
  live = jnp.arange(t)[None] < (jnp.full((b,), t) if count is None else count)[:, None]
  start = jnp.broadcast_to(slots[None], (b, *slots.shape))
  run = jnp.zeros((b, t), jnp.int32) if run is None else run
  return token_loop(op.definition, None, start, slots, tuple(written), q, run, live, chunk_size)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _outputs_and_grads(form, x, chunk_size, run, count):
  def scalar(x):
    out, end = form(x, chunk_size, run, count)
    memory = end.memory if form is _chunked else end
    return op_cases.scalar(out, memory), (out, memory)

  return jax.value_and_grad(scalar, has_aux=True)(x)


@pytest.mark.parametrize(("chunk_size", "packed"), [(1, True), (4, True), (16, False)])
def test_chunks_equal_the_token_loop(chunk_size, packed):
  run, count = (jnp.asarray(RUN), jnp.asarray(COUNT)) if packed else (None, None)
  with jax.enable_x64(True):
    x = _inputs()
    (_, want), want_grads = _outputs_and_grads(_loop, x, chunk_size, run, count)
  x = jax.tree.map(lambda a: a.astype(jnp.float32), x)
  (_, got), grads = _outputs_and_grads(_chunked, x, chunk_size, run, count)
  assert op_cases.distance(got, want) <= 1e-5
  assert op_cases.distance(grads, want_grads) <= 1e-4


@functools.partial(jax.jit, static_argnums=(2,))
def _pieces_and_grads(x, run, splits):
  """As `_outputs_and_grads` for C = 4, in pieces that go on from each other's states."""

  def scalar(x):
    outs, state = [], None
    for start, stop in zip((0, *splits), (*splits, T)):
      # Run numbers count from the state's run.
      entered = None if run is None else run - (run[:, start - 1 : start] if start else 0)
      out, state = _chunked(x, 4, entered, None, state, slice(start, stop))
      outs.append(out)
    result = jnp.concatenate(outs, axis=1), state
    return op_cases.scalar(*result), result

  return jax.value_and_grad(scalar, has_aux=True)(x)


def test_any_split_is_one_pass():
  run, splits = jnp.asarray(RUN), (1, 4, 15)
  x = _inputs(np.float32)
  (_, want), want_grads = _pieces_and_grads(x, run, ())
  (_, got), grads = _pieces_and_grads(x, run, splits)
  assert op_cases.distance(got, want) <= 1e-5
  assert op_cases.distance(grads, want_grads) <= 1e-4


def test_slots_stay_on_the_sphere_over_long_sequences():
  out, state = jax.jit(lambda x: _chunked(x, 16))(_inputs(np.float32, t=4096))
  assert np.all(np.isfinite(out))
  np.testing.assert_allclose(np.linalg.norm(state.memory, axis=-1), 1, atol=1e-6)


def test_a_slot_takes_only_what_is_orthogonal_to_it():
  slots, _, k, v, step = _inputs(np.float32, t=1)
  slots = op.unit(slots)
  _, state = op.lattice(slots, k, k, v, step, chunk_size=1)
  # The value's component along each slot changes nothing: add some, for a code of one slot.
  one = jnp.zeros_like(k).at[..., 2].set(1.0)
  along = v + 3 * slots[None, None, :, 2]
  first, second = (op.lattice(slots, one, one, u, step, chunk_size=1)[1].memory for u in (v, along))
  assert op_cases.distance(second, first) <= 1e-6
  assert op_cases.distance(state.memory, first) > 1e-3
