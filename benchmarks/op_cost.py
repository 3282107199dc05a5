"""What the op costs on this machine's CPU: growth with T, against the definition, against autodiff.

    python -m benchmarks.op_cost

Times are medians of paired runs (the two sides take turns), so that only their ratio counts on a
shared machine. Temporary memory is what the compiler plans. Writes results/op_cost.md.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from benchmarks import timing
from experiments import provenance
from trellis_jax import trellis
from trellis_jax.ops import activations, chunked, evolve
from trellis_jax.ops.spec import Spec

RESULTS = pathlib.Path(__file__).parent / "results" / "op_cost.md"
C = 16


def inputs(b: int, t: int, h: int, d: int, m: int):
  """Random inputs of the op, of the sizes a trained layer has."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  q, k, v = (unit(normal(b, t, h, d)) for _ in range(3))
  gates = -0.02 * jnp.abs(normal(b, t, h)), jax.nn.sigmoid(normal(b, t, h)) / C
  return (q, k, v, normal(b, t, h, m), *gates)


def step(implementation: str, chunk_size: int = C, curvature: float = 0.0) -> Callable:
  """Forward and backward of the op."""
  knobs = dict(chunk_size=chunk_size, curvature=curvature)
  call = functools.partial(trellis, implementation=implementation, **knobs)
  loss = lambda x: jnp.sum(call(*x)[0] ** 2)
  return jax.jit(jax.grad(loss))


def autodiff() -> Callable:
  """Forward and backward of the same scan, differentiated by JAX alone."""

  def loss(x):
    (b, _, h, d), m, v = x[0].shape, x[3].shape[-1], x[2].shape[-1]
    init = jnp.zeros((h, m, d)), jnp.zeros((h, m, v))
    start = jax.tree.map(lambda s: jnp.zeros((b, *s.shape)), init)
    rows = chunked.Rows(None, jnp.zeros((b,), jnp.int32))
    plain = lambda name, eps, z: activations.apply(name, z, eps)
    with (
      mock.patch.object(evolve, "evolve", evolve.evolve.fun),
      mock.patch.object(activations, "activate", plain),
    ):
      spec = Spec(chunk_size=C).check()
      o, *_ = chunked.forward(spec, chunked.Inputs(*x), start, init, rows, True)
    return jnp.sum(o**2)

  return jax.jit(jax.grad(loss))


def compare(name: str, slow, fast, rounds: int) -> list:
  """A row: the two sides' times and temporary memories, and the ratios slow / fast."""
  temp = [f.lower(x).compile().memory_analysis().temp_size_in_bytes / 1e6 for f, x in (slow, fast)]
  sides = {side: functools.partial(*pair) for side, pair in (("slow", slow), ("fast", fast))}
  seconds = tuple(timing.turns(sides, rounds).values())
  ratios = seconds[0] / seconds[1], temp[0] / temp[1]
  return [name, *(1e3 * s for s in seconds), ratios[0], *temp, ratios[1]]


def rows() -> list[list]:
  """The table's rows on the cores that this process may use."""
  short, long = inputs(1, 2048, 4, 64, 64), inputs(1, 16384, 4, 64, 64)
  xla = step("xla")
  found = [compare("T = 16,384 / T = 2,048 (B 1, H 4, D V M 64)", (xla, long), (xla, short), 9)]
  for b, h, d in ((1, 4, 64), (1, 2, 128)):
    x = inputs(b, 2048, h, d, d)
    size = f"(B {b}, H {h}, D V M {d}, T 2,048)"
    found.append(compare(f"reference / xla {size}", (step("reference"), x), (xla, x), 3))
    found.append(compare(f"plain autodiff / xla {size}", (autodiff(), x), (xla, x), 9))
    found.append(compare(f"exact, C = 1 / C = {C} {size}", (step("xla", 1), x), (xla, x), 9))
    for c in (C, 64):
      both = (step("xla", c, 1.0), x), (step("xla", c), x)
      found.append(compare(f"linearised / stale, C = {c} {size}", *both, 9))
  return found


def on_cores(count: int) -> list[list]:
  """The rows on `count` cores, in a process of its own: threads are counted when JAX starts."""
  program = "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:%d])\n"
  program += "import json; from benchmarks import op_cost; print(json.dumps(op_cost.rows()))"
  done = subprocess.run(
    [sys.executable, "-c", program % count], cwd=provenance.ROOT, stdout=subprocess.PIPE, check=True
  )
  return json.loads(done.stdout)


def main() -> None:
  """Prints and writes the table."""
  available = len(os.sched_getaffinity(0))
  body = [[n, *row] for n in dict.fromkeys((1, available)) for row in on_cores(n)]
  columns = ["cores", "forward + backward", "ms", "ms", "ratio", "temp MB", "temp MB", "ratio"]
  table = tabulate.tabulate(body, columns, tablefmt="github", floatfmt=".1f")
  text = f"    python -m benchmarks.op_cost\n\n{provenance.machine()}; fp32, C = {C}.\n\n{table}\n"
  provenance.write(RESULTS, text)
  print(text)


if __name__ == "__main__":
  main()
