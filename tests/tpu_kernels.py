"""The TPU kernels on any machine: cases, interpreters, what they are compared with."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu_plan
from trellis_jax import trellis
from trellis_jax.ops import trellis as op

FORWARD, GRADIENT, BF16 = 2e-5, 2e-4, 1e-2
# Memory starts as NaN, and two unordered accesses to one place are reported.
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


@contextlib.contextmanager
def interpreted(how=True):
  """Runs the kernels in an interpreter; forgets what was traced for another one."""
  op._call.clear_cache()
  with _tpu_plan.interpreted(how):
    yield
  op._call.clear_cache()


def case(b=2, t=100, h=2, d=64, v=64, m=64, seed=0):
  """Returns fp32 (inputs, memory) of sizes that the kernels accept; the memory is not near 0."""
  return op_cases.inputs(b, t, h, d, v, m, seed, np.float32)


def segments(t: int):
  """Returns ids [2, T]: restarts inside chunks, padding in front, between and behind."""
  first = [1] * 21 + [0] * 3 + [2] * (t // 3) + [3] * 5
  second = [0] * 4 + [7] * (t // 2)
  rows = (first + [0] * (t - len(first)), second + [8] * (t - len(second)))
  return jnp.asarray(rows, jnp.int32)


def value_and_grads(implementation, arrays, memory, state=None, segment_ids=None, **knobs):
  """Returns ((o, final state), gradients by every float of inputs, memory and state)."""
  leaves, tree = jax.tree.flatten((arrays, memory, state))
  is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
  floats, ints = ([x for x, f in zip(leaves, is_float) if f == want] for want in (True, False))

  def loss(floats, ints):
    floats, ints = iter(floats), iter(ints)
    leaves = [next(floats) if f else next(ints) for f in is_float]
    arrays, memory, state = jax.tree.unflatten(tree, leaves)
    options = dict(initial_memory=memory, initial_state=state, segment_ids=segment_ids)
    out = trellis(*arrays, **options, implementation=implementation, **knobs)
    return op_cases.scalar(*out), out

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, result), grads = run(floats, ints)
  return jax.device_get((result, grads))
