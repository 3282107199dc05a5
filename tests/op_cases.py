"""Random inputs of the op, and the distance between two results, shared by its tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from trellis_jax import TrellisState, trellis


def inputs(b=2, t=37, h=3, d=5, v=7, m=6, seed=0, dtype=np.float64):
  """Returns ((q, k, v, alpha, log_beta, gamma), (S_k, S_v)) with M != D != V and odd T."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  arrays = (
    normal(b, t, h, d) * d**-0.5,
    normal(b, t, h, d) * d**-0.5,
    normal(b, t, h, v) * v**-0.5,
    normal(b, t, h, m),
    -0.2 * np.abs(normal(b, t, h)),
    0.2 / (1 + np.exp(-normal(b, t, h))),
  )
  memory = (0.5 * normal(h, m, d), 0.5 * normal(h, m, v))
  cast = lambda x: jnp.asarray(x, dtype)
  return jax.tree.map(cast, arrays), jax.tree.map(cast, memory)


def state(arrays, chunk_size, seed=1):
  """Returns a state that rows could be in: midway in a chunk (row 0) and at its start (row 1)."""
  rng = np.random.default_rng(seed)
  q, _, v, alpha = arrays[:4]
  (b, _, h, d), m, dtype = q.shape, alpha.shape[-1], q.dtype
  normal = lambda n: jnp.asarray(0.5 * rng.normal(size=(b, h, m, n)), dtype)
  s_k, s_v, a_k, a_v = normal(d), normal(v.shape[-1]), normal(d), normal(v.shape[-1])
  offset = jnp.asarray([min(3, chunk_size - 1), 0], jnp.int32)
  if chunk_size == 1:
    a_k = a_v = None
  else:
    at_start = (offset == 0)[:, None, None, None]
    a_k, a_v = jnp.where(at_start, s_k, a_k), jnp.where(at_start, s_v, a_v)
  return TrellisState(s_k, s_v, a_k, a_v, offset, jnp.asarray([1, 7], jnp.int32))


def packed(t=37):
  """Returns segment ids [2, T]: restarts inside chunks, padding in front, between and behind."""
  rows = ([1] * 5 + [0] * 3 + [2] * 9 + [3] * 14, [0] * 4 + [7] * 23 + [8] * 7)
  return jnp.asarray([r + [0] * (t - len(r)) for r in rows], jnp.int32)


def single_tokens(implementation, arrays, memory, segment_ids, **knobs):
  """Returns ((o, final state), gradients by inputs and state) of one call a token, C = 16."""

  def token(state, xs):
    *x, ids = (x[:, None] for x in xs)
    options = dict(initial_memory=memory, initial_state=state, segment_ids=ids, chunk_size=16)
    o, state = trellis(*x, **options, implementation=implementation, **knobs)
    return state, o[:, 0]

  def loss(arrays, state):
    time_major = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (*arrays, segment_ids))
    state, o = jax.lax.scan(token, state, time_major)
    return scalar(o, state), (o, state)

  state = TrellisState.fresh(memory, segment_ids.shape[0], 16)
  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
  (_, out), grads = run(arrays, state)
  return out, [x for x in jax.tree.leaves(grads) if x.dtype != jax.dtypes.float0]


def scalar(*outputs):
  """Returns a smooth number that depends on every float of the outputs, such as (o, final state).

  The phases are small, so that fp32 holds their sines to its own precision in long arrays too.
  """
  total = 0.0
  for i, x in enumerate(jax.tree.leaves(outputs)):
    if jnp.issubdtype(x.dtype, jnp.floating):
      x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1)
      total = total + jnp.sum(jnp.sin(x * (1 + 0.1 * i) + jnp.arange(x.size) % 13))
  return total


@functools.partial(jax.jit, static_argnames=("implementation", "knobs"))
def value_and_grads(arrays, memory, state, segment_ids, implementation, knobs):
  """Returns ((o, final state), the gradients of `scalar` of them by every float that goes in).

  knobs: the op's other arguments, as a sorted tuple of pairs.
  """

  def loss(arrays, memory, state):
    out = trellis(
      *arrays,
      initial_memory=memory,
      initial_state=state,
      segment_ids=segment_ids,
      implementation=implementation,
      **dict(knobs),
    )
    return scalar(*out), out

  run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)
  (_, out), grads = run(arrays, memory, state)
  return out, [x for x in jax.tree.leaves(grads) if x.dtype != jax.dtypes.float0]


def distance(x, y):
  """Returns the largest |x - y| / |y| over a pytree's leaves, in the l2 norm of each leaf."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.all(np.isfinite(a)), "not finite"
    scale = np.linalg.norm(b)
    worst = max(worst, np.linalg.norm(a - b) / scale if scale else np.linalg.norm(a))
  return worst
