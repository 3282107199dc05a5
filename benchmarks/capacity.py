"""What memories of one size hold before any training: pairs, written once and then asked for.

    python -m benchmarks.capacity

A pair is a random key, unit(silu(.)) as the mixers make them, and a random token with its value
and code, which are random maps of it. n pairs are written one after another, nothing is forgotten,
then each key is asked for. A code is right when f(S_k k) is nearer to it (by cosine) than to the
others of the row, a value when the read is. All tokens of a row write with one step, the best of
STEPS for each number. Writes results/capacity.md.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tabulate

from experiments import provenance
from trellis_jax import nn, trellis
from trellis_jax.mixers.trellis import Config, targets
from trellis_jax.ops import activations
from trellis_jax.ops.affine import affine

RESULTS = pathlib.Path(__file__).parent / "results" / "capacity.md"
STEPS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
PAIRS, ROWS, WIDTH = (16, 32, 64), 64, 128
# Numbers of a head's memories: those of Gated DeltaNet in a model of two heads and width 128.
KEYS, VALUES = 48, 96
SHAPES = ((24, 96, 96), (32, 48, 96), (36, 64, 64), (48, 48, 48), (64, 36, 36))


READINGS = {
  "the default": Config(),
  "phi_eps 1/4": Config(phi_eps=0.25),
  "phi_eps 4": Config(phi_eps=4.0),
  "L2-SiLU": Config(phi="l2_silu", f="l2_silu"),
  "no f": Config(f="identity"),
  "softmax for f": Config(f="softmax"),
  "linear phi, layer-normed targets": Config(phi="identity", target="layer_norm"),
}


class Pairs(NamedTuple):
  """Keys [B, n, D] of length 1, values [B, n, V] and maps of the tokens to codes [B, n, M]."""

  keys: jax.Array
  values: jax.Array
  codes: jax.Array


def pairs(rows: int, n: int, shape: tuple[int, int, int], seed: int = 0) -> Pairs:
  """Returns random pairs for memories of `shape` (M, D, V)."""
  slots, key_dim, value_dim = shape
  key, token, *maps = jax.random.split(jax.random.key(seed), 4)
  x = jax.random.normal(token, (rows, n, WIDTH)) * WIDTH**-0.5
  values, codes = (
    x @ jax.random.normal(k, (WIDTH, size)) for k, size in zip(maps, (value_dim, slots))
  )
  keys = nn.unit(jax.nn.silu(jax.random.normal(key, (rows, n, key_dim))))
  return Pairs(keys, values, codes)


@functools.partial(jax.jit, static_argnames="c")
def two_passes(c: Config, x: Pairs, step: float) -> tuple[jax.Array, jax.Array]:
  """Returns the shares of codes and of values that are right, with the exact recurrence."""
  values, codes = nn.unit(x.values, c.v_eps), targets(c, x.codes)
  head = lambda y: y[:, :, None]
  gates = jnp.ones((*x.keys.shape[:2], 1))
  knobs = dict(phi=c.phi, phi_eps=c.phi_eps, f=c.f, phi_out=c.phi_out, eps=c.eps, chunk_size=1)
  arrays = map(head, (x.keys, x.keys, values, codes))
  _, state = trellis(*arrays, 0 * gates, step * gates, **knobs)
  asked = jnp.einsum("bnd,bmd->bnm", x.keys, state.memory_k[:, 0])
  code = activations.activate(c.f, c.eps, asked)
  read = jnp.einsum("bnm,bmv->bnv", code, state.memory_v[:, 0])
  read = activations.activate(c.phi_out, c.eps, read)
  return right(code, codes), right(read, values)


@jax.jit
def delta_rule(x: Pairs, step: float) -> jax.Array:
  """Returns the share of values that are right; values have a SiLU, as those of DeltaNet do."""
  values = jax.nn.silu(x.values)
  head = lambda y: y[:, :, None]
  beta = jnp.full((*x.keys.shape[:2], 1), step)
  keys = head(x.keys)
  _, state = affine(keys, keys, step * head(values), beta=beta)
  return right(jnp.einsum("bnd,bdv->bnv", x.keys, state[:, 0]), values)


def right(read: jax.Array, stored: jax.Array) -> jax.Array:
  """Returns the share of rows of `read` [B, n, W] that are nearest to their own of `stored`."""
  near = jnp.einsum("bnw,bsw->bns", nn.unit(read), nn.unit(stored))
  return jnp.mean(jnp.argmax(near, axis=-1) == jnp.arange(stored.shape[1])[None])


def table(rows: int = ROWS, numbers: tuple[int, ...] = PAIRS) -> Iterator[list]:
  """Yields (name, M, D, V, then for each number of pairs the share of codes, of values)."""
  cell = lambda share: f"{share:.2f}"
  best = lambda shares: cell(max(float(share) for share in shares if share == share))
  line = ["delta rule", "", KEYS, VALUES]
  for n in numbers:
    x = pairs(rows, n, (1, KEYS, VALUES))
    line += ["", best(delta_rule(x, step) for step in STEPS if step <= 1)]
  yield line
  for name, config in READINGS.items():
    everywhere = name in ("the default", "linear phi, layer-normed targets")
    for shape in SHAPES if everywhere else ((32, KEYS, VALUES),):
      line = [name, *shape]
      for n in numbers:
        x = pairs(rows, n, shape)
        shares = zip(*(two_passes(config, x, step) for step in STEPS))
        line += [best(share) for share in shares]
      yield line


def main() -> None:
  """Prints and writes the table."""
  columns = ["reading", "M", "D", "V"]
  columns += [f"{n} pairs: {what}" for n in PAIRS for what in ("codes", "values")]
  text = "    python -m benchmarks.capacity\n\n"
  text += f"Memories of {KEYS * VALUES:,} numbers, {ROWS} rows, tokens {WIDTH} wide. The share of "
  text += "pairs that come back\nright, before any training; see benchmarks/capacity.py.\n\n"
  text += tabulate.tabulate(table(), columns, tablefmt="github", disable_numparse=True) + "\n"
  provenance.write(RESULTS, text)
  print(text)


if __name__ == "__main__":
  main()
