"""Widths that a backend does not have, filled up with zeros to those that it has.

Exact: a key's and a value's zeros write zeros into the memory's columns, where nothing else is
written, and the read's features there are cut off.
"""

import jax
import jax.numpy as jnp


def over(run, widths: tuple[int, int], inputs, start, init, rows):
  """Returns `run(inputs, start, init, rows)`: (o, end, kept) of a backend, see `ops/chunked.py`.

  Args:
    run: what is called with the filled arrays.
    widths: of keys and of values there.
    inputs, start, init, rows: as they are.
  """
  own = inputs.q.shape[-1], inputs.v.shape[-1]
  if own == widths:
    return run(inputs, start, init, rows)
  fill = lambda x, n: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - x.shape[-1])])
  pair = lambda memories: tuple(fill(s, n) for s, n in zip(memories, widths))
  q, k, v = (fill(x, n) for x, n in zip(inputs[:3], (widths[0], *widths)))
  o, *memories = run(inputs._replace(q=q, k=k, v=v), pair(start), pair(init), rows)
  cut = lambda x, n: jax.lax.slice_in_dim(x, 0, n, axis=-1)
  return cut(o, own[1]), *(tuple(cut(s, n) for s, n in zip(m, own)) for m in memories)
